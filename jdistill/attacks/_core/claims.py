"""Results of attacks from elsewhere, whose claims are checked before they are counted."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jdistill import _validate
from jdistill._jax import call, full_precision
from jdistill.attacks._core.problem import AttackResult, Goal
from jdistill.attacks._core.traits import has_facts
from jdistill.nets import callable_logits_fn
from jdistill.typing import Array, Bounds, LogitsFn


def verified(
    result: Any,
    attack: Callable[..., Any],
    logits_fn: LogitsFn,
    labels: Array,
    targets: Array | None,
    bounds: Bounds | None = None,
) -> AttackResult:
    """Result of an attack whose successes a forward pass confirms; those of the library had theirs.

    Args:
        result: of `attack`.
        attack: the attack, with settings bound.
        logits_fn: the network that it attacked.
        labels: `[B]` int.
        targets: `[B]` int, or None.
        bounds: the box, where it is known.

    Raises:
        ValueError: not an `AttackResult` of `B` rows, or inputs that are not finite and inside the
            box.
    """
    if has_facts(attack):
        return result
    shapes = [jnp.shape(leaf) for leaf in result[:4]] if isinstance(result, AttackResult) else []
    if not shapes or any(shape[:1] != labels.shape for shape in shapes):
        raise ValueError(
            f"expected an AttackResult whose arrays lead with [B] = {labels.shape}, got "
            f"{f'arrays of shapes {shapes}' if shapes else type(result).__name__} from {attack!r}; "
            "return jdistill.AttackResult(inputs, success, distance, queries, info)"
        )
    inputs = jnp.asarray(result.inputs)
    _validate.inputs_in_box(inputs, bounds or (-jnp.inf, jnp.inf), name="the attack's inputs")
    goal = Goal(jnp.asarray(labels), None if targets is None else jnp.asarray(targets))
    with full_precision():
        logits = call(callable_logits_fn(logits_fn), inputs)
    distance = jnp.asarray(result.distance)
    reached = goal.reached(logits) | ((distance == 0) & goal.reached_clean(logits))
    return AttackResult(
        inputs=inputs,
        success=jnp.asarray(result.success, bool) & reached,
        distance=distance,
        queries=jnp.asarray(result.queries).astype(jnp.int32),
        info=result.info,
    )
