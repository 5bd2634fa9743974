"""The tables of the page: numbers as people read them, each with its range in small print."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from jdistill import _words
from jdistill.report import _claims
from jdistill.report._networks import (
    PLACE,
    AttackKey,
    Cells,
    Judged,
    Network,
    Stat,
    attack_key,
    attack_keys,
    of_network,
    shown,
    stat,
)
from jdistill.report._sentences import COMPARISONS, say
from jdistill.report._table import Row


class Cell(NamedTuple):
    """Text of a cell, with small print below it, and how dark it is, from 0 to 1."""

    text: Any
    small: Any = ""
    shade: float | None = None


class Table(NamedTuple):
    """A table; each line begins with its name."""

    heads: Sequence[tuple[str, str]]
    lines: Sequence[Sequence[Cell]]


_NONE = Cell("–")


def headline(found: Sequence[Network], judged: Sequence[Judged]) -> Table:
    """The answer as a table: what is left of each network's accuracy, and the verdict."""
    if not judged:
        heads = [("Network", ""), ("Test accuracy", "")]
        keys = attack_keys(found)
        heads += [(f"{key.name} success", key.limit) for key in keys]
        return Table(
            heads,
            [
                [
                    Cell(_name(net, found)),
                    share(net.accuracy),
                    *(share(net.attacks[k].success) if k in net.attacks else _NONE for k in keys),
                ]
                for net in shown(found)
            ],
        )
    heads = [
        ("Network", ""),
        ("Everything tried", "accuracy left"),
        ("Usual attack", "accuracy left"),
        ("No attack", "accuracy"),
        ("Verdict", ""),
    ]
    return Table(
        heads,
        [
            [
                Cell(_name(item.network, found), item.limit if item.several else ""),
                share(item.worst_case),
                share(item.naive),
                share(item.clean),
                Cell(item.label),
            ]
            for item in judged
        ],
    )


def results(found: Sequence[Network]) -> Table:
    """Everything in `results.csv`, one line per network."""
    keys = attack_keys(found)
    heads = [("Network", ""), ("Test accuracy", "")]
    for key in keys:
        heads.append((f"{key.name} success", key.limit))
        if key.eps is None and not key.has_no_norm:
            norm = _words.norm_name(key.norm)
            heads += [(f"{key.name} {which}", f"{norm}, successes") for which in ("mean", "median")]
    heads += [
        ("Zero gradients", "of examples"),
        ("Mean |logit|", ""),
        ("Sensitivity", "of logits"),
        ("Sensitivity", "of softmax, log10"),
    ]

    def line(network: Network) -> list[Cell]:
        cells = [Cell(_name(network, found)), share(network.accuracy, 2)]
        for key in keys:
            hit = network.attacks.get(key)
            cells.append(share(hit.success) if hit else _NONE)
            if key.eps is None and not key.has_no_norm:
                pair = (hit.mean_distance, hit.median_distance) if hit else (None, None)
                cells += [value(each, "decimals") for each in pair]
        return [
            *cells,
            share(network.zero_gradients),
            value(network.mean_abs_logit),
            value(network.sensitivity_logits),
            value(network.log10_sensitivity_softmax, "decimals"),
        ]

    return Table(heads, [line(network) for network in found])


def comparisons(made: Sequence[_claims.Comparison]) -> Table:
    """The paired comparisons, with what each supports."""
    heads = [
        ("Network", "against"),
        ("What follows", ""),
        ("Difference", "points"),
        ("p", ""),
        ("Quantity", ""),
        ("Over", ""),
    ]
    return Table(heads, [_comparison(each) for each in made])


def _comparison(made: _claims.Comparison) -> list[Cell]:
    row = made.row
    name, other = (
        f"{row.get(chain) or ''} {_words.line_name(int(row[generation]))}".strip()
        for chain, generation in (
            ("chain", "generation"),
            ("baseline_chain", "baseline_generation"),
        )
    )
    place = (int(row[PLACE]),)
    cells = [Cells("comparisons.csv", column, place) for column in ("difference", "low", "high")]
    low, high = (math.nan if row[end] is None else float(row[end]) for end in ("low", "high"))
    difference = Stat(float(row["difference"]), low, high, 1, tuple(cells))  # type: ignore[arg-type]
    size = row["num_examples"]
    over = "the seeds" if row["seed"] is None else f"seed {int(row['seed'])}"
    return [
        Cell(f"T = {float(row['temperature']):g}, {name}", other),
        Cell(say(COMPARISONS, made.case, number=made.number)),
        Cell(say({"": "{it:points2}"}, "", it=difference), difference.small("points2")),
        Cell("–" if row["p_value"] is None else _words.p_value(float(row["p_value"]))),
        Cell(_claims.quantity(row)),
        Cell(over, "" if size is None else f"n={int(size):,}"),
    ]


def checks(judged: Sequence[Judged]) -> Table:
    """The outcome of every check, one column per network."""
    titles: dict[str, str] = {}
    for item in judged:
        for check in item.shown.checks:
            titles.setdefault(check.name, check.title)
    networks = [item.network for item in judged]
    heads = [("Check", "")]
    heads += [(_name(item.network, networks), item.limit * item.several) for item in judged]
    lines = []
    for name, title in titles.items():
        outcomes = [
            next((check.outcome for check in item.shown.checks if check.name == name), "–")
            for item in judged
        ]
        lines.append([Cell(title), *map(Cell, outcomes)])
    return Table(heads, lines)


def verdict_attacks(item: Judged) -> Table:
    """The attacks behind one verdict, with their settings."""
    heads = [("Attack", ""), ("Accuracy left", "after it and all before"), ("Settings", "")]
    return Table(
        heads,
        [
            [
                Cell(each.name),
                Cell(_words.percent(each.robust_accuracy.value)),
                Cell(each.settings),
            ]
            for each in item.shown.attacks
        ],
    )


def of_each(
    found: Sequence[Network], rows: Sequence[Row], file: str, columns: dict[str, tuple[str, str]]
) -> Table:
    """Columns of a table with a row per network and seed: name, unit, and format by column."""
    own = [(network, of_network(rows, network)) for network in found]
    own = [(network, rows) for network, rows in own if rows]
    heads = [("Network", ""), *((head, "") for head, _ in columns.values())]
    lines = [
        [
            Cell(_name(network, found)),
            *(value(stat(rows, name, file=file), spec) for name, (_, spec) in columns.items()),
        ]
        for network, rows in own
    ]
    return Table(heads, lines)


def agreement(found: Sequence[Network], rows: Sequence[Row]) -> Table:
    """How students agree with their teachers, one line for each student and teacher."""
    heads = [
        ("Network", "learned from"),
        ("Same class", "of test examples"),
        ("Teacher's mistakes", ""),
        ("Mistakes repeated", "of the teacher's"),
        ("KL", "nats"),
        ("CKA", "of logits"),
    ]
    names = {(net.dataset, net.chain, net.temperature, net.generation): net for net in found}
    lines = []
    for network in found:
        by_teacher: dict[tuple[str, int], list[Row]] = {}
        for row in of_network(rows, network):
            key = (str(row.get("teacher_chain") or ""), int(row["teacher_generation"]))
            by_teacher.setdefault(key, []).append(row)
        for (chain, generation), own in by_teacher.items():
            teacher = names[network.dataset, chain, network.temperature, generation]
            of_chain = f" of {chain}" if chain != network.chain else ""
            share_of, mistakes, repeated, divergence, cka = (
                stat(own, name, file="agreement.csv", ends=name in _WITH_ENDS)
                for name in (
                    *("top1_agreement", "num_teacher_mistakes", "repeated_mistakes"),
                    *("mean_kl", "logits_cka"),
                )
            )
            lines.append(
                [
                    Cell(_name(network, found), f"{teacher.role}{of_chain}"),
                    share(share_of),
                    value(mistakes, "count"),
                    share(repeated),
                    value(divergence),
                    value(cka),
                ]
            )
    return Table(heads, lines)


_WITH_ENDS = ("top1_agreement", "repeated_mistakes")  # of one seed they have an interval


def deployment(found: Sequence[Network], rows: Sequence[Row], measured: Sequence[Row]) -> Table:
    """Sizes and times of exports, beside what was measured of the same networks."""
    # Accuracies and successes are those of the exported seed, not of all of them.
    own = {
        (place, int(row["seed"])): row
        for place, net in enumerate(found)
        for row in of_network(rows, net)
    }
    keys = [key for key in attack_keys(found) if key.attack == "autoattack"]
    heads = [
        ("Network", ""),
        ("Parameters", ""),
        ("Size", "of the chain's first"),
        ("Weights", "bytes"),
        ("One image", "ms"),
        ("128 images", "ms per image"),
        ("Test accuracy", ""),
        *((f"{key.name} success", key.limit) for key in keys),
    ]
    lines = []
    # From large to small.
    for (place, seed), row in sorted(
        own.items(), key=lambda item: (item[1]["temperature"], -item[1]["parameters"])
    ):
        network = found[place]
        about = [each for each in of_network(measured, network) if int(each["seed"]) == seed]
        attacked = [[each for each in about if _is_of(each, key)] for key in keys]
        parameters, size, weights, single, many = (
            stat([row], name, file="deployment.csv")
            for name in (
                *("parameters", "share_of_first", "weights_bytes"),
                *("milliseconds_per_image_batch_1", "milliseconds_per_image_batch_128"),
            )
        )
        lines.append(
            [
                Cell(_name(network, found)),
                value(parameters, "count"),
                share(size),
                value(weights, "count"),
                value(single),
                value(many),
                share(stat(about[:1], "test_accuracy", ends=True)),
                *(share(stat(each, "success_rate", ends=True)) for each in attacked),
            ]
        )
    return Table(heads, lines)


def _is_of(row: Row, key: AttackKey) -> bool:
    return bool(row["attack"]) and attack_key(row) == key


def distances(found: Sequence[Network], rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """Distances by attack and norm."""
    keys = list(dict.fromkeys(attack_key({**row, "eps": None}) for row in rows))
    columns = {
        "mean": ("Mean", "decimals"),
        "median": ("Median", "decimals"),
        "success_rate": ("Success", "%"),
    }
    return [
        (
            f"{key.name}, {_words.norm_name(key.norm)}",
            of_each(
                found,
                [row for row in rows if attack_key({**row, "eps": None}) == key],
                "distances.csv",
                columns,
            ),
        )
        for key in keys
    ]


def transfer(found: Sequence[Network], rows: Sequence[Row]) -> list[tuple[str, Table]]:
    """Success of what one generation's attack made on another one, by attack and temperature."""
    groups: dict[tuple[str, float, AttackKey], list[Row]] = {}
    for row in rows:
        key = (str(row.get("chain") or ""), float(row["temperature"]), attack_key(row))
        groups.setdefault(key, []).append(row)
    lines = {(net.chain, net.temperature, net.generation): net.line for net in found}
    return [
        (
            f"{key.name}, {key.limit}, T = {temperature:g}{', ' * bool(chain)}{chain}",
            _matrix(own, partial(_line, lines, chain, temperature)),
        )
        for (chain, temperature, key), own in groups.items()
    ]


def _line(
    lines: Mapping[tuple[str, float, int], str], chain: str, temperature: float, number: int
) -> str:
    return lines[chain, temperature, number]


def _matrix(rows: Sequence[Row], line_name: Callable[[int], str]) -> Table:
    cells: dict[tuple[int, int], list[Row]] = {}
    for row in rows:
        where = (int(row["source_generation"]), int(row["target_generation"]))
        cells.setdefault(where, []).append(row)
    numbers = sorted({number for where in cells for number in where})
    heads = [("Crafted on", "judged on"), *((line_name(number), "") for number in numbers)]
    lines = []
    for source in numbers:
        line = [Cell(line_name(source))]
        for target in numbers:
            own = cells.get((source, target))
            number = stat(own, "success_rate", file="transfer.csv") if own else None
            cell = share(number) if number else _NONE
            line.append(cell._replace(shade=number.mean if number else None))
        lines.append(line)
    return Table(heads, lines)


def sensitivity(found: Sequence[Network], rows: Sequence[Row]) -> Table:
    """The histogram of the softmax sensitivity of every network, over all seeds."""
    counts: dict[tuple[float, float], int] = {}
    for row in rows:
        counts[_bin(row)] = counts.get(_bin(row), 0) + int(row["count"])
    # A bin above all others is left out where nothing is in it: no softmax is that sensitive.
    edges = sorted(edge for edge, number in counts.items() if number or math.isfinite(edge[1]))
    heads = [("Network", ""), *((bin_name(edge), "") for edge in edges)]
    lines = []
    for network in found:
        own = {edge: 0 for edge in edges}
        for row in of_network(rows, network):
            if row["count"]:
                own[_bin(row)] += int(row["count"])
        total = sum(own.values())
        if total:
            shares = [number / total for number in own.values()]
            cells = [Cell(_words.percent(each), "", each) for each in shares]
            lines.append([Cell(_name(network, found)), *cells])
    return Table(heads, lines)


def _bin(row: Row) -> tuple[float, float]:
    return (
        -math.inf if row["low"] is None else float(row["low"]),
        math.inf if row["high"] is None else float(row["high"]),
    )


def bin_name(edge: tuple[float, float]) -> str:
    """A bin of log10 sensitivities.

    >>> bin_name((-math.inf, -40.0)), bin_name((-3.0, 0.0))
    ('< −40', '−3 to 0')
    """
    low, high = (f"{end:g}".replace("-", "−") for end in edge)
    if math.isinf(edge[0]):
        return f"< {high}"
    return f"≥ {low}" if math.isinf(edge[1]) else f"{low} to {high}"


def share(number: Stat | None, digits: int = 1) -> Cell:
    """A share with its interval, or the seeds' range."""
    return value(number, f"%{digits}")


def value(number: Stat | None, spec: str = "number") -> Cell:
    """A number with its range."""
    if number is None or not number.known:
        return _NONE
    return Cell(say({"": f"{{it:{spec}}}"}, "", it=number), number.small(spec))


def _name(network: Network, among: Sequence[Network]) -> str:
    """A network in a table of some: with its chain, where they are of several."""
    if not network.distilled:
        return network.name
    names = ("dataset", "chain")
    parts = [getattr(network, n) for n in names if len({getattr(one, n) for one in among}) > 1]
    return ", ".join([*filter(None, parts), f"T = {network.temperature:g} {network.role}"])
