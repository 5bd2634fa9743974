"""Expectations of the TPU compiler of our steps, written one way and another; no TPU is needed.

    python -m experiments.tpu_view
    python -m experiments.tpu_view --steps sweep --num-runs 9
    python -m experiments.tpu_view --json runs/tpu-view.json

Compiles ahead of time for one chip (v5e:1x1) with the compiler in the package `libtpu`, which has
to be installed beside JAX. It is that compiler's estimate and no measurement: nothing is run.
"""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import tyro

from experiments.bench import lowerings
from experiments.bench.lowerings import LOWERINGS, PRECISIONS, Lowering, Step, StepName
from experiments.bench.options import check, command
from experiments.bench.rows import Row, record, text
from experiments.bench.timing import Timing
from jdistill import runtime
from jdistill.runtime import tpu
from jdistill.runtime.tpu import Estimate
from jdistill.typing import Event

_TOPOLOGY = "v5e:1x1"
ESTIMATE = (
    "the TPU compiler's estimate for one v5e chip and not a measurement: nothing was run on a TPU"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Steps to compile, and their sizes."""

    steps: tuple[StepName, ...] = ("training", "sweep", "pgd")
    """Steps."""
    num_runs: int = 27
    """Runs of the sweep's step, stacked under `vmap`."""
    batch_size: int = 128
    """Images per step, of each run."""
    width: float = 1.0
    """Of the papers' MNIST network: a factor on every number of channels and hidden units."""
    json: str | None = None
    """File ending in .json that gets the rows as a list, with the keys of `experiments.bench`,
    where seconds are the compiler's."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        check(self)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    tpu.check_compiler()
    # The host's own backend; the compiler for TPU is asked for by name.
    jax.config.update("jax_platforms", "cpu")
    run(options)


def parse(arguments: Sequence[str]) -> Options:
    """Options of a command line; `--help` explains each."""
    program = "python -m experiments.tpu_view"
    return tyro.cli(Options, prog=program, description=__doc__, args=list(arguments))


def run(options: Options) -> None:
    """Compile everything, print the table, and write the rows where asked to."""
    file = None if options.json is None else pathlib.Path(options.json).expanduser()
    if file is not None:
        runtime.check_writable(file.parent, remedy="choose another --json")
    device = tpu.topology(_TOPOLOGY).devices[0]
    found = estimates(options, lambda step: compiled(step, device))
    rows = [row for name in found for row in compared(options, name, found[name])]
    versions = tpu.versions()
    shown = ", ".join(f"{name} {version}" for name, version in versions.items())
    print(
        f"* This is {ESTIMATE}.\n* {shown}\n* seconds: the least that each operation takes by its"
    )
    print("  operations and bytes, added up; cycles: estimates for what was scheduled, added up\n")
    print(text(rows), end="")
    if file is not None:
        shared = {"device": f"{device.device_kind}, {_TOPOLOGY}, not run", "versions": versions}
        runtime.write_json(file, [record(row, shared) for row in rows])


def estimates(
    options: Options, compile_: Callable[[Step], Estimate]
) -> dict[StepName, list[tuple[Lowering, Estimate]]]:
    """Estimates of every lowering, by step.

    Args:
        options: which.
        compile_: gives the estimate of a step.
    """
    found: dict[StepName, list[tuple[Lowering, Estimate]]] = {}
    sizes = {name: getattr(options, name) for name in ("width", "batch_size", "num_runs")}
    with runtime.progress() as progress:
        for name in options.steps:
            ways = (*LOWERINGS, *(PRECISIONS if name == "pgd" else ()))
            event: Event = {"event": "call", "stage": name, "total": len(ways), "unit": "program"}
            found[name] = []
            for done, lowering in enumerate(ways, start=1):
                progress({**event, "done": done - 1})
                step = lowerings.step(name, lowering, **sizes)
                found[name].append((lowering, compile_(step)))
                progress({**event, "done": done})
    return found


def compiled(step: Step, device: Any) -> Estimate:
    """Estimate of a step by the compiler, on a device that need not be there."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        step.arguments,
    )
    found = tpu.compiled(jax.jit(step.call), *arguments)
    if math.isnan(found.seconds):
        raise RuntimeError(
            "expected seconds of the compiler, got none; use the libtpu that jax[tpu] asks for"
        )
    return found


def compared(
    options: Options, name: StepName, found: Sequence[tuple[Lowering, Estimate]]
) -> list[Row]:
    """Rows of a step, each lowering beside the first; with loops there is no ratio.

    Args:
        options: of the program.
        name: of the step.
        found: of each lowering.
    """
    title = {
        "training": "training step",
        "sweep": f"sweep step, {options.num_runs} runs",
        "pgd": "PGD step",
    }[name]
    first = found[0][1]
    rows = []
    for lowering, one in found:
        note = ""
        if one.loops:
            note = f"has {one.loops} loops, whose bodies are counted once: too low"
        elif one is not first and one == first:
            note = "the same program as the first"
        looped = one.loops or first.loops
        facts = {
            "GFLOP": one.flops / 1e9,
            "MB_accessed": one.bytes / 1e6,
            "Mcycles": one.cycles / 1e6,
            "cycles_ratio": one.cycles / first.cycles if first.cycles and not looped else None,
            "MB_on_the_chip": one.memory / 1e6,
            "same_program": one == first,
        }
        rows.append(
            Row(
                f"{title}: {lowering.name}",
                Timing(0.0, (one.seconds,)),
                LOWERINGS[0].name,
                None if looped else Timing(0.0, (first.seconds,)),
                command(options, program="experiments.tpu_view", steps=(name,)),
                compiles=False,
                note=note,
                facts=facts,
            )
        )
    return rows


if __name__ == "__main__":
    runtime.run_main(main)
