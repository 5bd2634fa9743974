"""Measuring, attacking, and judging all networks of a study, into the tables of its workdir.

What was done to a network lies in `shards`, one entry per network, attack, and batch: a stopped run
goes on from there, and the tables are made of it.
"""

import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jdistill import (
    __version__,
    _entries,
    _fingerprint,
    diagnose,
    evaluate,
    report,
    runtime,
    train,
)
from jdistill.evaluate._agreement import agreement_of_logits
from jdistill.report import NetworkName
from jdistill.robust._objective import Adversarial
from jdistill.study._study import Examples, Stage, Study, at
from jdistill.study._training import Trained, chains_of
from jdistill.train._mixup import Mixup

Row = dict[str, Any]
Measured = tuple[evaluate.Evaluation, list[NetworkName]]
Agreements = dict[tuple[NetworkName, NetworkName], evaluate.Agreement]
_NUM_PICTURES = 8
_PARTS_OF_A_VERDICT = 16  # about; the attacks and probes of `diagnose.masking`
_SECONDS_BETWEEN_TABLES = 60.0


def measure(
    folder: epath.Path,
    study: Study,
    networks: Sequence[Trained],
    examples: Examples,
    *,
    first: int,
    progress: Any,
) -> dict[Any, Any]:
    """Evaluate, attack, and judge every network, as far as the workdir's shards do not say it.

    The tables are written every minute, so that a stopped study leaves what it has.

    Args:
        folder: the workdir.
        study: what to measure.
        networks: all trained networks.
        examples: of the study.
        first: number of the first stage among those of the study.
        progress: a callback with `begin`.

    Returns:
        Pictures for the report.
    """
    shards = runtime.ShardFolder(folder / "shards")
    measured: list[Measured] = []
    agreements: Agreements = {}
    logits: dict[NetworkName, np.ndarray] = {}  # of the networks of one run
    groups = list(_groups(networks))
    written = time.monotonic()
    num_parts = 2 + len(study.attacks) + len(study.distances)
    for number, group in enumerate(groups, start=1):
        prefix = f"T={group[0].temperature:g}, seed {group[0].seed}, "
        progress.begin(first + number - 1, prefix=prefix, num_parts=num_parts)
        result = evaluate.evaluate(
            [network.logits_fn for network in group],
            *examples.test,
            attacks=study.attacks,
            distances=study.distances,
            transfer=study.transfer,
            num_sensitivity=study.num_sensitivity,
            callback=progress,
            shards=shards,
            names=[network.stem for network in group],
        )
        names = [_name(examples, network) for network in group]
        measured.append((_slim(result), names))
        logits |= zip(names, result.clean.logits, strict=True)
        finished = number == len(groups)
        last = finished or groups[number][0][:3] != group[0][:3]
        if last:
            agreements |= _agreements(study, networks, examples, logits)
            logits = {}
        # They are of everything so far, so that each is larger than the one before.
        if finished or (last and time.monotonic() - written > _SECONDS_BETWEEN_TABLES):
            write_tables(folder, study, examples, measured, agreements, finished=finished)
            written = time.monotonic()
    if study.verdict is not None:
        rows = list(_verdicts(study, networks, examples, shards, first + len(groups), progress))
        if runtime.is_main_process():
            report.write_verdicts(folder / "verdicts.json", rows)
    return pictures(measured, study)


def num_stages(study: Study) -> int:
    """Groups of networks to be measured, and verdicts."""
    runs = len(study.temperatures) * len(study.seeds)
    architectures = [
        len({_fingerprint.fingerprint(_fingerprint.describe(stage.model)) for stage in stages})
        for stages in study.longest_chains().values()
    ]
    judged = 0
    if study.verdict is not None:
        judged = len(set(study.students().values())) * len(study.temperatures)
        judged += 1.0 in study.temperatures
    return runs * sum(architectures) + judged


def _slim(result: evaluate.Evaluation) -> evaluate.Evaluation:
    """The evaluation without logits, and with no more adversarial inputs than are shown.

    These are most of its size.
    """
    few = {
        name: outcome._replace(inputs=outcome.inputs[:, :_NUM_PICTURES].copy())
        for name, outcome in result.attacks.items()
    }
    none = {
        norm: outcome._replace(inputs=outcome.inputs[:, :0])
        for norm, outcome in result.distances.items()
    }
    clean = result.clean._replace(logits=result.clean.logits[:, :0].copy())
    return result._replace(clean=clean, attacks=few, distances=none)


def write_tables(
    folder: epath.Path,
    study: Study,
    examples: Examples,
    measured: Sequence[Measured],
    agreements: Agreements,
    *,
    finished: bool,
) -> None:
    """Write the tables of what was measured, on the main process."""
    if not runtime.is_main_process():
        return
    compared = _compared(study, examples, measured)
    tables = report.tables(measured, compared=compared, agreements=agreements)
    trained = trainings(study)
    for row in tables["results"]:
        if found := trained.get((row.get("chain", ""), row["generation"])):
            row["training"] = found
    for kind, rows in tables.items():
        path = folder / f"{kind}.csv"
        if rows or kind == "results":
            report.write_table(path, kind, rows)
        elif finished:  # of an earlier start, about what is no longer measured
            path.unlink(missing_ok=True)


def trainings(study: Study) -> dict[tuple[str, int], str]:
    """How the networks of a chain and generation were trained, where it was not ordinarily.

    Adversarially, by an objective that is not the library's, or nobody says how. What mixes or
    augments the examples is ordinary, as is any loss of the network's outputs.
    """
    longest = study.longest_chains()
    found = {
        (name if len(longest) > 1 else "", number): _training(stage)
        for name, stages in longest.items()
        for number, stage in enumerate(stages)
    }
    return {place: training for place, training in found.items() if training}


def _training(stage: Stage) -> str:
    if stage.frozen is not None:
        return "unknown"
    step: Any = stage.step()
    if not isinstance(step, train.TrainStep):  # of the user's own
        return "custom"
    if isinstance(step.objective, Adversarial):
        return "adversarial"
    return "" if step.objective is None or isinstance(step.objective, Mixup) else "custom"


def _name(examples: Examples, network: Trained) -> NetworkName:
    return NetworkName(
        dataset=examples.name,
        temperature=network.temperature,
        seed=network.seed,
        generation=network.generation,
        chain=network.chain,
    )


def pictures(measured: Sequence[Measured], study: Study) -> dict[Any, Any]:
    """Adversarial images of each temperature's last student, first seed, for the report."""
    found: dict[Any, Any] = {}
    for result, names in measured:
        for place, name in enumerate(names):
            if name.seed == study.seeds[0]:
                label = f"{name.chain}, T={name.temperature:g}" if name.chain else name.temperature
                arrays = report.pictures(result, place)
                if arrays is not None:
                    found[label] = arrays
    return found


def _groups(networks: Sequence[Trained]) -> Iterator[list[Trained]]:
    """The networks of each run that have one architecture, to be measured as a stack."""
    groups: dict[Any, list[Trained]] = {}
    for network in networks:
        leaves, structure = jax.tree.flatten(network.logits_fn)
        # Not jax.typeof, which has the mesh of a trained array and none of a restored one.
        shapes = tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        key = (network[:3], structure, shapes)
        groups.setdefault(key, []).append(network)
    yield from groups.values()


def _compared(
    study: Study, examples: Examples, measured: Sequence[Measured]
) -> list[tuple[NetworkName, NetworkName]]:
    """Each chain's student beside that of the first chain, seed by seed."""
    there = {name for _, names in measured for name in names}
    baseline, *others = study.students().values()
    pairs = [
        tuple(
            NetworkName(examples.name, temperature, seed, generation, chain)
            for chain, generation in (other, baseline)
        )
        for temperature in study.temperatures
        for seed in study.seeds
        for other in dict.fromkeys(others)
        if other != baseline
    ]
    return [(one, other) for one, other in pairs if one in there and other in there]


def _agreements(
    study: Study,
    networks: Sequence[Trained],
    examples: Examples,
    logits: Mapping[NetworkName, np.ndarray],
) -> Agreements:
    """Agreement with their teachers of those networks whose logits are given.

    Networks that chains share have each pair once, under the first chain that has them. It takes
    no further pass: the logits are those that the accuracy was measured by.
    """
    chains = {chain.name: chain for chain in chains_of(study)}
    found = {}
    for network in networks:
        name, chain = _name(examples, network), chains[network.chain]
        if name not in logits or chain.owners[name.generation] != name.chain:
            continue
        lesson = study.lesson(chain.stages[name.generation], name.generation)
        for number in lesson.teachers:
            own = name._replace(generation=number)
            teacher = own._replace(chain=chain.owners[number])
            found[name, teacher] = agreement_of_logits(
                logits[name], logits[own], examples.test.labels
            )
    return found


def _verdicts(
    study: Study,
    networks: Sequence[Trained],
    examples: Examples,
    shards: runtime.ShardFolder,
    number: int,
    progress: Any,
) -> Iterator[Row]:
    """The verdicts on the student of each chain and on the teacher at T = 1, first seed.

    That teacher is what transferred examples are crafted on, however it was trained.
    """
    first = [network for network in networks if network.seed == study.seeds[0]]
    places = study.students().values()
    plain = [network for network in networks if is_plain(study, network)]
    judged = [n for n in first if (n.chain, n.generation) in places or n in plain[:1]]
    for place, network in enumerate(judged, start=number):
        surrogate = surrogate_of(network, plain)
        prefix = f"verdict on T={network.temperature:g}, "
        progress.begin(place, prefix=prefix, num_parts=_PARTS_OF_A_VERDICT)
        verdict = judge(study, network, surrogate, examples, shards, callback=progress)
        row = _name(examples, network).columns()
        yield {**row, "verdict": verdict}


def is_plain(study: Study, network: Trained) -> bool:
    """True for what no distillation made: a teacher at T = 1, or whose loss has no temperature."""
    if network.generation or network.temperature == 1:
        return network.generation == 0
    chains = study.longest_chains()
    stage = chains[network.chain or next(iter(chains))][0]
    if stage.frozen is not None:  # nobody says how it was trained
        return False
    loss = stage.loss or study.teacher_loss
    at_its_own, at_one = (_fingerprint.describe(loss(T)) for T in (network.temperature, 1.0))
    return bool(at_its_own == at_one)


def surrogate_of(network: Trained, plain: Sequence[Trained]) -> Trained | None:
    """The plain network of the same seed that transferred examples are crafted on."""
    own = [one for one in plain if one.seed == network.seed and one.weights != network.weights]
    return own[0] if own else None


def judge(
    study: Study,
    network: Trained,
    surrogate: Trained | None,
    examples: Examples,
    shards: runtime.ShardFolder,
    *,
    callback: Any = None,
) -> diagnose.Verdict:
    """The study's verdict on a network, out of its shard or made."""
    assert study.verdict is not None
    inputs, labels = (column[: study.num_verdict] for column in examples.test)
    name = f"verdict/{network.stem}"
    settings = {
        "verdict": _fingerprint.describe_attack(study.verdict),
        "network": network.weights,
        "temperature": at(network.temperature),
        "surrogate": surrogate.weights if surrogate else None,
        "examples": _fingerprint.fingerprint([inputs, labels]),
        "jdistill": __version__,
    }
    kept = _entries.read(shards, name, settings)
    if kept is None:
        verdict = study.verdict(
            network.logits_fn,
            jax.random.key(zlib.crc32(b"verdict")),
            inputs,
            labels,
            train_temperature=network.temperature,
            surrogate=surrogate and surrogate.logits_fn,
            callback=callback,
        )
        kept = {"verdict": np.array(json.dumps(verdict.as_dict()))}
        _entries.write(shards, name, settings, kept)
    return diagnose.Verdict.from_dict(json.loads(str(kept["verdict"])))
