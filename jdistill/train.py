"""Training: one immutable state, one pure step, one host loop.

The step is compiled once an architecture: the temperature, the loss's weights and the learning
rate are data (`LossFn` is a pytree; optimisers made with `optax.inject_hyperparams` keep their
numbers in the state), so every generation at every temperature reuses it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdistill import _validate, data, losses, metrics, nets, parallel
from jdistill.typing import (
    ApplyFn,
    Array,
    ArrayLike,
    Batch,
    Callback,
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
        opt_state: the optimiser's state.
        key: PRNG key of the run; noise at a step comes from `fold_in(key, step)`.
    """

    step: Array
    params: PyTree
    model_state: PyTree
    opt_state: PyTree
    key: Array


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A training step `(state, batch, loss_fn) -> (state, metrics)`: a value that can be called.

    Equal steps share one compilation. Make one with `make_train_step`.

    Attributes:
        apply_fn: the network.
        optimizer: the optimiser.
        axis_name: the mapped axis to reduce over, or None.
    """

    apply_fn: ApplyFn
    optimizer: optax.GradientTransformation
    axis_name: str | None = None

    def __call__(
        self, state: TrainState, batch: Batch, loss_fn: LossFn
    ) -> tuple[TrainState, Metrics]:
        """One update on the batch; see `make_train_step`."""
        batch = _finite_padding(batch)
        num_rows = batch.mask.shape[0]
        # Keyed by position in the whole batch: with one key a device all of them would drop the
        # same units, and the result would depend on their number.
        positions = parallel.example_indices(num_rows, self.axis_name)
        step_key = jax.random.fold_in(state.key, state.step)
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, positions)

        def total_loss(params: PyTree) -> tuple[Array, tuple[Array, PyTree]]:
            logits, model_state = self.apply_fn(
                params, state.model_state, batch.inputs, train=True, key=keys
            )
            per_example = jnp.where(batch.mask > 0, loss_fn(logits, batch), 0.0)
            return jnp.sum(per_example * batch.mask), (logits, model_state)

        (loss, (logits, model_state)), gradient = jax.value_and_grad(total_loss, has_aux=True)(
            state.params
        )
        sums = {
            "loss": loss,
            "correct": jnp.sum(metrics.correct(logits, batch.labels) * batch.mask),
            "count": jnp.sum(batch.mask),
        }
        if self.axis_name is not None:
            # Sums over sums, never a mean of means: devices may hold different numbers of rows.
            sums, gradient = jax.lax.psum((sums, gradient), self.axis_name)
            model_state = jax.lax.pmean(model_state, self.axis_name)
        gradient = jax.tree.map(lambda leaf: leaf / jnp.maximum(sums["count"], 1), gradient)
        updates, opt_state = self.optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(state.step + 1, params, model_state, opt_state, state.key), sums


def make_train_step(
    apply_fn: ApplyFn, optimizer: optax.GradientTransformation, *, axis_name: str | None = None
) -> TrainStep:
    """A pure training step for a network and an optimiser.

    The gradient is of the mean loss over the batch's unmasked rows, over all devices. Padded rows
    count for nothing in it, whatever they hold. Batch statistics of the network's own (batch
    normalisation) do see them, and under `"pmap"` each device's rows alone, averaged afterwards.

    Args:
        apply_fn: the network, `jdistill.nets.apply_fn(model)` for one.
        optimizer: any optax optimiser.
        axis_name: the mapped axis to reduce over; `parallel.compile_step` sets it itself.

    Returns:
        The step, `(state, batch, loss_fn) -> (state, metrics)`. Metrics are sums over the batch:
        `loss`, `correct`, `count`.

    Example:
        >>> from jdistill import nets
        >>> model = nets.digits_net(width=0.25)
        >>> step = make_train_step(nets.apply_fn(model), sgd(0.1))
        >>> params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> state = create_state(step, params, jax.random.key(1))
        >>> batch = Batch(jnp.zeros((4, 8, 8, 1)), jnp.arange(4), None, jnp.ones(4))
        >>> state, sums = jax.jit(step)(state, batch, hard_loss())
        >>> int(state.step), float(sums["count"])
        (1, 4.0)
    """
    return TrainStep(apply_fn, optimizer, axis_name)


def create_state(
    step: TrainStep,
    params: PyTree,
    key: Array,
    *,
    model_state: PyTree | None = None,
    hyperparams: Mapping[str, ArrayLike] | None = None,
) -> TrainState:
    """A state at step 0, with a fresh optimiser.

    Args:
        step: whose optimiser starts.
        params: the initial weights.
        key: PRNG key of the run.
        model_state: None is `{}`.
        hyperparams: numbers to set in an optimiser made with `optax.inject_hyperparams`, such as
            `{"learning_rate": 0.1}`; they compile nothing.

    Returns:
        The state.

    Raises:
        ValueError: a hyperparameter that the optimiser does not have, or a key that is not a
            Threefry key (others draw differently on another number of devices).
    """
    key = _validate.prng_key(key)
    opt_state = step.optimizer.init(params)
    if hyperparams:
        known = getattr(opt_state, "hyperparams", {})
        unknown = sorted(set(hyperparams) - set(known))
        if unknown:
            raise ValueError(
                f"expected hyperparams among {sorted(known)}, got {unknown}; make the optimiser "
                "with optax.inject_hyperparams, as jdistill.train.sgd does"
            )
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
        logits, _ = self.apply_fn(params, model_state, inputs, train=False, key=None)
        return logits


def logits_fn(step: TrainStep, state: TrainState) -> LogitsFn:
    """The network that a state has trained so far, in evaluation mode.

    Args:
        step: the training step, which knows the network.
        state: its weights and model state (batch statistics and the like).

    Returns:
        A pytree that maps inputs `[B, ...]` to logits `[B, K]`; the weights are its leaves, so
        those of another state compile nothing.

    Example:
        >>> from jdistill import nets
        >>> model = nets.digits_net(width=0.25)
        >>> step = make_train_step(nets.apply_fn(model), sgd(0.1))
        >>> params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> network = logits_fn(step, create_state(step, params, jax.random.key(1)))
        >>> network(jnp.zeros((2, 8, 8, 1))).shape
        (2, 10)
    """
    return jax.tree_util.Partial(_Evaluation(step.apply_fn), state.params, state.model_state)


@functools.lru_cache(maxsize=64)  # equal settings give the same optimiser, hence equal steps
def sgd(
    learning_rate: float = 0.01, *, decay: float = 1e-6, momentum: float = 0.9
) -> optax.GradientTransformation:
    """Nesterov momentum SGD as Keras does it, the optimiser of the released recipe.

        lr_t = lr / (1 + decay · t)
        v ← momentum · v - lr_t · g
        w ← w + momentum · v - lr_t · g

    Args:
        learning_rate: above 0; a number in the optimiser's state, so that `create_state` can set
            it without a compilation.
        decay: per update, at least 0.
        momentum: in `[0, 1)`.

    Returns:
        The optimiser, with the injected hyperparameter `learning_rate`.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> optimizer = sgd(0.1)
        >>> state = optimizer.init(jnp.zeros(()))
        >>> update, state = optimizer.update(jnp.ones(()), state)
        >>> round(float(update), 4)  # -0.1 (1 + 0.9)
        -0.19

    References:
        Mandal & Gao 2023, released code `train_models.py`: lr 0.01, decay 1e-6, momentum 0.9.
    """
    _validate.positive(learning_rate=learning_rate)
    _validate.non_negative(decay=decay)
    _validate.within(0.0, 1.0, momentum=momentum)
    if momentum == 1:
        raise ValueError(f"expected momentum in [0, 1), got {momentum!r}; pass 0.9")

    def with_rate(learning_rate: float) -> optax.GradientTransformation:
        return optax.chain(
            # Before the momentum and not after it: Keras's velocity remembers each step's rate.
            optax.scale_by_schedule(lambda count: -learning_rate / (1 + decay * count)),
            optax.trace(decay=momentum, nesterov=True),
        )

    return optax.inject_hyperparams(with_rate)(learning_rate=learning_rate)


def fit(
    step: TrainStep,
    state: TrainState,
    examples: tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray | None],
    loss_fn: LossFn,
    *,
    num_epochs: int,
    batch_size: int = 128,
    mode: str = "jit",
    devices: Any = None,
    callback: Callback | None = None,
    stage: str = "train",
) -> TrainState:
    """Train a state to the end of an epoch, from wherever it stands.

    The order of each epoch is a permutation drawn from the state's key and the epoch's number,
    and the state counts its steps, so a run that is stopped and started again from any state it
    had gives the same result as one that was not.

    Args:
        step: the training step, not compiled.
        state: where to start; at step 0 or anywhere on the way.
        examples: `(inputs [N, ...], labels [N])`, or with `targets [N, K]` as a third; NumPy.
        loss_fn: `(logits, batch) -> [B]`.
        num_epochs: of the whole run, those already done included; at least 0.
        batch_size: examples a step over all devices; the last, smaller batch is padded and masked.
        mode: `"jit"` or `"pmap"`, see `parallel.compile_step`.
        devices: over which; None takes all.
        callback: called after every step with `event="step"`, and after every epoch with
            `event="epoch"`, each with `stage`, `step`, `num_steps`, `epoch` (counted from 1),
            `num_epochs` and `state`; an epoch's event also has the mean `loss` and `accuracy`
            over the epoch's batches (dropout on), as floats.
        stage: a name for the callback.

    Returns:
        The state after `num_epochs` epochs; unchanged if it is there already.

    Raises:
        ValueError: shapes that do not fit, labels outside `0..K-1`, values that are not finite,
            counts out of range.
        FloatingPointError: the loss of an epoch is not finite.
    """
    _validate.count(minimum=0, num_epochs=num_epochs)
    _validate.count(batch_size=batch_size)
    inputs, labels, targets = (*examples, None)[:3]
    num_examples = inputs.shape[0]
    _check_examples(step, state, inputs, labels, targets)
    steps_per_epoch = data.num_batches(num_examples, batch_size)
    num_steps = num_epochs * steps_per_epoch
    compiled = parallel.compile_step(step, mode, devices)
    seed = np.asarray(jax.random.key_data(state.key)).tolist()
    done = int(state.step)

    while done < num_steps:
        epoch, first = divmod(done, steps_per_epoch)
        order = data.epoch_order(seed, epoch, num_examples)
        sums: list[Metrics] = []
        for batch in data.batches(
            inputs, labels, targets, batch_size=batch_size, order=order, start=first
        ):
            state, batch_sums = compiled(state, batch, loss_fn)
            sums.append(batch_sums)
            done += 1
            progress = {
                "stage": stage,
                "step": done,
                "num_steps": num_steps,
                "epoch": epoch + 1,
                "num_epochs": num_epochs,
                "state": state,
            }
            if callback is not None:
                callback({"event": "step", **progress})
        # One transfer an epoch: the loop runs ahead of the device.
        sums = jax.device_get(sums)
        totals = {name: sum(float(entry[name]) for entry in sums) for name in sums[0]}
        loss = totals["loss"] / totals["count"]
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"expected a finite training loss, got {loss} in epoch {epoch + 1} of {stage}; "
                "lower the learning rate"
            )
        if callback is not None:
            accuracy = totals["correct"] / totals["count"]
            callback({"event": "epoch", **progress, "loss": loss, "accuracy": accuracy})
    return state


def _check_examples(
    step: TrainStep, state: TrainState, inputs: Any, labels: Any, targets: Any
) -> None:
    """What the loop could not see: a wrong label or row would train on silently, or as NaN."""
    num_examples = inputs.shape[0]
    if num_examples == 0:
        raise ValueError("expected at least one example, got none; pass inputs [N, ...]")
    num_classes = jax.eval_shape(logits_fn(step, state), inputs[:1]).shape[-1]
    _validate.class_indices(labels, batch_size=num_examples, num_classes=num_classes)
    if targets is not None and np.shape(targets) != (num_examples, num_classes):
        raise ValueError(
            f"expected targets of shape [N, K] = ({num_examples}, {num_classes}), got "
            f"{np.shape(targets)}; pass one row of class probabilities per example"
        )
    for name, values in (("inputs", inputs), ("targets", targets)):
        if values is not None and not (finite := np.isfinite(values)).all():
            row = int(np.argwhere(~finite)[0][0])
            raise ValueError(
                f"expected finite {name}, got nan or inf in row {row}; repair or remove it"
            )


def hard_loss(temperature: ArrayLike = 1.0) -> LossFn:
    """Cross-entropy of the labels at a temperature, as a loss function for the step.

    Args:
        temperature: above 0; carried as an array, so another one compiles nothing.

    Returns:
        `(logits [B, K], batch) -> [B]`, a pytree.

    Raises:
        ValueError: a temperature that is not above 0.

    Example:
        >>> batch = Batch(None, jnp.array([1]), None, jnp.ones(1))
        >>> float(hard_loss(20.0)(jnp.zeros((1, 2)), batch)[0])
        0.693...
    """
    _validate.positive(temperature=temperature)
    return jax.tree_util.Partial(_hard_loss, jnp.asarray(temperature, jnp.float32))


def _hard_loss(temperature: Array, logits: Array, batch: Batch) -> Array:
    return losses.cross_entropy(logits, batch.labels, temperature=temperature)


def make_eval_step(apply_fn: ApplyFn) -> Callable[[TrainState, Batch, LossFn], Metrics]:
    """A pure evaluation step: no dropout, no update, the same sums as the training step's.

    Args:
        apply_fn: the network.

    Returns:
        `(state, batch, loss_fn) -> metrics` with the sums `loss`, `correct` and `count`.
    """

    def step(state: TrainState, batch: Batch, loss_fn: LossFn) -> Metrics:
        logits, _ = apply_fn(state.params, state.model_state, batch.inputs, train=False, key=None)
        per_example = jnp.where(batch.mask > 0, loss_fn(logits, batch), 0.0)
        return {
            "loss": jnp.sum(per_example * batch.mask),
            "correct": jnp.sum(metrics.correct(logits, batch.labels) * batch.mask),
            "count": jnp.sum(batch.mask),
        }

    return step


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


@jax.jit
def _logits(logits_fn: LogitsFn, inputs: Array) -> Array:
    return logits_fn(inputs)


def predict(logits_fn: LogitsFn, inputs: np.ndarray, *, batch_size: int = 512) -> np.ndarray:
    """The logits of a whole set, in batches of one shape.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        inputs: `[N, ...]` float.
        batch_size: at least 1; the last batch is padded, and its padding dropped.

    Returns:
        `[N, K]` float, on the host.

    Example:
        >>> predict(lambda x: 2 * x, np.ones((3, 2), np.float32), batch_size=2).shape
        (3, 2)
    """
    _validate.count(batch_size=batch_size)
    logits_fn = nets.callable_logits_fn(logits_fn)
    rows = []
    for start in range(0, inputs.shape[0], batch_size):
        chunk = inputs[start : start + batch_size]
        size = chunk.shape[0]
        if size < batch_size and start > 0:
            chunk = np.concatenate([chunk, np.repeat(chunk[:1], batch_size - size, 0)])
        rows.append(np.asarray(_logits(logits_fn, chunk))[:size])
    return np.concatenate(rows)
