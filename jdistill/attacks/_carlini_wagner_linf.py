"""Carlini and Wagner's Linf attack."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._precision import full_precision
from jdistill.attacks._core import carlini_wagner_rounds as _rounds
from jdistill.attacks._core import constant_search as _search
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.typing import Array, ArrayLike, LogitsFn

# The search for smaller and smaller changes ends below one step of an 8-bit image.
_SMALLEST = 1 / 256
_LARGEST_SHRINK = 0.99


def carlini_wagner_linf(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    confidence: ArrayLike = 0.0,
    num_steps: int = 1000,
    learning_rate: ArrayLike = 5e-3,
    shrink: ArrayLike = 0.9,
    initial_const: ArrayLike = 1e-5,
    largest_const: ArrayLike = 20.0,
    const_factor: ArrayLike = 2.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
) -> AttackResult:
    """Smallest Linf perturbation by Adam on a margin and the entries above a falling threshold.

    In the variable `w` with `x' = mid + half · tanh(w)`, which keeps `x'` inside the box, minimize

        Σ_i max(|x'_i - x_i| - τ, 0) + c · max(0, z_y - max_{i≠y} z_i + κ)

    until `x'` is adversarial with no entry above τ. Then τ becomes `shrink · min(τ, ‖x' - x‖∞)` and
    the next round begins at `x'`. After `num_steps` without success the round goes on with
    `c · const_factor`; the example ends when `c` is above `largest_const`, or when τ is below
    1/256 of the box. The distance found is at best `shrink` exact. `c` starts far too small on
    purpose: Adam's steps are of one size for any `c`, but with one far too large its memory of the
    second term slows the first, and entries hardly come back below τ.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        confidence: κ in logit units, at least 0: by how much the goal must be passed.
        num_steps: Adam steps for each τ and `c`, at least 1; static.
        learning_rate: of Adam, in units of `w`, above 0. An input on the box's face starts at
            `|w| = 7.25` and moves at most `learning_rate` a step, so runs of few steps on
            images with black backgrounds need a larger one than the paper's 0.005.
        shrink: the factor of τ after a success, in `[0.01, 0.99]`.
        initial_const: the first `c`, above 0; a scalar or `[B]`.
        largest_const: the last `c` at most, above 0.
        const_factor: of `c` after a failure, in `[1.01, 1e6]`.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is the Linf distance to the clean input. `info`: `rounds [B]` int32, the
        thresholds that were met; `const [B]`, the last `c`; `first_success [B]` int32, the step
        over all rounds at which the first adversarial was seen, -1 if never.

    Raises:
        ValueError: confidence below 0, learning_rate or a constant not above 0, shrink or
            const_factor outside its range, num_steps below 1, inputs not finite or outside the
            box, labels or targets outside `0..K-1`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.8, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = carlini_wagner_linf(
        ...     logits_fn, None, x, y, num_steps=100, learning_rate=0.02, initial_const=0.1)
        >>> bool(result.success[0]), bool(0.2 < result.distance[0] < 0.22)  # exactly: 0.2
        (True, True)

    References:
        Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", section
        VI.C. The differences to the released code: every example has its own τ, `c` and Adam
        state; a round ends where `x'` is adversarial within τ itself, not where the loss is below
        `0.0001 · c`, which depends on the scale of the logits; the closest adversarial of all
        steps is returned, not the last round's; an example whose gradient is zero at its start
        ends there.
    """
    del key
    _validate.rank(
        0,
        confidence=confidence,
        learning_rate=learning_rate,
        shrink=shrink,
        largest_const=largest_const,
        const_factor=const_factor,
    )
    _validate.non_negative(confidence=confidence)
    _validate.positive(
        learning_rate=learning_rate, initial_const=initial_const, largest_const=largest_const
    )
    _validate.within(0.01, _LARGEST_SHRINK, shrink=shrink)
    _validate.within(_rounds.LEAST_FACTOR, 1e6, const_factor=const_factor)
    _validate.count(num_steps=num_steps)
    problem = _base.prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    as_float = functools.partial(jnp.asarray, dtype=problem.inputs.dtype)
    with full_precision():
        return _carlini_wagner_linf(
            problem,
            as_float(confidence),
            as_float(learning_rate),
            _base.one_per_example(shrink, problem.inputs, name="shrink"),
            _base.one_per_example(initial_const, problem.inputs, name="initial_const"),
            as_float(largest_const),
            as_float(const_factor),
            num_steps=num_steps,
        )


def _excess_over(delta: Array, threshold: Array) -> Array:
    over = jnp.maximum(jnp.abs(delta) - norms.per_example(threshold, delta), 0.0)
    return jnp.sum(over, axis=tuple(range(1, delta.ndim)))


def _distance(delta: Array) -> Array:
    return norms.distance(delta, "linf")


class _Limit(NamedTuple):
    """How far each pixel may go, and by what the next round shrinks that, `[B]` each."""

    threshold: Array
    shrink: Array


def _tighten(
    problem: Problem, delta: Array, gradient: Array, limit: _Limit
) -> tuple[_Limit, Array]:
    low, high = problem.bounds
    # As with the constant's factor, a traced 1 must not go on for ever.
    shrink = jnp.minimum(limit.shrink, _LARGEST_SHRINK)
    threshold = shrink * jnp.minimum(limit.threshold, _distance(delta))
    return limit._replace(threshold=threshold), threshold < _SMALLEST * (high - low)


@functools.partial(jax.jit, static_argnames="num_steps")
def _carlini_wagner_linf(
    problem: Problem,
    confidence: Array,
    learning_rate: Array,
    shrink: Array,
    initial_const: Array,
    largest_const: Array,
    const_factor: Array,
    *,
    num_steps: int,
) -> AttackResult:
    low, high = problem.bounds

    rules = _rounds.Rules(
        point=lambda problem, w, limit: _search.to_box(w, problem.bounds),
        penalty=lambda delta, limit: _excess_over(delta, limit.threshold),
        fits=lambda delta, limit: _distance(delta) <= limit.threshold,
        distance=_distance,
        tighten=_tighten,
    )
    return _rounds.run(
        problem,
        _rounds.Settings(confidence, learning_rate, largest_const, const_factor, num_steps),
        rules,
        initial_const,
        _Limit(jnp.full_like(initial_const, high - low), shrink),
        norm="linf",
    )
