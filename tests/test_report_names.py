"""The page calls networks, panels, and sections by what was measured, and cuts no name off."""

import pytest

from jdistill import report
from jdistill.report import _figures
from tests.report_rows import CW, PGD, Page, make_row, make_rows, make_verdict

# A chain of three networks, attacked by PGD within a radius and by C&W without one.
ROWS = [
    make_row(attack, 0.5, 1.2, generation=generation, temperature=temperature)
    for temperature in (1.0, 30.0)
    for generation in range(3)
    for attack in (PGD, CW)
]
NETWORKS = [
    {"dataset": "mnist", "temperature": temperature, "seed": 0, "generation": generation}
    for temperature in (1.0, 30.0)
    for generation in range(3)
]


def written(folder, rows=ROWS, **tables):
    """The files of a folder with these tables, and its page."""
    report.write_table(folder / "results.csv", "results", rows)
    for kind, own in tables.items():
        report.write_table(folder / f"{kind}.csv", kind, own)
    files = report.write_report(folder)
    return files, Page(files["report"])


def curve(network, attack, norm, eps, name, x):
    return {
        **network,
        **{"curve": name, "attack": attack, "norm": norm, "eps": eps, "x": float(x)},
        **{"robust_accuracy": 0.5, "low": 0.4, "high": 0.6, "num_examples": 100},
    }


CURVES = [
    curve(network, "worst_case", "l2", None, "eps", x) for network in NETWORKS for x in (0, 1)
]


def test_figures_and_tables_have_one_name_for_an_assistant(tmp_path):
    files, page = written(tmp_path)
    for name in ("attacks", "accuracy"):
        text = files[name].read_text()
        assert "<!-- assistant 1 -->" in text
        assert "<!-- student, 1 assistant -->" in text
        assert "no assistant" not in text
    assert "T = 30 assistant 1" in page.text


def test_the_student_of_a_chain_of_two_has_no_assistant(tmp_path):
    files, _ = written(tmp_path, make_rows((1.0, 20.0), 2, (0,)))
    assert "<!-- student, no assistant -->" in files["attacks"].read_text()


def test_a_transfer_table_has_the_names_of_the_others(tmp_path):
    rows = [
        {
            **{"dataset": "mnist", "temperature": 30.0, "seed": 0, "attack": "pgd"},
            **{"norm": "linf", "eps": 0.1, "num_examples": 100, "success_rate": 0.5},
            **{"source_generation": source, "target_generation": target},
            **{"low": 0.4, "high": 0.6},
        }
        for source in range(3)
        for target in range(3)
    ]
    _, page = written(tmp_path, transfer=rows)
    assert "assistant 1 50.0%" in page.text
    assert "student, no assistant" not in page.text


@pytest.mark.parametrize("measured", [False, True])
def test_a_section_without_content_is_left_out(tmp_path, measured):
    row = {"norm": "l2", "attack": "carlini_wagner_l2", "success_rate": 1.0, "num_examples": 100}
    rows = [{**network, **row, "mean": 1.2, "median": 1.1} for network in NETWORKS]
    _, page = written(tmp_path, distances=rows if measured else [])
    assert ("Distances to adversarial examples" in page.text) == measured


@pytest.mark.parametrize("attacks", [1, 2])
def test_everything_is_more_than_one_attack(tmp_path, attacks):
    more = [{**row, "attack": "ddn", "title": "DDN"} for row in ROWS if row["norm"] == "l2"]
    rows = ROWS + more * (attacks - 1)
    files, _ = written(tmp_path, rows, curves=CURVES)
    text = files["curve-eps"].read_text()
    assert ("<!-- C&amp;W L2 (l2) -->" in text) == (attacks == 1)
    assert ("<!-- everything (l2) -->" in text) == (attacks == 2)


def test_the_start_of_an_attack_is_no_step_of_it(tmp_path):
    rows = [
        curve(network, "pgd", "linf", 0.1, "steps", x) for network in NETWORKS for x in range(42)
    ]
    files, _ = written(tmp_path, curves=rows)
    assert "<!-- steps (the start is 1) -->" in files["curve-steps"].read_text()


@pytest.mark.parametrize("length", [5, 14, 60])
def test_a_legend_is_not_cut_off(length):
    with _figures.report_style():
        figure, _ = _figures._panels(1)
        handles = [_figures._handle(label="m" * length) for _ in range(3)]
        _figures._legend(figure, handles)
    (legend,) = figure.legends
    assert legend._ncols == {5: 3, 14: 2, 60: 1}[length]
    box = legend.get_window_extent()
    assert length == 60 or (box.x0 >= 0 and box.x1 <= figure.bbox.width)


@pytest.mark.parametrize("norms", ["radius alone", "both"])
def test_distances_without_a_bound_are_of_attacks_without_one(tmp_path, norms):
    rows = ROWS if norms == "both" else [row for row in ROWS if row["norm"] == "linf"]
    _, page = written(tmp_path, rows)
    answer = page.text.split("Distances of attacks without a bound. ")[1]
    expected = {
        "both": "In l2.",
        "radius alone": "No distance of an attack without a bound was measured.",
    }
    assert answer.startswith(expected[norms])


def test_a_reason_that_stands_alone_begins_as_a_sentence(tmp_path):
    verdict = make_verdict("masked", 0.9, 0.1)
    own = [{**network, "verdict": verdict} for network in NETWORKS if network["generation"] == 2]
    report.write_verdicts(tmp_path / "verdicts.json", own)
    _, page = written(tmp_path)
    assert "The gradient of the usual loss is exactly zero" in page.text
    assert "the gradient of the usual loss is exactly zero" not in page.text
