"""Static cost of attacks: how many passes through the network an example can take."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jdistill import _validate
from jdistill.attacks._core.engine import Passes
from jdistill.attacks._core.handlers import Counter, rehearse
from jdistill.typing import Array


def cost(attack: Callable[..., Any], *, shape: tuple[int, ...], num_classes: int) -> Passes:
    """Most forward and backward passes that an attack can spend on one example.

    Nothing is run: the attack checks its arguments, and the number of its steps is counted. What
    an example did cost is in the result's `queries` and `info["gradients"]`.

    Args:
        attack: an attack with its settings bound, as concrete numbers.
        shape: of one input, without the batch.
        num_classes: K.

    Returns:
        `Passes(forward, backward)`, the clean input's and the verification's included; of a
        driver, those of all its attacks; of `transfer`, those through both networks.

    Raises:
        ValueError: an attack that runs none of `jdistill.attacks`.

    Example:
        >>> import functools
        >>> from jdistill import attacks
        >>> pgd = functools.partial(attacks.pgd, eps=0.1, num_steps=10)
        >>> cost(pgd, shape=(28, 28, 1), num_classes=10)
        Passes(forward=12, backward=10)
    """
    _validate.function(attack=attack, remedy="pass an attack with its settings bound")
    shape = _validate.shape(shape=shape)
    _validate.count(num_classes=num_classes, minimum=2)
    counter = Counter()

    def logits_fn(inputs: Array) -> Array:
        return jnp.zeros((inputs.shape[0], num_classes))

    rehearse(attack, counter, logits_fn, shape)
    if counter.total == (0, 0):
        raise ValueError(
            f"expected an attack that runs one of jdistill.attacks, got {attack!r}; count its "
            "passes by hand"
        )
    return counter.total
