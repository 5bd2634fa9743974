"""The host loop over epochs, and predictions for a whole set."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jdistill import _validate, data, nets, parallel
from jdistill._jax import call, full_precision, logits_shape
from jdistill.train._step import TrainState, TrainStep, check_state, check_step, logits_fn
from jdistill.typing import Callback, Event, LogitsFn, LossFn, Metrics


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
        mode: `"jit"`, `"shard_map"`, or `"pmap"`, see `parallel.compile_step`.
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

    Example:
        >>> import flax.linen as nn
        >>> from jdistill import train
        >>> model = nn.Dense(2)
        >>> step = train.make_train_step(nets.apply_fn(model), train.sgd(0.5))
        >>> params, _ = nets.init(model, jax.random.key(0), (2,))
        >>> state = train.create_state(step, params, jax.random.key(1))
        >>> inputs, labels = np.eye(2, dtype=np.float32), np.arange(2)
        >>> state = train.fit(step, state, (inputs, labels), train.hard_loss(), num_epochs=20)
        >>> train.predict(train.logits_fn(step, state), inputs).argmax(axis=1).tolist()
        [0, 1]
    """
    _validate.count(minimum=0, num_epochs=num_epochs)
    _validate.count(batch_size=batch_size)
    check_step(step)
    check_state(state)
    _validate.function(loss_fn=loss_fn)
    _validate.callback(callback)
    _validate.text(stage=stage)
    inputs, labels, targets = _validate.examples(examples, 3)
    check_examples(step, state, inputs, labels, targets)
    seed = np.asarray(jax.random.key_data(state.key)).tolist()
    if jax.process_count() > 1:
        _check_hosts(
            {"inputs": inputs, "labels": labels, "targets": targets, "key": seed},
            state,
            loss_fn,
            devices,
            num_epochs=int(num_epochs),
            batch_size=int(batch_size),
            mode=mode,
        )
    num_examples = len(inputs)
    steps_per_epoch = data.num_batches(num_examples, batch_size)
    num_steps = num_epochs * steps_per_epoch
    compiled = parallel.compile_step(step, mode, devices)
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
            progress: Event = {
                "event": "step",
                "stage": stage,
                "step": done,
                "num_steps": num_steps,
                "epoch": epoch + 1,
                "num_epochs": num_epochs,
                "state": state,
            }
            if callback is not None:
                callback(progress)
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
            callback({**progress, "event": "epoch", "loss": loss, "accuracy": accuracy})
    return state


def _check_hosts(
    columns: dict[str, Any],
    state: TrainState,
    loss_fn: LossFn,
    devices: Sequence[jax.Device] | None,
    **options: Any,
) -> None:
    """Check that hosts agree; where they differ, each would train other weights, or hang."""
    chosen = jax.devices() if devices is None else devices
    if all(device.process_index == jax.process_index() for device in chosen):
        return  # on its own, it need not agree with anybody
    parallel.check_same(
        **options,
        devices=[device.id for device in chosen],
        **columns,
        state=jax.tree.leaves(parallel.local(state)),
        loss=parallel.local(loss_fn),
    )


def check_examples(
    step: TrainStep, state: TrainState, inputs: Any, labels: Any, targets: Any
) -> None:
    """Refuse wrong labels and rows, with which the loop would train on silently, or as NaN."""
    _validate.inputs_in_box(inputs, (-np.inf, np.inf))
    inputs = np.asarray(inputs)
    num_examples = inputs.shape[0]
    if num_examples == 0:
        raise ValueError("expected at least one example, got none; pass inputs [N, ...]")
    num_classes = logits_shape(logits_fn(step, state), inputs[:1], name="params").shape[-1]
    _validate.class_indices(labels, batch_size=num_examples, num_classes=num_classes)
    if targets is not None:
        _validate.soft_labels(targets, (num_examples, num_classes))


def predict(logits_fn: LogitsFn, inputs: np.ndarray, *, batch_size: int = 512) -> np.ndarray:
    """The logits of a whole set, in batches, with full float32 matrix products.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`, or to a pytree with them.
        inputs: `[N, ...]` float.
        batch_size: at least 1; the last batch is padded, and its padding dropped.

    Returns:
        `[N, K]` float, on the host.

    Raises:
        ValueError: inputs or logits that are not finite, a network that does not return `[B, K]`,
            a batch size below 1.

    Example:
        >>> predict(lambda x: 2 * x, np.ones((3, 2), np.float32), batch_size=2).shape
        (3, 2)
    """
    _validate.count(batch_size=batch_size)
    _validate.inputs_in_box(inputs, (-np.inf, np.inf))
    logits_fn, inputs = nets.callable_logits_fn(logits_fn), np.asarray(inputs)
    if inputs.shape[0] == 0:
        one = jax.ShapeDtypeStruct((1, *inputs.shape[1:]), np.float32)
        logits = nets.logits_of(jax.eval_shape(logits_fn, one))
        return np.zeros((0, logits.shape[-1]), logits.dtype)
    rows = []
    for start in range(0, inputs.shape[0], batch_size):
        chunk = inputs[start : start + batch_size]
        size = chunk.shape[0]
        if size < batch_size and start > 0:
            chunk = np.concatenate([chunk, np.repeat(chunk[:1], batch_size - size, 0)])
        with full_precision():  # in training it may be the device's; what is measured is exact
            logits = nets.logits_of(call(logits_fn, chunk))
        _validate.logits(logits, len(chunk))
        rows.append(np.asarray(logits)[:size])
    return np.concatenate(rows)
