"""Transfer attack: inputs crafted on one network, judged on another."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdistill import _validate
from jdistill._jax import full_precision, jit
from jdistill.attacks._core import driver, handlers
from jdistill.attacks._core.engine import Passes, select
from jdistill.attacks._core.problem import AttackResult, Problem, prepare
from jdistill.attacks._core.traits import Settings, facts, traits
from jdistill.nets import callable_logits_fn
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn


def _crafter(settings: Settings) -> list[Callable[..., Any]]:
    """The attack that crafts; nothing where it is not bound."""
    return [settings["attack"]] if "attack" in settings else []


@facts(
    title="Transfer",
    norms=(),
    follows=None,
    minimum_norm=lambda settings: any(traits(part).minimum_norm for part in _crafter(settings)),
    of=_crafter,
)
def transfer(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    source: LogitsFn,
    attack: Callable[..., Any],
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
) -> AttackResult:
    """Adversarial inputs crafted on one network, judged on another.

    The attack runs on `source` and never sees `logits_fn`, so nothing about the judged network can
    mask it. Where a transferred attack beats one on the network itself, the latter was masked.
    An attack that stops just beyond the source's boundary transfers poorly. Give it a margin to
    pass, such as the `confidence` of `carlini_wagner_l2`: the larger it is, the more transfers.

    Args:
        logits_fn: the judged network, inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys, for the attack; None is enough where it needs none.
        inputs: `[B, ...]` float inside `bounds`.
        labels: `[B]` int, the true classes.
        source: the network attacked, of the same inputs and classes.
        attack: an attack with its settings bound, such as
            `functools.partial(jdistill.attacks.carlini_wagner_l2, confidence=20.0)`. Called as
            `attack(source, keys, inputs, labels, bounds=bounds, targets=targets)`, so these two
            are not bound.
        bounds: the box of valid inputs, for the attack too.
        targets: `[B]` int, classes to reach, for the attack too; None takes any class but the
            label.

    Returns:
        The result. `inputs` are the crafted ones, whether they transfer or not, and `distance` is
        theirs in the attack's norm: a failure is shown at the point that failed, and at the clean
        input with distance `inf` only where a minimum-norm attack found nothing on the source.
        `success` is the judged network's. An example that it gets wrong by itself is a success,
        unchanged, at distance 0; one that only the source gets wrong comes back unchanged, a
        failure at distance 0. `queries` are forward passes of the judged network: one for the
        clean input, and one for the crafted one where that is needed. `info`: `first_success` and
        `gradients` (0) of the judged network, see `jdistill.attacks`; `source_success [B]`, whether
        the attack succeeded on the source; `source_queries [B]` int32, what it cost there;
        `crafted_distance [B]`, that of the crafted point for all examples, those already wrong
        included.

    Raises:
        ValueError: something that cannot be called, `bounds` or `targets` bound to the attack;
            else as the attack.

    Example:
        >>> import functools
        >>> from jdistill import attacks
        >>> source = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.8, 0]])
        >>> judged = lambda x: source(x) + jnp.array([[0.1, 0.0]])  # a little farther away
        >>> x, y = jnp.array([[0.4, 0.4]]), jnp.array([0])
        >>> attack = functools.partial(attacks.fgsm, eps=0.3, norm="l2")
        >>> result = transfer(judged, None, x, y, source=source, attack=attack)
        >>> bool(result.info["source_success"][0]), bool(result.success[0])
        (True, False)

    References:
        Carlini & Wagner 2017, "Towards Evaluating the Robustness of Neural Networks", section
        VIII.D and figure 10 (transfer against confidence). Papernot, McDaniel & Goodfellow 2016,
        "Transferability in Machine Learning: from Phenomena to Black-Box Attacks using
        Adversarial Samples".
    """
    driver.check_bound("transfer", "the attack", attack)
    _validate.function(source=source)
    source = callable_logits_fn(source)
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds, open_box=True)
    crafted = attack(
        source,
        problem.keys,
        problem.inputs,
        problem.goal.labels,
        bounds=bounds,
        targets=problem.goal.targets,
    )
    if handlers.counts(Passes(2, 0)):
        return handlers.untried(problem)
    with full_precision():
        return _judge(problem, crafted)


@jit
def _judge(problem: Problem, crafted: AttackResult) -> AttackResult:
    clean_success = problem.goal.reached_clean(problem.logits_fn(problem.inputs))
    fooled = problem.goal.reached(problem.logits_fn(crafted.inputs))
    result = AttackResult(
        inputs=select(clean_success, problem.inputs, crafted.inputs),
        success=clean_success | fooled,
        distance=jnp.where(clean_success, 0.0, crafted.distance),
        queries=jnp.where(clean_success, 1, 2).astype(jnp.int32),
        info={
            # The crafted point is the one that the judged network was asked about.
            "first_success": jnp.where(clean_success, 0, jnp.where(fooled, 1, -1)).astype(
                jnp.int32
            ),
            "gradients": jnp.zeros(fooled.shape, jnp.int32),
            "source_success": crafted.success,
            "source_queries": crafted.queries,
            "crafted_distance": crafted.distance,
        },
    )
    return jax.lax.stop_gradient(result)
