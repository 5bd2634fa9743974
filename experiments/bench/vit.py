"""Training steps and input gradients of a vision transformer, beside the same in PyTorch."""

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from experiments.bench import subjects, timing, torch_side
from experiments.bench.options import Options, command
from experiments.bench.rows import Row
from experiments.bench.subjects import Images
from experiments.bench.timing import AfterCall, Calls
from experiments.bench.train import (
    ascend,
    full_batches,
    stepping,
    torch_ascend,
    torch_stepping,
)
from jdistill import nets, train

STEP, STEP_PEER = "training step", "PyTorch's training step"
GRADIENT, GRADIENT_PEER = "input gradient and sign step in a scan", "PyTorch's gradient"
LEARNING_RATE = 0.01


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vit(Options):
    """Training step and input gradient of a `nets.ViT` beside the same in PyTorch, on the CPU.

    PyTorch's network is built of `torch.nn.TransformerEncoderLayer` with the same weights. The step
    is that of `train.fit`, SGD with Nesterov momentum; the gradient that of an attack's compiled
    loop, in a scan of sign steps that no image ends early. The weights are as drawn: what a step
    takes does not depend on them. The images are digits of 28 x 28 pixels.
    """

    on_cpu: ClassVar[bool] = True

    patch_sizes: tuple[int, ...] = (7, 4)
    """Sides of the patches, a network each: 16 and 49 patches."""
    width: int = 64
    """Size of a token."""
    depth: int = 4
    """Blocks."""
    num_heads: int = 4
    """Attention heads."""
    num_steps: int = 20
    """Steps per timed call; the seconds printed are those of one step."""
    batch_size: int = 128
    """Images per step."""
    peers: bool = True
    """Time PyTorch beside us."""
    cpu_time: bool = False
    """Count the seconds that the process computes, and not those that pass: for a machine that has
    other work to do, and one core of it (`taskset -c 0 python -m ...`)."""


def run(options: Vit, after_call: AfterCall) -> Iterator[list[Row]]:
    """Rows of the command, a group for each size of the patches."""
    missing = (options.peers and torch_side.missing()) or ""
    images = subjects.digits((28, 28, 1)).all
    for patch_size in options.patch_sizes:
        model = nets.ViT(patch_size, options.width, options.depth, options.num_heads)
        found = calls(options, model, images, beside_torch=options.peers and not missing)
        yield rows(options, model, found, missing, after_call)


def calls(options: Vit, model: nets.ViT, images: Images, *, beside_torch: bool) -> Calls:
    """Calls of `num_steps` training steps, and of as many steps along an input gradient.

    Args:
        options: the sizes.
        model: the network.
        images: to train on, and the first of them to attack.
        beside_torch: whether PyTorch does it, too.

    Raises:
        ValueError: the images are too few.
    """
    params, _ = nets.init(model, jax.random.key(0), images.inputs.shape[1:])
    held = jax.device_get(params)  # the step writes the new weights where these are
    step = train.make_train_step(nets.apply_fn(model), train.sgd(LEARNING_RATE))
    our_steps = stepping(step, train.create_state(step, params, jax.random.key(0)))
    batches = full_batches(images, options.batch_size, options.num_steps)
    logits_fn = nets.logits_fn(model, {"params": jax.tree.map(jnp.asarray, held)})
    first = Images(*(column[: options.batch_size] for column in images))
    on_device = [jnp.asarray(column) for column in first]
    num_steps = options.num_steps
    found: dict[str, Callable[[], Any]] = {
        STEP: lambda: our_steps(batches),
        GRADIENT: lambda: jax.block_until_ready(
            ascend(logits_fn, *on_device, 0.1, num_steps=num_steps)
        ),
    }
    if beside_torch:
        frozen = torch_side.torch_vit(held, model)
        tensors = torch_side.torch_batch(*first)
        torch_batches = [torch_side.torch_batch(batch.inputs, batch.labels) for batch in batches]
        torch_steps = torch_stepping(torch_side.torch_vit(held, model), LEARNING_RATE)
        found[STEP_PEER] = lambda: torch_steps(torch_batches)
        found[GRADIENT_PEER] = lambda: torch_ascend(frozen, *tensors, 0.1, num_steps=num_steps)
    return found


def rows(
    options: Vit,
    model: nets.ViT,
    calls: Calls,
    missing: str = "",
    after_call: AfterCall = lambda done, total: None,
) -> list[Row]:
    """Rows of the calls, in seconds per step; the note says why PyTorch is missing."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    timed = timing.interleaved(calls, repeats=options.repeats, after_call=after_call, clock=clock)
    of_cpu = ", CPU time" if options.cpu_time else ""
    return [
        Row(
            f"ViT, patches of {model.patch_size}, {name}, batch {options.batch_size}{of_cpu}",
            timed.timings[name],
            "PyTorch" if options.peers else "none",
            timed.timings.get(peer),
            command(options),
            each=options.num_steps,
            note=missing,
        )
        for name, peer in ((STEP, STEP_PEER), (GRADIENT, GRADIENT_PEER))
    ]
