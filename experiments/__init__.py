"""Runs that put the library together: parse, call the library, write a workdir."""

import sys
from types import TracebackType


def _quietly(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """No traceback for a Ctrl-C while the imports run; later ones are `runtime.run_main`'s."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped; nothing was begun", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


if sys.argv[:1] == ["-m"]:  # a program of this folder is being started, not imported
    sys.excepthook = _quietly
