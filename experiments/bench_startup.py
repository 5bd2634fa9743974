"""What `python -m experiments.bench startup` times: `import jdistill` in a fresh process."""

import pathlib
import subprocess
import sys
from collections.abc import Callable

from experiments import timing
from experiments.bench_rows import BenchRow
from experiments.timing import Timed

OURS, THEIRS = "import jdistill", "import jax, flax, optax"
_ROOT = pathlib.Path(__file__).parents[1]
_MOST_ADDED = 0.3  # seconds


def compare(
    *,
    repeats: int,
    after_call: Callable[[int, int], None] = lambda done, total: None,
    import_seconds: Callable[[str], float] | None = None,
) -> Timed:
    """Time the imports, each in processes of its own, in turn.

    Args:
        repeats: timed processes of each, after one that fills the system's file cache.
        after_call: told how many processes are done, of how many.
        import_seconds: of a statement; by default in a fresh process.
    """
    measure = import_seconds or seconds_in_a_fresh_process
    spent = 0.0  # the processes' own seconds, without those that Python takes to start

    def call(statement: str) -> Callable[[], None]:
        def run() -> None:
            nonlocal spent
            spent += measure(statement)

        return run

    return timing.interleaved(
        {statement: call(statement) for statement in (THEIRS, OURS)},
        repeats=repeats,
        after_call=after_call,
        clock=lambda: spent,
    )


def rows(timed: Timed) -> list[BenchRow]:
    """Of what `compare` gave; the target is the ratio at which 0.3 s are added."""
    ours, theirs = timed.timings[OURS], timed.timings[THEIRS]
    added = ours.median - theirs.median
    return [
        BenchRow(
            OURS,
            ours,
            THEIRS,
            theirs,
            target=1 + _MOST_ADDED / theirs.median,
            compiles=False,
            note=f"adds {added:.3f} s; the target is the ratio of {_MOST_ADDED} s",
        )
    ]


def seconds_in_a_fresh_process(statement: str) -> float:
    """How long a statement takes in a new Python."""
    program = f"import time; start = time.perf_counter(); {statement}; "
    program += "print(time.perf_counter() - start)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=_ROOT, check=True, stdout=subprocess.PIPE, text=True
    )
    return float(done.stdout.split()[-1])
