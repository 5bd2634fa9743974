"""What the convolution for CPUs is made of: shifted inputs, and sums of their products."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jdistill.typing import Array

# Examples a step of the loop that sums the kernel's gradient: few enough that their shifted
# copies fit into the cache, many enough for an efficient matrix product.
_CHUNK = 8
# Numbers of the output's gradient that a step of the loop over a depthwise convolution's rows
# takes: with as many for each place of the kernel they stay in the cache.
_MOST_AT_ONCE = 8192


class Spec(NamedTuple):
    """The static part of a convolution in NHWC/HWIO: numbers and pairs per spatial axis."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    groups: int
    precision: Any
    lone: bool  # On CPU: keep it off the kernel that is slow on its own.

    @property
    def is_unit(self) -> bool:
        """No strides, dilations, groups, or negative padding."""
        return {*self.strides, *self.lhs_dilation, *self.rhs_dilation, self.groups} == {1} and min(
            min(self.padding)
        ) >= 0


def depthwise(lhs: Array, rhs: Array, spec: Spec) -> Array:
    """The convolution with one input channel per output, as a sum of shifted inputs."""
    shifted = _windows(jnp.repeat(lhs, rhs.shape[3] // lhs.shape[3], axis=3), rhs, spec)
    weights = rhs.reshape(-1, 1, 1, 1, rhs.shape[3])
    return functools.reduce(jnp.add, [each * weights[i] for i, each in enumerate(shifted)])


def sum_of_rows(lhs: Array, grad: Array, spec: Spec, shape: tuple[int, ...]) -> Array:
    """Gradient of a depthwise kernel of that shape, a few rows or examples at a time."""
    padded = _pad(jnp.repeat(lhs, shape[3] // lhs.shape[3], axis=3), spec)
    batch, height, width, channels = grad.shape
    rows = _divisor(height, _MOST_AT_ONCE // (width * channels))
    examples = 1 if rows < height else _divisor(batch, _MOST_AT_ONCE // grad[0].size)
    under = (rows - 1) * spec.strides[0] + (shape[0] - 1) * spec.rhs_dilation[0] + 1
    blocks = height // rows

    def products(step: Any) -> tuple[Array, ...]:
        example, row = step // blocks * examples, step % blocks * rows
        part = lax.dynamic_slice(grad, (example, row, 0, 0), (examples, rows, width, channels))
        inputs = lax.dynamic_slice(
            padded,
            (example, row * spec.strides[0], 0, 0),
            (examples, under, *padded.shape[2:]),
        )
        return tuple(each * part for each in _places(inputs, shape, spec))

    # The first step starts the sums, as in `sum_of_products`.
    totals = lax.fori_loop(
        1,
        batch // examples * blocks,
        lambda step, totals: tuple(map(jnp.add, totals, products(step))),
        products(0),
    )
    return jnp.stack([total.sum(axis=(0, 1, 2)) for total in totals]).reshape(shape)


def _divisor(number: int, most: int) -> int:
    """The largest divisor of the number that is at most as large as the other, or 1."""
    return next(each for each in range(max(1, min(number, most)), 0, -1) if number % each == 0)


def _windows(lhs: Array, rhs: Array, spec: Spec) -> list[Array]:
    """The inputs under each place of the kernel `[h, w, I, O]`, `h * w` times `[B, H', W', I]`."""
    return _places(_pad(lhs, spec), rhs.shape, spec)


def _pad(lhs: Array, spec: Spec) -> Array:
    """The inputs with their padding and what dilation puts between them."""
    pads = [
        (low, high, step - 1)
        for (low, high), step in zip(spec.padding, spec.lhs_dilation, strict=True)
    ]
    return lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


def _places(padded: Array, shape: tuple[int, ...], spec: Spec) -> list[Array]:
    """The padded inputs under each place of a kernel of that shape."""

    def along(axis: int, place: int) -> slice:
        stride, step = spec.strides[axis], spec.rhs_dilation[axis]
        free = padded.shape[1 + axis] - (shape[axis] - 1) * step - 1
        return slice(place * step, place * step + free // stride * stride + 1, stride)

    return [padded[:, along(0, row), along(1, column)] for row, column in np.ndindex(*shape[:2])]


def sum_of_products(lhs: Array, rhs: Array, grad: Array, spec: Spec) -> Array:
    """Gradient of the kernel: shifted inputs times the output's gradient, `_CHUNK` by `_CHUNK`."""

    def product(part: Array, grad_part: Array) -> Array:
        flat_grad = jnp.reshape(grad_part, (-1, rhs.shape[3]))
        sums = [
            lax.dot_general(
                each.reshape(-1, rhs.shape[2]),
                flat_grad,
                (((0,), (0,)), ((), ())),
                precision=spec.precision,
            )
            for each in _windows(part, rhs, spec)
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


def patches(lhs: Array, rhs: Array, spec: Spec) -> Array:
    """The inputs under the kernel `[h, w, I, O]` at each place, `[B, H', W', h * w, I]`."""
    return jnp.stack(_windows(lhs, rhs, spec), axis=3)


def product(lhs: Array, rhs: Array, spec: Spec) -> Array:
    """The convolution as one product of patches and weights, `[B, H', W', O]`."""
    cut, weights = patches(lhs, rhs, spec), rhs.reshape(-1, rhs.shape[-1])
    flat = jnp.matmul(cut.reshape(-1, len(weights)), weights, precision=spec.precision)
    return flat.reshape(*cut.shape[:3], rhs.shape[-1])


def spread(lhs: Array, rhs: Array, grad: Array, spec: Spec) -> Array:
    """Gradient of the inputs of a 1x1 convolution: a product, and zeros where strides skip."""
    flat = grad.reshape(-1, grad.shape[-1])
    given = jnp.matmul(flat, rhs[0, 0].T, precision=spec.precision)
    given = given.reshape(*grad.shape[:3], rhs.shape[2])
    pads = [
        (0, size - (number - 1) * stride - 1, stride - 1)
        for size, number, stride in zip(lhs.shape[1:3], grad.shape[1:3], spec.strides, strict=True)
    ]
    return lax.pad(given, jnp.zeros((), given.dtype), [(0, 0, 0), *pads, (0, 0, 0)])


def sum_of_windows(rhs: Array, grad: Array, spec: Spec) -> Array:
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
