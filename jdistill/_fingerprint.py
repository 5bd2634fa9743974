"""Fingerprints of networks, losses, settings, examples, and keys, the same in every process.

A network or a loss is its weights, its settings, and the code of its functions, so an edited
function under the same name is another one, and so is one whose globals hold other arrays or
numbers; the code of what it calls by name is not followed.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import re
import types
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from jdistill._jax import captured, unbound


def describe(value: Any) -> Any:
    """Settings, functions and networks as JSON-able content; arrays by their hash."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return _array(value)
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
    if inspect.ismethod(value):
        return {"method": describe(value.__func__), "of": describe(value.__self__)}
    function = inspect.unwrap(value) if callable(value) else value
    if inspect.isfunction(function):
        return _function(function)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (each.name for each in dataclasses.fields(value) if each.name != "parent")
        held = {name: describe(getattr(value, name, None)) for name in fields}
        return {"class": _plain(type(value)), "holds": held}
    leaves, structure = jax.tree.flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return _object(value)
    return {"structure": _plain(structure), "leaves": describe(leaves)}


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


def _function(function: Any) -> str:
    """A function's name; of one from elsewhere also a hash of what it does and closes over.

    The code of what it calls by name is not followed.
    """
    name = f"{function.__module__}.{function.__qualname__}"
    if name.startswith("jdistill.") and "<" not in name:
        return name
    defaults = (function.__defaults__, function.__kwdefaults__)
    inside = [_code(function.__code__), describe(defaults)]
    for variable, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=True
    ):
        # A function that calls itself closes over itself, by its own name.
        if variable != function.__name__:
            with contextlib.suppress(ValueError):  # a variable that has no value yet
                inside.append(describe(cell.cell_contents))
    inside.append([[variable, describe(held)] for variable, held in captured(function)])
    return f"{name} {fingerprint(inside)}"


def _code(code: types.CodeType) -> list[Any]:
    """What a piece of code does, without where it stands."""
    constants = [
        _code(each) if isinstance(each, types.CodeType) else describe(each)
        for each in code.co_consts
    ]
    return [code.co_code.hex(), list(code.co_names), constants]


def _object(value: Any) -> Any:
    """An object by its class and what it holds; of one that holds nothing, its `repr`."""
    held = getattr(value, "__dict__", None)
    if not held or isinstance(value, type):
        return _plain(value)
    methods = {name: each for name, each in vars(type(value)).items() if inspect.isfunction(each)}
    return {"class": _plain(type(value)), "methods": describe(methods), "holds": describe(held)}


def _plain(value: Any) -> str:
    """A value's `repr` without addresses in memory."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
