"""Mixup as a training objective: student and teacher see one mixed view."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jdistill import _validate
from jdistill.typing import ApplyFn, Array, Batch, LossFn, PyTree

# Folded into an example's key for its λ, so that dropout, which has the key itself, is not tied
# to it.
_MIXED = 2**31 - 3


@dataclasses.dataclass(frozen=True)
class Mixup:
    """Mixup as an objective for `make_train_step`, equal by value; make one with `mixup`.

    Attributes:
        alpha: of the distribution that the shares are drawn from.
    """

    alpha: float

    def __call__(
        self,
        apply_fn: ApplyFn,
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        loss_fn: LossFn,
        keys: Array,
        axis_name: str | None = None,
    ) -> tuple[Array, tuple[Any, PyTree]]:
        """The loss of the mixed views `[B]`, with the outputs on them and the model state."""
        del axis_name
        shares = _shares(keys, self.alpha)
        others = jax.tree.map(lambda leaf: leaf[_partners(batch.mask)], batch)
        inputs = _mix(batch.inputs, others.inputs, shares)
        outputs, model_state = apply_fn(params, model_state, inputs, train=True, key=keys)

        def loss(labels: Array, targets: Array | None) -> Array:
            return loss_fn(outputs, Batch(inputs, labels, targets, batch.mask))

        # Mapped over the labels alone: what looks at the inputs, such as an online teacher, is
        # computed once.
        labels, targets = jax.tree.map(
            lambda *both: jnp.stack(both),
            (batch.labels, batch.targets),
            (others.labels, others.targets),
        )
        own, its = jax.vmap(loss)(labels, targets)
        return shares * own + (1 - shares) * its, (outputs, model_state)


def mixup(alpha: float = 1.0) -> Mixup:
    """Mixup, with one view for teacher and student ("function matching").

    Each example is mixed with another::

        x̃ = λ x_i + (1 - λ) x_j,    λ ~ Beta(α, α)
        loss_i = λ loss(outputs(x̃), y_i, q_i) + (1 - λ) loss(outputs(x̃), y_j, q_j)

    where j is the next real example of the batch, and the first one for the last; an epoch's order
    is random, and so is the pair. Each example draws its own λ, by its own key. The loss gets the
    mixed view as `batch.inputs`, so an online teacher (`distill.online_loss`) labels what the
    student sees, and then the labels matter as far as the loss asks for them. Soft labels made
    beforehand are mixed as the hard ones are.

    Padding is mixed with nothing, and nothing with it. A batch of one example stays as it is. The
    step mixes what its `augment` has made. The accuracy that training reports is the share of
    mixed views that are classified as `y_i`, which for most λ below a half is not to be expected:
    it says little, and is no accuracy on examples.

    Under `"pmap"` each device pairs its own rows: the result then depends on the number of devices,
    and under `"jit"` and in a sweep it does not.

    Args:
        alpha: α, above 0: 1 draws λ uniformly, as function matching does, and less mixes less.
            Static, since an objective is a part of the training step: another one compiles it anew.

    Returns:
        An objective for `make_train_step`, equal to those with the same `alpha`.

    Raises:
        ValueError: a number that is not above 0, or one that is traced.

    Example:
        >>> from jdistill import nets, train
        >>> model = nets.digits_net(width=0.25)
        >>> step = train.make_train_step(
        ...     nets.apply_fn(model), train.sgd(0.1), objective=train.mixup(1.0)
        ... )
        >>> step.objective
        Mixup(alpha=1.0)

    References:
        Zhang, Cissé, Dauphin & Lopez-Paz 2018, "mixup: Beyond Empirical Risk Minimization", section
        2; its code draws one λ a batch. Beyer, Zhai, Royer, Markeeva, Anil & Kolesnikov 2022,
        "Knowledge distillation: A good teacher is patient and consistent", section 3.
    """
    if _validate.is_traced(alpha):
        raise ValueError(
            "expected alpha to be a number, got a traced value; an objective is static: make it "
            "outside jit and vmap"
        )
    _validate.scalar(alpha=alpha)
    _validate.positive(alpha=alpha)
    return Mixup(float(alpha))


def _shares(keys: Array, alpha: float) -> Array:
    """λ of each example, `[B]`."""
    keys = jax.vmap(lambda key: jax.random.fold_in(key, _MIXED))(keys)
    return jax.vmap(lambda key: jax.random.beta(key, alpha, alpha))(keys)


def _partners(mask: Array) -> Array:
    """The next real row after each real one, around the end; padding has itself. `[B]` int."""
    places = jnp.arange(mask.shape[0])
    real = mask > 0
    from_here = jax.lax.cummin(jnp.where(real, places, mask.shape[0]), reverse=True)
    after = jnp.append(from_here[1:], mask.shape[0])
    return jnp.where(real, jnp.where(after < mask.shape[0], after, from_here[0]), places)


def _mix(inputs: Array, others: Array, shares: Array) -> Array:
    shares = shares.astype(inputs.dtype).reshape((-1,) + (1,) * (inputs.ndim - 1))
    return shares * inputs + (1 - shares) * others
