"""How a program starts and ends: signals, exit codes, errors in one line."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from jdistill import _validate

_STOPPED = "stopped; run the same command again to go on"


class _TerminatedError(KeyboardInterrupt):
    """SIGTERM, as an exception: whatever cleans up after Ctrl-C cleans up after this as well."""


def run_main(main: Callable[..., int | None], *args: Any, **kwargs: Any) -> None:
    """Runs a program's main function and ends the process as a command should end.

    | `main` | exit code | on stderr |
    |---|---|---|
    | returns None or 0 | 0: `run_main` returns | |
    | returns another number | that number | |
    | is stopped by Ctrl-C / by SIGTERM | 130 / 143 | how to go on, or the exception's own text |
    | raises ValueError, OSError, FloatingPointError or ImportError | 2 | `error: …`, one line |
    | raises anything else | 1 | the traceback: a bug |

    With `JDISTILL_DEBUG=1` in the environment, the third and fourth show their traceback first.

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
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
