"""The attack command as a user runs it, beside direct calls of the attacks."""

import csv
import dataclasses
import inspect
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import transfer
from jdistill import attacks, commands, data, losses, runtime
from jdistill import study as studies
from jdistill.commands import _attack as attack
from jdistill.commands import _attack_options as attack_options
from jdistill.study import _run, _training, _workdir

EPOCHS, STEPS = 3, 16  # an epoch
PGD = ["--attack", "pgd", "--eps", "0.1", "--num-steps", "4", "--num-examples", "12"]
NAME = "pgd_eps=0.1_num_steps=4_examples=12"


RECIPE = dataclasses.replace(
    studies.RECIPES["digits"].smallest(),
    temperatures=(1.0, 5.0),
    num_assistants=0,
    epochs=EPOCHS,
    learning_rate=0.1,
    learning_rate_power=0.5,
    train_examples=32 * STEPS,
    test_examples=None,
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A workdir of a teacher and a student at two temperatures, good enough to be worth attacking.

    The steps of `study.run` up to its measuring.
    """
    path = tmp_path_factory.mktemp("trained")
    study, folder = RECIPE.study(), _workdir.epath.Path(path)
    examples = study.examples()
    _run._extended(folder, study, examples, dataclasses.asdict(RECIPE))
    _training.train(folder, study, examples, parallel="jit", progress=runtime.progress())
    return path


@pytest.fixture
def fresh(trained, tmp_path):
    """A copy that nothing was attacked in."""
    copy = tmp_path / "run"
    shutil.copytree(trained, copy, ignore=shutil.ignore_patterns("attacks"))
    return copy


def run(path, *arguments):
    """The command in this process; the folder of its results."""
    attack.run([str(path), *arguments])


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def column(rows, name, convert=float):
    return np.array([convert(row[name]) for row in rows])


def network(path, temperature, generation):
    """A trained network of the workdir."""
    (found,) = studies.networks(
        RECIPE.study(), path, temperatures=[temperature], generations=[generation]
    )
    return found.logits_fn


def examples(size):
    test = data.load("digits").test
    return test.inputs[:size], test.labels[:size]


def check_rows(rows, points, direct, logits_fn, inputs, labels):
    """Rows and points are what a direct call found, judged by the network once more."""
    assert column(rows, "index", int).tolist() == list(range(len(labels)))
    assert column(rows, "label", int).tolist() == labels.tolist()
    clean = np.asarray(logits_fn(inputs)).argmax(1)
    assert column(rows, "clean_prediction", int).tolist() == clean.tolist()
    np.testing.assert_array_equal(column(rows, "success", int), direct.success)
    np.testing.assert_array_equal(column(rows, "queries", int), direct.queries)
    np.testing.assert_allclose(column(rows, "distance"), direct.distance, rtol=1e-4)
    np.testing.assert_allclose(points["inputs"], direct.inputs, atol=1e-5)
    for name, values in direct.info.items():
        np.testing.assert_allclose(column(rows, f"info_{name}"), values, rtol=1e-4)
    predicted = np.asarray(logits_fn(points["inputs"])).argmax(1)
    assert column(rows, "prediction", int).tolist() == predicted.tolist()


@pytest.mark.slow
def test_rows_are_those_of_a_direct_call(trained, capsys):
    run(trained, *PGD, "--num-restarts", "2", "--key", "7", "--batch-size", "5")
    folder = trained / "attacks" / "pgd_eps=0.1_num_steps=4_num_restarts=2_examples=12_key=7"
    assert len(list(folder.glob("*.csv"))) == len(list(folder.glob("*.npz"))) == 4
    inputs, labels = examples(12)
    rates = []
    for temperature, generation in ((1, 0), (1, 1), (5, 0), (5, 1)):
        logits_fn = network(trained, temperature, generation)
        direct = attacks.pgd(
            logits_fn, jax.random.key(7), inputs, labels, eps=0.1, num_steps=4, num_restarts=2
        )
        stem = f"T{temperature}_seed0_g{generation}"
        rows = table(folder / f"{stem}.csv")
        points = np.load(folder / f"{stem}.npz")
        check_rows(rows, points, direct, logits_fn, inputs, labels)
        success = column(rows, "success", int)
        np.testing.assert_array_equal(column(rows, "prediction", int) != labels, success)
        moved = np.abs(points["inputs"] - inputs).max(axis=(1, 2, 3))
        np.testing.assert_allclose(moved, column(rows, "distance"), rtol=1e-4)
        assert {row["temperature"] for row in rows} == {f"{temperature:.1f}"}
        assert {row["generation"] for row in rows} == {str(generation)}
        assert {row["target"] for row in rows} == {""}
        rates.append(success.mean())
        assert np.any((success == 1) & (moved > 0))
    printed = capsys.readouterr().out
    for rate in rates:
        assert f"{100 * rate:.4g} [" in printed
    assert f"results: {folder}" in printed
    held = json.loads((folder / "settings.json").read_text())
    assert held["settings"] == {
        "eps": 0.1,
        "norm": "linf",
        "num_steps": 4,
        "step_size": None,
        "num_restarts": 2,
        "random_start": True,
        "loss": "cross_entropy",
        "trace": False,
    }
    assert (held["num_examples"], held["key"], held["targets"]) == (12, 7, "none")
    assert held["versions"]["jax"] == jax.__version__


@pytest.mark.slow
def test_the_batch_size_changes_nothing(trained):
    path = trained / "attacks" / NAME
    found = []
    for batch_size in ("12", "5"):
        run(trained, *PGD, "--temperature", "1", "--batch-size", batch_size, "--overwrite")
        stem = path / "T1_seed0_g1"
        found.append((table(f"{stem}.csv"), np.load(f"{stem}.npz")["inputs"]))
    (rows, points), (others, other_points) = found
    for name in ("success", "queries", "prediction", "info_restart", "info_first_success"):
        assert column(rows, name).tolist() == column(others, name).tolist()
    np.testing.assert_allclose(column(rows, "distance"), column(others, "distance"), rtol=1e-4)
    np.testing.assert_allclose(points, other_points, atol=1e-5)


@pytest.mark.parametrize(
    ("given", "name", "output"),
    [
        ([], "", attacks.softmax),
        (["softmax_at"], "output=softmax_at_", attacks.softmax_at(5.0)),
        (
            ["softmax_at", "--output-temperature", "20"],
            "output=softmax_at_output_temperature=20_",
            attacks.softmax_at(20.0),
        ),
        (["logits"], "output=logits_", jnp.positive),
    ],
)
def test_the_three_forms_of_jsma(given, name, output, trained):
    # Where it saturates, the softmax has gradients that are mostly rounding.
    temperature = 5 if given else 1
    given = ["--output", *given] if given else []
    chosen = ["--temperature", str(temperature), "--generation", "1", "--num-examples", "6"]
    run(trained, "--attack", "jsma", *given, *chosen)
    folder = trained / "attacks" / f"jsma_{name}examples=6"
    stem = folder / f"T{temperature}_seed0_g1"
    inputs, labels = examples(6)
    logits_fn = network(trained, temperature, 1)
    direct = attacks.jsma(logits_fn, None, inputs, labels, output=output)
    check_rows(table(f"{stem}.csv"), np.load(f"{stem}.npz"), direct, logits_fn, inputs, labels)


def test_all_targets_and_arrays_of_info(trained):
    settings = ["--norm", "l2", "--num-steps", "5", "--trace", "--targets", "all"]
    chosen = ["--temperature", "1", "--generation", "0", "--num-examples", "3"]
    run(trained, "--attack", "fmn", *settings, *chosen)
    name = "fmn_norm=l2_num_steps=5_trace=True_targets=all_examples=3"
    stem = trained / "attacks" / name / "T1_seed0_g0"
    rows, points = table(f"{stem}.csv"), np.load(f"{stem}.npz")
    inputs, labels = examples(3)
    index, targets = column(rows, "index", int), column(rows, "target", int)
    assert points["index"].tolist() == index.tolist()
    everything = {(i, k) for i in range(3) for k in range(10) if k != labels[i]}
    assert sorted(everything) == sorted(zip(index.tolist(), targets.tolist(), strict=True))
    direct = attacks.fmn(
        network(trained, 1, 0), None, inputs[index], labels[index],
        norm="l2", num_steps=5, trace=True, targets=targets,
    )  # fmt: skip
    success = column(rows, "success", int)
    np.testing.assert_array_equal(success, direct.success)
    np.testing.assert_array_equal(success, column(rows, "prediction", int) == targets)
    assert 0 < success.sum() < len(rows)
    np.testing.assert_allclose(points["info_trace"], direct.info["trace"], rtol=1e-3, atol=1e-3)


def test_aims():
    labels = np.array([0, 1, 2, 2])
    logits = np.array([[-9, 0, 1.0], [0, -9, 1.0], [0, 1, 2.0], [1, 0, 2.0]])

    def aim(targets, size=4):
        return attack.aim(targets, labels[:size], logits[:size], jax.random.key(0))

    assert aim("none")[1] is None
    assert aim("next")[1].tolist() == [1, 2, 0, 0]
    assert aim("least_likely")[1].tolist() == [1, 0, 0, 1]  # the label itself is none
    index, targets = aim("all")
    assert index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert targets.tolist() == [1, 2, 2, 0, 0, 1, 0, 1]
    many = np.zeros(200, int)
    _, drawn = attack.aim("random", many, np.zeros((200, 10)), jax.random.key(0))
    assert set(drawn) == set(range(1, 10))
    assert aim("random")[1][:3].tolist() == aim("random", 3)[1].tolist()
    assert np.all(aim("random")[1] != labels)


def test_what_is_there_is_not_computed_again(fresh, capsys, monkeypatch):
    run(fresh, *PGD, "--generation", "1")
    folder = fresh / "attacks" / NAME
    before = {path: path.read_bytes() for path in folder.glob("T*")}
    first = capsys.readouterr().out
    for path in before:  # derived: whatever happens to it, it is written again
        path.write_bytes(path.read_bytes()[:20])
    with monkeypatch.context() as patched:
        patched.setattr(runtime.ShardFolder, "__setitem__", None)  # would raise
        run(fresh, *PGD, "--generation", "1")
        assert capsys.readouterr().out == first
        assert {path: path.read_bytes() for path in before} == before
        with pytest.raises(TypeError, match="not callable"):
            run(fresh, *PGD, "--generation", "1", "--overwrite")
    run(fresh, *PGD)  # other networks join
    assert len(list(folder.glob("*.csv"))) == 4


class Stop(KeyboardInterrupt):
    pass


@pytest.mark.parametrize(
    "arguments",
    [PGD, ["--attack", "autoattack", "--eps", "0.1", "--version", "rand", "--num-examples", "12"]],
)
def test_stopped_and_resumed_is_uninterrupted(fresh, trained, monkeypatch, arguments):
    arguments = [*arguments, "--batch-size", "5", "--temperature", "5"]
    run(trained, *arguments)
    original, written = runtime.ShardFolder.__setitem__, []

    def stopping(self, name, arrays):
        original(self, name, arrays)
        written.append(name)
        if len(written) == 4:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(runtime.ShardFolder, "__setitem__", stopping)
        with pytest.raises(Stop):
            run(fresh, *arguments)
    run(fresh, *arguments)
    (folder,) = (fresh / "attacks").iterdir()
    assert len(list(folder.glob("*.csv"))) == 2
    for path in (trained / "attacks" / folder.name).glob("T5*.csv"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("damage", ["cut", "empty", "flip"])
def test_damaged_shards_are_computed_again(fresh, damage):
    run(fresh, *PGD, "--temperature", "1")
    folder = fresh / "attacks" / NAME
    before = {path: path.read_bytes() for path in folder.glob("*.csv")}
    for path in folder.rglob("shards/**/*.npz"):
        content = path.read_bytes()
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"cut": content[:middle], "empty": b"", "flip": flipped}[damage])
    run(fresh, *PGD, "--temperature", "1")
    assert {path: path.read_bytes() for path in before} == before


def test_an_earlier_checkpoint(trained):
    step = (EPOCHS - 1) * STEPS
    run(trained, *PGD, "--step", str(step), "--generation", "1")
    run(trained, *PGD)
    stem = trained / "attacks" / NAME / "T1_seed0_g1"
    assert {row["step"] for row in table(f"{stem}_step{step}.csv")} == {str(step)}
    early, last = (np.load(f"{stem}{s}.npz")["inputs"] for s in (f"_step{step}", ""))
    assert np.abs(early - last).max() > 0.01  # by networks that differ
    with pytest.raises(
        FileNotFoundError, match=rf"step 3 in .*those of \[{step}, {step + STEPS}\]"
    ):
        run(trained, *PGD, "--step", "3")


def test_unfinished_networks_are_named(fresh):
    chain = fresh / "checkpoints" / "seed0" / "T5"
    shutil.rmtree(next(chain.glob("generation1-*")))
    shutil.rmtree(next(chain.glob("generation0-*")) / str(EPOCHS * STEPS))
    with pytest.raises(ValueError, match="expected finished networks") as error:
        run(fresh, *PGD)
    step = (EPOCHS - 1) * STEPS
    missing, finished = str(error.value).split("(finished:")
    assert (
        f"T=5, seed 0, generation 0 after epoch {EPOCHS - 1} of {EPOCHS} (step {step})" in missing
    )
    assert "T=5, seed 0, generation 1 without a whole checkpoint" in missing
    assert "T=1, seed 0, generation 0; T=1, seed 0, generation 1)" in finished
    assert not (fresh / "attacks").exists()
    run(fresh, *PGD, "--temperature", "1")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--attack to be one of apgd, apgd_targeted, autoattack,"),
        (["--attack", "foo"], "spatial, spsa, square, got 'foo'"),
        (["--attack", "pgd"], "--eps with --attack pgd, got none; pass it: Radius"),
        (["--attack", "pgd", "--eps", "x"], "--eps to be a number, got 'x'"),
        (["--attack", "pgd", "--eps", "1/0"], "--eps to be a number, got '1/0'"),
        (["--attack", "pgd", "--eps", "1", "--num-steps", "1.5"], "--num-steps to be a whole"),
        (["--attack", "pgd", "--epsilon", "1"], "among --eps, --norm, --num-steps, --step-size,"),
        (["--attack", "deepfool", "--eps", "1"], "got --eps 1"),
        (["elsewhere", "--attack", "deepfool"], "got elsewhere"),
        (
            ["--attack", "fgsm", "--eps", "1", "--loss", "l"],
            "'cross_entropy', 'margin', 'soft_margin', 'dlr', got 'l'",
        ),
        (["--attack", "jsma", "--output-temperature", "2"], "--output softmax_at beside"),
        (
            ["--attack", "jsma", "--output", "softmax_at", "--output-temperature", "0"],
            "expected output_temperature > 0",
        ),
        (["--attack", "deepfool", "--num-examples", "0"], "num_examples to be a whole number"),
        (["--attack", "deepfool", "--batch-size", "0"], "batch_size to be a whole number"),
        (["--attack", "deepfool", "--key", "4294967296"], "expected key in [0,"),
        (["--attack", "deepfool", "--targets", "some"], "least_likely"),
    ],
)
def test_a_bad_command_line_ends_in_one_line(arguments, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        commands.main(["attack", str(tmp_path), *arguments])
    assert error.value.code == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    assert words in printed.err + printed.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fgsm", "--eps", "1", "--norm", "l3"], "norm to be one of 'linf', 'l2', 'l1', got 'l3'"),
        (["fgsm", "--eps", "-1"], "expected eps >= 0, got -1.0"),
        (["fgsm", "--eps", "nan"], "expected eps >= 0, got nan"),
        (["jsma", "--theta", "0"], "expected theta finite and not 0"),
        (["deepfool", "--num-steps", "0"], "num_steps to be a whole number >= 1, got 0"),
        (["deepfool", "--num-examples", "401"], "num_examples <= 400, the test set of digits"),
        (["deepfool", "--temperature", "3"], "temperature among 1.0, 5.0, .*, got 3"),
        (["deepfool", "--seed", "1"], "seed among 0, .*, got 1"),
        (["deepfool", "--generation", "2"], "generation among 0, 1, .*, got 2"),
    ],
)
def test_bad_settings_are_named_and_write_nothing(arguments, words, fresh):
    with pytest.raises(ValueError, match=words):
        run(fresh, "--attack", *arguments)
    assert not (fresh / "attacks").exists()


def test_other_folders_and_other_data_are_refused(fresh, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"workdir of a run, got .*no config\.json"):
        run(tmp_path / "nothing", *PGD)
    path = fresh / "config.json"
    config = json.loads(path.read_text())
    study = {**config["study"], "dataset_checksum": "0"}
    path.write_text(json.dumps({**config, "study": study}))
    with pytest.raises(ValueError, match="its checksum is another"):
        run(fresh, *PGD)
    path.write_text(json.dumps(_workdir.sealed({**config, "study": study})))
    with pytest.raises(ValueError, match="dataset_checksum is '0', this study's"):
        run(fresh, *PGD)
    path.write_text(json.dumps(_workdir.sealed({**config, "recipe": None})))
    with pytest.raises(ValueError, match=r"made by `jdistill defend`.*study\.networks"):
        run(fresh, *PGD)
    path.write_text(json.dumps(_workdir.sealed({**config, "recipe": {"speed": 3}})))
    with pytest.raises(ValueError, match=r"recipe of a run in .*speed"):
        run(fresh, *PGD)
    with pytest.raises(ValueError, match="expected the workdir of a run, got none; pass it first"):
        run("", *PGD)


# The options, out of the signatures


def test_every_attack_on_single_examples_is_offered():
    found = {
        name
        for name in attacks.__all__
        if inspect.isfunction(getattr(attacks, name))
        and inspect.signature(getattr(attacks, name)).return_annotation is attacks.AttackResult
    }
    assert set(attack_options.ATTACKS) == found - {"ensemble", "transfer", "universal"}
    assert len(attack_options.ATTACKS) >= 13


def test_every_loss_of_logits_and_labels_is_offered():
    found = {
        name
        for name, loss in vars(losses).items()
        if inspect.isfunction(loss)
        and not name.startswith("_")
        and list(inspect.signature(loss).parameters)[:2] == ["logits", "labels"]
    }
    assert set(attack_options.CHOICES["loss"]) == found - {"largest_other", "targeted_dlr"}


@pytest.mark.parametrize("name", sorted(attack_options.ATTACKS))
def test_options_are_those_of_the_signature(name, capsys):
    signature = inspect.signature(attack_options.ATTACKS[name]).parameters
    options = attack_options.options(name)
    assert not {o.name for o in options} & {f.name for f in dataclasses.fields(attack.Options)}
    left_out = {"logits_fn", "key", "inputs", "labels", "bounds", "targets", "init"}
    left_out |= {"batch_size", "devices", "start", "callback"}  # of a driver
    assert {o.name for o in options} - {"output_temperature"} == set(signature) - left_out
    needed = [word for o in options if o.required for word in (o.flag, "0.25")]
    _, settings = attack.parse(["somewhere", "--attack", name, *needed])
    bound = attack_options.bind(name, settings, temperature=3.0)
    for setting, value in bound.keywords.items():
        default = signature[setting].default
        assert value == (0.25 if default is inspect.Parameter.empty else default), setting
        assert value is default or not callable(value)
    assert attack_options.folder_name(name, settings, {}) == (
        f"{name}_eps=0.25" if needed else name
    )
    with pytest.raises(SystemExit) as error:
        attack.parse(["--attack", name, "--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert all(option.flag in text and option.help for option in options)
    assert attack_options.summary(name)[:40] in text
    assert not any(word in text for word in ("may be traced", "scalar or", "; static"))


def test_help_lists_the_attacks(capsys):
    with pytest.raises(SystemExit) as error:
        attack.parse(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    for name in attack_options.ATTACKS:
        assert f"    {name} " in text
    for field in dataclasses.fields(attack.Options):
        assert field.name == "workdir" or f"--{field.name.replace('_', '-')}" in text


def test_values_and_names():
    given = ["--eps", "8/255", "--loss", "margin", "--no-random-start", "--step-size=1e-3"]
    _, settings = attack.parse(["run", "--attack=pgd", *given])
    assert settings["eps"] == 8 / 255
    assert (settings["loss"], settings["random_start"]) == ("margin", False)
    assert attack_options.bind("pgd", settings, 1.0).keywords["loss"] is losses.margin
    name = attack_options.folder_name("pgd", settings, {"examples": (5, None), "key": (0, 0)})
    assert name == (
        f"pgd_eps={8 / 255!r}_step_size=0.001_random_start=False_loss=margin_examples=5"
    )
    _, settings = attack.parse(["run", "--attack", "jsma", "--theta", "-1"])
    assert settings["theta"] == -1.0
    # Long names are cut, and stay apart.
    cut = {attack_options.folder_name("jsma", settings, {"x": ("y" * 300 + c, "")}) for c in "ab"}
    assert len(cut) == 2
    assert {len(name) for name in cut} == {200}


# -------------------------------------------------------------------------------------------------
# experiments.transfer


def test_transfer_is_judged_by_every_network(fresh, capsys):
    settings = ["--num-examples", "24", "--num-searches", "3", "--num-steps", "20"]
    transfer.main([str(fresh), "--confidences", "30", "0", *settings])
    rows = table(fresh / "transfer" / "transfer.csv")
    assert len(rows) == 2 * 4
    dataset = data.load("digits")
    inputs, labels = dataset.test.inputs[:24], dataset.test.labels[:24]
    source, judge = network(fresh, 1, 0), network(fresh, 5, 1)
    crafted = attacks.carlini_wagner_l2(
        source,
        None,
        inputs,
        labels,
        confidence=30.0,
        num_searches=3,
        num_steps=20,
        learning_rate=0.1,
        initial_const=0.1,
    )
    right = np.logical_and(
        *(np.asarray(one(inputs)).argmax(1) == labels for one in (source, judge))
    )
    fooled = np.asarray(judge(crafted.inputs)).argmax(1) != labels
    (row,) = (
        row
        for row in rows
        if (row["confidence"], row["temperature"], row["generation"]) == ("30.0", "5.0", "1")
    )
    assert int(row["num_examples"]) == right.sum()
    assert float(row["success_rate"]) == pytest.approx(fooled[right].mean())
    itself = [row for row in rows if (row["temperature"], row["generation"]) == ("1.0", "0")]
    assert float(itself[0]["success_rate"]) > 0.5  # the white-box attack
    printed = capsys.readouterr().out
    assert "κ = 0  κ = 30" in printed
    assert (fresh / "transfer" / "transfer.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("given", "message"),
    [(["-1"], "expected confidences >= 0, got -1.0"), ([], "expected at least one confidence")],
)
def test_transfer_names_what_is_wrong(fresh, given, message, capsys):
    with pytest.raises(SystemExit) as error:
        transfer.main([str(fresh), "--confidences", *given])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
    assert not (fresh / "transfer").exists()
