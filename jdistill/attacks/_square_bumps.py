"""Windows of an image, and the bumps that the Square Attack puts into them for l2."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jdistill import norms
from jdistill.typing import Array

_IMAGE = (1, 2)  # the axes of rows and columns


class Window(NamedTuple):
    """One rectangle per example, whole numbers `[B]` each; all of it lies in the image."""

    top: Array
    left: Array
    height: Array
    width: Array

    def places(self, rows: int, columns: int) -> tuple[Array, Array]:
        """Rows `[B, H, 1, 1]` and columns `[B, 1, W, 1]`, counted from the window's corner."""
        row = jnp.arange(rows)[None] - self.top[:, None]
        column = jnp.arange(columns)[None] - self.left[:, None]
        return row[:, :, None, None], column[:, None, :, None]

    def inside(self, shape: tuple[int, ...]) -> Array:
        """Mask of the pixels in the window, for images of that shape, `[B, H, W, 1]` bool."""
        # Comparisons and no slices, so that the sides may be traced.
        row, column = self.places(*shape[1:3])
        height, width = _column(self.height), _column(self.width)
        return (row >= 0) & (row < height) & (column >= 0) & (column < width)


def bump(window: Window, turned: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """A bump in its upper half and the opposite of one in its lower half, `[B, H, W, 1]`.

    Each half is a pyramid of centered rectangles, the k-th of height 1 / k². Both have one length
    in l2, and the whole the length 1; it is 0 outside the window.

    Args:
        window: where.
        turned: `[B]` bool, left and right instead of upper and lower.
        shape: of the images.
        dtype: of the result.
    """
    row, column = window.places(*shape[1:3])
    turned, height, width = _column(turned), _column(window.height), _column(window.width)
    along, across = jnp.where(turned, column, row), jnp.where(turned, row, column)
    length, breadth = jnp.where(turned, width, height), jnp.where(turned, height, width)
    upper = along < length // 2
    middle = jnp.where(upper, length // 2, length - length // 2) // 2
    along -= jnp.where(upper, 0, length // 2)
    # The rectangles have middle pixels and grow by one pixel to each side; a pixel is in all of
    # them from its ring on.
    ring = jnp.maximum(jnp.abs(along - middle), jnp.abs(across - breadth // 2))
    largest = jnp.maximum(middle, breadth // 2)
    heights = 1.0 / np.arange(1, max(shape[1:3]) + 2) ** 2
    sums = jnp.asarray(np.concatenate([[0.0], np.cumsum(heights)]), dtype)
    value = jnp.take(sums, largest + 1, mode="clip") - jnp.take(sums, ring, mode="clip")
    inside = window.inside(shape)
    halves = [_unit(jnp.where(inside & part, value, 0.0)) for part in (upper, ~upper)]
    return _unit(halves[0] - halves[1])


def num_draws(rows: int, columns: int, channels: int) -> int:
    """The number of random numbers that `grid` takes per example."""
    side = _tile(rows, columns)
    return (rows // side) * (columns // side) * (1 + channels)


def grid(draws: Array, shape: tuple[int, ...], eps: Array) -> Array:
    """The start for l2: bumps side by side, five or more along the shorter side of the image.

    Args:
        draws: `[B, num_draws(…)]` in [0, 1).
        shape: of the images, `[B, H, W, C]`.
        eps: `[B]`, the length of the whole.

    Returns:
        `[B, H, W, C]`.
    """
    batch, rows, columns, channels = shape
    side = _tile(rows, columns)
    counts = rows // side, columns // side
    draws = draws.reshape(batch, *counts, 1 + channels)
    one = Window(*(jnp.full(2, value) for value in (0, 0, side, side)))
    pair = bump(one, jnp.array([False, True]), (2, side, side, 1), draws.dtype)
    tiles = jnp.where(draws[..., :1] < 0.5, 1.0, 0.0)[:, :, None, :, None]
    tiles = tiles * pair[0][None, None, :, None] + (1.0 - tiles) * pair[1][None, None, :, None]
    tiles *= jnp.where(draws[..., 1:] < 0.5, -1.0, 1.0)[:, :, None, :, None]
    delta = tiles.reshape(batch, counts[0] * side, counts[1] * side, channels)
    margins = [extent - count * side for extent, count in zip((rows, columns), counts, strict=True)]
    edges = [(margin // 2, margin - margin // 2) for margin in margins]
    delta = jnp.pad(delta, ((0, 0), *edges, (0, 0)))
    return norms.per_example(eps, delta) * norms.normalize(delta, "l2")


def move(
    delta: Array, into: Window, out_of: Window, turned: Array, signs: Array, eps: Array
) -> Array:
    """A proposal for l2: the change of one window goes into another one, which gets a bump.

    Args:
        delta: `[B, H, W, C]`, the change so far, of length eps at most.
        into: the window that gets a bump, in the same direction as before as far as there was one.
        out_of: the window whose change is taken away.
        turned: `[B]` bool, of the bump.
        signs: `[B, C]`, of the bump.
        eps: `[B]`.

    Returns:
        `[B, H, W, C]`, of length eps.
    """
    target, source = into.inside(delta.shape), out_of.inside(delta.shape)
    # In each channel the new window gets the length of both, and its share of what is left.
    length = _length(jnp.where(target | source, delta, 0.0))
    whole = norms.per_example(norms.distance(delta, "l2"), delta)
    left = jnp.maximum(norms.per_example(eps, delta) ** 2 - whole**2, 0.0) / delta.shape[-1]
    shape = bump(into, turned, delta.shape, delta.dtype) * signs[:, None, None]
    shape = _unit(shape + _unit(jnp.where(target, delta, 0.0)))
    moved = jnp.where(target, shape * jnp.sqrt(left + length**2), jnp.where(source, 0.0, delta))
    return norms.per_example(eps, delta) * norms.normalize(moved, "l2")


def _tile(rows: int, columns: int) -> int:
    """The side of the start's bumps."""
    return max(min(rows, columns) // 5, 1)


def _column(value: Array) -> Array:
    """`[B]` as `[B, 1, 1, 1]`."""
    return value[:, None, None, None]


def _length(value: Array) -> Array:
    """The l2 norm of each channel of images, `[B, 1, 1, C]`."""
    return jnp.sqrt(jnp.sum(jnp.square(value), axis=_IMAGE, keepdims=True))


def _unit(value: Array) -> Array:
    """Each channel of images with length 1; 0 stays 0."""
    length = _length(value)
    return value / jnp.where(length > 0, length, 1.0)
