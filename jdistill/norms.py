"""Balls and boxes: distances, projections, steepest directions and random starts, per example.

Every function works on batches `[B, ...]` and treats each example alone; `eps` is a scalar or
`[B]`. The norms are named `"linf"`, `"l2"` and `"l1"`; where only a distance or a projection is
needed there is also `"l0"`, the number of entries that are not 0.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _order, _validate
from jdistill._jax import jit
from jdistill.typing import AnyArray, Array, ArrayLike, Bounds, Norm

__all__ = [
    "ascend",
    "distance",
    "flatten",
    "into_ball_and_box",
    "normalize",
    "per_example",
    "project",
    "random_start",
    "steepest",
]


def per_example(value: ArrayLike, like: AnyArray) -> Array:
    """A scalar or `[B]` value shaped `[B, 1, …]`, to broadcast against `like [B, ...]`.

    Args:
        value: scalar or `[B]`.
        like: `[B, ...]`, for shape and type.

    Returns:
        `[B, 1, …]` of the rank and type of `like`.

    Example:
        >>> per_example(0.5, jnp.zeros((2, 3, 4))).shape
        (2, 1, 1)
    """
    _batches(like=like)
    _one_per_example(like, value=value)
    value = jnp.asarray(value, like.dtype)
    value = jnp.broadcast_to(value, like.shape[:1])
    return value.reshape(like.shape[:1] + (1,) * (like.ndim - 1))


def flatten(value: AnyArray) -> Array:
    """One row per example, `[B, ...]` to `[B, D]`; an empty batch too, where -1 would not do.

    Args:
        value: `[B, ...]`.

    Returns:
        `[B, D]`.

    Example:
        >>> flatten(jnp.zeros((0, 28, 28, 1))).shape
        (0, 784)
    """
    _batches(value=value)
    return jnp.reshape(value, (value.shape[0], math.prod(value.shape[1:])))


def distance(delta: AnyArray, norm: Norm) -> Array:
    """The norm of each example's difference.

    Args:
        delta: `[B, ...]` float.
        norm: `"linf"`, `"l2"`, `"l1"` or `"l0"` (the number of entries that are not 0).

    Returns:
        `[B]` float, at least 0; accurate for tiny entries too (no underflow of the squares).

    Raises:
        ValueError: an unknown norm.

    Example:
        >>> distance(jnp.array([[3.0, -4.0]]), "l2").tolist()
        [5.0]
        >>> distance(jnp.array([[3.0, -4.0]]), "linf").tolist()
        [4.0]
        >>> distance(jnp.array([[3.0, -4.0]]), "l1").tolist()
        [7.0]
        >>> distance(jnp.array([[3.0, 0.0]]), "l0").tolist()
        [1.0]
    """
    if not jnp.issubdtype(getattr(delta, "dtype", float), jnp.integer):
        _batches(delta=delta)
    return _pick(_NORMS, norm).distance(delta)


def normalize(value: AnyArray, norm: Norm) -> Array:
    """Each example divided by its norm, at every scale of float32; 0 stays 0.

    Args:
        value: `[B, ...]` float. Entries that are not finite are taken for 0.
        norm: `"linf"`, `"l2"` or `"l1"`.

    Returns:
        `[B, ...]`.

    Raises:
        ValueError: an unknown norm.

    Example:
        >>> normalize(jnp.array([[3e-30, -1e-30], [0.0, 0.0]]), "l1").round(3).tolist()
        [[0.75..., -0.25], [0.0, 0.0]]
    """
    _batches(value=value)
    _pick(_DIRECTIONS, norm)
    value = _to_unit_scale(value)
    length = per_example(_NORMS[norm].distance(value), value)
    return value / jnp.where(length > 0, length, 1.0)


def project(delta: AnyArray, eps: ArrayLike, norm: Norm) -> Array:
    """The closest point of the ball of radius `eps` around 0, per example.

    Args:
        delta: `[B, ...]` float.
        eps: radius, at least 0; scalar or `[B]`. For `"l0"` the number of entries to keep, the
            largest ones; of equal ones the first.
        norm: `"linf"`, `"l2"`, `"l1"` or `"l0"`.

    Returns:
        `[B, ...]`.

    Raises:
        ValueError: an unknown norm, a radius below 0.

    Example:
        >>> project(jnp.array([[3.0, -4.0]]), 1.0, "l2").round(3).tolist()
        [[0.6..., -0.8...]]
        >>> project(jnp.array([[3.0, -4.0]]), 2.0, "l1").tolist()
        [[0.5, -1.5]]

    References:
        Duchi, Shalev-Shwartz, Singer & Chandra 2008, section 4 (`"l1"` by the simplex); Michelot
        1986 (onto the simplex: entries are dropped until all that are left keep something).
    """
    _batches(delta=delta)
    _validate.non_negative(eps=eps)
    _one_per_example(delta, eps=eps)
    return _pick(_NORMS, norm).project(delta, per_example(eps, delta))


def steepest(gradient: AnyArray, norm: Norm) -> Array:
    """The direction of unit norm along which a linear function with this gradient grows most.

    The gradient is first divided by its largest entry, so that gradients of any size give a full
    step: an absolute floor under the norm would hide the small ones, which is how several
    toolkits overrate masked networks. Zero and non-finite entries give 0.

    Args:
        gradient: `[B, ...]` float.
        norm: `"linf"` (the sign), `"l2"` (the unit vector) or `"l1"` (the largest entry alone).

    Returns:
        `[B, ...]`; all 0 where the gradient is exactly 0.

    Raises:
        ValueError: an unknown norm.

    Example:
        >>> steepest(jnp.array([[3e-30, -4e-30]]), "l2").round(3).tolist()
        [[0.6..., -0.8...]]
    """
    _batches(gradient=gradient)
    return _pick(_DIRECTIONS, norm).steepest(_to_unit_scale(gradient))


def ascend(
    inputs: AnyArray,
    gradient: AnyArray,
    length: ArrayLike,
    norm: Norm,
    bounds: Bounds,
) -> Array:
    """One step of the given length along the steepest direction.

    For linf and l2 this is `inputs + length · steepest(gradient)`, which may leave the box. For
    l1 that would change one entry, and nothing at all once this entry is at its bound. So the
    step is the best one within the box: the entry of the largest gradient moves to its bound,
    then the next one, until the length is used up::

        argmax_d ⟨gradient, d⟩   with ‖d‖₁ <= length and inputs + d in the box.

    Far from the box that is `length · steepest(gradient)` again.

    Args:
        inputs: `[B, ...]` float, inside the box.
        gradient: `[B, ...]` float; its scale does not matter. Entries 0 or not finite do not move.
        length: of the step, at least 0; scalar or `[B]`.
        norm: `"linf"`, `"l2"` or `"l1"`.
        bounds: the box, `(low, high)`.

    Returns:
        `[B, ...]`.

    Raises:
        ValueError: an unknown norm.

    Example:
        >>> inputs, gradient = jnp.array([[0.5, 0.5, 0.75]]), jnp.array([[1.0, -2.0, 3.0]])
        >>> ascend(inputs, gradient, 0.5, "l1", (0.0, 1.0)).tolist()
        [[0.5, 0.25, 1.0]]
        >>> ascend(inputs, gradient, 0.5, "linf", (0.0, 1.0)).tolist()
        [[1.0, 0.0, 1.25]]

    References:
        Croce & Hein 2021, "Mind the box" (the steepest direction of l1 within the box).
    """
    _batches(inputs=inputs, gradient=gradient)
    _pick(_DIRECTIONS, norm)
    _validate.non_negative(length=length)
    _one_per_example(inputs, length=length)
    _box(bounds, inputs)
    length, inputs = per_example(length, inputs), jnp.asarray(inputs)
    if norm != "l1":
        return inputs + length * steepest(gradient, norm)
    low, high = bounds
    gradient = _to_unit_scale(gradient)
    room = jnp.where(gradient > 0, high - inputs, inputs - low)
    moves = _order.fill(flatten(jnp.abs(gradient)), flatten(room), 1.0, length.reshape(-1, 1))
    return inputs + jnp.sign(gradient) * moves.reshape(room.shape)


def random_start(keys: Array, like: AnyArray, eps: ArrayLike, norm: Norm) -> Array:
    """A point drawn uniformly from the ball of radius `eps`, one per example.

    Args:
        keys: `[B]` PRNG keys; example `b` draws from `keys[b]` alone.
        like: `[B, ...]`, for shape and type.
        eps: radius, at least 0; scalar or `[B]`.
        norm: `"linf"`, `"l2"` or `"l1"`.

    Returns:
        `[B, ...]`.

    Raises:
        ValueError: an unknown norm, a radius below 0.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 4)
        >>> noise = random_start(keys, jnp.zeros((4, 28, 28)), 0.3, "l2")
        >>> noise.shape, bool(jnp.all(distance(noise, "l2") < 0.301))
        ((4, 28, 28), True)
    """
    _batches(like=like)
    _validate.non_negative(eps=eps)
    _one_per_example(like, eps=eps)
    _pick(_DIRECTIONS, norm)
    keys = _validate.prng_key(keys)
    if keys.shape != like.shape[:1]:
        raise ValueError(
            f"expected keys of shape [B] = {like.shape[:1]}, got shape {keys.shape}; pass one per "
            "example, such as jax.random.split(key, B)"
        )
    return _random_units(keys, like, norm=norm) * per_example(eps, like)


@functools.partial(jit, static_argnames="norm")
def _random_units(keys: Array, like: AnyArray, *, norm: Norm) -> Array:
    draw = functools.partial(_DIRECTIONS[norm].random_unit, shape=like.shape[1:], dtype=like.dtype)
    return jax.vmap(draw)(keys)


def into_ball_and_box(
    inputs: AnyArray, center: AnyArray, eps: ArrayLike, norm: Norm, bounds: Bounds
) -> Array:
    """The inputs projected into the ball around `center`, then clipped into the box.

    The center lies in the box, so clipping moves every entry towards it and the result is in both.
    For inputs inside the box this is the projection onto both: no entry leaves it on the way.

    Args:
        inputs: `[B, ...]` float.
        center: `[B, ...]` float, inside the box.
        eps: radius, at least 0; scalar or `[B]`.
        norm: `"linf"`, `"l2"`, `"l1"` or `"l0"`.
        bounds: the box, `(low, high)`.

    Returns:
        `[B, ...]`.

    Raises:
        ValueError: an unknown norm, a radius below 0.

    Example:
        >>> center = jnp.array([[0.5, 0.9]])
        >>> into_ball_and_box(center + 1.0, center, 0.25, "linf", (0.0, 1.0)).tolist()
        [[0.75, 1.0]]
    """
    _batches(inputs=inputs, center=center)
    _box(bounds, inputs)
    low, high = bounds
    return jnp.clip(center + project(inputs - center, eps, norm), low, high)


def _batches(**named: AnyArray) -> None:
    """An error where one is no batch of floats."""
    for name, value in named.items():
        if not isinstance(value, jax.Array | np.ndarray):
            raise ValueError(
                f"expected {name} to be an array [B, ...], got {type(value).__name__}; pass "
                "NumPy's or JAX's"
            )
    _validate.floats(-1, **named)


def _one_per_example(like: AnyArray, **named: ArrayLike) -> None:
    """An error where a number is none, and none per example."""
    for name, value in named.items():
        if not isinstance(value, jax.Array):
            _validate.numbers(**{name: value})
        _validate.per_example(like.shape[:1], **{name: value})


def _box(bounds: Bounds, like: AnyArray) -> None:
    """An error where known bounds are none of these inputs."""
    if not _validate.is_traced(bounds):
        _validate.bounds(bounds, like.shape, open_box=True)


class _Norm(NamedTuple):
    distance: Callable[[AnyArray], Array]
    project: Callable[[AnyArray, AnyArray], Array]  # (delta, eps [B, 1, …])


class _Direction(NamedTuple):
    steepest: Callable[[AnyArray], Array]  # of a gradient whose largest entry is 1
    random_unit: Callable[..., Array]  # (key, shape, dtype), in the unit ball


_Row = TypeVar("_Row")


def _pick(table: dict[str, _Row], norm: Norm) -> _Row:
    _validate.one_of(table, norm=norm)
    return table[norm]


def _feature_axes(value: AnyArray) -> tuple[int, ...]:
    return tuple(range(1, value.ndim))


def _to_unit_scale(value: AnyArray) -> Array:
    """Each example divided by its largest entry; entries that are not finite become 0."""
    value = jnp.where(jnp.isfinite(value), value, 0.0)
    scale = _order.largest(value)
    return value / jnp.where(scale > 0, scale, 1.0)


def _l2(delta: AnyArray) -> Array:
    """The Euclidean norm with kept axes, `[B, 1, …]`, scaled against under- and overflow."""
    flat = flatten(delta)  # one long axis: XLA's CPU loops over short ones are slow
    scale = _order.largest(delta).reshape(-1, 1)
    scaled = flat / jnp.where(scale > 0, scale, 1.0)
    length = scale * jnp.sqrt(jnp.sum(jnp.square(scaled), axis=1, keepdims=True))
    return length.reshape(delta.shape[0], *(1,) * (delta.ndim - 1))


def _l2_project(delta: AnyArray, eps: AnyArray) -> Array:
    length = _l2(delta)
    # The unit vector first: eps / length would round to 0 for a huge delta.
    unit = delta / jnp.where(length > 0, length, 1.0)
    return jnp.where(length > eps, eps * unit, delta)


def _l2_random_unit(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    direction_key, radius_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    direction = jax.random.normal(direction_key, shape, dtype)
    # The share of the ball's volume within radius r is r^d.
    radius = jax.random.uniform(radius_key, (), dtype) ** (1.0 / math.prod(shape))
    return radius * direction / jnp.linalg.norm(direction.ravel())


def _l1_project(delta: AnyArray, eps: AnyArray) -> Array:
    # Every entry loses the same amount and stops at 0. What the largest one keeps is `kept`, and
    # an entry smaller by `gap` keeps `kept - gap`. Counting from the largest entry down instead of
    # up from 0 cancels no digits where the ball is tiny beside delta; and since no entry keeps
    # more than eps, gaps can be cut there, so that no sum overflows.
    flat, eps = flatten(delta), jnp.reshape(eps, (-1, 1))
    size = jnp.abs(flat)
    gap = _order.largest(delta).reshape(-1, 1) - size
    cut = jnp.minimum(gap, eps)

    def kept_by(rest: Array) -> Array:
        """Amount that the largest entry keeps if just these entries keep something."""
        total = eps + jnp.sum(jnp.where(rest, cut, 0.0), axis=1, keepdims=True)
        return total / jnp.sum(rest, axis=1, keepdims=True, dtype=total.dtype)

    # With too many entries it is too much, so those that even then keep nothing can go, until all
    # that are left keep something: a few passes, and D at most. The largest ones always stay.
    def drop(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        rest, _ = carry
        fewer = rest & ((cut < kept_by(rest)) | (gap == 0))
        return fewer, jnp.any(fewer != rest)

    # The first pass before the loop, so that its carry is sharded as what it becomes.
    start = drop((jnp.ones(flat.shape, bool), jnp.asarray(True)))
    rest, _ = jax.lax.while_loop(lambda carry: carry[1], drop, start)
    inside = jnp.sum(size, axis=1, keepdims=True) <= eps
    shrunk = jnp.sign(flat) * jnp.maximum(kept_by(rest) - gap, 0.0)
    return jnp.where(inside, flat, shrunk).reshape(delta.shape)


def _l1_steepest(gradient: AnyArray) -> Array:
    flat = flatten(gradient)
    largest = jnp.argmax(jnp.abs(flat), axis=1, keepdims=True)
    chosen = jnp.arange(flat.shape[1])[None] == largest
    return jnp.where(chosen, jnp.sign(flat), 0.0).reshape(gradient.shape)


def _l1_random_unit(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    # d + 1 exponential draws over their sum are uniform on the simplex; d of them with random
    # signs are uniform in the ball, and the last one is the distance to its surface.
    direction_key, rest_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    direction = jax.random.laplace(direction_key, shape, dtype)
    return direction / (jnp.sum(jnp.abs(direction)) + jax.random.exponential(rest_key, (), dtype))


def _l0_project(delta: AnyArray, eps: AnyArray) -> Array:
    size = flatten(jnp.abs(delta))
    size = jnp.where(jnp.isnan(size), 0.0, size)
    # In float32, since float16 counts no further than 2,048.
    counts = jnp.minimum(eps.reshape(-1, 1).astype(jnp.float32), size.shape[1])
    counts = jnp.floor(counts).astype(jnp.int32)
    before, last = _order.first_to_reach(size, jnp.ones(size.shape, jnp.int32), counts)
    return jnp.where((before | last).reshape(delta.shape), delta, 0.0)


_NORMS = {
    "linf": _Norm(
        distance=lambda delta: _order.largest(delta).reshape(delta.shape[0]),
        project=lambda delta, eps: jnp.clip(delta, -eps, eps),
    ),
    "l2": _Norm(
        distance=lambda delta: _l2(delta).reshape(delta.shape[0]),
        project=_l2_project,
    ),
    "l1": _Norm(
        distance=lambda delta: jnp.sum(jnp.abs(delta), axis=_feature_axes(delta)),
        project=_l1_project,
    ),
    "l0": _Norm(
        distance=lambda delta: jnp.sum(delta != 0, axis=_feature_axes(delta), dtype=delta.dtype),
        project=_l0_project,
    ),
}

# Where a linear function has a steepest direction, which l0 does not bound.
_DIRECTIONS = {
    "linf": _Direction(
        steepest=jnp.sign,
        random_unit=lambda key, shape, dtype: jax.random.uniform(
            key, shape, dtype, minval=-1.0, maxval=1.0
        ),
    ),
    "l2": _Direction(
        steepest=lambda gradient: normalize(gradient, "l2"),
        random_unit=_l2_random_unit,
    ),
    "l1": _Direction(steepest=_l1_steepest, random_unit=_l1_random_unit),
}
