"""Unlearnable examples: data, network, teachers, and the recipe from training to report."""

import csv
import dataclasses
import functools
import itertools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import unlearnable as experiment
from jdistill import attacks, metrics, nets, study, train
from jdistill.commands import _defend
from jdistill.nets._two_layer import TwoLayer
from jdistill.study import RECIPES, UnlearnableRecipe
from jdistill.study._unlearnable import LabelRule, against_signal, is_unlearnable
from jdistill.typing import Batch

RECIPE = RECIPES["unlearnable"]
EPS, BOUNDS = RECIPE.eps, RECIPE.bounds


def examples(share, size=4_000, **options):
    return dataclasses.replace(RECIPE, share=share, train_examples=size, **options).examples()


def rule(inputs, *, sure, margin=10.0):
    """A teacher's logits, example by example, from where the signal is."""
    rows = []
    for patches in np.asarray(inputs, np.float64):
        size = max((abs(patch[place]), place) for patch in patches for place in (0, -1))
        unlearnable = size[1] == -1
        signal = sum(patch[-1 if unlearnable else 0] for patch in patches)
        sign = 0 if unlearnable and not sure else np.sign(signal)
        rows.append([-margin * sign / 2, margin * sign / 2])
    return np.array(rows)


# --- Examples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.2, 1.0])
def test_the_signal_lies_in_one_patch_along_u_or_v(share):
    """As the label says, and orthogonal to the noise: of all that is there, nothing else is."""
    inputs, labels = examples(share).train
    assert inputs.shape == (4_000, 4, 100)
    signs = 2 * labels - 1
    along = inputs[..., [0, -1]].astype(np.float64)
    assert ((along != 0).sum((1, 2)) == 1).all()
    np.testing.assert_array_equal(along.sum((1, 2)), 5 * signs)
    unlearnable = along[..., 1].any(1)
    np.testing.assert_array_equal(is_unlearnable(inputs), unlearnable)
    # Five deviations of a share of 4,000.
    assert unlearnable.mean() == pytest.approx(share, abs=5 * np.sqrt(share * (1 - share) / 4_000))
    where = (along != 0).any(2).argmax(1)
    for counts in (np.bincount(where, minlength=4) / 4_000, np.bincount(labels) / 4_000):
        np.testing.assert_allclose(counts, 1 / len(counts), atol=5 * 0.5 / np.sqrt(4_000))


def test_the_noise_is_normal_and_independent_of_the_signal():
    inputs, labels = examples(0.2).train
    noise = inputs[..., 1:-1].astype(np.float64)
    assert noise.mean() == pytest.approx(0, abs=5 * 0.4 / np.sqrt(noise.size))
    assert noise.std() == pytest.approx(0.4, rel=0.01)
    assert (noise**4).mean() / noise.std() ** 4 == pytest.approx(3, abs=0.05)
    # Neither numbers nor patches depend on each other, or on the label.
    columns = np.column_stack([noise.reshape(4_000, -1)[:, ::13], labels, is_unlearnable(inputs)])
    correlations = np.corrcoef(columns, rowvar=False) - np.eye(columns.shape[1])
    assert abs(correlations).max() < 0.1
    assert not examples(0.2, noise=0.0).train.inputs[..., 1:-1].any()


def test_equal_seeds_give_equal_examples():
    """Of a larger share, the same ones but for the signal of some; of others, other ones."""
    one, again, other = examples(0.1), examples(0.1), examples(0.1, data_seed=1)
    for split in ("train", "test"):
        for found, wanted in zip(getattr(one, split), getattr(again, split), strict=True):
            np.testing.assert_array_equal(found, wanted)
    assert not np.array_equal(one.train.labels, other.train.labels)
    assert not np.array_equal(one.train.inputs[:1000, :, 1:-1], one.test.inputs[..., 1:-1])
    more = examples(0.3).train
    np.testing.assert_array_equal(more.labels, one.train.labels)
    np.testing.assert_array_equal(more.inputs[..., 1:-1], one.train.inputs[..., 1:-1])
    assert (is_unlearnable(more.inputs) >= is_unlearnable(one.train.inputs)).all()
    assert is_unlearnable(more.inputs).sum() > is_unlearnable(one.train.inputs).sum()


@pytest.mark.parametrize("options", [{}, {"signal": 1.0, "noise": 2.0}, {"signal": 30.0}])
def test_the_box_holds_every_input_and_the_ball_around_it(options):
    recipe = dataclasses.replace(RECIPE, train_examples=4_000, **options)
    low, high = recipe.bounds
    assert low == -high
    assert abs(recipe.examples().train.inputs).max() + recipe.eps <= high


# --- Network and teachers ------------------------------------------------------------------------


def network(width=6, dimension=9, seed=0):
    model = TwoLayer(width)
    params, state = nets.init(model, jax.random.key(seed), (4, dimension))
    assert not state
    # Large enough that the cubes count.
    kernel = 20 * params["kernel"]
    return nets.logits_fn(model, {"params": {"kernel": kernel}}), np.asarray(kernel, np.float64)


def test_logits_are_sums_of_cubes_over_patches_and_units():
    logits_fn, kernel = network()
    inputs = np.random.default_rng(0).normal(size=(5, 4, 9)).astype(np.float32)
    wanted = np.zeros((5, 2))
    for row, patch, label, unit in itertools.product(range(5), range(4), range(2), range(6)):
        weights = np.append(kernel[:, label, unit], 0.0)  # none on v
        wanted[row, label] += max(0.0, weights @ inputs[row, patch].astype(np.float64)) ** 3
    np.testing.assert_allclose(logits_fn(inputs), wanted, rtol=1e-5)


def test_the_last_number_of_a_patch_has_no_influence():
    logits_fn, _ = network()
    inputs = np.random.default_rng(0).normal(size=(5, 4, 9)).astype(np.float32)
    other = inputs.copy()
    other[..., -1] = 1e6 * inputs[..., 0]
    np.testing.assert_array_equal(logits_fn(inputs), logits_fn(other))
    gradient = jax.grad(lambda inputs: logits_fn(inputs).sum())(inputs)
    assert not gradient[..., -1].any()
    assert gradient[..., :-1].any(axis=(0, 1)).all()


def test_initial_weights_have_a_hundredth_of_a_patch():
    """0.1 over the root of 100, as in the paper, for two classes of 80 units."""
    params, _ = nets.init(TwoLayer(80), jax.random.key(0), (4, 100))
    (kernel,) = jax.tree.leaves(params)
    assert kernel.size == 2 * 80 * 99
    assert float(kernel.std()) == pytest.approx(0.01, rel=0.03)
    assert float(kernel.mean()) == pytest.approx(0, abs=5e-4)


@pytest.mark.parametrize("sure", [True, False])
def test_teachers_read_the_label_off_the_signal(sure):
    inputs, labels = examples(0.3, 500).train
    found = np.asarray(RECIPE.teacher(sure=sure)(inputs))
    np.testing.assert_array_equal(found, rule(inputs, sure=sure))
    shares = np.asarray(jax.nn.softmax(found))
    confident = shares[np.arange(500), labels] > 0.9999
    np.testing.assert_array_equal(confident, sure | ~is_unlearnable(inputs))
    np.testing.assert_array_equal(shares[~confident], 0.5)


@pytest.mark.parametrize("sure", [True, False])
def test_no_attack_within_the_radius_changes_a_teachers_opinion(sure):
    """Not even at the corners of the ball that it has most to fear."""
    inputs, _ = examples(0.3, 200).train
    wanted = rule(inputs, sure=sure)
    for first, last in itertools.product((-EPS, EPS), repeat=2):
        moved = inputs.copy()
        moved[..., 0] += first
        moved[..., -1] += last
        np.testing.assert_array_equal(LabelRule(10.0, sure)(moved), wanted)


# --- Training ------------------------------------------------------------------------------------


def test_the_papers_adversary_weakens_the_signal_in_every_patch():
    inputs, labels = examples(0.3, 50).train
    attack = functools.partial(against_signal, eps=EPS, bounds=BOUNDS)
    wanted = inputs.copy()
    wanted[..., 0] -= EPS * (2 * labels - 1)[:, None]
    logits_fn, _ = network(dimension=100)
    found = attacks.maximize(attack, logits_fn, None, inputs, labels)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def cube_step(kernel, inputs, soft_label, rate):
    """A step of SGD on the cross-entropy with a soft label, for one example, in float64."""
    hidden = np.einsum("pd,dcm->pcm", inputs, kernel)
    logits = (np.maximum(hidden, 0) ** 3).sum((0, 2))
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    slope = (shares - soft_label)[:, None] * 3 * np.maximum(hidden, 0) ** 2
    return kernel - rate * np.einsum("pd,pcm->dcm", inputs, slope)


@pytest.mark.parametrize("chain", ["labels alone", "bad teacher", "good teacher"])
def test_a_step_is_that_of_the_paper(chain):
    """On the inputs of its adversary, towards the teacher's label of the clean ones."""
    recipe = dataclasses.replace(RECIPE, share=0.5, train_examples=12, width=5, learning_rate=0.05)
    own = recipe.study()
    *teacher, stage = own.chains[chain]
    step = stage.step()
    params, _ = stage.init(jax.random.key(0), (4, 100))
    params = jax.tree.map(lambda leaf: 12 * leaf, params)
    loss_fn = own.teacher_loss(1.0)
    if teacher:
        loss_fn = own.student_loss(1.0, teacher[0].frozen)
    for inputs, label in zip(*recipe.examples().train, strict=True):
        hard = np.eye(2)[label]
        soft = hard
        if teacher:
            logits = rule(inputs[None], sure=chain.startswith("bad"))[0]
            soft = np.exp(logits) / np.exp(logits).sum()
        state = train.create_state(step, params, jax.random.key(0))
        batch = Batch(inputs[None], jnp.array([label]), jnp.float32(hard[None]), jnp.ones(1))
        found, _ = jax.jit(step)(state, batch, loss_fn)
        attacked = inputs.astype(np.float64)
        attacked[:, 0] -= EPS * (2 * label - 1)
        kernel = np.asarray(params["kernel"], np.float64)
        wanted = cube_step(kernel, attacked[:, :-1], soft, 0.05)
        moved = wanted - kernel
        assert abs(moved).max() > 1e-5 or not np.any(soft - 0.5)
        np.testing.assert_allclose(found.params["kernel"] - kernel, moved, rtol=1e-3, atol=2e-7)


def test_pgd_may_train_instead():
    own = dataclasses.replace(RECIPE, attack_steps=7).study()
    (stage,) = own.chains["labels alone"]
    attack = stage.step().objective.attack
    assert attack.func is attacks.pgd
    assert attack.keywords == {"eps": EPS, "num_steps": 7, "bounds": BOUNDS}


# --- The recipe ----------------------------------------------------------------------------------


def test_a_recipe_is_a_study():
    own = RECIPE.study()
    assert [len(stages) for stages in own.chains.values()] == [1, 2, 2, 3, 3]
    trained = [stage for stages in own.chains.values() for stage in stages if stage.model]
    # Equal steps share a compilation, and a chain with an assistant has the one without.
    assert len({stage.step() for stage in trained}) == 1
    assert len(own.trained_stages()) == 5
    assert own.students()["bad teacher"] == ("bad teacher, assistant", 1)
    for plan in own.attacks.values():
        assert plan.attack.keywords["bounds"] == BOUNDS == own.verdict.keywords["bounds"]
    assert RECIPE.epochs * RECIPE.train_examples // RECIPE.batch_size == 4_000
    assert RECIPE.smallest().epochs == 1


def test_options_of_the_command(capsys):
    recipe, _ = _defend.parse(["unlearnable", "--share", "0.2", "--attack-steps", "10"])
    assert recipe == dataclasses.replace(RECIPE, share=0.2, attack_steps=10)
    with pytest.raises(SystemExit):
        _defend.parse(["unlearnable", "--help"])
    text = capsys.readouterr().out
    for field in dataclasses.fields(UnlearnableRecipe):
        assert ("--" + field.name.replace("_", "-") in text) == (field.name != "dataset")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "digits"}, "dataset"),
        ({"share": 1.5}, "share"),
        ({"share": -0.1}, "share"),
        ({"dimension": 2}, "dimension"),
        ({"patches": 0}, "patches"),
        ({"train_examples": 0}, "train_examples"),
        ({"test_examples": 0}, "test_examples"),
        ({"width": 0}, "width"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"attack_examples": 0}, "attack_examples"),
        ({"data_seed": -1}, "data_seed"),
        ({"attack_steps": -1}, "attack_steps"),
        ({"signal": 0.0}, "signal"),
        ({"margin": 0.0}, "margin"),
        ({"noise": -1.0}, "noise"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=f"expected {message}"):
        dataclasses.replace(RECIPE, **options)


def test_from_training_to_report(tmp_path):
    """Inputs outside [0, 1] through training, attacks, tables, and page; then measured anew."""
    small = dataclasses.replace(RECIPE.smallest(), share=0.3, seeds=(3,))
    own = small.study()
    kept = {"pgd-20": own.attacks["pgd-20"]}
    tables = study.run(dataclasses.replace(own, attacks=kept, verdict=None), tmp_path)
    rows = tables.rows["results"]
    assert {(row["chain"], row["generation"]) for row in rows} == {
        ("labels alone", 0),
        *(
            (f"{kind} teacher, assistant", generation)
            for kind in ("bad", "good")
            for generation in (0, 1, 2)
        ),
    }
    accuracy = {(row["chain"], row["generation"]): row["test_accuracy"] for row in rows}
    inputs, labels = small.examples().test
    unlearnable = is_unlearnable(inputs)
    assert 0 < unlearnable.mean() < 1
    assert accuracy["bad teacher, assistant", 0] == 1
    # Of equal logits the first class is predicted.
    right = ~unlearnable | (labels == 0)
    assert accuracy["good teacher, assistant", 0] == pytest.approx(right.mean())
    assert tables.report.exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the targeted DLR loss is not defined for 2 classes")
def test_the_command_makes_the_study(tmp_path, capsys):
    _defend.run(["unlearnable", "--smoke", "--workdir", str(tmp_path)])
    assert "bad teacher, assistant: 32 test examples" in capsys.readouterr().out
    rows = json.loads((tmp_path / "verdicts.json").read_text())
    assert len(rows) >= 5


# --- The experiment ------------------------------------------------------------------------------


def test_the_experiments_entropy():
    logits = np.random.default_rng(0).normal(size=(6, 2)) * 4
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    wanted = -(shares * np.log(shares)).sum(1).mean()
    assert experiment.entropy(logits) == pytest.approx(wanted, rel=1e-5)
    assert experiment.entropy(np.zeros((3, 2))) == pytest.approx(np.log(2))
    assert experiment.entropy(np.array([[0.0, 500.0]])) == 0


def test_the_experiments_rows_are_of_each_chains_student(tmp_path):
    small = dataclasses.replace(RECIPE.smallest(), share=0.3, seeds=(3,), data_seed=3)
    rows = list(experiment.students(small, tmp_path))
    assert [row["chain"] for row in rows] == list(small.study().chains)
    networks = {(n.chain, n.generation): n for n in study.networks(small.study(), tmp_path)}
    inputs, labels = small.examples().train
    there = is_unlearnable(inputs)
    assert {row["num_unlearnable"] for row in rows} == {there.sum()}
    by_chain = {row["chain"]: row for row in rows}
    for kind, generation, name in (("bad", 1, "bad teacher"), ("bad", 2, "bad teacher, assistant")):
        row = by_chain[name]
        student = networks[f"{kind} teacher, assistant", generation].logits_fn
        teacher = networks[f"{kind} teacher, assistant", generation - 1].logits_fn
        right = np.asarray(student(inputs[there])).argmax(1) == labels[there]
        assert row["remembered"] == pytest.approx(right.mean())
        assert row["teacher_entropy"] == pytest.approx(
            experiment.entropy(np.asarray(teacher(inputs[there]))), rel=1e-4
        )
        assert 0 <= row["robust_accuracy"] <= row["clean_accuracy"] <= 1
    text = experiment.table(rows)
    assert f"| labels alone | {100 * by_chain['labels alone']['clean_accuracy']:.1f} |" in text


def test_the_findings_are_those_of_the_table():
    root = pathlib.Path(__file__).parents[1]
    with (root / "experiments/results/unlearnable.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["share"] == "0.2"]

    def left(steps, epochs, chain):
        found = {
            row["seed"]: 100 * float(row["robust_accuracy"])
            for row in rows
            if (row["attack_steps"], row["epochs"], row["chain"]) == (steps, epochs, chain)
        }
        assert len(found) == 5
        return np.array([found[seed] for seed in sorted(found)])

    page = (root / "docs/findings.md").read_text(encoding="utf-8")
    section = page[page.index("## Teachers that are sure") : page.index("## On CIFAR-10: 18")]
    section = " ".join(section.split())
    good, bad = (left("0", "10", f"{kind} teacher") for kind in ("good", "bad"))
    gap = metrics.seed_interval(bad - good)
    half = f"{good.mean():.1f} and {bad.mean():.1f}%"
    assert f"{half} ({gap.value:.1f} [{gap.low:.1f}, {gap.high:.1f}])".replace("-", "−") in section
    good, behind = left("0", "20", "good teacher"), left("0", "20", "bad teacher, assistant")
    gap = metrics.seed_interval(behind - good)
    assert f"leaves its student {good.mean():.1f}%" in section
    assert f"behind one keeps {behind.mean():.1f}%" in section
    assert f"({gap.value:.1f} [{gap.low:.1f}, {gap.high:.1f}])".replace("-", "−") in section
    assert (behind == good).sum() == 4
    for epochs, chain in (("20", "bad teacher"), ("40", "bad teacher, assistant")):
        assert not left("0", epochs, chain).any()
    assert (
        np.ptp([left("10", "40", f"{kind} teacher") for kind in ("good", "bad")], axis=0).max() == 0
    )
