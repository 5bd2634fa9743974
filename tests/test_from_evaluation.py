"""Evaluations as tables and as a whole report: every number against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, diagnose, evaluate, nets, report
from jdistill.report import NetworkName

RNG = np.random.default_rng(0)
INPUTS = RNG.uniform(0, 1, (40, 5)).astype(np.float32)
INPUTS[::2] **= 3
WEIGHTS = RNG.normal(size=(3, 5, 4)).astype(np.float32)
LABELS = ((INPUTS - INPUTS.mean(0)) @ WEIGHTS[0]).argmax(1)


def linear(weights, inputs):
    return inputs @ weights


NETWORKS = [nets.callable_logits_fn(linear, jnp.asarray(w)) for w in WEIGHTS]
PLANS = {
    "pgd": evaluate.AttackPlan(functools.partial(attacks.pgd, eps=0.1, num_steps=3), 30),
    "own": lambda f, key, x, y: attacks.fgsm(f, None, x, y, eps=0.05),
    "deepfool": functools.partial(attacks.deepfool, norm="l2"),
}


@pytest.fixture(scope="module")
def result():
    return evaluate.evaluate(
        NETWORKS, INPUTS, LABELS, attacks=PLANS, distances=evaluate.distance_plans(num_steps=20)
    )


@pytest.fixture(scope="module")
def written(result, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    verdict = diagnose.masking(NETWORKS[0], jax.random.key(0), INPUTS[:8], LABELS[:8], eps=0.1)
    names = ["first", "second", "third"]
    return report.from_evaluation(result, names=names, verdicts={"first": verdict}, folder=folder)


def test_every_number_of_the_results_is_that_of_the_evaluation(result, written):
    rows = report.read_table(written["results"], "results")
    assert len(rows) == 3 * len(PLANS)
    for row in rows:
        place = ["first", "second", "third"].index(row["chain"])
        outcome = result.attacks[row["attack"]]
        logits = INPUTS @ WEIGHTS[place]
        assert row["num_test"] == 40
        assert row["test_accuracy"] == np.mean(logits.argmax(1) == LABELS)
        assert row["mean_abs_logit"] == pytest.approx(np.abs(logits).mean(), rel=1e-5)
        flags = outcome.success[place]
        assert row["num_attacked"] == len(flags) == (30 if row["attack"] == "pgd" else 40)
        assert row["success_rate"] == flags.mean()
        low, high = row["success_rate_low"], row["success_rate_high"]
        assert low <= row["success_rate"] <= high
        if flags.any():
            found = outcome.distance[place][flags]
            assert row["mean_distance"] == pytest.approx(found.mean(), rel=1e-5)
            assert row["median_distance"] == pytest.approx(np.median(found), rel=1e-5)
        assert row["mean_queries"] == pytest.approx(outcome.queries[place].mean())
        gradient = np.abs(WEIGHTS[place].sum(axis=1)).mean()
        assert row["sensitivity_logits"] == pytest.approx(gradient, rel=1e-4)


def test_other_tables_are_those_of_the_evaluation(result, written):
    folder = written["results"].parent
    for row in report.read_table(folder / "distances.csv", "distances"):
        place = ["first", "second", "third"].index(row["chain"])
        outcome = result.distances[row["norm"]]
        assert row["success_rate"] == outcome.success[place].mean()
        found = outcome.distance[place][outcome.success[place]]
        assert row["mean"] == pytest.approx(found.mean(), rel=1e-5)
    for row in report.read_table(folder / "curves.csv", "curves"):
        if row["curve"] == "steps":
            place = ["first", "second", "third"].index(row["chain"])
            at = result.attacks[row["attack"]].info["first_success"][place]
            broken = (at >= 0) & (at <= row["x"])
            assert row["robust_accuracy"] == pytest.approx(1 - broken.mean())
    (verdict,) = report.read_verdicts(folder / "verdicts.json")
    assert verdict["chain"] == "first"
    page = written["report"].read_text()
    assert "that first keeps" in page or "First keeps" in page
    assert '<th scope="row">third</th>' in page
    assert "ordinary network" not in page


def test_pairs_are_compared_on_the_same_examples(result):
    names = [NetworkName("d", generation=number) for number in range(3)]
    rows = report.tables([(result, names)], compared=[(names[2], names[1])])["comparisons"]
    (accuracy,) = [row for row in rows if row["quantity"] == "test_accuracy"]
    right = [(INPUTS @ w).argmax(1) == LABELS for w in WEIGHTS]
    assert accuracy["difference"] == pytest.approx(right[2].mean() - right[1].mean())
    robust = [row for row in rows if row["quantity"].startswith("robust_accuracy: pgd")]
    flags = result.attacks["pgd"].success
    assert robust[0]["difference"] == pytest.approx(flags[1].mean() - flags[2].mean())
    assert (accuracy["generation"], accuracy["baseline_generation"]) == (2, 1)
    with pytest.raises(ValueError, match="pairs of networks that were measured"):
        report.tables([(result, names)], compared=[(names[2], NetworkName("other"))])


def test_seeds_are_pooled(result):
    measured, pairs = [], []
    for seed in (0, 1):
        names = [NetworkName("d", seed=seed, generation=number) for number in range(3)]
        measured.append((result, names))
        pairs.append((names[2], names[1]))
    rows = report.tables(measured, compared=pairs)["comparisons"]
    pooled = [row for row in rows if row["seed"] is None]
    assert {row["quantity"] for row in pooled} == {row["quantity"] for row in rows}


def test_names_and_verdicts_that_do_not_fit_are_named(result, tmp_path):
    verdict = diagnose.masking(NETWORKS[0], jax.random.key(0), INPUTS[:8], LABELS[:8], eps=0.1)
    for options, message in (
        ({"names": ["a", "b"]}, "a different one for each of 3 networks"),
        ({"names": ["a", "a", "b"]}, "a different one"),
        ({"names": ["a", "b", "c"], "verdicts": {"d": verdict}}, "got one on d"),
        ({"verdicts": [verdict]}, "a verdict for each of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            report.from_evaluation(result, folder=tmp_path, **options)
    with pytest.raises(ValueError, match="a name for each of 3"):
        report.tables([(result, [NetworkName("a")])])


def test_pictures_of_channels_first_and_last_are_the_same():
    images = RNG.uniform(0, 1, (6, 1, 4, 5)).astype(np.float32)
    weights = jnp.asarray(RNG.normal(size=(20, 3)), jnp.float32)
    net = nets.callable_logits_fn(lambda w, x: x.reshape(len(x), -1) @ w, weights)
    plans = {"deepfool": functools.partial(attacks.deepfool, norm="l2", num_steps=3)}
    labels = np.arange(6) % 3
    first = report.pictures(evaluate.evaluate(net, images, labels, attacks=plans), 0)
    last = images.transpose(0, 2, 3, 1)
    same = report.pictures(evaluate.evaluate(net, last, labels, attacks=plans), 0)
    assert first["clean"].shape == (6, 4, 5, 1)
    np.testing.assert_array_equal(first["adversarial"], same["adversarial"])


def test_a_bare_attack_gives_distances():
    fmn = functools.partial(attacks.fmn, norm="l2", num_steps=5)
    bare, plan = (
        evaluate.evaluate(NETWORKS[:1], INPUTS, LABELS, attacks={}, distances={"l2": each})
        for each in (fmn, evaluate.AttackPlan(fmn))
    )
    np.testing.assert_array_equal(bare.distances["l2"].distance, plan.distances["l2"].distance)
