"""SPSA and NES: projected ascent along gradients that are estimated from logits alone."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._precision import full_precision
from jdistill.attacks._core import constant_search as _search
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.problem import AttackResult, Goal, Problem
from jdistill.attacks._loop import until_done
from jdistill.typing import Array, ArrayLike, LogitsFn

_NORMS = ("linf", "l2")
_Sums = tuple[Array, Array, Array]


def spsa(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    num_steps: int = 100,
    num_samples: int = 64,
    delta: ArrayLike = 0.01,
    learning_rate: ArrayLike | None = None,
    num_parallel: int | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """SPSA: Adam on the margin, along gradients estimated from random differences of it.

        g = mean over v of (f(x + δ v) - f(x - δ v)) / 2δ · v,     v random signs
        x ← project(x + learning_rate · Adam(g / ‖g‖₂))

    f is the margin max_{i≠y} z_i - z_y. No gradient of the network is used, only its logits: what
    hides a gradient cannot stop the attack, and δ looks past what is flat or shattered on a
    smaller scale. Each estimate is divided by its size, so no scale of the logits matters. For l2
    the step follows Adam's first moment alone, which is the steepest direction there.

    Points are clipped into the box before the network is asked; where that shortens a difference,
    the estimate is divided by what is left of it. Each example stops at its first success.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`; it is never differentiated.
        key: one key, or `[B]` keys. Step `t` draws its `s`-th direction from `fold_in(fold_in(
            example's key, t), s)`.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"` or `"l2"`.
        num_steps: Adam steps, at least 1; static.
        num_samples: directions a step, at least 1; static. Each costs two queries, and the step
            one more.
        delta: δ in input units, above 0; scalar or `[B]`; may be traced.
        learning_rate: of Adam, at least 0; scalar or `[B]`; may be traced. In input units: a step
            changes each feature by about as much; for l2 it is the step's length. None takes
            `eps / 10`.
        num_parallel: directions of each example that are tried in one batch, of `2 · B ·
            num_parallel` inputs; static. None takes all; fewer need less memory.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        trace: keep the margin after every step.

    Returns:
        The result. An example that resists is returned at its iterate of the largest margin.
        `info`: `first_success [B]` int32, the step after which it succeeded (0: misclassified to
        begin with), -1 if never; with `trace`, `margin [B, num_steps]`, that of each iterate, NaN
        where the example had stopped.

    Raises:
        ValueError: eps or learning_rate below 0 or NaN, delta not above 0, inputs not finite or
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
        Evaluating Against Weak Attacks", section 4.1 and algorithm 1.
    """
    _validate.one_of(_NORMS, norm=norm)
    _validate.positive(delta=delta)
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    eps = _base.radius(eps, problem.inputs)
    learning_rate = eps / 10 if learning_rate is None else learning_rate
    settings = _Settings(
        eps=eps,
        reach=_base.one_per_example(delta, problem.inputs, name="delta"),
        step_size=_base.radius(learning_rate, problem.inputs, name="learning_rate"),
        momentum=None,
    )
    return _search_from(problem, settings, _SPSA, norm, num_steps, num_samples, num_parallel, trace)


def nes(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    num_steps: int = 200,
    num_samples: int = 25,
    sigma: ArrayLike = 0.001,
    step_size: ArrayLike | None = None,
    momentum: ArrayLike = 0.9,
    num_parallel: int | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """NES: projected gradient steps along gradients estimated by antithetic Gaussian sampling.

        g = mean over u of (f(x + σ u) - f(x - σ u)) / 2σ · u,     u normal
        m ← momentum · m + (1 - momentum) · g / ‖g‖₂
        x ← project(x + step_size · steepest(m))

    f is the margin max_{i≠y} z_i - z_y. No gradient of the network is used, only its logits. The
    published σ is small: where logits are rounded or flat a larger one is needed. Each estimate is
    divided by its size, so no scale of the logits matters.

    Points are clipped into the box, and each example stops at its first success, as in `spsa`.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`; it is never differentiated.
        key: one key, or `[B]` keys. Step `t` draws its `s`-th direction from `fold_in(fold_in(
            example's key, t), s)`.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"` or `"l2"`.
        num_steps: steps, at least 1; static.
        num_samples: directions a step, at least 1; static. Each costs two queries, and the step
            one more.
        sigma: σ in input units, above 0; scalar or `[B]`; may be traced.
        step_size: length of a step in input units, at least 0; scalar or `[B]`; may be traced.
            None takes `eps / 10`.
        momentum: share of the direction before that is kept, in `[0, 1]`; 0 follows each estimate
            alone; scalar or `[B]`; may be traced.
        num_parallel: directions of each example that are tried in one batch; static. None: all.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        trace: keep the margin after every step.

    Returns:
        The result, as of `spsa`.

    Raises:
        ValueError: as `spsa`; step_size below 0, sigma not above 0, momentum outside `[0, 1]`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.6, 0]])
        >>> x, y = jnp.array([[0.3, 0.5]]), jnp.array([0])
        >>> result = nes(logits_fn, jax.random.key(0), x, y, eps=0.3)
        >>> bool(result.success[0]), bool(result.distance[0] <= 0.3)
        (True, True)

    References:
        Ilyas, Engstrom, Athalye & Lin 2018, "Black-box Adversarial Attacks with Limited Queries
        and Information", section 2.1 and algorithm 1; the momentum is the released code's.
    """
    _validate.one_of(_NORMS, norm=norm)
    _validate.positive(sigma=sigma)
    _validate.within(0.0, 1.0, momentum=momentum)
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    eps = _base.radius(eps, problem.inputs)
    step_size = eps / 10 if step_size is None else step_size
    settings = _Settings(
        eps=eps,
        reach=_base.one_per_example(sigma, problem.inputs, name="sigma"),
        step_size=_base.radius(step_size, problem.inputs, name="step_size"),
        momentum=_base.one_per_example(momentum, problem.inputs, name="momentum"),
    )
    return _search_from(problem, settings, _NES, norm, num_steps, num_samples, num_parallel, trace)


class _Settings(NamedTuple):
    """What may be traced; `[B]` each.

    Attributes:
        reach: δ or σ, what a random direction is multiplied with.
    """

    eps: Array
    reach: Array
    step_size: Array
    momentum: Array | None


class _Method(NamedTuple):
    """What the two attacks do not share; static."""

    draw: Callable[..., Array]  # (key, shape, dtype): a direction of mean 0 and variance 1
    init: Callable[[Array], Any]  # inputs [B, ...] -> state
    # (settings, norm, gradient [B, ...], state) -> direction [B, ...] and state
    turn: Callable[[_Settings, str, Array, Any], tuple[Array, Any]]


class _Counts(NamedTuple):
    """What else is static."""

    norm: str
    num_steps: int
    num_samples: int
    num_parallel: int
    trace: bool


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    inputs: Array
    state: Any  # the method's own
    step: Array
    done: Array
    best: Array
    best_margin: Array
    first_success: Array
    queries: Array
    margins: Array  # [B, 1, num_steps], or [B, 0, 0] without a trace


def _adam(settings: _Settings, norm: str, gradient: Array, state: Any) -> tuple[Array, Any]:
    del settings
    direction, state = _search.per_example_adam().update(gradient, state)
    # Divided feature by feature a direction is one of signs, which is not the steepest for l2.
    return direction if norm == "linf" else norms.steepest(state.mu, norm), state


def _averaged(settings: _Settings, norm: str, gradient: Array, state: Any) -> tuple[Array, Any]:
    assert settings.momentum is not None
    share = norms.per_example(settings.momentum, gradient)
    mean = share * state + (1.0 - share) * gradient
    return norms.steepest(mean, norm), mean


_SPSA = _Method(jax.random.rademacher, lambda x: _search.per_example_adam().init(x), _adam)
_NES = _Method(jax.random.normal, jnp.zeros_like, _averaged)


def _search_from(
    problem: Problem,
    settings: _Settings,
    method: _Method,
    norm: str,
    num_steps: int,
    num_samples: int,
    num_parallel: int | None,
    trace: bool,
) -> AttackResult:
    """Check what both attacks share, and run."""
    parallel = num_samples if num_parallel is None else num_parallel
    _validate.count(num_steps=num_steps, num_samples=num_samples, num_parallel=parallel)
    _base.need_key(problem, "random directions")
    counts = _Counts(norm, num_steps, num_samples, min(parallel, num_samples), trace)
    with full_precision():
        return _estimated(problem, settings, method, counts)


def _margin(problem: Problem, goal: Goal, inputs: Array) -> tuple[Array, Array]:
    """The margin towards the goal `[B]`, NaN where logits are broken; whether it is reached."""
    logits = problem.logits_fn(inputs)
    finite = jnp.all(jnp.isfinite(logits), axis=-1)
    return jnp.where(finite, goal.excess(logits), jnp.nan), goal.reached(logits)


def _estimate(
    problem: Problem,
    settings: _Settings,
    method: _Method,
    counts: _Counts,
    inputs: Array,
    step: Array,
) -> Array:
    """The gradient of the margin at the inputs, up to a factor, `[B, ...]`."""
    fold_in = jax.vmap(jax.random.fold_in)
    keys = fold_in(_base.need_key(problem, "random directions"), step)
    shape, dtype = inputs.shape[1:], inputs.dtype

    def draw(sample: Array) -> Array:
        own = fold_in(keys, jnp.broadcast_to(sample, keys.shape))
        return jax.vmap(lambda key: method.draw(key, shape, dtype))(own)

    def some(samples: Array) -> _Sums:
        """The sums over the directions of these numbers."""
        # Samples lead: the rows of the first sample, then those of the next one.
        directions = jax.vmap(draw)(samples)
        offsets = norms.per_example(settings.reach, inputs)[None] * directions
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

    bounds = problem.bounds
    numbers = jnp.arange(counts.num_samples)
    whole, rest = divmod(counts.num_samples, counts.num_parallel)
    if whole == 1 and not rest:
        slope, got, wanted = some(numbers)
    else:
        groups = numbers[: counts.num_samples - rest].reshape(whole, counts.num_parallel)
        add = functools.partial(jax.tree.map, jnp.add)
        sums: _Sums = (jnp.zeros_like(inputs),) * 3
        sums, _ = jax.lax.scan(lambda sums, group: (add(sums, some(group)), None), sums, groups)
        slope, got, wanted = add(sums, some(numbers[-rest:])) if rest else sums
    # A feature at a bound moved to one side only: less far, and the margin rose by less.
    return slope * jnp.where(got > 0, wanted / jnp.where(got > 0, got, 1.0), 0.0)


def _step(
    problem: Problem, settings: _Settings, method: _Method, counts: _Counts, carry: _Carry
) -> _Carry:
    """Estimate the gradient, move along it, and judge where that leads."""
    active = ~carry.done
    gradient = _estimate(problem, settings, method, counts, carry.inputs, carry.step)
    gradient = norms.normalize(gradient, "l2")
    direction, state = method.turn(settings, counts.norm, gradient, carry.state)
    length = norms.per_example(settings.step_size, direction)
    moved = norms.into_ball_and_box(
        carry.inputs + length * direction,
        problem.inputs,
        settings.eps,
        counts.norm,
        problem.bounds,
    )
    margin, reached = _margin(problem, problem.goal, moved)
    margin = jnp.where(jnp.isnan(margin), -jnp.inf, margin)
    success = active & reached
    better = active & (margin > carry.best_margin)
    step = carry.step + active
    return _Carry(
        # From where logits are broken no difference would lead back.
        inputs=_search.select(active & (margin > -jnp.inf), moved, carry.inputs),
        state=_search.select(active, state, carry.state),
        step=step,
        done=carry.done | success | (step == counts.num_steps),
        best=_search.select(better, moved, carry.best),
        best_margin=jnp.where(better, margin, carry.best_margin),
        first_success=jnp.where(success, step, carry.first_success),
        queries=carry.queries + jnp.where(active, 2 * counts.num_samples + 1, 0),
        margins=_base.record(carry.margins, active, margin, jnp.zeros_like(carry.step), carry.step),
    )


@functools.partial(jax.jit, static_argnames=("method", "counts"))
def _estimated(
    problem: Problem, settings: _Settings, method: _Method, counts: _Counts
) -> AttackResult:
    inputs = problem.inputs
    clean_success = problem.goal.reached_clean(problem.logits_fn(inputs))
    zeros = jnp.zeros(clean_success.shape, jnp.int32)
    shape = (1, counts.num_steps) if counts.trace else (0, 0)
    carry = until_done(
        lambda problem, settings, carry: _step(problem, settings, method, counts, carry),
        (problem, settings),
        _Carry(
            inputs=inputs,
            state=method.init(inputs),
            step=zeros,
            done=clean_success,
            best=inputs,
            best_margin=jnp.full(zeros.shape, -jnp.inf, inputs.dtype),
            first_success=jnp.where(clean_success, 0, -1),
            queries=zeros + 1,  # the clean forward pass
            margins=jnp.full(zeros.shape + shape, jnp.nan, inputs.dtype),
        ),
        at_most=counts.num_steps,
        spread=problem.spread,
    )
    info = {"first_success": carry.first_success}
    if counts.trace:
        info["margin"] = carry.margins[:, 0]
    return _base.finish(
        problem,
        carry.best,
        clean_success=clean_success,
        found=jnp.ones(zeros.shape, bool),
        queries=carry.queries,
        norm=counts.norm,
        info=info,
        minimum_norm=False,
    )
