"""Iterated fast gradient attacks from the input itself: the basic one, and one with momentum."""

from collections.abc import Callable

from jdistill import losses
from jdistill.attacks._base import AttackResult
from jdistill.attacks._pgd import iterate
from jdistill.typing import Array, ArrayLike, LogitsFn


def bim(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    num_steps: int = 10,
    step_size: ArrayLike | None = None,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.cross_entropy,
    trace: bool = False,
) -> AttackResult:
    """Basic iterative method: FGSM in small steps, from the input itself.

        x ← project(x + step_size · sign(∂ loss / ∂x))        (linf; for l2 and l1 as in `pgd`)

    That is `pgd` without a random start. Each example stops at its first success.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        num_steps: gradient steps, at least 1; static. The paper takes as many as `eps` has
            255ths, and a quarter more (at most 4 more): 10 for `eps = 8 / 255`.
        step_size: length of a step in input units, at least 0; scalar or `[B]`; may be traced.
            None takes `1.25 · eps / num_steps`, which is the paper's 1 / 255 at its number of
            steps for `eps` up to 16 / 255.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        init: `[B, ...]`, the start instead of the inputs (projected into ball and box).
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized).
        trace: keep the loss of every step.

    Returns:
        The result. An example that resists is returned at its last iterate. `info`:
        `first_success [B]` int32, the step (0: the start) at which it succeeded, -1 if never;
        `restart [B]` int32, all 0; with `trace`, `loss [B, 1, num_steps]`, what was maximized at
        each iterate before its step, NaN where the example had stopped.

    Raises:
        ValueError: eps or step_size below 0 or NaN, inputs not finite or outside the box, labels
            or targets outside `0..K-1`, wrong ranks, an unknown norm, counts below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.3, 0]])
        >>> x, y = jnp.array([[0.3, 0.3]]), jnp.array([0])
        >>> result = bim(logits_fn, None, x, y, eps=0.25)
        >>> bool(result.success[0]), int(result.info["first_success"][0])
        (True, 8)

    References:
        Kurakin, Goodfellow & Bengio 2017, "Adversarial examples in the physical world",
        section 2.2; for l1 see `pgd`.
    """
    del key
    return iterate(
        logits_fn,
        None,
        inputs,
        labels,
        eps=eps,
        norm=norm,
        num_steps=num_steps,
        step_size=step_size,
        path=1.25,
        decay=None,
        num_restarts=1,
        random_start=False,
        bounds=bounds,
        targets=targets,
        init=init,
        loss=loss,
        trace=trace,
    )


def mim(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: str = "linf",
    num_steps: int = 10,
    step_size: ArrayLike | None = None,
    decay: ArrayLike = 1.0,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    init: ArrayLike | None = None,
    loss: Callable[..., Array] = losses.cross_entropy,
    trace: bool = False,
) -> AttackResult:
    """Momentum iterative method: FGSM in small steps along the accumulated gradient.

        v ← decay · v + g / ‖g‖₁,    g = ∂ loss / ∂x
        x ← project(x + step_size · sign(v))        (linf; v / ‖v‖₂ for l2; for l1 as in `pgd`)

    Each example stops at its first success. A gradient of exactly 0 adds nothing to `v`, where the
    formula has 0 / 0; a tiny one adds a full unit.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: unused (the attack is deterministic); None or any key.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; scalar or `[B]`; may be traced.
        norm: `"linf"`, `"l2"` or `"l1"`.
        num_steps: gradient steps, at least 1; static.
        step_size: length of a step in input units, at least 0; scalar or `[B]`; may be traced.
            None takes `eps / num_steps`, as the paper: the surface is reached by steps of one
            direction alone.
        decay: of the accumulated gradient, at least 0; scalar or `[B]`; may be traced. 0 is `bim`.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to move towards; None moves away from the labels.
        init: `[B, ...]`, the start instead of the inputs (projected into ball and box).
        loss: per-example loss `(logits [B, K], labels [B]) -> [B]`, maximized (for targets:
            minimized).
        trace: keep the loss of every step.

    Returns:
        The result. An example that resists is returned at its last iterate. `info`:
        `first_success [B]` int32, the step (0: the start) at which it succeeded, -1 if never;
        `restart [B]` int32, all 0; with `trace`, `loss [B, 1, num_steps]`, what was maximized at
        each iterate before its step, NaN where the example had stopped.

    Raises:
        ValueError: eps, step_size or decay below 0 or NaN, inputs not finite or outside the box,
            labels or targets outside `0..K-1`, wrong ranks, an unknown norm, counts below 1.

    Example:
        >>> import jax.numpy as jnp
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.3, 0]])
        >>> x, y = jnp.array([[0.3, 0.3]]), jnp.array([0])
        >>> result = mim(logits_fn, None, x, y, eps=0.26)
        >>> bool(result.success[0]), int(result.info["first_success"][0])
        (True, 9)

    References:
        Dong, Liao, Pang, Su, Zhu, Hu & Li 2018, "Boosting adversarial attacks with momentum",
        algorithm 1 and section 3.1.
    """
    del key
    return iterate(
        logits_fn,
        None,
        inputs,
        labels,
        eps=eps,
        norm=norm,
        num_steps=num_steps,
        step_size=step_size,
        path=1.0,
        decay=decay,
        num_restarts=1,
        random_start=False,
        bounds=bounds,
        targets=targets,
        init=init,
        loss=loss,
        trace=trace,
    )
