"""Work of a network: the multiplications of its matrix products and convolutions."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax


def multiplications(fun: Callable[..., Any], *args: Any) -> int:
    """Multiplications of `fun(*args)`, read off its trace; a `while` loop's body counts once."""
    return _count(jax.make_jaxpr(fun)(*args).jaxpr)


def _count(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        summed = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
        return math.prod(equation.outvars[0].aval.shape) * summed
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = kernel[params["dimension_numbers"].rhs_spec[0]]
        return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // features
    inner = [_count(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "cond":  # one of its branches runs
        return max(inner)
    return params.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                yield each
