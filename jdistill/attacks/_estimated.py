"""SPSA and NES: projected ascent along gradients that are estimated from logits alone."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, metrics, norms
from jdistill._jax import register, static_field
from jdistill.attacks._core.constant_search import per_example_adam
from jdistill.attacks._core.engine import Method, Passes, Seen, run, select
from jdistill.attacks._core.problem import (
    AttackResult,
    Goal,
    Problem,
    need_key,
    one_per_example,
    prepare,
    radius,
    start_point,
)
from jdistill.attacks._core.traits import facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn, Norm

_NORMS: tuple[Norm, ...] = ("linf", "l2")
_Sums = tuple[Array, Array, Array]


@facts(title="SPSA", norms=_NORMS, access="scores")
def spsa(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: Norm = "linf",
    num_steps: int = 100,
    num_samples: int = 64,
    delta: ArrayLike | None = None,
    step_size: ArrayLike | None = None,
    num_parallel: int | None = None,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """SPSA: Adam on the margin, along gradients estimated from random differences of it.

    Each step is::

        g = mean over v of (f(x + δ v) - f(x - δ v)) / 2δ · v,     v random signs
        x ← project(x + step_size · Adam(g / ‖g‖₂))

    f is the margin max_{i≠y} z_i - z_y. No gradient of the network is used, only its logits: what
    hides a gradient cannot stop the attack, and δ looks past what is flat or shattered on a
    smaller scale. Each estimate is divided by its size, so no scale of the logits matters. For l2
    the step follows Adam's first moment alone, which is the steepest direction there.

    Points are clipped into the box before the network is asked; where that shortens a difference,
    the estimate is divided by what is left of it. The start is the input. Each iterate is judged,
    and each example stops at its first success.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`; it is never differentiated.
        key: one key, or `[B]` keys. Step `t` draws direction `s` from `fold_in(fold_in(
            example's key, t), s)`.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"` or `"l2"`.
        num_steps: Adam steps, at least 1; static.
        num_samples: directions per step, at least 1; static. Each costs two queries, and the step
            one more.
        delta: δ in input units, above 0; scalar or `[B]`; may be traced. None takes 0.01 of the
            box's width.
        step_size: length of a step in input units, at least 0; scalar or `[B]`; may be traced.
            None takes `eps / 10`. For linf it is the learning rate of Adam, which changes each
            feature by about as much.
        num_parallel: directions of each example that are tried in one batch, of `2 · B ·
            num_parallel` inputs; static. None takes all; fewer need less memory.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        init: `[B, ...]`, the start instead of the inputs (projected into ball and box); only what
            the steps lead to is judged.
        trace: keep the margin after every step.

    Returns:
        The result. An example that resists is returned at its iterate of the largest margin.
        `info`: `first_success`, the step after which it succeeded; `gradients`, all 0; with
        `trace`, the margin after each step, `trace [B, num_steps]`. See `jdistill.attacks`.

    Raises:
        ValueError: eps or step_size below 0 or NaN, delta not above 0, inputs not finite or
            outside the box, labels or targets outside `0..K-1`, wrong ranks, an unknown norm,
            counts below 1, no key.

    Example:
        >>> logits_fn = lambda x: jnp.round(  # the gradient is 0 everywhere
        ...     500 * (x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.6, 0.0]])))
        >>> x, y = jnp.array([[0.3, 0.5]]), jnp.array([0])
        >>> result = spsa(logits_fn, jax.random.key(0), x, y, eps=0.3)
        >>> bool(result.success[0]), bool(result.distance[0] <= 0.3)
        (True, True)

    References:
        Uesato, O'Donoghue, van den Oord & Kohli 2018, "Adversarial Risk and the Dangers of
        Evaluating Against Weak Attacks", section 4.1 and algorithm 1. Departures: the estimate's
        size, the clipping, and the form for l2 as above; the iterate of the largest margin is
        returned and not the last one, since the estimates are noisy.
    """
    _validate.one_of(_NORMS, norm=norm)
    delta = 0.01 * _validate.box_width(bounds, delta=delta) if delta is None else delta
    _validate.positive(delta=delta)
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds, open_box=True)
    reach = one_per_example(delta, problem.inputs, name="delta")
    method = _ascent(
        problem, eps, norm, num_steps, num_samples, reach, step_size, num_parallel, init
    )
    return run(method, problem, trace=trace)


@facts(title="NES", norms=_NORMS, access="scores")
def nes(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: Norm = "linf",
    num_steps: int = 200,
    num_samples: int = 25,
    sigma: ArrayLike | None = None,
    step_size: ArrayLike | None = None,
    decay: ArrayLike = 0.9,
    num_parallel: int | None = None,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """NES: projected gradient steps along gradients estimated by antithetic Gaussian sampling.

    Each step is::

        g = mean over u of (f(x + σ u) - f(x - σ u)) / 2σ · u,     u normal
        v ← decay · v + g / ‖g‖₂
        x ← project(x + step_size · steepest(v))

    f is the margin max_{i≠y} z_i - z_y. No gradient of the network is used, only its logits. The
    published σ is small: where logits are rounded or flat a larger one is needed. Each estimate is
    divided by its size, so no scale of the logits matters.

    Points are clipped into the box, the start is the input, and each example stops at its first
    success, as in `spsa`.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`; it is never differentiated.
        key: one key, or `[B]` keys. Step `t` draws direction `s` from `fold_in(fold_in(
            example's key, t), s)`.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"` or `"l2"`.
        num_steps: steps, at least 1; static.
        num_samples: directions per step, at least 1; static. Each costs two queries, and the step
            one more.
        sigma: σ in input units, above 0; scalar or `[B]`; may be traced. None takes 0.001 of the
            box's width.
        step_size: length of a step in input units, at least 0; scalar or `[B]`; may be traced.
            None takes `eps / 10`.
        decay: of the accumulated direction, at least 0; scalar or `[B]`; may be traced. 0 follows
            each estimate alone.
        num_parallel: directions of each example that are tried in one batch; static. None: all.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        init: `[B, ...]`, the start instead of the inputs (projected into ball and box); only what
            the steps lead to is judged.
        trace: keep the margin after every step.

    Returns:
        The result, as of `spsa`.

    Raises:
        ValueError: as `spsa`; sigma not above 0, decay below 0 or NaN.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.6, 0]])
        >>> x, y = jnp.array([[0.3, 0.5]]), jnp.array([0])
        >>> result = nes(logits_fn, jax.random.key(0), x, y, eps=0.3)
        >>> bool(result.success[0]), bool(result.distance[0] <= 0.3)
        (True, True)

    References:
        Ilyas, Engstrom, Athalye & Lin 2018, "Black-box Adversarial Attacks with Limited Queries
        and Information", section 2.1 and algorithm 1; the accumulated direction is the released
        code's. Departures: the margin and not the cross-entropy, a step size that stays as it is,
        and else as in `spsa`.
    """
    _validate.one_of(_NORMS, norm=norm)
    sigma = 0.001 * _validate.box_width(bounds, sigma=sigma) if sigma is None else sigma
    _validate.positive(sigma=sigma)
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds, open_box=True)
    reach = one_per_example(sigma, problem.inputs, name="sigma")
    decay = radius(decay, problem.inputs, name="decay")
    method = _ascent(
        problem, eps, norm, num_steps, num_samples, reach, step_size, num_parallel, init, decay
    )
    return run(method, problem, trace=trace)


def _ascent(
    problem: Problem,
    eps: ArrayLike,
    norm: Norm,
    num_steps: int,
    num_samples: int,
    reach: Array,
    step_size: ArrayLike | None,
    num_parallel: int | None,
    init: ArrayLike | None,
    decay: Array | None = None,
) -> "_Ascent":
    """The checked settings of both attacks."""
    parallel = num_samples if num_parallel is None else num_parallel
    _validate.count(num_steps=num_steps, num_samples=num_samples, num_parallel=parallel)
    need_key(problem, "random directions")
    eps = radius(eps, problem.inputs)
    step_size = eps / 10 if step_size is None else step_size
    start = problem.inputs if init is None else start_point(init, problem)
    return _Ascent(
        eps=eps,
        reach=reach,
        step_size=radius(step_size, problem.inputs, name="step_size"),
        decay=decay,
        start=start,
        norm=norm,
        num_events=num_steps,
        num_samples=num_samples,
        num_parallel=min(parallel, num_samples),
    )


def _margin(problem: Problem, goal: Goal, inputs: Array) -> tuple[Array, Array]:
    """The margin towards the goal `[B]`, NaN where logits are broken; whether it is reached."""
    logits = problem.logits_fn(inputs)
    finite = metrics.predicts(logits)
    return jnp.where(finite, goal.excess(logits), jnp.nan), goal.reached(logits)


class _State(NamedTuple):
    inputs: Array  # the current iterate
    average: Any  # Adam's moments, or the accumulated direction
    best: tuple[Array, Array]  # the iterate of the largest margin, and that margin


@register
class _Ascent(Method):
    eps: Array  # [B]
    reach: Array  # [B], δ or σ: how far the points of an estimate are
    step_size: Array  # [B]
    decay: Array | None  # [B]; None is SPSA, with random signs and Adam
    start: Array  # [B, ...]
    norm: Norm = static_field()
    num_events: int = static_field()
    num_samples: int = static_field()
    num_parallel: int = static_field()
    moves_first = True

    @property
    def passes(self) -> Passes:  # type: ignore[override]
        return Passes(2 * self.num_samples + 1, 0)

    def init(self, problem: Problem) -> tuple[_State, Array]:
        start = norms.into_ball_and_box(
            self.start, problem.inputs, self.eps, self.norm, problem.bounds
        )
        average = per_example_adam().init(start) if self.decay is None else jnp.zeros_like(start)
        nothing = jnp.full(self.eps.shape, -jnp.inf, start.dtype)
        return _State(start, average, (start, nothing)), problem.logits_fn(problem.inputs)

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """Estimate the gradient, move along it, and judge where that leads."""
        gradient = norms.normalize(self.estimate(problem, state.inputs, event), "l2")
        direction, average = self._turn(gradient, state.average)
        length = norms.per_example(self.step_size, direction)
        moved = norms.into_ball_and_box(
            state.inputs + length * direction, problem.inputs, self.eps, self.norm, problem.bounds
        )
        margin, reached = _margin(problem, problem.goal, moved)
        margin = jnp.where(jnp.isnan(margin), -jnp.inf, margin)
        # From where logits are broken no difference would lead back.
        inputs = select(margin > -jnp.inf, moved, state.inputs)
        best = select(margin > state.best[1], (moved, margin), state.best)
        return _State(inputs, average, best), Seen(reached, margin)

    def _turn(self, gradient: Array, average: Any) -> tuple[Array, Any]:
        """The direction of the step, of unit size, and the new average."""
        if self.decay is None:
            direction, average = per_example_adam().update(gradient, average)
            # Divided feature by feature a direction is one of signs, which is not the steepest
            # for l2.
            return direction if self.norm == "linf" else norms.steepest(average.mu, "l2"), average
        average = norms.per_example(self.decay, gradient) * average + gradient
        return norms.steepest(average, self.norm), average

    def estimate(self, problem: Problem, inputs: Array, step: Array) -> Array:
        """The gradient of the margin at the inputs, up to a factor, `[B, ...]`."""
        fold_in = jax.vmap(jax.random.fold_in)
        keys = fold_in(need_key(problem, "random directions"), step)
        shape, dtype = inputs.shape[1:], inputs.dtype
        bounds = tuple(end if end.ndim == 0 else end[None, None] for end in problem.bounds)
        # Of mean 0 and variance 1.
        random = jax.random.rademacher if self.decay is None else jax.random.normal

        def draw(sample: Array) -> Array:
            own = fold_in(keys, jnp.broadcast_to(sample, keys.shape))
            return jax.vmap(lambda key: random(key, shape, dtype))(own)

        def some(samples: Array) -> _Sums:
            """The sums over the directions of these numbers."""
            # Samples lead: the rows of the first sample, then those of the next one.
            directions = jax.vmap(draw)(samples)
            offsets = norms.per_example(self.reach, inputs)[None] * directions
            ends = jnp.clip(jnp.stack([inputs[None] + offsets, inputs[None] - offsets]), *bounds)
            repeated = jax.tree.map(lambda column: jnp.tile(column, 2 * len(samples)), problem.goal)
            margins, _ = _margin(problem, repeated, ends.reshape(-1, *shape))
            upper, lower = margins.reshape(2, len(samples), inputs.shape[0])
            rise = jnp.where(jnp.isfinite(upper - lower), upper - lower, 0.0)
            rise = rise.reshape(rise.shape + (1,) * len(shape))
            return (
                jnp.sum(rise * directions, axis=0),
                jnp.sum((ends[0] - ends[1]) * directions, axis=0),
                jnp.sum(2.0 * offsets * directions, axis=0),
            )

        numbers = jnp.arange(self.num_samples)
        whole, rest = divmod(self.num_samples, self.num_parallel)
        if whole == 1 and not rest:
            slope, got, wanted = some(numbers)
        else:
            groups = numbers[: self.num_samples - rest].reshape(whole, self.num_parallel)
            add = functools.partial(jax.tree.map, jnp.add)
            sums: _Sums = (jnp.zeros_like(inputs),) * 3
            sums, _ = jax.lax.scan(lambda sums, group: (add(sums, some(group)), None), sums, groups)
            slope, got, wanted = add(sums, some(numbers[-rest:])) if rest else sums
        # A feature at a bound moved to one side only: less far, and the margin rose by less.
        return slope * jnp.where(got > 0, wanted / jnp.where(got > 0, got, 1.0), 0.0)

    def point(self, problem: Problem, state: _State) -> Array:
        return state.best[0]
