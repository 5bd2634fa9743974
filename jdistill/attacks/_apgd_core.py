"""Auto-PGD's starts, for linf, l2 and l1: the gradients, the best points, and the next start."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp

from jdistill._jax import register, static_field
from jdistill.attacks._core.engine import Method, Progress, Seen, select
from jdistill.attacks._core.gradient import gain_gradient
from jdistill.attacks._core.problem import AttackResult, Goal, Problem
from jdistill.attacks._core.targets import Starts
from jdistill.typing import Array, Norm


class Visited(NamedTuple):
    """A point `[B, ...]`, its gradient, and its loss `[B]`."""

    inputs: Array
    gradient: Array
    loss: Array


class State(NamedTuple):
    inputs: Array  # the point to be judged next
    best: Visited  # since the start or the stage began
    largest: tuple[Array, Array] | None  # with `maximizes`, the best point of all starts, its loss
    targets: Array | None  # [B, num_targets]
    schedule: Any  # what the next step depends on besides


@register
class APGD(Method):
    """Base of the methods for the norms, which say how a start begins and moves."""

    loss: Any
    eps: Array  # [B]
    first: Array | None  # [B, ...], the first start towards each target; None draws it
    starts: Starts
    norm: Norm = static_field()
    num_steps: int = static_field()
    maximizes: bool = static_field()

    @property
    def events_per_start(self) -> int:
        """Points that a start judges."""
        return self.num_steps + 1

    @property
    def num_events(self) -> int:  # type: ignore[override]
        return self.starts.most * self.events_per_start

    def noisy(self, problem: Problem, keys: Array) -> Array:
        """Random points `[B, ...]`, from keys `[B]`."""
        raise NotImplementedError

    def into_ball(self, problem: Problem, inputs: Array) -> Array:
        """The points in the box and the ball in which a start begins."""
        raise NotImplementedError

    def first_schedule(self, problem: Problem, start: Array) -> Any:
        """The schedule before the first event; `start [B, ...]` is the first point."""
        raise NotImplementedError

    def begins(self, event: Array) -> Array:
        """Events of a start from which on the best point is sought anew, `[B]` bool."""
        return event == 0

    def counts(self, event: Array) -> Array:
        """Events of a start at which a success counts, `[B]` bool."""
        return jnp.ones(event.shape, bool)

    def move(self, problem: Problem, state: State, event: Array, now: Visited) -> tuple[Array, Any]:
        """The next point and schedule, after an event of a start; `state.best` includes `now`."""
        raise NotImplementedError

    def init(self, problem: Problem) -> tuple[State, Array]:
        logits = problem.logits_fn(problem.inputs)
        zeros = jnp.zeros_like(self.eps)
        start = self._begin(problem, zeros.astype(jnp.int32))
        state = State(
            inputs=start,
            best=Visited(start, jnp.zeros_like(start), zeros),
            largest=(problem.inputs, zeros - jnp.inf) if self.maximizes else None,
            targets=self.starts.targets(problem.goal, logits),
            schedule=self.first_schedule(problem, start),
        )
        return state, logits

    def _begin(self, problem: Problem, start: Array) -> Array:
        """The first point of each example's start `[B]`."""
        point, num_restarts = self.first, self.starts.num_restarts
        if point is None or num_restarts > 1:
            drawn = self.noisy(problem, self.starts.keys(problem, start))
            point = drawn if point is None else select(start % num_restarts == 0, point, drawn)
        return self.into_ball(problem, point)

    def step(self, problem: Problem, state: State, event: Array) -> tuple[State, Seen]:
        """Judge the current point, then move it, or begin the next start."""
        start, event = jnp.divmod(event, self.events_per_start)
        loss, goal = self.loss, problem.goal
        target = self.starts.target(state.targets, start)
        if target is not None:
            # The loss is of the label and the target.
            loss, goal = functools.partial(loss, targets=target), Goal(goal.labels, None)
        gradient, logits, gain = gain_gradient(problem, goal, loss, state.inputs)
        gain = gain.astype(self.eps.dtype)  # a network may have fewer bits
        gain = jnp.where(jnp.isnan(gain), -jnp.inf, gain)
        success = problem.goal.reached(logits) & self.counts(event)

        now = Visited(state.inputs, gradient, gain)
        best = select(self.begins(event) | (gain > state.best.loss), now, state.best)
        moved, schedule = self.move(problem, state._replace(best=best), event, now)

        ended = event == self.events_per_start - 1
        largest = state.largest
        if largest is not None:
            larger = ended & (best.loss > largest[1])
            largest = select(larger, (best.inputs, best.loss), largest)
        if self.starts.most > 1:
            moved = select(ended, self._begin(problem, start + 1), moved)
        spent = ended & self.starts.is_last(start)
        moved = select(spent, best.inputs if largest is None else largest[0], moved)
        return State(moved, best, largest, state.targets, schedule), Seen(success, gain, spent)

    def point(self, problem: Problem, state: State) -> Array:
        return state.inputs

    def info(
        self, problem: Problem, state: State, progress: Progress, result: AttackResult
    ) -> dict[str, Array]:
        # The last event's.
        restart = jnp.maximum(progress.event - 1, 0) // self.events_per_start
        target = self.starts.target(state.targets, restart)
        return {"restart": restart, **({} if target is None else {"target": target})}
