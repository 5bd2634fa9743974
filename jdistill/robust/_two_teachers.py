"""The loss of a clean and a robust teacher: MTARD."""

from typing import Any

import jax
import jax.numpy as jnp

from jdistill import _validate, losses, nets
from jdistill.robust._losses import checked
from jdistill.typing import Array, ArrayLike, Batch, LogitsFn, LossFn


def two_teachers_loss(
    temperature: ArrayLike,
    teacher: LogitsFn,
    *,
    robust_weight: ArrayLike = 0.5,
    clean_temperature: ArrayLike | None = None,
    robust_temperature: ArrayLike | None = None,
) -> LossFn:
    """The distillation loss of MTARD: a clean teacher for clean inputs, a robust one for others.

    The loss is::

        (1 - ω) · H(softmax(z_c(x) / T_c), softmax(z(x) / T))
            + ω · H(softmax(z_r(x') / T_r), softmax(z(x') / T))

    with the student's logits z, the clean teacher's z_c, the robust teacher's z_r, and adversarial
    inputs x' of the student (`adversarial`). Up to the entropy of the teachers' labels, which no
    student changes, these are the paper's divergences. No gradient flows into the teachers.

    What the papers adapt in training is fixed here, since it would have to be remembered from step
    to step: the weight ω, which MTARD moves towards the term that has fallen less since the first
    step; and the teachers' temperatures, which B-MTARD moves until the labels of both teachers have
    the same entropy. MTARD starts at ω = 1/2, all temperatures 1.

    Args:
        temperature: T of the student, above 0.
        teacher: the two teachers as one, `distill.together((clean, robust))`: what `distill.chain`
            gives to a generation with two `teachers`, the clean one first, and a study to such a
            stage, both with `online=True`.
        robust_weight: ω in `[0, 1]`.
        clean_temperature: T_c, above 0; None is T.
        robust_temperature: T_r, likewise.

    Returns:
        `(outputs, batch) -> [B]` of `Outputs`, a pytree that carries the teachers' weights: other
        numbers compile nothing.

    Raises:
        ValueError: numbers out of range; and from the loss, a teacher that is not two, or outputs
            of another objective.

    Example:
        >>> from jdistill import distill, robust
        >>> clean = sturdy = lambda inputs: inputs
        >>> loss_fn = robust.two_teachers_loss(1.0, distill.together((clean, sturdy)))
        >>> logits, attacked = jnp.array([[0.0, 0.0]]), jnp.array([[0.0, 9.0]])
        >>> batch = Batch(logits, jnp.array([0]), None, jnp.ones(1))
        >>> outputs = robust.Outputs(logits, attacked, attacked)
        >>> float(loss_fn(outputs, batch)[0])  # half of ln 2, and a bit
        0.347...

    References:
        Zhao, Yu, Sun, Zhang & Wei 2022, "Enhanced Accuracy and Robustness via Multi-Teacher
        Adversarial Distillation" (MTARD), whose released code takes the mean over classes, too.
        Zhao, Wang & Wei 2023, "Mitigating Accuracy-Robustness Trade-off via Balanced Multi-Teacher
        Adversarial Distillation" (B-MTARD), arXiv:2306.16170.
    """
    _validate.function(teacher=teacher)
    if clean_temperature is None:
        clean_temperature = temperature
    if robust_temperature is None:
        robust_temperature = temperature
    _validate.positive(
        temperature=temperature,
        clean_temperature=clean_temperature,
        robust_temperature=robust_temperature,
    )
    _validate.within(0.0, 1.0, robust_weight=robust_weight)
    return jax.tree_util.Partial(
        _two_teachers_loss,
        nets.callable_logits_fn(teacher),
        jnp.asarray(robust_weight, jnp.float32),
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(clean_temperature, jnp.float32),
        jnp.asarray(robust_temperature, jnp.float32),
    )


def _two_teachers_loss(
    teacher: Any,
    robust_weight: Array,
    temperature: Array,
    clean_temperature: Array,
    robust_temperature: Array,
    outputs: Any,
    batch: Batch,
) -> Array:
    outputs = checked(outputs)
    # Each teacher is called on both inputs; what is not used of them is compiled away.
    clean = _soft_labels(_pair(teacher(batch.inputs))[0], clean_temperature)
    robust = _soft_labels(_pair(teacher(outputs.adversarial_inputs))[1], robust_temperature)
    on_clean = losses.soft_cross_entropy(outputs.logits, clean, temperature=temperature)
    on_adversarial = losses.soft_cross_entropy(
        outputs.adversarial_logits, robust, temperature=temperature
    )
    return (1 - robust_weight) * on_clean + robust_weight * on_adversarial


def _pair(found: Any) -> tuple[Any, Any]:
    """The outputs of two teachers, of `distill.Several`."""
    each: Any = getattr(found, "each", (found,))
    if len(each) != 2:
        raise ValueError(
            f"expected teacher to be two networks, the clean and the robust one, got {len(each)}; "
            "pass distill.together((clean, robust)), or name two teachers of the generation"
        )
    return each[0], each[1]


def _soft_labels(outputs: Any, temperature: Array) -> Array:
    logits = jax.lax.stop_gradient(nets.logits_of(outputs))
    return jax.nn.softmax(logits / temperature, axis=-1)
