"""Handlers of methods: the maximizing form of adversarial training, and counting alone."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdistill._jax import jit
from jdistill.attacks._core import engine
from jdistill.attacks._core.engine import Handler, Method, Passes
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.attacks._core.traits import traits
from jdistill.typing import Array


@jit
def maximized(method: Method, problem: Problem) -> Array:
    """The points `[B, ...]` after all steps of all examples, with nothing judged."""
    state, _ = method.init(problem)

    def one(event: Array, state: Any) -> Any:
        return method.step(problem, state, jnp.full(problem.inputs.shape[:1], event))[0]

    if method.num_events:  # otherwise `init` is all, and there may be no step
        state = jax.lax.fori_loop(0, method.num_events, one, state)
    return jax.lax.stop_gradient(method.point(problem, state))


class Maximizer:
    """Handler that runs the maximizing form, whose result has points and nothing else."""

    on_host = False

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, method: Method, problem: Problem, trace: bool, /) -> AttackResult:
        """The points after all steps."""
        del trace
        self.asked = True
        if method.minimum_norm or method.num_events is None:
            raise ValueError(
                "expected a fixed-budget attack, got one that looks for the smallest distance; "
                "pass an attack with eps, such as functools.partial(attacks.pgd, eps=8 / 255)"
            )
        return untried(problem)._replace(inputs=maximized(method, problem))


class Counter:
    """Handler that adds up what an example can cost, and runs nothing."""

    on_host = False

    def __init__(self) -> None:
        self.total = Passes(0, 0)

    def add(self, passes: Passes) -> None:
        """Count these, too."""
        self.total = Passes(*(a + b for a, b in zip(self.total, passes, strict=True)))

    def __call__(self, method: Method, problem: Problem, trace: bool, /) -> AttackResult:
        """Count a method to its end, its verification included."""
        del trace
        events = method.most_events()
        begun, each = method.passes_at_start, method.passes
        forward = begun.forward + each.forward * events + 1
        self.add(Passes(forward, begun.backward + each.backward * events))
        return untried(problem)


def counts(passes: Passes) -> bool:
    """Count passes, if a `Counter` asks; returns whether it does."""
    handler = engine.current_handler()
    if isinstance(handler, Counter):
        handler.add(passes)
    return isinstance(handler, Counter)


def untried(problem: Problem) -> AttackResult:
    """The clean inputs as failures at no cost."""
    nothing = jnp.zeros(problem.inputs.shape[:1], jnp.int32)
    distance = nothing.astype(problem.inputs.dtype)
    return AttackResult(problem.inputs, nothing.astype(bool), distance, nothing, {})


def rehearse(
    attack: Callable[..., Any],
    handler: Handler,
    logits_fn: Any,
    shape: Sequence[int],
    batch_size: int = 1,
) -> None:
    """Call an attack on inputs `[batch_size, *shape]` that mean nothing, for the handler alone."""
    low, high = traits(attack).settings.get("bounds", (0.0, 1.0))
    inputs = jnp.clip(jnp.zeros((batch_size, *shape), jnp.float32), low, high)
    with engine.handled_by(handler):
        attack(logits_fn, jax.random.key(0), inputs, jnp.zeros(batch_size, jnp.int32))
