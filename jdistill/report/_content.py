"""What stands in a report, from the first screen to the last line."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from jdistill.report import (
    _checklist,
    _comparison_words,
    _evidence,
    _limits,
    _measure_figures,
    _tables,
    _text,
    _words,
)
from jdistill.report._blocks import (
    Block,
    Folded,
    Heading,
    Items,
    Page,
    Pairs,
    Picture,
    Section,
    Terms,
    Words,
)
from jdistill.report._measures import complete
from jdistill.report._networks import Network, networks
from jdistill.report._settings import flat, glance
from jdistill.report._table import Row
from jdistill.report._verdicts import judge

_CAPTIONS = {
    "verdict": (
        "The usual attack's number against the worst case",
        "Open: accuracy under the usual attack. Filled: what no attack of the verdict broke. The "
        "thin lines are 95 % intervals over the examples (of several seeds, all of them).",
    ),
    "attacks": (
        "Success of every attack against temperature",
        "Success rate of each attack, one panel an attack, all on one scale; the shaded panel is "
        "the share of examples on which the gradient that FGSM and PGD follow is exactly zero. "
        "Where that share is high, a low success of these two says nothing about the network.",
    ),
    "robustness": (
        "Distance to the adversarial examples found",
        "Mean (solid) and median (dotted) distance of the adversarial examples that the "
        "minimum-norm attack found. Means are over its successes alone: read them beside its "
        "success rate.",
    ),
    "accuracy": (
        "Accuracy on the clean test set",
        "Test accuracy at T = 1. Distillation is meant to leave it where it was.",
    ),
    "sensitivity": (
        "Sensitivity to the input, measured in two ways",
        "Left, of the logits; right, of the softmax at T = 1, as log10. They answer different "
        "questions: training at a temperature makes the logits larger, which raises the first, "
        "and saturates the softmax, which makes the second vanish on most examples; its mean is "
        "then that of the few where it does not.",
    ),
    "curve-eps": (
        "Accuracy under attack against its budget",
        "The teacher at T = 1 and the student of the longest chain at each temperature; bands are "
        "95 % intervals over the examples (of several seeds, all of them). Read off the distances "
        "that the attacks found in one run each.",
    ),
    "curve-steps": (
        "Accuracy under attack against its steps",
        "From one run each: the share of examples that are not broken after so many steps. A line "
        "that is still falling at its end shows an attack that was stopped too early.",
    ),
    "curve-queries": (
        "Accuracy under attack against its queries",
        "From one run each: the share of examples that are not broken after so many queries.",
    ),
    "sensitivity-bins": (
        "Sensitivity of the softmax, in the bins of Papernot et al. (2016)",
        "The share of examples by log10 of the mean |∂ softmax / ∂x| at T = 1. The normal numbers "
        "of float32 end near −38.",
    ),
    "distances": (
        "Distance to the adversarial examples found, by norm",
        "Mean (solid, ρ_adv) and median (dotted), over the successes alone: read them beside the "
        "success rates.",
    ),
    "transfer": (
        "Success of adversarial examples crafted on another generation",
        "In percent. The diagonal is the attack on the network itself; another source that does "
        "better shows that this attack fails for reasons of its own.",
    ),
}


def page(
    rows: Iterable[Row],
    measures: Mapping[str, Iterable[Row]] | None,
    *,
    config: Mapping[str, Any],
    run: Mapping[str, Any],
    figures: Mapping[str, epath.Path],
    pictures: Mapping[Any, epath.Path],
    has_weights: bool,
) -> Page:
    """The report as blocks; the arguments are those of `write_html`."""
    found = networks(rows)
    every = complete(measures, found)
    judged = judge(found, every["verdicts"])
    datasets = sorted({network.dataset for network in found})
    opening, more = _words.paragraphs(found, judged, every["comparisons"])

    def draw(*names: str) -> list[Block]:
        full = [
            name if len(datasets) == 1 else f"{name}_{dataset}"
            for dataset in datasets
            for name in names
        ]
        return [_picture(name, figures[name], found, datasets) for name in full if name in figures]

    # Without a verdict the attacks themselves are the first figure.
    first = "verdict" if judged else "attacks"
    others = [
        name for name in ("attacks", "robustness", "accuracy", "sensitivity") if name != first
    ]

    unknown = [name for name in figures if name.partition("_")[0] not in _CAPTIONS]

    def of_each(build: Callable[[list[Network]], list[Block]]) -> list[Block]:
        blocks: list[Block] = []
        for dataset in datasets:
            own = build([net for net in found if net.dataset == dataset])
            if own and len(datasets) > 1:
                blocks.append(Heading(dataset))
            blocks += own
        return blocks

    sections = [
        Section("In more words", "words", _some(Words(tuple(more)) if more else None)),
        Section("The verdict", "verdict", _evidence.overview(judged, every["verdicts"])),
        Section(
            "Results by temperature",
            "results",
            (*of_each(lambda own: [_tables.results(own)]), Words((_results_note(found),), True)),
        ),
        Section("Does an assistant help?", "assistants", _assistants(found, every["comparisons"])),
        Section(
            "Against temperature",
            "temperature",
            (
                *draw(*others),
                *(_picture(name, figures[name], found, datasets) for name in unknown),
            ),
        ),
        Section(
            "Against the attack's budget",
            "budget",
            (
                *draw("curve-eps", "curve-steps", "curve-queries"),
                *of_each(lambda own: _curve_tables(own, every["curves"])),
            ),
        ),
        Section(
            "Sensitivity of single examples",
            "sensitivity",
            (
                *draw("sensitivity-bins"),
                *of_each(lambda own: _if(_tables.bins, own, every["sensitivity"])),
            ),
        ),
        Section(
            "Distance to the nearest adversarial examples",
            "distances",
            (
                *draw("distances"),
                *of_each(lambda own: _if(_tables.distances, own, every["distances"])),
            ),
        ),
        Section(
            "Transfer between generations",
            "transfer",
            (*draw("transfer"), *of_each(lambda own: _transfer(own, every["transfer"]))),
        ),
        Section("Calibration", "calibration", tuple(_calibration(of_each, every["calibration"]))),
        Section("Adversarial examples", "pictures", _pictures(pictures)),
        Section("Evidence of the verdict", "evidence", _evidence.evidence(judged)),
        Section(
            "Checklist of “On Evaluating Adversarial Robustness”",
            "checklist",
            _evidence.checklist_blocks(
                _checklist.checklist(found, judged, every, config, has_weights=has_weights)
            ),
        ),
        Section(
            "What the quantities mean",
            "terms",
            (Terms((*_limits.TERMS, *(_limits.JUDGED_TERMS if judged else ()))),),
        ),
        Section("What was run", "run", _what_was_run(found, config, run)),
        Section(
            "What this report does not show",
            "limits",
            (
                Items(_limits.limits(found, judged, every)),
                Words((_limits.rules(bool(judged)),), True),
            ),
        ),
    ]
    return Page(
        title=f"Defensive distillation on {_text.join(datasets)}",
        lead=_lead(found),
        answer=tuple(opening),
        hero=tuple(block for block in draw(first) if isinstance(block, Picture)),
        sections=tuple(section for section in sections if section.blocks),
    )


def in_order(pictures: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """Picture grids by temperature, and then those with labels of their own."""

    def key(item: tuple[Any, Any]) -> tuple[bool, float, str]:
        label = item[0]
        is_text = isinstance(label, str)
        return is_text, 0.0 if is_text else float(label), str(label)

    return sorted(pictures.items(), key=key)


def _some(*blocks: Block | None) -> tuple[Block, ...]:
    return tuple(block for block in blocks if block is not None)


def _if(
    build: Callable[[Sequence[Network], Sequence[Row]], Block],
    found: Sequence[Network],
    rows: Sequence[Row],
) -> list[Block]:
    """A table, if there are rows about this data set."""
    own = [row for row in rows if row["dataset"] == found[0].dataset]
    return [build(found, own)] if own else []


def _lead(found: Sequence[Network]) -> str:
    """One line on what was trained."""
    temperatures = sorted({net.temperature for net in found})
    longest = max(net.generation for net in found)
    seeds = {seed for net in found for seed in net.seeds}
    parts = ["T = " + ", ".join(f"{temperature:g}" for temperature in temperatures)]
    if longest:
        parts.append(_text.count(longest - 1, "assistant"))
    else:
        parts.append("teacher only")
    parts.append(_text.count(len(seeds), "seed"))
    parts.append(_text.count(max(net.num_test for net in found), "test example"))
    return " · ".join(parts)


def _results_note(found: Sequence[Network]) -> str:
    if any(len(net.seeds) > 1 for net in found):
        text = "Numbers are means over seeds; below them the lowest and the highest seed (where "
        text += "there was one seed, the 95 % interval over examples, if there is one)."
    else:
        text = "One seed. Below a rate stands its 95 % interval over the examples; it does not "
        text += "include what another seed would change."
    return (
        f"{text} Every network is tested at T = 1, whatever temperature it was trained at. The "
        "teacher at T = 1 is an ordinarily trained network. Assistant 1 is the student of a chain "
        "without an assistant, assistant 2 that of a chain with one, and so on."
    )


def _assistants(found: Sequence[Network], rows: Sequence[Row]) -> tuple[Block, ...]:
    claims = _comparison_words.claims(found, rows)
    if not claims:
        return ()
    tests = sorted({str(claim.row["test"]) for claim in claims if claim.row["test"]})
    note = "Both networks of a pair were tested on the same examples"
    note += f": {'; '.join(tests)}." if tests else "."
    if any(claim.row["seed"] is not None for claim in claims):
        note += " A test within one seed is about two networks; what the next seed would give, it "
        note += "does not say."
    return _tables.comparisons(claims), Words((note,), True)


def _curve_tables(found: Sequence[Network], rows: Sequence[Row]) -> list[Block]:
    tables: list[Block] = []
    for curve in ("eps", "steps", "queries"):
        for key, lines in _measure_figures.curve_lines(found, rows, curve).items():
            title = f"{_text.attack_name(key)}, {_text.norm_name(key.norm)}"
            title = title if curve == "eps" else _text.attack_label(key)
            title = f"Accuracy (%) under {title}, against {curve}"
            tables.append(Folded(title, (_tables.curve(title, lines, curve),)))
    return tables


def _transfer(found: Sequence[Network], rows: Sequence[Row]) -> list[Block]:
    blocks: list[Block] = []
    for matrix in _measure_figures.matrices(found[0].dataset, rows):
        table = _tables.transfer(matrix)
        number = _text.of(matrix.num_examples, "example")
        blocks.append(Folded(f"{table.label}, {number}", (table,)))
    return blocks


def _calibration(
    of_each: Callable[[Callable[[list[Network]], list[Block]]], list[Block]], rows: Sequence[Row]
) -> list[Block]:
    blocks = of_each(lambda own: _if(_tables.calibration, own, rows))
    if blocks:
        note = "Of the softmax at T = 1. A network whose mean confidence is far above its accuracy "
        note += "is too sure of itself."
        blocks.append(Words((note,), True))
    return blocks


def _pictures(pictures: Mapping[Any, epath.Path]) -> tuple[Block, ...]:
    if not pictures:
        return ()
    note = (
        "From top to bottom: the clean example with its label; the adversarial example with what "
        "the network reads in it; their difference (red: brighter, blue: darker; one scale for "
        "all of a grid) with its distance."
    )
    grids = []
    for key, path in in_order(pictures):
        title = key if isinstance(key, str) else f"Student at T = {float(key):g}"
        alt = f"{title}: clean examples, their adversarial versions and the differences, with "
        grids.append(Picture(title, "", f"{alt}labels, predictions and distances.", path))
    return Words((note,), True), *grids


def _what_was_run(
    found: Sequence[Network], config: Mapping[str, Any], run: Mapping[str, Any]
) -> tuple[Block, ...]:
    budgets = _tables.budgets(found)
    blocks: list[Block] = [Pairs("At a glance", tuple(glance(found, run)))]
    if budgets.groups[0].lines:
        blocks += [Heading("Attacks"), budgets]
    return (
        *blocks,
        Heading("Settings"),
        Pairs("Settings", tuple(flat(config))),
        Heading("Machine and versions"),
        Pairs("Machine and versions", tuple(flat(run))),
    )


def _picture(
    name: str, path: epath.Path, found: Sequence[Network], datasets: Sequence[str]
) -> Picture:
    base, _, dataset = name.partition("_")
    title, caption = _CAPTIONS.get(base, (name.replace("_", " "), ""))
    if len(datasets) > 1 and dataset in datasets:
        title = f"{title}, {dataset}"
    temperatures = sorted({net.temperature for net in found})
    alt = f"Chart: {title.lower()}, T from {temperatures[0]:g} to {temperatures[-1]:g}; its "
    return Picture(title, caption, f"{alt}numbers are in the tables.", path)
