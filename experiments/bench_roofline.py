"""What `python -m experiments.bench roofline` measures: two steps, and what the device can do."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import arithmetic, bench_rows, bench_train, npz_network, steps, timing
from experiments.arithmetic import Work
from experiments.bench_rows import BenchRow
from experiments.timing import Timed, Timing
from jdistill import attacks, nets
from jdistill.typing import Array

TRAINING, PGD = "training step", "step of attacks.pgd"
PRODUCT, FULL_PRODUCT = "product", "product at full precision"
COPY = "copy"
# Passes of a timed call, so that neither its start nor fresh memory counts.
_PASSES = 8

LINES = (
    "operations and bytes in closed form: the products, and each pass's arrays once from or to "
    "memory (`experiments/arithmetic.py`); by the compiler: its count for XLA's own convolutions, "
    "which differ from what runs on a CPU, but have no loops, whose bodies it counts once",
    "limit: the longer of operations over the measured product's rate and bytes over the measured "
    "copy's; achieved: the limit over the step's median seconds",
)


class Point(NamedTuple):
    """A step on the roofline.

    Attributes:
        name: what is done.
        timing: the seconds of the calls.
        each: steps of a call.
        work: operations and bytes of a step, in closed form.
        compiled: the same by the compiler's count.
        flops_rate: the measured peak, operations a second.
        bytes_rate: the measured peak, bytes a second.
    """

    name: str
    timing: Timing
    each: int
    work: Work
    compiled: Work
    flops_rate: float
    bytes_rate: float

    @property
    def seconds(self) -> float:
        """Of a step, the median."""
        return self.timing.median / self.each

    @property
    def limits(self) -> dict[str, float]:
        """The least seconds that each of the two peaks allows."""
        return {
            "arithmetic": self.work.flops / self.flops_rate,
            "memory": self.work.bytes / self.bytes_rate,
        }

    @property
    def binding(self) -> str:
        """Which of them is longer."""
        return max(self.limits, key=self.limits.__getitem__)

    @property
    def achieved(self) -> float:
        """The share of the roofline that the step reaches."""
        return self.limits[self.binding] / self.seconds


class Roofline(NamedTuple):
    """What was found.

    Attributes:
        peaks: the measured rates by what was done: the timing, how many operations or bytes a
            call has, and whether they are `"FLOP"` or `"B"`.
        points: the steps.
    """

    peaks: dict[str, tuple[Timing, float, str]]
    points: list[Point]


def compare(
    params: npz_network.Params,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    num_steps: int,
    batch_size: int,
    matmul_size: int,
    copy_megabytes: int,
    repeats: int,
    after_call: Callable[[int, int], None] = lambda done, total: None,
) -> Timed:
    """Time the products, the copy, and calls of `num_steps` steps of both kinds, in turn.

    Training multiplies in the device's own precision and attacks in full float32, which are the
    same on a CPU; each has a peak of its own.

    Args:
        params: the weights of a `nets.ConvNet`.
        inputs: `[N, H, W, C]`.
        labels: `[N]`.
        num_steps: steps of a call.
        batch_size: images a step.
        matmul_size: rows and columns of the product's matrices.
        copy_megabytes: of the array that is copied.
        repeats: timed calls of each, in turn, after one that warms up.
        after_call: told how many calls are done, of how many.

    Raises:
        ValueError: the images are too few.
    """
    variables = {"params": jax.tree.map(jnp.asarray, params)}
    logits_fn = nets.logits_fn(npz_network.conv_net(params, inputs.shape[1:]), variables)
    images, classes = npz_network.correct_images(logits_fn, inputs, labels, batch_size)
    on_device = jnp.asarray(images), jnp.asarray(classes)
    batches = bench_train.full_batches(inputs, labels, batch_size, num_steps)
    train = bench_train.our_training(params, inputs.shape[1:])
    matrix = jax.random.uniform(jax.random.key(0), (matmul_size, matmul_size))
    array = jnp.ones(_copied_bytes(copy_megabytes) // 4)

    def product(precision: str) -> Any:
        return jax.block_until_ready(_product(matrix, precision=precision))

    calls: dict[str, Callable[[], Any]] = {
        PRODUCT: functools.partial(product, "default"),
        FULL_PRODUCT: functools.partial(product, "highest"),
        COPY: lambda: jax.block_until_ready(_passes(array, 0.5, 1.0)),
        TRAINING: lambda: train(batches),
        PGD: lambda: jax.block_until_ready(
            attacks.pgd(
                logits_fn,
                jax.random.key(0),
                *on_device,
                eps=bench_train.RESISTED_EPS,
                num_steps=num_steps,
            )
        ),
    }
    return timing.interleaved(calls, repeats=repeats, after_call=after_call)


def points(
    timed: Timed,
    model: nets.ConvNet,
    input_shape: tuple[int, int, int],
    *,
    num_steps: int,
    batch_size: int,
    matmul_size: int,
    copy_megabytes: int,
) -> Roofline:
    """Of what `compare` gave: rates, and where the steps are."""
    operations = 2 * matmul_size**3
    moved = 2 * _PASSES * _copied_bytes(copy_megabytes)
    peaks = {
        PRODUCT: (timed.timings[PRODUCT], float(operations), "FLOP"),
        FULL_PRODUCT: (timed.timings[FULL_PRODUCT], float(operations), "FLOP"),
        COPY: (timed.timings[COPY], float(moved), "B"),
    }
    plain = model.clone(conv_general_dilated=jax.lax.conv_general_dilated)
    sizes = (input_shape, batch_size)
    kinds = [
        (TRAINING, PRODUCT, arithmetic.training(model, *sizes), steps.training(plain, *sizes)),
        (PGD, FULL_PRODUCT, arithmetic.ascending(model, *sizes), steps.ascending(plain, *sizes)),
    ]
    return Roofline(
        peaks,
        [
            Point(
                f"{name}, batch {batch_size}",
                timed.timings[name],
                num_steps,
                work,
                compiled_work(step),
                operations / timed.timings[peak].median,
                moved / timed.timings[COPY].median,
            )
            for name, peak, work, step in kinds
        ],
    )


def compiled_work(step: steps.Step) -> Work:
    """What the compiler counts in a step; it is not run."""
    costs: Any = jax.jit(step.call).lower(*step.arguments).compile().cost_analysis()
    return Work(round(costs.get("flops", 0)), round(costs.get("bytes accessed", 0)))


def rows(found: Roofline) -> tuple[list[BenchRow], list[dict[str, Any]]]:
    """The rows as of every command, and what each has beside: the peer is the roofline."""
    peaks = [
        BenchRow(name, timing, "none", None, note=f"{amount / timing.median / 1e9:.4g} G{unit}/s")
        for name, (timing, amount, unit) in found.peaks.items()
    ]
    more: list[dict[str, Any]] = [
        {"unit": f"{unit}/s", "rate": amount / timing.median}
        for timing, amount, unit in found.peaks.values()
    ]
    for point in found.points:
        limit = point.limits[point.binding] * point.each
        peaks.append(
            BenchRow(point.name, point.timing, "roofline", Timing(limit, (limit,)), each=point.each)
        )
        more.append(
            {
                "flops": point.work.flops,
                "bytes": point.work.bytes,
                "compiler_flops": point.compiled.flops,
                "compiler_bytes": point.compiled.bytes,
                "limits_s": point.limits,
                "limit": point.binding,
                "achieved": point.achieved,
            }
        )
    return peaks, more


def text(found: Roofline) -> str:
    """Two tables in Markdown: the device's rates, and the steps."""
    rates = [
        [name, bench_rows.seconds(timing), f"{amount / timing.median / 1e9:.4g} G{unit}/s"]
        for name, (timing, amount, unit) in found.peaks.items()
    ]
    cells = [
        [
            point.name,
            bench_rows.seconds(point.timing, point.each),
            _both(point.work.flops / 1e9, point.compiled.flops / 1e9),
            _both(point.work.bytes / 1e6, point.compiled.bytes / 1e6),
            f"{point.work.flops / point.seconds / 1e9:.4g}",
            f"{point.work.bytes / point.seconds / 1e9:.4g}",
            f"{point.limits['arithmetic']:.3g} / {point.limits['memory']:.3g}",
            point.binding,
            f"{point.achieved:.0%}",
        ]
        for point in found.points
    ]
    head = ["what", "s", "GFLOP (compiler)", "MB (compiler)", "GFLOP/s", "GB/s"]
    head += ["least s: arithmetic / memory", "limit", "achieved"]
    return "\n".join(
        [bench_rows.table(["peak", "s", "rate"], rates), bench_rows.table(head, cells)]
    )


def _both(ours: float, compilers: float) -> str:
    return f"{ours:.3g} ({compilers:.3g})"


def _copied_bytes(megabytes: int) -> int:
    return megabytes * 10**6 // 4 * 4


@functools.partial(jax.jit, static_argnames="precision")
def _product(matrix: Array, *, precision: str) -> Array:
    return jnp.matmul(matrix, matrix, precision=precision)


@jax.jit
def _passes(array: Array, factor: float, offset: float) -> Array:
    """Reads and writes the array again and again; what is computed on the way costs nothing."""
    return jax.lax.fori_loop(0, _PASSES, lambda _, values: factor * values + offset, array)
