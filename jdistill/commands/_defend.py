"""Defend a network by distillation through teacher assistants, attack it, and report.

    jdistill defend digits
    jdistill defend mnist --temperatures 1 20 100 --workdir runs/mnist
    jdistill defend my_study.py --workdir runs/mine
    jdistill defend mnist --help

Stopped anywhere and started again with the same workdir, it goes on where it was. More
temperatures, seeds, or assistants extend a workdir; any other difference is refused. A file of your
own holds `study`, a jdistill.study.Study, or a function whose keyword arguments become options.

Costs on 2 CPU cores: digits (1,197 images of 8x8) two minutes; mnist and fashion_mnist (55,000 of
28x28) an hour; cifar10 many hours, meant for an accelerator. `--smoke` is seconds.
"""

import dataclasses
import inspect
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import tyro

from jdistill import runtime
from jdistill import study as studies
from jdistill.commands import _studies
from jdistill.study import RECIPES


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Where things lie and how the run is made."""

    workdir: str | None = None
    """Folder of the run: checkpoints, results, figures, report (none: runs/defend-NAME)."""
    data_dir: str | None = None
    """Folder of prepared TFDS sets (none: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    parallel: Literal["jit", "pmap", "sweep"] = "jit"
    """How training is spread over the devices: by the examples of a batch, run after run
    (jit, pmap), or by runs, all of them as one program (sweep: for accelerators)."""
    smoke: bool = False
    """Every size that is not given at its least: seconds, and numbers that mean nothing."""
    distributed: bool = False
    """Join the processes that run the same command on other hosts, which Cloud TPU, Slurm, and
    Kubernetes name; elsewhere give the three below."""
    coordinator_address: str | None = None
    """host:port of process 0, which the others reach."""
    num_processes: int | None = None
    """Processes in all, one per host."""
    process_id: int | None = None
    """Number of this process, from 0."""

    def join(self) -> None:
        """Join the other hosts, where asked to."""
        address = self.coordinator_address, self.num_processes, self.process_id
        if self.distributed or address != (None, None, None):
            runtime.initialize(*address)


def run(arguments: Sequence[str]) -> None:
    """Run the command."""
    name = arguments[0] if arguments else "--help"
    of_file = name.endswith(".py")
    made, options = _parse_file(arguments) if of_file else parse(arguments)
    options.join()
    suffix = "-smoke" if options.smoke else ""
    label = pathlib.Path(name).stem if of_file else name
    default = f"runs/defend-{label}{suffix}"
    folder = _studies.workdir_path(default if options.workdir is None else options.workdir)
    if isinstance(made, _studies.Source):
        source = made
        if options.smoke:
            source = source._replace(study=studies.smoke(source.study))
    else:
        source = _studies.of_recipe(_studies.extended(made, folder), options.data_dir)
    tables = studies.run(source.study, folder, parallel=options.parallel, recipe=source.recipe)
    print(tables)
    print(f"report: {tables.report}")


def parse(arguments: Sequence[str]) -> tuple[_studies.AnyRecipe, Options]:
    """The recipe and the options of a command line; `--help` explains each."""
    # It changes the defaults, so that what is given beside it still holds.
    recipes = {
        name: recipe.smallest() if "--smoke" in arguments else recipe
        for name, recipe in RECIPES.items()
    }
    known = [*recipes, "-h", "--help"]
    if not arguments or arguments[0] not in known:
        raise ValueError(
            f"expected one of {', '.join(recipes)} or a Python file, got "
            f"{arguments[0] if arguments else 'nothing'!r}; `jdistill defend --help` explains them"
        )
    return tyro.extras.subcommand_cli_from_dict(
        {name: _command(recipe) for name, recipe in recipes.items()},
        prog="jdistill defend",
        description=__doc__,
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
    )


# What says which of the recipes it is.
_FIXED = ("dataset", "network")


def _command(default: _studies.AnyRecipe) -> Any:
    """A function whose arguments, with their defaults, are the recipe's command line."""
    kind: Any = type(default)
    fixed = [name for name in _FIXED if name in kind.__dataclass_fields__]
    line = type(
        "_Line",
        (kind,),
        {
            "__annotations__": dict.fromkeys(fixed, tyro.conf.Suppress[str]),
            "__doc__": kind.__doc__,
            "__module__": kind.__module__,
        },
    )
    shown: Any = dataclasses.dataclass(frozen=True, kw_only=True)(line)
    values = shown(**vars(default))

    def command(recipe: shown = values, run: Options = Options()) -> tuple[Any, Options]:
        return kind(**vars(recipe)), run

    summary, _, rest = kind.__doc__.partition("\n")
    command.__doc__ = f"{summary} Data set: {default.dataset}.\n{rest}"
    return command


def _parse_file(arguments: Sequence[str]) -> tuple[_studies.Source, Options]:
    """The study of a file and the options."""
    path, *rest = arguments
    found = _studies.in_file(path)
    program: dict[str, Any] = {"prog": f"jdistill defend {path}", "args": rest}
    if not callable(found):
        options = tyro.cli(Options, description=__doc__, **program)
        return _studies.made(found, path, {}), options
    given, options = _both(found, program)
    return _studies.made(found, path, given), options


def _both(found: Any, program: dict[str, Any]) -> tuple[dict[str, Any], Options]:
    """The keyword arguments of a file's function, and the options."""
    fields: list[Any] = [
        (
            name,
            each.annotation if each.annotation is not each.empty else type(each.default),
            dataclasses.field(default=each.default)
            if each.default is not each.empty
            else dataclasses.field(),
        )
        for name, each in inspect.signature(found).parameters.items()
    ]
    own = dataclasses.make_dataclass("StudyOptions", fields, kw_only=True, frozen=True)
    own.__doc__ = inspect.getdoc(found) or "Options of the study."

    def command(study: own, run: Options = Options()) -> tuple[Any, Options]:  # type: ignore[valid-type]
        return study, run

    parsed, options = tyro.cli(
        command, description=__doc__, config=(tyro.conf.OmitArgPrefixes,), **program
    )
    return dataclasses.asdict(parsed), options
