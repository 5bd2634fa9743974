"""The papers' items: every one runs at the least scale, and their arithmetic is right."""

import contextlib
import csv
import dataclasses
import io
import pathlib
from typing import NamedTuple

import numpy as np
import pytest

from experiments import reproduce
from experiments.papers import carlini, measures, papernot2016, training
from experiments.papers.measures import Form, Hits
from jdistill import metrics

SMOKE = ("--scale", "smoke")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("papers")


def reproduced(workdir, item):
    """What the command prints, and the rows it leaves."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        reproduce.main([item, *SMOKE, "--workdir", str(workdir)])
    (path,) = (workdir / "smoke" / "tables").glob(f"{item}-*.csv")
    return printed.getvalue(), list(csv.DictReader(path.read_text().splitlines()))


@pytest.mark.slow
@pytest.mark.parametrize("item", reproduce.ITEMS)
def test_every_item_runs_at_the_least_scale(workdir, item):
    text, rows = reproduced(workdir, item)
    assert rows
    assert f"## {reproduce.ITEMS[item].title}" in text
    assert "at scale smoke" in text
    assert "nan" not in text
    again, same = reproduced(workdir, item)
    assert same == rows
    assert "training" not in again.partition("##")[0]


@pytest.mark.slow
def test_a_study_that_has_grown_is_measured_again(tmp_path, monkeypatch):
    """And one that is smaller than its workdir has rows of its own alone."""
    small = dataclasses.replace(
        training.TRAININGS["smoke"]["standardized"], seeds=(0,), num_epochs=1, num_attack=2
    )
    found = []
    for temperatures in ((1.0,), (1.0, 20.0), (20.0,)):
        own = {"standardized": dataclasses.replace(small, temperatures=temperatures)}
        monkeypatch.setitem(training.TRAININGS, "smoke", own)
        _, rows = reproduced(tmp_path, "logit-standard")
        found.append(rows)
        assert {float(row["temperature"]) for row in rows} == set(temperatures)
    assert len(found[1]) == len(found[0]) + len(found[2])
    assert all(row in found[1] for row in found[0] + found[2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mandal"], "expected an item among train, plan, mandal2023-accuracy"),
        (["mirzadeh2019-resnet"], "which has none; use --scale full"),
        (["ladder", "digits"], "expected one of the training studies ladder, got 'digits'"),
        (["train"], "expected the name of one of .*deit-fashion, deit-digits, mnist, mnist-half"),
        (["plan"], "expected the name of one of .*deit-fashion, deit-digits, mnist, mnist-half"),
    ],
)
def test_what_is_not_there_is_refused(arguments, message):
    names = dict(zip(("item", "training"), arguments, strict=False))
    with pytest.raises(ValueError, match=message):
        reproduce.Options(**names)


def test_every_training_study_is_used_and_there():
    for scale, found in training.TRAININGS.items():
        used = {
            name
            for item in reproduce.ITEMS.values()
            for name in {"full": item.full, "cpu": item.cpu, "smoke": (item.smoke,)}[scale]
        }
        assert used == set(found)


def test_the_papers_grid_costs_what_arithmetic_says():
    """6 N FLOPs per weight of a dense layer and application of a kernel, forward and backward."""
    cost = training.cost(training.TRAININGS["full"]["mnist"])
    assert cost.networks == 9 * 3 * 8
    # Teachers that chains share are trained once: 3 of the equal chains, 5 less 1 of the others.
    assert training.cost(training.TRAININGS["cpu"]["ladder"]).networks == 4 * 5 * (3 + 5 - 1)
    assert cost.steps == cost.networks * 50 * 430
    kernels = 26**2 * 9 * 32 + 24**2 * 9 * 32 * 32 + 10**2 * 9 * 32 * 64 + 8**2 * 9 * 64 * 64
    dense = 1024 * 200 + 200 * 200 + 200 * 10
    assert cost.flops == pytest.approx(6 * 128 * (kernels + dense) * cost.steps, rel=0.05)


def test_the_cases_of_targets():
    success = np.array([[True, True], [True, False], [False, False]])
    distance = np.where(success, [[1.0, 3.0], [2.0, 9.0], [9.0, 9.0]], np.inf)

    class Network(NamedTuple):
        temperature: float = 1.0
        seed: int = 0
        generation: int = 0

    row = Hits(Network(), success, distance).row()
    assert row["success"] == 0.5
    assert (row["best"], row["average"], row["worst"]) == (1.5, 2.0, 3.0)
    assert (row["num_images"], row["images_with_success"]) == (3, 2)


def rows_of(effect):
    """Accuracies in which the assistant adds `effect` of a seed at every temperature."""
    return [
        {"temperature": T, "seed": seed, "generation": generation, "value": value}
        for T in (1.0, 20.0)
        for seed in (0, 1, 2)
        for generation, value in enumerate(
            (0.9, 0.8 + 0.01 * seed, 0.8 + 0.01 * seed + effect[seed])
        )
    ]


def test_the_effect_of_an_assistant_is_paired_by_seed():
    effect = (0.02, 0.03, 0.05)
    lines = measures.by_length(rows_of(effect), "value", Form("value (%)", 2, 100.0))
    assert lines[0][1:4] == ["teacher", "no assistant", "1 assistant"]
    wanted = metrics.paired_over_seeds(100 * np.array(effect), np.zeros(3))
    value, low, high = wanted.difference
    assert lines[-1][0] == "all T"
    assert lines[-1][-1].startswith(f"{value:+.2f} [{low:+.2f}, {high:+.2f}]")
    (_head, none, one) = measures.over_lengths(
        rows_of(effect), {"value": Form("value (%)", 2, 100.0)}
    )
    assert none[1].startswith("81.00")
    assert one[2] == lines[-1][-1]


def test_one_seed_has_no_interval():
    rows = [row for row in rows_of((0.02, 0.03, 0.05)) if row["seed"] == 0]
    lines = measures.by_length(rows, "value", Form("value", 2))
    assert lines[1] == ["T = 1", "0.90", "0.80", "0.82", "+0.02 (one seed)"]


def test_the_slope_of_a_power_law():
    rows = [
        {"temperature": T, "seed": seed, "average": 2.0 * T**0.1}
        for T in (1.0, 10.0, 100.0)
        for seed in (0, 1)
    ]
    (lines,) = carlini.temperature_table(rows)
    found = {line[0]: line[1] for line in lines}
    assert found["slope of log distance on log T"].startswith("0.100 [0.100, 0.100]")
    assert found["change from the lowest T to the highest (%)"].startswith("58.5 [")


def test_failures_count_with_the_limit_in_robustness():
    row = {"name": 5.0, "best": 78.4, "num_features": 784, "num_images": 4, "seed": 0}
    row |= {"images_with_success": 2, "temperature": 5.0, "generation": 1}
    ((_, line),) = papernot2016.robustness_table([row])
    assert line[1:3] == ["12.25", "10.00"]


def test_the_findings_are_those_of_the_tables():
    """The comparison at T = 100 in docs/findings.md, against the rows that it is made of."""
    root = pathlib.Path(__file__).parents[1]
    page = (root / "docs" / "findings.md").read_text(encoding="utf-8")
    for column, name in ((1, "digits"), (2, "standardized")):
        path = root / "experiments" / "results" / f"logit-standard-{name}.csv"
        own = [
            row
            for row in csv.DictReader(path.read_text().splitlines())
            if (float(row["temperature"]), row["chain"]) == (100.0, "1 assistant")
        ]
        for title, quantity, scale in (
            ("size of the logits", "mean_abs_logit", 1.0),
            ("images whose gradient is exactly zero", "zero_gradient_fraction", 100.0),
            ("left under FGSM, l∞ ≤ 0.2", "fgsm", 100.0),
            ("left under AutoAttack, l∞ ≤ 0.2", "autoattack", 100.0),
            ("test accuracy", "test_accuracy", 100.0),
        ):
            (line,) = [line for line in page.splitlines() if line.startswith(f"| {title} |")]
            shown = line.strip("| ").split(" | ")[column].rstrip("%")
            mean = scale * sum(float(row[quantity]) for row in own) / len(own)
            digits = len(shown.partition(".")[2])
            assert float(shown) == round(mean, digits), title


RESULTS = pathlib.Path(reproduce.__file__).parent / "results"
_WHOLE = ("seed", "generation", "num_images", "images_with_success", "num_features", "count")


def cell(column, text):
    """A number of a table as it was written, or its text."""
    with contextlib.suppress(ValueError):
        return int(text) if column in _WHOLE else float(text)
    return text


# Of experiments of their own, which their own tests compare.
_OTHERS = ("dat", "epochs-mnist", "unlearnable")
OF_ITEMS = [path for path in sorted(RESULTS.glob("*.csv")) if path.stem not in _OTHERS]


def test_the_findings_epochs_are_those_of_their_rows():
    page = (RESULTS.parents[1] / "docs" / "findings.md").read_text()
    for row in csv.DictReader((RESULTS / "epochs-mnist.csv").read_text().splitlines()):
        accuracy, logit = 100 * float(row["test_accuracy"]), float(row["mean_abs_logit"])
        distances = " | ".join(f"{float(row[case]):.3f}" for case in ("best", "average", "worst"))
        assert f"| {row['epochs']} | {accuracy:.2f}% | {logit:.2f} | {distances} |" in page


@pytest.mark.parametrize("path", OF_ITEMS, ids=lambda path: path.stem)
def test_a_committed_table_is_that_of_its_rows(path):
    item = max((name for name in reproduce.ITEMS if path.stem.startswith(f"{name}-")), key=len)
    rows = [
        {column: cell(column, text) for column, text in row.items()}
        for row in csv.DictReader(path.read_text().splitlines())
    ]
    written = path.with_suffix(".md").read_text()
    for lines in reproduce.ITEMS[item].table(rows):
        assert measures.markdown(lines) in written


def test_seeds_that_are_all_alike_have_no_interval():
    assert measures.difference([0.5, 0.6], [0.4, 0.5], 2) == "+0.10 (every seed alike)"
    assert measures.difference([0.5, 0.6], [0.5, 0.6], 2) == "+0.00 [+0.00, +0.00], p = 1"


def test_one_pixel_at_a_time_is_the_greedy_choice_in_numpy():
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(6, 3)).astype(np.float32)
    inputs = rng.uniform(0, 0.3, (8, 6)).astype(np.float32)
    targets = (np.argmax(inputs @ weights, axis=1) + 1) % 3

    def attack(limit):
        return carlini.one_at_a_time(
            lambda x: x @ weights,
            None,
            inputs,
            None,
            targets=targets,
            temperature=5.0,
            max_features=limit,
        )

    for limit in (1, 2, 4):
        wanted = inputs.copy()
        for x, target in zip(wanted, targets, strict=True):
            for _ in range(limit):
                z = x.astype(np.float64) @ weights
                if z.argmax() == target:
                    break
                p = np.exp(z / 5) / np.exp(z / 5).sum()
                slope = p[target] * (weights[:, target] - weights @ p) / 5
                slope[x >= 1] = -np.inf
                if slope.max() > 0:
                    x[slope.argmax()] = 1
        found = attack(limit)
        np.testing.assert_array_equal(found.inputs, wanted)
        success = (wanted @ weights).argmax(1) == targets
        np.testing.assert_array_equal(found.success, success)
        changed = (wanted != inputs).sum(1)
        np.testing.assert_array_equal(found.distance, np.where(success, changed, np.inf))
