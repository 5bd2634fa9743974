"""Guards around calls of Orbax: its chatter dropped, signals held back."""

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from typing import Any


class _OrbaxFilter(logging.Filter):
    """Drops Orbax's chatter, and nothing else that goes through the same loggers.

    Orbax logs a dozen INFO lines a save, some of them from threads of its own, so that raising
    the level around a call would miss them: whoever shows INFO would lose the progress bars.
    """

    threshold = logging.WARNING
    # A warning on any machine that is busy; a short epoch is no mistake.
    chatter = "Waiting for previous save to complete"

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is loud enough, or not Orbax's at all."""
        if "orbax" not in record.pathname:
            return True
        return record.levelno >= self.threshold and self.chatter not in str(record.msg)


_orbax_filter = _OrbaxFilter()
logging.getLogger("absl").addFilter(_orbax_filter)
logging.getLogger().addFilter(_orbax_filter)  # some of its modules log there


@contextlib.contextmanager
def silent_orbax() -> Iterator[None]:
    """While a checkpoint that may be damaged is tried, Orbax's own complaints stay unseen."""
    _orbax_filter.threshold = logging.CRITICAL + 1
    try:
        yield
    finally:
        _orbax_filter.threshold = logging.WARNING


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Holds Ctrl-C and SIGTERM back until Orbax is done, a fraction of a second.

    Raised inside Orbax they end in its tracebacks, and threads left in the middle of a write abort
    the process at its exit. The second signal goes through, for storage that hangs.
    """
    # Other threads receive no signals. A handler that is not Python's raises nothing.
    handlers: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        both = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        handlers = {number: handler for number, handler in both.items() if callable(handler)}
    held: list[int] = []

    def hold(number: int, _: Any) -> None:
        if held:
            signal.signal(number, handlers[number])
            signal.raise_signal(number)
        held.append(number)

    for number in handlers:
        signal.signal(number, hold)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in held[:1]:
            signal.raise_signal(number)
