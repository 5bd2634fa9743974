"""Progress of the library's loops, out of their events: what, how far, time left."""

import sys
import time
from collections.abc import Mapping
from typing import Any

_PLAIN_SECONDS = 30.0


class Progress:
    """A callback with one bar, and lines above it; see `progress`."""

    def __init__(self) -> None:
        self.prefix = ""
        self._bar: Any = None
        self._stage: str | None = None
        self._started = self._told = 0.0
        self._terminal = sys.stderr.isatty()
        if self._terminal:
            try:
                import tqdm  # noqa: F401
            except ModuleNotFoundError:
                self._terminal = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show where the event's stage stands; events without a count end it."""
        done, total = _count(event)
        if total is None:
            self.close()
            return
        stage = self.prefix + event["stage"]
        if "num_stages" in event:
            stage = f"{event['stage_number']}/{event['num_stages']} {stage}"
        if stage != self._stage:
            self.close()
            self._stage, self._started, self._told = stage, time.monotonic(), time.monotonic()
            if self._terminal:
                self._open(event, done, total)
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(done - self._bar.n)
            if event["event"] == "epoch":
                shown = {"loss": f"{event['loss']:.4f}", "acc": f"{event['accuracy']:.4f}"}
                self._bar.set_postfix(shown)
        elif time.monotonic() - self._told > _PLAIN_SECONDS and done < total:
            self._told = time.monotonic()
            self._line(f"{stage}: {done} of {total}")
        if done >= total and event["event"] != "step":
            self.close()

    def close(self) -> None:
        """End the stage, if there is one."""
        if self._bar is not None:
            self._bar.close()
        elif self._stage is not None:
            self._line(f"{self._stage}: {time.monotonic() - self._started:.1f} s")
        self._bar = self._stage = None

    def say(self, line: str) -> None:
        """Print a line without breaking a bar."""
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            self._line(line)

    def _line(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def _open(self, event: Mapping[str, Any], done: int, total: int) -> None:
        from tqdm import tqdm

        self._bar = tqdm(
            total=total,
            # A resumed stage starts where it stopped, or the time left would be nonsense.
            initial=done - 1 if event["event"] == "step" else 0,
            desc=f"{self._stage:<28}",
            unit=event.get("unit", "step" if event["event"] == "step" else "ex"),
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5,
        )


def _count(event: Mapping[str, Any]) -> tuple[int, int | None]:
    if event["event"] in ("step", "epoch"):
        return event["step"], event["num_steps"]
    return event.get("done", 0), event.get("total")


def progress() -> Progress:
    """A progress bar for any callback of the library.

    On a terminal a bar with the stage, how far it is, and the time left (with tqdm); elsewhere a
    plain line per stage, and one every half a minute of a long one. `say(line)` prints a line
    beside it, and `prefix` is put before each stage's name.

    Returns:
        A context manager that is the callback.

    Example:
        >>> with progress() as bar:
        ...     for done in range(3):
        ...         bar({"event": "evaluate", "stage": "pgd", "done": done + 1, "total": 3})
    """
    return Progress()
