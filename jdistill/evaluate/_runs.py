"""Running a function over every network of a stack, in chunks of examples."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from jdistill import _validate, data, nets
from jdistill._jax import full_precision, jit, logits_shape
from jdistill.typing import Array, ArrayLike, Callback, LogitsFn

Place = tuple[int, int]  # (network, batch)


class Unit(NamedTuple):
    """What one call of a compiled function does: one batch, under one network or under all."""

    networks: tuple[int, ...]  # several under vmap
    batch: int
    rows: np.ndarray  # of the examples; the last ones may be padding
    num_real: int  # rows that are none

    @property
    def places(self) -> list[Place]:
        """Whose results the call gives, in their order."""
        return [(network, self.batch) for network in self.networks]


class Runs(NamedTuple):
    """A stack, and how to run functions of `(logits_fn, *columns)` over it in chunks."""

    stack: LogitsFn
    temperatures: np.ndarray  # [R]
    vmapped: bool
    callback: Callback | None

    @classmethod
    def of(
        cls,
        stack: LogitsFn,
        temperature: ArrayLike,
        vmapped: bool | None,
        callback: Callback | None,
    ) -> "Runs":
        """The checked stack, its logits divided by the test temperature."""
        _validate.function(stack=stack)
        _validate.callback(callback)
        if vmapped is not None:
            _validate.flag(vmapped=vmapped)
        _validate.positive(temperature=temperature)
        num_runs = nets.stack_size(stack)
        if np.shape(temperature) not in ((), (num_runs,)):
            raise ValueError(
                f"expected temperature to be a scalar or of shape [R] = ({num_runs},), got shape "
                f"{np.shape(temperature)}; pass one number, or one per network of the stack"
            )
        temperatures = np.broadcast_to(np.asarray(temperature, np.float32), (num_runs,))
        if vmapped is None:
            vmapped = jax.default_backend() != "cpu"
        return cls(nets.with_temperature(stack, temperatures), temperatures, vmapped, callback)

    def units(self, size: int, batch_size: int) -> list[Unit]:
        """The calls that cover all networks and examples, network by network."""
        num_runs = len(self.temperatures)
        groups = [tuple(range(num_runs))] if self.vmapped else [(run,) for run in range(num_runs)]
        indices = np.arange(size)[:, None]
        # Indices and not `data.batches` on the columns: those may hold PRNG keys or be None.
        batches = [
            (batch.inputs[:, 0], int(batch.mask.sum()))
            for batch in data.batches(indices, batch_size=min(batch_size, size))
        ]
        return [
            Unit(group, number, rows, num_real)
            for group in groups
            for number, (rows, num_real) in enumerate(batches)
        ]

    def computer(
        self, fun: Callable[..., Any], *columns: Any, eager: bool = False
    ) -> Callable[[Unit], dict[Place, Any]]:
        """What computes a unit: for each network, every output leaf as NumPy, real rows only.

        `eager` is for functions that check concrete values and are compiled inside. A column that
        is None stays None.
        """
        fun = _over_runs(fun) if self.vmapped else fun
        compiled = fun if eager else _jit(fun)
        one = functools.lru_cache(maxsize=1)(functools.partial(nets.index, self.stack))

        def compute(unit: Unit) -> dict[Place, Any]:
            network = self.stack if self.vmapped else one(unit.networks[0])
            chunk = [None if column is None else column[unit.rows] for column in columns]
            with full_precision():  # as in the attacks, so that both see the same network
                output = jax.device_get(compiled(network, *chunk))
            if not self.vmapped:
                return {unit.places[0]: jax.tree.map(lambda leaf: leaf[: unit.num_real], output)}
            return {
                place: jax.tree.map(lambda leaf, i=index: leaf[i, : unit.num_real], output)
                for index, place in enumerate(unit.places)
            }

        return compute

    def announcer(self, stage: str, units: list[Unit]) -> "Announcer":
        """Announcer of the progress of the units."""
        return Announcer(self.callback, stage, units)

    def map(
        self,
        fun: Callable[..., Any],
        stage: str | None,
        batch_size: int,
        *columns: Any,
        eager: bool = False,
    ) -> Any:
        """Every output leaf as NumPy, `[R, N, ...]`; without a stage no callback is told."""
        units = self.units(len(columns[0]), batch_size)
        compute = self.computer(fun, *columns, eager=eager)
        announce = self.announcer(stage or "", units)
        pieces: dict[Place, Any] = {}
        for unit in units:
            pieces |= compute(unit)
            if stage is not None:
                announce.after(unit)
        return joined(pieces)


class Announcer:
    """Announcements to the callback, after each unit and inside one."""

    def __init__(self, callback: Callback | None, stage: str, units: list[Unit]) -> None:
        self._callback, self._stage = callback, stage
        self._total = sum(unit.num_real * len(unit.networks) for unit in units)
        self._done = 0

    def after(self, unit: Unit) -> None:
        """A unit is done."""
        self._done += unit.num_real * len(unit.networks)
        self._tell(self._done)

    def inside(self, unit: Unit, event: Mapping[str, Any]) -> None:
        """Between two chunks of the unit's attack, see `attacks._core.chunks.Chunks`."""
        finished = unit.num_real - int(np.sum(event["active"][: unit.num_real]))
        self._tell(self._done + finished, step=event["done"], num_steps=event["total"])

    def _tell(self, done: int, **more: Any) -> None:
        if self._callback is not None:
            progress = {"stage": self._stage, "done": done, "total": self._total}
            self._callback({"event": "evaluate", **progress, **more})


def joined(pieces: Mapping[Place, Any]) -> Any:
    """The results of all places as one: every leaf `[R, N, ...]`."""
    num_runs = 1 + max(run for run, _ in pieces)

    def one(*leaves: np.ndarray) -> np.ndarray:
        rows = np.concatenate(leaves)  # all examples of the first network, then of the next
        return rows.reshape(num_runs, len(rows) // num_runs, *rows.shape[1:])

    return jax.tree.map(one, *(pieces[place] for place in sorted(pieces)))


@functools.lru_cache(maxsize=64)
def _jit(fun: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for each `fun`."""
    return jit(fun)


@functools.lru_cache(maxsize=64)
def _over_runs(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun` of a single network as one of a stack; the columns stay concrete, to be checked."""

    def over_runs(stack: LogitsFn, *columns: Array) -> Any:
        return jax.vmap(lambda network: fun(network, *columns))(stack)

    return over_runs


def check_inputs(stack: LogitsFn, inputs: Any) -> int | None:
    """The number of classes; an error for inputs that the networks of the stack cannot take."""
    _validate.inputs_in_box(inputs, (-np.inf, np.inf))
    if not len(inputs):
        return None
    return logits_shape(nets.index(stack, 0), np.asarray(inputs[:1]), name="stack").shape[1]


def refuse_tracers(*values: Any) -> None:
    """An error for a call under `jit` or `vmap`: the evaluators are loops of the host."""
    if _validate.is_traced(*values):
        raise ValueError(
            "expected concrete arrays, got tracers; the evaluators loop over chunks on the host: "
            "call them outside jit and vmap (a stack is put under vmap inside)"
        )


def first(size: int, name: str, count: int | None) -> int:
    """How many of a set's first examples to take: the count, at most all of them."""
    if size == 0:
        raise ValueError("expected at least one example, got none; pass inputs [N, ...]")
    if count is None:
        return size
    _validate.count(**{name: count})
    return min(count, size)
