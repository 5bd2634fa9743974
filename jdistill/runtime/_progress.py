"""Progress of the library's loops, out of their events: what, how far, time left."""

import sys
import time
from typing import Any, NamedTuple

from jdistill.typing import Event

_PLAIN_SECONDS = 30.0
_WORTH_A_LINE = 1.0  # of what is read from disk there would be many
_OVER_STAGES = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"
# A notebook's output has no width of its own, and each change of the bar is a message to it.
_IN_A_CELL = "{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
_CELL_OPTIONS = {"bar_format": _IN_A_CELL, "ncols": 88, "mininterval": 0.5}


def _in_notebook() -> bool:
    """Whether output goes to the cells of a notebook (Jupyter, Colab)."""
    ipython: Any = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


class Progress:
    """A callback with one bar, and lines above it; see `progress`."""

    def __init__(self) -> None:
        self.prefix = ""
        self._place: _Place | None = None
        self._bar: Any = None
        self._stage: str | None = None
        self._started = self._told = 0.0
        self._notebook = _in_notebook()
        # In a notebook stderr is a red box, and it is kept with the results.
        self._file = sys.stdout if self._notebook else sys.stderr
        self._terminal = self._notebook or sys.stderr.isatty()
        if self._terminal:
            try:
                import tqdm  # noqa: F401
            except ModuleNotFoundError:
                self._terminal = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: Any) -> None:
        if self._notebook and self._bar is not None and error is None:
            self._bar.bar_format = _IN_A_CELL.replace("<{remaining}", "")
            self._bar.set_description_str(f"{'done':<36}", refresh=False)
        self.close()

    def __call__(self, event: Event) -> None:
        """Show where the event's stage stands; events without a count end it."""
        done, total = _count(event)
        if total is None:
            self._end_stage()
            return
        stage = self.prefix + event["stage"]
        if self._place is not None:
            stage = f"{self._place.number}/{self._place.num_stages} {stage}"
            self._place.part(event["stage"])
        if stage != self._stage:
            self._end_stage()
            self._stage, self._started, self._told = stage, time.monotonic(), time.monotonic()
        if self._terminal:
            self._show(event, done, total)
        elif time.monotonic() - self._told > _PLAIN_SECONDS and done < total:
            self._told = time.monotonic()
            self._line(f"{stage}: {done} of {total}")
        if done >= total and event["event"] != "step":
            self._end_stage()

    def begin(
        self, number: int, num_stages: int | None = None, *, prefix: str = "", num_parts: int = 1
    ) -> None:
        """Begin stage `number`, from 1, which has parts that their `stage`s name.

        With a `prefix` it is the stage that has a line of its own without a terminal; without one
        each part has.
        """
        self._end_place()
        self.prefix = prefix
        if num_stages is not None:
            self._place = _Place(number, num_stages, num_parts, [], time.monotonic())

    def close(self) -> None:
        """End the bar and the stage, if there is one."""
        self._end_place()
        self._place = None
        self._end_stage(last=True)

    def say(self, line: str) -> None:
        """Print a line without breaking a bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._file)
        else:
            self._line(line)

    def _end_stage(self, *, last: bool = False) -> None:
        """A bar over many stages stays from one to the next, as any bar of a notebook."""
        stays = self._place is not None or (self._notebook and not last)
        if self._bar is not None and not stays:
            self._bar.close()
            self._bar = None
        if self._stage is not None and not (self.prefix and self._place):
            self._tell(self._stage, self._started)
        self._stage = None

    def _end_place(self) -> None:
        """Tell of the stage whose parts had no lines of their own."""
        if self._place is not None and self.prefix and self._place.parts:
            name = f"{self._place.number}/{self._place.num_stages} {self.prefix.rstrip(', ')}"
            self._tell(name, self._place.started)

    def _tell(self, name: str, started: float) -> None:
        """A line without a terminal, for what took long enough."""
        seconds = time.monotonic() - started
        if not self._terminal and seconds >= _WORTH_A_LINE:
            self._line(f"{name}: {seconds:.1f} s")

    def _line(self, text: str) -> None:
        print(text, file=self._file, flush=True)

    def _show(self, event: Event, done: int, total: int) -> None:
        """Set the bar, which is over all stages where it is known how many there are."""
        from tqdm import tqdm

        shown = {}
        if event["event"] == "epoch" and "runs" not in event:
            shown = {"loss": f"{event['loss']:.4f}", "acc": f"{event['accuracy']:.4f}"}
        position: float = done
        options: dict[str, Any] = {"unit": "step" if event["event"] == "step" else "ex"}
        if self._place is not None:
            position = self._place.position(done / total)
            shown = {"this": f"{done}/{total}", **shown}
            options = {"bar_format": _OVER_STAGES}
            total = self._place.num_stages
        elif self._notebook:
            self._rewind(done, total)
        if "unit" in event:
            options["unit"] = event["unit"]
        if self._bar is None:
            # What was resumed starts where it stopped, or the time left would be nonsense.
            first = position if self._place else done - (event["event"] == "step")
            self._bar = tqdm(
                total=total,
                initial=first,
                file=self._file,
                **(_CELL_OPTIONS if self._notebook else {"dynamic_ncols": True, **options}),
            )
        width = 36 if self._notebook else 28
        self._bar.set_description_str(f"{self._stage:<{width}}", refresh=False)
        if shown:
            self._bar.set_postfix(shown, refresh=False)
        self._bar.total = total
        self._bar.update(max(0.0, position - self._bar.n))

    def _rewind(self, done: int, total: int) -> None:
        """Let the bar of one stage serve the next; its time is that of all."""
        if self._bar is not None and (done < self._bar.n or total != self._bar.total):
            started = self._bar.start_t
            self._bar.reset(total)
            self._bar.start_t = started


class _Place(NamedTuple):
    """Where among stages it is, and the parts of this one so far."""

    number: int
    num_stages: int
    num_parts: int
    parts: list[str]
    started: float

    def part(self, name: str) -> None:
        """A part is at work."""
        if name not in self.parts:
            self.parts.append(name)

    def position(self, share: float) -> float:
        """Stages that are behind, with what is done of the last part."""
        within = (len(self.parts) - 1 + share) / self.num_parts
        return self.number - 1 + min(within, 1.0)


def _count(event: Event) -> tuple[int, int | None]:
    if event["event"] in ("step", "epoch"):
        return event["step"], event["num_steps"]
    return event.get("done", 0), event.get("total")


def progress() -> Progress:
    """A progress bar for any callback of the library.

    On a terminal a bar with the stage, how far it is, and the time left (with tqdm); elsewhere a
    plain line per stage that took a second, and one every half a minute of a long one. Of a study
    it is one bar over all stages, and in a notebook, on stdout, one for whatever comes. `say(line)`
    prints a line beside it, and `prefix` is put before each stage's name.

    Returns:
        A context manager that is the callback.

    Example:
        >>> with progress() as bar:
        ...     for done in range(3):
        ...         bar({"event": "evaluate", "stage": "pgd", "done": done + 1, "total": 3})
    """
    return Progress()
