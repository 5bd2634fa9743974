"""Training of many runs as one program, beside one run at a time."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from experiments.bench import timing
from experiments.bench.options import Options, command
from experiments.bench.rows import Row
from experiments.bench.timing import AfterCall, Calls
from jdistill import nets, sweep, train

LOOPED, VMAPPED, SINGLES = "looped", "vmapped", "one run at a time"
# The largest ratios that are wanted, by temperatures, seeds and platform.
TARGETS = {(9, 1, "cpu"): 1.0, (9, 3, "gpu"): 0.15}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Options):
    """Training of all temperatures and seeds as one program against one run at a time.

    An epoch of one generation. The program is timed both ways: run after run inside the compiled
    loop, which is the default on a CPU, and all runs at once under `vmap`, the default elsewhere.
    """

    num_temperatures: int = 9
    """Temperatures, from 1 to 100 by equal factors."""
    num_seeds: int = 1
    """Runs at each temperature."""
    num_steps: int = 8
    """Steps of each run in a timed call."""
    batch_size: int = 128
    """Images per step."""
    width: float = 1.0
    """Of the papers' MNIST network: a factor on every number of channels and hidden units."""


def run(options: Sweep, after_call: AfterCall) -> Iterator[list[Row]]:
    """Rows of the command."""
    model = nets.mnist_net(width=options.width)
    yield rows(options, calls(options, model, (28, 28, 1)), after_call)


def calls(options: Sweep, model: nets.ConvNet, input_shape: tuple[int, ...]) -> Calls:
    """Calls of the epoch at every temperature and seed; each returns the final weights.

    The images are random: a step takes as long on any.

    Args:
        options: the sizes.
        model: the network.
        input_shape: of one image.
    """
    draws = np.random.default_rng(0)
    count = options.num_steps * options.batch_size
    inputs = draws.integers(0, 256, (count, *input_shape)).astype(np.float32) / np.float32(255)
    examples = inputs, draws.integers(0, model.num_classes, count)
    steps = np.geomspace(1, 100, options.num_temperatures).astype(np.float32)
    temperatures = np.repeat(steps, options.num_seeds)
    keys = jax.vmap(jax.random.key)(np.tile(np.arange(options.num_seeds), len(steps)))
    params = nets.stack([nets.init(model, key, input_shape)[0] for key in keys])
    step = train.make_train_step(nets.apply_fn(model), train.sgd(0.01))
    stack = sweep.create_state(step, params, keys)
    singles = [nets.index(stack, run) for run in range(len(keys))]
    settings: dict[str, Any] = {"num_epochs": 1, "batch_size": options.batch_size}

    def together(vmapped: bool) -> Any:
        loss_fn = train.hard_loss(temperatures)
        state, _ = sweep.fit(step, stack, examples, loss_fn, vmapped=vmapped, **settings)
        return jax.block_until_ready(state.params)

    def one_by_one() -> Any:
        losses = [train.hard_loss(temperature) for temperature in temperatures]
        states = [
            train.fit(step, state, examples, loss_fn, **settings)
            for state, loss_fn in zip(singles, losses, strict=True)
        ]
        return jax.block_until_ready([state.params for state in states])

    return {
        LOOPED: functools.partial(together, False),
        VMAPPED: functools.partial(together, True),
        SINGLES: one_by_one,
    }


def rows(
    options: Sweep, calls: Calls, after_call: AfterCall = lambda done, total: None
) -> list[Row]:
    """Rows of the calls; the target is that of the way in which `sweep` runs by default."""
    timed = timing.interleaved(calls, repeats=options.repeats, after_call=after_call)
    platform = jax.default_backend()
    default = LOOPED if platform == "cpu" else VMAPPED
    grid = options.num_temperatures, options.num_seeds
    return [
        Row(
            f"{grid[0]} temperatures × {grid[1]} {'seed' if grid[1] == 1 else 'seeds'}, "
            f"{options.num_steps} steps each, one program, {way}",
            timed.timings[way],
            SINGLES,
            timed.timings[SINGLES],
            command(options),
            target=TARGETS.get((*grid, platform)) if way == default else None,
            peer_compiles=True,
        )
        for way in (LOOPED, VMAPPED)
    ]
