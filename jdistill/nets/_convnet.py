"""The papers' convolutional networks in Flax Linen."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdistill import _validate
from jdistill.nets._adapters import check_module
from jdistill.nets._convolution import conv_general_dilated
from jdistill.nets._fields import drop_units
from jdistill.nets._pooling import max_pool
from jdistill.typing import Array, PyTree


class ConvNet(nn.Module):
    """Blocks of 3x3 convolutions and 2x2 max-pools, then dense layers, then logits.

    The architecture of Carlini & Wagner (2017, Tables I and II) that Mandal & Gao (2023) distill:
    every convolution is 3x3, 'valid' and followed by a ReLU, every block ends in a max-pool,
    dropout follows the first hidden dense layer only (as in the released code), and the last
    layer is linear. Kernels start Glorot-uniform and biases at zero, the defaults of the Keras
    code that the training recipe comes from.

    Two nets with equal fields are equal and share one trace, so pass tuples, not lists
    (lists are turned into tuples) and module-level functions, not lambdas.

    Attributes:
        features: Channels of each convolution, one tuple a block.
        hidden: Sizes of the hidden dense layers; may be empty.
        num_classes: `K`, the number of logits.
        dropout_rate: Share of the first hidden layer's units dropped in training, in `[0, 1)`.
        shift: Subtracted from the inputs before anything else, so that attacks can work on the
            data's own range `[0, 1]` while the first layer sees `[-0.5, 0.5]` as in the papers.
        conv_general_dilated: The convolution, with the signature of
            `jax.lax.conv_general_dilated`. The default has fast gradients on CPU but no
            forward-mode derivative; pass `jax.lax.conv_general_dilated` where `jax.jvp`,
            `jax.jacfwd` or `jax.hessian` is needed.

    Raises:
        ValueError: A field out of its range, inputs that are not `[B, H, W, C]` or too small for
            the blocks, or `train=True` without `dropout_keys`.

    Example:
        >>> import jax
        >>> model = ConvNet(features=((4,),), hidden=(8,), num_classes=3)
        >>> params, model_state = init(model, jax.random.key(0), (8, 8, 1))
        >>> model.apply({"params": params}, jax.numpy.zeros((2, 8, 8, 1))).shape
        (2, 3)

    References:
        Carlini & Wagner, "Towards Evaluating the Robustness of Neural Networks", 2017, Tables
        I and II, and `setup_mnist.py`, `setup_cifar.py` of its code. Mandal & Gao, "Improving
        Defensive Distillation using Teacher Assistant", 2023.
    """

    features: tuple[tuple[int, ...], ...] = ((32, 32), (64, 64))
    hidden: tuple[int, ...] = (200, 200)
    num_classes: int = 10
    dropout_rate: float = 0.5
    shift: float = 0.5
    conv_general_dilated: Callable[..., Array] = conv_general_dilated

    def __post_init__(self) -> None:
        # Lists would make the module unhashable, and an unhashable module cannot be the static
        # part of an adapter.
        _validate.sequence(features=self.features, remedy="pass a tuple of tuples")
        blocks = tuple(_validate.shape(features=block) for block in self.features)
        object.__setattr__(self, "features", blocks)
        object.__setattr__(self, "hidden", _validate.shape(hidden=self.hidden))
        _validate.count(num_classes=self.num_classes)
        _validate.function(conv_general_dilated=self.conv_general_dilated)
        _validate.scalar(dropout_rate=self.dropout_rate, shift=self.shift)
        _validate.finite(shift=self.shift)
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(
                f"expected dropout_rate in [0, 1), got {self.dropout_rate!r}; "
                "pass the share of units to drop, 0 for none"
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: Array, *, train: bool = False, dropout_keys: Array | None = None
    ) -> Array:
        """The logits `[B, K]` of inputs `[B, H, W, C]`.

        Args:
            inputs: `[B, H, W, C]` float, in `[0, 1]` when `shift` is 0.5.
            train: Whether units are dropped.
            dropout_keys: `[B]` PRNG keys, one per example; the mask of example i depends on key
                i only. Needed when `train` and `dropout_rate > 0`, else unused.

        Returns:
            `[B, K]`, not normalized.
        """
        _validate.rank(4, inputs=inputs)
        drop = train and self.dropout_rate > 0 and len(self.hidden) > 0
        if drop and dropout_keys is None:
            raise ValueError(
                "expected dropout_keys when train=True and dropout_rate > 0, got None; pass one "
                "PRNG key per example, jax.random.split(key, len(inputs)), or set dropout_rate=0"
            )
        initial = nn.initializers.glorot_uniform()

        x = inputs - self.shift
        for number, block in enumerate(self.features):
            if min(x.shape[1:3]) < 2 * len(block) + 2:
                raise ValueError(
                    f"expected inputs of at least {2 * len(block) + 2} pixels a side at block "
                    f"{number}, got {x.shape[1]}x{x.shape[2]} (inputs {inputs.shape}); "
                    "use larger inputs or fewer convolutions in `features`"
                )
            for position, size in enumerate(block):
                x = nn.Conv(
                    size,
                    (3, 3),
                    padding="VALID",
                    kernel_init=initial,
                    conv_general_dilated=self.conv_general_dilated,
                    name=f"conv_{number}_{position}",
                )(x)
                x = nn.relu(x)
            x = max_pool(x)
        x = x.reshape((x.shape[0], math.prod(x.shape[1:])))  # -1 would not do for no inputs
        for number, size in enumerate(self.hidden):
            x = nn.relu(nn.Dense(size, kernel_init=initial, name=f"dense_{number}")(x))
            if drop and number == 0 and dropout_keys is not None:
                x = drop_units(dropout_keys, number, x, self.dropout_rate)
        return nn.Dense(self.num_classes, kernel_init=initial, name="logits")(x)


def _scaled(
    features: tuple[tuple[int, ...], ...], hidden: tuple[int, ...], width: float, **kwargs: Any
) -> ConvNet:
    """A `ConvNet` with every hidden size multiplied by `width`."""
    _validate.scalar(width=width)
    _validate.positive(width=width, remedy="pass 1.0 for the paper's sizes, less for an assistant")

    def scale(size: int) -> int:
        # floor(x + 1/2) and not round(): Python rounds halves to even, and sizes should grow
        # with the width.
        return max(1, math.floor(size * width + 0.5))

    sizes = {
        "features": tuple(tuple(scale(size) for size in block) for block in features),
        "hidden": tuple(scale(size) for size in hidden),
    }
    return ConvNet(**{**sizes, **kwargs})


def mnist_net(width: float = 1.0, **kwargs: Any) -> ConvNet:
    """The papers' network for 28x28x1 images: 312,202 parameters at width 1.

    Args:
        width: Factor on every number of channels and hidden units, rounded, at least 1 each;
            below 1 for a smaller assistant or student.
        **kwargs: Fields of `ConvNet`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: `width` is not a positive number, or a field is out of its range.

    Example:
        >>> mnist_net(width=0.5).features
        ((16, 16), (32, 32))

    References:
        Carlini & Wagner 2017, Table I; Mandal & Gao 2023, `setup_mnist.py`.
    """
    return _scaled(((32, 32), (64, 64)), (200, 200), width, **kwargs)


def cifar_net(width: float = 1.0, **kwargs: Any) -> ConvNet:
    """The papers' network for 32x32x3 images: 1,147,978 parameters at width 1.

    Args:
        width: Factor on every number of channels and hidden units, rounded, at least 1 each.
        **kwargs: Fields of `ConvNet`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: `width` is not a positive number, or a field is out of its range.

    Example:
        >>> cifar_net().hidden
        (256, 256)

    References:
        Carlini & Wagner 2017, Table I; Mandal & Gao 2023, `setup_cifar.py`.
    """
    return _scaled(((64, 64), (128, 128)), (256, 256), width, **kwargs)


def digits_net(width: float = 1.0, **kwargs: Any) -> ConvNet:
    """A small network of the same kind for 8x8x1 digits; not from a paper.

    Args:
        width: Factor on every number of channels and hidden units, rounded, at least 1 each.
        **kwargs: Fields of `ConvNet`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: `width` is not a positive number, or a field is out of its range.

    Example:
        >>> digits_net().features
        ((32, 32),)
    """
    return _scaled(((32, 32),), (64, 64), width, **kwargs)


def init(model: nn.Module, key: Array, input_shape: tuple[int, ...]) -> tuple[PyTree, PyTree]:
    """Draw a Linen module's variables.

    Args:
        model: `ConvNet`, or any Linen module with hashable fields, called with one batch of
            inputs.
        key: One PRNG key.
        input_shape: Shape of one input, without the batch axis.

    Returns:
        `(params, model_state)`: the trainable parameters, and every other collection of
        variables (`{"batch_stats": ...}`; `{}` where there is none).

    Raises:
        ValueError: `input_shape` does not fit the network, or the module cannot be hashed.

    Example:
        >>> import jax
        >>> params, model_state = init(digits_net(), jax.random.key(0), (8, 8, 1))
        >>> params["logits"]["kernel"].shape, model_state
        ((64, 10), {})
    """
    model = check_module(model)
    key = _validate.prng_key(key)
    _validate.rank(0, key=key)
    variables = dict(_draw(model, _validate.shape(input_shape=input_shape), key))
    params = variables.pop("params", {})
    return params, variables


# Compiled, because the forward pass that `Module.init` runs to learn the shapes then costs nothing.
# By JAX's own jit: without XLA's fusion emitters the draws of a ResNet-20 compile in 125 s, not 15.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _draw(model: nn.Module, input_shape: tuple[int, ...], key: Array) -> PyTree:
    return model.init(key, jnp.zeros((1, *input_shape), jnp.float32))
