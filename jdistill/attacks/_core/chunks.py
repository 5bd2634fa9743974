"""Attacks that come back to the host every few events, to save, report, and answer Ctrl-C."""

import functools
import io
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill._jax import jit
from jdistill.attacks._core import engine
from jdistill.attacks._core.engine import Carry, Method
from jdistill.attacks._core.problem import AttackResult, Problem

# Seconds that a chunk should take; between these nothing is changed.
_SHORTEST, _LONGEST = 0.5, 2.0

_start = jit(engine.start, static_argnames="trace")
_advance = jit(engine.advance)
_finish = jit(engine.finish, static_argnames="trace")


class Chunks:
    """Handler that runs a method in chunks of events, of about a second each.

    An attack may run several methods, one after the other, and each may depend on the results of
    those before it: what is saved are these results, and how far the running one is. A repeated
    call reads the results off, and goes on.

    Args:
        callback: called between chunks, every half second at most, with `done` and `total` events
            of the method that runs (`done` is what every unfinished example has had; `total` is
            None where it has no fixed number), `active [B]` bool, the examples that are not done,
            and `save`, a function that returns what `saved` takes, `[P]` uint8.
        saved: what an interrupted call of the same attack on the same examples had saved; where
            it does not fit, the attack begins anew.
    """

    on_host = True

    def __init__(
        self, callback: Callable[[dict[str, Any]], None], saved: np.ndarray | None = None
    ) -> None:
        self._callback = callback
        self._results: list[bytes] = []  # of the methods that are through
        self._saved: list[bytes] = [] if saved is None else _unpacked(saved.tobytes())

    def __call__(self, method: Method, problem: Problem, trace: bool, /) -> AttackResult:
        """Run the method to its end."""
        begin = functools.partial(_start, trace=trace)
        carry_like = jax.eval_shape(begin, method, problem)
        *results, running = self._saved or [b""]
        place = len(self._results)
        carry = None
        if place < len(results):
            result_like = jax.eval_shape(
                functools.partial(_finish, trace=trace), method, problem, carry_like
            )
            known = _restored(results[place], result_like)
            if known is not None:
                self._results.append(results[place])
                return known
        elif place == len(results):
            carry = _restored(running, carry_like)
        if carry is None:
            self._saved = []  # what follows was saved of another call
            carry = begin(method, problem)
        result = _finish(method, problem, self._advanced(method, problem, carry), trace=trace)
        self._results.append(_packed_tree(result))
        return result

    def _advanced(self, method: Method, problem: Problem, carry: Carry) -> Carry:
        """The carry when all examples are done."""
        events, compiled, told = 1, False, time.monotonic()
        while np.any(active := ~np.asarray(carry[1].done)) and method.num_events != 0:
            begun = time.monotonic()
            if begun - told >= _SHORTEST:
                self._callback(
                    {
                        "done": int(np.min(np.asarray(carry[1].event)[active])),
                        "total": method.num_events,
                        "active": active,
                        "save": functools.partial(self._pack, carry),
                    }
                )
                told = begun
            carry = jax.block_until_ready(_advance(method, problem, carry, jnp.int32(events)))
            seconds = time.monotonic() - begun
            if compiled and seconds > _LONGEST:
                events = max(1, events // 2)
            elif seconds < _SHORTEST:
                events *= 2
            compiled = True  # the first chunk's seconds are mostly the compiler's
        return carry

    def _pack(self, carry: Carry) -> np.ndarray:
        return np.frombuffer(_packed([*self._results, _packed_tree(carry)]), np.uint8)


def _packed_tree(tree: Any) -> bytes:
    """The leaves of a pytree, as bytes."""
    content = io.BytesIO()
    np.savez(content, *(np.asarray(leaf) for leaf in jax.tree.leaves(tree)))
    return content.getvalue()


def _restored(content: bytes, like: Any) -> Any:
    """The pytree of packed leaves, or None where they do not have these shapes and types."""
    if not content:
        return None
    with np.load(io.BytesIO(content)) as file:
        leaves = [file[name] for name in file.files]
    wanted, structure = jax.tree.flatten(like)
    if [(leaf.shape, leaf.dtype) for leaf in leaves] != [(w.shape, w.dtype) for w in wanted]:
        return None
    return jax.tree.unflatten(structure, [jnp.asarray(leaf) for leaf in leaves])


def _packed(parts: list[bytes]) -> bytes:
    content = io.BytesIO()
    np.savez(content, *(np.frombuffer(part, np.uint8) for part in parts))
    return content.getvalue()


def _unpacked(content: bytes) -> list[bytes]:
    if not content:
        return []
    with np.load(io.BytesIO(content)) as file:
        return [file[name].tobytes() for name in file.files]


def run_in_chunks(
    attack: Callable[[], Any],
    callback: Callable[[dict[str, Any]], None],
    saved: np.ndarray | None = None,
) -> Any:
    """`attack()`, with every method in it run by `Chunks(callback, saved)`."""
    with engine.handled_by(Chunks(callback, saved)):
        return attack()
