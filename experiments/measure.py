"""Measuring and attacking all networks of a run, chain by chain, into the tables of the workdir.

What was done to a network lies in `shards`, a file for each network, attack and batch; a stopped
run goes on from there, and the tables are made of it. They are written after every chain.
"""

import io
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from experiments import evidence
from experiments.evidence import Chain, Clean
from experiments.networks import weights_hash
from experiments.progress import Progress
from experiments.recipes import Recipe
from experiments.training import Network, temperature_name
from jdistill import __version__, data, diagnose, evaluate, nets, report, runtime, train

_PICTURED = "carlini_wagner_l2"
_NUM_PICTURES = 8

Row = dict[str, Any]


def measure(
    folder: epath.Path, recipe: Recipe, networks: Sequence[Network], examples: data.Split
) -> list[Row]:
    """Evaluate and attack every network, as far as the workdir's shards do not say it already.

    Args:
        folder: the workdir.
        recipe: whose attacks to run.
        networks: all trained networks.
        examples: the test set.

    Returns:
        The rows of `results.csv`, one a network and attack.
    """
    shards = runtime.ShardFolder(folder / "shards")
    before = _tables(folder)
    chains: list[Chain] = []
    tables: dict[str, list[Row]] = {kind: [] for kind in report.TABLES}
    with Progress() as progress:
        for members in _chains(networks):
            chain = _measured(members, recipe, examples, shards, progress)
            chains.append(chain)
            _save_pictures(folder, chain, examples)
            tables["results"] += evidence.results(chain)
            tables["curves"] = evidence.curves(chains)
            tables["sensitivity"] += evidence.sensitivity(chain)
            tables["calibration"] += evidence.calibration(chain)
            tables["distances"] += evidence.distances(chain)
            tables["comparisons"] += evidence.comparisons(chain)
            if plan := recipe.transfer_plan():
                tables["transfer"] += evidence.transfer(chain, plan, examples)
            # What an earlier start measured stays until its turn comes.
            done = {_run(chain.run) for chain in chains}
            rest = {
                kind: [row for row in rows if _run(row) not in done]
                for kind, rows in before.items()
            }
            _write(folder, {kind: rows + rest.get(kind, []) for kind, rows in tables.items()})
        tables["comparisons"] += evidence.comparisons_over_seeds(chains)
        _write(folder, tables)
        _write_verdicts(folder, recipe, networks, examples, shards, progress)
    return report.read_results(folder / "results.csv")


def _tables(folder: epath.Path) -> dict[str, list[Row]]:
    """The tables that are there."""
    return {
        kind: report.read_table(folder / f"{kind}.csv", kind)
        for kind in report.TABLES
        if (folder / f"{kind}.csv").exists()
    }


def _run(row: Row) -> tuple[float, int | None]:
    """The chain that a row is about; over several seeds, that of none."""
    return float(row["temperature"]), None if row["seed"] is None else int(row["seed"])


def pictures(folder: epath.Path, recipe: Recipe) -> dict[float, Any]:
    """The saved examples of each temperature's student, first seed."""
    found = {}
    for temperature in recipe.temperatures:
        path = _picture_path(folder, temperature, recipe.seeds[0], recipe.num_assistants + 1)
        if path.exists():
            found[temperature] = path
    return found


def _chains(networks: Sequence[Network]) -> list[list[Network]]:
    """The networks of each temperature and seed, by generation."""
    found: dict[tuple[float, int], list[Network]] = {}
    for network in networks:
        found.setdefault((network.temperature, network.seed), []).append(network)
    return [sorted(chain, key=lambda network: network.generation) for chain in found.values()]


def _measured(
    members: Sequence[Network],
    recipe: Recipe,
    examples: data.Split,
    shards: runtime.ShardFolder,
    progress: Progress,
) -> Chain:
    """Everything that is done to a chain: each network alone, on CPU, or the stack at once."""
    stack = nets.stack([network.logits_fn for network in members])
    names = [_name(network) for network in members]
    progress.prefix = f"T={members[0].temperature:g}, seed {members[0].seed}, "
    clean = [_clean(network, recipe, examples, shards, progress) for network in members]

    def outcome(name: str, plan: evaluate.AttackPlan) -> evaluate.AttackOutcome:
        return evaluate.under_attack(
            stack,
            *examples,
            plan,
            # The key is the attack's, so that networks are compared on the same draws.
            key=jax.random.key(zlib.crc32(name.encode())),
            callback=progress,
            stage=name,
            shards=shards,
            names=names,
        )

    found = Chain(
        dataset=recipe.dataset,
        networks=members,
        clean=clean,
        attacks={name: outcome(name, plan) for name, plan in recipe.attack_plans().items()},
        distances={
            norm: outcome(f"distance_{norm}", plan)
            for norm, plan in recipe.distance_plans().items()
        },
        crafted=outcome("transfer", crafting) if (crafting := recipe.transfer_plan()) else None,
    )
    progress.prefix = ""
    return found


def _clean(
    network: Network,
    recipe: Recipe,
    examples: data.Split,
    shards: runtime.ShardFolder,
    progress: Progress,
) -> Clean:
    """The measures without an attack, out of their shard or computed."""
    name = f"clean/{_name(network)}"
    of = weights_hash(network.logits_fn)
    kept = shards.get(name)
    if kept is None or str(kept["of"]) != of:
        measures = evaluate.clean(
            nets.stack([network.logits_fn]),
            *examples,
            num_sensitivity=recipe.sensitivity_examples,
            callback=progress,
        )
        accuracy, calibrated = measures.accuracy[0], measures.calibration[0]
        sensitivities = measures.log10_sensitivity_softmax_examples[0]
        columns = {
            "num_test": len(examples.labels),
            "test_accuracy": accuracy.value,
            "test_accuracy_low": accuracy.low,
            "test_accuracy_high": accuracy.high,
            "mean_abs_logit": float(measures.mean_abs_logit[0]),
            "num_sensitivity": len(sensitivities),
            "sensitivity_logits": float(measures.sensitivity_logits[0]),
            "log10_sensitivity_softmax": float(measures.log10_sensitivity_softmax[0]),
            "zero_gradient_fraction": float(measures.zero_gradient_fraction[0]),
        }
        wanted = report.TABLES["calibration"][4:]
        calibration = {column: getattr(calibrated, column) for column in wanted}
        kept = {
            "of": np.array(of),
            "correct": measures.correct[0],
            "sensitivities": sensitivities,
            "columns": np.array(json.dumps(columns)),
            "calibration": np.array(json.dumps(calibration)),
        }
        shards[name] = kept
    return Clean(
        kept["correct"],
        kept["sensitivities"],
        json.loads(str(kept["columns"])),
        json.loads(str(kept["calibration"])),
    )


def _write(folder: epath.Path, tables: Mapping[str, Sequence[Row]]) -> None:
    for kind, rows in tables.items():
        if rows or kind == "results":
            report.write_table(folder / f"{kind}.csv", kind, rows)


def _write_verdicts(
    folder: epath.Path,
    recipe: Recipe,
    networks: Sequence[Network],
    examples: data.Split,
    shards: runtime.ShardFolder,
    progress: Progress,
) -> None:
    """The verdict on the last student of each temperature and on the plain teacher, first seed.

    The plain teacher, where T = 1 is among the temperatures, is what transferred examples are
    crafted on.
    """
    if not recipe.verdict_examples:
        return
    inputs, labels = (column[: recipe.verdict_examples] for column in examples)
    of_seed = [network for network in networks if network.seed == recipe.seeds[0]]
    plain = [network for network in of_seed if (network.temperature, network.generation) == (1, 0)]
    last = max(network.generation for network in of_seed)
    judged = [*plain, *(network for network in of_seed if network.generation == last)]
    rows = []
    for network in judged:
        surrogate = next((other for other in plain if other is not network), None)
        name = f"verdict/{_name(network)}"
        of = "-".join(
            [
                __version__,
                weights_hash(network.logits_fn),
                weights_hash(surrogate.logits_fn) if surrogate else "alone",
            ]
        )
        kept = shards.get(name)
        if kept is None or str(kept["of"]) != of:
            progress.prefix = f"verdict on T={network.temperature:g}, "
            verdict = diagnose.masking(
                network.logits_fn,
                jax.random.key(zlib.crc32(b"verdict")),
                inputs,
                labels,
                eps=recipe.eps,
                train_temperature=network.temperature,
                surrogate=surrogate and surrogate.logits_fn,
                callback=progress,
            )
            kept = {"of": np.array(of), "verdict": np.array(json.dumps(verdict.as_dict()))}
            shards[name] = kept
            progress.prefix = ""
        rows.append(
            {
                "dataset": recipe.dataset,
                "temperature": network.temperature,
                "seed": network.seed,
                "generation": network.generation,
                "verdict": json.loads(str(kept["verdict"])),
            }
        )
        report.write_verdicts(folder / "verdicts.json", rows)


def _name(network: Network) -> str:
    """A network's name among the shards."""
    temperature = temperature_name(network.temperature)
    return f"T{temperature}_seed{network.seed}_g{network.generation}"


def _picture_path(folder: epath.Path, temperature: float, seed: int, generation: int) -> epath.Path:
    name = f"adversarial_T{temperature_name(temperature)}_seed{seed}_g{generation}.npz"
    return folder / "figures" / name


def _save_pictures(folder: epath.Path, chain: Chain, examples: data.Split) -> None:
    """A few examples of each network's adversarials, for the report."""
    outcome = chain.attacks.get(_PICTURED)
    if outcome is None:
        return
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    for index, network in enumerate(chain.networks):
        adversarial = outcome.inputs[index, :_NUM_PICTURES]
        path = _picture_path(folder, network.temperature, network.seed, network.generation)
        if path.exists():
            continue
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
