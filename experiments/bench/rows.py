"""Rows that every command of the bench ends in, as JSON and as one table in Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.bench.timing import Timing


class Row(NamedTuple):
    """Work that both sides do, and the seconds that it takes each.

    Attributes:
        name: of the work.
        ours: seconds of our calls.
        peer: who else does it.
        theirs: seconds of the peer's calls; None where there are none.
        command: that makes this row.
        each: units of the work (steps, …) per call.
        target: the largest ratio that is wanted; None for no such wish.
        compiles: whether our first call compiles.
        peer_compiles: whether the peer's does.
        note: what else there is to say, such as why there is no peer.
        facts: what was found, as JSON holds it; a list is ours and the peer's.
    """

    name: str
    ours: Timing
    peer: str
    theirs: Timing | None
    command: str = ""
    each: int = 1
    target: float | None = None
    compiles: bool = True
    peer_compiles: bool = False
    note: str = ""
    facts: Mapping[str, Any] = {}

    @property
    def ours_s(self) -> float:
        """Median seconds of ours."""
        return self.ours.median / self.each

    @property
    def theirs_s(self) -> float | None:
        """Median seconds of the peer's."""
        return None if self.theirs is None else self.theirs.median / self.each

    @property
    def ratio(self) -> float | None:
        """Median of ours over the peer's."""
        return None if self.theirs is None else self.ours.median / self.theirs.median

    @property
    def compile_s(self) -> float | None:
        """Seconds of our first call beyond the median, where it compiles."""
        return self.ours.extra if self.compiles else None

    @property
    def theirs_compile_s(self) -> float | None:
        """Seconds of the peer's first call beyond the median, where it compiles."""
        return self.theirs.extra if self.theirs and self.peer_compiles else None


def record(row: Row, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Row as JSON holds it, with the keys that the rows of every command have.

    Args:
        row: the row.
        conditions: `device`, `versions`, `xla_flags` and the like, for every row the same.
    """

    def extremes(timing: Timing | None) -> list[float] | None:
        return timing and [min(timing.warm) / row.each, max(timing.warm) / row.each]

    return {
        "name": row.name,
        "ours_s": row.ours_s,
        "theirs_s": row.theirs_s,
        "peer": row.peer,
        "ratio": row.ratio,
        "target": row.target,
        "compile_s": row.compile_s,
        "theirs_compile_s": row.theirs_compile_s,
        "ours_range_s": extremes(row.ours),
        "theirs_range_s": extremes(row.theirs),
        "repeats": len(row.ours.warm),
        "facts": dict(row.facts),
        "note": row.note,
        "command": row.command,
        **conditions,
    }


def text(rows: Sequence[Row]) -> str:
    """Table of the rows in Markdown, without the columns that nothing is in, and their notes."""
    facts = list(dict.fromkeys(name for row in rows for name in row.facts))
    head = ["what", "jdistill s", "peer s", "peer", "ratio", "target", "compile s"]
    head += [*(name.replace("_", " ") for name in facts), "command"]
    cells = [
        [
            row.name,
            seconds(row.ours, row.each),
            "–" if row.theirs is None else seconds(row.theirs, row.each),
            row.peer,
            "–" if row.ratio is None else f"{row.ratio:.2f}",
            "–" if row.target is None else f"{row.target:.3g}",
            _cell([s for s in (row.compile_s, row.theirs_compile_s) if s is not None], ".1f"),
            *(_cell(row.facts.get(name)) for name in facts),
            f"`{row.command}`" if row.command else "–",
        ]
        for row in rows
    ]
    columns = zip(head, *cells, strict=True)
    used = [column for column in columns if set(column[1:]) != {"–"}]
    notes = dict.fromkeys(
        f"* {f'{row.name}: ' if row.theirs else ''}{row.peer}: {row.note}\n"
        for row in rows
        if row.note
    )
    (shown, *lines) = zip(*used, strict=True)
    return "\n".join(part for part in (table(shown, lines), "".join(notes)) if part)


def seconds(timing: Timing, each: int = 1) -> str:
    """Median and range of the calls; seconds that were computed have none."""
    if timing.first == 0:
        return f"{timing.median / each:.3g}"
    low, high = min(timing.warm) / each, max(timing.warm) / each
    between = "1 call" if len(timing.warm) == 1 else f"{low:.3g}–{high:.3g}"
    return f"{timing.median / each:.3g} ({between})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown table whose columns are straight as plain text, too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    )
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)


def _cell(fact: Any, form: str = ".3g") -> str:
    if isinstance(fact, list | tuple):
        return " / ".join(_cell(part, form) for part in fact) or "–"
    if fact is None:
        return "–"
    return format(fact, form) if isinstance(fact, float) else str(fact)
