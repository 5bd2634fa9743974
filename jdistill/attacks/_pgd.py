"""Projected gradient descent, and the core that its variants share."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, losses, norms
from jdistill._precision import full_precision
from jdistill._pytree import as_pytree
from jdistill.attacks import _base
from jdistill.attacks._base import AttackResult, Problem
from jdistill.attacks._gradient import _NORMS, _gain_gradient
from jdistill.attacks._loop import until_done
from jdistill.typing import Array, ArrayLike, LogitsFn


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

    For l1 the steepest direction within the ball alone changes one feature, and nothing once that
    feature is at its bound. So the step is the steepest one within the box
    (`jdistill.norms.ascend`): features move to their bounds in the order of their gradients until
    `step_size` is used up. This departs from SLIDE (Tramèr & Boneh), which shares each step
    equally among the top percent of the features: it needs no share to be chosen, and on a linear
    function it ends at the optimum while the box is inactive, where equal shares do not.

    Each example stops at its first success; the others go on, through `num_restarts` starts.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys; None is enough where nothing is random.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        num_steps: gradient steps a start, at least 1; static.
        step_size: length of a step in input units, at least 0; scalar or `[B]`; may be traced.
            None takes `2.5 · eps / num_steps`.
        num_restarts: starts, at least 1; static. Only survivors take the next one.
        random_start: start uniformly inside the ball; otherwise at the input.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        init: `[B, ...]`, the first start instead (projected into ball and box).
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized). `jdistill.losses.margin` does not saturate on distilled networks. Bind
            numbers as in `fgsm`.
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
        Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", section
        2.1 and appendix (random starts). For l1: Tramèr & Boneh 2019, "Adversarial training and
        robustness for multiple perturbations" (SLIDE), and Croce & Hein 2021, "Mind the box"
        (steepest direction within the box).
    """
    return iterate(
        logits_fn,
        key,
        inputs,
        labels,
        eps=eps,
        norm=norm,
        num_steps=num_steps,
        step_size=step_size,
        path=2.5,
        decay=None,
        num_restarts=num_restarts,
        random_start=random_start,
        bounds=bounds,
        targets=targets,
        init=init,
        loss=loss,
        trace=trace,
    )


def iterate(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str,
    num_steps: int,
    step_size: ArrayLike | None,
    path: float,
    decay: ArrayLike | None,
    num_restarts: int,
    random_start: bool,
    bounds: tuple[float, float],
    targets: ArrayLike | None,
    init: ArrayLike | None,
    loss: Callable[..., Array],
    trace: bool,
) -> AttackResult:
    """Check the arguments of PGD or a variant of it, and run it.

    Args beyond those of `pgd`:
        path: without a `step_size`, the length of all steps together, in radii.
        decay: of the accumulated gradients, at least 0, scalar or `[B]`; None follows each
            iterate's gradient alone.
    """
    _validate.one_of(_NORMS, norm=norm)
    _validate.count(num_steps=num_steps, num_restarts=num_restarts)
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    eps = _base.radius(eps, problem.inputs)
    if step_size is None:
        step_size = path * eps / num_steps
    step_size = _base.radius(step_size, problem.inputs, name="step_size")
    if decay is not None:
        decay = _base.radius(decay, problem.inputs, name="decay")
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
            as_pytree(loss),
            eps,
            step_size,
            decay,
            init,
            norm=norm,
            num_steps=num_steps,
            num_restarts=num_restarts,
            random_start=random_start,
            trace=trace,
        )


class _PGDCarry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    inputs: Array  # the current iterate
    velocity: Array | None  # the accumulated gradients; None without momentum
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
    decay: Array | None
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
        velocity=None if settings.decay is None else jnp.zeros_like(start),
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

    direction, velocity = gradient, None
    if carry.velocity is not None and settings.decay is not None:
        velocity = norms.per_example(settings.decay, gradient) * carry.velocity
        velocity += norms.normalize(gradient, "l1")
        direction = velocity
    moved = norms.ascend(carry.inputs, direction, settings.step_size, settings.norm, problem.bounds)
    moved = norms.into_ball_and_box(
        moved, problem.inputs, settings.eps, settings.norm, problem.bounds
    )
    inputs = jnp.where(norms.per_example(moving, moved) > 0, moved, carry.inputs)
    restart = carry.restart + spent
    if settings.num_restarts > 1:
        fresh = _pgd_start(problem, settings, restart)
        again = norms.per_example(spent, moved) > 0
        inputs = jnp.where(again, fresh, inputs)
        velocity = None if velocity is None else jnp.where(again, 0.0, velocity)
    steps = jnp.where(spent, 0, carry.step + moving)
    # The last iterate of the last start is judged by the verification that follows the loop.
    last = moving & (steps == settings.num_steps) & (restart == settings.num_restarts - 1)
    return _PGDCarry(
        inputs=inputs,
        velocity=velocity,
        step=steps,
        restart=restart,
        done=carry.done | success | last,
        first_success=jnp.where(success, carry.step, carry.first_success),
        queries=carry.queries + active,
        losses=_base.record(carry.losses, active, gain, carry.restart, carry.step),
    )


@functools.partial(
    jax.jit, static_argnames=("norm", "num_steps", "num_restarts", "random_start", "trace")
)
def _pgd(
    problem: Problem,
    loss: Callable[..., Array],
    eps: Array,
    step_size: Array,
    decay: Array | None,
    init: Array | None,
    *,
    norm: str,
    num_steps: int,
    num_restarts: int,
    random_start: bool,
    trace: bool,
) -> AttackResult:
    settings = _PGDSettings(eps, step_size, decay, norm, num_steps, num_restarts, random_start)
    clean_success = problem.goal.reached_clean(problem.logits_fn(problem.inputs))
    carry = until_done(
        lambda problem, settings, carry: _pgd_step(problem, settings, loss, carry),
        (problem, settings),
        _pgd_init(problem, settings, init, clean_success, trace),
        at_most=num_restarts * num_steps,
        spread=problem.spread,
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
