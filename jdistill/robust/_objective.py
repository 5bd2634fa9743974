"""The objective of adversarial training: clean and adversarial inputs in one step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdistill import _validate, attacks, nets
from jdistill.typing import ApplyFn, Array, Batch, LogitsFn, LossFn, PyTree

# Folded into an example's key for what the attack draws, and for the dropout of the passes on
# adversarial and on reflected inputs; that of the clean pass has the key itself, as without an
# attack.
_CRAFTED, _ADVERSARIAL, _REFLECTED = 2**31 - 4, 2**31 - 5, 2**31 - 6


class Outputs(NamedTuple):
    """Outputs that a loss gets from `adversarial`, in the place of the student's alone.

    Attributes:
        logits: `[B, K]`, on the clean inputs x.
        adversarial_logits: `[B, K]`, on the adversarial ones x + δ.
        adversarial_inputs: `[B, ...]`, without a gradient.
        reflected_logits: `[B, K]`, on x - δ, for losses with `reflected = True`; else None.
        axis_name: the mapped axis that the batch is split over; None where the rows are all.

    Example:
        >>> from jdistill import losses
        >>> def clean_and_robust(outputs: Outputs, batch: Batch):  # a loss for `adversarial`
        ...     of = lambda logits: losses.cross_entropy(logits, batch.labels)
        ...     return of(outputs.logits) + of(outputs.adversarial_logits)
        >>> x, z = jnp.zeros((1, 3)), jnp.zeros((1, 2))
        >>> batch = Batch(x, jnp.array([0]), targets=None, mask=jnp.ones(1))
        >>> round(float(clean_and_robust(Outputs(z, z, x), batch)[0]), 3)
        1.386
    """

    logits: Array
    adversarial_logits: Array
    adversarial_inputs: Array
    reflected_logits: Array | None = None
    axis_name: str | None = None


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """The objective that `adversarial` makes.

    Attributes:
        attack: see `adversarial`.
        weight_perturbation: see `adversarial`.
    """

    attack: Callable[..., Any]
    weight_perturbation: float = 0.0

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
        """The loss `[B]`, with the outputs and the model state."""
        # Without a gradient, or the whole attack would be differentiated for nothing.
        weights = jax.lax.stop_gradient((params, model_state))
        network: LogitsFn = jax.tree_util.Partial(_Student(apply_fn), *weights)
        settings = {}
        inner = getattr(loss_fn, "inner", None)
        if inner is not None:
            network, climbed = inner(network, batch)
            if climbed is not None:
                _check_free(self.attack)
                settings["loss"] = climbed
        inputs = attacks.maximize(
            self.attack, network, _folded(keys, _CRAFTED), batch.inputs, batch.labels, **settings
        )

        def loss(params: PyTree) -> tuple[Array, tuple[Outputs, PyTree]]:
            # The clean pass is the last one, and so the one that training reports.
            state = model_state
            attacked, state = apply_fn(
                params, state, inputs, train=True, key=_folded(keys, _ADVERSARIAL)
            )
            reflected = None
            if getattr(loss_fn, "reflected", False):
                reflected, state = apply_fn(
                    params,
                    state,
                    2 * batch.inputs - inputs,
                    train=True,
                    key=_folded(keys, _REFLECTED),
                )
                reflected = nets.logits_of(reflected)
            clean, state = apply_fn(params, state, batch.inputs, train=True, key=keys)
            logits, adversarial_logits = nets.logits_of(clean), nets.logits_of(attacked)
            outputs = Outputs(logits, adversarial_logits, inputs, reflected, axis_name)
            return loss_fn(outputs, batch), (outputs, state)

        if self.weight_perturbation:
            # What is added has no gradient itself, so that the step's is that of the loss there.
            perturbation = self._perturbation(loss, weights[0], batch, axis_name)
            params = jax.tree.map(jnp.add, params, perturbation)
        return loss(params)

    def _perturbation(
        self,
        loss: Callable[[PyTree], tuple[Array, Any]],
        params: PyTree,
        batch: Batch,
        axis_name: str | None,
    ) -> PyTree:
        """A step up the loss, in each kernel as long as a share of the kernel's norm."""

        def total(params: PyTree) -> Array:
            return jnp.sum(jnp.where(batch.mask > 0, loss(params)[0], 0.0) * batch.mask)

        gradient = jax.grad(total)(params)
        if axis_name is not None:
            gradient = jax.lax.psum(gradient, axis_name)

        def scaled(leaf: Array, direction: Array) -> Array:
            if leaf.ndim < 2:  # biases, and the scales of normalizations
                return jnp.zeros_like(leaf)
            length = jnp.sqrt(jnp.sum(direction**2))
            # A gradient of 0 has no direction.
            unit = direction / jnp.where(length > 0, length, 1.0)
            return self.weight_perturbation * jnp.sqrt(jnp.sum(leaf**2)) * unit

        return jax.tree.map(scaled, params, gradient)


def adversarial(attack: Callable[..., Any], *, weight_perturbation: float = 0.0) -> Adversarial:
    """The objective of adversarial training and of robust distillation, for `make_train_step`.

    With `x'` the adversarial example::

        x' = argmax inner loss over the ball around x,    loss = loss_fn((z(x), z(x'), x'), batch)

    In each step the attack runs against the student as it is, in evaluation mode (running batch
    statistics, no dropout), and no gradient flows through it. Then the student sees the adversarial
    inputs, and after them the clean ones, both in training mode and each normalized by its own
    batch statistics. All passes update the running statistics, one after the other, so these are
    of either kind of input, the clean ones last. What the passes drop is drawn apart.

    The loss gets `Outputs` and the batch as it is; the losses of this module are made for them, and
    a loss of plain logits sees the clean ones. Accuracy in training is on the clean inputs. A loss
    that is an object may also say

    * what the attack climbs, as a method `inner(student, batch) -> (network, loss)`: the attack
      then maximizes `loss(network(x), labels)`, given the student as a `LogitsFn`. The network is
      the student for most, and the loss may hold arrays of the batch, as a
      `jax.tree_util.Partial`. Without the method, or for a loss of None, it is the attack's own:
      cross-entropy with the labels.
    * `reflected = True`: it wants the student's logits on x - δ as well, where x' = x + δ.

    Args:
        attack: a fixed-budget attack with its settings bound that `attacks.maximize` takes, such as
            `functools.partial(attacks.pgd, eps=0.1, num_steps=10)`. All its steps are taken for
            each example. Its `bounds` must hold the inputs, augmented ones too. Static, with its
            numbers: another one compiles the step anew, and so does an equal partial made again.
            One step of 1.25 · eps from a random start is fast adversarial training.
        weight_perturbation: γ of adversarial weight perturbation (AWP), at least 0; 0 is without.
            The loss is taken at weights moved up its own gradient, each kernel by γ times its norm,
            and the gradient there updates the weights as they were. It takes one pass more, and
            over devices a sum in float32 of its own, whatever the `exchange` of the step. Static.

    Returns:
        The objective, a value: equal for the same attack and perturbation.

    Raises:
        ValueError: what cannot be called, or a perturbation below 0; and from the step, an attack
            that is not of this kind, or one with a loss bound where the training loss has its own.

    Example:
        >>> import functools
        >>> from jdistill import attacks, nets, robust, train
        >>> attack = functools.partial(attacks.pgd, eps=0.1, num_steps=10)
        >>> step = train.make_train_step(
        ...     nets.apply_fn(nets.digits_net()),
        ...     train.sgd(0.05),
        ...     objective=robust.adversarial(attack),
        ... )
        >>> step.objective.attack.keywords["eps"]
        0.1

    References:
        Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks", equation
        2.1. Wong, Rice & Kolter 2020, "Fast is better than free: Revisiting adversarial training",
        algorithm 3. Wu, Xia & Wang 2020, "Adversarial Weight Perturbation Helps Robust
        Generalization", algorithm 1, with one step of A = 1; its released code starts after some
        epochs without. The order of the passes and their modes are those of the released code of
        Zhao et al. 2022, "Enhanced Accuracy and Robustness via Multi-Teacher Adversarial
        Distillation".
    """
    _validate.function(attack=attack, remedy="pass an attack such as jdistill.attacks.pgd")
    if _validate.is_traced(weight_perturbation):
        raise ValueError(
            "expected weight_perturbation to be a number, got a traced value; an objective is "
            "static: make it outside jit and vmap"
        )
    _validate.scalar(weight_perturbation=weight_perturbation)
    _validate.non_negative(weight_perturbation=weight_perturbation)
    return Adversarial(attack, float(weight_perturbation))


def _check_free(attack: Callable[..., Any]) -> None:
    """An error for an attack that cannot climb the loss of training, or has its own bound."""
    found = attacks.traits(attack)
    if "loss" not in found.settings:
        raise ValueError(
            f"expected an attack that takes a loss, got {found.title}; pass one such as "
            "attacks.pgd, since the training loss says what the attack climbs"
        )
    if "loss" in getattr(attack, "keywords", {}):
        raise ValueError(
            f"expected an attack without a loss of its own, got {found.title}; leave loss out, "
            "since the training loss says what the attack climbs"
        )


@dataclasses.dataclass(frozen=True)
class _Student:
    """Logits of the network in evaluation mode; equal for equal networks."""

    apply_fn: ApplyFn

    def __call__(self, params: PyTree, model_state: PyTree, inputs: Array) -> Array:
        outputs, _ = self.apply_fn(params, model_state, inputs, train=False, key=None)
        return nets.logits_of(outputs)


def _folded(keys: Array, number: int) -> Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
