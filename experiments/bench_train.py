"""What `python -m experiments.bench train` times: training steps and input gradients."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import npz_network, timing, torch_side
from experiments.bench_rows import BenchRow
from experiments.timing import Timed
from jdistill import attacks, data, losses, nets, parallel, train
from jdistill.typing import Array, Batch, LogitsFn

STEP, STEP_PEER = "step", "PyTorch's step"
GRADIENT, PGD, GRADIENT_PEER = "gradient", "pgd", "PyTorch's gradient"

# So small that no image is ever misclassified, or PGD would stop with it.
RESISTED_EPS = 1e-4


def compare(
    params: npz_network.Params,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    num_steps: int,
    batch_size: int,
    repeats: int,
    missing: str | None,
    after_call: Callable[[int, int], None] = lambda done, total: None,
) -> Timed:
    """Time calls of `num_steps` training steps, and of as many steps along an input gradient.

    Args:
        params: the weights of a `nets.ConvNet`, where all begin.
        inputs: `[N, H, W, C]`.
        labels: `[N]`.
        num_steps: steps of a call.
        batch_size: images a step: of those there are for training, the first that are classified
            correctly for the gradients.
        repeats: timed calls of each, in turn, after one that warms up.
        missing: why there is no PyTorch; None where there is.
        after_call: told how many calls are done, of how many.

    Raises:
        ValueError: the images are too few.
    """
    logits_fn = nets.logits_fn(
        npz_network.conv_net(params, inputs.shape[1:]),
        {"params": jax.tree.map(jnp.asarray, params)},
    )
    images, classes = npz_network.correct_images(logits_fn, inputs, labels, batch_size)
    batches = full_batches(inputs, labels, batch_size, num_steps)
    on_device = jnp.asarray(images), jnp.asarray(classes)
    our_steps = our_training(params, inputs.shape[1:])
    calls: dict[str, Callable[[], Any]] = {
        STEP: lambda: our_steps(batches),
        GRADIENT: lambda: np.asarray(ascend(logits_fn, *on_device, 0.1, num_steps=num_steps)),
        PGD: lambda: jax.block_until_ready(
            attacks.pgd(
                logits_fn, jax.random.key(0), *on_device, eps=RESISTED_EPS, num_steps=num_steps
            )
        ),
    }
    if missing is None:
        model = torch_side.torch_network(params)
        tensors = torch_side.torch_batch(images, classes)
        torch_batches = [torch_side.torch_batch(batch.inputs, batch.labels) for batch in batches]
        torch_steps = torch_training(params)
        calls[STEP_PEER] = lambda: torch_steps(torch_batches)
        calls[GRADIENT_PEER] = lambda: torch_ascend(model, *tensors, 0.1, num_steps=num_steps)
    return timing.interleaved(calls, repeats=repeats, after_call=after_call)


def rows(timed: Timed, *, num_steps: int, batch_size: int, missing: str | None) -> list[BenchRow]:
    """Of what `compare` gave: seconds a step."""
    fooled = int(np.sum(timed.results[PGD].success))
    stopped = f"{fooled} images were fooled, and stopped there" if fooled else ""
    compared = [
        (STEP, "training step, dropout on", STEP_PEER, 1.2, ""),
        (GRADIENT, "input gradient and sign step in a scan", GRADIENT_PEER, 0.95, ""),
        (PGD, "step of attacks.pgd that fools no image", GRADIENT_PEER, 0.95, stopped),
    ]
    return [
        BenchRow(
            f"{what}, batch {batch_size}",
            timed.timings[ours],
            "PyTorch",
            timed.timings.get(theirs),
            each=num_steps,
            target=target,
            note=missing or note,
        )
        for ours, what, theirs, target, note in compared
    ]


def full_batches(
    inputs: np.ndarray, labels: np.ndarray, batch_size: int, count: int
) -> list[Batch]:
    """That many batches, around and around the images and none of them padded.

    Raises:
        ValueError: the images are too few for one.
    """
    size = len(labels) // batch_size * batch_size
    if size == 0:
        raise ValueError(
            f"expected batch_size <= {len(labels)}, which is how many images there are, got "
            f"{batch_size}; pass a smaller one, or more images"
        )
    around = itertools.cycle(data.batches(inputs[:size], labels[:size], batch_size=batch_size))
    return list(itertools.islice(around, count))


def our_training(
    params: npz_network.Params,
    shape: tuple[int, ...],
    *,
    dropout_rate: float = 0.5,
    learning_rate: float = 0.01,
) -> Callable[[Sequence[Batch]], np.ndarray]:
    """A call that takes the steps of `train.fit`, goes on with the next call, gives the losses."""
    model = npz_network.conv_net(params, shape).clone(dropout_rate=dropout_rate)
    step = train.make_train_step(nets.apply_fn(model), train.sgd(learning_rate))
    compiled = parallel.compile_step(step)
    state = train.create_state(step, jax.tree.map(jnp.asarray, params), jax.random.key(0))
    loss_fn = train.hard_loss()

    def run(batches: Sequence[Batch]) -> np.ndarray:
        nonlocal state
        sums = []
        for batch in batches:
            state, metrics = compiled(state, batch, loss_fn)
            sums.append(metrics)
        jax.block_until_ready(state)
        return np.array([float(one["loss"] / one["count"]) for one in jax.device_get(sums)])

    return run


def scanned_training(
    params: npz_network.Params,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    num_steps: int,
    batch_size: int,
    dropout_rate: float = 0.5,
    learning_rate: float = 0.01,
) -> Callable[[], train.TrainState]:
    """A call that takes all steps in one program, its batches already on the device."""
    model = npz_network.conv_net(params, inputs.shape[1:]).clone(dropout_rate=dropout_rate)
    step = train.make_train_step(nets.apply_fn(model), train.sgd(learning_rate))
    state = train.create_state(step, jax.tree.map(jnp.asarray, params), jax.random.key(0))
    batches = full_batches(inputs, labels, batch_size, num_steps)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
    loss_fn = train.hard_loss()
    steps = jax.jit(
        lambda state, stacked: jax.lax.scan(
            lambda state, batch: (step(state, batch, loss_fn)[0], None), state, stacked
        )[0]
    )
    return lambda: jax.block_until_ready(steps(state, stacked))


def torch_training(
    params: npz_network.Params, *, dropout_rate: float = 0.5, learning_rate: float = 0.01
) -> Callable[[Sequence[tuple[Any, Any]]], np.ndarray]:
    """The same in eager PyTorch."""
    import torch

    model = torch_side.torch_network(params, dropout_rate=dropout_rate).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
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
    """The same in eager PyTorch."""
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
