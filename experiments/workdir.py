"""The folder of a run: what it holds, what may extend it, what is refused."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from experiments.recipes import Recipe
from jdistill import runtime
from jdistill.data import Dataset

# A workdir may grow along these; everything else about it is fixed when it is made.
_GROWING = ("temperatures", "seeds", "num_assistants")
# What may differ as long as the examples are the same (`checksum`): versions and wording.
_DESCRIBING = ("dataset_description",)


@contextlib.contextmanager
def reserved(path: str) -> Iterator[None]:
    """Check that the workdir can be written, before the work that may fail for other reasons.

    Where that work fails, a folder that was made for it is gone again.

    Raises:
        OSError: it cannot be written.
    """
    folder = epath.Path(path)
    made = not folder.exists()
    runtime.check_writable(folder)
    try:
        yield
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise


def open_workdir(path: str, recipe: Recipe, dataset: Dataset) -> tuple[epath.Path, Recipe]:
    """Make or reopen a workdir for a recipe.

    A workdir that exists is extended: the recipe comes back with its temperatures, seeds and
    assistants beside the new ones.

    Raises:
        ValueError: the workdir belongs to another run; the first difference is named.
    """
    workdir = epath.Path(path)
    config_path = workdir / "config.json"
    wanted = _config(recipe, dataset)
    if config_path.exists():
        held = _read(config_path)
        _refuse_difference(path, held, wanted)
        recipe = dataclasses.replace(
            recipe,
            temperatures=tuple(sorted({*held["temperatures"], *recipe.temperatures})),
            seeds=tuple(sorted({*held["seeds"], *recipe.seeds})),
            num_assistants=max(held["num_assistants"], recipe.num_assistants),
        )
        wanted = _config(recipe, dataset)
    runtime.write_json(config_path, wanted)
    return workdir, recipe


def read_workdir(path: str) -> tuple[epath.Path, Recipe, str]:
    """Open a workdir that is there; nothing is written.

    Returns:
        The folder, the recipe of its run, and the checksum of its data set.

    Raises:
        FileNotFoundError: there is no workdir.
        ValueError: its settings are not those of a run.
    """
    folder = epath.Path(path).expanduser()
    config_path = folder / "config.json"
    if not config_path.exists():
        raise FileNotFoundError(
            f"expected the workdir of a run, got {path}, which has no config.json; check the path, "
            "or make one with `python -m experiments.defend`"
        )
    try:
        held = json.loads(config_path.read_text())
        values = {field.name: held[field.name] for field in dataclasses.fields(Recipe)}
        for name in ("temperatures", "seeds"):
            values[name] = tuple(values[name])
        return folder, Recipe(**values), str(held["dataset_checksum"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected the settings of a run in {config_path}, got a file that does not hold them "
            f"({type(error).__name__}: {error}); use the version of jdistill that wrote it, or "
            "choose another workdir"
        ) from None


def check_dataset(dataset: Dataset, checksum: str) -> None:
    """Refuse a data set that is not the run's.

    Raises:
        ValueError: its checksum is another one.
    """
    if dataset.checksum != checksum:
        raise ValueError(
            f"expected the {dataset.name} of the run (checksum {checksum}), got another one "
            f"({dataset.checksum}); pass the --data-dir that the run was made with"
        )


@contextlib.contextmanager
def recorded(folder: epath.Path, *, started: float, parallel: str) -> Iterator[None]:
    """Write `run.json` when the block ends, however it ends.

    It holds versions, devices and seconds of this start; below `earlier_starts` those of the
    starts before it, on whatever machine; and the seconds of all of them.

    Args:
        folder: the workdir.
        started: `time.monotonic()` at the start.
        parallel: how the training step is spread over the devices.
    """
    try:
        yield
    finally:
        path = folder / "run.json"
        try:
            before = dict(json.loads(path.read_text()))
            earlier = [*before.pop("earlier_starts", []), before]
            total = float(before.pop("seconds_all_starts"))
        except (OSError, ValueError, KeyError, TypeError):
            earlier, total = [], 0.0
        seconds = round(time.monotonic() - started, 1)
        run = {**runtime.describe(), "parallel": parallel, "seconds": seconds}
        run["seconds_all_starts"] = round(total + seconds, 1)
        runtime.write_json(path, {**run, "earlier_starts": earlier})


def forget_epochs(log: epath.Path, labels: Mapping[str, Any], *, after: int) -> None:
    """Drop the log lines of a stage's epochs that will be run again.

    Raises:
        ValueError: a line of the log is none of ours.
    """
    lines = runtime.read_jsonl(log)
    for number, line in enumerate(lines, start=1):
        if not isinstance(line, dict) or not isinstance(line.get("epoch"), int):
            raise ValueError(
                f"expected an epoch's record in line {number} of {log}, got {str(line)[:60]!r}; "
                "remove that line"
            )
    kept = [
        line
        for line in lines
        if line["epoch"] <= after or any(line.get(name) != labels[name] for name in labels)
    ]
    if len(kept) < len(lines):
        runtime.atomic_write_text(log, "".join(json.dumps(line) + "\n" for line in kept))


def _config(recipe: Recipe, dataset: Dataset) -> dict[str, Any]:
    """The whole configuration as JSON has it (tuples are lists there)."""
    settings = dataclasses.asdict(recipe)
    settings["dataset_checksum"] = dataset.checksum
    settings["dataset_description"] = {
        "version": dataset.version,
        "fingerprint": dataset.fingerprint,
        "note": dataset.note,
    }
    return json.loads(json.dumps(settings))


def _read(path: epath.Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_text())
        return {**held, **{name: held[name] for name in _GROWING}}
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"expected the settings of an earlier run in {path}, got a file that does not hold "
            "them; choose another --workdir, or delete this one"
        ) from None


def _refuse_difference(path: str, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in wanted:
        if name in (*_GROWING, *_DESCRIBING) or held.get(name) == wanted[name]:
            continue
        raise ValueError(
            f"expected {name}={held.get(name)!r}, as in the workdir {path}, got {wanted[name]!r}; "
            "choose another --workdir, or the same value (only temperatures, seeds and "
            "num_assistants may extend a workdir)"
        )
