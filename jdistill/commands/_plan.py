"""Plan a study on a TPU slice that need not be there: what fits, and what it takes.

    jdistill plan digits
    jdistill plan mnist --topology v5e:4x4 --epochs 50 --seeds 0 1 2
    jdistill plan my_study.py --topology v5p:2x2x2 --json plan.json

The options of the study are those of `jdistill defend STUDY`, which --help there explains. Its own
training steps, sweep, forward passes and attacks are compiled ahead of time by the TPU compiler in
the package libtpu (pip install 'jdistill[tpu-plan]'). Nothing is trained: all numbers are
estimates. Costs on 2 CPU cores: a minute for the digits, two or three for mnist.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

import jax
import tyro

from jdistill import runtime
from jdistill import study as studies
from jdistill.commands import _defend, _studies
from jdistill.runtime import tpu


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """For which chips, and where the numbers go."""

    topology: str = "v5e:1x1"
    """Kind of chip (v4, v5e, v5p, v6e) and how many along each axis: v5e:4x4, v5p:2x2x2."""
    largest: bool = True
    """Look for the largest batch and stack that fit: more than half of the time."""
    json: str | None = None
    """File ending in .json that gets the numbers (none: they are only printed)."""


def run(arguments: Sequence[str]) -> None:
    """Print the plan."""
    name = arguments[0] if arguments else "--help"
    options, rest = tyro.cli(
        Options,
        prog=f"jdistill plan {'STUDY' if name.startswith('-') else name}",
        description=__doc__,
        args=list(arguments[1:]) if not name.startswith("-") else list(arguments),
        return_unknown_args=True,
    )
    file = None if options.json is None else pathlib.Path(options.json).expanduser()
    if file is not None:
        if file.suffix != ".json":
            raise ValueError(f"expected --json to end in .json, got {options.json!r}; name it so")
        runtime.check_writable(file.parent, remedy="choose another --json")
    _without_accelerator()
    of_file = name.endswith(".py")
    made, given = _defend._parse_file([name, *rest]) if of_file else _defend.parse([name, *rest])
    if given.workdir is not None:
        raise ValueError(f"expected no --workdir for a plan, got {given.workdir!r}; leave it out")
    if isinstance(made, _studies.Source):
        study = studies.smoke(made.study) if given.smoke else made.study
    else:
        study = _studies.of_recipe(made, given.data_dir).study
    plan = show(study, options.topology, largest=options.largest)
    if file is not None:
        runtime.write_json(file, plan.as_dict())


def show(study: studies.Study, topology: str, *, largest: bool = True) -> studies.Plan:
    """The plan of a study, made with a progress bar and printed."""
    _without_accelerator()
    with runtime.progress() as progress:
        plan = studies.plan(study, topology, largest=largest, callback=progress)
    print(plan)
    return plan


def _without_accelerator() -> None:
    """Ask for nothing at hand: neither a TPU nor a GPU is needed, nor taken."""
    tpu.check_compiler()
    jax.config.update("jax_platforms", "cpu")
