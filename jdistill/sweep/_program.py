"""The compiled part: some steps of every run of a stack, out of data that lies on the device."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from jdistill import data
from jdistill._jax import full_precision
from jdistill.train import TrainState, TrainStep, logits_fn
from jdistill.typing import Array, Batch, LossFn, Metrics

RUN_AXIS = "run"


class Store(NamedTuple):
    """A data set on the device, one for all runs."""

    inputs: Array | np.ndarray  # [N, ...] float, or uint8 where that is exact
    scales: tuple[Any, Any]  # 1/255 as a number of few bits and the rest, for uint8 inputs
    labels: Array | np.ndarray  # [N] int32


class Plan(NamedTuple):
    """Which examples each step of an epoch sees."""

    rows: np.ndarray  # [R, S, B] int32
    mask: np.ndarray  # [S, B] float32, 0 for padding


class Kind(NamedTuple):
    """Static arguments of a program, which is compiled for them and for shapes."""

    step: TrainStep
    vmapped: bool
    devices: tuple[jax.Device, ...]


def store(inputs: np.ndarray, labels: np.ndarray) -> Store:
    """The data as it is kept: whole 255ths as the bytes that they were read from."""
    with np.errstate(invalid="ignore", over="ignore"):
        levels = np.rint(inputs * np.float32(255))
        bytes_ = np.clip(levels, 0, 255).astype(np.uint8)
    exact = np.array_equal(np.divide(bytes_, np.float32(255), dtype=np.float32), inputs)
    return Store(bytes_ if exact else inputs, _SCALES, labels.astype(np.int32))


# XLA makes a product out of a division by 255, and half of all values would be one unit off. A
# byte times the first of these is exact, so the sum of both products rounds once, as a division.
_FIRST = np.round(2**22 / 255) / 2**22
_SCALES = (np.float32(_FIRST), np.float32(1 / 255 - _FIRST))


def _read(stored: Store, rows: Array) -> Array:
    """The inputs of these rows, as floats."""
    inputs = stored.inputs[rows]
    if inputs.dtype == jnp.uint8:
        values = inputs.astype(jnp.float32)
        return values * stored.scales[0] + values * stored.scales[1]
    return inputs


def _finite(tree: Any) -> Array:
    """Whether every number of a tree is."""
    leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]
    return functools.reduce(jnp.logical_and, leaves, jnp.bool_(True))


def _steps_of_one(
    kind: Kind,
    stored: Store,
    mask: Array,
    epoch_start: Array,
    first: Array,
    last: Array,
    state: TrainState,
    alive: Array,
    loss_fn: LossFn,
    targets: Array | None,
    rows: Array,
) -> tuple[TrainState, Array, Metrics]:
    """Steps `first` to `last` of the epoch for one run; a run that is further ahead waits."""

    def body(
        number: Array, carry: tuple[TrainState, Array, Metrics]
    ) -> tuple[TrainState, Array, Metrics]:
        state, alive, totals = carry
        chosen = rows[number]
        inputs = _read(stored, chosen)
        batch = Batch(
            inputs,
            stored.labels[chosen],
            None if targets is None else targets[chosen],
            mask[number],
        )
        new, sums = kind.step(state, batch, loss_fn)
        due = state.step == epoch_start + number
        # The last state with finite weights is kept: that of a run which has diverged.
        finite = _finite((sums["loss"], new.params))
        takes = alive & due & finite

        def choose(after: Array, before: Array) -> Array:
            return jnp.where(takes, after, before)

        state = jax.tree.map(choose, new._replace(key=state.key), state)
        totals = jax.tree.map(lambda total, one: total + jnp.where(takes, one, 0), totals, sums)
        return state, alive & (finite | ~due), totals

    zeros = {name: jnp.float32(0) for name in ("loss", "correct", "count")}
    return jax.lax.fori_loop(first, last, body, (state, alive, zeros))


def _over_runs(kind: Kind, fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun(shared, *stacked)` for every run: at once, or one after the other; spread on devices."""

    def together(shared: Any, *stacked: Any) -> Any:
        if kind.vmapped:
            return jax.vmap(functools.partial(fun, shared))(*stacked)
        return jax.lax.map(lambda one: fun(shared, *one), stacked)

    if len(kind.devices) == 1:
        return together

    def spread(shared: Any, *stacked: Any) -> Any:
        # No run knows of another, so every device has its own, and nothing is exchanged.
        return jax.shard_map(
            together,
            mesh=mesh(kind.devices),
            in_specs=(PartitionSpec(), *(PartitionSpec(RUN_AXIS) for _ in stacked)),
            out_specs=PartitionSpec(RUN_AXIS),
            check_vma=False,
        )(shared, *stacked)

    return spread


def mesh(devices: tuple[jax.Device, ...]) -> Mesh:
    """The devices in a row, along the axis of runs."""
    return Mesh(np.asarray(devices), (RUN_AXIS,), axis_types=(AxisType.Auto,))


def placement(kind: Kind, *, stacked: bool) -> Sharding:
    """Each device has its runs, or all have everything."""
    if len(kind.devices) == 1:
        # No mesh: with one, JAX 0.7 refuses `vmap` of a convolution's gradient.
        return SingleDeviceSharding(kind.devices[0])
    spec = PartitionSpec(RUN_AXIS) if stacked else PartitionSpec()
    return NamedSharding(mesh(kind.devices), spec)


def placed(kind: Kind, tree: Any, *, stacked: bool) -> Any:
    """The tree's arrays on the devices: each with its runs, or all with everything."""
    return jax.device_put(tree, placement(kind, stacked=stacked))


def placed_stack(kind: Kind, tree: Any, runs: np.ndarray) -> Any:
    """Some runs of a stack, by their indices, each on its device."""
    return placed(kind, jax.tree.map(lambda leaf: leaf[runs], tree), stacked=True)


def plan_of(
    seeds: Sequence[tuple[int, ...]], epoch: int, num_examples: int, batch_size: int
) -> Plan:
    """The rows of every step of an epoch for every run, and the mask of its padding."""
    drawn = {seed: data.epoch_order(seed, epoch, num_examples) for seed in set(seeds)}
    num_steps = data.num_batches(num_examples, batch_size)
    missing = num_steps * batch_size - num_examples
    first_of_last = (num_steps - 1) * batch_size

    def rows(order: np.ndarray) -> np.ndarray:
        # As `data.batches` fills up: with the last batch's first row.
        padded = np.concatenate([order, np.repeat(order[first_of_last], missing)])
        return padded.reshape(num_steps, batch_size).astype(np.int32)

    laid = {seed: rows(order) for seed, order in drawn.items()}
    mask = np.ones((num_steps, batch_size), np.float32)
    mask.reshape(-1)[num_examples:] = 0
    return Plan(np.stack([laid[seed] for seed in seeds]), mask)


def _once(make: Callable[..., Any]) -> Callable[..., Any]:
    """One program for equal arguments; a step that cannot be hashed gets a new one each time."""
    cached = functools.lru_cache(maxsize=32)(make)

    @functools.wraps(make)
    def program(*args: Any) -> Any:
        try:
            return cached(*args)
        except TypeError:
            return make(*args)

    return program


@_once
def steps_program(kind: Kind) -> Any:
    """The jitted `(shared, state, alive, loss_fn, targets, rows) -> (state, alive, sums)`.

    `shared` is `(store, mask, epoch_start, first, last)`; every other leaf is `[R, ...]`.
    """

    def one(shared: tuple[Any, ...], *stacked: Any) -> Any:
        return _steps_of_one(kind, *shared, *stacked)

    return jax.jit(_over_runs(kind, one))


@_once
def labels_program(kind: Kind, chunk_size: int) -> Any:
    """The jitted `((store,), state, temperature) -> soft labels [R, N, K]`, chunk by chunk."""

    def one(shared: tuple[Any, ...], state: TrainState, temperature: Array) -> Array:
        (stored,) = shared
        network = logits_fn(kind.step, state)
        num_examples = stored.labels.shape[0]
        starts = jnp.arange(0, num_examples, chunk_size)

        def predict(start: Array) -> Array:
            rows = jnp.minimum(start + jnp.arange(chunk_size), num_examples - 1)
            return jax.nn.softmax(network(_read(stored, rows)) / temperature, axis=-1)

        with full_precision():  # in training it may be the device's; labels are exact
            labels = jax.lax.map(predict, starts)
        return labels.reshape((-1, labels.shape[-1]))[:num_examples]

    return jax.jit(_over_runs(kind, one))
