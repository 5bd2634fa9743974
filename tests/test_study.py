"""Studies of own data, networks, and losses: run, resumed, extended, refused, damaged."""

import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jdistill import (
    attacks,
    data,
    diagnose,
    distill,
    evaluate,
    nets,
    report,
    runtime,
    study,
    sweep,
    train,
)
from jdistill.study import Stage, Study, _training, _workdir

PGD = evaluate.AttackPlan(functools.partial(attacks.pgd, eps=0.1, num_steps=2), 8)
MARGIN = evaluate.AttackPlan(functools.partial(attacks.deepfool, norm="l2", num_steps=2), 8)


def blobs(num_train=48, num_test=24, shape=(6,), seed=0):
    """Three noisy classes in [0, 1]."""
    rng = np.random.default_rng(seed)
    centers = rng.uniform(0.2, 0.8, (3, *shape))
    splits = []
    for size in (num_train, num_test):
        labels = np.arange(size) % 3
        inputs = np.clip(centers[labels] + rng.normal(0, 0.1, (size, *shape)), 0, 1)
        splits.append((inputs.astype(np.float32), labels))
    return tuple(splits)


def dense(params, inputs):
    return jnp.tanh(inputs @ params["first"]) @ params["second"] + params["bias"][None]


def init_dense(width, key, shape):
    one, two = jax.random.split(key)
    (size,) = shape
    return {
        "first": jax.random.normal(one, (size, width)),
        "second": 0.3 * jax.random.normal(two, (width, 3)),
        "bias": jnp.zeros(3),
    }


def stage(width=8, **options):
    model = (functools.partial(init_dense, width), dense)
    settings = {"optimizer": train.sgd(0.05), "num_epochs": 2, **options}
    return Stage(model=model, **settings)


STAGE = stage()
SMALL = Study(
    data=blobs(),
    name="blobs",
    chains={"no assistant": [STAGE] * 2, "1 assistant": [STAGE] * 3},
    temperatures=(1.0, 5.0),
    batch_size=16,
    initial_epochs=1,
    attacks={"pgd": PGD, "deepfool": MARGIN},
    transfer=("pgd",),
    num_sensitivity=8,
)


class BatchNormNet(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(8)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.5)(x))
        return nn.Dense(3)(x)


def brighter(keys, inputs):
    """Augmentation: some light more or less, per example."""
    light = jax.vmap(lambda key: jax.random.uniform(key, (), minval=-0.05, maxval=0.05))(keys)
    return jnp.clip(inputs + light.reshape((-1,) + (1,) * (inputs.ndim - 1)), 0, 1)


def read(folder):
    """The bytes of everything that is derived."""
    names = [*(f"{kind}.csv" for kind in report.TABLES), "verdicts.json", "metrics.jsonl"]
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study's workdir, never to be written."""
    folder = tmp_path_factory.mktemp("study") / "run"
    study.run(SMALL, folder)
    return folder


@pytest.mark.floor
def test_tables_hold_every_network_and_attack(finished):
    tables = study.load(finished)
    rows = tables.rows["results"]
    places = {(row["temperature"], row["generation"], row["attack"]) for row in rows}
    assert places == {(T, g, a) for T in (1.0, 5.0) for g in range(3) for a in SMALL.attacks}
    assert len(rows) == len(places)
    found = tables.rows["comparisons"]
    assert {(row["generation"], row["baseline_generation"]) for row in found} == {(2, 1)}
    assert "blobs" in str(tables)
    assert tables.report.read_text().startswith("<!DOCTYPE html>")
    assert json.loads((finished / "run.json").read_text())["seconds"] >= 0


def test_accuracies_are_those_of_the_checkpoints_and_distillation_is_the_librarys(finished):
    """Against `distill.chain` by hand, and NumPy."""
    (inputs, labels), (test_inputs, test_labels) = blobs()
    rows = study.load(finished).rows["results"]
    for network in study.networks(SMALL, finished):
        right = (np.asarray(network.logits_fn(test_inputs)).argmax(1) == test_labels).mean()
        own = [
            row
            for row in rows
            if (row["temperature"], row["generation"]) == (network.temperature, network.generation)
        ]
        assert len(own) == 2
        assert all(row["test_accuracy"] == pytest.approx(right, abs=1e-12) for row in own)
    weights_key, key = jax.random.split(jax.random.key(0))
    params, step = STAGE.init(weights_key, (6,))[0], STAGE.step()
    start = distill.initial_weights(step, params, (inputs, labels), key, batch_size=16)
    generation = distill.Generation(step=step, params=start.params, num_epochs=2)
    states = distill.chain([generation] * 3, (inputs, labels), key, temperature=5.0, batch_size=16)
    found = study.networks(SMALL, finished, temperatures=[5.0], generations=[2])
    expected = train.logits_fn(step, states[2])(test_inputs)
    np.testing.assert_allclose(found[0].logits_fn(test_inputs), expected, rtol=1e-5, atol=1e-6)


def test_running_again_changes_and_computes_nothing(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    monkeypatch.setattr(train.TrainStep, "__call__", None)
    monkeypatch.setattr(runtime.ShardFolder, "__setitem__", None)
    study.run(SMALL, folder)
    assert read(folder) == read(finished)


@pytest.mark.floor
def test_trained_first_and_measured_later_is_one_run(finished, tmp_path):
    folder = tmp_path / "run"
    networks = study.train(SMALL, folder)
    assert {(n.temperature, n.generation) for n in networks} == {
        (T, g) for T in (1.0, 5.0) for g in range(3)
    }
    assert set(read(folder)) == {"metrics.jsonl"}
    with pytest.raises(FileNotFoundError, match="expected"):
        study.load(folder)
    again = study.train(SMALL, folder)
    assert [network.weights for network in again] == [network.weights for network in networks]
    study.run(SMALL, folder)
    assert read(folder) == read(finished)


class Stop(Exception):
    pass


def stopped_at(count, folder, monkeypatch, parallel="jit", own=SMALL):
    """Run until the event of this number, and stop there."""
    seen = 0
    original = study._run._Follower.__call__

    def follow(self, event):
        nonlocal seen
        original(self, event)
        seen += 1
        if seen == count:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(study._run._Follower, "__call__", follow)
        with pytest.raises(Stop):
            study.run(own, folder, parallel=parallel)


@pytest.mark.parametrize("count", [2, 9, 23, 41, 50, 60])
def test_stopped_and_resumed_is_uninterrupted(finished, tmp_path, monkeypatch, count):
    stopped_at(count, tmp_path / "run", monkeypatch)
    study.run(SMALL, tmp_path / "run")
    assert read(tmp_path / "run") == read(finished)


def test_a_sweep_trains_the_same_networks(finished, tmp_path):
    study.run(SMALL, tmp_path / "run", parallel="sweep")
    one, other = (study.networks(SMALL, folder) for folder in (finished, tmp_path / "run"))
    assert [network.title for network in one] == [network.title for network in other]
    for network, twin in zip(one, other, strict=True):
        for leaf, same in zip(
            jax.tree.leaves(network.logits_fn), jax.tree.leaves(twin.logits_fn), strict=True
        ):
            np.testing.assert_allclose(leaf, same, rtol=1e-3, atol=1e-4)


def test_a_workdir_grows_along_temperatures_seeds_and_chains(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {network.stem for network in study.networks(SMALL, folder)}
    more = {**SMALL.chains, "2 assistants": [STAGE] * 4}
    grown = dataclasses.replace(SMALL, temperatures=(20.0,), chains=more)
    tables = study.run(grown, folder)
    places = {(row["temperature"], row["generation"]) for row in tables.rows["results"]}
    assert places == {(T, g) for T in (1.0, 5.0, 20.0) for g in range(4)}
    assert before < {network.stem for network in study.networks(grown, folder)}


def edited(params, inputs):
    return 2 * dense(params, inputs)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"batch_size": 8}, "in the workdir batch_size is 16, this study's 8"),
        ({"data": blobs(seed=1)}, "dataset_checksum"),
        ({"attacks": {"pgd": PGD._replace(num_examples=4), "deepfool": MARGIN}}, "num_examples"),
        ({"attacks": {"pgd": PGD}}, "deepfool"),
        ({"student_loss": functools.partial(distill.soft_loss, hard_weight=0.5)}, "student"),
        ({"num_sensitivity": 4}, "num_sensitivity"),
        ({"initial_epochs": 0}, "initial_epochs"),
        ({"chains": {"1 assistant": [STAGE] * 3}}, "'no assistant'"),
        ({"chains": {n: [stage(16)] * len(c) for n, c in SMALL.chains.items()}}, "network"),
        (
            {
                "chains": {
                    n: [dataclasses.replace(STAGE, model=(STAGE.model[0], edited))] * len(c)
                    for n, c in SMALL.chains.items()
                }
            },
            "network",
        ),
        (
            {
                "chains": {
                    n: [dataclasses.replace(STAGE, hyperparams={"learning_rate": 0.1})] * len(c)
                    for n, c in SMALL.chains.items()
                }
            },
            "learning_rate",
        ),
    ],
)
def test_another_study_is_refused_by_name(finished, tmp_path, changed, named):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    with pytest.raises(ValueError, match=named.replace("(", "\\(")):
        study.run(dataclasses.replace(SMALL, **changed), folder)
    assert read(folder) == read(finished)


def test_one_job_at_a_time(finished, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    code = (
        "import sys, time\nfrom etils import epath\nfrom jdistill.study import _workdir\n"
        "with _workdir.held(epath.Path(sys.argv[1])):\n    print('held', flush=True)\n"
        "    time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OSError, match=f"process {process.pid}"):
            study.run(SMALL, folder)
    finally:
        process.kill()
        process.communicate()
    with _workdir.held(_workdir.epath.Path(folder)):  # a killed holder holds nothing
        pass


def test_a_lease_is_taken_over_when_it_has_run_out(tmp_path, monkeypatch):
    place = _workdir.epath.Path(tmp_path)
    with (
        _workdir._leased(place),
        pytest.raises(OSError, match="no other job"),
        _workdir._leased(place),
    ):
        pass
    content = {"id": "1", "holder": "another", "time": 0.0}
    (tmp_path / ".lease").write_text(json.dumps(content))
    with _workdir._leased(place):
        pass
    assert not (tmp_path / ".lease").exists()


# The six kinds of studies, each from data to a report.


def run_smoke(own, folder, **options):
    tables = study.run(own, folder, **options)
    rows = tables.rows["results"]
    assert rows
    assert all(0 <= row["success_rate"] <= 1 for row in rows)
    assert tables.report.exists()
    return tables


def test_linen_with_batch_normalization(tmp_path):
    own = Stage(model=BatchNormNet(), optimizer=optax.adam(1e-2), num_epochs=2)
    tables = run_smoke(
        Study(data=blobs(), chains=[own] * 2, batch_size=16, attacks={"pgd": PGD}), tmp_path / "run"
    )
    assert {row["generation"] for row in tables.rows["results"]} == {0, 1}
    (teacher, _) = study.networks(
        Study(data=blobs(), chains=[own] * 2, batch_size=16, attacks={"pgd": PGD}), tmp_path / "run"
    )
    _, model_state = teacher.logits_fn.args
    assert any(np.abs(leaf).sum() > 0 for leaf in jax.tree.leaves(model_state))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.convolution = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dense = nnx.Linear(4 * 36, 3, rngs=rngs)

    def __call__(self, inputs):
        hidden = nnx.relu(self.norm(self.convolution(inputs)))
        return self.dense(hidden.reshape(hidden.shape[0], -1))


def test_an_nnx_convolutional_network(tmp_path):
    own = Stage(model=nets.nnx_model(NnxNet), optimizer=optax.adam(1e-2), num_epochs=2)
    images = Study(
        data=blobs(shape=(6, 6, 1)),
        chains=[own] * 2,
        batch_size=16,
        attacks={"pgd": PGD, "deepfool": MARGIN},
    )
    run_smoke(images, tmp_path / "run")
    assert (tmp_path / "run/figures/pictures_T1.png").exists()


def test_a_plain_function_on_a_table_with_bounds_per_feature(tmp_path):
    scale = np.array([1, 10, 100, 1, 1, 1], np.float32)
    (x, y), (x_test, y_test) = blobs()
    bounds = (np.zeros(6, np.float32), scale)

    def scaled(params, inputs):
        return dense(params, inputs / scale[None])

    own = Stage(
        model=(functools.partial(init_dense, 8), scaled), optimizer=optax.sgd(0.1), num_epochs=2
    )
    attack = functools.partial(attacks.pgd, eps=0.5, num_steps=3, bounds=bounds)
    verdict = functools.partial(diagnose.masking, eps=0.5, bounds=bounds)
    tables = run_smoke(
        Study(
            data=((x * scale, y), (x_test * scale, y_test)),
            chains=[own] * 2,
            batch_size=16,
            attacks={"pgd": attack},
            verdict=verdict,
            num_verdict=6,
        ),
        tmp_path / "run",
    )
    assert len(tables.rows["verdicts"]) == 2


def test_a_ladder_of_three_sizes_against_none(tmp_path):
    sizes = {width: stage(width) for width in (16, 8, 4)}
    takd = functools.partial(distill.soft_loss, hard_weight=0.3, temperature_squared=True)
    ladder = Study(
        data=blobs(),
        chains={
            "none": [sizes[16], sizes[4]],
            "ladder": [sizes[16], sizes[8], sizes[4]],
        },
        temperatures=(4.0,),
        teacher_loss=lambda _: distill.soft_loss(1.0),
        student_loss=takd,
        batch_size=16,
        attacks={"pgd": PGD},
    )
    tables = run_smoke(ladder, tmp_path / "run")
    places = {(row["chain"], row["generation"]) for row in tables.rows["results"]}
    assert places == {("none", 0), ("none", 1), ("ladder", 0), ("ladder", 1), ("ladder", 2)}
    found = study.networks(ladder, tmp_path / "run")
    teachers = [network.weights for network in found if network.generation == 0]
    assert len(teachers) == 2  # one network, trained once
    assert len(set(teachers)) == 1
    folders = list((tmp_path / "run/checkpoints/seed0/T4").iterdir())
    assert len(folders) == 4
    (comparison, *_) = tables.rows["comparisons"]
    assert (comparison["chain"], comparison["generation"]) == ("ladder", 2)
    assert (comparison["baseline_chain"], comparison["baseline_generation"]) == ("none", 1)


@pytest.mark.parametrize("parallel", ["jit", "sweep"])
def test_an_online_teacher_with_augmentation(tmp_path, parallel):
    own = Study(
        data=blobs(),
        chains=[stage(augment=brighter)] * 2,
        temperatures=(1.0, 4.0),
        online=True,
        batch_size=16,
        attacks={"pgd": PGD},
    )
    run_smoke(own, tmp_path / "run", parallel=parallel)


def test_a_frozen_teacher(tmp_path):
    (x, y), _ = blobs()
    params = init_dense(8, jax.random.key(3), (6,))
    teacher = nets.callable_logits_fn(dense, params)
    own = Study(
        data=blobs(),
        chains=[Stage(frozen=teacher), STAGE],
        temperatures=(2.0,),
        batch_size=16,
        attacks={"pgd": PGD},
    )
    run_smoke(own, tmp_path / "run")
    first, student = study.networks(own, tmp_path / "run")
    np.testing.assert_allclose(first.logits_fn(x), dense(params, x), rtol=1e-6)
    assert (student.generation, student.step) == (1, 6)
    del y
    other = nets.callable_logits_fn(dense, init_dense(8, jax.random.key(4), (6,)))
    with pytest.raises(ValueError, match="frozen"):
        study.run(dataclasses.replace(own, chains=[Stage(frozen=other), STAGE]), tmp_path / "run")


def test_a_users_own_attack(tmp_path):
    def noise(logits_fn, key, inputs, labels):
        del key
        return attacks.fgsm(logits_fn, None, inputs, labels, eps=0.05)

    own = Study(data=blobs(), chains=[STAGE] * 2, batch_size=16, attacks={"mine": noise})
    tables = run_smoke(own, tmp_path / "run")
    assert {row["attack"] for row in tables.rows["results"]} == {"mine"}


# Values, and what is wrong with them.


def test_chains_that_begin_alike_share_their_beginnings():
    other = stage(4)
    chains = {"a": [STAGE] * 2, "b": [STAGE] * 3, "c": [STAGE, other], "d": [STAGE, other]}
    own = dataclasses.replace(SMALL, chains=chains, transfer=())
    assert list(own.longest_chains()) == ["b", "c"]
    assert own.students() == {"a": ("b", 1), "b": ("b", 2), "c": ("c", 1), "d": ("c", 1)}
    assert own.trained_stages() == [STAGE, STAGE, STAGE, other]
    assert SMALL.students() == {name: ("", len(it) - 1) for name, it in SMALL.chains.items()}
    found = _training.chains_of(own)
    one, other = (chain.prints[5.0] for chain in found)
    assert one[0] == other[0]
    assert one[1] != other[1]
    assert found[1].owners == ("b", "c")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chains": {}}, "at least one chain"),
        ({"chains": {"a": []}}, "no stage"),
        ({"chains": {"a": [3]}}, "a Stage"),
        ({"chains": {"a": [STAGE, Stage(frozen=jnp.asarray)]}}, "first stage"),
        ({"chains": {"a": [Stage(frozen=jnp.asarray)]}}, "network that learns"),
        ({"temperatures": (0.0,)}, "temperatures"),
        ({"temperatures": (1.0, 1.0)}, "without repetition"),
        ({"seeds": (-1,)}, "seeds"),
        ({"seeds": (2**32,)}, "seeds"),
        ({"batch_size": 0}, "batch_size"),
        ({"attacks": {}}, "at least one attack"),
        ({"attacks": {"pgd": attacks.pgd}}, "missing a required argument: 'eps'"),
        ({"attacks": {"pgd": 3}}, "function"),
        ({"attacks": {".pgd": PGD}}, "beginning with a dot"),
        ({"chains": {"a/b": [STAGE] * 2}}, "slashes"),
        ({"chains": {1: [STAGE] * 2, "1": [STAGE] * 3}}, "differ as texts"),
        ({"verdict": diagnose.masking}, "verdict with all its settings"),
        ({"transfer": ("nope",)}, "transfer to name some of the attacks"),
        ({"chains": {"a": [STAGE, stage(4)]}}, "chains of one architecture"),
        ({"distances": {"l7": PGD}}, "l7"),
        ({"num_sensitivity": 0}, "num_sensitivity"),
        ({"student_loss": 3}, "student_loss"),
    ],
)
def test_bad_studies(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, **options)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ((1, 2, 3, 4), "test_inputs"),
        ((1, 2), "train split"),
        ((blobs()[0], blobs(shape=(5,))[1]), "one shape"),
        (((np.full((2, 6), np.nan), np.arange(2)), blobs()[1]), "finite"),
    ],
)
def test_bad_data(own, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, data=own).examples()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "model and optimizer"),
        ({"model": BatchNormNet(), "optimizer": None}, "model and optimizer"),
        ({"model": (1,), "optimizer": optax.sgd(1.0)}, "init, apply"),
        ({"model": BatchNormNet(), "optimizer": 3}, "optax"),
        ({"model": BatchNormNet(), "optimizer": optax.sgd(1.0), "num_epochs": -1}, "num_epochs"),
        ({"model": BatchNormNet(), "frozen": jnp.asarray}, "either frozen"),
        ({"frozen": jnp.asarray, "select": "best"}, "select='last' with frozen"),
    ],
)
def test_bad_stages(options, message):
    with pytest.raises(ValueError, match=message):
        Stage(**options)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ((blobs()[0], (255 * blobs()[1][0], blobs()[1][1])), "test inputs, for pgd"),
        (((255 * blobs()[0][0], blobs()[0][1]), blobs()[1]), "training inputs, for pgd"),
        (
            (blobs()[0], (255 * blobs()[1][0], blobs()[1][1]), blobs()[1]),
            r"validation inputs, for pgd, in \[0, 1\]",
        ),
        ((blobs()[0], (blobs()[1][0], np.full(24, 3))), "test labels"),
        ((blobs()[0], (blobs()[1][0], np.full(24, 1))), "class"),
    ],
)
def test_data_that_attacks_cannot_take_is_refused_before_training(tmp_path, own, message):
    with pytest.raises(ValueError, match=message):
        study.run(dataclasses.replace(SMALL, data=own), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("boxes", [[(0.0, 255.0)], [(-np.inf, np.inf)], [(0.0, 1.0), (0.0, 255.0)]])
def test_training_inputs_that_an_attack_would_take_are_not_refused(boxes):
    inputs = np.linspace(0, 1, 48, dtype=np.float32).reshape(12, 4)
    labels = np.arange(12) % 3
    plans = {
        str(number): functools.partial(attacks.pgd, eps=0.1, bounds=bounds)
        for number, bounds in enumerate(boxes)
    }
    own = dataclasses.replace(
        SMALL, data=((255 * inputs, labels), (inputs, labels)), attacks=plans, transfer=()
    )
    study._run._check_examples(own, own.examples())


def test_other_examples_of_a_data_set_are_another_study(tmp_path):
    (x, y), (x_test, y_test) = blobs(96)

    def dataset(part):
        splits = data.Split(x[part], y[part]), data.Split(x_test, y_test)
        return data.Dataset("same", splits[0], splits[1], splits[1], 3, "1", "f", "checksum", "")

    one = dataclasses.replace(SMALL, data=dataset(slice(0, 48)))
    study.run(one, tmp_path / "run")
    with pytest.raises(ValueError, match="dataset_checksum"):
        study.run(dataclasses.replace(one, data=dataset(slice(48, 96))), tmp_path / "run")


def test_checkpoints_know_their_losses_without_a_config(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(ValueError, match=r"config.json beside the checkpoints"):
        study.run(SMALL, tmp_path / "run")
    other = functools.partial(distill.soft_loss, hard_weight=0.5)
    fresh = tmp_path / "other"
    study.run(dataclasses.replace(SMALL, student_loss=other), fresh)
    for place in (fresh / "checkpoints/seed0/T5").iterdir():
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "run/checkpoints/seed0/T5" / place.name, place)
    with pytest.raises(ValueError, match="losses"):
        study.run(dataclasses.replace(SMALL, student_loss=other), fresh)


@pytest.mark.parametrize("parallel", ["jit", "sweep"])
def test_losses_see_the_temperatures_as_they_are_given(tmp_path, parallel):
    losses = {0.7: distill.soft_loss(0.7), 5.0: distill.soft_loss(5.0)}
    own = dataclasses.replace(
        SMALL, temperatures=(0.7, 5.0), teacher_loss=losses.get, student_loss=losses.__getitem__
    )
    run_smoke(own, tmp_path / "run", parallel=parallel)


def test_a_stage_of_no_epochs_is_kept(tmp_path):
    chain = [stage(num_epochs=0), STAGE, STAGE]
    own = dataclasses.replace(SMALL, chains=chain)
    run_smoke(own, tmp_path / "run")
    before = read(tmp_path / "run")
    run_smoke(own, tmp_path / "run")
    assert read(tmp_path / "run") == before
    assert [network.step for network in study.networks(own, tmp_path / "run", temperatures=[1.0])]


def test_numbers_and_weights_of_other_types(tmp_path):
    init = functools.partial(init_dense, 8)
    model = (
        lambda key, shape: jax.tree.map(lambda w: w.astype("bfloat16"), init(key, shape)),
        dense,
    )
    own = dataclasses.replace(
        SMALL,
        chains=[Stage(model=model, optimizer=optax.sgd(0.1), num_epochs=np.int64(1))] * 2,
        seeds=np.arange(2),
        batch_size=np.int64(16),
        temperatures=np.float32([1, 5]),
    )
    run_smoke(own, tmp_path / "run")


def test_the_default_loss_follows_online(tmp_path):
    online = dataclasses.replace(SMALL, online=True)
    run_smoke(online, tmp_path / "online")
    run_smoke(dataclasses.replace(online, online=False), tmp_path / "offline")


def test_networks_are_found_by_the_names_of_their_chains_and_each_student_is_judged(tmp_path):
    own = dataclasses.replace(
        SMALL,
        temperatures=(1.0,),
        verdict=functools.partial(diagnose.masking, eps=0.1),
        num_verdict=6,
    )
    tables = study.run(own, tmp_path / "run")
    assert [row["generation"] for row in tables.rows["verdicts"]] == [0, 1, 2]
    found = {
        name: [each.generation for each in study.networks(own, tmp_path / "run", chains=[name])]
        for name in own.chains
    }
    assert found == {"no assistant": [0, 1], "1 assistant": [0, 1, 2]}


def test_a_rate_written_otherwise_is_the_same_study(tmp_path):
    def of(rate):
        return dataclasses.replace(SMALL, chains=[stage(hyperparams={"learning_rate": rate})] * 2)

    study.run(of(lambda T: 0.05 * T), tmp_path / "run")
    before = read(tmp_path / "run")
    study.run(of(lambda T: T * 0.05), tmp_path / "run", recipe={"kept": 1})
    assert read(tmp_path / "run") == before
    study.run(of(0.05), tmp_path / "one")
    study.run(of(lambda T: T * 0.05), tmp_path / "run")
    assert json.loads((tmp_path / "run/config.json").read_text())["recipe"] == {"kept": 1}


# The best epoch instead of the last.


def with_validation(seed=3):
    """Blobs that one can hardly tell apart, so that the accuracy goes up and down."""
    rng = np.random.default_rng(seed)
    (inputs, labels), test = blobs(90)
    noisy = np.clip(inputs + rng.normal(0, 0.4, inputs.shape), 0, 1).astype(np.float32)
    return (noisy[:48], labels[:48]), (noisy[48:], labels[48:]), test


BEST = dataclasses.replace(
    SMALL,
    data=with_validation(),
    chains=[stage(optimizer=train.sgd(0.5), num_epochs=8, select="best")] * 2,
    temperatures=(1.0,),
    attacks={"pgd": PGD},
    transfer=(),
)


@pytest.fixture(scope="module")
def selected(tmp_path_factory):
    """The workdir of a study of best epochs, never to be written."""
    folder = tmp_path_factory.mktemp("best") / "run"
    study.run(BEST, folder)
    return folder


def weights(own, folder):
    return [(network.step, network.weights) for network in study.networks(own, folder)]


@pytest.mark.floor
def test_the_best_epoch_is_that_of_the_validation_examples(selected):
    """Against both generations by hand, epoch by epoch."""
    examples, (inputs, labels), _ = with_validation()
    (own,) = BEST.chains.values()
    weights_key, key = jax.random.split(jax.random.key(0))
    step, teacher = own[0].step(), None
    params = own[0].init(weights_key, (6,))[0]
    start = distill.initial_weights(step, params, examples, key, batch_size=16)
    generation = distill.Generation(step=step, params=start.params, num_epochs=8)
    for network in study.networks(BEST, selected):
        epochs = []

        def keep(event, epochs=epochs):
            if event["event"] == "epoch":
                logits = train.logits_fn(step, event["state"])(inputs)
                epochs.append(((np.argmax(logits, 1) == labels).mean(), event["state"]))

        distill.chain(
            [generation],
            examples,
            key,
            temperature=1.0,
            teacher=teacher,
            batch_size=16,
            callback=keep,
        )
        accuracies = [accuracy for accuracy, _ in epochs]
        best = accuracies.index(max(accuracies))
        assert best < 7  # another than the last, or the test would say nothing
        assert network.step == 3 * (best + 1)
        teacher = train.logits_fn(step, epochs[best][1])
        for leaf, same in zip(
            jax.tree.leaves(network.logits_fn), jax.tree.leaves(teacher), strict=True
        ):
            np.testing.assert_array_equal(leaf, same)
        logged = [
            line["validation_accuracy"]
            for line in runtime.read_jsonl(selected / "metrics.jsonl")
            if line.get("generation") == network.generation
        ]
        assert logged == pytest.approx(accuracies)
    rows = study.load(selected).rows["results"]
    test_inputs, test_labels = BEST.data[2]
    right = [
        (np.asarray(network.logits_fn(test_inputs)).argmax(1) == test_labels).mean()
        for network in study.networks(BEST, selected)
    ]
    assert [row["test_accuracy"] for row in rows] == pytest.approx(right)


@pytest.mark.parametrize("count", [22, 36, 60])
def test_a_best_epoch_stopped_and_resumed_is_the_same(selected, tmp_path, monkeypatch, count):
    stopped_at(count, tmp_path / "run", monkeypatch, own=BEST)
    study.run(BEST, tmp_path / "run")
    assert weights(BEST, tmp_path / "run") == weights(BEST, selected)
    assert read(tmp_path / "run") == read(selected)


def test_a_best_epoch_damaged_while_its_network_learns_is_no_other(selected, tmp_path, monkeypatch):
    """Refused, and learned again by the next call."""
    folder = tmp_path / "run"
    best = weights(BEST, selected)[1][0]
    assert best < 21  # so that its checkpoint is on the disk before the last epoch
    damaged = []

    def follow(self, event, original=study._run._Follower.__call__):
        original(self, event)
        if event["event"] == "epoch" and event["step"] == 24 and not damaged:
            damaged.extend(folder.glob(f"checkpoints/*/*/generation1-*/{best}/metadata/metadata"))
            for path in damaged:
                path.write_bytes(b"")

    with monkeypatch.context() as patch:
        patch.setattr(study._run._Follower, "__call__", follow)
        with pytest.raises(OSError, match=f"best epoch, step {best}, in .* run the same command"):
            study.train(BEST, folder)
    assert len(damaged) == 1
    study.run(BEST, folder)
    assert weights(BEST, folder) == weights(BEST, selected)


def test_the_best_epoch_under_pmap_goes_on_under_jit(tmp_path):
    networks = study.train(BEST, tmp_path / "run", parallel="pmap")
    again = study.train(BEST, tmp_path / "run")
    own = [(network.step, network.weights) for network in networks]
    assert own == [(network.step, network.weights) for network in again]
    assert own == weights(BEST, tmp_path / "run")


@pytest.mark.parametrize("item", ["state/manifest.ocdbt", "metadata/metadata"])
def test_a_damaged_best_epoch_is_learned_again(selected, tmp_path, item):
    folder = tmp_path / "run"
    shutil.copytree(selected, folder)
    teacher, _ = study.networks(BEST, selected)
    (place,) = folder.glob(f"checkpoints/seed0/T1/generation0-*/{teacher.step}")
    (place / item).write_bytes(b"")
    with pytest.raises(ValueError, match="without a whole checkpoint of its best epoch"):
        study.networks(BEST, folder)
    study.run(BEST, folder)
    assert weights(BEST, folder) == weights(BEST, selected)


def test_the_best_epoch_is_part_of_what_a_workdir_is(selected, finished, tmp_path):
    def refused(own, named, **options):
        with pytest.raises(ValueError, match=named):
            study.run(own, tmp_path / "run", **options)

    shutil.copytree(selected, tmp_path / "run")
    (own,) = BEST.chains.values()
    last = [dataclasses.replace(each, select="last") for each in own]
    refused(dataclasses.replace(BEST, chains=last), "select is 'best', this study's None")
    one, (inputs, labels), other = with_validation()
    refused(
        dataclasses.replace(BEST, data=(one, (inputs[::-1], labels[::-1]), other)),
        "validation_checksum",
    )
    refused(BEST, r"select='last' in a sweep, got one with 'best'", parallel="sweep")
    # What does not ask for it is described as before there was any choice.
    assert "select" not in (finished / "config.json").read_text()
    assert "validation" not in (finished / "config.json").read_text()


def test_the_best_epoch_wants_validation_examples():
    without = dataclasses.replace(BEST, data=blobs(), name="own")
    with pytest.raises(
        ValueError, match=r"validation examples for select='best', got none in .*own"
    ):
        without.examples()
    one, _, other = with_validation()
    empty = np.zeros((0, 6), np.float32), np.zeros(0, int)
    with pytest.raises(ValueError, match=r"validation|empty|at least one"):
        dataclasses.replace(BEST, data=(one, empty, other)).examples()
    with pytest.raises(ValueError, match=r"select to be one of 'last', 'best', got 'first'"):
        stage(select="first")
    digits = dataclasses.replace(BEST, data=functools.partial(data.load, "digits"))
    assert digits.examples().validation is not None
    assert dataclasses.replace(digits, chains=SMALL.chains).examples().validation is None
    assert len(study.smoke(BEST).examples().validation.labels) == 32


def test_a_generation_ends_with_the_state_that_it_selects():
    (own,) = BEST.chains.values()
    params = own[0].init(jax.random.key(0), (6,))[0]
    first = []

    def keep(event):
        if event["event"] == "epoch" and event["epoch"] == 1:
            first.append(event["state"])

    generation = distill.Generation(
        step=own[0].step(), params=params, num_epochs=3, select=lambda _: first[-1]
    )
    arguments = [generation] * 2, BEST.data[0], jax.random.key(1)
    states = distill.chain(*arguments, temperature=1.0, callback=keep)
    assert [int(state.step) for state in states] == [1, 1]
    with pytest.raises(ValueError, match="without select in a sweep"):
        sweep.chain(*arguments, temperature=1.0)
    with pytest.raises(ValueError, match="select"):
        distill.chain([dataclasses.replace(generation, select=3)], *arguments[1:], temperature=1.0)


def test_smoke_is_small_and_keeps_the_kinds():
    small = study.smoke(dataclasses.replace(SMALL, temperatures=(1.0, 5.0, 20.0), seeds=(0, 1)))
    assert (small.temperatures, small.seeds) == ((1.0, 5.0), (0,))
    assert small.attacks.keys() == SMALL.attacks.keys()
    assert len(small.examples().test.labels) == 24
    assert small.examples().name == "blobs"


def test_data_that_does_not_fit_is_refused_before(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda _: 20)
    with pytest.raises(MemoryError, match="GiB"):
        SMALL.examples()


def test_data_may_be_a_function(tmp_path):
    own = dataclasses.replace(SMALL, data=functools.partial(data.load, "digits"), name=None)
    assert own.examples().name == "digits"
