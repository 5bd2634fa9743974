"""Inner maximization of adversarial training."""

from collections.abc import Callable
from typing import Any

from jdistill.attacks._core import engine
from jdistill.attacks._core.handlers import Maximizer
from jdistill.attacks._core.traits import traits
from jdistill.typing import Array, ArrayLike, LogitsFn


def maximize(
    attack: Callable[..., Any],
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    **settings: Any,
) -> Array:
    """The points at which all steps of an attack end, for adversarial training.

    Every example takes all steps: none is frozen at its first success, none left out because it is
    wrong already, and nothing is judged or verified. So the passes are the steps' alone, and the
    loss may be any that the attack takes. It may also hold arrays `[B, ...]`, such as the clean
    logits, which elsewhere it must not::

        clean = jax.lax.stop_gradient(logits_fn(inputs))
        loss = jax.tree_util.Partial(lambda clean, logits, labels: kl(logits, clean), clean)
        adversarial = maximize(pgd, logits_fn, key, inputs, labels, loss=loss)     # TRADES

    Args:
        attack: a fixed-budget attack of `jdistill.attacks` with settings bound, such as
            `functools.partial(attacks.pgd, eps=8 / 255, num_steps=10)`.
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys; None is enough where nothing is random.
        inputs: `[B, ...]` float inside the bounds.
        labels: `[B]` int, the true classes.
        **settings: further settings of the attack.

    Returns:
        `[B, ...]`, without a gradient.

    Raises:
        ValueError: an attack that looks for the smallest distance, runs others, is a loop on the
            host, or is not of `jdistill.attacks`; else as the attack.

    Example:
        >>> import functools
        >>> import jax.numpy as jnp
        >>> from jdistill import attacks
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]])
        >>> bim = functools.partial(attacks.bim, eps=0.1, step_size=0.1)
        >>> x, y = jnp.array([[0.5, 0.5]]), jnp.array([1])  # wrong already
        >>> maximize(bim, logits_fn, None, x, y).round(3).tolist()
        [[0.6..., 0.6...]]

    References:
        Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks",
        equation 2.1. Zhang et al. 2019, "Theoretically Principled Trade-off between Robustness and
        Accuracy" (TRADES), algorithm 1.
    """
    found = traits(attack)
    if "attack" in found.settings or (found.host_loop and found.access is not None):
        raise ValueError(
            f"expected one compiled attack, got {found.title}, which is a loop on the host or runs "
            "others; pass an attack such as functools.partial(attacks.pgd, eps=8 / 255)"
        )
    maximizer = Maximizer()
    with engine.handled_by(maximizer):
        result = attack(logits_fn, key, inputs, labels, **settings)
    if not maximizer.asked:
        raise ValueError(
            f"expected an attack that runs one of jdistill.attacks, got {attack!r}; call it "
            "directly, and stop the gradient of its result's inputs"
        )
    points: Array = result.inputs
    return points
