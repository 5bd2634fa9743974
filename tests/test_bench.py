"""Timing beside other toolkits, which are played by stubs here: who is called when, and the tables.

No test looks at how long anything really takes.
"""

import functools
import importlib.util
import inspect
import json
import math

import jax
import numpy as np
import pytest

from experiments import bench, bench_attacks, bench_evaluate, npz_network, timing, torch_side
from experiments.bench_attacks import COMPARISONS, Outcome, Row
from experiments.peers import Comparison
from experiments.timing import Timing
from jdistill import attacks, nets


class Clock:
    """Stands still until somebody works."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def worker(clock, log, name, *seconds):
    """A call that takes so many seconds, another number each time, and returns how often it ran."""
    left = list(seconds)

    def call():
        log.append(name)
        clock.now += left.pop(0)
        return f"{name} {log.count(name)}"

    return call


def test_calls_take_turns_after_warming_up():
    clock, log, steps = Clock(), [], []
    timed = timing.interleaved(
        {"a": worker(clock, log, "a", 9, 3, 1, 2), "b": worker(clock, log, "b", 8, 40, 60, 50)},
        repeats=3,
        after_call=lambda *step: steps.append(step),
        clock=clock,
    )
    assert log == ["a", "b"] * 4
    assert timed.timings == {"a": Timing(9, (3, 1, 2)), "b": Timing(8, (40, 60, 50))}
    assert timed.results == {"a": "a 1", "b": "b 1"}
    assert timed.failures == {}
    assert steps == [(done, 8) for done in range(9)]


def test_median_and_what_the_first_call_took_beyond_it():
    assert Timing(9.0, (3.0, 1.0, 2.0)).median == 2.0
    assert Timing(9.0, (3.0, 1.0, 2.0)).extra == 7.0
    assert Timing(9.0, (1.0, 2.0)).median == 1.5
    assert Timing(1.0, (3.0,)).extra == 0.0


def test_optional_calls_may_fail_or_be_too_slow():
    clock, log, steps = Clock(), [], []

    def broken():
        log.append("broken")
        raise RuntimeError("no\n  such thing")

    timed = timing.interleaved(
        {
            "ours": worker(clock, log, "ours", 100, 1, 1),
            "broken": broken,
            "slow": worker(clock, log, "slow", 11),
            "fast": worker(clock, log, "fast", 10, 4, 6),
        },
        repeats=2,
        optional={"broken", "slow", "fast"},
        slow_seconds=10,
        after_call=lambda *step: steps.append(step),
        clock=clock,
    )
    assert log == ["ours", "broken", "slow", "fast", "ours", "fast", "ours", "fast"]
    assert timed.failures == {"broken": "RuntimeError: no such thing"}
    assert timed.timings == {
        "ours": Timing(100, (1, 1)),
        "slow": Timing(11, (11,)),
        "fast": Timing(10, (4, 6)),
    }
    assert set(timed.results) == {"ours", "slow", "fast"}
    assert steps[-1] == (8, 8)
    with pytest.raises(RuntimeError, match="such thing"):
        timing.interleaved({"broken": broken}, repeats=1)


@pytest.fixture(autouse=True)
def keep_caches(monkeypatch):
    """Other tests want what was compiled; returns how often it would have been forgotten."""
    calls = []
    monkeypatch.setattr(jax, "clear_caches", lambda: calls.append(True))
    return calls


@pytest.fixture
def judged(monkeypatch):
    """Peers' examples are their distances."""

    def distances(model, found, inputs, labels, norm, targets):
        targets = None if targets is None else list(targets)
        assert model == "model"
        assert targets == ([1, 2, 3, 4] if norm == "l0" else None)
        return np.asarray(found)

    monkeypatch.setattr(torch_side, "distances", distances)


INPUTS = np.zeros((4, 2, 2, 1), np.float32)
LABELS = np.arange(4)
SUBJECT = bench_attacks.Subject("network", INPUTS, LABELS, "model", ("tensor", np.arange(4)))


def fake(log, *, attack="pgd", norm="linf", **toolkits):
    """A comparison of stubs; a toolkit is the distances that it finds, or an exception."""

    def ours(logits_fn, key, inputs, labels):
        assert logits_fn == "network"
        assert inputs is INPUTS
        assert labels is LABELS
        log.append("jdistill")
        distance = np.array([1.0, 2.0, 3.0, 4.0])
        return attacks.AttackResult(inputs, distance != 3.0, distance, np.ones(4, int), {})

    def peer(name, found):
        def run(model, inputs, labels):
            assert (model, inputs) == ("model", "tensor")
            assert labels is SUBJECT.tensors[1]
            log.append(name)
            print("a toolkit's chatter")
            if isinstance(found, Exception):
                raise found
            return found

        return run

    named = {name: peer(name, found) for name, found in toolkits.items()}
    return Comparison(attack, norm, "10 steps", ours, named, targeted=norm == "l0")


def test_compare_calls_all_and_keeps_what_they_found(judged, keep_caches, capsys):
    log = []
    row = bench_attacks.compare(
        fake(log, foolbox=[1.5, math.inf, 1.0, 5.0], ART=ValueError("shape"), torchattacks=None),
        SUBJECT,
        repeats=2,
        missing={"torchattacks": "not installed; do something", "adv-lib": "irrelevant"},
    )
    assert log == ["jdistill", "foolbox", "ART", *["jdistill", "foolbox"] * 2]
    assert len(keep_caches) == 1
    assert (row.attack, row.norm, row.budget) == ("pgd", "linf", "10 steps")
    assert row.ours.distances.tolist() == [1.0, 2.0, math.inf, 4.0]
    assert row.ours.success == row.theirs["foolbox"].success == 0.75
    assert row.means("foolbox") == (2.5, 3.25)  # over the first and the last image
    assert set(row.theirs) == {"foolbox"}
    assert row.skipped == {
        "torchattacks": "not installed; do something",
        "ART": "ValueError: shape",
    }
    assert len(row.ours.timing.warm) == len(row.theirs["foolbox"].timing.warm) == 2
    assert capsys.readouterr().out == ""


def test_compare_raises_what_ours_raises():
    def ours(*_):
        raise FloatingPointError("ours")

    broken = Comparison("pgd", "linf", "", ours, {})
    with pytest.raises(FloatingPointError, match="ours"):
        bench_attacks.compare(broken, SUBJECT, repeats=1)


def outcome(*seconds, first=30.0, distances=(1.0, 2.0)):
    return Outcome(Timing(first, seconds), np.array(distances))


def test_ratio_is_against_the_fastest_median():
    # adv-lib has the smallest single time, ART the smallest median.
    theirs = {"foolbox": outcome(9, 8, 7), "adv-lib": outcome(1, 9, 9), "ART": outcome(5, 4, 3)}
    row = Row("ddn", "l2", "9 steps", outcome(1, 2, 30), theirs, {})
    assert row.fastest == "ART"
    assert row.ratio("ART") == 0.5
    assert row.ratio("foolbox") == 0.25
    assert Row("ddn", "l2", "9 steps", outcome(1), {}, {}).fastest is None


ROWS = [
    Row(
        "ddn",
        "l2",
        "9 steps",
        outcome(0.5, 0.25, 0.75, distances=(1.0, 2.0, 4.0, math.inf)),
        {
            "foolbox": outcome(3.0, 1.0, 2.0, distances=(3.0, 3.0, math.inf, math.inf)),
            "adv-lib": outcome(8.0, distances=(math.inf,) * 4),
        },
        {"ART": "ValueError: no"},
    ),
    Row("carlini_wagner_l0", "l0", "1 step", outcome(2.0, 2.0), {}, {"ART": "not installed"}),
]


def cells(table):
    """A Markdown table's rows."""
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1  # straight columns
    assert set(lines[1]) <= set("|- ")
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_tables():
    head, _, first, second = cells(bench_attacks.fastest_table(ROWS))
    assert dict(zip(head, first, strict=True)) == {
        "attack": "ddn",
        "norm": "l2",
        "budget": "9 steps",
        "compile s": "29.5",
        "jdistill s": "0.5 (0.25–0.75)",
        "fastest peer s": "2 (1–3)",
        "peer": "foolbox",
        "ratio": "0.25",
        "success %": "75 / 50",
        "mean distance": "1.5 / 3",
    }
    assert second[:2] == ["carlini_wagner_l0", "l0"]
    assert second[-5:] == ["–"] * 5
    head, _, *rows = cells(bench_attacks.peers_table(ROWS))
    assert [row[head.index("peer")] for row in rows] == ["foolbox", "adv-lib"]
    assert rows[1][3:] == ["8 (1 call)", "adv-lib", "0.06", "75 / 0", "– / –"]


def test_text_says_what_is_missing():
    text = bench_attacks.text(ROWS)
    assert bench_attacks.fastest_table(ROWS) in text
    assert bench_attacks.peers_table(ROWS) in text
    assert text.endswith(
        "* ART has no ddn l2 here: ValueError: no\n"
        "* ART has no carlini_wagner_l0 l0 here: not installed\n"
    )
    assert "*" not in bench_attacks.text([ROWS[0]._replace(skipped={})])


def test_records_are_json():
    first, second = json.loads(json.dumps([bench_attacks.record(row) for row in ROWS]))
    assert first["jdistill"]["median_seconds"] == 0.5
    assert first["jdistill"]["seconds"] == [0.5, 0.25, 0.75]
    assert first["compile_seconds"] == 29.5
    assert first["fastest_peer"] == "foolbox"
    assert first["peers"]["foolbox"]["ratio"] == 0.25
    assert first["peers"]["foolbox"]["jdistill_mean_distance"] == 1.5
    assert first["peers"]["adv-lib"]["mean_distance"] is None
    assert second["fastest_peer"] is None


def test_comparisons_fit_our_attacks_and_the_toolkits_known():
    assert len({(c.attack, c.norm) for c in COMPARISONS}) == len(COMPARISONS)
    assert {name for c in COMPARISONS for name in c.peers} == set(bench_attacks._TOOLKITS)
    for comparison in COMPARISONS:
        assert hasattr(attacks, comparison.attack)
        if isinstance(comparison.ours, functools.partial):
            signature = inspect.signature(comparison.ours.func)
            signature.bind(None, None, None, None, **comparison.ours.keywords)


def test_without_torch_the_error_says_what_to_install(monkeypatch):
    def find(*names):
        def find_spec(name):
            return object() if name in names else None

        monkeypatch.setattr(importlib.util, "find_spec", find_spec)

    find("torch", "foolbox", "art")
    assert set(bench_attacks.missing_toolkits()) == {"torchattacks", "adv-lib", "pyautoattack"}
    for names in ((), ("torch",), ("foolbox", "art")):
        find(*names)
        with pytest.raises(ModuleNotFoundError, match=r"expected torch .*requirements-peers\.txt"):
            bench.run(bench.parse(["attacks"]))


def test_command_line():
    options = bench.parse(["attacks"])
    assert options.attacks == tuple(dict.fromkeys(c.attack for c in COMPARISONS))
    assert (options.batch_size, options.repeats) == (100, 5)
    options = bench.parse(["attacks", "--attacks", "pgd", "ddn", "--repeats", "2"])
    assert options.attacks == ("pgd", "ddn")
    assert options.repeats == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--attacks", "square"], "fgsm"),
        (["--attacks"], "expected at least one attack"),
        (["--repeats", "0"], "expected repeats"),
        (["--batch-size", "-1"], "expected batch_size"),
        (["--slow-seconds", "nan"], "expected slow_seconds"),
        (["--output", "bench.csv"], "expected output to end in .md"),
    ],
)
def test_bad_options_are_refused(arguments, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as caught:
        bench.parse(["attacks", *arguments])
    assert message in str(caught.value) + "".join(capsys.readouterr())


@pytest.fixture
def digits():
    """Weights of a small network, and images with the labels that it gives them."""
    model = nets.ConvNet(features=((4, 4),), hidden=(8, 6), num_classes=10)
    params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
    params = jax.tree.map(np.asarray, params)
    inputs = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1)).astype(np.uint8)
    logits = nets.logits_fn(model, {"params": params})(inputs.astype(np.float32) / 255)
    return params, inputs, np.asarray(logits).argmax(1)


def write(folder, params, inputs, labels):
    flat = {f"{layer}/{kind}": v for layer, kinds in params.items() for kind, v in kinds.items()}
    np.savez(folder / "network.npz", **flat)
    np.savez(folder / "images.npz", inputs=inputs, labels=labels)


def test_files_hold_networks_and_images(tmp_path, digits):
    params, inputs, labels = digits
    write(tmp_path, *digits)
    read = npz_network.read_params(tmp_path / "network.npz")
    jax.tree.map(np.testing.assert_array_equal, read, dict(params))
    model = npz_network.conv_net(read, (8, 8, 1))
    assert (model.features, model.hidden, model.num_classes) == (((4, 4),), (8, 6), 10)
    images, read_labels = npz_network.read_images(tmp_path / "images.npz")
    np.testing.assert_array_equal(np.rint(images * 255), inputs)
    np.testing.assert_array_equal(read_labels, labels)


def test_files_of_the_checkout_are_those_of_the_papers_network():
    params = npz_network.read_params(bench._FILES / "plain.npz")
    inputs, labels = npz_network.read_images(bench._FILES / "images.npz")
    assert npz_network.conv_net(params, (28, 28, 1)) == nets.mnist_net()
    assert inputs.shape[1:] == (28, 28, 1)
    assert len(inputs) == len(labels) >= 150
    assert inputs.max() == 1.0


def test_files_that_hold_something_else(tmp_path, digits):
    params, inputs, labels = digits
    path = tmp_path / "file.npz"
    with pytest.raises(FileNotFoundError, match=r"expected an \.npz file.*make_networks"):
        npz_network.read_params(path)
    path.write_text("not an archive")
    with pytest.raises(ValueError, match=r"expected an \.npz file of arrays"):
        npz_network.read_params(path)
    np.savez(path, inputs=inputs / 255, labels=labels)
    with pytest.raises(ValueError, match=r"\(uint8\).*inputs float64\[12, 8, 8, 1\]"):
        npz_network.read_images(path)
    np.savez(path, inputs=inputs, labels=labels[1:])
    with pytest.raises(ValueError, match=r"labels int64\[11\]"):
        npz_network.read_images(path)
    for wrong in (
        {name: layer for name, layer in params.items() if name != "logits"},
        {name: layer for name, layer in params.items() if name != "dense_0"},
        {**params, "extra": params["logits"]},
        {},
    ):
        with pytest.raises(ValueError, match=r"expected the weights of a nets\.ConvNet"):
            npz_network.conv_net(wrong, (8, 8, 1))
    with pytest.raises(ValueError, match="inputs of shape"):
        npz_network.conv_net(params, (10, 10, 1))


def test_only_images_that_are_classified_correctly(digits, monkeypatch):
    params, inputs, labels = digits
    monkeypatch.setattr(torch_side, "torch_network", lambda params: "model")
    monkeypatch.setattr(torch_side, "torch_batch", lambda *batch: batch)
    labels = np.where(np.arange(12) % 3 == 0, (labels + 1) % 10, labels)
    images = inputs.astype(np.float32) / 255
    subject = bench_attacks.make_subject(params, images, labels, 4)
    np.testing.assert_array_equal(subject.inputs, images[[1, 2, 4, 5]])
    np.testing.assert_array_equal(subject.labels, labels[[1, 2, 4, 5]])
    for ours, theirs in zip((subject.inputs, subject.labels), subject.tensors, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match=r"expected batch_size <= 8, .* got 9"):
        bench_attacks.make_subject(params, images, labels, 9)


@pytest.fixture
def stubbed(monkeypatch, tmp_path, digits, judged):
    """`stubbed(comparisons)`: the options of a run that meets them instead of PyTorch."""
    write(tmp_path, *digits)
    monkeypatch.setattr(bench_attacks, "missing_toolkits", lambda: {"ART": "not installed"})
    monkeypatch.setattr(bench_attacks, "versions", lambda: {"torch": "0.0"})
    monkeypatch.setattr(bench_attacks, "set_torch_threads", lambda count: count)
    monkeypatch.setattr(bench_attacks, "make_subject", lambda *_: SUBJECT)

    def options(comparisons, *arguments):
        monkeypatch.setattr(bench, "COMPARISONS", comparisons)
        files = ["--network", tmp_path / "network.npz", "--images", tmp_path / "images.npz"]
        return bench.parse(["attacks", *map(str, files), *arguments])

    return options


def test_run_prints_and_writes_the_tables(stubbed, tmp_path, capsys):
    log = []
    comparisons = [
        fake(log, foolbox=[1.0, 1.0, 1.0, 1.0], ART=[1.0] * 4),
        fake(log, attack="jsma", norm="l0", torchattacks=[2.0] * 4),
        fake(log, attack="ddn", foolbox=[]),
    ]
    output = tmp_path / "new" / "bench.md"
    arguments = ("--attacks", "jsma", "pgd", "--repeats", "2", "--output", str(output))
    bench.run(stubbed(comparisons, *arguments))
    assert log == ["jdistill", "foolbox"] * 3 + ["jdistill", "torchattacks"] * 3
    printed = capsys.readouterr()
    assert output.read_text() == f"# Attacks beside other toolkits\n\n{printed.out}"
    assert "torch 0.0" in printed.out
    assert "network.npz" in printed.out
    assert "| pgd    | linf |" in printed.out
    assert "* ART has no pgd linf here: not installed" in printed.out
    assert "jsma l0" in printed.err
    content = json.loads(output.with_suffix(".json").read_text())
    assert content["conditions"]["repeats"] == 2
    assert [row["attack"] for row in content["attacks"]] == ["pgd", "jsma"]
    assert len(content["attacks"][0]["peers"]["foolbox"]["seconds"]) == 2


def test_stopped_run_prints_what_it_has(stubbed, tmp_path, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    comparisons = [fake([], foolbox=[1.0] * 4), Comparison("ddn", "l2", "", stop, {})]
    output = tmp_path / "bench.md"
    with pytest.raises(KeyboardInterrupt, match="a new run starts from the beginning"):
        bench.run(stubbed(comparisons, "--output", str(output)))
    printed = capsys.readouterr().out
    assert "| pgd " in printed
    assert output.read_text().endswith(printed)


# One call against single ones


def test_the_three_ways_of_an_evaluation_are_timed():
    def linear(weights, inputs):
        return inputs @ weights

    networks = [nets.callable_logits_fn(linear, jax.numpy.eye(3) + number) for number in range(2)]
    inputs, labels = np.full((4, 3), 0.5, np.float32), np.arange(4) % 3
    calls = []
    timings = bench_evaluate.compare(
        networks,
        inputs,
        labels,
        num_steps=1,
        batch_size=2,
        repeats=2,
        after_call=lambda done, total: calls.append((done, total)),
    )
    assert list(timings) == ["single calls", "one call, looped", "one call, vmapped"]
    assert all(len(found.warm) == 2 for found in timings.values())
    assert calls[-1] == (9, 9)


def test_the_ratio_is_that_to_the_single_calls():
    seconds = {"single calls": (4.0, 2.0, 3.0), "one call, looped": (3.0, 9.0, 1.5)}
    timings = {name: Timing(9.5, warm) for name, warm in seconds.items()}
    assert bench_evaluate.text(timings, 9).splitlines()[2:] == [
        "| 9 single calls | 3 (2–4) | 9.5 | 1.00 |",
        "| one call, looped | 3 (1.5–9) | 9.5 | 1.00 |",
    ]
    timings["one call, looped"] = Timing(9.5, (1.5,))
    assert bench_evaluate.text(timings, 9).splitlines()[3].endswith("| 9.5 | 0.50 |")


def test_networks_of_the_bench_differ_in_their_weights_alone():
    model = nets.ConvNet(features=((2,),), hidden=(3,), num_classes=4)
    params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
    params = jax.tree.map(np.asarray, params)
    one, other = bench_evaluate.make_networks(params, (8, 8, 1), 2)
    assert jax.tree.structure(one) == jax.tree.structure(other)
    leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    assert any(np.abs(a - b).max() > 0 for a, b in leaves)


def test_options_of_the_evaluation():
    options = bench.parse(["evaluate", "--num-networks", "3", "--num-steps", "2"])
    assert (options.num_networks, options.num_steps, options.repeats) == (3, 2, 3)
    with pytest.raises(ValueError, match=r"num_examples .*got 0"):
        bench.Evaluate(num_examples=0)
