"""Pytrees with a leading axis of runs, for `jax.vmap` over networks."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate
from jdistill.typing import PyTree


def stack(trees: Iterable[PyTree]) -> PyTree:
    """Stack pytrees of one structure along a new leading axis.

    Args:
        trees: `R` pytrees (variables, training states, each a `logits_fn`), alike in structure and
            in the shapes of their leaves; at least one.

    Returns:
        One pytree of that structure, every leaf `[R, ...]`.

    Raises:
        ValueError: There is no tree, or their structures or the shapes of their leaves differ.

    Example:
        >>> import jax.numpy as jnp
        >>> stack([{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}])["w"].shape
        (2, 2)
    """
    if isinstance(trees, str) or not isinstance(trees, Iterable):
        raise ValueError(f"expected trees to be a list of pytrees, got {trees!r}; pass a list")
    trees = list(trees)
    if not trees:
        raise ValueError("expected trees, at least one pytree to stack, got none; pass more")
    leaves = jax.tree.leaves(trees[0])
    _validate.arrays(trees=trees)
    structure: Any = jax.tree.structure(trees[0])
    shapes = [jnp.shape(leaf) for leaf in leaves]
    for position, tree in enumerate(trees[1:], start=1):
        other = jax.tree.structure(tree)
        if other != structure:
            raise ValueError(
                f"expected trees, pytrees of one structure, got {other} at index {position} beside "
                f"{structure}; stack networks of equal architecture only"
            )
        other_shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(tree)]
        if other_shapes != shapes:
            raise ValueError(
                f"expected trees with leaves of equal shapes, got {other_shapes} at index "
                f"{position} beside {shapes}; stack networks of equal architecture and width only"
            )
    return jax.tree.map(lambda *parts: jnp.stack(parts), *trees)


def index(tree: PyTree, i: int) -> PyTree:
    """Run `i` of a stacked pytree: `leaf[i]` of every leaf.

    Args:
        tree: Pytree whose every leaf is `[R, ...]`.
        i: Which run, in `-R..R-1`; may be traced, and is not checked then.

    Returns:
        The pytree without its leading axis.

    Raises:
        ValueError: `i` is out of range, or not an integer.

    Example:
        >>> import jax.numpy as jnp
        >>> index({"w": jnp.arange(6).reshape(3, 2)}, 1)["w"].tolist()
        [2, 3]
    """
    sizes = [shape[0] for shape in _shapes(tree)]
    if not isinstance(i, jax.core.Tracer):
        size = min(sizes, default=0)
        if len(set(sizes)) > 1:
            raise ValueError(
                f"expected a tree of leaves with one leading axis R, got sizes {sorted(set(sizes))}"
                "; pass what `stack` returned"
            )
        fits = np.ndim(i) == 0 and np.asarray(i).dtype.kind in "iu"
        if not fits or (sizes and not -size <= i < size):
            # As an index of an array, JAX would take the nearest one.
            raise ValueError(
                f"expected the index of one of {size} runs, got {i!r} as i; pass one of "
                f"{-size}..{size - 1}"
            )
    return jax.tree.map(lambda leaf: leaf[i], tree)


def unstack(tree: PyTree) -> list[PyTree]:
    """The list of pytrees that `stack` put together.

    Args:
        tree: Pytree whose every leaf is `[R, ...]`, with one `R`.

    Returns:
        `R` pytrees of the same structure, without the leading axis.

    Raises:
        ValueError: There is no leaf, or the leaves have no common leading axis.

    Example:
        >>> import jax.numpy as jnp
        >>> [part["w"].tolist() for part in unstack({"w": jnp.arange(4).reshape(2, 2)})]
        [[0, 1], [2, 3]]
    """
    shapes = _shapes(tree)
    sizes = {shape[0] for shape in shapes}
    if len(sizes) != 1:
        raise ValueError(
            f"expected a tree of leaves with one common leading axis, got shapes {shapes}; "
            "unstack what `stack` or a `vmap` returned"
        )
    return [index(tree, i) for i in range(sizes.pop())]


def stack_size(tree: PyTree) -> int:
    """Number of networks that a stack holds.

    Args:
        tree: A `logits_fn` pytree whose every leaf is `[R, ...]`.

    Returns:
        `R`.

    Raises:
        ValueError: The leaves share no leading axis.

    Example:
        >>> import jax.numpy as jnp
        >>> stack_size(stack([{"w": jnp.ones(2)}, {"w": jnp.zeros(2)}]))
        2
    """
    sizes = {shape[0] for shape in _shapes(tree)}
    if len(sizes) != 1:
        raise ValueError(
            "expected a stack, a tree of logits_fns whose leaves share a leading axis R, got "
            f"leaves of leading sizes {sorted(sizes)}; "
            "make one with jdistill.nets.stack([logits_fn, ...])"
        )
    return int(sizes.pop())


def _shapes(tree: PyTree) -> list[tuple[int, ...]]:
    """The shapes of the leaves, which are arrays with an axis of runs."""
    leaves = jax.tree.leaves(tree)
    for leaf in leaves:
        if not getattr(leaf, "shape", ()):
            shown = f"a scalar {leaf.dtype}" if hasattr(leaf, "dtype") else type(leaf).__name__
            raise ValueError(
                f"expected a stack, a tree of arrays that share a leading axis R, got {shown}; "
                "make one with jdistill.nets.stack([logits_fn, ...])"
            )
    return [leaf.shape for leaf in leaves]
