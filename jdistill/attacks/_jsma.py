"""Jacobian-based saliency map attack, on any function of the logits."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jdistill import _validate, norms
from jdistill._jax import as_pytree, register, static_field
from jdistill.attacks._core.engine import Method, Passes, Progress, Seen, run
from jdistill.attacks._core.problem import (
    AttackResult,
    Problem,
    one_per_example,
    prepare,
    start_point,
)
from jdistill.attacks._core.traits import Follows, Settings, facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn

# The share of an input's features that may change: 112 of MNIST's 784.
_SHARE = 0.145
# Scores of pairs held at a time, over the whole batch.
_PAIRS_AT_A_TIME = 2**20


@jax.custom_vjp
def softmax(logits: Array) -> Array:
    """The softmax, with a derivative that is exact where probabilities are tiny.

    The product of its Jacobian and a vector `w` is `F_j · Σ_k F_k (w_j - w_k)`. The usual form,
    `F_j · (w_j - Σ_k F_k w_k)`, subtracts numbers that are equal in float32 where a well-trained
    network is sure of its class, and the saliency of the other classes is then rounding alone.
    `output` of `jsma`. The derivative costs `K²` operations per example, and only backward-mode
    differentiation is there.

    Args:
        logits: `[B, K]` float.

    Returns:
        `[B, K]` float, rows that sum to 1.

    Example:
        >>> sure = jnp.array([[0.0, 30.0]])
        >>> jax.vjp(softmax, sure)[1](jnp.array([[0.0, 1.0]]))[0].tolist()
        [[-9.35...e-14, 9.35...e-14]]
        >>> jax.vjp(jax.nn.softmax, sure)[1](jnp.array([[0.0, 1.0]]))[0].tolist()
        [[-9.35...e-14, 0.0]]
    """
    return jax.nn.softmax(logits, axis=-1)


def _softmax_forward(logits: Array) -> tuple[Array, Array]:
    probs = jax.nn.softmax(logits, axis=-1)
    return probs, probs


def _softmax_backward(probs: Array, weights: Array) -> tuple[Array]:
    differences = weights[..., :, None] - weights[..., None, :]
    return (probs * jnp.sum(probs[..., None, :] * differences, axis=-1),)


softmax.defvjp(_softmax_forward, _softmax_backward)


def _follows(settings: Settings) -> Follows | None:
    """Scores that the saliency with this `output` climbs."""
    output = settings["output"]
    if output is softmax:
        return "softmax"
    if isinstance(output, Partial) and output.func is _softmax_at:
        (temperature,) = output.args
        plain = not _validate.is_traced(temperature) and float(temperature) == 1
        return "softmax" if plain else None
    return "logits" if output is jnp.positive else None


@facts(
    title="JSMA",
    norms=("l0",),
    minimum_norm=True,
    follows=_follows,
    freedom="changes a limited number of features",
)
def jsma(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    theta: ArrayLike | None = None,
    max_features: int | None = None,
    output: Callable[[Array], Array] = softmax,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Jacobian-based saliency map attack: the fewest features, two at a time, each by `theta`.

    With `F = output(logits)`, a target class `t` and `theta > 0`, each step adds `theta` to the
    pair of features `(p, q)` that raises `F_t` and lowers the others most::

        α = ∂F_t/∂x_p + ∂F_t/∂x_q,   β = Σ_{j≠t} (∂F_j/∂x_p + ∂F_j/∂x_q),
        maximize -α · β   over pairs with α > 0 and β < 0

    (for `theta < 0` with both signs turned). Features at the bound that they would move to are
    left out. An example ends at its success, when no pair is left, or after `max_features / 2`
    pairs. Of equal pairs the first one wins, in the order of the flattened features.

    The softmax of a distilled network has no gradient in float32, so that no pair qualifies and
    the attack ends without success: this is masking, not robustness. `output` says which form of
    the attack is meant:

    * `softmax` (the default): Papernot et al.;
    * `softmax_at(temperature)`: softmax(z / T), Carlini & Wagner's break of distillation;
    * `jax.numpy.positive`, which returns what it is given: the logits themselves.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`, at least 2 features per example.
        labels: `[B]` int, the true classes.
        theta: what a step adds to a feature, in input units; not 0; scalar or `[B]`; may be
            traced. None takes the box's width, with which a feature saturates at once.
        max_features: the most features changed, at least 2; static. An odd number is rounded
            down to pairs. None takes the paper's 14.5% of all features, rounded down to pairs
            (112 of 784), and at least 2. A step counts as two features even where `theta` is so
            small that the same feature is changed again.
        output: `(logits [B, K]) -> [B, K]`, per example, whose derivative is the saliency; a
            pytree or a plain function (which is static: keep one and reuse it).
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach. None aims at the most likely class other than the
            label at the clean input, and any class but the label is a success. For the least
            over all targets, as the paper's robustness has it, call once per target.
        init: `[B, ...]`, the start instead of the inputs, clipped into the box; what it changes
            counts in `distance`, not in `max_features`.
        trace: keep the pairs, and by how much each iterate passes the goal.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is the number of changed features (l0). `info`: `first_success`, where 1 is the
        start; `gradients`; `target [B]` int32, the class aimed at; `num_pairs [B]` int32, steps
        taken; with `trace`, by how many logits each iterate passes the goal, `trace
        [B, max_features / 2]`, and `pairs [B, max_features / 2, 2]` int32, flat indices of the
        features in the order of their change, -1 after the end. See `jdistill.attacks`.

    Raises:
        ValueError: theta 0 or not finite, max_features below 2, inputs of a single feature, not
            finite or outside the box, labels or targets outside `0..K-1`, scores of another shape.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[0.0, 3.0], [0.0, 1.0], [0.0, 2.0]]) - jnp.array(
        ...     [[0.0, 4.0]])
        >>> x, y = jnp.array([[0.1, 0.1, 0.1]]), jnp.array([0])
        >>> result = jsma(logits_fn, None, x, y, max_features=2)
        >>> result.inputs.round(1).tolist(), float(result.distance[0])
        ([[1.0, 0.1..., 1.0]], 2.0)

    References:
        Papernot, McDaniel, Jha, Fredrikson, Celik & Swami 2016, "The Limitations of Deep Learning
        in Adversarial Settings", algorithms 2 and 3; Papernot et al. 2016, "Distillation as a
        Defense", section V (112 features); Carlini & Wagner 2016, "Defensive Distillation is Not
        Robust to Adversarial Examples" (softmax(z / T)). Departures: α and β are divided by their
        largest entry first, which changes no order but keeps their product from rounding to 0 in
        float32; features that start at the bound are left out from the start; all pairs are looked
        at, some rows of their table at a time; the paper is targeted only.
    """
    del key
    theta = _validate.box_width(bounds, theta=theta) if theta is None else theta
    _validate.non_zero(theta=theta, remedy="pass what a step adds to a feature, in input units")
    problem = prepare(
        logits_fn, None, inputs, labels, targets=targets, bounds=bounds, open_box=True
    )
    num_features = math.prod(problem.inputs.shape[1:])
    if num_features < 2:
        raise ValueError(
            f"expected at least 2 features per example, got inputs of shape "
            f"{problem.inputs.shape}; the attack changes features in pairs"
        )
    if max_features is None:
        max_features = max(2, int(num_features * _SHARE))
    _validate.count(minimum=2, max_features=max_features)
    start = problem.inputs if init is None else start_point(init, problem)
    method = _JSMA(
        output=as_pytree(output, name="output"),
        theta=one_per_example(theta, problem.inputs, name="theta"),
        start=start,
        num_events=max_features // 2,
        keeps_pairs=trace,
    )
    return run(method, problem, trace=trace)


def softmax_at(temperature: ArrayLike) -> Callable[[Array], Array]:
    """The softmax at a temperature, `softmax(z / T)`, as an `output` of `jsma`.

    At the temperature of the training, a distilled network's softmax has the gradients that it
    hides at T = 1.

    Args:
        temperature: above 0; a scalar; may be traced.

    Returns:
        A pytree `(logits [B, K]) -> [B, K]` that carries the temperature: a new one compiles
        nothing.

    Raises:
        ValueError: a temperature that is not above 0.

    Example:
        >>> softmax_at(100.0)(jnp.array([[0.0, 200.0]])).round(3).tolist()
        [[0.119..., 0.881...]]

    References:
        Carlini & Wagner 2016, "Defensive Distillation is Not Robust to Adversarial Examples".
    """
    _validate.scalar(temperature=temperature)
    _validate.positive(temperature=temperature)
    return Partial(_softmax_at, jnp.asarray(temperature, float))


def _softmax_at(temperature: Array, logits: Array) -> Array:
    return softmax(logits / temperature.astype(logits.dtype))


class _State(NamedTuple):
    inputs: Array  # the current iterate
    target: Array  # the class aimed at
    num_pairs: Array
    pairs: Array | None  # [B, num_events, 2]


@register
class _JSMA(Method):
    output: Any
    theta: Array  # [B]
    start: Array  # [B, ...]
    num_events: int = static_field()
    keeps_pairs: bool = static_field()
    norm = "l0"
    minimum_norm = True
    passes = Passes(1, 2)

    def init(self, problem: Problem) -> tuple[_State, Array]:
        logits, target = problem.logits_fn(problem.inputs), problem.goal.targets
        if target is None:
            others = jax.nn.one_hot(problem.goal.labels, logits.shape[1], dtype=bool)
            target = jnp.argmax(jnp.where(others, -jnp.inf, logits), axis=1).astype(jnp.int32)
        pairs = None
        if self.keeps_pairs:
            pairs = jnp.full((*target.shape, self.num_events, 2), -1, jnp.int32)
        start = jnp.clip(self.start, *problem.bounds)
        return _State(start, target, jnp.zeros_like(target), pairs), logits

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """Judge the current iterate, then change its best pair."""
        logits, for_target, for_others = _saliency(problem, self.output, state.target, state.inputs)
        sign, theta = jnp.sign(self.theta)[:, None], self.theta[:, None]
        flat = norms.flatten(state.inputs)
        low, high = (_flat_end(end) for end in problem.bounds)
        movable = jnp.where(sign > 0, flat < high, flat > low)
        score, first, second = _best_pair(sign * for_target, -sign * for_others, movable)

        moving, index = score > 0, jnp.arange(flat.shape[1])[None]
        chosen = ((index == first[:, None]) | (index == second[:, None])) & moving[:, None]
        moved = jnp.where(chosen, jnp.clip(flat + theta, low, high), flat)
        pairs = state.pairs
        if pairs is not None:
            # Without a pair nothing is written: past the end nothing is.
            place = jnp.where(moving, event, self.num_events)
            pair = jnp.stack([first, second], axis=1)
            pairs = pairs.at[jnp.arange(len(place)), place].set(pair, mode="drop")
        new = _State(
            moved.reshape(state.inputs.shape), state.target, state.num_pairs + moving, pairs
        )
        goal = problem.goal
        return new, Seen(goal.reached(logits), goal.excess(logits), spent=~moving)

    def point(self, problem: Problem, state: _State) -> Array:
        return state.inputs

    def info(
        self, problem: Problem, state: _State, progress: Progress, result: AttackResult
    ) -> dict[str, Array]:
        pairs = {} if state.pairs is None else {"pairs": state.pairs}
        return {"target": state.target, "num_pairs": state.num_pairs, **pairs}


def _flat_end(end: Array) -> Array:
    return end if end.ndim == 0 else norms.flatten(end)


def _saliency(
    problem: Problem, output: Callable[[Array], Array], target: Array, inputs: Array
) -> tuple[Array, Array, Array]:
    """The logits, and the gradients `[B, D]` of the target's and of the summed others' scores.

    The two gradients are divided by their largest entry together.
    """
    logits, pull_inputs = jax.vjp(problem.logits_fn, inputs)
    scores, pull_logits = jax.vjp(output, logits)
    if scores.shape != logits.shape:
        raise ValueError(
            f"expected output to keep the logits' shape {logits.shape}, got {scores.shape}; pass a "
            "function of logits [B, K] such as attacks.softmax"
        )
    own = jax.nn.one_hot(target, scores.shape[1], dtype=scores.dtype)
    # Two backward passes whatever the number of classes: only the others' sum matters.
    both = jnp.stack(
        [pull_inputs(*pull_logits(weights))[0] for weights in (own, 1 - own)], axis=1
    ).reshape(*target.shape, 2, math.prod(inputs.shape[1:]))
    both = jnp.where(jnp.isfinite(both), both, 0.0)
    scale = jnp.max(jnp.abs(both), axis=(1, 2), keepdims=True)
    both = both / jnp.where(scale > 0, scale, 1.0)
    return logits, both[:, 0], both[:, 1]


def _best_pair(alpha: Array, beta: Array, movable: Array) -> tuple[Array, Array, Array]:
    """The largest product and its pair, `[B]` each; the product is 0 where no pair qualifies.

    A pair's product is `(alpha_p + alpha_q) · (beta_p + beta_q)` with both factors above 0. All
    pairs are looked at, but only some rows of the `[D, D]` table exist at a time.
    """
    batch_size, num_features = alpha.shape
    index = jnp.arange(num_features)

    def products(row: Array) -> Array:
        """Products of the features `row [B]` with all others, `[B, D]`."""
        own = functools.partial(jnp.take_along_axis, indices=row[:, None], axis=1)
        up, down = own(alpha) + alpha, own(beta) + beta
        allowed = movable & own(movable) & (index[None] != row[:, None])
        return jnp.where(allowed & (up > 0) & (down > 0), up * down, 0.0)

    best_of_rows = jax.lax.map(
        lambda row: jnp.max(products(jnp.full(batch_size, row)), axis=1),
        index,
        # Of an empty batch there is nothing to group.
        batch_size=min(num_features, max(1, _PAIRS_AT_A_TIME // alpha.size))
        if batch_size
        else None,
    )
    # The table is symmetric, so the first row that holds the best product holds the first pair.
    first = jnp.argmax(best_of_rows, axis=0)
    row = products(first)
    return jnp.max(row, axis=1), first.astype(jnp.int32), jnp.argmax(row, axis=1).astype(jnp.int32)
