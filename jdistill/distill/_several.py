"""Several networks as the one teacher of a loss."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from jdistill import _validate, nets
from jdistill.typing import LogitsFn


class Several(NamedTuple):
    """Outputs of several teachers for the same inputs, as `together` gives them to losses.

    Attributes:
        each: what each returns: logits `[B, K]`, or a pytree with them.

    Example:
        >>> import jax.numpy as jnp
        >>> outputs = Several((jnp.zeros((4, 10)), jnp.ones((4, 10))))
        >>> [logits.shape for logits in outputs.each]
        [(4, 10), (4, 10)]
    """

    each: tuple[Any, ...]


def together(teachers: Sequence[LogitsFn]) -> Any:
    """Several networks as one teacher, for the losses that take several.

    Args:
        teachers: each from inputs `[B, ...]` to logits `[B, K]`, or to a pytree with them; at least
            one.

    Returns:
        A pytree that maps inputs to `Several`; the networks' weights are its leaves.

    Raises:
        ValueError: no network, or what cannot be called.

    Example:
        >>> import jax.numpy as jnp
        >>> teacher = together([lambda x: x, lambda x: 2 * x])
        >>> [each.tolist() for each in teacher(jnp.ones((1, 2))).each]
        [[[1.0, 1.0]], [[2.0, 2.0]]]
    """
    _validate.sequence(teachers=teachers)
    if not teachers:
        raise ValueError("expected at least one of teachers, got none; pass trained networks")
    for teacher in teachers:
        _validate.function(teachers=teacher)
    return jax.tree_util.Partial(_outputs, tuple(map(nets.callable_logits_fn, teachers)))


def _outputs(teachers: tuple[Any, ...], inputs: Any) -> Several:
    return Several(tuple(teacher(inputs) for teacher in teachers))


def one_teacher(outputs: Any, name: str) -> Any:
    """The outputs of the one teacher of a loss, after an error for several."""
    if isinstance(outputs, Several):
        raise ValueError(
            f"expected one teacher for {name}, got {len(outputs.each)}; name one of them as the "
            "generation's, or use distill.several_teachers_loss"
        )
    return outputs
