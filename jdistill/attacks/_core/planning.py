"""Attacks as shapes: which programs they run, and the multiplications in these; nothing is run."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdistill._jax import full_precision, shapes, unbound
from jdistill.attacks._core import engine, handlers
from jdistill.attacks._core.engine import Method
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.attacks._core.rows import executed_and_once
from jdistill.attacks._core.traits import traits

Call = tuple[Method, Problem]  # as shapes


def program(method: Method, problem: Problem) -> AttackResult:
    """The result of a method, to be jitted: as `engine.run` does without its checks."""
    with full_precision():
        return engine.whole(method, problem)


def multiplications(method: Method, problem: Problem) -> tuple[int, int]:
    """Multiplications of the most events that an example may take, and with each body once."""
    total = 0
    begin, end = (functools.partial(each, trace=False) for each in (engine.start, engine.finish))
    with full_precision():
        carry = jax.eval_shape(begin, method, problem)
        total += executed_and_once(begin, method, problem)[0]
        if events := method.most_events():  # at most: an example that is done costs less
            total += events * executed_and_once(engine.event, method, problem, carry)[0]
        total += executed_and_once(end, method, problem, carry)[0]
        return total, executed_and_once(program, method, problem)[1]


class _Recorder:
    """Handler that keeps the methods of an attack as shapes, and runs them where it is asked to."""

    on_host = False

    def __init__(self, *, runs: bool) -> None:
        self.calls: list[Call] = []
        self._runs = runs

    def __call__(self, method: Method, problem: Problem, trace: bool, /) -> AttackResult:
        """The method's result, or the clean inputs."""
        del trace
        self.calls.append(shapes((method, problem)))
        # Not jitted: that would give the trace for the device at hand.
        return program(method, problem) if self._runs else handlers.untried(problem)


def on_stack(attack: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[[], list[Call]]]:
    """An attack that is no loop on the host, for a stack of networks.

    Args:
        attack: with its settings bound.

    Returns:
        `(stack, keys, inputs, labels) -> result`, to be jitted, and what its last trace has run.
    """
    recorder = _Recorder(runs=True)

    def call(stack: Any, keys: Any, inputs: Any, labels: Any) -> Any:
        recorder.calls.clear()
        with engine.handled_by(recorder):
            return jax.vmap(lambda network: attack(network, keys, inputs, labels))(stack)

    return call, lambda: recorder.calls


def of_host_loop(
    attack: Callable[..., Any], logits_fn: Any, batch_size: int, shape: Sequence[int]
) -> list[tuple[str, int, Call]]:
    """Methods that a loop on the host runs, such as AutoAttack's: name, how often, and what.

    It is called with weights of zero and methods that do nothing. What differs in numbers alone is
    one, as it is compiled once.

    Args:
        attack: with its settings bound.
        logits_fn: the network, as shapes.
        batch_size: examples; the attack's own setting is a limit.
        shape: of one.
    """
    recorder = _Recorder(runs=False)
    network = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), logits_fn)
    batch_size = min(batch_size, traits(attack).settings.get("batch_size") or batch_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what the zero network's logits are
        handlers.rehearse(attack, recorder, network, shape, batch_size)
    found: dict[Any, list[Call]] = {}
    for call in recorder.calls:
        method, _ = call
        name = type(method).__name__.strip("_")
        if (loss := getattr(method, "loss", None)) is not None:
            name += f" on {getattr(unbound(loss)[0], '__name__', 'a loss')}"
        own = (name, method.num_events, tuple(leaf.shape for leaf in jax.tree.leaves(call)))
        found.setdefault(own, []).append(call)
    return [(own[0], len(calls), calls[0]) for own, calls in found.items()]
