"""The report: what is written equals what was measured, and the words claim no more than it."""

import csv
import math
import re
import struct
import sys

import matplotlib
import numpy as np
import pytest

from jdistill import report
from jdistill.report import _figures, _html, _networks, _pictures, _reading, _text, _words
from tests.report_rows import (
    CW,
    FGSM,
    JSMA,
    MARGIN,
    PGD,
    SPATIAL,
    UNIVERSAL,
    Page,
    make_pictures,
    make_row,
    make_rows,
)


def write(tmp_path, rows, **more):
    """The page of these rows, without figures (drawing takes a second)."""
    return Page(report.write_html(tmp_path / "report.html", rows=rows, **more))


# --- results.csv ---------------------------------------------------------------------------------


def test_csv_reads_back_the_same_values(tmp_path):
    rows = make_rows()
    rows[0]["test_accuracy"] = np.float32(0.1) + 0.0  # not a short decimal
    rows[0]["seed"] = np.int64(0)
    rows[1]["success_rate"] = 1 / 3
    path = report.write_results(tmp_path / "deep" / "results.csv", rows)
    back = report.read_results(path)
    order = ("temperature", "seed", "generation", "attack")
    wanted = sorted(rows, key=lambda row: tuple(row[name] for name in order))
    assert back == wanted
    assert all(type(row["seed"]) is int and type(row["eps"] or 0.1) is float for row in back)


def test_csv_does_not_depend_on_the_order_of_rows(tmp_path):
    rows = make_rows()
    one = report.write_results(tmp_path / "one.csv", rows).read_bytes()
    two = report.write_results(tmp_path / "two.csv", reversed(rows)).read_bytes()
    again = report.write_results(tmp_path / "two.csv", report.read_results(tmp_path / "one.csv"))
    assert one == two == again.read_bytes()


def test_csv_leaves_blank_what_was_not_measured(tmp_path):
    row = make_row(CW, 0.0, mean_distance=math.nan, median_distance=None)
    path = report.write_results(tmp_path / "results.csv", [row])
    (cells,) = csv.DictReader(path.read_text().splitlines())
    assert cells["eps"] == cells["mean_distance"] == cells["median_distance"] == ""
    (back,) = report.read_results(path)
    assert back["eps"] is back["mean_distance"] is back["median_distance"] is None


def test_csv_keeps_further_columns(tmp_path):
    own = ("own", "linf", 0.1)
    rows = [{**make_row(own), "verdict": "masked", "restarts": 3, "ece": 0.25}]
    path = report.write_results(tmp_path / "results.csv", rows)
    assert path.read_text().splitlines()[0].endswith("mean_queries,ece,restarts,verdict")
    assert report.read_results(path) == [{**rows[0]}]


def test_csv_keeps_the_facts_of_attacks(tmp_path):
    rows = [make_row(attack) for attack in (FGSM, CW, SPATIAL)]
    path = report.write_results(tmp_path / "results.csv", rows)
    back = {row["attack"]: row for row in report.read_results(path)}
    for row in rows:
        assert {name: back[row["attack"]][name] for name in report.FACTS} == {
            name: row[name] for name in report.FACTS
        }
    found = {
        net.key.attack: net.key for net in _networks.networks(back.values())[0].attacks.values()
    }
    assert found["fgsm"].facts == _networks.Facts(
        "FGSM", "gradient", "softmax", False, "one step", None
    )
    assert [name for name, key in found.items() if key.has_no_norm] == ["spatial"]


def test_csv_keeps_the_old_file_when_rows_are_bad(tmp_path):
    path = report.write_results(tmp_path / "results.csv", [make_row()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="got two for dataset=mnist"):
        report.write_results(path, [make_row(), make_row()])
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.csv"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 0.5}, r"expected seed to be a whole number, got 0\.5 in row 0; pass an int"),
        ({"dataset": None}, "expected dataset in every row, got None in row 0"),
        ({"success_rate": 48.0}, r"expected success_rate in \[0, 1\], got 48\.0 in row 0"),
        ({"temperature": 0.0}, r"expected temperature > 0, got 0\.0 in row 0"),
        ({"mean_distance": "far"}, "expected mean_distance to be a number, got 'far' in row 0"),
        ({"follows": "cross-entropy"}, "expected follows to be softmax or logits, got 'cross-ent"),
        ({"minimum_norm": "no"}, "expected minimum_norm to be a number, got 'no'"),
    ],
)
def test_bad_rows_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        report.write_results(tmp_path / "results.csv", [make_row(**change)])
    assert not list(tmp_path.iterdir())


def test_missing_columns_are_named(tmp_path):
    row = make_row()
    del row["eps"]
    with pytest.raises(ValueError, match="got row 0 without eps; add them"):
        report.write_results(tmp_path / "results.csv", [row])
    (tmp_path / "other.csv").write_text("dataset,seed\nmnist,0\n")
    with pytest.raises(ValueError, match=r"other\.csv, got none named temperature, generation"):
        report.read_results(tmp_path / "other.csv")


def test_a_damaged_line_is_named(tmp_path):
    path = report.write_results(tmp_path / "results.csv", [make_row(), make_row(PGD)])
    path.write_text(path.read_text().replace("0.9912", "0.99x2", 1))
    with pytest.raises(ValueError, match=r"a number in column test_accuracy .* '0.99x2' in line 2"):
        report.read_results(path)


@pytest.mark.parametrize("call", [report.summary, report.answer])
def test_no_rows(call):
    with pytest.raises(ValueError, match="expected at least one row of results, got none"):
        call([])


# --- The table for the terminal ------------------------------------------------------------------


def test_summary_shows_each_network_once():
    text = report.summary(make_rows(seeds=(0,)))
    lines = text.splitlines()
    assert lines[0] == "mnist: 10,000 test examples, 1 seed"
    assert max(map(len, lines)) <= 108
    assert [line.split()[:2] for line in lines[5:8]] == [
        ["1", "teacher"],
        ["assistant", "1"],
        ["student", lines[7].split()[1]],
    ]
    (teacher,) = (net for net in _networks.networks(make_rows((1.0,), 1, (0,))))
    assert lines[5].split()[2:] == [
        f"{100 * teacher.accuracy.mean:.2f}",
        "6.10",
        f"{teacher.log10_sensitivity_softmax.mean:.2f}",
        f"{100 * teacher.zero_gradients.mean:.1f}",
        *(_text.percent(hit.success.mean) for hit in teacher.attacks.values()),
        f"{teacher.attacks[_networks.AttackKey(*CW)].mean_distance.mean:.2f}",
        f"{teacher.attacks[_networks.AttackKey(*CW)].median_distance.mean:.2f}",
    ]


def test_summary_averages_seeds_and_shows_the_spread():
    rows = [make_row(success=rate, seed=seed) for seed, rate in enumerate((0.4, 0.5, 0.9))]
    assert "60.0 ±30.0" in report.summary(rows)
    assert "3 seeds (mean ± the seed furthest from it)" in report.summary(rows)


def test_summary_breaks_a_table_that_is_too_wide():
    rows = [make_row((f"attack_{i}", "linf", 0.1 * i)) for i in range(1, 9)]
    lines = report.summary(rows, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    assert sum("network" in line for line in lines) > 1
    assert all(any(f"attack {i}" in line for line in lines) for i in range(1, 9))


def test_attacks_that_are_not_known_appear_by_name(tmp_path):
    rows = [make_row(("new_attack", "l1", 12.0), 0.25), make_row(("other", "l0", None), 0.5, 7.0)]
    page = write(tmp_path, rows)
    for text in ("new attack", "l1 ≤ 12", "other", "smallest l0", "25.0", "7.00"):
        assert text in page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "new attack" in report.summary(rows)


def test_rows_without_facts_are_read_neutrally(tmp_path):
    """A user's own rows, or those of an older run."""
    rows = [
        {name: row[name] for name in report.COLUMNS}
        for row in chain(0.98, [(FGSM, 0.03, None), (MARGIN, 0.8, None), (CW, 1.0, 1.7)])
    ]
    assert read(rows).kind == "blind"
    assert (
        "An attack that follows it would find nothing to follow there." in read(rows).sentences[0]
    )
    text = write(tmp_path, rows).text.replace("\N{NO-BREAK SPACE}", " ")
    assert MASKED not in text
    for words in (
        "pgd margin success",
        "carlini wagner l2, which may change the input as far as it needs,",
        "No attack here is known to avoid the softmax at T = 1",
        "No attack here is known to work without gradients.",
    ):
        assert words in text
    # One row that has them is enough for all on its attack.
    rows.append(make_row(FGSM, seed=1))
    hits = [hit for net in _networks.networks(rows) for hit in net.attacks.values()]
    assert {hit.key.facts.title for hit in hits if hit.key.attack == "fgsm"} == {"FGSM"}


# --- Figures -------------------------------------------------------------------------------------


def lines_of(figure):
    return {line.get_gid(): line for axes in figure.axes for line in axes.lines if line.get_gid()}


def near(line, temperatures, values):
    np.testing.assert_allclose(line.get_xdata(), temperatures, rtol=0.1)  # set side by side
    np.testing.assert_allclose(line.get_ydata(), values)


def mean_of(rows, column, generation, attack=None):
    chosen = [row for row in rows if row["generation"] == generation]
    chosen = [row for row in chosen if row["attack"] == (attack or "fgsm")]
    by_temperature = {}
    for row in chosen:
        by_temperature.setdefault(row["temperature"], []).append(row[column])
    return [np.mean(values) for _, values in sorted(by_temperature.items())]


def test_figures_draw_the_numbers_of_the_rows():
    rows = make_rows()
    found, temperatures = _networks.networks(rows), [1.0, 20.0, 100.0]
    accuracy = lines_of(_figures.accuracy_figure(found))
    sensitivity = lines_of(_figures.sensitivity_figure(found))
    robustness = lines_of(_figures.robustness_figure(found))
    attacks = lines_of(_figures.attacks_figure(found))
    assert [len(lines) for lines in (accuracy, sensitivity, robustness, attacks)] == [3, 6, 6, 12]
    for generation in range(3):
        end = f"generation={generation}"
        for lines, gid, column, attack, scale in (
            (accuracy, "accuracy", "test_accuracy", None, 100),
            (sensitivity, "sensitivity_logits", "sensitivity_logits", None, 1),
            (sensitivity, "log10_sensitivity_softmax", "log10_sensitivity_softmax", None, 1),
            (robustness, f"{CW[0]} l2 mean", "mean_distance", CW[0], 1),
            (robustness, f"{CW[0]} l2 median", "median_distance", CW[0], 1),
            (attacks, "fgsm linf 0.1 success", "success_rate", "fgsm", 100),
            (attacks, "pgd linf 0.1 success", "success_rate", "pgd", 100),
            (attacks, f"{CW[0]} l2 None success", "success_rate", CW[0], 100),
            (attacks, "zero_gradient_fraction", "zero_gradient_fraction", None, 100),
        ):
            values = scale * np.array(mean_of(rows, column, generation, attack))
            near(lines[f"{gid} {end}"], temperatures, values)


def test_figures_show_intervals_for_one_seed_and_bands_for_several():
    one = _figures.accuracy_figure(_networks.networks(make_rows(seeds=(0,)))).axes[0]
    (bars, *_) = one.collections
    ends = np.array(bars.get_segments()[0])[:, 1]
    np.testing.assert_allclose(ends, [98.92, 99.29])
    rows = make_rows(seeds=(0, 1, 2))
    several = _figures.accuracy_figure(_networks.networks(rows)).axes[0]
    (teacher, *_) = several.collections
    heights = teacher.get_paths()[0].vertices[:, 1]
    wanted = [100 * row["test_accuracy"] for row in rows if row["generation"] == 0]
    assert heights.min() == pytest.approx(min(wanted))
    assert heights.max() == pytest.approx(max(wanted))


def test_figures_are_labeled():
    found = _networks.networks(make_rows())
    for draw in _figures._FIGURES.values():
        figure = draw(found)
        assert all(axes.get_xlabel() == "distillation temperature T" for axes in figure.axes)
        assert any(axes.get_ylabel() for axes in figure.axes)
        (legend,) = figure.legends
        names = [text.get_text() for text in legend.get_texts()]
        assert names[:3] == ["teacher", "student, no assistant", "student, 1 assistant"]
        ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
        assert ticks == ["1", "20", "100"]


def test_figures_do_not_depend_on_the_callers_style(tmp_path):
    rows = make_rows((1.0, 20.0), 2, (0,))
    plain = report.write_figures(rows, tmp_path / "plain")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red"}):
        styled = report.write_figures(rows, tmp_path / "styled")
        assert matplotlib.rcParams["font.size"] == 30
    assert list(plain) == ["attacks", "robustness", "accuracy", "sensitivity"]
    for name, path in plain.items():
        assert path.read_bytes() == styled[name].read_bytes()
        width, height = struct.unpack(">II", path.read_bytes()[16:24])
        assert width >= 800
        assert height >= 400
        assert len(path.read_bytes()) > 10_000


def test_figures_leave_out_what_there_is_not(tmp_path):
    blank = {"sensitivity_logits": None, "log10_sensitivity_softmax": math.nan}
    assert list(report.write_figures([make_row(**blank)], tmp_path)) == ["attacks", "accuracy"]
    nothing = make_row(CW, 0.0, mean_distance=None)
    assert "robustness" not in report.write_figures([nothing], tmp_path)
    alone = make_row(attack=("", "", None), success_rate=None, **blank)
    assert list(report.write_figures([alone], tmp_path)) == ["accuracy"]


def test_figures_of_two_data_sets_are_named_apart(tmp_path):
    rows = [make_row(), make_row(dataset="digits")]
    names = report.write_figures(rows, tmp_path)
    assert {"accuracy_mnist", "accuracy_digits"} <= set(names)
    text = write(tmp_path, rows).text
    assert "On digits: " in text
    assert "On mnist: " in text


@pytest.mark.parametrize(("channels", "number"), [(1, 4), (3, 12), (2, 1)])
def test_picture_grid_shows_pictures_and_differences(tmp_path, channels, number):
    pictures = make_pictures(number, channels)
    figure = _pictures.picture_figure(_pictures.load_pictures(pictures), 8, "C&W L2", "l2")
    shown = min(number, 8)
    images = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(images) == 3 * shown
    change = (pictures["adversarial"] - pictures["clean"]).astype(np.float64)
    assert np.abs(images[2 * shown]).max() == pytest.approx(np.abs(change[0]).max())
    low, high = figure.axes[2 * shown].images[0].get_clim()
    assert low == -high
    assert high == pytest.approx(np.abs(change[:shown]).max())
    titles = [axes.get_title() for axes in figure.axes if axes.images]
    assert titles[0] == "label 0"
    if number == 4:
        assert titles[3:5] == ["label 3", "read as 1"]
        assert titles[7] == "not found"
        assert titles[8] == f"l2 {pictures['distance'][0]:.2f}"
    np.savez(tmp_path / "pictures.npz", **pictures)
    path = report.write_picture_grid(tmp_path / "pictures.npz", tmp_path / "grid.png")
    assert len(path.read_bytes()) > 5000


def test_picture_grid_refuses_arrays_that_do_not_fit(tmp_path):
    pictures = make_pictures()
    with pytest.raises(ValueError, match=r"expected labels of shape \(4,\).*got shape \(3,\)"):
        report.write_picture_grid({**pictures, "labels": np.arange(3)}, tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"shape \[P, H, W, C\] with P >= 1, got shape \(8, 8\)"):
        report.write_picture_grid({**pictures, "clean": np.zeros((8, 8))}, tmp_path / "x.png")
    del pictures["distance"]
    with pytest.raises(ValueError, match="got none named distance"):
        report.write_picture_grid(pictures, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


# --- The words -----------------------------------------------------------------------------------


def chain(zero, student, teacher=((FGSM, 0.48, None), (CW, 1.0, 1.4)), seeds=(0,), **columns):
    """A T = 1 teacher and a T = 100 student, each with (attack, success, distance)s."""
    rows = []
    for seed in seeds:
        rows += [make_row(*hit, seed=seed) for hit in teacher]
        network = {"temperature": 100.0, "generation": 1, "zero_gradient_fraction": zero}
        network = {**network, "test_accuracy": 0.9905, **columns, "seed": seed}
        rows += [make_row(*hit, **network) for hit in student]
    return rows


def read(rows):
    found = _networks.networks(rows)
    student = _words.subject(found)
    return _reading.reading(student, _words.base(found, student))


MASKED = "This is gradient masking"


@pytest.mark.parametrize(
    ("kind", "zero", "student"),
    [
        # A minimum-norm attack succeeds as near as on the T = 1 teacher.
        ("masked", 0.98, [(FGSM, 0.03, None), (CW, 1.0, 1.7)]),
        # An attack of the same budget succeeds.
        ("masked", 0.98, [(PGD, 0.03, None), (MARGIN, 0.8, None)]),
        # The distance grew: the zeros remain a fact, the conclusion does not follow.
        ("blind", 0.98, [(FGSM, 0.03, None), (CW, 1.0, 5.0)]),
        # The minimum-norm attack failed on many.
        ("blind", 0.98, [(FGSM, 0.03, None), (CW, 0.6, 1.5)]),
        # JSMA on the softmax is as blind, and is no second attack.
        ("masked", 0.98, [(JSMA, 0.01, 20.0), (CW, 1.0, 1.7)]),
        ("blind", 0.98, [(FGSM, 0.03, None), (JSMA, 0.96, 20.0)]),
        # BIM and MIM too, and they have a budget to compare in.
        ("masked", 0.98, [(("bim", "linf", 0.1), 0.03, None), (MARGIN, 0.8, None)]),
        ("blind", 0.98, [(PGD, 0.03, None), (("mim", "linf", 0.1), 0.3, None)]),
        # How far a rotation moves the pixels compares with nothing.
        ("blind", 0.98, [(FGSM, 0.03, None), (SPATIAL, 1.0, 0.9)]),
        # No second attack; an attack of another budget; a difference inside the noise.
        ("blind", 0.98, [(FGSM, 0.03, None)]),
        ("blind", 0.98, [(PGD, 0.03, None), (("pgd_margin", "linf", 0.3), 0.9, None)]),
        ("blind", 0.98, [(PGD, 0.03, None), (MARGIN, 0.08, None)]),
        ("blind", 0.98, [(CW, 1.0, 1.7)]),
        ("partly blind", 0.2, [(FGSM, 0.03, None), (CW, 1.0, 1.4)]),
        ("no zeros", 0.0, [(FGSM, 0.48, None), (CW, 1.0, 1.4)]),
        # A low success without zeros is no masking, even beside a high one elsewhere.
        ("no zeros", 0.0, [(FGSM, 0.03, None), (PGD, 0.04, None), (CW, 1.0, 1.4)]),
        # One step does worse than many on any network.
        ("no zeros", 0.0, [(FGSM, 0.3, None), (PGD, 0.8, None), (MARGIN, 0.82, None)]),
        # And one perturbation for all does worse than one for each.
        ("no zeros", 0.0, [(UNIVERSAL, 0.3, None), (MARGIN, 0.82, None)]),
        ("understated", 0.0, [(PGD, 0.3, None), (MARGIN, 0.8, None)]),
        ("not measured", None, [(FGSM, 0.03, None), (CW, 1.0, 1.4)]),
    ],
)
def test_masking_is_named_only_on_evidence(kind, zero, student):
    teacher = [(FGSM, 0.48, None), (CW, 1.0, 1.4), (JSMA, 0.97, 20.0), (SPATIAL, 1.0, 0.9)]
    rows = chain(zero, student, teacher)
    assert read(rows).kind == kind
    text = " ".join(report.answer(rows))
    assert (MASKED in text) == (kind == "masked")
    assert ("98.0 % of 1,000 examples" in text) == (zero == 0.98)


def test_an_interval_decides_with_the_gap():
    # 3 of 10 against 5 of 10: 20 points apart, and nothing is known.
    few = [(PGD, 0.3, None, 10), (MARGIN, 0.5, None, 10)]
    many = [(PGD, 0.3, None, 1000), (MARGIN, 0.5, None, 1000)]
    assert read(chain(0.7, few)).kind == "blind"
    assert read(chain(0.7, many)).kind == "masked"


def test_the_answer_states_figures_budgets_and_numbers_of_examples():
    student = [(FGSM, 0.03, None), (CW, 1.0, 1.8, 100)]
    teacher = [(FGSM, 0.48, None), (CW, 1.0, 1.4, 100)]
    accuracy, attacks, masking, bounds = report.answer(chain(0.98, student, teacher))
    assert accuracy == (
        "The student distilled at T = 100 without an assistant classifies 99.05 % of 10,000 test "
        "examples correctly (95 % interval 98.92 to 99.29 %); the teacher at T = 1, an ordinarily "
        "trained network, 99.12 % (95 % interval 98.92 to 99.29 %)."
    )
    assert attacks == (
        "Within l∞ ≤ 0.1, on 1,000 examples, FGSM succeeds on 3.0 % against the student (48.0 % "
        "against the teacher at T = 1). C&W L2, which may change the input as far as it needs, "
        "succeeds on 100 % of 100 examples against both, at a mean l2 distance of 1.80 (median "
        "1.75) for the student and 1.40 (median 1.35) for the teacher at T = 1."
    )
    assert masking == (
        "The input gradient of the loss at T = 1 is exactly zero in float32 on 98.0 % of 1,000 "
        "examples, and FGSM has nothing else to follow. This is gradient masking: FGSM's low "
        "success counts failures of the attack, and is no evidence that the network withstands "
        "perturbations. C&W L2, which does not follow that gradient, succeeds on 100 %, at a "
        "median l2 distance of 1.75 (the teacher at T = 1: 1.35)."
    )
    assert "1 more attack" not in bounds
    assert "results of 2 attacks" in bounds


def test_the_words_on_each_kind_of_attack():
    student = [(UNIVERSAL, 0.1, None), (JSMA, 0.01, 20.0), (SPATIAL, 0.9, 0.8), (MARGIN, 0.9, None)]
    _, attacks, masking, _ = report.answer(chain(0.98, student, teacher=()))
    assert "Spatial, which turns and shifts the input, succeeds on 90.0 %" in attacks
    assert "JSMA, which changes a limited number of features, succeeds on 1.0 %" in attacks
    assert "Universal and JSMA have nothing else to follow." in masking
    assert "their low success counts failures of the attacks" in masking
    assert "PGD margin, which does not follow that gradient, succeeds on 90.0 %." in masking
    # A distance attack has no budget in which its success would be a lower bound.
    student = [(PGD, 0.3, None), (JSMA, 0.9, 20.0), (MARGIN, 0.8, None)]
    _, _, reading, _ = report.answer(chain(0.0, student, teacher=()))
    assert reading.endswith("The success of PGD is a lower bound and nothing more.")


def test_what_was_tried_is_no_limit(tmp_path):
    rows = [make_row(FGSM), make_row(CW, distance=1.4)]
    text = write(tmp_path, rows).text
    assert "Perturbations other than l2 and l∞: rotations, blur, other data sets and inputs" in text
    page = write(tmp_path, [*rows, make_row(SPATIAL, distance=0.8)])
    assert "other than l2, l∞ and rotations and translations: blur, other data sets" in page.text
    (line,) = (line for line in page.table(-1) if line[0].startswith("Spatial"))
    assert line[2] == "none"


def test_the_answer_without_an_ordinary_network_does_not_name_one():
    rows = chain(0.98, [(FGSM, 0.03, None)], teacher=())
    text = " ".join(report.answer(rows))
    assert "teacher" not in text
    assert "ordinarily" not in text
    rows += [make_row(temperature=100.0)]
    text = " ".join(report.answer(rows))
    assert "the teacher at T = 100" in text
    assert "ordinarily" not in text


def test_the_answer_about_a_teacher_alone():
    text = " ".join(report.answer([make_row(temperature=20.0)]))
    assert text.startswith("No student was measured. The teacher trained at T = 20 classifies")
    assert "against" not in text


def test_the_answer_says_at_which_temperatures_it_holds():
    text = " ".join(report.answer(make_rows((1.0, 20.0, 100.0))))
    assert "The same holds for the student at T = 20." in text
    assert "At T = 1 zero gradients limit no attack." in text
    assert "not enough to say so" not in text


@pytest.mark.parametrize(
    ("seeds", "shift", "words"),
    [
        (1, 0.5, "With 1 seed this report calls no difference between them an effect."),
        (2, 0.5, "With 2 seeds this report calls no difference between them an effect."),
        (3, 0.0, "The ranges over 3 seeds overlap: no effect of the assistants shows."),
        (3, 0.5, "Not all of the ranges over 3 seeds overlap; the table has them."),
    ],
)
def test_the_assistants_effect_is_not_called_one_without_seeds(seeds, shift, words):
    rows = [
        make_row(CW, 1.0, 1.5 + 0.02 * seed + shift * (generation == 2), 100)
        | {"temperature": 20.0, "seed": seed, "generation": generation}
        for seed in range(seeds)
        for generation in range(3)
    ]
    (paragraph,) = (text for text in report.answer(rows) if text.startswith("With 1 assistant"))
    assert paragraph.endswith(words)


def test_rates_are_never_rounded_to_all_or_nothing():
    rows = chain(0.0, [(FGSM, 0.0004, None), (PGD, 0.9996, None)])
    text = " ".join(report.answer(rows))
    assert "<0.1 %" in text
    assert ">99.9 %" in text


@pytest.mark.parametrize("zero", [None, 0.0, 0.2, 0.98])
def test_no_verdict_by_one_word(tmp_path, zero):
    text = write(tmp_path, chain(zero, [(FGSM, 0.03, None), (CW, 1.0, 1.7)])).text.lower()
    assert not re.search(r"\b(robust|secure|safe|immune|unbreakable)\b", text)


# --- report.html ---------------------------------------------------------------------------------


def test_report_writes_the_workdir(tmp_path):
    rows = make_rows()
    pictures = {20.0: make_pictures(), "plain": make_pictures(2)}
    written = report.write_report(tmp_path, rows, pictures=pictures)
    assert written["results"] == tmp_path / "results.csv"
    assert written["report"] == tmp_path / "report.html"
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {
        "accuracy.png",
        "attacks.png",
        "pictures_T20.png",
        "pictures_plain.png",
        "robustness.png",
        "sensitivity.png",
    }
    page = Page(tmp_path / "report.html")
    assert "Student at T = 20" in page.text
    (tmp_path / "config.json").write_text('{"epochs": 5, "attacks": {"pgd": {"num_steps": 40}}}')
    again = report.write_report(tmp_path, pictures=pictures)
    assert again == written
    text = Page(tmp_path / "report.html").text
    assert "attacks.pgd.num_steps 40" in text
    assert "Machine and versions Not recorded." in text


def test_html_holds_the_numbers_of_the_rows(tmp_path):
    rows = make_rows(seeds=(0,))
    head, *body = write(tmp_path, rows).table()
    assert len(head) == 2 + 2 + 2 + 3 + 3
    assert len(body) == 9
    body[0].remove("1")
    body[3].remove("20")
    body[6].remove("100")
    for index, cells in enumerate(body):
        fgsm, pgd, cw = rows[3 * index : 3 * index + 3]
        assert cells == [
            ("Teacher", "Assistant 1", "Student")[fgsm["generation"]],
            f"{100 * fgsm['test_accuracy']:.2f}",
            f"{100 * fgsm['zero_gradient_fraction']:.1f}",
            f"{100 * fgsm['success_rate']:.1f}",
            f"{100 * pgd['success_rate']:.1f}",
            "100",
            f"{cw['mean_distance']:.2f}",
            f"{cw['median_distance']:.2f}",
            _text.number(fgsm["mean_abs_logit"]),
            _text.number(fgsm["sensitivity_logits"]),
            f"{fgsm['log10_sensitivity_softmax']:.2f}",
        ]


def test_html_needs_nothing_beside_it(tmp_path):
    report.write_report(tmp_path, make_rows(), pictures={1.0: make_pictures()})
    page = Page(tmp_path / "report.html")
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "iframe", "object", "embed", "video", "audio"}
    for tag, attributes in page.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            if name in attributes:
                assert attributes[name].startswith(("data:", "#")), (tag, name)
        assert not any(name.startswith("on") for name in attributes)
        if tag == "img":
            assert len(attributes["alt"]) > 20
            assert int(attributes["width"]) > 0
    assert not re.search(r"https?:|url\(|@import", page.source)
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5
    assert ("html", {"lang": "en"}) in page.tags
    assert "prefers-color-scheme: dark" in page.source
    assert "@media print" in page.source


def test_html_escapes_what_comes_from_outside(tmp_path):
    bad = "<script>alert(1)</script>"
    grid = report.write_picture_grid(make_pictures(1), tmp_path / "grid.png")
    page = write(
        tmp_path,
        [make_row(dataset=f'{bad}"', attack=(f"a{bad}", f"n{bad}", 0.1))],
        config={bad: {"inner": [bad, 1]}},
        run={"devices": bad},
        pictures={bad: grid},
    )
    assert "script" not in {tag for tag, _ in page.tags}
    assert bad not in page.source
    assert page.text.count(bad) >= 5


def test_html_lists_settings_and_machine(tmp_path):
    config = {"temperatures": [1, 20], "smoke": False, "data_dir": None, "lr": 0.1, "extra": []}
    run = {"versions": {"jax": "0.10.2"}, "wall_time_seconds": 12.5, "devices": [{"count": 8}]}
    text = write(tmp_path, [make_row()], config=config, run=run).text
    for line in (
        "temperatures 1, 20",
        "smoke no",
        "data_dir none",
        "lr 0.1",
        "extra none",
        "versions.jax 0.10.2",
        "wall_time_seconds 12.5",
        "devices.1.count 8",
    ):
        assert line in text


def test_html_says_what_was_not_done(tmp_path):
    text = write(tmp_path, make_rows((20.0,), 2, (0,))).text
    assert "none here is known to work without gradients" in text
    assert "one seed cannot tell them from chance" in text
    assert "no teacher at T = 1 was measured" in text
    assert "the attacks saw 100 to 1,000 of 10,000 examples" in text
    assert "all follow the cross-entropy" in text
    more = [make_row(MARGIN), make_row(("square", "linf", 0.1)), make_row(("autoattack", "l2", 1))]
    text = write(tmp_path, more).text
    assert "none here is known to work without gradients" not in text
    assert "all follow the cross-entropy" not in text
    assert "no teacher at T = 1" not in text


@pytest.mark.parametrize(
    "rows",
    [
        [make_row()],
        [make_row(CW, 0.0, mean_distance=math.nan, median_distance=math.nan, num_attacked=1)],
        [make_row(attack=("", "", None), num_attacked=None, success_rate=None)],
        [{**make_row(), **dict.fromkeys(report.COLUMNS[4:13])}],
        [make_row(log10_sensitivity_softmax=-math.inf, sensitivity_logits=0.0)],
        make_rows((1.0,), 2, range(5)),
        make_rows((0.5, 1, 2, 5, 10, 20, 30, 40, 50, 100), 8, (0,)),
    ],
    ids=["one", "no success", "no attack", "blanks", "vanished", "seeds", "many"],
)
def test_report_of_odd_rows(tmp_path, rows):
    report.write_report(tmp_path, rows)
    page = Page(tmp_path / "report.html")
    assert "nan" not in page.text.lower()
    assert "None" not in page.text
    assert " of no " not in page.text
    assert report.summary(rows)


def test_report_refuses_before_it_writes(tmp_path):
    with pytest.raises(FileNotFoundError):
        report.write_report(tmp_path)
    with pytest.raises(ValueError, match="got none named"):
        report.write_report(tmp_path, [make_row()], pictures={1.0: {}})
    with pytest.raises(ValueError, match="expected at least one row"):
        report.write_report(tmp_path, [])
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected JSON in .*run\.json"):
        report.write_report(tmp_path, [make_row()])
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_html_refuses_a_figure_that_is_no_png(tmp_path):
    (tmp_path / "figure.png").write_text("no")
    with pytest.raises(ValueError, match=r"expected a PNG file, got .*figure\.png"):
        report.write_html(
            tmp_path / "x.html", rows=[make_row()], figures={"accuracy": tmp_path / "figure.png"}
        )
    assert not (tmp_path / "x.html").exists()


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, package):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=rf"expected {package} .*'jdistill\[study\]'"):
        report.write_report(tmp_path, [make_row()])
    assert not list(tmp_path.iterdir())


def test_the_template_is_part_of_the_package():
    assert _html.__file__.endswith("jdistill/report/_html.py")
    assert (_html.importlib.resources.files("jdistill.report") / "report.html.j2").is_file()
