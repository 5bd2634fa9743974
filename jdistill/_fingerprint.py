"""Fingerprints of networks, losses, settings, examples, and keys, the same in every process.

A network or a loss is its weights, its settings, and the code of its functions and classes, those
of its own module that it calls by name included: an edited function under the same name is another
one, and so is one whose globals hold other arrays or numbers. The code of other modules is not
followed, nor are lists and objects among globals, which may count calls. What is the user's goes
by its qualified name without the module, so that the same file is the same study as a program
(`__main__`), by import, and under another file name; what a library has goes by its full name.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import re
import sys
import threading
import types
from collections.abc import Iterator, Mapping, Sequence
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


def differences(one: Any, other: Any, whose: str, name: str = "") -> list[str]:
    """Differences of two descriptions, such as `"attack.settings.eps is 0.1, this run's 0.2"`.

    What differs alike in several places is said once.

    Args:
        one: a description.
        other: another one.
        whose: the other's, such as `"this run's"`.
        name: of what is described.
    """
    places: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for place, said in _differences(one, other, whose, (name,) if name else ()):
        last = place[-1] if place and not place[-1].startswith("[") else ""
        places.setdefault((last, said), []).append(place)
    return [f"{_joined(alike)} {said}".strip() for (_, said), alike in places.items()]


def _differences(
    one: Any, other: Any, whose: str, place: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Each place where two descriptions differ, and what is to be said of it."""
    if one == other:
        return
    names = _name(one), _name(other)
    if names[0] == names[1] or None in names:
        if isinstance(one, dict) and isinstance(other, dict):
            for entry in sorted({*one, *other}):
                inner = (*place, str(entry))
                yield from _differences(one.get(entry), other.get(entry), whose, inner)
            return
        both_lists = isinstance(one, list) and isinstance(other, list) and len(one) == len(other)
        if both_lists and max(len(_text(one)), len(_text(other))) > _LONGEST:
            for index, pair in enumerate(zip(one, other, strict=True)):
                yield from _differences(*pair, whose, (*place, f"[{index}]"))
            return
    if _hashed(one) and _hashed(one) == _hashed(other):
        what = "other numbers" if "[" in _hashed(one) else "other code or settings"
        yield place, f"has {what} than {whose} ({_hashed(one)})"
        return
    texts = _cut(_text(one), _text(other))
    if None not in names:
        shown = [_INNER.sub("", text) for text in (_text(one), _text(other))]
        texts = texts if shown[0] == shown[1] else _cut(*shown)
    yield place, f"is {texts[0]}, {whose} {texts[1]}"


# Parts of a place that say nothing to who wrote the code.
_SILENT = frozenset({"function", "class", "holds", "refers"})


def _joined(places: Sequence[tuple[str, ...]]) -> str:
    """Places of one last part: as one with all that differ in brackets, or the first of them."""
    places = list(
        dict.fromkeys(
            tuple(part for part in place[:-1] if part not in _SILENT) + place[-1:]
            for place in places
        )
    )
    first, more = places[0], f" (and alike in {len(places) - 1} more)" if places[1:] else ""
    if all(len(place) == len(first) for place in places):
        parts = [tuple(dict.fromkeys(column)) for column in zip(*places, strict=True)]
        if math.prod(map(len, parts)) == len(places):
            first = tuple(f"({', '.join(each)})" if each[1:] else each[0] for each in parts)
            more = ""
    return ".".join(first).replace(".[", "[") + more


def _name(value: Any) -> str | None:
    """Name of the function or the class that a description is of; None of anything else."""
    if isinstance(value, str):
        return _hashed(value)
    if isinstance(value, dict):
        for kind in ("function", "class"):
            inner = value.get(kind)
            if inner is not None:
                return _name(inner) or (inner if isinstance(inner, str) else None)
    return None


def _hashed(value: Any) -> str:
    """Name before the hash in the description of an array or a function; empty without one."""
    found = _HASHED.match(value) if isinstance(value, str) else None
    return found[1] if found else ""


_HASHED = re.compile(r"^(.+) [0-9a-f]{16}$")
_LONGEST = 80
# In the name of a function, what is private to its library or says that it is in another one.
_INNER = re.compile(r"(?<=\w)\.(?:_\w+|<locals>)(?=\.)")


def _text(value: Any) -> str:
    """A description as text, in one order; of a function or a class its name."""
    name = _name(value)
    if name:
        return repr(name)
    if isinstance(value, (dict, list)):
        return json.dumps(value, sort_keys=True)
    return repr(value)


def _cut(one: str, other: str) -> tuple[str, str]:
    """Two texts, long ones around the first difference."""
    pairs = enumerate(zip(one, other, strict=False))
    differ = next((index for index, (a, b) in pairs if a != b), min(len(one), len(other)))
    start = max(0, differ - 30) if max(len(one), len(other)) > _LONGEST else 0

    def cut(text: str) -> str:
        end = start + _LONGEST
        return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"

    return cut(one), cut(other)


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


def _function(function: Any) -> Any:
    """A function's name; of one from elsewhere also its code, and what it closes over by name."""
    library = _is_library(function)
    module = _MOVED.sub(r"\1", function.__module__ or "")
    name = f"{module}.{function.__qualname__}" if library else function.__qualname__
    if name.startswith("jdistill.") and "<" not in name and library:
        return name
    inside: list[Any] = [_code(function.__code__)]
    if function.__kwdefaults__:  # which take no value by position
        inside.append(sorted(function.__kwdefaults__))
    holds = {each: describe(value) for each, value in _defaults(function).items()}
    for variable, cell in zip(
        function.__code__.co_freevars, function.__closure__ or (), strict=True
    ):
        with contextlib.suppress(ValueError):  # a variable that has no value yet
            held = cell.cell_contents
            # Schedules of optax turn the numbers of steps that they close over into floats at
            # their first call, and are the same after it.
            holds[variable] = describe(float(held) if library and type(held) is int else held)
    defaults = enumerate(function.__defaults__ or ())
    said = {f"defaults[0][{index}]": describe(value) for index, value in defaults}
    said |= {f"defaults[1][{each!r}]": held for each, held in holds.items()} | holds
    refers: dict[str, Any] = {}  # beside those
    for variable, held in captured(function):
        if variable in said and describe(held) == said[variable]:
            continue
        free = (f"{variable} {n}" if n > 1 else variable for n in itertools.count(1))
        refers[next(each for each in free if each not in refers)] = describe(held)
    if not library:
        inside.append([describe(each) for each in _called(function)])
    short = f"{name} {fingerprint(inside)}"
    more = {"holds": holds, "refers": refers}
    found = {"function": short, **{kind: held for kind, held in more.items() if held}}
    return found if len(found) > 1 else short


def _defaults(function: Any) -> dict[str, Any]:
    """The defaults of a function's arguments."""
    code, values = function.__code__, function.__defaults__ or ()
    named = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return {**dict(zip(named, values, strict=True)), **(function.__kwdefaults__ or {})}


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
        "class": kind.__qualname__,
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
    """A value's `repr` without addresses in memory, and without the user's modules."""
    own = "" if _is_library(type(value)) else type(value).__module__
    text = re.sub(r" at 0x[0-9a-f]+", "", repr(value))
    return _DOTTED.sub(lambda found: _without_module(found[0], own), text)


# Not within a name, nor a number.
_DOTTED = re.compile(r"(?<![\w.])[A-Za-z_]\w*(?:\.\w+)+")


def _without_module(dotted: str, own: str) -> str:
    """A dotted name without its module, which is `own` or another one that is no library."""
    parts = dotted.split(".")
    for number in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:number])
        if module == own or (module in sys.modules and not f"{module}.".startswith(LIBRARIES)):
            return ".".join(parts[number:])
    return dotted
