"""JAX's settings as the library uses them: precision, compiler options, functions as arguments."""

import contextlib
import contextvars
import dataclasses
import dis
import functools
import hashlib
import inspect
import typing
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate

# The XLA flag for convolutions on CPU: `runtime` sets it, `nets` looks whether it is set. Lone
# convolutions go to Eigen, not to the YNN library, which is slow at them.
CPU_FLAG = "--xla_cpu_experimental_ynn_fusion_type"
CPU_FLAG_VALUE = "-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"

# XLA's newer way to compile fused loops on CPU takes up to half of an attack's compile time, and
# the attack is no faster for it.
_CPU_OPTIONS = {"xla_cpu_use_fusion_emitters": False}

_F = TypeVar("_F", bound=Callable[..., Any])

_planned: contextvars.ContextVar[str | None] = contextvars.ContextVar("planned", default=None)


def static_field(**kwargs: Any) -> Any:
    """A field of a `register`ed class that belongs to the compiled program."""
    return dataclasses.field(metadata={"static": True}, **kwargs)


@typing.dataclass_transform(
    kw_only_default=True, frozen_default=True, field_specifiers=(static_field,)
)
def register(cls: type) -> type:
    """A frozen dataclass whose instances are pytrees; fields are leaves or pytrees, or static.

    Not by `jax.tree_util.register_dataclass`: since some version after 0.7 the structures of two
    such classes are equal where their static fields are, and `jit` then runs, once in a while, what
    was compiled for the other class (0.10.2: 41 of 300 classes of two numbers).
    """
    cls = dataclasses.dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(cls)
    leaves = tuple(each.name for each in fields if not each.metadata.get("static"))
    fixed = tuple(each.name for each in fields if each.metadata.get("static"))
    keys = tuple(map(jax.tree_util.GetAttrKey, leaves))

    def flatten(value: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        held = vars(value)
        return tuple([held[name] for name in leaves]), tuple([held[name] for name in fixed])

    def flatten_with_keys(value: Any) -> tuple[Any, tuple[Any, ...]]:
        found, meta = flatten(value)
        return tuple(zip(keys, found, strict=True)), meta

    def unflatten(meta: tuple[Any, ...], found: Any) -> Any:
        value: Any = object.__new__(
            cls
        )  # JAX builds trees of anything, which `__init__` may refuse
        vars(value).update(zip(leaves, found, strict=True))
        vars(value).update(zip(fixed, meta, strict=True))
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    return cls


def backend() -> str:
    """Platform that what is traced now is for: the default one, but under `planned_for`."""
    return _planned.get() or jax.default_backend()


@contextlib.contextmanager
def planned_for(platform: str) -> Iterator[None]:
    """Context in which code is traced for a platform that need not be there.

    JAX keeps traces without asking what they were for, so what is jitted inside must be new.
    """
    token = _planned.set(platform)
    try:
        yield
    finally:
        _planned.reset(token)


def full_precision() -> contextlib.AbstractContextManager[Any]:
    """Full float32 matrix products unless the user chose a precision.

    JAX's defaults are bfloat16 on TPU and TF32 on recent GPUs; that alone moves robust accuracy.
    """
    configured: str | None = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if configured is None:
        return jax.default_matmul_precision("highest")
    return contextlib.nullcontext()


def jit(fun: _F, **options: Any) -> _F:
    """`jax.jit` with the compiler options that suit the backend.

    Inside code that is compiled already the caller's options apply, as JAX allows no others.

    Args:
        fun: the function to compile.
        **options: of `jax.jit`.
    """
    inner = jax.jit(fun, **options)
    outermost = functools.cache(
        lambda: jax.jit(fun, **options, compiler_options=_compiler_options())
    )

    @functools.wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        if under_trace(args, kwargs):
            return inner(*args, **kwargs)
        try:
            return outermost()(*args, **kwargs)
        except ValueError as error:
            # Under `jax.grad` the tracers may be in what a function of the arguments closes over.
            if "compiler_options" not in str(error):
                raise
            return inner(*args, **kwargs)

    return cast(_F, call)


def shapes(tree: Any, sharding: Any = None) -> Any:
    """The arrays of a tree as shapes, on devices that need not be there."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=sharding)

    return jax.tree.map(shape, tree)


def under_trace(*values: Any) -> bool:
    """Tracing of the caller: True with tracers among the values, or under `jit` without any."""
    # Under `jit` a new array is a tracer as well.
    leaves = jax.tree.leaves((values, jnp.zeros(())))
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


@functools.cache
def _compiler_options() -> dict[str, bool] | None:
    """Options for the default backend, or None for XLA's own."""
    if jax.default_backend() != "cpu":
        return None
    try:
        jax.jit(lambda: 0, compiler_options=_CPU_OPTIONS)()
    except jax.errors.JaxRuntimeError:  # an XLA that does not know them, such as JAX 0.12's
        return None
    return _CPU_OPTIONS


def as_pytree(fun: Callable[..., Any], *, name: str = "loss") -> Callable[..., Any]:
    """A function that jit can take as an argument: a plain one becomes static."""
    named: dict[str, Any] = {name: fun}
    _validate.function(**named)
    if not jax.tree_util.all_leaves([fun]):
        return fun
    return jax.tree_util.Partial(static(fun))


def static(fun: Callable[..., Any]) -> Callable[..., Any]:
    """A plain function whose compiled code is of what it captures now.

    JAX takes it for the same function as long as the arrays and numbers that it refers to, in its
    closure or as globals of its module, are the same; then it compiles nothing anew.

    Raises:
        ValueError: an object that holds arrays and compares by identity, or a captured NumPy array
            that has changed in place.
    """
    refuse_held_arrays(fun)
    values = captured(fun)
    for name, value in values:
        if isinstance(value, np.ndarray):
            _refuse_changed(name, value)
    return _Capturing(fun, tuple(values)) if values else fun


class _Capturing:
    """A function that compares by what it captured when it was made."""

    def __init__(self, fun: Callable[..., Any], captured: tuple[tuple[str, Any], ...]) -> None:
        functools.update_wrapper(self, fun)
        self._fun, self._held = fun, captured  # held, so that no identity is used twice
        self._key = (fun, *((name, _token(value)) for name, value in captured))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._fun(*args, **kwargs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Capturing) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def captured(fun: Any) -> list[tuple[str, Any]]:
    """Arrays and numbers that a function refers to, by name: in its closure, defaults and globals.

    Those of containers, of objects' attributes, of functions in its module that it calls, and of
    partials are among them; numbers in lists, and of objects, are not, since they may count calls.
    """
    found: list[tuple[str, Any]] = []
    module = str(getattr(fun, "__module__", None))
    if not module.startswith(LIBRARIES):
        _capture("", fun, found, set(), module=module, numbers=True, depth=5)
    return found


LIBRARIES = ("jax", "jdistill.", "flax.", "optax.", "numpy", "builtins")


def _capture(
    name: str,
    value: Any,
    found: list[tuple[str, Any]],
    visited: set[int],
    *,
    module: str,
    numbers: bool,
    depth: int,
) -> None:
    """Add what a value holds."""
    if isinstance(value, np.ndarray | jax.Array):
        found.append((name, value))
        return
    if isinstance(value, bool | int | float | complex | str | np.generic):
        if numbers:
            found.append((name, value))
        return
    if depth == 0 or id(value) in visited or inspect.ismodule(value) or isinstance(value, type):
        return
    visited.add(id(value))
    held: dict[str, Any] = {}
    if inspect.isfunction(value):
        if value.__module__ == module or value.__module__ is None:
            held = _referred(value)
    elif isinstance(value, functools.partial):
        held = {name: (value.func, value.args, value.keywords)}
    elif inspect.ismethod(value):
        held = {name: (value.__func__, value.__self__)}
    elif isinstance(value, dict):
        held = {f"{name}[{key!r}]": each for key, each in value.items()}
    elif isinstance(value, list | tuple):
        held = {f"{name}[{index}]": each for index, each in enumerate(value)}
        numbers = numbers and isinstance(value, tuple)
    elif not str(type(value).__module__).startswith(("jax", "numpy")):
        held = {f"{name}.{key}": each for key, each in getattr(value, "__dict__", {}).items()}
        numbers = False
    for inner, each in held.items():
        _capture(inner, each, found, visited, module=module, numbers=numbers, depth=depth - 1)


def _referred(fun: Any) -> dict[str, Any]:
    """The variables, defaults and globals that a function of the user's reads, by name."""
    named: dict[str, Any] = {"defaults": (fun.__defaults__, fun.__kwdefaults__)}
    for name, cell in zip(fun.__code__.co_freevars, fun.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            named[name] = cell.cell_contents
    codes, reads, writes = [fun.__code__], set(), set()
    for code in codes:
        codes += [each for each in code.co_consts if inspect.iscode(each)]
        for step in dis.get_instructions(code):
            if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                reads.add(step.argval)
            elif step.opname in ("STORE_GLOBAL", "STORE_NAME"):
                writes.add(step.argval)
    there = sorted(name for name in reads - writes if name in fun.__globals__)
    return named | {name: fun.__globals__[name] for name in there}


def _token(value: Any) -> Any:
    """Token of a captured value, which differs where the value does."""
    if isinstance(value, np.ndarray):
        return value.shape, str(value.dtype), _digest(value)
    return id(value) if isinstance(value, jax.Array) else (type(value), repr(value))


def _digest(array: np.ndarray) -> bytes:
    content: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return hashlib.blake2b(content, digest_size=16).digest()


# By the identity of an array: it, while it lives, and what it held.
_seen: dict[int, tuple[weakref.ref, bytes]] = {}


def _refuse_changed(name: str, array: np.ndarray) -> None:
    """An error for a captured array that is not what it was, where JAX keeps what it made of it."""
    if array.dtype.hasobject or jax.dtypes.canonicalize_dtype(array.dtype) == array.dtype:
        return
    digest = _digest(array)
    reference, before = _seen.get(id(array), (None, digest))
    if reference is not None and reference() is array and before != digest:
        raise ValueError(
            f"expected a function whose arrays stay as they are, got {name} changed in place since "
            "the last call; pass it as an argument, nets.callable_logits_fn(function, arrays), or "
            "make a new array"
        )
    key = id(array)
    _seen[key] = weakref.ref(array, lambda _: _seen.pop(key, None)), digest


def refuse_held_arrays(fun: Callable[..., Any]) -> None:
    """An error for an object, or its method, that holds arrays and can change.

    It compares by identity, so compiled code would go on with the arrays that it had at first.
    """
    holder = getattr(fun, "__self__", fun)
    held = _held_arrays(holder)
    if held:
        raise ValueError(
            f"expected a function or a pytree, got an object of {type(holder).__name__} that holds "
            f"arrays ({', '.join(held[:3])}), whose changes compiled code would not see; pass them "
            "as arguments, nets.callable_logits_fn(function, arrays), or register the class as a "
            "pytree"
        )


def _held_arrays(holder: Any, depth: int = 3) -> list[str]:
    """Attributes that are arrays or pytrees with arrays, as `"layer.weights"`."""
    parameters = getattr(type(holder), "__dataclass_params__", None)
    if inspect.isroutine(holder) or inspect.ismodule(holder) or isinstance(holder, type):
        return []
    if isinstance(holder, functools.partial) or (parameters is not None and parameters.frozen):
        return []
    found = []
    for name, value in getattr(holder, "__dict__", {}).items():
        leaves = jax.tree.leaves(value)
        if any(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves):
            found.append(name)
        elif depth and len(leaves) == 1 and leaves[0] is value:
            found += [f"{name}.{inner}" for inner in _held_arrays(value, depth - 1)]
    return found


@jit
def call(fun: Callable[..., Any], *args: Any) -> Any:
    """The function compiled, once for all pytrees of one structure."""
    return fun(*args)


def logits_shape(fun: Any, inputs: Any, *, name: str = "logits_fn") -> jax.ShapeDtypeStruct:
    """Shape and type of a network's logits, checked; jit keeps the trace.

    Raises:
        ValueError: the network cannot take the inputs, or returns something else than `[B, K]`.
    """
    try:
        with full_precision():
            logits: jax.ShapeDtypeStruct = jax.eval_shape(call, fun, inputs)
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        if str(error).startswith("expected "):
            raise
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"expected {name} to take inputs of shape {np.shape(inputs)}, got a "
            f"{type(error).__name__} ({reason:.200}); pass the inputs and weights that it is for"
        ) from error
    _validate.logits(logits, np.shape(inputs)[0], name=name)
    return logits


def unbound(function: Any) -> tuple[Any, dict[str, Any]]:
    """The function without its partials; and its settings, those left at their defaults too."""
    function, bound = settings_bound(function)
    takes = parameters(function).values()
    defaults = {each.name: each.default for each in takes if each.default is not each.empty}
    return function, {**defaults, **bound}


def settings_bound(function: Any) -> tuple[Any, dict[str, Any]]:
    """The function without its partials; and the settings that they bind, the outermost first."""
    bound: dict[str, Any] = {}
    # By their attributes: what `jax.tree_util.Partial` makes of a partial is not one.
    while hasattr(function, "func") and hasattr(function, "keywords"):
        function, bound = function.func, {**function.keywords, **bound}
    return function, bound


def parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    """A callable's parameters; none where it has no signature, as some builtins."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}
