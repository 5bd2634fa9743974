"""Vision transformers in Flax Linen: ViT, and DeiT with its distillation token."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdistill import _validate
from jdistill.nets._fields import check_keys, check_rate, check_width, scaled
from jdistill.nets._rows import by_rows
from jdistill.typing import Array

# DeiT truncates at 2.0, which is a hundred standard deviations: as good as not at all.
_INITIAL = nn.initializers.normal(0.02)
# What PyTorch draws for a convolution, as DeiT's patch embedding is one: uniform, up to one over
# the root of the number of inputs.
_INITIAL_PATCH = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _dense(size: int, name: str, initial: Any = _INITIAL) -> nn.Dense:
    return nn.Dense(size, kernel_init=initial, dot_general=by_rows, name=name)


# What is under `jax.checkpoint` is cheap to compute again, and its gradient then keeps its inputs
# alone: on CPU a training step waits for memory, which is allocated anew for each.
@jax.checkpoint
def _gelu(x: Array) -> Array:
    return jax.nn.gelu(x, approximate=False)


@jax.checkpoint
def _normalized(x: Array, scale: Array, bias: Array) -> Array:
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + 1e-6) * scale + bias


class _Norm(nn.Module):
    """Layer normalization of the last axis."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Tokens `[B, N, D]` with mean 0 and variance 1 each, then scaled and shifted."""
        size = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, size)
        bias = self.param("bias", nn.initializers.zeros, size)
        return _normalized(x, scale[None, None], bias[None, None])


def _attend(query: Array, key: Array, value: Array, num_heads: int) -> Array:
    """Softmax attention of each head over its own part of the last axis.

    Args:
        query: `[B, M, D]`.
        key: `[B, N, D]`.
        value: `[B, N, D]`.
        num_heads: divides `D`.

    Returns:
        `[B, M, D]`.
    """
    head_size = query.shape[-1] // num_heads

    def heads(array: Array) -> Array:
        return array.reshape(*array.shape[:-1], num_heads, head_size).transpose(0, 2, 1, 3)

    # Scaled and normalized where there are fewer numbers: before and after the scores.
    scores = jnp.einsum("bhqd,bhkd->bhqk", heads(query / math.sqrt(head_size)), heads(key))
    highest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - highest)
    sums = jnp.sum(weights, axis=-1, keepdims=True)
    mixed = jnp.einsum("bhqk,bhkd->bhqd", weights, heads(value)) / sums
    return mixed.transpose(0, 2, 1, 3).reshape(query.shape)


class _Block(nn.Module):
    """One transformer block: attention and two dense layers, each normalized and beside a shortcut.

    Attributes:
        num_heads: number of attention heads.
        mlp_ratio: size of the hidden dense layer over that of a token.
    """

    num_heads: int
    mlp_ratio: int

    @nn.compact
    def __call__(
        self, x: Array, factors: tuple[Array, Array] | None, num_tokens: int | None
    ) -> Array:
        """The first `num_tokens` tokens of the next block, `[B, num_tokens, D]`.

        Args:
            x: tokens `[B, N, D]`.
            factors: what the two branches are multiplied by, `[B]` each; None for nothing.
            num_tokens: how many of the tokens are wanted; None for all.
        """
        width = x.shape[-1]

        def branch(number: int, y: Array) -> Array:
            return y if factors is None else y * factors[number][:, None, None]

        y = _Norm(name="attention_norm")(x)
        key, value = _dense(width, "key")(y), _dense(width, "value")(y)
        x, query = x[:, :num_tokens], _dense(width, "query")(y[:, :num_tokens])
        x += branch(0, _dense(width, "out")(_attend(query, key, value, self.num_heads)))
        y = _dense(self.mlp_ratio * width, "dense_0")(_Norm(name="mlp_norm")(x))
        return x + branch(1, _dense(width, "dense_1")(_gelu(y)))


class ViT(nn.Module):
    """Vision transformer; with `distillation_token=True`, DeiT as it is distilled.

    The picture is cut into square patches; a linear layer makes a token of each (as a reshape and a
    dense layer, which is the function of ViT's strided convolution and faster on CPU, and under
    `vmap`). A class token comes first; every token gets a learned position; `depth` blocks of
    attention and two dense layers follow, each branch normalized first and beside a shortcut; a
    last normalization; and a linear layer of the class token gives the logits. GELU is the exact
    one, epsilon of the normalizations is 1e-6. The last block is computed for the tokens that have
    heads only, except where Flax captures intermediate values: then for all.

    The distillation token stands after the class token and has a linear layer of its own, which is
    to learn from the teacher while the class token's learns from the labels. Everything else has
    the same names, shapes, and initial values with and without it: the parameters of a DeiT without
    `distillation_token`, `distillation_position`, and `distillation_logits` are a ViT's.

    Weights start as in DeiT: normal with a standard deviation of 0.02, the patch embedding's
    uniform up to one over the root of its number of inputs. Biases start at 0 (DeiT's patch
    embedding has a uniform one).

    Two nets with equal fields are equal and share one trace.

    Attributes:
        patch_size: Side of a patch in pixels; it divides height and width of the inputs.
        width: `D`, the size of a token.
        depth: Number of blocks.
        num_heads: Attention heads in a block; it divides `width`.
        mlp_ratio: Size of a block's hidden dense layer over `width`.
        num_classes: `K`, the number of logits.
        distillation_token: Whether there is a distillation token with a head of its own.
        drop_path_rate: Probability with which an example skips a branch of the last block in
            training, in `[0, 1)`; it grows linearly from 0 at the first block (stochastic depth,
            as in DeiT). What is not skipped is divided by the probability of that.
        shift: Subtracted from the inputs before anything else, so that attacks can work on the
            data's own range `[0, 1]` while the first layer sees `[-0.5, 0.5]`.

    Raises:
        ValueError: A field out of its range, inputs that are not `[B, H, W, C]` or cannot be cut
            into patches, inputs of another size than the weights are for, or `train=True` without
            `dropout_keys` where branches are skipped.

    Example:
        >>> import jax
        >>> from jdistill import nets
        >>> model = ViT(patch_size=4, width=8, depth=1, num_heads=2, num_classes=3)
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> model.apply({"params": params}, jax.numpy.zeros((2, 8, 8, 1))).shape
        (2, 3)

    References:
        Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words: Transformers for Image Recognition
        at Scale", section 3.1. Touvron, Cord, Douze, Massa, Sablayrolles & Jegou 2021, "Training
        data-efficient image transformers & distillation through attention", sections 4 and 5, and
        `models.py` of its code.
    """

    patch_size: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: int = 4
    num_classes: int = 10
    distillation_token: bool = False
    drop_path_rate: float = 0.0
    shift: float = 0.5

    def __post_init__(self) -> None:
        _validate.count(patch_size=self.patch_size, width=self.width, depth=self.depth)
        _validate.count(num_heads=self.num_heads, mlp_ratio=self.mlp_ratio)
        _validate.count(num_classes=self.num_classes)
        _validate.flag(distillation_token=self.distillation_token)
        _validate.scalar(shift=self.shift)
        _validate.finite(shift=self.shift)
        if self.width % self.num_heads:
            raise ValueError(
                f"expected num_heads to divide width = {self.width}, got {self.num_heads}; pass "
                "another number of heads, or a multiple of it as width"
            )
        check_rate("skipped branches of the last block", drop_path_rate=self.drop_path_rate)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, inputs: Array, *, train: bool = False, dropout_keys: Array | None = None
    ) -> Any:
        """The logits `[B, K]` of inputs `[B, H, W, C]`, and those of both heads if there are two.

        Args:
            inputs: `[B, H, W, C]` float, in `[0, 1]` when `shift` is 0.5.
            train: Whether branches are skipped.
            dropout_keys: `[B]` PRNG keys, one per example; what example i skips depends on key i
                only. Needed when `train` and `drop_path_rate > 0`, else unused.

        Returns:
            `[B, K]`, not normalized; with a distillation token a dict of three such arrays,
            "class_logits", "distillation_logits", and their mean "logits" (see `nets.logits_of`).
        """
        factors = self._branch_factors(dropout_keys) if train else None
        x = _dense(self.width, "patch_embedding", _INITIAL_PATCH)(self._patches(inputs))
        prefix = [self.param("class_token", _INITIAL, (self.width,))]
        positions = self.param("position_embedding", _INITIAL, (1 + x.shape[1], self.width))
        prefix[0] += positions[0]
        if self.distillation_token:
            # After the others, so that those are drawn alike without it.
            token = self.param("distillation_token", _INITIAL, (self.width,))
            prefix.append(token + self.param("distillation_position", _INITIAL, (self.width,)))
        first = jnp.broadcast_to(jnp.stack(prefix), (x.shape[0], len(prefix), self.width))
        x = jnp.concatenate([first, x + positions[None, 1:]], axis=1)
        # What the last block makes of the patches reaches no head, so it is left out, unless
        # somebody looks at what the parts of the network return.
        looked_at = self.is_mutable_collection("intermediates")
        for number in range(self.depth):
            block = _Block(self.num_heads, self.mlp_ratio, name=f"block_{number}")
            last = number == self.depth - 1 and not looked_at
            skips = None if factors is None or number == 0 else factors[number]
            x = block(x, skips, len(prefix) if last else None)
        x = _Norm(name="norm")(x[:, : len(prefix)])
        logits = _dense(self.num_classes, "logits")(x[:, 0])
        if not self.distillation_token:
            return logits
        others = _dense(self.num_classes, "distillation_logits")(x[:, 1])
        mean = (logits + others) / 2
        return {"logits": mean, "class_logits": logits, "distillation_logits": others}

    def _patches(self, inputs: Array) -> Array:
        """The pixels of each patch, `[B, N, patch_size * patch_size * C]`, row by row."""
        _validate.rank(4, inputs=inputs)
        batch, height, width, channels = inputs.shape
        side = self.patch_size
        if height % side or width % side or min(height, width) < side:
            raise ValueError(
                f"expected inputs that patches of {side}x{side} pixels cover, got {height}x{width} "
                f"(inputs {inputs.shape}); pass a patch_size that divides both"
            )
        rows, columns = height // side, width // side
        if self.has_variable("params", "position_embedding"):
            held = self.get_variable("params", "position_embedding").shape[0] - 1
            if held != rows * columns:
                raise ValueError(
                    f"expected inputs of {held} patches, for which the weights have positions, "
                    f"got {rows * columns} (inputs {inputs.shape}); resize the inputs, or draw "
                    "weights for this size"
                )
        cut = (inputs - self.shift).reshape(batch, rows, side, columns, side, channels)
        return cut.transpose(0, 1, 3, 2, 4, 5).reshape(
            batch, rows * columns, side * side * channels
        )

    def _branch_factors(self, keys: Array | None) -> list[tuple[Array, Array]] | None:
        """Factors of each block's two branches in training: 0, or inversely scaled."""
        if self.drop_path_rate == 0 or self.depth == 1:
            return None
        keys = check_keys(keys, "drop_path_rate")
        rates = [self.drop_path_rate * number / (self.depth - 1) for number in range(self.depth)]
        # One draw for all branches: what example i skips depends on `keys[i]` alone.
        drawn = jax.vmap(lambda key: jax.random.uniform(key, (self.depth, 2)))(keys)

        def factor(number: int, branch: int) -> Array:
            kept = 1.0 - rates[number]
            return jnp.where(drawn[:, number, branch] < kept, 1.0 / kept, 0.0)

        return [(factor(number, 0), factor(number, 1)) for number in range(self.depth)]


def _by_heads(
    width: float, num_heads: int, head_size: int, sizes: dict[str, int], fields: dict[str, Any]
) -> ViT:
    """A `ViT` with its number of heads, of a fixed size each, multiplied by `width`."""
    check_width(width)
    heads = scaled(num_heads, width)
    return ViT(**{**sizes, "num_heads": heads, "width": heads * head_size, **fields})


def vit_digits(width: float = 1.0, **kwargs: Any) -> ViT:
    """A small vision transformer for 8x8x1 digits; not from a paper.

    Patches of 2x2 pixels, 4 blocks, 4 heads of 16 units: 202,186 parameters at width 1.

    Args:
        width: Factor on the number of heads, rounded, at least 1; tokens have 16 units a head.
        **kwargs: Fields of `ViT`, such as `distillation_token=True`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: `width` is not a positive number, or a field is out of its range.

    Example:
        >>> vit_digits(width=0.5).width
        32
    """
    return _by_heads(width, 4, 16, {"patch_size": 2, "depth": 4}, kwargs)


def vit_mnist(width: float = 1.0, **kwargs: Any) -> ViT:
    """A small vision transformer for 28x28x1 images; not from a paper.

    Patches of 7x7 pixels, 4 blocks, 4 heads of 16 units: 205,066 parameters at width 1.

    Args:
        width: Factor on the number of heads, rounded, at least 1; tokens have 16 units a head.
        **kwargs: Fields of `ViT`, such as `distillation_token=True`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: `width` is not a positive number, or a field is out of its range.

    Example:
        >>> vit_mnist().patch_size
        7
    """
    return _by_heads(width, 4, 16, {"patch_size": 7, "depth": 4}, kwargs)


def vit_cifar(width: float = 1.0, **kwargs: Any) -> ViT:
    """A small vision transformer for 32x32x3 images; not from a paper.

    Patches of 4x4 pixels, 6 blocks, 4 heads of 32 units: 1,205,898 parameters at width 1.

    Args:
        width: Factor on the number of heads, rounded, at least 1; tokens have 32 units a head.
        **kwargs: Fields of `ViT`, such as `distillation_token=True`.

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: `width` is not a positive number, or a field is out of its range.

    Example:
        >>> vit_cifar(depth=4).depth
        4
    """
    return _by_heads(width, 4, 32, {"patch_size": 4, "depth": 6}, kwargs)


def deit_tiny(**kwargs: Any) -> ViT:
    """DeiT-Ti for 224x224x3 images of 1,000 classes: 5,717,416 parameters without the token.

    Args:
        **kwargs: Fields of `ViT`; `distillation_token=True` for the distilled one (5,910,800).

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: A field out of its range.

    Example:
        >>> deit_tiny(distillation_token=True).width
        192

    References:
        Touvron et al. 2021, "Training data-efficient image transformers & distillation through
        attention", table 1.
    """
    return _deit(192, kwargs)


def deit_small(**kwargs: Any) -> ViT:
    """DeiT-S for 224x224x3 images of 1,000 classes: 22,050,664 parameters without the token.

    Args:
        **kwargs: Fields of `ViT`; `distillation_token=True` for the distilled one (22,436,432).

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: A field out of its range.

    Example:
        >>> deit_small().num_heads
        6

    References:
        Touvron et al. 2021, "Training data-efficient image transformers & distillation through
        attention", table 1.
    """
    return _deit(384, kwargs)


def deit_base(**kwargs: Any) -> ViT:
    """DeiT-B for 224x224x3 images of 1,000 classes: 86,567,656 parameters without the token.

    Args:
        **kwargs: Fields of `ViT`; `distillation_token=True` for the distilled one (87,338,192).

    Returns:
        The module; it holds no parameters.

    Raises:
        ValueError: A field out of its range.

    Example:
        >>> deit_base().num_heads
        12

    References:
        Touvron et al. 2021, "Training data-efficient image transformers & distillation through
        attention", table 1.
    """
    return _deit(768, kwargs)


def _deit(width: int, fields: dict[str, Any]) -> ViT:
    """Twelve blocks with heads of 64 units, patches of 16x16 pixels."""
    sizes = {"patch_size": 16, "depth": 12, "num_heads": width // 64, "width": width}
    return ViT(**{**sizes, "num_classes": 1000, **fields})
