"""The answer in words, chosen by rules from the numbers.

A sentence is written only where its rule holds; the rules and their thresholds are the constants
below and the docstring of `reading`. What no rule covers is said neutrally, with the figures.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from jdistill.report import _text
from jdistill.report._table import Attacked, AttackKey, Network, Row, Stat, attack_keys, networks

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
# What attacks without a radius may do, where that is not all they need.
_FREEDOM = {
    "jsma": "changes a limited number of features",
    "spatial": "turns and shifts the input",
}
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
# Fewer seeds than this, and no difference between chain lengths is called one.
SEEDS_TO_COMPARE = 3

Kind = Literal["masked", "blind", "partly blind", "understated", "no zeros", "not measured"]


@dataclass(frozen=True)
class Reading:
    """What the share of zero gradients and the attacks say together about one network."""

    kind: Kind
    sentences: tuple[str, ...]


def answer(rows: Iterable[Row]) -> list[str]:
    """What was found, in sentences: one paragraph per item of the list.

    The subject is the last student of the chain at the highest temperature, compared with the
    teacher at T = 1, which is an ordinarily trained network (with the teacher at the student's
    own temperature where T = 1 was not run). Per data set: its accuracy; every attack's success
    with budget and number of examples; what the share of zero gradients says about those; what
    the assistants changed; and the bounds of it all.

    Args:
        rows: As for `write_results`.

    Returns:
        Plain text, one string a paragraph.

    Raises:
        ValueError: As `write_results`; or there is no row.
    """
    found = networks(rows)
    datasets = sorted({network.dataset for network in found})
    paragraphs = []
    for dataset in datasets:
        chosen = [network for network in found if network.dataset == dataset]
        student, baseline = subject(chosen), base(chosen)
        intro = f"On {dataset}: " if len(datasets) > 1 else ""
        paragraphs.append(intro + _accuracy(student, baseline))
        paragraphs.append(_attacks(student, baseline))
        paragraphs.append(" ".join([*reading(student, baseline).sentences, *_elsewhere(chosen)]))
        paragraphs.append(_assistants(chosen))
    paragraphs.append(_bounds(found))
    return [paragraph for paragraph in paragraphs if paragraph]


def subject(found: Sequence[Network]) -> Network:
    """The network that the answer is about: the last generation at the highest temperature."""
    return max(found, key=lambda net: (net.generation > 0, net.temperature, net.generation))


def base(found: Sequence[Network]) -> Network | None:
    """What it is compared with: the teacher at T = 1, or else at its own temperature."""
    student = subject(found)
    teachers = {net.temperature: net for net in found if net.generation == 0 and net != student}
    return teachers.get(1.0, teachers.get(student.temperature))


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
    start += f", and {_text.join(_names(naive))} {'has' if len(naive) == 1 else 'have'} nothing "
    start += "else to follow"
    silent = f"{start}: on those, a failure says nothing about the network."
    low = [hit for hit in naive if hit.success.mean <= 0.5]
    stronger = _stronger(network, low)
    if not mostly:
        return Reading("partly blind", (silent, *stronger))
    evidence = [*stronger, *_nearby(network, baseline)]
    if not low or not evidence:
        unsettled = "No other attack in this report settles how far the network withstands "
        return Reading("blind", (silent, unsettled + "perturbations of that size."))
    whose = "their" if len(naive) == len(low) > 1 else f"{_text.join(_names(low))}'s"
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
                f"({_name(baseline)}: {_text.decimals(there.mean)})."
            )
    return sentences


def _follows(key: AttackKey) -> str:
    name = _text.attack_name(key)
    return f"{name}, which does not follow that gradient," if key.attack in FOLLOW_OTHER else name


def _lower_bound(naive: Sequence[Attacked]) -> str:
    return f"The success of {_text.join(_names(naive))} is a lower bound and nothing more."


def _accuracy(student: Network, baseline: Network | None) -> str:
    if student.generation == 0:
        start = f"No student was measured. The teacher trained at T = {student.temperature:g}"
    else:
        through = _text.count(student.generation - 1, "assistant")
        start = f"The student distilled at T = {student.temperature:g} through {through}"
        start = start.replace("through no assistant", "without an assistant")
    text = f"{start} classifies {_text.percent(student.accuracy.mean, 2)} % of "
    text += f"{_text.of(student.num_test, 'test example')} correctly{_range(student.accuracy)}"
    if baseline:
        accuracy = _text.percent(baseline.accuracy.mean, 2)
        text += f"; {_name(baseline, full=True)}, {accuracy} %{_range(baseline.accuracy)}"
    return f"{text}."


def _attacks(network: Network, baseline: Network | None) -> str:
    """What the attacks did: a sentence a budget, and one for each minimum-norm attack."""
    groups: dict[tuple[str, float | None, int], list[Attacked]] = {}
    for key, hit in network.attacks.items():
        groups.setdefault((key.norm, key.eps, hit.num_attacked), []).append(hit)
    sentences = []
    for (_, eps, number), hits in groups.items():
        if eps is None:
            sentences += [_minimum_norm(hit, network, baseline) for hit in hits]
            continue
        parts: list[str] = []
        for hit in hits:
            other = baseline.attacks.get(hit.key) if baseline else None
            text = f"{_text.attack_name(hit.key)} {'' if parts else 'succeeds '}on "
            text += f"{_text.percent(hit.success.mean)} %"
            if not parts and baseline:
                text += f" against {_kind(network)}"
            if other and baseline:
                whom = "" if parts else f" against {_name(baseline)}"
                size = "" if other.num_attacked == number else f" of {other.num_attacked:,}"
                text += f" ({_text.percent(other.success.mean)} %{size}{whom})"
            parts.append(text)
        examples = _text.of(number, "example")
        sentences.append(f"Within {_text.budget(hits[0].key)}, on {examples}, {_text.join(parts)}.")
    return " ".join(sentences)


def _minimum_norm(hit: Attacked, network: Network, baseline: Network | None) -> str:
    norm = _text.norm_name(hit.key.norm)
    freedom = _FREEDOM.get(hit.key.attack, "may change the input as far as it needs")
    text = f"{_text.attack_name(hit.key)}, which {freedom}, succeeds on {_rate(hit)}"
    other = baseline.attacks.get(hit.key) if baseline else None
    if other is None or baseline is None:
        return f"{text}{_distance(hit)}."
    both = (hit.success.mean, hit.num_attacked) == (other.success.mean, other.num_attacked)
    if both and hit.mean_distance.known and other.mean_distance.known:
        text += f" against both, at a mean {norm} distance of {_away(hit)} for {_kind(network)} "
        return f"{text}and {_away(other)} for {_name(baseline)}."
    if both:
        return f"{text} against both."
    text += f" against {_kind(network)}{_distance(hit)}, and on "
    return f"{text}{_rate(other)} against {_name(baseline)}{_distance(other)}."


def _kind(network: Network) -> str:
    return "the student" if network.generation else "this teacher"


def _distance(hit: Attacked) -> str:
    if not hit.mean_distance.known:
        return ""
    return f", at a mean {_text.norm_name(hit.key.norm)} distance of {_away(hit)} for these"


def _away(hit: Attacked) -> str:
    median = _text.decimals(hit.median_distance.mean)
    return f"{_text.decimals(hit.mean_distance.mean)} (median {median})"


def _elsewhere(found: Sequence[Network]) -> list[str]:
    """At which other temperatures the last students are read as masked, and at which not."""
    student, baseline = subject(found), base(found)
    if not student.generation or reading(student, baseline).kind != "masked":
        return []
    others = [net for net in found if net.is_last and net.generation and net != student]
    yes = [net for net in others if reading(net, baseline).kind == "masked"]
    clear = [net for net in others if reading(net, baseline).kind == "no zeros"]
    no = [net for net in others if net not in yes and net not in clear]
    sentences = []
    if yes:
        sentences.append(f"The same holds for the student at T = {_temperatures(yes)}.")
    if clear:
        sentences.append(f"At T = {_temperatures(clear)} zero gradients limit no attack.")
    if no:
        sentences.append(f"At T = {_temperatures(no)} the evidence is not enough to say so.")
    return sentences


def _temperatures(found: Sequence[Network]) -> str:
    return _text.join([f"{network.temperature:g}" for network in found])


def _assistants(found: Sequence[Network]) -> str:
    """What assistants changed at the highest temperature, without calling noise an effect."""
    student = subject(found)
    plain = next(
        (n for n in found if n.temperature == student.temperature and n.generation == 1), None
    )
    if plain is None or student.generation < 2:
        return ""
    through = _text.count(student.generation - 1, "assistant")
    text = f"With {through} the student's test accuracy is "
    text += f"{_text.percent(student.accuracy.mean, 2)} %, without one "
    text += f"{_text.percent(plain.accuracy.mean, 2)} %"
    pairs = [(student.accuracy, plain.accuracy)]
    for key, hit in student.attacks.items():
        other = plain.attacks.get(key)
        if key.eps is None and other and hit.mean_distance.known and other.mean_distance.known:
            pairs.append((hit.mean_distance, other.mean_distance))
            text += (
                f"; the mean {_text.norm_name(key.norm)} distance of {_text.attack_name(key)} is "
            )
            text += f"{_text.decimals(hit.mean_distance.mean)} and "
            text += _text.decimals(other.mean_distance.mean)
    seeds = min(len(student.seeds), len(plain.seeds))
    if seeds < SEEDS_TO_COMPARE:
        had = _text.count(seeds, "seed")
        return f"{text}. With {had} this report calls no difference between them an effect."
    if all(_overlap(*pair) for pair in pairs):
        return f"{text}. The ranges over {seeds} seeds overlap: no effect of the assistants shows."
    return f"{text}. Not all of the ranges over {seeds} seeds overlap; the table has them."


def _overlap(one: Stat, other: Stat) -> bool:
    return one.low <= other.high and other.low <= one.high


def _bounds(found: Sequence[Network]) -> str:
    keys = attack_keys(found)
    if not keys:
        return "No attack was made, so nothing here says how the networks behave under attack."
    attacks = _text.count(len(keys), "attack")
    return (
        f"These are the results of {attacks} with the budgets and numbers of examples stated. "
        "A success shows that an adversarial example exists; a failure shows only that this "
        "attack did not find one, and another may."
    )


def _names(hits: Sequence[Attacked]) -> list[str]:
    return list(dict.fromkeys(_text.attack_name(hit.key) for hit in hits))


def _name(network: Network, *, full: bool = False) -> str:
    name = f"the teacher at T = {network.temperature:g}"
    if full and network.temperature == 1:
        name += ", an ordinarily trained network"
    return name


def _rate(hit: Attacked) -> str:
    return f"{_text.percent(hit.success.mean)} % of {_text.of(hit.num_attacked, 'example')}"


def _range(stat: Stat) -> str:
    """Where the number may lie: over the seeds, or over the examples of one."""
    if not stat.low < stat.high:
        return ""
    ends = f"{_text.percent(stat.low, 2)} to {_text.percent(stat.high, 2)} %"
    if stat.seeds > 1:
        return f" (mean of {stat.seeds} seeds, {ends})"
    return f" (95 % interval {ends})"
