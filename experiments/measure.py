"""Measuring and attacking all networks of a run, row by row into `results.csv`.

The table is also what a stopped run goes on from: a network's row for an attack that is there is
not computed again. It is written whole after every network on CPU, after every attack elsewhere.
"""

import io
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments.progress import Progress
from experiments.recipes import Recipe
from experiments.training import Network, temperature_name
from jdistill import data, evaluate, nets, report, runtime, train

_NAMES = ("temperature", "seed", "generation")
_PICTURED = "carlini_wagner_l2"
_NUM_PICTURES = 8

Row = dict[str, Any]


def measure(
    folder: epath.Path, recipe: Recipe, networks: Sequence[Network], examples: data.Split
) -> list[Row]:
    """Evaluate and attack every network that the workdir's results do not hold yet.

    Args:
        folder: the workdir.
        recipe: whose attacks to run.
        networks: all trained networks.
        examples: the test set.

    Returns:
        The rows of `results.csv`, one a network and attack.
    """
    path = folder / "results.csv"
    rows = report.read_results(path) if path.exists() else []
    with Progress() as progress:
        for name, (plan, norm, eps) in recipe.attack_plans().items():
            done = {_identity(row) for row in rows if row["attack"] == name}
            pending = [network for network in networks if _identity(network) not in done]
            if done:
                progress.say(f"{name}: {len(networks) - len(pending)} of {len(networks)} done")
            if not pending:
                continue
            measures = _clean(recipe, pending, rows, examples, progress)
            for number, group in enumerate(_groups(pending), start=1):
                # The key is the attack's, so that networks are compared on the same draws.
                outcome = evaluate.under_attack(
                    nets.stack([network.logits_fn for network in group]),
                    *examples,
                    plan,
                    key=jax.random.key(zlib.crc32(name.encode())),
                    callback=progress,
                    stage=name if len(group) == len(pending) else f"{name} {number}/{len(pending)}",
                )
                if name == _PICTURED:
                    _save_pictures(folder, group, outcome, examples)
                rows += [
                    {
                        "dataset": recipe.dataset,
                        **{column: getattr(network, column) for column in _NAMES},
                        **measures[_identity(network)],
                        "attack": name,
                        "norm": norm,
                        "eps": eps,
                        **_attack_columns(outcome, index),
                    }
                    for index, network in enumerate(group)
                ]
                report.write_results(path, rows)
    return report.read_results(path)


def _groups(networks: Sequence[Network]) -> list[list[Network]]:
    """Networks to attack at once: all on an accelerator, where a stack runs under `vmap`.

    On CPU a stack runs one network after another, so each may as well have its rows kept at once.
    """
    if jax.default_backend() == "cpu":
        return [[network] for network in networks]
    return [list(networks)]


def pictures(folder: epath.Path, recipe: Recipe) -> dict[float, Any]:
    """The saved examples of each temperature's student, first seed."""
    found = {}
    for temperature in recipe.temperatures:
        path = _picture_path(folder, temperature, recipe.seeds[0], recipe.num_assistants + 1)
        if path.exists():
            found[temperature] = path
    return found


def _identity(row: Any) -> tuple[float, int, int]:
    """What names a network, in a row of results or in a `Network`."""
    values = row if isinstance(row, Mapping) else row._asdict()
    return float(values["temperature"]), int(values["seed"]), int(values["generation"])


def _clean(
    recipe: Recipe,
    networks: Sequence[Network],
    rows: Iterable[Row],
    examples: data.Split,
    progress: Progress,
) -> dict[tuple[float, int, int], Row]:
    """The columns without an attack, from the rows at hand or computed."""
    columns = report.COLUMNS[4 : report.COLUMNS.index("attack")]
    known = {_identity(row): {column: row[column] for column in columns} for row in rows}
    new = [network for network in networks if _identity(network) not in known]
    if new:
        measures = evaluate.clean(
            nets.stack([network.logits_fn for network in new]),
            *examples,
            num_sensitivity=recipe.sensitivity_examples,
            callback=progress,
        )
        for index, network in enumerate(new):
            accuracy = measures.accuracy[index]
            known[_identity(network)] = {
                "num_test": len(examples.labels),
                "test_accuracy": accuracy.value,
                "test_accuracy_low": accuracy.low,
                "test_accuracy_high": accuracy.high,
                "mean_abs_logit": float(measures.mean_abs_logit[index]),
                "num_sensitivity": measures.log10_sensitivity_softmax_examples.shape[1],
                "sensitivity_logits": float(measures.sensitivity_logits[index]),
                "log10_sensitivity_softmax": float(measures.log10_sensitivity_softmax[index]),
                "zero_gradient_fraction": float(measures.zero_gradient_fraction[index]),
            }
    return known


def _attack_columns(outcome: evaluate.AttackOutcome, index: int) -> Row:
    rate = outcome.success_rate[index]
    return {
        "num_attacked": outcome.success.shape[1],
        "success_rate": rate.value,
        "success_rate_low": rate.low,
        "success_rate_high": rate.high,
        "mean_distance": float(outcome.mean_distance[index]),
        "median_distance": float(outcome.median_distance[index]),
        "mean_queries": float(outcome.queries[index].mean()),
    }


def _picture_path(folder: epath.Path, temperature: float, seed: int, generation: int) -> epath.Path:
    name = f"adversarial_T{temperature_name(temperature)}_seed{seed}_g{generation}.npz"
    return folder / "figures" / name


def _save_pictures(
    folder: epath.Path,
    networks: Sequence[Network],
    outcome: evaluate.AttackOutcome,
    examples: data.Split,
) -> None:
    """A few examples of each network's adversarials, for the report."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for index, network in enumerate(networks):
        adversarial = outcome.inputs[index, :_NUM_PICTURES]
        path = _picture_path(folder, *_identity(network))
        content = io.BytesIO()
        np.savez(
            content,
            clean=examples.inputs[: len(adversarial)],
            adversarial=adversarial,
            labels=examples.labels[: len(adversarial)],
            predictions=train.predict(network.logits_fn, adversarial).argmax(axis=-1),
            distance=outcome.distance[index, : len(adversarial)],
        )
        runtime.atomic_write(path, content.getvalue())
