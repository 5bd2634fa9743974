"""Distances of a student's features from its teacher's."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate
from jdistill.losses._distillation import log_space_kl
from jdistill.typing import AnyArray, Array


def hint(features: AnyArray, teacher_features: AnyArray) -> Array:
    """Mean squared difference of features, FitNets' hint.

    Where the student's layer has another size than the teacher's, the student needs a layer of its
    own from one to the other (the paper's regressor), whose outputs are the features here.

    Args:
        features: `[B, ...]` float, the student's.
        teacher_features: `[B, ...]` float of the same shape. Gradients pass into them, too; see
            `jax.lax.stop_gradient`.

    Returns:
        `[B]` float, at least 0: the mean over all axes but the first.

    Raises:
        ValueError: features of different shapes.

    Example:
        >>> hint(jnp.array([[1.0, 2.0], [3.0, 3.0]]), jnp.array([[1.0, 4.0], [3.0, 3.0]])).tolist()
        [2.0, 0.0]

    References:
        Romero, Ballas, Kahou, Chassang, Gatta & Bengio 2015, "FitNets: Hints for Thin Deep Nets",
        section 2.2, equation 3, which has half the sum in place of the mean.
    """
    _validate.floats(-2, features=features, teacher_features=teacher_features)
    if np.shape(features) != np.shape(teacher_features):
        raise ValueError(
            f"expected teacher_features of the shape of features, {np.shape(features)}, got "
            f"{np.shape(teacher_features)}; give the student a layer whose outputs have the shape "
            "of the teacher's, or compare attention maps (jdistill.losses.attention_transfer)"
        )
    difference = jnp.asarray(features) - teacher_features
    return jnp.mean(jnp.square(difference), axis=tuple(range(1, difference.ndim)))


def attention_transfer(features: AnyArray, teacher_features: AnyArray) -> Array:
    """Squared distance of two attention maps: where in the image the features are large.

    The loss is::

        || Q / ||Q|| - Q_t / ||Q_t|| ||²,     Q = sum over channels of features²

    The map has one value a pixel, so that student and teacher may have different numbers of
    channels. No factor on either's features changes it.

    Args:
        features: `[B, H, W, C]` float, the student's.
        teacher_features: `[B, H, W, D]` float, of the same height and width. Gradients pass into
            them, too; see `jax.lax.stop_gradient`.

    Returns:
        `[B]` float in `[0, 2]`: 0 for the same map, 2 for maps without a common pixel. Features
        that are 0 everywhere have a map of zeros: the value is 1, and no gradient leaves it.

    Raises:
        ValueError: features of different heights, widths, or numbers of examples.

    Example:
        >>> left, right = jnp.zeros((1, 1, 2, 3)).at[0, 0, 0].set(7.0), jnp.ones((1, 1, 2, 1))
        >>> attention_transfer(left, right).tolist()  # 2 - 2 / sqrt 2
        [0.585...]

    References:
        Zagoruyko & Komodakis 2017, "Paying More Attention to Attention: Improving the Performance
        of Convolutional Neural Networks via Attention Transfer", section 3.1, equation 2, whose
        norm is not squared; the released code has the mean square over pixels, which is this
        divided by `H W`.
    """
    _validate.floats(4, features=features, teacher_features=teacher_features)
    ours, theirs = np.shape(features), np.shape(teacher_features)
    if ours[:3] != theirs[:3]:
        raise ValueError(
            f"expected teacher_features [B, H, W, ...] = {ours[:3]} as features are, got "
            f"{theirs[:3]}; take layers of the same resolution, or resize one of them first "
            "(jax.image.resize)"
        )
    maps = _attention_map(jnp.asarray(features)), _attention_map(jnp.asarray(teacher_features))
    return jnp.sum(jnp.square(maps[0] - maps[1]), axis=-1)


def _attention_map(features: Array) -> Array:
    """Squares summed over channels, of length 1 over the pixels, `[B, H W]`."""
    # No scale matters, so that no gradient need pass through it; no square overflows then.
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(features), axis=(1, 2, 3), keepdims=True))
    scaled = features / jnp.where(largest == 0, 1.0, largest)
    pixels = jnp.sum(jnp.square(scaled), axis=-1).reshape(len(features), -1)
    # At least 1 where any feature is not 0: the largest is 1.
    square = jnp.sum(jnp.square(pixels), axis=-1, keepdims=True)
    return pixels / jnp.sqrt(jnp.where(square == 0, 1.0, square))


def relation_kl(
    left: AnyArray,
    right: AnyArray,
    teacher_left: AnyArray,
    teacher_right: AnyArray,
    *,
    num_heads: int,
) -> Array:
    """Divergence of relations between tokens from the teacher's, of each head.

    The loss is::

        mean over heads and tokens i of KL(R_t,i || R_i),     R = softmax(a bᵀ / sqrt d)

    with `a` and `b` one head's part of two projections and `d` its size. Queries and keys give the
    attention's own weights (Q-K relations), values and values the V-V relations; TinyMIM adds both.
    The relations are `[N, N]` whatever the widths are, so student and teacher may differ in width,
    and must agree in the number of heads: the student's layer may be cut into more or fewer heads
    here than it attends with.

    Args:
        left: `[B, N, heads · d]` float, the student's `a`: queries, or values.
        right: `[B, N, heads · d]` float, the student's `b`: keys, or values.
        teacher_left: `[B, N, heads · e]` float. Gradients pass into the teacher's, too; see
            `jax.lax.stop_gradient`.
        teacher_right: `[B, N, heads · e]` float.
        num_heads: at least 1; the last axis of all four is cut into that many parts.

    Returns:
        `[B]` float, at least 0 up to rounding.

    Raises:
        ValueError: other numbers of tokens or examples, widths that heads do not divide.

    Example:
        >>> tokens = jnp.arange(12.0).reshape(1, 3, 4)
        >>> relation_kl(tokens, tokens, tokens, tokens, num_heads=2).tolist()
        [0.0]
        >>> relation_kl(0 * tokens, tokens, 9 * tokens, tokens, num_heads=2).tolist()  # log 3
        [1.0986...]

    References:
        Ren, Wei, Zhang & Hu 2023, "TinyMIM: An Empirical Study of Distilling MIM Pre-trained
        Models", section 3. The released code takes the logarithm of a softmax, which may be `-inf`.
    """
    named = {"left": left, "right": right}
    named |= {"teacher_left": teacher_left, "teacher_right": teacher_right}
    _validate.floats(3, **named)
    _validate.count(num_heads=num_heads)
    for name, value in named.items():
        pair = left if name == "right" else teacher_left if name == "teacher_right" else value
        wanted = (*np.shape(left)[:2], np.shape(pair)[2])
        if np.shape(value) != wanted:
            raise ValueError(
                f"expected {name} of shape {wanted}, got {np.shape(value)}; pass projections of "
                "the same examples and tokens, and the two of one network with one width"
            )
        if wanted[2] % num_heads:
            raise ValueError(
                f"expected num_heads to divide the last axis of {name}, {wanted[2]}, got "
                f"{num_heads}; pass a number of heads that divides both widths"
            )
    ours = _relations(jnp.asarray(left), jnp.asarray(right), num_heads)
    theirs = _relations(jnp.asarray(teacher_left), jnp.asarray(teacher_right), num_heads)
    return jnp.mean(log_space_kl(theirs, ours), axis=(1, 2))


def _relations(left: Array, right: Array, num_heads: int) -> Array:
    """Logarithms of the relations, `[B, heads, N, N]`."""
    heads = [each.reshape(*each.shape[:2], num_heads, -1) for each in (left, right)]
    scores = jnp.einsum("bihd,bjhd->bhij", *heads)
    return jax.nn.log_softmax(scores / math.sqrt(heads[0].shape[-1]), axis=-1)
