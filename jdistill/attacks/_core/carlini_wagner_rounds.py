"""What Carlini and Wagner's Linf and L0 attacks share: rounds under an ever tighter limit.

A round looks for an adversarial within its limit, by Adam from where the round before ended. After
so many steps without one the weight of the adversarial term grows, and Adam starts anew from where
it is: a pixel on the box's face needs many steps to leave it, and they are not lost. A success
tightens the limit and starts the next round; the example ends when the weight is used up.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdistill import norms
from jdistill.attacks._core import constant_search as _search
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.attacks._loop import until_done
from jdistill.typing import Array

# Traced values cannot be checked; a factor of 1 would never end.
LEAST_FACTOR = 1.01


class Rules(NamedTuple):
    """What tells the attacks apart; a limit is an array or a pytree that leads with `[B]`."""

    point: Callable[[Problem, Array, Any], Array]  # (w, limit) -> the inputs they stand for
    penalty: Callable[[Array, Any], Array]  # (delta, limit) -> [B], minimized beside c · f
    fits: Callable[[Array, Any], Array]  # (delta, limit) -> [B] bool
    distance: Callable[[Array], Array]  # delta -> [B], the measure of the best
    # (delta, gradient of the excess, limit) -> the next limit, and whether that is the end [B]
    tighten: Callable[[Problem, Array, Array, Any], tuple[Any, Array]]


class Settings(NamedTuple):
    """What stays the same over the steps; the count is static."""

    confidence: Array
    learning_rate: Array
    largest_const: Array
    const_factor: Array
    num_steps: int


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    w: Array
    adam: Any
    step: Array  # since the limit or the constant changed
    const: Array
    limit: Any
    fresh: Array  # whether a round begins here
    rounds: Array  # that succeeded
    done: Array
    best: Array
    best_distance: Array
    first_success: Array
    queries: Array


def _init(problem: Problem, const: Array, limit: Any, clean_success: Array) -> _Carry:
    inputs = problem.inputs
    zeros = jnp.zeros(inputs.shape[:1], jnp.int32)
    w = _search.from_box(inputs, problem.bounds)
    return _Carry(
        w=w,
        adam=_search.per_example_adam().init(w),
        step=zeros,
        const=const,
        limit=limit,
        fresh=jnp.ones(zeros.shape, bool),
        rounds=zeros,
        done=clean_success,
        best=inputs,
        best_distance=jnp.full(inputs.shape[:1], jnp.inf, inputs.dtype),
        first_success=jnp.where(clean_success, 0, -1),
        queries=zeros + 1,  # the clean forward pass
    )


def _step(problem: Problem, settings: Settings, rules: Rules, carry: _Carry) -> _Carry:
    """Judge the current point, then one Adam step; a round's end chooses what comes next."""
    active = ~carry.done
    inputs, goal = problem.inputs, problem.goal
    candidate, to_w = jax.vjp(lambda w: rules.point(problem, w, carry.limit), carry.w)
    delta = candidate - inputs

    def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
        logits = problem.logits_fn(x)
        excess = goal.excess(logits)
        return jnp.sum(excess), (excess, logits)

    gradient, (excess, logits) = jax.grad(total, has_aux=True)(candidate)
    # A network that overflows far from the data must not spoil the example's moments.
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
    missed = ~(excess > settings.confidence)
    weight = jnp.where(missed, carry.const, 0.0)
    pull = jax.grad(lambda d: jnp.sum(rules.penalty(d, carry.limit)))(delta)
    (slope,) = to_w(pull - norms.per_example(weight, gradient) * gradient)
    (reach,) = to_w(gradient)

    adversarial = active & goal.reached(logits) & ~missed
    distance = rules.distance(delta)
    better = adversarial & (distance < carry.best_distance)
    success = adversarial & rules.fits(delta, carry.limit)
    limit, finished = rules.tighten(problem, delta, gradient, carry.limit)

    # Where nothing leads to the goal at a round's start, no weight will help.
    lost = carry.fresh & missed & jnp.all(norms.flatten(reach) == 0, axis=1)
    step = carry.step + 1
    failed = active & ~success & (step == settings.num_steps)
    factor = jnp.maximum(settings.const_factor, LEAST_FACTOR)
    const = jnp.where(failed, carry.const * factor, carry.const)
    # Written so that a NaN or an infinity that no check could see ends the loop as well.
    usable = jnp.isfinite(const) & (const <= settings.largest_const)
    over = (success & finished) | (active & lost) | (failed & ~usable)

    update, adam = _search.per_example_adam().update(slope, carry.adam)
    w = carry.w - settings.learning_rate * update
    w = _search.select(success, carry.w, w)
    anew = success | failed
    adam = _search.select(anew, _search.per_example_adam().init(w), adam)
    return _Carry(
        w=_search.select(active, w, carry.w),
        adam=_search.select(active, adam, carry.adam),
        step=jnp.where(anew, 0, jnp.where(active, step, carry.step)),
        const=const,
        limit=_search.select(success, limit, carry.limit),
        fresh=success,
        rounds=carry.rounds + success,
        done=carry.done | over,
        best=_search.select(better, candidate, carry.best),
        best_distance=jnp.where(better, distance, carry.best_distance),
        first_success=jnp.where(
            adversarial & (carry.first_success < 0), carry.queries - 1, carry.first_success
        ),
        queries=carry.queries + active,
    )


def run(
    problem: Problem,
    settings: Settings,
    rules: Rules,
    initial_const: Array,
    limit: Any,
    *,
    norm: str,
) -> AttackResult:
    """Rounds until every example is done; the best adversarial of all, verified."""
    clean_success = problem.goal.reached_clean(problem.logits_fn(problem.inputs))
    carry = until_done(
        lambda problem, settings, carry: _step(problem, settings, rules, carry),
        (problem, settings),
        _init(problem, initial_const, limit, clean_success),
        at_most=settings.num_steps,  # of each round
        spread=problem.spread,
    )
    return _base.finish(
        problem,
        carry.best,
        clean_success=clean_success,
        found=jnp.isfinite(carry.best_distance),
        queries=carry.queries,
        norm=norm,
        info={
            "rounds": carry.rounds.astype(jnp.int32),
            "const": carry.const,
            "first_success": carry.first_success.astype(jnp.int32),
        },
        minimum_norm=True,
    )
