"""All measures of a stack in one call."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jdistill.evaluate._attack import AttackOutcome, AttackPlan, under_attack
from jdistill.evaluate._clean import CleanMeasures, clean
from jdistill.typing import Array, ArrayLike, Callback, LogitsFn


class Evaluation(NamedTuple):
    """All measures of a stack: on clean inputs, and under each attack by name."""

    clean: CleanMeasures
    attacks: dict[str, AttackOutcome]


def evaluate(
    stack: LogitsFn,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    attacks: Mapping[str, AttackPlan],
    key: Array | None = None,
    temperature: ArrayLike = 1.0,
    num_sensitivity: int | None = None,
    batch_size: int = 250,
    vmapped: bool | None = None,
    callback: Callback | None = None,
) -> Evaluation:
    """Measure every network of a stack on the same examples: `clean`, then `under_attack`.

    Args:
        stack: a `logits_fn` pytree whose leaves lead with `R`; `nets.stack([f, g])` makes one.
        inputs: `[N, ...]` float, inside the attacks' bounds.
        labels: `[N]` int in `0..K-1`.
        attacks: by name.
        key: for random attacks; example `n` uses `fold_in(key, n)`, whatever the batch size.
        temperature: at which the networks are tested, above 0; scalar or `[R]`. 1 in every paper.
            The attacks, the softmax sensitivity and the zero gradients are those of the divided
            logits; `mean_abs_logit` and `sensitivity_logits` are of the logits as they are.
        num_sensitivity: see `clean`.
        batch_size: see `clean`; the attacks have their own.
        vmapped: whether to run the stack under `vmap`; None does so except on CPU.
        callback: called after every chunk with `event="evaluate"`, `stage` (`"accuracy"`,
            `"sensitivity"` or the attack's name), `done` and `total` (examples times networks).

    Returns:
        The measures, on the host.

    Raises:
        ValueError: inputs that are not finite, labels out of range, a temperature not above 0, a
            count that is no whole number above 0.

    Example:
        >>> import functools
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jdistill import attacks, nets
        >>> linear = lambda weights, x: x @ weights
        >>> stack = nets.stack(
        ...     [nets.callable_logits_fn(linear, w) for w in (jnp.eye(2), -jnp.eye(2))])
        >>> x, y = np.eye(2, dtype=np.float32), np.arange(2)
        >>> fgsm = AttackPlan(functools.partial(attacks.fgsm, eps=0.6))
        >>> result = evaluate(stack, x, y, attacks={"fgsm": fgsm})
        >>> [share.value for share in result.clean.accuracy]
        [1.0, 0.0]
        >>> [share.value for share in result.attacks["fgsm"].success_rate]
        [1.0, 1.0]

    References:
        Papernot et al. 2016, section V; Mandal & Gao 2023 (accuracy, sensitivity and robustness
        at each temperature).
    """
    measures = clean(
        stack,
        inputs,
        labels,
        temperature=temperature,
        num_sensitivity=num_sensitivity,
        batch_size=batch_size,
        vmapped=vmapped,
        callback=callback,
    )
    outcomes = {
        name: under_attack(
            stack,
            inputs,
            labels,
            plan,
            key=key,
            temperature=temperature,
            vmapped=vmapped,
            callback=callback,
            stage=name,
        )
        for name, plan in attacks.items()
    }
    return Evaluation(measures, outcomes)
