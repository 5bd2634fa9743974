"""Measures without an attack."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jdistill import _entries, _fingerprint, _validate, metrics, nets
from jdistill._entries import Store
from jdistill.evaluate._runs import (
    Runs,
    check_inputs,
    check_store,
    first,
    made_by,
    refuse_tracers,
    shard_names,
)
from jdistill.typing import Array, ArrayLike, Callback, LogitsFn


class CleanMeasures(NamedTuple):
    """The measures of each network of a stack on clean inputs.

    Attributes:
        accuracy: `[R]` intervals over the `N` examples.
        correct: `[R, N]` bool.
        mean_abs_logit: `[R]`, mean ``|z|`` over examples and classes, without those at `-inf`: the
            logits' scale.
        sensitivity_logits: `[R]`, see `metrics.sensitivity_logits`.
        log10_sensitivity_softmax: `[R]`, log10 of the mean over examples, see
            `metrics.log10_sensitivity_softmax`.
        log10_sensitivity_softmax_examples: `[R, S]`, the same for each of the first `S` examples.
        zero_gradient_fraction: `[R]`, share of those `S` examples whose cross-entropy has an
            exactly zero input gradient: what blinds FGSM and PGD.
        num_nonfinite: `[R]` int, examples whose logits are no prediction (`metrics.predicts`). They
            count as misclassified; means over logits and sensitivities are NaN with them.
        calibration: `[R]`, see `metrics.calibration`, at the test temperature.
        logits: `[R, N, K]`, as the networks give them, at whatever temperature they are tested.
    """

    accuracy: list[metrics.Interval]
    correct: np.ndarray
    mean_abs_logit: np.ndarray
    sensitivity_logits: np.ndarray
    log10_sensitivity_softmax: np.ndarray
    log10_sensitivity_softmax_examples: np.ndarray
    zero_gradient_fraction: np.ndarray
    num_nonfinite: np.ndarray
    calibration: list[metrics.Calibration]
    logits: np.ndarray


def clean(
    stack: LogitsFn,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    temperature: ArrayLike = 1.0,
    num_sensitivity: int | None = None,
    batch_size: int = 250,
    vmapped: bool | None = None,
    callback: Callback | None = None,
    shards: Store | None = None,
    names: Sequence[str] | None = None,
) -> CleanMeasures:
    """Accuracy, calibration, logit scale, both sensitivities and zero gradients of a stack.

    Args:
        stack: a `logits_fn` pytree whose leaves lead with `R`.
        inputs: `[N, ...]` float.
        labels: `[N]` int in `0..K-1`.
        temperature: at which the networks are tested, above 0; scalar or `[R]`.
        num_sensitivity: the first so many examples enter the sensitivities and the share of zero
            gradients; None takes all.
        batch_size: examples at a time, at least 1.
        vmapped: whether to run the stack under `vmap`; None does so except on CPU.
        callback: see `evaluate`.
        shards: where to keep what was measured of each network; see `under_attack`.
        names: `[R]`, the networks' names for the shards.

    Returns:
        The measures, on the host.

    Raises:
        ValueError: as `evaluate`.

    Example:
        >>> import jax.numpy as jnp
        >>> linear = lambda weights, x: x @ weights
        >>> weights = (jnp.eye(2), -jnp.eye(2))
        >>> stack = nets.stack([nets.callable_logits_fn(linear, w) for w in weights])
        >>> measures = clean(stack, np.eye(2, dtype=np.float32), np.arange(2))
        >>> [share.value for share in measures.accuracy], measures.mean_abs_logit.tolist()
        ([1.0, 0.0], [0.5, 0.5])
    """
    refuse_tracers(stack, inputs, labels)
    runs = Runs.of(stack, temperature, vmapped, callback)
    _validate.count(batch_size=batch_size)
    if shards is not None:
        check_store(shards)
    num_classes = check_inputs(stack, inputs)
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    _validate.class_indices(labels, batch_size=len(inputs), num_classes=num_classes)
    size = first(len(inputs), "num_sensitivity", num_sensitivity)
    settings = [
        {
            "network": _fingerprint.fingerprint(nets.index(stack, run)),
            "temperature": float(runs.temperatures[run]),
            "inputs": _fingerprint.describe(inputs),
            "labels": _fingerprint.describe(labels),
            "num_sensitivity": size,
            **made_by(),
        }
        for run in range(len(runs.temperatures) if shards is not None else 0)
    ]
    called = [f"clean/{name}" for name in shard_names(names, len(runs.temperatures))]
    found: list[Any] = [None] * len(called)
    if shards is not None:
        found = [_entries.read(shards, *entry) for entry in zip(called, settings, strict=True)]
    if any(measured is None for measured in found):
        logits = runs.map(_logits, "accuracy", batch_size, inputs)
        some = runs.map(_sensitivities, "sensitivity", batch_size, inputs[:size], labels[:size])
        columns = dict(
            zip(("logits", "by_logits", "by_softmax", "zero"), (logits, *some), strict=True)
        )
        for run, measured in enumerate(found):
            if measured is None:
                found[run] = {name: column[run] for name, column in columns.items()}
                if shards is not None:
                    _entries.write(shards, called[run], settings[run], found[run])
    divided, by_logits, by_softmax, zero = (
        np.stack([measured[name] for measured in found]) for name in _MEASURED
    )
    logits = divided * runs.temperatures[:, None, None]
    correct = np.stack([np.asarray(metrics.correct(rows, labels)) for rows in logits])
    return CleanMeasures(
        accuracy=[metrics.proportion(int(row.sum()), row.size) for row in correct],
        correct=correct,
        mean_abs_logit=np.abs(logits).mean(axis=(1, 2), where=~np.isneginf(logits)),
        sensitivity_logits=by_logits.mean(axis=1) * runs.temperatures,
        log10_sensitivity_softmax=np.array([metrics.log10_mean(row) for row in by_softmax]),
        log10_sensitivity_softmax_examples=by_softmax,
        zero_gradient_fraction=zero.mean(axis=1),
        num_nonfinite=(~metrics.predicts(logits)).sum(axis=1),
        calibration=[metrics.calibration(rows, labels) for rows in divided],
        logits=logits,
    )


_MEASURED = ("logits", "by_logits", "by_softmax", "zero")


def _logits(logits_fn: LogitsFn, inputs: Array) -> Array:
    return logits_fn(inputs)


def _sensitivities(logits_fn: LogitsFn, inputs: Array, labels: Array) -> tuple[Array, Array, Array]:
    return (
        metrics.sensitivity_logits(logits_fn, inputs),
        metrics.log10_sensitivity_softmax(logits_fn, inputs),
        metrics.zero_gradient(logits_fn, inputs, labels),
    )
