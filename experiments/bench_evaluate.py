"""What `python -m experiments.bench evaluate` times: one call for a stack against single calls."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments import npz_network, timing
from experiments.bench_rows import BenchRow
from experiments.timing import Timing
from jdistill import attacks, evaluate, nets
from jdistill.typing import LogitsFn

SINGLES = "single calls"
LOOPED, VMAPPED = "one call, looped", "one call, vmapped"


def make_networks(params: npz_network.Params, shape: tuple[int, ...], count: int) -> list[LogitsFn]:
    """Networks of one architecture and of different weights: the file's, a little disturbed."""
    model = npz_network.conv_net(params, shape)
    draws = np.random.default_rng(0)

    def disturbed(leaf: np.ndarray) -> np.ndarray:
        noise = draws.normal(size=leaf.shape).astype(leaf.dtype)
        return leaf + 0.02 * leaf.std() * noise

    return [
        nets.logits_fn(model, {"params": jax.tree.map(disturbed, params)}) for _ in range(count)
    ]


def compare(
    networks: Sequence[LogitsFn],
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    num_steps: int,
    batch_size: int,
    repeats: int,
    after_call: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Timing]:
    """Time the whole evaluation of a stack: in one call, both ways, and network by network.

    Args:
        networks: alike in architecture.
        inputs: `[N, ...]`.
        labels: `[N]`.
        num_steps: of PGD.
        batch_size: examples at a time.
        repeats: timed calls of each way, in turn, after one that warms up.
        after_call: told how many calls are done, of how many.
    """
    plans = {
        "fgsm": evaluate.AttackPlan(functools.partial(attacks.fgsm, eps=0.1), None, batch_size),
        "pgd": evaluate.AttackPlan(
            functools.partial(attacks.pgd, eps=0.1, num_steps=num_steps), None, batch_size
        ),
    }
    stack = nets.stack(networks)
    singles = [nets.stack([network]) for network in networks]

    def run(which: LogitsFn, vmapped: bool) -> Any:
        key = jax.random.key(0)
        options: dict[str, Any] = {
            "attacks": plans,
            "key": key,
            "batch_size": batch_size,
            "vmapped": vmapped,
        }
        return evaluate.evaluate(which, inputs, labels, **options)

    calls: dict[str, Callable[[], Any]] = {
        SINGLES: lambda: [run(single, False) for single in singles],
        LOOPED: lambda: run(stack, False),
        VMAPPED: lambda: run(stack, True),
    }
    return timing.interleaved(calls, repeats=repeats, after_call=after_call).timings


def rows(timings: Mapping[str, Timing], *, num_networks: int, platform: str) -> list[BenchRow]:
    """One call both ways; the target is that of the way in which a stack is run by default."""
    default = LOOPED if platform == "cpu" else VMAPPED
    wanted = 0.25 if (num_networks, platform) == (9, "gpu") else None
    return [
        BenchRow(
            f"{num_networks} networks in {way}",
            timings[way],
            f"{num_networks} {SINGLES}",
            timings[SINGLES],
            target=wanted if way == default else None,
            peer_compiles=True,
        )
        for way in (LOOPED, VMAPPED)
    ]
