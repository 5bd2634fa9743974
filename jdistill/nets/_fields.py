"""What fields of convolutional networks have in common: checks, rounding, functions by value."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jdistill import _validate
from jdistill.typing import Array


class _Bound(functools.partial[Any]):
    """A `functools.partial` that compares by what it holds, as modules do by their fields."""

    def _parts(self) -> tuple[Any, ...]:
        return self.func, self.args, tuple(sorted(self.keywords.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bound) and self._parts() == other._parts()

    def __hash__(self) -> int:
        return hash(self._parts())


def by_value(fun: Any) -> Any:
    """A function for a module's field: partials of one function with equal arguments are equal."""
    if isinstance(fun, functools.partial) and not isinstance(fun, _Bound):
        return _Bound(fun.func, *fun.args, **fun.keywords)
    return fun


def check_fields(model: Any) -> None:
    """Checks the fields that all networks with normalization have, and keeps `norm` by value."""
    _validate.count(num_classes=model.num_classes)
    _validate.scalar(shift=model.shift)
    _validate.finite(shift=model.shift)
    _validate.function(conv_general_dilated=model.conv_general_dilated)
    _validate.function(norm=model.norm, remedy="pass nets.batch_norm or nets.group_norm")
    object.__setattr__(model, "norm", by_value(model.norm))


def check_rate(what: str, **named: Any) -> None:
    """The one value is a share in `[0, 1)`, `what` in words."""
    _validate.scalar(**named)
    ((name, rate),) = named.items()
    if not 0.0 <= rate < 1.0:
        raise ValueError(
            f"expected {name} in [0, 1), got {rate!r}; pass the share of {what}, 0 for none"
        )


def check_keys(keys: Array | None, name: str) -> Array:
    """The keys of what is dropped in training by the rate of a field."""
    if keys is None:
        raise ValueError(
            f"expected dropout_keys when train=True and {name} > 0, got None; pass one PRNG key "
            f"per example, jax.random.split(key, len(inputs)), or set {name}=0"
        )
    return keys


def scaled(size: int, width: float) -> int:
    """A number of channels multiplied by a width, rounded with halves up, at least 1."""
    # Not round(): Python rounds halves to even, and sizes should grow with the width.
    return max(1, math.floor(size * width + 0.5))


def check_width(width: Any) -> None:
    """The width of a network is a positive number."""
    _validate.scalar(width=width)
    _validate.positive(width=width, remedy="pass 1.0 for the paper's sizes, less for an assistant")


def drop_units(keys: Array, layer: int, values: Array, rate: float) -> Array:
    """Inverted dropout; row i of `values [B, ...]` is masked by `keys[i]` and `layer` alone."""

    def mask(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, layer), 1.0 - rate, values.shape[1:])

    return jnp.where(jax.vmap(mask)(keys), values / (1.0 - rate), 0.0)
