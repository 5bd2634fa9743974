"""What a report does not show, and what its quantities mean."""

from collections.abc import Mapping, Sequence

from jdistill.report import _reading, _text, _words
from jdistill.report._networks import Network, attack_keys
from jdistill.report._table import Row
from jdistill.report._verdicts import Judged

_KINDS = {
    "verdicts": "a masking verdict",
    "comparisons": "paired tests of chain lengths",
    "curves": "curves of accuracy against budget and steps",
    "distances": "ρ_adv in several norms",
    "transfer": "transfer between the generations of a chain",
    "sensitivity": "histograms of the sensitivity",
    "calibration": "calibration",
}


def limits(
    found: Sequence[Network], judged: Sequence[Judged], measures: Mapping[str, Sequence[Row]]
) -> tuple[str, ...]:
    """What this report does not show, from what was and was not run."""
    keys = attack_keys(found)
    seeds = min(len(net.seeds) for net in found)
    lines = [
        "A proof. No attack here certifies that no adversarial example exists; every success "
        "rate is a lower bound on what a better attack would reach, and every distance an upper "
        "bound on the smallest one.",
    ]
    missing = [words for kind, words in _KINDS.items() if not measures[kind]]
    if missing:
        lines.append(f"Not done in this run: {_text.join(missing)}.")
    made = [key.facts.access for key in keys]
    made += [a.get("access") for item in judged for v in item.verdicts for a in v["attacks"]]
    if not {"scores", "decisions"} & set(made):
        lines.append(
            "What happens under a black-box attack: none here is known to work without gradients."
        )
    bounded = [key for key in keys if key.eps is not None]
    if not judged and all(key.facts.follows == "softmax" for key in bounded):
        lines.append(
            "The success of a scale-free loss within a fixed budget: the attacks that have a "
            "budget here all follow the cross-entropy at T = 1."
        )
    counts = [hit.num_attacked for net in found for hit in net.attacks.values()]
    counts += [item.num_examples for item in judged]
    tested = max(net.num_test for net in found)
    if counts and min(counts) < tested:
        lines.append(
            f"The whole test set: the attacks saw {min(counts):,} to {max(counts):,} of "
            f"{tested:,} examples."
            if min(counts) < max(counts)
            else f"The whole test set: the attacks saw {max(counts):,} of {tested:,} examples."
        )
    if seeds < _words.SEEDS_TO_COMPARE:
        had = "one seed" if seeds == 1 else f"{seeds} seeds"
        lines.append(
            f"Whether small differences between chain lengths or temperatures are real: {had} "
            "cannot tell them from chance."
        )
    moved = any(key.has_no_norm for key in keys)
    used = {key.norm for key in keys if not key.has_no_norm} | {item.norm for item in judged}
    norms = [_text.norm_name(norm) for norm in sorted(used)]
    norms = sorted(norms) + ["rotations and translations"] * moved
    untried = "blur, other data sets" if moved else "rotations, blur, other data sets"
    if norms:
        lines.append(
            f"Perturbations other than {_text.join(norms)}: {untried} and inputs outside the test "
            "distribution were not tried."
        )
    if all(net.temperature != 1 or net.generation for net in found):
        lines.append("A comparison with ordinary training: no teacher at T = 1 was measured.")
    return tuple(lines)


def rules(has_verdicts: bool) -> str:
    """By which rules the sentences at the top were chosen."""
    if has_verdicts:
        return (
            "The sentences at the top are chosen by rules from the verdict, whose own rules and "
            "thresholds stand beside each check. A comparison is called a difference only if its "
            "95 % interval excludes 0 and its p-value is below 0.05 divided by the number of "
            "comparisons."
        )
    return (
        "The sentences at the top are chosen by rules: gradient masking is named only if at least "
        f"{100 * _reading.ZERO_SHARE_MOST:.0f} % of the gradients are exactly zero, an attack that "
        "follows them fails on at least half of the examples, and either an attack of the same "
        "budget that does not follow them succeeds on at least "
        f"{100 * _reading.SUCCESS_GAP:.0f} percentage points more, with 95 % intervals apart, or a "
        "minimum-norm attack succeeds on at least "
        f"{100 * _reading.SUCCESS_FULL:.0f} % of the examples at a median distance of at most "
        f"{_reading.DISTANCE_SAME} times that of the network it is compared with."
    )


TERMS = (
    (
        "Teacher, assistant, student",
        "The teacher is trained on the labels with its logits divided by T; each later network on "
        "the class probabilities, at the same T, of the one before it.",
    ),
    (
        "Test accuracy",
        "The share of clean test examples that the network classifies correctly.",
    ),
    (
        "Mean |logit|",
        "The average size of the network's outputs before the softmax. Training at T makes it "
        "grow roughly with T, which saturates the softmax at T = 1.",
    ),
    (
        "Sensitivity of the logits",
        "Mean |∂ (sum of the logits) / ∂x| over examples and input entries, as in the code of "
        "Mandal and Gao (2023); it scales with the logits.",
    ),
    (
        "Sensitivity of the softmax",
        "Mean |∂ softmax / ∂x| at T = 1 over examples, classes and input entries, as in Papernot "
        "et al. (2016); shown as log10, computed in logarithms, so that −40 means 10⁻⁴⁰ and not 0.",
    ),
    (
        "Zero gradients",
        "The share of examples whose input gradient of the cross-entropy at T = 1 is exactly zero "
        "in float32: an attack that follows this gradient has nothing to follow there, so its "
        "failure says nothing about the network.",
    ),
    (
        "Success of an attack",
        "The share of all attacked examples that end up misclassified; an example that was "
        "misclassified from the start counts, at distance 0.",
    ),
    (
        "Budget",
        "“l∞ ≤ 0.1” allows each input entry to change by 0.1 (inputs are scaled as the data set "
        "has them, usually to [0, 1]); “smallest l2” is a minimum-norm attack, which may change "
        "as much as it needs and tries to need little.",
    ),
    (
        "Mean and median distance",
        "How far the adversarial examples that a minimum-norm attack found lie from their "
        "originals (the mean is ρ_adv, over its successes); both are upper bounds on the smallest "
        "distance.",
    ),
)

JUDGED_TERMS = (
    (
        "The usual attack, everything tried",
        "What is left of the accuracy under the attack that papers usually report, on the "
        "cross-entropy at T = 1; and the share of the same examples that no attack of the verdict "
        "broke. The second is an upper bound on what a better attack would leave.",
    ),
    (
        "Masked",
        "Evidence that the usual attack fails for reasons of its own, most often a gradient that "
        "is zero: its number is not to be believed.",
    ),
    (
        "No sign of masking",
        "No check points to masking, under the budget named. How much the network "
        "withstands is the number beside it, not this label.",
    ),
    (
        "Inconclusive",
        "What was spent cannot tell; the reason says what would.",
    ),
)
