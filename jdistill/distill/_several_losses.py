"""The student loss of several teachers, and how much each of them counts."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate, losses, nets
from jdistill._jax import as_pytree
from jdistill.distill._losses import loss_weights
from jdistill.distill._several import Several
from jdistill.typing import AnyArray, Array, ArrayLike, Batch, LogitsFn, LossFn

# `(teacher_logits [M, B, K], labels [B]) -> weights [M, B]`.
Weights = Callable[[Array, Array], Array]


def several_teachers_loss(
    temperature: ArrayLike,
    teacher: LogitsFn,
    *,
    hard_weight: ArrayLike = 0.0,
    temperature_squared: bool = False,
    weights: ArrayLike | Weights | None = None,
) -> LossFn:
    """The distillation loss against several teachers, each with its weight on each example.

    The loss is::

        (1 - λ) · s · Σ_m w_m · H(softmax(z_m / T), softmax(z / T)) + λ · H(y, softmax(z))

    with `s = T²` or 1, and `H` a sum over classes. Since the weights sum to 1, it is the loss
    against the weighted mean of the teachers' soft labels. No gradient flows into teachers or
    weights. As a `student_loss` of `chain` or of a study it wants `online=True`, for a generation
    with several `teachers`.

    Args:
        temperature: above 0.
        teacher: `together` of `M` networks in evaluation mode; a single network is one of them.
        hard_weight: λ in `[0, 1]`, the weight of the hard labels, whose term is at `T = 1`.
        temperature_squared: whether the first term is multiplied by `T²`.
        weights: at least 0, with the sum 1: `[M]` numbers; or a function of the teachers' logits
            and the labels, `([M, B, K], [B]) -> [M, B]`, such as `confidence_weights`; None is the
            mean.

    Returns:
        `(outputs, batch) -> [B]`, a pytree that carries the teachers' weights: other numbers
        compile nothing.

    Raises:
        ValueError: numbers out of range; and from the loss, weights that are not one a teacher and
            example, or teachers over different classes.

    Example:
        >>> from jdistill.distill import together
        >>> batch = Batch(jnp.array([[0.0, 9.0]]), jnp.array([1]), None, jnp.ones(1))
        >>> teachers = together([lambda x: x, lambda x: -x])  # that say the opposite
        >>> loss = several_teachers_loss(1.0, teachers)
        >>> float(loss(jnp.zeros((1, 2)), batch)[0])
        0.693...

    References:
        You, Xu, Xu & Tao 2017, "Learning from Multiple Teacher Networks", for the mean; Zhang, Chen
        & Wang 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation", for other weights.
    """
    _validate.function(teacher=teacher)
    numbers = loss_weights(temperature, hard_weight, temperature_squared)
    if weights is None:
        weigh: Any = jax.tree_util.Partial(_equal)
    elif callable(weights):
        weigh = as_pytree(weights, name="weights")
    else:
        _check_weights(weights)
        weigh = jax.tree_util.Partial(_fixed, jnp.asarray(weights, jnp.float32))
    network = nets.callable_logits_fn(teacher)
    return jax.tree_util.Partial(_several_teachers_loss, network, weigh, *numbers)


def confidence_weights(teacher_logits: AnyArray, labels: ArrayLike) -> Array:
    """Weights of teachers by how sure each is of the true label (CA-MKD), of each example.

    Of teacher `m` of `M`, with loss `L_m`, the weight is::

        w_m = (1 - softmax_m(L)) / (M - 1),     L_m = H(y, softmax(z_m))

    with the softmax over the `M` teachers. The one with the largest cross-entropy counts least. Two
    teachers share as the softmax of `-L` has it; of more the weights are at most `1 / (M - 1)`, and
    where one is far worse than the others, as at a large scale of the logits, it gets 0 and they
    share equally.

    Args:
        teacher_logits: `[M, B, K]` float, `M >= 2`.
        labels: `[B]` int in `0..K-1`.

    Returns:
        `[M, B]` float, in `[0, 1 / (M - 1)]`, with the sum 1 over the teachers.

    Raises:
        ValueError: fewer than two teachers, labels outside `0..K-1`.

    Example:
        >>> right, wrong = [[2.0, 0.0]], [[0.0, 2.0]]
        >>> confidence_weights(jnp.array([right, wrong]), jnp.array([0])).tolist()
        [[0.880...], [0.119...]]

    References:
        Zhang, Chen & Wang 2022, "Confidence-Aware Multi-Teacher Knowledge Distillation". Its
        released code also divides the loss by `M`; its term on features is not part of this.
    """
    _validate.floats(3, teacher_logits=teacher_logits)
    if len(teacher_logits) < 2:
        raise ValueError(
            f"expected teacher_logits of two teachers or more, got {len(teacher_logits)}; a single "
            "one needs no weights"
        )
    own = jnp.stack([losses.cross_entropy(jnp.asarray(each), labels) for each in teacher_logits])
    # A teacher that excludes the label has an infinite one, and a softmax of two would be NaN.
    finite = jnp.minimum(own, jnp.finfo(own.dtype).max)
    return (1 - jax.nn.softmax(finite, axis=0)) / (len(own) - 1)


def _equal(teacher_logits: Array, labels: Array) -> Array:
    num_teachers, num_examples = teacher_logits.shape[:2]
    return jnp.full((num_teachers, num_examples), 1 / num_teachers)


def _fixed(weights: Array, teacher_logits: Array, labels: Array) -> Array:
    num_teachers, num_examples = teacher_logits.shape[:2]
    if weights.shape != (num_teachers,):
        raise ValueError(
            f"expected weights [M] of {num_teachers} teachers, got shape {weights.shape}; pass one "
            "number each"
        )
    return jnp.broadcast_to(weights[:, None], (num_teachers, num_examples))


def _check_weights(weights: Any) -> None:
    _validate.non_negative(weights=weights)
    if _validate.is_traced(weights):
        return
    sums = np.sum(_validate.numbers(weights=weights), axis=-1)
    if np.ndim(weights) == 0 or not np.allclose(sums, 1.0, atol=1e-4):
        raise ValueError(
            f"expected weights [M] that sum to 1, got a sum of {np.ravel(sums)[0]:g}; divide them "
            "by it"
        )


def _several_teachers_loss(
    teacher: LogitsFn,
    weigh: Weights,
    temperature: Array,
    hard_weight: Array,
    factor: Array,
    outputs: Any,
    batch: Batch,
) -> Array:
    found = jax.lax.stop_gradient(teacher(batch.inputs))
    each = found.each if isinstance(found, Several) else (found,)
    its = [nets.logits_of(one) for one in each]
    shapes = [one.shape for one in its]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"expected teachers with logits of one shape, got {shapes}; learn from networks over "
            "the same classes"
        )
    weights = jax.lax.stop_gradient(weigh(jnp.stack(its), batch.labels))
    if jnp.shape(weights) != (len(its), len(batch.labels)):
        raise ValueError(
            f"expected weights [M, B] = {(len(its), len(batch.labels))}, got shape "
            f"{jnp.shape(weights)}; give one a teacher and example, as distill.confidence_weights"
        )
    logits = nets.logits_of(outputs)
    soft = jnp.zeros(logits.shape[:1], logits.dtype)
    for weight, one in zip(weights, its, strict=True):
        targets = jax.nn.softmax(one / temperature, axis=-1)
        soft += weight * losses.soft_cross_entropy(logits, targets, temperature=temperature)
    hard = losses.cross_entropy(logits, batch.labels)
    return (1 - hard_weight) * factor * soft + hard_weight * hard
