"""The networks that the rows of `results.csv` describe, averaged over seeds and sorted.

Everything else in this package reads rows through `networks`, so that the table, the figures and
the words agree.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jdistill.report._table import FACTS, Row, blank, checked, sort_key


class Facts(NamedTuple):
    """Facts in the rows of an attack, as `jdistill.attacks.Traits`; None where there are none."""

    title: str | None = None
    access: str | None = None
    follows: str | None = None
    minimum_norm: bool | None = None
    handicap: str | None = None
    freedom: str | None = None


@dataclass(frozen=True)
class AttackKey:
    """Key of an attack in a report, and the facts of the attack, which do not tell two apart.

    `eps` is None for a minimum-norm attack, and for one that no norm bounds.
    """

    attack: str
    norm: str
    eps: float | None
    facts: Facts = field(default=Facts(), compare=False)

    @property
    def budget(self) -> tuple[str, float | None]:
        """Norm and radius, the same for attacks that compare."""
        return self.norm, self.eps

    @property
    def has_no_norm(self) -> bool:
        """True where no norm bounds it and it seeks no small distance."""
        return self.eps is None and self.facts.minimum_norm is False


@dataclass(frozen=True)
class Stat:
    """One quantity of one network.

    Attributes:
        mean: The mean over seeds; NaN where nothing was measured.
        low: With several seeds the lowest of them; with one, the lower end of its 95 % interval
            (the value itself where there is no interval).
        high: The upper end, likewise.
        seeds: How many seeds have a value.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def spread(self) -> float:
        """How far the seed furthest from the mean lies from it; 0 with one seed."""
        return max(self.mean - self.low, self.high - self.mean) if self.seeds > 1 else 0.0

    @property
    def known(self) -> bool:
        """Whether there is a number to show."""
        return math.isfinite(self.mean)

    def overlaps(self, other: "Stat") -> bool:
        """Whether the two ranges have a point in common."""
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Attacked:
    """One attack on one network, over its seeds; `interval` is 95 %, averaged over seeds."""

    key: AttackKey
    num_attacked: int
    success: Stat
    interval: tuple[float, float]
    mean_distance: Stat
    median_distance: Stat
    mean_queries: Stat


@dataclass(frozen=True)
class Network:
    """One generation of a chain at one temperature, over its seeds.

    Attributes:
        generation: 0 is the teacher, `g` the student of `g - 1` assistants.
        is_last: Whether the chain ends here; the generations in between are its assistants.
        attacks: The attacks made on it, in the order of `attack_keys`.
    """

    dataset: str
    temperature: float
    generation: int
    is_last: bool
    seeds: tuple[int, ...]
    num_test: int
    accuracy: Stat
    mean_abs_logit: Stat
    num_sensitivity: int
    sensitivity_logits: Stat
    log10_sensitivity_softmax: Stat
    zero_gradients: Stat
    attacks: dict[AttackKey, Attacked]

    @property
    def role(self) -> str:
        """Teacher, assistant or student: what the network is in the longest chain that has it."""
        if self.generation == 0:
            return "teacher"
        return "student" if self.is_last else f"assistant {self.generation}"


def subjects(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows with each chain of a data set as a subject of its own.

    A comparison of networks of two chains has no place in either, and is left out.
    """
    found = []
    for row in rows:
        row = dict(row)
        chain, baseline = row.pop("chain", None), row.pop("baseline_chain", None)
        if not blank(chain):
            row["dataset"] = f"{row['dataset']}: {chain}"
        if blank(baseline) or baseline == chain:
            found.append(row)
    return found


def networks(rows: Iterable[Row]) -> list[Network]:
    """The networks that the rows describe, sorted by dataset, temperature and generation.

    Args:
        rows: As for `write_results`. A row whose `attack` is blank describes a network that was
            not attacked.

    Returns:
        One `Network` for each dataset, temperature and generation, averaged over its seeds.

    Raises:
        ValueError: As `write_results`; or there is no row.
    """
    groups: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    every = sorted(subjects(checked("results", rows)), key=lambda row: sort_key("results", row))
    # Of rows on the same attack some may be without.
    known = {str(row["attack"]): facts(row) for row in every if facts(row) != Facts()}
    for row in every:
        where = (str(row["dataset"]), float(row["temperature"]), int(row["generation"]))
        groups.setdefault(where, []).append(row)
    if not groups:
        raise ValueError("expected at least one row of results, got none; run an evaluation first")
    last: dict[tuple[str, float], int] = {}
    for dataset, temperature, generation in groups:
        chain = (dataset, temperature)
        last[chain] = max(last.get(chain, 0), generation)
    return [
        _network(*where, generation_last=last[where[:2]], rows=group, known=known)
        for where, group in sorted(groups.items())
    ]


def _network(
    dataset: str,
    temperature: float,
    generation: int,
    *,
    generation_last: int,
    rows: list[dict[str, Any]],
    known: Mapping[str, Facts],
) -> Network:
    # What was measured once for a network stands in each of its attacks' rows: one row a seed.
    by_seed = list({int(row["seed"]): row for row in rows}.values())
    by_attack: dict[AttackKey, list[dict[str, Any]]] = {}
    for row in rows:
        if not blank(row["attack"]):
            key = replace(attack_key(row), facts=known.get(str(row["attack"]), Facts()))
            by_attack.setdefault(key, []).append(row)
    return Network(
        dataset=dataset,
        temperature=temperature,
        generation=generation,
        is_last=generation == generation_last,
        seeds=tuple(sorted(int(row["seed"]) for row in by_seed)),
        num_test=_most(by_seed, "num_test"),
        accuracy=stat(by_seed, "test_accuracy", ("test_accuracy_low", "test_accuracy_high")),
        mean_abs_logit=stat(by_seed, "mean_abs_logit"),
        num_sensitivity=_most(by_seed, "num_sensitivity"),
        sensitivity_logits=stat(by_seed, "sensitivity_logits"),
        log10_sensitivity_softmax=stat(by_seed, "log10_sensitivity_softmax"),
        zero_gradients=stat(by_seed, "zero_gradient_fraction"),
        attacks={
            key: Attacked(
                key=key,
                num_attacked=_most(by_attack[key], "num_attacked"),
                success=stat(
                    by_attack[key], "success_rate", ("success_rate_low", "success_rate_high")
                ),
                interval=(
                    _mean(_values(by_attack[key], "success_rate_low")),
                    _mean(_values(by_attack[key], "success_rate_high")),
                ),
                mean_distance=stat(by_attack[key], "mean_distance"),
                median_distance=stat(by_attack[key], "median_distance"),
                mean_queries=stat(by_attack[key], "mean_queries"),
            )
            for key in sorted(by_attack, key=_attack_order)
        },
    )


def attack_keys(found: Sequence[Network]) -> list[AttackKey]:
    """Every attack made on any of the networks: budgeted ones first, then minimum-norm ones."""
    return sorted({key for network in found for key in network.attacks}, key=_attack_order)


def attack_key(row: Row) -> AttackKey:
    """Which attack a row is about."""
    norm, eps = str(row["norm"] or ""), budget_of(row["eps"])
    return AttackKey(str(row["attack"]), norm, eps, facts(row))


def facts(row: Row) -> Facts:
    """Facts in a row of its attack."""
    found = {name: row.get(name) for name in FACTS}
    found = {name: None if blank(value) else value for name, value in found.items()}
    if found["minimum_norm"] is not None:
        found["minimum_norm"] = bool(found["minimum_norm"])
    return Facts(**found)


def budget_of(eps: Any) -> float | None:
    """A budget as it is compared: kept as float32 or as float64, it is one budget."""
    return None if blank(eps) else float(f"{float(eps):.6g}")


def _attack_order(key: AttackKey) -> tuple[Any, ...]:
    return key.eps is None, key.norm != "linf", key.norm, key.attack, key.eps or 0.0


def _values(rows: Sequence[Row], name: str) -> list[float]:
    values = (math.nan if blank(row[name]) else float(row[name]) for row in rows)
    return [value for value in values if math.isfinite(value)]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _most(rows: Sequence[Row], name: str) -> int:
    return int(max(_values(rows, name), default=0))


def stat(rows: Sequence[Row], name: str, ends: tuple[str, str] | None = None) -> Stat:
    """One quantity of one network, from its rows: one a seed.

    Args:
        rows: One row per seed.
        name: The column of the quantity.
        ends: The columns of its 95 % interval, which counts where there is one seed.
    """
    values = _values(rows, name)
    low, high = values, values
    if ends and len(values) == 1:
        low, high = (_values(rows, end) or values for end in ends)
    return Stat(
        mean=_mean(values),
        low=min(low, default=math.nan),
        high=max(high, default=math.nan),
        seeds=len(values),
    )


def widest(rows: Sequence[Row], name: str) -> Stat:
    """As `stat`, of rows with `low` and `high`; over several seeds all of their intervals.

    Two seeds on the same few examples may agree by chance: the lowest and the highest of them would
    hide what the examples leave open.
    """
    values = _values(rows, name)
    return Stat(
        mean=_mean(values),
        low=min([*values, *_values(rows, "low")], default=math.nan),
        high=max([*values, *_values(rows, "high")], default=math.nan),
        seeds=len(values),
    )
