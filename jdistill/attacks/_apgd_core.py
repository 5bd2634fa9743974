"""What a start of Auto-PGD does, step by step, for linf and l2; and what l1 shares with it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import norms
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.constant_search import select
from jdistill.attacks._core.gradient import gain_gradient
from jdistill.attacks._core.problem import AttackResult, Goal, Problem
from jdistill.attacks._core.targets import Aims
from jdistill.attacks._loop import until_done
from jdistill.typing import Array

_MOMENTUM = 0.25  # the share of the step before


class Search(NamedTuple):
    """The checked arguments of one call."""

    problem: Problem
    loss: Callable[..., Array]
    eps: Array  # [B]
    rho: Array  # [B]
    init: Array | None
    first_target: Array  # scalar, its rank


class Settings(NamedTuple):
    """What is static.

    Attributes:
        num_targets: classes to aim at, one after another; None: the loss aims at none.
    """

    norm: str
    num_steps: int
    num_restarts: int
    num_targets: int | None
    best_loss: bool
    trace: bool

    @property
    def num_starts(self) -> int:
        """Of an example that resists."""
        return self.num_restarts * (self.num_targets or 1)


class Progress(NamedTuple):
    """How far each example is; every leaf leads with `[B]`.

    Attributes:
        event: evaluations made since the start, 0 at its first point.
        start: the start it is in.
        kept: with `best_loss`, the best point of all starts, and its loss.
        losses: `[B, starts, events]`, or `[B, 0, 0]` without a trace.
    """

    event: Array
    start: Array
    done: Array
    first_success: Array
    queries: Array
    kept: tuple[Array, Array] | None
    losses: Array

    @classmethod
    def begin(
        cls, search: Search, settings: Settings, clean_success: Array, num_events: int
    ) -> "Progress":
        """Before the first evaluation."""
        zeros = jnp.zeros(search.eps.shape, jnp.int32)
        inputs = search.problem.inputs
        shape = (settings.num_starts, num_events) if settings.trace else (0, 0)
        return cls(
            event=zeros,
            start=zeros,
            done=clean_success,
            first_success=jnp.where(clean_success, 0, -1),
            queries=zeros + 1,  # the clean forward pass
            kept=(inputs, jnp.full_like(search.eps, -jnp.inf)) if settings.best_loss else None,
            losses=jnp.full(zeros.shape + shape, jnp.nan, inputs.dtype),
        )

    def after(
        self,
        settings: Settings,
        *,
        gain: Array,
        success: Array,
        last: Array,
        best: Array,
        best_loss: Array,
        step: Array,
    ) -> tuple["Progress", Array]:
        """After an evaluation, and which examples begin their next start `[B]`.

        Args:
            settings: of the search.
            gain: `[B]`, of the point evaluated.
            success: `[B]`, whether that point is one.
            last: `[B]`, whether it is the start's last.
            best: `[B, ...]`, the start's best point so far.
            best_loss: `[B]`, its gain.
            step: `[B]`, gradient steps made since the start.
        """
        active = ~self.done
        success &= active
        stop = jnp.zeros_like(success) if settings.best_loss else success
        spent = active & ~stop & last
        kept = self.kept
        if kept is not None:
            better = spent & (best_loss > kept[1])
            kept = select(better, best, kept[0]), jnp.where(better, best_loss, kept[1])
        over = spent & (self.start == settings.num_starts - 1)
        again = spent & ~over
        moving = active & ~stop & ~over
        return Progress(
            event=jnp.where(again, 0, self.event + moving),
            start=self.start + again,
            done=self.done | stop | over,
            first_success=jnp.where(success & (self.first_success < 0), step, self.first_success),
            queries=self.queries + active,
            kept=kept,
            losses=_base.record(self.losses, active, gain, self.start, self.event),
        ), again


def aims_of(search: Search, settings: Settings, logits: Array) -> Aims | None:
    """From the clean logits; None where the loss aims at no class."""
    if settings.num_targets is None:
        return None
    return Aims.of(search.problem.goal, logits, search.first_target)


def aim_of(settings: Settings, aims: Aims | None, start: Array) -> Array | None:
    """The class that each example's start aims at, `[B]`."""
    return None if aims is None else aims.at(start // settings.num_restarts)


def evaluate(search: Search, aim: Array | None, inputs: Array) -> tuple[Array, Array, Array]:
    """Gradient `[B, ...]`, success `[B]` and gain `[B]`; a NaN is no gain at all."""
    problem, loss, goal = search.problem, search.loss, search.problem.goal
    if aim is not None:
        loss, goal = functools.partial(loss, targets=aim), Goal(goal.labels, None)
    gradient, logits, gain = gain_gradient(problem, goal, loss, inputs)
    gain = gain.astype(search.eps.dtype)  # of a network of fewer bits
    return gradient, problem.goal.reached(logits), jnp.where(jnp.isnan(gain), -jnp.inf, gain)


def needs_no_attack(search: Search, settings: Settings, logits: Array) -> Array:
    """Which examples succeed already, `[B]`; for the largest loss all are attacked."""
    reached = search.problem.goal.reached_clean(logits)
    return jnp.zeros_like(reached) if settings.best_loss else reached


def start_point(
    search: Search, settings: Settings, start: Array, noisy: Callable[[Array], Array]
) -> Array:
    """Where each example's start `[B]` begins: at `init`, or at `noisy(keys [B])`."""
    injected = search.init
    if injected is not None and settings.num_restarts == 1:
        return injected
    base_keys = _base.need_key(search.problem, "random starts")
    draw = search.first_target * settings.num_restarts + start
    point = noisy(jax.vmap(jax.random.fold_in)(base_keys, draw))
    if injected is None:
        return point
    return select(start % settings.num_restarts == 0, injected, point)


def finish(
    search: Search,
    settings: Settings,
    progress: Progress,
    *,
    candidate: Array,
    clean_success: Array,
    aim: Array | None,
) -> AttackResult:
    """The result; `candidate` is where an example stopped, or its best point."""
    if progress.kept is not None:
        candidate = progress.kept[0]
    info: dict[str, Any] = {"first_success": progress.first_success, "restart": progress.start}
    if aim is not None:
        info["target"] = aim
    if settings.trace:
        info["loss"] = progress.losses
    return _base.finish(
        search.problem,
        candidate,
        clean_success=clean_success,
        found=jnp.ones(search.eps.shape, bool),
        queries=progress.queries,
        norm=settings.norm,
        info=info,
        minimum_norm=False,
    )


def checkpoints(num_steps: int) -> np.ndarray:
    """After each number of steps, those since the last checkpoint if it is one, else 0.

    The first one comes after 22 % of the steps; each period is 3 % shorter than the one before,
    and no shorter than 6 %.
    """
    period = max(int(0.22 * num_steps), 1)
    shrink, shortest = max(int(0.03 * num_steps), 1), max(int(0.06 * num_steps), 1)
    periods = np.zeros(num_steps + 1, np.int32)
    step = period
    while step <= num_steps:
        periods[step] = period
        period = max(period - shrink, shortest)
        step += period
    return periods


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    progress: Progress
    inputs: Array
    previous: Array  # the point that the last step began at
    best: Array
    best_gradient: Array
    best_loss: Array
    checked_loss: Array  # the best one at the last checkpoint
    last_loss: Array
    increases: Array  # steps since the last checkpoint in which the loss grew
    halved: Array  # whether the last checkpoint halved the step size
    step_size: Array


def _begin(search: Search, settings: Settings, start: Array) -> Array:
    problem = search.problem

    def noisy(keys: Array) -> Array:
        shape, dtype = problem.inputs.shape[1:], problem.inputs.dtype

        def draw(key: Array) -> Array:
            if settings.norm == "linf":
                return jax.random.uniform(key, shape, dtype, minval=-1.0, maxval=1.0)
            return jax.random.normal(key, shape, dtype)

        noise = jax.vmap(draw)(keys)  # stretched to the surface of the ball, as in the reference
        unit = norms.normalize(noise, settings.norm)
        return jnp.clip(
            problem.inputs + norms.per_example(search.eps, unit) * unit, *problem.bounds
        )

    point = start_point(search, settings, start, noisy)
    return _into(search, settings, point)


def _into(search: Search, settings: Settings, inputs: Array) -> Array:
    problem = search.problem
    return norms.into_ball_and_box(
        inputs, problem.inputs, search.eps, settings.norm, problem.bounds
    )


def _step(search: Search, settings: Settings, aims: Aims | None, carry: _Carry) -> _Carry:
    """One forward and backward pass: judge the current point, then move those that resist."""
    progress, inputs = carry.progress, carry.inputs
    active, step, first = ~progress.done, progress.event, progress.event == 0
    aim = aim_of(settings, aims, progress.start)
    gradient, success, gain = evaluate(search, aim, inputs)

    better = first | (gain > carry.best_loss)
    best = select(better, inputs, carry.best)
    best_gradient = select(better, gradient, carry.best_gradient)
    best_loss = jnp.where(better, gain, carry.best_loss)
    # The reference compares the first step's loss with 0 and not with the start's.
    increases = jnp.where(first, 0, carry.increases + (gain > carry.last_loss))
    checked_loss = jnp.where(first, gain, carry.checked_loss)
    halved = first | carry.halved
    step_size = jnp.where(first, 2.0 * search.eps, carry.step_size)

    period = jnp.asarray(checkpoints(settings.num_steps))[step]
    check = period > 0
    stalled = (increases <= search.rho * period) | (~halved & (checked_loss >= best_loss))
    halve = check & stalled
    step_size = jnp.where(halve, 0.5 * step_size, step_size)
    point = select(halve, best, inputs)
    gradient = select(halve, best_gradient, gradient)

    moved = _into(
        search,
        settings,
        norms.ascend(point, gradient, step_size, settings.norm, search.problem.bounds),
    )
    share = norms.per_example(jnp.where(first, 0.0, _MOMENTUM), point)
    behind = select(first, point, carry.previous)
    moved = _into(
        search, settings, point + (1.0 - share) * (moved - point) + share * (point - behind)
    )

    progress, again = progress.after(
        settings,
        gain=gain,
        success=success,
        last=step == settings.num_steps,
        best=best,
        best_loss=best_loss,
        step=step,
    )
    if settings.num_starts > 1:
        moved = select(again, _begin(search, settings, progress.start), moved)
    stopped = active & progress.done
    # An example that broke stays where it did; one whose starts are used up, at its best point.
    moved = select(stopped, select(success, inputs, best), moved)
    return _Carry(
        progress=progress,
        inputs=select(active, moved, inputs),
        previous=point,
        best=best,
        best_gradient=best_gradient,
        best_loss=best_loss,
        checked_loss=jnp.where(check, best_loss, checked_loss),
        last_loss=jnp.where(first, 0.0, gain),
        increases=jnp.where(check, 0, increases),
        halved=jnp.where(check, halve, halved),
        step_size=step_size,
    )


@functools.partial(jax.jit, static_argnames="settings")
def run(search: Search, settings: Settings) -> AttackResult:
    """The whole attack, for linf and l2."""
    problem = search.problem
    logits = problem.logits_fn(problem.inputs)
    clean_success = needs_no_attack(search, settings, logits)
    aims = aims_of(search, settings, logits)
    progress = Progress.begin(search, settings, clean_success, settings.num_steps + 1)
    start = _begin(search, settings, progress.start)
    zeros = jnp.zeros_like(search.eps)
    carry = _Carry(
        progress=progress,
        inputs=start,
        previous=start,
        best=start,
        best_gradient=jnp.zeros_like(start),
        best_loss=zeros,
        checked_loss=zeros,
        last_loss=zeros,
        increases=jnp.zeros(zeros.shape, jnp.int32),
        halved=jnp.zeros(zeros.shape, bool),
        step_size=zeros,
    )
    carry = until_done(
        lambda search, aims, carry: _step(search, settings, aims, carry),
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
