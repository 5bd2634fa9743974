"""The state that training changes, and the pure steps that change or measure it."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jdistill import _validate, losses, metrics, nets, parallel
from jdistill.typing import (
    ApplyFn,
    Array,
    ArrayLike,
    Batch,
    LogitsFn,
    LossFn,
    Metrics,
    PyTree,
)


class TrainState(NamedTuple):
    """Everything that changes in training, one pytree.

    Attributes:
        step: int32 scalar, updates made so far.
        params: the network's parameters.
        model_state: batch statistics and the like; `{}` where there are none.
        opt_state: the optimizer's state.
        key: PRNG key of the run; noise at a step comes from `fold_in(key, step)`.
    """

    step: Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    key: Array


# Augmentation: `(keys [B], inputs [B, ...]) -> inputs [B, ...]`, row i from key i alone.
Augment = Callable[[Array, Array], Array]
# `(apply_fn, params, model_state, batch, loss_fn, keys [B], axis_name)
# -> (loss [B], (outputs, model_state))`.
Objective = Callable[..., tuple[Array, tuple[Any, PyTree]]]
# `(gradient, key, axis_name) -> gradient` summed over the devices, the same on all of them.
Exchange = Callable[[PyTree, Array, str], PyTree]
# Folded into a step's key for the augmentation and for the exchange; no example of a batch has
# these numbers.
_AUGMENTED, _EXCHANGED = 2**31 - 2, 2**31 - 7


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A training step `(state, batch, loss_fn) -> (state, metrics)`: a value that can be called.

    Equal steps share one compilation. Make one with `make_train_step`.

    Attributes:
        apply_fn: the network.
        optimizer: the optimizer.
        axis_name: the mapped axis to reduce over, or None.
        augment: see `make_train_step`.
        objective: see `make_train_step`.
        exchange: see `make_train_step`.
    """

    apply_fn: ApplyFn
    optimizer: optax.GradientTransformation
    axis_name: str | None = None
    augment: Augment | None = None
    objective: Objective | None = None
    exchange: Exchange | None = None

    def __call__(
        self, state: TrainState, batch: Batch, loss_fn: LossFn
    ) -> tuple[TrainState, Metrics]:
        """One update on the batch; see `make_train_step`."""
        if self.exchange is not None and self.axis_name is None:
            raise ValueError(
                "expected an exchange of gradients over a mapped axis, got a step without one; "
                "compile it with mode='shard_map' or 'pmap', or leave exchange out"
            )
        batch = _finite_padding(batch)
        num_rows = batch.mask.shape[0]
        # Keyed by position in the whole batch: with one key a device all of them would drop the
        # same units, and the result would depend on their number.
        positions = parallel.example_indices(num_rows, self.axis_name)
        step_key = jax.random.fold_in(state.key, state.step)
        keys = _keys_at(step_key, positions)
        if self.augment is not None:
            augment_keys = _keys_at(jax.random.fold_in(step_key, _AUGMENTED), positions)
            batch = batch._replace(inputs=self.augment(augment_keys, batch.inputs))
        objective = _plain_objective if self.objective is None else self.objective
        apply_fn = _Pair(nets.fast_on_cpu(self.apply_fn))

        def total_loss(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
            per_example, (outputs, model_state) = objective(
                apply_fn, params, state.model_state, batch, loss_fn, keys, self.axis_name
            )
            per_example = jnp.where(batch.mask > 0, per_example, 0.0)
            return jnp.sum(per_example * batch.mask), (nets.logits_of(outputs), model_state)

        (loss, (logits, model_state)), gradient = jax.value_and_grad(total_loss, has_aux=True)(
            state.params
        )
        sums = _sums(loss, logits, batch)
        if self.axis_name is not None:
            # Sums over sums, never a mean of means: devices may hold different numbers of rows.
            sums = jax.lax.psum(sums, self.axis_name)
            gradient = self._exchanged(gradient, step_key, self.axis_name)
            model_state = jax.lax.pmean(model_state, self.axis_name)
        gradient = jax.tree.map(lambda leaf: leaf / jnp.maximum(sums["count"], 1), gradient)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, model_state, opt_state, state.key), sums

    def _exchanged(self, gradient: PyTree, step_key: Array, axis_name: str) -> PyTree:
        """The gradient summed over the devices."""
        if self.exchange is None:
            return jax.lax.psum(gradient, axis_name)
        found = self.exchange(gradient, jax.random.fold_in(step_key, _EXCHANGED), axis_name)
        shapes, expected = (jax.tree.map(jnp.shape, each) for each in (found, gradient))
        if shapes != expected:
            raise ValueError(
                f"expected exchange to return arrays of shapes {expected}, got {shapes}; return "
                "the sum over the devices, of the gradient's own form"
            )
        return found


def _keys_at(key: Array, positions: Array) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, positions)


def _plain_objective(
    apply_fn: ApplyFn,
    params: PyTree,
    model_state: PyTree,
    batch: Batch,
    loss_fn: LossFn,
    keys: Array,
    axis_name: str | None,
) -> tuple[Array, tuple[Any, PyTree]]:
    """The loss of the network's outputs."""
    del axis_name
    outputs, model_state = apply_fn(params, model_state, batch.inputs, train=True, key=keys)
    return loss_fn(outputs, batch), (outputs, model_state)


@dataclasses.dataclass(frozen=True)
class _Pair:
    """An `ApplyFn` that is held to what it must return."""

    apply_fn: ApplyFn

    def __call__(
        self, params: PyTree, model_state: PyTree, inputs: Array, *, train: bool, key: Array | None
    ) -> tuple[Any, PyTree]:
        found = self.apply_fn(params, model_state, inputs, train=train, key=key)
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(
                "expected apply_fn to return (outputs, model_state), got "
                f"{type(found).__name__}; return the model state too, {{}} where there is none"
            )
        return found


def make_train_step(
    apply_fn: ApplyFn,
    optimizer: optax.GradientTransformation,
    *,
    axis_name: str | None = None,
    augment: Augment | None = None,
    objective: Objective | None = None,
    exchange: Exchange | None = None,
) -> TrainStep:
    """A pure training step for a network and an optimizer.

    The gradient is of the mean loss over the batch's unmasked rows, over all devices. Padded rows
    count for nothing in it, whatever they hold. Batch statistics of the network's own (batch
    normalization) do see them, and under `"pmap"` and `"shard_map"` each device's rows alone,
    averaged afterwards.

    Args:
        apply_fn: the network, `jdistill.nets.apply_fn(model)` for one.
        optimizer: any optax optimizer; for large batches over many devices `optax.lars` or
            `optax.lamb`, whose steps have lengths in proportion to each array's own norm.
        axis_name: the mapped axis to reduce over; `parallel.compile_step` sets it itself.
        augment: `(keys [B], inputs [B, ...]) -> inputs`, compiled into the step; row i must depend
            on key and input i alone. Soft labels made beforehand are of the inputs as they are; an
            online teacher sees them augmented.
        objective: `(apply_fn, params, model_state, batch, loss_fn, keys [B], axis_name)
            -> (loss [B], (outputs, model_state))`, for losses that need the network itself, such
            as adversarial training; None is `loss_fn` of the network's outputs. Over a mapped axis
            it sees the rows of its own device.
        exchange: `(gradient, key, axis_name) -> gradient`, the sum over the devices, such as
            `parallel.quantized_psum()`; None is `jax.lax.psum`. For the modes `"shard_map"` and
            `"pmap"`, on any number of devices: in `"jit"` it is XLA that sums, and a step with an
            exchange is an error there. The key is the step's, the same on all devices.

    Returns:
        The step, `(state, batch, loss_fn) -> (state, metrics)`. Metrics are sums over the batch:
        `loss`, `correct`, `count`.

    Raises:
        ValueError: an `apply_fn` that does not take `train` and `key`, such as a module; no
            optimizer of optax; what is no function in the place of one.

    Example:
        >>> from jdistill import nets, train
        >>> model = nets.digits_net(width=0.25)
        >>> step = train.make_train_step(nets.apply_fn(model), train.sgd(0.1))
        >>> params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> state = train.create_state(step, params, jax.random.key(1))
        >>> batch = Batch(jnp.zeros((4, 8, 8, 1)), jnp.arange(4), None, jnp.ones(4))
        >>> state, sums = jax.jit(step)(state, batch, train.hard_loss())
        >>> int(state.step), float(sums["count"])
        (1, 4.0)

    References:
        You, Gitman & Ginsburg 2017, "Large Batch Training of Convolutional Networks" (LARS). You et
        al. 2020, "Large Batch Optimization for Deep Learning: Training BERT in 76 minutes" (LAMB).
        Zhang et al. 2022, "Distributed Adversarial Training to Robustify Deep Neural Networks at
        Scale": LAMB, adversarial examples from each device's own rows, and gradients of 8 bits.
    """
    _check_apply_fn(apply_fn)
    _validate.instance(
        optax.GradientTransformation,
        "an optax optimizer",
        remedy="pass train.sgd() or one of optax",
        optimizer=optimizer,
    )
    _check_axis_name(axis_name)
    if augment is not None:
        _validate.function(augment=augment)
    if objective is not None:
        _validate.function(objective=objective)
    if exchange is not None:
        remedy = "pass parallel.quantized_psum()"
        _validate.function(exchange=exchange, remedy=remedy)
    return TrainStep(apply_fn, optimizer, axis_name, augment, objective, exchange)


def _check_apply_fn(apply_fn: Any) -> None:
    """An error for what is no `ApplyFn`, such as a module."""
    remedy = "pass jdistill.nets.apply_fn(model)"
    _validate.function(apply_fn=apply_fn, remedy=remedy)
    try:
        parameters = inspect.signature(apply_fn).parameters
    except (TypeError, ValueError):  # a callable that does not say
        return
    anything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    missing = [name for name in ("train", "key") if name not in parameters]
    if missing and not anything:
        raise ValueError(
            "expected apply_fn(params, model_state, inputs, *, train, key), got "
            f"{type(apply_fn).__name__} without `{missing[0]}`; {remedy}"
        )


def _check_axis_name(axis_name: str | None) -> None:
    if axis_name is not None:
        _validate.text(axis_name=axis_name)


def check_hyperparams(hyperparams: Mapping[str, ArrayLike]) -> None:
    """An error for a learning rate that is not above 0, or a decay below 0."""
    _validate.mapping(hyperparams=hyperparams)
    for name, value in hyperparams.items():
        if name == "learning_rate":
            _validate.positive(learning_rate=value)
        if name == "decay":
            _validate.non_negative(decay=value)


def check_step(step: TrainStep) -> None:
    """An error for what is no training step."""
    remedy = "make one: train.make_train_step"
    _validate.instance(TrainStep, "a TrainStep", remedy=remedy, step=step)


def check_state(state: TrainState, name: str = "state") -> None:
    """An error for what is no training state."""
    remedy = "make one: create_state"
    _validate.instance(TrainState, "a TrainState", remedy=remedy, **{name: state})


def create_state(
    step: TrainStep,
    params: PyTree,
    key: Array,
    *,
    model_state: PyTree | None = None,
    hyperparams: Mapping[str, ArrayLike] | None = None,
) -> TrainState:
    """A state at step 0, with a fresh optimizer.

    Args:
        step: whose optimizer starts.
        params: the initial weights.
        key: PRNG key of the run.
        model_state: None is `{}`.
        hyperparams: numbers to set in an optimizer made with `optax.inject_hyperparams`, such as
            `{"learning_rate": 0.1}`; they compile nothing.

    Returns:
        The state.

    Raises:
        ValueError: a hyperparameter that the optimizer does not have, a learning rate that is not
            above 0, a decay below 0, or a key that is not a Threefry key (others draw differently
            on another number of devices).

    Example:
        >>> import flax.linen as nn
        >>> from jdistill import nets, train
        >>> step = train.make_train_step(nets.apply_fn(nn.Dense(2)), train.sgd(0.5))
        >>> params, _ = nets.init(nn.Dense(2), jax.random.key(0), (4,))
        >>> state = train.create_state(
        ...     step, params, jax.random.key(1), hyperparams={"learning_rate": 0.1})
        >>> int(state.step), round(float(state.opt_state.hyperparams["learning_rate"]), 3)
        (0, 0.1)
    """
    check_step(step)
    _validate.arrays(params=params)
    if model_state:
        _validate.arrays(model_state=model_state)
    key = _validate.prng_key(key)
    _validate.rank(0, key=key)
    opt_state = step.optimizer.init(params)
    if hyperparams is not None:
        check_hyperparams(hyperparams)
    if hyperparams:
        known = getattr(opt_state, "hyperparams", {})
        unknown = sorted(set(hyperparams) - set(known))
        if unknown:
            raise ValueError(
                f"expected hyperparams among {sorted(known)}, got {unknown}; make the optimizer "
                "with optax.inject_hyperparams, as jdistill.train.sgd does"
            )
        _validate.scalar(**hyperparams)
        values = {
            name: jnp.asarray(value, known[name].dtype) for name, value in hyperparams.items()
        }
        opt_state = opt_state._replace(hyperparams=known | values)
    model_state = {} if model_state is None else model_state
    return TrainState(jnp.zeros((), jnp.int32), params, model_state, opt_state, key)


@dataclasses.dataclass(frozen=True)
class _Evaluation:
    """`apply_fn` in evaluation mode; equal networks compare equal, so they share a trace."""

    apply_fn: ApplyFn

    def __call__(self, params: PyTree, model_state: PyTree, inputs: Array) -> Array:
        return nets.logits_of(_Outputs(self.apply_fn)(params, model_state, inputs))


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """Likewise, with all outputs."""

    apply_fn: ApplyFn

    def __call__(self, params: PyTree, model_state: PyTree, inputs: Array) -> Any:
        apply_fn = _Pair(nets.fast_on_cpu(self.apply_fn))
        outputs, _ = apply_fn(params, model_state, inputs, train=False, key=None)
        return outputs


def logits_fn(step: TrainStep, state: TrainState) -> LogitsFn:
    """The network that a state has trained so far, in evaluation mode.

    Args:
        step: the training step, which knows the network.
        state: its weights and model state (batch statistics and the like).

    Returns:
        A pytree that maps inputs `[B, ...]` to logits `[B, K]`; the weights are its leaves, so
        those of another state compile nothing.

    Example:
        >>> from jdistill import nets, train
        >>> model = nets.digits_net(width=0.25)
        >>> step = train.make_train_step(nets.apply_fn(model), train.sgd(0.1))
        >>> params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> network = train.logits_fn(step, train.create_state(step, params, jax.random.key(1)))
        >>> network(jnp.zeros((2, 8, 8, 1))).shape
        (2, 10)
    """
    check_step(step)
    check_state(state)
    return jax.tree_util.Partial(_Evaluation(step.apply_fn), state.params, state.model_state)


def outputs_fn(step: TrainStep, state: TrainState) -> Any:
    """The network that a state has trained so far, with all its outputs, in evaluation mode.

    Args:
        step: the training step, which knows the network.
        state: its weights and model state.

    Returns:
        A pytree as that of `logits_fn`, which maps inputs `[B, ...]` to what the network returns:
        logits `[B, K]`, or a pytree with them and others, such as features.

    Example:
        >>> from jdistill import nets, train
        >>> step = train.make_train_step(nets.apply_fn(nets.digits_net(0.25)), train.sgd(0.1))
        >>> params, _ = nets.init(nets.digits_net(0.25), jax.random.key(0), (8, 8, 1))
        >>> network = train.outputs_fn(step, train.create_state(step, params, jax.random.key(1)))
        >>> network(jnp.zeros((2, 8, 8, 1))).shape
        (2, 10)
    """
    check_step(step)
    check_state(state)
    return jax.tree_util.Partial(_Outputs(step.apply_fn), state.params, state.model_state)


@dataclasses.dataclass(frozen=True)
class EvalStep:
    """An evaluation step `(state, batch, loss_fn) -> (state, metrics)`; the state comes back as is.

    Attributes:
        apply_fn: the network.
        axis_name: the mapped axis to sum over, or None.
    """

    apply_fn: ApplyFn
    axis_name: str | None = None

    def __call__(
        self, state: TrainState, batch: Batch, loss_fn: LossFn
    ) -> tuple[TrainState, Metrics]:
        """The sums of the batch; see `make_eval_step`."""
        outputs, _ = _Pair(nets.fast_on_cpu(self.apply_fn))(
            state.params, state.model_state, batch.inputs, train=False, key=None
        )
        per_example = jnp.where(batch.mask > 0, loss_fn(outputs, batch), 0.0)
        sums = _sums(jnp.sum(per_example * batch.mask), nets.logits_of(outputs), batch)
        return state, sums if self.axis_name is None else jax.lax.psum(sums, self.axis_name)


def make_eval_step(apply_fn: ApplyFn, *, axis_name: str | None = None) -> EvalStep:
    """A pure evaluation step: no dropout, no update, the same sums as the training step's.

    It has the training step's signature, so `parallel.compile_step` compiles it as well.

    Args:
        apply_fn: the network, `jdistill.nets.apply_fn(model)` for one.
        axis_name: the mapped axis to sum over; `parallel.compile_step` sets it itself.

    Returns:
        The step, `(state, batch, loss_fn) -> (state, metrics)` with the sums `loss`, `correct`
        and `count` over the batch's unmasked rows.

    Example:
        >>> from jdistill import nets, train
        >>> model = nets.digits_net(width=0.25)
        >>> apply_fn = nets.apply_fn(model)
        >>> params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> step = train.make_train_step(apply_fn, train.sgd(0.1))
        >>> state = train.create_state(step, params, jax.random.key(1))
        >>> batch = Batch(jnp.zeros((4, 8, 8, 1)), jnp.arange(4), None, jnp.ones(4))
        >>> _, sums = jax.jit(train.make_eval_step(apply_fn))(state, batch, train.hard_loss())
        >>> float(sums["count"])
        4.0
    """
    _check_apply_fn(apply_fn)
    _check_axis_name(axis_name)
    return EvalStep(apply_fn, axis_name)


def _sums(loss: Array, logits: Array, batch: Batch) -> Metrics:
    """Sums over the batch's unmasked rows."""
    return {
        "loss": loss,
        "correct": jnp.sum(metrics.correct(logits, batch.labels) * batch.mask),
        "count": jnp.sum(batch.mask),
    }


def hard_loss(temperature: ArrayLike = 1.0) -> LossFn:
    """Cross-entropy of the labels at a temperature, as a loss function for the step.

    Args:
        temperature: above 0; carried as an array, so another one compiles nothing.

    Returns:
        `(outputs, batch) -> [B]`, a pytree.

    Raises:
        ValueError: a temperature that is not above 0.

    Example:
        >>> batch = Batch(None, jnp.array([1]), None, jnp.ones(1))
        >>> float(hard_loss(20.0)(jnp.zeros((1, 2)), batch)[0])
        0.693...
    """
    _validate.positive(temperature=temperature)
    return jax.tree_util.Partial(_hard_loss, jnp.asarray(temperature, jnp.float32))


def _hard_loss(temperature: Array, outputs: Any, batch: Batch) -> Array:
    logits = nets.logits_of(outputs)
    return losses.cross_entropy(logits, batch.labels, temperature=temperature)


def _finite_padding(batch: Batch) -> Batch:
    """The batch with 0 for what is not finite in padded rows.

    A mask on the loss is not enough: its gradient there is 0, and 0 times NaN is NaN.
    """

    def repair(values: Array) -> Array:
        real = batch.mask.reshape((-1,) + (1,) * (values.ndim - 1)) > 0
        return jnp.where(real | jnp.isfinite(values), values, jnp.zeros_like(values))

    return batch._replace(
        inputs=repair(batch.inputs),
        targets=None if batch.targets is None else repair(batch.targets),
    )
