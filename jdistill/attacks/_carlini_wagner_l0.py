"""Carlini and Wagner's L0 attack."""

import math

import jax.numpy as jnp

from jdistill import _validate
from jdistill._jax import register
from jdistill.attacks._core.carlini_wagner_rounds import LARGEST_FACTOR, LEAST_FACTOR, Rounds, run
from jdistill.attacks._core.constant_search import first_point, to_box
from jdistill.attacks._core.problem import AttackResult, Problem, one_per_example, prepare
from jdistill.attacks._core.traits import facts
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn

# Of n changed pixels at most 0.3 √n are given up at once, each of at most this share of the effect.
_AT_ONCE = 0.3
_SMALL_SHARE = 0.01


@facts(title="C&W L0", norms=("l0",), minimum_norm=True)
def carlini_wagner_l0(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    confidence: ArrayLike = 0.0,
    num_steps: int = 1000,
    learning_rate: ArrayLike = 0.01,
    initial_const: ArrayLike = 1e-3,
    largest_const: ArrayLike = 2e6,
    const_factor: ArrayLike = 2.0,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    trace: bool = False,
) -> AttackResult:
    """Fewest changed pixels, by giving up those that an L2 attack has least use for.

    All pixels may change at first. A round minimizes, in the variable `w` with
    `x' = mid + half · tanh(w)` and over the pixels that may change::

        ‖x' - x‖² + c · max(0, z_y - max_{i≠y} z_i + κ)

    until `x'` is adversarial. Then those pixels are fixed at the input's for good whose effect
    `Σ_channels |∂(z_y - max_{i≠y} z_i)/∂x' · (x' - x)|` is least: always one, and up to 0.3 √n of
    the n changed ones where each has at most a hundredth of the effect of all. The next round
    begins at what is left of `x'`. After `num_steps` without success the round goes on with
    `c · const_factor`; the example ends when `c` is above `largest_const`.

    A pixel is, as in the paper, a spatial position with all its channels where the inputs are
    images `[B, H, W, C]`, and a single entry for inputs of any other rank.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        confidence: κ in logit units, at least 0: by how much the goal must be passed; scalar or
            `[B]`.
        num_steps: Adam steps for each round and `c`, at least 1; static.
        learning_rate: of Adam, in units of `w`, above 0; scalar or `[B]`. An input on the box's
            face starts at `|w| = 7.25` and moves at most `learning_rate` per step, so runs of few
            steps on images with black backgrounds need a larger one than the paper's 0.01.
        initial_const: the first `c`, above 0; scalar or `[B]`.
        largest_const: the last `c` at most, above 0; scalar or `[B]`.
        const_factor: of `c` after a failure, in `[1.01, 1e6]`; scalar or `[B]`. The last round of
            every example fails and runs through all that are left, so a larger factor saves most
            of the time.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.
        init: `[B, ...]`, where the first round starts, moved into the box; None starts at the
            inputs.
        trace: keep the loss of every iterate. The trace is as wide as the longest run possible,
            `num_steps · (pixels + ⌈ln (largest_const / initial_const) / ln const_factor⌉ + 1)`,
            by default 816,000 per MNIST image, which are 3 MB. Settings that change the width are
            compiled anew.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is the number of pixels that differ from the clean input at all. `info`:
        `rounds [B]` int32, those that succeeded; `const [B]`, the last `c`; `first_success`, over
        all rounds; `gradients`; with `trace` the loss of every iterate, `trace [B, width]`, one
        round after the other. See `jdistill.attacks`.

    Raises:
        ValueError: confidence below 0, learning_rate or a constant not above 0, const_factor
            outside its range, num_steps below 1, inputs not finite or outside the box, labels or
            targets outside `0..K-1`, a trace under `jit`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[2.0, -2.0], [1.0, -1.0]]) - jnp.array([[1.2, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = carlini_wagner_l0(logits_fn, None, x, y, num_steps=300, const_factor=10.0)
        >>> (result.inputs != x).tolist(), result.distance.tolist()
        ([[True, False]], [1.0])

    References:
        Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", section
        VI.B. The differences: the margin's gradient is that of the logits, where the loss itself
        is flat once it is adversarial; after a `c` that fails the search goes on from where it is,
        with a fresh Adam, and not from the round's start, which leaves pixels on the box's face
        behind (on 20 MNIST images at 50 steps per `c`: 8.4 pixels against 12.0); as in the
        released code several pixels are fixed at once,
        but by their share of the effect and not by an effect below 0.01, which depends on the
        scale of the logits, and the effect is of each channel, so that channels do not cancel;
        every example has its own pixels, `c` and Adam state; the adversarial of the fewest pixels
        of all steps is returned; an example whose gradient is zero at a round's start ends there.
    """
    del key
    _validate.non_negative(confidence=confidence)
    _validate.positive(
        learning_rate=learning_rate, initial_const=initial_const, largest_const=largest_const
    )
    _validate.within(LEAST_FACTOR, LARGEST_FACTOR, const_factor=const_factor)
    _validate.count(num_steps=num_steps)
    _validate.flag(trace=trace)
    problem = prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    const_factor = one_per_example(const_factor, problem.inputs, name="const_factor")
    method = _CarliniWagnerL0(
        confidence=one_per_example(confidence, problem.inputs, name="confidence"),
        learning_rate=one_per_example(learning_rate, problem.inputs, name="learning_rate"),
        initial_const=one_per_example(initial_const, problem.inputs, name="initial_const"),
        largest_const=one_per_example(largest_const, problem.inputs, name="largest_const"),
        # Traced values cannot be checked, and a factor of 1 would never end.
        const_factor=jnp.maximum(const_factor, LEAST_FACTOR),
        first=first_point(init, problem),
        num_steps=num_steps,
    )
    return run(method, problem, trace=trace)


@register
class _CarliniWagnerL0(Rounds):
    """The limit: the pixels that may change, `[B, pixels]` bool."""

    norm = "l0"

    def distance(self, delta: Array) -> Array:
        return jnp.sum(_changed(delta), axis=1).astype(delta.dtype)

    def first_limit(self, problem: Problem) -> Array:
        return jnp.ones(_by_pixel(problem.inputs).shape[:2], bool)

    def moved(self, problem: Problem, w: Array, limit: Array) -> Array:
        moved = _by_pixel(to_box(w, problem.bounds))
        return jnp.where(limit[:, :, None], moved, _by_pixel(problem.inputs)).reshape(w.shape)

    def penalty(self, delta: Array, limit: Array, width: Array) -> Array:
        return jnp.sum(jnp.square(_by_pixel(delta / width)), axis=(1, 2))

    def tighten(
        self, problem: Problem, delta: Array, gradient: Array, limit: Array
    ) -> tuple[Array, Array]:
        effect = jnp.sum(jnp.abs(_by_pixel(gradient * delta)), axis=2)
        changed = _changed(delta) & limit
        total = jnp.sum(jnp.where(changed, effect, 0.0), axis=1, keepdims=True)
        rank = jnp.argsort(jnp.argsort(jnp.where(changed, effect, jnp.inf), axis=1), axis=1)
        at_once = jnp.floor(_AT_ONCE * jnp.sqrt(jnp.sum(changed, axis=1, keepdims=True)))
        little = (rank < at_once) & (effect <= _SMALL_SHARE * total)
        free = changed & ~little & (rank > 0)
        return free, ~jnp.any(free, axis=1)

    def most_rounds(self) -> int:
        return _by_pixel(self.first).shape[1]


def _by_pixel(value: Array) -> Array:
    """`[B, pixels, channels]`; a feature is a pixel of one channel."""
    channels = value.shape[-1] if value.ndim == 4 else 1
    pixels = math.prod(value.shape[1:]) // channels
    return value.reshape(value.shape[0], pixels, channels)


def _changed(delta: Array) -> Array:
    """Mask of the pixels that differ at all, `[B, pixels]` bool."""
    return jnp.any(_by_pixel(delta) != 0, axis=2)
