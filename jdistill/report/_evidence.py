"""The parts of a report that are about verdicts: their overview, their evidence, the checklist."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from jdistill.report import _tables, _text, _verdict_words
from jdistill.report._blocks import Block, Card, Cards, Folded, Heading, Items, Words
from jdistill.report._measure_figures import headline
from jdistill.report._table import Row
from jdistill.report._verdicts import Judged
from jdistill.report._words import subject

_TONES = {"masked": "bad", "clear": "good", "undecided": "open", "not run": "open"}
_ABOUT = (
    "The label says whether the usual attack's number is to be believed; how much a network "
    "withstands is the other number, and that is an upper bound. "
)


def overview(judged: Sequence[Judged], verdicts: Sequence[Row]) -> tuple[Block, ...]:
    """The verdicts as a table, and each in its long form, with its budget."""
    if not judged:
        return ()
    note = _ABOUT
    number = sum(len(item.verdicts) for item in judged)
    if number < len(verdicts):
        note += f"{len(verdicts) - number} verdicts at other budgets are in verdicts.json. "
    if any(len(item.seeds) > 1 for item in judged):
        note += "Over several seeds the gravest label stands, and the numbers are means; below "
        note += "them the 95 % intervals of all seeds, from the lowest end to the highest."
    else:
        note += "Below a number stands its 95 % interval over the examples."
    by_dataset: dict[str, list[Judged]] = {}
    for item in judged:
        by_dataset.setdefault(item.network.dataset, []).append(item)
    blocks: list[Block] = []
    for dataset, own in by_dataset.items():
        if len(by_dataset) > 1:
            blocks.append(Heading(dataset))
        blocks += [_tables.verdicts(own), Items(_long_forms(own))]
    return (*blocks, Words((note.strip(),), note=True))


def evidence(judged: Sequence[Judged]) -> tuple[Block, ...]:
    """Every check of the verdict: on the answer's subject in full, on the others to open."""
    if not judged:
        return ()
    blocks: list[Block] = []
    for dataset in dict.fromkeys(item.network.dataset for item in judged):
        own = [item for item in judged if item.network.dataset == dataset]
        student = subject([], own)
        shown = headline(own)
        intro = f"{dataset}: " if len({item.network.dataset for item in judged}) > 1 else ""
        for item in sorted(shown, key=lambda item: item.network != student):
            title = intro + _title(item)
            if item.network == student:
                blocks += [Heading(title), *_of(item)]
            else:
                blocks.append(Folded(title, _of(item), on_paper=False))
        if len(shown) > 1:
            blocks += [Heading(f"{intro}every check, network by network".capitalize())]
            blocks.append(_tables.checks(shown))
        hidden = len(own) - len(shown)
        if hidden:
            text = f"The evidence on {_text.count(hidden, 'more network')} is in verdicts.json."
            blocks.append(Words((text,), note=True))
    return tuple(blocks)


def checklist_blocks(cards: Sequence[Card]) -> tuple[Block, ...]:
    """The checklist, led by how much of it was done."""
    done = sum(card.badge == "done" for card in cards)
    text = (
        f"Of {len(cards)} items {done} were done in this run. Each is answered by a rule from the "
        "rows and checks that the run has (Carlini et al. 2019, condensed); “done” says that it "
        "was looked at, and the words what came out."
    )
    return Words((text,), note=True), Cards(tuple(cards))


def _long_forms(judged: Sequence[Judged]) -> tuple[str, ...]:
    """The verdicts in long form; networks with the same one together, by temperature."""
    # The temperature of a probe is each network's own; but for it, they were attacked alike.
    groups: dict[str, dict[str, list[str]]] = {}
    forms: dict[str, set[str]] = {}
    for item in judged:
        for seed, found in zip(item.seeds, item.verdicts, strict=True):
            name = item.network.role
            name += f" (seed {seed})" if len(set(item.labels)) > 1 else ""
            form = _verdict_words.long_form(found)
            alike = re.sub(r"\bT = [-+.\de]*\d", "a T of its own", form)
            forms.setdefault(alike, set()).add(form)
            places = groups.setdefault(alike, {})
            names = places.setdefault(f"T = {item.network.temperature:g}", [])
            names += [name] * (name not in names)
    lines = []
    for alike, places in groups.items():
        where = "; ".join(f"{place} ({', '.join(names)})" for place, names in places.items())
        exact = forms[alike]
        lines.append(f"{where}: {alike if len(exact) > 1 else next(iter(exact))}.")
    return tuple(lines)


def _title(item: Judged) -> str:
    seed = f", seed {item.seeds[item.shown]}" if len(item.seeds) > 1 else ""
    name = _text.sentence(_text.network_name(item.network))[:-1]
    return f"{name}{seed}: {item.label}"


def _of(item: Judged) -> tuple[Block, ...]:
    found = item.verdicts[item.shown]
    reason = f"{_text.sentence(found['reason'])} Budget: {found['budget']}."
    return (
        Words((reason,)),
        Cards(tuple(_card(check) for check in found["checks"])),
        _tables.attacks(found),
    )


def _card(check: Mapping[str, Any]) -> Card:
    figures = ", ".join(
        f"{name.replace('_', ' ')} {_figure(value)}" for name, value in check["figures"].items()
    )
    notes = [("Figures", figures), ("Threshold", check["threshold"]), ("Source", check["source"])]
    return Card(
        title=str(check["title"]),
        badge=str(check["outcome"]),
        tone=_TONES[check["outcome"]],
        text=str(check["finding"]),
        notes=tuple((name, str(value)) for name, value in notes if value),
    )


def _figure(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if float(value).is_integer() else _text.number(float(value))
