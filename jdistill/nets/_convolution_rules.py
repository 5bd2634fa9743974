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
  weights, one fused loop over memory: 75 times faster. Its kernel's gradient is summed a few rows
  at a time, in arrays that stay in the cache: 3 to 4 times faster than a sum over all places at
  once, which goes through memory channel by channel. Other groups run one after the other.
* A 1x1 convolution is a matrix product, and so are its gradients. XLA takes up to ten times as long
  for the gradient of its kernel, which it writes as a convolution with a kernel of the picture's
  size.
* Under `vmap` over kernels it makes one grouped convolution, slower than its parts one after the
  other. Here the parts run one after the other.

On every other platform the convolution and its gradients are XLA's own.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdistill._jax import CPU_FLAG_VALUE
from jdistill.nets._convolution_parts import (
    Spec,
    depthwise,
    patches,
    product,
    spread,
    sum_of_products,
    sum_of_rows,
    sum_of_windows,
)
from jdistill.typing import Array

LAYOUT = ("NHWC", "HWIO", "NHWC")
# Up to so many numbers under the kernel (a 3x3 kernel on three channels has 27) a convolution is
# a product of patches and weights. The patches of a 3x3 kernel take nine times the inputs' memory.
_SMALL_WINDOW = 32


# Places of a kernel that are looked at one by one, in products and in sums of shifted inputs; of
# more a convolution compiles sooner. And the most outputs per input for which such a sum pays.
_MOST_PRODUCTS, _MOST_SHIFTS, _MOST_OUTPUTS = 25, 49, 4


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
                return depthwise(lhs, rhs, spec)
            return _by_group(functools.partial(_on_cpu, spec=_of_group(spec)), spec, lhs, rhs)
        if _is_product(rhs, spec):
            return product(lhs, rhs, spec)
        if not spec.is_unit:
            return _plain(lhs, rhs, spec)
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
    if _is_pointwise(rhs, spec):
        return spread(lhs, rhs, grad, spec)
    if _is_product(rhs, spec):
        return sum_of_windows(rhs, grad, spec)
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
            return _depthwise_rhs_gradient(lhs, grad, spec, rhs.shape)
        part = functools.partial(_rhs_gradient, spec=_of_group(spec))
        return _by_group(part, spec, lhs, rhs, grad)
    if _is_product(rhs, spec):
        flat_inputs = patches(lhs, rhs, spec).reshape(-1, rhs[..., 0].size)
        flat = grad.reshape(-1, grad.shape[-1])
        return jnp.matmul(flat_inputs.T, flat, precision=spec.precision).reshape(rhs.shape)
    if lone_is_slow() and math.prod(rhs.shape[:2]) <= _MOST_PRODUCTS:
        return sum_of_products(lhs, rhs, grad, spec)
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


def _is_pointwise(rhs: Array, spec: Spec) -> bool:
    """True for a 1x1 kernel on the inputs as they are, or on every few of them."""
    as_they_are = {*sum(spec.padding, ())} == {0} and {*spec.lhs_dilation} == {1}
    return rhs.shape[:2] == (1, 1) and spec.groups == 1 and as_they_are


def _is_product(rhs: Array, spec: Spec) -> bool:
    """True for a convolution that is one product of patches and weights, and so its gradients."""
    return _is_pointwise(rhs, spec) or (spec.is_unit and rhs[..., 0].size <= _SMALL_WINDOW)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _depthwise_rhs_gradient(lhs: Array, grad: Array, spec: Spec, shape: tuple[int, ...]) -> Array:
    """Gradient of a depthwise kernel of that shape, summed over places a few rows at a time."""
    return sum_of_rows(lhs, grad, spec, shape)


def _depthwise_forward(
    lhs: Array, grad: Array, spec: Spec, shape: tuple[int, ...]
) -> tuple[Array, tuple[Array, Array]]:
    return _depthwise_rhs_gradient(lhs, grad, spec, shape), (lhs, grad)


def _depthwise_backward(
    spec: Spec, shape: tuple[int, ...], residuals: tuple[Array, Array], weights: Array
) -> tuple[Array, Array]:
    """It is linear in both, so its gradients are a convolution's with the weights as the kernel."""
    lhs, grad = residuals
    return (
        _summed_as(lhs, _lhs_gradient(lhs, weights, grad, spec), weights),
        _summed_as(grad, convolution(lhs, weights, spec), weights),
    )


_depthwise_rhs_gradient.defvjp(_depthwise_forward, _depthwise_backward)
