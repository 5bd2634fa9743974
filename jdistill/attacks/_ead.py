"""Elastic-net attack: a sparse minimum-norm attack by shrinkage and thresholding."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._jax import register, static_field
from jdistill.attacks._core.constant_search import ConstantSearch, Search, first_point
from jdistill.attacks._core.engine import Passes, Progress, Seen, run, select
from jdistill.attacks._core.problem import AttackResult, Problem, one_per_example, prepare
from jdistill.attacks._core.traits import facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn

_RULES = ("l1", "elastic_net")


@facts(title="EAD", norms=("l1",), minimum_norm=True)
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
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Small L1 perturbation by accelerated gradient steps that set small entries to zero.

    With `f(x') = max(0, z_y - max_{i≠y} z_i + κ)`, look for `x'` of small::

        c · f(x') + ‖x' - x‖₂² + β · ‖x' - x‖₁

    inside the box, in units of its width, by steps (FISTA) from `x' = v = x`, for `k = 0, 1, …`::

        x'_new = S_β(v - α_k · ∂(c · f(v) + ‖v - x‖₂²)/∂v)       α_k = learning_rate · √(1 - k/n)
        v      = x'_new + k / (k + 3) · (x'_new - x')

    `S_β` moves each entry towards the input's by β, to the input's itself where that is nearer,
    and clips into the box. The smallest `c` that succeeds is searched for: times 10 until the
    first success, then bisection. A search begins at the input; without `abort_early`, where the
    one before ended, which comes closer in few steps. Of all adversarial `x'` the decision rule
    picks one.

    As published, and as in other toolkits, β is the threshold of every step, not β times the step
    size. A step of size α so descends the objective above with the weight β / α in β's place: with
    the defaults 1 and rising, far more L1 than L2. That is what makes the perturbations sparse.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        beta: β in units of the box's width, at least 0; scalar or `[B]`. The paper's are 0.001 and
            0.01.
        decision_rule: which adversarial is returned: `"l1"`, the one of the smallest L1 distance,
            or `"elastic_net"`, of the smallest `‖x' - x‖₂² + β · ‖x' - x‖₁`.
        confidence: κ in logit units, at least 0: by how much the goal must be passed; scalar or
            `[B]`.
        num_searches: values of `c` tried, at least 1; static.
        num_steps: n, steps for each `c`, at least 1; static.
        learning_rate: the first step size in the box of width 1, above 0; scalar or `[B]`.
        initial_const: the first `c`, above 0; scalar or `[B]`.
        abort_early: end a search when the example's own objective has stopped falling (checked
            every tenth of the steps).
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        init: `[B, ...]`, where searches begin instead of at the inputs, moved into the box.
        trace: keep the objective of every iterate.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is the L1 distance, under either rule. A step costs two queries, at `v` and at
        `x'`, and one gradient, at `v`. `info`: `elastic_net [B]`, `‖x' - x‖₂² + β · ‖x' - x‖₁` of
        the returned point, in units of the box's width (inf if nothing was found); `const [B]`, its
        `c` (NaN if nothing was found); `first_success`, over all searches; `gradients`; with
        `trace` the objective of every iterate, `trace [B, num_searches · num_steps]`, one search
        after the other. See `jdistill.attacks`.

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
    _validate.non_negative(beta=beta, confidence=confidence)
    _validate.positive(learning_rate=learning_rate, initial_const=initial_const)
    _validate.count(num_searches=num_searches, num_steps=num_steps)
    _validate.flag(abort_early=abort_early)
    problem = prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    method = _EAD(
        beta=one_per_example(beta, problem.inputs, name="beta"),
        confidence=one_per_example(confidence, problem.inputs, name="confidence"),
        learning_rate=one_per_example(learning_rate, problem.inputs, name="learning_rate"),
        initial_const=one_per_example(initial_const, problem.inputs, name="initial_const"),
        first=first_point(init, problem),
        decision_rule=decision_rule,
        num_searches=num_searches,
        num_steps=num_steps,
        abort_early=abort_early,
    )
    return run(method, problem, trace=trace)


class _State(NamedTuple):
    current: Array  # x'
    ahead: Array  # v, where the next gradient is taken
    search: Search


@register
class _EAD(ConstantSearch):
    beta: Array  # [B]
    first: Array  # [B, ...], where searches begin
    decision_rule: str = static_field()
    norm = "l1"
    passes = Passes(2, 1)

    def init(self, problem: Problem) -> tuple[_State, Array]:
        state = _State(self.first, self.first, self.first_search())
        return state, problem.logits_fn(problem.inputs)

    def _shrink(self, moved: Array, problem: Problem) -> Array:
        """Each entry β nearer to the input's, or equal to it, inside the box."""
        delta = moved - problem.inputs
        beta = norms.per_example(self.beta * problem.width, delta)
        kept = jnp.sign(delta) * jnp.maximum(jnp.abs(delta) - beta, 0.0)
        return jnp.clip(problem.inputs + kept, *problem.bounds)

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """One step and its judgment; a search's end begins the next one."""
        inputs, goal, const = problem.inputs, problem.goal, state.search.const
        width = problem.width

        def shortfall(logits: Array) -> Array:
            return jnp.maximum(self.confidence - goal.excess(logits), 0.0)

        def smooth(point: Array) -> Array:
            loss = _squared((point - inputs) / width) + const * shortfall(problem.logits_fn(point))
            return jnp.sum(loss)

        gradient = jax.grad(smooth)(state.ahead)
        # A network that overflows somewhere must not spoil the example's later searches.
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
        k = state.search.step.astype(inputs.dtype)
        alpha = norms.per_example(self.learning_rate * jnp.sqrt(1 - k / self.num_steps), inputs)
        # The gradient and the step are of inputs in units of the width.
        current = self._shrink(state.ahead - alpha * gradient * width**2, problem)
        momentum = norms.per_example(k / (k + 3), inputs)
        ahead = jnp.clip(current + momentum * (current - state.current), *problem.bounds)

        logits = problem.logits_fn(current)
        delta = current - inputs
        l1 = norms.distance(delta, "l1")
        elastic_net = _squared(delta / width) + self.beta * l1 / width
        loss = elastic_net + const * shortfall(logits)
        success = goal.reached(logits) & (goal.excess(logits) > self.confidence)

        search, ended, spent = self.next_search(state.search, success, loss)
        # From a point of low loss the first large steps lead up, which would look like a stall.
        anew = ended & self.abort_early
        first = _State(self.first, self.first, search)
        new = select(anew, first, _State(current, ahead, search))
        value = l1 if self.decision_rule == "l1" else elastic_net
        return new, Seen(success, loss, spent, current, value, note=const)

    def info(
        self, problem: Problem, state: _State, progress: Progress, result: AttackResult
    ) -> dict[str, Array]:
        width = problem.width
        squared = _squared((result.inputs - problem.inputs) / width)
        elastic_net = squared + self.beta * result.distance / width
        elastic_net = jnp.where(result.success, elastic_net, jnp.inf)
        return super().info(problem, state, progress, result) | {"elastic_net": elastic_net}


def _squared(delta: Array) -> Array:
    return jnp.sum(jnp.square(delta), axis=tuple(range(1, delta.ndim)))
