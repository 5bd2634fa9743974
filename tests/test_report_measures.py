"""What the report makes of verdicts, curves and the other tables of a workdir."""

import html
import json
import math
import re

import numpy as np
import pytest

from jdistill import report
from jdistill.report import (
    _checklist,
    _comparison_words,
    _evidence,
    _measure_figures,
    _networks,
    _settings,
    _verdicts,
)
from jdistill.report._measures import KINDS, complete
from tests.report_rows import (
    CW,
    FGSM,
    MARGIN,
    PGD,
    Page,
    make_comparison,
    make_measures,
    make_row,
    make_rows,
    make_verdict,
    networks_of,
)

ROWS = make_rows((1.0, 20.0, 100.0), 3, (0,))
MEASURES = make_measures(ROWS)
# "Robust" may say which accuracy is meant, and never what a network is.
ALONE = re.compile(r"\brobust\b(?! accurac)", re.IGNORECASE)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A workdir with everything that can be measured, and its report."""
    folder = tmp_path_factory.mktemp("run")
    report.write_results(folder / "results.csv", ROWS)
    for kind, rows in MEASURES.items():
        if kind == "verdicts":
            report.write_verdicts(folder / "verdicts.json", rows)
        else:
            report.write_table(folder / f"{kind}.csv", kind, rows)
    (folder / "checkpoints").mkdir()
    run = {
        "versions": {"jdistill": "0.1.0", "jax": "0.10.2"},
        "devices": [{"kind": "TPU v5 lite", "count": 4}],
        "matmul_precision": None,
        "seconds": 75.0,
    }
    config = {"seeds": [0], "pgd_steps": 40}
    return folder, report.write_report(folder, run=run, config=config)


def answer(rows=ROWS, **measures):
    return "\n".join(report.answer(rows, measures))


# --- The tables ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "verdicts"])
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


NAN_FIGURE = [{**make_verdict("masked", 1, 0)["checks"][0], "figures": {"share": math.nan}}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "robust"}, "the label of verdict 0.*to be one of masked, .*, got 'robust'"),
        ({"budget": None, "drop": "budget"}, "expected budget in verdict 0.*, got none; write it"),
        ({"drop": "checks"}, "expected checks in verdict 0"),
        ({"naive": 0.98}, "expected a mapping for naive of verdict 0.*, got 0.98"),
        ({"naive": {"value": 98.0, "low": None, "high": None}}, r"value of naive .* in \[0, 1\]"),
        ({"eps": math.nan}, "expected eps of verdict 0.* to be a finite number, got nan"),
        ({"attacks": "PGD"}, "expected a list of attacks in verdict 0.*, got 'PGD'"),
        ({"checks": [{"name": "zero"}]}, "expected title, .* in a check of verdict 0"),
        ({"checks": NAN_FIGURE}, "share of the check zero_gradients .* finite number, got nan"),
        (
            {"checks": [{**NAN_FIGURE[0], "outcome": "passed"}]},
            "the outcome of the check zero_gradients .* one of masked, clear, .*, got 'passed'",
        ),
    ],
)
def test_a_verdict_of_another_version_is_refused(tmp_path, change, message):
    verdict = {**make_verdict("masked", 0.99, 0.7), **change}
    verdict.pop(verdict.pop("drop", None), None)
    row = {**networks_of(ROWS)[0], "verdict": verdict}
    path = tmp_path / "verdicts.json"
    with pytest.raises(ValueError, match=message):
        report.write_verdicts(path, [row])
    assert not path.exists()
    path.write_text(json.dumps([row]))
    with pytest.raises(ValueError, match=message.replace("verdict 0", r"verdict 0 of .*json")):
        report.read_verdicts(path)


def test_a_file_that_holds_no_verdicts(tmp_path):
    path = tmp_path / "verdicts.json"
    for text, message in (
        ("{", "expected JSON in .*verdicts.json"),
        ("{}", "expected a list of verdicts in .*, got a dict"),
        ('[{"dataset": "mnist"}]', "expected temperature, seed, generation, verdict in verdict 0"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            report.read_verdicts(path)
    twice = [MEASURES["verdicts"][0]] * 2
    with pytest.raises(ValueError, match="one verdict per network, norm and eps, got two"):
        report.write_verdicts(path, twice)


def test_measures_of_an_unknown_network_or_kind_are_refused(tmp_path):
    row = {**MEASURES["calibration"][0], "temperature": 7.0}
    with pytest.raises(ValueError, match=r"calibration about networks of results\.csv, .*=7, "):
        report.answer(ROWS, {"calibration": [row]})
    with pytest.raises(ValueError, match=r"expected measures of the kinds .*, got curve; rename"):
        report.answer(ROWS, {"curve": []})
    report.write_table(tmp_path / "calibration.csv", "calibration", [row])
    with pytest.raises(ValueError, match=r"calibration about networks of results\.csv"):
        report.write_report(tmp_path, ROWS)
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.csv"]


# --- The verdict in words ------------------------------------------------------------------------


def judged_rows(*verdicts, rows=ROWS):
    """Verdicts for (temperature, generation, seed, verdict)s."""
    names = ("temperature", "generation", "seed", "verdict")
    found = [dict(zip(names, item, strict=True)) for item in verdicts]
    return [{"dataset": rows[0]["dataset"], **item} for item in found]


def test_the_masked_verdict_in_words():
    verdicts = judged_rows(
        (1.0, 0, 0, make_verdict("no sign of masking", 0.73, 0.72)),
        (20.0, 2, 0, make_verdict("masked", 0.95, 0.75)),
        (100.0, 2, 0, make_verdict("masked", 0.988, 0.802)),
    )
    first, second, *_ = report.answer(ROWS, {"verdicts": verdicts})
    assert first == (
        "Within l∞ ≤ 0.1, on 200 examples, the usual attack leaves 98.8 % accuracy to the student "
        "with 1 assistant at T = 100; everything that was tried together leaves 80.2 % (95 % "
        "interval 74.7 to 85.7 %). This is gradient masking: the first of these numbers is not to "
        "be believed."
    )
    text = answer(verdicts=verdicts)
    assert second.startswith("With 1 assistant the student's test accuracy is")
    assert "2 of 13 checks say that the usual attack fails for reasons of its own. The" in text
    assert (
        "By the same two measures the teacher at T = 1, an ordinarily trained network, keeps "
        "73.0 % and 72.0 %: a difference of +25.8 points by the usual attack and of +8.2 points by "
        "everything that was tried, where the 95 % intervals overlap." in text
    )
    assert "At T = 20 the verdict is masked too." in text


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("masked", "This is gradient masking: the first"),
        ("no sign of masking", "There is no sign of masking under PGD-40, APGD-CE, APGD-T, Square"),
        ("inconclusive", "The verdict is inconclusive: what was tried cannot tell whether"),
    ],
)
def test_the_answer_goes_with_the_verdict(label, words):
    # The rows alone say "masked": 98 % of the gradients are zero, and C&W succeeds as near.
    assert "This is gradient masking" in answer()
    text = answer(verdicts=judged_rows((100.0, 2, 0, make_verdict(label, 0.9, 0.8))))
    assert words in text
    assert ("gradient masking" in text) == (label == "masked")
    assert "exactly zero in float32" not in text
    assert ("no attack without gradients was run" in text.lower()) == (label == "inconclusive")
    assert "No verdict was asked for on the teacher at T = 1" in text


def test_the_answer_is_about_a_judged_network():
    verdicts = judged_rows((20.0, 1, 0, make_verdict("no sign of masking", 0.8, 0.8)))
    first = report.answer(ROWS, {"verdicts": verdicts})[0]
    assert "the student without an assistant at T = 20; everything" in first


def test_one_masked_seed_is_enough():
    rows = make_rows((100.0,), 2, (0, 1, 2))
    labels = ("no sign of masking", "masked", "no sign of masking")
    verdicts = judged_rows(
        *((100.0, 1, seed, make_verdict(name, 0.9, 0.7)) for seed, name in enumerate(labels)),
        rows=rows,
    )
    text = answer(rows, verdicts=verdicts)
    assert "This is gradient masking on 1 of 3 seeds: the first" in text
    (item,) = _verdicts.judge(_networks.networks(rows), verdicts)
    assert item.seeds[item.shown] == 1
    # All three intervals, and not how near the three means happen to lie.
    low, high = verdicts[0]["verdict"]["worst_case"]["low"], item.worst_case.high
    assert (item.worst_case.low, item.worst_case.mean) == (low, pytest.approx(0.7))
    assert high == verdicts[0]["verdict"]["worst_case"]["high"]


def test_long_forms_differ_where_more_than_the_probe_differs():
    budgets = ["PGD-40, PGD-40 at T = 0.238, at linf 0.1", "PGD-40, PGD-40 at T = 31, at linf 0.1"]
    verdicts = judged_rows(
        *(
            (t, 2, 0, make_verdict("masked", 0.9, 0.5, budget=budgets[t > 20]))
            for t in (20.0, 100.0)
        ),
        (1.0, 0, 0, make_verdict("no sign of masking", 0.7, 0.7, budget=budgets[0])),
    )
    judged = _verdicts.judge(_networks.networks(ROWS), verdicts)
    plain, masked = _evidence.overview(judged, verdicts)[1].items
    assert plain == f"T = 1 (teacher): no sign of masking under {budgets[0]}."
    assert masked.startswith("T = 20 (student); T = 100 (student): masked: the usual")
    assert "(PGD-40, PGD-40 at a T of its own, at linf 0.1)" in masked


def test_verdicts_on_other_examples_are_not_subtracted():
    verdicts = judged_rows(
        (1.0, 0, 0, make_verdict("no sign of masking", 0.73, 0.72, num_examples=100)),
        (100.0, 2, 0, make_verdict("masked", 0.988, 0.802)),
    )
    text = answer(verdicts=verdicts)
    assert "keeps 73.0 % and 72.0 %, on 100 examples: not the same ones, so no difference" in text
    assert "points by the usual attack" not in text


def test_verdicts_at_another_budget_are_counted_not_shown(tmp_path):
    network = networks_of(ROWS)[0]
    one = {**network, "verdict": make_verdict("masked", 0.9, 0.5)}
    more = [{**n, "verdict": make_verdict("masked", 0.99, 0.2, eps=0.3)} for n in networks_of(ROWS)]
    path = report.write_html(tmp_path / "x.html", rows=ROWS, measures={"verdicts": [one, *more]})
    text = Page(path).text
    assert "1 verdicts at other budgets are in verdicts.json" in text
    assert "Within l∞ ≤ 0.3" in text.replace("\N{NO-BREAK SPACE}", " ")


# --- Comparisons ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("support", "words", "change"),
    [
        ("not shown", "the data do not show an effect", {}),
        ("shown", "show that it is higher", {"low": 0.001, "high": 0.003, "p_value": 1e-4}),
        (
            "shown",
            "show that it is lower",
            {"difference": -0.002, "low": -0.003, "high": -0.001, "p_value": 1e-4},
        ),
        ("one of many", "as one of 10 comparisons it does not", {"low": 0.001, "p_value": 0.02}),
        ("disagree", "the data do not settle it", {"low": 0.001, "p_value": 0.2}),
        ("disagree", "the data do not settle it", {"p_value": 0.01}),
        ("not tested", "nothing follows", {"p_value": None}),
        ("not tested", "nothing follows", {"low": None, "high": None}),
    ],
)
def test_a_comparison_claims_no_more_than_it_supports(support, words, change):
    row = make_comparison(**change)
    assert _comparison_words.support(row, 10) == support
    (network,) = [
        net for net in _networks.networks(ROWS) if (net.temperature, net.generation) == (20.0, 2)
    ]
    claim = _comparison_words.Claim(row, network, 10, support)
    assert words in claim.conclusion
    assert claim.sentence.endswith(f"{claim.conclusion}.")
    assert ("95 % interval" in claim.sentence) == (row["low"] is not None)


def test_the_sentence_on_assistants_has_its_figures():
    rows = make_rows((1.0, 20.0), 3, (0, 1))
    comparisons = [
        make_comparison(),
        make_comparison(
            "robust_accuracy: apgd_targeted at linf 0.1", p_value=0.0312, title="APGD-T"
        ),
    ]
    parts = report.answer(rows, {"comparisons": comparisons})
    short, rest = (part for part in parts if part.startswith("At T = 20"))
    assert short == (
        "At T = 20 the accuracy under APGD-T within l∞ ≤ 0.1 of the student with 1 assistant "
        "differs from that of the student without an assistant by +0.20 points (95 % interval "
        "−0.30 to +0.70, p = 0.031, 2 seeds, 500 examples): the interval and the test disagree: "
        "the data do not settle it. Of all 2 comparisons of chain lengths none show a difference."
    )
    assert rest == (
        "At T = 20 the test accuracy of the student with 1 assistant differs from that of the "
        "student without an assistant by +0.20 points (95 % interval −0.30 to +0.70, p = 0.4, "
        "2 seeds, 10,000 examples): the data do not show an effect."
    )


def test_tests_over_seeds_stand_for_those_of_each_seed():
    found = _networks.networks(make_rows((20.0,), 3, (0, 1)))
    own = [make_comparison(seed=seed) for seed in (0, 1)]
    assert [claim.row["seed"] for claim in _comparison_words.claims(found, own)] == [0, 1]
    both = _comparison_words.claims(found, [*own, make_comparison(p_value=0.01)])
    assert [(claim.row["seed"], claim.number) for claim in both] == [(None, 1)]
    _, rest = _comparison_words.effect(found[-1], found, own)
    assert "A test within one seed says nothing about the next seed's networks." in rest


# --- The checklist -------------------------------------------------------------------------------


def checklist(rows, measures=None, config=(), has_weights=False):
    found = _networks.networks(rows)
    every = complete(measures, found)
    judged = _verdicts.judge(found, every["verdicts"])
    cards = _checklist.checklist(found, judged, every, dict(config), has_weights=has_weights)
    return {card.title: card for card in cards}


BARE = [
    {**make_row(attack=("", "", None), success_rate=None, temperature=20.0, test_accuracy=None)}
]


def only(kind, rows):
    """The measures of one kind that are about the network of `BARE`."""
    own = [row for row in rows if row["temperature"] == 20.0]
    own = [row for row in own if row.get("generation", 0) == 0]
    own = [row for row in own if row.get("target_generation", 0) == 0]
    return {kind: [row for row in own if row.get("source_generation", 0) == 0]}


def with_check(*names):
    """A verdict in which these checks alone were run."""
    verdict = make_verdict("no sign of masking", 0.8, 0.8)
    for check in verdict["checks"]:
        check["outcome"] = "clear" if check["name"] in names else "not run"
    verdict = {**verdict, "attacks": []}
    return {"verdicts": [{**networks_of(BARE)[0], "verdict": verdict}]}


CURVES = MEASURES["curves"]
OTHER = {"temperature": 20.0}


@pytest.mark.parametrize(
    ("item", "arguments"),
    [
        ("State a precise threat model", {"rows": [make_row(FGSM)]}),
        ("State a precise threat model", {"measures": with_check()}),
        ("Attack in a way that is adapted to the defense", {"rows": [make_row(MARGIN)]}),
        (
            "Attack in a way that is adapted to the defense",
            {"measures": with_check("temperature_probe")},
        ),
        ("Report accuracy without an attack", {"rows": [make_row()]}),
        ("Attack an undefended network with the same code", {"rows": [make_row(FGSM)]}),
        ("Compare one step with many", {"rows": [make_row(FGSM), make_row(PGD)]}),
        (
            "Show that more steps and restarts change nothing",
            {"measures": with_check("more_effort")},
        ),
        (
            "Show that more steps and restarts change nothing",
            {"measures": only("curves", [row for row in CURVES if row["curve"] == "steps"])},
        ),
        ("Verify that the attacks have converged", {"measures": with_check("still_moving")}),
        ("Show that success grows with the budget", {"measures": with_check("eps_curve")}),
        ("Draw accuracy against the budget", {"measures": only("curves", CURVES)}),
        ("Reach full success without a bound", {"measures": with_check("unbounded")}),
        ("Reach full success without a bound", {"rows": [make_row(CW, 1.0, 1.4)]}),
        ("Check that the gradients are of use", {"measures": with_check("gradient_agreement")}),
        ("Try an attack without gradients", {"rows": [make_row(("square", "linf", 0.1))]}),
        ("Try an attack without gradients", {"measures": with_check("black_box")}),
        (
            "Try an attack that sees the predicted class alone",
            {"rows": [make_row(("hop_skip_jump", "l2", None), 1.0, 2.0)]},
        ),
        ("Try adversarial examples of another network", {"measures": with_check("transfer")}),
        (
            "Try adversarial examples of another network",
            {"measures": only("transfer", MEASURES["transfer"])},
        ),
        ("Compare with random noise", {"measures": with_check("random_noise")}),
        ("Report the worst case of every example over all attacks", {"measures": with_check()}),
        ("Test more than one norm", {"rows": [make_row(FGSM), make_row(CW, 1.0, 1.4)]}),
        (
            "Judge attacks without a bound by distance",
            {"measures": only("distances", MEASURES["distances"])},
        ),
        ("List the attacks' settings", {"config": {"pgd_steps": 40}}),
        ("Keep code and weights for others", {"has_weights": True}),
    ],
)
def test_an_item_of_the_checklist_is_done_where_the_run_has_it(item, arguments):
    assert checklist(BARE)[item].badge == "not done"
    done = checklist(**{"rows": BARE, **arguments})[item]
    assert (done.badge, done.tone) == ("done", "good")
    assert done.text.endswith(".")
    assert done.text != checklist(BARE)[item].text


def test_nothing_of_the_checklist_is_done_without_a_run():
    cards = checklist(BARE)
    assert len(cards) == 21
    assert {card.badge for card in cards.values()} == {"not done"}
    everything = checklist(ROWS, MEASURES, {"a": 1}, True)
    missing = [title for title, card in everything.items() if card.badge == "not done"]
    assert missing == [
        "Try an attack that sees the predicted class alone",
        "Compare with earlier work and explain differences",
    ]


def test_the_checklist_says_what_came_out():
    cards = checklist(ROWS, MEASURES)
    gradients = cards["Check that the gradients are of use"].text
    assert gradients.startswith("18 checks: 6 of them point to masking. The check zero_gradients")
    assert "l∞ ≤ 0.1" in cards["State a precise threat model"].text
    assert "one step of FGSM nowhere" in cards["Compare one step with many"].text
    worse = [make_row(FGSM, 0.9), make_row(PGD, 0.5)]
    text = checklist(worse)["Compare one step with many"].text
    assert "succeeds clearly more often at T = 1 (teacher), a sign of masking." in text
    # Curves read off the distances of one run cannot rise, so they answer nothing.
    text = checklist(ROWS, {"curves": CURVES})["Show that success grows with the budget"].text
    assert text == "Not that check of the verdict."
    moved = [
        {**row, "success_rate": 0.9, "low": 0.85, "high": 0.95}
        if row["source_generation"] == 0 < row["target_generation"]
        else row
        for row in MEASURES["transfer"]
    ]
    text = checklist(ROWS, {"transfer": moved})["Try adversarial examples of another network"].text
    assert "18 pairs: 6 succeed clearly more often" in text


# --- The figures ---------------------------------------------------------------------------------


def lines_of(figure):
    return {line.get_gid(): line for axes in figure.axes for line in axes.lines if line.get_gid()}


def test_the_first_figure_draws_the_two_numbers():
    found = _networks.networks(ROWS)
    judged = _verdicts.judge(found, MEASURES["verdicts"])
    figure = _measure_figures.verdict_figure(judged)
    dots = lines_of(figure)
    for row in MEASURES["verdicts"]:
        if row["generation"] == 2:
            for side in ("naive", "worst_case"):
                dot = dots[f"{side} temperature={row['temperature']:g}"]
                (value,) = dot.get_xdata()
                assert value == pytest.approx(100 * row["verdict"][side]["value"])
    words = [text.get_text() for text in figure.axes[0].texts]
    assert words.count("masked") == 2
    assert words.count("no sign of masking") == 2
    assert "T = 1, teacher" in words


def test_curves_draw_the_rows_and_their_bands():
    found = _networks.networks(ROWS)
    figure = _measure_figures.curve_figure(found, CURVES, "steps")
    drawn = lines_of(figure)
    wanted = [
        row
        for row in CURVES
        if (row["curve"], row["attack"]) == ("steps", "pgd_margin")
        and (row["temperature"], row["generation"]) == (100.0, 2)
    ]
    line = drawn["steps pgd_margin T=100"]
    np.testing.assert_allclose(line.get_xdata(), [row["x"] for row in wanted])
    values = [100 * row["robust_accuracy"] for row in wanted]
    np.testing.assert_allclose(line.get_ydata(), values)
    axes = line.axes
    heights = np.concatenate([band.get_paths()[0].vertices[:, 1] for band in axes.collections])
    assert heights.min() <= 100 * min(row["low"] for row in wanted) + 1e-9
    assert _measure_figures.curve_figure(found, [], "steps") is None
    assert _measure_figures.curve_figure(found, wanted, "eps") is None


def test_histograms_share_out_all_examples():
    found = _networks.networks(ROWS)
    rows = MEASURES["sensitivity"]
    edges = _measure_figures.bins(rows)
    assert edges[0] == (-math.inf, -40.0)
    assert edges[-1] == (-3.0, 0.0)  # nothing lies above, so that bin is not drawn
    above = [{**row, "count": 5} if row["low"] == 0.0 else row for row in rows]
    assert _measure_figures.bins(above)[-1] == (0.0, math.inf)
    figure = _measure_figures.bins_figure(found, rows)
    for axes, network in zip(figure.axes, _measure_figures.shown(found), strict=True):
        heights = [bar.get_height() for bar in axes.patches]
        assert sum(heights) == pytest.approx(100)
        own = [row["count"] for row in rows if _verdicts.is_of(row, network)]
        np.testing.assert_allclose(heights, np.array(own[:-1]) / 5)


def test_transfer_matrices_have_source_and_target_apart():
    rows = [
        {**row, "success_rate": 0.9, "low": 0.8, "high": 1.0}
        if (row["source_generation"], row["target_generation"]) == (0, 2)
        else row
        for row in MEASURES["transfer"]
    ]
    matrix = _measure_figures.matrices("mnist", rows)[0]
    assert matrix.temperature == 1.0
    assert matrix.stats[0, 2].mean == 0.9
    assert matrix.stats[2, 0].mean == pytest.approx(0.12)
    figure = _measure_figures.transfer_figure(_networks.networks(ROWS), rows)
    assert figure.axes[0].images[0].get_array()[0, 2] == pytest.approx(90)


# --- The page and its twins ----------------------------------------------------------------------


def test_the_report_shows_everything_that_was_measured(written):
    folder, paths = written
    names = {"verdict", "curve-eps", "curve-steps", "curve-queries", "distances", "transfer"}
    assert {*names, "sensitivity-bins"} <= set(paths)
    assert "robustness" not in paths  # the same quantity stands in more norms
    page = Page(folder / "report.html")
    assert (folder / "report.html").stat().st_size < 3_000_000
    titles = re.findall(r"<h2>(.*?)</h2>", page.source)
    assert titles == [
        *("What was found", "In more words", "The verdict", "Results by temperature"),
        *("Does an assistant help?", "Against temperature", "Against the attack&#39;s budget"),
        *("Sensitivity of single examples", "Distance to the nearest adversarial examples"),
        *("Transfer between generations", "Calibration", "Evidence of the verdict"),
        *("Checklist of “On Evaluating Adversarial Robustness”", "What the quantities mean"),
        *("What was run", "What this report does not show"),
    ]
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    for words in (
        "no sign of masking under PGD-40, APGD-CE, APGD-T, Square (1,000 queries), at linf 0.1",
        "masked: the usual attack's number is not to be believed (PGD-40",
        "Athalye et al. 2018, section 3.1",
        "at least half of the examples",
        "40 steps, step size 0.01, 1 restart",
        "devices 4 × TPU v5 lite",
        "measured at full float32 precision",
        "wall time 1 min 15 s",
    ):
        assert words in text, words
    assert "Not done in this run" not in text


def test_the_page_needs_nothing_beside_it(written):
    page = Page(written[0] / "report.html")
    assert not {tag for tag, _ in page.tags} & {"script", "iframe", "object", "embed", "form"}
    anchors = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            if name in attributes:
                where = attributes[name]
                assert where.startswith("data:") or where.removeprefix("#") in anchors
    assert not re.search(r"https?:|url\(|@import", page.source)


def cells_of_html(path):
    """Every line of every table, the small print in brackets, without blank cells."""
    source = path.read_text(encoding="utf-8")
    lines = []
    for table in re.findall(r"<table.*?</table>", source, re.S):
        for line in re.findall(r"<tr>(.*?)</tr>", table, re.S):
            cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.S)
            cells = [re.sub(r"<small>(.*?)</small>", r" (\1)", cell, flags=re.S) for cell in cells]
            cells = [html.unescape(re.sub(r"<.*?>", "", cell)) for cell in cells]
            lines.append([cell for cell in cells if cell])
    return lines


def cells_of_markdown(path):
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("| ") and not line.startswith(("| :--", "| name | value |")):
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)]
            cells = [re.sub(r"\\(.)", r"\1", cell) for cell in cells]
            lines.append([cell for cell in cells if cell])
    return lines


def test_the_markdown_twin_has_the_same_tables_words_and_checklist(written):
    folder, paths = written
    page, text = Page(folder / "report.html"), paths["markdown"].read_text(encoding="utf-8")
    assert cells_of_markdown(paths["markdown"]) == cells_of_html(folder / "report.html")
    plain = re.sub(r"\\(.)", r"\1", text)
    for paragraph in report.answer(ROWS, MEASURES):
        assert paragraph in plain
    for words in re.findall(r"<b>(.*?)</b>\n<p>(.*?)</p>", page.source):
        for part in words:
            assert html.unescape(part).replace("\N{NO-BREAK SPACE}", " ") in plain
    for name in re.findall(r"\]\((figures/.*?)\)", text):
        assert (folder / name).is_file()
    assert text.count("](figures/") == len(re.findall("<img", page.source))


@pytest.mark.parametrize("label", ["masked", "no sign of masking", "inconclusive", None])
def test_no_network_is_judged_by_one_word(tmp_path, label):
    measures = make_measures(ROWS, label) if label else {}
    page = Page(report.write_html(tmp_path / "x.html", rows=ROWS, measures=measures))
    assert not ALONE.search(page.text)
    assert not re.search(r"\b(secure|safe|immune|unbreakable)\b", page.text.lower())
    # And no label stands without the budget that it rests on.
    for sentence in re.findall(r"[^.]*no sign of masking under[^.]*", page.text):
        assert "PGD-40" in sentence


def test_what_was_not_measured_is_left_out_and_said(tmp_path):
    text = Page(report.write_html(tmp_path / "x.html", rows=ROWS)).text
    assert "Not done in this run: a masking verdict, paired tests of chain lengths, curves" in text
    for title in (
        "The verdict",
        "Transfer between generations",
        "Calibration",
        "Does an assistant",
    ):
        assert title not in text
    for kind in KINDS:
        page = Page(
            report.write_html(tmp_path / "x.html", rows=ROWS, measures={kind: MEASURES[kind]})
        )
        assert "nan" not in page.text.lower().split()
        assert "None" not in page.text


def test_a_verdict_on_the_teacher_alone(tmp_path):
    rows = [make_row(FGSM)]
    verdicts = judged_rows((1.0, 0, 0, make_verdict("no sign of masking", 0.7, 0.7)), rows=rows)
    verdicts[0]["verdict"]["num_nonfinite"] = 3
    verdicts[0]["verdict"]["naive"] = {"value": 0.7, "low": None, "high": None}
    page = Page(report.write_html(tmp_path / "x.html", rows=rows, measures={"verdicts": verdicts}))
    text = page.text.replace("\N{NO-BREAK SPACE}", " ")
    assert "leaves 70.0 % accuracy to the teacher at T = 1; everything" in text
    assert "By the same two measures" not in text
    assert "3 with NaN or infinite logits" in text


def test_outside_text_is_shown_as_it_is(tmp_path):
    bad = "<script>alert(1)</script> | *x*"
    row = make_row(FGSM)
    verdict = make_verdict("masked", 0.9, 0.5, budget=bad, reason=bad)
    verdict["checks"][0] |= {"title": bad, "finding": bad, "figures": {bad: 0.5}}
    measures = {
        "verdicts": [{**networks_of([row])[0], "verdict": verdict}],
        "curves": [{**CURVES[0], "generation": 0, "attack": bad}],
    }
    paths = report.write_report(tmp_path, [row], measures=measures, config={bad: bad})
    page = Page(paths["report"])
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text.count(bad) >= 5
    text = paths["markdown"].read_text()
    assert "<script>" not in text.replace("\\<script\\>", "")
    assert r"\<script\>alert(1)\</script\> \| \*x\*" in text


def test_a_figure_of_ones_own_is_shown_under_its_name(tmp_path):
    rows = [make_row(FGSM)]
    figures = report.write_figures(rows, tmp_path)
    own = {"loss_landscape": figures["attacks"]}
    page = Page(report.write_html(tmp_path / "x.html", rows=rows, figures=own))
    assert "loss landscape." in page.text
    assert [tag for tag, _ in page.tags].count("img") == 1


def test_two_data_sets_have_parts_of_their_own(tmp_path):
    rows = [*make_rows((20.0,), 3, (0,)), *(make_row(dataset="digits") for _ in range(1))]
    measures = {kind: make_measures(rows)[kind] for kind in ("verdicts", "transfer")}
    names = report.write_figures(rows, tmp_path, measures)
    assert {"verdict_mnist", "verdict_digits", "transfer_mnist"} <= set(names)
    text = "\n".join(report.answer(rows, measures))
    assert "On digits: Within l∞ ≤ 0.1" in text
    assert "On mnist: Within l∞ ≤ 0.1" in text


def test_a_glance_holds_only_what_was_recorded():
    found = _networks.networks(ROWS)
    assert _settings.glance(found, {}) == [("seeds", "0")]
    run = {"matmul_precision": "bfloat16", "x64": True, "seconds": 1.0, "seconds_all_starts": 90.0}
    assert _settings.glance(found, run)[1:] == [
        ("precision", "matrix products at bfloat16, x64 enabled"),
        ("wall time", "1 min 30 s"),
    ]
