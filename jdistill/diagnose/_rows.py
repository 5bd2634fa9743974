"""Running functions on some of the examples, in chunks of few sizes."""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.attacks import AttackResult
from jdistill.typing import Array, Callback, Event

_SMALLEST = 16  # fewer rows are not worth a program of their own


class Found(NamedTuple):
    """Result of an attack, on the host.

    Attributes:
        success: `[N]` bool; False where it was not run.
        inputs: `[N, ...]`.
        info: as the attack's.
    """

    success: np.ndarray
    inputs: np.ndarray
    info: dict[str, np.ndarray]


class Rows(NamedTuple):
    """All examples, and how to run something on those of a mask.

    Attributes:
        keys: `[N]`.
        inputs: `[N, ...]`.
        labels: `[N]`.
        batch_size: the most examples at a time.
        callback: told of every chunk.
    """

    keys: Array
    inputs: Array
    labels: Array
    batch_size: int
    callback: Callback | None

    def run(
        self,
        stage: str,
        fun: Callable[..., Any],
        mask: np.ndarray,
        *,
        inputs: np.ndarray | None = None,
        draws: str | None = None,
    ) -> Any:
        """`fun(keys, inputs, labels)` on the rows of the mask, scattered over all `N` rows.

        The rows left out are 0, False. Example `n` draws from its own key and the stage's name,
        whatever else is run, and on whichever rows.

        Args:
            stage: its name.
            fun: returns arrays that lead with `[B]`.
            mask: `[N]`.
            inputs: `[N, ...]` instead of the examples'.
            draws: the name of a stage to draw the same as; None draws anew.
        """
        rows = np.flatnonzero(mask)
        number = zlib.crc32((draws or stage).encode())
        keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(self.keys, number)
        columns = self.inputs if inputs is None else jnp.asarray(inputs)
        if not len(rows):
            shapes = jax.eval_shape(fun, keys[:1], columns[:1], self.labels[:1])
            return jax.tree.map(lambda s: np.zeros((len(mask), *s.shape[1:]), s.dtype), shapes)
        size = _size(len(rows), min(self.batch_size, len(mask)))
        chunks = []
        for first in range(0, len(rows), size):
            chunk = rows[first : first + size]
            padded = np.concatenate([chunk, np.repeat(rows[:1], size - len(chunk))])
            output = jax.device_get(fun(keys[padded], columns[padded], self.labels[padded]))
            chunks.append(jax.tree.map(lambda leaf, real=chunk.size: leaf[:real], output))
            if self.callback is not None:
                done = min(first + size, len(rows))
                progress: Event = {"event": "diagnose", "stage": stage, "done": done}
                self.callback({**progress, "total": len(rows)})

        def scattered(*leaves: np.ndarray) -> np.ndarray:
            joined = np.concatenate(leaves)
            whole = np.zeros((len(mask), *joined.shape[1:]), joined.dtype)
            whole[rows] = joined
            return whole

        return jax.tree.map(scattered, *chunks)

    def attack(
        self,
        stage: str,
        attack: Callable[..., AttackResult],
        mask: np.ndarray,
        *,
        draws: str | None = None,
    ) -> Found:
        """As `run`, of an attack `(keys, inputs, labels) -> AttackResult`."""
        result = self.run(stage, attack, mask, draws=draws)
        return Found(result.success, result.inputs, result.info)


def _size(count: int, largest: int) -> int:
    """The chunk for so many rows: the largest, or a quarter of it, and so on, if they fit.

    A few sizes only, since each is compiled for.
    """
    size = largest
    while size // 4 >= max(count, _SMALLEST):
        size //= 4
    return size
