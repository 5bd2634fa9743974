"""Times of `python -m experiments.device`, with the functions of `experiments.bench`.

Each function is a part of the run: it yields rows as dictionaries that JSON can hold.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import device_attacks
from experiments.bench import roofline as bench_roofline
from experiments.bench import rows, stacks, subjects, timing
from experiments.bench import train as bench_train
from experiments.bench.subjects import Images, Params
from experiments.device_checks import Row
from jdistill import attacks, nets
from jdistill.typing import Array, LogitsFn, Norm

_EPS: dict[Norm, float] = {"linf": 0.1, "l2": 1.5}  # as in experiments/README.md


class Sizes(NamedTuple):
    """Amounts to time.

    Attributes:
        repeats: calls that count, after one that warms up; those that take long have fewer.
        network: the file in `tests/parity` of what is trained and attacked.
        batch_size: images per training step.
        num_steps: training steps per call.
        pgd_images: attacked at once, in 40 steps.
        carlini_wagner: images, searches and steps per search.
        autoattack_images: attacked at once, on the small network.
        sweep: temperatures, seeds, steps per run, images per step.
        sweep_width: of the network that is swept.
        precisions: seeds, and epochs per generation, of the chains at each precision.
        roofline: images per step, rows of the matrices, megabytes of the array.
    """

    repeats: int
    network: str
    batch_size: int
    num_steps: int
    pgd_images: int
    carlini_wagner: tuple[int, int, int]
    autoattack_images: int
    sweep: tuple[int, int, int, int]
    sweep_width: float
    precisions: tuple[int, int]
    roofline: tuple[int, int, int]


SIZES = {
    "full": Sizes(
        repeats=5,
        network="plain",
        batch_size=128,
        num_steps=20,
        pgd_images=512,
        carlini_wagner=(20, 9, 1000),
        autoattack_images=500,
        sweep=(9, 3, 8, 128),
        sweep_width=1.0,
        precisions=(5, 16),
        roofline=(512, 8192, 1024),
    ),
    "small": Sizes(
        repeats=1,
        network="plain_small",
        batch_size=32,
        num_steps=2,
        pgd_images=32,
        carlini_wagner=(4, 2, 20),
        autoattack_images=8,
        sweep=(3, 1, 2, 16),
        sweep_width=0.25,
        precisions=(3, 4),
        roofline=(32, 256, 8),
    ),
}


class Peak(NamedTuple):
    """Rates that a device's maker states.

    Attributes:
        float32: operations per second at full precision.
        default: the same at the precision that JAX has by default there: TF32, where there is it.
        memory: bytes per second.
    """

    float32: float
    default: float
    memory: float | None


# By a pattern in the device's kind, the first that fits; dense rates, from NVIDIA's data sheets.
_PEAKS = {
    r"\bH200\b": Peak(67e12, 494.7e12, 4.8e12),
    r"\bH100 PCIe\b": Peak(51e12, 378e12, 2.0e12),
    r"\bH100\b": Peak(67e12, 494.7e12, 3.35e12),
    r"\bA100\b.*80GB": Peak(19.5e12, 156e12, 2.0e12),
    r"\bA100\b": Peak(19.5e12, 156e12, 1.555e12),
    r"\bT4\b": Peak(8.1e12, 8.1e12, 0.32e12),
    r"\bL4\b": Peak(30.3e12, 60e12, 0.3e12),
}


def known_peak(kind: str) -> Peak | None:
    """The rates of a device of this kind, where they are known."""
    found = (peak for pattern, peak in _PEAKS.items() if re.search(pattern, kind))
    return next(found, None)


def training_step(sizes: Sizes) -> Iterator[Row]:
    """A training step, and steps along an input gradient."""
    params, images = _files(sizes.network)
    options = bench_train.Train(
        num_steps=sizes.num_steps,
        batch_size=sizes.batch_size,
        repeats=sizes.repeats,
        peers=False,
    )
    calls = bench_train.calls(options, params, images, beside_torch=False)
    for row in bench_train.rows(options, calls):
        yield _row(row._replace(command=""))
    # What is left of a training step without a call and an upload per step.
    what = f"training step in a scan, batch {sizes.batch_size}"
    call = bench_train.scanned_training(options, params, images)
    timed = timing.interleaved({what: call}, repeats=sizes.repeats)
    yield _row(rows.Row(what, timed.timings[what], "none", None, each=sizes.num_steps))


def pgd(sizes: Sizes) -> Iterator[Row]:
    """PGD of 40 steps on many images."""
    logits_fn, inputs, labels = _images(sizes.network, sizes.pgd_images)
    for norm, eps in _EPS.items():
        attack = functools.partial(attacks.pgd, norm=norm, eps=eps, num_steps=40)
        what = f"PGD, 40 steps, {norm} {eps}, {len(labels)} images"
        yield _timed(what, attack, logits_fn, inputs, labels, sizes.repeats)


def carlini_wagner(sizes: Sizes) -> Iterator[Row]:
    """Carlini & Wagner's L2 attack."""
    count, searches, steps = sizes.carlini_wagner
    logits_fn, inputs, labels = _images(sizes.network, count)
    attack = functools.partial(attacks.carlini_wagner_l2, num_searches=searches, num_steps=steps)
    what = f"Carlini & Wagner's L2, {searches} × {steps:,} steps, {count} images"
    yield _timed(what, attack, logits_fn, inputs, labels, min(sizes.repeats, 2))


def autoattack(sizes: Sizes) -> Iterator[Row]:
    """Standard AutoAttack on the small network."""
    count = sizes.autoattack_images
    logits_fn, inputs, labels = _images("plain_small", count)
    attack = functools.partial(attacks.autoattack, eps=_EPS["linf"], batch_size=count)
    what = f"standard AutoAttack, linf {_EPS['linf']}, {count} images, a quarter of the width"
    yield _timed(what, attack, logits_fn, inputs, labels, 1)


def sweep(sizes: Sizes) -> Iterator[Row]:
    """A sweep as one program, under `lax.map` and under `vmap`, against its runs one by one."""
    num_temperatures, num_seeds, num_steps, batch_size = sizes.sweep
    options = stacks.Sweep(
        num_temperatures=num_temperatures,
        num_seeds=num_seeds,
        num_steps=num_steps,
        batch_size=batch_size,
        repeats=min(sizes.repeats, 3),
        width=sizes.sweep_width,
    )
    for group in stacks.run_sweep(options, lambda done, total: None):
        yield from (_row(row._replace(command="")) for row in group)


def roofline(sizes: Sizes, peak: Peak | None) -> Iterator[Row]:
    """Rates of a product, of a copy and of two steps, beside what the maker states.

    Args:
        sizes: of steps and arrays.
        peak: of the device; None where it is not known.
    """
    params, images = _files(sizes.network)
    batch_size, matmul_size, copy_megabytes = sizes.roofline
    options = bench_roofline.Roofline(
        num_steps=sizes.num_steps,
        batch_size=batch_size,
        matmul_size=matmul_size,
        copy_megabytes=copy_megabytes,
        repeats=sizes.repeats,
    )
    calls = bench_roofline.calls(options, params, images)
    timed = timing.interleaved(calls, repeats=sizes.repeats)
    works = bench_roofline.works(options, params, images.inputs.shape[1:])
    # Training multiplies in the device's own precision, attacks in float32.
    stated = {
        bench_roofline.PRODUCT: "default",
        bench_roofline.FULL_PRODUCT: "float32",
        bench_roofline.COPY: "memory",
        bench_roofline.TRAINING: "default",
        bench_roofline.PGD: "float32",
    }
    for row in bench_roofline.rows(options, timed, works):
        field = stated[row.name.split(", ")[0]]
        top = None if peak is None else getattr(peak, field)
        of_peak = None if top is None else row.facts["rate"] / top
        yield {**_row(row._replace(command="")), **row.facts, "peak": top, "of_peak": of_peak}


def _timed(
    what: str,
    attack: Callable[..., attacks.AttackResult],
    logits_fn: LogitsFn,
    inputs: Array,
    labels: Array,
    repeats: int,
) -> Row:
    def call() -> attacks.AttackResult:
        return jax.block_until_ready(attack(logits_fn, jax.random.key(0), inputs, labels))

    timed = timing.interleaved({what: call}, repeats=repeats)
    success = float(np.mean(timed.results[what].success))
    return {**_row(rows.Row(what, timed.timings[what], "none", None)), "success": success}


def _row(row: rows.Row) -> Row:
    return rows.record(row, {})


def _files(name: str) -> tuple[Params, Images]:
    params = subjects.read_params(device_attacks.FILES / f"{name}.npz")
    return params, subjects.read_images(device_attacks.FILES / "images.npz")


def _images(name: str, count: int) -> tuple[LogitsFn, Array, Array]:
    """A network, and images on the device that it classifies correctly."""
    logits_fn = nets.logits_fn(*device_attacks.network(name))
    inputs, labels = subjects.correct_images(logits_fn, _files(name)[1], count)
    return logits_fn, jnp.asarray(inputs), jnp.asarray(labels)
