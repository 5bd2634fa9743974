"""The prepared run on an accelerator: its checks notice what differs, and nothing stops it."""

import json
import os
import pathlib
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import device, device_attacks, device_checks, device_precisions, device_times
from experiments.device import Part
from experiments.device_attacks import NETWORKS, Outcome
from experiments.device_checks import Reference
from jdistill import attacks, nets

ROOT = pathlib.Path(__file__).parents[1]
ATTACKS = ("fgsm", "ddn")
NAMES = ["fgsm linf", "fgsm l2", "fgsm l1", "ddn"]
# What training gives, where a test is not about training.
LOSSES, ACCURACIES = [2.3, 2.2, 2.0], [0.9, 0.8, 0.7]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The file of a tiny reference: two attacks on a few images, and the numbers above."""
    path = tmp_path_factory.mktemp("device") / "new" / "reference.npz"
    with pytest.MonkeyPatch.context() as patch:
        no_training(patch)
        device_checks.write_reference(path, names=ATTACKS, num_images=6)
    return path


def no_training(patch):
    patch.setattr(device_checks, "training_losses", lambda precision: LOSSES)
    patch.setattr(device_checks, "chain_accuracies", lambda *arguments: ACCURACIES)


def run(folder, reference, *parts, budget=600.0):
    """The exit code, and what is in the file."""
    arguments = ["run", "--reference", str(reference), "--output", str(folder), "--size", "small"]
    code = device.run(
        device.parse([*arguments, "--budget-s", str(budget), "--parts", *(parts or device.PARTS)])
    )
    return code, json.loads((folder / "device.json").read_text())


def changed(reference, path, **meta):
    """A copy of the reference in which an attack found the opposite, and `meta` is changed."""
    with np.load(reference) as file:
        arrays = {name: file[name] for name in file.files}
    flags = f"outcomes/{NAMES[0]}/{NETWORKS[0]}/success"
    arrays[flags] = ~arrays[flags]
    arrays["meta"] = json.dumps(json.loads(arrays["meta"].item()) | meta)
    np.savez(path, **arrays)
    return path


def test_every_attack_is_a_case_in_every_norm():
    there = device_attacks.cases()
    assert len({case.name for case in there}) == len(there)
    found = {attacks.traits(case.attack).name for case in there}
    assert {"pgd", "square", "ddn", "autoattack", "ensemble", "universal", "transfer"} <= found
    assert not found & {"maximize", "cost", "traits", "softmax", "autoattack_names"}
    for case in there:
        traits = attacks.traits(case.attack)
        alike = [other for other in there if other.name.split()[0] == traits.name]
        assert len(alike) == max(len(traits.norms), 1) or " " not in case.name
        assert traits.settings.get("num_steps", 0) <= 20
        assert "0x" not in case.settings  # the same text in every process
        # Runs nothing, but the attack checks its settings.
        assert attacks.cost(case.attack, shape=(28, 28, 1), num_classes=10).forward < 20_000
    with pytest.raises(ValueError, match="expected attacks among apgd"):
        device_attacks.cases(["nothing"])


def test_a_device_that_agrees_passes(reference, tmp_path, monkeypatch, capsys):
    no_training(monkeypatch)
    code, content = run(tmp_path, reference, "attacks", "training", "chain")
    assert code == 0
    assert content["failures"] == []
    assert not content["reference"]["stale"]
    assert {entry["status"] for entry in content["parts"].values()} == {"done"}
    rows = {row["attack"]: row for row in content["parts"]["attacks"]["rows"]}
    assert sorted(rows) == sorted(NAMES)
    for row in rows.values():
        assert (row["examples"], row["share"], row["passed"]) == (12, 1.0, True)
        assert row["equal"] + row["ties"] == 12
    assert rows["ddn"]["mean_distance_ratio"] == 1.0
    assert [row["device"] for row in content["parts"]["training"]["rows"]] == LOSSES
    generations = [row["generation"] for row in content["parts"]["chain"]["rows"]]
    assert generations == ["teacher", "assistant", "student"]
    printed = capsys.readouterr().out
    assert "every check that was made passed" in printed
    assert "| fgsm linf | 12 " in printed
    assert "| equal at highest |" in printed


def test_a_device_that_differs_fails(reference, tmp_path, monkeypatch, capsys):
    no_training(monkeypatch)
    bad = changed(
        reference,
        tmp_path / "bad.npz",
        losses=[*LOSSES[:-1], LOSSES[-1] * 1.01],
        accuracies=[ACCURACIES[0] - 0.05, *ACCURACIES[1:]],
    )
    code, content = run(tmp_path, bad, "attacks", "training", "chain")
    assert code == 1
    assert content["failures"] == [f"attacks: {NAMES[0]}", "training: 3", "chain: teacher"]
    (row,) = [row for row in content["parts"]["attacks"]["rows"] if row["passed"] is False]
    assert row["equal"] <= 6
    assert row["different"][0] in range(6)
    assert f"failed: attacks: {NAMES[0]}" in capsys.readouterr().out


@pytest.mark.slow
def test_training_agrees_with_itself(reference, tmp_path, monkeypatch):
    """The losses and the chain as they are, short."""
    monkeypatch.setattr(device_checks, "LOSS_STEPS", 3)
    monkeypatch.setattr(device_checks, "LOSS_BATCH", 16)
    losses = device_checks.training_losses("highest")
    np.testing.assert_allclose(losses, np.log(10), atol=0.1)  # it has learned nothing yet
    assert len(set(losses)) == 3
    accuracies = device_checks.chain_accuracies(device_checks.digits(), "highest", 3)
    assert max(accuracies) > 0.15  # and more than chance
    path = changed(
        reference, tmp_path / "own.npz", losses=losses, accuracies=accuracies, num_epochs=3
    )
    code, content = run(tmp_path, path, "training", "chain")
    assert (code, content["failures"]) == (0, [])


def test_a_reference_of_other_settings_or_sources_is_noticed(reference, tmp_path, capsys):
    cases = json.loads(np.load(reference)["meta"].item())["cases"]
    old = changed(
        reference, tmp_path / "old.npz", cases=cases | {NAMES[0]: "eps=9"}, sources="another"
    )
    code, content = run(tmp_path, old, "attacks")
    assert (code, content["failures"]) == (1, [f"attacks: {NAMES[0]}"])
    assert content["reference"]["stale"]
    printed = capsys.readouterr().out
    assert "made with eps=9; make it anew" in printed
    assert "has changed since" in printed


def test_fewer_bits_are_shown_and_fail_nothing(reference, tmp_path, capsys):
    bad = changed(reference, tmp_path / "bad.npz")
    code, content = run(tmp_path, bad, "attacks_bf16", "attacks_tf32")
    assert (code, content["failures"]) == (0, [])
    rows = content["parts"]["attacks_bf16"]["rows"]
    assert len(rows) == len(NAMES)
    assert {row["passed"] for row in rows} == {None}
    assert "| equal at highest | equal at TF32 | equal at bf16 |" in capsys.readouterr().out


@pytest.mark.parametrize(("precision", "dropped"), [("TF32", 13), ("bf16", 16)])
def test_operands_are_rounded(precision, dropped):
    """Of one dense layer, to the nearest even number with so many bits fewer."""

    def rounded(values):
        bits = np.asarray(values, np.float32).view(np.uint32)
        bits = bits + (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
        return (bits >> dropped << dropped).view(np.float32)

    model = nets.ConvNet(features=(), hidden=(), num_classes=3)
    draws = np.random.default_rng(0)
    inputs = draws.uniform(size=(5, 2, 2, 1)).astype(np.float32)
    kernel, bias = draws.normal(size=(4, 3)).astype(np.float32), np.float32([0.1, 0.2, 0.3])
    variables = {"params": {"logits": {"kernel": kernel, "bias": bias}}}
    logits_fn = device_attacks._logits_fn(model, variables, precision)
    exact = rounded(inputs.reshape(5, 4) - np.float32(0.5)).astype(float) @ rounded(kernel)
    np.testing.assert_allclose(logits_fn(inputs), exact + bias, rtol=1e-6, atol=1e-6)
    assert np.abs(exact + bias - nets.logits_fn(model, variables)(inputs)).max() > 2.0**-dropped
    gradient = jax.grad(lambda images: jnp.sum(logits_fn(images)[:, 0]))(inputs)
    np.testing.assert_array_equal(gradient[0].reshape(4), rounded(kernel)[:, 0])


def test_ties_on_either_side_are_left_out():
    def outcome(success, ties):
        return {
            name: Outcome(np.array(success), np.array(ties), np.array([1.0, 2.0, 0.0]))
            for name in NETWORKS
        }

    (case,) = device_attacks.cases(["ddn"])
    ours = outcome([True, False, False], [False, True, False])
    theirs = outcome([False, True, False], [True, False, False])
    row = device_checks.compared(case, ours, theirs)
    assert (row["examples"], row["ties"], row["equal"], row["share"]) == (6, 4, 2, 1.0)
    assert row["passed"]
    no_ties = outcome([False, True, False], [False, False, False])
    row = device_checks.compared(case, ours, no_ties)
    assert (row["ties"], row["share"], row["passed"]) == (2, 0.5, False)
    assert row["different"].tolist() == [0, 3]


def part(rows, title="A part"):
    return Part(title, {"what": lambda row: str(row["what"])}, rows, least_s=5)


def test_a_part_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def fails(_):
        yield {"what": 1}
        raise RuntimeError("out of memory")

    def works(_):
        yield {"what": 2}

    monkeypatch.setattr(device, "PARTS", {"first": part(fails), "second": part(works)})
    code, content = run(tmp_path, tmp_path / "missing.npz")
    assert code == 1
    assert content["failures"] == ["first (RuntimeError: out of memory)"]
    assert content["parts"]["first"]["rows"] == [{"what": 1}]
    assert content["parts"]["second"]["status"] == "done"
    assert "failed: RuntimeError: out of memory" in capsys.readouterr().out


def test_an_attack_that_fails_is_a_row(reference, tmp_path, monkeypatch):
    def broken(case, *arguments):
        if case.name == NAMES[1]:
            raise RuntimeError("no such kernel")
        return attack(case, *arguments)

    attack = device_attacks._attack
    monkeypatch.setattr(device_attacks, "_attack", broken)
    code, content = run(tmp_path, reference, "attacks")
    assert (code, content["failures"]) == (1, [f"attacks: {NAMES[1]}"])
    rows = {row["attack"]: row for row in content["parts"]["attacks"]["rows"]}
    assert rows[NAMES[1]]["error"] == "RuntimeError: no such kernel"
    assert rows[NAMES[0]]["passed"]


def test_without_a_reference_the_checks_fail_and_say_so(tmp_path):
    code, content = run(tmp_path, tmp_path / "missing.npz", "training")
    assert code == 1
    assert "make device-reference" in content["parts"]["training"]["error"]


def test_a_run_that_is_cut_leaves_its_rows(tmp_path, monkeypatch):
    def cut(_):
        yield {"what": 1}
        seen.append(json.loads((tmp_path / "device.json").read_text()))
        raise KeyboardInterrupt

    seen = []
    monkeypatch.setattr(device, "PARTS", {"first": part(cut), "second": part(cut)})
    with pytest.raises(KeyboardInterrupt, match="holds what was done"):
        run(tmp_path, tmp_path / "missing.npz")
    (while_running,) = seen
    assert while_running["parts"]["first"]["status"] == "running"
    content = json.loads((tmp_path / "device.json").read_text())
    assert content["parts"]["first"]["status"] == "cut"
    assert content["parts"]["first"]["rows"] == [{"what": 1}]
    assert "second" not in content["parts"]


def test_what_does_not_fit_is_skipped(reference, tmp_path, monkeypatch, capsys):
    def never(_):
        raise AssertionError

    monkeypatch.setattr(device, "PARTS", {"long": part(never)})
    code, content = run(tmp_path, reference, budget=4.0)
    assert (code, content["parts"]["long"]["status"]) == (0, "skipped")
    assert "skipped: long" in capsys.readouterr().out


def test_attacks_for_which_no_time_is_left_are_rows(reference):
    there = device_checks.read_reference(reference)
    rows = list(device_checks.check_attacks(there, "highest", time.monotonic() - 1))
    assert {row["attack"] for row in rows} == set(NAMES)
    assert {row["skipped"] for row in rows} == {"no time left"}


def test_what_runs_when_the_time_is_over_is_waited_for(monkeypatch):
    """Or it would disturb what is timed next; what has not begun is left."""

    def slow(*_):
        time.sleep(0.5)
        ended.append(time.monotonic())
        return {}

    ended = []
    monkeypatch.setattr(device_attacks, "_attack", slow)
    monkeypatch.setattr(device_attacks, "_cores", lambda: 2)
    chosen = device_attacks.cases(["fgsm", "ddn"])
    there, deadline = device_attacks.work(1), time.monotonic() + 0.1
    found = {
        case.name: result
        for case, result in device_attacks.attack_all(chosen, there, deadline=deadline)
    }
    assert found == {"fgsm linf": {}, "fgsm l2": {}, "fgsm l1": None, "ddn": None}
    assert max(ended) < time.monotonic()
    assert len(ended) == 2


@pytest.mark.parametrize(
    ("kind", "float32"),
    [
        ("NVIDIA H200", 67e12),
        ("NVIDIA H100 80GB HBM3", 67e12),
        ("NVIDIA H100 PCIe", 51e12),
        ("NVIDIA A100-SXM4-40GB", 19.5e12),
        ("Tesla T4", 8.1e12),
        ("NVIDIA L4", 30.3e12),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_known_devices(kind, float32):
    peak = device_times.known_peak(kind)
    assert (peak and peak.float32) == float32


@pytest.mark.slow
def test_exports_and_the_cache(reference, tmp_path):
    arguments = ["--reference", str(reference), "--output", str(tmp_path), "--size", "small"]
    command = [sys.executable, "-m", "experiments.device", "run", "--parts", "export", "cache"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    content = json.loads((tmp_path / "device.json").read_text())
    assert (done.returncode, content["failures"]) == (0, []), done.stderr
    rows = content["parts"]["export"]["rows"]
    assert [row["read"] for row in rows] == ["load", "load_stablehlo"] * len(NETWORKS)
    [row] = content["parts"]["cache"]["rows"]
    assert row["from_cache"] >= row["compiled"] > 0  # equal programs are compiled once


def test_it_imports_what_a_bare_machine_has():
    """Of the declared dependencies, only those that the docstring lists."""
    code = """
import sys
import experiments.device
missing = {"tensorflow_datasets", "tyro", "tqdm", "matplotlib", "sklearn", "jinja2", "PIL",
           "orbax", "tensorstore", "chex", "scipy", "torch", "array_record", "importlib_resources"}
print(*sorted(missing & set(sys.modules)))
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout.strip()) == (0, ""), found.stderr


@pytest.mark.slow
def test_times_at_small_size(tmp_path, capsys):
    parts = ("steps", "sweep", "pgd", "roofline", "carlini_wagner")
    code, content = run(tmp_path, tmp_path / "missing.npz", *parts)
    assert code == 0, content["failures"]
    for name in parts:
        for row in content["parts"][name]["rows"]:
            assert row["ours_s"] > 0
    swept = content["parts"]["sweep"]["rows"]
    assert [row["name"].split(", ")[-1] for row in swept] == ["under lax.map", "under vmap"]
    mapped, vmapped = (row["facts"]["megabytes"] for row in swept)
    assert 0 < mapped[0] < vmapped[0]  # one run's activations, or those of all
    assert 0 < mapped[1] == vmapped[1]
    assert len(content["parts"]["pgd"]["rows"]) == 2
    rates = content["parts"]["roofline"]["rows"]
    assert len(rates) == 5
    assert all(row["rate"] > 0 and row["peak"] is None for row in rates)
    assert "– " in capsys.readouterr().out


def test_differences_are_paired_over_seeds(reference, tmp_path, monkeypatch, capsys):
    """And where all seeds differ alike, there is no interval."""
    found = {
        device_precisions.FULL: [0.9, 0.8, 0.7],
        device_precisions.TF32: [0.9, 0.8, 0.7],
        device_precisions.BF16: [0.8, 0.7, 0.6],
        device_precisions.HALF: [0.7, 0.8, 0.6],
    }

    def chains(examples, precision, *sizes):
        assert len(examples["labels"]) > 1000
        assert sizes == device_times.SIZES["small"].precisions
        return {"accuracy": np.array(found[precision])}

    monkeypatch.setattr(device_precisions, "chains", chains)
    code, content = run(tmp_path, reference, "precisions")
    assert (code, content["failures"]) == (0, [])
    rows = {row["precision"]: row for row in content["parts"]["precisions"]["rows"]}
    assert [rows[name]["difference"] for name in found if name in rows] == pytest.approx(
        [0, -0.1, -0.1]
    )
    assert rows[device_precisions.TF32]["interval"] == [0, 0]
    assert rows[device_precisions.BF16]["interval"] is None
    low, high = rows[device_precisions.HALF]["interval"]
    assert (low + high) / 2 == pytest.approx(-0.1)
    assert high - low == pytest.approx(2 * 4.303 * 0.1 / 3**0.5, rel=1e-3)  # Student's t
    assert all("not measured on an accelerator" in row["note"] for row in rows.values())
    assert "| -0.1000 | – |" in capsys.readouterr().out


@pytest.mark.slow
def test_training_at_precisions():
    """On a CPU the products are float32's to the bit, and rounded activations are not."""
    few = {name: value[:64] for name, value in device_checks.digits().items()}
    full, tf32, half = (
        device_precisions.chains(few, precision, 2, 1)
        for precision in (device_precisions.FULL, device_precisions.TF32, device_precisions.HALF)
    )
    assert list(full) == [
        "teacher's training loss, epoch 1",
        *(f"test accuracy, {name}" for name in device_checks.GENERATIONS),
    ]
    for quantity, values in full.items():
        assert values.shape == (2,)
        np.testing.assert_array_equal(tf32[quantity], values)
    loss = next(iter(full))
    assert 0 < np.abs(half[loss] - full[loss]).max() < 0.05


def test_shares_of_a_stated_peak(monkeypatch):
    reference = Reference({}, {}, {}, {})
    subject = device.Run(lambda: reference, device_times.SIZES["small"], None, 0.0)
    row = {
        **dict(name="product", ours_s=0.5, compile_s=None, unit="FLOP/s", rate=4e12, peak=8e12),
        **dict(of_peak=0.5),
    }
    part = device.PARTS["roofline"]._replace(rows=lambda _: iter([row]))
    (found,) = part.rows(subject)
    cells = [text(found) for text in part.columns.values()]
    assert cells[3:6] == ["4,000 GFLOP/s", "8,000 GFLOP/s", "50.0%"]
