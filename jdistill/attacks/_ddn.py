"""Decoupled direction and norm, a minimum-norm attack on a sphere of changing radius."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from jdistill import _validate, norms
from jdistill._jax import as_pytree, register, static_field
from jdistill.attacks._core.engine import Method, Passes, Seen, run
from jdistill.attacks._core.gradient import hardening_gradient
from jdistill.attacks._core.problem import AttackResult, Problem, one_per_example, prepare
from jdistill.attacks._core.traits import by_loss, facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn

# The step size ends at this share of where it begins.
_LAST_STEP = 0.01


@facts(title="DDN", norms=("l2",), minimum_norm=True, follows=by_loss)
def ddn(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    num_steps: int = 1000,
    gamma: ArrayLike = 0.05,
    initial_norm: ArrayLike | None = None,
    step_size: ArrayLike | None = None,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    loss: Callable[..., Array] | None = None,
    trace: bool = False,
) -> AttackResult:
    """Smallest L2 perturbation by steps on a sphere whose radius follows success and failure.

    From `δ = 0` and the radius `ε = initial_norm`, each step turns `δ` along the loss's gradient
    and then sets its length apart from its direction, shorter after a success and longer after a
    failure::

        δ ← δ + α · g / ‖g‖              α from step_size down to step_size / 100, by a cosine
        ε ← ε · (1 - γ) or ε · (1 + γ)   where x + δ was adversarial, or was not
        δ ← clip(x + ε · δ / ‖δ‖) - x

    The closest adversarial of all iterates is returned.

    As published the attack climbs the cross-entropy, whose gradient a distilled network saturates
    to zeros: the direction is then lost and the attack ends far off or fails. The default here is
    the soft margin, whose direction is that of a cross-entropy at a temperature of each example's
    own, which no scale of the logits changes; its softness falls over the steps from 1 to a
    hundredth, so that the last directions are the margin's, also with many classes. Pass
    `loss=losses.cross_entropy` for the published attack.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        num_steps: gradient steps, at least 1; static. The paper has 100, 300 and 1000.
        gamma: γ, the relative change of the radius a step, in `[0.001, 0.5]`; the distance found
            is at best that exact. Scalar or `[B]`.
        initial_norm: the first radius in input units, above 0; scalar or `[B]`. None takes the
            width of the box, as the paper does.
        step_size: the first α in input units, above 0; scalar or `[B]`. None takes the width of the
            box.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized). None takes `losses.soft_margin` with a falling softness.
        trace: keep the loss of every iterate, the margin where none is given.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is the L2 distance. An attacked example costs `num_steps + 2` queries. `info`:
        `first_success`, `gradients`, and with `trace` the loss of every iterate,
        `trace [B, num_steps]`; see `jdistill.attacks`.

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
    if initial_norm is None:
        initial_norm = _validate.box_width(bounds, initial_norm=None)
    step_size = _validate.box_width(bounds, step_size=None) if step_size is None else step_size
    _validate.positive(initial_norm=initial_norm, step_size=step_size)
    _validate.count(num_steps=num_steps)
    problem = prepare(
        logits_fn, None, inputs, labels, targets=targets, bounds=bounds, open_box=True
    )
    method = _DDN(
        loss=loss if loss is None else as_pytree(loss),
        gamma=one_per_example(gamma, problem.inputs, name="gamma"),
        initial_norm=one_per_example(initial_norm, problem.inputs, name="initial_norm"),
        step_size=one_per_example(step_size, problem.inputs, name="step_size"),
        num_events=num_steps,
    )
    return run(method, problem, trace=trace)


class _State(NamedTuple):
    delta: Array
    gradient: Array  # at inputs + delta
    adversarial: Array  # whether inputs + delta is
    radius: Array


@register
class _DDN(Method):
    loss: Any
    gamma: Array  # [B]
    initial_norm: Array  # [B]
    step_size: Array  # [B], of the first step
    num_events: int = static_field()
    norm = "l2"
    minimum_norm = True
    keeps_closest = True
    narrows = False
    passes_at_start = Passes(1, 1)

    def init(self, problem: Problem) -> tuple[_State, Array]:
        gradient, logits, _ = hardening_gradient(problem, self.loss, problem.inputs, 1.0)
        adversarial = problem.goal.reached_clean(logits)
        return _State(jnp.zeros_like(gradient), gradient, adversarial, self.initial_norm), logits

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """Turn, set the length, and judge the new iterate."""
        inputs, (low, high) = problem.inputs, problem.bounds
        share = (1 + jnp.cos(jnp.pi * event / self.num_events)) / 2
        alpha = self.step_size * (_LAST_STEP + (1 - _LAST_STEP) * share)
        turned = state.delta + norms.per_example(alpha, inputs) * norms.steepest(
            state.gradient, "l2"
        )
        # Enough to be clipped into the farthest corner of the box.
        corner = jnp.maximum(inputs - low, high - inputs)
        largest = norms.distance(corner, "l2") + self.step_size
        largest = jnp.where(jnp.isfinite(problem.widest), largest, jnp.inf)
        factor = jnp.where(state.adversarial, 1 - self.gamma, 1 + self.gamma)
        radius = jnp.minimum(state.radius * factor, largest)
        # `steepest` is the unit vector, or zeros where the direction is.
        unit = norms.steepest(turned, "l2")
        point = jnp.clip(inputs + norms.per_example(radius, inputs) * unit, low, high)

        gradient, logits, gain = hardening_gradient(problem, self.loss, point, share)
        adversarial = problem.goal.reached(logits)
        delta = point - inputs
        distance = norms.distance(delta, "l2")
        new = _State(delta, gradient, adversarial, radius)
        return new, Seen(adversarial, gain, point=point, distance=distance)
