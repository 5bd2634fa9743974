"""Recipes of transformer students, and stages that name their teachers, in a study's workdir."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from jdistill import attacks, distill, evaluate, export, nets, report, study, train
from jdistill.study import RECIPES, DeitRecipe, Stage, Study, _deit, _training
from jdistill.study._study import keys_of
from tests.test_study import SMALL, blobs, stage

DEIT = [name for name, recipe in RECIPES.items() if isinstance(recipe, DeitRecipe)]
FGSM = evaluate.AttackPlan(functools.partial(attacks.fgsm, eps=0.05), 8)
LESSONS = Study(
    data=blobs(),
    name="blobs",
    chains={
        "alone": [stage(6)],
        "hard": [stage(), stage(6, loss=distill.hard_label_loss)],
        "both": [
            stage(),
            stage(6, teachers=()),
            stage(6, teachers=(0, 1), num_epochs=3, temperature_schedule=distill.annealed),
        ],
    },
    temperatures=(1.0, 5.0),
    batch_size=16,
    attacks={"fgsm": FGSM},
    num_sensitivity=8,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lessons")
    study.run(LESSONS, folder)
    return folder


def by_place(networks):
    """Weights by chain, temperature, and generation."""
    return {(n.chain, n.temperature, n.generation): jax.tree.leaves(n.logits_fn) for n in networks}


def assert_same(found, expected):
    for one, other in zip(found, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_study_teaches_as_a_chain_does(finished):
    """To the bit: the same keys, weights to begin with, and lessons."""
    found = by_place(study.networks(LESSONS, finished))
    weights_key, key = keys_of(0)
    for chain in _training.chains_of(LESSONS):
        generations = []
        for each in chain.stages:
            params, model_state = each.init(weights_key, (6,))
            generations.append(
                distill.Generation(
                    step=each.step(),
                    params=params,
                    model_state=model_state,
                    num_epochs=each.num_epochs,
                    teachers=each.teachers,
                    loss=each.loss,
                    temperature_schedule=each.temperature_schedule,
                )
            )
        states = distill.chain(
            generations, LESSONS.examples().train, key, temperature=5.0, batch_size=16
        )
        for number, state in enumerate(states):
            place = chain.owners[number], 5.0, number
            if chain.owners[number] == chain.name:
                assert_same(found[place], (state.params, state.model_state))


def test_a_study_with_lessons_goes_on_where_it_was(tmp_path, finished, monkeypatch):
    """Stopped within the last student, whose temperature changes from epoch to epoch."""

    class Stop(Exception):
        pass

    record, seen = _training.Keeper.record, []

    def stop(self, event):
        record(self, event)
        seen.append(event)
        if event["generation"] == 2 and event["epoch"] == 2:
            raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(_training.Keeper, "record", stop)
        with pytest.raises(Stop):
            study.train(LESSONS, tmp_path)
    assert len(seen) > 2
    found = by_place(study.train(LESSONS, tmp_path))
    for place, weights in by_place(study.networks(LESSONS, finished)).items():
        assert_same(found[place], weights)


def test_agreement_is_with_every_teacher(finished):
    rows = study.load(finished).rows["agreement"]
    pairs = {(row["chain"], row["generation"], row["teacher_generation"]) for row in rows}
    assert {pair for pair in pairs if pair[1] == 2} == {("both", 2, 0), ("both", 2, 1)}
    assert not [pair for pair in pairs if pair[:2] == ("both", 1)]  # of no teacher


@pytest.mark.parametrize(
    "changed",
    [
        {"loss": functools.partial(distill.hard_label_loss, hard_weight=0.5)},
        {"teachers": ()},
        {"temperature_schedule": distill.annealed},
        {"online": True, "loss": distill.online(distill.hard_label_loss)},
    ],
)
def test_another_lesson_is_another_study(finished, changed):
    teacher, student = LESSONS.chains["hard"]
    chain = [teacher, dataclasses.replace(student, **changed)]
    other = dataclasses.replace(LESSONS, chains={**LESSONS.chains, "hard": chain})
    name = next(iter(changed))
    with pytest.raises(ValueError, match=rf"chains\.hard\.stage 1\.{name}"):
        study.run(other, finished)


def test_a_student_of_the_labels_is_not_learned_anew_with_another_teacher(tmp_path):
    """Its lesson names no teacher, so that nothing that happens to one concerns it."""
    keeper = _training.Keeper
    run = _training.Run(tmp_path, LESSONS, LESSONS.examples(), 0, 1.0)
    (chain,) = [each for each in _training.chains_of(LESSONS) if each.name == "both"]
    with keeper(chain, run, lambda event: None) as own:
        own._teachers.update({0: "a", 1: "b"})
        assert [own._teacher_of(number) for number in range(3)] == ["", "", "a+b"]


def test_stages_that_teach_and_learn_are_planned():
    from jdistill.study import _programs

    networks = _programs.networks_of(LESSONS, LESSONS.examples())
    labeled = {network.name: network.num_labeled for network in networks}
    # The first network labels for the students of two chains, and the second for one of them.
    assert sum(labeled.values()) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teachers": (1,)}, "different earlier ones"),
        ({"loss": 3}, "as loss; pass a function"),
        ({"teachers": (), "online": True}, "online only of a generation with teachers"),
    ],
)
def test_a_study_checks_its_lessons(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SMALL, transfer=(), chains={"own": [stage(), stage(**options)]})


# Recipes


@pytest.mark.parametrize("name", DEIT)
def test_a_recipe_is_a_study(name):
    recipe = RECIPES[name]
    found = dataclasses.replace(recipe, assistants=True).study()
    first, *others = found.chains
    assert first == "no teacher"
    assert len(found.chains["no teacher"]) == 1
    assert {len(found.chains[chain]) for chain in others} == {2, 3}
    for chain in others:
        student = found.chains[chain][-1].model
        assert student.distillation_token == ("token" in chain)
        assert (student.width, student.depth) == (found.chains[first][0].model.width, student.depth)
    # The transformer without a teacher teaches the last chain: one network.
    assert found.students()["no teacher"] == ("hard, token, from ViT", 0)
    assert recipe.smallest().epochs == 1


def test_teachers_may_come_from_an_export(tmp_path):
    model = nets.vit_digits(0.25)
    params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
    network = nets.logits_fn(model, {"params": params})
    export.save(tmp_path, network, input_shape=(8, 8, 1), stablehlo=False)
    recipe = dataclasses.replace(
        RECIPES["deit-digits"], teacher=str(tmp_path), transformer=str(tmp_path)
    )
    inputs = np.random.default_rng(0).uniform(size=(3, 8, 8, 1)).astype("float32")
    for chain in ("hard", "hard, token, from ViT"):
        frozen = recipe.study().chains[chain][0].frozen
        np.testing.assert_array_equal(frozen(inputs), network(inputs))


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"learning_rate": 0.0}, {"hard_weight": 2.0}, {"train_examples": 0}]
)
def test_bad_options_of_a_recipe(options):
    with pytest.raises(ValueError, match=f"expected {next(iter(options))}"):
        dataclasses.replace(RECIPES["deit-digits"], **options)


def test_equal_optimizers_are_one():
    """So that the networks of a study share their compiled steps."""
    assert _deit.adamw(10, 0.1, 0.01) is _deit.adamw(10, 0.1, 0.01)


@pytest.mark.slow
def test_a_recipe_from_training_to_report(tmp_path):
    recipe = RECIPES["deit-digits"].smallest()
    recipe = dataclasses.replace(recipe, temperatures=(1.0,), assistants=False)
    small = dataclasses.replace(recipe.study(), attacks={"fgsm": FGSM}, verdict=None)
    rows = study.run(small, tmp_path).rows
    assert {row["chain"] for row in rows["comparisons"]} >= {"soft", "hard, token"}
    assert {row["teacher_generation"] for row in rows["agreement"]} == {0}
    assert (tmp_path / "report.html").exists()
    assert "agreement" in report.TABLES


# Augmentation


def test_images_are_shifted_and_mirrored_as_in_numpy():
    rng = np.random.default_rng(0)
    images = rng.uniform(size=(40, 5, 6, 2)).astype("float32")
    keys = jax.random.split(jax.random.key(0), 40)
    found = np.asarray(train.ShiftAndFlip(2, flip=True)(keys, images))
    seen = set()
    for image, moved in zip(images, found, strict=True):
        padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
        ways = {
            (row, column, flip): padded[row : row + 5, column : column + 6][:, :: -1 if flip else 1]
            for row in range(5)
            for column in range(5)
            for flip in (False, True)
        }
        (way,) = [way for way, each in ways.items() if np.array_equal(each, moved)]
        seen.add(way)
    assert len(seen) > 20
    assert {flip for *_, flip in seen} == {False, True}


def test_an_image_is_moved_by_its_own_key():
    images = np.random.default_rng(0).uniform(size=(8, 5, 5, 1)).astype("float32")
    keys = jax.random.split(jax.random.key(0), 8)
    whole = train.ShiftAndFlip(1)(keys, images)
    np.testing.assert_array_equal(whole[3:5], train.ShiftAndFlip(1)(keys[3:5], images[3:5]))
    np.testing.assert_array_equal(train.ShiftAndFlip(0)(keys, images), images)
    assert train.ShiftAndFlip(1) == train.ShiftAndFlip(1)


@pytest.mark.parametrize("options", [{"max_shift": -1}, {"flip": 2}])
def test_bad_shifts(options):
    with pytest.raises(ValueError, match=f"expected {next(iter(options))}"):
        train.ShiftAndFlip(**options)


def test_stages_of_a_recipe_are_stages():
    chains = RECIPES["deit-cifar10"].study().chains.values()
    assert all(isinstance(each, Stage) for chain in chains for each in chain)


def test_a_frozen_teacher_with_features(tmp_path):
    """A student matches its layer; what is measured of it are its logits."""
    pair = nets.with_features(nets.digits_net(0.125), {"hint": "conv_0_1"})
    params, model_state = pair[0](jax.random.key(0), (8, 8, 1))
    frozen = nets.outputs_fn(pair, {"params": params, **model_state})
    loss = functools.partial(distill.feature_loss, layers={"hint": "hint"})
    student = Stage(model=pair, optimizer=train.sgd(0.01), num_epochs=1, loss=loss, online=True)
    rng = np.random.default_rng(0)
    splits = [
        (rng.uniform(size=(n, 8, 8, 1)).astype("float32"), np.arange(n) % 10) for n in (32, 8)
    ]
    mine = Study(data=splits, chains=[Stage(frozen=frozen), student], attacks={"fgsm": FGSM})
    rows = study.run(mine, tmp_path).rows["results"]
    assert {row["generation"] for row in rows} == {0, 1}
    teacher, _ = study.networks(mine, tmp_path)
    inputs = splits[1][0]
    np.testing.assert_array_equal(teacher.logits_fn(inputs), frozen(inputs)["logits"])


@pytest.mark.parametrize("token", [False, True])
def test_a_transformer_is_read_back_from_its_export(tmp_path, token):
    model = nets.vit_digits(0.25, distillation_token=token)
    params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
    network = nets.logits_fn(model, {"params": params})
    export.save(tmp_path, network, input_shape=(8, 8, 1))
    inputs = np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype("float32")
    expected = network(inputs)
    np.testing.assert_array_equal(export.load(tmp_path)(inputs), expected)
    program = export.load_stablehlo(tmp_path)
    np.testing.assert_allclose(program(inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_projections_of_features_are_not_exported(tmp_path):
    pair = nets.with_features(nets.digits_net(0.125), {"hint": "conv_0_1"}, projections={"hint": 7})
    step = train.make_train_step(pair[1], train.sgd(0.1))
    params, _ = pair[0](jax.random.key(0), (8, 8, 1))
    network = train.logits_fn(step, train.create_state(step, params, jax.random.key(0)))
    export.save(tmp_path, network, input_shape=(8, 8, 1))
    inputs = np.random.default_rng(0).uniform(size=(5, 8, 8, 1)).astype("float32")
    np.testing.assert_allclose(export.load(tmp_path)(inputs), network(inputs), atol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": distill.decoupled_loss}, "to take the temperature alone, got decoupled_loss"),
        ({"loss": distill.hard_label_loss, "online": True}, r"distill\.online\(loss\)"),
        ({"online": True}, "expected a loss of generation 1 beside online=True"),
    ],
)
def test_losses_of_the_wrong_kind_are_named_before_anything_is_trained(options, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(
            SMALL,
            transfer=(),
            student_loss=functools.partial(distill.soft_loss, hard_weight=0.5),
            chains={"own": [stage(), stage(**options)]},
        )


@pytest.mark.parametrize("name", ["loss", "online", "temperature_schedule"])
def test_a_frozen_network_has_no_lesson(name):
    given = {"loss": distill.soft_loss, "online": True, "temperature_schedule": distill.annealed}
    with pytest.raises(ValueError, match=f"expected no {name} with frozen"):
        Stage(frozen=lambda inputs: inputs, **{name: given[name]})


def test_a_teacher_whose_loss_has_no_temperature_is_an_ordinary_network(finished):
    from jdistill.study import _measure

    found = {n.generation: n for n in study.networks(LESSONS, finished) if n.temperature == 5}
    ordinary = dataclasses.replace(LESSONS, teacher_loss=_deit.at_one)
    assert not _measure.is_plain(LESSONS, found[0])
    assert _measure.is_plain(ordinary, found[0])
    assert not _measure.is_plain(ordinary, found[1])


def test_numbers_of_numpy_describe_as_numbers():
    chain = [stage(), stage(), stage(teachers=tuple(np.arange(2)))]
    scheduled = stage(temperature_schedule=lambda T, progress: np.float32(T))
    for stages in (chain, [stage(), scheduled]):
        own = dataclasses.replace(SMALL, transfer=(), chains={"own": stages})
        assert own.longest_chains()
