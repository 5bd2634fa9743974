"""Attacks of a fixed budget that follow the gradient of a loss: FGSM and PGD."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, losses, norms
from jdistill._precision import full_precision
from jdistill.attacks import _base
from jdistill.attacks._base import AttackResult, Goal, Problem
from jdistill.typing import Array, ArrayLike, LogitsFn

_NORMS = ("linf", "l2")


def fgsm(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.cross_entropy,
) -> AttackResult:
    """Fast gradient (sign) method: one full step along the steepest direction of the loss.

        x' = clip(x + eps · sign(∂ loss / ∂x))        (linf; the unit gradient for l2)

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"` or `"l2"`.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized).

    Returns:
        The result; `info` is empty. Each attacked example costs two queries.

    Raises:
        ValueError: eps below 0 or NaN, inputs not finite or outside the box, labels or targets
            outside `0..K-1`, wrong ranks, an unknown norm.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]])
        >>> x, y = jnp.array([[0.3, 0.3]]), jnp.array([0])
        >>> result = fgsm(logits_fn, None, x, y, eps=0.2)
        >>> result.inputs.round(3).tolist(), bool(result.success[0])
        ([[0.1..., 0.1...]], False)

    References:
        Goodfellow, Shlens & Szegedy 2015, section 4.
    """
    del key
    _validate.one_of(_NORMS, norm=norm)
    problem = _base.prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    with full_precision():
        return _fgsm(problem, _as_pytree(loss), _base.radius(eps, problem.inputs), norm=norm)


def pgd(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    num_steps: int = 40,
    step_size: ArrayLike | None = None,
    num_restarts: int = 1,
    random_start: bool = True,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.cross_entropy,
    trace: bool = False,
) -> AttackResult:
    """Projected gradient descent on a loss, inside a ball around each input.

        x ← project(x + step_size · steepest(∂ loss / ∂x))

    Each example stops at its first success; the others go on, through `num_restarts` starts.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys; None is enough where nothing is random.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"` or `"l2"`.
        num_steps: gradient steps a start, at least 1; static.
        step_size: length of a step in input units, at least 0; scalar or `[B]`; may be traced.
            None takes `2.5 · eps / num_steps`.
        num_restarts: starts, at least 1; static. Only survivors take the next one.
        random_start: start uniformly inside the ball; otherwise at the input.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        init: `[B, ...]`, the first start instead (projected into ball and box).
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized). `jdistill.losses.margin` does not saturate on distilled networks.
        trace: keep the loss of every step.

    Returns:
        The result. An example that resists is returned at its last iterate. `info`:
        `first_success [B]` int32, the step (0: the start) at which it succeeded, -1 if never;
        `restart [B]` int32, the start it ended in; with `trace`, `loss
        [B, num_restarts, num_steps]`, what was maximized at each iterate before its step, NaN
        where the example had stopped.

    Raises:
        ValueError: eps or step_size below 0 or NaN, inputs not finite or outside the box, labels
            or targets outside `0..K-1`, wrong ranks, an unknown norm, counts below 1, no key where
            one is needed.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.3, 0]])
        >>> x, y = jnp.array([[0.3, 0.3]]), jnp.array([0])
        >>> result = pgd(logits_fn, jax.random.key(0), x, y, eps=0.25, num_steps=10)
        >>> bool(result.success[0]), bool(result.distance[0] <= 0.25)
        (True, True)

    References:
        Madry et al. 2018, section 2.1 and appendix (random starts).
    """
    _validate.one_of(_NORMS, norm=norm)
    _validate.count(num_steps=num_steps, num_restarts=num_restarts)
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    eps = _base.radius(eps, problem.inputs)
    if step_size is None:
        step_size = 2.5 * eps / num_steps
    step_size = _base.radius(step_size, problem.inputs, name="step_size")
    if init is not None:
        init = _base.start_point(init, problem)
    if num_restarts > 1 and not random_start:
        raise ValueError(
            f"expected num_restarts=1 without random starts, got {num_restarts}; every restart "
            "would be the same run: pass random_start=True"
        )
    draws = num_restarts > 1 or (random_start and init is None)
    if draws:
        _base.need_key(problem, "random starts")
    with full_precision():
        return _pgd(
            problem,
            _as_pytree(loss),
            eps,
            step_size,
            init,
            norm=norm,
            num_steps=num_steps,
            num_restarts=num_restarts,
            random_start=random_start,
            trace=trace,
        )


def _as_pytree(loss: Callable[..., Array]) -> Callable[..., Array]:
    """A loss that jit can take as an argument: a plain function becomes static."""
    return jax.tree_util.Partial(loss) if jax.tree_util.all_leaves([loss]) else loss


def _gain_gradient(
    problem: Problem, goal: Goal, loss: Callable[..., Array], inputs: Array
) -> tuple[Array, Array, Array]:
    """Gradient `[B, ...]`, logits `[B, K]` and gain `[B]` at the inputs.

    The gradient is of the batch sum, so each row is that example's own, whatever the batch size.
    """

    def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
        logits = problem.logits_fn(x)
        gain = goal.gain(loss, logits)
        return jnp.sum(gain), (logits, gain)

    gradient, (logits, gain) = jax.grad(total, has_aux=True)(inputs)
    return gradient, logits, gain


@functools.partial(jax.jit, static_argnames="norm")
def _fgsm(problem: Problem, loss: Callable[..., Array], eps: Array, *, norm: str) -> AttackResult:
    inputs = problem.inputs
    gradient, logits, _ = _gain_gradient(problem, problem.goal, loss, inputs)
    moved = inputs + norms.per_example(eps, inputs) * norms.steepest(gradient, norm)
    return _base.finish(
        problem,
        norms.into_ball_and_box(moved, inputs, eps, norm, problem.bounds),
        clean_success=problem.goal.reached_clean(logits),
        found=jnp.ones(eps.shape, bool),
        queries=jnp.ones(eps.shape, jnp.int32),
        norm=norm,
        info={},
        minimum_norm=False,
    )


class _PGDCarry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    inputs: Array  # the current iterate
    step: Array  # steps taken since the start
    restart: Array
    done: Array
    first_success: Array
    queries: Array
    losses: Array  # [B, num_restarts, num_steps], or [B, 0, 0] without a trace


class _PGDSettings(NamedTuple):
    """What stays the same over the steps; the counts are static."""

    eps: Array
    step_size: Array
    norm: str
    num_steps: int
    num_restarts: int
    random_start: bool


def _pgd_start(problem: Problem, settings: _PGDSettings, restart: Array) -> Array:
    """The starting point of each example's restart `[B]`."""
    inputs = problem.inputs
    if not settings.random_start:
        return inputs
    base_keys = _base.need_key(problem, "random starts")
    keys = jax.vmap(jax.random.fold_in)(base_keys, restart)
    noise = norms.random_start(keys, inputs, settings.eps, settings.norm)
    return jnp.clip(inputs + noise, *problem.bounds)


def _pgd_init(
    problem: Problem,
    settings: _PGDSettings,
    init: Array | None,
    clean_success: Array,
    trace: bool,
) -> _PGDCarry:
    zeros = jnp.zeros(settings.eps.shape, jnp.int32)
    if init is None:
        start = _pgd_start(problem, settings, zeros)
    else:
        start = norms.into_ball_and_box(
            init, problem.inputs, settings.eps, settings.norm, problem.bounds
        )
    shape = (settings.num_restarts, settings.num_steps) if trace else (0, 0)
    return _PGDCarry(
        inputs=start,
        step=zeros,
        restart=zeros,
        done=clean_success,
        first_success=jnp.where(clean_success, 0, -1),
        queries=zeros + 1,  # the clean forward pass
        losses=jnp.full(zeros.shape + shape, jnp.nan, problem.inputs.dtype),
    )


def _pgd_step(
    problem: Problem, settings: _PGDSettings, loss: Callable[..., Array], carry: _PGDCarry
) -> _PGDCarry:
    """One forward and backward pass: judge the current iterate, then move those that resist."""
    active = ~carry.done
    gradient, logits, gain = _gain_gradient(problem, problem.goal, loss, carry.inputs)
    success = active & problem.goal.reached(logits)
    # A start whose steps are used up was judged just now; its example takes the next start.
    spent = active & ~success & (carry.step == settings.num_steps)
    moving = active & ~success & ~spent

    step = norms.per_example(settings.step_size, gradient) * norms.steepest(gradient, settings.norm)
    moved = norms.into_ball_and_box(
        carry.inputs + step, problem.inputs, settings.eps, settings.norm, problem.bounds
    )
    inputs = jnp.where(norms.per_example(moving, moved) > 0, moved, carry.inputs)
    restart = carry.restart + spent
    if settings.num_restarts > 1:
        fresh = _pgd_start(problem, settings, restart)
        inputs = jnp.where(norms.per_example(spent, moved) > 0, fresh, inputs)
    steps = jnp.where(spent, 0, carry.step + moving)
    # The last iterate of the last start is judged by the verification that follows the loop.
    last = moving & (steps == settings.num_steps) & (restart == settings.num_restarts - 1)
    return _PGDCarry(
        inputs=inputs,
        step=steps,
        restart=restart,
        done=carry.done | success | last,
        first_success=jnp.where(success, carry.step, carry.first_success),
        queries=carry.queries + active,
        # An example that stopped keeps its entries: it writes past the end, where nothing is.
        losses=carry.losses.at[
            jnp.arange(gain.shape[0]),
            carry.restart,
            jnp.where(active, carry.step, settings.num_steps),
        ].set(gain, mode="drop")
        if carry.losses.size
        else carry.losses,
    )


@functools.partial(
    jax.jit, static_argnames=("norm", "num_steps", "num_restarts", "random_start", "trace")
)
def _pgd(
    problem: Problem,
    loss: Callable[..., Array],
    eps: Array,
    step_size: Array,
    init: Array | None,
    *,
    norm: str,
    num_steps: int,
    num_restarts: int,
    random_start: bool,
    trace: bool,
) -> AttackResult:
    settings = _PGDSettings(eps, step_size, norm, num_steps, num_restarts, random_start)
    clean_success = problem.goal.reached_clean(problem.logits_fn(problem.inputs))
    carry = jax.lax.while_loop(
        lambda carry: jnp.any(~carry.done),
        functools.partial(_pgd_step, problem, settings, loss),
        _pgd_init(problem, settings, init, clean_success, trace),
    )
    info = {"restart": carry.restart}
    if trace:
        info["loss"] = carry.losses
    result = _base.finish(
        problem,
        carry.inputs,
        clean_success=clean_success,
        found=jnp.ones(eps.shape, bool),
        queries=carry.queries,
        norm=norm,
        info=info,
        minimum_norm=False,
    )
    first = jnp.where(result.success & (carry.first_success < 0), num_steps, carry.first_success)
    return result._replace(info=info | {"first_success": first.astype(jnp.int32)})
