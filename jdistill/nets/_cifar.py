"""The networks for CIFAR that papers on distillation compare: residual and plain ones, by depth."""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jdistill import _validate
from jdistill.nets._convolution import conv_general_dilated
from jdistill.nets._fields import check_fields
from jdistill.nets._normalization import Norm, batch_norm
from jdistill.nets._pooling import max_pool
from jdistill.typing import Array

# Channels of the plain networks' convolutions, a max-pool after each tuple, and hidden layers.
_PLAIN: dict[int, tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]] = {
    2: (((16,), (16,)), ()),
    4: (((16, 16), (32, 32)), ()),
    6: (((16, 16), (32, 32), (64, 64)), ()),
    8: (((16, 16), (32, 32), (64, 64), (128, 128)), (64,)),
    10: (((32, 32), (64, 64), (128, 128), (256, 256, 256, 256)), (128,)),
}

# One pixel on every side, as in the papers: on even sizes 'SAME' with a stride of 2 pads the far
# side alone, and the outputs would stand one pixel off those of the shortcut.
_PADDING = ((1, 1), (1, 1))


def _shortcut(inputs: Array, size: int, stride: int) -> Array:
    """Every `stride`-th pixel of `[B, H, W, C]`, with channels of zeros after its own up to `size`.

    Option A of He et al.: no parameters.
    """
    kept = inputs[:, ::stride, ::stride]
    return jnp.pad(kept, ((0, 0), (0, 0), (0, 0), (0, size - inputs.shape[-1])))


class ResNet(nn.Module):
    """Residual network for CIFAR of depth 6n + 2: 8, 14, 20, 26, 32, 44, 56, 110.

    A 3x3 convolution to 16 channels; three groups of n blocks with 16, 32, and 64 channels, the
    second and third of which halve the picture in their first block; the mean over all pixels; and
    a linear layer. A block is two 3x3 convolutions beside a shortcut. Every convolution is without
    a bias and followed by normalization (by batch, unless `norm` says otherwise; running averages
    decay by 0.9 a step, epsilon is 1e-5), and kernels start He-normal. Where the size changes, the
    shortcut has no parameters: it takes every second pixel and adds channels of zeros (option A of
    the paper).

    Teacher assistants were studied with ResNets whose shortcuts are 1x1 convolutions there (option
    B; released code of Mirzadeh et al. 2020), with batch normalization: 2,752 more parameters.

    Two nets with equal fields are equal and share one trace; pass module-level functions, not
    lambdas.

    Attributes:
        depth: Layers with weights on the longest path: 6n + 2, at least 8.
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
        ValueError: A depth that is not 6n + 2, another field out of its range, or inputs that are
            not `[B, H, W, C]`.

    Example:
        >>> import jax
        >>> from jdistill import nets
        >>> model = ResNet(8, num_classes=3)
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 3))
        >>> variables = {"params": params, **model_state}
        >>> model.apply(variables, jax.numpy.zeros((2, 8, 8, 3))).shape
        (2, 3)

    References:
        He, Zhang, Ren & Sun 2016, "Deep Residual Learning for Image Recognition", section 4.2.
    """

    depth: int
    num_classes: int = 10
    shift: float = 0.5
    conv_general_dilated: Callable[..., Array] = conv_general_dilated
    norm: Norm = batch_norm

    def __post_init__(self) -> None:
        _validate.count(minimum=8, depth=self.depth)
        if (self.depth - 2) % 6:
            lower = self.depth - (self.depth - 2) % 6
            raise ValueError(
                f"expected depth of 6n + 2, such as 8, 14, 20, 26, got {self.depth}; "
                f"pass {lower} or {lower + 6}"
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

        def layer(x: Array, size: int, stride: int, name: str) -> Array:
            x = nn.Conv(
                size,
                (3, 3),
                strides=stride,
                padding=_PADDING,
                use_bias=False,
                kernel_init=nn.initializers.he_normal(),
                conv_general_dilated=self.conv_general_dilated,
                name=f"conv{name}",
            )(x)
            normalized: Array = self.norm(name=f"norm{name}", train=train)(x)
            return normalized

        x = nn.relu(layer(inputs - self.shift, 16, 1, ""))
        for group, size in enumerate((16, 32, 64)):
            for block in range((self.depth - 2) // 6):
                stride = 2 if group > 0 and block == 0 else 1
                y = nn.relu(layer(x, size, stride, f"_{group}_{block}_0"))
                y = layer(y, size, 1, f"_{group}_{block}_1")
                x = nn.relu(_shortcut(x, size, stride) + y)
        return nn.Dense(self.num_classes, name="logits")(jnp.mean(x, axis=(1, 2)))


class PlainNet(nn.Module):
    """Plain convolutional network by its number of convolutions: 2, 4, 6, 8, or 10.

    The teachers, assistants, and students of Mirzadeh et al. 2020 (TAKD) on CIFAR-10. Channels,
    with `|` for a 2x2 max-pool::

        2:   16 | 16 |
        4:   16 16 | 32 32 |
        6:   16 16 | 32 32 | 64 64 |
        8:   16 16 | 32 32 | 64 64 | 128 128 |  and a hidden dense layer of 64
        10:  32 32 | 64 64 | 128 128 | 256 256 256 256 |  and a hidden dense layer of 128

    From the released code, as far as known from copies of it: the table above; 3x3 convolutions
    with a bias, padded to keep the size, each followed by batch normalization and a ReLU; a ReLU
    and no normalization after the hidden layer; linear logits. Not from it: convolutions start
    He-normal and dense layers LeCun-normal, where PyTorch's defaults are uniform. Running averages
    decay by 0.9 a step and epsilon is 1e-5, as PyTorch has it. The released networks for CIFAR-100
    are wider. `norm` may put another normalization in the place of that by batch.

    Two nets with equal fields are equal and share one trace; pass module-level functions, not
    lambdas.

    Attributes:
        depth: Number of convolutions: 2, 4, 6, 8, or 10.
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
        ValueError: Another depth, another field out of its range, or inputs that are not
            `[B, H, W, C]` or too small for the max-pools.

    Example:
        >>> import jax
        >>> from jdistill import nets
        >>> model = PlainNet(2, num_classes=3)
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 3))
        >>> variables = {"params": params, **model_state}
        >>> model.apply(variables, jax.numpy.zeros((2, 8, 8, 3))).shape
        (2, 3)

    References:
        Mirzadeh, Farajtabar, Li, Levine, Matsukawa & Ghasemzadeh 2020, "Improved Knowledge
        Distillation via Teacher Assistant", and `plain_cnn_cifar.py` of its code.
    """

    depth: int
    num_classes: int = 10
    shift: float = 0.5
    conv_general_dilated: Callable[..., Array] = conv_general_dilated
    norm: Norm = batch_norm

    def __post_init__(self) -> None:
        _validate.one_of(_PLAIN, depth=self.depth)
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
        blocks, hidden = _PLAIN[self.depth]
        least = 2 ** len(blocks)
        if min(inputs.shape[1:3]) < least:
            raise ValueError(
                f"expected inputs of at least {least} pixels a side at depth {self.depth}, got "
                f"{inputs.shape[1]}x{inputs.shape[2]}; use larger inputs or a smaller depth"
            )
        x = inputs - self.shift
        for number, block in enumerate(blocks):
            for position, size in enumerate(block):
                x = nn.Conv(
                    size,
                    (3, 3),
                    padding=_PADDING,
                    kernel_init=nn.initializers.he_normal(),
                    conv_general_dilated=self.conv_general_dilated,
                    name=f"conv_{number}_{position}",
                )(x)
                x = nn.relu(self.norm(name=f"norm_{number}_{position}", train=train)(x))
            x = max_pool(x)
        x = x.reshape((x.shape[0], math.prod(x.shape[1:])))  # -1 would not do for no inputs
        for number, size in enumerate(hidden):
            x = nn.relu(nn.Dense(size, name=f"dense_{number}")(x))
        return nn.Dense(self.num_classes, name="logits")(x)


def resnet(depth: int, **kwargs: Any) -> ResNet:
    """The residual network for 32x32x3 images: 269,722 parameters at depth 20.

    Args:
        depth: 6n + 2, at least 8; in papers on distillation 8, 14, 20, 26, 32, 44, 56, and 110.
        **kwargs: Fields of `ResNet`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: A depth that is not 6n + 2, or a field out of its range.

    Example:
        >>> resnet(20).depth
        20

    References:
        He, Zhang, Ren & Sun 2016, "Deep Residual Learning for Image Recognition", section 4.2.
    """
    return ResNet(depth, **kwargs)


def plain_net(depth: int, **kwargs: Any) -> PlainNet:
    """The plain network of the paper on teacher assistants, for 32x32x3 images.

    Args:
        depth: Number of convolutions: 2, 4, 6, 8, or 10.
        **kwargs: Fields of `PlainNet`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: Another depth, or a field out of its range.

    Example:
        >>> plain_net(4).depth
        4

    References:
        Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant".
    """
    return PlainNet(depth, **kwargs)
