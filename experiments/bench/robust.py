"""Steps of adversarial training, beside the same in eager PyTorch."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import subjects, timing, torch_side
from experiments.bench.options import Options, command
from experiments.bench.rows import Row
from experiments.bench.subjects import Images, Params
from experiments.bench.timing import AfterCall, Calls
from experiments.bench.train import full_batches, stepping
from jdistill import attacks, nets, robust, train
from jdistill.typing import Batch

STEP, STEP_PEER = "step of adversarial training (PGD)", "PyTorch's step"
LEARNING_RATE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Robust(Options):
    """Step of adversarial training beside the same in eager PyTorch, on the CPU.

    The step is that of `train.fit` with `robust.adversarial(attacks.pgd)`: the attack from a random
    start, in evaluation mode, then SGD with Nesterov momentum on its inputs. Both have the papers'
    network with the same weights, as drawn: what a step takes does not depend on them. The images
    are digits of 28 x 28 pixels.
    """

    on_cpu: ClassVar[bool] = True

    widths: tuple[float, ...] = (1.0, 0.5)
    """Widths of the network, one each."""
    attack_steps: int = 10
    """Steps of PGD per training step."""
    eps: float = 0.3
    """Radius of the attack (linf)."""
    random_start: bool = True
    """Start the attack at random in the ball, and not at the images."""
    num_steps: int = 4
    """Training steps per timed call; the seconds printed are those of one step."""
    batch_size: int = 128
    """Images per step."""
    peers: bool = True
    """Time PyTorch beside us."""
    cpu_time: bool = False
    """Count the seconds that the process computes, and not those that pass: for a machine that has
    other work to do, and one core of it (`taskset -c 0 python -m ...`)."""


def run(options: Robust, after_call: AfterCall) -> Iterator[list[Row]]:
    """Rows of the command, a group for each width."""
    missing = (options.peers and torch_side.missing()) or ""
    images = subjects.digits((28, 28, 1)).all
    for width in options.widths:
        found = calls(options, width, images, beside_torch=options.peers and not missing)
        yield rows(options, width, found, missing, after_call)


def calls(options: Robust, width: float, images: Images, *, beside_torch: bool) -> Calls:
    """Calls of `num_steps` training steps, each going on from the one before.

    Args:
        options: the sizes.
        width: of the network.
        images: to train on.
        beside_torch: whether PyTorch does it, too.

    Raises:
        ValueError: the images are too few.
    """
    model = nets.mnist_net(width, dropout_rate=0.0)
    params, _ = nets.init(model, jax.random.key(0), images.inputs.shape[1:])
    held = jax.device_get(params)  # the step writes the new weights where these are
    batches = full_batches(images, options.batch_size, options.num_steps)
    our_steps = _steps(options, model, params)
    found: dict[str, Callable[[], Any]] = {STEP: lambda: our_steps(batches)}
    if beside_torch:
        torch_batches = [torch_side.torch_batch(batch.inputs, batch.labels) for batch in batches]
        torch_steps = _torch_steps(options, held)
        found[STEP_PEER] = lambda: torch_steps(torch_batches)
    return found


def _steps(
    options: Robust, model: nets.ConvNet, params: Params
) -> Callable[[Sequence[Batch]], np.ndarray]:
    attack = functools.partial(
        attacks.pgd,
        eps=options.eps,
        num_steps=options.attack_steps,
        random_start=options.random_start,
    )
    step = train.make_train_step(
        nets.apply_fn(model), train.sgd(LEARNING_RATE), objective=robust.adversarial(attack)
    )
    state = train.create_state(step, jax.tree.map(jnp.asarray, params), jax.random.key(0))
    return stepping(step, state, robust.on_adversarial(train.hard_loss)(1.0))


def _torch_steps(
    options: Robust, params: Params
) -> Callable[[Sequence[tuple[Any, Any]]], np.ndarray]:
    import torch

    model = torch_side.torch_network(params)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.9, nesterov=True)
    eps, step_size = options.eps, 2.5 * options.eps / options.attack_steps

    def attacked(inputs: Any, labels: Any) -> Any:
        model.requires_grad_(False)
        there = inputs
        if options.random_start:
            there = (inputs + torch.empty_like(inputs).uniform_(-eps, eps)).clamp(0, 1)
        for _ in range(options.attack_steps):
            there = there.detach().requires_grad_(True)
            loss = torch.nn.functional.cross_entropy(model(there), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, there)
            with torch.no_grad():
                there = there + step_size * gradient.sign()
                there = torch.clamp(torch.clamp(there, inputs - eps, inputs + eps), 0, 1)
        model.requires_grad_(True)
        return there

    def run(batches: Sequence[tuple[Any, Any]]) -> np.ndarray:
        found = []
        for inputs, labels in batches:
            there = attacked(inputs, labels)
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(there), labels)
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        return torch.stack(found).numpy()

    return run


def rows(
    options: Robust,
    width: float,
    calls: Calls,
    missing: str = "",
    after_call: AfterCall = lambda done, total: None,
) -> list[Row]:
    """Row of the calls, in seconds per step; the note says why PyTorch is missing."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    timed = timing.interleaved(calls, repeats=options.repeats, after_call=after_call, clock=clock)
    of_cpu = ", CPU time" if options.cpu_time else ""
    title = f"width {width:g}, {STEP}, {options.attack_steps} steps, batch {options.batch_size}"
    return [
        Row(
            f"{title}{of_cpu}",
            timed.timings[STEP],
            "PyTorch" if options.peers else "none",
            timed.timings.get(STEP_PEER),
            command(options),
            each=options.num_steps,
            target=1.0 if options.peers else None,
            note=missing,
        )
    ]
