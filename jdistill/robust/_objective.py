"""The objective of adversarial training: clean and adversarial inputs in one step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jdistill import _validate, attacks, nets
from jdistill.typing import ApplyFn, Array, Batch, LogitsFn, LossFn, PyTree

# Folded into an example's key for what the attack draws, and for the dropout of the adversarial
# pass; that of the clean pass has the key itself, as without an attack.
_CRAFTED, _ADVERSARIAL = 2**31 - 4, 2**31 - 5
# `(student, batch, loss_fn) -> (network, loss)`: the attack climbs `loss(network(x), labels)`.
Inner = Callable[[LogitsFn, Batch, LossFn], tuple[LogitsFn, Callable[[Array, Array], Array]]]


class Outputs(NamedTuple):
    """What a loss gets from `adversarial`, in the place of the student's outputs.

    Attributes:
        logits: `[B, K]`, on the clean inputs.
        adversarial_logits: `[B, K]`, on the adversarial ones.
        adversarial_inputs: `[B, ...]`, without a gradient.
    """

    logits: Array
    adversarial_logits: Array
    adversarial_inputs: Array


@dataclasses.dataclass(frozen=True)
class Adversarial:
    """The objective that `adversarial` makes.

    Attributes:
        attack: see there.
        inner: likewise.
    """

    attack: Callable[..., Any]
    inner: Inner | None = None

    def __call__(
        self,
        apply_fn: ApplyFn,
        params: PyTree,
        model_state: PyTree,
        batch: Batch,
        loss_fn: LossFn,
        keys: Array,
    ) -> tuple[Array, tuple[Any, PyTree]]:
        """The loss `[B]`, with the outputs and the model state."""
        # Without a gradient, or the whole attack would be differentiated for nothing.
        weights = jax.lax.stop_gradient((params, model_state))
        network: LogitsFn = jax.tree_util.Partial(_Student(apply_fn), *weights)
        settings = {}
        if self.inner is not None:
            network, settings["loss"] = self.inner(network, batch, loss_fn)
        inputs = attacks.maximize(
            self.attack, network, _folded(keys, _CRAFTED), batch.inputs, batch.labels, **settings
        )
        attacked, model_state = apply_fn(
            params, model_state, inputs, train=True, key=_folded(keys, _ADVERSARIAL)
        )
        clean, model_state = apply_fn(params, model_state, batch.inputs, train=True, key=keys)
        outputs = Outputs(nets.logits_of(clean), nets.logits_of(attacked), inputs)
        return loss_fn(outputs, batch), (outputs, model_state)


def adversarial(attack: Callable[..., Any], *, inner: Inner | None = None) -> Adversarial:
    """The objective of adversarial training and of robust distillation, for `make_train_step`.

        x' = argmax loss_inner(z(x'), y) over the ball,    loss = loss_fn((z(x), z(x'), x'), batch)

    In each step the attack runs against the student as it is, in evaluation mode (running batch
    statistics, no dropout), and no gradient flows through it. Then the student sees the adversarial
    inputs, and after them the clean ones, both in training mode and each normalized by its own
    batch statistics. Both passes update the running statistics, one after the other, so these are
    of either kind of input, the clean ones last. What the two drop is drawn apart.

    The loss gets `Outputs` and the batch as it is; `on_adversarial` and `two_teachers_loss` are
    made for them, and a loss of plain logits sees the clean ones. Accuracy in training is on the
    clean inputs.

    Args:
        attack: a fixed-budget attack with its settings bound that `attacks.maximize` takes, such as
            `functools.partial(attacks.pgd, eps=0.1, num_steps=10)`. All its steps are taken for
            each example. Its `bounds` must hold the inputs, augmented ones too. Static, with its
            numbers: another one compiles the step anew, and so does an equal partial made again.
        inner: what the attack climbs: `(student, batch, loss_fn) -> (network, loss)`, where the
            attack then maximizes `loss(network(x), labels)`, given the student as a `LogitsFn`, the
            batch, and the loss of the step, which may hold a teacher. The network is the student
            for most, and the loss may hold arrays of the batch, as a `jax.tree_util.Partial`: the
            divergence from `student(batch.inputs)` is that of TRADES. None is the attack's own
            loss, cross-entropy with the labels for PGD, on the student.

    Returns:
        The objective, a value: equal for the same attack and inner.

    Raises:
        ValueError: what cannot be called; and from the step, an attack that is not of this kind.

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
        2.1. The order of the passes and their modes are those of the released code of Zhao et al.
        2022, "Enhanced Accuracy and Robustness via Multi-Teacher Adversarial Distillation".
    """
    _validate.function(attack=attack, remedy="pass an attack such as jdistill.attacks.pgd")
    if inner is not None:
        _validate.function(inner=inner)
    return Adversarial(attack, inner)


@dataclasses.dataclass(frozen=True)
class _Student:
    """Logits of the network in evaluation mode; equal for equal networks."""

    apply_fn: ApplyFn

    def __call__(self, params: PyTree, model_state: PyTree, inputs: Array) -> Array:
        outputs, _ = self.apply_fn(params, model_state, inputs, train=False, key=None)
        return nets.logits_of(outputs)


def _folded(keys: Array, number: int) -> Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)
