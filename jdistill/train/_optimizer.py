"""The optimizer of the released recipe."""

import functools

import optax

from jdistill import _validate


def sgd(
    learning_rate: float = 0.01, *, decay: float = 1e-6, momentum: float = 0.9
) -> optax.GradientTransformation:
    """Nesterov momentum SGD as Keras does it, the optimizer of the released recipe.

    Each step is::

        lr_t = lr / (1 + decay · t)
        v ← momentum · v - lr_t · g
        w ← w + momentum · v - lr_t · g

    Args:
        learning_rate: above 0; like `decay` a number in the optimizer's state, so that
            `create_state` can set it without a compilation, and a sweep for each run.
        decay: per update, at least 0.
        momentum: in `[0, 1)`.

    Returns:
        The optimizer, with the injected hyperparameters `learning_rate` and `decay`.

    Raises:
        ValueError: numbers out of range.

    Example:
        >>> import jax.numpy as jnp
        >>> optimizer = sgd(0.1)
        >>> state = optimizer.init(jnp.zeros(()))
        >>> update, state = optimizer.update(jnp.ones(()), state)
        >>> round(float(update), 4)  # -0.1 (1 + 0.9)
        -0.19

    References:
        Mandal & Gao 2023, released code `train_models.py`: lr 0.01, decay 1e-6, momentum 0.9.
    """
    _validate.scalar(learning_rate=learning_rate, decay=decay, momentum=momentum)
    _validate.positive(learning_rate=learning_rate)
    _validate.non_negative(decay=decay)
    _validate.within(0.0, 1.0, momentum=momentum)
    if momentum == 1:
        raise ValueError(f"expected momentum in [0, 1), got {momentum!r}; pass 0.9")
    return _sgd(learning_rate, decay, momentum)


@functools.lru_cache(maxsize=64)  # equal settings give the same optimizer, hence equal steps
def _sgd(learning_rate: float, decay: float, momentum: float) -> optax.GradientTransformation:
    def with_numbers(learning_rate: float, decay: float) -> optax.GradientTransformation:
        return optax.chain(
            # Before the momentum and not after it: Keras's velocity remembers each step's rate.
            optax.scale_by_schedule(lambda count: -learning_rate / (1 + decay * count)),
            optax.trace(decay=momentum, nesterov=True),
        )

    return optax.inject_hyperparams(with_numbers)(learning_rate=learning_rate, decay=decay)
