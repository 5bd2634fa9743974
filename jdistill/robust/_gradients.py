"""Losses of robust distillation that match how the teacher changes around an input."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdistill import _validate, losses
from jdistill._jax import register
from jdistill.robust._from_teacher import adaad_loss
from jdistill.robust._losses import (
    checked,
    kl,
    logits_at,
    network,
    number,
    one_network,
    positive,
)
from jdistill.robust._objective import Outputs
from jdistill.typing import Array, ArrayLike, Batch, LogitsFn, LossFn


def igdm_loss(
    temperature: ArrayLike,
    teacher: LogitsFn,
    *,
    loss: Callable[..., LossFn] = adaad_loss,
    gradient_weight: ArrayLike = 1.0,
) -> LossFn:
    """The loss of IGDM: another one, and the teacher's change across the input.

    The loss is::

        loss + γ · KL(softmax(z_t(x + δ) - z_t(x - δ)) || softmax(z(x + δ) - z(x - δ)))

    where `x' = x + δ` is what the attack of the other loss leads to. The difference stands for the
    gradient along δ. `x - δ` may lie outside of the data's box, as in the released code.

    Args:
        temperature: T of the other loss, above 0; the added term has none.
        teacher: inputs `[B, ...]` to logits `[B, K]`; no gradient flows into its weights.
        loss: `(T, teacher) -> loss_fn` of `Outputs`: `adaad_loss`, `rslad_loss`, `ard_loss`, …
        gradient_weight: γ, at least 0. The paper multiplies it by the share of epochs done.

    Returns:
        `(outputs, batch) -> [B]` of `Outputs`, a pytree that carries the teacher's weights.

    Raises:
        ValueError: numbers out of range, what is no loss; and from the loss, outputs of another
            objective, or several teachers.

    Example:
        >>> from jdistill import robust
        >>> inputs = jnp.array([[1.0, 3.0]])
        >>> batch = Batch(inputs, jnp.array([1]), None, jnp.ones(1))
        >>> loss_fn = robust.igdm_loss(1.0, lambda inputs: inputs)
        >>> float(loss_fn(robust.Outputs(inputs, inputs, inputs, inputs), batch)[0])
        0.0

    References:
        Lee, Cho & Kim 2025, "Indirect Gradient Matching for Adversarial Robust Distillation",
        by its released code.
    """
    _validate.function(loss=loss)
    teacher = network(teacher)
    try:
        inner = loss(temperature, teacher)
    except TypeError as error:
        raise ValueError(
            f"expected loss to take (temperature, teacher), got one that does not ({error}); pass "
            "one such as robust.adaad_loss"
        ) from None
    _validate.function(loss=inner)
    return _Igdm(
        loss=inner,
        teacher=teacher,
        gradient_weight=number("gradient_weight", gradient_weight),
    )


@register
class _Igdm:
    loss: Any
    teacher: LogitsFn
    gradient_weight: Array
    reflected = True

    def inner(self, student: LogitsFn, batch: Batch) -> tuple[LogitsFn, Any]:
        """What the other loss has the attack climb."""
        inner = getattr(self.loss, "inner", None)
        return (student, None) if inner is None else inner(student, batch)

    def __call__(self, outputs: Any, batch: Batch) -> Array:
        outputs = checked(outputs)
        change = _change(self.teacher, outputs, batch)
        return self.loss(outputs, batch) + self.gradient_weight * change


def _change(teacher: LogitsFn, outputs: Outputs, batch: Batch) -> Array:
    """The divergence of the student's change from `x - δ` to `x + δ` from the teacher's."""
    if outputs.reflected_logits is None:
        raise ValueError(
            "expected reflected_logits of the objective, got None; wrap the loss in nothing that "
            "hides its `reflected`"
        )
    adversarial = outputs.adversarial_inputs
    reflected = 2 * batch.inputs - adversarial
    its = logits_at(teacher, adversarial) - logits_at(teacher, reflected)
    return kl(its, outputs.adversarial_logits - outputs.reflected_logits)


def saad_loss(
    temperature: ArrayLike,
    teacher: LogitsFn,
    *,
    gradient_weight: ArrayLike = 1.0,
    clean_weight: ArrayLike = 0.0,
    entropy_scale: ArrayLike = 5.0,
    correction: ArrayLike = 1.0,
) -> LossFn:
    """The loss of SAAD: what the teacher is sure of under attack counts little.

    The loss is::

        w · (KL(p_t(x') || p(x')) + γ · change) + β · (1 - w / max w) · KL(p_t(x) || p(x))
        w = s · (H(p_t(x')) - min H)

    with the entropy H of the teacher's prediction, minimum and maximum over the batch, `change` the
    term of `igdm_loss`, and `p = softmax(z / T)`. The weights are of the whole batch, on however
    many devices it lies. The attack climbs `KL(q || p(x'))`, with q the teacher's prediction at x
    where the label's logit follows its own linear approximation::

        q = softmax((z_t(x) + c · e_y · ⟨∇ z_t(x)_y, x' - x⟩) / T)

    Args:
        temperature: T, above 0; the paper has 1.
        teacher: inputs `[B, ...]` to logits `[B, K]`; no gradient flows into its weights.
        gradient_weight: γ, at least 0. The paper multiplies it by the share of epochs done.
        clean_weight: β, at least 0.
        entropy_scale: s, at least 0.
        correction: c, at least 0; 0 leaves the attack with that of RSLAD.

    Returns:
        `(outputs, batch) -> [B]` of `Outputs`, a pytree that carries the teacher's weights.

    Raises:
        ValueError: numbers out of range; and from the loss, outputs of another objective, or
            several teachers.

    Example:
        >>> from jdistill import robust
        >>> inputs = jnp.array([[1.0, 3.0], [0.0, 0.0]])
        >>> batch = Batch(inputs, jnp.array([1, 1]), None, jnp.ones(2))
        >>> loss_fn = robust.saad_loss(1.0, lambda inputs: inputs)
        >>> loss_fn(robust.Outputs(inputs, inputs, inputs, inputs), batch).tolist()
        [0.0, 0.0]

    References:
        Lee & Chung 2026, "Sample-wise Adaptive Weighting for Transfer Consistency in Adversarial
        Distillation", arXiv:2512.10275, by its released code; what that evaluates, a mean of the
        weights of the later epochs (SWA), is not part of the loss.
    """
    return _Saad(
        temperature=positive(temperature),
        teacher=network(teacher),
        gradient_weight=number("gradient_weight", gradient_weight),
        clean_weight=number("clean_weight", clean_weight),
        entropy_scale=number("entropy_scale", entropy_scale),
        correction=number("correction", correction),
    )


@register
class _Saad:
    temperature: Array
    teacher: LogitsFn
    gradient_weight: Array
    clean_weight: Array
    entropy_scale: Array
    correction: Array
    reflected = True

    def inner(self, student: LogitsFn, batch: Batch) -> tuple[LogitsFn, Any]:
        def of_label(inputs: Array) -> tuple[Array, Array]:
            logits = one_network(self.teacher, inputs)
            own = jnp.take_along_axis(logits, batch.labels[:, None], axis=-1)
            return jnp.sum(own), logits

        gradient, its = jax.grad(of_label, has_aux=True)(batch.inputs)
        fixed = jax.lax.stop_gradient((batch.inputs, self.correction * gradient))
        both = jax.tree_util.Partial(_with_change, student, *fixed)
        climbed = jax.tree_util.Partial(
            _from_corrected, jax.lax.stop_gradient(its), self.temperature
        )
        return both, climbed

    def __call__(self, outputs: Any, batch: Batch) -> Array:
        outputs = checked(outputs)
        its = logits_at(self.teacher, outputs.adversarial_inputs)
        log_probs = losses.tempered_log_softmax(its, self.temperature)
        entropy = -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1)
        axis, real = outputs.axis_name, batch.mask > 0
        above = entropy - _smallest(jnp.where(real, entropy, jnp.inf), axis)
        above = jnp.where(real, above, 0.0)
        largest = -_smallest(-above, axis)
        share = above / jnp.where(largest > 0, largest, 1.0)

        attacked = kl(its, outputs.adversarial_logits, self.temperature)
        change = _change(self.teacher, outputs, batch)
        its = logits_at(self.teacher, batch.inputs)
        clean = kl(its, outputs.logits, self.temperature)
        weighted = self.entropy_scale * above * (attacked + self.gradient_weight * change)
        return weighted + self.clean_weight * (1 - share) * clean


def _with_change(student: LogitsFn, clean: Array, gradient: Array, inputs: Array) -> Array:
    """The student's logits, and next to them how much the label's logit of the teacher grows."""
    axes = tuple(range(1, inputs.ndim))
    change = jnp.sum(gradient * (inputs - clean), axis=axes)
    return jnp.concatenate([student(inputs), change[:, None]], axis=-1)


def _from_corrected(its: Array, temperature: Array, logits: Array, labels: Array) -> Array:
    """The divergence of the student's prediction from the teacher's corrected one."""
    logits, change = logits[:, :-1], logits[:, -1:]
    corrected = its + change * jax.nn.one_hot(labels, its.shape[-1], dtype=its.dtype)
    return kl(corrected, logits, temperature)


def _smallest(values: Array, axis_name: str | None) -> Array:
    """The smallest value over the whole batch, without a gradient."""
    found = jnp.min(jax.lax.stop_gradient(values))
    return found if axis_name is None else jax.lax.pmin(found, axis_name)
