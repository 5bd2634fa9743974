"""What the share of zero gradients and the attacks say together, chosen by rules.

A sentence is written only where its rule holds; the rules and their thresholds are the constants
below and the docstring of `reading`. Where a verdict was asked for, the verdict stands instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jdistill.report import _text
from jdistill.report._networks import Attacked, AttackKey, Network

# The attacks that, with their default loss, follow the input gradient of the cross-entropy at
# T = 1, the gradient whose zeros `zero_gradient_fraction` counts (or of the softmax, as JSMA: it is
# zero where that one is); and those that are known to follow something else. An attack in neither
# is reported without a word on what it follows.
FOLLOW_CROSS_ENTROPY = frozenset({"fgsm", "bim", "mim", "pgd", "apgd", "universal", "jsma"})
FOLLOW_OTHER = frozenset(
    {
        "apgd_dlr",
        "apgd_targeted",
        "autoattack",
        "pgd_margin",
        "boundary",
        "carlini_wagner_l0",
        "carlini_wagner_l2",
        "carlini_wagner_linf",
        "ddn",
        "deepfool",
        "ead",
        "fab",
        "fab_targeted",
        "fmn",
        "nes",
        "hop_skip_jump",
        "spatial",
        "spsa",
        "square",
    }
)
# One step does worse than many on any network, and so does one perturbation for all examples, so
# these say nothing about a loss function.
HANDICAPPED = frozenset({"fgsm", "universal"})
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

    * "masked": the gradient is exactly zero on at least half of the examples, an attack that
      follows it (FGSM, BIM, MIM, PGD, APGD-CE, JSMA) fails on at least half, and either an attack
      of the same norm and budget that does not follow it succeeds on at least 10 points more (95 %
      intervals apart), or a minimum-norm attack that does not follow it succeeds on at least 95 %
      at a median distance of at most 1.5 times the baseline's.
    * "blind": the gradient is zero on at least half, without that second piece of evidence.
    * "partly blind": it is zero on 1 % to 50 %.
    * "understated": below 1 %, but another attack of the same budget succeeds on 10 points more
      than PGD.
    * "no zeros": below 1 % and no such attack. Says that no more than this was looked at.
    * "not measured": the rows have no share of zero gradients.

    Args:
        network: The network to read.
        baseline: What its distances are compared with, or None.

    Returns:
        The kind, and the sentences that the report prints.
    """
    naive = [hit for key, hit in network.attacks.items() if key.attack in FOLLOW_CROSS_ENTROPY]
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
        able = [hit for hit in bounded if hit.key.attack not in HANDICAPPED]
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
    for norm, eps in dict.fromkeys((hit.key.norm, hit.key.eps) for hit in naive):
        same = [hit for hit in network.attacks.values() if hit.key[1:] == (norm, eps)]
        others = [hit for hit in same if hit.key.attack not in FOLLOW_CROSS_ENTROPY]
        if eps is None or not others:
            continue
        weak = max((hit for hit in same if hit in naive), key=lambda hit: hit.success.mean)
        best = max(others, key=lambda hit: hit.success.mean)
        # An interval that was not measured (NaN) does not overlap: the gap decides alone.
        overlap = best.interval[0] <= weak.interval[1]
        if best.success.mean - weak.success.mean >= SUCCESS_GAP and not overlap:
            sentences.append(
                f"Within the same budget, {_text.budget(best.key)}, {_follows(best.key)} succeeds "
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
        if key.attack in FOLLOW_CROSS_ENTROPY | _text.NO_NORM:
            continue
        here, there = hit.median_distance, other.median_distance
        if min(hit.success.mean, other.success.mean) >= SUCCESS_FULL and (
            here.mean <= DISTANCE_SAME * there.mean
        ):
            sentences.append(
                f"{_follows(key)} succeeds on {_text.percent(hit.success.mean)} %, at a median "
                f"{_text.norm_name(key.norm)} distance of {_text.decimals(here.mean)} "
                f"({_text.teacher_name(baseline)}: {_text.decimals(there.mean)})."
            )
    return sentences


def _follows(key: AttackKey) -> str:
    name = _text.attack_name(key)
    return f"{name}, which does not follow that gradient," if key.attack in FOLLOW_OTHER else name


def _lower_bound(naive: Sequence[Attacked]) -> str:
    return (
        f"The success of {_text.join(_text.attack_names(naive))} is a lower bound and nothing more."
    )
