"""Two fixed inputs, whose logits tell whether a network is the one that was written."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from jdistill import _jax

# Of the largest logit, what another platform or version may move the logits of the fixed inputs by:
# far above rounding, far below what another activation or constant does.
_TOLERANCE = 1e-3


def inputs(shape: Sequence[int], bounds: Any) -> np.ndarray:
    """Two inputs within the bounds, the same everywhere: `[2, ...]`, of a low-discrepancy row."""
    low, high = (np.asarray(end, float) for end in bounds)
    low = np.where(np.isfinite(low), low, np.where(np.isfinite(high), high - 1.0, -1.0))
    high = np.where(np.isfinite(high), high, low + 1.0)
    shares = np.arange(2 * math.prod(shape)) * 0.6180339887498949 % 1.0
    return (low + shares.reshape(2, *shape) * (high - low)).astype(np.float32)


def logits(network: Any, shape: Sequence[int], bounds: Any) -> np.ndarray:
    """The network's logits of them, at full precision."""
    probe = jnp.asarray(inputs(shape, bounds))
    _jax.logits_shape(network, probe)
    with _jax.full_precision():
        return np.asarray(_jax.call(network, probe))


def check(network: Any, folder: epath.Path, config: Mapping[str, Any]) -> None:
    """The network gives the logits that were written."""
    found = logits(network, config["input_shape"], config["bounds"])
    expected = np.asarray(config["probe_logits"])
    tolerance = max(_TOLERANCE, 8 * float(jnp.finfo(found.dtype).eps))
    size = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    same = found.shape == expected.shape
    if not same or not np.allclose(found.astype(float), expected, rtol=0, atol=tolerance * size):
        raise ValueError(
            f"expected the logits that {folder / 'config.json'} holds for two fixed inputs, such "
            f"as {expected[0, :3]}, got {found[0, :3]}; pass the model that was written, or use "
            f"the versions that wrote it, jdistill {config['versions']['jdistill']} and JAX "
            f"{config['versions']['jax']}"
        )
