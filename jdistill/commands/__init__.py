"""The command `jdistill`: defend, attack, verdict, report, plan.

    jdistill defend digits                            train, measure, judge, report
    jdistill defend my_study.py --workdir runs/mine   the same for a study of your own
    jdistill attack runs/mine --attack pgd --eps 0.1  any attack on the networks of a workdir
    jdistill verdict runs/mine                        the masking verdict on them
    jdistill report runs/mine                         the page again, from the tables
    jdistill plan mnist --topology v5e:1x1            what a study takes on a TPU; none is needed
    jdistill COMMAND --help                           options, with units, defaults, and costs

Compiled programs are kept in JAX's cache on disk (JAX_COMPILATION_CACHE_DIR, else in the user's
cache folder): the first run of a kind compiles, later ones start within seconds.
"""

import importlib
import importlib.util
import sys
from collections.abc import Sequence

from jdistill import runtime

_COMMANDS = ("defend", "attack", "verdict", "report", "plan")
_NEEDED = ("tyro", "tqdm", "matplotlib", "jinja2", "sklearn")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, and end the process as a command should."""
    runtime.run_main(run, list(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> None:
    """Run a command.

    Raises:
        ValueError: there is no such command, or its arguments are wrong.
        ModuleNotFoundError: a package that it needs is missing.
    """
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(__doc__)
        return
    if name not in _COMMANDS:
        raise ValueError(
            f"expected one of the commands {', '.join(_COMMANDS)}, got {name!r}; `jdistill --help` "
            "explains them"
        )
    for package in _NEEDED:
        if importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(
                f"expected the package {package}, which the command needs, got none; "
                "pip install 'jdistill[study]'"
            )
    command = importlib.import_module(f"jdistill.commands._{name}")
    runtime.add_cpu_flags()
    runtime.enable_compilation_cache()
    command.run(list(arguments[1:]))
