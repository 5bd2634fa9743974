"""Max pooling with a gradient that is cheap on CPU.

XLA's own gradient of a window maximum is a select-and-scatter, 28 ms on CPU where a comparison
with the maximum takes one (the first pool of the paper's MNIST network, batch 128, two cores).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdistill import _validate
from jdistill.nets._convolution import lone_is_slow
from jdistill.typing import Array


def _plain(inputs: Array) -> Array:
    """XLA's pooling of `[B, H, W, C]`."""
    return lax.reduce_window(inputs, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _corners(inputs: Array) -> list[Array]:
    """The four members of every window, `[B, H // 2, W // 2, C]` each, row by row."""
    height, width = 2 * (inputs.shape[1] // 2), 2 * (inputs.shape[2] // 2)
    return [inputs[:, row:height:2, column:width:2] for row in (0, 1) for column in (0, 1)]


def _windows(inputs: Array) -> Array:
    """The same four, in axes of their own: `[B, H // 2, 2, W // 2, 2, C]`."""
    batch, height, width, channels = inputs.shape
    whole = inputs[:, : 2 * (height // 2), : 2 * (width // 2)]
    return whole.reshape(batch, height // 2, 2, width // 2, 2, channels)


def _on_cpu(inputs: Array) -> Array:
    """The same values; without XLA's flag its pooling is one kernel with the convolution before."""
    if lone_is_slow():
        return _plain(inputs)
    one, two, three, four = _corners(inputs)
    return jnp.maximum(jnp.maximum(one, two), jnp.maximum(three, four))


@jax.custom_jvp
def _pool(inputs: Array) -> Array:
    """`_plain`, with the derivative below."""
    return lax.platform_dependent(inputs, cpu=_on_cpu, default=_plain)


@_pool.defjvp
def _pool_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The tangent of the first largest member of each window; its transpose is the gradient."""
    (inputs,), (tangent,) = primals, tangents

    def on_cpu(inputs: Array, tangent: Array) -> tuple[Array, Array]:
        out = _pool(inputs)
        first, second, third, _ = (member == out for member in _corners(inputs))
        largest = jnp.where(first, 0, jnp.where(second, 1, jnp.where(third, 2, 3)))
        # One selection over the whole picture, whose transpose is one as well: four strided
        # slices would be four scattered additions.
        members = jnp.arange(4).reshape(1, 1, 2, 1, 2, 1)
        is_largest = jnp.expand_dims(largest, (2, 4)) == members
        chosen = jnp.where(is_largest, _windows(tangent), 0)
        return out, jnp.sum(chosen, axis=(2, 4))

    def default(inputs: Array, tangent: Array) -> tuple[Array, Array]:
        return jax.jvp(_plain, (inputs,), (tangent,))

    return lax.platform_dependent(inputs, tangent, cpu=on_cpu, default=default)


def max_pool(inputs: Array) -> Array:
    """Maximum over 2x2 windows with stride 2, as `flax.linen.max_pool(x, (2, 2), (2, 2))`.

    Differentiable in forward and reverse mode. In a tie the whole gradient goes to the first
    largest member of the window in row-major order, which is also what XLA does. Platforms other
    than CPU get XLA's own gradient.

    Args:
        inputs: `[..., H, W, C]` float; an odd last row or column is left out.

    Returns:
        `[..., H // 2, W // 2, C]`.

    Raises:
        ValueError: Fewer than three axes.

    Example:
        >>> import jax.numpy as jnp
        >>> max_pool(jnp.arange(16.0).reshape(1, 4, 4, 1))[0, :, :, 0].tolist()
        [[5.0, 7.0], [13.0, 15.0]]
    """
    if np.ndim(inputs) < 3:
        raise ValueError(
            f"expected inputs of shape [..., H, W, C], got shape {np.shape(inputs)}; "
            "add the missing axes"
        )
    _validate.floats(-3, inputs=inputs)
    lead = inputs.shape[:-3]
    if len(lead) == 1:
        return _pool(inputs)
    pooled = _pool(jnp.reshape(inputs, (-1, *inputs.shape[-3:])))
    return jnp.reshape(pooled, (*lead, *pooled.shape[1:]))
