"""Elastic-net attack: a sparse minimum-norm attack by shrinkage and thresholding."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._precision import full_precision
from jdistill.attacks._core import constant_search as _search
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.constant_search import Bracket
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.attacks._loop import until_done
from jdistill.typing import Array, ArrayLike, LogitsFn

_RULES = ("l1", "elastic_net")


def ead(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    beta: ArrayLike = 0.01,
    decision_rule: str = "l1",
    confidence: ArrayLike = 0.0,
    num_searches: int = 9,
    num_steps: int = 1000,
    learning_rate: ArrayLike = 0.01,
    initial_const: ArrayLike = 1e-3,
    abort_early: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Small L1 perturbation by accelerated gradient steps that set small entries to zero.

    With `f(x') = max(0, z_y - max_{i≠y} z_i + κ)`, look for `x'` of small

        c · f(x') + ‖x' - x‖₂² + β · ‖x' - x‖₁

    inside the box, by steps (FISTA) from `x' = v = x`, for `k = 0, 1, …`:

        x'_new = S_β(v - α_k · ∂(c · f(v) + ‖v - x‖₂²)/∂v)       α_k = learning_rate · √(1 - k/n)
        v      = x'_new + k / (k + 3) · (x'_new - x')

    `S_β` moves each entry towards the input's by β, to the input's itself where that is nearer,
    and clips into the box. The smallest `c` that succeeds is searched for: times 10 until the
    first success, then bisection. A search begins at the input; without `abort_early`, where the
    one before ended. Of all adversarial `x'` the decision rule picks one.

    As published β is the threshold of every step, not β times the step size. A step of size α so
    descends the objective above with the weight β / α in β's place: with the defaults 1 and
    rising, far more L1 than L2. That is what makes the perturbations sparse.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        beta: β in input units, at least 0. The paper's are 0.001 and 0.01.
        decision_rule: which adversarial is returned: `"l1"`, the one of the smallest L1 distance,
            or `"elastic_net"`, of the smallest `‖x' - x‖₂² + β · ‖x' - x‖₁`.
        confidence: κ in logit units, at least 0: by how much the goal must be passed.
        num_searches: values of `c` tried, at least 1; static.
        num_steps: n, steps for each `c`, at least 1; static.
        learning_rate: the first step size, above 0.
        initial_const: the first `c`, above 0; a scalar or `[B]`.
        abort_early: end a search when the example's own objective has stopped falling (checked
            every tenth of the steps).
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        trace: keep the objective of every step.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is the L1 distance, under either rule. A step costs two queries, at `v` and at
        `x'`. `info`: `elastic_net [B]`, `‖x' - x‖₂² + β · ‖x' - x‖₁` of the returned point (inf
        if none); `const [B]`, its `c` (NaN if none); `first_success [B]` int32, the step over all
        searches at which the first adversarial was seen, -1 if never; with `trace`, `loss
        [B, num_searches, num_steps]`, the objective after each step, NaN after the end of a
        search.

    Raises:
        ValueError: an unknown decision_rule, beta or confidence below 0, learning_rate or
            initial_const not above 0, counts below 1, inputs not finite or outside the box,
            labels or targets outside `0..K-1`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[2.0, -2.0], [1.0, -1.0]]) - jnp.array([[1.2, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = ead(logits_fn, None, x, y, num_searches=6, num_steps=100)
        >>> bool(result.success[0]), bool(0.3 < result.distance[0] < 0.32)  # exactly: 0.3
        (True, True)
        >>> (result.inputs != x).tolist()  # the input of the larger weight alone
        [[True, False]]

    References:
        Chen et al. 2018, "EAD: Elastic-Net Attacks to Deep Neural Networks via Adversarial
        Examples", section 4 and algorithm 1. The differences: `v` is clipped into the box, so that
        the network is asked for no point outside; without `abort_early` a search begins where the
        last one ended, not at the input; every stop is per example; failures are the clean input;
        other classes are masked with `-inf`.
    """
    del key
    _validate.one_of(_RULES, decision_rule=decision_rule)
    _validate.rank(0, beta=beta, confidence=confidence, learning_rate=learning_rate)
    _validate.non_negative(beta=beta, confidence=confidence)
    _validate.positive(learning_rate=learning_rate, initial_const=initial_const)
    _validate.count(num_searches=num_searches, num_steps=num_steps)
    problem = _base.prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    as_float = functools.partial(jnp.asarray, dtype=problem.inputs.dtype)
    with full_precision():
        return _ead(
            problem,
            as_float(beta),
            as_float(confidence),
            as_float(learning_rate),
            _base.one_per_example(initial_const, problem.inputs, name="initial_const"),
            decision_rule=decision_rule,
            num_searches=num_searches,
            num_steps=num_steps,
            abort_early=abort_early,
            trace=trace,
        )


class _Settings(NamedTuple):
    beta: Array
    confidence: Array
    learning_rate: Array
    decision_rule: str
    num_searches: int
    num_steps: int
    abort_early: bool


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    current: Array  # x'
    ahead: Array  # v, where the next gradient is taken
    step: Array  # inside the current search
    search: Array
    done: Array
    bracket: Bracket
    succeeded: Array  # in the current search
    previous_loss: Array  # at the last check for an early end
    best: Array
    best_value: Array  # what the decision rule compares
    best_const: Array
    first_success: Array
    queries: Array
    losses: Array  # [B, num_searches, num_steps], or [B, 0, 0] without a trace


def _init(
    problem: Problem, settings: _Settings, const: Array, clean_success: Array, trace: bool
) -> _Carry:
    inputs = problem.inputs
    zeros = jnp.zeros(inputs.shape[:1], jnp.int32)
    infinite = jnp.full(inputs.shape[:1], jnp.inf, inputs.dtype)
    shape = (settings.num_searches, settings.num_steps) if trace else (0, 0)
    return _Carry(
        current=inputs,
        ahead=inputs,
        step=zeros,
        search=zeros,
        done=clean_success,
        bracket=_search.first_bracket(const),
        succeeded=jnp.zeros(zeros.shape, bool),
        previous_loss=infinite,
        best=inputs,
        best_value=infinite,
        best_const=jnp.full_like(infinite, jnp.nan),
        first_success=jnp.where(clean_success, 0, -1),
        queries=zeros + 1,  # the clean forward pass
        losses=jnp.full(zeros.shape + shape, jnp.nan, inputs.dtype),
    )


def _squared(delta: Array) -> Array:
    return jnp.sum(jnp.square(delta), axis=tuple(range(1, delta.ndim)))


def _shrink(moved: Array, problem: Problem, beta: Array) -> Array:
    """Each entry β nearer to the input's, or equal to it, inside the box."""
    delta = moved - problem.inputs
    kept = jnp.sign(delta) * jnp.maximum(jnp.abs(delta) - beta, 0.0)
    return jnp.clip(problem.inputs + kept, *problem.bounds)


def _step(problem: Problem, settings: _Settings, carry: _Carry) -> _Carry:
    """One step and its judgment; at a search's end choose the next constant."""
    active = ~carry.done
    inputs, goal = problem.inputs, problem.goal
    wide = functools.partial(norms.per_example, like=inputs)

    def shortfall(logits: Array) -> Array:
        return jnp.maximum(settings.confidence - goal.excess(logits), 0.0)

    def smooth(point: Array) -> Array:
        loss = _squared(point - inputs) + carry.bracket.const * shortfall(problem.logits_fn(point))
        return jnp.sum(loss)

    gradient = jax.grad(smooth)(carry.ahead)
    # A network that overflows somewhere must not spoil the example's later searches.
    gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
    fraction = carry.step.astype(inputs.dtype)
    alpha = settings.learning_rate * jnp.sqrt(1 - fraction / settings.num_steps)
    current = _shrink(carry.ahead - wide(alpha) * gradient, problem, settings.beta)
    momentum = fraction / (fraction + 3)
    ahead = jnp.clip(current + wide(momentum) * (current - carry.current), *problem.bounds)

    logits = problem.logits_fn(current)
    delta = current - inputs
    l1 = norms.distance(delta, "l1")
    elastic_net = _squared(delta) + settings.beta * l1
    loss = elastic_net + carry.bracket.const * shortfall(logits)
    value = l1 if settings.decision_rule == "l1" else elastic_net
    success = active & goal.reached(logits) & (goal.excess(logits) > settings.confidence)
    better = success & (value < carry.best_value)
    succeeded = carry.succeeded | success

    step = carry.step + 1
    checked = carry.step % max(settings.num_steps // 10, 1) == 0
    stalled = checked & (loss > 0.9999 * carry.previous_loss) & settings.abort_early
    ended = active & (stalled | (step == settings.num_steps))
    # From a point of low loss the first large steps lead up, which would look like a stall.
    again = ended & settings.abort_early
    bracket = _search.next_bracket(carry.bracket, succeeded, carry.search, settings.num_searches)
    search = carry.search + ended
    return _Carry(
        current=_search.select(again, inputs, _search.select(active, current, carry.current)),
        ahead=_search.select(again, inputs, _search.select(active, ahead, carry.ahead)),
        step=jnp.where(ended, 0, jnp.where(active, step, carry.step)),
        search=search,
        done=carry.done | (search == settings.num_searches),
        bracket=_search.select(ended, bracket, carry.bracket),
        succeeded=succeeded & ~ended,
        previous_loss=jnp.where(
            ended, jnp.inf, jnp.where(checked & active, loss, carry.previous_loss)
        ),
        best=_search.select(better, current, carry.best),
        best_value=jnp.where(better, value, carry.best_value),
        best_const=jnp.where(better, carry.bracket.const, carry.best_const),
        first_success=jnp.where(
            success & (carry.first_success < 0),
            carry.search * settings.num_steps + carry.step,
            carry.first_success,
        ),
        queries=carry.queries + 2 * active,
        losses=_base.record(carry.losses, active, loss, carry.search, carry.step),
    )


@functools.partial(
    jax.jit,
    static_argnames=("decision_rule", "num_searches", "num_steps", "abort_early", "trace"),
)
def _ead(
    problem: Problem,
    beta: Array,
    confidence: Array,
    learning_rate: Array,
    initial_const: Array,
    *,
    decision_rule: str,
    num_searches: int,
    num_steps: int,
    abort_early: bool,
    trace: bool,
) -> AttackResult:
    settings = _Settings(
        beta=beta,
        confidence=confidence,
        learning_rate=learning_rate,
        decision_rule=decision_rule,
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
    result = _base.finish(
        problem,
        carry.best,
        clean_success=clean_success,
        found=jnp.isfinite(carry.best_value),
        queries=carry.queries,
        norm="l1",
        info=info,
        minimum_norm=True,
    )
    elastic_net = _squared(result.inputs - problem.inputs) + beta * result.distance
    return result._replace(info=info | {"elastic_net": elastic_net})
