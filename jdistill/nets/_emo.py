"""EMO, efficient networks of inverted residual mobile blocks, some of which attend."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

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
    scaled,
)
from jdistill.nets._normalization import Norm, batch_norm
from jdistill.typing import Array

# What PyTorch draws for a convolution, as EMO's code leaves it: uniform, up to one over the root of
# the number of inputs.
_INITIAL = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class _Stage(NamedTuple):
    """A row of `EMO.stages`."""

    blocks: int
    channels: int
    expansion: float
    kernel: int
    head_size: int
    stride: int


_SMALL = (_Stage(2, 24, 2.0, 3, 0, 2), _Stage(4, 48, 3.0, 5, 12, 2))


class EMO(nn.Module):
    """Efficient model of inverted residual mobile blocks (iRMB): depthwise convolution, attention.

    A 3x3 convolution with a bias, normalized; a block without expansion that weighs its channels by
    what their means say (squeeze and excitation); stages of blocks; a last normalization; the mean
    over all pixels; and a linear layer. A block

    1. normalizes its inputs;
    2. in a stage with attention, takes the mean of the pixels of a window instead of each pixel, by
       the softmax attention of heads that have their part of the channels each;
    3. expands the channels by a 1x1 convolution with a bias, and the activation;
    4. adds what a depthwise convolution, normalization, and SiLU make of that;
    5. reduces the channels by a 1x1 convolution, and is added to its inputs.

    The first block of a stage expands twice as far, may have a stride, does not attend, and adds
    nothing: neither in 4 nor in 5. Attending to the pixels before they are expanded gives, but for
    the activation, what attending to the expanded ones would, with fewer operations; so does the
    released code.

    Stages with attention have layer normalization in 1 and GELU in 3, the others `norm` and SiLU;
    the one in 4 and after the first convolution is `norm` everywhere, and the last one as in the
    last stage. Epsilon is 1e-6 everywhere. As in the released code a window has every n-th pixel of
    the picture in each direction, not neighbors, and a picture that windows do not cover is padded
    with zeros that take part in attention.

    Kernels start uniform, as PyTorch has them, and biases at 0; the linear layer's weights start
    normal with a standard deviation of 0.02.

    Two nets with equal fields are equal and share one trace; pass module-level functions, not
    lambdas.

    Attributes:
        stages: A row of six numbers each: blocks, channels, expansion (may be a fraction), side of
            the depthwise kernel (odd), channels of a head (0 for no attention; it divides the
            channels), and the stride of the first block.
        stem_channels: Channels of the first convolution.
        stem_stride: Its stride: 2 for ImageNet's pictures, 1 for small ones.
        window: Side of a window of attention in pixels; 0 for the whole picture.
        drop_path_rate: Probability with which an example skips the last block in training, in
            `[0, 1)`; it grows linearly from 0 at the first block of the first stage, and blocks
            that add nothing skip nothing (the paper's 0.04 to 0.05).
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
            without `dropout_keys` where blocks are skipped.

    Example:
        >>> import jax
        >>> from jdistill import nets
        >>> model = EMO(stages=((1, 8, 2, 3, 0, 2), (2, 8, 2, 3, 4, 1)), stem_channels=4)
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> variables = {"params": params, **model_state}
        >>> model.apply(variables, jax.numpy.zeros((2, 8, 8, 1))).shape
        (2, 10)

    References:
        Zhang, Li, Li, Liang, Xue, Zhang, Jiang, Wang & Wang 2023, "Rethinking Mobile Block for
        Efficient Attention-based Models", section 3 and table 2, and `emo.py` of its code.
    """

    stages: tuple[Any, ...] = _SMALL
    stem_channels: int = 24
    stem_stride: int = 2
    window: int = 7
    drop_path_rate: float = 0.0
    num_classes: int = 10
    shift: float = 0.5
    conv_general_dilated: Callable[..., Array] = conv_general_dilated
    norm: Norm = by_value(functools.partial(batch_norm, epsilon=1e-6))

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", _checked(self.stages))
        _validate.count(stem_channels=self.stem_channels, stem_stride=self.stem_stride)
        _validate.count(minimum=0, window=self.window)
        check_rate("examples that skip the last block", drop_path_rate=self.drop_path_rate)
        check_fields(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: Array, *, train: bool = False, dropout_keys: Array | None = None
    ) -> Array:
        """The logits `[B, K]` of inputs `[B, H, W, C]`.

        Args:
            inputs: `[B, H, W, C]` float, in `[0, 1]` when `shift` is 0.5.
            train: Whether it is called in training: blocks are skipped, and with batch
                normalization the batch's own statistics normalize, and the running ones are
                updated.
            dropout_keys: `[B]` PRNG keys, one per example; what example i skips depends on key i
                only. Needed when `train` and `drop_path_rate > 0`, else unused.

        Returns:
            `[B, K]`, not normalized.
        """
        _validate.rank(4, inputs=inputs)
        skip = train and self.drop_path_rate > 0
        factors = self._factors(check_keys(dropout_keys, "drop_path_rate")) if skip else None
        x = self._conv(self.stem_channels, 3, "stem", self.stem_stride, bias=True)(
            inputs - self.shift
        )
        x = self.norm(name="norm_stem", train=train)(x)
        x = self._excited(self._local(x, 3, 1, "stem", train))
        x = self._conv(self.stem_channels, 1, "stem_reduce")(x)
        number = 0
        for at, stage in enumerate(self.stages):
            for place in range(stage.blocks):
                y = self._block(x, stage, f"{at}_{place}", is_first=place == 0, train=train)
                if place > 0:
                    y = x + (y if factors is None else y * factors[number][:, None, None, None])
                x, number = y, number + 1
        x = self._norm(x, self.stages[-1], "norm", train)
        initial = nn.initializers.normal(0.02)
        head = nn.Dense(self.num_classes, kernel_init=initial, name="logits")
        return head(jnp.mean(x, axis=(1, 2)))

    def _block(self, x: Array, stage: _Stage, name: str, *, is_first: bool, train: bool) -> Array:
        """What a block adds to its inputs; all of its outputs for the first of a stage."""
        wide = int(x.shape[-1] * stage.expansion * (2 if is_first else 1))
        y = self._norm(x, stage, f"norm_{name}", train)
        if stage.head_size and not is_first:
            y = self._attended(y, stage.head_size, name)
        y = self._conv(wide, 1, f"{name}_expand", bias=True)(y)
        y = jax.nn.gelu(y, approximate=False) if stage.head_size else jax.nn.silu(y)
        near = self._local(y, stage.kernel, stage.stride if is_first else 1, name, train)
        return self._conv(stage.channels, 1, f"{name}_reduce")(near if is_first else y + near)

    def _norm(self, x: Array, stage: _Stage, name: str, train: bool) -> Array:
        """The normalization of a stage's blocks."""
        layer = (
            nn.LayerNorm(epsilon=1e-6, name=name)
            if stage.head_size
            else self.norm(name=name, train=train)
        )
        normalized: Array = layer(x)
        return normalized

    def _conv(
        self,
        size: int,
        kernel: int,
        name: str,
        stride: int = 1,
        groups: int = 1,
        *,
        bias: bool = False,
    ) -> nn.Conv:
        return nn.Conv(
            size,
            (kernel, kernel),
            strides=stride,
            padding=((kernel // 2, kernel // 2),) * 2,
            feature_group_count=groups,
            use_bias=bias,
            kernel_init=_INITIAL,
            conv_general_dilated=self.conv_general_dilated,
            name=f"conv_{name}",
        )

    def _local(self, x: Array, kernel: int, stride: int, name: str, train: bool) -> Array:
        """A depthwise convolution, normalized, and SiLU."""
        channels = x.shape[-1]
        y = self._conv(channels, kernel, f"{name}_depthwise", stride, channels)(x)
        return jax.nn.silu(self.norm(name=f"norm_{name}_depthwise", train=train)(y))

    def _excited(self, x: Array) -> Array:
        """The channels weighed by two layers on their means: squeeze and excitation."""
        channels = x.shape[-1]
        means = jnp.mean(x, axis=(1, 2), keepdims=True)
        hidden = jax.nn.silu(nn.Dense(channels, kernel_init=_INITIAL, name="squeeze")(means))
        return x * jax.nn.sigmoid(nn.Dense(channels, kernel_init=_INITIAL, name="excite")(hidden))

    def _attended(self, x: Array, head_size: int, name: str) -> Array:
        """The means of the pixels of each window, `[B, H, W, C]`, by the attention of each head."""
        batch, height, width, channels = x.shape
        sides = [self.window or size for size in (height, width)]
        counts = [-(-size // side) for size, side in zip((height, width), sides, strict=True)]
        rows, columns = (side * count for side, count in zip(sides, counts, strict=True))
        x = jnp.pad(x, ((0, 0), (0, rows - height), (0, columns - width), (0, 0)))
        pairs = self._conv(2 * channels, 1, f"{name}_query_key", bias=True)(x)

        def cut(array: Array) -> Array:
            """`[B, windows, pixels, heads, head_size]`: a window has every n-th pixel."""
            parts = array.reshape(batch, sides[0], counts[0], sides[1], counts[1], channels)
            ordered = parts.transpose(0, 2, 4, 1, 3, 5)
            return ordered.reshape(
                batch, math.prod(counts), math.prod(sides), channels // head_size, head_size
            )

        query, key, value = cut(pairs[..., :channels]), cut(pairs[..., channels:]), cut(x)
        scores = jnp.einsum("bwqhd,bwkhd->bwhqk", query, key) / math.sqrt(head_size)
        means = jnp.einsum("bwhqk,bwkhd->bwqhd", jax.nn.softmax(scores, axis=-1), value)
        parts = means.reshape(batch, *counts, *sides, channels).transpose(0, 3, 1, 4, 2, 5)
        return parts.reshape(batch, rows, columns, channels)[:, :height, :width]

    def _factors(self, keys: Array) -> list[Array]:
        """What each block is multiplied by in training, `[B]`: 0, or inversely scaled."""
        number = sum(stage.blocks for stage in self.stages)
        drawn = jax.vmap(lambda key: jax.random.uniform(key, (number,)))(keys)
        kept = [1.0 - self.drop_path_rate * at / max(1, number - 1) for at in range(number)]
        return [jnp.where(drawn[:, at] < kept[at], 1.0 / kept[at], 0.0) for at in range(number)]


def _checked(stages: Any) -> tuple[_Stage, ...]:
    """Rows of six numbers in their ranges, at least one."""
    _validate.sequence(stages=stages, remedy="pass a tuple of tuples")
    rows = [tuple(row) if isinstance(row, Iterable) else (row,) for row in stages]
    if not rows or any(len(row) != 6 for row in rows):
        raise ValueError(
            "expected stages to be one row or more of (blocks, channels, expansion, kernel, "
            f"head_size, stride), got {stages!r}; pass six numbers each"
        )
    checked = []
    for row in rows:
        sizes = _validate.shape(minimum=0, stages=(*row[:2], *row[3:]))
        expansion: Any = row[2]
        _validate.scalar(**{"the expansion of stages": expansion})
        stage = _Stage(sizes[0], sizes[1], float(expansion), *sizes[2:])
        least = min(stage.blocks, stage.channels, stage.kernel, stage.stride)
        heads_fit = not stage.head_size or stage.channels % stage.head_size == 0
        if least < 1 or stage.kernel % 2 == 0 or not heads_fit or not 1 <= expansion < math.inf:
            raise ValueError(
                "expected stages with whole numbers >= 1, an odd kernel, an expansion >= 1, and "
                f"channels that head_size divides (0 for no heads), got {tuple(stage)}; pass "
                "(blocks, channels, expansion, kernel, head_size, stride)"
            )
        checked.append(stage)
    return tuple(checked)


def emo_small(width: float = 1.0, **kwargs: Any) -> EMO:
    """A small EMO for 28x28 and 32x32 images; not from a paper.

    The first convolution keeps the picture's size, two stages halve it each, and in the second one
    all pixels attend to all: 90,458 parameters for 28x28x1 images at width 1.

    Args:
        width: Factor on the number of channels, rounded, and on the number of heads, which have 12
            channels each; at least 1 each.
        **kwargs: Fields of `EMO`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: `width` is not a positive number, or a field is out of its range.

    Example:
        >>> emo_small(width=0.5).stages[1].channels
        24
    """
    check_width(width)

    def size(stage: _Stage) -> int:
        unit = stage.head_size or 1
        return unit * scaled(stage.channels // unit, width)

    stages = tuple(stage._replace(channels=size(stage)) for stage in _SMALL)
    sizes = {"stages": stages, "stem_channels": scaled(16, width), "stem_stride": 1, "window": 0}
    return EMO(**{**sizes, **kwargs})


def _emo(
    blocks: Iterable[int],
    channels: Iterable[int],
    expansions: Iterable[float],
    heads: Iterable[int],
    fields: dict[str, Any],
) -> EMO:
    """An EMO for ImageNet: two stages without attention and with 3x3 kernels, two with 5x5."""
    rows = zip(blocks, channels, expansions, (3, 3, 5, 5), heads, (2, 2, 2, 2), strict=True)
    return EMO(**{"stages": tuple(rows), "num_classes": 1000, **fields})


def emo_1m(**kwargs: Any) -> EMO:
    """EMO-1M for 224x224x3 images of 1,000 classes: 1,361,168 parameters.

    Args:
        **kwargs: Fields of `EMO`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: A field out of its range.

    Example:
        >>> emo_1m().stages[3].channels
        168

    References:
        Zhang et al. 2023, "Rethinking Mobile Block for Efficient Attention-based Models", table 2.
    """
    return _emo((2, 2, 8, 3), (32, 48, 80, 168), (2.0, 2.5, 3.0, 3.5), (0, 0, 20, 21), kwargs)


def emo_2m(**kwargs: Any) -> EMO:
    """EMO-2M for 224x224x3 images of 1,000 classes: 2,377,472 parameters.

    Args:
        **kwargs: Fields of `EMO`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: A field out of its range.

    Example:
        >>> emo_2m().stages[2].blocks
        9

    References:
        Zhang et al. 2023, "Rethinking Mobile Block for Efficient Attention-based Models", table 2.
    """
    return _emo((3, 3, 9, 3), (32, 48, 120, 200), (2.0, 2.5, 3.0, 3.5), (0, 0, 20, 20), kwargs)


def emo_5m(**kwargs: Any) -> EMO:
    """EMO-5M for 224x224x3 images of 1,000 classes: 5,108,848 parameters.

    Args:
        **kwargs: Fields of `EMO`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: A field out of its range.

    Example:
        >>> emo_5m().stages[3].channels
        288

    References:
        Zhang et al. 2023, "Rethinking Mobile Block for Efficient Attention-based Models", table 2.
    """
    return _emo((3, 3, 9, 3), (48, 72, 160, 288), (2.0, 3.0, 4.0, 4.0), (0, 0, 32, 32), kwargs)


def emo_6m(**kwargs: Any) -> EMO:
    """EMO-6M for 224x224x3 images of 1,000 classes: 6,168,496 parameters.

    Args:
        **kwargs: Fields of `EMO`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: A field out of its range.

    Example:
        >>> emo_6m().stages[3].channels
        320

    References:
        Zhang et al. 2023, "Rethinking Mobile Block for Efficient Attention-based Models", `emo.py`
        of its code.
    """
    return _emo((3, 3, 9, 3), (48, 72, 160, 320), (2.0, 3.0, 4.0, 5.0), (0, 0, 20, 32), kwargs)
