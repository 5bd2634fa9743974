"""Agreement of students with their teachers: against NumPy, in a study's tables, on its page."""

import functools
import json
import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, data, evaluate, metrics, nets, report, runtime, study, train
from jdistill.evaluate._agreement import agreement_of_logits
from jdistill.report import NetworkName
from jdistill.study import Stage, Study
from tests.report_rows import Page

N, K = 60, 5
RNG = np.random.default_rng(4)
LABELS = RNG.integers(0, K, N)


def wilson(successes, total, z=1.959963984540054):
    """The share and its interval by the formula."""
    share = successes / total
    center = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total)
    half *= math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return share, center - half, center + half


def reference(student, teacher, labels):
    """Every measure by its definition; the exponentials of 500 and -500 fit into long doubles."""
    student, teacher = (np.asarray(rows, np.longdouble) for rows in (student, teacher))
    one, two = (rows.argmax(axis=1) for rows in (student, teacher))
    mistaken = two != labels
    p, q = (np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True) for rows in (teacher, student))
    center = np.eye(len(labels)) - 1 / len(labels)
    first, second = (
        center @ (rows @ rows.T) @ center
        for rows in (student.astype(np.float64), teacher.astype(np.float64))
    )
    cka = np.trace(first @ second) / np.linalg.norm(first) / np.linalg.norm(second)
    return {
        "top1_agreement": wilson((one == two).sum(), len(labels)),
        "repeated_mistakes": wilson(((one == two) & mistaken).sum(), mistaken.sum()),
        "num_teacher_mistakes": mistaken.sum(),
        "mean_kl": float((p * np.log(p / q)).sum(axis=1).mean()),
        "logits_cka": cka,
        "num_examples": len(labels),
    }


def check(found, expected):
    for name, value in expected.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-9, abs=1e-12), name


def pair_of_logits(scale):
    """Logits of two networks that are alike and make mistakes, some of them with ties."""
    teacher = RNG.normal(size=(N, K)) + 0.8 * np.eye(K)[LABELS]
    student = teacher + 0.7 * RNG.normal(size=(N, K))
    rows = [np.clip(scale * each, -500, 500).astype(np.float32) for each in (student, teacher)]
    for each in rows:
        each[::7, 1] = each[::7].max(axis=1)  # a tie: the first of the largest counts
    return rows


@pytest.mark.floor
@pytest.mark.parametrize("scale", [0.1, 1.0, 40.0, 500.0])
def test_against_definitions_in_long_doubles(scale):
    student, teacher = pair_of_logits(scale)
    expected = reference(student, teacher, LABELS)
    assert 0.3 < expected["top1_agreement"][0] < 0.95
    assert 5 < expected["num_teacher_mistakes"] < N - 5
    assert 0.1 < expected["repeated_mistakes"][0] < 0.9
    found = agreement_of_logits(student, teacher, LABELS)
    check(found, expected)
    assert found.num_nonfinite == 0
    other = agreement_of_logits(teacher, student, LABELS)
    assert other.mean_kl != pytest.approx(found.mean_kl, rel=1e-3)  # it is of the teacher's
    assert other.logits_cka == pytest.approx(found.logits_cka)
    # A shift of all logits of an example changes no softmax.
    shifted = agreement_of_logits(student - 300.0, teacher + 5.0, LABELS)
    assert shifted.mean_kl == pytest.approx(found.mean_kl, rel=1e-3, abs=1e-5)


def test_of_networks_in_batches_is_that_of_their_logits():
    inputs = RNG.uniform(0, 1, (N, 4)).astype(np.float32)
    weights = [jnp.asarray(RNG.normal(size=(4, K)), jnp.float32) for _ in range(2)]
    traces = []

    def linear(w, x):
        traces.append(x.shape)
        return 30 * (x @ w)

    student, teacher = (nets.callable_logits_fn(linear, w) for w in weights)
    expected = reference(*(30 * (inputs @ np.asarray(w)) for w in weights), LABELS)
    for batch_size in (7, N, 250):
        found = evaluate.agreement(student, teacher, inputs, LABELS, batch_size=batch_size)
        for name in ("top1_agreement", "repeated_mistakes", "num_teacher_mistakes"):
            assert getattr(found, name) == pytest.approx(expected[name]), name
        assert found.mean_kl == pytest.approx(expected["mean_kl"], rel=1e-5)
        assert found.logits_cka == pytest.approx(expected["logits_cka"], rel=1e-5)
    before = len(traces)
    evaluate.agreement(teacher, student, inputs, LABELS, batch_size=7)
    assert len(traces) == before  # other weights compile nothing


def test_with_itself():
    _, teacher = pair_of_logits(500.0)
    found = agreement_of_logits(teacher, teacher, LABELS)
    assert found.top1_agreement.value == found.repeated_mistakes.value == 1.0
    assert found.mean_kl == 0.0
    assert found.logits_cka == pytest.approx(1.0)


def test_a_teacher_without_mistakes_and_one_example():
    logits = 9.0 * np.eye(K)[LABELS]
    found = agreement_of_logits(logits, logits, LABELS)
    assert found.num_teacher_mistakes == 0
    assert np.isnan(found.repeated_mistakes).all()
    one = agreement_of_logits(logits[:1], logits[:1], LABELS[:1])
    assert np.isnan(one.logits_cka)
    assert one.top1_agreement.value == 1.0


def test_logits_that_are_not_finite():
    """They agree on nothing; a masked class counts only where the other network has it."""
    fine = np.array([2.0, 1.0, -np.inf])
    wide = np.array([2.0, 1.0, 0.0])
    broken = np.array([np.nan, 0.0, 0.0])
    labels = np.array([1, 1])

    def found(student, teacher):
        return agreement_of_logits(np.stack([student] * 2), np.stack([teacher] * 2), labels)

    both = found(fine, fine)
    assert (both.mean_kl, both.top1_agreement.value, both.num_nonfinite) == (0.0, 1.0, 0)
    assert np.isnan(both.logits_cka)
    assert found(fine, wide).mean_kl == np.inf
    p, q = np.exp([2, 1]) / np.exp([2, 1]).sum(), np.exp([2, 1]) / np.exp([2, 1, 0]).sum()
    assert found(wide, fine).mean_kl == pytest.approx((p * np.log(p / q)).sum())
    for pair in ((broken, wide), (wide, broken), (broken, broken), (wide, np.full(3, -np.inf))):
        none = found(*pair)
        assert (none.top1_agreement.value, none.mean_kl, none.num_nonfinite) == (0.0, np.inf, 2)
        assert none.repeated_mistakes.value == 0.0
        assert none.num_teacher_mistakes == 2


def test_bad_input_is_named():
    inputs = np.zeros((3, 4), np.float32)
    two, three = (nets.callable_logits_fn(lambda w, x: x @ w, jnp.ones((4, k))) for k in (2, 3))
    labels = np.array([0, 1, 0])
    for arguments, message in (
        ((two, three, inputs, labels), r"over the same classes, got logits of shapes \(3, 2\) and"),
        ((two, two, inputs[:0], labels[:0]), "expected at least one example, got none"),
        ((two, two, inputs, labels + 1), "expected labels in 0..1"),
        ((two, two, inputs, labels[:2]), "labels"),
        ((two, None, inputs, labels), "expected a callable, got NoneType as teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate.agreement(*arguments)
    with pytest.raises(ValueError, match="batch_size"):
        evaluate.agreement(two, two, inputs, labels, batch_size=0)
    with pytest.raises(ValueError, match="expected concrete arrays, got tracers"):
        jax.jit(lambda x: evaluate.agreement(two, two, x, labels).mean_kl)(inputs)


# --- As rows -------------------------------------------------------------------------------------


def test_rows_name_student_and_teacher(tmp_path):
    found = agreement_of_logits(*pair_of_logits(1.0), LABELS)
    student = NetworkName("toy", 20.0, 3, 2, "long")
    teacher = NetworkName("toy", 20.0, 3, 1, "short")
    for pair in ((student, teacher), (student._replace(chain=""), teacher._replace(chain=""))):
        (row,) = report.tables([], agreements={pair: found})["agreement"]
        named = (row.get("chain", ""), row["generation"])
        assert named == (pair[0].chain, 2)
        assert (row.get("teacher_chain", ""), row["teacher_generation"]) == (pair[1].chain, 1)
        assert row["top1_agreement_high"] == found.top1_agreement.high
        path = report.write_table(tmp_path / "agreement.csv", "agreement", [row])
        assert report.read_table(path, "agreement") == [row]
    for wrong, message in (
        ({(student, teacher._replace(seed=0)): found}, "of one data set, temperature, and seed"),
        ({student: found}, "two NetworkNames"),
        ({(student, "teacher"): found}, "two NetworkNames"),
        ({(student, teacher): 0.5}, "expected agreements to be an Agreement"),
        ([found], "agreements"),
    ):
        with pytest.raises(ValueError, match=message):
            report.tables([], agreements=wrong)


# --- In a study ----------------------------------------------------------------------------------


def dense(params, inputs):
    flat = inputs.reshape(inputs.shape[0], -1)
    return jnp.tanh(flat @ params["first"]) @ params["second"]


def init_dense(width, key, shape):
    one, two = jax.random.split(key)
    return {
        "first": 0.2 * jax.random.normal(one, (math.prod(shape), width)),
        "second": 0.3 * jax.random.normal(two, (width, 10)),
    }


def stage(width, **options):
    model = (functools.partial(init_dense, width), dense)
    rates = {"learning_rate": lambda temperature: 0.1 * temperature}
    return Stage(model=model, optimizer=train.sgd(0.1), num_epochs=3, hyperparams=rates, **options)


def digits():
    found = data.load("digits")
    return tuple(found.train[0:2]), tuple(column[:150] for column in found.test)


# They share the teacher and the assistant; the students differ.
CHAINS = {
    "wide": [stage(24), stage(12), stage(10)],
    "narrow": [stage(24), stage(12), stage(6)],
}
STUDY = Study(
    data=digits,
    name="digits",
    chains=CHAINS,
    temperatures=(10.0,),
    seeds=(0, 1),
    batch_size=32,
    attacks={"fgsm": evaluate.AttackPlan(functools.partial(attacks.fgsm, eps=0.1), 20)},
    num_sensitivity=4,
)
PAIRS = {(("wide", 1), ("wide", 0)), (("wide", 2), ("wide", 1)), (("narrow", 2), ("wide", 1))}


def pair_of(row):
    """Student and teacher of a row."""
    return (
        (row["chain"], row["generation"]),
        (row["teacher_chain"], row["teacher_generation"]),
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A study's workdir, never to be written."""
    folder = tmp_path_factory.mktemp("study") / "run"
    study.run(STUDY, folder)
    return folder


def test_a_study_measures_every_network_beside_its_teacher(finished):
    """Each pair once, as NumPy has it, and its mistakes are those of the accuracy."""
    rows = study.load(finished).rows["agreement"]
    wanted = {(10.0, seed, *pair) for seed in (0, 1) for pair in PAIRS}
    places = [(row["temperature"], row["seed"], *pair_of(row)) for row in rows]
    assert len(places) == len(set(places))
    assert set(places) == wanted
    _, (inputs, labels) = digits()
    networks = {
        (net.temperature, net.seed, net.chain, net.generation): np.asarray(net.logits_fn(inputs))
        for net in study.networks(STUDY, finished)
    }
    accuracies = {
        (row["temperature"], row["seed"], row["chain"], row["generation"]): row["test_accuracy"]
        for row in study.load(finished).rows["results"]
    }
    for row, (temperature, seed, student, teacher) in zip(rows, places, strict=True):
        one, two = (networks[temperature, seed, *network] for network in (student, teacher))
        expected = reference(one, two, labels)
        assert 0.3 < expected["top1_agreement"][0] < 1
        for name in ("top1_agreement", "repeated_mistakes"):
            ends = [row[name], row[f"{name}_low"], row[f"{name}_high"]]
            assert ends == pytest.approx(expected[name], rel=1e-9), name
        for name in ("num_teacher_mistakes", "num_examples"):
            assert row[name] == expected[name]
        assert row["mean_kl"] == pytest.approx(expected["mean_kl"], rel=1e-4)
        assert row["logits_cka"] == pytest.approx(expected["logits_cka"], rel=1e-5)
        right = row["num_examples"] - row["num_teacher_mistakes"]
        assert right / row["num_examples"] == accuracies[temperature, seed, *teacher]


def test_the_page_shows_it_over_the_seeds(finished):
    page = Page(finished / "report.html")
    start = page.text.index("Agreement of students with their teachers")
    section = page.text[start : page.text.index("Sensitivity of single examples")]
    assert "says nothing about the robustness of either" in section
    assert "linear centered kernel alignment of the logits, not of hidden features" in section
    assert "narrow, T = 10 studentassistant 1 of wide" in section
    assert "wide, T = 10 assistant 1teacher" in section
    rows = study.load(finished).rows["agreement"]
    shown = [
        (column, tuple(map(int, places.split(","))), how, float(value))
        for value, cells, _ in page.numbers
        for column, places, how in re.findall(r"^agreement\.csv#(\w+)@([\d,]+)\|(\w+)$", cells)
    ]
    reduce = {"mean": np.mean, "min": min, "max": max}
    assert {how for _, _, how, _ in shown} == set(reduce)
    for column, places, how, value in shown:
        assert value == pytest.approx(reduce[how]([rows[place][column] for place in places]))
        assert len({pair_of(rows[place]) for place in places}) == 1
        assert [rows[place]["seed"] for place in places] == [0, 1]
    means = {(column, places) for column, places, how, _ in shown if how == "mean"}
    assert len(means) == 5 * len(PAIRS)


class Stop(Exception):
    pass


def test_stopped_and_resumed_is_uninterrupted(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("agreement.csv", "results.csv"):
        (folder / name).unlink()
    kept = sorted((folder / "shards/clean").iterdir())
    for path in kept[::2]:
        path.unlink()
    seen = []

    def stop(self, name, arrays, original=runtime.ShardFolder.__setitem__):
        original(self, name, arrays)
        seen.append(name)
        if len(seen) == len(kept) // 4:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(runtime.ShardFolder, "__setitem__", stop)
        with pytest.raises(Stop):
            study.run(STUDY, folder)
    assert not (folder / "agreement.csv").exists()
    study.run(STUDY, folder)
    for name in ("agreement.csv", "results.csv"):
        assert (folder / name).read_bytes() == (finished / name).read_bytes()


def test_a_workdir_from_before_loads_and_reports_and_gets_it_without_work(
    finished, tmp_path, monkeypatch
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "agreement.csv").unlink()
    sums = json.loads((folder / "tables.json").read_text())
    sums.pop("agreement.csv")
    (folder / "tables.json").write_text(json.dumps(sums))
    tables = study.load(folder)
    assert tables.rows["agreement"] == []
    assert tables.rows["calibration"]
    assert "Agreement of students" not in Page(study.write_report(folder)).text
    monkeypatch.setattr(train.TrainStep, "__call__", None)
    monkeypatch.setattr(runtime.ShardFolder, "__setitem__", None)
    study.run(STUDY, folder)
    assert (folder / "agreement.csv").read_bytes() == (finished / "agreement.csv").read_bytes()


def test_a_frozen_teacher_counts_as_one_and_there_may_be_two_or_none(tmp_path):
    weights = init_dense(24, jax.random.key(3), (8, 8, 1))
    frozen = nets.callable_logits_fn(dense, weights)
    own = Study(
        data=digits,
        chains=[Stage(frozen=frozen), stage(6), stage(6, teachers=()), stage(6, teachers=(0, 2))],
        attacks=STUDY.attacks,
        num_sensitivity=4,
    )
    tables = study.run(own, tmp_path / "run")
    row, *others = tables.rows["agreement"]
    assert (row["generation"], row["teacher_generation"]) == (1, 0)
    assert "chain" not in row
    assert [(one["generation"], one["teacher_generation"]) for one in others] == [(3, 0), (3, 2)]
    text = Page(tables.report).text
    assert "T = 1 studentteacher" in text
    assert "T = 1 studentassistant 2" in text
    _, (inputs, labels) = digits()
    wrong = np.asarray(frozen(inputs)).argmax(1) != labels
    assert row["num_teacher_mistakes"] == wrong.sum() > 75
    found = metrics.top1_agreement(
        np.asarray(study.networks(own, tmp_path / "run")[1].logits_fn(inputs)),
        np.asarray(frozen(inputs)),
    )
    assert row["top1_agreement"] == found.mean()
