"""What a start of FAB does, step by step."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import norms
from jdistill.attacks._core import hyperplane as _hyperplane
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.constant_search import select
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.attacks._core.targets import Aims
from jdistill.typing import Array


class Search(NamedTuple):
    """The checked arguments of one call."""

    problem: Problem
    eps: Array  # [B]; inf without one
    alpha_max: Array  # [B]
    eta: Array  # [B]
    beta: Array  # [B]
    first_target: Array  # scalar, its rank


class Settings(NamedTuple):
    """What is static."""

    norm: str
    num_steps: int
    num_restarts: int
    num_targets: int | None  # classes to aim at, one after another; None: the nearest boundary
    first_will_do: bool  # whether an example ends with the start that succeeded

    @property
    def num_starts(self) -> int:
        """Of an example that resists."""
        return self.num_restarts * (self.num_targets or 1)


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    inputs: Array
    step: Array  # made since the start
    start: Array
    done: Array
    best: Array
    best_distance: Array
    best_start: Array
    first_success: Array
    queries: Array


def _boundary(problem: Problem, norm: str, aim: Array | None, inputs: Array) -> tuple[Array, Array]:
    """The linearized boundary to step to: its unit normal and gap, see `_hyperplane`."""
    goal = problem.goal
    logits, pull_back = jax.vjp(problem.logits_fn, inputs)
    num_classes = logits.shape[1]

    def between(raised: Array, lowered: Array) -> tuple[Array, Array]:
        one_hot = functools.partial(jax.nn.one_hot, num_classes=num_classes, dtype=logits.dtype)
        (normal,) = pull_back(one_hot(raised) - one_hot(lowered))
        rows = jnp.arange(logits.shape[0])
        return _hyperplane.unit(normal, logits[rows, lowered] - logits[rows, raised])

    if aim is not None:
        if goal.targets is None:
            return between(aim, goal.labels)
        # A third class may lie between the label and the target.
        own = jax.nn.one_hot(aim, num_classes, dtype=bool)
        return between(aim, jnp.argmax(jnp.where(own, -jnp.inf, logits), axis=1))

    def nearer(kept: tuple[Array, Array, Array], index: Array) -> tuple[tuple, None]:
        normal, gap = between(index + (index >= goal.labels), goal.labels)  # all but the label
        distance = _hyperplane.distance(normal, gap, norm)
        return select(distance < kept[0], (distance, normal, gap), kept), None

    nothing = jnp.zeros(inputs.shape[:1], inputs.dtype)
    kept = nothing + jnp.inf, jnp.zeros_like(inputs), nothing
    # One class at a time: K gradients at once would be K times the memory.
    (_, normal, gap), _ = jax.lax.scan(nearer, kept, jnp.arange(num_classes - 1))
    return normal, gap


def _move(search: Search, norm: str, inputs: Array, normal: Array, gap: Array) -> Array:
    """One step between the iterate and the clean input, both projected onto the boundary."""
    clean, bounds = search.problem.inputs, search.problem.bounds
    axes = tuple(range(1, inputs.ndim))
    gaps = jnp.concatenate([gap, gap + jnp.sum(normal * (inputs - clean), axis=axes)])
    points, normals = jnp.concatenate([inputs, clean]), jnp.concatenate([normal, normal])
    ways = _hyperplane.project(points, normals, gaps, norm, bounds)
    lengths = norms.distance(ways, norm)
    size = inputs.shape[0]
    total = lengths[:size] + lengths[size:]
    # Where there is no boundary to see, nothing but the draw towards the input is left.
    share = jnp.where(total > 0, lengths[:size] / jnp.where(total > 0, total, 1.0), 0.5)
    share = norms.per_example(jnp.minimum(share, search.alpha_max), inputs)
    eta = norms.per_example(search.eta, inputs)
    own, other = inputs + eta * ways[:size], clean + eta * ways[size:]
    return jnp.clip((1 - share) * own + share * other, *bounds)


def _begin(search: Search, settings: Settings, start: Array, best_distance: Array) -> Array:
    """Where each example's start `[B]` begins."""
    problem, clean = search.problem, search.problem.inputs
    if settings.num_restarts == 1:
        return clean
    low, high = problem.bounds
    place = search.first_target * settings.num_restarts + start
    keys = jax.vmap(jax.random.fold_in)(_base.need_key(problem, "random starts"), place)
    draw = jax.random.normal
    if settings.norm == "linf":
        draw = functools.partial(jax.random.uniform, minval=-1.0, maxval=1.0)
    noise = jax.vmap(lambda key: draw(key, clean.shape[1:], clean.dtype))(keys)
    # Where neither a radius nor a distance is known, the box's own.
    widest = norms.distance(jnp.full_like(clean, high - low), settings.norm)
    radius = jnp.minimum(jnp.minimum(search.eps, best_distance), widest)
    noise = norms.normalize(noise, settings.norm) * norms.per_example(radius / 2, clean)
    return select(start % settings.num_restarts == 0, clean, jnp.clip(clean + noise, low, high))


def _step(search: Search, settings: Settings, aims: Aims | None, carry: _Carry) -> _Carry:
    """One step to the boundary, and back a little where it was crossed."""
    problem, norm = search.problem, settings.norm
    clean, active = problem.inputs, ~carry.done
    aim = None if aims is None else aims.at(carry.start // settings.num_restarts)
    normal, gap = _boundary(problem, norm, aim, carry.inputs)
    moved = _move(search, norm, carry.inputs, normal, gap)

    adversarial = active & problem.goal.reached(problem.logits_fn(moved))
    distance = norms.distance(moved - clean, norm)
    found = adversarial & (distance <= search.eps)
    closer = found & (distance < carry.best_distance)
    best_distance = jnp.where(closer, distance, carry.best_distance)
    back = clean + norms.per_example(search.beta, clean) * (moved - clean)
    inputs = select(adversarial, jnp.clip(back, *problem.bounds), moved)

    made = settings.num_steps * carry.start + carry.step + 1
    spent = active & (carry.step + 1 == settings.num_steps)
    over = spent & (carry.start == settings.num_starts - 1)
    if settings.first_will_do:
        over |= spent & jnp.isfinite(best_distance)
    again = spent & ~over
    start = carry.start + again
    inputs = select(again, _begin(search, settings, start, best_distance), inputs)
    return _Carry(
        inputs=select(active, inputs, carry.inputs),
        step=jnp.where(again, 0, carry.step + active),
        start=start,
        done=carry.done | over,
        best=select(closer, moved, carry.best),
        best_distance=best_distance,
        best_start=jnp.where(closer, carry.start, carry.best_start),
        first_success=jnp.where(found & (carry.first_success < 0), made, carry.first_success),
        queries=carry.queries + 2 * active,
    )


@functools.partial(jax.jit, static_argnames="settings")
def run(search: Search, settings: Settings) -> AttackResult:
    """The whole attack."""
    problem = search.problem
    logits = problem.logits_fn(problem.inputs)
    clean_success = problem.goal.reached_clean(logits)
    aims = None
    if settings.num_targets is not None:
        aims = Aims.of(problem.goal, logits, search.first_target)
    zeros = jnp.zeros(clean_success.shape, jnp.int32)
    carry = _Carry(
        inputs=problem.inputs,
        step=zeros,
        start=zeros,
        done=clean_success,
        best=problem.inputs,
        best_distance=jnp.full_like(search.eps, jnp.inf),
        best_start=zeros,
        first_success=jnp.where(clean_success, 0, -1).astype(jnp.int32),
        queries=zeros + 1,  # the clean forward pass
    )
    carry = jax.lax.while_loop(
        lambda carry: jnp.any(~carry.done),
        functools.partial(_step, search, settings, aims),
        carry,
    )
    info = {"first_success": carry.first_success, "restart": carry.best_start}
    aim = None if aims is None else aims.at(carry.best_start // settings.num_restarts)
    if aim is not None:
        info["target"] = aim
    return _base.finish(
        problem,
        carry.best,
        clean_success=clean_success,
        found=jnp.isfinite(carry.best_distance),
        queries=carry.queries,
        norm=settings.norm,
        info=info,
        minimum_norm=True,
    )
