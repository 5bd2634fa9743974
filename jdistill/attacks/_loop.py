"""The loop of the attacks: step after step until every example is done."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdistill.attacks._core.problem import Spread
from jdistill.typing import Array, PyTree

# A loop is compiled once for each number of rows that it may have, so there are few of them, and
# none where an attack takes too few steps to be worth the compilation: halves while half the rows
# are many, and quarters then.
_FEWER = (2, 2, 4)
_LEAST_ROWS = 32
_LEAST_STEPS = 50


def until_done(
    step: Callable[..., Any],
    fixed: tuple[PyTree, ...],
    carry: Any,
    *,
    at_most: int,
    spread: Spread,
    done: Callable[[Any], Array] = lambda carry: carry.done,
) -> Any:
    """`carry = step(*fixed, carry)` until every example is done; those that are stop costing.

    When half of the examples are done, the others go on in a batch of their own, half as large;
    and so on. A step treats each example by itself and leaves alone what is done, so the outcome
    is the same, to the rounding that depends on a batch's size. Under `vmap` over networks a loop
    waits for the network with the most examples left.

    Args:
        step: from the parts of `fixed` and a carry, of `b <= B` examples, to their next carry.
        fixed: what the loop does not change: functions, scalars, and arrays `[B, ...]`.
        carry: the state, every leaf `[B, ...]`.
        at_most: steps that an example may take.
        spread: whether the examples lie on several devices, where they stay: gathered rows would
            be on each of them.
        done: of a carry, which examples are, `[B]` bool.

    Returns:
        The last carry, `[B, ...]`.
    """

    def loop(fixed: tuple[PyTree, ...], carry: Any, enough: int) -> Any:
        return jax.lax.while_loop(
            lambda carry: jnp.sum(~done(carry)) > enough,
            functools.partial(step, *fixed),
            carry,
        )

    sizes = [0] if spread.over_devices else row_counts(done(carry).shape[0], at_most)
    carry = loop(fixed, carry, sizes[0])
    for size, enough in itertools.pairwise(sizes):
        rows = jnp.argsort(done(carry), stable=True)[:size]
        part = loop(_rows(fixed, rows), _rows(carry, rows), enough)
        carry = _with_rows(carry, rows, part)
    return carry


def row_counts(batch_size: int, at_most: int) -> list[int]:
    """How many rows the loops after the first have, down to none."""
    counts: list[int] = []
    while at_most >= _LEAST_STEPS:
        rows = counts[-1] if counts else batch_size
        rows = -(-rows // _FEWER[min(len(counts), len(_FEWER) - 1)])
        if rows < _LEAST_ROWS:
            break
        counts.append(rows)
    return [*counts, 0]


def _with_rows(tree: PyTree, rows: Array, part: PyTree) -> PyTree:
    """The tree with these rows of it replaced."""
    return jax.tree.map(lambda whole, some: whole.at[rows].set(some), tree, part)


def _rows(tree: PyTree, rows: Array) -> PyTree:
    """These rows of every array; functions (and what they hold) and scalars stay as they are."""

    def some(leaf: Any) -> Any:
        return leaf if callable(leaf) or getattr(leaf, "ndim", 0) == 0 else leaf[rows]

    return jax.tree.map(some, tree, is_leaf=callable)
