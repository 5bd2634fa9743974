"""What a network normalizes its channels by, as an argument: batch or group normalization."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from jdistill import _validate
from jdistill.typing import Array

# `norm(name=..., train=...)` makes the module that normalizes the channels, the last axis.
Norm = Callable[..., Any]


def batch_norm(
    *, name: str, train: bool, momentum: float = 0.9, epsilon: float = 1e-5
) -> nn.Module:
    """Batch normalization: by mean and variance over examples and pixels, with running averages.

    For the field `norm` of this package's networks. In training the batch's own statistics
    normalize, so an example's logits depend on the others, and the running ones are updated (model
    state "batch_stats"); in evaluation the running ones normalize.

    Args:
        name: Of the layer, as its variables are called.
        train: Whether the batch's own statistics normalize, and the running ones are updated.
        momentum: What the running averages keep at a step, in `[0, 1]`; one minus PyTorch's.
        epsilon: Added to the variance; positive.

    Returns:
        The module, of inputs `[..., C]`.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> import functools
        >>> from jdistill import nets
        >>> nets.resnet(8, norm=functools.partial(batch_norm, momentum=0.99)).depth
        8

    References:
        Ioffe & Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing
        Internal Covariate Shift".
    """
    _check(name, train, epsilon)
    _validate.scalar(momentum=momentum)
    _validate.within(0.0, 1.0, momentum=momentum)
    return nn.BatchNorm(
        use_running_average=not train, momentum=momentum, epsilon=epsilon, name=name
    )


def group_norm(*, name: str, train: bool, num_groups: int = 32, epsilon: float = 1e-5) -> nn.Module:
    """Group normalization: each example by mean and variance over pixels and a group of channels.

    For the field `norm` of this package's networks. An example's logits do not depend on others, in
    training and in evaluation the same, and there is no model state.

    There are `num_groups` groups or, where that does not divide the number of channels, the largest
    number below that does. A group has at least two channels: a single one would be zero wherever
    there is one pixel.

    Args:
        name: Of the layer, as its variables are called.
        train: Ignored; for the signature that `nets.batch_norm` has.
        num_groups: Most groups; at least 1.
        epsilon: Added to the variance; positive.

    Returns:
        The module, of inputs `[B, ..., C]`.

    Raises:
        ValueError: An argument out of its range.

    Example:
        >>> import functools, jax
        >>> from jdistill import nets
        >>> model = nets.resnet(8, norm=functools.partial(group_norm, num_groups=8))
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 3))
        >>> params["norm"]["scale"].shape, model_state
        ((16,), {})

    References:
        Wu & He 2018, "Group Normalization", section 3.
    """
    _check(name, train, epsilon)
    _validate.count(num_groups=num_groups)
    return _GroupNorm(num_groups, epsilon, name=name)


def _check(name: Any, train: Any, epsilon: Any) -> None:
    _validate.text(name=name)
    _validate.flag(train=train)
    _validate.scalar(epsilon=epsilon)
    _validate.positive(epsilon=epsilon)


class _GroupNorm(nn.Module):
    """Group normalization with a number of groups that fits the channels."""

    num_groups: int
    epsilon: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        *others, channels = x.shape
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        most = max(1, min(self.num_groups, channels // 2))
        groups = next(number for number in range(most, 0, -1) if channels % number == 0)
        parts = x.reshape(*others, groups, channels // groups)
        axes = (*range(1, len(others)), parts.ndim - 1)
        centered = parts - jnp.mean(parts, axes, keepdims=True)
        variance = jnp.mean(jnp.square(centered), axes, keepdims=True)
        whole = (centered * lax.rsqrt(variance + self.epsilon)).reshape(x.shape)
        ones = (1,) * len(others)
        return whole * scale.reshape(*ones, channels) + bias.reshape(*ones, channels)
