"""Gradients of per-example losses with respect to the inputs."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdistill import losses
from jdistill._jax import backend
from jdistill.attacks._core.problem import Goal, Problem
from jdistill.typing import Array, ArrayLike, Norm

# The norms in which `norms.ascend` steps along a gradient.
NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
# Near enough to the margin: above it by a hundredth of what the soft margin is, at most.
_LAST_SOFTNESS = 0.01


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


def hardening_gradient(
    problem: Problem, loss: Callable[..., Array] | None, inputs: Array, share: ArrayLike
) -> tuple[Array, Array, Array]:
    """`gain_gradient`, where no loss is given that of a soft margin that hardens into the margin.

    The gain is then the margin's own: the boundary is where that is 0.

    Args:
        problem: the attack's arguments.
        loss: as of `gain_gradient`, or None.
        inputs: `[B, ...]`.
        share: of the schedule that is left, from 1 to 0; scalar or `[B]`.
    """
    if loss is not None:
        return gain_gradient(problem, problem.goal, loss, inputs)
    softness = jnp.maximum(jnp.square(share), _LAST_SOFTNESS)
    loss = functools.partial(losses.soft_margin, softness=softness)
    gradient, logits, _ = gain_gradient(problem, problem.goal, loss, inputs)
    return gradient, logits, problem.goal.excess(logits)


def of_each(pull_back: Callable[[Array], tuple[Array]], cotangents: Array) -> Array:
    """Gradients of `C` functions of the logits per example, `[B, C, ...]`.

    Args:
        pull_back: of `jax.vjp(logits_fn, inputs)`.
        cotangents: `[B, C, K]`.
    """

    def one(cotangent: Array) -> Array:
        return pull_back(cotangent)[0]

    if backend() == "cpu":
        # One after the other: what a pass of C times the rows holds does not fit into the cache,
        # and it takes twice as long.
        return jnp.moveaxis(jax.lax.map(one, jnp.moveaxis(cotangents, 1, 0)), 0, 1)
    return jax.vmap(one, in_axes=1, out_axes=1)(cotangents)
