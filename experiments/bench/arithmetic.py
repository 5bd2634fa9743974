"""Operations and bytes of a `nets.ConvNet`'s steps in closed form, for the roofline.

Counted are the products (a multiplication and an addition are two operations) and the traffic of
an ideal program: each pass through a layer reads two of its three arrays (inputs, weights,
outputs, or their gradients) once from memory and writes the third once, and everything else (bias,
ReLU, dropout, loss) happens on the way at no cost.
"""

import itertools
import math
from typing import NamedTuple

from jdistill import nets

_BYTES = 4  # of a float32


class Layer(NamedTuple):
    """Forward pass of a layer over a batch.

    Attributes:
        name: as of its parameters, or `pool_…`.
        flops: of its product; 0 for a pool, which only compares.
        inputs: numbers that go in.
        weights: numbers of its kernel; 0 for a pool.
        outputs: numbers that come out.
    """

    name: str
    flops: int
    inputs: int
    weights: int
    outputs: int

    @property
    def bytes(self) -> int:
        """Bytes of its three arrays: the traffic of any pass, forward or backward."""
        return _BYTES * (self.inputs + self.weights + self.outputs)


class Work(NamedTuple):
    """Work of a step: floating-point operations, and bytes from and to memory."""

    flops: int
    bytes: int


def layers(model: nets.ConvNet, input_shape: tuple[int, int, int], batch_size: int) -> list[Layer]:
    """Layers in order.

    Args:
        model: the network.
        input_shape: of one image, `[H, W, C]`.
        batch_size: images.
    """
    found: list[Layer] = []
    height, width, channels = input_shape
    for number, block in enumerate(model.features):
        for position, size in enumerate(block):
            inputs = batch_size * height * width * channels
            height, width = height - 2, width - 2
            outputs = batch_size * height * width * size
            weights = 9 * channels * size
            name, flops = f"conv_{number}_{position}", 2 * outputs * 9 * channels
            found.append(Layer(name, flops, inputs, weights, outputs))
            channels = size
        height, width = height // 2, width // 2
        found.append(Layer(f"pool_{number}", 0, outputs, 0, batch_size * height * width * channels))
    sizes = (height * width * channels, *model.hidden, model.num_classes)
    for number, (before, after) in enumerate(itertools.pairwise(sizes)):
        name = f"dense_{number}" if number < len(model.hidden) else "logits"
        flops = 2 * batch_size * before * after
        found.append(Layer(name, flops, batch_size * before, before * after, batch_size * after))
    return found


def training(model: nets.ConvNet, input_shape: tuple[int, int, int], batch_size: int) -> Work:
    """Training step: forward, gradients of the weights and, but for the first, of the inputs.

    The update reads weights, gradient and momentum and writes weights and momentum.
    """
    there = layers(model, input_shape, batch_size)
    passes = [*there, *(layer for layer in there if layer.weights), *there[1:]]
    update = 5 * _BYTES * sum(layer.weights for layer in there)
    return Work(sum(one.flops for one in passes), sum(one.bytes for one in passes) + update)


def ascending(model: nets.ConvNet, input_shape: tuple[int, int, int], batch_size: int) -> Work:
    """Step of PGD: forward, gradient of the inputs.

    The step reads images, gradient and where they started, and writes images.
    """
    passes = 2 * layers(model, input_shape, batch_size)
    step = 4 * _BYTES * batch_size * math.prod(input_shape)
    return Work(sum(one.flops for one in passes), sum(one.bytes for one in passes) + step)
