"""FMN: minimum-norm attacks by projected gradient steps in a ball of changing radius."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._jax import as_pytree, register, static_field
from jdistill.attacks._core import hyperplane
from jdistill.attacks._core.engine import Method, Passes, Seen, run
from jdistill.attacks._core.gradient import hardening_gradient
from jdistill.attacks._core.problem import AttackResult, Problem, one_per_example, prepare
from jdistill.attacks._core.traits import by_loss, facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn, Norm

_NORMS: tuple[Norm, ...] = ("linf", "l2", "l1", "l0")
# The step size ends at this share of where it begins.
_LAST_STEP = 0.01
# For l0 a step should bring a feature to its bound: half-way it would look worth half as much.
_STEP_SIZES = {"linf": 1.0, "l2": 1.0, "l1": 1.0, "l0": 10.0}


@facts(title="FMN", norms=_NORMS, minimum_norm=True, follows=by_loss)
def fmn(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    norm: Norm = "linf",
    num_steps: int = 1000,
    step_size: ArrayLike | None = None,
    gamma: ArrayLike = 0.05,
    final_gamma: ArrayLike = 0.001,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    loss: Callable[..., Array] | None = None,
    trace: bool = False,
) -> AttackResult:
    """Smallest perturbation in any of four norms, by steps in a ball that shrinks and grows.

    From `δ = 0`, each step first sets the radius `ε` and then moves `δ` inside the ball::

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
    loss is the margin (`loss=losses.margin`). The default is the soft margin, whose gradient does
    not jump between runners-up, with a softness that falls over the steps from 1 to a hundredth:
    what is left at the end is the margin, whose boundary is the network's own. With many classes
    the soft margin alone stops short of it, by 19% for 1,000 classes of a linear network.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        norm: `"linf"`, `"l2"`, `"l1"` or `"l0"` (the number of changed entries).
        num_steps: gradient steps, at least 1; static.
        step_size: the first α in input units, above 0; scalar or `[B]`. It is a length in l2 for
            every norm. None takes the box's width, as the paper does, and 10 times that for l0.
        gamma: the first γ, the relative change of the radius a step, in `[0, 0.5]`; scalar or
            `[B]`.
        final_gamma: the last γ, in `[0, 0.5]`; scalar or `[B]`. The distance is at best that exact.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized). None takes `losses.soft_margin` with a falling softness. The estimate of the
            boundary wants a loss that is about 0 there, as margins are; with another one, the first
            radii grow by guesses until an adversarial is found.
        trace: keep the loss of every iterate, the margin where none is given.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is to the clean input in `norm`. An attacked example costs `num_steps + 2`
        queries. `info`: `first_success`, `gradients`, and with `trace` the loss of every iterate,
        `trace [B, num_steps]`; see `jdistill.attacks`.

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
    if step_size is None:
        step_size = _STEP_SIZES[norm] * _validate.box_width(bounds, step_size=None)
    _validate.positive(step_size=step_size)
    _validate.within(0.0, 0.5, gamma=gamma, final_gamma=final_gamma)
    problem = prepare(
        logits_fn, None, inputs, labels, targets=targets, bounds=bounds, open_box=True
    )
    method = _FMN(
        loss=loss if loss is None else as_pytree(loss),
        step_size=one_per_example(step_size, problem.inputs, name="step_size"),
        gamma=one_per_example(gamma, problem.inputs, name="gamma"),
        final_gamma=one_per_example(final_gamma, problem.inputs, name="final_gamma"),
        norm=norm,
        num_events=num_steps,
    )
    return run(method, problem, trace=trace)


class _State(NamedTuple):
    delta: Array
    gradient: Array  # at inputs + delta
    gain: Array  # there
    adversarial: Array  # whether inputs + delta is
    radius: Array
    closest: Array  # the distance of the closest adversarial so far


@register
class _FMN(Method):
    loss: Any
    step_size: Array  # [B], of the first step
    gamma: Array  # [B], of the first step
    final_gamma: Array  # [B]
    norm: Norm = static_field()
    num_events: int = static_field()
    minimum_norm = True
    keeps_closest = True
    narrows = False
    passes_at_start = Passes(1, 1)

    def init(self, problem: Problem) -> tuple[_State, Array]:
        inputs = problem.inputs
        gradient, logits, gain = hardening_gradient(problem, self.loss, inputs, 1.0)
        # The logits, and so the gain, may have fewer bits than the inputs.
        radius = jnp.zeros(gain.shape, inputs.dtype)
        adversarial = problem.goal.reached_clean(logits)
        nowhere = jnp.full_like(radius, jnp.inf)
        state = _State(jnp.zeros_like(inputs), gradient, gain, adversarial, radius, nowhere)
        return state, logits

    def _radius(self, state: _State, gamma: Array) -> Array:
        """The radius `[B]` of the next step."""
        radius = state.radius
        if self.norm == "l0":
            # A number of features, which the linearized boundary says little about.
            fewer = jnp.minimum(radius - 1, jnp.floor(radius * (1 - gamma)))
            more = jnp.maximum(radius + 1, jnp.floor(radius * (1 + gamma)))
            smaller = jnp.maximum(jnp.minimum(fewer, state.closest), 1.0)
            return jnp.where(state.adversarial, smaller, more)
        distance = norms.distance(state.delta, self.norm)
        # Where the linearized gain is 0; nowhere if nothing leads there.
        boundary = hyperplane.unit(state.gradient, state.gain)
        estimate = distance + hyperplane.distance(*boundary, self.norm)
        seen = jnp.isfinite(state.closest)
        smaller = jnp.minimum(radius * (1 - gamma), state.closest)
        larger = (1 + gamma) * jnp.where(seen, radius, estimate)
        return jnp.where(state.adversarial, smaller, larger)

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """Set the radius, move inside the ball, and judge the new iterate."""
        inputs = problem.inputs
        share = (1 + jnp.cos(jnp.pi * event / self.num_events)) / 2
        gamma = self.final_gamma + (self.gamma - self.final_gamma) * share
        alpha = self.step_size * (_LAST_STEP + (1 - _LAST_STEP) * share)

        radius = self._radius(state, gamma)
        direction = norms.steepest(state.gradient, "l2")
        move = norms.per_example(alpha, inputs) * direction
        delta = jnp.clip(inputs + state.delta + move, *problem.bounds) - inputs
        projected = _into_ball(delta, direction, radius, self.norm)
        point = jnp.clip(inputs + projected, *problem.bounds)
        delta = point - inputs

        gradient, logits, gain = hardening_gradient(problem, self.loss, point, share)
        adversarial = problem.goal.reached(logits)
        distance = norms.distance(delta, self.norm)
        closest = jnp.where(adversarial, jnp.minimum(distance, state.closest), state.closest)
        new = _State(delta, gradient, gain, adversarial, radius, closest)
        return new, Seen(adversarial, gain, point=point, distance=distance)


def _into_ball(delta: Array, direction: Array, radius: Array, norm: Norm) -> Array:
    """The perturbation inside the ball; for l0 that of the features that are worth most."""
    if norm != "l0":
        return norms.project(delta, radius, norm)
    worth = jnp.maximum(delta * direction, 0.0)
    return jnp.where(norms.project(worth, radius, "l0") > 0, delta, 0.0)
