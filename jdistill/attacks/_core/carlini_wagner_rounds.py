"""Rounds under an ever tighter limit: the loop of Carlini and Wagner's Linf and L0 attacks.

A round looks for an adversarial within its limit, by Adam from where the round before ended. After
so many steps without one the weight of the adversarial term grows, and Adam starts anew from where
it is: a pixel on the box's face needs many steps to leave it, and they are not lost. A success
tightens the limit and starts the next round; the example ends when the weight is used up.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import norms
from jdistill._jax import register, static_field
from jdistill.attacks._core import engine
from jdistill.attacks._core.constant_search import from_box, per_example_adam, to_box
from jdistill.attacks._core.engine import Method, Progress, Seen, select
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.typing import Array

# A factor of 1 would never end.
LEAST_FACTOR, LARGEST_FACTOR = 1.01, 1e6


class _State(NamedTuple):
    w: Array
    adam: Any
    step: Array  # since the limit or the constant changed
    const: Array
    limit: Any
    fresh: Array  # whether a round begins here
    rounds: Array  # that succeeded


@register
class Rounds(Method):
    """Base of the attacks; a limit is an array or a pytree that leads with `[B]`."""

    confidence: Array  # [B]
    learning_rate: Array  # [B]
    initial_const: Array  # [B]
    largest_const: Array  # [B]
    const_factor: Array  # [B], at least LEAST_FACTOR
    first: Array  # [B, ...], where the first round starts
    num_steps: int = static_field()
    num_events: int | None = static_field(default=None)  # with a trace alone, which needs a width
    minimum_norm = True
    keeps_closest = True

    def first_limit(self, problem: Problem) -> Any:
        """The limit of the first round."""
        raise NotImplementedError

    def moved(self, problem: Problem, w: Array, limit: Any) -> Array:
        """The inputs that `w` stands for, `[B, ...]`."""
        del limit
        return to_box(w, problem.bounds)

    def penalty(self, delta: Array, limit: Any, width: Array) -> Array:
        """Term minimized beside the adversarial one, `[B]`, where the box has this width."""
        raise NotImplementedError

    def fits(self, delta: Array, limit: Any) -> Array:
        """Adversarials that end the round, `[B]` bool."""
        del limit
        return jnp.ones(delta.shape[:1], bool)

    def tighten(
        self, problem: Problem, delta: Array, gradient: Array, limit: Any
    ) -> tuple[Any, Array]:
        """The next round's limit, and whether there is no next round, `[B]` bool.

        `delta` is the adversarial that ended this round, and `gradient` the excess's there.
        """
        raise NotImplementedError

    def most_rounds(self) -> Any:
        """The most rounds that can succeed, a number or `[B]`."""
        raise NotImplementedError

    def most_events(self) -> int:
        try:
            growth = np.log(self.largest_const) - np.log(self.initial_const)
            # Rounded up, not down: the products are rounded, too.
            constants = np.ceil(np.maximum(growth / np.log(self.const_factor), 0.0)) + 1
            return int(np.max(self.most_rounds() + constants, initial=0)) * self.num_steps
        except jax.errors.TracerArrayConversionError:
            raise ValueError(
                "expected concrete settings, which bound the number of steps, got a tracer; call "
                "the attack outside jit, or with trace=False"
            ) from None

    def init(self, problem: Problem) -> tuple[_State, Array]:
        w = from_box(self.first, problem.bounds)
        zeros = jnp.zeros(w.shape[:1], jnp.int32)
        state = _State(
            w=w,
            adam=per_example_adam().init(w),
            step=zeros,
            const=self.initial_const,
            limit=self.first_limit(problem),
            fresh=jnp.ones(zeros.shape, bool),
            rounds=zeros,
        )
        return state, problem.logits_fn(problem.inputs)

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """Judge the current point, then one Adam step; a round's end chooses what comes next."""
        goal, const, limit = problem.goal, state.const, state.limit
        candidate, to_w = jax.vjp(lambda w: self.moved(problem, w, limit), state.w)
        delta = candidate - problem.inputs

        def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
            logits = problem.logits_fn(x)
            excess = goal.excess(logits)
            return jnp.sum(excess), (excess, logits)

        def total_penalty(delta: Array) -> tuple[Array, Array]:
            penalty = self.penalty(delta, limit, problem.width)
            return jnp.sum(penalty), penalty

        gradient, (excess, logits) = jax.grad(total, has_aux=True)(candidate)
        # A network that overflows far from the data must not spoil the example's moments.
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
        missed = ~(excess > self.confidence)
        weight = jnp.where(missed, const, 0.0)
        pull, penalty = jax.grad(total_penalty, has_aux=True)(delta)
        (slope,) = to_w(pull - norms.per_example(weight, gradient) * gradient)
        (reach,) = to_w(gradient)

        adversarial = goal.reached(logits) & ~missed
        success = adversarial & self.fits(delta, limit)
        tighter, finished = self.tighten(problem, delta, gradient, limit)

        # Where nothing leads to the goal at a round's start, no weight will help.
        lost = state.fresh & missed & jnp.all(norms.flatten(reach) == 0, axis=1)
        step = state.step + 1
        failed = ~success & (step == self.num_steps)
        larger = const * self.const_factor
        # Written so that whatever no check could see ends the loop as well.
        usable = (larger > const) & (larger <= self.largest_const)
        spent = (success & finished) | lost | (failed & ~usable)

        update, adam = per_example_adam().update(slope, state.adam)
        w = state.w - norms.per_example(self.learning_rate, update) * update
        w = select(success, state.w, w)
        anew = success | failed
        new = _State(
            w=w,
            adam=select(anew, per_example_adam().init(w), adam),
            step=jnp.where(anew, 0, step),
            const=jnp.where(failed, larger, const),
            limit=select(success, tighter, limit),
            fresh=success,
            rounds=state.rounds + success,
        )
        loss = penalty + weight * (self.confidence - excess)
        return new, Seen(adversarial, loss, spent, candidate, self.distance(delta))

    def info(
        self, problem: Problem, state: _State, progress: Progress, result: AttackResult
    ) -> dict[str, Array]:
        return {"rounds": state.rounds, "const": state.const}


def run(method: Rounds, problem: Problem, *, trace: bool) -> AttackResult:
    """The engine's `run`; a trace is as wide as the settings allow an attack to be long."""
    if trace:
        method = dataclasses.replace(method, num_events=method.most_events())
    return engine.run(method, problem, trace=trace)
