"""A state as one array of bytes, with what is needed to tell whether another state fits it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from jdistill.typing import PyTree

Spec = dict[str, Any]  # name, shape and dtype of one leaf


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def named_leaves(tree: PyTree) -> list[tuple[str, Any]]:
    """The leaves under their path, in the order of the tree."""
    leaves = [
        (f"state{jax.tree_util.keystr(path)}", leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    if not leaves:
        raise ValueError(f"expected a state with leaves, got {tree!r}; pass the arrays to save")
    for name, leaf in leaves:
        arrays = (jax.Array, jax.ShapeDtypeStruct, np.ndarray, np.generic)
        number = _is_number(leaf) and np.asarray(leaf).dtype != object
        if not number and (not isinstance(leaf, arrays) or leaf.dtype == np.dtype(object)):
            raise ValueError(
                f"expected arrays and numbers as leaves of the state, got {leaf!r} at {name}; "
                "convert it to a numeric array, or save it in the metadata"
            )
    return leaves


def _is_number(leaf: Any) -> bool:
    """A Python number, and no NumPy scalar (np.float64 is a float)."""
    return isinstance(leaf, (bool, int, float)) and not isinstance(leaf, np.generic)


def spec(name: str, leaf: Any) -> Spec:
    """Name, shape, and dtype of a leaf: the same in a checkpoint and the state it restores."""
    if _is_number(leaf):
        return {"name": name, "shape": [], "dtype": type(leaf).__name__}
    return {"name": name, "shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _to_host(leaf: Any) -> np.ndarray:
    """The values of a leaf, all of them.

    As NumPy, because Orbax refuses the host-local arrays that `pmap` leaves on many hosts.
    """
    if _is_key(leaf):
        leaf = jax.random.key_data(leaf)
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.is_fully_replicated:
            leaf = leaf.addressable_data(0)
        else:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def pack(state: PyTree) -> tuple[np.ndarray, list[Spec]]:
    """The bytes of all leaves, and their specs.

    The bytes are a copy: they are written in the background, while the caller's next step donates
    the buffers of the state.
    """
    leaves = named_leaves(state)
    parts = [np.ravel(_to_host(leaf)).view(np.uint8) for _, leaf in leaves]
    return np.concatenate(parts), [spec(name, leaf) for name, leaf in leaves]


def unpack(packed: np.ndarray, like: PyTree) -> PyTree:
    """The state in the form of `like`, whose specs are those of the packed one."""
    leaves, structure = jax.tree.flatten(like)
    values, start = [], 0
    for leaf in leaves:
        stored = jax.eval_shape(jax.random.key_data, leaf) if _is_key(leaf) else leaf
        shape, dtype = np.shape(stored), np.dtype(getattr(stored, "dtype", type(stored)))
        stop = start + math.prod(shape) * dtype.itemsize
        # The copy is aligned as the type wants it, and the leaf's own.
        value = packed[start:stop].copy().view(dtype).reshape(shape)
        values.append(_as_like(value, leaf))
        start = stop
    return jax.tree.unflatten(structure, values)


def _as_like(value: np.ndarray, like: Any) -> Any:
    """A leaf of the kind of `like`, on the devices of `like`."""
    if _is_number(like):
        return value.item()
    if isinstance(like, np.generic):
        return value[()]
    if isinstance(like, np.ndarray):
        return value
    array = _to_device(value, like)
    return jax.random.wrap_key_data(array, impl=_key_impl(like)) if _is_key(like) else array


def _key_impl(like: Any) -> Any:
    """The PRNG of a key; `jax.random.key_impl` alone refuses a `jax.ShapeDtypeStruct`."""
    impl: list[Any] = []
    jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), like)
    return impl[0]


def _to_device(value: np.ndarray, like: Any) -> jax.Array:
    """The value laid out as `like` is.

    An array that was on no device in particular must stay so: committed to one, it could not meet
    arrays that lie on a mesh.
    """
    if like.sharding is None or not getattr(like, "committed", True):
        return jnp.asarray(value)
    if like.sharding.is_fully_addressable:
        return jax.device_put(value, like.sharding)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])


def check_same(folder: epath.Path, saved: list[Spec], wanted: list[Spec]) -> None:
    """The checkpoint is of a state like the one asked for, leaf by leaf and in order."""
    if saved == wanted:
        return

    def described(specs: list[Spec]) -> dict[str, str]:
        return {spec["name"]: f"{spec['dtype']}{spec['shape']}" for spec in specs}

    there, here = described(saved), described(wanted)
    differing = [
        f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
        for name in {**here, **there}
        if there.get(name) != here.get(name)
    ] or ["the leaves are in another order"]
    more = f"; and {len(differing) - 4} more" if len(differing) > 4 else ""
    raise ValueError(
        f"expected a checkpoint of this state, got another one in {folder}: "
        f"{'; '.join(differing[:4])}{more}; "
        "use the settings that it was saved with, or choose another `--workdir`"
    )
