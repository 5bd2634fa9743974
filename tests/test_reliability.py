"""The program that damages workdirs: what it finds, and that it would find what is wrong."""

import shutil

import pytest

from experiments import reliability
from jdistill import study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reliability") / "reference"
    study.run(reliability.small_study(), folder)
    return folder


@pytest.mark.parametrize("damage", ["cut", "a digit", "deleted"])
@pytest.mark.parametrize(
    "kind", ["config.json", "results.csv", "attack shards", "checkpoint, state"]
)
def test_damage_is_mended_or_refused(reference, kind, damage):
    own, change = reliability.small_study(), reliability.DAMAGES[damage]
    path = reliability.files(reference, reliability.KINDS[kind])[0]
    content = None if change is None else change(path.read_bytes())
    found = reliability.outcome(own, reference, str(path.relative_to(reference)), content)
    assert found == ("refused" if kind == "config.json" else "remade")


def test_every_kind_has_a_file(reference):
    for pattern in reliability.KINDS.values():
        assert reliability.files(reference, pattern)


def test_other_numbers_are_noticed(reference, tmp_path, monkeypatch):
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    (other / "results.csv").write_bytes(b"other")
    found = reliability.outcome(reliability.small_study(), other, "report.html", b"")
    assert found.startswith("WRONG: other ['results.csv']")

    def fail(*_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(study, "run", fail)
    found = reliability.outcome(reliability.small_study(), reference, "report.html", b"")
    assert found == "WRONG: RuntimeError: a bug"
