"""Attacks that come back to the host every few events: to save, to tell, to answer Ctrl-C."""

import functools
import io
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill.attacks._core import engine
from jdistill.attacks._core.engine import Carry, Method
from jdistill.attacks._core.problem import AttackResult, Problem

# Seconds that a chunk should take; between these nothing is changed.
_SHORTEST, _LONGEST = 0.5, 2.0

_start = jax.jit(engine.start, static_argnames="trace")
_advance = jax.jit(engine.advance)
_finish = jax.jit(engine.finish, static_argnames="trace")


class Chunks:
    """Handler that runs a method in chunks of events, of about a second each.

    An attack may run several methods; what was saved is that of the one that was running, and a
    repeated call runs those before it again.

    Args:
        callback: called between chunks with `done` and `total` events of the method that runs
            (None where it has no fixed number), the number of `active` examples, and `save`, a
            function that returns what `saved` takes, `[n]` uint8.
        saved: what an interrupted call of the same attack on the same examples had saved; where
            it does not fit, the attack begins anew.
    """

    on_host = True

    def __init__(
        self, callback: Callable[[dict[str, Any]], None], saved: np.ndarray | None = None
    ) -> None:
        self._callback = callback
        self._saved = saved
        self._call = -1

    def __call__(self, method: Method, problem: Problem, trace: bool, /) -> AttackResult:
        """Run the method to its end."""
        self._call += 1
        begin = functools.partial(_start, trace=trace)
        carry = self._restored(jax.eval_shape(begin, method, problem))
        if carry is None:
            carry = begin(method, problem)
        events, compiled = 1, False
        while active := int(np.sum(~np.asarray(carry[1].done))):
            self._tell(method, carry, active)
            begun = time.monotonic()
            carry = jax.block_until_ready(_advance(method, problem, carry, jnp.int32(events)))
            seconds = time.monotonic() - begun
            if compiled and seconds > _LONGEST:
                events = max(1, events // 2)
            elif seconds < _SHORTEST:
                events *= 2
            compiled = True  # the first chunk's seconds are mostly those of the compiler
        return _finish(method, problem, carry, trace=trace)

    def _tell(self, method: Method, carry: Carry, active: int) -> None:
        self._callback(
            {
                "done": int(np.max(np.asarray(carry[1].event))),
                "total": method.num_events,
                "active": active,
                "save": functools.partial(self._pack, carry),
            }
        )

    def _pack(self, carry: Carry) -> np.ndarray:
        content = io.BytesIO()
        leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(carry)]
        np.savez(content, np.asarray(self._call), *leaves)
        return np.frombuffer(content.getvalue(), np.uint8)

    def _restored(self, like: Any) -> Carry | None:
        """The saved carry, where it is of this call and of these shapes."""
        if self._saved is None or not len(self._saved):
            return None
        with np.load(io.BytesIO(self._saved.tobytes())) as file:
            call, *leaves = (file[name] for name in file.files)
        wanted, structure = jax.tree.flatten(like)
        kinds = [(leaf.shape, leaf.dtype) for leaf in leaves]
        if call != self._call or kinds != [(leaf.shape, leaf.dtype) for leaf in wanted]:
            return None
        return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])


def run_in_chunks(
    attack: Callable[[], Any],
    callback: Callable[[dict[str, Any]], None],
    saved: np.ndarray | None = None,
) -> Any:
    """`attack()`, with every method in it run by `Chunks(callback, saved)`."""
    with engine.handled_by(Chunks(callback, saved)):
        return attack()
