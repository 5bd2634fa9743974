"""Ensemble of attacks: the worst case per example, in a loop on the host."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate
from jdistill.attacks._core import driver
from jdistill.attacks._core.driver import EnsembleState
from jdistill.attacks._core.problem import AttackResult, prepare, refuse_tracers
from jdistill.attacks._core.traits import Settings, facts, traits
from jdistill.typing import Array, ArrayLike, Bounds, Callback, LogitsFn


def _members(settings: Settings) -> Sequence[Callable[..., Any]]:
    """The attacks of a list or a mapping; none where they are not bound."""
    attacks = settings.get("attacks", ())
    return list(attacks.values() if isinstance(attacks, Mapping) else attacks)


@facts(
    title="Ensemble",
    norms=(),
    follows=None,
    minimum_norm=lambda settings: settings["minimum_norm"],
    host_loop=True,
    of=_members,
)
def ensemble(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    attacks: Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]],
    minimum_norm: bool = False,
    batch_size: int = 250,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    devices: Sequence[jax.Device] | None = None,
    start: EnsembleState | None = None,
    callback: Callback | None = None,
) -> AttackResult:
    """Worst case per example over any number of attacks, each run on the survivors only.

    An example counts as broken as soon as one attack breaks it, and later attacks skip it. With
    `minimum_norm=True` every attack runs on every example and the smallest distance wins; of equal
    distances the earlier attack's.

    This is a driver: a loop on the host that gathers the survivors into batches, padded to 16, 24,
    32, 48, 64 and so on, so that few sizes are compiled. It cannot be called under `jit` or `vmap`.
    Each example keeps its own key, so the results do not depend on `batch_size` or on who else
    survives.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys; None is enough where no attack is random. Attack `a` draws
            from `fold_in(example's key, a)`.
        inputs: `[B, ...]` float inside `bounds`; any number of examples.
        labels: `[B]` int, the true classes.
        attacks: attacks with their settings bound, such as
            `functools.partial(jdistill.attacks.pgd, eps=0.1)`, cheap ones first; or a mapping
            from names to them (the names are for the callback). Called as
            `attack(logits_fn, keys, inputs, labels, bounds=bounds, targets=targets)`, so these
            two are not bound. Settings hold for all examples: none may be `[B]`.
        minimum_norm: whether the smallest distance wins. All attacks must then share a norm, and
            otherwise a budget: distances in two norms, or within two budgets, do not compare.
            A minimum-norm attack in a run of `minimum_norm=False` breaks an example at whatever
            distance it finds.
        batch_size: the most examples at a time, at least 1.
        bounds: the box of valid inputs, for all attacks.
        targets: `[B]` int, classes to reach, for all attacks; None moves away from the labels.
        devices: to spread each batch over; None leaves everything where it is. The flags do not
            depend on them.
        start: the state of an earlier run of the same attacks on the same examples, to go on from:
            what was done is not done again, and the result is that of a run without a stop.
        callback: called after every batch, and about once per second inside one, which is then
            run in chunks of steps, with `event="attack"`, `stage="ensemble"`, `attack` (the
            name, or the index),
            the numbers of examples `done` and in `total` of this attack, `survivors` so far, and
            `state`, an `EnsembleState`: its arrays change as the run goes on, so save them, or copy
            them. Inside a batch also `step` and `num_steps` (None where that is not fixed) of the
            loop that runs.

    Returns:
        The result. An example that no attack broke is what the last one returned. `queries` are
        those of all attacks run on the example. `info`: `broken_by [B]` int32, the index of the
        attack whose point it is, -1 where no attack was needed or none succeeded; `gradients [B]`
        int32, backward passes of all attacks.

    Raises:
        ValueError: no attacks, something that cannot be called, bound settings as above, a tracer
            among the arguments, batch_size below 1, a start of other examples; else as the attacks.

    Example:
        >>> import functools
        >>> from jdistill import attacks
        >>> logits_fn = lambda x: x @ jnp.array([[1.0, -1.0], [1.0, -1.0]]) - jnp.array([[0.6, 0]])
        >>> x, y = jnp.array([[0.2, 0.2], [0.3, 0.3], [0.9, 0.9]]), jnp.array([0, 0, 0])
        >>> weak, strong = (functools.partial(attacks.fgsm, eps=eps) for eps in (0.1, 0.2))
        >>> result = ensemble(logits_fn, None, x, y, attacks=[weak, strong])
        >>> result.info["broken_by"].tolist(), result.success.tolist(), result.queries.tolist()
        ([0, 1, -1], [True, True, False], [2, 4, 4])

    References:
        Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks", section 5 (the worst case over attacks).
    """
    refuse_tracers("ensemble", logits_fn, key, inputs, labels, targets, attacks)
    _validate.count(batch_size=batch_size)
    _validate.flag(minimum_norm=minimum_norm)
    named = _named(attacks, math.prod(np.shape(inputs)[:1]))
    if minimum_norm:
        _check_norms(named)
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds, open_box=True)
    state = driver.run(
        named,
        problem,
        minimum_norm=minimum_norm,
        batch_size=batch_size,
        bounds=bounds,
        devices=devices,
        start=start,
        callback=callback,
        stage="ensemble",
    )
    info = {"broken_by": jnp.asarray(state.broken_by)}
    return driver.result(state, minimum_norm=minimum_norm, info=info)


def _named(attacks: Any, num_examples: int) -> dict[Any, Callable[..., Any]]:
    """The attacks by name or index, checked."""
    if isinstance(attacks, Mapping):
        named = dict(attacks)
    elif isinstance(attacks, Sequence):
        named = dict(enumerate(attacks))
    else:
        named = {}
    if not named:
        raise ValueError(
            f"expected one attack or more, got {attacks!r}; pass a list or a mapping of attacks "
            "with their settings bound: [functools.partial(jdistill.attacks.pgd, eps=0.1)]"
        )
    for name, attack in named.items():
        driver.check_bound("ensemble", f"attacks[{name!r}]", attack, num_examples=num_examples)
    return named


def _check_norms(named: Mapping[Any, Callable[..., Any]]) -> None:
    """Smallest distances are compared, so they must be of one norm."""
    norms = {name: traits(attack).norm for name, attack in named.items()}
    known = {norm for norm in norms.values() if norm is not None}
    if len(known) > 1:
        raise ValueError(
            f"expected attacks of one norm with minimum_norm=True, got {norms}; run an ensemble "
            "for each norm"
        )
