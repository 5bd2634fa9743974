"""What every command of `experiments.bench` ends in: rows of ours beside a peer's, and tables."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments.timing import Timing


class BenchRow(NamedTuple):
    """One thing that both sides do, and how long it takes each.

    Attributes:
        row: what is done.
        ours: the seconds of our calls.
        peer: who else does it.
        theirs: the seconds of the peer's calls; None where there are none.
        each: how many of what `row` names (steps, …) a call does.
        target: the largest ratio that is wanted; None for no such wish.
        compiles: whether our first call compiles.
        peer_compiles: whether the peer's does.
        note: what else there is to say, such as why there is no peer.
    """

    row: str
    ours: Timing
    peer: str
    theirs: Timing | None
    each: int = 1
    target: float | None = None
    compiles: bool = True
    peer_compiles: bool = False
    note: str = ""

    @property
    def ours_s(self) -> float:
        """Our median seconds."""
        return self.ours.median / self.each

    @property
    def theirs_s(self) -> float | None:
        """The peer's median seconds."""
        return None if self.theirs is None else self.theirs.median / self.each

    @property
    def ratio(self) -> float | None:
        """Our median over the peer's."""
        return None if self.theirs is None else self.ours.median / self.theirs.median


def record(row: BenchRow, conditions: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able: the row, and what it depends on.

    Args:
        row: the row.
        conditions: `device`, `versions`, `xla_flags` and the like, for every row the same.
    """

    def extremes(timing: Timing | None) -> list[float] | None:
        return timing and [min(timing.warm) / row.each, max(timing.warm) / row.each]

    return {
        "row": row.row,
        "ours_s": row.ours_s,
        "theirs_s": row.theirs_s,
        "peer": row.peer,
        "ratio": row.ratio,
        "target": row.target,
        "compile_s": row.ours.extra if row.compiles else None,
        "theirs_compile_s": row.theirs.extra if row.theirs and row.peer_compiles else None,
        "ours_range_s": extremes(row.ours),
        "theirs_range_s": extremes(row.theirs),
        "repeats": len(row.ours.warm),
        "note": row.note,
        **conditions,
    }


def text(rows: Sequence[BenchRow]) -> str:
    """The rows in Markdown, and their notes."""
    cells = []
    for row in rows:
        compiling = [f"{row.ours.extra:.1f}"] if row.compiles else []
        if row.theirs is not None and row.peer_compiles:
            compiling.append(f"{row.theirs.extra:.1f}")
        cells.append(
            [
                row.row,
                seconds(row.ours, row.each),
                "–" if row.theirs is None else seconds(row.theirs, row.each),
                row.peer,
                "–" if row.ratio is None else f"{row.ratio:.2f}",
                "–" if row.target is None else f"{row.target:.3g}",
                " / ".join(compiling) or "–",
            ]
        )
    head = ["what", "jdistill s", "peer s", "peer", "ratio", "target", "compile s"]
    notes = dict.fromkeys(
        f"* {f'{row.peer} is missing' if row.theirs is None else row.row}: {row.note}\n"
        for row in rows
        if row.note
    )
    return "\n".join(part for part in (table(head, cells), "".join(notes)) if part)


def seconds(timing: Timing, each: int = 1) -> str:
    """The median, and from where to where the calls went."""
    low, high = min(timing.warm) / each, max(timing.warm) / each
    between = "1 call" if len(timing.warm) == 1 else f"{low:.3g}–{high:.3g}"
    return f"{timing.median / each:.3g} ({between})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are straight as plain text, too."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = (
        [cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines
    )
    return "".join(f"| {' | '.join(line)} |\n" for line in padded)
