"""Carlini and Wagner's L2 attack."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._jax import register
from jdistill.attacks._core.constant_search import (
    ConstantSearch,
    Search,
    first_point,
    from_box,
    per_example_adam,
    to_box,
)
from jdistill.attacks._core.engine import Seen, run, select
from jdistill.attacks._core.problem import AttackResult, Problem, one_per_example, prepare
from jdistill.attacks._core.traits import facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn


@facts(title="C&W L2", norms=("l2",), minimum_norm=True)
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
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Smallest L2 perturbation by Adam on a margin, with a search over its weight.

    In the variable `w` with `x' = mid + half · tanh(w)`, which keeps `x'` inside the box, look for
    the minimum of::

        ‖x' - x‖² / (high - low)² + c · max(0, z_y - max_{i≠y} z_i + κ)

    and search for the smallest `c` that succeeds: times 10 until the first success, then bisection.
    The margin is of the logits, so no temperature and no softmax saturation stands in the way.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        confidence: κ in logit units, at least 0: by how much the goal must be passed; scalar or
            `[B]`.
        num_searches: values of `c` tried, at least 1; static.
        num_steps: Adam steps for each `c`, at least 1; static.
        learning_rate: of Adam, in units of `w`, above 0; scalar or `[B]`. An input on the box's
            face starts at `|w| = 7.25` and moves at most `learning_rate` per step, so runs of few
            steps on images with black backgrounds need a larger one than the paper's 0.01.
        initial_const: the first `c`, above 0; scalar or `[B]`.
        abort_early: end a search when the example's own loss has stopped falling (checked every
            tenth of the steps).
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        init: `[B, ...]`, where each search starts, moved into the box; None starts at the inputs.
        trace: keep the loss of every iterate.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is the L2 distance to the clean input. `info`: `const [B]`, the `c` of the
        returned point (NaN if nothing was found); `first_success`, over all searches;
        `gradients`; with `trace` the loss of every iterate, `trace [B, num_searches · num_steps]`,
        one search after the other. See `jdistill.attacks`.

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
        and VI.A (f6 with change of variables). The differences from the released code: failures
        are the clean input and not a gray image; every stop and Adam's state, its count included,
        are per example; the true class is masked with `-inf` and not by subtracting 10,000, so
        that no scale of the logits matters; the distance is to the input itself and not to its
        image in tanh space; a success at the step that ends a search counts.
    """
    del key
    _validate.non_negative(confidence=confidence)
    _validate.positive(learning_rate=learning_rate, initial_const=initial_const)
    _validate.count(num_searches=num_searches, num_steps=num_steps)
    _validate.flag(abort_early=abort_early)
    problem = prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    clean_w = from_box(problem.inputs, problem.bounds)
    method = _CarliniWagnerL2(
        confidence=one_per_example(confidence, problem.inputs, name="confidence"),
        learning_rate=one_per_example(learning_rate, problem.inputs, name="learning_rate"),
        initial_const=one_per_example(initial_const, problem.inputs, name="initial_const"),
        clean_w=clean_w,
        first_offset=from_box(first_point(init, problem), problem.bounds) - clean_w,
        num_searches=num_searches,
        num_steps=num_steps,
        abort_early=abort_early,
    )
    return run(method, problem, trace=trace)


class _State(NamedTuple):
    offset: Array  # w minus the clean input's w
    adam: Any
    search: Search


@register
class _CarliniWagnerL2(ConstantSearch):
    clean_w: Array  # [B, ...], the clean inputs in the variable w
    first_offset: Array  # [B, ...], where each search starts
    norm = "l2"

    def init(self, problem: Problem) -> tuple[_State, Array]:
        adam = per_example_adam().init(self.first_offset)
        state = _State(self.first_offset, adam, self.first_search())
        return state, problem.logits_fn(problem.inputs)

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """Judge the current point, then one Adam step; a search's end begins the next one."""
        inputs, goal, const = problem.inputs, problem.goal, state.search.const
        width = problem.width

        def total(offset: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
            point = to_box(self.clean_w + offset, problem.bounds)
            logits = problem.logits_fn(point)
            delta = (point - inputs) / width
            squared = jnp.sum(jnp.square(delta), axis=tuple(range(1, inputs.ndim)))
            loss = squared + const * jnp.maximum(self.confidence - goal.excess(logits), 0.0)
            return jnp.sum(loss), (loss, squared, point, logits)

        gradient, (loss, squared, point, logits) = jax.grad(total, has_aux=True)(state.offset)
        # A network that overflows far from the data must not spoil the example's moments.
        gradient = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
        success = goal.reached(logits) & (goal.excess(logits) > self.confidence)
        update, adam = per_example_adam().update(gradient, state.adam)
        offset = state.offset - norms.per_example(self.learning_rate, update) * update

        search, ended, spent = self.next_search(state.search, success, loss)
        first = _State(self.first_offset, per_example_adam().init(self.first_offset), search)
        new = select(ended, first, _State(offset, adam, search))
        return new, Seen(success, loss, spent, point, squared, note=const)
