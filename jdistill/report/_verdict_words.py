"""The verdict in words.

What a label means is said here once; a network is never called anything by one word, and every
"no sign" comes with the budget that it was sought with.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from jdistill.report import _text
from jdistill.report._networks import Network, Stat
from jdistill.report._verdicts import LABELS, Judged


def verdict(judged: Judged) -> str:
    """The verdict on one network with its two numbers: what the first screen says."""
    return f"{_numbers(judged)} {_meaning(judged)}"


def reasons(network: Network, baseline: Network | None, judged: Sequence[Judged]) -> str:
    """Why, what is left of the gain, and the verdicts at the other temperatures.

    Args:
        network: What the answer is about, one of the judged.
        baseline: What it is compared with, judged or not.
        judged: All verdicts on this data set.
    """
    one = next(item for item in judged if item.network == network)
    other = next((item for item in judged if item.network == baseline), None)
    sentences = _because(one)
    if baseline is not None:
        sentences.append(_gain(one, other) if other else _no_baseline(baseline))
    return " ".join([*sentences, *_elsewhere(network, judged)])


def long_form(found: Mapping[str, Any]) -> str:
    """A verdict with the budget that it rests on: never the label alone.

    >>> long_form({"label": "no sign of masking", "budget": "PGD-40, at linf 0.3, 500 examples"})
    'no sign of masking under PGD-40, at linf 0.3, 500 examples'
    """
    if found["label"] == "masked":
        return f"masked: the usual attack's number is not to be believed ({found['budget']})"
    if found["label"] == "inconclusive":
        return f"inconclusive: what was spent cannot tell ({found['budget']})"
    return f"{found['label']} under {found['budget']}"


def label(judged: Judged) -> str:
    """The label, and how many seeds have it where not all do."""
    number = judged.labels.count(judged.label)
    if number == len(judged.labels):
        return judged.label
    return f"{judged.label} ({number} of {len(judged.labels)} seeds)"


def _numbers(judged: Judged) -> str:
    examples = _text.of(judged.num_examples, "example")
    text = f"Within {judged.budget}, on {examples}, the usual attack leaves {_share(judged.naive)} "
    text += f"accuracy to {_text.network_name(judged.network)}; everything that was tried together "
    return f"{text}leaves {_share(judged.worst_case)}{_range(judged.worst_case)}."


def _meaning(judged: Judged) -> str:
    found = judged.verdicts[judged.shown]
    number, every = judged.labels.count(judged.label), len(judged.labels)
    some = "" if number == every else f" on {number} of {every} seeds"
    if judged.label == "masked":
        return f"This is gradient masking{some}: the first of these numbers is not to be believed."
    if judged.label == "inconclusive":
        text = (
            f"The verdict is inconclusive{some}: what was tried cannot tell whether the first of "
        )
        return f"{text}these numbers is to be believed. {_text.sentence(found['reason'])}"
    text = f"There is no sign of masking under {found['budget']}; that is no proof, and another "
    return f"{text}attack may find more."


def _because(judged: Judged) -> list[str]:
    """What speaks for masking: how many checks, and the first of them."""
    found = judged.verdicts[judged.shown]
    run = [check for check in found["checks"] if check["outcome"] != "not run"]
    against = [check for check in run if check["outcome"] == "masked"]
    if not against:
        return []
    says = "says" if len(against) == 1 else "say"
    count = f"{len(against)} of {_text.count(len(run), 'check')} {says} that the usual attack "
    count += "fails for reasons of its own."
    return [count, _text.sentence(against[0]["finding"])]


def _gain(one: Judged, other: Judged) -> str:
    """What the defense seems to gain, and what is left of it against everything tried."""
    whom = _text.teacher_name(other.network, full=True)
    text = f"By the same two measures {whom}, keeps {_share(other.naive)} and "
    text += _share(other.worst_case)
    if one.num_examples != other.num_examples:
        size = _text.of(other.num_examples, "example")
        return f"{text}, on {size}: not the same ones, so no difference is drawn."
    claimed = one.naive.mean - other.naive.mean
    true = one.worst_case.mean - other.worst_case.mean
    text += f": a difference of {_text.points(claimed)} points by the usual attack and of "
    text += f"{_text.points(true)} points by everything that was tried"
    if one.worst_case.overlaps(other.worst_case):
        text += ", where the 95 % intervals overlap"
    return f"{text}."


def _no_baseline(baseline: Network) -> str:
    return f"No verdict was asked for on {_text.teacher_name(baseline, full=True)}."


def _elsewhere(network: Network, judged: Sequence[Judged]) -> list[str]:
    """The labels of the last judged students at the other temperatures."""
    sentences = []
    others = [item for item in last_judged(judged) if item.network != network]
    others = [item for item in others if item.network.generation]
    for name in LABELS:
        same = [f"{item.network.temperature:g}" for item in others if item.label == name]
        if same:
            verdict_is = "the verdict is " + (
                "masked too" if _same(network, name, judged) else name
            )
            sentences.append(f"At T = {_text.join(same)} {verdict_is}.")
    return sentences


def _same(network: Network, name: str, judged: Sequence[Judged]) -> bool:
    own = next(item for item in judged if item.network == network)
    return name == own.label == "masked"


def last_judged(judged: Sequence[Judged]) -> list[Judged]:
    """Of each data set and temperature the judged network of the longest chain."""
    last = {(item.network.dataset, item.network.temperature): item for item in judged}
    return list(last.values())


def _share(stat: Stat) -> str:
    return f"{_text.percent(stat.mean)} %"


def _range(stat: Stat) -> str:
    if not stat.low < stat.high:
        return ""
    ends = f"{_text.percent(stat.low)} to {_text.percent(stat.high)} %"
    seeds = "" if stat.seeds == 1 else f", over all of {stat.seeds} seeds"
    return f" (95 % interval {ends}{seeds})"
