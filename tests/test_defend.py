"""The commands defend, verdict, and report as a user runs them."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from jdistill import attacks, commands, data, metrics, nets, report
from jdistill import study as studies
from jdistill.commands import _defend
from jdistill.study import RECIPES, _recipes

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = ["digits", "--smoke"]
TABLES = [f"{kind}.csv" for kind in report.TABLES if kind != "deployment"]


def run(workdir, *arguments):
    """The command in this process, without its start-up of JAX."""
    _defend.run([*SMOKE, "--workdir", str(workdir), *arguments])


def command(*arguments, **options):
    """The command as a process of its own, its compiled programs kept between tests."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache" / "defend"),
        "JDISTILL_CACHE": str(ROOT / ".jax_cache" / "jdistill"),
        **options.pop("env", {}),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "jdistill", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def fails(arguments, capsys):
    """What a command that is wrong prints, in one line."""
    with pytest.raises(SystemExit) as error:
        commands.main(arguments)
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir of an uninterrupted run, never to be written."""
    workdir = tmp_path_factory.mktemp("finished")
    run(workdir)
    return workdir


def test_run_leaves_the_whole_workdir(finished):
    assert {path.name for path in finished.iterdir() if not path.name.startswith(".")} == {
        "config.json",
        "run.json",
        "checkpoints",
        "metrics.jsonl",
        *TABLES,
        "verdicts.json",
        "tables.json",
        "pictures.npz",
        "shards",
        "figures",
        "report.html",
    }
    rows = report.read_table(finished / "results.csv", "results")
    names = {"fgsm", "pgd", "pgd_margin", "apgd_margin", "carlini_wagner_l2"}
    expected = {(t, 0, g, a) for t in (1.0, 20.0) for g in range(3) for a in names}
    found = [(r["temperature"], r["seed"], r["generation"], r["attack"]) for r in rows]
    assert sorted(found) == sorted(expected)
    assert all(row["num_test"] == 32 for row in rows)
    assert {r["num_attacked"] for r in rows if r["attack"] == "fgsm"} == {16}
    facts = {row["attack"]: (row["title"], row["follows"], row["minimum_norm"]) for row in rows}
    assert facts["pgd_margin"] == ("PGD margin", "logits", False)
    assert facts["carlini_wagner_l2"] == ("C&W L2", "logits", True)
    transfer = report.read_table(finished / "transfer.csv", "transfer")
    assert len(transfer) == 2 * 3 * 3
    for kind in ("curves", "transfer", "distances", "comparisons"):
        for row in report.read_table(finished / f"{kind}.csv", kind):
            alone = row.get("attack") == "worst_case" or row.get("quantity") == "test_accuracy"
            assert (row["title"] is None) == alone, (kind, row)
    for name in ("accuracy.svg", "attacks.svg", "verdict.svg", "pictures_T20.png"):
        assert (finished / "figures" / name).stat().st_size > 5000
    page = (finished / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert json.loads((finished / "run.json").read_text())["devices"]


def test_results_are_those_of_the_library(finished):
    """A row recomputed from the checkpointed weights by direct calls."""
    recipe = RECIPES["digits"].smallest()
    (network,) = studies.networks(recipe.study(), finished, temperatures=[20.0], generations=[2])
    test = data.load("digits").test
    inputs, labels = test.inputs[:32], test.labels[:32]
    logits = network.logits_fn(inputs)
    (row,) = [
        row
        for row in report.read_table(finished / "results.csv", "results")
        if (row["temperature"], row["generation"], row["attack"]) == (20.0, 2, "fgsm")
    ]
    assert row["test_accuracy"] == np.mean(np.argmax(logits, 1) == labels)
    assert row["mean_abs_logit"] == pytest.approx(float(np.abs(logits).mean()), rel=1e-5)
    fgsm = attacks.fgsm(network.logits_fn, None, inputs[:16], labels[:16], eps=recipe.eps)
    assert row["success_rate"] == float(fgsm.success.mean())
    sensitivity = metrics.sensitivity_logits(network.logits_fn, inputs[:16]).mean()
    assert row["sensitivity_logits"] == pytest.approx(float(sensitivity), rel=1e-4)


def test_a_workdir_is_extended_and_other_settings_are_refused(finished, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    run(workdir, "--temperatures", "5", "--num-assistants", "2", "--cw-examples", "8")
    rows = report.read_table(workdir / "results.csv", "results")
    places = {(row["temperature"], row["generation"]) for row in rows}
    assert places == {(T, g) for T in (1.0, 5.0, 20.0) for g in range(4)}
    before = (workdir / "results.csv").read_bytes()
    run(workdir, "--num-assistants", "0")  # what is there stays
    assert (workdir / "results.csv").read_bytes() == before
    message = fails(["defend", *SMOKE, "--workdir", str(workdir), "--eps", "0.3"], capsys)
    assert "eps" in message
    assert "0.2, this study's 0.3" in message


def test_the_report_is_made_again_from_the_tables(finished, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    page = (workdir / "report.html").read_text()
    (workdir / "report.html").unlink()
    shutil.rmtree(workdir / "figures")
    commands.run(["report", str(workdir)])
    assert (workdir / "report.html").read_text() == page
    assert "report: " in capsys.readouterr().out


@pytest.mark.parametrize("name", [*TABLES, "verdicts.json", "pictures.npz", "tables.json"])
@pytest.mark.parametrize("damage", ["empty", "cut", "bit", "number", "deleted"])
def test_a_damaged_table_is_refused_by_name_and_written_anew(
    finished, tmp_path, capsys, name, damage
):
    for item in (*TABLES, "verdicts.json", "pictures.npz", "tables.json", "run.json"):
        shutil.copy(finished / item, tmp_path / item)
    path = tmp_path / name
    content = path.read_bytes()
    middle = len(content) // 2
    while not content[middle : middle + 1].isdigit():
        middle += 1
    changed = {
        "empty": b"",
        "cut": content[:middle],
        "bit": content[:middle] + bytes([content[middle] ^ 2]) + content[middle + 1 :],
        "number": content[:middle] + (b"1" if content[middle : middle + 1] != b"1" else b"2")
        + content[middle + 1 :],
    }  # fmt: skip
    if damage == "deleted":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    message = fails(["report", str(tmp_path)], capsys)
    if name == "tables.json":  # which says of each of the others what it must be
        assert "as the run wrote it" in message or "tables" in message
    else:
        assert name in message
    assert "again" in message


def test_verdicts_on_other_networks(finished, tmp_path, capsys):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    commands.run(["verdict", str(workdir), "--temperature", "20", "--generation", "1"])
    printed = capsys.readouterr().out
    assert printed.startswith("T=20, seed 0, generation 1\n")
    assert "worst case" in printed
    (kept,) = [p for p in (workdir / "shards/verdict").iterdir() if "T20_seed0_g1" in p.name]
    before = kept.read_bytes()
    commands.run(["verdict", str(workdir), "--temperature", "20", "--generation", "1"])
    assert capsys.readouterr().out == printed
    assert kept.read_bytes() == before


STUDY = '''
import functools
import numpy as np
from jdistill import attacks, train
from jdistill.study import Stage, Study

def init(key, shape):
    return np.eye(shape[0], 2, dtype=np.float32)

def apply(params, inputs):
    return inputs @ params

def make(width: int = 4, rate: float = 0.1):
    """A study of mine.

    Args:
        width: features.
        rate: of learning.
    """
    rng = np.random.default_rng(0)
    x = rng.uniform(size=(60, width)).astype(np.float32)
    y = (x[:, 0] > x[:, 1]).astype(int)
    stage = Stage(model=(init, apply), optimizer=train.sgd(rate), num_epochs=2)
    attack = functools.partial(attacks.pgd, eps=0.1, num_steps=2)
    return Study(
        data=((x[:40], y[:40]), (x[40:], y[40:])), chains=[stage] * 2, batch_size=10, name="mine",
        attacks={"pgd": attack},
    )

'''


def test_a_study_of_ones_own(tmp_path, capsys):
    file, workdir = tmp_path / "my_study.py", str(tmp_path / "run")
    file.write_text(STUDY + "study = make\n")
    arguments = ["defend", str(file), "--workdir", workdir, "--width", "3"]
    commands.run(arguments)
    assert "mine" in capsys.readouterr().out
    commands.run(["attack", workdir, "--attack", "fgsm", "--eps", "0.1", "--num-examples", "9"])
    assert "T=1, seed 0, generation 1" in capsys.readouterr().out
    message = fails([*arguments[:-1], "4"], capsys)
    assert "dataset_checksum" in message
    message = fails([*arguments, "--rate", "0.2"], capsys)
    assert "optimizer" in message
    with pytest.raises(SystemExit) as error:
        commands.main(["defend", str(file), "--help"])
    assert error.value.code == 0
    assert "--rate" in capsys.readouterr().out
    # The file as it is now is what the commands make the study from.
    file.write_text(STUDY.replace("inputs @ params", "2 * inputs @ params") + "study = make\n")
    assert "network" in fails(["attack", workdir, "--attack", "fgsm", "--eps", "0.1"], capsys)
    file.write_text(STUDY + "study = make()\n")
    commands.run(["defend", str(file), "--workdir", str(tmp_path / "other"), "--smoke"])
    file.write_text("study = 3")
    assert "to define `study`" in fails(["defend", str(file)], capsys)


# In another process, whose `sys.path` and modules are its own.
def defends(folder, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "jdistill", "defend", *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_file_imports_what_lies_beside_it(tmp_path):
    beside, elsewhere = tmp_path / "beside", tmp_path / "elsewhere"
    beside.mkdir()
    elsewhere.mkdir()
    (beside / "my_parts.py").write_text(STUDY)
    (beside / "my_study.py").write_text("from my_parts import make as study\n")
    done = defends(elsewhere, beside / "my_study.py", "--workdir", "run", "--smoke")
    assert done.returncode == 0, done.stderr


def test_errors_of_a_file_name_its_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    file, part = tmp_path / "my_study.py", tmp_path / "my_wrong_part.py"

    def said(text):
        file.write_text(text)
        return fails(["defend", str(file), "--workdir", str(tmp_path / "run")], capsys)

    assert f"{file}, line 2: ModuleNotFoundError: No module" in said("\nimport not_there_at_all\n")
    assert f"{file}, line 3: KeyError: 'a'" in said("def study():\n    pass\n    {}['a']\n")
    assert f"{file}, line 2: SyntaxError" in said("x = 1\ny = = 2\n")
    text = "from jdistill.study import Study\nstudy = Study(data=None, chains={})\n"
    assert f"{file}, line 2: expected at least one chain" in said(text)
    part.write_text("import numpy as np\n\nx = np.zeros(3).reshape(2)\n")
    assert f"{part}, line 3: cannot reshape" in said("import my_wrong_part\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["defond"], "one of the commands defend, attack"),
        (["defend", "imagenet"], "one of digits, mnist"),
        (["defend", "nothing.py"], "neither; check it"),
        (["defend", *SMOKE, "--workdir", ""], "got an empty text"),
        (["defend", *SMOKE, "--workdir", "~nosuchuser/run"], "user that is there"),
        (["defend", *SMOKE, "--workdir", "file:///tmp/run"], "without file://"),
        (["report", "/nonexistent"], "tables of a study"),
        (["verdict", "/nonexistent"], "no config.json"),
        (["attack", "/nonexistent", "--attack", "deepfool"], "no config.json"),
    ],
)
def test_a_bad_command_ends_in_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in fails(arguments, capsys)
    assert not list(tmp_path.iterdir())


def test_unwritable_workdir_is_refused_before_anything(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    message = fails(["defend", *SMOKE, "--workdir", str(tmp_path / "file" / "run")], capsys)
    assert "expected a writable folder" in message
    assert "--workdir" in message


def test_a_missing_package_is_said_with_its_line(capsys, monkeypatch):
    monkeypatch.setattr(commands, "_NEEDED", ("tyro", "nosuchpackage"))
    message = fails(["report", "somewhere"], capsys)
    assert "nosuchpackage" in message
    assert "pip install 'jdistill[study]'" in message


def test_smoke_leaves_what_is_given():
    recipe, _ = _defend.parse(["mnist", "--smoke", "--temperatures", "5", "--seeds", "1", "2"])
    assert (recipe.temperatures, recipe.seeds, recipe.epochs) == ((5.0,), (1, 2), 1)
    recipe, _ = _defend.parse(["mnist", "--temperatures", "5"])
    assert recipe.epochs == RECIPES["mnist"].epochs


def test_help_names_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as error:
        _defend.parse(["mnist", "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    recipe = RECIPES["mnist"]
    for field in dataclasses.fields(recipe):
        named = "--" + field.name.replace("_", "-") in text
        assert named == (field.name not in ("dataset", "network")), field.name
    assert text.count("default:") >= len(dataclasses.fields(recipe)) - 2
    for arguments in (["--help"], ["defend", "--help"], ["report", "--help"]):
        with pytest.raises(SystemExit) as error:
            commands.main([*arguments]) or sys.exit(0)
        assert error.value.code == 0


@pytest.mark.parametrize("name", sorted(_recipes.RECIPES))
def test_every_recipe_has_a_smoke_variant_and_the_papers_network(name):
    recipe = _recipes.RECIPES[name]
    assert recipe.dataset == name
    assert recipe.smallest().epochs == 1
    assert recipe.rate(1.0) == recipe.learning_rate
    assert recipe.smallest().attack_plans().keys() == recipe.attack_plans().keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperatures": (1.0, 1.0)}, "temperatures without repetition"),
        ({"temperatures": ()}, "not empty"),
        ({"temperatures": (-1.0,)}, "temperatures > 0"),
        ({"seeds": (2**32,)}, "seeds below"),
        ({"num_assistants": 7}, "num_assistants"),
        ({"epochs": 0}, "epochs"),
        ({"eps": 0.0}, "eps"),
        ({"fgsm_examples": 0, "pgd_examples": 0, "cw_examples": 0}, "at least one attack"),
    ],
)
def test_bad_recipes(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPES["digits"], **options)


def test_absent_data_set_is_an_error_within_seconds(tmp_path):
    started = time.monotonic()
    workdir, cache = str(tmp_path / "run"), {"JDISTILL_CACHE": str(tmp_path / "cache")}
    arguments = ["--workdir", workdir, "--data-dir", str(tmp_path)]
    process = command("defend", "mnist", *arguments, env=cache)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in message
    assert "TFDS_DATA_DIR" in message
    assert not (tmp_path / "run").exists()
    # Five seconds for the answer; the rest is Python and JAX starting on a busy machine.
    assert time.monotonic() - started < 30


@pytest.mark.slow
def test_ctrl_c_keeps_the_checkpoint_and_exits_130(tmp_path):
    workdir = tmp_path / "run"
    process = command("defend", "digits", "--epochs", "500", "--workdir", str(workdir))
    deadline = time.monotonic() + 120
    pattern = "checkpoints/seed0/T1/generation0-*/[0-9]*"
    # The log line comes before the checkpoint, so it does not say that there is one.
    while time.monotonic() < deadline and not any(workdir.glob(pattern)):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        _, message = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in message
    assert "again" in message
    assert any(workdir.glob(pattern))


@pytest.mark.slow
def test_killed_again_and_again_is_uninterrupted(finished, tmp_path):
    """SIGKILL at three moments; tables, verdicts, and log are the same bytes."""
    workdir = tmp_path / "run"
    arguments = ["defend", *SMOKE, "--workdir", str(workdir)]
    whole = tmp_path / "whole"
    process = command("defend", *SMOKE, "--workdir", str(whole))
    process.communicate(timeout=600)
    assert process.returncode == 0
    for event in ("checkpoints/seed0/T20/generation1-*/[0-9]*", "shards/pgd/*", "shards/verdict/*"):
        process = command(*arguments)
        while process.poll() is None and not any(workdir.glob(event)):
            time.sleep(0.02)
        process.kill()
        process.communicate()
    process = command(*arguments)
    _, message = process.communicate(timeout=600)
    assert process.returncode == 0, message
    for name in (*TABLES, "verdicts.json", "metrics.jsonl"):
        assert (workdir / name).read_bytes() == (whole / name).read_bytes(), name
    assert json.loads((workdir / "run.json").read_text())["earlier_starts"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_smoke_run_on_real_images(name, tmp_path, monkeypatch):
    if not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("TFDS_DATA_DIR names no folder of prepared data sets")
    # The papers' layers at a quarter of their width take two thirds of the time.
    for network in ("mnist_net", "cifar_net"):
        original = getattr(nets, network)
        monkeypatch.setattr(nets, network, lambda original=original: original(width=0.25))
    _defend.run([name, "--smoke", "--workdir", str(tmp_path)])
    rows = report.read_table(tmp_path / "results.csv", "results")
    assert len(rows) == 2 * 3 * 5
    assert {row["dataset"] for row in rows} == {name}


@pytest.mark.slow
def test_a_sweep_trains_the_networks_of_single_runs(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])
    run(tmp_path, "--parallel", "sweep")
    recipe = RECIPES["digits"].smallest()
    pairs = [studies.networks(recipe.study(), folder) for folder in (finished, tmp_path)]
    for one, other in zip(*pairs, strict=True):
        assert one.title == other.title
        leaves = zip(jax.tree.leaves(one.logits_fn), jax.tree.leaves(other.logits_fn), strict=True)
        for leaf, same in leaves:
            np.testing.assert_allclose(leaf, same, rtol=1e-3, atol=1e-4)
    assert json.loads((tmp_path / "run.json").read_text())["parallel"] == "sweep"


def test_commands_end_as_programs_do():
    process = command("nothing")
    _, message = process.communicate(timeout=60)
    assert process.returncode == 2
    assert message.startswith("error: expected one of the commands")
