"""Fingerprints of networks, losses, settings, examples, and keys, the same in every process.

A network or a loss is what it computes: the hash of its trace and of its gradient's, with the
constants in them, and of its weights. Names are for messages only, so an edited function under the
same name is another one.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import re
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jdistill._jax import as_pytree, unbound
from jdistill.typing import LogitsFn


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
    leaves, structure = jax.tree.flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return _object(value)
    return {"structure": _plain(structure), "leaves": describe(leaves)}


def describe_attack(attack: Any, logits: Any = None) -> Any:
    """An attack's function with all its settings, also those left at their defaults.

    Args:
        attack: the attack.
        logits: shape and type of the network's logits `[B, K]`, where losses are described by what
            they compute.
    """
    function, settings = unbound(attack)
    described = describe(settings)
    if logits is not None and callable(settings.get("loss")):
        labels = jax.ShapeDtypeStruct(logits.shape[:1], np.int32)
        described["loss"] = describe_program(settings["loss"], logits, labels)
    return {"function": describe(function), "settings": described}


def describe_network(logits_fn: LogitsFn, inputs: Any) -> tuple[Any, Any]:
    """A network by its weights and by what it computes; and the shape of its logits.

    Args:
        logits_fn: the network.
        inputs: `[B, ...]`, for shape and type.

    Returns:
        The description, and shape and type of the logits, or None where JAX cannot trace it.
    """
    inputs = jax.ShapeDtypeStruct(np.shape(inputs), inputs.dtype)
    try:
        logits = jax.eval_shape(lambda fun, x: fun(x), as_pytree(logits_fn), inputs)
    except Exception:
        logits = None
    weights = fingerprint(jax.device_get(jax.tree.leaves(as_pytree(logits_fn))))
    return {"weights": weights, "program": describe_program(logits_fn, inputs)}, logits


def describe_program(function: Any, *arguments: Any) -> Any:
    """A function by what it computes of arguments of these shapes, and by its gradient.

    The leaves of a pytree (a network's weights) are left out; a function that JAX cannot trace is
    described by its code.
    """

    def both(fun: Any, first: Any, *rest: Any) -> Any:
        value, pull_back = jax.vjp(lambda x: fun(x, *rest), first)
        return value, pull_back(jax.tree.map(jax.numpy.ones_like, value))

    try:
        traced = jax.make_jaxpr(both)(as_pytree(function), *arguments)
    except Exception:
        return describe(function)
    # Where functions lie in memory and what they are called changes nothing.
    text = re.sub(r" at 0x[0-9a-f]+|\bname=[^\s\]]+", "", str(traced))
    return fingerprint([text, *map(describe, _constants(traced))])


def _constants(traced: Any) -> Iterator[Any]:
    """The arrays inside of a trace, those of its inner functions too."""
    yield from getattr(traced, "consts", ())
    for equation in getattr(traced, "jaxpr", traced).eqns:
        for variable in equation.invars:
            if hasattr(variable, "val"):
                yield variable.val
        for value in equation.params.values():
            for each in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(each, "eqns") or hasattr(each, "jaxpr"):
                    yield from _constants(each)


def fingerprint(value: Any) -> str:
    """A hash of what `describe` says, 16 hexadecimal digits."""
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

    What it calls by name is not followed.
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
