"""Losses of robust distillation from one online teacher: ARD, IAD, RSLAD, AdaAD, LTD."""

from typing import Any

import jax
import jax.numpy as jnp

from jdistill import losses
from jdistill._jax import register
from jdistill.robust._losses import (
    away_from,
    checked,
    kl,
    logits_at,
    network,
    number,
    one_network,
    positive,
    share,
)
from jdistill.typing import Array, ArrayLike, Batch, LogitsFn, LossFn


def ard_loss(temperature: ArrayLike, teacher: LogitsFn, *, hard_weight: ArrayLike = 0.0) -> LossFn:
    """The loss of ARD: the student answers the attack as the teacher answers the clean input.

    The loss is::

        (1 - λ) · T² · KL(softmax(z_t(x) / T) || softmax(z(x') / T)) + λ · H(y, softmax(z(x)))

    The attack climbs the cross-entropy with the labels. Without an attack it is distillation.

    Args:
        temperature: T, above 0; the paper has 30.
        teacher: inputs `[B, ...]` to logits `[B, K]`; no gradient flows into it.
        hard_weight: λ in `[0, 1]`; the paper has 0.

    Returns:
        `(outputs, batch) -> [B]` of `Outputs`, a pytree that carries the teacher's weights.

    Raises:
        ValueError: numbers out of range; and from the loss, outputs of another objective, or
            several teachers.

    Example:
        >>> from jdistill import robust
        >>> inputs = jnp.array([[1.0, 3.0]])
        >>> batch = Batch(inputs, jnp.array([1]), None, jnp.ones(1))
        >>> loss_fn = robust.ard_loss(30.0, lambda inputs: inputs)
        >>> float(loss_fn(robust.Outputs(inputs, inputs, inputs), batch)[0])
        0.0

    References:
        Goldblum, Fowl, Feizi & Goldstein 2020, "Adversarially Robust Distillation".
    """
    return _Ard(
        temperature=positive(temperature),
        teacher=network(teacher),
        hard_weight=share("hard_weight", hard_weight),
    )


@register
class _Ard:
    temperature: Array
    teacher: LogitsFn
    hard_weight: Array

    def __call__(self, outputs: Any, batch: Batch) -> Array:
        outputs = checked(outputs)
        its = logits_at(self.teacher, batch.inputs)
        soft = self.temperature**2 * kl(its, outputs.adversarial_logits, self.temperature)
        hard = losses.cross_entropy(outputs.logits, batch.labels)
        return (1 - self.hard_weight) * soft + self.hard_weight * hard


def iad_loss(
    temperature: ArrayLike,
    teacher: LogitsFn,
    *,
    hard_weight: ArrayLike = 0.0,
    power: ArrayLike = 0.1,
) -> LossFn:
    """The loss of IAD-I, which trusts the teacher less where it is itself misled by the attack.

    The loss is::

        (1 - λ) · (T² · KL(softmax(z_t(x) / T) || softmax(z(x') / T)) + (1 - a) · KL(p(x) || p(x')))
            + λ · H(y, p(x)),    a = p_t(y | x')^β,    p = softmax(z)

    That is `ard_loss` and, instead of the teacher's doubtful label, the student's own prediction.
    The attack climbs the cross-entropy with the labels.

    Args:
        temperature: T, above 0; the paper has 1.
        teacher: inputs `[B, ...]` to logits `[B, K]`; no gradient flows into it.
        hard_weight: λ in `[0, 1]`; the paper has 0.
        power: β, at least 0; 0 is `ard_loss`.

    Returns:
        `(outputs, batch) -> [B]` of `Outputs`, a pytree that carries the teacher's weights.

    Raises:
        ValueError: as `ard_loss`.

    Example:
        >>> from jdistill import robust
        >>> inputs = jnp.array([[1.0, 3.0]])
        >>> batch = Batch(inputs, jnp.array([1]), None, jnp.ones(1))
        >>> loss_fn = robust.iad_loss(1.0, lambda inputs: inputs)
        >>> float(loss_fn(robust.Outputs(inputs, inputs, inputs), batch)[0])
        0.0

    References:
        Zhu, Yao, Han, Zhang, Liu, Niu, Zhou, Xu & Yang 2022, "Reliable Adversarial Distillation
        with Unreliable Teachers", IAD-I as released, which trains by `ard_loss` for the first 60 of
        200 epochs.
    """
    ard: Any = ard_loss(temperature, teacher, hard_weight=hard_weight)
    return _Iad(ard=ard, power=number("power", power))


@register
class _Iad:
    ard: _Ard
    power: Array

    def __call__(self, outputs: Any, batch: Batch) -> Array:
        outputs = checked(outputs)
        its = logits_at(self.ard.teacher, outputs.adversarial_inputs)
        trust = jnp.exp(-self.power * losses.cross_entropy(its, batch.labels))
        introspection = (1 - trust) * kl(outputs.logits, outputs.adversarial_logits)
        return self.ard(outputs, batch) + (1 - self.ard.hard_weight) * introspection


def rslad_loss(
    temperature: ArrayLike, teacher: LogitsFn, *, robust_weight: ArrayLike = 5 / 6
) -> LossFn:
    """The loss of RSLAD: the teacher's soft labels of clean inputs, for the attack as well.

    The loss is::

        ω · KL(p_t(x) || p(x')) + (1 - ω) · KL(p_t(x) || p(x)),    x' = argmax KL(p_t(x) || p(x'))

    with `p = softmax(z / T)`, of the teacher likewise. No labels are used.

    Args:
        temperature: T, above 0; the paper has 1.
        teacher: inputs `[B, ...]` to logits `[B, K]`; no gradient flows into it.
        robust_weight: ω in `[0, 1]`.

    Returns:
        `(outputs, batch) -> [B]` of `Outputs`, a pytree that carries the teacher's weights.

    Raises:
        ValueError: numbers out of range; and from the loss, outputs of another objective, or
            several teachers.

    Example:
        >>> from jdistill import robust
        >>> inputs = jnp.array([[1.0, 3.0]])
        >>> batch = Batch(inputs, jnp.array([1]), None, jnp.ones(1))
        >>> loss_fn = robust.rslad_loss(1.0, lambda inputs: inputs)
        >>> float(loss_fn(robust.Outputs(inputs, inputs, inputs), batch)[0])
        0.0

    References:
        Zi, Zhao, Ma & Jiang 2021, "Revisiting Adversarial Robustness Distillation: Robust Soft
        Labels Make Student Better"; its code divides by the number of classes as well.
    """
    weight = share("robust_weight", robust_weight)
    return _Rslad(temperature=positive(temperature), teacher=network(teacher), robust_weight=weight)


@register
class _Rslad:
    temperature: Array
    teacher: LogitsFn
    robust_weight: Array

    def inner(self, student: LogitsFn, batch: Batch) -> tuple[LogitsFn, Any]:
        return student, away_from(one_network(self.teacher, batch.inputs), self.temperature)

    def __call__(self, outputs: Any, batch: Batch) -> Array:
        outputs = checked(outputs)
        its = logits_at(self.teacher, batch.inputs)
        attacked = kl(its, outputs.adversarial_logits, self.temperature)
        clean = kl(its, outputs.logits, self.temperature)
        return self.robust_weight * attacked + (1 - self.robust_weight) * clean


def adaad_loss(
    temperature: ArrayLike, teacher: LogitsFn, *, robust_weight: ArrayLike = 1.0
) -> LossFn:
    """The loss of AdaAD: the attack looks for where student and teacher differ most.

    The loss is::

        ω · KL(p_t(x') || p(x')) + (1 - ω) · KL(p_t(x) || p(x)),    x' = argmax KL(p_t(x') || p(x'))

    with `p = softmax(z / T)`, of the teacher likewise, and the attack's gradient through both.

    Args:
        temperature: T, above 0; the paper has 1.
        teacher: inputs `[B, ...]` to logits `[B, K]`; no gradient flows into its weights.
        robust_weight: ω in `[0, 1]`.

    Returns:
        `(outputs, batch) -> [B]` of `Outputs`, a pytree that carries the teacher's weights.

    Raises:
        ValueError: as `rslad_loss`.

    Example:
        >>> from jdistill import robust
        >>> inputs = jnp.array([[1.0, 3.0]])
        >>> batch = Batch(inputs, jnp.array([1]), None, jnp.ones(1))
        >>> loss_fn = robust.adaad_loss(1.0, lambda inputs: inputs)
        >>> float(loss_fn(robust.Outputs(inputs, inputs, inputs), batch)[0])
        0.0

    References:
        Huang, Chen, Wang, Lu, Cheng & Wang 2023, "Boosting Accuracy and Robustness of Student
        Models via Adaptive Adversarial Distillation".
    """
    weight = share("robust_weight", robust_weight)
    return _Adaad(temperature=positive(temperature), teacher=network(teacher), robust_weight=weight)


@register
class _Adaad:
    temperature: Array
    teacher: LogitsFn
    robust_weight: Array

    def inner(self, student: LogitsFn, batch: Batch) -> tuple[LogitsFn, Any]:
        del batch
        both = jax.tree_util.Partial(_both, self.teacher, student)
        return both, jax.tree_util.Partial(_apart, self.temperature)

    def __call__(self, outputs: Any, batch: Batch) -> Array:
        outputs = checked(outputs)
        its = logits_at(self.teacher, outputs.adversarial_inputs)
        attacked = kl(its, outputs.adversarial_logits, self.temperature)
        clean = kl(logits_at(self.teacher, batch.inputs), outputs.logits, self.temperature)
        return self.robust_weight * attacked + (1 - self.robust_weight) * clean


def _both(teacher: LogitsFn, student: LogitsFn, inputs: Array) -> Array:
    """The logits of teacher and student side by side, `[B, 2K]`: one network to an attack."""
    return jnp.concatenate([one_network(teacher, inputs), student(inputs)], axis=-1)


def _apart(temperature: Array, logits: Array, labels: Array) -> Array:
    del labels
    its, own = jnp.split(logits, 2, axis=-1)
    return kl(its, own, temperature)


def low_temperature_loss(
    temperature: ArrayLike, teacher: LogitsFn, *, trades_weight: ArrayLike | None = None
) -> LossFn:
    """The loss of low-temperature distillation (LTD): adversarial training on soft labels.

    The loss is::

        H(q, p(x')),    x' = argmax H(q, p(x')),    q = softmax(z_t(x) / T),    p = softmax(z)

    or, within TRADES::

        H(q, p(x)) + β · KL(p(x) || p(x')),    x' = argmax KL(p(x) || p(x'))

    The temperature is the teacher's alone. The student's is 1, in training as when it is used, so
    that nothing multiplies its logits by T afterwards: what masks gradients in defensive
    distillation is not there.

    Args:
        temperature: T of the teacher, above 0; the lower, the nearer to hard labels.
        teacher: inputs `[B, ...]` to logits `[B, K]`; no gradient flows into it.
        trades_weight: β, at least 0; None is the first form.

    Returns:
        `(outputs, batch) -> [B]` of `Outputs`, a pytree that carries the teacher's weights.

    Raises:
        ValueError: numbers out of range; and from the loss, outputs of another objective, or
            several teachers.

    Example:
        >>> from jdistill import robust
        >>> inputs = jnp.zeros((1, 2))
        >>> batch = Batch(inputs, jnp.array([1]), None, jnp.ones(1))
        >>> loss_fn = robust.low_temperature_loss(5.0, lambda inputs: inputs)
        >>> float(loss_fn(robust.Outputs(inputs, inputs, inputs), batch)[0])
        0.693...

    References:
        Chen & Lee 2021, "LTD: Low Temperature Distillation for Gradient Masking-free Adversarial
        Training", arXiv:2111.02331, by its abstract, which combines it with other training; with
        weight perturbation it is an argument of `adversarial`.
    """
    weight = None if trades_weight is None else number("trades_weight", trades_weight)
    return _LowTemperature(
        temperature=positive(temperature), teacher=network(teacher), trades_weight=weight
    )


@register
class _LowTemperature:
    temperature: Array
    teacher: LogitsFn
    trades_weight: Array | None

    def _labels(self, batch: Batch) -> Array:
        its = logits_at(self.teacher, batch.inputs)
        return jax.nn.softmax(its / self.temperature, axis=-1)

    def inner(self, student: LogitsFn, batch: Batch) -> tuple[LogitsFn, Any]:
        if self.trades_weight is not None:
            return student, away_from(student(batch.inputs))
        return student, jax.tree_util.Partial(_against, self._labels(batch))

    def __call__(self, outputs: Any, batch: Batch) -> Array:
        outputs = checked(outputs)
        if self.trades_weight is None:
            return losses.soft_cross_entropy(outputs.adversarial_logits, self._labels(batch))
        clean = losses.soft_cross_entropy(outputs.logits, self._labels(batch))
        return clean + self.trades_weight * kl(outputs.logits, outputs.adversarial_logits)


def _against(soft_labels: Array, logits: Array, labels: Array) -> Array:
    del labels
    return losses.soft_cross_entropy(logits, soft_labels)
