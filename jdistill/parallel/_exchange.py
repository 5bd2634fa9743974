"""The sum of gradients over the devices, sent as 8-bit numbers."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jdistill import _validate
from jdistill.parallel._devices import axis_index
from jdistill.typing import Array, PyTree

_LARGEST = 127  # of int8, on either side of 0


@dataclasses.dataclass(frozen=True)
class QuantizedSum:
    """The exchange that `quantized_psum` makes.

    Attributes:
        block_size: numbers of the gradient that share a scale.
    """

    block_size: int = 256

    def __call__(self, gradient: PyTree, key: Array, axis_name: str) -> PyTree:
        """The sum over the axis, the same to the last bit on every device."""
        device = axis_index(axis_name)
        num_devices = jax.lax.axis_size(axis_name)
        leaves, structure = jax.tree.flatten(gradient)
        for leaf in leaves:
            if not jnp.issubdtype(leaf.dtype, jnp.floating):
                raise ValueError(
                    f"expected a gradient of floating-point arrays, got {leaf.dtype}; "
                    "exchange it by jax.lax.psum, which is without an exchange"
                )
        sizes = [math.prod(leaf.shape) for leaf in leaves]
        if num_devices == 1 or not sum(sizes):
            return gradient  # there is nothing to send
        values = jnp.concatenate([leaf.reshape(-1).astype(jnp.float32) for leaf in leaves])
        values = jnp.pad(values, (0, -sum(sizes) % (num_devices * self.block_size)))
        # [devices, blocks, block size]: device d sums what all have in row d.
        values = values.reshape(num_devices, -1, self.block_size)
        first, second = jax.random.split(jax.random.fold_in(key, device))
        parts = jax.lax.all_to_all(_quantized(first, values), axis_name, 0, 0)
        total = jnp.sum(_restored(*parts), axis=0)
        sums = _restored(*jax.lax.all_gather(_quantized(second, total), axis_name)).reshape(-1)
        ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        found = [
            sums[end - size : end].reshape(leaf.shape).astype(leaf.dtype)
            for leaf, size, end in zip(leaves, sizes, ends, strict=True)
        ]
        return jax.tree.unflatten(structure, found)


def quantized_psum(*, block_size: int = 256) -> QuantizedSum:
    """An exchange for `train.make_train_step` that sends gradients as 8-bit numbers.

    Every device sends::

        s = max |g| / 127,    q = ⌊g / s⌋ + [u < g / s - ⌊g / s⌋],    u uniform,    E[s q] = g

    The flattened gradient is cut into blocks, each with a scale s in float32 beside its numbers q.
    Every device sends to each other one the part that this one sums (all-to-all), and then all send
    their sums, rounded once more, to all (all-gather): about a quarter of the bytes of
    `jax.lax.psum` in float32. The result is unbiased. No number is off by more than its block's
    scales, added over the devices, and that of the sum; it is the same on all devices. What is not
    finite makes its whole block NaN. One device alone sends nothing, and rounds nothing.

    Args:
        block_size: numbers a scale, at least 1; a scale takes the bytes of 4. The gradient is
            filled up to a multiple of `block_size` times the number of devices.

    Returns:
        The exchange, `(gradient, key, axis_name) -> gradient summed over the axis`: a value, equal
        for the same block size. The key is the same on all devices, and each folds its number in.

    Raises:
        ValueError: no whole number of at least 1; and from the exchange, a gradient that is not of
            floating-point arrays, or an axis that is none.

    Example:
        >>> from jdistill import nets, parallel, train
        >>> step = train.make_train_step(
        ...     nets.apply_fn(nets.digits_net()),
        ...     train.sgd(0.1),
        ...     exchange=parallel.quantized_psum(),
        ... )
        >>> compiled = parallel.compile_step(step, mode="shard_map")
        >>> step.exchange.block_size
        256

    References:
        Zhang et al. 2022, "Distributed Adversarial Training to Robustify Deep Neural Networks at
        Scale", and its released code, which scales each array by its norm, sends all of it to all
        devices, and has this switched off. Alistarh et al. 2017, "QSGD: Communication-Efficient SGD
        via Gradient Quantization and Encoding", section 3.1.
    """
    _validate.count(block_size=block_size)
    return QuantizedSum(int(block_size))


def _quantized(key: Array, values: Array) -> tuple[Array, Array]:
    """Blocks `[..., block size]` as int8, rounded at random without bias, and scales `[..., 1]`."""
    scale = jnp.max(jnp.abs(values), axis=-1, keepdims=True) / _LARGEST
    scaled = values / jnp.where(scale > 0, scale, 1)
    below = jnp.floor(scaled)
    above = jax.random.uniform(key, values.shape) < scaled - below
    # The largest number may be a rounding above 127.
    rounded = jnp.clip(below + above, -_LARGEST, _LARGEST)
    return rounded.astype(jnp.int8), scale


def _restored(rounded: Array, scale: Array) -> Array:
    return rounded.astype(jnp.float32) * scale
