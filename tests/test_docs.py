"""The pages of `docs/`: tables are what the code says and costs, examples print what is shown."""

import importlib.util
import pathlib
import re
from typing import get_args

import jax
import numpy as np
import pytest

from jdistill import attacks, diagnose, report
from jdistill.diagnose._verdict import Label

DOCS = pathlib.Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "attacks.md").read_text(encoding="utf-8")


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_attacks = load("make_attacks")
ATTACKS = make_attacks.public_attacks()
ROWS = make_attacks.parse_table(PAGE)


def test_every_attack_has_its_row():
    tools = {"bpda", "cost", "expectation", "maximize", "softmax", "softmax_at", "traits"}
    others = {"AttackResult", "EnsembleState", "Passes", "Traits", "autoattack_names"}
    assert set(ROWS) == set(attacks.__all__) - tools - others
    for name in tools:
        assert f"attacks.{name}" in PAGE


@pytest.mark.parametrize("name", ATTACKS)
def test_what_the_code_says_is_in_the_table(name):
    cells = make_attacks.read(ATTACKS[name])
    assert len(cells) >= 7
    assert {column: ROWS[name][column] for column in cells} == cells


# The others run for many seconds.
CHEAP = ["bim", "deepfool", "fgsm", "fmn", "jsma", "pgd", "spatial", "universal"]


@pytest.mark.parametrize("name", CHEAP)
def test_what_is_measured_is_in_the_table(name):
    cells = make_attacks.measure(ATTACKS[name])
    assert {"forward", "backward", "saturated softmax"} == set(cells)
    assert {column: ROWS[name][column] for column in cells} == cells


def test_a_wrong_count_is_noticed():
    def fgsm(logits_fn, key, inputs, labels, *, eps):
        result = attacks.fgsm(logits_fn, key, inputs, labels, eps=eps)
        return result._replace(queries=result.queries + 1)

    with pytest.raises(RuntimeError, match=r"expected fgsm to have queries: 2, got 3"):
        make_attacks.measure(fgsm)


def test_the_networks_are_what_the_table_says():
    inputs, labels = make_attacks.example()
    draw = np.random.default_rng(1).uniform
    for low, high in ((0, 1), (0, 0.01), (0.99, 1)):
        random = draw(low, high, (100, *make_attacks.SHAPE)).astype(np.float32)
        logits = np.asarray(make_attacks.resisting_network()(random))
        assert np.all(logits[:, 0] - logits[:, 1:].max(axis=1) >= 1)
    plain = np.asarray(make_attacks.breakable_network()(inputs))
    assert plain.shape == (1, 10)
    assert plain.argmax() == labels[0]
    scaled = np.asarray(make_attacks.breakable_network(scale=1024.0)(inputs))
    np.testing.assert_allclose(scaled, 1024 * plain, rtol=1e-4)
    assert "1,024 times as large" in PAGE
    assert make_attacks.SATURATING == 1024


def test_the_page_knows_which_attacks_saturation_stops():
    stopped = {name for name, row in ROWS.items() if row["saturated softmax"] == "**fails**"}
    assert stopped == {
        name for name, attack in ATTACKS.items() if attacks.traits(attack).follows == "softmax"
    }
    (sentence,) = re.findall(r"attacks that climb the cross-entropy \((.*?)\)", PAGE, re.DOTALL)
    climbing = {name for name, row in ROWS.items() if row["default loss"] == "`cross_entropy`"}
    assert set(re.findall(r"`(\w+)`", sentence)) == climbing == stopped - {"jsma"}


def test_the_page_is_written_between_its_marks(tmp_path, monkeypatch):
    page = tmp_path / "attacks.md"
    page.write_text(PAGE, encoding="utf-8")
    first, last = PAGE.index("| attack | in reports |"), PAGE.index(make_attacks.END)
    table = PAGE[first:last].rstrip() + "\n"
    monkeypatch.setattr(make_attacks, "PAGE", page)
    monkeypatch.setattr(make_attacks, "make_table", lambda: table)
    make_attacks.main()
    assert page.read_text(encoding="utf-8") == PAGE
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit, match="expected the lines"):
        make_attacks.main()


def test_the_quirks_name_attacks():
    _, _, *lines = PAGE[PAGE.index("| attack | the reference's quirk |") :].splitlines()
    for line in lines:
        if not line.startswith("|"):
            break
        cells = line.strip("| ").split(" | ")
        assert len(cells) == 4, line
        names = re.findall(r"`(\w+)`", cells[0])
        assert names
        for name in names:
            name = "carlini_wagner" + name if name.startswith("_") else name
            assert hasattr(attacks, name), name


GUIDE = (DOCS / "guides/verdict.md").read_text(encoding="utf-8")


def test_the_guide_knows_every_check():
    rows = re.findall(r"^\| `(\w+)` \| .*\? \| ", GUIDE, re.MULTILINE)
    x = np.linspace(0.1, 0.9, 40, dtype=np.float32)[:, None]
    verdict = diagnose.masking(
        lambda x: 4 * (x - 0.5) @ np.array([[1.0, -1.0]], np.float32),
        jax.random.key(0),
        x,
        (x[:, 0] < 0.5).astype(np.int32),
        eps=0.05,
        num_queries=10,
    )
    assert sorted(rows) == sorted(check.name for check in verdict.checks)
    for label in get_args(Label):
        assert f"| `{label}` |" in GUIDE
    assert verdict.label == "no sign of masking"


def test_the_examples_table_is_of_its_verdicts():
    def cell(interval):
        return f"{interval.value:.1%} [{interval.low:.1%}, {interval.high:.1%}]"

    text = (DOCS / "example" / "README.md").read_text(encoding="utf-8")
    names = {0: "teacher", 2: "student, 1 assistant"}
    rows = [
        f"| T = {row['temperature']:g}, {names[row['generation']]} | "
        f"{cell(row['verdict'].worst_case)} | {cell(row['verdict'].naive)} | "
        f"{cell(row['verdict'].clean)} | {row['verdict'].label} |"
        for row in report.read_verdicts(DOCS / "example" / "verdicts.json")
        if row["generation"] in names
    ]
    assert len(rows) == 6
    assert "\n".join(rows) in text
