"""Robust chains: what assistants do to robust accuracy, and what goes along with it.

Two accounts of why a strong teacher can make a weak student are measured beside each other: its
confidence on examples that no student gets robustly (Lee et al. 2026, arXiv:2605.21999), and how
rarely what fools the student fools the teacher (Lee & Chung 2026, arXiv:2512.10275).
"""

import functools
from typing import Any

import jax
import numpy as np
from scipy import stats

from experiments.papers.measures import Line, Row, Source, difference, per_seed, shown
from jdistill import attacks, evaluate, metrics, nets, runtime, train
from jdistill.study import Trained
from jdistill.typing import LogitsFn

_QUANTITIES = {
    "test_accuracy": ("test accuracy (%)", 100.0, 2),
    "autoattack": ("under AutoAttack (%)", 100.0, 1),
    "entropy": ("teacher's entropy (nats)", 1.0, 3),
    "transfer": ("student → teacher (%)", 100.0, 1),
}
_ALONE = "no teacher"


def rows(source: Source) -> list[Row]:
    """Of each chain's student and seed: accuracies, and its teacher's entropy and transfer.

    The teacher is the network that the student has learned from. Its entropy is the mean over those
    attacked test examples that AutoAttack breaks on every student of the seed; transfer is the
    share of the student's adversarial examples that the teacher misclassifies too.
    """
    places = source.study.students()
    verdicts = {
        (row.get("chain") or "", row["seed"], row["generation"]): row["verdict"].label
        for row in source.rows("verdicts")
    }
    found = []
    for seed in source.study.seeds:
        of_seed = source.networks(seeds=[seed])
        networks = {(network.chain, network.generation): network for network in of_seed}
        outcomes = {name: _broken(source, networks[place]) for name, place in places.items()}
        never = np.logical_and.reduce([broken for _, broken in outcomes.values()])
        for name, (chain, generation) in places.items():
            student = networks[chain, generation]
            accuracy, broken = outcomes[name]
            row = {
                "chain": name,
                "seed": seed,
                "test_accuracy": accuracy,
                "autoattack": 1.0 - float(broken.mean()),
                "num_attacked": len(broken),
                "num_never_robust": int(never.sum()),
                "entropy": float("nan"),
                "transfer": float("nan"),
                "verdict": verdicts.get((chain, seed, generation), ""),
            }
            if generation:
                teacher = networks[chain, generation - 1]
                inputs = source.test.inputs[: len(broken)][never]
                row["entropy"] = _entropy(teacher.logits_fn, inputs)
                row["transfer"] = _transfer(source, student.logits_fn, teacher.logits_fn)
            found.append(row)
    return found


def _broken(source: Source, network: Trained) -> tuple[float, np.ndarray]:
    """Test accuracy, and which examples AutoAttack breaks, as the study has kept them."""
    result = evaluate.evaluate(
        [network.logits_fn],
        *source.test,
        attacks={"autoattack": source.study.attacks["autoattack"]},
        num_sensitivity=source.study.num_sensitivity,
        callback=source.progress,
        shards=runtime.ShardFolder(source.folder / "shards"),
        names=[network.stem],
    )
    return float(result.clean.accuracy[0].value), result.attacks["autoattack"].success[0]


def _entropy(teacher: LogitsFn, inputs: np.ndarray) -> float:
    """Mean entropy of a teacher's predictions; NaN of no inputs."""
    if len(inputs) == 0:
        return float("nan")
    log_probs = np.asarray(jax.nn.log_softmax(train.predict(teacher, inputs)), np.float64)
    return float(-(np.exp(log_probs) * log_probs).sum(-1).mean())


def _transfer(source: Source, student: LogitsFn, teacher: LogitsFn) -> float:
    """Share of the inputs that fool the student, crafted on it, which fool its teacher."""
    plan = source.study.attacks["autoattack"]
    eps = attacks.traits(plan.attack).settings["eps"]
    # It goes on after its first success, towards the largest loss.
    craft = functools.partial(attacks.apgd, eps=eps, num_steps=40, best_loss=True)
    outcome = evaluate.under_attack(
        nets.stack([student]),
        source.test.inputs[: plan.num_examples],
        source.test.labels[: plan.num_examples],
        evaluate.AttackPlan(craft, batch_size=plan.batch_size),
        key=jax.random.key(0),
    )
    fooled = outcome.success[0]
    labels = source.test.labels[: plan.num_examples]
    right = metrics.correct(train.predict(teacher, outcome.inputs[0]), labels)
    return float((~np.asarray(right))[fooled].mean()) if fooled.any() else float("nan")


def table(found: list[Row]) -> list[list[Line]]:
    """Each chain beside the one without an assistant, and which account explains the difference."""
    chains = list(dict.fromkeys(row["chain"] for row in found))
    heads = [head for title, _, _ in _QUANTITIES.values() for head in (title, "− no assistant")]
    lines: list[Line] = [["student", *heads, "verdict, first seed"]]
    for chain in chains:
        own, base = (
            [row for row in found if row["chain"] == each] for each in (chain, _direct(chain))
        )
        cells = []
        for name, (_, scale, digits) in _QUANTITIES.items():
            values, before = (per_seed(each, name, scale) for each in (own, base))
            cells.append(shown(values, digits, share=scale == 100))
            cells.append(difference(values, before, digits) if chain != _direct(chain) else "")
        verdicts = sorted({row["verdict"] for row in own} - {""})
        lines.append([chain, *cells, "; ".join(verdicts) or "–"])
    return [lines, _accounts(found)]


def _direct(chain: str) -> str:
    """The chain of the same loss without an assistant."""
    return chain.split(",")[0]


def _accounts(found: list[Row]) -> list[Line]:
    """Correlations of the changes that assistants make, with intervals over seeds."""
    names = ("autoattack", "entropy", "transfer")
    by_place = {(row["chain"], row["seed"]): row for row in found}
    changes: dict[Any, list[list[float]]] = {}  # by seed and loss
    for (chain, seed), row in by_place.items():
        base = by_place.get((_direct(chain), seed))
        if chain == _direct(chain) or base is None:
            continue
        change = [row[name] - base[name] for name in names]
        if np.isfinite(change).all():
            changes.setdefault((seed, _direct(chain)), []).append(change)
    arrays = {place: np.array(each) for place, each in changes.items()}
    means = {
        loss: np.concatenate([own for (_, of), own in arrays.items() if of == loss]).mean(0)
        for _, loss in arrays
    }
    centered = {place: own - means[place[1]] for place, own in arrays.items()}
    lines: list[Line] = [["change of", "correlation with that of robust accuracy", "within a loss"]]
    for place, title in ((1, "teacher's entropy"), (2, "transfer to the teacher")):
        lines.append([title, _correlation(arrays, place), _correlation(centered, place)])
    return lines


def _correlation(arrays: dict[Any, np.ndarray], place: int) -> str:
    """Spearman's correlation, with a bootstrap interval that draws whole seeds."""
    seeds = sorted({seed for seed, _ in arrays})
    every = [
        np.concatenate([own for (of, _), own in arrays.items() if of == seed]) for seed in seeds
    ]

    def of(chosen: list[np.ndarray]) -> float:
        joined = np.concatenate(chosen)
        if len(joined) < 3 or (np.ptp(joined, axis=0)[[0, place]] == 0).any():
            return float("nan")
        return float(stats.spearmanr(joined[:, 0], joined[:, place]).statistic)

    if not every or not np.isfinite(of(every)):
        return "–"
    draws = np.random.default_rng(0).integers(len(every), size=(2000, len(every)))
    low, high = np.nanquantile([of([every[i] for i in draw]) for draw in draws], [0.025, 0.975])
    return f"{of(every):+.2f} [{low:+.2f}, {high:+.2f}]"
