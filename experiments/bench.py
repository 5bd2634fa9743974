"""Time the library: its attacks beside what else there is, and its evaluation of a stack.

    python -m experiments.bench attacks
    python -m experiments.bench attacks --attacks pgd ddn --batch-size 20 --repeats 3
    python -m experiments.bench attacks --output runs/bench-attacks.md
    python -m experiments.bench evaluate
    python -m experiments.bench attacks --help

The attacks run on the CPU, where the other toolkits do; the evaluation where JAX runs by default.

Run it on a machine at rest: what disturbs it slows PyTorch's threads, which wait for each other,
more than JAX. The range beside each median shows whether it was at rest.
"""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import tyro

from experiments import bench_attacks, bench_evaluate, npz_network
from experiments.bench_attacks import COMPARISONS, Row
from experiments.progress import Progress
from jdistill import _validate, runtime

_FILES = pathlib.Path(__file__).parents[1] / "tests" / "parity"
_NAMES = tuple(dict.fromkeys(comparison.attack for comparison in COMPARISONS))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attacks:
    """Each attack beside the toolkits for PyTorch that have it too: same network, images, budget.

    Printed are, for each attack, the median seconds of a call (and the range), ours over the
    fastest toolkit's, the seconds that compiling adds to our first call, and what was found for
    that time.
    """

    attacks: tuple[Literal[_NAMES], ...] = _NAMES  # type: ignore[valid-type]
    """Which attacks."""
    network: str | None = None
    """File of a network's weights, as tests/parity/make_networks.py writes them (none: the
    checkout's tests/parity/plain.npz, the papers' network trained on MNIST)."""
    images: str | None = None
    """File of images and labels, from the same program (none: the checkout's
    tests/parity/images.npz, the first test images of MNIST)."""
    batch_size: int = 100
    """Images a call: the first so many that the network classifies correctly. AutoAttack has its
    own number."""
    repeats: int = 5
    """Timed calls of each attack, in turn with the toolkits', after one that warms up; AutoAttack's
    is one."""
    slow_seconds: float = 120.0
    """A toolkit whose first call takes longer than so many seconds is not called again."""
    output: str | None = None
    """File ending in .md that gets what is printed, anew after each attack; beside it, ending in
    .json, every call's seconds (none: nothing is written)."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        _validate.count(batch_size=self.batch_size, repeats=self.repeats)
        _validate.positive(slow_seconds=self.slow_seconds)
        if not self.attacks:
            raise ValueError(f"expected at least one attack, got none; pick of {', '.join(_NAMES)}")
        if self.output is not None and not self.output.endswith(".md"):
            raise ValueError(
                f"expected output to end in .md, got {self.output!r}; the tables are Markdown"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluate:
    """The evaluation of several networks in one call against one call each: seconds and ratios.

    Clean measures, FGSM and PGD. One call is timed both ways that a stack can be run: in a loop
    over its networks, which is the default on a CPU, and under `vmap`, the default elsewhere.
    """

    num_networks: int = 9
    """How many networks: the file's weights, each time disturbed a little."""
    num_examples: int = 200
    """Images."""
    batch_size: int = 100
    """Images at a time."""
    num_steps: int = 10
    """Steps of PGD."""
    repeats: int = 3
    """Timed calls of each way, in turn, after one that warms up."""
    network: str | None = None
    """As of `attacks`."""
    images: str | None = None
    """As of `attacks`."""

    def __post_init__(self) -> None:
        """Check every option, and name the one that is wrong."""
        for field in ("num_networks", "num_examples", "batch_size", "num_steps", "repeats"):
            _validate.count(**{field: getattr(self, field)})


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if isinstance(options, Attacks):
        jax.config.update("jax_platforms", "cpu")  # where the other toolkits run
    # What is compiled is to be timed, not read from a disk.
    jax.config.update("jax_enable_compilation_cache", False)
    runtime.add_cpu_flags()
    if isinstance(options, Attacks):
        run(options)
    else:
        run_evaluate(options)


def parse(arguments: Sequence[str]) -> Attacks | Evaluate:
    """The options of a command line; `--help` explains each."""
    return tyro.extras.subcommand_cli_from_dict(
        {"attacks": Attacks, "evaluate": Evaluate},
        prog="python -m experiments.bench",
        description=__doc__,
        args=list(arguments),
    )


def run(options: Attacks) -> None:
    """Compare attack by attack; print the tables, and write them where asked to."""
    missing = bench_attacks.missing_toolkits()
    output = None if options.output is None else pathlib.Path(options.output).expanduser()
    if output is not None:
        runtime.check_writable(output.parent, remedy="choose another --output")
    network = options.network or os.fspath(_FILES / "plain.npz")
    images = options.images or os.fspath(_FILES / "images.npz")
    params = npz_network.read_params(network)
    subject_of = functools.cache(
        functools.partial(bench_attacks.make_subject, params, *npz_network.read_images(images))
    )
    chosen = [comparison for comparison in COMPARISONS if comparison.attack in options.attacks]
    for comparison in chosen:  # or its error comes after the first attacks
        subject_of(comparison.num_images or options.batch_size)
    conditions = {
        **runtime.describe(),
        "toolkits": bench_attacks.versions(),
        "cores": _cores(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "torch_threads": bench_attacks.set_torch_threads(_cores()),
        "network": os.path.basename(network),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "batch_size": options.batch_size,
        "repeats": options.repeats,
    }
    heading = _conditions_text(conditions)
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
    except KeyboardInterrupt as error:
        if rows:
            print(bench_attacks.text(rows), end="")
        error.args = (
            "stopped; the tables hold what was done, a new run starts from the beginning",
        )
        raise
    print(f"{heading}\n{bench_attacks.text(rows)}", end="")


def run_evaluate(options: Evaluate) -> None:
    """Compare one call with single ones; print the table."""
    params = npz_network.read_params(options.network or os.fspath(_FILES / "plain.npz"))
    inputs, labels = npz_network.read_images(options.images or os.fspath(_FILES / "images.npz"))
    size = min(options.num_examples, len(labels))
    device = jax.devices()[0]
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
    print(
        f"{device.platform} ({device.device_kind}), {_cores()} cores, JAX {jax.__version__}; "
        f"{size} images, "
        f"{options.batch_size} at a time, PGD of {options.num_steps} steps; medians of "
        f"{options.repeats}\n\n{bench_evaluate.text(timings, options.num_networks)}",
        end="",
    )


def _write(output: pathlib.Path, conditions: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """The tables, and every call's seconds."""
    text = f"{_conditions_text(conditions)}\n{bench_attacks.text(rows)}"
    runtime.atomic_write_text(output, f"# Attacks beside other toolkits\n\n{text}")
    content = {"conditions": conditions, "attacks": [bench_attacks.record(row) for row in rows]}
    runtime.write_json(output.with_suffix(".json"), content)


def _bar(progress: Progress, stage: str) -> Callable[[int, int], None]:
    """What moves a stage's bar."""

    def move(done: int, total: int) -> None:
        progress({"event": "call", "stage": stage, "done": done, "total": total, "unit": "call"})

    return move


def _conditions_text(conditions: Mapping[str, Any]) -> str:
    """What the numbers depend on, as a list in Markdown."""
    packages = {**conditions["versions"], **conditions["toolkits"]}
    flags = conditions["xla_flags"]
    lines = [
        ", ".join(f"{name} {version}" for name, version in packages.items()),
        f"{conditions['platform']}, {conditions['cores']} cores, load before the run "
        f"{conditions['load']}; JAX on CPU with {f'`XLA_FLAGS={flags}`' if flags else 'no flags'}, "
        f"PyTorch with {conditions['torch_threads']} threads",
        f"network {conditions['network']}, {conditions['parameters']:,} parameters; "
        f"{conditions['batch_size']} images a call, all of them classified correctly",
        f"seconds: medians, and ranges, of {conditions['repeats']} repeats in turn, after a call "
        "that warms up; compile s: what our first call took beyond the median",
        "ratio: our seconds over the peer's; success, and the mean distance over the images that "
        "both fool: ours / the peer's",
    ]
    return "".join(f"* {line}\n" for line in lines)


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    runtime.run_main(main)
