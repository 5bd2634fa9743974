"""Plan of a study on a TPU slice: what its programs take, by the TPU compiler's estimate."""

import math
from typing import Any, NamedTuple

from jdistill import data
from jdistill._jax import planned_for
from jdistill.attacks._core import planning
from jdistill.attacks._core.rows import executed_and_once
from jdistill.runtime import tpu
from jdistill.runtime.tpu import Estimate, Topology
from jdistill.study._programs import (
    Program,
    attack_programs,
    forward_programs,
    networks_of,
    sweep_programs,
    training_programs,
)
from jdistill.study._study import Study
from jdistill.sweep import _memory
from jdistill.typing import Callback, Event


class Row(NamedTuple):
    """Estimate of one program of a study.

    Attributes:
        program: its name.
        part: `"training"`, `"initial"`, `"sweep"`, `"forward"` or `"attack"`.
        size: examples of a call, or runs of a sweep.
        chips: that work on a call.
        memory: bytes on each of these; None where the compiler does not say, as it does not fit.
        fits: whether that is at most 90% of the chip's memory.
        largest: the largest batch, or stack of runs, that fits; None where it was not asked for.
        more: whether still larger ones would fit, that nobody needs.
        flops: of a call, over all chips.
        calls: of all networks; of a sweep its steps.
        seconds: of all calls, at least.
        communication: by kind, the bytes that each chip gets from others in a call.
    """

    program: str
    part: str
    size: int
    chips: int
    memory: int | None
    fits: bool
    largest: int | None
    more: bool
    flops: float
    calls: int
    seconds: float
    communication: dict[str, int]


class Plan(NamedTuple):
    """Estimates of all programs of a study on a topology.

    Attributes:
        topology: the slice of TPUs, with what is known of its chips.
        rows: one for each program: its name, size, memory, operations, calls, and seconds.
        notes: what the rows leave out, one sentence each.
    """

    topology: Topology
    rows: list[Row]
    notes: list[str]

    def hours(self, *parts: str) -> float:
        """Hours of all calls of these parts."""
        return sum(row.seconds for row in self.rows if row.part in parts) / 3600

    def __str__(self) -> str:
        """The table, with what it is and is not."""
        chip, count = self.topology.chip, len(self.topology.devices)
        head = ["program", "size", "chips", "MB/chip", "fits", "largest", "GFLOP", "calls"]
        head += ["PFLOP", "seconds", "chip-hours", "MB exchanged"]
        lines = [head, *(_cells(row, count) for row in self.rows)]
        widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
        rows = (
            "  ".join(
                [line[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
            )
            for line in lines
        )
        measured = self.hours("initial", "forward", "attack")
        ways = {"one run after the other": "training", "as a sweep": "sweep"}
        totals = [
            f"at least {_number(hours)} hours, {_number(hours * count)} chip-hours, trained {way}"
            for way, part in ways.items()
            if any(row.part == part for row in self.rows)
            for hours in [measured + self.hours(part)]
        ]
        shown = ", ".join(f"{name} {version}" for name, version in tpu.versions().items())
        return "\n".join(
            [
                f"{self.topology.name}: {count} chip{'s' * (count > 1)} of "
                f"{chip.memory / 1e9:g} GB, {chip.flops / 1e12:g} TFLOP/s of bfloat16, "
                f"{chip.bandwidth / 1e9:g} GB/s ({shown})",
                "The TPU compiler's estimate and not a measurement: nothing was run on a TPU.",
                "",
                *rows,
                "",
                *totals,
                "",
                *(f"* {note}" for note in [*_LEGEND, *self.notes]),
            ]
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON-able content."""
        return {
            "topology": self.topology.name,
            "chips": len(self.topology.devices),
            "measured": False,
            "versions": tpu.versions(),
            "rows": [row._asdict() for row in self.rows],
            "notes": self.notes,
        }


_LEGEND = (
    "times are the least that the arithmetic, the memory, and the links allow, at their peak; "
    "small steps take longer, since each has to be started",
    "a loop's body, which the compiler counts once, is multiplied by its steps; of attacks by the "
    "most that an example may take",
    "fits: in 90% of the memory; largest: batch of a step, or runs of a sweep; the compiler worked "
    "in haste: with more effort small programs take up to half of the memory, and bytes and "
    "seconds move by a fifth",
    "measuring takes one chip, whose idle neighbors are in the chip-hours; float32 products of "
    "attacks are six of bfloat16",
)


def _cells(row: Row, num_chips: int) -> list[str]:
    largest = "" if row.largest is None else f"{'>= ' * row.more}{row.largest}"
    kinds = (f"{_number(size / 1e6)} {kind}" for kind, size in row.communication.items())
    return [
        row.program,
        f"{row.size} runs" if row.part == "sweep" else f"batch {row.size}",
        str(row.chips),
        "?" if row.memory is None else _number(row.memory / 1e6),
        "yes" if row.fits else "NO",
        largest,
        _number(row.flops / 1e9),
        str(row.calls),
        _number(row.flops * row.calls / 1e15),
        _number(row.seconds),
        _number(row.seconds * num_chips / 3600),
        ", ".join(kinds) or "0",
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def plan(
    study: Study, topology: str, *, largest: bool = True, callback: Callback | None = None
) -> Plan:
    """Compile a study's programs for a TPU slice that need not be there, and add up.

    Its training steps, its sweep, its forward passes and its attacks are compiled as `run` has
    them, and each estimate is multiplied by how often the study calls it. Nothing is trained.

    Args:
        study: what is planned; its data are loaded, since their number counts.
        topology: such as `"v5e:1x1"`.
        largest: whether to look for the largest batch and stack that fit, which takes two or three
            more compilations for each training step and sweep.
        callback: called with `event="call"` before and after each program.

    Returns:
        The plan. It is the compiler's estimate and no measurement.

    Raises:
        ValueError: no such topology.
        ImportError: the package `libtpu` is missing.

    Example:
        It needs `pip install 'jdistill[tpu-plan]'`, and takes minutes:

        >>> from jdistill.study import RECIPES, plan
        >>> print(plan(RECIPES["digits"].study(), "v5e:1x1"))  # doctest: +SKIP
    """
    slice_ = tpu.topology(topology)
    examples = study.examples()
    notes = [
        "not counted: sensitivities, transfer, and verdict; compiling, loading, and the start of "
        "each call"
    ]
    if study.selects_best():
        notes.append(
            "not counted either: the accuracy on the validation examples after each epoch; stages "
            "that end with their best epoch are not trained as a sweep"
        )
    per_epoch = data.num_batches(len(examples.train.labels), study.batch_size)
    initial = study.initial_epochs * per_epoch * len(study.seeds)
    with planned_for("tpu"):
        networks = networks_of(study, examples)
        programs = [
            *training_programs(study, examples, networks, slice_.devices),
            *(
                []
                if study.selects_best()
                else sweep_programs(study, examples, networks, slice_.devices)
            ),
            *forward_programs(study, examples, networks, slice_.devices[:1]),
            *attack_programs(study, examples, slice_.devices[:1], notes),
        ]
        rows = []
        for number, program in enumerate(programs):
            event: Event = {"event": "call", "stage": program.name, "unit": "program"}
            if callback is not None:
                callback({**event, "done": number, "total": len(programs)})
            rows.append(row := _row(program, slice_, largest))
            if row.part == "training" and initial:
                seconds = row.seconds / max(row.calls, 1) * initial
                first = row._replace(part="initial", calls=initial, seconds=seconds)
                rows.append(first._replace(program=row.program.replace("training", "initial")))
            if callback is not None:
                callback({**event, "done": number + 1, "total": len(programs)})
    return Plan(slice_, rows, notes)


def _row(program: Program, slice_: Topology, largest: bool) -> Row:
    """The estimate of a program, times its calls."""
    found = estimate(program)
    chip = slice_.chip
    budget = _memory.SHARE * chip.memory
    most = None
    if largest and program.resized is not None:
        most = largest_of(program, found, budget)
    if found is None:
        return Row(*program[:4], None, False, most, False, math.nan, program.calls, math.nan, {})
    times = _executed_over_once(program)
    flops, moved = found.flops * times, found.bytes * times
    exchanged = found.communication
    seconds = max(flops * program.passes / chip.flops, moved / chip.bandwidth)
    # Around a ring each byte comes and goes twice, as a part of the sum and as the sum.
    seconds += 2 * sum(exchanged.values()) / chip.links
    fits, more = found.memory <= budget, most == program.most
    sizes = found.memory, fits, most, more
    calls = program.calls
    return Row(*program[:4], *sizes, flops * program.chips, calls, seconds * calls, exchanged)


def estimate(program: Program) -> Estimate | None:
    try:
        return tpu.compiled(program.jitted, *program.arguments, hasty=True)
    except MemoryError:
        return None


def largest_of(program: Program, found: Estimate | None, budget: float) -> int:
    """The largest size that fits: by the growth of the memory, and then tried; 0 if none does."""
    assert program.resized is not None
    resized = program.resized

    def memory(size: int) -> float:
        one = estimate(resized(size))
        return math.inf if one is None else one.memory

    size, used = program.size, math.inf if found is None else found.memory
    unit = program.chips
    while used > budget:
        if size <= unit:
            return 0
        size = max(unit, size // 2 // unit * unit)
        used = memory(size)
    guess, too_much = 8 * size, program.most + unit
    for _ in range(8):
        guess = min(guess, too_much - unit) // unit * unit
        if guess <= size:
            break
        more = memory(guess)
        if more > budget:
            too_much = guess
            guess = guess * 7 // 8 if guess < 2 * size else (size + guess) // 2
            continue
        per_one = (more - used) / (guess - size)
        size, used = guess, more
        if used > 0.85 * budget:
            break
        # What does not depend on the size hides at first how the memory grows.
        room = 64 * size if per_one <= 0 else min(64 * size, (budget - used) / per_one)
        guess = int(size + 0.97 * room)
    return size


def _executed_over_once(program: Program) -> float:
    """Multiplications of a call, over those of its program with every loop's body once."""
    calls = [] if program.methods is None else program.methods()
    counts = [planning.multiplications(*call) for call in calls]
    # What is jitted may have loops of the user's own.
    counts = counts or [executed_and_once(program.jitted, *program.arguments)]
    executed, once = (sum(each) for each in zip(*counts, strict=True))
    return executed / once if once else 1.0
