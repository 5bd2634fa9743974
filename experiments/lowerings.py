"""The ways to write a convolution, a pooling and a product that the TPU compiler is asked about."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments import steps
from jdistill import nets
from jdistill.nets import _convnet, _convolution_rules, _pooling
from jdistill.typing import Array

_INPUT_SHAPE = (28, 28, 1)

StepName = Literal["training", "sweep", "pgd"]
ConvolutionName = Literal["xla", "jdistill", "cpu rules", "patches"]
PoolingName = Literal["xla", "jdistill", "mask"]


class Lowering(NamedTuple):
    """A way to write a step.

    Attributes:
        name: as in the table.
        convolution: XLA's own; the library's; the library's rules for CPU, on TPU; patches times
            weights.
        pooling: XLA's own; the library's; the library's rule for CPU, on TPU.
        precision: of an attack's products.
    """

    name: str
    convolution: ConvolutionName = "xla"
    pooling: PoolingName = "xla"
    precision: str = "highest"


# The first is what the others are compared with.
LOWERINGS = (
    Lowering("XLA's convolution and pooling"),
    Lowering("jdistill's, as it is", "jdistill", "jdistill"),
    Lowering("convolution by the CPU's rules", "cpu rules"),
    Lowering("patches × weights", "patches"),
    Lowering("max-pool by mask", pooling="mask"),
)
PRECISIONS = (
    Lowering("XLA's, precision high (3 bfloat16 products)", precision="high"),
    Lowering("XLA's, precision default (1 bfloat16 product)", precision="default"),
)


def step(
    name: StepName, lowering: Lowering, *, width: float, batch_size: int, num_runs: int
) -> steps.Step:
    """A step of the papers' MNIST network, written that way; trace it within `written`.

    Args:
        name: which step.
        lowering: how its network is written.
        width: of the network.
        batch_size: images a step, of each run.
        num_runs: runs of a sweep's step.
    """
    convolution = _CONVOLUTIONS[lowering.convolution]
    model = nets.mnist_net(width=width, conv_general_dilated=convolution)
    if name == "training":
        return steps.training(model, _INPUT_SHAPE, batch_size)
    if name == "sweep":
        return steps.sweeping(model, _INPUT_SHAPE, batch_size, num_runs)
    return steps.ascending(model, _INPUT_SHAPE, batch_size, lowering.precision)


@contextlib.contextmanager
def written(lowering: Lowering) -> Iterator[None]:
    """Within: what the network has no argument for is written that way, too."""
    with contextlib.ExitStack() as stack:
        if lowering.convolution == "cpu rules":
            stack.enter_context(mock.patch.object(_convolution_rules, "lax", _CpuRules()))
        if lowering.pooling == "mask":
            stack.enter_context(mock.patch.object(_pooling, "lax", _CpuRules()))
        if lowering.pooling == "xla":
            stack.enter_context(mock.patch.object(_convnet, "max_pool", _xla_max_pool))
        yield


class _CpuRules:
    """`jax.lax`, but every platform gets what is meant for CPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jax.lax, name)

    @staticmethod
    def platform_dependent(
        *arguments: Any, cpu: Callable[..., Any], default: Callable[..., Any]
    ) -> Any:
        del default
        return cpu(*arguments)


def _xla_max_pool(inputs: Array) -> Array:
    return nn.max_pool(inputs, (2, 2), (2, 2))


def patches_convolution(
    lhs: Array,
    rhs: Array,
    window_strides: Sequence[int],
    padding: Any,
    *,
    precision: Any = None,
    **options: Any,
) -> Array:
    """A 'valid' convolution as shifted inputs side by side times the weights, one product.

    Under `vmap` over weights that is a batched product, where XLA's convolution is a grouped one.

    Args:
        lhs: inputs `[B, H, W, I]`.
        rhs: kernel `[h, w, I, O]`.
        window_strides: all 1.
        padding: `"VALID"`, or pairs of 0.
        precision: of the product.
        **options: the rest of what `jax.lax.conv_general_dilated` takes; not looked at.
    """
    del window_strides, padding, options
    rows, columns, _, features = rhs.shape
    height, width = lhs.shape[1] - rows + 1, lhs.shape[2] - columns + 1
    patches = jnp.concatenate(
        [
            lhs[:, row : row + height, column : column + width]
            for row in range(rows)
            for column in range(columns)
        ],
        axis=-1,
    )
    return jnp.matmul(patches, jnp.reshape(rhs, (-1, features)), precision=precision)


_CONVOLUTIONS: Mapping[ConvolutionName, Callable[..., Array]] = {
    "xla": jax.lax.conv_general_dilated,
    "jdistill": nets.conv_general_dilated,
    "cpu rules": nets.conv_general_dilated,
    "patches": patches_convolution,
}
