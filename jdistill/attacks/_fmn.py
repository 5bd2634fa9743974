"""FMN: minimum-norm attacks by projected gradient steps in a ball of changing radius."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, losses, norms
from jdistill._precision import full_precision
from jdistill._pytree import as_pytree
from jdistill.attacks import _base, _hyperplane, _search
from jdistill.attacks._base import AttackResult, Problem
from jdistill.attacks._gradient import _gain_gradient
from jdistill.typing import Array, ArrayLike, LogitsFn

_NORMS = ("linf", "l2", "l1", "l0")
# The step size ends at this share of where it begins.
_LAST_STEP = 0.01
# For l0 a step should bring a feature to its bound: half-way it would look worth half as much.
_STEP_SIZES = {"linf": 1.0, "l2": 1.0, "l1": 1.0, "l0": 10.0}


def fmn(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    norm: str = "linf",
    num_steps: int = 1000,
    step_size: ArrayLike | None = None,
    gamma: ArrayLike = 0.05,
    final_gamma: ArrayLike = 0.001,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.soft_margin,
    trace: bool = False,
) -> AttackResult:
    """Smallest perturbation in any of four norms, by steps in a ball that shrinks and grows.

    From `δ = 0`, each step first sets the radius `ε` and then moves `δ` inside the ball:

        ε ← min(ε (1 - γ), ‖δ*‖)               where x + δ is adversarial; δ* is the best so far
            ε (1 + γ)                          where it is not, but an adversarial was seen
            (1 + γ) (‖δ‖ + |loss| / ‖g‖_q)     where none was: as far as the linearized boundary
        δ ← project(clip(x + δ + α · g / ‖g‖₂) - x, ε)

    `g` is the gradient of the loss at `x + δ` and `q` the dual of the attack's norm. Over the steps
    `γ` falls from `gamma` to `final_gamma` and `α` from `step_size` to a hundredth of it, by a
    cosine.

    For l0 the radius is a number of features: it begins at 1, and changes by `γ` of itself, rounded
    down, but at least by 1. The features kept are those of the largest `g · δ`, what each adds to
    the linearized loss; the others return to the input.

    The closest adversarial of all iterates is returned. Gradients count by their direction, and
    the loss by its ratio to the gradient, so the scale of the logits changes nothing. The paper's
    loss is the margin (`loss=losses.margin`); the default is the margin with a soft maximum, whose
    gradient does not jump between runners-up, and which ends closer.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        norm: `"linf"`, `"l2"`, `"l1"` or `"l0"` (the number of changed entries).
        num_steps: gradient steps, at least 1; static.
        step_size: the first α in input units, above 0; scalar or `[B]`. It is a length in l2 for
            every norm. None takes 1, as the paper does for inputs in `[0, 1]`, and 10 for l0.
        gamma: the first γ, the relative change of the radius a step, in `[0, 0.5]`; scalar or
            `[B]`.
        final_gamma: the last γ, in `[0, 0.5]`; scalar or `[B]`. The distance is at best that exact.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized). The estimate of the boundary wants one that is about 0 there, as margins
            are; with another one, the first radii grow by guesses until an adversarial is found.
        trace: keep the loss of every step.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is to the clean input in `norm`. An attacked example costs `num_steps + 2`
        queries. `info`: `first_success [B]` int32, the step at which the first adversarial was
        seen (0: the clean input), -1 if never; with `trace`, `loss [B, num_steps]`, what was
        maximized after each step, NaN for examples that needed no attack.

    Raises:
        ValueError: an unknown norm, num_steps below 1, step_size not above 0, gamma or final_gamma
            outside their range, inputs not finite or outside the box, labels or targets outside
            `0..K-1`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.8, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = fmn(logits_fn, None, x, y, num_steps=100)
        >>> bool(result.success[0]), bool(0.2 < result.distance[0] < 0.203)  # exactly: 0.2
        (True, True)

    References:
        Pintor, Roli, Brendel & Biggio 2021, "Fast Minimum-norm Adversarial Attacks through
        Adaptive Norm Constraints", algorithm 1 and section 2. The differences: the default loss;
        the estimate is taken times `1 + γ`, because a step to just the boundary of a linear piece
        is no success, and neither would be any later one; `δ` is clipped before it is projected,
        not after, so that what the box takes away uses up no radius (the projection leads towards
        the input, and so stays in the box); l0 keeps the features of the largest `g · δ` and not
        of the largest `|δ|`, which with a box is the room that a feature has and not what it is
        worth; the last iterate counts too; every start is the input itself.
    """
    del key
    _validate.one_of(_NORMS, norm=norm)
    _validate.count(num_steps=num_steps)
    step_size = _STEP_SIZES[norm] if step_size is None else step_size
    _validate.positive(step_size=step_size)
    _validate.within(0.0, 0.5, gamma=gamma, final_gamma=final_gamma)
    problem = _base.prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    each = functools.partial(_base.one_per_example, inputs=problem.inputs)
    with full_precision():
        return _fmn(
            problem,
            as_pytree(loss),
            each(step_size, name="step_size"),
            each(gamma, name="gamma"),
            each(final_gamma, name="final_gamma"),
            norm=norm,
            num_steps=num_steps,
            trace=trace,
        )


class _Settings(NamedTuple):
    step_size: Array  # [B], of the first step
    gamma: Array  # [B], of the first step
    final_gamma: Array  # [B]
    norm: str
    num_steps: int


class _Carry(NamedTuple):
    """The state of each example; every leaf leads with `[B]`."""

    delta: Array
    gradient: Array  # at inputs + delta
    gain: Array  # there
    adversarial: Array  # whether inputs + delta is
    radius: Array
    best: Array
    best_distance: Array
    first_success: Array


def _init(problem: Problem, gradient: Array, gain: Array, clean_success: Array) -> _Carry:
    inputs = problem.inputs
    radius = jnp.zeros(gain.shape, inputs.dtype)  # the logits, and so the gain, may have fewer bits
    return _Carry(
        delta=jnp.zeros_like(inputs),
        gradient=gradient,
        gain=gain,
        adversarial=clean_success,
        radius=radius,
        best=inputs,
        best_distance=jnp.full_like(radius, jnp.inf),
        first_success=jnp.where(clean_success, 0, -1),
    )


def _next_radius(settings: _Settings, carry: _Carry, gamma: Array) -> Array:
    """The radius `[B]` of the next step."""
    radius = carry.radius
    if settings.norm == "l0":
        # A number of features, which the linearized boundary says little about.
        fewer = jnp.minimum(radius - 1, jnp.floor(radius * (1 - gamma)))
        more = jnp.maximum(radius + 1, jnp.floor(radius * (1 + gamma)))
        smaller = jnp.maximum(jnp.minimum(fewer, carry.best_distance), 1.0)
        return jnp.where(carry.adversarial, smaller, more)
    distance = norms.distance(carry.delta, settings.norm)
    # Where the linearized gain is 0; nowhere if nothing leads there.
    hyperplane = _hyperplane.unit(carry.gradient, carry.gain)
    estimate = distance + _hyperplane.distance(*hyperplane, settings.norm)
    seen = jnp.isfinite(carry.best_distance)
    smaller = jnp.minimum(radius * (1 - gamma), carry.best_distance)
    larger = (1 + gamma) * jnp.where(seen, radius, estimate)
    return jnp.where(carry.adversarial, smaller, larger)


def _into_ball(delta: Array, direction: Array, radius: Array, norm: str) -> Array:
    """The perturbation inside the ball; for l0 that of the features that are worth most."""
    if norm != "l0":
        return norms.project(delta, radius, norm)
    worth = jnp.maximum(delta * direction, 0.0)
    return jnp.where(norms.project(worth, radius, "l0") > 0, delta, 0.0)


def _step(
    problem: Problem, settings: _Settings, loss: Callable[..., Array], carry: _Carry, step: Array
) -> _Carry:
    """Set the radius, move inside the ball, and judge the new iterate."""
    inputs = problem.inputs
    share = (1 + jnp.cos(jnp.pi * step / settings.num_steps)) / 2
    gamma = settings.final_gamma + (settings.gamma - settings.final_gamma) * share
    alpha = settings.step_size * (_LAST_STEP + (1 - _LAST_STEP) * share)

    radius = _next_radius(settings, carry, gamma)
    direction = norms.steepest(carry.gradient, "l2")
    move = norms.per_example(alpha, inputs) * direction
    delta = jnp.clip(inputs + carry.delta + move, *problem.bounds) - inputs
    projected = _into_ball(delta, direction, radius, settings.norm)
    candidate = jnp.clip(inputs + projected, *problem.bounds)
    delta = candidate - inputs

    gradient, logits, gain = _gain_gradient(problem, problem.goal, loss, candidate)
    adversarial = problem.goal.reached(logits)
    distance = norms.distance(delta, settings.norm)
    better = adversarial & (distance < carry.best_distance)
    return _Carry(
        delta=delta,
        gradient=gradient,
        gain=gain,
        adversarial=adversarial,
        radius=radius,
        best=_search.select(better, candidate, carry.best),
        best_distance=jnp.where(better, distance, carry.best_distance),
        first_success=jnp.where(
            adversarial & (carry.first_success < 0), step + 1, carry.first_success
        ),
    )


@functools.partial(jax.jit, static_argnames=("norm", "num_steps", "trace"))
def _fmn(
    problem: Problem,
    loss: Callable[..., Array],
    step_size: Array,
    gamma: Array,
    final_gamma: Array,
    *,
    norm: str,
    num_steps: int,
    trace: bool,
) -> AttackResult:
    settings = _Settings(step_size, gamma, final_gamma, norm, num_steps)
    gradient, logits, gain = _gain_gradient(problem, problem.goal, loss, problem.inputs)
    clean_success = problem.goal.reached_clean(logits)

    def body(carry: _Carry, step: Array) -> tuple[_Carry, Array]:
        carry = _step(problem, settings, loss, carry, step)
        return carry, jnp.where(clean_success, jnp.nan, carry.gain) if trace else carry.gain[:0]

    carry, gains = jax.lax.scan(
        body, _init(problem, gradient, gain, clean_success), jnp.arange(num_steps)
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
        norm=norm,
        info=info,
        minimum_norm=True,
    )
