"""The page: every number is that of its cells, and no sentence says more than the numbers."""

import csv
import dataclasses
import html
import itertools
import json
import re
import sys
from typing import get_args

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from jdistill import _words, report
from jdistill.diagnose._verdict import Label
from jdistill.report import _claims, _networks, _sentences
from tests.report_rows import (
    CW,
    FGSM,
    JSMA,
    MARGIN,
    PGD,
    SPATIAL,
    Page,
    make_agreement,
    make_comparison,
    make_measures,
    make_pictures,
    make_row,
    make_rows,
    make_verdict,
    networks_of,
)

ROWS = make_rows((1.0, 20.0, 100.0), 3, (0,))
MEASURES = make_measures(ROWS)


def write(folder, rows=ROWS, **measures):
    """The page of a folder with these tables."""
    report.write_table(folder / "results.csv", "results", rows)
    for kind, own in measures.items():
        if kind == "verdicts":
            report.write_verdicts(folder / "verdicts.json", own)
        elif own:
            report.write_table(folder / f"{kind}.csv", kind, own)
    return Page(report.write_report(folder)["report"])


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with everything that can be measured, and its page."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "checkpoints").mkdir()
    run = {
        "versions": {"jdistill": "0.1.0", "jax": "0.10.2"},
        "devices": [{"kind": "TPU v5 lite", "count": 4}],
        "seconds": 75.0,
    }
    (folder / "run.json").write_text(json.dumps(run))
    config = {"temperatures": [1.0, 20.0], "optimizer": {"name": "sgd<b>"}, "seeds": []}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, write(folder, **MEASURES)


# --- Every number of the page --------------------------------------------------------------------


def check_numbers(folder, page):
    """Every number that names its cells, against the files, and its text against its value."""
    tables = {
        path.name: list(csv.DictReader(path.read_text().splitlines()))
        for path in folder.glob("*.csv")
    }
    path = folder / "verdicts.json"
    verdicts = json.loads(path.read_text()) if path.exists() else []
    assert page.numbers
    for value, cells, text in page.numbers:
        place, how = cells.split("|")
        file, _, rest = place.partition("#")
        column, _, rows = rest.rpartition("@")
        found = []
        for row in map(int, rows.split(",")):
            cell = verdicts[row]["verdict"] if file == "verdicts.json" else tables[file][row]
            for name in column.split("."):
                cell = cell[name]
            found.append(float(cell))
        reduce = {"mean": np.mean, "min": min, "max": max}[how]
        assert float(value) == pytest.approx(reduce(found), rel=1e-12, abs=1e-15), cells
        check_text(float(value), html.unescape(text))


def check_text(value, text):
    """A text is its value, rounded to the digits that it has."""
    plain = text.replace("−", "-").replace(",", "").replace("+", "")
    scale = 1.0
    if plain.endswith("%"):
        plain, scale = plain[:-1], 100.0
    if plain[0] in "<>":
        bound = float(plain[1:])
        assert 0 < 100 * value < bound if plain[0] == "<" else bound < 100 * value < 100
        return
    digits = len(plain.partition(".")[2]) if "e" not in plain else None
    shown = float(plain)
    candidates = [scale * value, 100 * value]  # points are hundredths without a sign of percent
    if digits is None or abs(shown) >= 1000:
        assert any(shown == pytest.approx(each, rel=6e-3) for each in candidates), (value, text)
    else:
        half = 0.5 * 10.0**-digits + 1e-9
        larger = max(half, 0.5 * 10 ** (np.floor(np.log10(max(abs(shown), 1e-9))) - 2))
        assert any(abs(shown - each) <= larger for each in candidates), (value, text)


def test_numbers_are_those_of_their_cells(written):
    folder, page = written
    check_numbers(folder, page)
    assert {cells.partition("#")[0] for _, cells, _ in page.numbers} >= {
        "results.csv",
        "verdicts.json",
        "agreement.csv",
        "calibration.csv",
        "deployment.csv",
        "comparisons.csv",
        "distances.csv",
        "transfer.csv",
    }


LABELS = ("masked", "weak attack", "no sign of masking", "inconclusive")
NONFINITE = st.sampled_from([0, 0, 3])
ATTACKS = st.lists(st.sampled_from([FGSM, PGD, MARGIN, CW, JSMA, SPATIAL]), unique=True)


@st.composite
def runs(draw):
    """Rows and measures of a run that may lack, repeat, or fail anything."""
    temperatures = draw(st.sampled_from([(1.0,), (20.0,), (1.0, 20.0), (1.0, 5.0, 100.0)]))
    seeds = draw(st.sampled_from([(0,), (0, 1), (3, 5, 8)]))
    generations = draw(st.sampled_from([1, 2, 3]))
    attacks = draw(ATTACKS)
    number = draw(st.sampled_from([3, 40, 1000]))
    share = st.integers(0, number).map(lambda count: count / number)
    rows = []
    for temperature, seed, generation in itertools.product(temperatures, seeds, range(generations)):
        where = {"temperature": temperature, "seed": seed, "generation": generation}
        accuracy = draw(share)
        columns = {
            **where,
            "num_test": number,
            "test_accuracy": accuracy,
            "test_accuracy_low": max(accuracy - 0.1, 0.0),
            "test_accuracy_high": min(accuracy + 0.1, 1.0),
            "zero_gradient_fraction": draw(share),
        }
        for attack in attacks:
            success = draw(share)
            distance = draw(st.floats(0.06, 3)) if success and attack in (CW, JSMA) else None
            rows.append(make_row(attack, success, distance, number, **columns))
        if not attacks:
            rows.append({**make_row(**columns), "attack": None, "norm": None, "eps": None})
    measures = make_measures(rows)
    measures["verdicts"] = [
        {**network, "verdict": _verdict(draw, share, number)}
        for network in networks_of(rows)
        if draw(st.booleans())
    ]
    kept = {kind: own for kind, own in measures.items() if draw(st.booleans())}
    return rows, kept


def _verdict(draw, share, number):
    naive, worst = sorted([draw(share), draw(share)], reverse=True)
    outcomes = {"unbounded": draw(st.sampled_from(["clear", "masked", "undecided", "not run"]))}
    label = draw(st.sampled_from(LABELS))
    more = {"num_examples": number, "num_nonfinite": draw(NONFINITE)}
    return make_verdict(label, naive, worst, outcomes, **more)


@hypothesis.settings(max_examples=45, deadline=None, derandomize=True)
@hypothesis.given(run=runs())
def test_any_run_gives_true_numbers_and_no_contradiction(tmp_path_factory, run):
    rows, measures = run
    folder = tmp_path_factory.mktemp("any")
    page = write(folder, rows, **measures)
    check_numbers(folder, page)
    check_consistent(page, rows, measures)


def check_consistent(page, rows, measures):
    """No sentence contradicts another, or a table."""
    items = checklist_of(page)
    answer = re.search(r'<section class="answer ([\w-]+)">', page.source)[1]
    verdicts = [row["verdict"] for row in measures.get("verdicts", [])]
    tried = {row["norm"] for row in rows if row["attack"] and row["attack"] != "spatial"}
    tried |= {verdict.norm for verdict in verdicts}
    tried |= {row["norm"] for kind in ("distances", "curves") for row in measures.get(kind, [])}
    other = re.search(r"Perturbations other than (.*?)\.", page.text)
    for norm in tried:
        assert _words.norm_name(norm) in other[1], "a norm that was tried is 'not tried'"
    missing = re.search(r"Not done in this run: (.*?)\.", page.text)
    for kind, words in _claims._KINDS.items():
        there = bool(measures.get(kind))
        assert there != bool(missing and words in missing[1]), kind
    # The label of the answer goes with the checks and the numbers beside it.
    assert answer in {label.replace(" ", "-") for label in LABELS} if verdicts else True
    assert ("No verdict was asked for" in page.text) or verdicts
    if answer == "no-sign-of-masking":
        assert "no check points to masked gradients" in page.text
    # A box that says passed is not one of a problem that stands elsewhere on the page.
    if any(row["attack"] for row in rows):
        assert "No attack was made" not in page.text
    if "fails on some examples" in page.text:
        assert items["Full success without a bound"] == "problem found"
    # JSMA may change a limited number of features only.
    unbounded = [row for row in rows if row["attack"] == "carlini_wagner_l2"]
    unbounded += measures.get("distances", [])
    made = any(c.outcome != "not run" for v in verdicts for c in v.checks if c.name == "unbounded")
    if unbounded:
        assert items["Full success without a bound"] != "not done"
    elif not made:
        assert items["Full success without a bound"] == "not done"
    has_seeds = len({row["seed"] for row in rows}) > 1
    assert ("One seed:" in page.text) == (not has_seeds)
    assert (items["The worst case of every example over all attacks"] == "passed") == bool(verdicts)


def checklist_of(page):
    """The state of every item."""
    pattern = r'<li><span class="state[^"]*">([^<]*)</span><b>(.*?)\.</b>'
    return {html.unescape(title): state for state, title in re.findall(pattern, page.source)}


# --- What was wrong before -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "number", "case"),
    [
        # (a) However small p is, of one seed it is about these two networks.
        ({"seed": 0, "low": 0.1, "high": 0.2, "p_value": 5e-7}, 20, "one seed"),
        ({"seed": 0, "low": 0.1, "high": 0.2, "p_value": 0.04}, 20, "many"),
        ({"low": 0.1, "high": 0.2, "p_value": 5e-7, "difference": 0.15}, 20, "higher"),
        ({"low": -0.2, "high": -0.1, "p_value": 5e-7, "difference": -0.15}, 20, "lower"),
        ({"low": 0.1, "high": 0.2, "p_value": 0.04}, 20, "many"),
        ({"low": 0.1, "high": 0.2, "p_value": 0.04, "difference": 0.15}, 1, "higher"),
        ({"low": 0.1, "high": 0.2, "p_value": 0.2}, 20, "disagree"),
        ({}, 20, "not shown"),
        ({"p_value": None}, 20, "untested"),
    ],
)
def test_what_a_comparison_supports(change, number, case):
    assert _claims.support(make_comparison(**change), number) == case


def test_a_difference_of_one_seed_lacks_a_second(tmp_path):
    row = make_comparison(seed=0, low=0.1, high=0.2, difference=0.15, p_value=5e-7)
    page = write(tmp_path, comparisons=[row])
    assert "of the method one seed says nothing" in page.text
    assert "1 comparison of chains found 1 difference between two networks, each on" in page.text
    assert "as one of" not in page.text


def judged_rows(*verdicts):
    """Verdicts for (temperature, generation, verdict)s of seed 0."""
    where = {"dataset": "mnist", "seed": 0}
    return [
        {**where, "temperature": T, "generation": generation, "verdict": verdict}
        for T, generation, verdict in verdicts
    ]


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("masked", "Do not trust the 95.0% that the student with 1 assistant at T = 100 keeps"),
        (
            "weak attack",
            "keeps 70.0% (95% interval 63.6% to 76.4%) of 200 examples within l∞ ≤ 0.1, not",
        ),
        (
            "no sign of masking",
            "keeps 70.0% (95% interval 63.6% to 76.4%) of 200 examples within l∞ ≤ 0.1 against",
        ),
        ("inconclusive", "What was tried cannot tell how far to trust the 95.0%"),
    ],
)
def test_the_answer_is_the_verdict(tmp_path, label, words):
    """(b) The gap is in the headline, and no label is praise."""
    verdicts = judged_rows((100.0, 2, make_verdict(label, 0.95, 0.7)))
    page = write(tmp_path, verdicts=verdicts)
    assert words in page.text
    assert "No verdict was asked for on the ordinary network at T = 1" in page.text
    assert "green" not in page.source


@pytest.mark.parametrize(
    ("worst", "base", "case"),
    [(0.9, 0.5, "higher"), (0.3, 0.8, "lower"), (0.72, 0.7, "overlap")],
)
def test_what_a_defense_gains(worst, base, case):
    rows = judged_rows(
        (1.0, 0, make_verdict("weak attack", 0.9, base)),
        (100.0, 2, make_verdict("masked", 0.95, worst)),
    )
    found = _networks.networks(ROWS)
    judged = _networks.judged(found, _networks.numbered(rows))
    network = _claims.subject(found, judged)
    claim = _claims.gain(network, _claims.baseline(found, network), judged)
    assert claim.case == case


def test_a_problem_is_not_done(tmp_path):
    """(c) An item that found a problem says so."""
    checks = judged_rows((100.0, 2, make_verdict("masked", 0.9, 0.5, {"eps_curve": "masked"})))
    items = checklist_of(write(tmp_path, verdicts=checks))
    assert items["Success grows with the budget"] == "problem found"
    assert items["Random noise is not stronger"] == "passed"
    assert items["Try an attack that sees the predicted class alone"] == "not done"


def test_attacks_are_known_by_their_facts(tmp_path):
    """(d) A row's display name decides nothing."""
    rows = [make_row(CW, 1.0, 1.4), make_row(FGSM)]
    items = checklist_of(write(tmp_path / "known", rows))
    assert items["Full success without a bound"] == "passed"
    assert items["Adapt the attack: avoid the softmax at T = 1"] == "passed"
    plain = [{**row, **dict.fromkeys(report.FACTS), "title": "C&W"} for row in rows]
    items = checklist_of(write(tmp_path / "unknown", plain))
    assert items["Adapt the attack: avoid the softmax at T = 1"] == "not done"


def test_a_norm_that_was_measured_was_tried(tmp_path):
    """(e) Wherever it stands."""
    row = {"dataset": "mnist", "temperature": 1.0, "seed": 0, "generation": 0, "norm": "l0"}
    row |= {"attack": "fmn", "success_rate": 1.0, "mean": 9.0, "median": 8.0, "num_examples": 9}
    page = write(tmp_path, [make_row()], distances=[row])
    assert "Perturbations other than l0 and l∞." in page.text
    assert checklist_of(page)["More than one norm"] == "passed"


def test_what_a_reader_must_know_first(tmp_path):
    """(f) Networks that hardly learned, and attacks that fail without a bound."""
    low = {"test_accuracy": 0.2, "test_accuracy_low": 0.1, "test_accuracy_high": 0.3}
    page = write(tmp_path, [make_row(CW, 0.4, 1.0, **low), make_row(FGSM, **low)])
    first = page.text[: page.text.index("Every attack on every network")]
    assert "mnist: fewer than half of the test examples are classified correctly" in first
    assert "C&W L2 may change an input as far as it needs, and yet fails" in first
    assert checklist_of(page)["Full success without a bound"] == "problem found"


def test_a_defense_that_costs_accuracy_says_so():
    rows = [
        make_row(),
        make_row(
            temperature=20.0,
            generation=1,
            test_accuracy=0.8,
            test_accuracy_low=0.78,
            test_accuracy_high=0.82,
        ),
    ]
    assert "costs" in {claim.case for claim in _claims.warnings(_networks.networks(rows), [])}


def test_a_network_is_not_compared_with_itself(tmp_path):
    """(h) T = 1 alone."""
    page = write(
        tmp_path, [make_row()], verdicts=judged_rows((1.0, 0, make_verdict("masked", 1, 0)))
    )
    assert "by the same measure" not in page.text.lower()
    assert "How robust are networks on mnist?" in page.text


def test_the_gravest_label_of_any_seed_stands():
    rows = [make_row(seed=seed) for seed in (0, 1)]
    verdicts = [
        {"dataset": "mnist", "temperature": 1.0, "seed": seed, "generation": 0, "verdict": verdict}
        for seed, verdict in enumerate(
            [make_verdict("no sign of masking", 0.9, 0.9), make_verdict("masked", 0.8, 0.5)]
        )
    ]
    (item,) = _networks.judged(_networks.networks(rows), _networks.numbered(verdicts))
    assert item.label == item.shown.label == "masked"
    assert item.naive.mean == pytest.approx(0.85)
    assert (item.naive.low, item.naive.high) == pytest.approx(
        (verdicts[1]["verdict"].naive.low, verdicts[0]["verdict"].naive.high)
    )


def two_seeds(*pairs, **columns):
    """Verdicts of seeds 0, 1, … of one network."""
    where = {"dataset": "mnist", "temperature": 1.0, "generation": 0, **columns}
    return [{**where, "seed": seed, "verdict": verdict} for seed, verdict in enumerate(pairs)]


CHAINS = [
    {**make_row(temperature=20.0, generation=generation), "chain": chain}
    for chain in ("large", "small")
    for generation in (0, 1)
]
OF_CHAINS = [
    {**row, "chain": chain}
    for chain, verdict in (
        ("large", make_verdict("no sign of masking", 0.5, 0.5)),
        ("small", make_verdict("masked", 0.95, 0.02)),
    )
    for row in judged_rows((20.0, 1, verdict))
]
NONE = ("repeated_mistakes", "repeated_mistakes_low", "repeated_mistakes_high")
OF_ANOTHER = make_agreement(
    {"dataset": "mnist", "chain": "small", "temperature": 20.0, "seed": 0, "generation": 1},
    0.5,
    **{"teacher_chain": "large", "num_teacher_mistakes": 0, **dict.fromkeys(NONE)},
)
FMN = {
    **{"dataset": "mnist", "temperature": 1.0, "seed": 0, "generation": 0, "norm": "l0"},
    **{"attack": "fmn", "success_rate": 0.3, "mean": 9.0, "median": 8.0, "num_examples": 9},
}
WITHOUT_ENDS = {"success_rate_low": None, "success_rate_high": None}
SAID = {
    "an attack without a success": (
        [make_row(CW, 0.0)],
        {},
        "C&W L2 succeeds on 0%",
        "nothing here says",
    ),
    "an attack that no norm bounds": (
        [make_row(SPATIAL, 0.3)],
        {},
        "succeeds on 30.0%",
        "nothing here says",
    ),
    "the subject alone was not attacked": (
        [make_row(), {**make_row(temperature=20.0, generation=1), "attack": None, "norm": None}],
        {},
        "FGSM within l∞ ≤ 0.1 succeeds",
        "No attack was made",
    ),
    "another radius has more": (
        [make_row(FGSM, 0.3), make_row(("pgd", "linf", 0.3), 0.99)],
        {},
        "no other attack at this radius succeeds on more",
        "the most of the attacks",
    ),
    "one of two seeds fails": (
        [make_row(CW, success, 1.0, seed=seed) for seed, success in enumerate((0.2, 0.97))],
        {},
        "C&W L2 fails on some examples",
        "C&W L2 and l",
    ),
    "one of two seeds is masked": (
        [make_row(seed=seed) for seed in (0, 1)],
        {
            "verdicts": two_seeds(
                make_verdict("no sign of masking", 0.7, 0.7), make_verdict("masked", 0.9, 0.1)
            )
        },
        "Its 2 seeds were not judged alike: masked on 1 and no sign of masking on 1",
        "seed 0: masked",
    ),
    "two radii": (
        [make_row(), make_row(temperature=20.0, generation=1)],
        {
            "verdicts": judged_rows(
                (1.0, 0, make_verdict("weak attack", 0.9, 0.5)),
                (20.0, 1, dataclasses.replace(make_verdict("masked", 0.9, 0.1), eps=0.2)),
            )
        },
        "The ordinary network at T = 1 was judged on other examples, seeds, or radii",
        "No verdict was asked for",
    ),
    "two chains": (
        CHAINS,
        {"verdicts": OF_CHAINS},
        "masked for the student without an assistant of small at T = 20",
        "Others: masked for T",
    ),
    "a teacher of another chain, without a mistake": (
        CHAINS,
        {"agreement": [OF_ANOTHER]},
        "small, T = 20 studentteacher of large 50.0%49.0%–51.0% 0 – 20.1 0.490",
        "nan",
    ),
    "two networks without distillation": (
        [{**make_row(), "chain": chain} for chain in ("a", "b")],
        {},
        "2 networks · 1 seed",
        "2 chains",
    ),
    "JSMA may not go as far as it needs": ([make_row(JSMA, 0.2, 9.0)], {}, "JSMA", "as far as it"),
    "distances alone": ([make_row()], {"distances": [FMN]}, "fmn l0 fails on some", "one value"),
    "no comparison was tested": (
        [make_row(), make_row(generation=1), make_row(generation=2)],
        {"comparisons": [make_comparison(temperature=1.0, p_value=None)]},
        "no comparison could be tested",
        "established",
    ),
    "one step without intervals": (
        [make_row(FGSM, 0.9, **WITHOUT_ENDS), make_row(PGD, 0.1, **WITHOUT_ENDS)],
        {},
        "No attack of one step stands beside one of many, with intervals",
        "Compared on",
    ),
    "scores alone": ([make_row(("square", "linf", 0.1))], {}, "Square", "knows all weights"),
    "mathematics in a title": (
        [{**make_row(), "title": "$x_$"}],
        {},
        "$x_$ within",
        "nothing here says",
    ),
    "a column of the name that places have": ([{**make_row(), "row": "first"}], {}, "FGSM", "nan"),
    "no test examples": ([make_row(num_test=None)], {}, "1 network · 1 seed", "no test examples"),
}


@pytest.mark.parametrize("name", SAID)
def test_what_the_page_says(tmp_path, name):
    """Tables of which a page once said something false, or ended in a traceback."""
    rows, measures, said, unsaid = SAID[name]
    page = write(tmp_path, rows, **measures)
    assert said in page.text
    assert unsaid not in page.text
    check_numbers(tmp_path, page)


@pytest.mark.parametrize("change", [{"chain": "unknown"}, {"seed": 7}])
def test_tables_about_unknown_networks_are_refused(tmp_path, change):
    row = {**judged_rows((1.0, 0, make_verdict("masked", 0.9, 0.1)))[0], **change}
    with pytest.raises(ValueError, match="expected verdicts about networks of results"):
        write(tmp_path, [make_row()], verdicts=[row])


@pytest.mark.parametrize("recipe", ["mnist", ["a"], {"seconds": "long"}])
def test_any_settings_are_shown(tmp_path, recipe):
    (tmp_path / "config.json").write_text(json.dumps({"recipe": recipe}))
    (tmp_path / "run.json").write_text(json.dumps({"seconds_all_starts": "long"}))
    assert "long" in write(tmp_path, [make_row()]).text


# --- The page as a page --------------------------------------------------------------------------


def test_it_is_short_and_needs_nothing_beside_it(written):
    folder, page = written
    assert len(page.text.split()) <= 3500
    for tag, attributes in page.tags:
        assert tag != "script"
        for name in ("src", "href"):
            where = attributes.get(name) or "#"
            assert where.startswith(("data:", "#")) or (folder / where).exists()
    ids = re.findall(r'\bid="([^"]+)"', page.source)
    assert len(ids) == len(set(ids))
    text = page.text
    for wrong in ("nan", "not to be believed", " %", "–%"):
        assert wrong not in text, wrong
    assert "{" not in text[: text.index("verdicts.json {")]  # but for the settings


def test_settings_and_machine_are_escaped_and_listed(written):
    _, page = written
    assert "sgd&lt;b&gt;" in page.source
    for words in ("optimizer", '"jax": "0.10.2"', "TPU v5 lite", '"seconds": 75.0'):
        assert words in page.text


def test_figures_are_files_and_the_same_bytes(written, tmp_path):
    folder, page = written
    names = sorted(path.name for path in (folder / "figures").iterdir())
    assert {"verdict.svg", "attacks.svg", "curve-eps.svg", "curve-steps.svg"} <= set(names)
    before = {name: (folder / "figures" / name).read_bytes() for name in names}
    html_before = (folder / "report.html").read_bytes()
    report.write_report(folder)
    assert before == {name: (folder / "figures" / name).read_bytes() for name in names}
    assert (folder / "report.html").read_bytes() == html_before
    assert page.source.count("<svg") == len(names)


def test_figures_draw_the_numbers_of_the_rows(written):
    folder, _ = written
    svg = (folder / "figures" / "attacks.svg").read_text()
    for attack in ("fgsm", "pgd", "carlini_wagner_l2"):
        for generation in range(3):
            assert re.search(rf'id="{attack} \w+ \S+ success generation={generation}"', svg)
    curves = (folder / "figures" / "curve-steps.svg").read_text()
    assert 'id="steps pgd T=100 generation=2"' in curves


def test_chains_stand_apart_and_are_compared(tmp_path):
    rows = [
        {**make_row(generation=generation), "chain": chain}
        for chain in ("small", "large")
        for generation in (0, 1)
    ]
    row = make_comparison(generation=1, temperature=1.0, low=0.1, high=0.2, p_value=1e-6)
    page = write(tmp_path, rows, comparisons=[{**row, "chain": "large", "baseline_chain": "small"}])
    assert "large, T = 1 student" in page.text
    assert "T = 1, large student, no assistant" in page.text
    assert "small student, no assistant" in page.text


def test_pictures_are_shown(tmp_path):
    report.write_table(tmp_path / "results.csv", "results", [make_row()])
    files = report.write_report(tmp_path, pictures={20.0: make_pictures(), "mine": make_pictures()})
    assert {"pictures_T20", "pictures_mine"} <= set(files)
    page = Page(files["report"])
    assert sum(tag == "img" for tag, _ in page.tags) == 2


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError):
        report.write_report(tmp_path)
    report.write_table(tmp_path / "results.csv", "results", [make_row()])
    report.write_table(tmp_path / "curves.csv", "curves", MEASURES["curves"])
    with pytest.raises(ValueError, match=r"expected curves about networks of results\.csv, got"):
        report.write_report(tmp_path)
    (tmp_path / "curves.csv").unlink()
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"expected JSON in .*run\.json"):
        report.write_report(tmp_path)


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, package):
    report.write_table(tmp_path / "results.csv", "results", [make_row()])
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jdistill\[study\]'"):
        report.write_report(tmp_path)


def test_colors_can_be_told_from_the_page():
    """Contrast of at least 3:1, in the light and in the dark; grid lines apart."""
    from jdistill.report import _figures

    def luminance(color):
        parts = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
        linear = np.where(parts <= 0.03928, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    for light, dark in _figures.DARK.items():
        if light == _figures.LINE:
            continue
        for color, page in ((light, "#ffffff"), (dark, "#14181c")):
            one, other = sorted([luminance(color), luminance(page)])
            assert (other + 0.05) / (one + 0.05) >= 3, color


def test_every_label_has_its_sentence():
    assert set(LABELS) == set(get_args(Label)) == set(_networks.LABELS)
    assert set(LABELS) <= set(_sentences.ANSWERS)
