"""Gradients of per-example losses with respect to the inputs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdistill.attacks._core.problem import Goal, Problem
from jdistill.typing import Array

# The norms in which `norms.ascend` steps along a gradient.
NORMS = ("linf", "l2", "l1")


def gain_gradient(
    problem: Problem, goal: Goal, loss: Callable[..., Array], inputs: Array
) -> tuple[Array, Array, Array]:
    """Gradient, logits, and gain at the inputs.

    The gradient is of the batch sum, so each row is that example's own, whatever the batch size.

    Args:
        problem: the attack's arguments.
        goal: which labels or targets the loss is of.
        loss: `(logits [B, K], labels [B]) -> [B]`.
        inputs: `[B, ...]`.

    Returns:
        Gradient `[B, ...]`, logits `[B, K]`, and gain `[B]`: what the attack maximizes.
    """

    def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
        logits = problem.logits_fn(x)
        gain = goal.gain(loss, logits)
        return jnp.sum(gain), (logits, gain)

    gradient, (logits, gain) = jax.grad(total, has_aux=True)(inputs)
    return gradient, logits, gain
