"""σ-zero: a minimum-norm attack on the number of changed entries, by a smooth l0 norm."""

from typing import Any, NamedTuple

import jax.numpy as jnp

from jdistill import _validate, losses, norms
from jdistill._jax import register, static_field
from jdistill.attacks._core.constant_search import per_example_adam
from jdistill.attacks._core.engine import Method, Passes, Seen, run, select
from jdistill.attacks._core.gradient import gain_gradient
from jdistill.attacks._core.problem import AttackResult, Problem, one_per_example, prepare
from jdistill.attacks._core.traits import facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn

# Step size and threshold step end at this share of where they begin.
_LAST_STEP = 0.1
# Adam's first moment; the usual 0.9 remembers directions from both sides of the boundary.
_MOMENTUM = 0.6


@facts(title="σ-zero", norms=("l0",), minimum_norm=True)
def sigma_zero(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    num_steps: int = 1000,
    step_size: ArrayLike | None = None,
    sigma: ArrayLike = 1e-3,
    threshold: ArrayLike = 0.3,
    threshold_step: ArrayLike = 0.01,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """σ-zero: fewest changed entries, by Adam on a smooth l0 norm and an adaptive threshold.

    With `u = δ / (high - low)` and `h` the margin, `max_{i≠y} z_i - z_y`, each step, the first from
    `δ = 0`, is::

        d ← -∂h/∂x                           where x + δ is not adversarial
            (1 - w) · ∂/∂u Σ u² / (u² + σ)   where it is; w = max(u · ∂h/∂x, 0), its largest entry 1
        δ ← clip(x + δ - α · Adam(d / ‖d‖∞)) - x
        δ ← δ where |u| >= τ, else 0

    The smooth norm pulls small entries to 0, least those that the linearized margin needs most. The
    threshold `τ` rises by `threshold_step` after an adversarial, which makes the next one sparser,
    and falls by as much after a failure. Over the steps `α`, from `step_size` on, and the change of
    `τ` fall to a tenth by a cosine. The adversarial of the fewest changed entries is returned.

    Gradients count by their direction alone, so the scale of the logits changes nothing.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        num_steps: gradient steps, at least 1; static. The paper has 1000; the released code's
            default is 100.
        step_size: the first α in input units, above 0; scalar or `[B]`; may be traced. None takes
            the width of the box, as the paper does: a step can bring an entry from bound to bound.
        sigma: σ, how closely the smooth norm follows l0, above 0; scalar or `[B]`; may be traced.
        threshold: the first τ, as a share of the box's width, in `[0, 1]`; scalar or `[B]`; may be
            traced.
        threshold_step: the first change of τ per step, in `[0, 1]`; scalar or `[B]`; may be traced.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        trace: keep the margin of every iterate.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is the number of changed entries. An attacked example costs `num_steps + 2`
        queries. `info`: `first_success`, `gradients`, and with `trace` the margin of every iterate,
        `trace [B, num_steps]`; see `jdistill.attacks`.

    Raises:
        ValueError: step_size or sigma not above 0, threshold or threshold_step outside `[0, 1]`,
            num_steps below 1, inputs not finite or outside the box, labels or targets outside
            `0..K-1`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[3.0, -3.0], [1.0, -1.0]]) - jnp.array([[2.0, 0]])
        >>> x, y = jnp.array([[0.6, 0.6]]), jnp.array([0])
        >>> result = sigma_zero(logits_fn, None, x, y, num_steps=100)
        >>> (result.inputs != x).tolist(), float(result.distance[0])
        ([[True, False]], 1.0)

    References:
        Cinà, Villani, Pintor, Schönherr, Biggio & Pelillo 2025, "σ-zero: Gradient-based
        Optimization of ℓ0-norm Adversarial Examples", algorithm 1. The differences: there both
        terms are added, the hinge of the margin and the smooth norm over the number of entries,
        which weighs logits against a share, so that their scale decides; here each has the steps
        in which it is needed, as the hinge's gradient is 0 once it is passed. The smooth norm
        spares the entries that the margin needs (without the factor `1 - w` it pulls on all
        alike, and ends with a fifth more of them on the networks of docs/parity.md); Adam's first
        moment decays by 0.6, not 0.9; the smooth norm also leads back from where the logits are
        not finite; the last iterate counts too.
    """
    del key
    _validate.count(num_steps=num_steps)
    _validate.positive(sigma=sigma)
    _validate.within(0.0, 1.0, threshold=threshold, threshold_step=threshold_step)
    if step_size is not None:
        _validate.positive(step_size=step_size)
    problem = prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    step_size = problem.width if step_size is None else step_size
    method = _SigmaZero(
        step_size=one_per_example(step_size, problem.inputs, name="step_size"),
        sigma=one_per_example(sigma, problem.inputs, name="sigma"),
        threshold=one_per_example(threshold, problem.inputs, name="threshold"),
        threshold_step=one_per_example(threshold_step, problem.inputs, name="threshold_step"),
        num_events=num_steps,
    )
    return run(method, problem, trace=trace)


class _State(NamedTuple):
    delta: Array
    gradient: Array  # of the margin at inputs + delta
    beyond: Array  # whether inputs + delta is adversarial, or its logits are not finite
    threshold: Array
    adam: Any


@register
class _SigmaZero(Method):
    step_size: Array  # [B], of the first step
    sigma: Array  # [B]
    threshold: Array  # [B], the first one
    threshold_step: Array  # [B], of the first step
    num_events: int = static_field()
    norm = "l0"
    minimum_norm = True
    keeps_closest = True
    narrows = False
    passes_at_start = Passes(1, 1)

    def init(self, problem: Problem) -> tuple[_State, Array]:
        inputs = problem.inputs
        gradient, logits, _ = gain_gradient(problem, problem.goal, losses.margin, inputs)
        state = _State(
            delta=jnp.zeros_like(inputs),
            gradient=gradient,
            beyond=problem.goal.reached_clean(logits),
            threshold=self.threshold,
            adam=per_example_adam(_MOMENTUM).init(inputs),
        )
        return state, logits

    def step(self, problem: Problem, state: _State, event: Array) -> tuple[_State, Seen]:
        """Move, set small entries to 0, and judge the new iterate."""
        inputs, (low, high) = problem.inputs, problem.bounds
        share = (1 + jnp.cos(jnp.pi * event / self.num_events)) / 2
        share = _LAST_STEP + (1 - _LAST_STEP) * share

        gradient = norms.normalize(state.gradient, "linf")
        relative, sigma = state.delta / (high - low), norms.per_example(self.sigma, inputs)
        pull = 2 * relative * sigma / jnp.square(jnp.square(relative) + sigma)
        worth = norms.normalize(jnp.maximum(gradient * relative, 0.0), "linf")
        down = select(state.beyond, pull * (1 - worth), -gradient)
        update, adam = per_example_adam(_MOMENTUM).update(norms.normalize(down, "linf"), state.adam)
        moved = state.delta - norms.per_example(self.step_size * share, update) * update
        moved = jnp.clip(inputs + moved, low, high) - inputs

        change = jnp.where(state.beyond, share, -share) * self.threshold_step
        threshold = jnp.clip(state.threshold + change, 0.0, 1.0)
        kept = jnp.abs(moved) >= norms.per_example(threshold, moved) * (high - low)
        point = jnp.where(kept & (moved != 0), jnp.clip(inputs + moved, low, high), inputs)

        gradient, logits, gain = gain_gradient(problem, problem.goal, losses.margin, point)
        adversarial = problem.goal.reached(logits)
        delta = point - inputs
        # The first steps change most entries; where a network overflows there, no gradient leads
        # back.
        beyond = adversarial | ~jnp.isfinite(gain)
        new = _State(delta, gradient, beyond, threshold, adam)
        return new, Seen(adversarial, gain, point=point, distance=norms.distance(delta, "l0"))
