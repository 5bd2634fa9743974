"""Student losses on logits beyond the soft labels' cross-entropy: DKD and DIST."""

from typing import Any

import jax
import jax.numpy as jnp

from jdistill import _validate, losses, nets
from jdistill.distill._losses import loss_weights
from jdistill.distill._several import one_teacher
from jdistill.typing import Array, ArrayLike, Batch, LogitsFn, LossFn


def decoupled_loss(
    temperature: ArrayLike,
    teacher: LogitsFn,
    *,
    hard_weight: ArrayLike = 0.0,
    temperature_squared: bool = False,
    alpha: ArrayLike = 1.0,
    beta: ArrayLike = 8.0,
) -> LossFn:
    """The decoupled distillation loss (DKD), against a teacher that labels each batch.

    The loss is::

        (1 - λ) · s · (α · TCKD + β · NCKD) + λ · H(y, softmax(z)),    s = T² or 1

    TCKD is the divergence of the label's probability against the rest, NCKD that of the other
    classes among themselves (`losses.decoupled_kl`). No gradient flows into the teacher. As a
    `student_loss` of `chain` or of a study it wants `online=True`.

    The paper adds both terms with a weight of 1 and `s = T²`: with `hard_weight=0.5` and
    `temperature_squared=True` this is half of it.

    Args:
        temperature: above 0.
        teacher: inputs `[B, ...]` to logits `[B, K]`, or to a pytree with them, in evaluation mode.
        hard_weight: λ in `[0, 1]`, the weight of the hard labels, whose term is at `T = 1`.
        temperature_squared: whether the first term is multiplied by `T²`.
        alpha: α, at least 0.
        beta: β, at least 0; 8 is the released code's default, beside `T = 4`.

    Returns:
        `(outputs, batch) -> [B]`, a pytree that carries the teacher's weights: other numbers
        compile nothing.

    Raises:
        ValueError: numbers out of range; and from the loss, several teachers.

    Example:
        >>> batch = Batch(jnp.array([[2.0, 8.0]]), jnp.array([1]), None, jnp.ones(1))
        >>> loss = decoupled_loss(4.0, lambda x: x)
        >>> float(loss(jnp.array([[2.0, 8.0]]), batch)[0])
        0.0

    References:
        Zhao, Cui, Song, Qiu & Liang 2022, "Decoupled Knowledge Distillation", section 3. Its
        released code lets the first term grow over the first epochs, which is not done here.
    """
    _validate.function(teacher=teacher)
    weights = loss_weights(temperature, hard_weight, temperature_squared)
    _validate.non_negative(alpha=alpha, beta=beta)
    both = (jnp.asarray(each, jnp.float32) for each in (alpha, beta))
    return jax.tree_util.Partial(_decoupled_loss, nets.callable_logits_fn(teacher), *weights, *both)


def dist_loss(
    temperature: ArrayLike,
    teacher: LogitsFn,
    *,
    hard_weight: ArrayLike = 0.0,
    temperature_squared: bool = False,
    beta: ArrayLike = 2.0,
    gamma: ArrayLike = 2.0,
) -> LossFn:
    """The correlation loss DIST, against a teacher that labels each batch.

    The loss is::

        (1 - λ) · s · (β · inter + γ · intra) + λ · H(y, softmax(z)),    s = T² or 1

    The first part is one minus the correlation of an example's probabilities with the teacher's
    over the classes (`losses.inter_class_distance`), the second that of a class's probabilities
    over the examples (`losses.intra_class_distance`). So the student need not match the teacher's
    probabilities, but a linear function of them. No gradient flows into the teacher. As a
    `student_loss` of `chain` or of a study it wants `online=True`.

    The second part is of the whole batch: it changes with the batch size, and with the number of
    devices where each computes its own rows (`mode="pmap"`); with `gamma=0` nothing does.

    The paper's weights for classification are `β = γ = 2` beside 1 for the hard labels: with
    `hard_weight=0.5` this is half of it, with the released code's `s = T²` where
    `temperature_squared=True`.

    Args:
        temperature: above 0.
        teacher: inputs `[B, ...]` to logits `[B, K]`, or to a pytree with them, in evaluation mode.
        hard_weight: λ in `[0, 1]`, the weight of the hard labels, whose term is at `T = 1`.
        temperature_squared: whether the first term is multiplied by `T²`.
        beta: β, at least 0, the weight of the examples' correlations.
        gamma: γ, at least 0, that of the classes'.

    Returns:
        `(outputs, batch) -> [B]`, a pytree that carries the teacher's weights: other numbers
        compile nothing.

    Raises:
        ValueError: numbers out of range; and from the loss, several teachers.

    Example:
        >>> batch = Batch(jnp.array([[2.0, 8.0, 2.0]]), jnp.array([1]), None, jnp.ones(1))
        >>> loss = dist_loss(1.0, lambda x: x, gamma=0.0)
        >>> bool(loss(jnp.array([[0.0, 0.1, 0.0]]), batch)[0] < 1e-6)
        True

    References:
        Huang, You, Wang, Qian & Xu 2022, "Knowledge Distillation from A Stronger Teacher", sections
        3 and 4.
    """
    _validate.function(teacher=teacher)
    weights = loss_weights(temperature, hard_weight, temperature_squared)
    _validate.non_negative(beta=beta, gamma=gamma)
    both = (jnp.asarray(each, jnp.float32) for each in (beta, gamma))
    return jax.tree_util.Partial(_dist_loss, nets.callable_logits_fn(teacher), *weights, *both)


def _decoupled_loss(
    teacher: LogitsFn,
    temperature: Array,
    hard_weight: Array,
    factor: Array,
    alpha: Array,
    beta: Array,
    outputs: Any,
    batch: Batch,
) -> Array:
    logits, its = nets.logits_of(outputs), _logits(teacher, batch, "decoupled_loss")
    soft = losses.decoupled_kl(
        logits, its, batch.labels, temperature=temperature, alpha=alpha, beta=beta
    )
    hard = losses.cross_entropy(logits, batch.labels)
    return (1 - hard_weight) * factor * soft + hard_weight * hard


def _dist_loss(
    teacher: LogitsFn,
    temperature: Array,
    hard_weight: Array,
    factor: Array,
    beta: Array,
    gamma: Array,
    outputs: Any,
    batch: Batch,
) -> Array:
    logits, its = nets.logits_of(outputs), _logits(teacher, batch, "dist_loss")
    inter = losses.inter_class_distance(logits, its, temperature=temperature)
    intra = losses.intra_class_distance(logits, its, batch.mask, temperature=temperature)
    hard = losses.cross_entropy(logits, batch.labels)
    return (1 - hard_weight) * factor * (beta * inter + gamma * intra) + hard_weight * hard


def _logits(teacher: LogitsFn, batch: Batch, name: str) -> Array:
    """The one teacher's logits, without a gradient."""
    return nets.logits_of(jax.lax.stop_gradient(one_teacher(teacher(batch.inputs), name)))
