"""Training step and PGD step, beside what the device's measured rates allow."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.bench import arithmetic, subjects, timing, train
from experiments.bench.arithmetic import Work
from experiments.bench.options import NetworkOptions, command
from experiments.bench.rows import Row
from experiments.bench.subjects import Images, Params
from experiments.bench.timing import AfterCall, Calls, Timed, Timing
from jdistill.typing import Array

TRAINING, PGD = "training step", "step of attacks.pgd"
PRODUCT, FULL_PRODUCT = "product", "product at full precision"
COPY = "copy"
# Passes of a timed call, so that neither its start nor fresh memory counts.
PASSES = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline(NetworkOptions):
    """Share that a training step and a step of PGD reach of what the device can do.

    Measured are the device's rates (a large float32 product; passes over a large array) and the
    seconds of both steps; operations and bytes of the steps are counted in closed form: the
    products, and each pass's arrays once from or to memory. The limit is the longer of operations
    over the product's rate and bytes over the copy's.
    """

    num_steps: int = 20
    """Steps per timed call; the seconds printed are those of one step."""
    batch_size: int = 128
    """Images per step."""
    matmul_size: int = 4096
    """Rows and columns of the matrices whose product is the peak of arithmetic."""
    copy_megabytes: int = 256
    """Size of the array that is read and written for the peak of memory; larger than any cache."""


def run(options: Roofline, after_call: AfterCall) -> Iterator[list[Row]]:
    """Rows of the command."""
    params, images = subjects.load(options)
    timed = timing.interleaved(
        calls(options, params, images), repeats=options.repeats, after_call=after_call
    )
    yield rows(options, timed, works(options, params, images.inputs.shape[1:]))


def calls(options: Roofline, params: Params, images: Images) -> Calls:
    """Calls of the products, of the copy, and of `num_steps` steps of both kinds.

    Training multiplies in the device's own precision and attacks in full float32, which are the
    same on a CPU; each has a peak of its own.

    Args:
        options: the sizes.
        params: weights of a `nets.ConvNet`.
        images: to train on, and the first that are classified correctly to attack.

    Raises:
        ValueError: the images are too few.
    """
    shape = images.inputs.shape[1:]
    logits_fn = subjects.logits_fn(params, shape)
    right = subjects.correct_images(logits_fn, images, options.batch_size)
    on_device = [jnp.asarray(column) for column in right]
    batches = train.full_batches(images, options.batch_size, options.num_steps)
    our_training = train.our_training(params, shape)
    matrix = jax.random.uniform(jax.random.key(0), (options.matmul_size, options.matmul_size))
    array = jnp.ones(_copied_bytes(options) // 4)

    def ready(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(function(*arguments))

    return {
        PRODUCT: ready(_product, matrix, "default"),
        FULL_PRODUCT: ready(_product, matrix, "highest"),
        COPY: ready(passes, array, 0.5, 1.0),
        TRAINING: lambda: our_training(batches),
        PGD: functools.partial(
            train.resisted_pgd, logits_fn, *on_device, num_steps=options.num_steps
        ),
    }


def works(options: Roofline, params: Params, input_shape: tuple[int, ...]) -> dict[str, Work]:
    """Operations and bytes of both steps, by arithmetic."""
    model = subjects.conv_net(params, input_shape)
    sizes: Any = (input_shape, options.batch_size)
    return {
        TRAINING: arithmetic.training(model, *sizes),
        PGD: arithmetic.ascending(model, *sizes),
    }


def rows(options: Roofline, timed: Timed, works: dict[str, Work]) -> list[Row]:
    """Rows of the rates, and of the steps beside their limit.

    Args:
        options: the sizes.
        timed: the calls.
        works: of both steps.
    """
    operations = 2 * options.matmul_size**3
    amounts = {
        PRODUCT: (operations, "FLOP/s"),
        FULL_PRODUCT: (operations, "FLOP/s"),
        COPY: (2 * PASSES * _copied_bytes(options), "B/s"),
    }
    rates = {name: amount / timed.timings[name].median for name, (amount, _) in amounts.items()}
    found = [
        Row(
            name,
            timed.timings[name],
            "none",
            None,
            command(options),
            facts={"rate": rates[name], "unit": unit},
        )
        for name, (_, unit) in amounts.items()
    ]
    for name, product in ((TRAINING, PRODUCT), (PGD, FULL_PRODUCT)):
        steps = timed.timings[name]
        limits = {
            "arithmetic": works[name].flops / rates[product],
            "memory": works[name].bytes / rates[COPY],
        }
        binding = max(limits, key=limits.__getitem__)
        seconds = steps.median / options.num_steps
        limit = limits[binding] * options.num_steps
        facts = {
            "rate": works[name].flops / seconds,
            "unit": "FLOP/s",
            "flops": works[name].flops,
            "bytes": works[name].bytes,
            "limit": binding,
            "achieved": limits[binding] / seconds,
        }
        what = f"{name}, batch {options.batch_size}"
        allowed = Timing(0.0, (limit,))
        found.append(
            Row(what, steps, "roofline", allowed, command(options), options.num_steps, facts=facts)
        )
    return found


def _copied_bytes(options: Roofline) -> int:
    return options.copy_megabytes * 10**6 // 4 * 4


@functools.partial(jax.jit, static_argnums=1)
def _product(matrix: Array, precision: str) -> Array:
    return jnp.matmul(matrix, matrix, precision=precision)


@jax.jit
def passes(array: Array, factor: float, offset: float) -> Array:
    """Read and write the array again and again; what is computed on the way costs nothing."""
    return jax.lax.fori_loop(0, PASSES, lambda _, values: factor * values + offset, array)
