"""Evaluation of a stack of networks under an attack."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jdistill import _fingerprint, _validate, attacks, metrics, nets, parallel
from jdistill._entries import Store
from jdistill._jax import jit
from jdistill.attacks import AttackResult
from jdistill.attacks._core.chunks import run_in_chunks
from jdistill.attacks._core.claims import verified
from jdistill.attacks._core.problem import example_keys
from jdistill.evaluate import _shards
from jdistill.evaluate._runs import (
    Announcer,
    Place,
    Runs,
    Unit,
    check_inputs,
    check_store,
    first,
    joined,
    made_by,
    refuse_tracers,
    shard_names,
)
from jdistill.evaluate._shards import Piece, Shards
from jdistill.typing import Array, ArrayLike, AttackFn, Callback, LogitsFn, Norm

# How often what an attack did inside a batch is kept.
_SECONDS_BETWEEN_SAVES = 30.0


class AttackPlan(NamedTuple):
    """An attack with its settings bound, and on how many examples to run it.

    Attributes:
        attack: `(logits_fn, key, inputs, labels) -> AttackResult`, such as
            `functools.partial(attacks.pgd, eps=0.1)`.
        num_examples: the first so many examples are attacked; None attacks all.
        batch_size: examples at a time.

    Example:
        >>> import functools
        >>> pgd = functools.partial(attacks.pgd, eps=0.1, num_steps=40)
        >>> plan = AttackPlan(pgd, num_examples=1000)
        >>> plan.num_examples, attacks.traits(plan.attack).eps
        (1000, 0.1)
    """

    attack: AttackFn
    num_examples: int | None = None
    batch_size: int = 250


Plan = AttackPlan | AttackFn


class AttackOutcome(NamedTuple):
    """Outcome of an attack on each network of a stack, over the first `M` examples.

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
        num_nonfinite: `[R]` int, of how many returned inputs the network's logits are not all
            finite. On a clean input that counts as misclassified, on an adversarial one it is no
            success: where there are some, the success rate is a lower bound. None where it was not
            counted.
        norm: of the distances; None where that is not known (see `attacks.Traits`).
        eps: the attack's radius; None for a minimum-norm attack.
        traits: the attack's facts; None of an outcome that was made by hand.
        predictions: `[R, M]` int, the classes that the network sees in the returned inputs; None of
            an outcome that was made by hand.
    """

    success: np.ndarray
    distance: np.ndarray
    queries: np.ndarray
    inputs: np.ndarray
    success_rate: list[metrics.Interval]
    mean_distance: np.ndarray
    median_distance: np.ndarray
    info: dict[str, np.ndarray]
    num_nonfinite: np.ndarray | None = None
    norm: Norm | None = None
    eps: float | None = None
    traits: attacks.Traits | None = None
    predictions: np.ndarray | None = None


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
    shards: Store | None = None,
    shard_name: str | None = None,
    names: Sequence[str] | None = None,
) -> AttackOutcome:
    """Evaluate every network of a stack under one attack.

    With `shards` it can be stopped at any moment and called again: what is there is read, and the
    outcome is that of a run without a stop. Networks that are attacked one by one are also kept
    inside a batch, every half a minute, and go on from there. On several hosts
    (`jax.process_count()`) each computes its share, waits for the others and reads theirs, so all
    must see the same shards.

    Args:
        stack: a `logits_fn` pytree whose leaves lead with `R`.
        inputs: `[N, ...]` float, inside the attack's bounds.
        labels: `[N]` int in `0..K-1`.
        plan: the attack and its number of examples.
        key: for random attacks; example `n` uses `fold_in(key, n)`. Or `[N]` keys, one each.
        targets: `[N]` int, what the attack aims at, passed on to it; None does not.
        temperature: at which the networks are attacked, above 0; scalar or `[R]`.
        vmapped: whether to run the stack under `vmap`; None does so except on CPU, and except for
            attacks that are loops on the host or may be (see `attacks.Traits`).
        callback: see `evaluate`.
        stage: a name for the callback.
        shards: where to keep what was done to one network on one batch, such as
            `runtime.ShardFolder(path)` or a dict; None keeps nothing. A shard says by which
            attack, network, examples and key it was made; one made by others is refused.
        shard_name: the attack's, for the shards; None takes `stage`.
        names: `[R]`, of the networks, for the shards; None numbers them as `network-0`. Name them
            where the stack is not always put together alike.

    Returns:
        The outcome, on the host.

    Raises:
        ValueError: as the attack; a shard of other settings (the error names the difference).

    Example:
        >>> import functools
        >>> import jax.numpy as jnp
        >>> linear = nets.callable_logits_fn(lambda w, x: x @ w, jnp.eye(2))
        >>> x, y = np.eye(2, dtype=np.float32), np.arange(2)
        >>> plan, shards = AttackPlan(functools.partial(attacks.fgsm, eps=0.6), batch_size=1), {}
        >>> outcome = under_attack(nets.stack([linear]), x, y, plan, stage="fgsm", shards=shards)
        >>> outcome.success.tolist(), list(shards)
        ([[True, True]], ['fgsm/network-0/00000', 'fgsm/network-0/00001'])
    """
    _validate.text(stage=stage)
    if shard_name is not None:
        _validate.text(shard_name=shard_name)
    job = _job(stack, inputs, labels, plan, key, targets, temperature, vmapped, callback, names)
    if shards is None:
        pieces = job.work(None, stage, 0, 1)
    else:
        kept = job.shards(shards, shard_name or stage, names)
        host, num_hosts = jax.process_index(), jax.process_count()
        pieces = job.work(kept, stage, host, num_hosts)
        if num_hosts > 1:
            pieces = _of_all_hosts(job.units, kept)
    piece, known = joined(pieces), attacks.traits(plan.attack)
    outcome = summarize(
        piece.result,
        num_nonfinite=(~piece.finite).sum(axis=1),
        norm=known.norm,
        eps=known.eps,
    )
    return outcome._replace(traits=known, predictions=np.asarray(piece.predictions))


def summarize(
    result: AttackResult,
    *,
    num_nonfinite: np.ndarray | None = None,
    norm: Norm | None = None,
    eps: float | None = None,
) -> AttackOutcome:
    """The success rates and distances of attack results stacked along `R`.

    Args:
        result: every leaf leads with `[R, M]`.
        num_nonfinite: `[R]`, see `AttackOutcome`.
        norm: of the distances.
        eps: the attack's radius.

    Returns:
        The outcome, on the host.

    Raises:
        ValueError: leaves of another shape, a negative or NaN radius, no `AttackResult`.

    Example:
        >>> import jax.numpy as jnp
        >>> row = lambda *values: jnp.array([values])
        >>> result = AttackResult(jnp.zeros((1, 2, 3)), row(True, False), row(2.0, jnp.inf),
        ...                       row(5, 9), {})
        >>> outcome = summarize(result)
        >>> outcome.success_rate[0].value, float(outcome.mean_distance[0])
        (0.5, 2.0)
    """
    _validate.instance(AttackResult, "an AttackResult", result=result)
    _validate.mapping(info=result.info)
    success, distance = np.asarray(result.success), np.asarray(result.distance)
    if success.ndim != 2 or success.shape != distance.shape:
        raise ValueError(
            f"expected a result with success and distance of shape [R, M], got {success.shape} and "
            f"{distance.shape}; stack the results of the networks"
        )
    if num_nonfinite is not None:
        _validate.class_indices(num_nonfinite, name="num_nonfinite", batch_size=len(success))
    if norm is not None:
        _validate.text(norm=norm)
    if eps is not None:
        _validate.scalar(eps=eps)
        _validate.non_negative(eps=eps)
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
        num_nonfinite=num_nonfinite,
        norm=norm,
        eps=eps,
    )


class _Job(NamedTuple):
    """The checked arguments of `under_attack`."""

    stack: LogitsFn  # as it was given, before the temperature
    runs: Runs
    plan: AttackPlan
    columns: tuple[Any, ...]  # inputs, labels, keys, targets
    units: list[Unit]

    @property
    def attacked(self) -> "_Attacked":
        return _Attacked(self.plan.attack)

    def work(
        self, kept: Shards | None, stage: str, host: int, num_hosts: int
    ) -> dict[Place, Piece]:
        """One host's share, read or computed: the units of its index modulo the hosts' number."""
        units = self.units[host::num_hosts]
        compute = self.runs.computer(self.attacked, *self.columns, eager=True)
        announcer = self.runs.announcer(stage, units)
        if not self.runs.vmapped and (kept is not None or self.runs.callback is not None):
            compute = functools.partial(_computed_in_chunks, compute, kept, announcer)
        return _shards.work(units, compute, kept, announcer.after)

    def shards(self, store: Store, name: str, names: Sequence[str] | None) -> Shards:
        """The store's shards for this job: what they are called, and what they must say."""
        check_store(store)
        num_runs = len(self.runs.temperatures)
        names = shard_names(names, num_runs)
        attack = _fingerprint.describe_attack(self.plan.attack)
        networks = [
            {
                "weights": _fingerprint.fingerprint(nets.index(self.stack, run)),
                "temperature": float(self.runs.temperatures[run]),
            }
            for run in range(num_runs)
        ]
        shared = {"attack": attack, **made_by()}
        examples = {unit.batch: self._examples(unit) for unit in self.units}
        called, settings = {}, {}
        for run, batch in (place for unit in self.units for place in unit.places):
            called[run, batch] = f"{name}/{names[run]}/{batch:05d}"
            settings[run, batch] = {"network": networks[run], **examples[batch], **shared}
        return Shards(store, called, settings)

    def _examples(self, unit: Unit) -> dict[str, Any]:
        """Fingerprints of a unit's examples, for its shard."""
        rows = unit.rows[: unit.num_real]
        names = ("inputs", "labels", "key", "targets")
        return {
            "examples": {"first": int(rows[0]), "count": unit.num_real},
            "batch_size": len(unit.rows),
            **{
                name: None if column is None else _fingerprint.describe(column[rows])
                for name, column in zip(names, self.columns, strict=True)
            },
        }


def _computed_in_chunks(
    compute: Callable[[Unit], dict[Any, Piece]],
    kept: Shards | None,
    announcer: Announcer,
    unit: Unit,
) -> dict[Any, Piece]:
    """A unit of one network, that can be stopped inside and goes on from there."""
    (place,) = unit.places
    saved = time.monotonic()

    def between(event: Mapping[str, Any]) -> None:
        nonlocal saved
        if kept is not None and time.monotonic() - saved >= _SECONDS_BETWEEN_SAVES:
            kept.write_part(place, event["save"]())
            saved = time.monotonic()
        announcer.inside(unit, event)

    part = None if kept is None else kept.read_part(place)
    found: dict[Any, Piece] = run_in_chunks(functools.partial(compute, unit), between, part)
    return found


def _job(
    stack: LogitsFn,
    inputs: np.ndarray,
    labels: np.ndarray,
    plan: AttackPlan,
    key: Array | None,
    targets: np.ndarray | None,
    temperature: ArrayLike,
    vmapped: bool | None,
    callback: Callback | None,
    names: Sequence[str] | None,
) -> _Job:
    refuse_tracers(stack, inputs, labels, key)
    _validate.instance(AttackPlan, "an AttackPlan", remedy="pass AttackPlan(attack)", plan=plan)
    if vmapped is None and attacks.traits(plan.attack).host_loop:
        vmapped = False
    runs = Runs.of(stack, temperature, vmapped, callback)
    _validate.count(batch_size=plan.batch_size)
    num_classes = check_inputs(stack, inputs)
    inputs, labels = np.asarray(inputs), np.asarray(labels)
    _validate.class_indices(labels, batch_size=len(inputs), num_classes=num_classes)
    size = first(len(inputs), "num_examples", plan.num_examples)
    if targets is not None:
        _validate.class_indices(targets, name="targets", batch_size=len(inputs))
        targets = np.asarray(targets)[:size]
    shard_names(names, len(runs.temperatures))
    # Keys travel with their examples, so batches do not change the draws.
    keys = None if key is None else example_keys(key, len(inputs))[:size]
    columns = (inputs[:size], labels[:size], keys, targets)
    return _Job(stack, runs, plan, columns, runs.units(size, plan.batch_size))


def _of_all_hosts(units: list[Unit], kept: Shards) -> dict[Any, Piece]:
    """Every host's pieces, once all hosts are done."""
    parallel.barrier("shards")
    pieces = {place: kept.read(place) for unit in units for place in unit.places}
    missing = [kept.names[place] for place, piece in pieces.items() if piece is None]
    if missing:
        raise FileNotFoundError(
            f"expected the shards of all hosts, got none for {missing[0]!r} and {len(missing) - 1} "
            "others; pass shards that all hosts share, such as a folder in a bucket"
        )
    return {place: piece for place, piece in pieces.items() if piece is not None}


@jit
def _predicted(logits_fn: LogitsFn, inputs: Array) -> Any:
    logits = logits_fn(inputs)
    return metrics.predicts(logits), logits.argmax(axis=1)


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
    ) -> Piece:
        if targets is None:
            result = self.attack(logits_fn, keys, inputs, labels)
        else:
            result = self.attack(logits_fn, keys, inputs, labels, targets=targets)  # type: ignore[call-arg]
        result = verified(result, self.attack, logits_fn, labels, targets)
        return Piece(result, *_predicted(logits_fn, result.inputs))
