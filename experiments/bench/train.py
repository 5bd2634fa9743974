"""Training steps and input gradients, beside the same in eager PyTorch."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import subjects, timing, torch_side
from experiments.bench.options import TorchOptions, command
from experiments.bench.rows import Row
from experiments.bench.subjects import Images, Params
from experiments.bench.timing import AfterCall, Calls
from jdistill import attacks, data, losses, nets, parallel, train
from jdistill.typing import Array, Batch, LogitsFn, LossFn

STEP, STEP_PEER = "training step, dropout on", "PyTorch's training step"
GRADIENT, GRADIENT_PEER = "input gradient and sign step in a scan", "PyTorch's gradient"
PGD = "step of attacks.pgd that fools no image"

# So small that no image is ever misclassified, or PGD would stop with it.
RESISTED_EPS = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Train(TorchOptions):
    """Training step and input gradient beside the same in eager PyTorch, on the CPU.

    The step is that of `train.fit`: dropout on, SGD with Nesterov momentum. The gradient is that
    of an attack's compiled loop, once in a scan of sign steps that no image ends early, and once
    in `attacks.pgd`, in a ball so small that no image is misclassified.
    """

    num_steps: int = 20
    """Steps per timed call; the seconds printed are those of one step."""
    batch_size: int = 128
    """Images per step."""


def run(options: Train, after_call: AfterCall) -> Iterator[list[Row]]:
    """Rows of the command."""
    params, images = subjects.load(options)
    missing = (options.peers and torch_side.missing()) or ""
    found = calls(options, params, images, beside_torch=options.peers and not missing)
    yield rows(options, found, missing, after_call)


def calls(options: Train, params: Params, images: Images, *, beside_torch: bool) -> Calls:
    """Calls of `num_steps` training steps, and of as many steps along an input gradient.

    Args:
        options: the sizes.
        params: weights of a `nets.ConvNet`, where all begin.
        images: to train on, and the first that are classified correctly to attack.
        beside_torch: whether PyTorch does it, too.

    Raises:
        ValueError: the images are too few.
    """
    num_steps = options.num_steps
    logits_fn = subjects.logits_fn(params, images.inputs.shape[1:])
    right = subjects.correct_images(logits_fn, images, options.batch_size)
    on_device = [jnp.asarray(column) for column in right]
    batches = full_batches(images, options.batch_size, num_steps)
    our_steps = our_training(params, images.inputs.shape[1:])
    found: dict[str, Callable[[], Any]] = {
        STEP: lambda: our_steps(batches),
        GRADIENT: lambda: jax.block_until_ready(
            ascend(logits_fn, *on_device, 0.1, num_steps=num_steps)
        ),
        PGD: functools.partial(resisted_pgd, logits_fn, *on_device, num_steps=num_steps),
    }
    if beside_torch:
        model = torch_side.torch_network(params)
        tensors = torch_side.torch_batch(*right)
        torch_batches = [torch_side.torch_batch(batch.inputs, batch.labels) for batch in batches]
        torch_steps = torch_training(params)
        found[STEP_PEER] = lambda: torch_steps(torch_batches)
        found[GRADIENT_PEER] = lambda: torch_ascend(model, *tensors, 0.1, num_steps=num_steps)
    return found


def rows(
    options: Train,
    calls: Calls,
    missing: str = "",
    after_call: AfterCall = lambda done, total: None,
) -> list[Row]:
    """Rows of the calls, in seconds per step; the note says why PyTorch is missing."""
    timed = timing.interleaved(calls, repeats=options.repeats, after_call=after_call)
    return [
        Row(
            f"{name}, batch {options.batch_size}",
            timed.timings[name],
            "PyTorch" if options.peers else "none",
            timed.timings.get(peer),
            command(options),
            each=options.num_steps,
            target=target if options.peers else None,
            note=missing or (fooled(timed.results[PGD]) if name == PGD else ""),
        )
        for name, peer, target in (
            (STEP, STEP_PEER, 1.2),
            (GRADIENT, GRADIENT_PEER, 0.95),
            (PGD, GRADIENT_PEER, 0.95),
        )
    ]


def resisted_pgd(
    logits_fn: LogitsFn, inputs: Array, labels: Array, *, num_steps: int
) -> attacks.AttackResult:
    """PGD that takes all its steps, since it fools no image."""
    key = jax.random.key(0)
    settings: dict[str, Any] = {"eps": RESISTED_EPS, "num_steps": num_steps}
    return jax.block_until_ready(attacks.pgd(logits_fn, key, inputs, labels, **settings))


def fooled(result: attacks.AttackResult) -> str:
    """Note on images that were fooled and did not take all steps."""
    count = int(np.sum(result.success))
    return f"images that were fooled, and stopped there: {count}" if count else ""


def full_batches(images: Images, batch_size: int, count: int) -> list[Batch]:
    """That many batches, around and around the images and none of them padded.

    Raises:
        ValueError: the images are too few for one.
    """
    there = len(images.labels)
    if there < batch_size:
        raise ValueError(
            f"expected batch_size <= {there}, which is how many images there are, got "
            f"{batch_size}; pass a smaller one, or more images"
        )
    whole = (column[: there // batch_size * batch_size] for column in images)
    around = itertools.cycle(data.batches(*whole, batch_size=batch_size))
    return list(itertools.islice(around, count))


def our_training(
    params: Params, input_shape: tuple[int, ...], **settings: float
) -> Callable[[Sequence[Batch]], np.ndarray]:
    """Steps of `train.fit`: each call goes on from the one before and gives the losses."""
    return stepping(*_training(params, input_shape, **settings))


def stepping(
    step: train.TrainStep, state: train.TrainState, loss_fn: LossFn | None = None
) -> Callable[[Sequence[Batch]], np.ndarray]:
    """Steps as `train.fit` takes them, from this state and then from where the last call ended."""
    compiled = parallel.compile_step(step)
    loss_fn = train.hard_loss() if loss_fn is None else loss_fn

    def run(batches: Sequence[Batch]) -> np.ndarray:
        nonlocal state
        sums = []
        for batch in batches:
            state, metrics = compiled(state, batch, loss_fn)
            sums.append(metrics)
        jax.block_until_ready(state)
        return np.array([float(one["loss"] / one["count"]) for one in jax.device_get(sums)])

    return run


def scanned_training(options: Train, params: Params, images: Images) -> Callable[[], Any]:
    """All steps in one program, its batches already on the device."""
    step, state = _training(params, images.inputs.shape[1:])
    batches = full_batches(images, options.batch_size, options.num_steps)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    loss_fn = train.hard_loss()

    def one(state: train.TrainState, batch: Batch) -> tuple[train.TrainState, None]:
        return step(state, batch, loss_fn)[0], None

    scan = jax.jit(functools.partial(jax.lax.scan, one))
    return lambda: jax.block_until_ready(scan(state, stacked))


def torch_training(
    params: Params, *, dropout_rate: float = 0.5, learning_rate: float = 0.01
) -> Callable[[Sequence[tuple[Any, Any]]], np.ndarray]:
    """Steps of `our_training` in eager PyTorch."""
    return torch_stepping(
        torch_side.torch_network(params, dropout_rate=dropout_rate), learning_rate
    )


def torch_stepping(
    model: Any, learning_rate: float
) -> Callable[[Sequence[tuple[Any, Any]]], np.ndarray]:
    """Steps of `stepping` in eager PyTorch, by SGD with Nesterov momentum."""
    import torch

    model = model.train().requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9, nesterov=True)

    def run(batches: Sequence[tuple[Any, Any]]) -> np.ndarray:
        found = []
        for images, classes in batches:
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(images), classes)
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found).numpy()

    return run


@functools.partial(jax.jit, static_argnames="num_steps")
def ascend(
    logits_fn: LogitsFn, inputs: Array, labels: Array, eps: float, *, num_steps: int
) -> Array:
    """Sign steps up the cross-entropy within a ball; no example stops, whatever it reaches."""

    def total(images: Array) -> Array:
        return jnp.sum(losses.cross_entropy(logits_fn(images), labels))

    def body(images: Array, _: None) -> tuple[Array, None]:
        moved = images + 2.5 * eps / num_steps * jnp.sign(jax.grad(total)(images))
        return jnp.clip(jnp.clip(moved, inputs - eps, inputs + eps), 0, 1), None

    return jax.lax.scan(body, inputs, None, length=num_steps)[0]


def torch_ascend(model: Any, inputs: Any, labels: Any, eps: float, *, num_steps: int) -> Any:
    """Sign steps of `ascend` in eager PyTorch."""
    import torch

    images = inputs
    for _ in range(num_steps):
        images = images.detach().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(model(images), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
        with torch.no_grad():
            moved = images + 2.5 * eps / num_steps * gradient.sign()
            images = torch.clamp(torch.clamp(moved, inputs - eps, inputs + eps), 0, 1)
    return images


def _training(
    params: Params,
    input_shape: tuple[int, ...],
    *,
    dropout_rate: float = 0.5,
    learning_rate: float = 0.01,
) -> tuple[train.TrainStep, train.TrainState]:
    model = subjects.conv_net(params, input_shape).clone(dropout_rate=dropout_rate)
    step = train.make_train_step(nets.apply_fn(model), train.sgd(learning_rate))
    return step, train.create_state(step, jax.tree.map(jnp.asarray, params), jax.random.key(0))
