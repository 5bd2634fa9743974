"""Tables, verdicts, and pictures as files: what is read is what was written, or refused by name."""

import csv
import json
import math

import numpy as np
import pytest

from jdistill import _words, report
from jdistill.report import _networks, _pictures
from tests.report_rows import (
    CW,
    FGSM,
    PGD,
    SPATIAL,
    make_measures,
    make_pictures,
    make_row,
    make_rows,
    make_verdict,
    networks_of,
)

ROWS = make_rows((1.0, 20.0, 100.0), 3, (0,))
MEASURES = make_measures(ROWS)
KINDS = [kind for kind in report.TABLES if kind != "results"]


def write_results(path, rows):
    return report.write_table(path, "results", rows)


def read_results(path):
    return report.read_table(path, "results")


# --- results.csv ---------------------------------------------------------------------------------


def test_csv_reads_back_the_same_values(tmp_path):
    rows = make_rows()
    rows[0]["test_accuracy"] = np.float32(0.1) + 0.0  # not a short decimal
    rows[0]["seed"] = np.int64(0)
    rows[1]["success_rate"] = 1 / 3
    path = write_results(tmp_path / "deep" / "results.csv", rows)
    back = read_results(path)
    order = ("temperature", "seed", "generation", "attack")
    wanted = sorted(rows, key=lambda row: tuple(row[name] for name in order))
    assert back == wanted
    assert all(type(row["seed"]) is int and type(row["eps"] or 0.1) is float for row in back)


def test_csv_does_not_depend_on_the_order_of_rows(tmp_path):
    rows = make_rows()
    one = write_results(tmp_path / "one.csv", rows).read_bytes()
    two = write_results(tmp_path / "two.csv", reversed(rows)).read_bytes()
    again = write_results(tmp_path / "two.csv", read_results(tmp_path / "one.csv"))
    assert one == two == again.read_bytes()


def test_csv_leaves_blank_what_was_not_measured(tmp_path):
    row = make_row(CW, 0.0, mean_distance=math.nan, median_distance=None)
    path = write_results(tmp_path / "results.csv", [row])
    (cells,) = csv.DictReader(path.read_text().splitlines())
    assert cells["eps"] == cells["mean_distance"] == cells["median_distance"] == ""
    (back,) = read_results(path)
    assert back["eps"] is back["mean_distance"] is back["median_distance"] is None


def test_csv_keeps_further_columns(tmp_path):
    own = ("own", "linf", 0.1)
    rows = [{**make_row(own), "verdict": "masked", "restarts": 3, "ece": 0.25}]
    path = write_results(tmp_path / "results.csv", rows)
    assert path.read_text().splitlines()[0].endswith("mean_queries,ece,restarts,verdict")
    assert read_results(path) == [{**rows[0]}]


def test_csv_keeps_the_facts_of_attacks(tmp_path):
    rows = [make_row(attack) for attack in (FGSM, CW, SPATIAL)]
    path = write_results(tmp_path / "results.csv", rows)
    back = {row["attack"]: row for row in read_results(path)}
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
    path = write_results(tmp_path / "results.csv", [make_row()])
    before = path.read_bytes()
    with pytest.raises(ValueError, match="got two for dataset=mnist"):
        write_results(path, [make_row(), make_row()])
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
        write_results(tmp_path / "results.csv", [make_row(**change)])
    assert not list(tmp_path.iterdir())


def test_missing_columns_are_named(tmp_path):
    row = make_row()
    del row["eps"]
    with pytest.raises(ValueError, match="got row 0 without eps; add them"):
        write_results(tmp_path / "results.csv", [row])
    (tmp_path / "other.csv").write_text("dataset,seed\nmnist,0\n")
    with pytest.raises(ValueError, match=r"other\.csv, got none named temperature, generation"):
        read_results(tmp_path / "other.csv")


def test_a_damaged_line_is_named(tmp_path):
    path = write_results(tmp_path / "results.csv", [make_row(), make_row(PGD)])
    path.write_text(path.read_text().replace("0.9912", "0.99x2", 1))
    with pytest.raises(ValueError, match=r"a number in column test_accuracy .* '0.99x2' in line 2"):
        read_results(path)


def test_no_rows():
    with pytest.raises(ValueError, match="expected at least one row of results, got none"):
        report.summary([])


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
        f"{teacher.log10_sensitivity_softmax.mean:.2f}".replace("-", "−"),
        f"{100 * teacher.zero_gradients.mean:.1f}",
        *(_words.percent(hit.success.mean).rstrip("%") for hit in teacher.attacks.values()),
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


@pytest.mark.parametrize(("channels", "number"), [(1, 4), (3, 12), (2, 1)])
def test_picture_grid_shows_pictures_and_differences(tmp_path, channels, number):
    pictures = make_pictures(number, channels)
    figure = _pictures._figure(_pictures.load_pictures(pictures), 8, "C&W L2", "l2")
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_table_reads_back_the_same_values(tmp_path, kind):
    rows = MEASURES[kind]
    assert len(rows) >= 6
    assert tuple(rows[0]) != ()
    one = report.write_table(tmp_path / "deep" / "one.csv", kind, rows)
    back = report.read_table(one, kind)
    titled = "title" in rows[0]
    assert one.read_text().splitlines()[0] == ",".join([*report.TABLES[kind], *["title"] * titled])
    assert sorted(map(str, map(sorted_items, back))) == sorted(map(str, map(sorted_items, rows)))
    two = report.write_table(tmp_path / "two.csv", kind, reversed(back))
    assert two.read_bytes() == one.read_bytes()


def sorted_items(row):
    return sorted((name, value) for name, value in row.items())


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("curves", {"robust_accuracy": math.nan}, "expected robust_accuracy in every row, got nan"),
        ("curves", {"robust_accuracy": 73.0}, r"robust_accuracy in \[0, 1\], got 73.0 in row 0"),
        ("curves", {"low": -0.1}, r"expected low in \[0, 1\], got -0.1"),
        ("curves", {"curve": "epsilon"}, "expected curve to be eps or steps or queries, got 'eps"),
        ("curves", {"verdict": "masked"}, "no columns but those of .*, got verdict in row 0"),
        ("transfer", {"source_generation": 0.5}, "source_generation to be a whole number"),
        ("sensitivity", {"count": -1}, "expected count >= 0, got -1"),
        ("calibration", {"nll": None}, "expected nll in every row, got None"),
        ("agreement", {"top1_agreement": 97.0}, r"top1_agreement in \[0, 1\], got 97.0 in row 0"),
        ("agreement", {"mean_kl": None}, "expected mean_kl in every row, got None"),
        ("agreement", {"num_teacher_mistakes": -1}, "expected num_teacher_mistakes >= 0, got -1"),
        ("agreement", {"repeated_mistakes_low": 0.9}, "repeated_mistakes_low <= .*_high, got 0.9"),
        ("agreement", {"teacher_generation": 0.5}, "teacher_generation to be a whole number"),
        ("deployment", {"parameters": -1}, "expected parameters >= 0, got -1"),
        ("deployment", {"weights_bytes": None}, "expected weights_bytes in every row, got None"),
        ("deployment", {"share_of_first": 0.0}, "expected share_of_first > 0, got 0.0"),
        ("deployment", {"milliseconds_per_image_batch_1": 0.0}, "batch_1 > 0, got 0.0 in row 0"),
        ("deployment", {"milliseconds_per_image_batch_128": -1.0}, "batch_128 > 0, got -1.0"),
        ("distances", {"success_rate": "all"}, "success_rate to be a number, got 'all'"),
        ("comparisons", {"difference": 2.0}, r"difference in \[-1, 1\], got 2.0 in row 0"),
        ("comparisons", {"p_value": 1.5}, r"p_value in \[0, 1\], got 1.5"),
        ("comparisons", {"generation": None}, "which network the row describes"),
    ],
)
def test_a_bad_row_is_named_and_nothing_written(tmp_path, kind, change, message):
    row = {**MEASURES[kind][0], **change}
    with pytest.raises(ValueError, match=message):
        report.write_table(tmp_path / "x.csv", kind, [row])
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_named_with_its_line(tmp_path):
    path = report.write_table(tmp_path / "curves.csv", "curves", MEASURES["curves"])
    good = path.read_text()
    lines = good.splitlines()
    for bad, message in (
        ("nan", r"a number in column robust_accuracy of .*curves\.csv, got 'nan' in line 2"),
        ("1.7", r"robust_accuracy in \[0, 1\], got 1\.7 in line 2 of .*curves\.csv"),
    ):
        cells = lines[1].split(",")
        cells[9] = bad
        path.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]))
        with pytest.raises(ValueError, match=message):
            report.read_table(path, "curves")
    path.write_text(good.replace(",robust_accuracy", ",accuracy", 1))
    with pytest.raises(ValueError, match=r"TABLES\['curves'\] in .*got none named robust_accuracy"):
        report.read_table(path, "curves")
    path.write_text(f"{good}{lines[1]}\n")
    with pytest.raises(ValueError, match=r"one row per dataset.* in curves, got two for dataset"):
        report.read_table(path, "curves")


def test_an_unknown_kind_names_the_known_ones(tmp_path):
    with pytest.raises(ValueError, match=r"expected kind to be one of results, curves, .*'curve'"):
        report.read_table(tmp_path, "curve")


def test_verdicts_read_back_the_same(tmp_path):
    one = report.write_verdicts(tmp_path / "verdicts.json", reversed(MEASURES["verdicts"]))
    back = report.read_verdicts(one)
    assert len(back) == 9
    assert all(row in back for row in MEASURES["verdicts"])
    assert report.write_verdicts(tmp_path / "2.json", back).read_bytes() == one.read_bytes()


CHECK = make_verdict("masked", 1, 0).as_dict()["checks"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "robust"}, "expected label among masked, .*, got 'robust'"),
        ({"drop": "budget"}, "expected a verdict with .*, got none named budget"),
        ({"more": 1}, "got more beside them"),
        ({"naive": 0.98}, "expected naive with value, low, high, got 0.98"),
        ({"naive": {"value": 98.0, "low": 0.0, "high": 1.0}}, r"value of naive in \[0, 1\]"),
        ({"eps": math.nan}, "expected eps to be finite, got nan"),
        ({"attacks": "PGD"}, "attacks of a verdict"),
        ({"checks": [{"name": "zero"}]}, "a check of a verdict with .*, got none named"),
        ({"checks": [{**CHECK, "figures": {"share": math.nan}}]}, "share of zero_.* finite"),
        ({"checks": [{**CHECK, "outcome": "passed"}]}, "among masked, clear, .*, got 'passed'"),
    ],
)
def test_a_verdict_of_another_version_is_refused(tmp_path, change, message):
    verdict = {**make_verdict("masked", 0.99, 0.7).as_dict(), **change}
    verdict.pop(verdict.pop("drop", None), None)
    path = tmp_path / "verdicts.json"
    path.write_text(json.dumps([{**networks_of(ROWS)[0], "verdict": verdict}]))
    with pytest.raises(ValueError, match=message) as error:
        report.read_verdicts(path)
    assert f"verdict 0 of {path}" in str(error.value)


def test_a_file_that_holds_no_verdicts(tmp_path):
    path = tmp_path / "verdicts.json"
    for text, message in (
        ("{", r"expected JSON in .*verdicts\.json"),
        ("{}", r"verdicts of .*verdicts\.json to be a list of mappings, got dict"),
        ('[{"dataset": "mnist"}]', "expected a verdict with"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            report.read_verdicts(path)
    path.unlink()
    row = MEASURES["verdicts"][0]
    for rows, message in (
        ([row, row], "one verdict per network, norm and eps, got two"),
        ([{**row, "verdict": row["verdict"].as_dict()}], r"a diagnose\.Verdict in verdict 0"),
        ([{**row, "seed": None}], "expected seed in verdict 0"),
        ([{**row, "seed": "first"}], "expected numbers as temperature, seed"),
    ):
        with pytest.raises(ValueError, match=message):
            report.write_verdicts(path, rows)
        assert not path.exists()
