"""Evaluation of several networks in one call, beside one call each."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from experiments.bench import subjects, timing
from experiments.bench.options import NetworkOptions, command
from experiments.bench.rows import Row
from experiments.bench.subjects import Images, Params
from experiments.bench.timing import AfterCall, Calls
from jdistill import attacks, evaluate, nets
from jdistill.typing import LogitsFn

LOOPED, VMAPPED, SINGLES = "one call, looped", "one call, vmapped", "single calls"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate(NetworkOptions):
    """Evaluation of several networks in one call against one call each.

    Clean measures, FGSM and PGD. One call is timed both ways that a stack can be run: in a loop
    over its networks, which is the default on a CPU, and under `vmap`, the default elsewhere.
    """

    num_networks: int = 9
    """Networks: one network's weights, each time disturbed a little."""
    num_examples: int = 200
    """Images."""
    batch_size: int = 100
    """Images at a time."""
    num_steps: int = 10
    """Steps of PGD."""
    repeats: int = 3
    """Timed calls of each way, in turn, after one that warms up."""


def run(options: Evaluate, after_call: AfterCall) -> Iterator[list[Row]]:
    """Rows of the command."""
    params, images = subjects.load(options)
    networks = make_networks(params, images.inputs.shape[1:], options.num_networks)
    yield rows(options, calls(options, networks, images), after_call)


def make_networks(params: Params, input_shape: tuple[int, ...], count: int) -> list[LogitsFn]:
    """Networks of one architecture whose weights differ: these, a little disturbed."""
    draws = np.random.default_rng(0)

    def disturbed(leaf: np.ndarray) -> np.ndarray:
        noise = draws.normal(size=leaf.shape).astype(leaf.dtype)
        return leaf + 0.02 * np.std(leaf) * noise

    return [subjects.logits_fn(jax.tree.map(disturbed, params), input_shape) for _ in range(count)]


def calls(options: Evaluate, networks: Sequence[LogitsFn], images: Images) -> Calls:
    """Calls of the whole evaluation: of a stack in one call, both ways, and network by network."""
    size = options.batch_size
    pgd = functools.partial(attacks.pgd, eps=0.1, num_steps=options.num_steps)
    settings: dict[str, Any] = {
        "attacks": {
            "fgsm": evaluate.AttackPlan(functools.partial(attacks.fgsm, eps=0.1), None, size),
            "pgd": evaluate.AttackPlan(pgd, None, size),
        },
        "batch_size": size,
    }
    few = [column[: options.num_examples] for column in images]
    stack = nets.stack(networks)
    singles = [nets.stack([network]) for network in networks]

    def evaluated(stack: LogitsFn, vmapped: bool) -> Any:
        return evaluate.evaluate(stack, *few, key=jax.random.key(0), vmapped=vmapped, **settings)

    return {
        LOOPED: lambda: evaluated(stack, False),
        VMAPPED: lambda: evaluated(stack, True),
        SINGLES: lambda: [evaluated(single, False) for single in singles],
    }


def rows(
    options: Evaluate, calls: Calls, after_call: AfterCall = lambda done, total: None
) -> list[Row]:
    """Rows of the calls; the target is that of the way in which a stack is run by default."""
    timings = timing.interleaved(calls, repeats=options.repeats, after_call=after_call).timings
    platform = jax.default_backend()
    default = LOOPED if platform == "cpu" else VMAPPED
    wanted = 0.25 if (options.num_networks, platform) == (9, "gpu") else None
    return [
        Row(
            f"{options.num_networks} networks in {way}, {options.num_examples} images, "
            f"PGD of {options.num_steps} steps",
            timings[way],
            f"{options.num_networks} {SINGLES}",
            timings[SINGLES],
            command(options),
            target=wanted if way == default else None,
            peer_compiles=True,
        )
        for way in (LOOPED, VMAPPED)
    ]
