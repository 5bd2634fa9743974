"""The networks that the tables describe, averaged over seeds; each number knows its cells.

Everything else in this package reads rows through `networks` and `judged`, so that the tables, the
figures, and the words agree.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jdistill import _words
from jdistill.diagnose import Verdict
from jdistill.report._table import FACTS, Row, blank, checked, listed, sort_key


class Cells(NamedTuple):
    """The cells of a file that a number is made of: its column in some rows, from 0.

    Attributes:
        file: such as `results.csv`.
        column: there.
        rows: the rows' places in the file.
    """

    file: str
    column: str
    rows: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.file}#{self.column}@{','.join(map(str, self.rows))}"


@dataclass(frozen=True)
class Stat:
    """A number of the report.

    In a sentence it takes `%` (with digits: `%2`), `points`, `number`, `decimals`, `count`, a noun
    to count (`count example`), or `ends`, which is where the number may lie.

    Attributes:
        mean: over the seeds; NaN where nothing was measured.
        low: with several seeds the lowest of them; with one, the lower end of its 95% interval.
        high: likewise.
        seeds: how many have a value.
        cells: what `mean`, `low`, and `high` are made of.
        over_all: whether the ends are those of all seeds' intervals.
    """

    mean: float
    low: float
    high: float
    seeds: int
    cells: tuple[Cells | None, Cells | None, Cells | None] = (None, None, None)
    over_all: bool = False

    @property
    def spread(self) -> float:
        """How far the seed furthest from the mean lies from it; 0 with one seed."""
        return max(self.mean - self.low, self.high - self.mean) if self.seeds > 1 else 0.0

    @property
    def known(self) -> bool:
        """Whether there is a number to show."""
        return math.isfinite(self.mean)

    @property
    def has_ends(self) -> bool:
        """Whether something is known of where it may lie."""
        return self.low < self.high

    def overlaps(self, other: "Stat") -> bool:
        """Whether the two ranges have a point in common."""
        return self.low <= other.high and other.low <= self.high

    @property
    def kind(self) -> str:
        """Meaning of its ends."""
        return "interval" if self.seeds == 1 else "intervals" if self.over_all else "seeds"

    def __html_format__(self, spec: str) -> Any:
        """The number as HTML, with its value and its cells."""
        from markupsafe import Markup

        if spec.startswith("count "):
            noun = spec.removeprefix("count ") + "s" * (self.mean != 1)
            return Markup("{} {}").format(_data(self.mean, "count", self.cells[0], "mean"), noun)
        if spec != "ends":
            return _data(self.mean, spec, self.cells[0], "mean")
        if not self.has_ends:
            return "no interval known" if self.seeds == 1 else "the same on every seed"
        return Markup(_ENDS[self.kind]).format(
            low=_data(self.low, "%", self.cells[1], "min"),
            high=_data(self.high, "%", self.cells[2], "max"),
            seeds=self.seeds,
        )

    def small(self, spec: str) -> Any:
        """Where it may lie, in the small print of a table; empty where nothing is known."""
        from markupsafe import Markup

        if not self.has_ends:
            return ""
        low = _data(self.low, spec, self.cells[1], "min")
        return Markup("{}–{}").format(low, _data(self.high, spec, self.cells[2], "max"))


_ENDS = {
    "interval": "95% interval {low} to {high}",
    "intervals": "95% intervals of {seeds} seeds, {low} to {high}",
    "seeds": "{seeds} seeds, {low} to {high}",
}


def _text(value: float, spec: str) -> str:
    if spec.startswith("%"):
        return _words.percent(value, int(spec[1:] or 1))
    if spec.startswith("points"):
        return _words.points(value, int(spec[6:] or 1))
    if spec == "count":
        return f"{value:,.0f}"
    return {"number": _words.number, "decimals": _words.decimals}[spec](value)


def _data(value: float, spec: str, cells: Cells | None, how: str) -> Any:
    from markupsafe import Markup

    text = _text(value, spec)
    if cells is None or not math.isfinite(value):
        return Markup("{}").format(text)
    return Markup('<data value="{}" data-of="{}" title="{:.6g}, {} in {}">{}</data>').format(
        repr(value), f"{cells}|{how}", value, cells.column, cells.file, text
    )


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
    """Key of an attack in a report, and its facts, which do not tell two apart.

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

    @property
    def name(self) -> str:
        """The attack as readers know it; its own name where the rows have no title."""
        return self.facts.title or self.attack.replace("_", " ")

    @property
    def limit(self) -> str:
        """Limit of what it may change."""
        if self.has_no_norm:
            return "any size"
        if self.eps is None:
            return f"smallest {_words.norm_name(self.norm)}"
        return _words.within(self.norm, self.eps)


@dataclass(frozen=True)
class Attacked:
    """One attack on one network, over its seeds; `interval` is 95%, averaged over seeds."""

    key: AttackKey
    num_attacked: Stat
    success: Stat
    interval: tuple[float, float]
    mean_distance: Stat
    median_distance: Stat


@dataclass(frozen=True)
class Network:
    """One generation of a chain at one temperature, over its seeds.

    Attributes:
        generation: 0 is the teacher, `g` the student of `g - 1` assistants.
        is_last: whether the chain ends here; the generations in between are its assistants.
        distilled: whether the rows are of distillation at all; else only names are known.
        attacks: those made on it, in the order of `attack_keys`.
        training: one of `TRAININGS`; empty where it is the ordinary one.
    """

    dataset: str
    chain: str
    temperature: float
    generation: int
    is_last: bool
    distilled: bool
    seeds: tuple[int, ...]
    num_test: Stat
    accuracy: Stat
    mean_abs_logit: Stat
    sensitivity_logits: Stat
    log10_sensitivity_softmax: Stat
    zero_gradients: Stat
    attacks: dict[AttackKey, Attacked]
    training: str = ""

    @property
    def subject(self) -> str:
        """Data set, and the chain where there are several."""
        return f"{self.dataset}: {self.chain}" if self.chain else self.dataset

    @property
    def role(self) -> str:
        """Teacher, assistant, or student: what it is in the longest chain that has it."""
        if self.generation == 0:
            return "teacher"
        return "student" if self.is_last else f"assistant {self.generation}"

    @property
    def line(self) -> str:
        """The role as a legend names it: a student with how many assistants."""
        return _words.line_name(self.generation) if self.is_last else self.role

    @property
    def name(self) -> str:
        """The network as a sentence names it."""
        if not self.distilled:
            return self.chain or self.dataset
        of_chain = f" of {self.chain}" if self.chain else ""
        if self.generation == 0:
            who = self._name_of_first
        elif not self.is_last:
            who = f"the chain's {self.role}"
        elif self.generation == 1:
            who = "the student without an assistant"
        else:
            who = f"the student with {_words.count(self.generation - 1, 'assistant')}"
        return f"{who}{of_chain} at T = {self.temperature:g}"

    @property
    def _name_of_first(self) -> str:
        if self.is_ordinary:
            return "the ordinary network"
        # A chain of one network alone has nobody to teach.
        who = "network" if self.is_last else "teacher"
        if self.training == "adversarial":
            return f"the adversarially trained {who}"
        return f"the {who}" if self.training else "the teacher"

    @property
    def is_reference(self) -> bool:
        """True for a teacher at T = 1, beside which others are shown, trained in any way."""
        return self.distilled and self.generation == 0 and self.temperature == 1

    @property
    def is_ordinary(self) -> bool:
        """True for an ordinarily trained network, as far as the rows know."""
        return self.is_reference and not self.training


@dataclass(frozen=True)
class Judged:
    """The verdicts on one network at one radius, over its seeds.

    Attributes:
        network: the network.
        norm: of the radius.
        eps: the radius.
        seeds: that were judged.
        verdicts: theirs, in the same order.
        naive: accuracy under the usual attack.
        worst_case: share of the examples that no attack of the verdict broke.
        clean: accuracy on the same examples without an attack.
        num_examples: that a verdict rests on, the fewest of any seed.
        several: whether there are verdicts at other radii beside it.
    """

    network: Network
    norm: str
    eps: float
    seeds: tuple[int, ...]
    verdicts: tuple[Verdict, ...]
    naive: Stat
    worst_case: Stat
    clean: Stat
    num_examples: Stat
    several: bool

    @property
    def label(self) -> str:
        """The gravest label of any seed: one masked network is enough not to trust the number."""
        labels = [verdict.label for verdict in self.verdicts]
        return min(labels, key=LABELS.index)

    @property
    def shown(self) -> Verdict:
        """The first verdict of that label, whose evidence the report shows."""
        return next(verdict for verdict in self.verdicts if verdict.label == self.label)

    @property
    def seed(self) -> int:
        """The seed of the verdict that is shown."""
        return self.seeds[self.verdicts.index(self.shown)]

    @property
    def limit(self) -> str:
        """Norm and radius, as the report writes them."""
        return _words.within(self.norm, self.eps)

    @property
    def budget(self) -> tuple[str, float]:
        """Norm and radius."""
        return self.norm, self.eps

    def compares_with(self, other: "Judged") -> bool:
        """Whether both are of the same radius, as many examples, and the same seeds."""
        same = self.budget == other.budget and self.seeds == other.seeds
        return same and self.num_examples.mean == other.num_examples.mean


LABELS = ("masked", "weak attack", "inconclusive", "no sign of masking")


def networks(rows: Iterable[Row]) -> list[Network]:
    """The networks of the rows of results, by data set, chain, temperature, and generation.

    Raises:
        ValueError: a bad row; or there is none.
    """
    groups: dict[tuple[str, str, float, int], list[Row]] = {}
    every = sorted(checked("results", numbered(rows)), key=lambda row: sort_key("results", row))
    # Of rows on the same attack some may be without.
    known = {str(row["attack"]): facts(row) for row in every if facts(row) != Facts()}
    for row in every:
        groups.setdefault(_where(row), []).append(row)
    if not groups:
        raise ValueError("expected at least one row of results, got none; run an evaluation first")
    last: dict[Any, int] = {}
    for *chain, generation in groups:
        last[tuple(chain)] = max(last.get(tuple(chain), 0), generation)
    distilled = any(where[2] != 1 or where[3] for where in groups)
    return [
        _network(where, last[where[:3]] == where[3], distilled, group, known)
        for where, group in sorted(groups.items())
    ]


def numbered(rows: Iterable[Row]) -> list[Row]:
    """The rows with their places, unless they have them."""
    return [{PLACE: place, **row} for place, row in enumerate(listed(rows))]


PLACE = "\0row"  # no column is called that


def _where(row: Row) -> tuple[str, str, float, int]:
    chain = "" if blank(row.get("chain")) else str(row["chain"])
    return str(row["dataset"]), chain, float(row["temperature"]), int(row["generation"])


def _network(
    where: tuple[str, str, float, int],
    is_last: bool,
    distilled: bool,
    rows: Sequence[Row],
    known: Mapping[str, Facts],
) -> Network:
    # What was measured once for a network stands in each of its attacks' rows: one row a seed.
    by_seed = list({int(row["seed"]): row for row in rows}.values())
    by_attack: dict[AttackKey, list[Row]] = {}
    for row in rows:
        if not blank(row["attack"]):
            key = replace(attack_key(row), facts=known.get(str(row["attack"]), Facts()))
            by_attack.setdefault(key, []).append(row)
    dataset, chain, temperature, generation = where
    return Network(
        dataset=dataset,
        chain=chain,
        temperature=temperature,
        generation=generation,
        is_last=is_last,
        distilled=distilled,
        seeds=tuple(sorted(int(row["seed"]) for row in by_seed)),
        num_test=amount(by_seed, "num_test"),
        accuracy=stat(by_seed, "test_accuracy", ends=True),
        mean_abs_logit=stat(by_seed, "mean_abs_logit"),
        sensitivity_logits=stat(by_seed, "sensitivity_logits"),
        log10_sensitivity_softmax=stat(by_seed, "log10_sensitivity_softmax"),
        zero_gradients=stat(by_seed, "zero_gradient_fraction"),
        attacks={key: _attacked(key, by_attack[key]) for key in sorted(by_attack, key=_order)},
        training=next((str(r["training"]) for r in rows if not blank(r.get("training"))), ""),
    )


def _attacked(key: AttackKey, rows: Sequence[Row]) -> Attacked:
    low, high = (stat(rows, f"success_rate_{end}").mean for end in ("low", "high"))
    return Attacked(
        key=key,
        num_attacked=amount(rows, "num_attacked"),
        success=stat(rows, "success_rate", ends=True),
        interval=(low, high),
        mean_distance=stat(rows, "mean_distance"),
        median_distance=stat(rows, "median_distance"),
    )


def judged(found: Sequence[Network], verdicts: Sequence[Row]) -> list[Judged]:
    """The verdicts by radius and network, in the networks' order."""
    budgets: dict[tuple[str, float], list[Row]] = {}
    for row in verdicts:
        budget = row["verdict"].norm, budget_of(row["verdict"].eps) or 0.0
        budgets.setdefault(budget, []).append(row)
    result = []
    for network in found:
        own = {budget: of_network(rows, network) for budget, rows in sorted(budgets.items())}
        for budget, rows in own.items():
            if rows:
                rows.sort(key=lambda row: int(row["seed"]))
                result.append(_judged(network, budget, rows, len(budgets) > 1))
    return result


def _judged(network: Network, budget: tuple[str, float], rows: list[Row], several: bool) -> Judged:
    shares = {}
    for name in ("naive", "worst_case", "clean"):
        flat = [
            {PLACE: row[PLACE]}
            | {f"{name}.{end}": v for end, v in getattr(row["verdict"], name)._asdict().items()}
            for row in rows
        ]
        shares[name] = stat(
            flat,
            f"{name}.value",
            file="verdicts.json",
            over_all=(f"{name}.low", f"{name}.high"),
        )
    sizes = [{PLACE: row[PLACE], "num_examples": row["verdict"].num_examples} for row in rows]
    return Judged(
        network=network,
        norm=budget[0],
        eps=budget[1],
        seeds=tuple(int(row["seed"]) for row in rows),
        verdicts=tuple(row["verdict"] for row in rows),
        num_examples=amount(sizes, "num_examples", file="verdicts.json", choose=min),
        several=several,
        **shares,
    )


def of_network(rows: Iterable[Row], network: Network) -> list[Row]:
    """The rows about a network, at whatever seed."""
    own = (network.dataset, network.chain, network.temperature, network.generation)
    return [row for row in rows if _where(row) == own]


def shown(found: Sequence[Network]) -> list[Network]:
    """The teacher at T = 1, and the student of the longest chain at each temperature."""
    return [net for net in found if net.is_reference or net.is_last]


def attack_keys(found: Sequence[Network]) -> list[AttackKey]:
    """Every attack made on any of the networks: budgeted ones first, then minimum-norm ones."""
    return sorted({key for network in found for key in network.attacks}, key=_order)


def attack_key(row: Row) -> AttackKey:
    """Which attack a row is about."""
    norm, eps = str(row["norm"] or ""), budget_of(row.get("eps"))
    return AttackKey(str(row["attack"]), norm, eps, facts(row))


def facts(row: Row) -> Facts:
    """Facts in a row of its attack."""
    found = {name: None if blank(row.get(name)) else row[name] for name in FACTS}
    if found["minimum_norm"] is not None:
        found["minimum_norm"] = bool(found["minimum_norm"])
    return Facts(**found)


def budget_of(eps: Any) -> float | None:
    """A radius as it is compared: kept as float32 or as float64, it is one radius."""
    return None if blank(eps) else float(f"{float(eps):.6g}")


def _order(key: AttackKey) -> tuple[Any, ...]:
    return key.eps is None, key.norm != "linf", key.norm, key.attack, key.eps or 0.0


def stat(
    rows: Sequence[Row],
    name: str,
    *,
    file: str = "results.csv",
    ends: bool = False,
    over_all: tuple[str, str] | None = None,
) -> Stat:
    """One quantity of one network, from its rows: one per seed.

    Args:
        rows: one per seed.
        name: the column.
        file: that the rows are of.
        ends: whether the columns of its 95% interval count where there is one seed.
        over_all: columns of low and high ends, which count for every seed. Two seeds on the same
            few examples may agree by chance: the lowest and the highest of them would hide what
            the examples leave open.
    """
    known = [row for row in rows if not blank(row[name]) and math.isfinite(float(row[name]))]
    columns = (name, name, name)
    if over_all is not None:
        columns = (name, *over_all)
    elif ends and len(known) == 1:
        columns = (name, f"{name}_low", f"{name}_high")
    values: list[list[float]] = []
    cells = []
    for column in columns:
        own = [row for row in known if not blank(row[column])]
        if not own:  # an interval that was not measured: the value itself
            own, column = known, name
        values.append([float(row[column]) for row in own])
        cells.append(Cells(file, column, tuple(int(row.get(PLACE, -1)) for row in own)))
    means, lows, highs = values
    return Stat(
        mean=math.fsum(means) / len(means) if means else math.nan,
        low=min(lows, default=math.nan),
        high=max(highs, default=math.nan),
        seeds=len(known),
        cells=tuple(cells),  # type: ignore[arg-type]
        over_all=over_all is not None,
    )


def amount(
    rows: Sequence[Row],
    name: str,
    *,
    file: str = "results.csv",
    choose: Callable[..., Any] = max,
) -> Stat:
    """A count of examples: the largest of the seeds, or the smallest."""
    known = [row for row in rows if not blank(row[name])]
    if not known:
        return Stat(0, 0, 0, 0)
    chosen = choose(known, key=lambda row: int(row[name]))
    value = int(chosen[name])
    cells = Cells(file, name, (int(chosen.get(PLACE, -1)),))
    return Stat(value, value, value, 1, (cells, cells, cells))
