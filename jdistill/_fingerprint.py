"""Fingerprints of networks, losses, settings, examples, and keys, the same in every process.

A network or a loss is its weights, its settings, and the code of its functions and classes, those
of its own module that it calls by name included: an edited function under the same name is another
one, and so is one whose globals hold other arrays or numbers. The code of other modules is not
followed, nor are lists and objects among globals, which may count calls.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import re
import threading
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jdistill._jax import LIBRARIES, captured, unbound

# Public modules whose functions go by its name, so that they may move between its files.
_MOVED = re.compile(r"^(jdistill\.(?:distill|losses))\._\w+$")


class _Open(threading.local):
    """Values that are being described, outermost first, which one may refer to again."""

    def __init__(self) -> None:
        self.ids: list[int] = []


_open = _Open()


def describe(value: Any) -> Any:
    """Settings, functions and networks as JSON-able content; arrays by their hash."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _array(value)
    if id(value) in _open.ids:
        return f"cycle {len(_open.ids) - _open.ids.index(id(value))}"
    _open.ids.append(id(value))
    try:
        return _describe(value)
    finally:
        _open.ids.pop()


def _describe(value: Any) -> Any:
    if isinstance(value, functools.partial):  # JAX's Partial is one, too
        return {
            "function": describe(value.func),
            "arguments": describe(value.args),
            "settings": describe(value.keywords),
        }
    if isinstance(value, Mapping):
        return {str(name): describe(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [describe(entry) for entry in value]
    if isinstance(value, (set, frozenset)):  # whose order is another one in every process
        return sorted(json.dumps(describe(entry), sort_keys=True) for entry in value)
    if isinstance(value, type):
        return _class(value)
    if inspect.ismethod(value):
        return {"method": describe(value.__func__), "of": describe(value.__self__)}
    inner = getattr(value, "fun", None)
    if _is_library(type(value)) and inspect.isfunction(inner) and not _is_library(inner):
        rules = [describe(getattr(value, name, None)) for name in ("jvp", "fwd", "bwd")]
        return {"function": describe(inner), "rules": rules}
    function = _unwrapped(value) if callable(value) else value
    if inspect.isfunction(function):
        return _function(function)
    if dataclasses.is_dataclass(value):
        fields = (each.name for each in dataclasses.fields(value) if each.name != "parent")
        held = {name: describe(getattr(value, name, None)) for name in fields}
        return {"class": _class(type(value)), "holds": held}
    leaves, structure = jax.tree.flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return _object(value)
    parts = {"structure": _plain(structure), "leaves": describe(leaves)}
    return parts if _is_library(type(value)) else {"class": _class(type(value)), **parts}


def describe_attack(attack: Any) -> Any:
    """An attack's function with all its settings, also those left at their defaults."""
    function, settings = unbound(attack)
    return {"function": describe(function), "settings": describe(settings)}


def fingerprint(value: Any) -> str:
    """Hash of settings, networks, losses, or arrays, the same in every process and on any machine.

    Functions count by their code, defaults, and captured values, not by their names; arrays by
    their type, shape, and content. The order of keys makes no difference, nor does a tuple for a
    list; 1 and 1.0 differ, so convert numbers to the type that the setting has.

    Returns:
        16 hexadecimal digits.
    """
    text = json.dumps(describe(value), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def differences(one: Any, other: Any, name: str = "") -> list[str]:
    """Where two descriptions differ, as `"attack.settings.eps 0.1, not 0.2"`."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = []
        for entry in sorted({*one, *other}):
            inner = f"{name}.{entry}" if name else entry
            found += differences(one.get(entry), other.get(entry), inner)
        return found
    return [] if one == other else [f"{name} {_short(one)}, not {_short(other)}"]


def _array(value: Any) -> Any:
    if isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    array = np.asarray(value)
    if array.ndim == 0 and array.dtype.kind in "biuf":
        return array.item()
    digest = hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()
    return f"{array.dtype}{list(array.shape)} {digest}"


def _is_library(value: Any) -> bool:
    """True for a function or a class of a library, whose name says what it does."""
    if inspect.isfunction(value):  # whose `__module__` a wrapper copies
        module = str(value.__globals__.get("__name__"))
    else:
        module = str(getattr(value, "__module__", None))
    return module.startswith(LIBRARIES)


def _unwrapped(value: Any) -> Any:
    """Function inside the wrappers of libraries, such as `jax.jit`; the user's own stay."""
    while hasattr(value, "__wrapped__") and (not inspect.isfunction(value) or _is_library(value)):
        value = value.__wrapped__
    return value


def _function(function: Any) -> str:
    """A function's name; of one from elsewhere also a hash of what it does and closes over."""
    module = _MOVED.sub(r"\1", function.__module__)
    name = f"{module}.{function.__qualname__}"
    if name.startswith("jdistill.") and "<" not in name:
        return name
    defaults = (function.__defaults__, function.__kwdefaults__)
    inside = [_code(function.__code__), describe(defaults)]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            held = cell.cell_contents
            # Schedules of optax turn the numbers of steps that they close over into floats at
            # their first call, and are the same after it.
            whole = _is_library(function) and type(held) is int
            inside.append(describe(float(held) if whole else held))
    inside.append([[variable, describe(held)] for variable, held in captured(function)])
    if not _is_library(function):
        inside.append([describe(each) for each in _called(function)])
    return f"{name} {fingerprint(inside)}"


def _called(function: Any) -> list[Any]:
    """The functions and classes of its own module that a function names."""
    found = []
    for name in sorted(_names(function.__code__)):
        value = _unwrapped(function.__globals__.get(name))
        own = inspect.isfunction(value) or isinstance(value, type)
        if own and value.__module__ == function.__module__:
            found.append(value)
    return found


def _names(code: types.CodeType) -> set[str]:
    """The names in a piece of code and in those within it."""
    inner = [_names(each) for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*inner)


# Those that `dataclasses` writes into a class.
_GENERATED = frozenset({"__init__", "__repr__", "__eq__", "__hash__", "__replace__"})


def _class(kind: type) -> Any:
    """A class of a library by its name, another one with its code and its numbers."""
    if _is_library(kind):
        return _plain(kind)
    generated = _GENERATED if dataclasses.is_dataclass(kind) else frozenset()
    parts = {}
    for name, value in vars(kind).items():
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, property):
            value = [value.fget, value.fset]
        elif callable(value) and not isinstance(value, type):
            value = _unwrapped(value)
            if name in generated or not inspect.isfunction(value) or _is_library(value):
                continue
        elif name.startswith("_") or not isinstance(value, (bool, int, float, str, np.ndarray)):
            continue
        parts[name] = describe(value)
    return {
        "class": _plain(kind),
        "code": parts,
        "bases": [describe(base) for base in kind.__bases__],
    }


def _code(code: types.CodeType) -> list[Any]:
    """A piece of code as content, without where it stands."""
    constants = [
        _code(each) if isinstance(each, types.CodeType) else describe(each)
        for each in code.co_consts
    ]
    return [code.co_code.hex(), list(code.co_names), constants]


def _object(value: Any) -> Any:
    """An object by its class and what it holds; of one that holds nothing, its `repr`."""
    held = getattr(value, "__dict__", None)
    kind = _class(type(value))
    return (
        {"class": kind, "holds": describe(held)} if held else {"class": kind, "is": _plain(value)}
    )


def _plain(value: Any) -> str:
    """A value's `repr` without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
