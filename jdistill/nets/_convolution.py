"""`jax.lax.conv_general_dilated` with fast gradients on CPU."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdistill.nets._convolution_rules import Spec, convolution, is_split
from jdistill.typing import Array


def conv_general_dilated(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """`jax.lax.conv_general_dilated` with fast gradients on CPU.

    The values and the gradients are those of `jax.lax.conv_general_dilated`, to float32 rounding.
    Networks passed to attacks and training steps use it automatically (see `nets.fast_on_cpu`).
    Elsewhere, pass it to the layer: `flax.linen.Conv(..., conv_general_dilated=...)`.

    The rules apply on CPU to 1-D and 2-D convolutions in float32 and float64, of any
    layout, strides, dilations, and groups of features; everything else, and every other platform,
    gets XLA's own convolution and gradients.

    Reverse mode only (any order): `jax.jvp` and what builds on it (`jax.jacfwd`, `jax.hessian`)
    raise a TypeError; pass `jax.lax.conv_general_dilated` itself where they are needed.

    Args:
        lhs: Inputs, such as `[B, H, W, I]` in the layout that flax uses.
        rhs: Kernel, such as `[h, w, I, O]`.
        window_strides: One stride per spatial axis.
        padding: 'VALID', 'SAME', 'SAME_LOWER' or `(low, high)` for each spatial axis.
        lhs_dilation: As in `jax.lax.conv_general_dilated`.
        rhs_dilation: As in `jax.lax.conv_general_dilated`.
        dimension_numbers: As in `jax.lax.conv_general_dilated`.
        feature_group_count: As in `jax.lax.conv_general_dilated`.
        batch_group_count: As in `jax.lax.conv_general_dilated`.
        precision: As in `jax.lax.conv_general_dilated`.
        preferred_element_type: As in `jax.lax.conv_general_dilated`.

    Returns:
        The outputs, such as `[B, H', W', O]`.

    Raises:
        TypeError: Forward-mode differentiation, or arguments that
            `jax.lax.conv_general_dilated` refuses.

    Example:
        >>> import jax.numpy as jnp
        >>> inputs, kernel = jnp.ones((1, 5, 5, 1)), jnp.ones((3, 3, 1, 2))
        >>> layout = ("NHWC", "HWIO", "NHWC")
        >>> conv_general_dilated(inputs, kernel, (1, 1), "VALID", dimension_numbers=layout).shape
        (1, 3, 3, 2)
    """
    plain = functools.partial(
        lax.conv_general_dilated,
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation,
        rhs_dilation,
        dimension_numbers,
        feature_group_count,
        batch_group_count,
        precision,
        preferred_element_type,
    )
    expected = jax.eval_shape(plain)  # raises what `jax.lax` raises
    if (
        lhs.ndim not in (3, 4)
        or lhs.dtype not in (jnp.float32, jnp.float64)
        or not lhs.dtype == rhs.dtype == expected.dtype
        or min(lhs.size, rhs.size, expected.size) == 0
        or batch_group_count != 1
        or is_split(lhs, rhs)
    ):
        return plain()
    lhs_axes, rhs_axes, out_axes = lax.conv_dimension_numbers(
        lhs.shape, rhs.shape, dimension_numbers
    )
    rank = lhs.ndim - 2
    lhs = lhs.transpose((lhs_axes[0], *lhs_axes[2:], lhs_axes[1]))
    rhs = rhs.transpose((*rhs_axes[2:], rhs_axes[1], rhs_axes[0]))
    strides, lhs_steps, rhs_steps = (
        tuple(map(int, values or (1,) * rank))
        for values in (window_strides, lhs_dilation, rhs_dilation)
    )
    if isinstance(padding, str):
        under = [(size - 1) * step + 1 for size, step in zip(rhs.shape, rhs_steps, strict=False)]
        padding = lax.padtype_to_pads(lhs.shape[1:-1], under, strides, padding)
    pads = tuple((int(low), int(high)) for low, high in padding)
    if rank == 1:
        lhs, rhs = lhs[:, None], rhs[None]
        strides, lhs_steps, rhs_steps = (1, *strides), (1, *lhs_steps), (1, *rhs_steps)
        pads = ((0, 0), *pads)
    spec = Spec(strides, pads, lhs_steps, rhs_steps, feature_group_count, precision, lone=False)
    out = convolution(lhs, rhs, spec)
    if rank == 1:
        out = out[:, 0]
    places = (out_axes[0], *out_axes[2:], out_axes[1])
    return out.transpose(tuple(int(axis) for axis in np.argsort(places)))
