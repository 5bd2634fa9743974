"""Projection of a point onto a hyperplane within the box, shortest in linf, l2 or l1, per example.

A hyperplane `{z : ⟨normal, z - point⟩ = gap}` is given relative to a point: what the logits say of
it there is the gap itself, and no digits cancel. Everything is in units of the normal's largest
entry (`unit`), so that no scale of the network's logits over- or underflows, and no floor hides a
small gradient.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdistill import _order, norms
from jdistill.typing import Array, ArrayLike, Norm

# A linear function rises along its steepest direction at the dual norm's rate.
_DUAL: dict[Norm, Norm] = {"linf": "l1", "l2": "l2", "l1": "linf"}


def unit(normal: Array, gap: Array) -> tuple[Array, Array]:
    """The same hyperplane with a normal whose largest entry is 1.

    Args:
        normal: `[B, ...]`; entries that are not finite are taken for 0.
        gap: `[B]`.

    Returns:
        The normal and the gap; both 0 where there is no hyperplane: no normal, or a gap that is
        not finite.
    """
    normal, gap = jnp.where(jnp.isfinite(normal), normal, 0.0), gap.astype(normal.dtype)
    scale = norms.distance(normal, "linf")
    usable = (scale > 0) & jnp.isfinite(gap)
    scale = jnp.where(usable, scale, 1.0)
    normal = jnp.where(norms.per_example(usable, normal) > 0, normal, 0.0)
    return normal / norms.per_example(scale, normal), jnp.where(usable, gap, 0.0) / scale


def distance(normal: Array, gap: Array, norm: Norm) -> Array:
    """Distance to the hyperplane where no box is in the way, `[B]`; `inf` without a hyperplane.

    Args:
        normal: `[B, ...]`, from `unit`.
        gap: `[B]`, from `unit`.
        norm: `"linf"`, `"l2"` or `"l1"`.
    """
    rate = norms.distance(normal, _DUAL[norm])
    return jnp.where(rate > 0, jnp.abs(gap) / jnp.where(rate > 0, rate, 1.0), jnp.inf)


def project(
    points: Array,
    normal: Array,
    gap: Array,
    norm: Norm,
    bounds: tuple[ArrayLike, ArrayLike],
) -> Array:
    """The shortest way from each point to its hyperplane within the box.

        argmin_d ‖d‖   with ⟨normal, d⟩ = gap and points + d in the box

    Every entry moves to the side that closes the gap, and none farther than its room `r` to the
    bound. With the weights `a = |normal|` the optima are

        linf: d = min(t, r)     l2: d = min(t·a, r)     with t such that ⟨a, d⟩ = |gap|
        l1: the entries of the largest weights move to their bounds until ⟨a, d⟩ = |gap|

    Where the box ends before the hyperplane, all entries with a weight move to their bounds.

    Args:
        points: `[B, ...]` inside the box.
        normal: `[B, ...]`, from `unit`. An entry that is 0 does not move.
        gap: `[B]`, of the points; infinite is beyond the box.
        norm: `"linf"`, `"l2"` or `"l1"`.
        bounds: the box, `(low, high)`.

    Returns:
        `d [B, ...]`.
    """
    low, high = bounds
    sign = jnp.sign(normal) * norms.per_example(jnp.where(gap < 0, -1.0, 1.0), normal)
    weights = norms.flatten(jnp.abs(normal))
    room = norms.flatten(jnp.where(sign > 0, high - points, points - low))
    room = jnp.where(weights > 0, jnp.maximum(room, 0.0), 0.0)
    amount = jnp.abs(gap)[:, None]
    within = jnp.sum(weights * room, axis=1, keepdims=True) > amount
    moves = jnp.where(within, _MOVES[norm](weights, room, amount, within), room)
    return sign * moves.reshape(sign.shape)


def _linf(weights: Array, room: Array, amount: Array, within: Array) -> Array:
    return _level((weights > 0).astype(weights.dtype), weights, room, amount, within)


def _l2(weights: Array, room: Array, amount: Array, within: Array) -> Array:
    return _level(weights, weights, room, amount, within)


def _level(rates: Array, weights: Array, room: Array, amount: Array, within: Array) -> Array:
    """`min(t · rates, room)` with `t` such that the weighted sum is the amount, `[B, D]`.

    The sum is concave and piecewise linear in `t`. So Newton's method from 0 on stays below the
    root: each step fills up entries that stay full, or is the last one and exact.
    """

    def step(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        level, full, _ = carry
        rest = amount - jnp.sum(jnp.where(full, weights * room, 0.0), axis=1, keepdims=True)
        slope = jnp.sum(jnp.where(full, 0.0, weights * rates), axis=1, keepdims=True)
        steeper = rest / jnp.where(slope > 0, slope, 1.0)
        level = jnp.where(slope > 0, jnp.maximum(level, steeper), level)
        filled = full | (room <= level * rates)
        return level, filled, jnp.any(filled & ~full)

    start = jnp.zeros_like(amount), (room <= 0) | ~within, jnp.asarray(True)
    level, _, _ = jax.lax.while_loop(lambda carry: carry[2], step, start)
    return jnp.where(weights > 0, jnp.minimum(level * rates, room), 0.0)


def _l1(weights: Array, room: Array, amount: Array, within: Array) -> Array:
    del within
    return _order.fill(weights, room, weights, amount)


_MOVES: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "linf": _linf,
    "l2": _l2,
    "l1": _l1,
}
