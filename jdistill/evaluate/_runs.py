"""Running a function over every network of a stack, in chunks of examples."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jdistill import _validate, data, nets
from jdistill._precision import full_precision
from jdistill.typing import Array, ArrayLike, Callback, LogitsFn


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
        _validate.positive(temperature=temperature)
        num_runs = _num_runs(stack)
        if np.shape(temperature) not in ((), (num_runs,)):
            raise ValueError(
                f"expected temperature to be a scalar or of shape [R] = ({num_runs},), got shape "
                f"{np.shape(temperature)}; pass one number, or one per network of the stack"
            )
        temperatures = np.broadcast_to(np.asarray(temperature, np.float32), (num_runs,))
        if vmapped is None:
            vmapped = jax.default_backend() != "cpu"
        return cls(nets.with_temperature(stack, temperatures), temperatures, vmapped, callback)

    def map(
        self,
        fun: Callable[..., Any],
        stage: str,
        batch_size: int,
        *columns: Any,
        eager: bool = False,
    ) -> Any:
        """Every output leaf as NumPy, `[R, N, ...]`.

        `eager` is for functions that check concrete values and are compiled inside.
        """
        size, num_runs = len(columns[0]), len(self.temperatures)
        if self.vmapped:
            networks = [(self.stack, num_runs)]
        else:
            networks = [(nets.index(self.stack, run), 1) for run in range(num_runs)]
        fun = _over_runs(fun) if self.vmapped else fun
        compiled = fun if eager else _jit(fun)
        done, outputs = 0, []
        for network, count in networks:
            chunks = []
            for chunk, real in _padded_chunks(columns, size, batch_size):
                with full_precision():  # as in the attacks, so that both see the same network
                    chunks.append((jax.device_get(compiled(network, *chunk)), real))
                done += real * count
                if self.callback is not None:
                    progress = {"stage": stage, "done": done, "total": size * num_runs}
                    self.callback({"event": "evaluate", **progress})
            outputs.append(_join(chunks, axis=1 if self.vmapped else 0))
        if self.vmapped:
            return outputs[0]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *outputs)


@functools.lru_cache(maxsize=64)
def _jit(fun: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for each `fun`."""
    return jax.jit(fun)


@functools.lru_cache(maxsize=64)
def _over_runs(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun` of a single network as one of a stack; the columns stay concrete, to be checked."""

    def over_runs(stack: LogitsFn, *columns: Array) -> Any:
        return jax.vmap(lambda network: fun(network, *columns))(stack)

    return over_runs


def _padded_chunks(
    columns: tuple[Any, ...], size: int, batch_size: int
) -> Iterator[tuple[list[Any], int]]:
    """The columns in chunks of one shape, each with its number of real rows.

    A column that is None stays None. The others may hold PRNG keys, which NumPy does not know,
    hence indices and not `data.batches` on the columns themselves.
    """
    indices = np.arange(size)[:, None]
    for batch in data.batches(indices, batch_size=min(batch_size, size)):
        rows = batch.inputs[:, 0]
        chunk = [None if column is None else column[rows] for column in columns]
        yield chunk, int(batch.mask.sum())


def _join(chunks: list[tuple[Any, int]], axis: int) -> Any:
    """The chunks' outputs one after another along the example axis, without their padding."""

    def joined(*leaves: np.ndarray) -> np.ndarray:
        real = [
            np.take(leaf, np.arange(count), axis=axis)
            for leaf, (_, count) in zip(leaves, chunks, strict=True)
        ]
        return np.concatenate(real, axis=axis)

    return jax.tree.map(joined, *(output for output, _ in chunks))


def _num_runs(stack: LogitsFn) -> int:
    """The length of the stack's leading axis."""
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(stack)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "expected a stack of logits_fns whose leaves share a leading axis R, got leaves of "
            f"leading sizes {sorted(str(size) for size in sizes)}; "
            "make one with jdistill.nets.stack([logits_fn, ...])"
        )
    return sizes.pop()[0]


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
