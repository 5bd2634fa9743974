"""Functions as arguments of compiled code: what they carry compiles nothing anew."""

from collections.abc import Callable
from typing import Any

import jax


def as_pytree(fun: Callable[..., Any]) -> Callable[..., Any]:
    """A function that jit can take as an argument: a plain one becomes static."""
    return jax.tree_util.Partial(fun) if jax.tree_util.all_leaves([fun]) else fun


@jax.jit
def call(fun: Callable[..., Any], *args: Any) -> Any:
    """The function compiled, once for all pytrees of one structure."""
    return fun(*args)
