"""The bench on the oldest supported versions, the pinned ones, and the newest, side by side.

    python -m experiments.bench.lanes
    python -m experiments.bench.lanes --num-rounds 5 --json runs/bench-lanes.json
    python -m experiments.bench.lanes --read runs/bench-lanes.json

The commands of `experiments.bench` that are cheap and typical, each in a fresh process of each
lane's virtual environment (`make bench-lanes` makes all three) by turns, for several rounds, so
that what disturbs the machine disturbs all lanes alike. Nothing is read from a compilation cache.
"""

import dataclasses
import itertools
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tyro

from experiments.bench import options as bench_options
from experiments.bench.rows import table
from jdistill import runtime

LANES = {"floor": ".venv-floor", "pinned": ".venv", "newest": ".venv-newest"}
BASE = "pinned"
COMMANDS = (
    "startup --repeats 1",
    "train --num-steps 5 --repeats 3 --no-peers",
    "attacks --attacks pgd carlini_wagner_l2 --batch-size 10 --repeats 2 --no-peers --no-long",
    "sweep --num-temperatures 3 --num-steps 4 --width 0.5 --repeats 2",
)
_ROOT = pathlib.Path(__file__).parents[2]

# By round and by lane, the rows of all commands as `--json` has them.
Rounds = list[dict[str, list[dict[str, Any]]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lanes:
    """Bench on all lanes: seconds, and apart from them seconds of compiling, a column a lane."""

    num_rounds: int = 3
    """Processes of each command in each lane; shown are the medians of their medians."""
    json: str | None = None
    """File ending in .json that gets all rows, by round and lane, anew after each process."""
    read: str | None = None
    """Such a file, to make the table of and run nothing."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        bench_options.check(self)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run, and print the table."""
    options = tyro.cli(
        Lanes, prog="python -m experiments.bench.lanes", description=__doc__, args=arguments
    )
    if options.read is not None:
        print(text(json.loads(pathlib.Path(options.read).read_text())), end="")
        return
    file = None if options.json is None else pathlib.Path(options.json).expanduser()
    if file is not None:
        runtime.check_writable(file.parent, remedy="choose another --json")
    rounds: Rounds = []
    try:
        for rounds in run(options.num_rounds, rows_of):
            if file is not None:
                runtime.write_json(file, rounds)
    except KeyboardInterrupt as error:
        error.args = (
            "stopped; the table is of what was done, a new run starts from the beginning",
        )
        raise
    finally:
        if rounds:
            print(text(rounds), end="")


def run(num_rounds: int, rows_of: Callable[[str, str], list[dict[str, Any]]]) -> Iterator[Rounds]:
    """All rows so far, anew after each process.

    Args:
        num_rounds: how often each command runs in each lane.
        rows_of: of a lane and a command.
    """
    rounds: Rounds = []
    for number in range(num_rounds):
        rounds.append({lane: [] for lane in LANES})
        for command in COMMANDS:
            for lane in LANES:
                print(f"round {number + 1} of {num_rounds}: {lane}, {command}", file=sys.stderr)
                rounds[-1][lane] += rows_of(lane, command)
                yield rounds


def rows_of(lane: str, command: str) -> list[dict[str, Any]]:
    """Rows of a command in a process of a lane.

    Raises:
        FileNotFoundError: the lane has no environment.
        RuntimeError: the process failed.
    """
    python = _ROOT / LANES[lane] / "bin" / "python"
    if not python.exists():
        raise FileNotFoundError(
            f"expected the {lane} versions in {LANES[lane]}, got no {python}; run make bench-lanes"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.json"
        line = [str(python), "-m", "experiments.bench", *shlex.split(command)]
        done = subprocess.run(
            [*line, "--json", str(path)], cwd=_ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(
                f"expected {command} to run in {LANES[lane]}, got {done.stderr[-2000:]}"
            )
        return json.loads(path.read_text())


# -------------------------------------------------------------------------------------------------
# The table


def text(rounds: Rounds) -> str:
    """Markdown of the lanes and the table: a row per work, a column per lane."""
    others = [lane for lane in LANES if lane != BASE]
    head = ["what", *(f"{lane} s" for lane in LANES), *(f"{lane} / {BASE}" for lane in others)]
    cells = []
    for name, lanes in merged(rounds).items():
        medians = {lane: statistics.median(seconds) for lane, seconds in lanes.items()}
        ratios = [
            f"{medians[lane] / medians[BASE]:.2f}"
            if medians.get(lane) and medians.get(BASE)
            else "–"
            for lane in others
        ]
        cells.append([name, *(_seconds(lanes.get(lane, ())) for lane in LANES), *ratios])
    return f"{_conditions(rounds)}\n{table(head, cells)}"


def merged(rounds: Rounds) -> dict[str, dict[str, list[float]]]:
    """Seconds by work, by lane, one a round: first those of the calls, then those of compiling.

    A peer that is timed, such as the runs of a sweep one at a time, is a work of its own.
    """
    calls: dict[str, dict[str, list[float]]] = {}
    compiling: dict[str, dict[str, list[float]]] = {}
    for one in rounds:
        for lane, rows in one.items():
            for name, seconds, compile_s in _works(rows):
                calls.setdefault(name, {}).setdefault(lane, []).append(seconds)
                if compile_s is not None:
                    found = compiling.setdefault(f"compiling: {name}", {})
                    found.setdefault(lane, []).append(compile_s)
    return calls | compiling


def _works(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, float, float | None]]:
    """Name, seconds, and seconds of compiling of ours, and of a peer after its last row."""
    for peer, beside in itertools.groupby(rows, lambda row: row["peer"]):
        for row in beside:
            yield row["name"], row["ours_s"], row["compile_s"]
        if row["theirs_s"] is not None:
            yield peer, row["theirs_s"], row["theirs_compile_s"]


def _seconds(seconds: Sequence[float]) -> str:
    if not seconds:
        return "–"
    return f"{statistics.median(seconds):.3g} ({min(seconds):.3g}–{max(seconds):.3g})"


def _conditions(rounds: Rounds) -> str:
    """A line per lane with its versions and flags, and one of what the columns are."""
    lines = []
    for lane in LANES:
        rows = [row for one in rounds for row in one.get(lane, ())]
        if rows:
            versions = rows[0]["versions"]
            shown = ("python", "jax", "jaxlib", "flax")
            names = ", ".join(f"{name} {versions[name]}" for name in shown if name in versions)
            flags = sorted({row["xla_flags"] for row in rows if row["xla_flags"]})
            lines.append(f"{lane}: {names}; {f'`{flags[0]}`' if flags else 'no flags'}")
    every = [row for one in rounds for rows in one.values() for row in rows]
    loads = [row["load"] for row in every if row["load"] is not None]
    if loads:
        between = f"load before the processes {min(loads):.1f} to {max(loads):.1f}"
        lines.append(f"{every[0]['device']}; {between}")
    lines.append(
        f"medians, and ranges, over {len(rounds)} round(s) of fresh processes by turns; ratios are "
        "those of the medians"
    )
    return "".join(f"* {line}\n" for line in lines)


if __name__ == "__main__":
    runtime.run_main(main)
