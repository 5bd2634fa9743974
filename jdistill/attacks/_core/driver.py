"""Host loop of `ensemble` and `autoattack`: each attack on the survivors, in padded batches."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _fingerprint, _validate, parallel
from jdistill._jax import settings_bound
from jdistill.attacks._core.chunks import run_in_chunks
from jdistill.attacks._core.claims import verified
from jdistill.attacks._core.problem import AttackResult, Problem
from jdistill.typing import Array, Bounds, Callback, Event

_SMALLEST = 16  # fewer rows are not worth a program of their own


class EnsembleState(NamedTuple):
    """State of a run of `ensemble` or `autoattack`, which goes on from it: arrays on the host.

    Attributes:
        inputs: `[N, ...]`, the point that it is left with.
        success: `[N]` bool.
        distance: `[N]`, `inf` before the first attack.
        queries: `[N]` int32, of all attacks run on it.
        gradients: `[N]` int32, of all attacks run on it.
        broken_by: `[N]` int32, the index of the attack whose point it is, -1 if none.
        attacks_done: `[N]` int32, how many attacks it has been through.
        of: `[16]` uint8, a hash of the examples, the keys and the settings that it belongs to.
        part: `[P]` uint8, how far the batch is that was running; empty between two batches.

    Example:
        >>> import functools
        >>> from jdistill import attacks
        >>> run = functools.partial(
        ...     attacks.ensemble, lambda x: x @ jnp.eye(2), None, jnp.eye(2), jnp.arange(2),
        ...     attacks=[functools.partial(attacks.fgsm, eps=0.6)])
        >>> states = []
        >>> result = run(callback=lambda event: states.append(event["state"]))
        >>> states[-1].success.tolist(), states[-1].broken_by.tolist()
        ([True, True], [0, 0])
        >>> run(start=states[-1]).success.tolist()  # all is done
        [True, True]
    """

    inputs: np.ndarray
    success: np.ndarray
    distance: np.ndarray
    queries: np.ndarray
    gradients: np.ndarray
    broken_by: np.ndarray
    attacks_done: np.ndarray
    of: np.ndarray
    part: np.ndarray


def check_bound(driver: str, which: str, attack: Any, *, num_examples: int | None = None) -> None:
    """An error where an attack binds what its driver hands it, or cannot be handed on.

    Args:
        driver: the name of the public function.
        which: the attack, for the message.
        attack: with its settings bound, through any number of partials.
        num_examples: of a driver that groups its examples anew, which a setting per example
            could not follow; else None.
    """
    if not callable(attack):
        raise ValueError(
            f"expected a callable as {which}, got {type(attack).__name__}; bind its settings with "
            "functools.partial"
        )
    _, bound = settings_bound(attack)
    for name in ("bounds", "targets"):
        if name in bound:
            raise ValueError(
                f"expected {name} as an argument of {driver}, got it bound in {which}; pass "
                f"{driver}(..., {name}=...), which hands it on"
            )
    for name, value in bound.items() if num_examples is not None else ():
        rows = isinstance(value, np.ndarray | jax.Array | list | tuple) and np.ndim(value) > 0
        if rows and len(value) == num_examples and not any(map(callable, value)):
            raise ValueError(
                f"expected settings that hold for all examples, got {name} of shape "
                f"{np.shape(value)} in {which}; {driver} regroups the examples: pass a scalar"
            )


def nothing(inputs: np.ndarray, of: np.ndarray) -> EnsembleState:
    """State before the first attack."""
    size = len(inputs)
    return EnsembleState(
        inputs=inputs.copy(),
        success=np.zeros(size, bool),
        distance=np.full(size, np.inf, inputs.dtype),
        queries=np.zeros(size, np.int32),
        gradients=np.zeros(size, np.int32),
        broken_by=np.full(size, -1, np.int32),
        attacks_done=np.zeros(size, np.int32),
        of=of,
        part=np.zeros(0, np.uint8),
    )


def fingerprint(
    named: Mapping[Any, Callable[..., Any]], problem: Problem, *settings: Any
) -> np.ndarray:
    """A hash of all that a run depends on, `[16]` uint8."""
    from jdistill import __version__

    attacks = [[name, _fingerprint.describe_attack(each)] for name, each in named.items()]
    examples = (problem.inputs, *problem.goal, problem.keys, *problem.bounds)
    everything = (problem.logits_fn, attacks, examples, settings, __version__)
    return np.frombuffer(_fingerprint.fingerprint(everything).encode(), np.uint8)


def check_state(state: EnsembleState, fresh: EnsembleState) -> EnsembleState:
    """A copy of a state to go on from; `fresh` is that of this run before the first attack.

    Raises:
        ValueError: it is of another run.
    """
    _validate.instance(EnsembleState, "an EnsembleState", start=state)
    for name, value, empty in zip(EnsembleState._fields, state, fresh, strict=True):
        if name != "part" and np.shape(value) != empty.shape:
            raise ValueError(
                f"expected start.{name} of shape {empty.shape}, got {np.shape(value)}; pass the "
                f"state of a run on these {len(fresh.inputs)} examples"
            )
    if not np.array_equal(state.of, fresh.of):
        raise ValueError(
            "expected a start of this run, got the state of another one; go on with the same "
            "network, attacks, inputs, labels, key, and version of jdistill, or begin anew with "
            "start=None"
        )
    return EnsembleState(*(np.array(value) for value in state))


def run(
    named: Mapping[Any, Callable[..., Any]],
    problem: Problem,
    *,
    minimum_norm: bool,
    batch_size: int,
    bounds: Bounds,
    devices: Sequence[jax.Device] | None,
    start: EnsembleState | None,
    callback: Callback | None,
    stage: str,
) -> EnsembleState:
    """Every attack, in order, on the examples that no earlier one broke.

    Args:
        named: the attacks; attack `a` draws from `fold_in(example's key, a)`.
        problem: the checked arguments, of all examples.
        minimum_norm: whether all attacks run on all examples, and the smallest distance wins.
        batch_size: the most examples at a time.
        bounds: the box.
        devices: to spread each batch over.
        start: a state to go on from.
        callback: see `ensemble`.
        stage: for the callback.
    """
    if devices is not None:
        devices = _validate.devices(devices)
    _validate.callback(callback)
    inputs = np.asarray(problem.inputs)
    of = np.zeros(16, np.uint8)
    if start is not None or callback is not None:  # otherwise no state leaves this run
        of = fingerprint(named, problem, stage, minimum_norm)
    state = nothing(inputs, of)
    if start is not None:
        state = check_state(start, state)
    columns = (problem.inputs, problem.goal.labels, problem.goal.targets)
    logits_fn = problem.logits_fn
    if devices is not None:
        logits_fn = parallel.replicate(logits_fn, devices)
    for index, (name, attack) in enumerate(named.items()):
        keys = problem.keys
        if keys is not None:
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, index)
        # At distance 0 the clean input is a success, which nothing can better.
        needed = state.distance > 0 if minimum_norm else ~state.success
        active = np.flatnonzero(needed & (state.attacks_done == index))
        for first in range(0, len(active), batch_size):
            rows = active[first : first + batch_size]
            padded = _pad(rows, batch_size, 1 if devices is None else len(devices))
            batch: list[Any] = [
                None if column is None else column[padded] for column in (keys, *columns)
            ]
            if devices is not None:
                batch = parallel.split(batch, devices)

            call = functools.partial(attack, logits_fn, *batch[:3], bounds=bounds, targets=batch[3])
            if callback is None:
                found = call()
            else:
                tell = _Telling(callback, stage, name, first, len(rows), len(active), state)
                found = run_in_chunks(call, tell.inside, _part_of(state, len(rows)))
                state = state._replace(part=state.part[:0])
            found = verified(found, attack, logits_fn, batch[2], batch[3], bounds)
            _update(state, rows, found, index, minimum_norm)
            if callback is not None:
                tell._replace(state=state).after()
    return state


def _part_of(state: EnsembleState, size: int) -> np.ndarray | None:
    """State saved inside a batch of this size; with another size it was of other examples."""
    part = state.part
    return part[4:] if len(part) and part[:4].view("<u4")[0] == size else None


class _Telling(NamedTuple):
    """Events that the callback gets of one batch."""

    callback: Callback
    stage: str
    attack: Any  # its name
    first: int  # examples that this attack was through with before
    size: int
    total: int
    state: EnsembleState

    def inside(self, event: Mapping[str, Any]) -> None:
        """Event between two chunks of the batch."""
        finished = self.size - int(np.sum(event["active"][: self.size]))
        size = np.array([self.size], "<u4").view(np.uint8)
        state = self.state._replace(part=np.concatenate([size, event["save"]()]))
        own = self._event(finished, state)
        self.callback({**own, "step": event["done"], "num_steps": event["total"]})

    def after(self) -> None:
        """Event after the batch."""
        self.callback(self._event(self.size, self.state))

    def _event(self, finished: int, state: EnsembleState) -> Event:
        return {
            "event": "attack",
            "stage": self.stage,
            "attack": self.attack,
            "done": self.first + finished,
            "total": self.total,
            "survivors": int(np.sum(~state.success)),
            "state": state,
        }


def result(state: EnsembleState, *, minimum_norm: bool, info: dict[str, Array]) -> AttackResult:
    """The state after the last attack, as a result."""
    distance = state.distance
    if minimum_norm:
        distance = np.where(state.success, distance, np.inf).astype(distance.dtype)
    return AttackResult(
        inputs=jnp.asarray(state.inputs),
        success=jnp.asarray(state.success),
        distance=jnp.asarray(distance),
        queries=jnp.asarray(state.queries),
        info={**info, "gradients": jnp.asarray(state.gradients)},
    )


def _update(
    state: EnsembleState, rows: np.ndarray, found: AttackResult, index: int, minimum_norm: bool
) -> None:
    """Take over the attack's rows, or those of them that are closer."""
    # An attack of the user's own need not count them.
    gradients = np.asarray(found.info.get("gradients", np.zeros(found.queries.shape, np.int32)))
    found = found._replace(info={})  # of another shape for each attack
    found = jax.tree.map(lambda leaf: np.asarray(leaf)[: len(rows)], found)
    state.queries[rows] += found.queries
    state.gradients[rows] += gradients[: len(rows)]
    better = found.success & (found.distance < state.distance[rows])
    # An attack for the smallest distance that finds nothing leaves nothing to take.
    taken = better if minimum_norm else found.success | np.isfinite(found.distance)
    state.inputs[rows[taken]] = found.inputs[taken]
    state.success[rows[taken]] = found.success[taken]
    state.distance[rows[taken]] = found.distance[taken]
    needed = taken & found.success & (found.distance > 0)
    state.broken_by[rows[needed]] = index
    state.attacks_done[rows] = index + 1


def _pad(rows: np.ndarray, batch_size: int, multiple: int) -> np.ndarray:
    """The rows, and copies of them up to a size that few programs are compiled for.

    The sizes are 16, 24, 32, 48, 64, 96 and so on: with powers of two alone up to half of the rows
    would be copies. They are real rows again, so they keep no loop going.
    """
    power = max(1 << (len(rows) - 1).bit_length(), _SMALLEST)
    less = 3 * power // 4
    size = less if len(rows) <= less and power > _SMALLEST else power
    size = min(size, batch_size)
    size += -size % multiple
    return np.resize(rows, size)
