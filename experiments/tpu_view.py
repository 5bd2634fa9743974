"""What the TPU compiler expects of our steps, lowered one way and another; no TPU is needed.

    python -m experiments.tpu_view
    python -m experiments.tpu_view --steps sweep --num-runs 9
    python -m experiments.tpu_view --json runs/tpu-view.json

Compiles ahead of time for one chip (v5e:1x1) with the compiler in the package `libtpu`, which has
to be installed beside JAX. It is that compiler's estimate and no measurement: nothing is run.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import tyro
from jax.experimental import topologies

from experiments import lowerings
from experiments.bench.options import check, command
from experiments.bench.rows import table
from experiments.lowerings import LOWERINGS, PRECISIONS, Step, StepName
from experiments.progress import Progress
from jdistill import runtime

_TOPOLOGY = "v5e:1x1"
# The shape, a tuple's too, and the operation.
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%\S+ = ((?:\(.*?\)|\S+) [\w-]+)\(", re.MULTILINE)
# So that libtpu does not ask a cloud's metadata which TPU this is, nor insist on being the only
# process that has it: there is no device to share.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}
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


class Estimate(NamedTuple):
    """Estimate of a program by the compiler.

    Attributes:
        flops: floating-point operations.
        bytes: from and to memory, and between operations.
        optimal_seconds: the sum over the operations of what each takes at least; None where the
            compiler has none.
        cycles: the sum of its schedule's estimates for each operation, which, unlike the seconds,
            grow with the passes that a precision takes.
        memory: bytes on the chip: arguments, outputs and temporaries.
        loops: loops in the program; the body of each is counted once.
        instructions: how many there are of each operation and shape.
        compile_s: seconds that compiling took.
    """

    flops: float
    bytes: float
    optimal_seconds: float | None
    cycles: int
    memory: int
    loops: int
    instructions: Counter[str]
    compile_s: float


class Row(NamedTuple):
    """Step written one way.

    Attributes:
        step: what is compiled.
        lowering: how.
        estimate: of it.
        first: of the step's first lowering.
    """

    step: str
    lowering: str
    estimate: Estimate
    first: Estimate

    @property
    def ratio(self) -> float | None:
        """Ratio of the seconds to the first lowering's; None with loops, or without seconds."""
        ours, theirs = self.estimate.optimal_seconds, self.first.optimal_seconds
        if ours is None or theirs is None or self.estimate.loops or self.first.loops:
            return None
        return ours / theirs

    @property
    def cycles_ratio(self) -> float | None:
        """Ratio of the cycles to the first lowering's; None with loops."""
        if self.estimate.loops or self.first.loops or not self.first.cycles:
            return None
        return self.estimate.cycles / self.first.cycles

    @property
    def same(self) -> bool:
        """True for the first's program: the same instructions, and every figure."""
        return self.estimate._replace(compile_s=0) == self.first._replace(compile_s=0)

    @property
    def note(self) -> str:
        """Note for the table."""
        if self.estimate is self.first:
            return ""
        if self.same:
            return "the same program as the first"
        if self.estimate.loops:
            return f"has {self.estimate.loops} loops, whose bodies are counted once: too low"
        return ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    check_compiler()
    # The host's own backend; the compiler for TPU is asked for by name.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if options.json is not None:
        folder = pathlib.Path(options.json).expanduser().parent
        runtime.check_writable(folder, remedy="choose another --json")
    run(options)


def parse(arguments: Sequence[str]) -> Options:
    """Options of a command line; `--help` explains each."""
    return tyro.cli(
        Options,
        prog="python -m experiments.tpu_view",
        description=__doc__,
        args=list(arguments),
    )


def check_compiler() -> None:
    """Raise where there is no compiler for TPU.

    Raises:
        ImportError: `libtpu` is not installed.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            "expected the package libtpu beside JAX, got none; do `pip install libtpu`, best in an "
            "environment of its own: with libtpu there, JAX looks for a TPU wherever it starts"
        )


def run(options: Options) -> None:
    """Compile everything, print the table, and write the rows where asked to."""
    device: Any = topologies.get_topology_desc(
        platform="tpu", topology_name=_TOPOLOGY, chips_per_host_bounds=[1, 1, 1]
    ).devices[0]
    rows = estimates(options, lambda step: compiled(step, device))
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
    shared = {
        "device": f"{device.device_kind}, {_TOPOLOGY}, not run",
        "versions": versions,
        "command": command(options, program="experiments.tpu_view"),
    }
    print(_heading(options, versions) + text(rows), end="")
    if options.json is not None:
        content = [record(row, shared) for row in rows]
        runtime.write_json(pathlib.Path(options.json).expanduser(), content)


def estimates(options: Options, compile_: Callable[[Step], Estimate]) -> list[Row]:
    """Rows of every step and lowering.

    Args:
        options: which.
        compile_: what the compiler says of a step.
    """
    rows: list[Row] = []
    with Progress() as progress:
        for name in options.steps:
            ways = (*LOWERINGS, *(PRECISIONS if name == "pgd" else ()))
            move = {"event": "call", "stage": name, "total": len(ways), "unit": "program"}
            progress({**move, "done": 0})
            title = {"pgd": "PGD step"}.get(name, f"{name} step")
            title += f", {options.num_runs} runs" if name == "sweep" else ""
            first = None
            for done, lowering in enumerate(ways, start=1):
                step = lowerings.step(
                    name,
                    lowering,
                    width=options.width,
                    batch_size=options.batch_size,
                    num_runs=options.num_runs,
                )
                estimate = compile_(step)
                first = first or estimate
                rows.append(Row(title, lowering.name, estimate, first))
                progress({**move, "done": done})
    return rows


def compiled(step: Step, device: Any) -> Estimate:
    """Estimate of a step by the compiler, on a device that need not be there."""
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        step.arguments,
    )
    started = time.perf_counter()
    program = jax.jit(step.call).lower(*arguments).compile()
    seconds = time.perf_counter() - started
    memory: Any = program.memory_analysis()
    return read(
        program.as_text() or "",
        program.cost_analysis() or {},
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
        seconds,
    )


def read(program: str, costs: Mapping[str, float], memory: int, compile_s: float) -> Estimate:
    """Estimate out of what the compiler gives.

    Args:
        program: its text.
        costs: `cost_analysis`.
        memory: bytes on the chip.
        compile_s: seconds that compiling took.
    """
    # An operation that the compiler has no estimate for counts as -1 s. Only these are known to
    # take no time: parts that were copied next to each other are called one array.
    unknown = program.count('custom_call_target="ConcatBitcast"')
    seconds = costs.get("optimal_seconds")
    if seconds is not None and seconds < 0:
        seconds += unknown
    # The computations before are the insides of the operations in it.
    entry = program[program.find("\nENTRY") :]
    return Estimate(
        costs.get("flops", 0.0),
        costs.get("bytes accessed", 0.0),
        None if seconds is None or seconds < 0 else seconds,
        sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', entry))),
        memory,
        len(re.findall(r" while\(", program)),
        Counter(_INSTRUCTION.findall(program)),
        compile_s,
    )


def record(row: Row, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Row as JSON holds it, with the keys of the bench's rows."""
    ours, first = row.estimate, row.first
    return {
        "name": f"{row.step}: {row.lowering}",
        "ours_s": ours.optimal_seconds,
        "theirs_s": first.optimal_seconds,
        "peer": LOWERINGS[0].name,
        "ratio": row.ratio,
        "target": None,
        "compile_s": ours.compile_s,
        "note": "; ".join(part for part in (ESTIMATE, row.note) if part),
        "facts": {
            "flops": ours.flops,
            "bytes": ours.bytes,
            "cycles": ours.cycles,
            "cycles_ratio": row.cycles_ratio,
            "memory": ours.memory,
            "loops": ours.loops,
            "same_program": row.same,
        },
        **shared,
    }


def text(rows: Sequence[Row]) -> str:
    """Table of the rows in Markdown."""

    def of(value: float | None, form: str = ".2f") -> str:
        return "–" if value is None else format(value, form)

    head = ["step", "lowering", "GFLOP", "MB accessed", "optimal ms", "ratio"]
    head += ["Mcycles", "ratio", "MB on the chip", "note"]
    cells = []
    for row in rows:
        ours = row.estimate
        optimal = None if ours.optimal_seconds is None else 1e3 * ours.optimal_seconds
        cells.append(
            [
                row.step,
                row.lowering,
                of(ours.flops / 1e9, ".3g"),
                of(ours.bytes / 1e6, ",.0f"),
                of(optimal, ".3f"),
                of(row.ratio),
                of(ours.cycles / 1e6, ".3f"),
                of(row.cycles_ratio),
                of(ours.memory / 1e6, ",.0f"),
                row.note,
            ]
        )
    return table(head, cells)


def _heading(options: Options, versions: Mapping[str, str]) -> str:
    lines = [
        f"This is {ESTIMATE}.",
        ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; `nets.mnist_net(width={options.width})`, batch {options.batch_size}, without dropout",
        "optimal: the least that each operation takes by its operations and bytes, added up; "
        "cycles: the compiler's estimates for what it scheduled, added up; ratio: to the step's "
        "first lowering; on the chip: arguments, outputs and temporaries",
    ]
    return "".join(f"* {line}\n" for line in lines) + "\n"


if __name__ == "__main__":
    runtime.run_main(main)
