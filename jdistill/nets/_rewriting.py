"""Functions with their convolutions and max-pools computed by the rules that are fast on CPU.

A network of a user's own calls `jax.lax`, whose gradients are slow on CPU. Here the network is
traced, and its trace is evaluated with this package's convolution and max-pool in their place.
"""

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jax.tree_util import Partial

from jdistill import _validate
from jdistill._jax import under_trace
from jdistill.nets._convolution import conv_general_dilated
from jdistill.nets._pooling import max_pool
from jdistill.typing import Array


@dataclasses.dataclass(frozen=True)
class Fast:
    """What `fast_on_cpu` makes of a function; equal where the functions are equal."""

    fun: Callable[..., Any]
    enabled: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        if not (self.enabled and jax.default_backend() == "cpu" and under_trace(args, kwargs)):
            return self.fun(*args, **kwargs)
        try:
            return _rewritten(self.fun)(*args, **kwargs)
        except TypeError as error:
            if "forward-mode autodiff" not in str(error):
                raise
            raise TypeError(
                "expected reverse-mode differentiation of a network with fast convolutions, got "
                "forward-mode; pass nets.fast_on_cpu(network, enabled=False)"
            ) from error


def fast_on_cpu(fun: Callable[..., Any], enabled: bool = True) -> Any:
    """A network whose convolutions and max-pools have the library's fast gradients on CPU.

    Attacks, evaluation, and training steps apply it to the network that they are given: call it
    with `enabled=False` to have XLA's own there, or in training loops of your own.

    Where the network is traced (under `jit`, `grad`, or `vmap`) and the default backend is the
    CPU, its trace is evaluated with `nets.conv_general_dilated` and `nets.max_pool` in the place
    of JAX's, also inside `jit`, `scan`, and `remat`; functions with a derivative rule of their own
    stay as they are. The values and gradients are the same, to float32 rounding. Reverse mode
    only: pass `enabled=False` for `jax.jvp`, `jax.jacfwd`, and `jax.hessian` of convolutions.

    Args:
        fun: A `LogitsFn`, an `ApplyFn`, or any other function of and to pytrees of arrays.
        enabled: False gives the network as it is, also to what would apply this by itself.

    Returns:
        A function of the same signature; a pytree with the same leaves where `fun` is one. A
        network that was disabled stays so.

    Raises:
        ValueError: `fun` cannot be called, or `enabled` is neither True nor False.
        TypeError: forward-mode differentiation of a convolution, when it is called.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import linen
        >>> net = fast_on_cpu(lambda inputs: linen.max_pool(inputs, (2, 2), (2, 2)))
        >>> jax.grad(lambda inputs: net(inputs).sum())(jnp.zeros((1, 2, 2, 1))).ravel().tolist()
        [1.0, 0.0, 0.0, 0.0]
    """
    _validate.function(fun=fun)
    _validate.flag(enabled=enabled)
    if isinstance(fun, Fast):
        return fun if enabled else Fast(fun.fun, enabled=False)
    if is_fast(fun):
        return fun if enabled else _disabled(fun)
    if jax.tree_util.all_leaves([fun]):
        return Fast(fun, enabled)
    return Partial(Fast(call_pytree, enabled), fun if enabled else _disabled(fun))


def is_fast(fun: Any) -> bool:
    """True for what needs no `fast_on_cpu` any more: adapters, and this library's functions."""
    if not isinstance(fun, Partial):
        return isinstance(fun, Fast)
    module = getattr(fun.func, "__module__", None) or ""
    return isinstance(fun.func, Fast) or module.startswith("jdistill.")


def call_pytree(fun: Callable[..., Any], *args: Any) -> Any:
    """`fun(*args)`, with `fun` itself a pytree."""
    return fun(*args)


def _disabled(tree: Any) -> Any:
    """The pytree with every `Fast` function in it disabled."""
    if not isinstance(tree, Partial):
        return tree
    fun = fast_on_cpu(tree.func, enabled=False) if isinstance(tree.func, Fast) else tree.func
    args, keywords = jax.tree.map(
        _disabled, (tree.args, tree.keywords), is_leaf=lambda each: isinstance(each, Partial)
    )
    return Partial(fun, *args, **keywords)


def _rewritten(fun: Callable[..., Any]) -> Callable[..., Any]:
    """The function that evaluates the other's trace, equation by equation."""

    @functools.wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        leaves, structure = jax.tree.flatten((args, kwargs))
        traced = [isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves]
        fixed = [None if is_array else leaf for leaf, is_array in zip(leaves, traced, strict=True)]

        def of_arrays(arrays: list[Array]) -> Any:
            rest = iter(arrays)
            whole = [
                next(rest) if is_array else leaf
                for leaf, is_array in zip(fixed, traced, strict=True)
            ]
            inner_args, inner_kwargs = jax.tree.unflatten(structure, whole)
            return fun(*inner_args, **inner_kwargs)

        arrays = [leaf for leaf, is_array in zip(leaves, traced, strict=True) if is_array]
        closed, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(arrays)
        outs = _evaluate(closed, arrays)
        return jax.tree.unflatten(jax.tree.structure(shapes), outs)

    return call


def _evaluate(closed: ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """The trace's outputs, with what `_RULES` knows replaced."""
    if not _concerns(closed.jaxpr):
        return list(jaxpr_as_fun(closed)(*args))
    jaxpr = closed.jaxpr
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*closed.consts, *args], strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for concerned, group in itertools.groupby(jaxpr.eqns, _concerns_equation):
        for equations in [[each] for each in group] if concerned else [list(group)]:
            outs = None
            if concerned:
                (equation,) = equations
                rule = _RULES[equation.primitive.name]
                outs = rule(equation, [read(variable) for variable in equation.invars])
            if outs is None:
                outs = _as_they_are(jaxpr, equations, values)
            variables = [variable for each in equations for variable in each.outvars]
            values.update(zip(variables, outs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _concerns(jaxpr: Jaxpr) -> bool:
    """True for a trace with something to replace."""
    return any(map(_concerns_equation, jaxpr.eqns))


def _concerns_equation(equation: JaxprEqn) -> bool:
    name, params = equation.primitive.name, equation.params
    if name in _REPLACED:
        return True
    # A choice by platform was made by somebody who knows the platforms.
    if name not in _RULES or params.get("branches_platforms") is not None:
        return False
    return any(_concerns(inner.jaxpr) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> list[ClosedJaxpr]:
    """The traces inside an equation."""
    found = []
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, Jaxpr):
                each = ClosedJaxpr(each, ())
            if isinstance(each, ClosedJaxpr):
                found.append(each)
    return found


def _as_they_are(jaxpr: Jaxpr, equations: list[JaxprEqn], values: dict[Any, Any]) -> list[Any]:
    """All outputs of the equations, evaluated by JAX as a trace of their own."""
    outputs = [variable for each in equations for variable in each.outvars]
    used = dict.fromkeys(
        variable
        for each in equations
        for variable in each.invars
        if not isinstance(variable, Literal)
    )
    inputs = [variable for variable in used if variable not in {*outputs}]
    effects = frozenset().union(*(each.effects for each in equations))
    alone = jaxpr.replace(
        constvars=[], invars=inputs, outvars=outputs, eqns=equations, effects=effects
    )
    return list(jaxpr_as_fun(ClosedJaxpr(alone, ()))(*(values[variable] for variable in inputs)))


def _convolve(equation: JaxprEqn, operands: list[Any]) -> list[Any] | None:
    if equation.params.get("out_sharding") is not None:
        return None
    known = inspect.signature(conv_general_dilated).parameters
    options = {name: value for name, value in equation.params.items() if name in known}
    return [conv_general_dilated(*operands, **options)]


def _max_pool(equation: JaxprEqn, operands: list[Any]) -> list[Any] | None:
    """A pooling over at most two axes, which become height and width."""
    params, (inputs,) = equation.params, operands
    window, strides = params["window_dimensions"], params["window_strides"]
    axes = [axis for axis in range(inputs.ndim) if (window[axis], strides[axis]) != (1, 1)]
    axes += [axis for axis in range(inputs.ndim) if axis not in axes][: max(0, 2 - len(axes))]
    dilations = {*params["base_dilation"], *params["window_dilation"]}
    padded = {axis for axis, pads in enumerate(params["padding"]) if any(pads)}
    fits = all(max(params["padding"][axis]) < window[axis] for axis in padded)
    supported = len(axes) == 2 and padded <= {*axes} and fits and dilations == {1}
    if not supported or inputs.dtype not in (jnp.float32, jnp.float64) or inputs.ndim < 3:
        return None
    axes.sort()
    *others, channels = (axis for axis in range(inputs.ndim) if axis not in axes)
    order = (*others, *axes, channels)
    height, width = axes
    pooled = max_pool(
        inputs.transpose(order),
        (window[height], window[width]),
        (strides[height], strides[width]),
        (params["padding"][height], params["padding"][width]),
    )
    return [pooled.transpose(tuple(int(axis) for axis in np.argsort(order)))]


def _called(equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    return _evaluate(equation.params["jaxpr"], operands)


def _rematerialized(equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    closed = ClosedJaxpr(equation.params["jaxpr"], ())
    options = {name: equation.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(lambda *args: _evaluate(closed, args), **options)(*operands)


def _scanned(equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    params = equation.params
    closed, num_carry = params["jaxpr"], params["num_carry"]
    end = params["num_consts"] + num_carry
    consts, carry, inputs = (
        operands[: params["num_consts"]],
        operands[params["num_consts"] : end],
        operands[end:],
    )

    def body(carry: list[Any], inputs: list[Any]) -> tuple[list[Any], list[Any]]:
        outs = _evaluate(closed, [*consts, *carry, *inputs])
        return outs[:num_carry], outs[num_carry:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, outputs = lax.scan(body, carry, inputs, **options)
    return [*carry, *outputs]


def _looped(equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    params = equation.params
    middle = params["cond_nconsts"]
    end = middle + params["body_nconsts"]
    of_condition, of_body = operands[:middle], operands[middle:end]
    return list(
        lax.while_loop(
            lambda carry: _evaluate(params["cond_jaxpr"], [*of_condition, *carry])[0],
            lambda carry: _evaluate(params["body_jaxpr"], [*of_body, *carry]),
            operands[end:],
        )
    )


def _branched(equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    def branch(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
        return lambda *args: _evaluate(closed, args)

    index, *rest = operands
    return lax.switch(index, [branch(each) for each in equation.params["branches"]], *rest)


# What a rule gives None for stays as it is.
_REPLACED: dict[str, Callable[[JaxprEqn, list[Any]], list[Any] | None]] = {
    "conv_general_dilated": _convolve,
    "reduce_window_max": _max_pool,
}
# What has a derivative rule of its own (`jax.custom_vjp`, `jax.custom_jvp`) stays as it is.
_RULES = {
    **_REPLACED,
    "pjit": _called,
    "jit": _called,
    # One thing under the names that JAX has given it.
    "checkpoint": _rematerialized,
    "remat": _rematerialized,
    "remat2": _rematerialized,
    "scan": _scanned,
    "while": _looped,
    "cond": _branched,
}
