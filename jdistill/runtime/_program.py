"""How a program starts and ends: signals, exit codes, errors in one line."""

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jdistill import _validate

_STOPPED = "stopped; run the same command again to go on"
# Seconds that a program has after SIGTERM; supervisors send SIGKILL after 30 or more.
_GRACE = 15.0
_watching = False


def _stop_watching() -> None:
    """In a forked child: its signals are not its parent's."""
    if _watching:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_stop_watching)


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, as an exception: whatever cleans up after Ctrl-C cleans up after this as well."""


def run_main(main: Callable[..., int | None], *args: Any, **kwargs: Any) -> None:
    """Runs a program's main function and ends the process as a command should end.

    =================================  ======================  ==================================
    `main`                             exit code               on stderr
    =================================  ======================  ==================================
    returns None or 0                  0: `run_main` returns   nothing
    returns another number             that number             nothing
    is stopped by Ctrl-C / by SIGTERM  130 / 143               how to go on, or the exception's
                                                               own text
    raises ValueError, OSError,        2                       `error: …`, one line
    FloatingPointError or ImportError
    raises anything else               1                       the traceback: a bug
    =================================  ======================  ==================================

    With `JDISTILL_DEBUG=1` in the environment, the third and fourth show their traceback first.

    SIGTERM ends the process within about 15 seconds, also in the middle of a compilation or of a
    long computation, from which Python cannot be called back: then without cleaning up, which no
    file needs. With processes on several hosts, an error ends this one at once; JAX's orderly end
    would wait for those that may be the reason.

    Args:
        main: the program; returns its exit code, or None for 0.
        *args: its arguments.
        **kwargs: its keyword arguments.

    Raises:
        SystemExit: with the exit code, unless that is 0.

    Example:
        >>> def main():
        ...     print("trained")
        >>> run_main(main)
        trained
    """
    _validate.function(main=main)
    try:
        with _sigterm_raises():
            code = main(*args, **kwargs)
    except KeyboardInterrupt as error:
        _show(str(error) or _STOPPED)
        code = 143 if isinstance(error, _TerminatedError) else 130
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        _show(f"error: {' '.join(str(error).split()) or type(error).__name__}")
        code = 2
    except SystemExit as error:
        if not jax.distributed.is_initialized():
            raise
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if code and not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        code = 1
    if code and jax.distributed.is_initialized():
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _show(line: str) -> None:
    """The line on stderr, behind what is on stdout and, on request, the traceback."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    if os.environ.get("JDISTILL_DEBUG") == "1":
        traceback.print_exc()
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises `_TerminatedError` inside, and does what it did before outside."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread alone, and lets no other set handlers
        return

    def stop(*_: Any) -> None:
        raise _TerminatedError

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        with _ended_in_time():
            yield
    finally:
        # None: a handler that was not set from Python, and cannot be set back.
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


@contextlib.contextmanager
def _ended_in_time() -> Iterator[None]:
    """A thread that ends the process where SIGTERM has not ended the block in time.

    Python runs a handler between two of its own instructions, and a compilation is none. The
    number of a signal is written to a file at once, and the thread reads there.
    """
    global _watching
    heard, told = os.pipe()
    os.set_blocking(told, False)
    over = threading.Event()

    def watch() -> None:
        while received := os.read(heard, 1):
            if received[0] == signal.SIGTERM and not over.wait(_GRACE):
                _show(_STOPPED)
                os._exit(143)

    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="jdistill: SIGTERM", daemon=True)
    thread.start()
    outer, _watching = _watching, True
    try:
        yield
    finally:
        over.set()
        _watching = outer
        signal.set_wakeup_fd(before)
        os.close(told)
        thread.join()
        os.close(heard)
