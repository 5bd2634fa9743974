"""Fast gradient (sign) method."""

from collections.abc import Callable
from typing import Any

from jdistill import _validate, losses, norms
from jdistill._jax import as_pytree, register, static_field
from jdistill.attacks._core.engine import Method, Passes, run
from jdistill.attacks._core.gradient import NORMS, gain_gradient
from jdistill.attacks._core.problem import AttackResult, Problem, prepare, radius
from jdistill.attacks._core.traits import by_loss, facts, with_loss
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn, Norm


@facts(
    title=with_loss("FGSM", losses.cross_entropy),
    norms=NORMS,
    follows=by_loss,
    handicap="one step",
)
def fgsm(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.cross_entropy,
    trace: bool = False,
) -> AttackResult:
    """Fast gradient (sign) method: one full step along the steepest direction of the loss.

    The result is::

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
        trace: as for every attack; there is no point between the input and the result.

    Returns:
        The result. An attacked example costs two queries and one gradient. `info`:
        `first_success`, `gradients`, and with `trace` nothing more: `trace [B, 0]`; see
        `jdistill.attacks`.

    Raises:
        ValueError: eps below 0 or NaN, inputs not finite or outside the box, labels or targets
            outside `0..K-1`, wrong ranks, an unknown norm.

    Example:
        >>> import jax.numpy as jnp
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
    _validate.one_of(NORMS, norm=norm)
    problem = prepare(
        logits_fn, None, inputs, labels, targets=targets, bounds=bounds, open_box=True
    )
    method = _FGSM(loss=as_pytree(loss), eps=radius(eps, problem.inputs), norm=norm)
    return run(method, problem, trace=trace)


@register
class _FGSM(Method):
    loss: Any
    eps: Array  # [B]
    norm: Norm = static_field()
    num_events = 0
    passes_at_start = Passes(1, 1)
    passes = Passes(0, 0)

    def init(self, problem: Problem) -> tuple[Array, Array]:
        inputs, bounds = problem.inputs, problem.bounds
        gradient, logits, _ = gain_gradient(problem, problem.goal, self.loss, inputs)
        moved = norms.ascend(inputs, gradient, self.eps, self.norm, bounds)
        return norms.into_ball_and_box(moved, inputs, self.eps, self.norm, bounds), logits

    def point(self, problem: Problem, state: Array) -> Array:
        return state
