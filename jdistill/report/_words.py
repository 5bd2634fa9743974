"""The answer in words, chosen by rules from the numbers.

A sentence is written only where its rule holds; the rules and their thresholds are the constants
below and the docstring of `reading`. What no rule covers is said neutrally, with the figures.
"""

from collections.abc import Iterable, Mapping, Sequence

from jdistill.report import _comparison_words, _text, _verdict_words
from jdistill.report._measures import complete
from jdistill.report._networks import Attacked, Network, attack_keys, networks
from jdistill.report._reading import reading
from jdistill.report._table import Row
from jdistill.report._verdicts import Judged, judge

# Fewer seeds than this, and no difference between chain lengths is called one.
SEEDS_TO_COMPARE = 3


def answer(rows: Iterable[Row], measures: Mapping[str, Iterable[Row]] | None = None) -> list[str]:
    """What was found, in sentences: one paragraph per item of the list.

    The subject is the last student of the chain at the highest temperature (of the networks with a
    verdict, where there are any), compared with the teacher at T = 1, which is an ordinarily
    trained network (with the teacher at the student's own temperature where T = 1 was not run).
    Per data set: the verdict, or else what the share of zero gradients says; what the assistants
    changed; the subject's accuracy; every attack's success with budget and number of examples; and
    the bounds of it all.

    Args:
        rows: As for `write_results`.
        measures: What else was measured, as `read_measures` gives it. Of these, the words are
            about `verdicts` and `comparisons`.

    Returns:
        Plain text, one string a paragraph.

    Raises:
        ValueError: As `write_results`, `write_table` and `write_verdicts`; or there is no row.
    """
    found = networks(rows)
    every = complete(measures, found)
    opening, rest = paragraphs(found, judge(found, every["verdicts"]), every["comparisons"])
    return [*opening, *rest]


def paragraphs(
    found: Sequence[Network], judged: Sequence[Judged], comparisons: Sequence[Row]
) -> tuple[list[str], list[str]]:
    """The words of `answer`: what the first screen has room for, and the rest.

    Without a verdict there is no shorter answer than all of it.
    """
    datasets = sorted({network.dataset for network in found})
    opening, rest = [], []
    for dataset in datasets:
        chosen = [network for network in found if network.dataset == dataset]
        own = [item for item in judged if item.network.dataset == dataset]
        intro = f"On {dataset}: " if len(datasets) > 1 else ""
        student = subject(chosen, own)
        baseline = base(chosen, student)
        body = [_accuracy(student, baseline), _attacks(student, baseline)]
        short, more = _comparison_words.effect(student, chosen, comparisons)
        short = short or _assistants(chosen)
        if own:
            one = next(item for item in own if item.network == student)
            opening += [intro + _verdict_words.verdict(one), short]
            rest += [_verdict_words.reasons(student, baseline, own), more, *body]
        else:
            zeros = [*reading(student, baseline).sentences, *_elsewhere(chosen)]
            opening += [intro + body[0], body[1], " ".join(zeros), short, more]
    rest.append(_bounds(found))
    if not judged:
        opening, rest = opening + rest, []
    return [text for text in opening if text], [text for text in rest if text]


def subject(found: Sequence[Network], judged: Sequence[Judged] = ()) -> Network:
    """The network that the answer is about: the last generation at the highest temperature."""
    return max(
        [item.network for item in judged] or found,
        key=lambda net: (net.generation > 0, net.temperature, net.generation),
    )


def base(found: Sequence[Network], student: Network) -> Network | None:
    """What it is compared with: the teacher at T = 1, or else at its own temperature."""
    teachers = {net.temperature: net for net in found if net.generation == 0 and net != student}
    return teachers.get(1.0, teachers.get(student.temperature))


def _accuracy(student: Network, baseline: Network | None) -> str:
    if student.generation == 0:
        start = f"No student was measured. The teacher trained at T = {student.temperature:g}"
    else:
        through = _text.count(student.generation - 1, "assistant")
        start = f"The student distilled at T = {student.temperature:g} through {through}"
        start = start.replace("through no assistant", "without an assistant")
    text = f"{start} classifies {_text.percent(student.accuracy.mean, 2)} % of "
    text += (
        f"{_text.of(student.num_test, 'test example')} correctly{_text.range_of(student.accuracy)}"
    )
    if baseline:
        accuracy = _text.percent(baseline.accuracy.mean, 2)
        text += f"; {_text.teacher_name(baseline, full=True)}, {accuracy} %"
        text += _text.range_of(baseline.accuracy)
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
                whom = "" if parts else f" against {_text.teacher_name(baseline)}"
                size = "" if other.num_attacked == number else f" of {other.num_attacked:,}"
                text += f" ({_text.percent(other.success.mean)} %{size}{whom})"
            parts.append(text)
        examples = _text.of(number, "example")
        sentences.append(f"Within {_text.budget(hits[0].key)}, on {examples}, {_text.join(parts)}.")
    return " ".join(sentences)


def _minimum_norm(hit: Attacked, network: Network, baseline: Network | None) -> str:
    norm = _text.norm_name(hit.key.norm)
    freedom = hit.key.facts.freedom or "may change the input as far as it needs"
    text = f"{_text.attack_name(hit.key)}, which {freedom}, succeeds on {_rate(hit)}"
    other = baseline.attacks.get(hit.key) if baseline else None
    if other is None or baseline is None:
        return f"{text}{_distance(hit)}."
    both = (hit.success.mean, hit.num_attacked) == (other.success.mean, other.num_attacked)
    if both and hit.mean_distance.known and other.mean_distance.known:
        text += f" against both, at a mean {norm} distance of {_away(hit)} for {_kind(network)} "
        return f"{text}and {_away(other)} for {_text.teacher_name(baseline)}."
    if both:
        return f"{text} against both."
    text += f" against {_kind(network)}{_distance(hit)}, and on "
    return f"{text}{_rate(other)} against {_text.teacher_name(baseline)}{_distance(other)}."


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
    student = subject(found)
    baseline = base(found, student)
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
    if all(one.overlaps(other) for one, other in pairs):
        return f"{text}. The ranges over {seeds} seeds overlap: no effect of the assistants shows."
    return f"{text}. Not all of the ranges over {seeds} seeds overlap; the table has them."


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


def _rate(hit: Attacked) -> str:
    return f"{_text.percent(hit.success.mean)} % of {_text.of(hit.num_attacked, 'example')}"
