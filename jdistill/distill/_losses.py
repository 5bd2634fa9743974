"""Losses of students as factories: `T -> loss_fn`, or `(T, teacher) -> loss_fn`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jdistill import _validate, losses, nets
from jdistill.distill._several import Several, one_teacher
from jdistill.typing import Array, ArrayLike, Batch, LogitsFn, LossFn


def soft_loss(
    temperature: ArrayLike,
    *,
    hard_weight: ArrayLike = 0.0,
    temperature_squared: bool = False,
) -> LossFn:
    """The distillation loss against the batch's soft labels (offline: `batch.targets`).

    The loss is::

        (1 - λ) · s · H(q, softmax(z / T)) + λ · H(y, softmax(z)),    s = T² or 1

    with `H(q, p) = -Σ_k q_k log p_k`, a sum over classes; the step takes the mean over the batch.
    `λ = 0` and `s = 1` are defensive distillation; TAKD and Hinton's take `λ` in (0, 1), `s = T²`.

    Args:
        temperature: above 0.
        hard_weight: λ in `[0, 1]`, the weight of the hard labels, whose term is at `T = 1`.
        temperature_squared: whether the soft term is multiplied by `T²`, which keeps its
            gradients comparable to the hard term's.

    Returns:
        `(outputs, batch) -> [B]`, a pytree: other numbers compile nothing.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> batch = Batch(None, jnp.array([1]), jnp.array([[0.5, 0.5]]), jnp.ones(1))
        >>> float(soft_loss(20.0)(jnp.zeros((1, 2)), batch)[0])
        0.693...

    References:
        Papernot et al. 2016, section IV; Hinton, Vinyals & Dean 2015, section 2; Mirzadeh et al.
        2020, equation 3.
    """
    return jax.tree_util.Partial(
        _soft_loss, *loss_weights(temperature, hard_weight, temperature_squared)
    )


def online_loss(
    temperature: ArrayLike,
    teacher: LogitsFn,
    *,
    hard_weight: ArrayLike = 0.0,
    temperature_squared: bool = False,
) -> LossFn:
    """The distillation loss against a teacher that labels each batch as it comes.

    For inputs that change from epoch to epoch (augmentation), where soft labels cannot be
    computed beforehand. No gradient flows into the teacher. Otherwise as `soft_loss`.

    Args:
        temperature: above 0.
        teacher: inputs `[B, ...]` to logits `[B, K]`, in evaluation mode.
        hard_weight: λ in `[0, 1]`.
        temperature_squared: whether the soft term is multiplied by `T²`.

    Returns:
        `(outputs, batch) -> [B]`, a pytree that carries the teacher's weights.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> batch = Batch(jnp.zeros((1, 2)), jnp.array([1]), None, jnp.ones(1))
        >>> float(online_loss(20.0, lambda x: x)(jnp.zeros((1, 2)), batch)[0])
        0.693...
    """
    _validate.function(teacher=teacher)
    weights = loss_weights(temperature, hard_weight, temperature_squared)
    return jax.tree_util.Partial(_online_loss, nets.callable_logits_fn(teacher), *weights)


def standardized_loss(
    temperature: ArrayLike, teacher: LogitsFn, *, hard_weight: ArrayLike = 0.0
) -> LossFn:
    """The distillation loss on standardized logits, against a teacher that labels each batch.

    The loss is::

        (1 - λ) · KL(softmax(s(z_t) / T) || softmax(s(z) / T)) + λ · H(y, softmax(z))

    with `s` the logits' standardization over classes (`losses.standardize`). With `λ = 0` neither
    the scale of the student's logits nor that of the teacher's changes it, so that nothing makes
    the student as confident as its teacher. No gradient flows into the teacher. As a `student_loss`
    of `chain` or of a study it wants `online=True`.

    Args:
        temperature: above 0.
        teacher: inputs `[B, ...]` to logits `[B, K]`, in evaluation mode.
        hard_weight: λ in `[0, 1]`, the weight of the hard labels, whose term is at `T = 1` and not
            standardized.

    Returns:
        `(outputs, batch) -> [B]`, a pytree that carries the teacher's weights: other numbers
        compile nothing.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> batch = Batch(jnp.array([[2.0, 8.0]]), jnp.array([1]), None, jnp.ones(1))
        >>> loss = standardized_loss(2.0, lambda x: x)
        >>> bool(loss(jnp.array([[0.1, 0.2]]), batch)[0] < 1e-6)
        True

    References:
        Sun, Ren, Li, Wang & Cao 2024, "Logit Standardization in Knowledge Distillation",
        arXiv:2403.01427. Its released code multiplies the first term by `T²`, and weighs the two
        terms by numbers that do not add up to 1.
    """
    _validate.function(teacher=teacher)
    temperature, hard_weight, _ = loss_weights(temperature, hard_weight, False)
    network = nets.callable_logits_fn(teacher)
    return jax.tree_util.Partial(_standardized_loss, network, temperature, hard_weight)


def hard_label_loss(temperature: ArrayLike, *, hard_weight: ArrayLike = 0.0) -> LossFn:
    """The distillation loss against the class that the teacher predicts (offline).

    The loss is::

        (1 - λ) · H(argmax q, softmax(z)) + λ · H(y, softmax(z))

    with `q` the soft labels in `batch.targets`. The largest entry of one teacher's does not depend
    on the temperature, so that this loss has none; the earlier of equal entries counts. Of several
    teachers it is that of the mean at the temperature of the labels.

    Args:
        temperature: above 0; taken so that this is a `student_loss`, and not used.
        hard_weight: λ in `[0, 1]`, the weight of the true labels; 1/2 in the paper, without a
            distillation token.

    Returns:
        `(outputs, batch) -> [B]`, a pytree: another weight compiles nothing.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> batch = Batch(None, jnp.array([0]), jnp.array([[0.4, 0.6]]), jnp.ones(1))
        >>> logits = jnp.array([[0.0, 50.0]])  # class 1, as the teacher has it
        >>> float(hard_label_loss(20.0)(logits, batch)[0])
        0.0

    References:
        Touvron, Cord, Douze, Massa, Sablayrolles & Jégou 2021, "Training data-efficient image
        transformers & distillation through attention", section 4, equation 3.
    """
    temperature, hard_weight, _ = loss_weights(temperature, hard_weight, False)
    # Carried, so that runs of a sweep at different temperatures have losses of one structure.
    return jax.tree_util.Partial(_hard_label_loss, temperature, hard_weight)


def online(student_loss: Callable[..., LossFn]) -> Callable[..., LossFn]:
    """An offline student loss against teachers that label each batch as it comes.

    For inputs that change from epoch to epoch, of which soft labels cannot be made beforehand:
    `online(hard_label_loss)`, as `online_loss` is for `soft_loss`. No gradient flows into the
    teacher. Of several teachers (`together`) the labels are the mean.

    Args:
        student_loss: `T -> loss_fn` of soft labels in `batch.targets`.

    Returns:
        `(T, teacher) -> loss_fn`, a student loss for `online=True`, equal for equal arguments.

    Raises:
        ValueError: what is no loss.

    Example:
        >>> batch = Batch(jnp.array([[0.0, 9.0]]), jnp.array([0]), None, jnp.ones(1))
        >>> loss_fn = online(hard_label_loss)(1.0, lambda x: x)
        >>> float(loss_fn(jnp.array([[0.0, 50.0]]), batch)[0])  # class 1, as the teacher has it
        0.0
    """
    remedy = "pass a function of the temperature, such as distill.hard_label_loss"
    _validate.function(remedy=remedy, student_loss=student_loss)
    return functools.partial(_online, student_loss)


def through_token(
    student_loss: Callable[..., LossFn], *, hard_weight: float = 0.5
) -> Callable[..., LossFn]:
    """The student loss of a transformer with a distillation token: each head has a teacher.

    The loss is::

        (1 - λ) · l(z_distillation, batch) + λ · H(y, softmax(z_class))

    The head of the distillation token learns from the teacher alone, by any student loss `l`; the
    head of the class token from the labels alone.

    Args:
        student_loss: `T -> loss_fn` or, for online teachers, `(T, teacher) -> loss_fn`, without a
            hard-label term: `hard_label_loss` is DeiT's hard distillation,
            `functools.partial(soft_loss, temperature_squared=True)` its soft one.
        hard_weight: λ in `[0, 1]`; 1/2 in the paper.

    Returns:
        A student loss of the same arguments, a value that is equal for equal ones. Its outputs must
        have `class_logits` and `distillation_logits` beside `logits`, as `nets.deit_tiny` has.

    Raises:
        ValueError: what is no loss, a weight out of range; and from the loss, outputs without the
            two heads.

    Example:
        >>> loss_fn = through_token(hard_label_loss)(1.0)
        >>> batch = Batch(None, jnp.array([0]), jnp.array([[0.4, 0.6]]), jnp.ones(1))
        >>> right, teachers = jnp.array([[50.0, 0.0]]), jnp.array([[0.0, 50.0]])
        >>> heads = {"class_logits": right, "distillation_logits": teachers}
        >>> float(loss_fn({"logits": (right + teachers) / 2, **heads}, batch)[0])
        0.0

    References:
        Touvron et al. 2021, "Training data-efficient image transformers & distillation through
        attention", section 4.
    """
    remedy = "pass a function of the temperature, such as distill.soft_loss"
    _validate.function(remedy=remedy, student_loss=student_loss)
    _validate.scalar(hard_weight=hard_weight)
    _validate.within(0.0, 1.0, hard_weight=hard_weight)
    return functools.partial(_through_token, student_loss, float(hard_weight))


def _online(student_loss: Callable[..., LossFn], temperature: Any, teacher: LogitsFn) -> LossFn:
    _validate.function(teacher=teacher)
    _validate.positive(temperature=temperature)
    return jax.tree_util.Partial(
        _labeled,
        as_argument(student_loss(temperature)),
        nets.callable_logits_fn(teacher),
        jnp.asarray(temperature, jnp.float32),
    )


def as_argument(loss_fn: LossFn) -> Any:
    """A loss as a pytree; a plain function becomes one without leaves."""
    _validate.function(student_loss=loss_fn)
    alone = jax.tree_util.all_leaves([loss_fn])
    return jax.tree_util.Partial(loss_fn) if alone else loss_fn


def _through_token(
    student_loss: Callable[..., LossFn], hard_weight: float, temperature: Any, *teacher: Any
) -> LossFn:
    inner = as_argument(student_loss(temperature, *teacher))
    return jax.tree_util.Partial(_token_loss, inner, jnp.asarray(hard_weight, jnp.float32))


def loss_weights(
    temperature: ArrayLike, hard_weight: ArrayLike, temperature_squared: bool
) -> tuple[Array, Array, Array]:
    """Temperature, hard weight and the soft term's factor as arrays, checked."""
    _validate.positive(temperature=temperature)
    _validate.within(0.0, 1.0, hard_weight=hard_weight)
    _validate.flag(temperature_squared=temperature_squared)
    temperature = jnp.asarray(temperature, jnp.float32)
    factor = jnp.square(temperature) if temperature_squared else jnp.ones_like(temperature)
    return temperature, jnp.asarray(hard_weight, jnp.float32), factor


def _mixed(
    temperature: Array,
    hard_weight: Array,
    factor: Array,
    outputs: Any,
    batch: Batch,
    targets: Array,
) -> Array:
    logits = nets.logits_of(outputs)
    soft = losses.soft_cross_entropy(logits, targets, temperature=temperature)
    hard = losses.cross_entropy(logits, batch.labels)
    return (1 - hard_weight) * factor * soft + hard_weight * hard


def _soft_loss(
    temperature: Array, hard_weight: Array, factor: Array, outputs: Any, batch: Batch
) -> Array:
    return _mixed(temperature, hard_weight, factor, outputs, batch, _targets(batch))


def _online_loss(
    teacher: LogitsFn,
    temperature: Array,
    hard_weight: Array,
    factor: Array,
    outputs: Any,
    batch: Batch,
) -> Array:
    targets = soft_targets(teacher(batch.inputs), temperature)
    return _mixed(temperature, hard_weight, factor, outputs, batch, targets)


def _standardized_loss(
    teacher: LogitsFn, temperature: Array, hard_weight: Array, outputs: Any, batch: Batch
) -> Array:
    logits = nets.logits_of(outputs)
    its = one_teacher(teacher(batch.inputs), "standardized_loss")
    its = jax.lax.stop_gradient(nets.logits_of(its))
    soft = losses.standardized_kl(logits, its, temperature=temperature)
    hard = losses.cross_entropy(logits, batch.labels)
    return (1 - hard_weight) * soft + hard_weight * hard


def _hard_label_loss(temperature: Array, hard_weight: Array, outputs: Any, batch: Batch) -> Array:
    del temperature
    logits = nets.logits_of(outputs)
    predicted = jnp.argmax(_targets(batch), axis=-1)
    from_teacher = losses.cross_entropy(logits, predicted)
    hard = losses.cross_entropy(logits, batch.labels)
    return (1 - hard_weight) * from_teacher + hard_weight * hard


def _labeled(
    inner: LossFn, teacher: LogitsFn, temperature: Array, outputs: Any, batch: Batch
) -> Array:
    targets = soft_targets(teacher(batch.inputs), temperature)
    return inner(outputs, batch._replace(targets=targets))


def soft_targets(outputs: Any, temperature: Array) -> Array:
    """Soft labels of a teacher's outputs, without a gradient; of several teachers the mean."""
    several = outputs.each if isinstance(outputs, Several) else (outputs,)
    logits = [jax.lax.stop_gradient(nets.logits_of(each)) for each in several]
    found = [jax.nn.softmax(each / temperature, axis=-1) for each in logits]
    return found[0] if len(found) == 1 else jnp.mean(jnp.stack(found), axis=0)


def _token_loss(inner: LossFn, hard_weight: Array, outputs: Any, batch: Batch) -> Array:
    heads = ("class_logits", "distillation_logits")
    if not isinstance(outputs, Mapping) or any(name not in outputs for name in heads):
        held = ", ".join(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
        raise ValueError(
            f"expected outputs with {' and '.join(heads)} for through_token, got {held}; use a "
            "network with a distillation token, or the loss without through_token"
        )
    from_teacher = inner({**outputs, "logits": outputs["distillation_logits"]}, batch)
    hard = losses.cross_entropy(outputs["class_logits"], batch.labels)
    return (1 - hard_weight) * from_teacher + hard_weight * hard


def _targets(batch: Batch) -> Array:
    """The batch's soft labels."""
    if batch.targets is None:
        raise ValueError(
            "expected soft labels in batch.targets, got None; pass them to train.fit as "
            "(inputs, labels, targets), or use distill.online_loss"
        )
    targets: Array = batch.targets
    return targets
