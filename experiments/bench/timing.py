"""Timing of calls beside each other, on a machine that is never quite at rest."""

import statistics
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

Calls = Mapping[str, Callable[[], Any]]
AfterCall = Callable[[int, int], None]  # told how many calls are done, of how many


class Timing(NamedTuple):
    """Seconds of one call, over and over.

    Attributes:
        first: of the first call, which also imports, traces and compiles; 0 for seconds that were
            computed and not timed.
        warm: of the calls that count.
    """

    first: float
    warm: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median of the calls that count."""
        return statistics.median(self.warm)

    @property
    def extra(self) -> float:
        """Seconds of the first call beyond the median: for JAX, tracing and compiling."""
        return max(self.first - self.median, 0.0)


class Timed(NamedTuple):
    """Result of `interleaved`.

    Attributes:
        timings: by name.
        results: of each first call, by name.
        failures: by name, why a call could not be made.
    """

    timings: dict[str, Timing]
    results: dict[str, Any]
    failures: dict[str, str]


def interleaved(
    calls: Calls,
    *,
    repeats: int,
    optional: Collection[str] = (),
    slow_seconds: float = float("inf"),
    after_call: AfterCall = lambda done, total: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Timed:
    """Time calls in turn, so that what disturbs the machine disturbs all of them alike.

    Each is called once to warm up, then all of them in order, `repeats` times.

    Args:
        calls: by name; each returns when its work is done.
        repeats: calls of each that count.
        optional: names of calls that do not compile and may fail: an exception of their first
            call is noted and not raised, and a first call of more than `slow_seconds` is the only.
        slow_seconds: see `optional`.
        after_call: told how many calls are done, of how many.
        clock: seconds.
    """
    first: dict[str, float] = {}
    warm: dict[str, list[float]] = {}
    results: dict[str, Any] = {}
    failures: dict[str, str] = {}
    again, done, total = list(calls), 0, len(calls) * (1 + repeats)

    def timed(name: str) -> tuple[float, Any]:
        started = clock()
        result = calls[name]()
        return clock() - started, result

    for name in calls:
        after_call(done, total)
        try:
            first[name], results[name] = timed(name)
        except Exception as error:
            if name not in optional:
                raise
            failures[name] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        once = name in optional and first.get(name, 0.0) > slow_seconds
        warm[name] = [first[name]] if once else []
        if once or name in failures:
            again.remove(name)
            total -= repeats
        done += 1
    for _ in range(repeats):
        for name in again:
            after_call(done, total)
            warm[name].append(timed(name)[0])
            done += 1
    after_call(done, total)
    timings = {name: Timing(first[name], tuple(warm[name])) for name in first}
    return Timed(timings, results, failures)
