"""Carlini and Wagner's L0 attack."""

import functools
import math

import jax
import jax.numpy as jnp

from jdistill import _validate
from jdistill._precision import full_precision
from jdistill.attacks._core import carlini_wagner_rounds as _rounds
from jdistill.attacks._core import constant_search as _search
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.typing import Array, ArrayLike, LogitsFn

# Of n changed pixels at most 0.3 √n are given up at once, each of at most this share of the effect.
_AT_ONCE = 0.3
_SMALL_SHARE = 0.01


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
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
) -> AttackResult:
    """Fewest changed pixels, by giving up those that an L2 attack has least use for.

    All pixels may change at first. A round minimizes, in the variable `w` with
    `x' = mid + half · tanh(w)` and over the pixels that may change,

        ‖x' - x‖² + c · max(0, z_y - max_{i≠y} z_i + κ)

    until `x'` is adversarial. Then those pixels are fixed at the input's for good whose effect
    `Σ_channels |∂(z_y - max_{i≠y} z_i)/∂x' · (x' - x)|` is least: always one, and up to 0.3 √n of
    the n changed ones where each has at most a hundredth of the effect of all. The next round
    begins at what is left of `x'`. After `num_steps` without success the round goes on with
    `c · const_factor`; the example ends when `c` is above `largest_const`.

    A pixel is a spatial position with all its channels where the inputs are images
    `[B, H, W, C]`, and a single entry for inputs of any other rank.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        confidence: κ in logit units, at least 0: by how much the goal must be passed.
        num_steps: Adam steps for each round and `c`, at least 1; static.
        learning_rate: of Adam, in units of `w`, above 0. An input on the box's face starts at
            `|w| = 7.25` and moves at most `learning_rate` a step, so runs of few steps on
            images with black backgrounds need a larger one than the paper's 0.01.
        initial_const: the first `c`, above 0; a scalar or `[B]`.
        largest_const: the last `c` at most, above 0.
        const_factor: of `c` after a failure, in `[1.01, 1e6]`. The last round of every example
            fails and runs through all that are left, so a larger factor saves most of the time.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; None takes any class but the label.

    Returns:
        The result. Where nothing was found: the clean input, `success=False`, `distance=inf`.
        `distance` is the number of pixels that differ from the clean input at all. `info`:
        `rounds [B]` int32, those that succeeded; `const [B]`, the last `c`; `first_success [B]`
        int32, the step over all rounds at which the first adversarial was seen, -1 if never.

    Raises:
        ValueError: confidence below 0, learning_rate or a constant not above 0, const_factor
            outside its range, num_steps below 1, inputs not finite or outside the box, labels or
            targets outside `0..K-1`.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[2.0, -2.0], [1.0, -1.0]]) - jnp.array([[1.2, 0]])
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> result = carlini_wagner_l0(logits_fn, None, x, y, num_steps=300, const_factor=10.0)
        >>> (result.inputs != x).tolist(), result.distance.tolist()
        ([[True, False]], [1.0])

    References:
        Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", section
        VI.B. The differences: the margin's gradient is that of the logits, where the loss itself
        is flat once it is adversarial; as in the released code several pixels are fixed at once,
        but by their share of the effect and not by an effect below 0.01, which depends on the
        scale of the logits, and the effect is of each channel, so that channels do not cancel;
        every example has its own pixels, `c` and Adam state; the adversarial of the fewest pixels
        of all steps is returned; an example whose gradient is zero at a round's start ends there.
    """
    del key
    _validate.rank(
        0,
        confidence=confidence,
        learning_rate=learning_rate,
        largest_const=largest_const,
        const_factor=const_factor,
    )
    _validate.non_negative(confidence=confidence)
    _validate.positive(
        learning_rate=learning_rate, initial_const=initial_const, largest_const=largest_const
    )
    _validate.within(_rounds.LEAST_FACTOR, 1e6, const_factor=const_factor)
    _validate.count(num_steps=num_steps)
    problem = _base.prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    as_float = functools.partial(jnp.asarray, dtype=problem.inputs.dtype)
    with full_precision():
        return _carlini_wagner_l0(
            problem,
            as_float(confidence),
            as_float(learning_rate),
            _base.one_per_example(initial_const, problem.inputs, name="initial_const"),
            as_float(largest_const),
            as_float(const_factor),
            num_steps=num_steps,
        )


def _by_pixel(value: Array) -> Array:
    """`[B, pixels, channels]`; a feature is a pixel of one channel."""
    channels = value.shape[-1] if value.ndim == 4 else 1
    pixels = math.prod(value.shape[1:]) // channels
    return value.reshape(value.shape[0], pixels, channels)


def _changed(delta: Array) -> Array:
    """Which pixels differ at all, `[B, pixels]`."""
    return jnp.any(_by_pixel(delta) != 0, axis=2)


def _distance(delta: Array) -> Array:
    return jnp.sum(_changed(delta), axis=1).astype(delta.dtype)


def _point(problem: Problem, w: Array, free: Array) -> Array:
    """The inputs that `w` stands for where the pixels are free, the clean ones elsewhere."""
    moved = _by_pixel(_search.to_box(w, problem.bounds))
    clean = _by_pixel(problem.inputs)
    return jnp.where(free[:, :, None], moved, clean).reshape(w.shape)


def _tighten(problem: Problem, delta: Array, gradient: Array, free: Array) -> tuple[Array, Array]:
    """The pixels still free after those of least effect were fixed, and whether none is left."""
    effect = jnp.sum(jnp.abs(_by_pixel(gradient * delta)), axis=2)
    changed = _changed(delta) & free
    total = jnp.sum(jnp.where(changed, effect, 0.0), axis=1, keepdims=True)
    rank = jnp.argsort(jnp.argsort(jnp.where(changed, effect, jnp.inf), axis=1), axis=1)
    at_once = jnp.floor(_AT_ONCE * jnp.sqrt(jnp.sum(changed, axis=1, keepdims=True)))
    little = (rank < at_once) & (effect <= _SMALL_SHARE * total)
    free = changed & ~little & (rank > 0)
    return free, ~jnp.any(free, axis=1)


@functools.partial(jax.jit, static_argnames="num_steps")
def _carlini_wagner_l0(
    problem: Problem,
    confidence: Array,
    learning_rate: Array,
    initial_const: Array,
    largest_const: Array,
    const_factor: Array,
    *,
    num_steps: int,
) -> AttackResult:
    rules = _rounds.Rules(
        point=_point,
        penalty=lambda delta, free: jnp.sum(jnp.square(_by_pixel(delta)), axis=(1, 2)),
        fits=lambda delta, free: jnp.ones(delta.shape[:1], bool),
        distance=_distance,
        tighten=_tighten,
    )
    result = _rounds.run(
        problem,
        _rounds.Settings(confidence, learning_rate, largest_const, const_factor, num_steps),
        rules,
        initial_const,
        jnp.ones(_by_pixel(problem.inputs).shape[:2], bool),
        norm="l0",
    )
    pixels = _distance(result.inputs - problem.inputs)
    return result._replace(distance=jnp.where(result.success, pixels, jnp.inf))
