"""MobileNetV2 for ImageNet's pictures and for small ones."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdistill import _validate
from jdistill.nets._convolution import conv_general_dilated
from jdistill.nets._fields import (
    by_value,
    check_fields,
    check_keys,
    check_rate,
    check_width,
    drop_units,
)
from jdistill.nets._normalization import Norm, batch_norm
from jdistill.typing import Array

Stages = tuple[tuple[int, int, int, int], ...]

# Expansion, channels, blocks, and the first block's stride: table 2 of the paper.
_IMAGENET: Stages = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class MobileNetV2(nn.Module):
    """MobileNetV2: inverted residual blocks, whose wide part is depthwise.

    A 3x3 convolution; stages of blocks; a 1x1 convolution; the mean over all pixels; and a linear
    layer. A block expands its channels by a 1x1 convolution (one with expansion 1 does not), goes
    on by a 3x3 depthwise convolution, which may have a stride, and reduces them by another 1x1
    convolution without an activation. Where neither size nor channels change, what came in is
    added. Every convolution is without a bias, padded alike on both sides, and followed by
    normalization (by batch, unless `norm` says otherwise) and, but for each block's last one, by
    the activation.

    Kernels start He-normal by their inputs, nine of a depthwise one; torchvision starts them by
    their outputs.

    Two nets with equal fields are equal and share one trace; pass module-level functions, not
    lambdas.

    Attributes:
        stages: A row of four whole numbers each, as in table 2 of the paper: the expansion, the
            channels, the number of blocks, and the stride of the first of them.
        stem_channels: Channels of the first convolution.
        stem_stride: Its stride: 2 for ImageNet's pictures, 1 for small ones.
        head_channels: Channels of the last convolution.
        projections: Whether each block with a stride of 1 has a shortcut, through a 1x1 convolution
            and normalization where channels change, and blocks with expansion 1 begin with a 1x1
            convolution, too: so is the widely used copy for CIFAR, and not the paper's network.
        activation: The activation; the paper's is `jax.nn.relu6`.
        dropout_rate: Share of values dropped before the linear layer in training, in `[0, 1)`.
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
        ValueError: A field out of its range, inputs that are not `[B, H, W, C]`, or `train=True`
            without `dropout_keys` where values are dropped.

    Example:
        >>> import jax
        >>> from jdistill import nets
        >>> model = MobileNetV2(stages=((1, 8, 1, 1), (2, 8, 2, 2)), head_channels=16)
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> variables = {"params": params, **model_state}
        >>> model.apply(variables, jax.numpy.zeros((2, 8, 8, 1))).shape
        (2, 10)

    References:
        Sandler, Howard, Zhu, Zhmoginov & Chen 2018, "MobileNetV2: Inverted Residuals and Linear
        Bottlenecks", section 4 and table 2.
    """

    stages: Stages = _IMAGENET
    stem_channels: int = 32
    stem_stride: int = 2
    head_channels: int = 1280
    projections: bool = False
    activation: Callable[..., Array] = jax.nn.relu6
    dropout_rate: float = 0.0
    num_classes: int = 10
    shift: float = 0.5
    conv_general_dilated: Callable[..., Array] = conv_general_dilated
    norm: Norm = batch_norm

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", _checked(self.stages))
        _validate.count(stem_channels=self.stem_channels, stem_stride=self.stem_stride)
        _validate.count(head_channels=self.head_channels)
        _validate.flag(projections=self.projections)
        _validate.function(activation=self.activation, remedy="pass a function of an array")
        object.__setattr__(self, "activation", by_value(self.activation))
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
            dropout_keys: `[B]` PRNG keys, one per example; the mask of example i depends on key i
                only. Needed when `train` and `dropout_rate > 0`, else unused.

        Returns:
            `[B, K]`, not normalized.
        """
        _validate.rank(4, inputs=inputs)
        drop = train and self.dropout_rate > 0
        keys = check_keys(dropout_keys, "dropout_rate") if drop else None

        def layer(
            x: Array, size: int, kernel: int, name: str, stride: int = 1, groups: int = 1
        ) -> Array:
            x = nn.Conv(
                size,
                (kernel, kernel),
                strides=stride,
                padding=((kernel // 2, kernel // 2),) * 2,
                feature_group_count=groups,
                use_bias=False,
                kernel_init=nn.initializers.he_normal(),
                conv_general_dilated=self.conv_general_dilated,
                name=f"conv{name}",
            )(x)
            normalized: Array = self.norm(name=f"norm{name}", train=train)(x)
            return normalized

        x = layer(inputs - self.shift, self.stem_channels, 3, "", self.stem_stride)
        x = self.activation(x)
        for stage, (expansion, size, number, first) in enumerate(self.stages):
            for block in range(number):
                name, stride = f"_{stage}_{block}", first if block == 0 else 1
                wide = expansion * x.shape[-1]
                y = x
                if expansion > 1 or self.projections:
                    y = self.activation(layer(y, wide, 1, f"{name}_expand"))
                y = self.activation(layer(y, wide, 3, f"{name}_depthwise", stride, wide))
                y = layer(y, size, 1, f"{name}_reduce")
                if stride == 1 and x.shape[-1] == size:
                    y += x
                elif stride == 1 and self.projections:
                    y += layer(x, size, 1, f"{name}_shortcut")
                x = y
        x = self.activation(layer(x, self.head_channels, 1, "_head"))
        x = jnp.mean(x, axis=(1, 2))
        if keys is not None:
            x = drop_units(keys, 0, x, self.dropout_rate)
        return nn.Dense(self.num_classes, name="logits")(x)


def _checked(stages: Any) -> Stages:
    """Rows of four whole numbers, as tuples."""
    _validate.sequence(stages=stages, remedy="pass a tuple of tuples")
    rows = [_validate.shape(stages=row) for row in stages]
    for row in rows:
        if len(row) != 4:
            raise ValueError(
                "expected each of stages to be (expansion, channels, blocks, stride), got "
                f"{row}; pass four numbers"
            )
    return tuple((row[0], row[1], row[2], row[3]) for row in rows)


def _rounded(size: float) -> int:
    """A number of channels as a multiple of 8, the nearest that is not below it by over a tenth."""
    nearest = max(8, int(size + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * size else nearest


def _sizes(width: float, stages: Stages) -> dict[str, Any]:
    """The channels of all layers multiplied by the width; the last one's only if it is above 1."""
    check_width(width)
    return {
        "stages": tuple((row[0], _rounded(row[1] * width), *row[2:]) for row in stages),
        "stem_channels": _rounded(32 * width),
        "head_channels": _rounded(1280 * max(1.0, width)),
    }


def mobilenet_v2(width: float = 1.0, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 for 224x224x3 images of 1,000 classes: 3,504,872 parameters at width 1.

    Args:
        width: Factor on the number of channels, rounded to multiples of 8; the last convolution's
            1,280 grow with a width above 1 and stay at one below, as in the paper.
        **kwargs: Fields of `MobileNetV2`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: `width` is not a positive number, or a field is out of its range.

    Example:
        >>> mobilenet_v2(width=0.5).stages[-1]
        (6, 160, 1, 1)

    References:
        Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", table 2.
    """
    return MobileNetV2(**{**_sizes(width, _IMAGENET), "num_classes": 1000, **kwargs})


def mobilenet_v2_cifar(width: float = 1.0, **kwargs: Any) -> MobileNetV2:
    """MobileNetV2 for small pictures such as 32x32x3: 2,296,922 parameters at width 1.

    It halves the picture three times, not five: the first convolution and the stage of 24 channels
    have a stride of 1. It has the shortcuts and ReLUs of the copy that papers on CIFAR train;
    `projections=False, activation=jax.nn.relu6` makes the paper's blocks of it (2,236,682).

    Args:
        width: Factor on the number of channels, as for `mobilenet_v2`.
        **kwargs: Fields of `MobileNetV2`, such as `head_channels` for a small network.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: `width` is not a positive number, or a field is out of its range.

    Example:
        >>> mobilenet_v2_cifar(width=0.25, head_channels=64).stages[1]
        (6, 8, 2, 1)

    References:
        Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks". Liu,
        "pytorch-cifar", `mobilenetv2.py`.
    """
    stages = tuple((*row[:3], 1 if row[1] == 24 else row[3]) for row in _IMAGENET)
    fields = {"stem_stride": 1, "projections": True, "activation": jax.nn.relu}
    return MobileNetV2(**{**_sizes(width, stages), **fields, **kwargs})
