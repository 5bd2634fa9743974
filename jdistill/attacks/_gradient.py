"""The gradient of a loss with respect to the inputs, and the attack of one step along it: FGSM."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdistill import _validate, losses, norms
from jdistill._precision import full_precision
from jdistill._pytree import as_pytree
from jdistill.attacks import _base
from jdistill.attacks._base import AttackResult, Goal, Problem
from jdistill.typing import Array, ArrayLike, LogitsFn

_NORMS = ("linf", "l2", "l1")


def fgsm(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.cross_entropy,
) -> AttackResult:
    """Fast gradient (sign) method: one full step along the steepest direction of the loss.

        x' = clip(x + eps · sign(∂ loss / ∂x))        (linf; the unit gradient for l2)

    For l1 the step is the best one within the box (`jdistill.norms.ascend`): the features of
    largest gradient move to their bounds, one after the other, until `eps` is used up.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized). Bind numbers with `jax.tree_util.Partial` and arrays, so that new ones
            compile nothing; a `functools.partial` is compiled for each object.

    Returns:
        The result; `info` is empty. Each attacked example costs two queries.

    Raises:
        ValueError: eps below 0 or NaN, inputs not finite or outside the box, labels or targets
            outside `0..K-1`, wrong ranks, an unknown norm.

    Example:
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]])
        >>> x, y = jnp.array([[0.3, 0.3]]), jnp.array([0])
        >>> result = fgsm(logits_fn, None, x, y, eps=0.2)
        >>> result.inputs.round(3).tolist(), bool(result.success[0])
        ([[0.1..., 0.1...]], False)

    References:
        Goodfellow, Shlens & Szegedy 2015, "Explaining and Harnessing Adversarial Examples",
        section 4.
    """
    del key
    _validate.one_of(_NORMS, norm=norm)
    problem = _base.prepare(logits_fn, None, inputs, labels, targets=targets, bounds=bounds)
    with full_precision():
        return _fgsm(problem, as_pytree(loss), _base.radius(eps, problem.inputs), norm=norm)


def _gain_gradient(
    problem: Problem, goal: Goal, loss: Callable[..., Array], inputs: Array
) -> tuple[Array, Array, Array]:
    """Gradient `[B, ...]`, logits `[B, K]` and gain `[B]` at the inputs.

    The gradient is of the batch sum, so each row is that example's own, whatever the batch size.
    """

    def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
        logits = problem.logits_fn(x)
        gain = goal.gain(loss, logits)
        return jnp.sum(gain), (logits, gain)

    gradient, (logits, gain) = jax.grad(total, has_aux=True)(inputs)
    return gradient, logits, gain


@functools.partial(jax.jit, static_argnames="norm")
def _fgsm(problem: Problem, loss: Callable[..., Array], eps: Array, *, norm: str) -> AttackResult:
    inputs = problem.inputs
    gradient, logits, _ = _gain_gradient(problem, problem.goal, loss, inputs)
    moved = norms.ascend(inputs, gradient, eps, norm, problem.bounds)
    return _base.finish(
        problem,
        norms.into_ball_and_box(moved, inputs, eps, norm, problem.bounds),
        clean_success=problem.goal.reached_clean(logits),
        found=jnp.ones(eps.shape, bool),
        queries=jnp.ones(eps.shape, jnp.int32),
        norm=norm,
        info={},
        minimum_norm=False,
    )
