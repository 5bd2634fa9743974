"""Losses of a student's logits against its teacher's: decoupled (DKD), and correlations (DIST)."""

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate
from jdistill.losses._classification import check_temperature, of_class, tempered_log_softmax
from jdistill.losses._soft import standardize
from jdistill.typing import AnyArray, Array, ArrayLike


def decoupled_kl(
    logits: AnyArray,
    teacher_logits: AnyArray,
    labels: ArrayLike,
    *,
    temperature: ArrayLike,
    alpha: ArrayLike = 1.0,
    beta: ArrayLike = 8.0,
) -> Array:
    """Decoupled distillation loss (DKD): the label's share and the other classes, apart.

    The loss is::

        α · KL((p_y, 1 - p_y) || (q_y, 1 - q_y)) + β · KL(p̂ || q̂)

    with `p` the teacher's and `q` the student's `softmax(z / T)`, and `p̂`, `q̂` the same over the
    classes other than the label `y`. The divergence of all classes is this with `α = 1` and
    `β = 1 - p_y`: there a confident teacher silences what it says about the others, and a constant
    `β` does not. Of two classes the other one is alone, and the second term is 0. No factor `T²` is
    applied.

    Args:
        logits: `[B, K]` float, the student's.
        teacher_logits: `[B, K]` float. Gradients pass into them, too; see `jax.lax.stop_gradient`.
        labels: `[B]` int in `0..K-1`.
        temperature: above 0; scalar or broadcastable to `[B, 1]`.
        alpha: α, at least 0; scalar or `[B]`.
        beta: β, likewise.

    Returns:
        `[B]` float, at least 0 up to rounding.

    Raises:
        ValueError: numbers out of range, logits of different shapes.

    Example:
        >>> student, teacher = jnp.zeros((1, 3)), jnp.array([[0.0, 0.0, jnp.log(2.0)]])
        >>> float(decoupled_kl(student, teacher, jnp.array([2]), temperature=1.0)[0])
        0.0588...
        >>> float(decoupled_kl(student, teacher, jnp.array([0]), temperature=1.0, alpha=0.0)[0])
        0.453...

    References:
        Zhao, Cui, Song, Qiu & Liang 2022, "Decoupled Knowledge Distillation", section
        3. Its released code multiplies by `T²`, takes the label out by subtracting 1,000 from its
        logit, which is not enough for logits of that size, and takes logarithms of probabilities
        that may be 0.
    """
    _validate.floats(2, logits=logits, teacher_logits=teacher_logits)
    _same_shape(logits, teacher_logits)
    _validate.non_negative(alpha=alpha, beta=beta)
    _validate.per_example(logits.shape[:1], alpha=alpha, beta=beta)
    its_label, its_others = _decoupled(teacher_logits, labels, temperature)
    own_label, own_others = _decoupled(logits, labels, temperature)
    of_label = jnp.asarray(alpha, logits.dtype) * log_space_kl(its_label, own_label)
    return of_label + jnp.asarray(beta, logits.dtype) * log_space_kl(its_others, own_others)


def _decoupled(logits: AnyArray, labels: ArrayLike, temperature: ArrayLike) -> tuple[Array, Array]:
    """Log-probabilities of the label against the rest `[B, 2]`, and of the others `[B, K]`."""
    log_probs = tempered_log_softmax(logits, temperature)
    own = of_class(logits, labels)
    of_label = jnp.sum(jnp.where(own, log_probs, 0.0), axis=-1)
    others = jnp.where(own, -jnp.inf, log_probs)
    # Where masks leave no other class, zeros have a gradient, and it is not used.
    alone = jnp.all(jnp.isneginf(others), axis=-1)
    safe = jnp.where(alone[:, None], 0.0, others)
    of_rest = jnp.where(alone, -jnp.inf, jax.nn.logsumexp(safe, axis=-1))
    binary = jnp.stack([of_label, of_rest], axis=-1)
    return binary, jnp.where(alone[:, None], -jnp.inf, jax.nn.log_softmax(safe, axis=-1))


def log_space_kl(log_targets: Array, log_probs: Array) -> Array:
    """`Σ_k p_k (log p_k - log q_k)` over the last axis, of logarithms.

    What the targets exclude, or what is too small for a float, adds nothing.
    """
    absent = jnp.exp(log_targets) == 0
    targets, probs = (jnp.where(absent, 0.0, each) for each in (log_targets, log_probs))
    terms = jnp.exp(targets) * (targets - probs)
    return jnp.sum(jnp.where(absent, 0.0, terms), axis=-1)


def pearson_distance(logits: AnyArray, teacher_logits: AnyArray) -> Array:
    """Distance of two rows by their correlation, `1 - ρ(z, z_t)`.

    Neither a shift of either row nor a factor above 0 changes it. Of two classes it says whether
    both prefer the same one, and nothing more: 0 or 2.

    Args:
        logits: `[B, K]` float, the student's; or other scores of the classes. DIST takes
            probabilities (`inter_class_distance`).
        teacher_logits: `[B, K]` float. Gradients pass into them, too; see `jax.lax.stop_gradient`.

    Returns:
        `[B]` float in `[0, 2]`. A row whose values are all equal correlates with none: 1, and its
        derivative is that of `standardize`. A class that is masked out in either does not count.

    Raises:
        ValueError: logits of different shapes.

    Example:
        >>> student, teacher = jnp.array([[1.0, 2.0, 4.0]]), jnp.array([[4.0, 2.0, 1.0]])
        >>> float(pearson_distance(student, teacher)[0])
        1.928...
        >>> abs(float(pearson_distance(student, 7 * student - 3)[0])) < 1e-6
        True

    References:
        Huang, You, Wang, Qian & Xu 2022, "Knowledge Distillation from A Stronger Teacher", section
        3. Its released code adds 1e-8 to the denominator.
    """
    _validate.floats(2, logits=logits, teacher_logits=teacher_logits)
    _same_shape(logits, teacher_logits)
    masked = jnp.isneginf(logits) | jnp.isneginf(teacher_logits)
    ones, twos = (
        jnp.where(masked, 0.0, standardize(jnp.where(masked, -jnp.inf, each)))
        for each in (jnp.asarray(logits), jnp.asarray(teacher_logits))
    )
    count = jnp.maximum(jnp.sum(~masked, axis=-1), 1).astype(logits.dtype)
    # Half the mean square of a difference, which is exact where the correlation is near 1; each
    # row that has no deviation lacks a half.
    flat = sum(jnp.all(each == 0, axis=-1).astype(logits.dtype) for each in (ones, twos))
    return 0.5 * (jnp.sum(jnp.square(ones - twos), axis=-1) / count + flat)


def inter_class_distance(
    logits: AnyArray, teacher_logits: AnyArray, *, temperature: ArrayLike = 1.0
) -> Array:
    """The first part of DIST: the correlation of each example's probabilities over the classes.

    The loss is::

        1 - ρ(softmax(z / T), softmax(z_t / T))

    It is 0 where the student's probabilities are a linear function of the teacher's. Shifts of the
    logits do not change it, their scale does; the higher the temperature, the closer it comes to
    `pearson_distance` of the logits, which has neither. No factor `T²` is applied.

    Args:
        logits: `[B, K]` float, the student's.
        teacher_logits: `[B, K]` float. Gradients pass into them, too; see `jax.lax.stop_gradient`.
        temperature: above 0; scalar or broadcastable to `[B, 1]`.

    Returns:
        `[B]` float in `[0, 2]`; 1 where all probabilities of either are equal.

    Raises:
        ValueError: a temperature that is not above 0, logits of different shapes.

    Example:
        >>> student, teacher = jnp.array([[0.0, 0.0, 1.0]]), jnp.array([[0.0, 0.0, 9.0]])
        >>> float(inter_class_distance(student, teacher)[0]) < 1e-6
        True

    References:
        Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", section 3. Its released
        code multiplies by `T²`.
    """
    _validate.floats(2, logits=logits, teacher_logits=teacher_logits)
    _same_shape(logits, teacher_logits)
    ours, theirs = (_above_uniform(each, temperature) for each in (logits, teacher_logits))
    return pearson_distance(ours, theirs)


def intra_class_distance(
    logits: AnyArray,
    teacher_logits: AnyArray,
    mask: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
) -> Array:
    """The second part of DIST: the correlation of each class's probabilities over the examples.

    The loss is::

        1 - mean_k ρ(softmax(z / T)_k, softmax(z_t / T)_k)

    with each correlation over the real rows of the batch. So it is one number for all of them, and
    an example's value depends on the others: on the batch size, on who is in the batch, and, where
    each device sees its own rows (`"pmap"`), on the number of devices. It is the one loss here of
    which that holds. Of one example there is no correlation: 1, without a gradient.

    Args:
        logits: `[B, K]` float, the student's.
        teacher_logits: `[B, K]` float. Gradients pass into them, too; see `jax.lax.stop_gradient`.
        mask: `[B]`, 1 for a real example and 0 for padding, which counts for nothing, whatever it
            holds.
        temperature: above 0; scalar or broadcastable to `[B, 1]`.

    Returns:
        `[B]` float in `[0, 2]`, the same in all real rows and 0 in the others: the mean over real
        rows is the distance. A class whose probability does not change has a distance of 1.

    Raises:
        ValueError: a temperature that is not above 0, logits of different shapes, a mask without a
            real example.

    Example:
        >>> student, teacher = jnp.eye(3), jnp.array([[3.0, 0.0, 0.0], [0.0, 3.0, 0.0], [9.0] * 3])
        >>> intra_class_distance(student, teacher, jnp.array([1, 1, 0])).tolist()
        [0.333..., 0.333..., 0.0]

    References:
        Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher", section 3. Its released
        code multiplies by `T²`.
    """
    _validate.floats(2, logits=logits, teacher_logits=teacher_logits)
    _same_shape(logits, teacher_logits)
    real = _real_rows(mask, logits.shape[0])[:, None]
    ours, theirs = (_columns(each, real, temperature) for each in (logits, teacher_logits))
    distances = pearson_distance(ours, theirs)
    counted = jnp.any(~jnp.isneginf(ours) & ~jnp.isneginf(theirs), axis=-1)
    total = jnp.sum(jnp.where(counted, distances, 0.0))
    value = total / jnp.maximum(jnp.sum(counted), 1).astype(logits.dtype)
    return jnp.where(real[:, 0], value, 0.0)


def _columns(logits: AnyArray, real: Array, temperature: ArrayLike) -> Array:
    """Each class's probabilities over the rows, up to a shift, `[K, B]`; `-inf` where not real."""
    logits = jnp.where(real, logits, 0.0)
    excess = _above_uniform(logits, temperature)
    classes = ~jnp.isneginf(excess)
    # A correlation knows no shift, and a float resolves small numbers best: of a class that is rare
    # everywhere the probabilities, of one that is near `1 / K` everywhere what exceeds it.
    near = jnp.all((jnp.abs(excess) < 0.5 / logits.shape[-1]) | ~real | ~classes, axis=0)
    probs = jnp.where(classes, jnp.exp(tempered_log_softmax(logits, temperature)), -jnp.inf)
    return jnp.where(real, jnp.where(near[None], excess, probs), -jnp.inf).T


def _above_uniform(logits: AnyArray, temperature: ArrayLike) -> Array:
    """`softmax(z / T) - 1 / K`, exact also where all are nearly `1 / K`; masked classes `-inf`."""
    check_temperature(temperature, logits.shape[0])
    logits = jnp.asarray(logits)
    classes = ~jnp.isneginf(logits)
    # A common shift does not matter, so that no gradient need pass through it.
    top = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    below = jnp.where(classes, logits - jnp.where(jnp.isneginf(top), 0.0, top), 0.0)
    excess = jnp.expm1(below / jnp.asarray(temperature, logits.dtype))
    excess = jnp.where(classes, excess, 0.0)
    count = jnp.maximum(jnp.sum(classes, axis=-1, keepdims=True), 1).astype(excess.dtype)
    mean = jnp.sum(excess, axis=-1, keepdims=True) / count
    return jnp.where(classes, (excess - mean) / (count * (1.0 + mean)), -jnp.inf)


def _same_shape(logits: AnyArray, teacher_logits: AnyArray) -> None:
    if np.shape(teacher_logits) != np.shape(logits):
        raise ValueError(
            f"expected teacher_logits of the shape of logits, {np.shape(logits)}, got "
            f"{np.shape(teacher_logits)}; pass one row per example, over the same classes"
        )


def _real_rows(mask: ArrayLike, num_rows: int) -> Array:
    """Real rows by their mask, `[B]` bool."""
    known = not _validate.is_traced(mask)
    real = _validate.booleans(mask, name="mask") if known else jnp.asarray(mask) > 0
    if real.shape != (num_rows,) or (known and not real.any()):
        raise ValueError(
            f"expected mask of shape [B] = ({num_rows},) with a real example, got "
            f"{np.asarray(mask).tolist() if known and real.size < 9 else 'one'} of shape "
            f"{real.shape}; pass 1 for each example that counts"
        )
    return jnp.asarray(real)
