"""Training and evaluation of many runs at once, beside one run at a time."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from experiments.bench import subjects, timing
from experiments.bench.options import NetworkOptions, Options, command
from experiments.bench.rows import Row
from experiments.bench.subjects import Images, Params
from experiments.bench.timing import AfterCall, Calls
from jdistill import attacks, evaluate, nets, sweep, train
from jdistill.sweep import _memory
from jdistill.typing import LogitsFn

MAPPED, VMAPPED, SINGLES = "as one, under lax.map", "as one, under vmap", "one at a time"
LOOPED = "as one, looped"  # an evaluation's, over networks in Python


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep(Options):
    """Training of all temperatures and seeds as one program against one run at a time.

    An epoch of one generation. The program is timed both ways: run after run under `lax.map`, which
    is the default on a CPU, and all runs at once under `vmap`, the default elsewhere. Megabytes are
    those of the largest program that a way compiles, by the compiler's own account.
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


def run_sweep(options: Sweep, after_call: AfterCall) -> Iterator[list[Row]]:
    """Rows of a sweep."""
    megabytes: dict[str, float] = {}

    def keep(way: str, size: int) -> None:
        megabytes[way] = size / 1e6

    calls = {
        way: _watched(call, functools.partial(keep, way))
        for way, call in sweep_calls(
            options, nets.mnist_net(width=options.width), (28, 28, 1)
        ).items()
    }
    grid = options.num_temperatures, options.num_seeds
    name = f"sweep of {grid[0]} temperatures and {grid[1]} seeds, {options.num_steps} steps each"
    targets = {(9, 1, "cpu"): 1.0, (9, 3, "gpu"): 0.15}
    found = rows(
        options,
        name,
        calls,
        {key[2]: targets[key] for key in targets if key[:2] == grid},
        after_call,
    )
    yield [
        row._replace(facts={"megabytes": [megabytes.get(way), megabytes.get(SINGLES)]})
        for way, row in zip((MAPPED, VMAPPED), found, strict=True)
    ]


def run_evaluate(options: Evaluate, after_call: AfterCall) -> Iterator[list[Row]]:
    """Rows of an evaluation."""
    params, images = subjects.load(options)
    networks = disturbed(params, images.inputs.shape[1:], options.num_networks)
    name = f"evaluation of {len(networks)} networks on {options.num_examples} images"
    targets = {"gpu": 0.25} if len(networks) == 9 else {}
    yield rows(options, name, evaluate_calls(options, networks, images), targets, after_call)


def rows(
    options: Options,
    name: str,
    calls: Calls,
    targets: Mapping[str, float],
    after_call: AfterCall = lambda done, total: None,
) -> list[Row]:
    """Rows of both ways; the platform's target is that of its default way.

    Args:
        options: of the command.
        name: of the work.
        calls: of both ways, and one at a time.
        targets: the largest ratios that are wanted, by platform.
        after_call: told how many calls are done, of how many.
    """
    timings = timing.interleaved(calls, repeats=options.repeats, after_call=after_call).timings
    platform = jax.default_backend()
    looped = LOOPED if LOOPED in calls else MAPPED
    default = looped if platform == "cpu" else VMAPPED
    return [
        Row(
            f"{name}, {way}",
            timings[way],
            SINGLES,
            timings[SINGLES],
            command(options),
            target=targets.get(platform) if way == default else None,
            peer_compiles=True,
        )
        for way in (looped, VMAPPED)
    ]


def sweep_calls(options: Sweep, model: nets.ConvNet, input_shape: tuple[int, ...]) -> Calls:
    """Calls of an epoch of every run on random images; each returns the final weights."""
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

    mapped, vmapped = functools.partial(together, False), functools.partial(together, True)
    return {MAPPED: mapped, VMAPPED: vmapped, SINGLES: one_by_one}


def _watched(call: Callable[[], Any], tell: Callable[[int], Any]) -> Callable[[], Any]:
    """The call, which tells the bytes of the largest program that it compiled."""

    def watched() -> Any:
        before = _programs()
        result = call()
        new = [program for program in _programs() if not any(program is one for one in before)]
        if new:
            tell(max(_memory.bytes_of(each.get_compiled_memory_stats()) for each in new))
        return result

    return watched


def _programs() -> list[Any]:
    """The compiled programs that are alive; JAX does not say which of them a call has made."""
    return jax.devices()[0].client.live_executables()


def disturbed(params: Params, input_shape: tuple[int, ...], count: int) -> list[LogitsFn]:
    """Networks of one architecture whose weights differ: these, a little disturbed."""
    draws = np.random.default_rng(0)

    def noisy(leaf: np.ndarray) -> np.ndarray:
        return leaf + 0.02 * np.std(leaf) * draws.normal(size=leaf.shape).astype(leaf.dtype)

    return [subjects.logits_fn(jax.tree.map(noisy, params), input_shape) for _ in range(count)]


def evaluate_calls(options: Evaluate, networks: Sequence[LogitsFn], images: Images) -> Calls:
    """Calls of the whole evaluation of a stack of networks, and network by network."""
    size = options.batch_size
    fgsm = functools.partial(attacks.fgsm, eps=0.1)
    pgd = functools.partial(attacks.pgd, eps=0.1, num_steps=options.num_steps)
    plans = {name: evaluate.AttackPlan(a, None, size) for name, a in (("fgsm", fgsm), ("pgd", pgd))}
    few = [column[: options.num_examples] for column in images]
    singles = [nets.stack([network]) for network in networks]

    def evaluated(stack: LogitsFn, vmapped: bool) -> Any:
        key = jax.random.key(0)
        return evaluate.evaluate(
            stack, *few, attacks=plans, key=key, batch_size=size, vmapped=vmapped
        )

    return {
        SINGLES: lambda: [evaluated(single, False) for single in singles],
        LOOPED: functools.partial(evaluated, nets.stack(networks), False),
        VMAPPED: functools.partial(evaluated, nets.stack(networks), True),
    }
