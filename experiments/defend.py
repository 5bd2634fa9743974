"""Defend a network by distillation through teacher assistants, attack it, and report.

    python -m experiments.defend digits
    python -m experiments.defend mnist --temperatures 1 20 100 --workdir runs/mnist
    python -m experiments.defend mnist --help

Stopped anywhere and started again with the same workdir, it goes on where it was. More
temperatures, seeds or assistants extend a workdir; any other difference is refused.
"""

import dataclasses
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, Literal

import tyro

from experiments import measure, training, workdir
from experiments.progress import Progress
from experiments.recipes import RECIPES, Recipe, smoke
from jdistill import data, report, runtime


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where things lie and how the run is made."""

    workdir: str | None = None
    """Folder of the run: checkpoints, results, figures, report (none: runs/defend-DATASET)."""
    data_dir: str | None = None
    """Folder of prepared TFDS sets (none: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    parallel: Literal["jit", "pmap", "sweep"] = "jit"
    """How training is spread over the devices: by the examples of a batch, chain after chain
    (jit, pmap), or by chains, all of them as one program (sweep: for accelerators)."""
    smoke: bool = False
    """Every size that is not given at its least: seconds, and numbers that mean nothing."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    recipe, options = parse(sys.argv[1:] if arguments is None else arguments)
    runtime.add_cpu_flags()
    runtime.enable_compilation_cache()
    run(recipe, options)


def parse(arguments: Sequence[str]) -> tuple[Recipe, Options]:
    """The recipe and the options of a command line; `--help` explains each."""
    # It changes the defaults, so that what is given beside it still holds.
    recipes = {
        name: smoke(recipe) if "--smoke" in arguments else recipe
        for name, recipe in RECIPES.items()
    }
    return tyro.extras.subcommand_cli_from_dict(
        {name: _command(recipe) for name, recipe in recipes.items()},
        prog="python -m experiments.defend",
        description=__doc__,
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
    )


def _command(default: Recipe) -> Any:
    """A function whose arguments, with their defaults, are the data set's command line."""

    def command(
        recipe: Recipe = default,
        run: Options = Options(),
    ) -> tuple[Recipe, Options]:
        return recipe, run

    command.__doc__ = f"{Recipe.__doc__} Data set: {default.dataset}."
    return command


def run(recipe: Recipe, options: Options) -> None:
    """Train what is not trained, attack what is not attacked, write the report."""
    started = time.monotonic()
    report.check_packages()
    suffix = "-smoke" if options.smoke else ""
    path = os.path.expanduser(options.workdir or f"runs/defend-{recipe.dataset}{suffix}")
    with workdir.reserved(path), Progress() as progress:
        dataset = data.load(recipe.dataset, data_dir=options.data_dir, progress=progress)
        folder, recipe = workdir.open_workdir(path, recipe, dataset)
    examples = data.Split(*(column[: recipe.train_examples] for column in dataset.train))
    test_examples = data.Split(*(column[: recipe.test_examples] for column in dataset.test))

    with workdir.recorded(folder, started=started, parallel=options.parallel):
        networks = training.train(folder, recipe, examples, mode=options.parallel)
        rows = measure.measure(folder, recipe, networks, test_examples)
    written = report.write_report(folder, rows, pictures=measure.pictures(folder, recipe))
    print(report.summary(rows))
    print(f"report: {written['report']}")


if __name__ == "__main__":
    runtime.run_main(main)
