"""Losses of labels and soft labels, and the margins that attacks maximize."""

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate
from jdistill.typing import AnyArray, Array, ArrayLike


def cross_entropy(logits: AnyArray, labels: ArrayLike, *, temperature: ArrayLike = 1.0) -> Array:
    """Cross-entropy of hard labels at a temperature, `-log softmax(z / T)_y`.

    Args:
        logits: `[B, K]` float.
        labels: `[B]` int in `0..K-1`.
        temperature: above 0; scalar or broadcastable to `[B, 1]`.

    Returns:
        `[B]` float, at least 0.

    Raises:
        ValueError: a temperature that is not above 0, labels outside `0..K-1`.

    Example:
        >>> float(cross_entropy(jnp.array([[0.0, 0.0]]), jnp.array([1]))[0])  # log 2
        0.693...
    """
    log_probs = tempered_log_softmax(logits, temperature)
    return -_pick(log_probs, labels)


def soft_cross_entropy(
    logits: AnyArray, targets: AnyArray, *, temperature: ArrayLike = 1.0
) -> Array:
    """Cross-entropy of soft labels, `-sum_k q_k log softmax(z / T)_k`: a sum over classes.

    Equal to `kl_divergence` plus the entropy of the targets, so the gradients are the same.

    Args:
        logits: `[B, K]` float.
        targets: `[B, K]` float, rows that sum to 1. An exact 0 adds nothing, even where the
            student's log-probability is `-inf`.
        temperature: above 0; scalar or broadcastable to `[B, 1]`.

    Returns:
        `[B]` float.

    Raises:
        ValueError: a temperature that is not above 0, targets of another shape or no probabilities.

    Example:
        >>> half = jnp.array([[0.5, 0.5]])
        >>> float(soft_cross_entropy(jnp.zeros((1, 2)), half, temperature=20.0)[0])
        0.693...

    References:
        Papernot et al. 2016, "Distillation as a Defense", section IV; Hinton et al. 2015.
    """
    log_probs = tempered_log_softmax(logits, temperature)
    _validate.soft_labels(targets, log_probs.shape, allow_nan=True)
    # 0 · -inf would be NaN; a target that is NaN itself must stay one.
    return -jnp.sum(jnp.where(targets == 0, 0.0, targets * log_probs), axis=-1)


def margin(logits: AnyArray, labels: ArrayLike) -> Array:
    """Margin of the best other class over the given one, `max_{i≠y} z_i - z_y`.

    Positive where the example is misclassified. It grows with the scale of the logits but its
    gradient never saturates, which is why distillation at a high temperature cannot hide it.

    Args:
        logits: `[B, K]` float, `K >= 2`.
        labels: `[B]` int in `0..K-1`.

    Returns:
        `[B]` float.

    Raises:
        ValueError: labels outside `0..K-1`.

    Example:
        >>> margin(jnp.array([[3.0, 1.0, 0.0]]), jnp.array([0])).tolist()
        [-2.0]

    References:
        Carlini & Wagner 2017, section IV.A, f6.
    """
    return largest_other(logits, labels) - _pick(logits, labels)


def soft_margin(logits: AnyArray, labels: ArrayLike, softness: ArrayLike = 1.0) -> Array:
    """The margin with a soft maximum, `τ · log sum_{i≠y} exp(z_i / τ) - z_y`.

    The temperature is the example's own, set by the spread of its logits, and no gradient passes
    through it::

        τ = softness · (max z - mean z) / (4 + log(K - 1))

    So the gradient is that of a cross-entropy at T = τ but for its length: it weighs all classes
    that are near, where the margin's jumps from one runner-up to another; and like the margin's it
    does not saturate, whatever the logits are multiplied by. With two classes it is the margin;
    with more it is above it, by at most `τ · log(K - 1)`, and closer the smaller the softness is.

    Args:
        logits: `[B, K]` float, `K >= 2`.
        labels: `[B]` int in `0..K-1`.
        softness: above 0; scalar or `[B]`; may be traced.

    Returns:
        `[B]` float, in units of the logits.

    Raises:
        ValueError: labels outside `0..K-1`, a softness that is not above 0.

    Example:
        >>> z, y = jnp.array([[3.0, 1.0, 1.0]]), jnp.array([0])
        >>> float(soft_margin(z, y)[0]), float(margin(z, y)[0])
        (-1.80..., -2.0)
        >>> bool(soft_margin(1024 * z, y) == 1024 * soft_margin(z, y))
        True
    """
    _check_labels(labels, logits)
    _validate.positive(softness=softness)
    _validate.per_example(logits.shape[:1], softness=softness)
    classes = ~jnp.isneginf(logits)
    count = jnp.maximum(jnp.sum(classes, axis=-1, keepdims=True), 2)
    mean = jnp.sum(jnp.where(classes, logits, 0.0), axis=-1, keepdims=True) / count
    spread = jnp.max(logits, axis=-1, keepdims=True) - mean
    divisor = 4.0 + jnp.log(count - 1.0).astype(logits.dtype)
    temperature = jax.lax.stop_gradient(jnp.where(spread > 0, spread, 1.0) / divisor)
    temperature *= jnp.broadcast_to(jnp.asarray(softness, logits.dtype), spread.shape[:1])[:, None]
    # Before the division, which logits of 16 bits might not survive.
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    others = jnp.where(of_class(logits, labels), -jnp.inf, (logits - top) / temperature)
    soft = temperature[..., 0] * jax.nn.logsumexp(others, axis=-1) + top[..., 0]
    return soft - _pick(logits, labels)


def dlr(logits: AnyArray, labels: ArrayLike) -> Array:
    """Difference of logits ratio: the margin over the gap from the first logit to the third.

    The loss is::

        (max_{i≠y} z_i - z_y) / (z_(1) - z_(3)),     z_(1) >= z_(2) >= z_(3) the sorted logits

    Neither the scale of the logits nor a shift changes it, so it cannot saturate. Its gradient is
    zero where the label's logit is the third.

    Args:
        logits: `[B, K]` float, `K >= 3`.
        labels: `[B]` int in `0..K-1`.

    Returns:
        `[B]` float, at least -1; above 0 where the example is misclassified. Where the three
        largest logits are equal, or only two classes are not masked out: the margin alone.

    Raises:
        ValueError: fewer than three classes, labels outside `0..K-1`.

    Example:
        >>> z, y = jnp.array([[3.0, 1.0, 0.0]]), jnp.array([0])
        >>> dlr(z, y).tolist(), dlr(1024 * z, y).tolist()
        ([-0.666...], [-0.666...])

    References:
        Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks", section 4.1, equation 6.
    """
    first, _, third = _largest(logits, 3, "dlr")
    return margin(logits, labels) / _or_one(first - third)


def targeted_dlr(logits: AnyArray, labels: ArrayLike, targets: ArrayLike) -> Array:
    """Difference of logits ratio towards a target, with another denominator than `dlr`.

    The loss is::

        (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2)

    Args:
        logits: `[B, K]` float, `K >= 4`.
        labels: `[B]` int in `0..K-1`, the true classes.
        targets: `[B]` int in `0..K-1`.

    Returns:
        `[B]` float. Where the four largest logits are equal, or only two classes are not masked
        out: the numerator alone.

    Raises:
        ValueError: fewer than four classes, labels or targets outside `0..K-1`.

    Example:
        >>> z = jnp.array([[4.0, 2.0, 1.0, 0.0]])
        >>> targeted_dlr(z, jnp.array([0]), jnp.array([1])).tolist()
        [-0.571...]

    References:
        Croce & Hein 2020, section 4.1, equation 7.
    """
    first, _, third, fourth = _largest(logits, 4, "targeted_dlr")
    fourth = jnp.where(jnp.isneginf(fourth), third, fourth)
    gap = _pick(logits, targets, "targets") - _pick(logits, labels)
    return gap / _or_one(first - 0.5 * (third + fourth))


def largest_other(logits: AnyArray, labels: ArrayLike) -> Array:
    """The largest logit of the classes other than the given one.

    Args:
        logits: `[B, K]` float, `K >= 2`.
        labels: `[B]` int in `0..K-1`.

    Returns:
        `[B]` float.

    Raises:
        ValueError: labels outside `0..K-1`.

    Example:
        >>> largest_other(jnp.array([[3.0, 1.0, 0.0]]), jnp.array([0])).tolist()
        [1.0]
    """
    # -inf and not a large constant: logits of strongly distilled networks pass any constant.
    return jnp.max(jnp.where(of_class(logits, labels), -jnp.inf, logits), axis=-1)


def tempered_log_softmax(logits: AnyArray, temperature: ArrayLike = 1.0) -> Array:
    """`log softmax(z / T)`, exact in log space for any temperature above 0.

    Args:
        logits: `[B, K]` float.
        temperature: above 0; scalar or broadcastable to `[B, 1]`.

    Returns:
        `[B, K]` float, at most 0.

    Raises:
        ValueError: a temperature that is not above 0.

    Example:
        >>> tempered_log_softmax(jnp.array([[0.0, 1000.0]])).tolist()
        [[-1000.0, 0.0]]
    """
    _validate.floats(2, logits=logits)
    check_temperature(temperature, logits.shape[0])
    return jax.nn.log_softmax(logits / jnp.asarray(temperature, logits.dtype), axis=-1)


def check_temperature(temperature: ArrayLike, num_rows: int) -> None:
    """An error for what is not above 0, or neither one number nor one per example."""
    _validate.positive(temperature=temperature)
    shape = np.shape(temperature)
    if shape not in ((), (1, 1), (num_rows, 1)):
        raise ValueError(
            f"expected temperature to be a scalar or of shape [B, 1] = ({num_rows}, 1), got "
            f"shape {shape}; pass one number, or a column of one per example"
        )


def _pick(values: AnyArray, labels: ArrayLike, name: str = "labels") -> Array:
    """`values[b, labels[b]]`, `[B]`."""
    _check_labels(labels, values, name)
    index = jnp.asarray(labels).astype(jnp.int32)[:, None]
    return jnp.take_along_axis(values, index, axis=-1)[:, 0]


def _largest(logits: AnyArray, count: int, name: str) -> tuple[Array, ...]:
    """The largest logits in order, each `[B]`."""
    _validate.floats(2, logits=logits)
    if logits.shape[-1] < count:
        raise ValueError(
            f"expected logits of {count} classes or more for {name}, got {logits.shape[-1]}; use "
            "jdistill.losses.margin, which any number of classes has"
        )
    values, _ = jax.lax.top_k(logits, count)
    return tuple(values[..., rank] for rank in range(count))


def _or_one(value: AnyArray) -> Array:
    """The value, or 1 where it is 0 or infinite: a quotient then has a finite gradient."""
    return jnp.where((value == 0) | jnp.isinf(value), 1.0, value)


def of_class(logits: AnyArray, labels: ArrayLike) -> Array:
    """Where the labels' own entries are, `[B, K]` bool."""
    _check_labels(labels, logits)
    return jax.nn.one_hot(jnp.asarray(labels), logits.shape[-1], dtype=bool)


def _check_labels(labels: ArrayLike, logits: AnyArray, name: str = "labels") -> None:
    # Without it -1 would be the last class, as an index, and K a NaN.
    _validate.floats(2, logits=logits)
    batch_size, num_classes = np.shape(logits)
    _validate.class_indices(labels, name=name, batch_size=batch_size, num_classes=num_classes)
