"""The report of a folder: its tables and verdicts, read, checked, and shown as one HTML page."""

import base64
import importlib.resources
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from jdistill import _validate, _words
from jdistill._files import PathLike, as_path, write_whole
from jdistill.report import _claims, _figures, _sentences, _tables
from jdistill.report._checklist import Run, checklist
from jdistill.report._networks import Judged, Network, judged, networks, numbered
from jdistill.report._optional import check_packages, optional
from jdistill.report._pictures import load_pictures, write_picture_grid
from jdistill.report._sentences import say
from jdistill.report._table import TABLES, Row, blank, read_table
from jdistill.report._verdicts import read_verdicts

_GENERATIONS = (
    *("generation", "source_generation", "target_generation", "baseline_generation"),
    "teacher_generation",
)
_CHAINS = {"baseline_generation": "baseline_chain", "teacher_generation": "teacher_chain"}
_MACHINE = ("versions", "devices", "programs", "seconds", "seconds_all_starts")


def read_tables(folder: PathLike) -> dict[str, list[dict[str, Any]]]:
    """The tables and verdicts of a folder, checked.

    Args:
        folder: a workdir, or what `from_evaluation` has written.

    Returns:
        The rows of every kind of `TABLES`, and `"verdicts"`; empty where there is no such file.

    Raises:
        FileNotFoundError: there is no `results.csv`.
        ValueError: a table or a verdict is not as it was written, or is about a network that has no
            row in `results.csv`.

    Example:
        >>> import functools, tempfile
        >>> import jax.numpy as jnp, numpy as np
        >>> from jdistill import attacks, evaluate, nets, report
        >>> net = nets.callable_logits_fn(lambda w, x: x @ w, jnp.eye(2))
        >>> fgsm = functools.partial(attacks.fgsm, eps=0.6)
        >>> x, y, folder = np.eye(2, dtype=np.float32), np.arange(2), tempfile.mkdtemp()
        >>> result = evaluate.evaluate(net, x, y, attacks={"fgsm": fgsm})
        >>> written = report.from_evaluation(result, names=["mine"], folder=folder)
        >>> [row["success_rate"] for row in read_tables(folder)["results"]]
        [1.0]
    """
    where = as_path(folder)
    rows: dict[str, list[dict[str, Any]]] = {}
    for kind in TABLES:
        path = where / f"{kind}.csv"
        there = kind == "results" or path.exists()
        rows[kind] = read_table(path, kind) if there else []
    path = where / "verdicts.json"
    rows["verdicts"] = read_verdicts(path) if path.exists() else []
    known = {_place(row, "generation") for row in rows["results"]}
    known |= {place[:-1] for place in known}
    for kind, own in rows.items():
        for row in own:
            for name in _GENERATIONS:
                if name in row and _place(row, name) not in known:
                    network = ", ".join(
                        f"{column}={row[column]}"
                        for column in ("dataset", "chain", "temperature", "seed", name)
                        if not blank(row.get(column))
                    )
                    raise ValueError(
                        f"expected {kind} about networks of results.csv, got {network}; measure "
                        f"that network too, or delete the file of {kind}"
                    )
    return rows


def _place(row: Row, generation: str) -> tuple[Any, ...]:
    """Key of a row's network; without a seed where the row is over all seeds."""
    network = (
        str(row["dataset"]),
        str(row.get(_CHAINS.get(generation, "chain")) or ""),
        float(row["temperature"]),
        int(row[generation]),
    )
    return network if blank(row["seed"]) else (*network, int(row["seed"]))


def write_report(
    folder: PathLike,
    *,
    config: Mapping[str, Any] | None = None,
    pictures: Mapping[Any, Mapping[str, Any] | PathLike] | None = None,
) -> dict[str, epath.Path]:
    """Writes figures and `report.html` from the tables of a folder.

    Args:
        folder: with `results.csv`, and what else there is of `TABLES` and `verdicts.json`.
        config: settings to show; None reads `config.json` if there is one.
        pictures: by temperature, or by a label of your own, what `write_picture_grid` takes.

    Returns:
        The path of everything written: `report`, and each figure by its name.

    Raises:
        FileNotFoundError: there is no `results.csv`.
        ModuleNotFoundError: matplotlib or jinja2 is missing.
        ValueError: as `read_tables`; a picture that is none.

    Example:
        >>> import tempfile
        >>> from jdistill.report import TABLES, write_table
        >>> row = dict.fromkeys(TABLES["results"]) | {"dataset": "toy", "temperature": 1.0}
        >>> row |= {"seed": 0, "generation": 0, "num_test": 100, "test_accuracy": 0.9}
        >>> folder = tempfile.mkdtemp()
        >>> path = write_table(f"{folder}/results.csv", "results", [row])
        >>> write_report(folder)["report"].name
        'report.html'
    """
    check_packages()
    where = as_path(folder)
    for name, each in (("config", config), ("pictures", pictures)):
        if each is not None:
            _validate.mapping(**{name: each})
    rows = read_tables(where)
    arrays = {key: load_pictures(each) for key, each in (pictures or {}).items()}
    settings = _json(where / "config.json") if config is None else config
    model = _model(rows, settings, _json(where / "run.json"), (where / "checkpoints").exists())
    written: dict[str, epath.Path] = {}
    for subject in model["subjects"]:
        for name, figure in subject["figures"].items():
            full = name if len(model["subjects"]) == 1 else f"{name}_{_file_name(subject['title'])}"
            written[full] = write_whole(where / "figures" / f"{full}.svg", figure.svg.encode())
    grids = []
    for key, each in arrays.items():
        title = key if isinstance(key, str) else f"T = {float(key):g}, student"
        full = f"pictures_{_file_name(key if isinstance(key, str) else f'T{float(key):g}')}"
        path = write_picture_grid(each, where / "figures" / f"{full}.png")
        grids.append((title, base64.b64encode(path.read_bytes()).decode()))
        written[full] = path
    page = _rendered(pictures=grids, **model)
    return {"report": write_whole(where / "report.html", page.encode()), **written}


class Section(NamedTuple):
    """A folded part of the page.

    Attributes:
        title: its heading.
        blurb: what it says, in short.
        figures: names of figures.
        tables: with titles.
        file: the CSV file of its numbers.
    """

    title: str
    blurb: Any = ""
    figures: Sequence[str] = ()
    tables: Sequence[tuple[str, Any]] = ()
    file: str = ""


def _model(
    rows: Mapping[str, Sequence[Row]],
    config: Mapping[str, Any],
    run: Mapping[str, Any],
    has_weights: bool,
) -> dict[str, Any]:
    """Everything that the page shows."""
    places = {kind: numbered(own) for kind, own in rows.items()}
    found = networks(places["results"])
    verdicts = judged(found, places["verdicts"])
    datasets = list(dict.fromkeys(network.dataset for network in found))
    limits = _claims.limits(found, verdicts, places)
    return {
        "title": _title(found),
        "lead": _lead(found),
        "note": config.get("note", ""),
        "subjects": [
            _subject(
                dataset,
                [net for net in found if net.dataset == dataset],
                [item for item in verdicts if item.network.dataset == dataset],
                {
                    kind: [row for row in own if str(row["dataset"]) == dataset]
                    for kind, own in places.items()
                },
            )
            for dataset in datasets
        ],
        "checklist": checklist(Run(found, verdicts, places, config, has_weights)),
        "limits": [say(_sentences.LIMITS, claim.case, **claim.fields) for claim in limits],
        "terms": _sentences.TERMS if found[0].distilled else _sentences.terms_of_attacks(),
        "settings": _shown(config["recipe"] if config.get("recipe") else config),
        "machine": _shown({name: run[name] for name in _MACHINE if name in run}),
        "files": [
            name
            for kind in rows
            if rows[kind]
            for name in [f"{kind}.csv" if kind != "verdicts" else "verdicts.json"]
        ],
        "has_config": bool(config.get("recipe")),
    }


def _title(found: Sequence[Network]) -> str:
    names = _words.join(list(dict.fromkeys(network.dataset for network in found)))
    neutral = any(network.training == "adversarial" for network in found)
    if any(network.generation for network in found) and not neutral:
        return f"Does distillation make networks robust on {names}?"
    return f"How robust are networks on {names}?"


def _lead(found: Sequence[Network]) -> str:
    temperatures = sorted({network.temperature for network in found})
    chains = {network.chain for network in found if network.chain}
    longest = max(network.generation for network in found)
    seeds = {seed for network in found for seed in network.seeds}
    tested = max(network.num_test.mean for network in found)
    if found[0].distilled:
        parts = ["T = " + ", ".join(f"{temperature:g}" for temperature in temperatures)]
        parts += [_words.count(len(chains), "chain")] * bool(chains)
        parts += [_words.count(longest - 1, "assistant")] * (longest > 0)
    else:
        parts = [_words.count(len(found), "network")]
    parts.append(_words.count(len(seeds), "seed"))
    parts += [_words.count(int(tested), "test example")] * (tested > 0)
    return " · ".join(parts)


def _subject(
    title: str,
    found: Sequence[Network],
    verdicts: Sequence[Judged],
    rows: Mapping[str, Sequence[Row]],
) -> dict[str, Any]:
    """All about one data set."""
    network = _claims.subject(found, verdicts)
    other = _claims.baseline(found, network)
    claim = _claims.answer(network, verdicts)
    answer = [say(_sentences.ANSWERS, claim.case, **claim.fields)]
    if differing := _claims.seeds_differ(network, verdicts):
        answer.append(say(_sentences.ANSWERS, differing.case, **differing.fields))
    if gained := _claims.gain(network, other, verdicts):
        answer.append(say(_sentences.GAINS, gained.case, **gained.fields))
    made = _claims.comparisons(rows["comparisons"])
    effect = _claims.effect(made)
    if effect:
        answer.append(say(_sentences.EFFECTS, effect.case, **effect.fields))
    drawn = _figures.figures(found, verdicts, rows)
    hero = "verdict" if verdicts else "attacks"
    sections, beside = _sections(found, made, rows), set(drawn) - {hero}
    warned = _claims.warnings(found, verdicts, rows["distances"])
    return {
        "title": title,
        "tone": claim.case.replace(" ", "-"),
        "answer": answer,
        "elsewhere": _claims.elsewhere(network, verdicts),
        "small": _small(found),
        "warnings": [say(_sentences.WARNINGS, each.case, **each.fields) for each in warned],
        "headline": _tables.headline(found, _claims.last_judged(verdicts)),
        "figures": drawn,
        "hero": hero,
        "sections": [each for each in sections if each.tables or set(each.figures) & beside],
        "evidence": _evidence(network, found, verdicts),
    }


def _sections(
    found: Sequence[Network],
    made: Sequence[_claims.Comparison],
    rows: Mapping[str, Sequence[Row]],
) -> list[Section]:
    calibration = {
        "mean_confidence": ("Mean confidence", "%"),
        "ece": ("ECE", "%2"),
        "nll": ("NLL", "number"),
        "brier": ("Brier score", "number"),
    }
    return [
        Section(
            "Every attack on every network",
            _small(found),
            ("attacks", "accuracy", "robustness"),
            [("", _tables.results(found))],
            "results.csv",
        ),
        Section(
            "Do the chains differ?",
            "Within a seed on the same n examples; over the seeds by their means.",
            (),
            [("", _tables.comparisons(made))] if made else [],
            "comparisons.csv",
        ),
        Section(
            "Accuracy against the budget and the steps",
            "Read off one run of each attack; a band spans the 95% intervals of its seeds.",
            ("curve-eps", "curve-steps", "curve-queries") if rows["curves"] else (),
            [],
            "curves.csv",
        ),
        Section(
            "Distances to adversarial examples",
            "Over successes alone; read a distance beside its success rate.",
            ("distances",),
            _tables.distances(found, rows["distances"]),
            "distances.csv",
        ),
        Section(
            "Transfer between the networks of a chain",
            "The row crafts, the column is judged. A source clearly better than the diagonal shows "
            "that the attack there is weak.",
            (),
            _tables.transfer(found, rows["transfer"]),
            "transfer.csv",
        ),
        Section(
            "Agreement of students with their teachers",
            _sentences.AGREEMENT,
            (),
            [("", _tables.agreement(found, rows["agreement"]))] if rows["agreement"] else [],
            "agreement.csv",
        ),
        Section(
            "Size and speed",
            _deployment(rows["deployment"]),
            (),
            [("", _tables.deployment(found, rows["deployment"], rows["results"]))]
            if rows["deployment"]
            else [],
            "deployment.csv",
        ),
        Section(
            "Sensitivity of single examples",
            "Share of the examples by log10 of the mean |∂ softmax / ∂x| at T = 1.",
            (),
            [("", _tables.sensitivity(found, rows["sensitivity"]))] if rows["sensitivity"] else [],
            "sensitivity.csv",
        ),
        Section(
            "Calibration",
            "Of the softmax at T = 1.",
            (),
            [("", _tables.of_each(found, rows["calibration"], "calibration.csv", calibration))]
            if rows["calibration"]
            else [],
            "calibration.csv",
        ),
    ]


def _deployment(rows: Sequence[Row]) -> Any:
    """What the sizes and times are of."""
    devices = sorted({(str(row["backend"]), str(row["device"])) for row in rows})
    names = [
        backend if backend == device else f"{backend} ({device})" for backend, device in devices
    ]
    return say(_sentences.DEPLOYMENT, "", devices=_words.join(names)) if rows else ""


def _small(found: Sequence[Network]) -> str:
    """Meaning of the small print of a table."""
    if any(len(network.seeds) > 1 for network in found):
        return "Means over the seeds; in small print where the seeds, or their 95% intervals, lie."
    return "In small print 95% intervals over the examples."


def _evidence(
    network: Network, found: Sequence[Network], verdicts: Sequence[Judged]
) -> dict[str, Any] | None:
    """The checks on all networks, and one verdict in full."""
    if not verdicts:
        return None
    item = _claims.verdict_of(network, verdicts)
    assert item is not None  # the answer is about a judged network, where there are any
    first = _claims.last_judged(verdicts)
    others = [each for each in verdicts if each not in first]
    where = [f", {item.limit}"] * item.several + [f", seed {item.seed}"] * (len(item.seeds) > 1)
    return {
        "name": "".join([network.name, *where]),
        "verdict": item.shown,
        "others": _tables.headline(found, others) if others else None,
        "checks": _tables.checks(first),
        "attacks": _tables.verdict_attacks(item),
    }


def _shown(settings: Any) -> str:
    """Settings as text; empty where there are none."""
    return json.dumps(settings, indent=2, ensure_ascii=False, default=str) if settings else ""


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(
            f"expected JSON in {path}, got text that is none ({error}); repair or delete the file"
        ) from None
    return value if isinstance(value, dict) else {"value": value}


def _rendered(**model: Any) -> str:
    jinja2 = optional("jinja2")
    source = importlib.resources.files("jdistill.report").joinpath("report.html.j2")
    # autoescape: data set names, settings and devices are text from outside.
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(source.read_text(encoding="utf-8"))
    return str(template.render(colors=_figures.DARK, **model))


def _file_name(title: str) -> str:
    """A file name of the letters of a title; T = 20, student as T20_student."""
    short = title.replace("T = ", "T").replace(", ", "_")
    return "".join(letter if letter.isalnum() or letter in "-._" else "_" for letter in short)
