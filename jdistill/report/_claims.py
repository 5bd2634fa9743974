"""Decisions on what the page may say: pure functions of the numbers, to cases of `_sentences`."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from jdistill import _words
from jdistill.report._networks import (
    LABELS,
    Judged,
    Network,
    Stat,
    attack_key,
    attack_keys,
    budget_of,
    of_network,
    stat,
)
from jdistill.report._table import Row, blank

# The usual level; divided by the number of comparisons (Bonferroni).
LEVEL = 0.05
# A minimum-norm attack "succeeds" from here on; the field's own reports have 99 to 100%.
FULL_SUCCESS = 0.95
# Below it a network has hardly learned; a defense that costs more than this is said to cost.
LEARNED = 0.5
COST = 0.1
FEW_EXAMPLES = 100

_KINDS = {
    "verdicts": "a masking verdict",
    "comparisons": "paired tests of chains",
    "curves": "curves against budget and steps",
    "distances": "distances in several norms",
    "transfer": "transfer between generations",
    "sensitivity": "histograms of the sensitivity",
    "calibration": "calibration",
}


class Claim(NamedTuple):
    """A case, and what its sentence is about."""

    case: str
    fields: dict[str, Any]


def subject(found: Sequence[Network], judged: Sequence[Judged]) -> Network:
    """The network that the answer is about: the last student at the highest temperature.

    Of the judged ones, where there are any, else of the attacked ones.
    """
    networks = [item.network for item in judged] or [net for net in found if net.attacks] or found
    return max(networks, key=lambda net: (net.generation > 0, net.temperature, net.generation))


def verdict_of(network: Network, judged: Sequence[Judged]) -> Judged | None:
    """A network's verdict; of several radii the gravest one."""
    own = [item for item in judged if item.network == network]
    return min(own, key=lambda item: LABELS.index(item.label), default=None)


def last_judged(judged: Sequence[Judged]) -> list[Judged]:
    """Those on the first screen: the teacher at T = 1, and each chain's last student."""
    last = {(item.network.subject, item.network.temperature): item.network for item in judged}
    shown = list(last.values())
    return [item for item in judged if item.network.is_reference or item.network in shown]


def answer(network: Network, judged: Sequence[Judged]) -> Claim:
    """Answer on a network's robustness: its verdict, or else its strongest attack."""
    own = verdict_of(network, judged)
    if own is not None:
        numbers = {"naive": own.naive, "worst": own.worst_case, "limit": own.limit}
        numbers["number"] = own.num_examples
        return Claim(own.label, {"name": network.name, **numbers})
    bounded = [hit for hit in network.attacks.values() if hit.key.eps is not None]
    if bounded:
        radii = [hit.key.budget for hit in bounded]
        common = max(dict.fromkeys(radii), key=radii.count)
        best = max(
            (hit for hit in bounded if hit.key.budget == common), key=lambda hit: hit.success.mean
        )
        about = {"attack": best.key.name, "limit": best.key.limit, "success": best.success}
        return Claim("attack", {"name": network.name, **about})
    hits = sorted(network.attacks.values(), key=lambda hit: not hit.median_distance.known)
    if not hits:
        return Claim("no attack", {"name": network.name})
    hit = hits[0]
    about = {"name": network.name, "attack": hit.key.name, "success": hit.success}
    if not hit.median_distance.known:
        return Claim("success", about)
    norm = _words.norm_name(hit.key.norm)
    return Claim("distance", {**about, "median": hit.median_distance, "norm": norm})


def seeds_differ(network: Network, judged: Sequence[Judged]) -> Claim | None:
    """Counts of the labels that a network's seeds got, where they were judged unlike."""
    own = verdict_of(network, judged)
    labels = [verdict.label for verdict in own.verdicts] if own else []
    if len(set(labels)) < 2:
        return None
    counts = [f"{label} on {labels.count(label)}" for label in LABELS if label in labels]
    return Claim("seeds differ", {"number": len(labels), "counts": _words.join(counts)})


def baseline(found: Sequence[Network], network: Network) -> Network | None:
    """The ordinary network of the same data, to compare with: of the same chain if it has one."""
    plain = [net for net in found if net.is_ordinary and net.dataset == network.dataset]
    own = [net for net in plain if net.chain == network.chain]
    other = next(iter([*own, *plain]), None)
    return None if other == network else other


def gain(network: Network, other: Network | None, judged: Sequence[Judged]) -> Claim | None:
    """Gain of the defense on the ordinary network, by everything tried."""
    one = verdict_of(network, judged)
    if one is None or other is None:
        return None
    bases = [item for item in judged if item.network == other]
    base = next((item for item in bases if item.compares_with(one)), None)
    about = {"other": other.name}
    if base is None:
        return Claim("judged otherwise" if bases else "not judged", about)
    difference = one.worst_case.mean - base.worst_case.mean
    case = "higher" if difference > 0 else "lower"
    if one.worst_case.overlaps(base.worst_case):
        case = "overlap"
    return Claim(
        case,
        {
            **about,
            "base": base.worst_case,
            "gain": _words.points(difference),
            "claimed": _words.points(one.naive.mean - base.naive.mean),
        },
    )


def elsewhere(network: Network, judged: Sequence[Judged]) -> dict[str, list[str]]:
    """The other networks that stand for a chain or temperature, by label."""
    found: dict[str, list[str]] = {}
    for item in last_judged(judged):
        other = item.network
        gravest = verdict_of(other, judged) == item
        stands = not other.is_reference or (other.is_last and not other.is_ordinary)
        if gravest and other != network and stands:
            found.setdefault(item.label, []).append(
                f"T = {other.temperature:g}" if other.subject == network.subject else other.name
            )
    return found


def warnings(
    found: Sequence[Network], judged: Sequence[Judged], distances: Sequence[Row] = ()
) -> list[Claim]:
    """Warnings that stand before everything else."""
    claims = []
    poor = [net for net in found if net.accuracy.known and net.accuracy.mean < LEARNED]
    if poor:
        claims.append(Claim("hardly learned", {"names": _names(poor)}))
    last = subject(found, judged)
    other = baseline(found, last)
    if other is not None and last not in poor and _costs(last.accuracy, other.accuracy):
        accuracies = {"accuracy": last.accuracy, "base": other.accuracy}
        claims.append(Claim("costs", {"name": last.name, "other": other.name, **accuracies}))
    for name, hits in failing(found, distances).items():
        worst = min((success for _, success in hits), key=lambda success: success.mean)
        about = {"attack": name, "success": worst}
        claims.append(Claim("unbounded", {"names": _names([net for net, _ in hits]), **about}))
    bad = [item.network for item in judged if _outcome(item, "unbounded") == "masked"]
    if bad:
        claims.append(Claim("unbounded check", {"names": _names(bad)}))
    for item in judged:
        if any(verdict.num_nonfinite for verdict in item.verdicts):
            claims.append(Claim("nonfinite", {"name": item.network.name}))
    fewest = min((item.num_examples for item in judged), key=lambda n: n.mean, default=None)
    if fewest is not None and fewest.mean < FEW_EXAMPLES:
        claims.append(Claim("few", {"number": fewest}))
    if max(len(net.seeds) for net in found) == 1:
        claims.append(Claim("one seed", {}))
    return claims


def _costs(accuracy: Stat, base: Stat) -> bool:
    lower = base.mean - accuracy.mean > COST
    return accuracy.known and base.known and lower and not accuracy.overlaps(base)


def unbounded(
    found: Sequence[Network], distances: Sequence[Row]
) -> dict[str, list[tuple[Network, Stat]]]:
    """By the name of an attack that may go as far as it needs, its success on each network."""
    made: dict[str, list[tuple[Network, Stat]]] = {}
    for network in found:
        for key, hit in network.attacks.items():
            if key.eps is None and not key.has_no_norm and key.facts.freedom is None:
                made.setdefault(key.name, []).append((network, hit.success))
        by_norm: dict[Any, list[Row]] = {}
        for row in of_network(distances, network):
            by_norm.setdefault(attack_key({**row, "eps": None}), []).append(row)
        for key, rows in by_norm.items():
            success = stat(rows, "success_rate", file="distances.csv")
            made.setdefault(f"{key.name} {_words.norm_name(key.norm)}", []).append(
                (network, success)
            )
    return made


def failing(
    found: Sequence[Network], distances: Sequence[Row]
) -> dict[str, list[tuple[Network, Stat]]]:
    """Those of `unbounded` that do not succeed.

    By the upper end of one seed's interval; by the lowest of several seeds.
    """
    failed = {
        name: [
            (network, success)
            for network, success in made
            if (success.high if success.seeds == 1 else success.low) < FULL_SUCCESS
        ]
        for name, made in unbounded(found, distances).items()
    }
    return {name: made for name, made in failed.items() if made}


def _names(networks: Sequence[Network]) -> str:
    """A few networks by name, or how many."""
    if len(networks) > 2:
        return f"{len(networks)} networks (such as {networks[0].name})"
    return _words.join([network.name for network in networks])


def _outcome(item: Judged, name: str) -> str:
    """The gravest outcome of a check over the seeds."""
    order = ("masked", "undecided", "clear", "not run")
    outcomes = [c.outcome for verdict in item.verdicts for c in verdict.checks if c.name == name]
    return min(outcomes, key=order.index, default="not run")


class Comparison(NamedTuple):
    """One comparison of two networks, and the case of what it supports."""

    row: Row
    case: str
    number: int


def comparisons(rows: Sequence[Row]) -> list[Comparison]:
    """The comparisons, those over the seeds where there are any, else those of each seed."""
    pooled = {_pair(row) for row in rows if blank(row["seed"])}
    chosen = [row for row in rows if blank(row["seed"]) or _pair(row) not in pooled]
    number = sum(not blank(row["p_value"]) for row in chosen)
    return [Comparison(row, support(row, number), number) for row in chosen]


def support(row: Row, number: int) -> str:
    """Case of `COMPARISONS` that a comparison supports, as one of `number` made.

    Within one seed a test is over examples: it tells these two networks apart, and says nothing of
    the next seed's, however small p is.
    """
    if any(blank(row[name]) for name in ("low", "high", "p_value")):
        return "untested"
    excludes = float(row["low"]) > 0 or float(row["high"]) < 0
    p_value = float(row["p_value"])
    if excludes != (p_value < LEVEL):
        return "disagree"
    if not excludes:
        return "not shown"
    if p_value >= LEVEL / max(number, 1):
        return "many"
    if not blank(row["seed"]):
        return "one seed"
    return "higher" if float(row["difference"]) > 0 else "lower"


def effect(made: Sequence[Comparison]) -> Claim | None:
    """Claim of all comparisons together."""
    if not made:
        return None
    tested = [each for each in made if each.case != "untested"]
    if not tested:
        return Claim("untested", {})
    shown = sum(each.case in ("higher", "lower") for each in tested)
    differing = sum(each.case == "one seed" for each in tested)
    number = _words.count(len(tested), "comparison")
    found = {"shown": shown, "differing": differing}
    fields = {name: _words.count(value, "difference") for name, value in found.items()}
    fields |= {"number": number}
    return Claim("shown" if shown else "one seed" if differing else "none", fields)


def _pair(row: Row) -> tuple[Any, ...]:
    names = ("dataset", "chain", "baseline_chain", "temperature", "quantity")
    return tuple(row.get(name) for name in (*names, "generation", "baseline_generation"))


_QUANTITY = re.compile(r"robust_accuracy: (?P<attack>.+) at (?P<norm>\S+) (?P<eps>[\d.e+-]+)")


def quantity(row: Row) -> str:
    """The compared quantity, in words.

    >>> quantity({"quantity": "test_accuracy"})
    'test accuracy'
    >>> quantity({"quantity": "robust_accuracy: pgd_margin at linf 0.1", "title": "PGD margin"})
    'accuracy under PGD margin, l∞ ≤ 0.1'
    """
    text = str(row["quantity"])
    if found := _QUANTITY.fullmatch(text):
        name = row.get("title") or found["attack"].replace("_", " ")
        limit = _words.within(found["norm"], budget_of(found["eps"]) or 0.0)
        return f"accuracy under {name}, {limit}"
    return text.replace("_", " ")


def limits(
    found: Sequence[Network], judged: Sequence[Judged], measures: Mapping[str, Sequence[Row]]
) -> list[Claim]:
    """Limits of what the page shows, from what was and was not run."""
    keys = attack_keys(found)
    claims = [Claim("proof", {})]
    missing = [words for kind, words in _KINDS.items() if not measures[kind]]
    if missing:
        claims.append(Claim("missing", {"kinds": _words.join(missing)}))
    if not {"scores", "decisions"} & set(facts_tried("access", keys, judged)):
        claims.append(Claim("black box", {}))
    seen = [hit.num_attacked for net in found for hit in net.attacks.values()]
    seen = [item.num_examples for item in judged] or seen
    most = max(seen, key=lambda size: size.mean, default=None)
    tested = max((net.num_test for net in found), key=lambda size: size.mean)
    if most is not None and most.mean < tested.mean:
        who = "verdicts" if judged else "attacks"
        claims.append(Claim("test set", {"who": who, "most": most, "tested": tested}))
    norms = norms_tried(found, judged, measures)
    if norms:
        claims.append(Claim("norms", {"norms": _words.join(norms)}))
    if found[0].distilled and not any(net.is_ordinary for net in found):
        claims.append(Claim("baseline", {}))
    return claims


def norms_tried(
    found: Sequence[Network], judged: Sequence[Judged], measures: Mapping[str, Sequence[Row]]
) -> list[str]:
    """The norms of every attack there was, in whatever table it stands."""
    keys = attack_keys(found)
    norms = {key.norm for key in keys if key.norm and not key.has_no_norm}
    norms |= {item.norm for item in judged}
    norms |= {str(row["norm"]) for kind in ("distances", "curves") for row in measures[kind]}
    names = sorted(_words.norm_name(norm) for norm in norms if norm)
    return names + ["rotations and translations"] * any(key.has_no_norm for key in keys)


def facts_tried(fact: str, keys: Iterable[Any], judged: Sequence[Judged]) -> dict[str, list[str]]:
    """By the value of a fact of attacks, the names of those that have it, verdicts' included."""
    made = [(key.name, getattr(key.facts, fact)) for key in keys]
    for item in judged:
        for verdict in item.verdicts:
            made += [(each.name, getattr(each, fact)) for each in verdict.attacks]
    found: dict[str, list[str]] = {}
    for name, value in made:
        if value is not None and name not in found.setdefault(value, []):
            found[value].append(name)
    return found
