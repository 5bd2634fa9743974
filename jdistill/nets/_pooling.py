"""Max pooling with a gradient that is cheap on CPU.

XLA's own gradient of a window maximum is a select-and-scatter, 28 ms on CPU where a comparison
with the maximum takes one (the first pool of the paper's MNIST network, batch 128, two cores).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdistill import _validate
from jdistill.nets._convolution_rules import is_split, lone_is_slow
from jdistill.typing import Array

# A window's members are looked at one by one; of more, XLA's own gradient is faster, and compiles.
_MOST_MEMBERS = 64


class _Spec(NamedTuple):
    """The static part of a pooling of `[B, H, W, C]`: numbers and pairs per spatial axis."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    @property
    def is_partition(self) -> bool:
        """Windows that neither overlap nor leave gaps or stand out."""
        return self.window == self.strides and not any(sum(self.padding, ()))


def _plain(inputs: Array, spec: _Spec) -> Array:
    """XLA's pooling of `[B, H, W, C]`."""
    padding = ((0, 0), *spec.padding, (0, 0))
    window, strides = (1, *spec.window, 1), (1, *spec.strides, 1)
    return lax.reduce_window(inputs, -jnp.inf, lax.max, window, strides, padding)


def _members(inputs: Array, spec: _Spec, fill: float) -> list[Array]:
    """The members of every window, `[B, H', W', C]` each, row by row; `fill` in the padding."""
    config = [(0, 0, 0), *((low, high, 0) for low, high in spec.padding), (0, 0, 0)]
    padded = lax.pad(inputs, jnp.asarray(fill, inputs.dtype), config)
    ends = [
        max(0, (size - window) // stride * stride + 1)
        for size, window, stride in zip(padded.shape[1:3], spec.window, spec.strides, strict=True)
    ]
    return [
        padded[
            :, row : row + ends[0] : spec.strides[0], column : column + ends[1] : spec.strides[1]
        ]
        for row, column in np.ndindex(*spec.window)
    ]


def _windows(inputs: Array, spec: _Spec) -> Array:
    """Windows that are a partition, in axes of their own: `[B, H', h, W', w, C]`."""
    batch, *sizes, channels = inputs.shape
    height, width = (size // step for size, step in zip(sizes, spec.window, strict=True))
    (rows, columns) = spec.window
    whole = inputs[:, : height * rows, : width * columns]
    return whole.reshape(batch, height, rows, width, columns, channels)


def _on_cpu(inputs: Array, spec: _Spec) -> Array:
    """The same values; without XLA's flag its pooling is one kernel with the convolution before."""
    if lone_is_slow():
        return _plain(inputs, spec)
    return functools.reduce(jnp.maximum, _members(inputs, spec, -math.inf))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _pool(inputs: Array, spec: _Spec) -> Array:
    """`_plain`, with the derivative below."""
    return lax.platform_dependent(
        inputs,
        cpu=functools.partial(_on_cpu, spec=spec),
        default=functools.partial(_plain, spec=spec),
    )


@_pool.defjvp
def _pool_jvp(spec: _Spec, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    """The tangent of the first largest member of each window; its transpose is the gradient."""
    (inputs,), (tangent,) = primals, tangents
    number = math.prod(spec.window)

    def on_cpu(inputs: Array, tangent: Array) -> tuple[Array, Array]:
        out = _pool(inputs, spec)
        largest = jnp.full(out.shape, number - 1, jnp.int32)
        members = _members(inputs, spec, -math.inf)
        for place in reversed(range(number - 1)):
            largest = jnp.where(members[place] == out, place, largest)
        if spec.is_partition:
            # One selection over the whole picture, whose transpose is one as well: four strided
            # slices would be four scattered additions.
            places = jnp.arange(number).reshape(1, 1, spec.window[0], 1, spec.window[1], 1)
            is_largest = jnp.expand_dims(largest, (2, 4)) == places
            return out, jnp.sum(jnp.where(is_largest, _windows(tangent, spec), 0), axis=(2, 4))
        chosen = [
            jnp.where(largest == place, member, 0)
            for place, member in enumerate(_members(tangent, spec, 0.0))
        ]
        return out, functools.reduce(jnp.add, chosen)

    def default(inputs: Array, tangent: Array) -> tuple[Array, Array]:
        return jax.jvp(functools.partial(_plain, spec=spec), (inputs,), (tangent,))

    return lax.platform_dependent(inputs, tangent, cpu=on_cpu, default=default)


def max_pool(
    inputs: Array,
    window_shape: Sequence[int] = (2, 2),
    strides: Sequence[int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> Array:
    """Maximum over windows, as `flax.linen.max_pool(x, window_shape, strides, padding)`.

    Differentiable in forward and reverse mode. In a tie the whole gradient goes to the first
    largest member of the window in row-major order, which is also what XLA does. Platforms other
    than CPU, and windows of more than 64 members, get XLA's own gradient.

    Args:
        inputs: `[..., H, W, C]` float.
        window_shape: Height and width of a window.
        strides: From one window to the next; None is the windows' shape.
        padding: 'VALID' (what makes no whole window is left out), 'SAME', or `(low, high)` for
            each spatial axis; below the windows' shape.

    Returns:
        `[..., H', W', C]`, by default `[..., H // 2, W // 2, C]`.

    Raises:
        ValueError: Fewer than three axes, or an invalid window, stride, or padding.

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
    window = _pair(window_shape=window_shape)
    steps = window if strides is None else _pair(strides=strides)
    spec = _Spec(window, steps, _pads(inputs.shape[-3:-1], window, steps, padding))
    pool = _plain if math.prod(window) > _MOST_MEMBERS or is_split(inputs) else _pool
    lead = inputs.shape[:-3]
    if len(lead) == 1:
        return pool(inputs, spec)
    pooled = pool(jnp.reshape(inputs, (math.prod(lead), *inputs.shape[-3:])), spec)
    return jnp.reshape(pooled, (*lead, *pooled.shape[1:]))


def _pair(**named: Any) -> tuple[int, ...]:
    pair = _validate.shape(**named)
    if len(pair) != 2:
        (name,) = named
        raise ValueError(f"expected {name} of two numbers, got {pair}; pass (height, width)")
    return pair


def _pads(
    sizes: Sequence[int],
    window: tuple[int, ...],
    strides: tuple[int, ...],
    padding: str | Sequence[tuple[int, int]],
) -> tuple[tuple[int, int], ...]:
    """The padding as pairs."""
    if padding in ("VALID", "SAME"):
        return tuple(lax.padtype_to_pads(sizes, window, strides, padding))
    pads = np.asarray(padding)
    limit = np.asarray(window)[:, None]
    if pads.shape != (2, 2) or pads.dtype.kind != "i" or ((pads < 0) | (pads >= limit)).any():
        raise ValueError(
            f"expected padding 'VALID', 'SAME', or two pairs from 0 to below the window {window}, "
            f"got {padding!r}; pass ((top, bottom), (left, right))"
        )
    return tuple((int(low), int(high)) for low, high in pads)
