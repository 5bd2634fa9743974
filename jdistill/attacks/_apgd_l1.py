"""Auto-PGD for l1: sparse steps, an exact projection, and a radius that shrinks in three stages."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _order, norms
from jdistill._jax import register
from jdistill.attacks._apgd_core import APGD, State, Visited
from jdistill.attacks._core.engine import select
from jdistill.attacks._core.problem import Problem
from jdistill.typing import Array

_RADII = (3.0, 2.0, 1.0)  # in units of eps
_SHRINK = 1.5  # of the step size
_SMALLEST_STEP = 0.1  # in units of the radius


class _Plan(NamedTuple):
    """Course of a start, evaluation by evaluation, `[events]`: static tables.

    Attributes:
        radius: in units of eps.
        enters: whether a stage begins.
        checks: whether the sparsity is looked at.
        leaves: whether its stage ends, and another one follows.
        judged: whether the radius is eps itself, so that a success counts.
    """

    radius: np.ndarray
    enters: np.ndarray
    checks: np.ndarray
    leaves: np.ndarray
    judged: np.ndarray

    @classmethod
    @functools.cache
    def of(cls, num_steps: int) -> "_Plan":
        """Plan of a start with so many gradient steps."""
        early = math.ceil(0.3 * num_steps) if num_steps >= 3 else 0
        counts = (early, early, num_steps - 2 * early)
        rows = []
        for stage, (radius, count) in enumerate(zip(_RADII, counts, strict=True)):
            period = max(int(0.04 * count), 1)
            for step in range(count + 1):
                last = step == count and stage < len(counts) - 1
                check = step > 0 and step % period == 0
                rows.append((radius, step == 0, check, last, stage == 2))
        columns = [np.array(column) for column in zip(*rows, strict=True)]
        return cls(*columns)


class _Schedule(NamedTuple):
    density: Array  # features changed at the last checkpoint; a step changes two thirds as many
    step_size: Array


@register
class SparseAPGD(APGD):
    """The method for l1."""

    @property
    def plan(self) -> _Plan:
        """The tables of a start."""
        return _Plan.of(self.num_steps)

    @property
    def events_per_start(self) -> int:
        return len(self.plan.radius)

    def begins(self, event: Array) -> Array:
        return jnp.asarray(self.plan.enters)[event]

    def counts(self, event: Array) -> Array:
        return jnp.asarray(self.plan.judged)[event]

    def noisy(self, problem: Problem, keys: Array) -> Array:
        """Points around the inputs, as in the released code."""
        inputs = problem.inputs
        draw = lambda key: jax.random.normal(key, inputs.shape[1:], inputs.dtype)  # noqa: E731
        return inputs + jax.vmap(draw)(keys)

    def into_ball(self, problem: Problem, inputs: Array) -> Array:
        return _project(problem, inputs, _RADII[0] * self.eps)

    def first_schedule(self, problem: Problem, start: Array) -> _Schedule:
        zeros = jnp.zeros_like(self.eps)
        return _Schedule(zeros, zeros)

    def move(
        self, problem: Problem, state: State, event: Array, now: Visited
    ) -> tuple[Array, _Schedule]:
        """A sparse step, from the best point where that became sparser."""
        best, (density, step_size) = state.best, state.schedule
        enters, checks, leaves = (
            jnp.asarray(column)[event]
            for column in (self.plan.enters, self.plan.checks, self.plan.leaves)
        )
        radii = jnp.asarray(self.plan.radius, self.eps.dtype)
        radius = radii[event] * self.eps

        changed = norms.distance(best.inputs - problem.inputs, "l0")
        sparser = checks & (changed < 0.95 * density)
        smaller = jnp.maximum(step_size / _SHRINK, _SMALLEST_STEP * radius)
        step_size = jnp.where(enters | sparser, radius, jnp.where(checks, smaller, step_size))
        density = jnp.where(enters | checks, changed, density)
        point, gradient, _ = select(sparser, best, now)
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
        moved = _project(problem, _ascend(point, gradient, step_size, density), radius)
        # The next stage begins at the best point of this one.
        later = radii[jnp.minimum(event + 1, len(radii) - 1)] * self.eps
        moved = select(leaves, _project(problem, best.inputs, later), moved)
        return moved, _Schedule(density, step_size)


def _project(problem: Problem, inputs: Array, radius: Array) -> Array:
    """The closest point in the box of the ball of that radius `[B]`, exactly but for rounding.

    It is the soft-thresholded change, clipped into the box; the threshold is found by bisection.
    """
    center, (low, high) = problem.inputs, problem.bounds
    delta = inputs - center
    room = norms.flatten(jnp.where(delta > 0, high - center, center - low))
    largest, delta = norms.distance(delta, "linf"), norms.flatten(delta)
    size = jnp.abs(delta)

    def shrunk(threshold: Array) -> Array:
        return jnp.clip(size - threshold[:, None], 0.0, room)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        middle = 0.5 * (ends[0] + ends[1])
        outside = jnp.sum(shrunk(middle), axis=1) > radius
        return jnp.where(outside, middle, ends[0]), jnp.where(outside, ends[1], middle)

    zeros = jnp.zeros_like(radius)
    halvings = jnp.finfo(size.dtype).nmant + 12  # until nothing but rounding is left
    _, threshold = jax.lax.fori_loop(0, halvings, halve, (zeros, largest))
    inside = jnp.sum(shrunk(zeros), axis=1) <= radius
    threshold = jnp.where(inside, 0.0, threshold)
    moved = (jnp.sign(delta) * shrunk(threshold)).reshape(center.shape)
    # A bound itself where the room is used up: center + room may be a rounding beyond it.
    return jnp.clip(center + moved, low, high)


def _ascend(inputs: Array, gradient: Array, length: Array, density: Array) -> Array:
    """Equal steps along the signs of the gradient's largest entries, two thirds of `density [B]`.

    In whole numbers: at a fraction that rounding decides, nets and devices would differ.
    """
    size = norms.flatten(jnp.abs(gradient))
    entries = (2 * density.astype(jnp.int32) + 2) // 3
    entries = jnp.clip(entries, 1, size.shape[1])[:, None]
    _, last = _order.first_to_reach(size, jnp.ones(size.shape, jnp.int32), entries)
    smallest = jnp.sum(jnp.where(last, size, 0.0), axis=1)
    kept = jnp.abs(gradient) >= norms.per_example(smallest, gradient)  # and all equal ones
    direction = jnp.where(kept, jnp.sign(gradient), 0.0)
    return inputs + norms.per_example(length, inputs) * norms.normalize(direction, "l1")
