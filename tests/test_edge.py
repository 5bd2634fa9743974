"""Students for the edge: the recipe, and the exports of a study with their sizes and times."""

import csv
import dataclasses
import functools
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, data, evaluate, export, nets, runtime, study, train
from jdistill.commands import _defend
from jdistill.study import RECIPES, EdgeRecipe, Stage, Study, _deploy, _workdir
from jdistill.typing import Batch
from tests.report_rows import Page

SHAPE = (28, 28, 1)
RECIPE = RECIPES["edge-mnist"]


def num_parameters(model, shape=SHAPE):
    params, _ = jax.eval_shape(lambda key: nets.init(model, key, shape), jax.random.key(0))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


# --- The recipe ----------------------------------------------------------------------------------


def test_students_have_the_shares_of_the_teacher_that_they_are_named_by():
    chains = RECIPE.study().chains
    teacher = num_parameters(nets.mnist_net())
    assert teacher == 312_202
    shares = {"78k": 1 / 4, "20k": 1 / 16, "5k": 1 / 64, "87k EMO": 1 / 4}
    for name, share in shares.items():
        first, student = chains[name]
        assert num_parameters(first.model) == teacher
        number = num_parameters(student.model)
        assert number / teacher == pytest.approx(share, rel=0.15), name
        assert name.split()[0] == f"{round(number / 1000)}k"
    through = chains["78k-20k-5k"]
    assert [stage.model for stage in through] == [
        *(stage.model for stage in chains["78k"]),
        *(chains[name][1].model for name in ("20k", "5k")),
    ]
    assert chains["5k alone"][0].model == through[-1].model


def test_students_learn_from_soft_and_true_labels_and_the_teacher_from_true_ones():
    """At T with its square, against the formula in NumPy; the teacher's loss has no T."""
    draw = np.random.default_rng(0)
    logits, soft = draw.normal(size=(5, 10)), draw.dirichlet(np.ones(10), 5)
    labels = draw.integers(0, 10, 5)

    def cross_entropy(z, rows):
        return -(rows * (z - np.log(np.exp(z).sum(1, keepdims=True)))).sum(1)

    hard = cross_entropy(logits, np.eye(10)[labels])
    own = dataclasses.replace(RECIPE, hard_weight=0.3).study()
    batch = Batch(None, jnp.asarray(labels), jnp.asarray(soft), jnp.ones(5))
    found = own.student_loss(4.0)(jnp.asarray(logits), batch)
    wanted = 0.7 * 16 * cross_entropy(logits / 4, soft) + 0.3 * hard
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    batch = batch._replace(targets=jnp.eye(10)[labels])
    np.testing.assert_allclose(own.teacher_loss(4.0)(jnp.asarray(logits), batch), hard, rtol=1e-5)


def test_the_smallest_recipe_is_a_study():
    small = RECIPE.smallest()
    own = small.study()
    assert own.deployed
    assert {stage.num_epochs for stages in own.chains.values() for stage in stages} == {1}
    assert own.attacks["autoattack"].num_examples == 4
    assert own.attacks["fgsm"].attack.keywords == {"eps": 0.1}
    assert "87k EMO" not in own.chains
    # The quarter is trained once, for its own sake and as an assistant.
    assert len(own.trained_stages()) == 7


def test_options_of_the_command(capsys):
    options = ["--temperatures", "2", "8", "--hard-weight", "0.5", "--no-efficient"]
    recipe, _ = _defend.parse(["edge-mnist", *options])
    assert recipe == dataclasses.replace(
        RECIPE, temperatures=(2.0, 8.0), hard_weight=0.5, efficient=False
    )
    with pytest.raises(SystemExit):
        _defend.parse(["edge-mnist", "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(EdgeRecipe):
        assert ("--" + field.name.replace("_", "-") in text) == (field.name != "dataset")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "cifar10"}, "dataset"),
        ({"epochs": 0}, "epochs"),
        ({"train_examples": 0}, "train_examples"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"hard_weight": 1.5}, "hard_weight"),
        ({"eps": 0.0}, "eps"),
        ({"attack_examples": 0}, "attack_examples"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **options)


# --- Deployed students of a study ----------------------------------------------------------------


def digits():
    found = data.load("digits")
    return tuple(column[:128] for column in found.train), tuple(c[:60] for c in found.test)


def stage(width):
    return Stage(model=nets.digits_net(width), optimizer=train.sgd(0.05), num_epochs=1)


STUDY = Study(
    data=digits,
    name="digits",
    chains=[stage(0.5), stage(0.125)],
    seeds=(3, 5),
    batch_size=32,
    attacks={"fgsm": evaluate.AttackPlan(functools.partial(attacks.fgsm, eps=0.1), 20)},
    num_sensitivity=4,
    deployed=True,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study's workdir, never to be written."""
    folder = tmp_path_factory.mktemp("study") / "run"
    study.run(STUDY, folder)
    return folder


def test_the_first_seeds_teacher_and_student_are_exported(finished):
    """They load again, and give the logits of the networks that were trained."""
    rows = study.load(finished).rows["deployment"]
    assert [(row["seed"], row["generation"]) for row in rows] == [(3, 0), (3, 1)]
    networks = study.networks(STUDY, finished, seeds=(3,))
    assert {path.name for path in (finished / "exports").iterdir()} == {
        network.stem for network in networks
    }
    _, (inputs, _) = digits()
    for row, network in zip(rows, networks, strict=True):
        place = finished / "exports" / row["export"]
        wanted = np.asarray(network.logits_fn(inputs))
        assert np.ptp(wanted) > 0.1
        np.testing.assert_allclose(export.load(place)(inputs), wanted, rtol=1e-4, atol=1e-5)
        program = export.load_stablehlo(place)
        np.testing.assert_allclose(program(inputs), wanted, rtol=1e-4, atol=1e-5)


def test_sizes_are_those_of_the_files(finished):
    rows = study.load(finished).rows["deployment"]
    for row, width in zip(rows, (0.5, 0.125), strict=True):
        place = finished / "exports" / row["export"]
        with np.load(place / "weights.npz") as weights:
            assert row["parameters"] == sum(weights[name].size for name in weights.files)
        assert row["parameters"] == num_parameters(nets.digits_net(width), (8, 8, 1))
        assert row["weights_bytes"] == (place / "weights.npz").stat().st_size
        assert row["program_bytes"] == (place / "model.stablehlo").stat().st_size
        assert row["backend"] == jax.default_backend()
        assert row["num_calls"] > 1
        assert row["milliseconds_per_image_batch_1"] > 0
        assert row["milliseconds_per_image_batch_128"] > 0
    teacher, student = rows
    assert teacher["share_of_first"] == 1
    assert student["share_of_first"] == student["parameters"] / teacher["parameters"] < 0.2


def test_running_statistics_are_no_parameters(tmp_path):
    """Of a network with batch normalization, which its file of weights holds as well."""
    model = nets.resnet(8)
    params, model_state = nets.init(model, jax.random.key(0), (8, 8, 1))
    network = nets.logits_fn(model, {"params": params, **model_state})
    place = export.save(tmp_path, network, input_shape=(8, 8, 1))
    found = _deploy._whole(place)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert jax.tree.leaves(model_state)


def test_the_page_shows_them_with_the_exported_seeds_accuracy(finished):
    page = Page(finished / "report.html")
    start = page.text.index("Size and speed")
    section = page.text[start : page.text.index("Sensitivity of single examples")]
    assert "A smaller network is not a more robust one." in section
    assert f"measured on {jax.default_backend()}" in section
    tables = study.load(finished).rows
    shown = {}
    for value, cells, _ in page.numbers:
        match = re.match(r"^deployment\.csv#(\w+)@(\d+)\|mean$", cells)
        if match:
            shown[match[1], int(match[2])] = float(value)
    assert len(shown) == 2 * 5
    for (column, place), value in shown.items():
        assert value == tables["deployment"][place][column]
    # In its table, the accuracies are of seed 3 alone.
    source = page.source[page.source.index("<summary>Size and speed") :]
    source = source[: source.index("</details>")]
    places = re.findall(r"results\.csv#test_accuracy@([\d,]+)\|mean", source)
    assert [tables["results"][int(place)]["seed"] for place in places] == [3, 3]


def unchanged(one, other):
    """Table, exports, and everything that is of them, byte for byte."""
    names = [path.relative_to(one) for path in (one / "exports").rglob("*") if path.is_file()]
    assert len(names) == 6
    for name in ("deployment.csv", "results.csv", *names):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_another_run_measures_no_time_again(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    monkeypatch.setattr(_deploy, "_milliseconds", None)
    study.run(STUDY, folder)
    unchanged(finished, folder)
    # Nor with the table gone, or a file of an export damaged.
    (folder / "deployment.csv").unlink()
    first, second = sorted((folder / "exports").iterdir())
    (first / "config.json").write_text("{")
    (second / "weights.npz").write_bytes(b"cut")
    study.run(STUDY, folder)
    unchanged(finished, folder)


def test_stopped_between_two_exports_it_keeps_the_first(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "deployment.csv").unlink()
    rows = study.load(finished).rows["deployment"]
    student = rows[1]["export"]
    shutil.rmtree(folder / "exports" / student)
    (shard,) = (path for path in (folder / "shards/deployment").iterdir() if student in path.name)
    shard.unlink()
    monkeypatch.setattr(_deploy, "_milliseconds", lambda network, inputs, size: 0.25 * size)
    found = study.run(STUDY, folder).rows["deployment"]
    times = ("milliseconds_per_image_batch_1", "milliseconds_per_image_batch_128")
    assert found[0] == rows[0]
    assert found[1] == {**rows[1], **dict(zip(times, (0.25, 32.0), strict=True))}


def test_a_workdir_may_turn_it_on_and_off(finished, tmp_path, monkeypatch):
    """Nothing that is trained or measured depends on it."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    plain = dataclasses.replace(STUDY, deployed=False)
    monkeypatch.setattr(train.TrainStep, "__call__", None)
    monkeypatch.setattr(_deploy, "_milliseconds", None)
    tables = study.run(plain, folder)
    assert not (folder / "deployment.csv").exists()
    assert "deployment.csv" not in _workdir.check_seal(folder)
    assert tables.rows["deployment"] == []
    assert "Size and speed" not in Page(tables.report).text
    study.run(STUDY, folder)
    unchanged(finished, folder)
    config = json.loads((finished / "config.json").read_text())
    assert "deployed" not in json.dumps(config["study"])


def test_chains_that_share_a_teacher_have_one_row_of_it(tmp_path, monkeypatch):
    """One that has no teacher has no share; a student within a longer chain is its assistant."""
    monkeypatch.setattr(_deploy, "_milliseconds", lambda network, inputs, size: 1.0)
    chains = {
        "small": [stage(0.5), stage(0.125)],
        "middle": [stage(0.5), stage(0.25)],
        "through": [stage(0.5), stage(0.25), stage(0.125)],
        "alone": [stage(0.125)],
    }
    own = dataclasses.replace(STUDY, chains=chains, seeds=(3,), temperatures=(2.0,))
    study.run(own, tmp_path / "run")
    with open(tmp_path / "run/deployment.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    shares = {
        (row["chain"], int(row["generation"])): row["share_of_first"] and int(row["parameters"])
        for row in rows
    }
    sizes = [num_parameters(nets.digits_net(width), (8, 8, 1)) for width in (0.5, 0.25, 0.125)]
    assert shares == {
        ("small", 0): sizes[0],
        ("small", 1): sizes[2],
        ("through", 1): sizes[1],
        ("through", 2): sizes[2],
        ("alone", 0): "",
    }


def dense(params, inputs):
    return inputs.reshape(inputs.shape[0], 64) @ params


def test_a_frozen_teacher_without_weights_is_left_out(tmp_path, monkeypatch):
    """And a student that no file can hold is named."""
    monkeypatch.setattr(_deploy, "_milliseconds", lambda network, inputs, size: 1.0)
    directions = np.linspace(-1, 1, 640, dtype=np.float32).reshape(64, 10)

    def frozen(inputs):
        return dense(directions, inputs)

    own = dataclasses.replace(STUDY, chains=[Stage(frozen=frozen), stage(0.125)], seeds=(3,))
    (row,) = study.run(own, tmp_path / "run").rows["deployment"]
    assert (row["generation"], row["share_of_first"]) == (1, None)

    def refuse(*args, **kwargs):
        raise ValueError("it calls back into Python")

    shutil.rmtree(tmp_path / "run/exports")
    monkeypatch.setattr(export, "save", refuse)
    with pytest.raises(ValueError, match=r"expected students .* generation 1 \(it calls back"):
        study.run(own, tmp_path / "run")


def test_a_time_is_of_one_image_in_compiled_calls(monkeypatch):
    """By a clock that each call moves on: compiling and the first calls do not count."""
    now = [0.0]
    traces, calls = [], []

    def network(inputs):
        traces.append(inputs.shape)
        return inputs.sum((1, 2, 3))[:, None]

    partial = nets.callable_logits_fn(network)
    ready = jax.block_until_ready

    def wait(value):
        calls.append(value.shape)
        now[0] += 100.0 if len(calls) <= 2 else 0.004
        return ready(value)

    monkeypatch.setattr(_deploy.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(_deploy.jax, "block_until_ready", wait)
    images = np.ones((3, 2, 2, 1), np.float32)
    assert _deploy._milliseconds(partial, images, 8) == pytest.approx(0.5)
    assert set(calls) == {(8, 1)}
    assert len(traces) == 1


def test_bad_input_is_named(monkeypatch):
    with pytest.raises(ValueError, match="expected deployed to be True or False"):
        dataclasses.replace(STUDY, deployed="yes")

    def missing():
        raise ImportError("expected the package flatbuffers")

    # Before anything is trained.
    monkeypatch.setattr(_deploy._program, "check_flatbuffers", missing)
    monkeypatch.setattr(runtime, "progress", None)
    with pytest.raises(ImportError, match="flatbuffers"):
        study.run(STUDY, "nowhere")
