"""Decoupled direction and norm, a minimum-norm attack on a sphere of changing radius."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, losses, norms
from jdistill._precision import full_precision
from jdistill._pytree import as_pytree
from jdistill.attacks import _base, _search
from jdistill.attacks._base import AttackResult, Problem
from jdistill.attacks._gradient import _gain_gradient
from jdistill.typing import Array, ArrayLike, LogitsFn

# The step size ends at this share of where it begins.
_LAST_STEP = 0.01


def ddn(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    num_steps: int = 1000,
    gamma: ArrayLike = 0.05,
    initial_norm: ArrayLike = 1.0,
    step_size: ArrayLike = 1.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.soft_margin,
    trace: bool = False,
) -> AttackResult:
    """Smallest L2 perturbation by steps on a sphere whose radius follows success and failure.

    From `δ = 0` and the radius `ε = initial_norm`, each step turns `δ` along the loss's gradient
    and then sets its length apart from its direction, shorter after a success and longer after a
    failure:

        δ ← δ + α · g / ‖g‖              α from step_size down to step_size / 100, by a cosine
        ε ← ε · (1 - γ) or ε · (1 + γ)   where x + δ was adversarial, or was not
        δ ← clip(x + ε · δ / ‖δ‖) - x

    The closest adversarial of all iterates is returned.

    As published the attack climbs the cross-entropy, whose gradient a distilled network saturates
    to zeros: the direction is then lost and the attack ends far off or fails. The default here is
    the soft margin: the direction is that of a cross-entropy at a temperature of each example's
    own, which no scale of the logits changes. Pass `loss=losses.cross_entropy` for the published
    attack.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        num_steps: gradient steps, at least 1; static. The paper has 100, 300 and 1000.
        gamma: γ, the relative change of the radius a step, in `[0.001, 0.5]`; the distance found
            is at best that exact. Scalar or `[B]`.
        initial_norm: the first radius in input units, above 0; scalar or `[B]`.
        step_size: the first α in input units, above 0; scalar or `[B]`.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized).
        trace: keep the loss of every step.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is the L2 distance. An attacked example costs `num_steps + 2` queries. `info`:
        `first_success [B]` int32, the step at which the first adversarial was seen (0: the clean
        input), -1 if never; with `trace`, `loss [B, num_steps]`, what was maximized after each
        step, NaN for examples that needed no attack.

    Raises:
        ValueError: gamma outside its range, initial_norm or step_size not above 0, num_steps below
            1, inputs not finite or outside the box, labels or targets outside `0..K-1`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.8, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = ddn(logits_fn, None, x, y, num_steps=100)
        >>> bool(result.success[0]), bool(0.28 < result.distance[0] < 0.30)  # exactly: 0.283
        (True, True)

    References:
        Rony et al. 2019, "Decoupling Direction and Norm for Efficient Gradient-Based L2
        Adversarial Attacks and Defenses", algorithm 1. The differences: the default loss; the
        iterates are not rounded to 256 levels (quantization is not applied); `δ` is the clipped
        step that was truly taken, as in figure 1 and the released code; the last iterate counts
        too; a gradient of zero turns `δ` nowhere, where the released code draws a random
        direction; `ε` stops growing where every corner of the box is in reach.
    """
    del key
    _validate.within(1e-3, 0.5, gamma=gamma)
    _validate.positive(initial_norm=initial_norm, step_size=step_size)
    _validate.count(num_steps=num_steps)
    problem = _base.prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    each = functools.partial(_base.one_per_example, inputs=problem.inputs)
    with full_precision():
        return _ddn(
            problem,
            as_pytree(loss),
            each(gamma, name="gamma"),
            each(initial_norm, name="initial_norm"),
            each(step_size, name="step_size"),
            num_steps=num_steps,
            trace=trace,
        )


class _Settings(NamedTuple):
    gamma: Array  # [B]
    step_size: Array  # [B], of the first step
    largest_norm: Array  # [B], enough to be clipped into the farthest corner of the box
    num_steps: int


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    delta: Array
    gradient: Array  # at inputs + delta
    norm: Array  # the radius
    adversarial: Array  # whether inputs + delta is
    best: Array
    best_distance: Array
    first_success: Array


def _init(problem: Problem, gradient: Array, clean_success: Array, initial_norm: Array) -> _Carry:
    inputs = problem.inputs
    return _Carry(
        delta=jnp.zeros_like(inputs),
        gradient=gradient,
        norm=initial_norm,
        adversarial=clean_success,
        best=inputs,
        best_distance=jnp.full(inputs.shape[:1], jnp.inf, inputs.dtype),
        first_success=jnp.where(clean_success, 0, -1),
    )


def _step(
    problem: Problem, settings: _Settings, loss: Callable[..., Array], carry: _Carry, step: Array
) -> tuple[_Carry, Array]:
    """Turn, set the length, and judge the new iterate; also gives its gain `[B]`."""
    inputs = problem.inputs
    share = (1 + jnp.cos(jnp.pi * step / settings.num_steps)) / 2
    alpha = settings.step_size * (_LAST_STEP + (1 - _LAST_STEP) * share)
    turned = carry.delta + norms.per_example(alpha, inputs) * norms.steepest(carry.gradient, "l2")

    factor = jnp.where(carry.adversarial, 1 - settings.gamma, 1 + settings.gamma)
    norm = jnp.minimum(carry.norm * factor, settings.largest_norm)
    # `steepest` is the unit vector, or zeros where the direction is.
    unit = norms.steepest(turned, "l2")
    candidate = jnp.clip(inputs + norms.per_example(norm, inputs) * unit, *problem.bounds)
    delta = candidate - inputs

    gradient, logits, gain = _gain_gradient(problem, problem.goal, loss, candidate)
    adversarial = problem.goal.reached(logits)
    distance = norms.distance(delta, "l2")
    better = adversarial & (distance < carry.best_distance)
    return _Carry(
        delta=delta,
        gradient=gradient,
        norm=norm,
        adversarial=adversarial,
        best=_search.select(better, candidate, carry.best),
        best_distance=jnp.where(better, distance, carry.best_distance),
        first_success=jnp.where(
            adversarial & (carry.first_success < 0), step + 1, carry.first_success
        ),
    ), gain


@functools.partial(jax.jit, static_argnames=("num_steps", "trace"))
def _ddn(
    problem: Problem,
    loss: Callable[..., Array],
    gamma: Array,
    initial_norm: Array,
    step_size: Array,
    *,
    num_steps: int,
    trace: bool,
) -> AttackResult:
    inputs = problem.inputs
    low, high = problem.bounds
    farthest = norms.distance(jnp.maximum(inputs - low, high - inputs), "l2")
    settings = _Settings(
        gamma=gamma,
        step_size=step_size,
        largest_norm=farthest + step_size,
        num_steps=num_steps,
    )
    gradient, logits, _ = _gain_gradient(problem, problem.goal, loss, inputs)
    clean_success = problem.goal.reached_clean(logits)

    def body(carry: _Carry, step: Array) -> tuple[_Carry, Array]:
        carry, gain = _step(problem, settings, loss, carry, step)
        return carry, jnp.where(clean_success, jnp.nan, gain) if trace else gain[:0]

    carry, gains = jax.lax.scan(
        body, _init(problem, gradient, clean_success, initial_norm), jnp.arange(num_steps)
    )
    info = {"first_success": carry.first_success.astype(jnp.int32)}
    if trace:
        info["loss"] = jnp.moveaxis(gains, 0, 1)
    return _base.finish(
        problem,
        carry.best,
        clean_success=clean_success,
        found=jnp.isfinite(carry.best_distance),
        queries=jnp.where(clean_success, 1, 1 + num_steps),
        norm="l2",
        info=info,
        minimum_norm=True,
    )
