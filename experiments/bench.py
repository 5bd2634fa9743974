"""Time the library beside what else there is: PyTorch, its toolkits, or our own simpler ways.

    python -m experiments.bench attacks
    python -m experiments.bench attacks --attacks pgd ddn --batch-size 20 --repeats 3
    python -m experiments.bench attacks --output runs/bench-attacks.md
    python -m experiments.bench train --json runs/bench-train.json
    python -m experiments.bench train --no-flags
    python -m experiments.bench sweep --num-seeds 3
    python -m experiments.bench evaluate
    python -m experiments.bench data
    python -m experiments.bench startup
    python -m experiments.bench roofline
    python -m experiments.bench attacks --help

Attacks and training steps run on the CPU, where PyTorch does; the others where JAX runs by default.

Run it on a machine at rest: what disturbs it slows PyTorch's threads, which wait for each other,
more than JAX. The range beside each median shows whether it was at rest.
"""

import functools
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import tyro

from experiments import (
    bench_attacks,
    bench_data,
    bench_evaluate,
    bench_roofline,
    bench_rows,
    bench_startup,
    bench_sweep,
    bench_train,
    npz_network,
    torch_side,
)
from experiments.bench_attacks import COMPARISONS, Row
from experiments.bench_options import (
    Attacks,
    Data,
    Evaluate,
    Options,
    Roofline,
    Startup,
    Sweep,
    Train,
)
from experiments.bench_rows import BenchRow
from experiments.progress import Progress
from jdistill import nets, runtime

_FILES = pathlib.Path(__file__).parents[1] / "tests" / "parity"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if isinstance(options, (Attacks, Train)):
        jax.config.update("jax_platforms", "cpu")  # where the peers run
    # What is compiled is to be timed, not read from a disk.
    jax.config.update("jax_enable_compilation_cache", False)
    if options.flags:
        runtime.add_cpu_flags()
    run(options)


def parse(arguments: Sequence[str]) -> Options:
    """The options of a command line; `--help` explains each."""
    return tyro.extras.subcommand_cli_from_dict(
        {name: kind for name, (kind, _) in _COMMANDS.items()},
        prog="python -m experiments.bench",
        description=__doc__,
        args=list(arguments),
    )


def run(options: Options) -> None:
    """Run a command: print its tables, and write them where asked to."""
    if options.json is not None:
        folder = pathlib.Path(options.json).expanduser().parent
        runtime.check_writable(folder, remedy="choose another --json")
    dict(_COMMANDS.values())[type(options)](options)


def run_attacks(options: Attacks) -> None:
    """Compare attack by attack; the files are written anew after each."""
    missing = bench_attacks.missing_toolkits()
    output = None if options.output is None else pathlib.Path(options.output).expanduser()
    if output is not None:
        runtime.check_writable(output.parent, remedy="choose another --output")
    params, *images = _network_and_images(options)
    subject_of = functools.cache(functools.partial(bench_attacks.make_subject, params, *images))
    chosen = [comparison for comparison in COMPARISONS if comparison.attack in options.attacks]
    for comparison in chosen:  # or its error comes after the first attacks
        subject_of(comparison.num_images or options.batch_size)
    conditions = {
        **_conditions(bench_attacks.versions(), torch=True),
        "network": os.path.basename(options.network or "plain.npz"),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "batch_size": options.batch_size,
        "repeats": options.repeats,
    }
    heading = _heading(conditions, _attack_lines(conditions))
    rows: list[Row] = []
    try:
        with Progress() as progress:
            progress.say(heading)
            for comparison in chosen:
                row = bench_attacks.compare(
                    comparison,
                    subject_of(comparison.num_images or options.batch_size),
                    repeats=1 if comparison.num_images else options.repeats,
                    slow_seconds=options.slow_seconds,
                    missing=missing,
                    after_call=_bar(progress, f"{comparison.attack} {comparison.norm}"),
                )
                rows.append(row)
                if output is not None:
                    _write(output, conditions, rows)
                _write_rows(options, bench_attacks.bench_rows_of(rows), conditions)
    except KeyboardInterrupt as error:
        if rows:
            print(bench_attacks.text(rows), end="")
        error.args = (
            "stopped; the tables hold what was done, a new run starts from the beginning",
        )
        raise
    print(f"{heading}\n{bench_attacks.text(rows)}", end="")


def run_evaluate(options: Evaluate) -> None:
    """Compare one call for all networks with single ones."""
    params, inputs, labels = _network_and_images(options)
    size = min(options.num_examples, len(labels))
    conditions = _conditions()
    with Progress() as progress:
        timings = bench_evaluate.compare(
            bench_evaluate.make_networks(params, inputs.shape[1:], options.num_networks),
            inputs[:size],
            labels[:size],
            num_steps=options.num_steps,
            batch_size=options.batch_size,
            repeats=options.repeats,
            after_call=_bar(progress, "evaluate"),
        )
    what = f"{size} images, {options.batch_size} at a time, PGD of {options.num_steps} steps"
    rows = bench_evaluate.rows(
        timings, num_networks=options.num_networks, platform=jax.default_backend()
    )
    _show(options, rows, conditions, what)


def run_train(options: Train) -> None:
    """Compare a training step and an input gradient with PyTorch's."""
    missing = torch_side.missing()
    params, inputs, labels = _network_and_images(options)
    conditions = _conditions(torch=missing is None)
    sizes = {"num_steps": options.num_steps, "batch_size": options.batch_size}
    with Progress() as progress:
        timed = bench_train.compare(
            params,
            inputs,
            labels,
            **sizes,
            repeats=options.repeats,
            missing=missing,
            after_call=_bar(progress, "train"),
        )
    what = f"seconds a step, out of calls of {options.num_steps}"
    _show(options, bench_train.rows(timed, **sizes, missing=missing), conditions, what)


def run_sweep(options: Sweep) -> None:
    """Compare one program for all runs with one run at a time."""
    conditions = _conditions()
    sizes = {
        "num_temperatures": options.num_temperatures,
        "num_seeds": options.num_seeds,
        "num_steps": options.num_steps,
    }
    with Progress() as progress:
        timed = bench_sweep.compare(
            nets.mnist_net(width=options.width),
            (28, 28, 1),
            **sizes,
            batch_size=options.batch_size,
            repeats=options.repeats,
            after_call=_bar(progress, "sweep"),
        )
    rows = bench_sweep.rows(timed, **sizes, platform=jax.default_backend())
    what = f"`nets.mnist_net(width={options.width})`, batch {options.batch_size}"
    _show(options, rows, conditions, what)


def run_data(options: Data) -> None:
    """Compare the ways of an epoch's batches to the device."""
    missing = torch_side.missing()
    conditions = _conditions(torch=missing is None)
    with Progress() as progress:
        timed = bench_data.compare(
            options.num_examples,
            batch_size=options.batch_size,
            repeats=options.repeats,
            missing=missing,
            after_call=_bar(progress, "data"),
        )
    rows = bench_data.rows(
        timed, num_examples=options.num_examples, batch_size=options.batch_size, missing=missing
    )
    _show(options, rows, conditions, "seconds an epoch; the store is on the device before")


def run_startup(options: Startup) -> None:
    """Compare the imports."""
    conditions = _conditions()
    with Progress() as progress:
        timed = bench_startup.compare(repeats=options.repeats, after_call=_bar(progress, "startup"))
    what = "seconds of the import alone, each in a fresh process"
    _show(options, bench_startup.rows(timed), conditions, what)


def run_roofline(options: Roofline) -> None:
    """Compare two steps with what the device's measured rates allow."""
    params, inputs, labels = _network_and_images(options)
    conditions = _conditions()
    with Progress() as progress:
        timed = bench_roofline.compare(
            params,
            inputs,
            labels,
            num_steps=options.num_steps,
            batch_size=options.batch_size,
            matmul_size=options.matmul_size,
            copy_megabytes=options.copy_megabytes,
            repeats=options.repeats,
            after_call=_bar(progress, "roofline"),
        )
    found = bench_roofline.points(
        timed,
        npz_network.conv_net(params, inputs.shape[1:]),
        inputs.shape[1:],
        num_steps=options.num_steps,
        batch_size=options.batch_size,
        matmul_size=options.matmul_size,
        copy_megabytes=options.copy_megabytes,
    )
    print(_heading(conditions, bench_roofline.LINES) + "\n" + bench_roofline.text(found), end="")
    rows, more = bench_roofline.rows(found)
    _write_rows(options, rows, conditions, more)


_COMMANDS: Mapping[str, tuple[type[Options], Callable[[Any], None]]] = {
    "train": (Train, run_train),
    "attacks": (Attacks, run_attacks),
    "evaluate": (Evaluate, run_evaluate),
    "sweep": (Sweep, run_sweep),
    "data": (Data, run_data),
    "startup": (Startup, run_startup),
    "roofline": (Roofline, run_roofline),
}


def _network_and_images(options: Attacks | Evaluate | Train | Roofline) -> tuple[Any, Any, Any]:
    """Weights, inputs and labels of the files, or of the checkout's."""
    params = npz_network.read_params(options.network or os.fspath(_FILES / "plain.npz"))
    return params, *npz_network.read_images(options.images or os.fspath(_FILES / "images.npz"))


def _show(
    options: Options, rows: Sequence[BenchRow], conditions: Mapping[str, Any], what: str
) -> None:
    """Print the rows under what they depend on, and write them where asked to."""
    lines = [
        what,
        f"medians, and ranges, of {options.repeats} repeats in turn, after a call that "
        "warms up; compile s: what the first call took beyond the median, ours / the peer's where "
        "it compiles too; ratio: our seconds over the peer's",
    ]
    print(f"{_heading(conditions, lines)}\n{bench_rows.text(rows)}", end="")
    _write_rows(options, rows, conditions)


def _write_rows(
    options: Options,
    rows: Sequence[BenchRow],
    conditions: Mapping[str, Any],
    more: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Write the rows where asked to, each with more of its own."""
    if options.json is None:
        return
    shared = {
        "device": _device_text(conditions),
        "versions": {**conditions["versions"], **conditions["toolkits"]},
        "xla_flags": conditions["xla_flags"],
        "torch_threads": conditions["torch_threads"],
        "load": conditions["load"],
    }
    more = more or [{}] * len(rows)
    content = [
        bench_rows.record(row, {**shared, **own}) for row, own in zip(rows, more, strict=True)
    ]
    runtime.write_json(pathlib.Path(options.json).expanduser(), content)


def _write(output: pathlib.Path, conditions: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """The tables, and every call's seconds."""
    heading = _heading(conditions, _attack_lines(conditions))
    text = f"{heading}\n{bench_attacks.text(rows)}"
    runtime.atomic_write_text(output, f"# Attacks beside other toolkits\n\n{text}")
    content = {"conditions": conditions, "attacks": [bench_attacks.record(row) for row in rows]}
    runtime.write_json(output.with_suffix(".json"), content)


def _bar(progress: Progress, stage: str) -> Callable[[int, int], None]:
    """What moves a stage's bar."""

    def move(done: int, total: int) -> None:
        progress({"event": "call", "stage": stage, "done": done, "total": total, "unit": "call"})

    return move


def _conditions(
    toolkits: Mapping[str, str] | None = None, *, torch: bool = False
) -> dict[str, Any]:
    """What the numbers depend on; PyTorch gets its threads. Starts the backend."""
    if toolkits is None:
        versions = bench_attacks.versions()
        toolkits = {"torch": versions["torch"]} if torch else {}
    return {
        **runtime.describe(),
        "toolkits": dict(toolkits),
        "cores": _cores(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch_threads": torch_side.set_threads(_cores()) if torch else None,
    }


def _heading(conditions: Mapping[str, Any], lines: Sequence[str]) -> str:
    """What the numbers depend on and what they are, as a list in Markdown."""
    packages = {**conditions["versions"], **conditions["toolkits"]}
    flags = conditions["xla_flags"]
    threads = conditions["torch_threads"]
    lines = [
        ", ".join(f"{name} {version}" for name, version in packages.items()),
        f"{conditions['platform']}, {conditions['cores']} cores, load before the run "
        f"{conditions['load']}; JAX on {_device_name(conditions)} with "
        f"{f'`XLA_FLAGS={flags}`' if flags else 'no flags'}"
        f"{'' if threads is None else f', PyTorch with {threads} threads'}",
        *lines,
    ]
    return "".join(f"* {line}\n" for line in lines)


def _attack_lines(conditions: Mapping[str, Any]) -> list[str]:
    return [
        f"network {conditions['network']}, {conditions['parameters']:,} parameters; "
        f"{conditions['batch_size']} images a call, all of them classified correctly",
        f"seconds: medians, and ranges, of {conditions['repeats']} repeats in turn, after a call "
        "that warms up; compile s: what our first call took beyond the median",
        "ratio: our seconds over the peer's; success, and the mean distance over the images that "
        "both fool: ours / the peer's",
    ]


def _device_name(conditions: Mapping[str, Any]) -> str:
    first = conditions["devices"][0]
    return "CPU" if first["platform"] == "cpu" else f"{first['count']} × {first['kind']}"


def _device_text(conditions: Mapping[str, Any]) -> str:
    """For a row: where it was measured."""
    name, cores = _device_name(conditions), conditions["cores"]
    return f"{name}, {cores} cores, {conditions['platform']}"


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    runtime.run_main(main)
