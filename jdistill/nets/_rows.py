"""The product of a dense layer, so that its gradient is fast on CPU."""

import math
from typing import Any

import jax

from jdistill.typing import Array


def by_rows(lhs: Array, rhs: Array, dimension_numbers: Any = None, **options: Any) -> Array:
    """`[..., I]` by `[I, O]` as one product of two matrices; the `dot_general` of `nn.Dense`.

    XLA's gradient of `rhs` sums over all leading axes at once, which on CPU takes several times as
    long where there are two or more.
    """
    del dimension_numbers
    rows = lhs.reshape(math.prod(lhs.shape[:-1]), lhs.shape[-1])
    product = jax.lax.dot_general(rows, rhs, (((1,), (0,)), ((), ())), **options)
    return product.reshape(*lhs.shape[:-1], rhs.shape[1])
