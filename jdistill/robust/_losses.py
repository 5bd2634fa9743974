"""Parts of the losses of `Outputs`, and the loss that leaves out the clean inputs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdistill import _validate, losses, nets
from jdistill._jax import as_pytree
from jdistill.losses._distillation import log_space_kl
from jdistill.robust._objective import Outputs
from jdistill.typing import Array, ArrayLike, Batch, LogitsFn, LossFn


def on_adversarial(loss: Callable[..., LossFn]) -> Callable[..., LossFn]:
    """A loss where the attack leads: of the adversarial logits alone.

    `on_adversarial(train.hard_loss)` is adversarial training (PGD-AT), which makes robust teachers.
    Soft labels and hard ones stay those of the clean example; an online teacher sees the
    adversarial inputs, since `batch.inputs` are those.

    Args:
        loss: `T -> loss_fn` or, for online teachers, `(T, teacher) -> loss_fn`.

    Returns:
        A factory of the same arguments, for steps with `objective=adversarial(attack)`.

    Raises:
        ValueError: what is no loss; and from the loss, outputs of another objective.

    Example:
        >>> from jdistill import train
        >>> loss_fn = on_adversarial(train.hard_loss)(1.0)
        >>> right, wrong = jnp.array([[50.0, 0.0]]), jnp.array([[0.0, 50.0]])
        >>> batch = Batch(jnp.zeros((1, 3)), jnp.array([0]), None, jnp.ones(1))
        >>> float(loss_fn(Outputs(right, wrong, batch.inputs), batch)[0])
        50.0

    References:
        Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", equation
        2.1.
    """
    _validate.function(loss=loss)
    return functools.partial(_on_adversarial, loss)


def _on_adversarial(loss: Callable[..., LossFn], temperature: Any, *teacher: Any) -> LossFn:
    return jax.tree_util.Partial(_loss_there, as_pytree(loss(temperature, *teacher)))


def _loss_there(loss_fn: LossFn, outputs: Any, batch: Batch) -> Array:
    outputs = checked(outputs)
    return loss_fn(outputs.adversarial_logits, batch._replace(inputs=outputs.adversarial_inputs))


def checked(outputs: Any) -> Outputs:
    """The outputs, which must be those of `adversarial`."""
    if not isinstance(outputs, Outputs):
        raise ValueError(
            f"expected outputs with adversarial logits, got {type(outputs).__name__}; train with "
            "make_train_step(..., objective=robust.adversarial(attack)), and give losses of robust "
            "as they are, not within on_adversarial"
        )
    return outputs


def number(name: str, value: ArrayLike) -> Array:
    """A weight as an array; an error where it is below 0."""
    named: dict[str, Any] = {name: value}
    _validate.non_negative(**named)
    return jnp.asarray(value, jnp.float32)


def share(name: str, value: ArrayLike) -> Array:
    """A weight as an array; an error where it is not in [0, 1]."""
    _validate.within(0.0, 1.0, **{name: value})
    return jnp.asarray(value, jnp.float32)


def positive(temperature: ArrayLike) -> Array:
    """A temperature as an array; an error where it is not above 0."""
    _validate.positive(temperature=temperature)
    return jnp.asarray(temperature, jnp.float32)


def network(teacher: Any) -> LogitsFn:
    """A teacher as a pytree; an error for what is none."""
    _validate.function(teacher=teacher)
    return nets.callable_logits_fn(teacher)


def logits_at(teacher: LogitsFn, inputs: Array) -> Array:
    """A teacher's logits, without a gradient."""
    return jax.lax.stop_gradient(one_network(teacher, inputs))


def one_network(teacher: LogitsFn, inputs: Array) -> Array:
    """A teacher's logits; an error where it is several networks."""
    found: Any = teacher(inputs)
    each = getattr(found, "each", (found,))
    if len(each) != 1:
        raise ValueError(
            f"expected one teacher, got {len(each)} together; name one teacher of the generation, "
            "or use robust.two_teachers_loss"
        )
    return nets.logits_of(each[0])


def kl(target_logits: Array, logits: Array, temperature: ArrayLike = 1.0) -> Array:
    """`KL(softmax(t / T) || softmax(z / T))` of logits, `[B]`, with gradients into both."""
    log_targets = losses.tempered_log_softmax(target_logits, temperature)
    return log_space_kl(log_targets, losses.tempered_log_softmax(logits, temperature))


def away_from(target_logits: Array, temperature: ArrayLike = 1.0) -> Any:
    """`(logits, labels) -> [B]` for an attack: the divergence from what is predicted there."""
    fixed = jax.lax.stop_gradient(target_logits)
    return jax.tree_util.Partial(_away_from, fixed, jnp.asarray(temperature, jnp.float32))


def _away_from(target_logits: Array, temperature: Array, logits: Array, labels: Array) -> Array:
    del labels
    return kl(target_logits, logits, temperature)
