"""Divergences of a student's predictions from its teacher's."""

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate
from jdistill.losses._classification import soft_cross_entropy, tempered_log_softmax
from jdistill.typing import AnyArray, Array, ArrayLike


def kl_divergence(logits: AnyArray, targets: AnyArray, *, temperature: ArrayLike = 1.0) -> Array:
    """Divergence of the prediction from soft labels, `KL(q || softmax(z / T))`, over classes.

    A loss averaged over classes as well (the default reduction of some frameworks) is this one
    divided by `K`. No factor `T²` is applied: `jdistill.distill` takes it as an argument.

    Args:
        logits: `[B, K]` float.
        targets: `[B, K]` float, rows that sum to 1.
        temperature: above 0; scalar or broadcastable to `[B, 1]`.

    Returns:
        `[B]` float, at least 0 up to rounding.

    Raises:
        ValueError: a temperature that is not above 0, targets of another shape or no probabilities.

    Example:
        >>> float(kl_divergence(jnp.zeros((1, 2)), jnp.array([[1.0, 0.0]]))[0])
        0.693...
    """
    _validate.floats(2, logits=logits)
    _validate.soft_labels(targets, logits.shape, allow_nan=True)
    safe = jnp.where(targets > 0, targets, 1.0)
    negative_entropy = jnp.sum(targets * jnp.log(safe), axis=-1)
    return negative_entropy + soft_cross_entropy(logits, targets, temperature=temperature)


def standardize(logits: AnyArray) -> Array:
    """Logits with mean 0 and standard deviation 1 over each example's classes.

    The result is::

        (z - mean z) / sqrt(mean (z - mean z)²)

    Neither the scale of the logits nor a shift changes it. Where all logits of an example are equal
    (to 2e-37) it is 0, and its derivative there, where it jumps, is taken to be that of
    `z - mean z`.

    Args:
        logits: `[B, K]` float.

    Returns:
        `[B, K]` float, in `[-sqrt(K - 1), sqrt(K - 1)]`; a masked class stays `-inf`, and counts
        in neither the mean nor the deviation, which is the population's (divided by `K`).

    Raises:
        ValueError: logits that are not `[B, K]` floats.

    Example:
        >>> standardize(jnp.array([[8.0, 2.0, 2.0, 8.0], [3.0, 3.0, 3.0, 3.0]])).tolist()
        [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]

    References:
        Sun, Ren, Li, Wang & Cao 2024, "Logit Standardization in Knowledge Distillation", section
        4.2, algorithm 1. Its released code divides by the sample's deviation, by `K - 1`.
    """
    _validate.floats(2, logits=logits)
    classes = ~jnp.isneginf(logits)
    count = jnp.maximum(jnp.sum(classes, axis=-1, keepdims=True), 1)
    # Neither this shift nor this scale matters, so that no gradient need pass through them. Equal
    # logits are then exactly 0, where their mean may be off by a rounding, and none are too large
    # or too small to be squared. With a sixteenth of them no difference overflows, and the inverse
    # of none is so small that XLA takes it for 0; what it may take for 0 itself is equal.
    wide = jnp.asarray(logits, jnp.promote_types(logits.dtype, jnp.float32)) / 16
    top = jax.lax.stop_gradient(jnp.max(wide, axis=-1, keepdims=True))
    below = jnp.where(classes, wide - top, 0.0)
    extent = jax.lax.stop_gradient(jnp.max(-below, axis=-1, keepdims=True))
    is_flat = extent < jnp.finfo(wide.dtype).tiny
    scaled = jnp.where(is_flat, 16.0 * below, below / jnp.where(is_flat, 1.0, extent))
    mean = jnp.sum(scaled, axis=-1, keepdims=True) / count
    centered = jnp.where(classes, scaled - mean, 0.0)
    variance = jnp.sum(jnp.square(centered), axis=-1, keepdims=True) / count
    # A root of 0 would have an infinite derivative.
    deviation = jnp.sqrt(jnp.where(is_flat, 1.0, variance))
    return jnp.where(classes, centered / deviation, -jnp.inf).astype(logits.dtype)


def standardized_kl(logits: AnyArray, teacher_logits: AnyArray, *, temperature: ArrayLike) -> Array:
    """Divergence of a student from its teacher where both have standardized logits.

    The loss is::

        KL(softmax(standardize(z_t) / T) || softmax(standardize(z_s) / T))

    Neither the scale of either's logits nor a shift changes it, so that the student learns how the
    teacher ranks and spaces the classes, and need not be as confident. No factor `T²` is applied.

    Args:
        logits: `[B, K]` float, the student's.
        teacher_logits: `[B, K]` float. Gradients pass into them, too; see `jax.lax.stop_gradient`.
        temperature: above 0; scalar or broadcastable to `[B, 1]`.

    Returns:
        `[B]` float, at least 0 up to rounding.

    Raises:
        ValueError: a temperature that is not above 0, logits of different shapes.

    Example:
        >>> student, teacher = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[4.0, 2.0, 1.0]])
        >>> float(standardized_kl(student, teacher, temperature=2.0)[0])
        0.481...
        >>> abs(float(standardized_kl(student, 7 * student + 3, temperature=2.0)[0])) < 1e-6
        True

    References:
        Sun, Ren, Li, Wang & Cao 2024, "Logit Standardization in Knowledge Distillation",
        arXiv:2403.01427, algorithm 1. Its released code also multiplies by `T²`.
    """
    _validate.floats(2, logits=logits, teacher_logits=teacher_logits)
    if np.shape(teacher_logits) != np.shape(logits):
        raise ValueError(
            f"expected teacher_logits of the shape of logits, {np.shape(logits)}, got "
            f"{np.shape(teacher_logits)}; pass one row per example, over the same classes"
        )
    targets = jnp.exp(tempered_log_softmax(standardize(teacher_logits), temperature))
    return kl_divergence(standardize(logits), targets, temperature=temperature)
