"""A 2-D convolution whose gradients are fast on CPU.

What XLA does on CPU, and what is done here instead (measured with JAX 0.10 on two cores, batch
128, the layers of the paper's MNIST network):

* It writes the gradient of a convolution as another convolution with its dimensions out of the
  NHWC/HWIO order. Inside a loop body such a convolution runs on a scalar kernel, 20 times
  slower (jax-ml/jax#12868). Here both gradients are ordinary convolutions: that of the inputs
  with the flipped and transposed kernel, that of the kernel with channels and examples exchanged.
* A lone 'valid' convolution whose output must be kept goes to a kernel that is 4 times slower
  than Eigen's. XLA's flags (`runtime.add_cpu_flags`) send it to Eigen; without them one surplus
  row is computed and sliced off, which helps less, and the gradient of the kernel is a few matrix
  products on shifted copies of the inputs, a few examples at a time, which stay in the cache.
* With the one to three channels of an image, convolutions use a small part of the processor. Here
  the first layer is a product of patches and weights, and so are its gradients: 1.5 to 4 times
  faster.
* Under `vmap` over kernels it makes one grouped convolution, slower than its parts one after the
  other. Here the parts run one after the other.

On every other platform the convolution and its gradients are XLA's own.
"""

import functools
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jdistill._jax import CPU_FLAG_VALUE
from jdistill.typing import Array

_LAYOUT = ("NHWC", "HWIO", "NHWC")
# Up to so many numbers under the kernel (a 3x3 kernel on three channels has 27) a convolution is
# a product of patches and weights. The patches of a 3x3 kernel take nine times the inputs' memory.
_SMALL_WINDOW = 32
# Examples a step of the loop that sums the kernel's gradient: few enough that their shifted
# copies fit into the cache, many enough for an efficient matrix product.
_CHUNK = 8


class _Spec(NamedTuple):
    """The static part of a supported convolution."""

    padding: tuple[tuple[int, int], ...]
    precision: Any
    lone: bool  # On CPU: keep it off the kernel that is slow on its own.


def _plain(lhs: Array, rhs: Array, spec: _Spec) -> Array:
    """XLA's convolution."""
    return lax.conv_general_dilated(
        lhs, rhs, (1, 1), spec.padding, dimension_numbers=_LAYOUT, precision=spec.precision
    )


def _on_cpu(lhs: Array, rhs: Array, spec: _Spec) -> Array:
    """The same values by the kernels that are fast on CPU."""
    (top, bottom), columns = spec.padding

    @jax.custom_batching.custom_vmap
    def convolve(lhs: Array, rhs: Array) -> Array:
        if _has_small_window(rhs):
            return _product(_patches(lhs, rhs, spec), rhs, spec)
        if not spec.lone or not lone_is_slow():
            return _plain(lhs, rhs, spec)
        padded = _plain(lhs, rhs, spec._replace(padding=((top, bottom + 1), columns)))
        return padded[:, :-1]

    @convolve.def_vmap
    def batched(axis_size: int, is_batched: list[bool], lhs: Array, rhs: Array) -> Any:
        del axis_size
        many_lhs, many_rhs = is_batched
        if not many_rhs:
            # One kernel: the mapped axis is just more examples.
            flat = convolve(jnp.reshape(lhs, (-1, *lhs.shape[2:])), rhs)
            return jnp.reshape(flat, (*lhs.shape[:2], *flat.shape[1:])), True
        if many_lhs:
            return lax.map(lambda pair: convolve(*pair), (lhs, rhs)), True
        return lax.map(lambda kernel: convolve(lhs, kernel), rhs), True

    return convolve(lhs, rhs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _convolution(lhs: Array, rhs: Array, spec: _Spec) -> Array:
    """The convolution in NHWC/HWIO with unit strides, with the gradients of this file."""
    return lax.platform_dependent(
        lhs,
        rhs,
        cpu=functools.partial(_on_cpu, spec=spec),
        default=functools.partial(_plain, spec=spec),
    )


def _forward(lhs: Array, rhs: Array, spec: _Spec) -> tuple[Array, tuple[Array, Array]]:
    return _convolution(lhs, rhs, spec._replace(lone=True)), (lhs, rhs)


def _backward(spec: _Spec, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    def on_cpu(lhs: Array, rhs: Array, grad: Array) -> tuple[Array, Array]:
        return (
            _summed_as(lhs, _lhs_gradient(rhs, grad, spec), grad),
            _summed_as(rhs, _rhs_gradient(lhs, rhs, grad, spec), grad),
        )

    def default(lhs: Array, rhs: Array, grad: Array) -> tuple[Array, Array]:
        _, pullback = jax.vjp(functools.partial(_plain, spec=spec), lhs, rhs)
        return pullback(grad)

    return lax.platform_dependent(*residuals, grad, cpu=on_cpu, default=default)


_convolution.defvjp(_forward, _backward)


def _summed_as(operand: Array, value: Array, grad: Array) -> Array:
    """The gradient `value`, summed over the mesh axes that `grad` varies over and `operand` not.

    Inside `shard_map` a kernel may be the same on every device while the batch is not; the
    gradient is then the sum over devices, and JAX leaves that sum to the rule. The gradient of an
    addition of the two does the same, as itself and nothing otherwise, in every version of JAX.
    """
    _, pullback = jax.vjp(lambda one: one + grad[0, 0, 0, 0], operand)
    return pullback(value)[0]


def _lhs_gradient(rhs: Array, grad: Array, spec: _Spec) -> Array:
    """Gradient of the inputs: a full convolution with the flipped and transposed kernel."""
    if _has_small_window(rhs):
        return _sum_of_windows(rhs, grad, spec)
    padding = tuple(
        (size - 1 - low, size - 1 - high)
        for size, (low, high) in zip(rhs.shape[:2], spec.padding, strict=True)
    )
    flipped = jnp.flip(rhs, (0, 1)).transpose((0, 1, 3, 2))
    # 'Full' padding keeps this convolution off the slow kernel; where there is none (a 1x1
    # kernel, or padding as wide as the kernel) it is a lone one.
    return _convolution(grad, flipped, _Spec(padding, spec.precision, not any(sum(padding, ()))))


def _rhs_gradient(lhs: Array, rhs: Array, grad: Array, spec: _Spec) -> Array:
    """Gradient of the kernel `[h, w, I, O]`: inputs and output's gradient, over all examples."""
    if _has_small_window(rhs):
        patches = _patches(lhs, rhs, spec).reshape(-1, rhs[..., 0].size)
        flat = grad.reshape(-1, grad.shape[-1])
        return jnp.matmul(patches.T, flat, precision=spec.precision).reshape(rhs.shape)
    # The output's gradient as a kernel has to be larger than the padding, as every kernel here.
    too_small = any(
        max(pads) >= size for pads, size in zip(spec.padding, grad.shape[1:3], strict=True)
    )
    if lone_is_slow() or too_small:
        return _sum_of_products(lhs, rhs, grad, spec)
    # The examples are what is summed over, the channels what is not: they change places.
    sums = _convolution(
        lhs.transpose((3, 1, 2, 0)), grad.transpose((1, 2, 0, 3)), spec._replace(lone=True)
    )
    return sums.transpose((1, 2, 0, 3))


def lone_is_slow() -> bool:
    """Whether XLA's flags leave lone convolutions to the slow kernel; read while tracing."""
    return CPU_FLAG_VALUE not in os.environ.get("XLA_FLAGS", "")


def _sum_of_products(lhs: Array, rhs: Array, grad: Array, spec: _Spec) -> Array:
    """Gradient of the kernel: shifted inputs times the output's gradient, `_CHUNK` by `_CHUNK`."""
    lhs = jnp.pad(lhs, ((0, 0), *spec.padding, (0, 0)))
    rows, columns, channels, features = rhs.shape
    height, width = grad.shape[1:3]

    def product(part: Array, grad_part: Array) -> Array:
        flat_grad = jnp.reshape(grad_part, (-1, features))
        sums = [
            lax.dot_general(
                part[:, row : row + height, column : column + width].reshape(-1, channels),
                flat_grad,
                (((0,), (0,)), ((), ())),
                precision=spec.precision,
            )
            for row in range(rows)
            for column in range(columns)
        ]
        return jnp.reshape(jnp.stack(sums), rhs.shape)

    whole = lhs.shape[0] // _CHUNK
    if whole < 2:
        return product(lhs, grad)

    def split(array: Array) -> Array:
        return jnp.reshape(array[: whole * _CHUNK], (whole, _CHUNK, *array.shape[1:]))

    def add(total: Array, parts: tuple[Array, Array]) -> tuple[Array, None]:
        return total + product(*parts), None

    # The first chunk starts the sum: zeros would not carry the mesh axes over which the batch may
    # be split inside `shard_map`.
    lhs_parts, grad_parts = split(lhs), split(grad)
    total = product(lhs_parts[0], grad_parts[0])
    total, _ = lax.scan(add, total, (lhs_parts[1:], grad_parts[1:]))
    if whole * _CHUNK < lhs.shape[0]:
        total += product(lhs[whole * _CHUNK :], grad[whole * _CHUNK :])
    return total


def _has_small_window(rhs: Array) -> bool:
    return rhs[..., 0].size <= _SMALL_WINDOW


def _patches(lhs: Array, rhs: Array, spec: _Spec) -> Array:
    """What lies under the kernel `[h, w, I, O]` at each place, `[B, H', W', h * w, I]`."""
    lhs = jnp.pad(lhs, ((0, 0), *spec.padding, (0, 0)))
    rows, columns = rhs.shape[:2]
    height, width = lhs.shape[1] - rows + 1, lhs.shape[2] - columns + 1
    return jnp.stack(
        [
            lhs[:, row : row + height, column : column + width]
            for row in range(rows)
            for column in range(columns)
        ],
        axis=3,
    )


def _product(patches: Array, rhs: Array, spec: _Spec) -> Array:
    """The convolution as one product of patches and weights, `[B, H', W', O]`."""
    weights = rhs.reshape(-1, rhs.shape[-1])
    flat = jnp.matmul(patches.reshape(-1, len(weights)), weights, precision=spec.precision)
    return flat.reshape(*patches.shape[:3], rhs.shape[-1])


def _sum_of_windows(rhs: Array, grad: Array, spec: _Spec) -> Array:
    """Gradient of the inputs: what each place gives to each place under the kernel, summed."""
    rows, columns, channels, features = rhs.shape
    batch, height, width, _ = grad.shape
    # Places last: then every summand is one contiguous picture.
    given = lax.dot_general(
        rhs.reshape(-1, features),
        grad.reshape(-1, features),
        (((1,), (1,)), ((), ())),
        precision=spec.precision,
    ).reshape(rows, columns, channels, batch, height, width)

    def at(row: int, column: int) -> Array:
        around = ((0, 0), (0, 0), (row, rows - 1 - row), (column, columns - 1 - column))
        return jnp.pad(given[row, column], around)

    total = sum(at(row, column) for row in range(rows) for column in range(columns))
    (top, bottom), (left, right) = spec.padding
    whole = jnp.transpose(total, (1, 2, 3, 0))
    return whole[:, top : whole.shape[1] - bottom, left : whole.shape[2] - right]


def _is_one(values: Sequence[int] | None) -> bool:
    """Whether a stride or dilation does nothing."""
    return values is None or all(value == 1 for value in values)


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
    Meant for `flax.linen.Conv(..., conv_general_dilated=nets.conv_general_dilated)`.

    The rules of this file apply on CPU to 2-D convolutions in NHWC/HWIO with unit strides, no
    dilation, no groups and padding below the kernel's size; everything else, and every other
    platform, gets XLA's own convolution and gradients.

    Reverse mode only (any order): `jax.jvp` and what builds on it (`jax.jacfwd`, `jax.hessian`)
    raise a TypeError; pass `jax.lax.conv_general_dilated` itself where they are needed.

    Args:
        lhs: Inputs, `[B, H, W, I]` in the layout that flax uses.
        rhs: Kernel, `[h, w, I, O]`.
        window_strides: One stride a spatial axis.
        padding: 'VALID', 'SAME', 'SAME_LOWER' or `(low, high)` for each spatial axis.
        lhs_dilation: As in `jax.lax.conv_general_dilated`.
        rhs_dilation: As in `jax.lax.conv_general_dilated`.
        dimension_numbers: As in `jax.lax.conv_general_dilated`.
        feature_group_count: As in `jax.lax.conv_general_dilated`.
        batch_group_count: As in `jax.lax.conv_general_dilated`.
        precision: As in `jax.lax.conv_general_dilated`.
        preferred_element_type: As in `jax.lax.conv_general_dilated`.

    Returns:
        `[B, H', W', O]`.

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
    supported = (
        lhs.ndim == rhs.ndim == 4
        and lhs.dtype == rhs.dtype
        and lhs.dtype in (jnp.float32, jnp.float64)
        and min(lhs.size, rhs.size) > 0
        and _is_one(window_strides)
        and _is_one(lhs_dilation)
        and _is_one(rhs_dilation)
        and feature_group_count == batch_group_count == 1
        and preferred_element_type is None
        and lhs.shape[3] == rhs.shape[2]
    )
    if supported:
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        canonical = lax.conv_dimension_numbers(lhs.shape, rhs.shape, _LAYOUT)
        if numbers == canonical:
            if isinstance(padding, str):
                pads = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], (1, 1), padding)
            else:
                pads = list(padding)
            pairs = tuple((int(low), int(high)) for low, high in pads)
            if all(
                0 <= low < size and 0 <= high < size and extent + low + high >= size
                for (low, high), size, extent in zip(
                    pairs, rhs.shape[:2], lhs.shape[1:3], strict=True
                )
            ):
                return _convolution(lhs, rhs, _Spec(pairs, precision, lone=False))
    return lax.conv_general_dilated(
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
