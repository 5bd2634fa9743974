"""Networks of training studies, targeted attacks on them, and tables, which the items share."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from experiments.papers.training import AnyTraining
from jdistill import data, evaluate, metrics, nets, runtime, train
from jdistill import study as studies
from jdistill.study import Study, Trained

Row = dict[str, Any]
Line = list[str]


@dataclasses.dataclass(frozen=True)
class Source:
    """A training study that was run.

    Attributes:
        name: in `TRAININGS`.
        training: its sizes.
        study: itself.
        folder: its workdir, in which the items keep what they did to its networks.
        num_images: the first so many test images are attacked.
        full: whether the attacks have the papers' settings and not fewer steps.
        progress: a callback.
    """

    name: str
    training: AnyTraining
    study: Study
    folder: epath.Path
    num_images: int
    full: bool
    progress: Any = None

    def networks(self, **where: Any) -> list[Trained]:
        """Its trained networks; `where` as in `study.networks`."""
        where = {"temperatures": self.study.temperatures, "seeds": self.study.seeds, **where}
        return studies.networks(self.study, self.folder, **where)

    @functools.cached_property
    def test(self) -> data.Split:
        """Test examples of the study."""
        return self.study.examples().test

    def clean(self, **where: Any) -> list[tuple[Trained, evaluate.CleanMeasures]]:
        """Measures of its networks without an attack, kept as the study keeps them.

        Networks come by temperature, seed, and generation.
        """
        networks = sorted(self.networks(**where), key=lambda network: network[1:4])
        return [
            (
                network,
                evaluate.clean(
                    nets.stack([network.logits_fn]),
                    *self.test,
                    num_sensitivity=self.study.num_sensitivity,
                    callback=self.progress,
                    shards=runtime.ShardFolder(self.folder / "shards"),
                    names=[network.stem],
                ),
            )
            for network in networks
        ]

    def rows(self, kind: str) -> list[Row]:
        """Rows of a table of the study, `"results"` for one; a workdir may hold more than it."""
        return [
            row
            for row in studies.load(self.folder).rows[kind]
            if row["temperature"] in self.study.temperatures and row["seed"] in self.study.seeds
        ]

    def measured(self) -> list[Row]:
        """Rows of the study's own results, one per network, with its accuracy under AutoAttack."""
        robust = [row for row in self.rows("results") if row["attack"] == "autoattack"]
        return [
            {**row, "robust_accuracy": 1.0 - row["success_rate"]}
            for row in sorted(robust, key=lambda row: tuple(named(row).values()))
        ]

    @property
    def plain(self) -> dict[str, Any]:
        """Ordinary networks, the teachers at T = 1, as `networks` takes them."""
        return {"temperatures": [1.0], "generations": [0]}

    @property
    def hottest(self) -> float:
        """The highest temperature."""
        return max(self.study.temperatures)


class Hits(NamedTuple):
    """Outcome of a targeted attack, over the images that the network classifies correctly.

    Attributes:
        network: that was attacked.
        success: `[N, K-1]`, by image and target.
        distance: `[N, K-1]`; `inf` where the attack failed.
    """

    network: Trained
    success: np.ndarray
    distance: np.ndarray

    def row(self) -> Row:
        """Success, and the mean distance in the best, the average, and the worst case of targets.

        An image without a success in the best case, or with a failure in the worst, counts for
        neither; `success` says how many there are.
        """
        known = np.where(self.success, self.distance, np.nan)
        some, every = self.success.any(axis=1), self.success.all(axis=1)
        return {
            **named(self.network._asdict()),
            "num_images": len(self.success),
            "images_with_success": int(some.sum()),
            "success": _mean(self.success),
            "best": _mean(np.where(self.success, self.distance, np.inf).min(axis=1)[some]),
            "average": _mean(known[self.success]),
            "worst": _mean(np.where(self.success, self.distance, -np.inf).max(axis=1)[every]),
        }


def named(row: Row) -> Row:
    """The columns that name a network."""
    return {name: row[name] for name in ("temperature", "seed", "generation")}


def targeted(
    source: Source, networks: Iterable[Trained], name: str, attack: Any, *, batch_size: int = 90
) -> list[Hits]:
    """An attack on each network towards each class but the label, kept in the workdir.

    Args:
        source: of the networks.
        networks: to attack.
        name: of the attack, with settings of its own.
        attack: with its settings bound; it takes `targets`.
        batch_size: pairs of image and target at a time.
    """
    num_classes = int(source.test.labels.max()) + 1
    inputs, labels = (part[: source.num_images] for part in source.test)
    targets = np.array([np.delete(np.arange(num_classes), label) for label in labels])
    many, their = (np.repeat(part, num_classes - 1, axis=0) for part in (inputs, labels))
    found = []
    for network in networks:
        outcome = evaluate.under_attack(
            nets.stack([network.logits_fn]),
            many,
            their,
            evaluate.AttackPlan(attack, batch_size=batch_size),
            targets=targets.ravel(),
            shards=runtime.ShardFolder(source.folder / "items"),
            shard_name=name,
            stage=f"{name} on {network.title}",
            names=[network.stem],
            callback=source.progress,
        )
        right = metrics.correct(train.predict(network.logits_fn, inputs), labels)
        success, distance = (
            part[0].reshape(targets.shape)[right] for part in (outcome.success, outcome.distance)
        )
        found.append(Hits(network, success, distance))
    return found


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if values.size else math.nan


# --- Tables --------------------------------------------------------------------------------------


class Form(NamedTuple):
    """How a quantity is shown.

    Attributes:
        title: with its unit.
        digits: after the point.
        scale: 100 for shares in percent.
    """

    title: str
    digits: int = 2
    scale: float = 1.0


def per_seed(rows: Iterable[Row], quantity: str, scale: float) -> list[float]:
    """Each seed's mean of a quantity, in the order of the seeds."""
    values: dict[int, list[float]] = {}
    for row in rows:
        values.setdefault(row["seed"], []).append(scale * row[quantity])
    return [_mean(np.array(values[seed])) for seed in sorted(values)]


def by_length(rows: Sequence[Row], quantity: str, form: Form) -> list[Line]:
    """A quantity by temperature and chain length, and what the first assistant changes.

    The last line is over all temperatures: each seed's mean.
    """
    generations = sorted({row["generation"] for row in rows})
    temperatures = sorted({row["temperature"] for row in rows})
    lines = [[form.title, *map(_length, generations), "1 assistant − none"]]
    for T in [*temperatures, None]:
        chosen = [row for row in rows if T is None or row["temperature"] == T]
        own = {
            number: per_seed(
                (row for row in chosen if row["generation"] == number), quantity, form.scale
            )
            for number in generations
        }
        cells = [shown(own[number], form.digits, share=form.scale == 100) for number in generations]
        effect = difference(own[2], own[1], form.digits) if {1, 2} <= set(own) else "–"
        lines.append(["all T" if T is None else f"T = {T:g}", *cells, effect])
    return lines


def over_lengths(rows: Sequence[Row], quantities: Mapping[str, Form]) -> list[Line]:
    """Quantities by chain length, over all temperatures, beside their change from no assistant."""
    by_generation = {
        number: [row for row in rows if row["generation"] == number]
        for number in sorted({row["generation"] for row in rows if row["generation"]})
    }
    heads = [head for form in quantities.values() for head in (form.title, "− no assistant")]
    lines = [["chain", *heads]]
    for number, chosen in by_generation.items():
        line = [_length(number)]
        for quantity, form in quantities.items():
            own, base = (
                per_seed(each, quantity, form.scale) for each in (chosen, by_generation[1])
            )
            line.append(shown(own, form.digits, share=form.scale == 100))
            line.append(difference(own, base, form.digits) if number > 1 else "")
        lines.append(line)
    return lines


def cases(rows: Sequence[Row], published: Mapping[str, Sequence[str]]) -> list[Line]:
    """Best, average, and worst case of the targets by attack, each beside the published figure."""
    published_too = (f"{case}, published" for case in _CASES)
    lines = [["attack", "images", "success (%)", *_CASES, *published_too]]
    for attack in dict.fromkeys(row["attack"] for row in rows):
        own = [row for row in rows if row["attack"] == attack]
        lines.append(
            [
                attack,
                str(sum(row["num_images"] for row in own)),
                shown([100 * row["success"] for row in own], 1, share=True),
                *(shown([row[case] for row in own], 3) for case in _CASES),
                *published.get(attack, ["–"] * len(_CASES)),
            ]
        )
    return lines


_CASES = ("best", "average", "worst")


def shown(values: Sequence[float], digits: int, *, share: bool = False) -> str:
    """A mean over seeds with its 95% interval; a single value where there is one seed.

    The interval of a share in percent is cut at 0 and 100.
    """
    if not values or not all(map(math.isfinite, values)):
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    found = metrics.seed_interval(np.array(values))
    low, high = np.clip([found.low, found.high], *((0.0, 100.0) if share else (-np.inf, np.inf)))
    return f"{found.value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def difference(first: Sequence[float], second: Sequence[float], digits: int) -> str:
    """A difference with its interval, paired by seed, and its p-value."""
    if not first or not all(map(math.isfinite, [*first, *second])):
        return "–"
    if len(first) == 1:
        return f"{first[0] - second[0]:+.{digits}f} (one seed)"
    found = metrics.paired_over_seeds(np.array(first), np.array(second))
    if not math.isfinite(found.p_value):
        return f"{found.difference.value:+.{digits}f} (every seed alike)"
    value, low, high = (f"{each:+.{digits}f}" for each in found.difference)
    return f"{value} [{low}, {high}], p = {found.p_value:.2g}"


def _length(generation: int) -> str:
    names = ("teacher", "no assistant", "1 assistant")
    return names[generation] if generation < 3 else f"{generation - 1} assistants"


def markdown(lines: Sequence[Line]) -> str:
    """Lines as a Markdown table."""
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])
