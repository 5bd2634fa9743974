"""The command `experiments.bench attacks` with the real toolkits, at its smallest."""

import json

import jax
import pytest

from experiments import bench

pytest.importorskip("torch", reason="needs torch and the toolkits: make parity installs them")

pytestmark = pytest.mark.parity


def test_fgsm_beside_the_toolkits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "clear_caches", lambda: None)  # other tests want what was compiled
    output = tmp_path / "bench.md"
    arguments = ["--attacks", "fgsm", "--batch-size", "30", "--repeats", "1"]
    bench.run(bench.parse(["attacks", *arguments, "--output", str(output)]))
    (row,) = json.loads(output.with_suffix(".json").read_text())["attacks"]
    assert row["skipped"] == {}
    assert set(row["peers"]) == {"torchattacks", "foolbox"}
    for found in (row["jdistill"], *row["peers"].values()):
        assert found["median_seconds"] > 0
        # One step, the same for all of them.
        assert found["success_rate"] == row["jdistill"]["success_rate"]
    assert f"| {row['fastest_peer']} " in capsys.readouterr().out
