"""Auto-PGD for l1: sparse steps, an exact projection, and a radius that shrinks in three stages."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _order, norms
from jdistill.attacks._apgd_core import (
    Progress,
    Search,
    Settings,
    aim_of,
    aims_of,
    evaluate,
    finish,
    needs_no_attack,
    start_point,
)
from jdistill.attacks._core.constant_search import select
from jdistill.attacks._core.problem import AttackResult
from jdistill.attacks._core.targets import Aims
from jdistill.attacks._loop import until_done
from jdistill.typing import Array

_RADII = (3.0, 2.0, 1.0)  # in units of eps
_SHRINK = 1.5  # of the step size
_SMALLEST_STEP = 0.1  # in units of the radius


class _Plan(NamedTuple):
    """What happens at each evaluation of a start, `[events]`: static tables.

    Attributes:
        radius: in units of eps.
        steps: gradient steps made before.
        enters: whether a stage begins.
        checks: whether the sparsity is looked at.
        leaves: whether its stage ends, and another one follows.
        judged: whether the radius is eps itself, so that a success counts.
    """

    radius: np.ndarray
    steps: np.ndarray
    enters: np.ndarray
    checks: np.ndarray
    leaves: np.ndarray
    judged: np.ndarray

    @classmethod
    def of(cls, num_steps: int) -> "_Plan":
        """Of a start with so many gradient steps."""
        early = math.ceil(0.3 * num_steps) if num_steps >= 3 else 0
        counts = (early, early, num_steps - 2 * early)
        rows = []
        steps = 0
        for stage, (radius, count) in enumerate(zip(_RADII, counts, strict=True)):
            period = max(int(0.04 * count), 1)
            for step in range(count + 1):
                last = step == count and stage < len(counts) - 1
                check = step > 0 and step % period == 0
                rows.append((radius, steps + step, step == 0, check, last, stage == 2))
            steps += count
        columns = [np.array(column) for column in zip(*rows, strict=True)]
        return cls(*columns)


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    progress: Progress
    inputs: Array
    best: Array
    best_gradient: Array
    best_loss: Array
    density: Array  # features changed at the last checkpoint; a step changes two thirds as many
    step_size: Array


def _project(search: Search, inputs: Array, radius: Array) -> Array:
    """The closest point in the box of the ball of that radius `[B]`, exactly but for rounding.

    It is the soft-thresholded change, clipped into the box; the threshold is found by bisection.
    """
    center, (low, high) = search.problem.inputs, search.problem.bounds
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


def _begin(search: Search, settings: Settings, radius: float, start: Array) -> Array:
    inputs = search.problem.inputs

    def noisy(keys: Array) -> Array:
        draw = lambda key: jax.random.normal(key, inputs.shape[1:], inputs.dtype)  # noqa: E731
        return inputs + jax.vmap(draw)(keys)

    return _project(search, start_point(search, settings, start, noisy), radius * search.eps)


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


def _step(
    search: Search, settings: Settings, plan: _Plan, aims: Aims | None, carry: _Carry
) -> _Carry:
    """One forward and backward pass: judge the current point, then move those that resist."""
    progress, inputs = carry.progress, carry.inputs
    active = ~progress.done
    radius, steps, enters, checks, leaves, judged = (
        jnp.asarray(column)[progress.event] for column in plan
    )
    radius = radius.astype(search.eps.dtype) * search.eps
    aim = aim_of(settings, aims, progress.start)
    gradient, success, gain = evaluate(search, aim, inputs)
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
    success &= judged

    better = enters | (gain > carry.best_loss)
    best = select(better, inputs, carry.best)
    best_gradient = select(better, gradient, carry.best_gradient)
    best_loss = jnp.where(better, gain, carry.best_loss)

    changed = norms.distance(best - search.problem.inputs, "l0")
    sparser = checks & (changed < 0.95 * carry.density)
    smallest = _SMALLEST_STEP * radius
    step_size = jnp.where(
        enters | sparser,
        radius,
        jnp.where(checks, jnp.maximum(carry.step_size / _SHRINK, smallest), carry.step_size),
    )
    look = enters | checks
    density = jnp.where(look, changed, carry.density)
    point = select(sparser, best, inputs)
    gradient = select(sparser, best_gradient, gradient)
    moved = _project(search, _ascend(point, gradient, step_size, density), radius)
    # The next stage begins at the best point of this one.
    later = jnp.asarray(plan.radius)[jnp.minimum(progress.event + 1, len(plan.radius) - 1)]
    moved = select(leaves, _project(search, best, later.astype(radius.dtype) * search.eps), moved)

    progress, again = progress.after(
        settings,
        gain=gain,
        success=success,
        last=progress.event == len(plan.radius) - 1,
        best=best,
        best_loss=best_loss,
        step=steps.astype(jnp.int32),
    )
    if settings.num_starts > 1:
        moved = select(again, _begin(search, settings, _RADII[0], progress.start), moved)
    stopped = active & progress.done
    moved = select(stopped, select(success, inputs, best), moved)
    return _Carry(
        progress=progress,
        inputs=select(active, moved, inputs),
        best=best,
        best_gradient=best_gradient,
        best_loss=best_loss,
        density=density,
        step_size=step_size,
    )


@functools.partial(jax.jit, static_argnames="settings")
def run(search: Search, settings: Settings) -> AttackResult:
    """The whole attack, for l1."""
    problem = search.problem
    plan = _Plan.of(settings.num_steps)
    logits = problem.logits_fn(problem.inputs)
    clean_success = needs_no_attack(search, settings, logits)
    aims = aims_of(search, settings, logits)
    progress = Progress.begin(search, settings, clean_success, len(plan.radius))
    start = _begin(search, settings, _RADII[0], progress.start)
    zeros = jnp.zeros_like(search.eps)
    carry = _Carry(
        progress=progress,
        inputs=start,
        best=start,
        best_gradient=jnp.zeros_like(start),
        best_loss=zeros,
        density=zeros,
        step_size=zeros,
    )
    carry = until_done(
        lambda search, aims, carry: _step(search, settings, plan, aims, carry),
        (search, aims),
        carry,
        at_most=settings.num_starts * settings.num_steps,
        spread=problem.spread,
        done=lambda carry: carry.progress.done,
    )
    return finish(
        search,
        settings,
        carry.progress,
        candidate=carry.inputs,
        clean_success=clean_success,
        aim=aim_of(settings, aims, carry.progress.start),
    )
