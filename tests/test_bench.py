"""Timing beside other toolkits, which are played by stubs here: who is called when, and the tables.

No test looks at how long anything really takes.
"""

import dataclasses
import functools
import importlib.util
import inspect
import json
import math
import os
import subprocess
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from experiments import (
    bench,
    bench_attacks,
    bench_data,
    bench_evaluate,
    bench_options,
    bench_rows,
    bench_startup,
    bench_sweep,
    bench_train,
    npz_network,
    timing,
    torch_side,
)
from experiments.bench_attacks import COMPARISONS, Outcome, Row
from experiments.bench_rows import BenchRow
from experiments.peers import Comparison
from experiments.timing import Timed, Timing
from jdistill import attacks, data, losses, nets, runtime


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
    assert len({(c.attack, c.norm, c.budget) for c in COMPARISONS}) == len(COMPARISONS)
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


@pytest.mark.parametrize("name", ["train", "attacks", "evaluate", "sweep", "data", "startup"])
def test_every_command_has_the_common_options(name):
    options = bench.parse([name])
    assert options.flags
    assert options.json is None
    options = bench.parse([name, "--no-flags", "--json", "rows.json", "--repeats", "7"])
    assert (options.flags, options.json, options.repeats) == (False, "rows.json", 7)


@pytest.mark.parametrize("kind", [kind for kind, _ in bench._COMMANDS.values()])
def test_every_command_checks_its_options(kind):
    with pytest.raises(ValueError, match=r"expected json to end in \.json, got 'rows\.md'"):
        kind(json="rows.md")
    fields = {field.name: field.type for field in dataclasses.fields(kind)}
    for name in (name for name, type_ in fields.items() if type_ is int):
        with pytest.raises(ValueError, match=f"expected {name} .*got 0"):
            kind(**{name: 0})
    if "width" in fields:
        with pytest.raises(ValueError, match=r"expected width .*got 0"):
            kind(width=0.0)


@pytest.mark.parametrize("flags", [True, False])
def test_flags_are_set_before_the_command_runs(flags, monkeypatch):
    log = []
    monkeypatch.setattr(jax.config, "update", lambda name, value: log.append((name, value)))
    monkeypatch.setattr(runtime, "add_cpu_flags", lambda: log.append("flags"))
    monkeypatch.setattr(bench, "run", lambda options: log.append(type(options).__name__))
    bench.main(["data"] if flags else ["data", "--no-flags"])
    cache = ("jax_enable_compilation_cache", False)
    assert log == [cache, *(["flags"] if flags else []), "Data"]
    log.clear()
    bench.main(["train"])
    assert log == [("jax_platforms", "cpu"), cache, "flags", "Train"]


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
        (["--output", "a/b.md", "--json", "a/b.json"], "expected json to be another file"),
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
    monkeypatch.setattr(torch_side, "set_threads", lambda count: count)
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
    rows_file = tmp_path / "other" / "rows.json"
    bench.run(stubbed(comparisons, *arguments, "--json", str(rows_file)))
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
    pgd, jsma = check_rows(rows_file)
    assert pgd["row"] == "pgd linf, 10 steps, 4 images"
    assert (pgd["peer"], pgd["target"]) == ("foolbox", 1.0)
    assert (jsma["peer"], jsma["target"]) == ("torchattacks", 0.7)
    assert pgd["ours_s"] == content["attacks"][0]["jdistill"]["median_seconds"]
    assert pgd["versions"]["torch"] == "0.0"


def check_rows(path):
    """The rows of a file that `--json` names, whose figures agree with each other."""
    rows = json.loads(path.read_text())
    for row in rows:
        assert row["ours_s"] > 0
        low, high = row["ours_range_s"]
        assert low <= row["ours_s"] <= high
        if row["theirs_s"] is None:
            assert row["ratio"] is None
            assert row["note"]
        else:
            assert row["ratio"] == pytest.approx(row["ours_s"] / row["theirs_s"])
        assert row["target"] is None or row["target"] > 0
        assert row["row"]
        assert row["peer"]
        assert "CPU" in row["device"]
        assert row["versions"]["jax"] == jax.__version__
        assert row["xla_flags"] == os.environ.get("XLA_FLAGS", "")
    assert len({(row["row"], row["peer"]) for row in rows}) == len(rows)
    return rows


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


@pytest.mark.slow
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


def test_one_call_is_compared_with_all_single_calls():
    timings = {
        "single calls": Timing(9.5, (4.0, 2.0, 3.0)),
        "one call, looped": Timing(9.5, (3.0, 9.0, 1.5)),
        "one call, vmapped": Timing(9.5, (1.5,)),
    }
    looped, vmapped = bench_evaluate.rows(timings, num_networks=9, platform="gpu")
    assert (looped.ratio, vmapped.ratio) == (1.0, 0.5)
    assert (looped.target, vmapped.target) == (None, 0.25)  # of the way that is the default there
    assert looped.row == "9 networks in one call, looped"
    assert looped.peer == "9 single calls"
    for count, platform in ((8, "gpu"), (9, "cpu")):
        rows = bench_evaluate.rows(timings, num_networks=count, platform=platform)
        assert [row.target for row in rows] == [None, None]


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
        bench_options.Evaluate(num_examples=0)


# Rows


def test_a_row_is_of_one_of_the_steps_of_a_call():
    row = BenchRow("step", Timing(30.0, (8.0, 4.0, 6.0)), "peer", Timing(9.0, (12.0,)), each=2)
    assert (row.ours_s, row.theirs_s, row.ratio) == (3.0, 6.0, 0.5)
    record = json.loads(json.dumps(bench_rows.record(row, {"device": "a device"})))
    assert record == {
        "row": "step",
        "ours_s": 3.0,
        "theirs_s": 6.0,
        "peer": "peer",
        "ratio": 0.5,
        "target": None,
        "compile_s": 24.0,  # of the call, not of a step
        "theirs_compile_s": None,
        "ours_range_s": [2.0, 4.0],
        "theirs_range_s": [6.0, 6.0],
        "repeats": 3,
        "note": "",
        "device": "a device",
    }
    alone = bench_rows.record(row._replace(theirs=None, compiles=False, peer_compiles=True), {})
    assert (alone["theirs_s"], alone["ratio"], alone["theirs_range_s"]) == (None, None, None)
    assert (alone["compile_s"], alone["theirs_compile_s"]) == (None, None)


def test_table_of_rows_and_their_notes():
    ours, theirs = Timing(30.0, (8.0, 4.0, 6.0)), Timing(9.5, (3.0, 2.0, 4.0))
    missing = BenchRow("a", ours, "torch", None, target=1.2, note="not installed")
    rows = [missing, missing._replace(row="b"), BenchRow("c", ours, "x", theirs, note="so", each=2)]
    text = bench_rows.text([*rows, rows[2]._replace(row="d", peer_compiles=True, note="")])
    table, notes = text.split("\n\n")
    _, _, *lines = cells(table)
    assert lines[0] == ["a", "6 (4–8)", "–", "torch", "–", "1.2", "24.0"]
    assert lines[2] == ["c", "3 (2–4)", "1.5 (1–2)", "x", "2.00", "–", "24.0"]
    assert lines[3][-1] == "24.0 / 6.5"
    assert notes == "* torch is missing: not installed\n* c: so\n"
    assert bench_rows.text([rows[2]._replace(note="")]).count("\n") == 3


# Training steps and input gradients


@pytest.mark.slow
def test_training_steps_are_those_of_the_optimizer(digits):
    params, inputs, labels = digits
    images = inputs.astype(np.float32) / 255
    batches = bench_train.full_batches(images, labels, 5, 5)
    assert [batch.mask.sum() for batch in batches] == [5] * 5
    np.testing.assert_array_equal(batches[1].inputs, images[5:10])
    np.testing.assert_array_equal(batches[4].inputs, images[:5])  # around, without a padded one
    run = bench_train.our_training(params, (8, 8, 1), dropout_rate=0.0, learning_rate=0.1)
    first = run(batches[:1])
    logits = nets.logits_fn(npz_network.conv_net(params, (8, 8, 1)), {"params": params})
    expected = losses.cross_entropy(logits(images[:5]), labels[:5]).mean()
    np.testing.assert_allclose(first, [expected], rtol=1e-5)
    assert np.all(np.diff(run(batches[:1] * 4), prepend=first) < 0)  # goes on where it was
    dropped = bench_train.our_training(params, (8, 8, 1))(batches[:1])
    assert abs(dropped[0] - first[0]) > 1e-4
    with pytest.raises(ValueError, match=r"expected batch_size <= 12, .* got 13"):
        bench_train.full_batches(images, labels, 13, 1)


def test_ascent_goes_on_after_success():
    weights = jax.numpy.array([[2.0, -2.0], [1.0, -1.0]])
    logits_fn = nets.callable_logits_fn(lambda w, x: x @ w - 0.3, weights)
    inputs = np.array([[0.5, 0.5], [0.05, 0.5]], np.float32)
    found = bench_train.ascend(logits_fn, inputs, np.array([0, 0]), 0.1, num_steps=5)
    np.testing.assert_allclose(found, [[0.4, 0.4], [0.0, 0.4]], atol=1e-6)  # ball, and box


def test_train_without_torch(digits, tmp_path, monkeypatch, capsys):
    write(tmp_path, *digits)
    monkeypatch.setattr(torch_side, "missing", lambda: "torch is not installed; do something")
    output = tmp_path / "rows.json"
    files = ["--network", tmp_path / "network.npz", "--images", tmp_path / "images.npz"]
    sizes = ["--num-steps", "2", "--batch-size", "4", "--repeats", "2", "--json", output]
    bench.run(bench.parse(["train", *map(str, [*files, *sizes])]))
    rows = check_rows(output)
    assert [row["target"] for row in rows] == [1.2, 0.95, 0.95]
    assert {row["note"] for row in rows} == {"torch is not installed; do something"}
    printed = capsys.readouterr().out
    assert printed.count("torch is not installed") == 1
    assert "training step" in printed


def test_rows_of_training_are_of_one_step():
    timings = {
        name: Timing(9.0, (seconds,))
        for name, seconds in {
            bench_train.STEP: 2.0,
            bench_train.GRADIENT: 4.0,
            bench_train.PGD: 6.0,
            bench_train.STEP_PEER: 8.0,
            bench_train.GRADIENT_PEER: 16.0,
        }.items()
    }
    for fooled in (0, 2):
        success = np.arange(5) < fooled
        results = {bench_train.PGD: SimpleNamespace(success=success)}
        rows = bench_train.rows(
            Timed(timings, results, {}), num_steps=4, batch_size=5, missing=None
        )
        assert [row.ours_s for row in rows] == [0.5, 1.0, 1.5]
        assert [row.ratio for row in rows] == [0.25, 0.25, 0.375]
        notes = [row.note for row in rows]
        assert notes == ["", "", "2 images were fooled, and stopped there" if fooled else ""]


# A sweep


@pytest.mark.slow
def test_all_ways_of_a_sweep_train_the_same_networks():
    model = nets.digits_net(width=0.1)
    timed = bench_sweep.compare(
        model,
        (8, 8, 1),
        num_temperatures=2,
        num_seeds=2,
        num_steps=2,
        batch_size=3,
        repeats=1,
    )
    looped, vmapped, singles = (
        timed.results[name]
        for name in (bench_sweep.LOOPED, bench_sweep.VMAPPED, bench_sweep.SINGLES)
    )
    assert len(singles) == 4
    for stack in (looped, vmapped):
        for run, params in enumerate(singles):
            ours = nets.index(stack, run)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, params)
    kernels = np.asarray(looped["logits"]["kernel"])
    for one, other in ((0, 1), (0, 2)):  # another seed, another temperature
        assert np.abs(kernels[one] - kernels[other]).max() > 1e-4


def test_targets_of_a_sweep_are_those_of_its_default_way():
    names = (bench_sweep.LOOPED, bench_sweep.VMAPPED, bench_sweep.SINGLES)
    seconds = zip(names, (1.0, 2.0, 4.0), strict=True)
    timed = Timed({name: Timing(9.0, (value,)) for name, value in seconds}, {}, {})

    def targets(temperatures, seeds, platform):
        rows = bench_sweep.rows(
            timed,
            num_temperatures=temperatures,
            num_seeds=seeds,
            num_steps=8,
            platform=platform,
        )
        assert [row.ratio for row in rows] == [0.25, 0.5]
        assert {row.peer for row in rows} == {"one run at a time"}
        return [row.target for row in rows]

    assert targets(9, 1, "cpu") == [1.0, None]
    assert targets(9, 3, "gpu") == [None, 0.15]
    assert targets(9, 3, "cpu") == targets(3, 1, "cpu") == targets(9, 1, "gpu") == [None, None]


def test_sweep_command(tmp_path, capsys, monkeypatch):
    def compare(model, input_shape, **sizes):
        assert (model, input_shape) == (nets.mnist_net(width=0.5), (28, 28, 1))
        del sizes["after_call"]
        assert sizes == {
            "num_temperatures": 2,
            "num_seeds": 1,
            "num_steps": 3,
            "batch_size": 4,
            "repeats": 1,
        }
        names = (bench_sweep.LOOPED, bench_sweep.VMAPPED, bench_sweep.SINGLES)
        return Timed({name: Timing(9.0, (1.5,)) for name in names}, {}, {})

    monkeypatch.setattr(bench_sweep, "compare", compare)
    output = tmp_path / "rows.json"
    sizes = {"num-temperatures": 2, "num-steps": 3, "batch-size": 4, "width": 0.5, "repeats": 1}
    arguments = [str(word) for name, size in sizes.items() for word in (f"--{name}", size)]
    bench.run(bench.parse(["sweep", *arguments, "--json", str(output)]))
    assert [row["ratio"] for row in check_rows(output)] == [1.0, 1.0]
    assert "2 temperatures × 1 seed, 3 steps each" in capsys.readouterr().out


# The input path


def test_every_way_gives_an_epochs_batches(tmp_path):
    timed = bench_data.compare(10, shape=(4, 4, 1), batch_size=4, repeats=1, missing="no torch")
    assert list(timed.results) == [bench_data.STORE, bench_data.HOST]
    (count, (inputs, labels)), host = timed.results.values()
    assert count == host[0] == data.num_batches(10, 4)
    assert inputs.shape == (4, 4, 4, 1)
    np.testing.assert_array_equal(inputs, host[1][0])  # the same order, exactly the same floats
    np.testing.assert_array_equal(labels, host[1][1])
    output = tmp_path / "rows.json"
    arguments = ["--num-examples", "10", "--batch-size", "4", "--repeats", "1"]
    bench.run(bench.parse(["data", *arguments, "--json", str(output)]))
    assert [row["peer"] for row in check_rows(output)] == [bench_data.HOST, bench_data.LOADER]


# Start-up


def test_imports_take_turns_and_their_own_seconds_count():
    log = []
    seconds = {bench_startup.THEIRS: [9.0, 2.0, 1.0, 3.0], bench_startup.OURS: [8.0, 2.5, 4.0, 2.0]}

    def import_seconds(statement):
        log.append(statement)
        return seconds[statement].pop(0)

    timed = bench_startup.compare(repeats=3, import_seconds=import_seconds)
    assert log == [bench_startup.THEIRS, bench_startup.OURS] * 4
    (row,) = bench_startup.rows(timed)
    assert (row.ours_s, row.theirs_s, row.ratio) == (2.5, 2.0, 1.25)
    assert row.target == 1.15  # 0.3 s more than theirs
    assert row.note.startswith("adds 0.500 s")
    assert bench_rows.record(row, {})["compile_s"] is None


def test_seconds_of_a_statement_in_a_fresh_process():
    assert 0.05 <= bench_startup.seconds_in_a_fresh_process("time.sleep(0.05); print('x')") < 5
    with pytest.raises(subprocess.CalledProcessError):
        bench_startup.seconds_in_a_fresh_process("import no_such_module_anywhere")


def test_startup_command(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_startup, "seconds_in_a_fresh_process", lambda statement: 1.0)
    output = tmp_path / "rows.json"
    bench.run(bench.parse(["startup", "--json", str(output)]))
    (row,) = check_rows(output)
    assert row["ratio"] == 1.0
