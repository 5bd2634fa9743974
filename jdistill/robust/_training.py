"""Losses of adversarial training from labels: TRADES and MART."""

from typing import Any

import jax
import jax.numpy as jnp

from jdistill import losses
from jdistill._jax import register
from jdistill.robust._losses import away_from, checked, kl, number, positive
from jdistill.typing import Array, ArrayLike, Batch, LogitsFn, LossFn


def trades_loss(temperature: ArrayLike = 1.0, *, weight: ArrayLike = 6.0) -> LossFn:
    """The loss of TRADES: right on clean inputs, and the same prediction all around them.

    The loss is::

        H(y, p(x)) + β · KL(p(x) || p(x')),    x' = argmax KL(p(x) || p(x')),    p = softmax(z / T)

    The attack climbs the divergence, and gradients flow into both predictions. At `β = 0` it is
    ordinary training. The divergence has no gradient at x itself: the attack needs a random start.

    Args:
        temperature: T, above 0; the paper has 1.
        weight: β, at least 0.

    Returns:
        `(outputs, batch) -> [B]` of `Outputs`, a pytree: other numbers compile nothing.

    Raises:
        ValueError: numbers out of range; and from the loss, outputs of another objective.

    Example:
        >>> from jdistill import robust
        >>> loss_fn = robust.trades_loss(weight=6.0)
        >>> logits = jnp.array([[2.0, 0.0]])
        >>> batch = Batch(jnp.zeros((1, 3)), jnp.array([0]), None, jnp.ones(1))
        >>> float(loss_fn(robust.Outputs(logits, logits, batch.inputs), batch)[0])
        0.126...

    References:
        Zhang, Yu, Jiao, Xing, El Ghaoui & Jordan 2019, "Theoretically Principled Trade-off between
        Robustness and Accuracy", algorithm 1; its code starts the attack from Gaussian noise of
        deviation 0.001.
    """
    return _Trades(temperature=positive(temperature), weight=number("weight", weight))


@register
class _Trades:
    temperature: Array
    weight: Array

    def inner(self, student: LogitsFn, batch: Batch) -> tuple[LogitsFn, Any]:
        return student, away_from(student(batch.inputs), self.temperature)

    def __call__(self, outputs: Any, batch: Batch) -> Array:
        outputs = checked(outputs)
        clean = losses.cross_entropy(outputs.logits, batch.labels, temperature=self.temperature)
        divergence = kl(outputs.logits, outputs.adversarial_logits, self.temperature)
        return clean + self.weight * divergence


def mart_loss(temperature: ArrayLike = 1.0, *, weight: ArrayLike = 5.0) -> LossFn:
    """The loss of MART, which asks more of examples that are misclassified without an attack.

    The loss is::

        -log p_y(x') - log(1 - max_{k ≠ y} p_k(x')) + λ · KL(p(x) || p(x')) · (1 - p_y(x))

    with `p = softmax(z / T)`. The attack climbs the cross-entropy.

    Args:
        temperature: T, above 0; the paper has 1.
        weight: λ, at least 0.

    Returns:
        `(outputs, batch) -> [B]` of `Outputs`, a pytree: other numbers compile nothing.

    Raises:
        ValueError: numbers out of range; and from the loss, outputs of another objective.

    Example:
        >>> from jdistill import robust
        >>> logits = jnp.array([[0.0, 0.0]])
        >>> batch = Batch(jnp.zeros((1, 3)), jnp.array([0]), None, jnp.ones(1))
        >>> float(robust.mart_loss()(robust.Outputs(logits, logits, batch.inputs), batch)[0])
        1.386...

    References:
        Wang, Zou, Yi, Bailey, Ma & Gu 2020, "Improving Adversarial Robustness Requires Revisiting
        Misclassified Examples". Its released code adds 1e-4 and 1e-12 inside of the
        logarithms, where this is exact in log space.
    """
    return _Mart(temperature=positive(temperature), weight=number("weight", weight))


@register
class _Mart:
    temperature: Array
    weight: Array

    def __call__(self, outputs: Any, batch: Batch) -> Array:
        outputs = checked(outputs)
        log_clean = losses.tempered_log_softmax(outputs.logits, self.temperature)
        log_attacked = losses.tempered_log_softmax(outputs.adversarial_logits, self.temperature)
        boosted = -_of_label(log_attacked, batch.labels) - _log_of_rest(log_attacked, batch.labels)
        uncertain = 1 - jnp.exp(_of_label(log_clean, batch.labels))
        divergence = kl(outputs.logits, outputs.adversarial_logits, self.temperature)
        return boosted + self.weight * divergence * uncertain


def _of_label(values: Array, labels: Array) -> Array:
    return jnp.take_along_axis(values, labels[:, None], axis=-1)[:, 0]


def _log_of_rest(log_probs: Array, labels: Array) -> Array:
    """`log(1 - p)` of the likeliest class but the label: the sum of all others, in log space."""
    classes = jnp.arange(log_probs.shape[-1])
    others = jnp.where(labels[:, None] == classes[None], -jnp.inf, log_probs)
    likeliest = jnp.argmax(others, axis=-1)[:, None] == classes[None]
    return jax.nn.logsumexp(jnp.where(likeliest, -jnp.inf, log_probs), axis=-1)
