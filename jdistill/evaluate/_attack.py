"""What an attack does to a stack of networks."""

import dataclasses
from typing import NamedTuple

import numpy as np

from jdistill import _validate, metrics
from jdistill.attacks import AttackResult
from jdistill.attacks._base import example_keys
from jdistill.evaluate._runs import Runs, first, refuse_tracers
from jdistill.typing import Array, ArrayLike, AttackFn, Callback, LogitsFn


class AttackPlan(NamedTuple):
    """An attack with its settings bound, and on how many examples to run it.

    Attributes:
        attack: `(logits_fn, key, inputs, labels) -> AttackResult`, such as
            `functools.partial(attacks.pgd, eps=0.1)`.
        num_examples: the first so many examples are attacked; None attacks all.
        batch_size: examples at a time.
    """

    attack: AttackFn
    num_examples: int | None = None
    batch_size: int = 250


class AttackOutcome(NamedTuple):
    """What an attack did to each network of a stack, over the first `M` examples.

    Attributes:
        success: `[R, M]` bool; examples misclassified to begin with count as successes.
        distance: `[R, M]`, in the attack's norm; `inf` where a minimum-norm attack failed.
        queries: `[R, M]` int32, forward passes.
        inputs: `[R, M, ...]`, what the attack returned.
        success_rate: `[R]` intervals over the examples.
        mean_distance: `[R]`, over the successes; for a minimum-norm attack this is the
            robustness ρ_adv. NaN without a success. Always read it beside the success rate.
        median_distance: `[R]`, over the successes; NaN without one.
        info: what else the attack says of each example, every array `[R, M, ...]`.
    """

    success: np.ndarray
    distance: np.ndarray
    queries: np.ndarray
    inputs: np.ndarray
    success_rate: list[metrics.Interval]
    mean_distance: np.ndarray
    median_distance: np.ndarray
    info: dict[str, np.ndarray]


def under_attack(
    stack: LogitsFn,
    inputs: np.ndarray,
    labels: np.ndarray,
    plan: AttackPlan,
    *,
    key: Array | None = None,
    targets: np.ndarray | None = None,
    temperature: ArrayLike = 1.0,
    vmapped: bool | None = None,
    callback: Callback | None = None,
    stage: str = "attack",
) -> AttackOutcome:
    """What one attack does to every network of a stack.

    Args:
        stack: a `logits_fn` pytree whose leaves lead with `R`.
        inputs: `[N, ...]` float, inside the attack's bounds.
        labels: `[N]` int in `0..K-1`.
        plan: the attack and its number of examples.
        key: for random attacks; example `n` uses `fold_in(key, n)`. Or `[N]` keys, one each.
        targets: `[N]` int, what the attack aims at, passed on to it; None does not.
        temperature: at which the networks are attacked, above 0; scalar or `[R]`.
        vmapped: whether to run the stack under `vmap`; None does so except on CPU.
        callback: see `evaluate`.
        stage: a name for the callback.

    Returns:
        The outcome, on the host.

    Raises:
        ValueError: as the attack.
    """
    refuse_tracers(stack, inputs, labels, key)
    runs = Runs.of(stack, temperature, vmapped, callback)
    _validate.count(batch_size=plan.batch_size)
    _validate.class_indices(labels, batch_size=len(inputs))
    size = first(len(inputs), "num_examples", plan.num_examples)
    if targets is not None:
        _validate.class_indices(targets, name="targets", batch_size=len(inputs))
        targets = targets[:size]
    # Keys travel with their examples, so batches do not change the draws.
    keys = None if key is None else example_keys(key, len(inputs))[:size]
    columns = (inputs[:size], labels[:size], keys, targets)
    result = runs.map(_Attacked(plan.attack), stage, plan.batch_size, *columns, eager=True)
    return summarize(result)


def summarize(result: AttackResult) -> AttackOutcome:
    """The success rates and distances of attack results stacked along `R`.

    Args:
        result: every leaf leads with `[R, M]`.

    Returns:
        The outcome, on the host.

    Example:
        >>> import jax.numpy as jnp
        >>> row = lambda *values: jnp.array([values])
        >>> result = AttackResult(jnp.zeros((1, 2, 3)), row(True, False), row(2.0, jnp.inf),
        ...                       row(5, 9), {})
        >>> outcome = summarize(result)
        >>> outcome.success_rate[0].value, float(outcome.mean_distance[0])
        (0.5, 2.0)
    """
    success, distance = np.asarray(result.success), np.asarray(result.distance)
    runs = [metrics.robustness(*row) for row in zip(distance, success, strict=True)]
    info = {name: np.asarray(values) for name, values in result.info.items()}
    return AttackOutcome(
        success=success,
        distance=distance,
        queries=np.asarray(result.queries),
        inputs=np.asarray(result.inputs),
        success_rate=[run.success_rate for run in runs],
        mean_distance=np.array([run.mean for run in runs]),
        median_distance=np.array([run.median for run in runs]),
        info=info,
    )


@dataclasses.dataclass(frozen=True)
class _Attacked:
    """The attack in the form `Runs.map` takes; equal attacks share a compilation."""

    attack: AttackFn

    def __call__(
        self,
        logits_fn: LogitsFn,
        inputs: Array,
        labels: Array,
        keys: Array | None,
        targets: Array | None,
    ) -> AttackResult:
        if targets is None:
            return self.attack(logits_fn, keys, inputs, labels)
        return self.attack(logits_fn, keys, inputs, labels, targets=targets)  # type: ignore[call-arg]
