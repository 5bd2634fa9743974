"""Meshes, arrays over the devices of one, and where in the batch a device's rows stand."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jdistill import _validate
from jdistill.typing import PyTree

#: Name of the mesh's axis over which a batch is split.
DATA_AXIS = "data"


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A one-dimensional mesh over the devices, along the data axis.

    Args:
        devices: which; None takes all of every process.

    Returns:
        The mesh, with the axis `"data"`.

    Raises:
        ValueError: no devices, or what is no device.

    Example:
        >>> make_mesh(jax.devices()[:1]).shape["data"]
        1
    """
    devices = jax.devices() if devices is None else _validate.devices(devices)
    # The default type of an axis changed between JAX 0.7 and 0.10; named, it is the same.
    return Mesh(np.asarray(devices), (DATA_AXIS,), axis_types=(AxisType.Auto,))


def replicate(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """The arrays of a tree, whole on every device: weights for a computation over a mesh.

    Args:
        tree: any pytree of arrays.
        devices: one or more.

    Returns:
        The same tree, its arrays on these devices.

    Raises:
        ValueError: no devices, or leaves that are no arrays.

    Example:
        >>> replicate(jnp.zeros(3), jax.devices()[:1]).sharding.is_fully_replicated
        True
    """
    _validate.arrays(tree=tree)
    return spread(tree, NamedSharding(make_mesh(_validate.devices(devices)), PartitionSpec()))


def split(tree: PyTree, devices: Sequence[jax.Device]) -> PyTree:
    """The arrays of a tree, each device with an equal share of the rows.

    Args:
        tree: any pytree of arrays `[B, ...]`, B a multiple of the number of devices.
        devices: one or more.

    Returns:
        The same tree, its arrays on these devices.

    Raises:
        ValueError: no devices, leaves that are no arrays, rows whose
            number is not a multiple of that of the devices.

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


def spread(tree: PyTree, everywhere: NamedSharding) -> PyTree:
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
        return leaf if there else placed(leaf, everywhere)

    return jax.tree.map(place, tree)


def placed(leaf: Any, sharding: NamedSharding) -> jax.Array:
    """An array over devices, which may be those of several processes that all have the array."""
    if sharding.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = placed(jax.random.key_data(leaf), sharding)
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

    Raises:
        ValueError: a negative number of rows.

    Example:
        >>> example_indices(3, None).tolist()
        [0, 1, 2]
    """
    _validate.count(minimum=0, num_rows=num_rows)
    local = jnp.arange(num_rows)
    return local if axis_name is None else local + axis_index(axis_name) * num_rows


def axis_index(axis_name: str) -> jax.Array:
    """The number of this device along a mapped axis."""
    _validate.text(axis_name=axis_name)
    try:
        return jax.lax.axis_index(axis_name)
    except NameError:
        raise ValueError(
            f"expected axis_name of a mapped axis, got {axis_name!r}, which is none here; call it "
            "inside pmap or shard_map over that axis"
        ) from None
