"""Write the report of a workdir again, from its tables.

    jdistill report runs/mnist

The tables are checked first: those that are not as the run wrote them are refused by name, and the
run writes them anew from what it has measured. It computes nothing, and takes seconds.
"""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from jdistill import study as studies
from jdistill.commands import _studies


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which workdir."""

    workdir: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="WORKDIR")]]
    """Folder of a run of `jdistill defend`."""


def run(arguments: Sequence[str]) -> None:
    """Write the report, and print the table."""
    options = tyro.cli(Options, prog="jdistill report", description=__doc__, args=list(arguments))
    folder = _studies.workdir_path(options.workdir)
    page = studies.write_report(folder)
    print(studies.load(folder))
    print(f"report: {page}")
