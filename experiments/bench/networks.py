"""PGD on networks as users write them, with the library's rules for CPU and without them."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.bench import subjects, timing, train
from experiments.bench.options import Options, command
from experiments.bench.rows import Row
from experiments.bench.subjects import Images
from experiments.bench.timing import AfterCall, Calls
from jdistill import nets
from jdistill.typing import Array, PyTree

MNIST, PLAIN = "nets.mnist_net", "mnist_net in plain Flax"
RESNET, SEPARABLE = "ResNet-20", "depthwise-separable network"
OFF = " without nets.fast_on_cpu"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Networks(Options):
    """PGD on networks that a user writes in Flax, on the CPU.

    The papers' MNIST network written out with `nn.Conv` and `nn.max_pool` beside `nets.mnist_net`
    of the same weights; and that one, a ResNet-20 for CIFAR and a depthwise-separable network
    beside themselves without `nets.fast_on_cpu`.
    """

    on_cpu: ClassVar[bool] = True

    num_steps: int = 10
    """Steps of PGD, in a ball so small that no image ends them early."""
    batch_size: int = 128
    """Images."""
    width: float = 1.0
    """Of all networks: a factor on every number of channels and hidden units. Their weights are
    trained on the digits, once, in a few minutes, and kept in the cache."""


class PlainNet(nn.Module):
    """Network of a `nets.ConvNet`'s weights in plain Flax, for inference.

    Attributes:
        features: channels of each convolution, one tuple per block.
        hidden: sizes of the hidden dense layers.
        conv_general_dilated: the convolution.
    """

    features: tuple[tuple[int, ...], ...]
    hidden: tuple[int, ...]
    conv_general_dilated: Callable[..., Array] = jax.lax.conv_general_dilated

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits `[B, 10]` of inputs `[B, H, W, C]`."""
        convolution = functools.partial(
            nn.Conv,
            kernel_size=(3, 3),
            padding="VALID",
            conv_general_dilated=self.conv_general_dilated,
        )
        x = inputs - 0.5
        for number, block in enumerate(self.features):
            for position, size in enumerate(block):
                x = nn.relu(convolution(size, name=f"conv_{number}_{position}")(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape((x.shape[0], -1))
        for number, size in enumerate(self.hidden):
            x = nn.relu(nn.Dense(size, name=f"dense_{number}")(x))
        return nn.Dense(10, name="logits")(x)


class ResNet20(nn.Module):
    """Residual network for CIFAR-10 of 3 × 3 blocks (He et al. 2016, section 4.2).

    Attributes:
        width: channels of the first stage.
    """

    width: int = 16

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> Array:
        """Logits `[B, 10]` of inputs `[B, H, W, C]`."""
        normalized = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        convolution = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False)
        x = nn.relu(normalized()(convolution(self.width)(inputs - 0.5)))
        for stage, block in [(stage, block) for stage in range(3) for block in range(3)]:
            size, strides = self.width * 2**stage, 2 if stage and not block else 1
            y = nn.relu(normalized()(convolution(size, strides=strides)(x)))
            y = normalized()(convolution(size)(y))
            if strides > 1:
                x = normalized()(convolution(size, kernel_size=(1, 1), strides=strides)(x))
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class SeparableNet(nn.Module):
    """Network of depthwise 3×3 and pointwise convolutions (Howard et al. 2017), a small one.

    Attributes:
        width: channels of the first layer.
    """

    width: int = 16

    @nn.compact
    def __call__(self, inputs: Array) -> Array:
        """Logits `[B, 10]` of inputs `[B, H, W, C]`."""
        x = nn.relu(nn.Conv(self.width, (3, 3))(inputs - 0.5))
        for factor, strides in ((2, 2), (4, 1), (4, 2), (8, 1)):
            channels = x.shape[-1]
            depthwise = nn.Conv(channels, (3, 3), strides, feature_group_count=channels)
            x = nn.relu(depthwise(x))
            x = nn.relu(nn.Conv(self.width * factor, (1, 1))(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Subject(NamedTuple):
    """Network to attack, and images that it classifies correctly."""

    model: nn.Module
    variables: PyTree
    images: Images


def run(options: Networks, after_call: AfterCall) -> Iterator[list[Row]]:
    """Rows of the command."""
    yield rows(options, calls(options, load(options)), after_call)


def plain_net(model: nets.ConvNet, **settings: Any) -> PlainNet:
    """Network of the same architecture in plain Flax."""
    return PlainNet(model.features, model.hidden, **settings)


def load(options: Networks) -> dict[str, Subject]:
    """Networks by name, trained on the digits."""
    width = options.width
    mnist, channels = nets.mnist_net(width=width), max(1, round(16 * width))

    def subject(file: str, model: nn.Module, input_shape: tuple[int, int, int]) -> Subject:
        variables = subjects.trained(f"{file}-{width:g}", model, input_shape)
        logits_fn = nets.logits_fn(model, variables)
        images = subjects.digits(input_shape).all
        right = subjects.correct_images(logits_fn, images, options.batch_size)
        return Subject(model, jax.tree.map(jnp.asarray, variables), right)

    return {
        MNIST: subject("mnist_net", mnist, (28, 28, 1)),
        PLAIN: subject("mnist_net", plain_net(mnist), (28, 28, 1)),
        RESNET: subject("resnet20", ResNet20(channels), (32, 32, 3)),
        SEPARABLE: subject("separable", SeparableNet(channels), (32, 32, 3)),
    }


def calls(options: Networks, networks: Mapping[str, Subject]) -> Calls:
    """Calls of PGD on each network, and with the library's rules for CPU switched off."""
    found: dict[str, Callable[[], Any]] = {}
    for name, (model, variables, images) in networks.items():
        ways = {name: nets.logits_fn(model, variables)}
        if name != MNIST:
            ways[name + OFF] = nets.fast_on_cpu(ways[name], enabled=False)
        on_device = [jnp.asarray(column) for column in images]
        for way, logits_fn in ways.items():
            found[way] = functools.partial(
                train.resisted_pgd, logits_fn, *on_device, num_steps=options.num_steps
            )
    return found


def rows(
    options: Networks, calls: Calls, after_call: AfterCall = lambda done, total: None
) -> list[Row]:
    """Rows of the calls."""
    timed = timing.interleaved(calls, repeats=options.repeats, after_call=after_call)
    pairs = [(PLAIN, MNIST), *((name, name + OFF) for name in calls if name + OFF in calls)]
    return [
        Row(
            f"PGD, {options.num_steps} steps, {options.batch_size} images, {name}",
            timed.timings[name],
            peer,
            timed.timings[peer],
            command(options),
            target=1.15 if peer == MNIST else None,
            peer_compiles=True,
            note=train.fooled(timed.results[name]),
        )
        for name, peer in pairs
    ]
