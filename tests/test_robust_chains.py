"""Robust chains: the recipes, a study from training to report, and the table of what goes along."""

import dataclasses
import functools
import re
from urllib.parse import unquote

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.papers import robust_chains
from jdistill import attacks, data, evaluate, export, losses, nets, report, robust, study, train
from jdistill.commands import _defend
from jdistill.study import RECIPES, RobustRecipe, Stage, Study, _measure, _robust
from jdistill.typing import Batch
from tests.report_rows import make_rows

ROBUST = [name for name, recipe in RECIPES.items() if isinstance(recipe, RobustRecipe)]
FASHION = RECIPES["robust-chain-fashion"]
DENSE = dataclasses.replace(
    FASHION, layers="dense", teacher_width=1.0, student_width=0.25, num_assistants=2
)

# Recipes


@pytest.mark.parametrize("name", ROBUST)
def test_a_recipe_is_a_study(name):
    recipe = dataclasses.replace(RECIPES[name], losses=("rslad", "igdm"), num_assistants=2)
    own = recipe.study()
    lengths = {chain: len(stages) for chain, stages in own.chains.items()}
    assert lengths == {
        **{"rslad": 2, "rslad, 1 assistant": 3, "rslad, 2 assistants": 4},
        **{"igdm": 2, "igdm, 1 assistant": 3, "igdm, 2 assistants": 4, "no teacher": 1},
    }
    # A teacher for all chains, and networks in a row that chains share wherever they are equal:
    # those of the CPU's recipe for MNIST all, so that its "no teacher" is the teacher itself.
    assert (
        len(own.trained_stages())
        == {
            "robust-chain-mnist": 1 + 2 * 3,
            "robust-chain-fashion": 1 + 2 * (1 + 2 + 2) + 1,
            "robust-chain-cifar10": 1 + 2 * 3 + 1,
        }[name]
    )
    students = {stages[-1].model for stages in own.chains.values()}
    assert len(students) == 1
    small = recipe.smallest()
    assert (small.epochs, small.attack_examples, small.num_assistants) == (1, 4, 1)


def test_assistants_lie_between_teacher_and_student():
    _, first, second, student = DENSE.study().chains["rslad, 2 assistants"]
    assert [stage.model.hidden for stage in (first, second, student)] == [
        (256, 128),
        (181, 91),
        (128, 64),
    ]
    assert DENSE.study().chains["rslad, 1 assistant"][1].model == first.model
    cifar = dataclasses.replace(RECIPES["robust-chain-cifar10"], num_assistants=1).study()
    _, assistant, student = cifar.chains["rslad, 1 assistant"]
    assert assistant.model == student.model == nets.resnet18()


def test_teachers_learn_by_trades_and_students_by_their_loss():
    """At the students' temperature, which is not the teacher's."""
    own = dataclasses.replace(DENSE, losses=("ard",), trades_weight=3.0, temperature=5.0).study()
    teacher, student = own.chains["ard"]
    (alone,) = own.chains["no teacher"]
    draw = np.random.default_rng(0)
    z, moved, its = draw.normal(size=(3, 4, 10)).astype(np.float32)
    batch = Batch(jnp.asarray(its), jnp.arange(4), None, jnp.ones(4))
    outputs = robust.Outputs(z, moved, its)
    for stage in (teacher, alone):
        expected = robust.trades_loss(weight=3.0)(outputs, batch)
        np.testing.assert_allclose(stage.loss(5.0)(outputs, batch), expected)
    expected = robust.ard_loss(5.0, lambda inputs: inputs)(outputs, batch)
    np.testing.assert_allclose(student.loss(5.0, lambda inputs: inputs)(outputs, batch), expected)
    assert student.step().objective is alone.step().objective
    assert alone.step() == alone.step()
    assert teacher.step().objective.attack.keywords == {"eps": 0.1, "num_steps": 10}


def test_a_teacher_may_come_from_an_export(tmp_path):
    model = nets.ConvNet(features=(), hidden=(4,), dropout_rate=0.0)
    params, _ = nets.init(model, jax.random.key(0), (28, 28, 1))
    network = nets.logits_fn(model, {"params": params})
    export.save(tmp_path, network, input_shape=(28, 28, 1), stablehlo=False)
    own = dataclasses.replace(DENSE, teacher=str(tmp_path)).study()
    inputs = np.random.default_rng(0).uniform(size=(3, 28, 28, 1)).astype("float32")
    np.testing.assert_array_equal(own.chains["rslad"][0].frozen(inputs), network(inputs))


def test_options_of_the_command(capsys):
    options = ["--losses", "adaad", "saad", "--num-assistants", "1", "--layers", "dense"]
    recipe, _ = _defend.parse(["robust-chain-fashion", *options])
    assert recipe == dataclasses.replace(
        FASHION, losses=("adaad", "saad"), num_assistants=1, layers="dense"
    )
    with pytest.raises(SystemExit):
        _defend.parse(["robust-chain-fashion", "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(RobustRecipe):
        assert ("--" + field.name.replace("_", "-") in text) == (field.name != "dataset")


@pytest.mark.parametrize(
    "options",
    [
        {"dataset": "digits"},
        {"layers": "wide"},
        {"losses": ("mtard",)},
        {"losses": ()},
        {"losses": ("ard", "ard")},
        {"num_assistants": -1},
        {"epochs": 0},
        {"attack_steps": 0},
        {"train_examples": 0},
        {"student_width": 0.0},
        {"trades_weight": -1.0},
        {"weight_perturbation": -1.0},
        {"temperature": 0.0},
        {"eps": 0.0},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        dataclasses.replace(FASHION, **options)


def test_equal_objectives_are_one():
    """So that the networks of a study share their compiled steps."""
    assert _robust._objective(0.1, 3, 0.0) is _robust._objective(0.1, 3, 0.0)


# A study


def digits():
    found = data.load("digits")
    return tuple(column[:400] for column in found.train), tuple(c[:100] for c in found.test)


def small_study():
    """Two chains of one teacher, and the student's network alone."""
    craft = functools.partial(attacks.pgd, eps=0.1, num_steps=3)
    make_step = functools.partial(train.make_train_step, objective=robust.adversarial(craft))

    def stage(width, loss):
        return Stage(
            model=nets.ConvNet(features=(), hidden=(width,), dropout_rate=0.0),
            optimizer=train.sgd(0.05),
            num_epochs=8,
            make_step=make_step,
            loss=loss,
        )

    teacher = stage(64, functools.partial(robust.trades_loss, weight=2.0))
    student = stage(16, robust.rslad_loss)
    chains = {
        "rslad": [teacher, student],
        "rslad, 1 assistant": [teacher, stage(32, robust.rslad_loss), student],
        "no teacher": [stage(16, robust.trades_loss)],
    }
    return Study(
        data=digits,
        name="digits",
        chains=chains,
        seeds=(0, 1),
        online=True,
        batch_size=32,
        attacks={
            # In its place, since it takes long.
            "autoattack": evaluate.AttackPlan(
                functools.partial(attacks.pgd, eps=0.1, num_steps=10, loss=losses.margin), 40
            )
        },
        num_sensitivity=4,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study's workdir, never to be written."""
    own, folder = small_study(), tmp_path_factory.mktemp("robust")
    return own, folder, study.run(own, folder, parallel="jit")


def test_a_network_that_chains_share_is_measured_once(finished):
    """Its stem is that of the first chain, and the table has it in both."""
    own, folder, tables = finished
    networks = study.networks(own, folder, seeds=[0])
    teachers = [each for each in networks if each.generation == 0 and each.chain != "no teacher"]
    assert [each.chain for each in teachers] == ["rslad", "rslad, 1 assistant"]
    assert teachers[0].stem == teachers[1].stem
    assert teachers[0].stem.startswith("rslad_T1_seed0_g0_")
    # Of each seed: teacher, student, assistant, its student, and the one without a teacher.
    kept = {unquote(path.name) for path in (folder / "shards" / "autoattack").iterdir()}
    stems = {each.stem for each in study.networks(own, folder)}
    assert len(stems) == 2 * 5
    assert kept == stems
    rows = [
        {name: row[name] for name in ("seed", "test_accuracy", "success_rate")}
        for row in tables.rows["results"]
        if row["generation"] == 0 and row["chain"] != "no teacher"
    ]
    assert len(rows) == 4
    for seed in own.seeds:
        one, other = (row for row in rows if row["seed"] == seed)
        assert one == other


def test_robust_students_withstand_what_ordinary_ones_do_not(finished):
    own, _, tables = finished
    robust_accuracy = [
        1 - row["success_rate"] for row in tables.rows["results"] if row["chain"] == "rslad"
    ]
    plain = Stage(
        model=nets.ConvNet(features=(), hidden=(16,), dropout_rate=0.0),
        optimizer=train.sgd(0.05),
        num_epochs=8,
    )
    params, _ = plain.init(jax.random.key(0), (8, 8, 1))
    state = train.create_state(plain.step(), params, jax.random.key(0))
    examples = own.examples()
    state = train.fit(plain.step(), state, examples.train, train.hard_loss(), num_epochs=8)
    judge = own.attacks["autoattack"].attack
    result = judge(
        train.logits_fn(plain.step(), state),
        jax.random.key(0),
        examples.test.inputs[:40],
        examples.test.labels[:40],
    )
    assert min(robust_accuracy) > 1 - float(np.mean(result.success)) + 0.1


# The table


def test_rows_say_what_the_networks_do(finished):
    """Entropy and transfer by hand, for one student."""
    from experiments.papers.measures import Source

    own, folder, _ = finished
    source = Source("robust", None, own, folder, 4, full=False)
    found = robust_chains.rows(dataclasses.replace(source, study=own))
    assert [(row["seed"], row["chain"]) for row in found] == [
        (seed, chain) for seed in own.seeds for chain in own.chains
    ]
    inputs, labels = (part[:40] for part in source.test)
    for seed in own.seeds:
        networks = {
            (each.chain, each.generation): each.logits_fn
            for each in study.networks(own, folder, seeds=[seed])
        }
        students = {
            "rslad": networks["rslad", 1],
            "rslad, 1 assistant": networks["rslad, 1 assistant", 2],
            "no teacher": networks["no teacher", 0],
        }
        rows = {row["chain"]: row for row in found if row["seed"] == seed}
        assert {row["num_never_robust"] for row in rows.values()} == {
            rows["rslad"]["num_never_robust"]
        }
        for chain, logits_fn in students.items():
            right = np.argmax(train.predict(logits_fn, source.test.inputs), 1) == source.test.labels
            assert rows[chain]["test_accuracy"] == pytest.approx(right.mean())
            assert rows[chain]["autoattack"] <= right[:40].mean() + 1e-6
        assert np.isnan(rows["no teacher"]["entropy"])
        assistant = networks["rslad, 1 assistant", 1]
        its = np.asarray(jax.nn.softmax(train.predict(assistant, inputs)), float)
        entropy = -(its * np.log(its)).sum(1)
        found_entropy = rows["rslad, 1 assistant"]["entropy"]
        assert entropy.min() <= found_entropy <= entropy.max()
        craft = functools.partial(attacks.apgd, eps=0.1, num_steps=40, best_loss=True)
        result = craft(students["rslad, 1 assistant"], jax.random.key(0), inputs, labels)
        fooled = np.asarray(result.success)
        wrong = np.argmax(train.predict(assistant, np.asarray(result.inputs)), 1) != labels
        share = rows["rslad, 1 assistant"]["transfer"]
        assert share == pytest.approx(wrong[fooled].mean(), abs=0.1)


def rows_of(changes):
    """Rows of five seeds whose robust accuracy follows the entropy, and not the transfer."""
    draw = np.random.default_rng(0)
    for seed in range(5):
        for place, chain in enumerate(("ard", "ard, 1 assistant", "ard, 2 assistants")):
            change = changes[seed] * place
            yield {
                "chain": chain,
                "seed": seed,
                "test_accuracy": 0.9,
                "autoattack": 0.5 + change,
                "entropy": 1.0 + change,
                "transfer": draw.uniform(),
                "verdict": "no sign of masking",
            }


def test_the_table_says_which_account_goes_along_with_robust_accuracy():
    lines, accounts = robust_chains.table(list(rows_of(np.linspace(-0.1, 0.12, 5))))
    assert [line[0] for line in lines] == [
        "student",
        "ard",
        "ard, 1 assistant",
        "ard, 2 assistants",
    ]
    assert lines[2][4].startswith("+1.0 [")
    (_, entropy, within), (_, transfer, _) = accounts[1:]
    assert entropy.startswith("+1.00 [")
    assert within.startswith("+1.00 [")  # there is one loss
    assert not transfer.startswith("+1.00")


def test_a_difference_between_losses_is_none_within_them():
    """Entropy rises with one loss and falls with the other, as robust accuracy does."""
    draw = np.random.default_rng(1)
    rows = []
    for loss, sign in (("ard", 1), ("saad", -1)):
        for seed in range(5):
            for place, chain in enumerate((loss, f"{loss}, 1 assistant", f"{loss}, 2 assistants")):
                noise = draw.normal(size=3) * 0.001 * (place > 0)
                row = {"chain": chain, "seed": seed, "test_accuracy": 0.9, "verdict": ""}
                row["autoattack"] = 0.5 + sign * 0.1 * (place > 0) + noise[0]
                row["entropy"] = 1.0 + sign * 0.1 * (place > 0) + noise[1]
                rows.append({**row, "transfer": 0.5 + noise[2]})
    _, accounts = robust_chains.table(rows)
    pooled, within = (float(cell.split()[0]) for cell in accounts[1][1:])
    assert pooled > 0.6
    assert abs(within) < 0.5


def test_changes_that_are_all_alike_have_no_correlation():
    _, accounts = robust_chains.table(list(rows_of(np.zeros(5))))
    assert accounts[1][1] == "–"


# What a report may call such networks


def test_a_study_knows_which_networks_are_not_ordinary():
    own = DENSE.study()
    assert set(_measure.trainings(own).values()) == {"adversarial"}
    assert _measure.trainings(RECIPES["digits"].study()) == {}
    mixed = functools.partial(train.make_train_step, objective=train.mixup(1.0))

    def weighted(apply_fn, state, loss_fn, batch, *more):
        raise NotImplementedError

    odd = functools.partial(train.make_train_step, objective=weighted)
    model, optimizer = nets.digits_net(0.5), train.sgd(0.1)
    stages = [
        Stage(frozen=nets.callable_logits_fn(lambda x: x)),
        Stage(model=model, optimizer=optimizer, make_step=mixed),
        Stage(model=model, optimizer=optimizer, make_step=odd),
    ]
    study_of_all = dataclasses.replace(own, chains=stages, transfer=())
    assert _measure.trainings(study_of_all) == {("", 0): "unknown", ("", 2): "custom"}


@pytest.mark.parametrize("training", ["", "adversarial", "custom"])
def test_a_robust_teacher_is_not_called_ordinary(training, tmp_path):
    rows = make_rows()
    for row in rows:
        if training and row["generation"] == 0:
            row["training"] = training
    report.write_table(tmp_path / "results.csv", "results", rows)
    page = report.write_report(tmp_path)["report"].read_text()
    text = re.sub(r"<[^>]+>", "", page)
    assert not training or "the ordinary network" not in text
    assert ("No network known to be ordinarily trained was attacked." in text) == bool(training)
    neutral = training == "adversarial"
    assert ("Does distillation make networks robust" in text) == (not neutral)
