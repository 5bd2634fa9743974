"""Seconds of the library beside what else there is: PyTorch, its toolkits, our own simpler ways.

    python -m experiments.bench attacks
    python -m experiments.bench attacks --attacks pgd ddn --batch-size 20 --repeats 3
    python -m experiments.bench attacks --json runs/bench-attacks.json
    python -m experiments.bench networks
    python -m experiments.bench train --no-flags
    python -m experiments.bench robust
    python -m experiments.bench vit
    python -m experiments.bench sweep --num-seeds 3
    python -m experiments.bench evaluate
    python -m experiments.bench data
    python -m experiments.bench startup
    python -m experiments.bench roofline
    python -m experiments.bench attacks --help

Attacks, networks and training steps run on the CPU, where PyTorch does; the others where JAX runs
by default. Every row says by what command it is made.

Run it on a machine at rest: what disturbs it slows PyTorch's threads, which wait for each other,
more than JAX. The range beside each median shows whether it was at rest.
"""

import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import tyro

from experiments.bench import (
    attacks,
    data,
    networks,
    peers,
    robust,
    roofline,
    rows,
    stacks,
    startup,
    torch_side,
    train,
    vit,
)
from experiments.bench.options import Options
from experiments.bench.rows import Row
from experiments.bench.timing import AfterCall
from jdistill import runtime
from jdistill.typing import Event

COMMANDS: Mapping[str, tuple[type[Options], Callable[[Any, AfterCall], Iterator[list[Row]]]]] = {
    "attacks": (attacks.Attacks, attacks.run),
    "networks": (networks.Networks, networks.run),
    "train": (train.Train, train.run),
    "robust": (robust.Robust, robust.run),
    "vit": (vit.Vit, vit.run),
    "sweep": (stacks.Sweep, stacks.run_sweep),
    "evaluate": (stacks.Evaluate, stacks.run_evaluate),
    "data": (data.Data, data.run),
    "startup": (startup.Startup, startup.run),
    "roofline": (roofline.Roofline, roofline.run),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.on_cpu:
        jax.config.update("jax_platforms", "cpu")
    # What is compiled is to be timed, not read from a disk.
    jax.config.update("jax_enable_compilation_cache", False)
    if options.flags:
        runtime.add_cpu_flags()
    run(options)


def parse(arguments: Sequence[str]) -> Options:
    """Options of a command line; `--help` explains each."""
    return tyro.extras.subcommand_cli_from_dict(
        {name: kind for name, (kind, _) in COMMANDS.items()},
        prog="python -m experiments.bench",
        description=__doc__,
        args=list(arguments),
    )


def run(options: Options) -> None:
    """Run a command."""
    show(options, groups(options))


def groups(options: Options) -> Iterator[list[Row]]:
    """Rows of a command, comparison by comparison, below a bar of the calls."""
    name = type(options).__name__.lower()
    with runtime.progress() as progress:

        def after_call(done: int, total: int) -> None:
            event: Event = {"event": "call", "stage": name, "unit": "call"}
            progress({**event, "done": done, "total": total})

        yield from dict(COMMANDS.values())[type(options)](options, after_call)


def show(options: Options, groups: Iterable[list[Row]]) -> None:
    """Write the rows where asked to, and print them; of a run that is stopped, those there are."""
    file = None if options.json is None else pathlib.Path(options.json).expanduser()
    if file is not None:
        runtime.check_writable(file.parent, remedy="choose another --json")
    conditions = conditions_of(options)
    found: list[Row] = []
    try:
        for group in groups:
            found += group
            if file is not None:
                runtime.write_json(file, [rows.record(row, conditions) for row in found])
    except KeyboardInterrupt as error:
        error.args = ("stopped; the rows hold what was done, a new run starts from the beginning",)
        raise
    finally:
        if found:
            print(f"{heading(conditions)}\n{rows.text(found)}", end="")


def conditions_of(options: Options) -> dict[str, Any]:
    """Conditions that the seconds depend on, as JSON holds them; PyTorch gets its threads."""
    described = runtime.describe()
    first = described["devices"][0]
    device = "CPU" if first["platform"] == "cpu" else f"{first['count']} × {first['kind']}"
    threads = None
    beside_torch = getattr(options, "peers", False)
    if beside_torch and torch_side.missing() is None:
        import torch

        torch.set_num_threads(_cores())
        threads = torch.get_num_threads()
    return {
        "device": f"{device}, {_cores()} cores, {described['platform']}",
        "versions": described["versions"] | (peers.versions() if beside_torch else {}),
        "xla_flags": described["xla_flags"],
        "torch_threads": threads,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def heading(conditions: Mapping[str, Any]) -> str:
    """Conditions, and what the columns are, as a list in Markdown."""
    flags, threads = conditions["xla_flags"], conditions["torch_threads"]
    lines = [
        ", ".join(f"{name} {version}" for name, version in conditions["versions"].items()),
        f"{conditions['device']}, load before the run {conditions['load']}; "
        f"{f'`XLA_FLAGS={flags}`' if flags else 'no flags'}"
        f"{'' if threads is None else f', PyTorch with {threads} threads'}",
        "medians, and ranges, of the repeats in turn, after a call that warms up; ratio: our "
        "seconds over the peer's; compile s: seconds of the first call beyond the median; ours / "
        "the peer's where there are two",
    ]
    return "".join(f"* {line}\n" for line in lines)


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    runtime.run_main(main)
