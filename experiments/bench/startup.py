"""Import of the library in a fresh process, beside those of what it is made of."""

import dataclasses
import functools
import pathlib
import subprocess
import sys
from collections.abc import Iterator

from experiments.bench import timing
from experiments.bench.options import Options, command
from experiments.bench.rows import Row
from experiments.bench.timing import AfterCall

OURS, THEIRS = "import jdistill", "import jax, flax, optax"
MOST_ADDED = 0.3  # seconds
_ROOT = pathlib.Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Startup(Options):
    """Seconds of `import jdistill` alone, in fresh processes, against `import jax, flax, optax`."""


def run(options: Startup, after_call: AfterCall) -> Iterator[list[Row]]:
    """Rows of the command."""
    yield [compare(options, OURS, THEIRS, after_call)]


def compare(
    options: Startup, ours: str, theirs: str, after_call: AfterCall = lambda done, total: None
) -> Row:
    """Row of two statements; the target is the ratio at which 0.3 s are added.

    Args:
        options: the repeats.
        ours: a statement.
        theirs: another.
        after_call: told how many processes are done, of how many.
    """
    spent = 0.0  # the statements' own seconds, without those that Python takes to start

    def call(statement: str) -> None:
        nonlocal spent
        spent += seconds_in_a_fresh_process(statement)

    calls = {statement: functools.partial(call, statement) for statement in (theirs, ours)}
    timed = timing.interleaved(
        calls, repeats=options.repeats, after_call=after_call, clock=lambda: spent
    )
    median = timed.timings[theirs].median
    return Row(
        ours,
        timed.timings[ours],
        theirs,
        timed.timings[theirs],
        command(options),
        target=1 + MOST_ADDED / median,
        compiles=False,
        facts={"added_s": timed.timings[ours].median - median},
    )


def seconds_in_a_fresh_process(statement: str) -> float:
    """Seconds of a statement in a new Python."""
    program = f"import time; start = time.perf_counter(); {statement}; "
    program += "print(time.perf_counter() - start)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=_ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout.split()[-1])
