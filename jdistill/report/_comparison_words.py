"""What the paired tests say about assistants, in sentences that claim no more than the data do."""

import math
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jdistill.report import _text
from jdistill.report._networks import AttackKey, Network, facts
from jdistill.report._table import Row, blank
from jdistill.report._verdicts import is_of

# The usual level; divided by the number of comparisons (Bonferroni), because of many comparisons
# without any effect one in twenty falls below it.
LEVEL = 0.05
_BUDGETED = re.compile(r"(?P<attack>\S+) at (?P<norm>\S+) (?P<eps>[\d.e+-]+)")

Support = Literal["shown", "one of many", "disagree", "not shown", "not tested"]


class Claim(NamedTuple):
    """One comparison of two networks of a chain, and what it supports."""

    row: Row
    network: Network
    number: int
    support: Support

    @property
    def conclusion(self) -> str:
        """What the data say of the difference, after a colon."""
        if self.support == "shown":
            which = "higher" if float(self.row["difference"]) > 0 else "lower"
            return f"the data show that it is {which}"
        if self.support == "one of many":
            return (
                f"alone this would count as a difference; as one of {self.number} comparisons "
                "it does not"
            )
        if self.support == "disagree":
            return "the interval and the test disagree: the data do not settle it"
        if self.support == "not tested":
            return "no interval or no p-value was computed, so nothing follows"
        return "the data do not show an effect"

    @property
    def sentence(self) -> str:
        """The comparison as a sentence, with its figures."""
        row = self.row
        against = _text.chain_name(int(row["baseline_generation"]))
        text = f"At T = {self.network.temperature:g} the {quantity(row)} of "
        text += f"{_text.chain_name(self.network.generation)} differs from that of {against}"
        return f"{text} by {self.figures}."

    @property
    def next_sentence(self) -> str:
        """The same after a sentence that has named the two networks."""
        return f"The {quantity(self.row)} differs by {self.figures}."

    @property
    def figures(self) -> str:
        """The difference, what is known of its uncertainty, and what follows."""
        row, details = self.row, []
        if not blank(row["low"]) and not blank(row["high"]):
            details.append(f"95 % interval {interval(row)}")
        if not blank(row["p_value"]):
            details.append(_text.p_value(float(row["p_value"])))
        details.append(over(row, self.network))
        points = _text.points(float(row["difference"]), 2)
        return f"{points} points ({', '.join(details)}): {self.conclusion}"


def claims(found: Sequence[Network], rows: Sequence[Row]) -> list[Claim]:
    """The comparisons, those over the seeds where there are any, else those of each seed."""
    pooled = {_what(row) for row in rows if blank(row["seed"])}
    chosen = [row for row in rows if blank(row["seed"]) or _what(row) not in pooled]
    number = sum(not blank(row["p_value"]) for row in chosen)
    return [
        Claim(row, network, number, support(row, number))
        for network in found
        for row in chosen
        if is_of(row, network)
    ]


def support(row: Row, number: int) -> Support:
    """What a comparison supports, as one of `number` made.

    * "shown": the 95 % interval excludes 0, and the p-value is below 0.05 / `number`.
    * "one of many": the interval excludes 0, and the p-value is below 0.05 alone.
    * "disagree": one of the interval and the p-value speaks for a difference, the other does not.
    * "not shown": neither does.
    * "not tested": one of them is missing.

    Of one seed a test is over examples: it tells these two networks apart, and says nothing about
    the next seed's. So it is "one of many" at most.
    """
    if any(blank(row[name]) for name in ("low", "high", "p_value")):
        return "not tested"
    excludes = float(row["low"]) > 0 or float(row["high"]) < 0
    small = float(row["p_value"]) < LEVEL
    if excludes != small:
        return "disagree"
    if not small:
        return "not shown"
    of_one_seed = not blank(row["seed"])
    strong = float(row["p_value"]) < LEVEL / max(number, 1)
    return "shown" if strong and not of_one_seed else "one of many"


def effect(student: Network, found: Sequence[Network], rows: Sequence[Row]) -> tuple[str, str]:
    """What assistants changed for the subject of the answer: in short, and the rest.

    Args:
        student: The subject.
        found: All networks.
        rows: The rows of `comparisons.csv`.

    Returns:
        The most telling comparison with how many of all showed anything, and the other ones; both
        empty where the subject was not compared.
    """
    every = [claim for claim in claims(found, rows) if claim.network.dataset == student.dataset]
    made = [
        claim
        for claim in every
        if claim.network == student and int(claim.row["baseline_generation"]) == 1
    ]
    if not made:
        return "", ""
    # The defense is for accuracy under attack; what it costs without one comes second.
    made.sort(key=lambda claim: claim.row["quantity"] == "test_accuracy")
    short, rest = made[0].sentence, [claim.sentence for claim in made[1:2]]
    rest += [claim.next_sentence for claim in made[2:4]]
    if len(every) > 1:
        shown = sum(claim.support == "shown" for claim in every)
        verb = "shows" if shown == 1 else "show"
        short += f" Of all {len(every)} comparisons of chain lengths {shown or 'none'} {verb} a "
        short += "difference."
    if any(not blank(claim.row["seed"]) for claim in made):
        rest.append("A test within one seed says nothing about the next seed's networks.")
    return short, " ".join(rest)


def quantity(row: Row) -> str:
    """What was compared, in words.

    >>> quantity({"quantity": "test_accuracy"})
    'test accuracy'
    >>> row = {"quantity": "robust_accuracy: pgd_margin at linf 0.1", "title": "PGD margin"}
    >>> quantity(row)
    'accuracy under PGD margin within l∞ ≤ 0.1'
    """
    name, _, attack = str(row["quantity"]).partition(":")
    if name == "robust_accuracy":
        if budgeted := _BUDGETED.fullmatch(attack.strip()):
            eps = float(budgeted["eps"])
            key = AttackKey(budgeted["attack"], budgeted["norm"], eps, facts(row))
            return f"accuracy under {_text.attack_name(key)} within {_text.budget(key)}"
        return f"accuracy under {attack.strip() or 'attack'}"
    return " ".join([name.replace("_", " "), attack.strip()]).strip()


def interval(row: Row) -> str:
    """The interval of a difference, in points."""
    ends = [math.nan if blank(row[end]) else float(row[end]) for end in ("low", "high")]
    return f"{_text.points(ends[0], 2)} to {_text.points(ends[1], 2)}"


def over(row: Row, network: Network) -> str:
    """What a comparison is over: the seeds, or the examples of one."""
    size = 0 if blank(row["num_examples"]) else int(row["num_examples"])
    examples = f"{size:,} examples" if size else "the same examples"
    if not blank(row["seed"]):
        return f"seed {int(row['seed'])}, {examples}"
    return f"{_text.count(len(network.seeds), 'seed')}, {examples}"


def _what(row: Row) -> tuple[object, ...]:
    names = ("dataset", "temperature", "quantity", "generation", "baseline_generation")
    return tuple(row[name] for name in names)
