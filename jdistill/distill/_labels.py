"""Soft labels, made beforehand."""

import jax
import numpy as np

from jdistill import _validate, train
from jdistill.typing import LogitsFn


def soft_labels(
    logits_fn: LogitsFn, inputs: np.ndarray, *, temperature: float, batch_size: int = 512
) -> np.ndarray:
    """A network's predictions at a temperature, `softmax(z / T)`, for a whole set.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        inputs: `[N, ...]` float.
        temperature: above 0.
        batch_size: examples at a time.

    Returns:
        `[N, K]` float32 on the host; rows sum to 1.

    Raises:
        ValueError: a temperature that is not above 0.
        FloatingPointError: predictions that are not finite; a student would learn nothing from
            them, without a word.

    Example:
        >>> soft_labels(lambda x: x, np.array([[0.0, 20.0]], np.float32), temperature=20.0).round(2)
        array([[0.27, 0.73]], dtype=float32)

    References:
        Papernot et al. 2016, section IV.A.
    """
    _validate.scalar(temperature=temperature)
    _validate.positive(temperature=temperature)
    return softened(train.predict(logits_fn, inputs, batch_size=batch_size), temperature)


def softened(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Predictions `softmax(z / T)` of logits on the host; see `soft_labels`."""
    predictions = np.asarray(jax.nn.softmax(logits / np.float32(temperature), axis=-1))
    bad = ~np.isfinite(predictions).all(axis=-1)
    if bad.any():
        raise FloatingPointError(
            f"expected finite predictions, got {predictions[bad][0]} for {bad.sum()} of "
            f"{len(bad)} examples; the network has diverged: train it with a lower learning rate"
        )
    return predictions
