"""Studies from recipes, files, and workdirs; and the paths of workdirs."""

import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from jdistill.study import (
    RECIPES,
    DeitRecipe,
    EdgeRecipe,
    Recipe,
    RobustRecipe,
    Study,
    UnlearnableRecipe,
    _workdir,
)

Made = Callable[..., Any]


class Source(NamedTuple):
    """A study, and what makes it again.

    Attributes:
        study: itself.
        recipe: JSON-able, kept in the workdir.
    """

    study: Study
    recipe: dict[str, Any]


def workdir_path(given: str) -> epath.Path:
    """The path of a workdir.

    Raises:
        ValueError: it is empty, of a user that is not there, or an address that is no folder.
    """
    if not given.strip():
        raise ValueError("expected --workdir to be a folder, got an empty text; name one")
    if given.startswith("file://"):
        raise ValueError(
            f"expected --workdir to be a path or gs://…, got {given!r}; pass the path without "
            "file://"
        )
    expanded = os.path.expanduser(given)
    if expanded.startswith("~"):
        raise ValueError(
            f"expected --workdir in the folder of a user that is there, got {given!r}; pass "
            "another path"
        )
    return epath.Path(expanded)


AnyRecipe = Recipe | DeitRecipe | EdgeRecipe | RobustRecipe | UnlearnableRecipe


def of_recipe(recipe: AnyRecipe, data_dir: str | None) -> Source:
    """The study of a recipe."""
    kept = dataclasses.asdict(recipe)
    if not isinstance(recipe, Recipe):
        kept["kind"] = type(recipe).__name__
    return Source(recipe.study(data_dir=data_dir), kept)


def extended(recipe: AnyRecipe, folder: epath.Path) -> AnyRecipe:
    """The recipe with the assistants that its workdir has already."""
    if not isinstance(recipe, Recipe):
        return recipe
    held = (_held(folder) or {}).get("num_assistants")
    more = held if isinstance(held, int) else 0
    return dataclasses.replace(recipe, num_assistants=max(more, recipe.num_assistants))


def in_file(path: str) -> Study | Made:
    """The `study` of a file: a study, or a function that returns one.

    What lies beside the file can be imported, as where Python runs it.

    Raises:
        ValueError: it has no such thing, or cannot be run; names the line.
        FileNotFoundError: there is no file.
    """
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"expected the name of a recipe or the path of a Python file, got {path!r}, which is "
            "neither; check it"
        )
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(file.resolve().parent)
    if folder not in sys.path:  # and it stays: functions may import when they are called
        sys.path.insert(0, folder)
    sys.modules[file.stem] = module  # where its functions say that they are from
    with _lines_named(file):
        spec.loader.exec_module(module)
    found = getattr(module, "study", None)
    if not isinstance(found, Study) and not callable(found):
        raise ValueError(
            f"expected {path} to define `study`, a jdistill.study.Study or a function that returns "
            f"one, got {type(found).__name__}; name it so"
        )
    return found


@contextlib.contextmanager
def _lines_named(file: pathlib.Path) -> Iterator[None]:
    """Context in which errors say where in the user's files they come from."""
    try:
        yield
    except Exception as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ValueError(f"{_line(error, file)}: {kind}{error}") from error


def _line(error: Exception, file: pathlib.Path) -> str:
    """File and line of the innermost code that lies beside a file."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}, line {error.lineno}"
    folder, found = file.resolve().parent, str(file)
    for frame in traceback.extract_tb(error.__traceback__):
        there = pathlib.Path(frame.filename).resolve()
        inside = there.relative_to(folder).parts if there.is_relative_to(folder) else None
        if inside and "site-packages" not in inside and not there.is_relative_to(_LIBRARY):
            found = f"{frame.filename}, line {frame.lineno}"
    return found


_LIBRARY = pathlib.Path(__file__).resolve().parents[1]


def made(found: Study | Made, path: str, options: Mapping[str, Any]) -> Source:
    """The study of a file."""
    with _lines_named(pathlib.Path(path).expanduser()):
        study = found(**options) if callable(found) else found
    if not isinstance(study, Study):
        raise ValueError(
            f"expected study() in {path} to return a jdistill.study.Study, got "
            f"{type(study).__name__}; return one"
        )
    return Source(study, {"file": os.path.abspath(path), "options": dict(options)})


def of_workdir(folder: epath.Path, data_dir: str | None) -> Study:
    """The study that a workdir belongs to, made again from its recipe.

    Raises:
        FileNotFoundError: there is no workdir.
        ValueError: its recipe is none of the command's.
    """
    if not (folder / "config.json").exists():
        raise FileNotFoundError(
            f"expected the workdir of a run, got {folder}, which has no config.json; check the "
            "path, or make one with `jdistill defend`"
        )
    recipe = _held(folder)
    if recipe is None:
        raise ValueError(
            f"expected a workdir made by `jdistill defend`, got {folder}, which was made by "
            "study.run in Python; use study.networks there"
        )
    if "file" in recipe:
        found = in_file(recipe["file"])
        return made(found, recipe["file"], recipe.get("options", {})).study
    try:
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in recipe.items()
        }
        kinds = {type(each).__name__: type(each) for each in RECIPES.values()}
        kind: Any = kinds.get(values.pop("kind", Recipe.__name__), Recipe)
        return kind(**values).study(data_dir=data_dir)
    except TypeError as error:
        raise ValueError(
            f"expected the recipe of a run in {folder / 'config.json'}, got another ({error}); use "
            "the version of jdistill that wrote it, or choose another workdir"
        ) from None


def _held(folder: epath.Path) -> dict[str, Any] | None:
    config = _workdir.read_config(folder)
    recipe = None if config is None else config.get("recipe")
    return json.loads(json.dumps(recipe)) if isinstance(recipe, dict) else None
