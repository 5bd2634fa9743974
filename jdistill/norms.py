"""Balls and boxes: distances, projections, steepest directions and random starts, per example.

Every function works on batches `[B, ...]` and treats each example alone; `eps` is a scalar or
`[B]`. The norms are named `"linf"` and `"l2"`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate
from jdistill.typing import Array, ArrayLike


def per_example(value: ArrayLike, like: Array) -> Array:
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
    value = jnp.asarray(value, like.dtype)
    value = jnp.broadcast_to(value, like.shape[:1])
    return value.reshape(like.shape[:1] + (1,) * (like.ndim - 1))


def distance(delta: Array, norm: str) -> Array:
    """The norm of each example's difference.

    Args:
        delta: `[B, ...]` float.
        norm: `"linf"` or `"l2"`.

    Returns:
        `[B]` float, at least 0; accurate for tiny entries too (no underflow of the squares).

    Raises:
        ValueError: an unknown norm.

    Example:
        >>> distance(jnp.array([[3.0, -4.0]]), "l2").tolist()
        [5.0]
        >>> distance(jnp.array([[3.0, -4.0]]), "linf").tolist()
        [4.0]
    """
    return _norm(norm).distance(delta)


def project(delta: Array, eps: ArrayLike, norm: str) -> Array:
    """The closest point of the ball of radius `eps` around 0, per example.

    Args:
        delta: `[B, ...]` float.
        eps: radius, at least 0; scalar or `[B]`.
        norm: `"linf"` or `"l2"`.

    Returns:
        `[B, ...]`.

    Raises:
        ValueError: an unknown norm.

    Example:
        >>> project(jnp.array([[3.0, -4.0]]), 1.0, "l2").round(3).tolist()
        [[0.6..., -0.8...]]
    """
    return _norm(norm).project(delta, per_example(eps, delta))


def steepest(gradient: Array, norm: str) -> Array:
    """The direction of unit norm along which a linear function with this gradient grows most.

    The gradient is first divided by its largest entry, so that gradients of any size give a full
    step: an absolute floor under the norm would hide the small ones, which is how several
    toolkits overrate masked networks. Zero and non-finite entries give 0.

    Args:
        gradient: `[B, ...]` float.
        norm: `"linf"` (the sign) or `"l2"` (the unit vector).

    Returns:
        `[B, ...]`; all 0 where the gradient is exactly 0.

    Raises:
        ValueError: an unknown norm.

    Example:
        >>> steepest(jnp.array([[3e-30, -4e-30]]), "l2").round(3).tolist()
        [[0.6..., -0.8...]]
    """
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
    scale = jnp.max(jnp.abs(gradient), axis=_feature_axes(gradient), keepdims=True)
    return _norm(norm).steepest(gradient / jnp.where(scale > 0, scale, 1.0))


def random_start(keys: Array, like: Array, eps: ArrayLike, norm: str) -> Array:
    """A point drawn uniformly from the ball of radius `eps`, one per example.

    Args:
        keys: `[B]` PRNG keys; example `b` draws from `keys[b]` alone.
        like: `[B, ...]`, for shape and type.
        eps: radius, at least 0; scalar or `[B]`.
        norm: `"linf"` or `"l2"`.

    Returns:
        `[B, ...]`.

    Raises:
        ValueError: an unknown norm.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 4)
        >>> noise = random_start(keys, jnp.zeros((4, 28, 28)), 0.3, "l2")
        >>> noise.shape, bool(jnp.all(distance(noise, "l2") < 0.301))
        ((4, 28, 28), True)
    """
    shape = like.shape[1:]
    unit = jax.vmap(lambda key: _norm(norm).random_unit(key, shape, like.dtype))(keys)
    return unit * per_example(eps, like)


def into_ball_and_box(
    inputs: Array, center: Array, eps: ArrayLike, norm: str, bounds: tuple[ArrayLike, ArrayLike]
) -> Array:
    """The inputs projected into the ball around `center`, then clipped into the box.

    The center lies in the box, so clipping moves every entry towards it and the result is in both.

    Args:
        inputs: `[B, ...]` float.
        center: `[B, ...]` float, inside the box.
        eps: radius, at least 0; scalar or `[B]`.
        norm: `"linf"` or `"l2"`.
        bounds: the box, `(low, high)`.

    Returns:
        `[B, ...]`.

    Raises:
        ValueError: an unknown norm.

    Example:
        >>> center = jnp.array([[0.5, 0.9]])
        >>> into_ball_and_box(center + 1.0, center, 0.25, "linf", (0.0, 1.0)).tolist()
        [[0.75, 1.0]]
    """
    low, high = bounds
    return jnp.clip(center + project(inputs - center, eps, norm), low, high)


class _Norm(NamedTuple):
    distance: Callable[[Array], Array]
    project: Callable[[Array, Array], Array]  # (delta, eps [B, 1, …])
    steepest: Callable[[Array], Array]  # of a gradient whose largest entry is 1
    random_unit: Callable[..., Array]  # (key, shape, dtype), in the unit ball


def _norm(name: str) -> _Norm:
    _validate.one_of(_NORMS, norm=name)
    return _NORMS[name]


def _feature_axes(value: Array) -> tuple[int, ...]:
    return tuple(range(1, value.ndim))


def _l2(delta: Array) -> Array:
    """The Euclidean norm with kept axes, `[B, 1, …]`, scaled against under- and overflow."""
    axes = _feature_axes(delta)
    scale = jnp.max(jnp.abs(delta), axis=axes, keepdims=True)
    scaled = delta / jnp.where(scale > 0, scale, 1.0)
    return scale * jnp.sqrt(jnp.sum(jnp.square(scaled), axis=axes, keepdims=True))


def _l2_project(delta: Array, eps: Array) -> Array:
    length = _l2(delta)
    # The unit vector first: eps / length would round to 0 for a huge delta.
    unit = delta / jnp.where(length > 0, length, 1.0)
    return jnp.where(length > eps, eps * unit, delta)


def _l2_steepest(gradient: Array) -> Array:
    length = _l2(gradient)
    return gradient / jnp.where(length > 0, length, 1.0)


def _l2_random_unit(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    direction_key, radius_key = jax.random.fold_in(key, 0), jax.random.fold_in(key, 1)
    direction = jax.random.normal(direction_key, shape, dtype)
    # The share of the ball's volume within radius r is r^d.
    radius = jax.random.uniform(radius_key, (), dtype) ** (1.0 / math.prod(shape))
    return radius * direction / jnp.linalg.norm(direction.ravel())


_NORMS = {
    "linf": _Norm(
        distance=lambda delta: jnp.max(jnp.abs(delta), axis=_feature_axes(delta)),
        project=lambda delta, eps: jnp.clip(delta, -eps, eps),
        steepest=jnp.sign,
        random_unit=lambda key, shape, dtype: jax.random.uniform(
            key, shape, dtype, minval=-1.0, maxval=1.0
        ),
    ),
    "l2": _Norm(
        distance=lambda delta: _l2(delta).reshape(delta.shape[0]),
        project=_l2_project,
        steepest=_l2_steepest,
        random_unit=_l2_random_unit,
    ),
}
