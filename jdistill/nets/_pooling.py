"""Max pooling with a gradient that is cheap on CPU."""

import jax
import jax.numpy as jnp
from jax import lax

from jdistill.typing import Array


def _plain(inputs: Array) -> Array:
    """XLA's pooling of `[B, H, W, C]`."""
    return lax.reduce_window(inputs, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _corners(inputs: Array) -> list[Array]:
    """The four `[B, H // 2, W // 2, C]` members of the windows, row by row."""
    height, width = 2 * (inputs.shape[1] // 2), 2 * (inputs.shape[2] // 2)
    return [
        inputs[:, row:height:2, column:width:2] for row in range(2) for column in range(2)
    ]


@jax.custom_jvp
def _pool(inputs: Array) -> Array:
    return _plain(inputs)


@_pool.defjvp
def _pool_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (inputs,), (tangent,) = primals, tangents

    def on_cpu(inputs: Array, tangent: Array) -> tuple[Array, Array]:
        out = _pool(inputs)
        first, second, third, _ = (corner == out for corner in _corners(inputs))
        one, two, three, four = _corners(tangent)
        return out, jnp.where(first, one, jnp.where(second, two, jnp.where(third, three, four)))

    def default(inputs: Array, tangent: Array) -> tuple[Array, Array]:
        return jax.jvp(_plain, (inputs,), (tangent,))

    return lax.platform_dependent(inputs, tangent, cpu=on_cpu, default=default)


def max_pool(inputs: Array) -> Array:
    """Maximum over 2x2 windows with stride 2.

    Args:
        inputs: `[..., H, W, C]` float.

    Returns:
        `[..., H // 2, W // 2, C]`.
    """
    flat = jnp.reshape(inputs, (-1, *inputs.shape[-3:]))
    pooled = _pool(flat)
    return jnp.reshape(pooled, (*inputs.shape[:-3], *pooled.shape[1:]))
