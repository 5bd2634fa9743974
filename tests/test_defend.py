"""The experiment as a user runs it: end to end, resumed, extended, refused, interrupted."""

import csv
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
import pytest

from experiments import defend, evidence, measure, training
from experiments.recipes import RECIPES, smoke
from jdistill import attacks, evaluate, nets, report, runtime, train
from jdistill.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parents[1]
SMOKE = ["digits", "--smoke"]
TABLES = [f"{kind}.csv" for kind in report.TABLES]


def run(workdir, *arguments):
    """The command in this process, without its start-up of JAX."""
    recipe, options = defend.parse([*SMOKE, "--workdir", str(workdir), *arguments])
    defend.run(recipe, options)


def command(*arguments, **options):
    """The command as a process of its own, its compiled programs kept between tests."""
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache" / "defend"),
        "JDISTILL_CACHE": str(ROOT / ".jax_cache" / "jdistill"),
        **options.pop("env", {}),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.defend", *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A workdir of an uninterrupted run, with what it printed."""
    workdir = tmp_path_factory.mktemp("finished")
    run(workdir)
    return workdir


def stored(workdir):
    """The last state of every network that a workdir holds, by its folder."""
    found = {}
    for folder in sorted(workdir.glob("checkpoints/seed*/T*/generation*")):
        model = RECIPES["digits"].model()
        step = train.make_train_step(nets.apply_fn(model), train.sgd(0.1))
        params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
        like = train.create_state(step, params, jax.random.key(0))
        with Checkpointer(folder) as checkpointer:
            restored = checkpointer.restore_latest(like)
        found[str(folder.relative_to(workdir))] = restored.state
    return found


def assert_same_networks(workdir, reference):
    ours, theirs = stored(workdir), stored(reference)
    assert ours.keys() == theirs.keys()
    assert ours
    for name, state in theirs.items():
        assert int(ours[name].step) == int(state.step)
        leaves = zip(jax.tree.leaves(ours[name].params), jax.tree.leaves(state.params), strict=True)
        for leaf, other in leaves:
            np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5)


@pytest.fixture
def two_devices(monkeypatch):
    """For the two chains of a smoke run."""
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:2])


@pytest.mark.slow
def test_a_sweep_trains_the_networks_of_single_chains(finished, tmp_path, two_devices):
    run(tmp_path, "--parallel", "sweep")
    assert_same_networks(tmp_path, finished)
    assert json.loads((tmp_path / "run.json").read_text())["parallel"] == "sweep"
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    single = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]

    def place(entry):
        return (entry["seed"], entry.get("temperature", 0), entry["stage"], entry["epoch"])

    assert sorted(map(place, log)) == sorted(map(place, single))
    losses = {place(entry): entry["loss"] for entry in single}
    assert all(abs(entry["loss"] / losses[place(entry)] - 1) < 1e-3 for entry in log)


@pytest.mark.slow
def test_a_stopped_sweep_and_single_chains_go_on_from_each_other(
    finished, tmp_path, monkeypatch, two_devices
):
    class Stopped(Exception):
        pass

    record, count = training.Chain.record, 0

    def stopping(self, event):
        nonlocal count
        record(self, event)
        count += 1
        if count == 3:  # the first generation of both chains, and the second of one
            raise Stopped

    monkeypatch.setattr(training.Chain, "record", stopping)
    with pytest.raises(Stopped):
        run(tmp_path, "--parallel", "sweep")
    monkeypatch.setattr(training.Chain, "record", record)
    shutil.copytree(tmp_path, tmp_path.with_name("single"))
    run(tmp_path, "--parallel", "sweep")
    run(tmp_path.with_name("single"))
    assert_same_networks(tmp_path, finished)
    assert_same_networks(tmp_path.with_name("single"), finished)


@pytest.mark.slow
def test_a_chain_of_a_sweep_that_diverges_is_left_out(tmp_path, monkeypatch, capsys, two_devices):
    rate = training.Recipe.rate
    monkeypatch.setattr(
        training.Recipe, "rate", lambda recipe, t: 1e38 if t == 1 else rate(recipe, t)
    )
    run(tmp_path, "--parallel", "sweep")
    assert "T=1 has diverged and is left out" in capsys.readouterr().err
    rows = report.read_results(tmp_path / "results.csv")
    assert {row["temperature"] for row in rows} == {20.0}
    monkeypatch.setattr(training.Recipe, "rate", lambda recipe, t: 1e38)
    with pytest.raises(FloatingPointError, match="in at least one chain, got none"):
        run(tmp_path.with_name("all"), "--parallel", "sweep")


def test_run_leaves_the_whole_workdir(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "run.json",
        "checkpoints",
        "metrics.jsonl",
        *TABLES,
        "verdicts.json",
        "shards",
        "figures",
        "report.html",
        "report.md",
    }
    rows = report.read_results(finished / "results.csv")
    attacks = {"fgsm", "pgd", "pgd_margin", "carlini_wagner_l2"}
    expected = {(t, 0, g, a) for t in (1.0, 20.0) for g in range(3) for a in attacks}
    found = [(r["temperature"], r["seed"], r["generation"], r["attack"]) for r in rows]
    assert sorted(found) == sorted(expected)
    assert all(row["num_test"] == 32 for row in rows)
    assert {r["num_attacked"] for r in rows if r["attack"] == "fgsm"} == {16}
    facts = {row["attack"]: (row["title"], row["follows"], row["minimum_norm"]) for row in rows}
    assert facts == {
        "fgsm": ("FGSM", "softmax", False),
        "pgd": ("PGD", "softmax", False),
        "pgd_margin": ("PGD margin", "logits", False),
        "carlini_wagner_l2": ("C&W L2", "logits", True),
    }
    for kind in ("curves", "transfer", "distances", "comparisons"):
        for row in report.read_table(finished / f"{kind}.csv", kind):
            alone = row.get("attack") == "worst_case" or row.get("quantity") == "test_accuracy"
            assert (row["title"] is None) == alone, (kind, row)
    for name in ("accuracy.png", "sensitivity.png", "distances.png", "pictures_T20.png"):
        assert (finished / "figures" / name).stat().st_size > 5000
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 4
    assert json.loads((finished / "run.json").read_text())["devices"]


def test_results_are_those_of_the_library(finished):
    """A row recomputed from the checkpointed weights by direct calls."""
    import jax

    from jdistill import attacks, data, metrics, nets, train
    from jdistill.checkpoint import Checkpointer

    recipe = smoke(RECIPES["digits"])
    model = recipe.model()
    step = train.make_train_step(nets.apply_fn(model), train.sgd(recipe.learning_rate))
    params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
    like = train.create_state(step, params, jax.random.key(0))
    with Checkpointer(finished / "checkpoints/seed0/T20/generation2") as checkpointer:
        state = checkpointer.restore_latest(like).state
    logits_fn = nets.logits_fn(model, {"params": state.params})
    test = data.load("digits").test
    inputs, labels = test.inputs[:32], test.labels[:32]
    logits = logits_fn(inputs)
    (row,) = [
        row
        for row in report.read_results(finished / "results.csv")
        if (row["temperature"], row["generation"], row["attack"]) == (20.0, 2, "fgsm")
    ]
    assert row["test_accuracy"] == np.mean(np.argmax(logits, 1) == labels)
    assert row["mean_abs_logit"] == pytest.approx(float(np.abs(logits).mean()), rel=1e-5)
    fgsm = attacks.fgsm(logits_fn, None, inputs[:16], labels[:16], eps=recipe.eps)
    assert row["success_rate"] == float(fgsm.success.mean())
    sensitivity = metrics.sensitivity_logits(logits_fn, inputs[:16]).mean()
    assert row["sensitivity_logits"] == pytest.approx(float(sensitivity), rel=1e-4)


def same_tables(one, other):
    for name in (*TABLES, "verdicts.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_finished_run_is_not_run_again(finished, tmp_path, capsys, monkeypatch):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    monkeypatch.setattr(measure.evaluate, "clean", None)  # would raise
    monkeypatch.setattr(measure.diagnose, "masking", None)
    monkeypatch.setattr(runtime.ShardFolder, "__setitem__", None)
    run(workdir)
    printed = capsys.readouterr()
    assert "generation 2: done" in printed.err
    assert "report: " in printed.out
    same_tables(workdir, finished)


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [1, 3, 6])
def test_stopped_in_training_and_resumed_is_uninterrupted(
    finished, tmp_path, monkeypatch, capsys, stop_at
):
    epochs = 0
    original = training.Stage.__call__

    def stopping(self, event):
        nonlocal epochs
        original(self, event)
        epochs += event["event"] == "epoch"
        if epochs == stop_at:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(training.Stage, "__call__", stopping)
        with pytest.raises(Stop):
            run(tmp_path)
    assert not (tmp_path / "results.csv").exists()
    stopped = json.loads((tmp_path / "run.json").read_text())
    capsys.readouterr()
    run(tmp_path)
    times = json.loads((tmp_path / "run.json").read_text())
    assert 0 < stopped["seconds_all_starts"] == stopped["seconds"]
    assert [start["seconds"] for start in times["earlier_starts"]] == [stopped["seconds"]]
    assert times["seconds_all_starts"] == pytest.approx(stopped["seconds"] + times["seconds"])
    assert "initial weights: done" in capsys.readouterr().err
    for name in ("results.csv", "metrics.jsonl"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [2, 17, 50])
def test_stopped_in_measuring_and_resumed_is_uninterrupted(
    finished, tmp_path, monkeypatch, stop_at
):
    written = []
    original = runtime.ShardFolder.__setitem__

    def stopping(self, name, arrays):
        if len(written) == stop_at:
            written.append("stopped")
            raise Stop
        written.append(name)
        original(self, name, arrays)

    monkeypatch.setattr(runtime.ShardFolder, "__setitem__", stopping)
    with pytest.raises(Stop):
        run(tmp_path)
    run(tmp_path)
    # Nothing is done twice: 6 networks, each with its clean measures and 8 attacks; 3 verdicts.
    assert len(set(written)) == len(written) == 1 + 6 * 9 + 3
    same_tables(tmp_path, finished)


def test_tables_hold_what_several_seeds_say():
    """Gains that differ between two seeds, whose t interval reaches beyond 1, and one grid."""
    found = [_chain(0, gain=-0.05), _chain(1, gain=0.12)]
    rows = evidence.comparisons_over_seeds(found)
    assert {row["seed"] for row in rows} == {None}
    (robust,) = (row for row in rows if row["quantity"] == "robust_accuracy: pgd at linf 0.1")
    assert robust["difference"] == pytest.approx(0.035)
    assert robust["high"] > 1
    report.write_table(found_path := f"{tempfile.mkdtemp()}/comparisons.csv", "comparisons", rows)
    assert report.read_table(found_path, "comparisons")
    assert {row["title"] for row in rows} == {None, "PGD"}
    curves = evidence.curves(found)
    for curve in ("eps", "steps"):
        x = [
            {row["x"] for row in curves if (row["curve"], row["seed"]) == (curve, seed)}
            for seed in (0, 1)
        ]
        assert x[0] == x[1]
    steps = [row for row in curves if row["curve"] == "steps"]
    assert {row["x"] for row in steps} == {0, 1, 2, 3, 4, 5}
    assert {(row["attack"], row["title"]) for row in steps} == {("pgd", "PGD")}


def test_attacks_of_one_title_are_told_apart():
    pgd = functools.partial(attacks.pgd, eps=0.1)
    plans = {"pgd": pgd, "long": functools.partial(pgd, num_steps=9), "own": lambda *_: None}
    chain = _chain(0, gain=0.0)
    outcomes = {
        name: chain.attacks["pgd"]._replace(traits=attacks.traits(attack))
        for name, attack in plans.items()
    }
    rows = evidence.results(chain._replace(attacks=outcomes))
    titles = {row["attack"]: row.get("title") for row in rows}
    assert titles == {"pgd": "PGD (pgd)", "long": "PGD (long)", "own": None}


def _chain(seed, gain):
    """Three generations on 100 examples; the last one stands against PGD by so much more."""
    size = 100
    standing = [50, 50, 50 + round(100 * gain)]
    success = np.stack([np.arange(size) >= count for count in standing])
    steps = np.where(success, 1 + np.arange(size) % (2 + seed), -1)
    distance = np.where(success, 0.1, np.inf)
    result = attacks.AttackResult(
        np.zeros((3, size, 1)), success, distance, np.ones((3, size), int), {"first_success": steps}
    )
    smallest = result._replace(
        success=np.ones((3, size), bool), distance=np.full((3, size), 0.2 + 0.1 * seed), info={}
    )
    clean = evidence.Clean(np.ones(size, bool), np.zeros(size), {}, {})
    pgd = attacks.traits(functools.partial(attacks.pgd, eps=0.1, num_steps=4))
    outcome = evaluate.summarize(result, norm="linf", eps=0.1)._replace(traits=pgd)
    return evidence.Chain(
        dataset="digits",
        networks=[training.Network(20.0, seed, number, None) for number in range(3)],
        clean=[clean] * 3,
        attacks={"pgd": outcome},
        distances={"linf": evaluate.summarize(smallest, norm="linf")},
        crafted=None,
    )


def test_shards_of_other_networks_are_refused(finished, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    shards = workdir / "shards" / "fgsm"
    shutil.copytree(shards / "T1_seed0_g0", shards / "T20_seed0_g2", dirs_exist_ok=True)
    with pytest.raises(ValueError, match="expected shard 'fgsm/T20_seed0_g2/00000' to be of this"):
        run(workdir)


def test_damaged_checkpoint_falls_back_and_says_so(finished, tmp_path, caplog):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    stage = workdir / "checkpoints/seed0/T20/generation1"
    for path in stage.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    (workdir / "results.csv").unlink()
    run(workdir)
    assert "damaged" in caplog.text
    assert (workdir / "results.csv").read_bytes() == (finished / "results.csv").read_bytes()


@pytest.mark.slow
def test_damaged_last_epoch_of_a_teacher_is_trained_again_with_its_student(tmp_path, caplog):
    """The teacher falls back to the epoch before; its student's checkpoints are of another one."""
    settings = {"workdir": str(tmp_path), "epochs": 2, "temperatures": (20.0,)}
    recipe, options = extended(settings | {"num_assistants": 0})
    defend.run(recipe, options)
    before = (tmp_path / "results.csv").read_bytes()
    log = (tmp_path / "metrics.jsonl").read_text()
    last = tmp_path / "checkpoints/seed0/T20/generation0/4"
    for path in last.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    (tmp_path / "results.csv").unlink()
    defend.run(recipe, options)
    assert "damaged" in caplog.text
    assert (tmp_path / "results.csv").read_bytes() == before
    assert sorted((tmp_path / "metrics.jsonl").read_text().split("\n")) == sorted(log.split("\n"))


def extended(arguments):
    """The smoke recipe changed by hand, since --smoke fixes the sizes."""
    import dataclasses

    recipe, options = defend.parse([*SMOKE, "--workdir", arguments.pop("workdir")])
    return dataclasses.replace(recipe, **arguments), options


@pytest.mark.slow
def test_temperatures_seeds_and_assistants_extend_a_workdir(finished, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    defend.run(
        *extended(
            {
                "workdir": str(workdir),
                "temperatures": (5.0,),
                "seeds": (0, 1),
                "num_assistants": 2,
            }
        )
    )
    with open(workdir / "results.csv") as file:
        new = list(csv.DictReader(file))
    with open(finished / "results.csv") as file:
        old = list(csv.DictReader(file))
    assert len(new) == 3 * 2 * 4 * 4
    # The old networks' rows stand unchanged: seeds, temperatures and chain length do not touch.
    assert all(row in new for row in old)
    config = json.loads((workdir / "config.json").read_text())
    assert config["temperatures"] == [1.0, 5.0, 20.0]
    assert (config["seeds"], config["num_assistants"]) == ([0, 1], 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"epochs": 2}, "expected epochs=1"),
        ({"learning_rate": 0.5}, "expected learning_rate=0.05"),
        ({"cw_steps": 7}, "expected cw_steps=5"),
    ],
)
def test_any_other_difference_is_refused_by_name(finished, change, words):
    before = (finished / "config.json").read_bytes()
    with pytest.raises(ValueError, match=words):
        defend.run(*extended({"workdir": str(finished), **change}))
    assert (finished / "config.json").read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["digits", "--temperatures", "0"],
        ["digits", "--temperatures", "nan"],
        ["digits", "--eps", "-0.1"],
        ["digits", "--num-assistants", "7"],
        ["digits", "--epochs", "0"],
        ["digits", "--seeds", "1", "1"],
        ["digits", "--seeds", "-1"],
        ["digits", "--seeds", "4294967296"],
        ["cats"],
    ],
)
def test_bad_options_end_in_one_line_and_write_nothing(arguments, tmp_path, capsys):
    from jdistill import runtime

    workdir = tmp_path / "new"
    with pytest.raises(SystemExit) as error:
        runtime.run_main(defend.main, [*arguments, "--workdir", str(workdir)])
    assert error.value.code == 2
    assert not workdir.exists()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert arguments[-1].rstrip("0") in printed.err + printed.out


@pytest.mark.parametrize("line", ["{}", "[]", '{"epoch": null}'])
def test_a_log_that_others_wrote_is_refused_by_line(line, finished, tmp_path):
    workdir = tmp_path / "copy"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints/seed0/T20/generation2")
    log = workdir / "metrics.jsonl"
    log.write_text(log.read_text() + line + "\n")
    with pytest.raises(ValueError, match=r"in line 8 of .*metrics\.jsonl, got .*; remove that"):
        run(workdir)


def test_a_missing_package_is_named_before_the_training(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jdistill\[demo\]'"):
        run(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_ctrl_c_while_it_starts_shows_no_traceback():
    # Importing is the one thing that `run_main` cannot wrap; this stops there.
    code = (
        "import sys; sys.argv[0] = '-m'; import experiments; "
        "assert sys.excepthook is experiments._quietly; raise KeyboardInterrupt"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (130, -signal.SIGINT)
    assert done.stderr == "stopped; nothing was begun\n"


def test_smoke_leaves_what_is_given():
    recipe, _ = defend.parse(["mnist", "--smoke", "--temperatures", "5", "--seeds", "1", "2"])
    assert (recipe.temperatures, recipe.seeds, recipe.epochs) == ((5.0,), (1, 2), 1)
    recipe, _ = defend.parse(["mnist", "--temperatures", "5"])
    assert recipe.epochs == RECIPES["mnist"].epochs


def test_unwritable_workdir_is_refused_before_anything(tmp_path, capsys):
    from jdistill import runtime

    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as error:
        runtime.run_main(defend.main, [*SMOKE, "--workdir", str(tmp_path / "file" / "run")])
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert "expected a writable folder" in message
    assert "--workdir" in message


def test_absent_data_set_is_an_error_within_seconds(tmp_path):
    started = time.monotonic()
    process = command(
        "mnist",
        "--workdir",
        str(tmp_path / "run"),
        "--data-dir",
        str(tmp_path),
        env={"JDISTILL_CACHE": str(tmp_path / "cache")},
    )
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
    process = command("digits", "--epochs", "500", "--workdir", str(workdir))
    checkpoints = workdir / "checkpoints/seed0/T1/generation0"
    deadline = time.monotonic() + 120
    # The log line comes before the checkpoint, so it does not say that there is one.
    while time.monotonic() < deadline and not any(checkpoints.glob("[0-9]*")):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    try:
        _, message = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in message
    assert "again" in message
    assert any(path.name.isdigit() for path in checkpoints.iterdir())


def test_help_names_every_option_with_its_default(capsys):
    import dataclasses

    with pytest.raises(SystemExit) as error:
        defend.parse(["mnist", "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    recipe = RECIPES["mnist"]
    for field in dataclasses.fields(recipe):
        if field.name not in ("dataset", "network"):
            assert "--" + field.name.replace("_", "-") in text, field.name
    assert text.count("default:") >= len(dataclasses.fields(recipe)) - 2


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_has_a_smoke_variant_and_the_papers_network(name):
    recipe = RECIPES[name]
    assert recipe.dataset == name
    assert smoke(recipe).epochs == 1
    assert recipe.rate(1.0) == recipe.learning_rate
    assert smoke(recipe).attack_plans().keys() == recipe.attack_plans().keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_smoke_run_on_real_images(name, tmp_path, monkeypatch):
    if not os.environ.get("TFDS_DATA_DIR"):
        pytest.skip("TFDS_DATA_DIR names no folder of prepared data sets")
    # The papers' layers at a quarter of their width take two thirds of the time.
    for network in ("mnist_net", "cifar_net"):
        narrow = functools.partial(getattr(nets, network), width=0.25)
        monkeypatch.setattr(nets, network, narrow)
    recipe, options = defend.parse([name, "--smoke", "--workdir", str(tmp_path)])
    defend.run(recipe, options)
    rows = report.read_results(tmp_path / "results.csv")
    assert len(rows) == 2 * 3 * 4
    assert {row["dataset"] for row in rows} == {name}
