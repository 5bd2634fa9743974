"""The report as one HTML file that needs nothing beside it."""

import base64
import importlib.resources
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from jdistill._files import PathLike, as_path, write_whole
from jdistill.report import _text, _words
from jdistill.report._figures import write_figures
from jdistill.report._optional import check_packages, optional
from jdistill.report._pictures import load_pictures, write_picture_grid
from jdistill.report._settings import flat, read_json
from jdistill.report._table import (
    Attacked,
    AttackKey,
    Network,
    Row,
    Stat,
    attack_keys,
    networks,
    read_results,
    write_results,
)

_CAPTIONS = {
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
        "questions: training at a temperature makes the logits larger, which raises the first "
        "and, by saturating the softmax, makes the second vanish.",
    ),
}


def write_report(
    workdir: PathLike,
    rows: Iterable[Row] | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    pictures: Mapping[Any, Mapping[str, Any] | PathLike] | None = None,
) -> dict[str, epath.Path]:
    """Writes `results.csv`, `figures/*.png` and `report.html` into a workdir.

    Args:
        workdir: The folder; it is made. What is already there is replaced file by file.
        rows: As for `write_results`; None reads the workdir's `results.csv`.
        config: The settings of the experiment; None reads `config.json` if there is one.
        run: Versions, devices and times; None reads `run.json` if there is one.
        pictures: By temperature (or by a label of your own), what `write_picture_grid` takes:
            the path of an .npz, or its arrays.

    Returns:
        The path of everything written: `results`, `report`, and each figure by its name
        (`accuracy`, …, `pictures_T20`).

    Raises:
        FileNotFoundError: `rows` is None and the workdir has no `results.csv`.
        ModuleNotFoundError: matplotlib or jinja2 is missing.
        ValueError: As `write_results` and `write_picture_grid`; or there is no row.
    """
    folder = as_path(workdir)
    # Before anything is written, so that a missing package or a bad picture leaves no half report.
    check_packages()
    table = read_results(folder / "results.csv") if rows is None else [dict(row) for row in rows]
    networks(table)
    arrays = {key: load_pictures(value) for key, value in _in_order(pictures or {})}
    config = read_json(folder / "config.json") if config is None else config
    run = read_json(folder / "run.json") if run is None else run
    written = {}
    if rows is not None:
        written["results"] = write_results(folder / "results.csv", table)
    figures = write_figures(table, folder / "figures")
    grids = {}
    for key, value in arrays.items():
        name = f"pictures_{_picture_name(key)}"
        path = folder / "figures" / f"{name}.png"
        grids[key] = written[name] = write_picture_grid(value, path)
    report = write_html(
        folder / "report.html",
        rows=table,
        config=config,
        run=run,
        figures=figures,
        pictures=grids,
    )
    return {"results": folder / "results.csv", "report": report, **figures, **written}


def write_html(
    path: PathLike,
    *,
    rows: Iterable[Row],
    config: Mapping[str, Any] | None = None,
    run: Mapping[str, Any] | None = None,
    figures: Mapping[str, PathLike] | None = None,
    pictures: Mapping[Any, PathLike] | None = None,
) -> epath.Path:
    """Writes the report as one HTML file: no script, nothing loaded from elsewhere.

    It opens with the answer in words (see `answer`), then the attacks' figure, the table, the
    other figures and the pictures, what each quantity means, what was run, and what the report
    does not show.

    Args:
        path: The file to write.
        rows: As for `write_results`.
        config: The settings of the experiment; nested mappings are listed as `outer.inner`.
        run: Versions, devices, times and whatever else is needed to run it again, likewise.
        figures: PNG files by the names that `write_figures` gives.
        pictures: PNG files by temperature, as `write_picture_grid` draws them.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: jinja2 is missing.
        ValueError: As `write_results`; or there is no row.
    """
    jinja2 = optional("jinja2")
    rows = list(rows)
    found = networks(rows)
    datasets = sorted({network.dataset for network in found})
    source = importlib.resources.files("jdistill.report").joinpath("report.html.j2")
    # autoescape: data set names, settings and devices are text from outside.
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    drawn = [
        _figure(name, as_path(figure), found, datasets)
        for name, figure in sorted((figures or {}).items(), key=_figure_order)
    ]
    page = environment.from_string(source.read_text(encoding="utf-8")).render(
        title=f"Defensive distillation on {_text.join(datasets)}",
        lead=_lead(found),
        answer=[_unbroken(paragraph) for paragraph in _words.answer(rows)],
        hero=drawn[:1],
        figures=drawn[1:],
        tables=[_table([net for net in found if net.dataset == name]) for name in datasets],
        pictures=[
            {"title": _picture_title(key), **_embed(as_path(grid))}
            for key, grid in _in_order(pictures or {})
        ],
        several_seeds=any(len(net.seeds) > 1 for net in found),
        budgets=_budgets(found),
        settings=flat(config or {}),
        run=flat(run or {}),
        limits=_limits(found),
        rules=_words,
    )
    return write_whole(path, page.encode())


# --- The parts of the page -----------------------------------------------------------------------


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


def _unbroken(text: str) -> str:
    """Text with no line break between a number and its sign."""
    for words in (" %", "T = ", " = ", " ≤ "):
        text = text.replace(words, words.replace(" ", "\N{NO-BREAK SPACE}"))
    return text


def _table(found: Sequence[Network]) -> dict[str, Any]:
    """The per-temperature table: headers, and one group of lines for each temperature."""
    keys = attack_keys(found)
    # What was attacked, and how, before what explains it: a narrow screen shows the left first.
    heads: list[tuple[str, str]] = [("Test accuracy", "%"), ("Zero gradients", "% of examples")]
    for key in keys:
        heads.append((f"{_text.attack_name(key)} success", f"%, {_text.budget(key)}"))
        if key.eps is None:
            norm = _text.norm_name(key.norm)
            heads.append((f"{_text.attack_name(key)} mean", f"{norm}, over successes"))
            heads.append((f"{_text.attack_name(key)} median", f"{norm}, over successes"))
    heads += [
        ("Mean |logit|", ""),
        ("Sensitivity of logits", "mean |∂Σz/∂x|"),
        ("Sensitivity of softmax", "log10 mean |∂p/∂x|"),
    ]
    groups: dict[float, list[dict[str, Any]]] = {}
    for network in found:
        cells = [_percent_cell(network.accuracy, 2), _percent_cell(network.zero_gradients, 1)]
        for key in keys:
            cells += _attack_cells(key, network.attacks.get(key))
        cells += [
            _cell(network.mean_abs_logit),
            _cell(network.sensitivity_logits),
            _cell(network.log10_sensitivity_softmax, fixed=True),
        ]
        groups.setdefault(network.temperature, []).append(
            {"role": network.role.capitalize(), "cells": cells}
        )
    return {
        "dataset": found[0].dataset,
        "heads": heads,
        "groups": [(f"{temperature:g}", lines) for temperature, lines in groups.items()],
    }


def _attack_cells(key: AttackKey, hit: Attacked | None) -> list[tuple[str, str]]:
    if hit is None:
        return [("–", "")] * (3 if key.eps is None else 1)
    cells = [_percent_cell(hit.success, 1)]
    if key.eps is None:
        cells += [_cell(hit.mean_distance, fixed=True), _cell(hit.median_distance, fixed=True)]
    return cells


def _percent_cell(stat: Stat, digits: int) -> tuple[str, str]:
    ends = [_text.percent(end, digits) for end in (stat.low, stat.high)]
    return _text.percent(stat.mean, digits), _ends(stat, ends)


def _cell(stat: Stat, *, fixed: bool = False) -> tuple[str, str]:
    form = _text.decimals if fixed else _text.number
    return form(stat.mean), _ends(stat, [form(stat.low), form(stat.high)])


def _ends(stat: Stat, ends: Sequence[str]) -> str:
    return f"{ends[0]} to {ends[1]}" if stat.low < stat.high and ends[0] != ends[1] else ""


def _figure_order(item: tuple[str, Any]) -> tuple[str, int]:
    name = item[0]
    known = list(_CAPTIONS)
    base = name.partition("_")[0]
    return name.partition("_")[2], known.index(base) if base in known else len(known)


def _figure(
    name: str, path: epath.Path, found: Sequence[Network], datasets: Sequence[str]
) -> dict[str, Any]:
    base, _, dataset = name.partition("_")
    title, caption = _CAPTIONS.get(base, (name.replace("_", " "), ""))
    if len(datasets) > 1 and dataset in datasets:
        title = f"{title}, {dataset}"
    temperatures = sorted({net.temperature for net in found})
    lines = max(net.generation for net in found) + 1
    alt = f"Chart: {title.lower()}, T from {temperatures[0]:g} to {temperatures[-1]:g}, "
    alt += f"{_text.count(lines, 'line')}; its numbers are in the table."
    return {"title": title, "caption": caption, "alt": alt, **_embed(path)}


def _embed(path: epath.Path) -> dict[str, Any]:
    """A PNG file as a data address, and its size, which lets a browser lay out before it draws."""
    data = path.read_bytes()
    if not data.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(
            f"expected a PNG file, got {path} which is none; draw it with "
            "jdistill.report.write_figures or write_picture_grid"
        )
    width, height = struct.unpack(">II", data[16:24])
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"source": source, "width": width, "height": height}


def _in_order(pictures: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    def key(item: tuple[Any, Any]) -> tuple[bool, float, str]:
        label = item[0]
        is_text = isinstance(label, str)
        return is_text, 0.0 if is_text else float(label), str(label)

    return sorted(pictures.items(), key=key)


def _picture_name(key: Any) -> str:
    """A file name for a picture grid: the temperature, or the letters of a label."""
    if isinstance(key, str):
        return "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in key)
    return f"T{float(key):g}"


def _picture_title(key: Any) -> str:
    return key if isinstance(key, str) else f"Student at T = {float(key):g}"


def _budgets(found: Sequence[Network]) -> list[dict[str, str]]:
    """What each attack was allowed and what it spent."""
    lines = []
    for key in attack_keys(found):
        hits = [net.attacks[key] for net in found if key in net.attacks]
        queries = [hit.mean_queries.mean for hit in hits if hit.mean_queries.known]
        spent = "–"
        if queries:
            ends = [_text.number(end) for end in (min(queries), max(queries))]
            spent = ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"
        counts = sorted({hit.num_attacked for hit in hits})
        none = "none" if key.attack in _text.NO_NORM else "none: minimum norm"
        lines.append(
            {
                "name": _text.attack_name(key),
                "id": key.attack,
                "norm": _text.norm_name(key.norm),
                "eps": none if key.eps is None else _text.eps_text(key.eps),
                "examples": " to ".join(
                    f"{end:,}" for end in dict.fromkeys(counts[:1] + counts[-1:])
                ),
                "queries": spent,
            }
        )
    return lines


def _limits(found: Sequence[Network]) -> list[str]:
    """What this report does not show, from what was and was not run."""
    keys = attack_keys(found)
    names = {key.attack for key in keys}
    seeds = min(len(net.seeds) for net in found)
    limits = [
        "A proof. No attack here certifies that no adversarial example exists; every success "
        "rate is a lower bound on what a better attack would reach, and every distance an upper "
        "bound on the smallest one.",
    ]
    if not any("autoattack" in name or "square" in name for name in names):
        limits.append(
            "What happens under a black-box or a combined attack: neither Square nor AutoAttack "
            "was run."
        )
    if not any(
        key.eps is not None and key.attack not in _words.FOLLOW_CROSS_ENTROPY for key in keys
    ):
        limits.append(
            "The success of a scale-free loss within a fixed budget: the attacks that have a "
            "budget here all follow the cross-entropy at T = 1."
        )
    counts = [hit.num_attacked for net in found for hit in net.attacks.values()]
    tested = max(net.num_test for net in found)
    if counts and min(counts) < tested:
        limits.append(
            f"The whole test set: the attacks saw {min(counts):,} to {max(counts):,} of "
            f"{tested:,} examples."
            if min(counts) < max(counts)
            else f"The whole test set: the attacks saw {max(counts):,} of {tested:,} examples."
        )
    if seeds < _words.SEEDS_TO_COMPARE:
        had = "one seed" if seeds == 1 else f"{seeds} seeds"
        limits.append(
            f"Whether small differences between chain lengths or temperatures are real: {had} "
            "cannot tell them from chance."
        )
    moved = names & _text.NO_NORM
    norms = sorted({_text.norm_name(key.norm) for key in keys if key.attack not in moved})
    norms += ["rotations and translations"] * bool(moved)
    untried = "blur, other data sets" if moved else "rotations, blur, other data sets"
    if keys:
        limits.append(
            f"Perturbations other than {_text.join(norms)}: {untried} and inputs outside the test "
            "distribution were not tried."
        )
    if all(net.temperature != 1 or net.generation for net in found):
        limits.append("A comparison with ordinary training: no teacher at T = 1 was measured.")
    return limits
