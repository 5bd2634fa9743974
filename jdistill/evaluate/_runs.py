"""Running a function over every network of a stack, in chunks of examples."""

import functools
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jdistill import _validate, data, nets
from jdistill._jax import call, full_precision, jit, logits_shape
from jdistill.typing import Array, ArrayLike, Callback, Event, LogitsFn

Place = tuple[int, int]  # (network, batch)


class Unit(NamedTuple):
    """Work of one call of a compiled function: one batch, under one network or under all."""

    networks: tuple[int, ...]  # several under vmap
    batch: int
    rows: np.ndarray  # of the examples; the last ones may be padding
    num_real: int  # rows that are none

    @property
    def places(self) -> list[Place]:
        """Networks and batches whose results the call gives, in their order."""
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
        """Function that computes a unit: for each network, every output leaf as NumPy, real rows.

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
        if self._callback is not None:
            self._callback(self._event(self._done))

    def inside(self, unit: Unit, event: Mapping[str, Any]) -> None:
        """Between two chunks of the unit's attack, see `attacks._core.chunks.Chunks`."""
        finished = unit.num_real - int(np.sum(event["active"][: unit.num_real]))
        if self._callback is not None:
            own = self._event(self._done + finished)
            self._callback({**own, "step": event["done"], "num_steps": event["total"]})

    def _event(self, done: int) -> Event:
        return {"event": "evaluate", "stage": self._stage, "done": done, "total": self._total}


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


def made_by() -> dict[str, Any]:
    """Library and precision that made a shard, for its header."""
    from jdistill import __version__

    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return {"jdistill": __version__, "matmul_precision": precision or "highest"}


def check_store(shards: Any) -> None:
    """An error for what is no store of shards."""
    _validate.instance(MutableMapping, "a mapping", remedy="pass a dict", shards=shards)


def shard_names(names: Sequence[str] | None, num_runs: int) -> list[str]:
    """The names of the networks in their shards, checked."""
    if names is None:
        return [f"network-{run}" for run in range(num_runs)]
    _validate.sequence(names=names)
    _validate.text(**{f"each of names ({name!r})": name for name in names})
    if len(names) != num_runs or len(set(names)) != num_runs:
        raise ValueError(
            f"expected names, a different name for each of the {num_runs} networks, got {names}; "
            "name them in the stack's order"
        )
    return list(names)


def stacked(networks: Any, inputs: Any) -> LogitsFn:
    """One network, several, or a stack of them, as a stack.

    Raises:
        ValueError: it cannot be told which it is, or networks of different structures.
    """
    if isinstance(networks, (list, tuple)) and not hasattr(networks, "_fields"):
        if not networks:
            raise ValueError("expected networks, at least one, got none; pass [logits_fn]")
        for network in networks:
            _validate.function(networks=network)
        leading = [_with_leaf(nets.callable_logits_fn(network)) for network in networks]
        try:
            return nets.stack(leading)
        except ValueError as error:
            raise ValueError(
                f"expected networks of one structure, got others ({error}); measure each kind in "
                "a call of its own"
            ) from None
    _validate.function(networks=networks)
    if not jax.tree.leaves(nets.callable_logits_fn(networks)):
        return stacked([networks], inputs)
    leaves, structure = jax.tree.flatten(networks)
    shapes = tuple((np.shape(leaf), jax.typeof(leaf).dtype) for leaf in leaves)
    inputs = np.asarray(inputs)
    example = np.zeros((1, *inputs.shape[1:]), inputs.dtype)
    single, stack = _kinds(structure, shapes, example.shape, example.dtype)
    if single and stack:
        raise ValueError(
            "expected one network or a stack, got what can be either; pass [network] for one, and "
            "a list of the networks for several"
        )
    if not single and not stack:
        logits_shape(networks, example, name="networks")  # says why it is no network
    return stacked([networks], inputs) if single else networks


@functools.lru_cache(maxsize=64)
def _kinds(structure: Any, shapes: tuple[Any, ...], shape: Any, dtype: Any) -> tuple[bool, bool]:
    """Whether what has these leaves gives logits as it is, and as the first of a stack."""
    example = jax.ShapeDtypeStruct(shape, dtype)

    def gives_logits(cut: int) -> bool:
        if any(len(of_leaf) < cut for of_leaf, _ in shapes):
            return False
        leaves = [jax.ShapeDtypeStruct(of_leaf[cut:], kind) for of_leaf, kind in shapes]
        try:
            with full_precision():
                logits = jax.eval_shape(call, jax.tree.unflatten(structure, leaves), example)
        except Exception:  # whatever a network says to weights of other shapes
            return False
        return len(logits.shape) == 2 and logits.shape[0] == shape[0]

    return gives_logits(0), gives_logits(1)


def _with_leaf(network: LogitsFn) -> LogitsFn:
    """The network with a leaf to stack, where it has none of its own."""
    return network if jax.tree.leaves(network) else nets.with_temperature(network, 1.0)


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
