"""What `python -m experiments.bench sweep` times: many runs as one program against one by one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import timing
from experiments.bench_rows import BenchRow
from experiments.timing import Timed
from jdistill import nets, sweep, train

LOOPED, VMAPPED, SINGLES = "looped", "vmapped", "one run at a time"


def compare(
    model: nets.ConvNet,
    input_shape: tuple[int, ...],
    *,
    num_temperatures: int,
    num_seeds: int,
    num_steps: int,
    batch_size: int,
    repeats: int,
    after_call: Callable[[int, int], None] = lambda done, total: None,
) -> Timed:
    """Time an epoch of one generation at every temperature and seed, as one program and run by run.

    The images are random: a step takes as long on any. Each result is the final weights.

    Args:
        model: the network.
        input_shape: of one image.
        num_temperatures: from 1 to 100 by equal factors.
        num_seeds: runs at each temperature.
        num_steps: of the epoch.
        batch_size: images a step.
        repeats: timed calls of each way, in turn, after one that warms up.
        after_call: told how many calls are done, of how many.
    """
    draws = np.random.default_rng(0)
    count = num_steps * batch_size
    inputs = draws.integers(0, 256, (count, *input_shape)).astype(np.float32) / np.float32(255)
    examples = inputs, draws.integers(0, model.num_classes, count)
    temperatures = np.repeat(np.geomspace(1, 100, num_temperatures), num_seeds).astype(np.float32)
    seeds = np.tile(np.arange(num_seeds), num_temperatures)
    keys = jax.vmap(jax.random.key)(seeds)
    params = nets.stack([nets.init(model, key, input_shape)[0] for key in keys])
    step = train.make_train_step(nets.apply_fn(model), train.sgd(0.01))
    stack = sweep.create_state(step, params, keys)
    singles = [nets.index(stack, run) for run in range(len(seeds))]
    options: dict[str, Any] = {"num_epochs": 1, "batch_size": batch_size}

    def together(vmapped: bool) -> Any:
        loss_fn = train.hard_loss(temperatures)
        state, _ = sweep.fit(step, stack, examples, loss_fn, vmapped=vmapped, **options)
        return jax.block_until_ready(state.params)

    def one_by_one() -> Any:
        losses = [train.hard_loss(temperature) for temperature in temperatures]
        states = [
            train.fit(step, state, examples, loss_fn, **options)
            for state, loss_fn in zip(singles, losses, strict=True)
        ]
        return jax.block_until_ready([state.params for state in states])

    calls: dict[str, Callable[[], Any]] = {
        LOOPED: functools.partial(together, False),
        VMAPPED: functools.partial(together, True),
        SINGLES: one_by_one,
    }
    return timing.interleaved(calls, repeats=repeats, after_call=after_call)


def rows(
    timed: Timed, *, num_temperatures: int, num_seeds: int, num_steps: int, platform: str
) -> list[BenchRow]:
    """Of what `compare` gave; the target is that of the way in which `sweep` runs by default."""
    targets = {(9, 1, "cpu"): 1.0, (9, 3, "gpu"): 0.15}
    default = LOOPED if platform == "cpu" else VMAPPED
    seeds = "seed" if num_seeds == 1 else "seeds"
    return [
        BenchRow(
            f"{num_temperatures} temperatures × {num_seeds} {seeds}, {num_steps} steps each, "
            f"one program, {way}",
            timed.timings[way],
            SINGLES,
            timed.timings[SINGLES],
            target=targets.get((num_temperatures, num_seeds, platform)) if way == default else None,
            peer_compiles=True,
        )
        for way in (LOOPED, VMAPPED)
    ]
