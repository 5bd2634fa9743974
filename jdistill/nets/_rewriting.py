"""Functions with their convolutions and max-pools computed by the rules that are fast on CPU.

A network of a user's own calls `jax.lax`, whose gradients are slow on CPU. Here the network is
traced, and its trace is evaluated with this package's convolution and max-pool in their place.
"""

import contextvars
import dataclasses
import functools
import inspect
import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, jaxpr_as_fun
from jax.tree_util import Partial

from jdistill import _validate
from jdistill._jax import backend, under_trace
from jdistill.nets._convolution import conv_general_dilated
from jdistill.nets._pooling import max_pool
from jdistill.typing import Array

# Set while a function that is not to be rewritten runs: then what it calls is not, either.
_switched_off: contextvars.ContextVar[bool] = contextvars.ContextVar("switched_off", default=False)


@dataclasses.dataclass(frozen=True)
class Fast:
    """The callable that `fast_on_cpu` returns; two are equal if their functions are."""

    fun: Callable[..., Any]
    enabled: bool = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function's result."""
        if not self.enabled:
            token = _switched_off.set(True)
            try:
                return self.fun(*args, **kwargs)
            finally:
                _switched_off.reset(token)
        if _switched_off.get() or backend() != "cpu" or not under_trace(args, kwargs):
            return self.fun(*args, **kwargs)
        try:
            return _rewritten(self.fun, args, kwargs)
        except TypeError as error:
            if "forward-mode autodiff" in str(error):
                error.add_note(
                    "Convolutions have reverse mode only where they are fast on CPU; pass "
                    "nets.fast_on_cpu(network, enabled=False)."
                )
            raise


def fast_on_cpu(fun: Callable[..., Any], enabled: bool = True) -> Any:
    """A network whose convolutions and max-pools have the library's fast gradients on CPU.

    Attacks, evaluation, and training steps apply it to the network they are given. Call it yourself
    in your own training loops, or with `enabled=False` to keep XLA's operations everywhere.

    Where the network is traced (under `jit`, `grad`, or `vmap`) and the default backend is the
    CPU, its trace is evaluated with `nets.conv_general_dilated` and `nets.max_pool` in the place
    of JAX's, also inside `jit`, `scan`, and `remat`; functions with a derivative rule of their own
    stay as they are. The values and gradients are the same, to float32 rounding. Reverse mode
    only: pass `enabled=False` for `jax.jvp`, `jax.linearize`, `jax.jacfwd`, and `jax.hessian` of
    convolutions.

    Args:
        fun: A `LogitsFn`, an `ApplyFn`, or any other pure function of and to pytrees of arrays.
        enabled: False keeps the network as it is, and what it calls; the outermost call decides.

    Returns:
        A function of the same signature; a pytree with the same leaves where `fun` is one.

    Raises:
        ValueError: `fun` cannot be called, or is an NNX module, whose updates would be lost;
            `enabled` is neither True nor False.
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
    if any(base.__module__.startswith("flax.nnx") for base in type(fun).__mro__):
        raise ValueError(
            f"expected a pure function, got the NNX module {type(fun).__name__}, whose updates "
            "would be lost; pass nets.nnx_logits_fn(module), or a function of the state of "
            "nnx.split(module) that returns the new one"
        )
    if isinstance(fun, Fast):
        return fun if enabled else Fast(fun.fun, enabled=False)
    if isinstance(fun, Partial) and isinstance(fun.func, Fast):
        func = fast_on_cpu(fun.func, enabled)
        return fun if func is fun.func else Partial(func, *fun.args, **fun.keywords)
    if jax.tree_util.all_leaves([fun]):
        return Fast(fun, enabled)
    return Partial(Fast(call_pytree, enabled), fun)


def is_fast(fun: Any) -> bool:
    """True for what `fast_on_cpu` was applied to, and for functions of this library."""
    if not isinstance(fun, Partial):
        return isinstance(fun, Fast)
    module = getattr(fun.func, "__module__", None) or ""
    return isinstance(fun.func, Fast) or module.startswith("jdistill.")


def call_pytree(fun: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """`fun(*args, **kwargs)`, with `fun` itself a pytree."""
    return fun(*args, **kwargs)


def _rewritten(fun: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """The function's result, by evaluating its trace."""
    # What is no tracer the function may look at, as it could without this.
    traced, others, inside = _separated((args, kwargs))
    plain = _known_plain(fun)
    kind = inside, *(_kind(leaf) for leaf in (*others, *traced))
    if kind in plain:
        return fun(*args, **kwargs)
    outside: list[Any] = []

    def of_traced(traced: list[Array]) -> list[Array]:
        inner_args, inner_kwargs = _joined(traced, others, inside)
        results, *rest = _separated(fun(*inner_args, **inner_kwargs))
        outside.extend(rest)
        return results

    closed = jax.make_jaxpr(of_traced)(traced)
    if not _concerns(closed.jaxpr):
        plain.add(kind)
    return _joined(_evaluate(closed, traced), *outside)


# By the function: of which arguments there is nothing to replace, so that it need not be traced
# beforehand. If that changes, nothing but the speed does.
_plain: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()


def _known_plain(fun: Callable[..., Any]) -> set[Any]:
    """The set for a function, which may be added to."""
    try:
        return _plain.setdefault(fun, set())
    except TypeError:  # no weak reference, or no hash
        return set()


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, bool | int | float | str):
        return leaf
    return getattr(leaf, "shape", None), str(getattr(leaf, "dtype", type(leaf)))


def _separated(tree: Any) -> tuple[list[Array], list[Any], Any]:
    """Leaves that are tracers; all leaves, with a mark in the places of those; the structure."""
    leaves, structure = jax.tree.flatten(tree)
    is_traced = [isinstance(leaf, jax.core.Tracer) for leaf in leaves]
    traced = [leaf for leaf, found in zip(leaves, is_traced, strict=True) if found]
    others = [_TRACED if found else leaf for leaf, found in zip(leaves, is_traced, strict=True)]
    return traced, others, structure


def _joined(traced: Sequence[Array], others: list[Any], structure: Any) -> Any:
    """The pytree that `_separated` took apart."""
    rest = iter(traced)
    leaves = [next(rest) if leaf is _TRACED else leaf for leaf in others]
    return jax.tree.unflatten(structure, leaves)


_TRACED = object()


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
    fits = all(0 <= pad < window[axis] for axis in padded for pad in params["padding"][axis])
    supported = len(axes) == 2 and padded <= {*axes} and fits and dilations == {1}
    if not supported or inputs.dtype not in (jnp.float32, jnp.float64) or inputs.ndim < 3:
        return None
    if inputs.size == 0:
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


def _called(equation: JaxprEqn, operands: list[Any]) -> list[Any] | None:
    params = equation.params
    shardings = [*params.get("in_shardings", ()), *params.get("out_shardings", ())]
    if any(type(each).__name__ != "UnspecifiedValue" for each in shardings):
        return None
    return _jitted(params["jaxpr"])(*operands)


@functools.lru_cache(maxsize=64)
def _jitted(closed: ClosedJaxpr) -> Callable[..., list[Any]]:
    """The evaluation of a function that was under `jit`; JAX has one trace for all its calls."""
    return jax.jit(lambda *args: _evaluate(closed, args))


def _rematerialized(equation: JaxprEqn, operands: list[Any]) -> list[Any]:
    closed = ClosedJaxpr(equation.params["jaxpr"], ())
    options = {name: equation.params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(lambda *args: _evaluate(closed, args), **options)(*operands)


def _scanned(equation: JaxprEqn, operands: list[Any]) -> list[Any] | None:
    params = equation.params
    if "num_carry" not in params:  # JAX 0.11 and later say it otherwise: the loop stays XLA's own
        return None
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
