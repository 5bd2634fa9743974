"""What an attack with bound settings says of itself: its settings, its norm, its radius."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jdistill import _validate, attacks

# The attacks without an argument `norm`, and what their distances are in.
_ONE_NORM: dict[Callable[..., Any], str] = {
    attacks.boundary: "l2",
    attacks.carlini_wagner_l0: "l0",
    attacks.carlini_wagner_l2: "l2",
    attacks.carlini_wagner_linf: "linf",
    attacks.ddn: "l2",
    attacks.ead: "l1",
    attacks.jsma: "l0",
}


class Budget(NamedTuple):
    """What an attack may do: move an input by at most `eps` in a norm."""

    norm: str
    eps: float


def bound_settings(attack: Any) -> dict[str, Any]:
    """The attack's settings by name: what is bound, and the defaults of what is not."""
    bound: dict[str, Any] = {}
    while isinstance(attack, functools.partial):
        attack, bound = attack.func, {**attack.keywords, **bound}
    try:
        parameters = inspect.signature(attack).parameters.values()
    except (TypeError, ValueError):  # a callable that does not tell
        return bound
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {**defaults, **bound}


def function_of(attack: Callable[..., Any]) -> Callable[..., Any]:
    """The attack without its settings."""
    while isinstance(attack, functools.partial):
        attack = attack.func
    return attack


def norm_of(attack: Callable[..., Any]) -> str | None:
    """The norm of the attack's distances; None where it does not tell."""
    function, settings = function_of(attack), bound_settings(attack)
    if function is attacks.transfer:
        return norm_of(settings["attack"]) if "attack" in settings else None
    norm = settings.get("norm", _ONE_NORM.get(function))
    return norm if isinstance(norm, str) else None


def eps_of(attack: Callable[..., Any]) -> float | None:
    """The attack's radius; None for a minimum-norm attack, and for a radius of each example."""
    function, settings = function_of(attack), bound_settings(attack)
    if function is attacks.transfer:
        return eps_of(settings["attack"]) if "attack" in settings else None
    eps = settings.get("eps")
    if eps is None or _validate.is_traced(eps) or np.ndim(eps):
        return None
    # A radius that came as float32 is meant as the short number that it rounds.
    return float(str(np.asarray(eps)[()]))
