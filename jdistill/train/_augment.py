"""Augmentation of images, example by example."""

import dataclasses

import jax
import jax.numpy as jnp

from jdistill import _validate
from jdistill.typing import Array


@dataclasses.dataclass(frozen=True)
class ShiftAndFlip:
    """`augment` of `make_train_step`: images moved by a few pixels, and mirrored.

    Each image is moved by a whole number of pixels, drawn evenly from `-max_shift` to `max_shift`
    for its rows and for its columns, with 0 in the pixels that come in; and with `flip` mirrored
    left to right with probability 1/2. Image i depends on key i alone.

    Equal values are equal, so that a compiled step is shared.

    Attributes:
        max_shift: pixels, at least 0; 4 at a side of 32 in papers on CIFAR-10.
        flip: whether images are mirrored, which digits must not be.

    Raises:
        ValueError: a count below 0, or inputs that are not `[B, H, W, C]`.

    Example:
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> ShiftAndFlip(1)(keys, jnp.ones((2, 3, 3, 1))).shape
        (2, 3, 3, 1)

    References:
        He, Zhang, Ren & Sun 2016, "Deep Residual Learning for Image Recognition", section 4.2.
    """

    max_shift: int = 4
    flip: bool = False

    def __post_init__(self) -> None:
        _validate.count(minimum=0, max_shift=self.max_shift)
        _validate.flag(flip=self.flip)

    def __call__(self, keys: Array, inputs: Array) -> Array:
        """The images `[B, H, W, C]`, each moved as its own key says."""
        _validate.rank(4, inputs=inputs)
        margin = ((self.max_shift, self.max_shift),) * 2 + ((0, 0),)

        def one(key: Array, image: Array) -> Array:
            shift_key, flip_key = jax.random.split(key)
            corner = jax.random.randint(shift_key, (2,), 0, 2 * self.max_shift + 1)
            start = (*corner, jnp.zeros((), corner.dtype))
            image = jax.lax.dynamic_slice(jnp.pad(image, margin), start, image.shape)
            if not self.flip:
                return image
            return jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)

        return jax.vmap(one)(keys, inputs)
