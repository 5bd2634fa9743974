"""Carlini and Wagner's Linf attack."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jdistill import _validate, norms
from jdistill._jax import register
from jdistill.attacks._core.carlini_wagner_rounds import LARGEST_FACTOR, LEAST_FACTOR, Rounds, run
from jdistill.attacks._core.constant_search import first_point
from jdistill.attacks._core.problem import AttackResult, Problem, one_per_example, prepare
from jdistill.attacks._core.traits import facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn

# The search for smaller and smaller changes ends below one step of an 8-bit image.
_SMALLEST = 1 / 256
_LEAST_SHRINK, _LARGEST_SHRINK = 0.01, 0.99


@facts(title="C&W L∞", norms=("linf",), minimum_norm=True)
def carlini_wagner_linf(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    confidence: ArrayLike = 0.0,
    num_steps: int = 1000,
    learning_rate: ArrayLike = 5e-3,
    shrink: ArrayLike = 0.9,
    initial_const: ArrayLike = 1e-5,
    largest_const: ArrayLike = 20.0,
    const_factor: ArrayLike = 2.0,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Smallest Linf perturbation by Adam on a margin and the entries above a falling threshold.

    In the variable `w` with `x' = mid + half · tanh(w)`, which keeps `x'` inside the box, look for
    the minimum of::

        Σ_i max(|x'_i - x_i| - τ, 0) / (high - low) + c · max(0, z_y - max_{i≠y} z_i + κ)

    until `x'` is adversarial with no entry above τ. Then τ becomes `shrink · min(τ, ‖x' - x‖∞)` and
    the next round begins at `x'`. After `num_steps` without success the round goes on with
    `c · const_factor`; the example ends when `c` is above `largest_const`, or when τ is below
    1/256 of the box. The distance found is at best `shrink` exact. `c` starts far too small on
    purpose: Adam's steps are of one size for any `c`, but with one far too large its memory of the
    second term slows the first, and entries hardly come back below τ.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        confidence: κ in logit units, at least 0: by how much the goal must be passed; scalar or
            `[B]`.
        num_steps: Adam steps for each τ and `c`, at least 1; static.
        learning_rate: of Adam, in units of `w`, above 0; scalar or `[B]`. An input on the box's
            face starts at `|w| = 7.25` and moves at most `learning_rate` per step, so runs of few
            steps on images with black backgrounds need a larger one than the paper's 0.005.
        shrink: the factor of τ after a success, in `[0.01, 0.99]`; scalar or `[B]`.
        initial_const: the first `c`, above 0; scalar or `[B]`.
        largest_const: the last `c` at most, above 0; scalar or `[B]`.
        const_factor: of `c` after a failure, in `[1.01, 1e6]`; scalar or `[B]`.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        init: `[B, ...]`, where the first round starts, moved into the box; None starts at the
            inputs.
        trace: keep the loss of every iterate. The trace is as wide as the longest run possible,
            `num_steps · (⌈ln 256 / ln (1 / shrink)⌉ + ⌈ln (largest_const / initial_const) /
            ln const_factor⌉ + 2)`, by default 76,000 per example. Settings that change the width
            are compiled anew.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is the Linf distance to the clean input. `info`: `rounds [B]` int32, the
        thresholds that were met; `const [B]`, the last `c`; `first_success`, over all rounds;
        `gradients`; with `trace` the loss of every iterate, `trace [B, width]`, one round after
        the other. See `jdistill.attacks`.

    Raises:
        ValueError: confidence below 0, learning_rate or a constant not above 0, shrink or
            const_factor outside its range, num_steps below 1, inputs not finite or outside the
            box, labels or targets outside `0..K-1`, a trace under `jit`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.8, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = carlini_wagner_linf(
        ...     logits_fn, None, x, y, num_steps=100, learning_rate=0.02, initial_const=0.1)
        >>> bool(result.success[0]), bool(0.2 < result.distance[0] < 0.22)  # exactly: 0.2
        (True, True)

    References:
        Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", section
        VI.C. The differences from the released code: every example has its own τ, `c` and Adam
        state; after a `c` that fails the search goes on from where it is, with a fresh Adam, and
        not from the round's start, which leaves inputs on the box's face behind; a round ends
        where `x'` is adversarial within τ itself, not where the loss is below `0.0001 · c`, which
        depends on the scale of the logits; the closest adversarial of all steps is returned, not
        the last round's; an example whose gradient is zero at its start ends there.
    """
    del key
    _validate.non_negative(confidence=confidence)
    _validate.positive(
        learning_rate=learning_rate, initial_const=initial_const, largest_const=largest_const
    )
    _validate.within(_LEAST_SHRINK, _LARGEST_SHRINK, shrink=shrink)
    _validate.within(LEAST_FACTOR, LARGEST_FACTOR, const_factor=const_factor)
    _validate.count(num_steps=num_steps)
    _validate.flag(trace=trace)
    problem = prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    shrink = one_per_example(shrink, problem.inputs, name="shrink")
    const_factor = one_per_example(const_factor, problem.inputs, name="const_factor")
    method = _CarliniWagnerLinf(
        confidence=one_per_example(confidence, problem.inputs, name="confidence"),
        learning_rate=one_per_example(learning_rate, problem.inputs, name="learning_rate"),
        # Traced values cannot be checked, and a factor of 1 would never end.
        shrink=jnp.minimum(shrink, _LARGEST_SHRINK),
        const_factor=jnp.maximum(const_factor, LEAST_FACTOR),
        initial_const=one_per_example(initial_const, problem.inputs, name="initial_const"),
        largest_const=one_per_example(largest_const, problem.inputs, name="largest_const"),
        first=first_point(init, problem),
        num_steps=num_steps,
    )
    return run(method, problem, trace=trace)


@register
class _CarliniWagnerLinf(Rounds):
    shrink: Array  # [B]
    norm = "linf"

    def first_limit(self, problem: Problem) -> Array:
        return jnp.full_like(self.shrink, problem.widest)

    def penalty(self, delta: Array, limit: Array, width: Array) -> Array:
        over = jnp.maximum(jnp.abs(delta) - norms.per_example(limit, delta), 0.0) / width
        return jnp.sum(over, axis=tuple(range(1, delta.ndim)))

    def fits(self, delta: Array, limit: Array) -> Array:
        return self.distance(delta) <= limit

    def tighten(
        self, problem: Problem, delta: Array, gradient: Array, limit: Array
    ) -> tuple[Array, Array]:
        threshold = self.shrink * jnp.minimum(limit, self.distance(delta))
        return threshold, threshold < _SMALLEST * problem.width

    def most_rounds(self) -> Any:
        return np.ceil(np.log(_SMALLEST) / np.log(self.shrink)) + 1
