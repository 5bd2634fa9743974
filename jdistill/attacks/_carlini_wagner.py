"""Carlini and Wagner's minimum-norm attacks."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate
from jdistill._precision import full_precision
from jdistill.attacks import _base, _search
from jdistill.attacks._base import AttackResult, Problem
from jdistill.attacks._loop import until_done
from jdistill.attacks._search import Bracket
from jdistill.typing import Array, ArrayLike, LogitsFn


def carlini_wagner_l2(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    confidence: ArrayLike = 0.0,
    num_searches: int = 9,
    num_steps: int = 1000,
    learning_rate: ArrayLike = 0.01,
    initial_const: ArrayLike = 1e-3,
    abort_early: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Smallest L2 perturbation by Adam on a margin, with a search over its weight.

    In the variable `w` with `x' = mid + half · tanh(w)`, which keeps `x'` inside the box, minimize

        ‖x' - x‖² + c · max(0, z_y - max_{i≠y} z_i + κ)

    and search for the smallest `c` that succeeds: times 10 until the first success, then bisection.
    The margin is of the logits, so no temperature and no softmax saturation stands in the way.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        confidence: κ in logit units, at least 0: by how much the goal must be passed.
        num_searches: values of `c` tried, at least 1; static.
        num_steps: Adam steps for each `c`, at least 1; static.
        learning_rate: of Adam, in units of `w`, above 0. An input on the box's face starts at
            `|w| = 7.25` and moves at most `learning_rate` a step, so runs of few steps on
            images with black backgrounds need a larger one than the paper's 0.01.
        initial_const: the first `c`, above 0; a scalar or `[B]`.
        abort_early: end a search when the example's own loss has stopped falling (checked every
            tenth of the steps).
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        init: `[B, ...]`, where each search starts, moved into the box; None starts at the inputs.
        trace: keep the loss of every step.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is the L2 distance to the clean input. `info`: `const [B]`, the `c` of the
        returned point (NaN if none); `first_success [B]` int32, the step over all searches at
        which the first adversarial was seen, -1 if never; with `trace`, `loss
        [B, num_searches, num_steps]`, NaN after the end of a search.

    Raises:
        ValueError: confidence below 0, learning_rate or initial_const not above 0, counts below
            1, inputs not finite or outside the box, labels or targets outside `0..K-1`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.8, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = carlini_wagner_l2(
        ...     logits_fn, None, x, y, num_searches=6, num_steps=100, learning_rate=0.05)
        >>> bool(result.success[0]), bool(0.28 < result.distance[0] < 0.30)  # exactly: 0.283
        (True, True)

    References:
        Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", sections V
        and VI.A (f6 with change of variables); the differences to the released code: failures
        are the clean input and not zeros, every stop is per example, other classes are masked
        with `-inf`, the distance is to the input itself and not to its image in tanh space, and a
        success at the step that ends a search counts.
    """
    del key
    _validate.rank(0, confidence=confidence, learning_rate=learning_rate)
    _validate.non_negative(confidence=confidence)
    _validate.positive(learning_rate=learning_rate, initial_const=initial_const)
    _validate.count(num_searches=num_searches, num_steps=num_steps)
    problem = _base.prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    as_float = functools.partial(jnp.asarray, dtype=problem.inputs.dtype)
    start = None if init is None else _base.start_point(init, problem)
    with full_precision():
        return _carlini_wagner_l2(
            problem,
            start,
            as_float(confidence),
            as_float(learning_rate),
            _base.one_per_example(initial_const, problem.inputs, name="initial_const"),
            num_searches=num_searches,
            num_steps=num_steps,
            abort_early=abort_early,
            trace=trace,
        )


class _Settings(NamedTuple):
    confidence: Array
    learning_rate: Array
    initial_w: Array  # [B, ...], the clean inputs in the variable w
    first_offset: Array  # [B, ...], where each search starts
    num_searches: int
    num_steps: int
    abort_early: bool


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    offset: Array  # w minus the clean input's w
    adam: Any  # one Adam state an example
    step: Array  # inside the current search
    search: Array
    done: Array
    bracket: Bracket
    succeeded: Array  # in the current search
    previous_loss: Array  # at the last check for an early end
    best: Array
    best_distance: Array  # squared
    best_const: Array
    first_success: Array
    queries: Array
    losses: Array  # [B, num_searches, num_steps], or [B, 0, 0] without a trace


def _init(
    problem: Problem, settings: _Settings, const: Array, clean_success: Array, trace: bool
) -> _Carry:
    inputs = problem.inputs
    zeros = jnp.zeros(inputs.shape[:1], jnp.int32)
    floats = jnp.zeros(inputs.shape[:1], inputs.dtype)
    offset = settings.first_offset
    shape = (settings.num_searches, settings.num_steps) if trace else (0, 0)
    return _Carry(
        offset=offset,
        adam=_search.per_example_adam().init(offset),
        step=zeros,
        search=zeros,
        done=clean_success,
        bracket=_search.first_bracket(const),
        succeeded=jnp.zeros(zeros.shape, bool),
        previous_loss=floats + jnp.inf,
        best=inputs,
        best_distance=floats + jnp.inf,
        best_const=floats + jnp.nan,
        first_success=jnp.where(clean_success, 0, -1),
        queries=zeros + 1,  # the clean forward pass
        losses=jnp.full(zeros.shape + shape, jnp.nan, inputs.dtype),
    )


def _step(problem: Problem, settings: _Settings, carry: _Carry) -> _Carry:
    """Judge the current point, then one Adam step; at a search's end choose the next constant."""
    active = ~carry.done
    inputs, goal = problem.inputs, problem.goal

    def total(offset: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
        candidate = _search.to_box(settings.initial_w + offset, problem.bounds)
        logits = problem.logits_fn(candidate)
        squared = jnp.sum(jnp.square(candidate - inputs), axis=tuple(range(1, inputs.ndim)))
        shortfall = jnp.maximum(settings.confidence - goal.excess(logits), 0.0)
        loss = squared + carry.bracket.const * shortfall
        return jnp.sum(loss), (loss, squared, candidate, logits)

    gradient, (loss, squared, candidate, logits) = jax.grad(total, has_aux=True)(carry.offset)
    # A network that overflows far from the data must not spoil the example's moments.
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)

    success = active & goal.reached(logits) & (goal.excess(logits) > settings.confidence)
    better = success & (squared < carry.best_distance)
    succeeded = carry.succeeded | success

    update, adam = _search.per_example_adam().update(gradient, carry.adam)
    offset = carry.offset - settings.learning_rate * update

    step = carry.step + 1
    check_every = max(settings.num_steps // 10, 1)
    checked = carry.step % check_every == 0
    stalled = checked & (loss > 0.9999 * carry.previous_loss) & settings.abort_early
    ended = active & (stalled | (step == settings.num_steps))

    bracket = _search.next_bracket(carry.bracket, succeeded, carry.search, settings.num_searches)
    search = carry.search + ended
    fresh = (settings.first_offset, _search.per_example_adam().init(settings.first_offset))
    offset, adam = _search.select(ended, fresh, (offset, adam))
    return _Carry(
        offset=_search.select(active, offset, carry.offset),
        adam=_search.select(active, adam, carry.adam),
        step=jnp.where(ended, 0, jnp.where(active, step, carry.step)),
        search=search,
        done=carry.done | (search == settings.num_searches),
        bracket=_search.select(ended, bracket, carry.bracket),
        succeeded=succeeded & ~ended,
        previous_loss=jnp.where(
            ended, jnp.inf, jnp.where(checked & active, loss, carry.previous_loss)
        ),
        best=_search.select(better, candidate, carry.best),
        best_distance=jnp.where(better, squared, carry.best_distance),
        best_const=jnp.where(better, carry.bracket.const, carry.best_const),
        first_success=jnp.where(
            success & (carry.first_success < 0),
            carry.search * settings.num_steps + carry.step,
            carry.first_success,
        ),
        queries=carry.queries + active,
        losses=_base.record(carry.losses, active, loss, carry.search, carry.step),
    )


@functools.partial(jax.jit, static_argnames=("num_searches", "num_steps", "abort_early", "trace"))
def _carlini_wagner_l2(
    problem: Problem,
    init: Array | None,
    confidence: Array,
    learning_rate: Array,
    initial_const: Array,
    *,
    num_searches: int,
    num_steps: int,
    abort_early: bool,
    trace: bool,
) -> AttackResult:
    initial_w = _search.from_box(problem.inputs, problem.bounds)
    first_offset = jnp.zeros_like(initial_w)
    if init is not None:
        first_offset = _search.from_box(jnp.clip(init, *problem.bounds), problem.bounds) - initial_w
    settings = _Settings(
        confidence=confidence,
        learning_rate=learning_rate,
        initial_w=initial_w,
        first_offset=first_offset,
        num_searches=num_searches,
        num_steps=num_steps,
        abort_early=abort_early,
    )
    clean_success = problem.goal.reached_clean(problem.logits_fn(problem.inputs))
    carry = until_done(
        _step,
        (problem, settings),
        _init(problem, settings, initial_const, clean_success, trace),
        at_most=num_searches * num_steps,
        spread=problem.spread,
    )
    info = {"const": carry.best_const, "first_success": carry.first_success.astype(jnp.int32)}
    if trace:
        info["loss"] = carry.losses
    return _base.finish(
        problem,
        carry.best,
        clean_success=clean_success,
        found=jnp.isfinite(carry.best_distance),
        queries=carry.queries,
        norm="l2",
        info=info,
        minimum_norm=True,
    )
