"""Loop over rows of examples that drops those that are done, and the work it saves."""

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jdistill.typing import Array, PyTree

# A loop is compiled once for each number of rows that it may have, so there are few of them, and
# none where an attack takes too few steps, or a forward pass of these rows too few multiplications,
# to be worth the compilation: halves while half the rows are many, and quarters then.
_FEWER = (2, 2, 4)
_LEAST_ROWS = 32
LEAST_STEPS = 50
_LEAST_WORK = 2e7
# Rows of the loops that take them in turn.
_IN_TURN = (32, 8, 0)


def until_done(
    step: Callable[[tuple[PyTree, ...], Any], Any],
    fixed: tuple[PyTree, ...],
    carry: tuple[Array, Any],
    *,
    goes_on: Callable[[Any], Array],
    done: Callable[[Any], Array],
    sizes: list[int],
) -> Any:
    """`carry = step(fixed, carry)` until every example is done; those that are stop costing.

    A step treats each example by itself and leaves alone what is done, so the outcome does not
    depend on the sizes, to the rounding that depends on a batch's size. Under `vmap` over networks
    a loop waits for the network with the most examples left.

    Args:
        step: from the parts of `fixed` and a carry, of `b <= B` examples, to their next carry.
        fixed: what the loop does not change: functions, scalars, and arrays `[B, ...]`.
        carry: a scalar, and the state, every leaf `[B, ...]`.
        goes_on: whether the loop may go on, of a carry; scalar bool.
        done: which examples are done, of a carry, `[B]` bool.
        sizes: from `row_counts`: how many rows the loops after the first have, down to 0.

    Returns:
        The last carry, `[B, ...]`.
    """

    def loop(fixed: tuple[PyTree, ...], carry: Any, enough: int) -> Any:
        return jax.lax.while_loop(
            lambda carry: goes_on(carry) & (jnp.sum(~done(carry)) > enough),
            functools.partial(step, fixed),
            carry,
        )

    carry = loop(fixed, carry, sizes[0])
    for size, enough in itertools.pairwise(sizes):
        # Where the loop before was interrupted more are left than fit, and nothing happens here.
        rows = jnp.argsort(done(carry), stable=True)[:size]
        scalar, state = loop(_rows(fixed, rows), _rows(carry, rows), enough)
        carry = scalar, _with_rows(carry[1], rows, state)
    return carry


def in_turn(
    step: Callable[[tuple[PyTree, ...], Any], Any],
    fixed: tuple[PyTree, ...],
    carry: tuple[Array, Any],
    *,
    goes_on: Callable[[Any], Array],
    done: Callable[[Any], Array],
) -> Any:
    """`until_done` with a step of the first few examples that are not done, whoever they are.

    For steps that cost much, where a row costs the same in few rows as in many, as on a CPU: no
    example waits for the slowest of its batch.
    """

    def turn(size: int, carry: Any) -> Any:
        rows = jnp.argsort(done(carry), stable=True)[:size]
        scalar, state = step(_rows(fixed, rows), _rows(carry, rows))
        return scalar, _with_rows(carry[1], rows, state)

    def unfinished(enough: int, carry: Any) -> Array:
        return goes_on(carry) & (jnp.sum(~done(carry)) > enough)

    for size, smaller in itertools.pairwise(_IN_TURN):
        enough = size - 1 if smaller else 0  # with fewer left some rows would have no work
        carry = jax.lax.while_loop(
            functools.partial(unfinished, enough), functools.partial(turn, size), carry
        )
    return carry


def row_counts(batch_size: int, at_most: int, work: float) -> list[int]:
    """Numbers of rows of the loops after the first, down to 0.

    Args:
        batch_size: rows of the first loop.
        at_most: steps of the attack.
        work: multiplications of a forward pass of all rows.
    """
    counts: list[int] = []
    while at_most >= LEAST_STEPS:
        rows = counts[-1] if counts else batch_size
        rows = -(-rows // _FEWER[min(len(counts), len(_FEWER) - 1)])
        if rows < _LEAST_ROWS or rows * work < batch_size * _LEAST_WORK:
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


def multiplications(fun: Callable[..., Any], *args: Any) -> int:
    """Multiplications of `fun(*args)`, read off its trace; a `while` loop's body counts once."""
    return executed_and_once(fun, *args)[0]


def executed_and_once(fun: Callable[..., Any], *args: Any) -> tuple[int, int]:
    """`multiplications`, and those with every loop's body once, as XLA's cost analysis counts."""
    return _count(jax.make_jaxpr(fun)(*args).jaxpr)


def _count(jaxpr: Any) -> tuple[int, int]:
    return _sum(_of_equation(equation) for equation in jaxpr.eqns)


def _sum(counts: Iterable[tuple[int, int]]) -> tuple[int, int]:
    counts = [(0, 0), *counts]
    return sum(executed for executed, _ in counts), sum(once for _, once in counts)


def _of_equation(equation: Any) -> tuple[int, int]:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        count = math.prod(equation.outvars[0].aval.shape) * summed
        return count, count
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        count = math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
        return count, count
    inner = [_count(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "cond":  # one of its branches runs; the last is that for any other platform
        return max(reversed(inner), key=lambda counts: counts[1])
    executed, once = _sum(inner)
    return (params["length"] * executed if name == "scan" else executed), once


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each
