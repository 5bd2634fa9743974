"""One pure step, compiled for one device or many: `jit` over a mesh, or `pmap`.

Both modes give the same result: the batch is split over the devices, the state is the same on
all of them. `jit` is the one to use; `pmap` is there for programs that are written around it.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jdistill import _validate
from jdistill._fingerprint import fingerprint
from jdistill.typing import Batch, LossFn, Metrics, PyTree, StepFn

DATA_AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh over the devices, along the data axis.

    Args:
        devices: which; None takes all of every process.

    Returns:
        The mesh, with the axis `"data"`.

    Example:
        >>> make_mesh(jax.devices()[:1]).shape["data"]
        1
    """
    devices = jax.devices() if devices is None else _validate.devices(devices)
    # The default type of an axis changed between JAX 0.7 and 0.10; named, it is the same.
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def pad_batch(batch: Batch, multiple: int) -> Batch:
    """The batch with rows added until its size is a multiple; the new rows have mask 0.

    Args:
        batch: any batch of at least one row.
        multiple: at least 1, such as the number of devices.

    Returns:
        The batch, padded with copies of its first row.

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


def replicate(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """The arrays of a tree, whole on every device: weights for a computation over a mesh.

    Args:
        tree: any pytree of arrays.
        devices: one or more.

    Returns:
        The same tree, its arrays on these devices.

    Example:
        >>> replicate(jnp.zeros(3), jax.devices()[:1]).sharding.is_fully_replicated
        True
    """
    _validate.arrays(tree=tree)
    return _spread(tree, NamedSharding(make_mesh(_validate.devices(devices)), PartitionSpec()))


def split(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """The arrays of a tree, each device with an equal share of the rows.

    Args:
        tree: any pytree of arrays `[B, ...]`, B a multiple of the number of devices.
        devices: one or more.

    Returns:
        The same tree, its arrays on these devices.

    Example:
        >>> split(jnp.zeros((4, 3)), jax.devices()[:1]).shape
        (4, 3)
    """
    devices = _validate.devices(devices)
    _validate.arrays(tree=tree)
    for leaf in jax.tree.leaves(tree):
        if not np.ndim(leaf) or np.shape(leaf)[0] % len(devices):
            raise ValueError(
                f"expected a tree of arrays whose rows are a multiple of {len(devices)} devices, "
                f"got shape {np.shape(leaf)}; pad them, as pad_batch does"
            )
    return jax.device_put(tree, NamedSharding(make_mesh(devices), PartitionSpec(DATA_AXIS)))


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
            `axis_name` gets the name of the data axis in mode `"pmap"` and None in `"jit"`; any
            other callable must itself reduce over the axis `"data"` under `"pmap"`.
        mode: `"jit"` (one global computation over a mesh) or `"pmap"` (one program a device).
        devices: over which; None takes all.

    Returns:
        The compiled step, of the same signature.

    Raises:
        ValueError: an unknown mode.

    Example:
        >>> def step(state, batch, loss_fn):
        ...     return state + jnp.sum(batch.mask), {}
        >>> batch = Batch(np.zeros((3, 2)), np.zeros(3, int), None, np.ones(3, np.float32))
        >>> state, _ = compile_step(step, devices=jax.devices()[:1])(jnp.zeros(()), batch, None)
        >>> float(state)
        3.0

    References:
        JAX documentation, "Distributed arrays and automatic parallelization" and
        "Migrating to the new jax.pmap".
    """
    _validate.function(step=step)
    _validate.one_of(("jit", "pmap"), mode=mode)
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
    step = functools.partial(_with_axis_name(step, DATA_AXIS if mode == "pmap" else None))
    return _jit_step(step, devices) if mode == "jit" else _pmap_step(step, devices)


_cached_compile: Callable[..., Any] = functools.lru_cache(maxsize=64)(_compile)


def _with_axis_name(step: StepFn, axis_name: str | None) -> StepFn:
    """The step told which axis to reduce over, where it has a field for it."""
    if not dataclasses.is_dataclass(step) or not hasattr(step, "axis_name"):
        return step
    return dataclasses.replace(step, axis_name=axis_name)


def _jit_step(step: StepFn, devices: tuple[jax.Device, ...]) -> Callable[..., Any]:
    mesh = make_mesh(devices)
    by_example = NamedSharding(mesh, PartitionSpec(DATA_AXIS))
    everywhere = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(
        step, in_shardings=(everywhere, by_example, everywhere), out_shardings=everywhere
    )

    def run(state: PyTree, batch: Batch, loss_fn: LossFn) -> tuple[PyTree, Metrics]:
        state = _spread(state, everywhere)
        batch = pad_batch(batch, len(devices))
        if jax.process_count() > 1:
            batch = jax.tree.map(lambda leaf: _placed(leaf, by_example), batch)
            loss_fn = _spread(loss_fn, everywhere)
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
            state = _spread(state, everywhere)
        batch = pad_batch(batch, len(devices))
        split = jax.tree.map(lambda leaf: leaf.reshape((len(devices), -1, *leaf.shape[1:])), batch)
        if len(local) < len(devices):
            split = jax.tree.map(lambda leaf: leaf[here], split)
        return compiled(state, split, loss_fn)

    return run


def local(tree: PyTree) -> PyTree:
    """The arrays of a tree as this process has them on one device.

    A program over arrays that lie on the devices of several processes has to be run by all of
    them; over local ones each process can go its own way.

    Args:
        tree: any pytree of arrays, those of several processes the same on every device.

    Returns:
        The same tree; arrays of this process alone stay what they are.

    Example:
        >>> local({"w": jnp.ones(2)})["w"].tolist()
        [1.0, 1.0]
    """
    return jax.tree.map(
        lambda leaf: (
            leaf if getattr(leaf, "is_fully_addressable", True) else leaf.addressable_shards[0].data
        ),
        tree,
    )


def _spread(tree: PyTree, everywhere: NamedSharding) -> PyTree:
    """The tree copied to every device, where it is not there yet.

    A step returns its state spread out. One that went in otherwise has another type to JAX, and
    the second call would trace and compile the step again.
    """

    def place(leaf: Any) -> Any:
        sharding = getattr(leaf, "sharding", None)
        there = (
            sharding is not None
            and not isinstance(sharding, SingleDeviceSharding)
            and sharding.device_set == everywhere.device_set
        )
        return leaf if there else _placed(leaf, everywhere)

    return jax.tree.map(place, tree)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array over devices, which may be those of several processes that all have the array."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = _placed(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype), copy=False)
    return jax.make_array_from_callback(host.shape, sharding, lambda rows: host[rows])


def example_indices(num_rows: int, axis_name: str | None) -> jax.Array:
    """The position of each local row in the global batch, `[B]` int32.

    Args:
        num_rows: rows that this program sees; static.
        axis_name: the mapped axis the batch is split over, or None for the whole batch.

    Returns:
        `[num_rows]` int32.

    Example:
        >>> example_indices(3, None).tolist()
        [0, 1, 2]
    """
    _validate.count(minimum=0, num_rows=num_rows)
    if axis_name is not None:
        _validate.text(axis_name=axis_name)
    local = jnp.arange(num_rows)
    if axis_name is None:
        return local
    try:
        device = jax.lax.axis_index(axis_name)
    except NameError:
        raise ValueError(
            f"expected axis_name of a mapped axis, got {axis_name!r}, which is none here; call it "
            "inside pmap or shard_map over that axis"
        ) from None
    return local + device * num_rows


def check_same(**values: Any) -> None:
    """An error, on every host, where a host has another value than host 0.

    Every process calls it with the same names in the same order; with one process it does nothing.
    Arrays are compared by their content (those without an axis by their value), functions by code.

    Args:
        **values: settings, arrays, or networks, by the name that a message gives them.

    Raises:
        ValueError: the hosts differ; names the first value that does, and the hosts.

    Example:
        >>> check_same(batch_size=128)
    """
    if jax.process_count() == 1:
        return
    digests = [list(bytes.fromhex(fingerprint(each))) for each in values.values()]
    # [hosts, values, bytes]
    found = np.asarray(multihost_utils.process_allgather(np.array(digests, np.uint8)))
    differs = (found != found[:1]).any(axis=2)
    if not differs.any():
        return
    place = int(differs.any(axis=0).argmax())
    hosts = ", ".join(map(str, np.flatnonzero(differs[:, place])))
    name = list(values)[place].replace("_", " ")
    raise ValueError(
        f"expected the same {name} on all {len(found)} hosts, got another on host {hosts} than on "
        "host 0; start the same command, with the same versions and data, on every host"
    )


def barrier(name: str) -> None:
    """Wait until every process has come here; with one process, nothing.

    Args:
        name: of the place, the same in every process.

    Example:
        >>> barrier("tables written")
    """
    _validate.text(name=name)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"jdistill: {name}")
