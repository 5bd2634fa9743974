"""What the share of zero gradients and the attacks say together, chosen by rules.

A sentence is written only where its rule holds; the rules and their thresholds are the constants
below and the docstring of `reading`. Where a verdict was asked for, the verdict stands instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jdistill.report import _text
from jdistill.report._networks import Attacked, AttackKey, Network

# At least this share of exact zeros, and the gradient is no guide for most examples.
ZERO_SHARE_MOST = 0.5
# Below this share, exact zeros explain nothing.
ZERO_SHARE_NONE = 0.01
# An attack at the same budget tells more only if it succeeds on this much more (and its 95 %
# interval lies above): less is within the differences between loss functions on any network.
SUCCESS_GAP = 0.10
# A minimum-norm attack "succeeds" from here on; the field's own reports have 99 to 100 %.
SUCCESS_FULL = 0.95
# "No further away": the median distance at most this many times the baseline's. Published: 1.25
# for MNIST distilled at T = 100 against undistilled; claims of a defense are 6 to 9 times.
DISTANCE_SAME = 1.5

Kind = Literal["masked", "blind", "partly blind", "understated", "no zeros", "not measured"]


@dataclass(frozen=True)
class Reading:
    """What the share of zero gradients and the attacks say together about one network."""

    kind: Kind
    sentences: tuple[str, ...]


def reading(network: Network, baseline: Network | None) -> Reading:
    """Reads a network's zero gradients together with the attacks on it.

    An attack follows the gradient whose zeros are counted, that of the cross-entropy at T = 1, if
    its `follows` is "softmax"; where that is not known, nothing is said of what it follows.

    * "masked": the gradient is exactly zero on at least half of the examples, an attack that
      follows it fails on at least half, and either an attack of the same norm and budget that does
      not follow it succeeds on at least 10 points more (95 % intervals apart), or a minimum-norm
      attack that does not follow it succeeds on at least 95 % at a median distance of at most 1.5
      times the baseline's.
    * "blind": the gradient is zero on at least half, without that second piece of evidence.
    * "partly blind": it is zero on 1 % to 50 %.
    * "understated": below 1 %, but another attack of the same budget succeeds on 10 points more
      than those that follow it and do not do worse on any network (as one step does).
    * "no zeros": below 1 % and no such attack. Says that no more than this was looked at.
    * "not measured": the rows have no share of zero gradients.

    Args:
        network: The network to read.
        baseline: What its distances are compared with, or None.

    Returns:
        The kind, and the sentences that the report prints.
    """
    naive = [hit for hit in network.attacks.values() if _follows_softmax(hit.key)]
    zero = network.zero_gradients
    if not zero.known:
        return Reading(
            "not measured",
            (
                "The share of examples with a zero input gradient was not measured, so this "
                "report cannot say whether attacks failed for want of a gradient.",
            ),
        )
    share = f"{_text.percent(zero.mean)} % of {_text.of(network.num_sensitivity, 'example')}"
    start = f"The input gradient of the loss at T = 1 is exactly zero in float32 on {share}"
    if zero.mean < ZERO_SHARE_NONE:
        bounded = [hit for hit in naive if hit.key.eps is not None]
        able = [hit for hit in bounded if hit.key.facts.handicap is None]
        stronger = _stronger(network, able)
        if stronger:
            start += ", so zeros are not what separates the attacks."
            return Reading("understated", (start, *stronger, _lower_bound(able)))
        rest = ": zero gradients are not what limits the attacks here. Other ways in which "
        rest += "attacks can fail were not tested by this number."
        return Reading("no zeros", (start + rest,))
    mostly = zero.mean >= ZERO_SHARE_MOST
    if not naive:
        text = f"{start}. An attack that follows it would find nothing to follow there."
        return Reading("blind" if mostly else "partly blind", (text,))
    start += f", and {_text.join(_text.attack_names(naive))} "
    start += f"{'has' if len(naive) == 1 else 'have'} nothing else to follow"
    silent = f"{start}: on those, a failure says nothing about the network."
    low = [hit for hit in naive if hit.success.mean <= 0.5]
    stronger = _stronger(network, low)
    if not mostly:
        return Reading("partly blind", (silent, *stronger))
    evidence = [*stronger, *_nearby(network, baseline)]
    if not low or not evidence:
        unsettled = "No other attack in this report settles how far the network withstands "
        return Reading("blind", (silent, unsettled + "perturbations of that size."))
    whose = "their" if len(naive) == len(low) > 1 else f"{_text.join(_text.attack_names(low))}'s"
    failures = "failures of the attack" if len(low) == 1 else "failures of the attacks"
    verdict = f"This is gradient masking: {whose} low success counts {failures}, and is no "
    verdict += "evidence that the network withstands perturbations."
    return Reading("masked", (f"{start}.", verdict, *evidence))


def _stronger(network: Network, naive: Sequence[Attacked]) -> list[str]:
    """For each budget, a sentence if an attack does much better than all the naive ones."""
    sentences = []
    for budget in dict.fromkeys(hit.key.budget for hit in naive if hit.key.eps is not None):
        same = [hit for hit in network.attacks.values() if hit.key.budget == budget]
        others = [hit for hit in same if not _follows_softmax(hit.key)]
        if not others:
            continue
        weak = max((hit for hit in same if hit in naive), key=lambda hit: hit.success.mean)
        best = max(others, key=lambda hit: hit.success.mean)
        # An interval that was not measured (NaN) does not overlap: the gap decides alone.
        overlap = best.interval[0] <= weak.interval[1]
        if best.success.mean - weak.success.mean >= SUCCESS_GAP and not overlap:
            sentences.append(
                f"Within the same budget, {_text.budget(best.key)}, {_clause(best.key)} succeeds "
                f"on {_text.percent(best.success.mean)} %."
            )
    return sentences


def _nearby(network: Network, baseline: Network | None) -> list[str]:
    """A sentence for each minimum-norm attack that succeeds no further away than before."""
    sentences = []
    for key, hit in network.attacks.items():
        other = baseline.attacks.get(key) if baseline else None
        if key.eps is not None or other is None or baseline is None:
            continue
        if _follows_softmax(key) or key.has_no_norm:
            continue
        here, there = hit.median_distance, other.median_distance
        if min(hit.success.mean, other.success.mean) >= SUCCESS_FULL and (
            here.mean <= DISTANCE_SAME * there.mean
        ):
            sentences.append(
                f"{_clause(key)} succeeds on {_text.percent(hit.success.mean)} %, at a median "
                f"{_text.norm_name(key.norm)} distance of {_text.decimals(here.mean)} "
                f"({_text.teacher_name(baseline)}: {_text.decimals(there.mean)})."
            )
    return sentences


def _follows_softmax(key: AttackKey) -> bool:
    return key.facts.follows == "softmax"


def _clause(key: AttackKey) -> str:
    """The attack, and that it follows another gradient where that is known."""
    name = _text.attack_name(key)
    known = key.facts.follows == "logits"
    return f"{name}, which does not follow that gradient," if known else name


def _lower_bound(naive: Sequence[Attacked]) -> str:
    return (
        f"The success of {_text.join(_text.attack_names(naive))} is a lower bound and nothing more."
    )
