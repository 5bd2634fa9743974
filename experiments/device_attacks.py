"""Attacks that `experiments.device` runs: all of `jdistill.attacks`, on small trained networks.

In every norm that an attack is made for, with few steps, at a precision of products.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import subjects
from jdistill import attacks, losses, nets, train
from jdistill.typing import Array, LogitsFn, Norm, PyTree

FILES = pathlib.Path(__file__).parents[1] / "tests" / "parity"
# Both have the same shapes, so that each attack is compiled once for the two of them.
NETWORKS = ("plain_small", "distilled_small")

# Radii at which some examples are fooled and some are not.
_EPS: dict[Norm, float] = {"linf": 0.1, "l2": 1.5, "l1": 15.0}
# Settings for whichever attack has an argument of the name, so that the check is short: counts
# bound what the default would be, and a coarse search needs fewer of them.
_COUNTS = {
    "num_steps": 20,
    "num_queries": 300,
    "num_searches": 3,
    "num_samples": 20,
    "num_starts": 20,
    "num_targets": 3,
    "num_epochs": 2,
    "num_angles": 7,
    "num_shifts": 3,
}
_COARSE = {"initial_const": 0.1, "const_factor": 10.0, "largest_const": 100.0}

# Where an image lies as near to the boundary as that, two devices may judge it differently.
TIE = 1e-5
PRECISIONS = ("highest", "TF32", "bf16")


class Case(NamedTuple):
    """An attack to check.

    Attributes:
        name: of the attack, and the norm where it has a choice.
        attack: the attack with its settings.
        settings: the same as text, so that a reference made with other ones is noticed.
    """

    name: str
    attack: Callable[..., attacks.AttackResult]
    settings: str


class Outcome(NamedTuple):
    """Outcome of an attack on one network; arrays `[N]`.

    Attributes:
        success: bool.
        ties: bool, whether the returned input is so near to a boundary that rounding decides.
        distance: float.
    """

    success: np.ndarray
    ties: np.ndarray
    distance: np.ndarray


class Work(NamedTuple):
    """The networks and images to attack.

    Attributes:
        networks: by name.
        inputs: `[N, H, W, C]`.
        labels: `[N]`.
    """

    networks: Mapping[str, tuple[nets.ConvNet, PyTree]]
    inputs: Array
    labels: Array


# -------------------------------------------------------------------------------------------------
# Cases


def cases(names: Sequence[str] = ()) -> list[Case]:
    """Every attack in every norm that it is made for, with few steps.

    Args:
        names: of the attacks; empty: all that return an `AttackResult`.

    Raises:
        ValueError: a name that is not an attack's.
    """
    there = {
        name: function
        for name, function in vars(attacks).items()
        if name in attacks.__all__
        and inspect.isfunction(function)
        and inspect.signature(function).return_annotation is attacks.AttackResult
    }
    for name in names:
        if name not in there:
            raise ValueError(f"expected attacks among {', '.join(there)}, got {name!r}")
    return [case for name in names or there for case in _cases_of(there[name])]


def _cases_of(attack: Callable[..., attacks.AttackResult]) -> list[Case]:
    traits = attacks.traits(attack)
    parameters = inspect.signature(attack).parameters
    chosen: list[Norm | None] = [*traits.norms] if "norm" in parameters else [None]
    found = []
    for norm in chosen:
        settings: dict[str, Any] = {} if norm is None else {"norm": norm}
        if "eps" in parameters and parameters["eps"].default is inspect.Parameter.empty:
            settings["eps"] = _EPS[norm or traits.norm or "linf"]
        for name, value in _COUNTS.items():
            default = parameters[name].default if name in parameters else None
            if default is not None and default > value:
                settings[name] = value
        settings |= {name: value for name, value in _COARSE.items() if name in parameters}
        for name, value in _required().items():
            if name in parameters:
                settings[name] = value
        found.append(
            Case(
                traits.name if norm is None else f"{traits.name} {norm}",
                functools.partial(attack, **settings),
                ", ".join(f"{name}={_text(value)}" for name, value in sorted(settings.items())),
            )
        )
    return found


@functools.cache
def _required() -> dict[str, Any]:
    """Settings of attacks that are made of others."""
    pgd = functools.partial(attacks.pgd, eps=_EPS["linf"], num_steps=_COUNTS["num_steps"])
    deepfool = functools.partial(attacks.deepfool, norm="linf", num_steps=_COUNTS["num_steps"])
    model, variables = network(NETWORKS[0])
    return {
        "attack": pgd,
        "attacks": (pgd, deepfool),
        "minimum_norm": True,
        "source": nets.logits_fn(model, variables),
    }


def _text(value: Any) -> str:
    if isinstance(value, functools.partial):
        settings = {key: _text(one) for key, one in sorted(value.keywords.items())}
        return f"{attacks.traits(value).name}{settings}"
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    return getattr(value, "__name__", type(value).__name__) if callable(value) else repr(value)


# -------------------------------------------------------------------------------------------------
# Networks


def network(name: str) -> tuple[nets.ConvNet, PyTree]:
    """A trained network of `tests/parity` and its variables."""
    params = subjects.read_params(FILES / f"{name}.npz")
    model = subjects.conv_net(params, (28, 28, 1))
    return model, {"params": jax.tree.map(jnp.asarray, params)}


def work(num_images: int) -> Work:
    """The networks, and the first images of `tests/parity`, also those classified wrongly."""
    inputs, labels = subjects.read_images(FILES / "images.npz")
    return Work(
        {name: network(name) for name in NETWORKS},
        jnp.asarray(inputs[:num_images]),
        jnp.asarray(labels[:num_images]),
    )


def logits_of(there: Work, name: str, precision: str, batch_size: int) -> np.ndarray:
    """The logits of the images in batches of that size, as the attacks compute them, `[N, K]`."""
    model, variables = there.networks[name]
    with _multiplying(precision):
        logits_fn = _logits_fn(model, variables, precision)
        return train.predict(logits_fn, np.asarray(there.inputs), batch_size=batch_size)


def _logits_fn(model: nets.ConvNet, variables: PyTree, precision: str) -> LogitsFn:
    """The network whose products have that precision under `_multiplying`."""
    bits = {"TF32": 10, "bf16": 7}.get(precision)
    if precision == "TF32" and jax.default_backend() == "gpu":
        bits = None  # the device rounds by itself
    if bits is None:
        return nets.logits_fn(model, variables)
    return nets.callable_logits_fn(_Rounded(model, bits), variables)


def _multiplying(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Matrix products at a precision; at the highest, nothing is set, as for any user."""
    if precision == "highest":
        return contextlib.nullcontext()
    # JAX's "bfloat16" is TF32 on a GPU, so bf16 is what `_Rounded` makes of exact products.
    return jax.default_matmul_precision("tensorfloat32" if precision == "TF32" else "highest")


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """Logits with the operands of all products rounded, and the products summed in float32.

    Attributes:
        model: the network.
        bits: of the mantissas that are left: 7 for bf16, 10 for TF32.
    """

    model: nets.ConvNet
    bits: int

    def __call__(self, variables: PyTree, inputs: Array) -> Array:
        def round_inputs(call: Any, arguments: Any, options: Any, context: Any) -> Any:
            if isinstance(context.module, nn.Conv | nn.Dense):
                arguments = (self._rounded(arguments[0]), *arguments[1:])
            return call(*arguments, **options)

        kernels = jax.tree.map(
            lambda leaf: self._rounded(leaf) if leaf.ndim > 1 else leaf, variables
        )
        with nn.intercept_methods(round_inputs):
            logits: Any = self.model.apply(kernels, inputs)
        return logits

    def _rounded(self, values: Array) -> Array:
        return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=self.bits)


# -------------------------------------------------------------------------------------------------
# Attacks


def attack_all(
    chosen: Sequence[Case],
    there: Work,
    *,
    precision: str = "highest",
    deadline: float = float("inf"),
) -> Iterator[tuple[Case, dict[str, Outcome] | BaseException | None]]:
    """Run the cases side by side, since nearly all of the time goes into compiling.

    Args:
        chosen: the cases.
        there: the networks and images.
        precision: one of `PRECISIONS`.
        deadline: of `time.monotonic`; what is not done by then is left.

    Yields:
        Each case as it is done: its outcomes by network, or the error, or None where no time was
        left for it.
    """
    threads = concurrent.futures.ThreadPoolExecutor(_cores())
    timeout = None if deadline == float("inf") else max(deadline - time.monotonic(), 0.0)
    try:
        futures = {
            threads.submit(_attack, case, there, precision, deadline): case for case in chosen
        }
        left = dict.fromkeys(futures)
        try:
            for future in concurrent.futures.as_completed(futures, timeout):
                del left[future]
                yield futures[future], future.exception() or future.result()
        except TimeoutError:
            # What runs comes to its end, or it would disturb what is timed next.
            threads.shutdown(cancel_futures=True)
        for future in left:
            found = None if future.cancelled() else future.exception() or future.result()
            yield futures[future], found
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _attack(case: Case, there: Work, precision: str, deadline: float) -> dict[str, Outcome] | None:
    if time.monotonic() > deadline:
        return None
    found = {}
    for name, (model, variables) in there.networks.items():
        with _multiplying(precision):
            result = case.attack(
                _logits_fn(model, variables, precision),
                jax.random.key(0),
                there.inputs,
                there.labels,
            )
        with jax.default_matmul_precision("highest"):
            logits = nets.logits_fn(model, variables)(result.inputs)
        margins = np.abs(np.asarray(losses.margin(logits, there.labels)))
        ties = margins <= TIE * np.abs(np.asarray(logits)).max(-1)
        found[name] = Outcome(np.asarray(result.success), ties, np.asarray(result.distance))
    return found


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
