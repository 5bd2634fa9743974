"""Studies: own data, networks, and losses, from training to a report, in one resumable call.

In short::

    study = Study(data=..., chains={"no assistant": [stage] * 2, "1 assistant": [stage] * 3}, ...)
    tables = run(study, "runs/mine")

A `Study` is a value: what is trained (chains of stages, at temperatures and seeds), and what is
measured of it. `run` trains, measures, judges, and reports into a workdir, from which it goes on;
`train` does the first of it alone. `load` reads the tables again, `networks` the trained networks.
`smoke` makes any study small. `plan` says what it takes on a TPU that need not be there. `RECIPES`
are the studies that the command knows by name: of the paper's chains on the data sets of
`jdistill.data` (`Recipe`), of transformer students (`DeitRecipe`), of small students that are
exported (`EdgeRecipe`), of robust chains (`RobustRecipe`), and of examples that no student learns
robustly (`UnlearnableRecipe`).
"""

from jdistill.study import _deit, _edge, _recipes, _robust, _unlearnable
from jdistill.study._deit import DeitRecipe
from jdistill.study._edge import EdgeRecipe
from jdistill.study._plan import Plan, plan
from jdistill.study._recipes import Recipe
from jdistill.study._robust import RobustRecipe
from jdistill.study._run import Tables, load, networks, run, train, write_report
from jdistill.study._study import Stage, Study, smoke
from jdistill.study._training import Trained
from jdistill.study._unlearnable import UnlearnableRecipe

#: Studies that the command `jdistill defend` knows, by name.
RECIPES: dict[str, Recipe | DeitRecipe | EdgeRecipe | RobustRecipe | UnlearnableRecipe] = {
    **_recipes.RECIPES,
    **_deit.RECIPES,
    **_edge.RECIPES,
    **_robust.RECIPES,
    **_unlearnable.RECIPES,
}

__all__ = [
    "RECIPES",
    "DeitRecipe",
    "EdgeRecipe",
    "Plan",
    "Recipe",
    "RobustRecipe",
    "Stage",
    "Study",
    "Tables",
    "Trained",
    "UnlearnableRecipe",
    "load",
    "networks",
    "plan",
    "run",
    "smoke",
    "train",
    "write_report",
]
