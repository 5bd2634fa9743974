"""The worst case over several attacks, per example: a host loop."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate
from jdistill.attacks import _base
from jdistill.attacks._base import AttackResult
from jdistill.typing import Array, ArrayLike, Callback, LogitsFn


def ensemble(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    attacks: Sequence[Callable[..., Any]] | Mapping[str, Callable[..., Any]],
    minimum_norm: bool = False,
    batch_size: int = 250,
    bounds: tuple[float, float] = (0.0, 1.0),
    targets: ArrayLike | None = None,
    callback: Callback | None = None,
) -> AttackResult:
    """Worst case per example over any number of attacks, each run on the survivors only.

    An example counts as broken as soon as one attack breaks it, and later attacks skip it. With
    `minimum_norm=True` every attack runs on every example and the smallest distance wins; of equal
    distances the earlier attack's.

    This is a driver: a loop on the host that gathers the survivors into batches, padded to the
    next power of two so that few sizes are compiled. It cannot be called under `jit` or `vmap`.
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
        callback: called after every batch with `event="attack"`, `stage="ensemble"`, `attack` (the
            name, or the index), and the numbers of examples `done` and in `total` of this attack,
            and `survivors` so far.

    Returns:
        The result. An example that no attack broke is what the last one returned. `queries` are
        those of all attacks run on the example. `info`: `broken_by [B]` int32, the index of the
        attack whose point it is, -1 where none was needed or none succeeded.

    Raises:
        ValueError: no attacks, something that cannot be called, bound settings as above, a tracer
            among the arguments, batch_size below 1; else as the attacks.

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
    _base.refuse_tracers("ensemble", logits_fn, key, inputs, labels, targets, attacks)
    _validate.count(batch_size=batch_size)
    named = _named(attacks)
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds)
    columns = (problem.inputs, problem.goal.labels, problem.goal.targets)
    best = _Best.nothing(np.asarray(problem.inputs))
    for index, (name, attack) in enumerate(named.items()):
        keys = problem.keys
        if keys is not None:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        # At distance 0 the clean input is a success, which nothing can better.
        active = np.flatnonzero(best.distance > 0 if minimum_norm else ~best.success)
        for start in range(0, len(active), batch_size):
            rows = active[start : start + batch_size]
            result = _run(attack, problem.logits_fn, keys, columns, rows, batch_size, bounds)
            best.update(rows, result, index, minimum_norm)
            if callback is not None:
                callback(
                    {
                        "event": "attack",
                        "stage": "ensemble",
                        "attack": name,
                        "done": start + len(rows),
                        "total": len(active),
                        "survivors": int(np.sum(~best.success)),
                    }
                )
    if minimum_norm:
        best.distance[~best.success] = np.inf
    return AttackResult(
        inputs=jnp.asarray(best.inputs),
        success=jnp.asarray(best.success),
        distance=jnp.asarray(best.distance),
        queries=jnp.asarray(best.queries),
        info={"broken_by": jnp.asarray(best.broken_by)},
    )


class _Best(NamedTuple):
    """What each example is left with so far: arrays on the host, written in place."""

    inputs: np.ndarray
    success: np.ndarray
    distance: np.ndarray
    queries: np.ndarray
    broken_by: np.ndarray

    @classmethod
    def nothing(cls, inputs: np.ndarray) -> "_Best":
        size = len(inputs)
        return cls(
            inputs=inputs.copy(),
            success=np.zeros(size, bool),
            distance=np.full(size, np.inf, inputs.dtype),
            queries=np.zeros(size, np.int32),
            broken_by=np.full(size, -1, np.int32),
        )

    def update(self, rows: np.ndarray, result: AttackResult, index: int, minimum_norm: bool):
        """Take over the attack's rows, or those of them that are closer."""
        self.queries[rows] += result.queries
        better = result.success & (result.distance < self.distance[rows])
        taken = better if minimum_norm else np.ones(len(rows), bool)
        self.inputs[rows[taken]] = result.inputs[taken]
        self.success[rows[taken]] = result.success[taken]
        self.distance[rows[taken]] = result.distance[taken]
        needed = taken & result.success & (result.distance > 0)
        self.broken_by[rows[needed]] = index


def _run(
    attack: Callable[..., Any],
    logits_fn: LogitsFn,
    keys: Array | None,
    columns: tuple[Array, Array, Array | None],
    rows: np.ndarray,
    batch_size: int,
    bounds: tuple[float, float],
) -> AttackResult:
    """The attack on these rows, as NumPy arrays without padding."""
    size = min(1 << (len(rows) - 1).bit_length(), batch_size)
    # Copies of a real row: its own work again, so they keep no loop going.
    padded = np.concatenate([rows, np.repeat(rows[:1], size - len(rows))])
    taken = [None if column is None else column[padded] for column in (keys, *columns)]
    result = attack(logits_fn, *taken[:3], bounds=bounds, targets=taken[3])
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(rows)], result._replace(info={}))


def _named(attacks: Any) -> dict[Any, Callable[..., Any]]:
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
        if not callable(attack):
            raise ValueError(
                f"expected callables as attacks, got {type(attack).__name__} for {name!r}; bind "
                "their settings with functools.partial"
            )
        for setting, value in getattr(attack, "keywords", {}).items():
            _check_setting(name, setting, value)
    return named


def _check_setting(name: Any, setting: str, value: Any) -> None:
    """A bound setting holds for any rows, and is not the ensemble's own."""
    if setting in ("bounds", "targets"):
        raise ValueError(
            f"expected {setting} as an argument of ensemble, got it bound in attack {name!r}; pass "
            f"ensemble(..., {setting}=...), which hands it to every attack"
        )
    if isinstance(value, (np.ndarray, jax.Array, list)) and np.ndim(value) > 0:
        raise ValueError(
            f"expected settings that hold for all examples, got {setting} of shape "
            f"{np.shape(value)} in attack {name!r}; the ensemble regroups the examples: pass a "
            "scalar"
        )
