"""One pure step, compiled for one device or many."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jdistill import _validate
from jdistill.parallel._devices import DATA_AXIS, make_mesh, placed, spread
from jdistill.typing import Batch, LossFn, Metrics, PyTree, StepFn

MODES = ("jit", "shard_map", "pmap")


def pad_batch(batch: Batch, multiple: int) -> Batch:
    """The batch with rows added until its size is a multiple; the new rows have mask 0.

    Args:
        batch: any batch of at least one row.
        multiple: at least 1, such as the number of devices.

    Returns:
        The batch, padded with copies of its first row.

    Raises:
        ValueError: no `Batch`, one without rows or a mask, or with columns of different lengths; a
            multiple below 1.

    Example:
        >>> batch = Batch(np.zeros((3, 2)), np.zeros(3, int), None, np.ones(3))
        >>> pad_batch(batch, 4).mask.tolist()
        [1.0, 1.0, 1.0, 0.0]
    """
    _check_batch(batch)
    _validate.count(multiple=multiple)
    rows = -batch.mask.shape[0] % multiple
    if rows == 0:
        return batch
    padded = jax.tree.map(lambda leaf: np.concatenate([leaf, np.repeat(leaf[:1], rows, 0)]), batch)
    return padded._replace(mask=np.concatenate([batch.mask, np.zeros(rows, batch.mask.dtype)]))


def _check_batch(batch: Batch) -> None:
    """An error for what is no batch, or one whose columns differ in length."""
    _validate.instance(Batch, "a Batch", batch=batch)
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(batch)}
    if batch.mask is None or len(sizes) != 1 or not sizes.isdisjoint({(), (0,)}):
        raise ValueError(
            f"expected a batch of one row or more with a mask, got columns of {sorted(sizes)} rows"
            "; give each as many rows, and a mask of ones where none is padding"
        )


def compile_step(
    step: StepFn, mode: str = "jit", devices: Sequence[jax.Device] | None = None
) -> Callable[[PyTree, Batch, LossFn], tuple[PyTree, Metrics]]:
    """Compile a step `(state, batch, loss_fn) -> (state, metrics)` over devices.

    The compiled step takes batches of any size: it pads them to a multiple of the number of
    devices with rows of mask 0, and spreads them. States and metrics go in and come out whole,
    the same on every device. Equal steps, modes and devices share one compilation.

    With several processes every one of them passes the same state and the same batch, the whole
    one, and copies to its devices the rows that are theirs; so the result is that of one process.

    Args:
        step: a pure step, `jdistill.train.make_train_step` for one. A dataclass with a field
            `axis_name` gets None in mode `"jit"` and the name of the data axis in the others; any
            other callable must itself reduce over the axis `"data"` there.
        mode: `"jit"` (one global computation over a mesh), `"shard_map"` (one program a device,
            over the same mesh), or `"pmap"` (the same by JAX's older function).
        devices: over which; None takes all.

    Returns:
        The compiled step, of the same signature.

    Raises:
        ValueError: an unknown mode.

    Example:
        >>> def step(state, batch, loss_fn):
        ...     return state + batch.mask.sum(), {}
        >>> batch = Batch(np.zeros((3, 2)), np.zeros(3, int), None, np.ones(3, np.float32))
        >>> state, _ = compile_step(step, devices=jax.devices()[:1])(np.zeros(()), batch, None)
        >>> float(state)
        3.0

    References:
        JAX documentation, "Distributed arrays and automatic parallelization", "Manual parallelism
        with shard_map", and "Migrating to the new jax.pmap".
    """
    _validate.function(step=step)
    _validate.one_of(MODES, mode=mode)
    devices = tuple(jax.devices() if devices is None else _validate.devices(devices))
    if jax.process_index() not in {device.process_index for device in devices}:
        raise ValueError(
            f"expected devices of this process, {jax.process_index()}, among devices, got none; "
            "pass some, or do not call it in this process"
        )
    try:
        return _cached_compile(step, mode, devices)
    except TypeError:  # a step that cannot be hashed is compiled anew for each call
        return _compile(step, mode, devices)


def _compile(
    step: StepFn, mode: str, devices: tuple[jax.Device, ...]
) -> Callable[[PyTree, Batch, LossFn], tuple[PyTree, Metrics]]:
    # JAX wants to hash what it compiles; a partial hashes by identity, whatever it holds.
    step = functools.partial(_with_axis_name(step, None if mode == "jit" else DATA_AXIS))
    if mode == "pmap":
        return _pmap_step(step, devices)
    mesh = make_mesh(devices)
    return _mesh_step(step if mode == "jit" else _shard_mapped(step, mesh), mesh)


_cached_compile: Callable[..., Any] = functools.lru_cache(maxsize=64)(_compile)


def _with_axis_name(step: StepFn, axis_name: str | None) -> StepFn:
    """The step told which axis to reduce over, where it has a field for it."""
    if not dataclasses.is_dataclass(step) or not hasattr(step, "axis_name"):
        return step
    return dataclasses.replace(step, axis_name=axis_name)


def _shard_mapped(step: StepFn, mesh: Mesh) -> StepFn:
    """The step as one program a device, on its rows of the batch and the whole state.

    Where JAX tracks what is replicated (`check_vma`), the gradient of replicated weights is already
    the sum over the devices, and the step's own sum would be that many times too large.
    """
    mapped: StepFn = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec(DATA_AXIS), PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    return mapped


def _mesh_step(step: StepFn, mesh: Mesh) -> Callable[..., Any]:
    by_example = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    everywhere = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(
        step, in_shardings=(everywhere, by_example, everywhere), out_shardings=everywhere
    )

    def run(state: PyTree, batch: Batch, loss_fn: LossFn) -> tuple[PyTree, Metrics]:
        state = spread(state, everywhere)
        batch = pad_batch(batch, mesh.size)
        if jax.process_count() > 1:
            batch = jax.tree.map(lambda leaf: placed(leaf, by_example), batch)
            loss_fn = spread(loss_fn, everywhere)
        return compiled(state, batch, loss_fn)

    return run


def _pmap_step(step: StepFn, devices: tuple[jax.Device, ...]) -> Callable[..., Any]:
    if len({device.process_index for device in devices}) > 1:
        if set(devices) != set(jax.devices()):
            raise ValueError(
                f"expected all {len(jax.devices())} devices for pmap over several processes, got "
                f"{len(devices)}; leave devices out, or use mode='jit'"
            )
        # The order of JAX's pmap, whatever that of `jax.devices()`: rows and axis indices agree.
        each = (jax.local_devices(process_index=p) for p in range(jax.process_count()))
        devices = tuple(device for own in each for device in own)
    here = [place for place, d in enumerate(devices) if d.process_index == jax.process_index()]
    local = [devices[place] for place in here]
    everywhere = NamedSharding(make_mesh(local), PartitionSpec())
    compiled = jax.pmap(
        step,
        axis_name=DATA_AXIS,
        in_axes=(None, 0, None),
        out_axes=(None, None),
        devices=devices if len(local) == len(devices) else None,
    )

    def run(state: PyTree, batch: Batch, loss_fn: LossFn) -> tuple[PyTree, Metrics]:
        if jax.__version_info__ >= (0, 8):  # before, pmap did not mind where its arguments lie
            state = spread(state, everywhere)
        batch = pad_batch(batch, len(devices))
        split = jax.tree.map(lambda leaf: leaf.reshape((len(devices), -1, *leaf.shape[1:])), batch)
        if len(local) < len(devices):
            split = jax.tree.map(lambda leaf: leaf[here], split)
        return compiled(state, split, loss_fn)

    return run
