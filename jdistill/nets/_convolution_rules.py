"""A convolution in NHWC/HWIO whose gradients are fast on CPU.

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
* A depthwise convolution runs channel by channel. Here it is a sum of shifted inputs times
  weights, one fused loop over memory: 75 times faster. Other groups run one after the other.
* Under `vmap` over kernels it makes one grouped convolution, slower than its parts one after the
  other. Here the parts run one after the other.

On every other platform the convolution and its gradients are XLA's own.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdistill._jax import CPU_FLAG_VALUE
from jdistill.typing import Array

LAYOUT = ("NHWC", "HWIO", "NHWC")
# Up to so many numbers under the kernel (a 3x3 kernel on three channels has 27) a convolution is
# a product of patches and weights. The patches of a 3x3 kernel take nine times the inputs' memory.
_SMALL_WINDOW = 32
# Examples a step of the loop that sums the kernel's gradient: few enough that their shifted
# copies fit into the cache, many enough for an efficient matrix product.
_CHUNK = 8


# Places of a kernel that are looked at one by one, in products and in sums of shifted inputs; of
# more a convolution compiles sooner. And the most outputs per input for which such a sum pays.
_MOST_PRODUCTS, _MOST_SHIFTS, _MOST_OUTPUTS = 25, 49, 4


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


def _plain(lhs: Array, rhs: Array, spec: Spec) -> Array:
    """XLA's convolution."""
    return lax.conv_general_dilated(
        lhs,
        rhs,
        spec.strides,
        spec.padding,
        spec.lhs_dilation,
        spec.rhs_dilation,
        dimension_numbers=LAYOUT,
        feature_group_count=spec.groups,
        precision=spec.precision,
    )


def _on_cpu(lhs: Array, rhs: Array, spec: Spec) -> Array:
    """The same values by the kernels that are fast on CPU."""

    @jax.custom_batching.custom_vmap
    def convolve(lhs: Array, rhs: Array) -> Array:
        if spec.groups > 1:
            if _is_depthwise(rhs, spec):
                return _depthwise(lhs, rhs, spec)
            return _by_group(functools.partial(_on_cpu, spec=_of_group(spec)), spec, lhs, rhs)
        if not spec.is_unit:
            return _plain(lhs, rhs, spec)
        if _has_small_window(rhs):
            return _product(_patches(lhs, rhs, spec), rhs, spec)
        if not spec.lone or not lone_is_slow():
            return _plain(lhs, rhs, spec)
        (top, bottom), columns = spec.padding
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
def convolution(lhs: Array, rhs: Array, spec: Spec) -> Array:
    """The convolution in NHWC/HWIO, with the gradients of this file."""
    return lax.platform_dependent(
        lhs,
        rhs,
        cpu=functools.partial(_on_cpu, spec=spec),
        default=functools.partial(_plain, spec=spec),
    )


def _forward(lhs: Array, rhs: Array, spec: Spec) -> tuple[Array, tuple[Array, Array]]:
    return convolution(lhs, rhs, spec._replace(lone=True)), (lhs, rhs)


def _backward(spec: Spec, residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    def on_cpu(lhs: Array, rhs: Array, grad: Array) -> tuple[Array, Array]:
        return (
            _summed_as(lhs, _lhs_gradient(lhs, rhs, grad, spec), grad),
            _summed_as(rhs, _rhs_gradient(lhs, rhs, grad, spec), grad),
        )

    def default(lhs: Array, rhs: Array, grad: Array) -> tuple[Array, Array]:
        _, pullback = jax.vjp(functools.partial(_plain, spec=spec), lhs, rhs)
        return pullback(grad)

    return lax.platform_dependent(*residuals, grad, cpu=on_cpu, default=default)


convolution.defvjp(_forward, _backward)


def _summed_as(operand: Array, value: Array, grad: Array) -> Array:
    """The gradient `value`, summed over the mesh axes that `grad` varies over and `operand` not.

    Inside `shard_map` a kernel may be the same on every device while the batch is not; the
    gradient is then the sum over devices, and JAX leaves that sum to the rule. The gradient of an
    addition of the two does the same, as itself and nothing otherwise, in every version of JAX.
    """
    _, pullback = jax.vjp(lambda one: one + grad[0, 0, 0, 0], operand)
    return pullback(value)[0]


def _lhs_gradient(lhs: Array, rhs: Array, grad: Array, spec: Spec) -> Array:
    """Gradient of the inputs: a full convolution with the flipped and transposed kernel."""
    depthwise = _is_depthwise(rhs, spec)
    if spec.groups > 1 and not depthwise:
        part = functools.partial(_lhs_gradient, spec=_of_group(spec))
        return _by_group(part, spec, lhs, rhs, grad)
    if spec.is_unit and _has_small_window(rhs):
        return _sum_of_windows(rhs, grad, spec)
    before, after = [], []
    for (low, _), (size, under, out) in zip(
        spec.padding, _dilated(lhs, rhs, grad, spec), strict=True
    ):
        before.append(under - 1 - low)
        after.append(size + low - out)
    padding = tuple(zip(before, after, strict=True))
    transposed = spec._replace(
        strides=spec.lhs_dilation,
        padding=padding,
        lhs_dilation=spec.strides,
        # 'Full' padding keeps this convolution off the slow kernel; where there is none (a 1x1
        # kernel, or padding as wide as the kernel) it is a lone one.
        lone=not any(sum(padding, ())),
    )
    flipped = jnp.flip(rhs, (0, 1))
    if not depthwise:
        return convolution(grad, flipped.transpose((0, 1, 3, 2)), transposed)
    every = convolution(grad, flipped, transposed._replace(groups=grad.shape[3]))
    return every.reshape(*every.shape[:3], lhs.shape[3], -1).sum(axis=4)


def _rhs_gradient(lhs: Array, rhs: Array, grad: Array, spec: Spec) -> Array:
    """Gradient of the kernel `[h, w, I, O]`: inputs and output's gradient, over all examples."""
    if spec.groups > 1:
        if _is_depthwise(rhs, spec):
            windows = _windows(_repeated(lhs, rhs), rhs, spec)
            return jnp.stack([(each * grad).sum(axis=(0, 1, 2)) for each in windows]).reshape(
                rhs.shape
            )
        part = functools.partial(_rhs_gradient, spec=_of_group(spec))
        return _by_group(part, spec, lhs, rhs, grad)
    if spec.is_unit and _has_small_window(rhs):
        patches = _patches(lhs, rhs, spec).reshape(-1, rhs[..., 0].size)
        flat = grad.reshape(-1, grad.shape[-1])
        return jnp.matmul(patches.T, flat, precision=spec.precision).reshape(rhs.shape)
    if lone_is_slow() and math.prod(rhs.shape[:2]) <= _MOST_PRODUCTS:
        return _sum_of_products(lhs, rhs, grad, spec)
    # The examples are what is summed over, the channels what is not: they change places.
    padding = tuple(
        (low, out - size + under - 1 - low)
        for (low, _), (size, under, out) in zip(
            spec.padding, _dilated(lhs, rhs, grad, spec), strict=True
        )
    )
    exchanged = spec._replace(
        strides=spec.rhs_dilation, padding=padding, rhs_dilation=spec.strides, lone=True
    )
    total: Any = 0.0
    for rows in _parts(len(lhs)):
        total += convolution(
            lhs[rows].transpose((3, 1, 2, 0)), grad[rows].transpose((1, 2, 0, 3)), exchanged
        )
    return total.transpose((1, 2, 0, 3))


def _parts(num_examples: int) -> list[slice]:
    """Rows of the examples a few at a time, which stay in the cache."""
    ends = np.linspace(0, num_examples, min(8, max(1, num_examples // 16)) + 1).astype(int)
    return [slice(int(first), int(end)) for first, end in itertools.pairwise(ends)]


def lone_is_slow() -> bool:
    """True where XLA's flags leave lone convolutions to the slow kernel; read while tracing."""
    return CPU_FLAG_VALUE not in os.environ.get("XLA_FLAGS", "")


def _dilated(lhs: Array, rhs: Array, grad: Array, spec: Spec) -> list[tuple[int, int, int]]:
    """Sizes of inputs, kernel, and output per spatial axis, with what dilation puts between."""

    def sizes(shape: tuple[int, ...], steps: tuple[int, ...]) -> list[int]:
        return [(size - 1) * step + 1 for size, step in zip(shape, steps, strict=True)]

    return list(
        zip(
            sizes(lhs.shape[1:3], spec.lhs_dilation),
            sizes(rhs.shape[:2], spec.rhs_dilation),
            sizes(grad.shape[1:3], spec.strides),
            strict=True,
        )
    )


def is_split(*operands: Array) -> bool:
    """True for arrays whose type says how they are split over devices, which XLA's own follow."""
    shardings = [getattr(jax.typeof(each), "sharding", None) for each in operands]
    return any(axis is not None for each in shardings for axis in getattr(each, "spec", ()))


def _is_depthwise(rhs: Array, spec: Spec) -> bool:
    """True for groups of one input channel for which a sum of shifted inputs pays."""
    rows, columns, inputs, outputs = rhs.shape
    few = rows * columns <= _MOST_SHIFTS and outputs // spec.groups <= _MOST_OUTPUTS
    return spec.groups > 1 and inputs == 1 and few


def _of_group(spec: Spec) -> Spec:
    return spec._replace(groups=1)


def _by_group(fun: Callable[..., Array], spec: Spec, *operands: Array) -> Array:
    """`fun` of each group's channels (the last axis of every operand), one after the other."""

    def split(operand: Array) -> Array:
        return jnp.moveaxis(operand.reshape(*operand.shape[:-1], spec.groups, -1), -2, 0)

    def joined(parts: Array) -> Array:
        whole = jnp.moveaxis(parts, 0, -2)
        return whole.reshape(*whole.shape[:-2], -1)

    return joined(lax.map(lambda parts: fun(*parts), tuple(map(split, operands))))


def _depthwise(lhs: Array, rhs: Array, spec: Spec) -> Array:
    """The convolution with one input channel per output, as a sum of shifted inputs."""
    windows = _windows(_repeated(lhs, rhs), rhs, spec)
    weights = rhs.reshape(-1, 1, 1, 1, rhs.shape[3])
    return functools.reduce(jnp.add, [each * weights[i] for i, each in enumerate(windows)])


def _repeated(lhs: Array, rhs: Array) -> Array:
    """The input channel of every output channel of a depthwise convolution."""
    return jnp.repeat(lhs, rhs.shape[3] // lhs.shape[3], axis=3)


def _windows(lhs: Array, rhs: Array, spec: Spec) -> list[Array]:
    """The inputs under each place of the kernel `[h, w, I, O]`, `h * w` times `[B, H', W', I]`."""
    pads = [
        (low, high, step - 1)
        for (low, high), step in zip(spec.padding, spec.lhs_dilation, strict=True)
    ]
    padded = lax.pad(lhs, jnp.zeros((), lhs.dtype), [(0, 0, 0), *pads, (0, 0, 0)])

    def along(axis: int, place: int) -> slice:
        stride, step = spec.strides[axis], spec.rhs_dilation[axis]
        free = padded.shape[1 + axis] - (rhs.shape[axis] - 1) * step - 1
        return slice(place * step, place * step + free // stride * stride + 1, stride)

    return [
        padded[:, along(0, row), along(1, column)] for row, column in np.ndindex(*rhs.shape[:2])
    ]


def _sum_of_products(lhs: Array, rhs: Array, grad: Array, spec: Spec) -> Array:
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


def _has_small_window(rhs: Array) -> bool:
    return rhs[..., 0].size <= _SMALL_WINDOW


def _patches(lhs: Array, rhs: Array, spec: Spec) -> Array:
    """The inputs under the kernel `[h, w, I, O]` at each place, `[B, H', W', h * w, I]`."""
    return jnp.stack(_windows(lhs, rhs, spec), axis=3)


def _product(patches: Array, rhs: Array, spec: Spec) -> Array:
    """The convolution as one product of patches and weights, `[B, H', W', O]`."""
    weights = rhs.reshape(-1, rhs.shape[-1])
    flat = jnp.matmul(patches.reshape(-1, len(weights)), weights, precision=spec.precision)
    return flat.reshape(*patches.shape[:3], rhs.shape[-1])


def _sum_of_windows(rhs: Array, grad: Array, spec: Spec) -> Array:
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
