"""Residual networks with projections: ResNet-18 and its kin, and wide residual networks."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jdistill import _validate
from jdistill.nets._convolution import conv_general_dilated
from jdistill.nets._fields import (
    check_fields,
    check_keys,
    check_rate,
    check_width,
    drop_units,
    scaled,
)
from jdistill.nets._normalization import Norm, batch_norm
from jdistill.nets._pooling import max_pool
from jdistill.typing import Array


def _convolution(model: Any, size: int, kernel: int, stride: int, name: str) -> nn.Conv:
    """A convolution without a bias, padded alike on both sides (see `_cifar.py`)."""
    return nn.Conv(
        size,
        (kernel, kernel),
        strides=stride,
        padding=((kernel // 2, kernel // 2),) * 2,
        use_bias=False,
        kernel_init=nn.initializers.he_normal(),
        conv_general_dilated=model.conv_general_dilated,
        name=name,
    )


class ProjectionResNet(nn.Module):
    """Residual network of basic blocks whose shortcuts are 1x1 convolutions; ResNet-18 and its kin.

    The stem, a convolution and perhaps a max-pool; groups of blocks, each with twice the channels
    of the one before and, from the second on, half its picture; the mean over all pixels; and a
    linear layer. A block is two 3x3 convolutions beside a shortcut, which where the size changes is
    a 1x1 convolution (option B of the paper). Every convolution is without a bias, padded alike on
    both sides, and followed by normalization (by batch, unless `norm` says otherwise).

    Kernels start He-normal by their inputs; PyTorch's networks start them by their outputs.

    Two nets with equal fields are equal and share one trace; pass module-level functions, not
    lambdas.

    Attributes:
        blocks: Number of blocks of each group: (2, 2, 2, 2) for ResNet-18, (3, 4, 6, 3) for
            ResNet-34.
        channels: Channels of the first group and of the stem.
        stem_size: Side of the first convolution's kernel, odd: 3 for small pictures, 7 for
            ImageNet's.
        stem_stride: Stride of the first convolution: 1, or 2 for ImageNet.
        stem_pool: Whether a 3x3 max-pool with a stride of 2 follows it, as for ImageNet.
        num_classes: `K`, the number of logits.
        shift: Subtracted from the inputs before anything else, so that attacks can work on the
            data's own range `[0, 1]` while the first layer sees `[-0.5, 0.5]`.
        conv_general_dilated: The convolution, with the signature of
            `jax.lax.conv_general_dilated`. The default has fast gradients on CPU but no
            forward-mode derivative; pass `jax.lax.conv_general_dilated` where `jax.jvp`,
            `jax.jacfwd` or `jax.hessian` is needed.
        norm: What makes a normalization layer: `nets.batch_norm`, `nets.group_norm` (no model
            state), either under `functools.partial`, or a function of `name` and `train` that
            returns a Linen module.

    Raises:
        ValueError: A field out of its range, or inputs that are not `[B, H, W, C]`.

    Example:
        >>> import jax
        >>> from jdistill import nets
        >>> model = ProjectionResNet(blocks=(1, 1), channels=4, num_classes=3)
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> variables = {"params": params, **model_state}
        >>> model.apply(variables, jax.numpy.zeros((2, 8, 8, 1))).shape
        (2, 3)

    References:
        He, Zhang, Ren & Sun 2016, "Deep Residual Learning for Image Recognition", section 4.1.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    channels: int = 64
    stem_size: int = 3
    stem_stride: int = 1
    stem_pool: bool = False
    num_classes: int = 10
    shift: float = 0.5
    conv_general_dilated: Callable[..., Array] = conv_general_dilated
    norm: Norm = batch_norm

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", _validate.shape(blocks=self.blocks))
        _validate.count(channels=self.channels)
        _validate.count(stem_size=self.stem_size, stem_stride=self.stem_stride)
        _validate.flag(stem_pool=self.stem_pool)
        if self.stem_size % 2 == 0:
            raise ValueError(
                f"expected an odd stem_size, got {self.stem_size}; "
                f"pass {self.stem_size - 1} or {self.stem_size + 1}"
            )
        check_fields(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Array, *, train: bool = False) -> Array:
        """The logits `[B, K]` of inputs `[B, H, W, C]`.

        Args:
            inputs: `[B, H, W, C]` float, in `[0, 1]` when `shift` is 0.5.
            train: Whether it is called in training: with batch normalization the batch's own
                statistics normalize, and the running ones are updated.

        Returns:
            `[B, K]`, not normalized.
        """
        _validate.rank(4, inputs=inputs)

        def layer(x: Array, size: int, kernel: int, stride: int, name: str) -> Array:
            x = _convolution(self, size, kernel, stride, f"conv{name}")(x)
            normalized: Array = self.norm(name=f"norm{name}", train=train)(x)
            return normalized

        x = layer(inputs - self.shift, self.channels, self.stem_size, self.stem_stride, "")
        x = nn.relu(x)
        if self.stem_pool:
            x = max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for group, number in enumerate(self.blocks):
            size = self.channels * 2**group
            for block in range(number):
                name, stride = f"_{group}_{block}", 2 if group > 0 and block == 0 else 1
                y = nn.relu(layer(x, size, 3, stride, f"{name}_0"))
                y = layer(y, size, 3, 1, f"{name}_1")
                if stride > 1:
                    x = layer(x, size, 1, stride, f"{name}_shortcut")
                x = nn.relu(x + y)
        return nn.Dense(self.num_classes, name="logits")(jnp.mean(x, axis=(1, 2)))


class WideResNet(nn.Module):
    """Wide residual network of depth 6n + 4 and a width: WRN-16-4, WRN-28-10, WRN-34-10.

    A 3x3 convolution to 16 channels; three groups of n blocks with 16, 32, and 64 channels times
    the width, the second and third of which halve the picture in their first block; normalization,
    a ReLU, and the mean over all pixels; and a linear layer. A block is pre-activated: twice
    normalization, a ReLU, and a 3x3 convolution, with dropout before the second one. Its shortcut
    adds what came in; where the size changes, it is a 1x1 convolution of what came in after the
    first normalization and ReLU. Convolutions have no bias.

    Kernels start He-normal by their inputs; the released code starts them by their outputs.

    Two nets with equal fields are equal and share one trace; pass module-level functions, not
    lambdas.

    Attributes:
        depth: Number of convolutions, 6n + 4, at least 10: the first one, 2n in each group, and the
            three shortcuts.
        width: Factor on the channels of the groups, rounded, at least 1 each; the paper's are whole
            numbers, and less than 1 makes a small assistant.
        dropout_rate: Share of values dropped between the convolutions of a block in training, in
            `[0, 1)`; the paper has 0.3 or none.
        num_classes: `K`, the number of logits.
        shift: Subtracted from the inputs before anything else, so that attacks can work on the
            data's own range `[0, 1]` while the first layer sees `[-0.5, 0.5]`.
        conv_general_dilated: The convolution, with the signature of
            `jax.lax.conv_general_dilated`. The default has fast gradients on CPU but no
            forward-mode derivative; pass `jax.lax.conv_general_dilated` where `jax.jvp`,
            `jax.jacfwd` or `jax.hessian` is needed.
        norm: What makes a normalization layer: `nets.batch_norm`, `nets.group_norm` (no model
            state), either under `functools.partial`, or a function of `name` and `train` that
            returns a Linen module.

    Raises:
        ValueError: A depth that is not 6n + 4, another field out of its range, inputs that are not
            `[B, H, W, C]`, or `train=True` without `dropout_keys` where values are dropped.

    Example:
        >>> import jax
        >>> from jdistill import nets
        >>> model = WideResNet(10, 0.5, num_classes=3)
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 3))
        >>> variables = {"params": params, **model_state}
        >>> model.apply(variables, jax.numpy.zeros((2, 8, 8, 3))).shape
        (2, 3)

    References:
        Zagoruyko & Komodakis 2016, "Wide Residual Networks", section 2 and table 1, and
        `wide-resnet.lua` of its code.
    """

    depth: int
    width: float = 1.0
    dropout_rate: float = 0.0
    num_classes: int = 10
    shift: float = 0.5
    conv_general_dilated: Callable[..., Array] = conv_general_dilated
    norm: Norm = batch_norm

    def __post_init__(self) -> None:
        _validate.count(minimum=10, depth=self.depth)
        if (self.depth - 4) % 6:
            lower = self.depth - (self.depth - 4) % 6
            raise ValueError(
                f"expected depth of 6n + 4, such as 10, 16, 28, 34, 40, got {self.depth}; "
                f"pass {lower} or {lower + 6}"
            )
        check_width(self.width)
        check_rate("values to drop", dropout_rate=self.dropout_rate)
        check_fields(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: Array, *, train: bool = False, dropout_keys: Array | None = None
    ) -> Array:
        """The logits `[B, K]` of inputs `[B, H, W, C]`.

        Args:
            inputs: `[B, H, W, C]` float, in `[0, 1]` when `shift` is 0.5.
            train: Whether it is called in training: values are dropped, and with batch
                normalization the batch's own statistics normalize, and the running ones are
                updated.
            dropout_keys: `[B]` PRNG keys, one per example; the masks of example i depend on key i
                only. Needed when `train` and `dropout_rate > 0`, else unused.

        Returns:
            `[B, K]`, not normalized.
        """
        _validate.rank(4, inputs=inputs)
        drop = train and self.dropout_rate > 0
        keys = check_keys(dropout_keys, "dropout_rate") if drop else None

        def activated(x: Array, name: str) -> Array:
            return nn.relu(self.norm(name=f"norm{name}", train=train)(x))

        x = _convolution(self, 16, 3, 1, "conv")(inputs - self.shift)
        number = (self.depth - 4) // 6
        for group, base in enumerate((16, 32, 64)):
            size = scaled(base, self.width)
            for block in range(number):
                name, stride = f"_{group}_{block}", 2 if group > 0 and block == 0 else 1
                before = activated(x, f"{name}_0")
                if stride > 1 or x.shape[-1] != size:
                    x = _convolution(self, size, 1, stride, f"conv{name}_shortcut")(before)
                y = _convolution(self, size, 3, stride, f"conv{name}_0")(before)
                y = activated(y, f"{name}_1")
                if keys is not None:
                    y = drop_units(keys, group * number + block, y, self.dropout_rate)
                x = x + _convolution(self, size, 3, 1, f"conv{name}_1")(y)
        return nn.Dense(self.num_classes, name="logits")(jnp.mean(activated(x, ""), axis=(1, 2)))


def resnet18(width: float = 1.0, **kwargs: Any) -> ProjectionResNet:
    """ResNet-18 for small pictures such as 32x32x3: 11,173,962 parameters at width 1.

    Its stem is a 3x3 convolution with a stride of 1 and no max-pool, as papers on CIFAR have it.

    Args:
        width: Factor on every number of channels, from 64 on, rounded, at least 1.
        **kwargs: Fields of `ProjectionResNet`, such as `blocks=(3, 4, 6, 3)` for a ResNet-34.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: `width` is not a positive number, or a field is out of its range.

    Example:
        >>> resnet18(width=0.25).channels
        16

    References:
        He, Zhang, Ren & Sun 2016, "Deep Residual Learning for Image Recognition", table 1.
    """
    check_width(width)
    return ProjectionResNet(**{"channels": scaled(64, width), **kwargs})


def resnet18_imagenet(width: float = 1.0, **kwargs: Any) -> ProjectionResNet:
    """ResNet-18 for 224x224x3 images of 1,000 classes: 11,689,512 parameters at width 1.

    Its stem is a 7x7 convolution and a 3x3 max-pool, both with a stride of 2.

    Args:
        width: Factor on every number of channels, from 64 on, rounded, at least 1.
        **kwargs: Fields of `ProjectionResNet`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: `width` is not a positive number, or a field is out of its range.

    Example:
        >>> resnet18_imagenet().stem_size
        7

    References:
        He, Zhang, Ren & Sun 2016, "Deep Residual Learning for Image Recognition", table 1.
    """
    stem = {"stem_size": 7, "stem_stride": 2, "stem_pool": True}
    return resnet18(width, **{**stem, "num_classes": 1000, **kwargs})


def wide_resnet(depth: int, width: float, **kwargs: Any) -> WideResNet:
    """The wide residual network for 32x32x3 images, WRN-`depth`-`width`: 36,479,194 for WRN-28-10.

    Args:
        depth: 6n + 4, at least 10; in papers on robustness 16, 28, 34, 40, and 70.
        width: Factor on the channels; in papers a whole number, 1 to 16.
        **kwargs: Fields of `WideResNet`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: A depth that is not 6n + 4, or a field out of its range.

    Example:
        >>> wide_resnet(16, 4).width
        4

    References:
        Zagoruyko & Komodakis 2016, "Wide Residual Networks", table 1.
    """
    return WideResNet(depth, width, **kwargs)
