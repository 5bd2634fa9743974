"""The benches: who is called when, the rows, the networks of their own, and both sides' work.

No test looks at how long anything really takes.
"""

import functools
import inspect
import json
import math
import os
import pathlib
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import experiments.bench.__main__ as bench
import experiments.bench.attacks as bench_attacks
import experiments.bench.data as bench_data
import experiments.bench.robust as bench_robust
import experiments.bench.train as bench_train
import experiments.bench.vit as bench_vit
from experiments.bench import lanes, networks, peers, stacks, startup, subjects, timing
from experiments.bench.options import command
from experiments.bench.peers import Comparison
from experiments.bench.rows import Row, record, text
from experiments.bench.subjects import Images
from experiments.bench.timing import Timing
from jdistill import attacks, data, losses, nets, train

ROOT = pathlib.Path(__file__).parents[1]

# Timing


def timed(seconds, **options):
    """Result of `interleaved` for calls that take so many seconds each; who was called, and told.

    Args:
        seconds: by name, of each call in turn; None for one that fails.
    """
    now, log, told = [0.0], [], []
    left = {name: list(each) for name, each in seconds.items()}

    def call(name):
        log.append(name)
        took = left[name].pop(0)
        if took is None:
            raise RuntimeError("no\n  such thing")
        now[0] += took
        return f"{name} {log.count(name)}"

    found = timing.interleaved(
        {name: functools.partial(call, name) for name in seconds},
        after_call=lambda *step: told.append(step),
        clock=lambda: now[0],
        **options,
    )
    return found, log, told


def test_calls_take_turns_after_warming_up():
    found, log, told = timed({"a": [9, 3, 1, 2], "b": [8, 40, 60, 50]}, repeats=3)
    assert log == ["a", "b"] * 4
    assert found.timings == {"a": Timing(9, (3, 1, 2)), "b": Timing(8, (40, 60, 50))}
    assert (found.results, found.failures) == ({"a": "a 1", "b": "b 1"}, {})
    assert told == [(done, 8) for done in range(9)]
    assert (found.timings["a"].median, found.timings["a"].extra) == (2, 7)
    assert (Timing(1, (1, 2)).median, Timing(1, (3,)).extra) == (1.5, 0)


def test_optional_calls_may_fail_or_be_too_slow():
    seconds = {"ours": [100, 1, 1], "broken": [None], "slow": [11], "fast": [10, 4, 6]}
    optional = {"broken", "slow", "fast"}
    found, log, told = timed(seconds, repeats=2, optional=optional, slow_seconds=10)
    assert log == ["ours", "broken", "slow", "fast", "ours", "fast", "ours", "fast"]
    assert found.failures == {"broken": "RuntimeError: no such thing"}
    expected = {"ours": Timing(100, (1, 1)), "slow": Timing(11, (11,)), "fast": Timing(10, (4, 6))}
    assert found.timings == expected
    assert set(found.results) == set(expected)
    assert told[-1] == (8, 8)
    with pytest.raises(RuntimeError, match="such thing"):
        timed({"broken": [None]}, repeats=1)


# Rows


def test_a_row_is_of_one_of_the_steps_of_a_call():
    row = Row("step", Timing(30, (8, 4, 6)), "peer", Timing(9, (12,)), "python", each=2)
    found = json.loads(json.dumps(record(row, {"device": "a device"})))
    assert found == {
        **{"name": "step", "ours_s": 3, "theirs_s": 6, "peer": "peer", "ratio": 0.5},
        **{"target": None, "compile_s": 24, "theirs_compile_s": None},  # of the call, not of a step
        **{"ours_range_s": [2, 4], "theirs_range_s": [6, 6], "repeats": 3, "facts": {}, "note": ""},
        **{"command": "python", "device": "a device"},
    }
    alone = record(row._replace(theirs=None, compiles=False, peer_compiles=True), {})
    assert set(alone) == set(found) - {"device"}
    assert alone["theirs_s"] is alone["ratio"] is alone["theirs_range_s"] is None
    assert alone["compile_s"] is alone["theirs_compile_s"] is None


def cells(table):
    """A Markdown table's rows, by the names of its columns."""
    lines = table.splitlines()
    assert len({len(line) for line in lines}) == 1  # straight columns
    assert set(lines[1]) <= set("|- ")
    head, _, *found = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, row, strict=True)) for row in found]


def test_table_of_rows_and_their_notes():
    ours, theirs = Timing(30.0, (8, 4, 6)), Timing(9.5, (3, 2, 4))
    facts = {"success": [0.75, 0.5], "mean_distance": [1.5, None], "limit": "memory"}
    found = [
        Row("a", ours, "torch", None, "python -m a", target=1.2, note="not installed"),
        Row("b", ours, "torch", None, compiles=False, note="not installed"),
        Row("c", ours, "x", theirs, each=2, peer_compiles=True, facts=facts, note="so"),
    ]
    table, notes = text(found).split("\n\n")
    first, second, third = cells(table)
    assert first | {"command": None} == {
        **{"what": "a", "jdistill s": "6 (4–8)", "peer s": "–", "peer": "torch", "ratio": "–"},
        **{"target": "1.2", "compile s": "24.0", "success": "–", "mean distance": "–"},
        **{"limit": "–", "command": None},
    }
    assert first["command"] == "`python -m a`"
    assert second["compile s"] == "–"
    assert (third["jdistill s"], third["peer s"], third["ratio"]) == (
        "3 (2–4)",
        "1.5 (1–2)",
        "2.00",
    )
    shown = ["24.0 / 6.5", "0.75 / 0.5", "1.5 / –", "memory"]
    assert [third[name] for name in ("compile s", "success", "mean distance", "limit")] == shown
    assert notes == "* torch: not installed\n* c: x: so\n"
    assert "target" not in cells(text(found[2:]).split("\n\n")[0])[0]  # nothing is in it


# The command line


@pytest.mark.parametrize("name", bench.COMMANDS)
def test_options_of_every_command(name):
    kind, _ = bench.COMMANDS[name]
    options = bench.parse([name])
    assert (options, options.flags, options.json) == (kind(), True, None)
    assert command(options) == f"python -m experiments.bench {name}"
    with pytest.raises(ValueError, match=r"expected json to end in \.json, got 'rows\.md'"):
        kind(json="rows.md")
    changed = {"flags": False}
    for field, value in vars(options).items():
        if type(value) is int:
            changed[field] = value + 1
            with pytest.raises(ValueError, match=f"expected {field} >= 1, got 0"):
                kind(**{field: 0})
        if type(value) is float:
            changed[field] = value / 4
            for bad in (0.0, math.nan):
                with pytest.raises(ValueError, match=f"expected {field} > 0 .*got {bad}"):
                    kind(**{field: bad})
        if type(value) is tuple:
            changed[field] = value[:2]
            with pytest.raises(ValueError, match=f"expected at least one of {field}"):
                kind(**{field: ()})
    # The command that a row carries gives its options again, but for the file.
    line = command(kind(json="rows.json", **changed))
    assert bench.parse(shlex.split(line)[3:]) == kind(**changed)


def test_bad_options_are_refused(capsys):
    for arguments in (
        ["train", "--network", "mine.npz", "--width", "0.5"],
        ["attacks", "--attacks"],
    ):
        with pytest.raises(SystemExit):
            bench.parse(arguments)
    assert "leave one of them out" in " ".join(capsys.readouterr().err.split())
    assert "fgsm" in bench.parse(["attacks"]).attacks


def check_rows(path):
    """The rows of a file that `--json` names, whose figures agree with each other."""
    rows = json.loads(path.read_text())
    for row in rows:
        low, high = row["ours_range_s"]
        assert 0 < low <= row["ours_s"] <= high
        theirs = row["theirs_s"]
        assert row["ratio"] == (theirs and pytest.approx(row["ours_s"] / theirs))
        bench.parse(shlex.split(row["command"])[3:])
        assert "CPU" in row["device"]
        assert row["versions"]["jax"] == jax.__version__
    assert len({(row["name"], row["peer"]) for row in rows}) == len(rows)
    return rows


@pytest.mark.parametrize("flags", [True, False])
def test_a_program_of_its_own_sets_the_flag(flags, tmp_path):
    path = tmp_path / "new" / "rows.json"
    program = [sys.executable, "-m", "experiments.bench", "data", "--json", str(path)]
    program += ["--num-examples", "8", "--repeats", "1", *([] if flags else ["--no-flags"])]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    printed = subprocess.check_output(program, cwd=ROOT, env=environment, text=True)
    (row,) = check_rows(path)
    assert (row["xla_flags"] or "no flags") in printed
    if jax.__version_info__ < (0, 11):  # that of JAX 0.12 has no such flag
        assert ("xla_cpu" in row["xla_flags"]) == flags


def test_a_stopped_run_leaves_what_it_has(tmp_path, capsys):
    def groups():
        yield [Row("first", Timing(2, (1,)), "x", None, "python -m experiments.bench data")]
        raise KeyboardInterrupt

    path = tmp_path / "rows.json"
    with pytest.raises(KeyboardInterrupt, match="a new run starts from the beginning"):
        bench.show(bench_data.Data(json=str(path)), groups())
    assert "| first | 1 (1 call) |" in capsys.readouterr().out
    assert [row["name"] for row in check_rows(path)] == ["first"]


# Attacks


WEIGHTS = np.array([[2.0, -2.0], [1.0, -1.0]], np.float32)
POINTS = np.array([[0.55, 0.45], [0.5, 0.9], [0.2, 0.3], [0.9, 0.9]], np.float32)


def model(points):
    """A network in NumPy that a toolkit attacks; class 0 where 2 x + y > 1.5."""
    return points @ WEIGHTS - np.array([[1.5, -1.5]], np.float32)


@functools.partial(nets.callable_logits_fn)
def network(points):
    """The same for us."""
    return points @ WEIGHTS - jnp.array([[1.5, -1.5]])


def sign_step(model, points, labels, eps=0.2):
    print("a toolkit's chatter")
    towards = np.sign(WEIGHTS.T[1 - labels] - WEIGHTS.T[labels])
    return np.clip(points + eps * towards, 0, 1)


CLASSES = model(POINTS).argmax(1)
SUBJECT = bench_attacks.Subject(network, jnp.asarray(POINTS), CLASSES, model, (POINTS, CLASSES))


def broken(*_):
    raise ValueError("shape")


def test_compare_calls_all_and_keeps_what_they_found(capsys):
    weak = functools.partial(sign_step, eps=0.05)
    toolkits = {"foolbox": sign_step, "weak": weak, "ART": broken, "torchattacks": broken}
    comparison = Comparison(
        "fgsm", "linf", "eps 0.2", functools.partial(attacks.fgsm, eps=0.2), toolkits
    )
    missing = {"torchattacks": "not installed; do something", "adv-lib": "irrelevant"}
    options = bench_attacks.Attacks(repeats=2)
    rows = bench_attacks.compare(comparison, SUBJECT, options, missing)
    assert {row.name for row in rows} == {"fgsm linf, eps 0.2, 4 images"}
    assert {row.command for row in rows} == {command(options, attacks=("fgsm",))}
    facts = {row.peer: (row.facts["success"], row.note) for row in rows}
    # |2 x + y - 1.5| / 3 is each point's distance from the boundary: 0.02, 0.13, 0.27 and 0.4.
    assert facts == {
        "foolbox": ([0.5, 0.5], ""),
        "weak": ([0.5, 0.25], ""),
        "torchattacks": ([0.5, None], "not installed; do something"),
        "ART": ([0.5, None], "ValueError: shape"),
    }
    (same,) = (row.facts["mean_distance"] for row in rows if row.peer == "foolbox")
    assert same == pytest.approx([0.2, 0.2])
    assert len(rows[0].ours.warm) == len(rows[0].theirs.warm) == 2
    assert capsys.readouterr().out == ""
    ours = Comparison("fgsm", "linf", "", broken, {})
    with pytest.raises(ValueError, match="shape"):  # of ours it is no note
        bench_attacks.compare(ours, SUBJECT, options, {})


def test_rows_of_an_attack_begin_with_the_fastest_toolkit():
    seconds = {  # adv-lib has the smallest single time, ART the smallest median
        **{"jdistill": (1, 2, 30), "foolbox": (9, 8, 7), "adv-lib": (1, 9, 9), "ART": (5, 4, 3)}
    }
    inf = math.inf
    distances = {
        "jdistill": [1, 2, 4, inf],
        "foolbox": [3, 3, inf, inf],
        "adv-lib": [inf] * 4,
        "ART": [1, 2, 4, inf],
    }
    rows = bench_attacks.rows(
        peers.ddn(9),
        {name: Timing(30, warm) for name, warm in seconds.items()},
        {name: np.array(found, float) for name, found in distances.items()},
        {"torchattacks": "no"},
        "python",
    )
    assert [row.peer for row in rows] == ["ART", "foolbox", "adv-lib", "torchattacks"]
    assert [row.ratio for row in rows] == [0.5, 0.25, 2 / 9, None]
    assert [row.target for row in rows] == [0.95, None, None, None]
    assert [row.note for row in rows] == ["", "", "", "no"]
    assert rows[1].facts == {"success": [0.75, 0.5], "mean_distance": [1.5, 3.0]}
    assert rows[2].facts == {"success": [0.75, 0.0], "mean_distance": [None, None]}


def test_comparisons_fit_our_attacks_and_the_toolkits_known():
    there = bench_attacks.COMPARISONS
    assert len({(c.attack, c.norm, c.budget) for c in there}) == len(there)
    assert {name for c in there for name in c.peers} == set(peers.TOOLKITS)
    assert set(bench_attacks.TARGETS) <= {(c.attack, c.norm) for c in there}
    for comparison in there:
        assert hasattr(attacks, comparison.attack)
        if isinstance(comparison.ours, functools.partial):
            assert attacks.traits(comparison.ours).name == comparison.attack
            keywords = comparison.ours.keywords
            inspect.signature(getattr(attacks, comparison.attack)).bind(*[None] * 4, **keywords)


def test_without_torch_the_error_says_what_to_install():
    def missing(*there):
        return bench_attacks.missing_toolkits(lambda name: name if name in there else None)

    assert set(missing("torch", "foolbox", "art")) == {"torchattacks", "adv-lib", "pyautoattack"}
    for there in ((), ("torch",), ("foolbox", "art")):
        with pytest.raises(ModuleNotFoundError, match=r"expected torch .*requirements-peers\.txt"):
            missing(*there)


# Networks and images


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of a small network, and of images with the labels that it gives them."""
    model = nets.ConvNet(features=((4, 4),), hidden=(8, 6), num_classes=10)
    params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
    inputs = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 1)).astype(np.uint8)
    logits = nets.logits_fn(model, {"params": params})(inputs.astype(np.float32) / 255)
    flat = {f"{layer}/{kind}": v for layer, kinds in params.items() for kind, v in kinds.items()}
    folder = tmp_path_factory.mktemp("files")
    np.savez(folder / "network.npz", **flat)
    np.savez(folder / "images.npz", inputs=inputs, labels=np.asarray(logits).argmax(1))
    return folder


@pytest.fixture(scope="module")
def small(files):
    """Weights and images of these files."""
    return subjects.read_params(files / "network.npz"), subjects.read_images(files / "images.npz")


def test_files_hold_networks_and_images(small, files, tmp_path):
    params, images = small
    model = subjects.conv_net(params, (8, 8, 1))
    assert (model.features, model.hidden, model.num_classes) == (((4, 4),), (8, 6), 10)
    with np.load(files / "images.npz") as file:
        stored = file["inputs"]
    np.testing.assert_array_equal(np.rint(images.inputs * 255), stored)
    path = tmp_path / "file.npz"
    with pytest.raises(FileNotFoundError, match=r"expected an \.npz file, got no such file"):
        subjects.read_params(path)
    path.write_text("not an archive")
    with pytest.raises(ValueError, match=r"expected an \.npz file of arrays"):
        subjects.read_params(path)
    np.savez(path, inputs=stored / 255, labels=images.labels)
    with pytest.raises(ValueError, match=r"\(uint8\).*inputs float64\[12, 8, 8, 1\]"):
        subjects.read_images(path)
    np.savez(path, inputs=stored, labels=images.labels[1:])
    with pytest.raises(ValueError, match=r"labels int32\[11\]"):
        subjects.read_images(path)
    for wrong in (
        {name: layer for name, layer in params.items() if name != "logits"},
        {name: layer for name, layer in params.items() if name != "dense_0"},
        {**params, "extra": params["logits"]},
        {},
    ):
        with pytest.raises(ValueError, match=r"expected the weights of a nets\.ConvNet"):
            subjects.conv_net(wrong, (8, 8, 1))
    with pytest.raises(ValueError, match="inputs of shape"):
        subjects.conv_net(params, (10, 10, 1))


def test_only_images_that_are_classified_correctly(small):
    params, (inputs, labels) = small
    labels = np.where(np.arange(12) % 3 == 0, (labels + 1) % 10, labels)
    logits_fn = subjects.logits_fn(params, (8, 8, 1))
    right = subjects.correct_images(logits_fn, Images(inputs, labels), 4)
    np.testing.assert_array_equal(right.inputs, inputs[[1, 2, 4, 5]])
    np.testing.assert_array_equal(right.labels, labels[[1, 2, 4, 5]])
    with pytest.raises(ValueError, match=r"expected batch_size <= 8, .* got 9"):
        subjects.correct_images(logits_fn, Images(inputs, labels), 9)


def test_images_are_the_digits_enlarged():
    digits = data.load("digits")
    there = subjects.digits((16, 24, 3))
    assert there.all.inputs.shape == (1797, 16, 24, 3)
    assert (there.all.inputs.min(), there.all.inputs.max()) == (0, 1)
    assert there.all.inputs.dtype == np.float32
    np.testing.assert_array_equal(there.learned.labels, digits.train.labels)
    np.testing.assert_array_equal(there.all.labels[:400], digits.test.labels)  # unseen ones first
    np.testing.assert_allclose(
        there.all.inputs[:400, ::15, ::23, 1:2], digits.test.inputs[:, ::7, ::7]
    )


def test_a_network_of_its_own_has_something_to_attack(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JDISTILL_CACHE", str(tmp_path))
    model = nets.digits_net(width=0.25)
    learn = functools.partial(subjects.trained, "small", model, (8, 8, 1), num_epochs=12)
    variables = learn()
    assert "training small on the digits, once" in capsys.readouterr().err
    logits_fn = nets.logits_fn(model, variables)
    inputs, labels = (column[:600] for column in subjects.digits((8, 8, 1)).all)
    logits = train.predict(logits_fn, inputs)
    assert (logits.argmax(1) == labels).mean() > 0.8
    assert 1 < np.abs(logits).mean() < 30
    settings = {"eps": 0.15, "num_steps": 5}
    found = attacks.pgd(logits_fn, jax.random.key(0), inputs[:100], labels[:100], **settings)
    assert 0.2 < np.mean(found.success) < 1
    jax.tree.map(np.testing.assert_array_equal, learn(), variables)
    assert capsys.readouterr().err == ""  # out of the cache
    (path,) = (tmp_path / "bench").glob("small-*.npz")
    path.write_text("damaged")
    jax.tree.map(np.testing.assert_array_equal, learn(), variables)


# Training steps and input gradients


@pytest.mark.slow
def test_training_steps_are_those_of_the_optimizer(small):
    params, images = small
    batches = bench_train.full_batches(images, 5, 5)
    assert [batch.mask.sum() for batch in batches] == [5] * 5
    np.testing.assert_array_equal(batches[1].inputs, images.inputs[5:10])
    np.testing.assert_array_equal(batches[4].inputs, images.inputs[:5])  # around, none padded
    run = bench_train.our_training(params, (8, 8, 1), dropout_rate=0.0, learning_rate=0.1)
    first = run(batches[:1])
    logits = subjects.logits_fn(params, (8, 8, 1))(images.inputs[:5])
    expected = losses.cross_entropy(logits, images.labels[:5]).mean()
    np.testing.assert_allclose(first, [expected], rtol=1e-5)
    assert np.all(np.diff(run(batches[:1] * 4), prepend=first) < 0)  # goes on where it was
    dropped = bench_train.our_training(params, (8, 8, 1))(batches[:1])
    assert abs(dropped[0] - first[0]) > 1e-4
    with pytest.raises(ValueError, match=r"expected batch_size <= 12, .* got 13"):
        bench_train.full_batches(images, 13, 1)


def test_ascent_goes_on_after_success():
    weights = jnp.array([[2.0, -2.0], [1.0, -1.0]])
    logits_fn = nets.callable_logits_fn(lambda w, x: x @ w - 0.3, weights)
    inputs = np.array([[0.5, 0.5], [0.05, 0.5]], np.float32)
    found = bench_train.ascend(logits_fn, inputs, np.array([0, 0]), 0.1, num_steps=5)
    np.testing.assert_allclose(found, [[0.4, 0.4], [0.0, 0.4]], atol=1e-6)  # ball, and box


def test_a_step_of_pgd_that_fools_an_image_says_so():
    settings = {"eps": 0.2, "num_steps": 2}
    result = attacks.pgd(network, jax.random.key(0), POINTS, CLASSES, **settings)
    assert bench_train.fooled(result) == "images that were fooled, and stopped there: 2"
    resisted = bench_train.resisted_pgd(network, POINTS, CLASSES, num_steps=2)
    assert bench_train.fooled(resisted) == ""


def test_train_writes_rows(files, tmp_path, capsys):
    own = ["--network", files / "network.npz", "--images", files / "images.npz"]
    sizes = ["--num-steps", 2, "--batch-size", 4, "--repeats", 1, "--json", tmp_path / "rows.json"]
    bench.run(bench.parse([*map(str, ["train", *own, *sizes])]))
    rows = check_rows(tmp_path / "rows.json")
    assert [row["target"] for row in rows] == [1.2, 0.95, 0.95]
    assert {row["peer"] for row in rows} == {"PyTorch"}
    without = [row["note"] for row in rows if row["theirs_s"] is None]
    assert all("torch is not installed" in note for note in without)
    assert "| training step, dropout on, batch 4 " in capsys.readouterr().out


def test_vit_writes_rows(tmp_path, capsys):
    sizes = ["--patch-sizes", 14, 7, "--width", 8, "--depth", 1, "--num-heads", 2, "--no-peers"]
    sizes += ["--num-steps", 2, "--batch-size", 4, "--repeats", 1, "--cpu-time"]
    bench.run(bench.parse([*map(str, ["vit", *sizes, "--json", tmp_path / "rows.json"])]))
    rows = check_rows(tmp_path / "rows.json")
    assert [row["name"].split(",")[1:3] for row in rows] == [
        [f" patches of {size}", f" {what}"]
        for size in (14, 7)
        for what in ("training step", "input gradient and sign step in a scan")
    ]
    assert {(row["peer"], row["theirs_s"], row["note"]) for row in rows} == {("none", None, "")}
    assert "ViT, patches of 7, training step, batch 4, CPU time" in capsys.readouterr().out


def test_vit_steps_learn_and_ascend():
    options = bench_vit.Vit(num_steps=4, batch_size=6)
    model = nets.ViT(4, 8, 1, 2)
    images = Images(*(column[:6] for column in subjects.digits((8, 8, 1)).all))
    calls = bench_vit.calls(options, model, images, beside_torch=False)
    assert set(calls) == {bench_vit.STEP, bench_vit.GRADIENT}
    losses_found = [calls[bench_vit.STEP]() for _ in range(2)]
    # The same batch again and again, and the second call goes on from the first.
    assert np.all(np.diff(np.concatenate(losses_found)) < 0)
    moved = np.asarray(calls[bench_vit.GRADIENT]()) - images.inputs
    assert 0.09 < np.abs(moved).max() < 0.1 + 1e-6


def test_robust_writes_rows(tmp_path, capsys):
    sizes = ["--widths", 0.1, "--attack-steps", 1, "--num-steps", 2, "--batch-size", 4]
    sizes += ["--repeats", 1, "--no-peers", "--cpu-time", "--json", tmp_path / "rows.json"]
    bench.run(bench.parse([*map(str, ["robust", *sizes])]))
    (row,) = check_rows(tmp_path / "rows.json")
    assert (row["peer"], row["theirs_s"], row["target"]) == ("none", None, None)
    title = "width 0.1, step of adversarial training (PGD), 1 steps, batch 4, CPU time"
    assert title in capsys.readouterr().out


def test_robust_steps_are_pytorchs():
    """The losses of the same steps, from the images themselves; small ones at first."""
    pytest.importorskip("torch")
    options = bench_robust.Robust(
        num_steps=3, batch_size=8, attack_steps=2, eps=0.1, random_start=False
    )
    images = Images(*(column[:24] for column in subjects.digits((28, 28, 1)).all))
    calls = bench_robust.calls(options, 0.2, images, beside_torch=True)
    ours, theirs = (calls[name]() for name in (bench_robust.STEP, bench_robust.STEP_PEER))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    again, theirs = (calls[name]() for name in (bench_robust.STEP, bench_robust.STEP_PEER))
    np.testing.assert_allclose(again, theirs, rtol=1e-3)
    assert np.abs(again - ours).max() > 1e-4


def test_without_peers_nothing_of_torch_is_needed(files, tmp_path, monkeypatch, capsys):
    for module in ("torch", "foolbox"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    own = ["--network", files / "network.npz", "--images", files / "images.npz", "--no-peers"]
    sizes = ["--batch-size", 4, "--repeats", 1, "--json", tmp_path / "rows.json"]
    bench.run(bench.parse([*map(str, ["attacks", "--attacks", "fgsm", "jsma", *own, *sizes])]))
    rows = check_rows(tmp_path / "rows.json")
    assert [(row["name"].split()[0], row["peer"]) for row in rows] == [
        ("fgsm", "none"),
        ("jsma", "none"),
    ]
    assert {(row["theirs_s"], row["target"], row["note"]) for row in rows} == {(None, None, "")}
    assert "torch" not in rows[0]["versions"]
    options = bench_attacks.Attacks(attacks=("autoattack",), peers=False, long=False)
    with pytest.raises(ValueError, match="expected an attack that is not long, got autoattack"):
        next(bench_attacks.run(options, lambda done, total: None))
    assert capsys.readouterr().out


# Networks


def test_the_plain_network_is_the_papers():
    model = nets.mnist_net(width=0.1)
    params, _ = nets.init(model, jax.random.key(0), (28, 28, 1))
    inputs = np.random.default_rng(0).uniform(0, 1, (3, 28, 28, 1)).astype(np.float32)
    logits = [one.apply({"params": params}, inputs) for one in (model, networks.plain_net(model))]
    np.testing.assert_allclose(*logits, atol=1e-5)


def test_networks_are_what_they_are_called():
    def kernels(model):
        draw = functools.partial(nets.init, model, input_shape=(32, 32, 3))
        params, _ = jax.eval_shape(lambda key: draw(key=key), jax.random.key(0))
        leaves = jax.tree.leaves_with_path(params)
        return [leaf.shape for path, leaf in leaves if "kernel" in str(path[-1])]

    resnet = kernels(networks.ResNet20())
    assert len([shape for shape in resnet if shape[:2] == (3, 3)]) == 19
    assert [shape for shape in resnet if len(shape) == 2] == [(64, 10)]  # the twentieth layer
    separable = kernels(networks.SeparableNet())
    assert len([shape for shape in separable if shape[:3] == (3, 3, 1)]) == 4


def test_pgd_with_and_without_the_rules_for_cpu(small):
    params, images = small
    model = subjects.conv_net(params, (8, 8, 1))
    separable = networks.SeparableNet(2)
    drawn, _ = nets.init(separable, jax.random.key(0), (8, 8, 1))
    there = {
        networks.MNIST: networks.Subject(model, {"params": params}, images),
        networks.PLAIN: networks.Subject(networks.plain_net(model), {"params": params}, images),
        networks.SEPARABLE: networks.Subject(separable, {"params": drawn}, images),
    }
    options = networks.Networks(num_steps=2, batch_size=12, repeats=1)
    calls = networks.calls(options, there)
    rows = networks.rows(options, calls)
    plain, separable = networks.PLAIN, networks.SEPARABLE
    pairs = [(plain, networks.MNIST), (plain, plain + networks.OFF)]
    pairs += [(separable, separable + networks.OFF)]
    assert [(row.name.split(", ")[-1], row.peer) for row in rows] == pairs
    for ours, theirs in pairs:  # one algorithm, to rounding
        np.testing.assert_allclose(calls[ours]().inputs, calls[theirs]().inputs, atol=2.1e-4)


# A sweep, an evaluation, the input path, start-up


@pytest.mark.slow
def test_all_ways_of_a_sweep_train_the_same_networks():
    options = stacks.Sweep(num_temperatures=2, num_seeds=2, num_steps=2, batch_size=3)
    calls = stacks.sweep_calls(options, nets.digits_net(width=0.1), (8, 8, 1))
    looped, vmapped, singles = (calls[name]() for name in calls)
    assert len(singles) == 4
    for stack in (looped, vmapped):
        for run, params in enumerate(singles):
            ours = nets.index(stack, run)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, params)
    kernels = np.asarray(looped["logits"]["kernel"])
    for one, other in ((0, 1), (0, 2)):  # another seed, another temperature
        assert np.abs(kernels[one] - kernels[other]).max() > 1e-4


@pytest.mark.parametrize("looped", [stacks.MAPPED, stacks.LOOPED])
def test_the_target_is_that_of_the_default_way(looped):
    calls = dict.fromkeys((looped, stacks.VMAPPED, stacks.SINGLES), int)
    rows = stacks.rows(stacks.Sweep(repeats=1), "runs", calls, {"cpu": 0.5, "gpu": 0.1})
    assert [(row.name, row.peer, row.target) for row in rows] == [
        (f"runs, {looped}", "one at a time", 0.5),
        ("runs, as one, under vmap", "one at a time", None),
    ]


def test_the_bytes_of_what_a_call_compiles():
    array = np.ones((1000, 3), np.float32)
    told = []
    product = jax.jit(lambda x: x @ x.T)
    call = stacks._watched(functools.partial(product, array), told.append)
    assert call().shape == (1000, 1000)
    (size,) = told
    assert 4 * (3_000 + 1_000_000) <= size < 2 * 4 * (3_000 + 1_000_000)
    call()
    assert len(told) == 1  # it compiled nothing


@pytest.mark.slow
def test_all_ways_of_an_evaluation_find_the_same(small):
    params, images = small
    stack = stacks.disturbed(params, (8, 8, 1), 2)
    leaves = zip(*map(jax.tree.leaves, stack), strict=True)
    assert any(np.abs(a - b).max() > 0 for a, b in leaves)
    options = stacks.Evaluate(num_networks=2, num_examples=6, batch_size=6, num_steps=1)
    singles, looped, vmapped = (
        call() for call in stacks.evaluate_calls(options, stack, images).values()
    )
    for found in (looped, vmapped):
        for number, single in enumerate(singles):
            assert found.clean.accuracy[number] == single.clean.accuracy[0]
            for name in ("fgsm", "pgd"):
                ours, theirs = found.attacks[name].success, single.attacks[name].success
                np.testing.assert_array_equal(ours[number], theirs[0])


def test_an_epoch_has_every_batch():
    options = bench_data.Data(num_examples=10, batch_size=4)
    (ours,) = bench_data.calls(options, (4, 4, 1), beside_torch=False).values()
    count, (inputs, labels) = ours()
    assert count == data.num_batches(10, 4)
    assert (inputs.shape, labels.shape) == ((4, 4, 4, 1), (4,))
    np.testing.assert_allclose(np.rint(inputs * 255), inputs * 255, atol=1e-4)


def test_seconds_of_statements_in_fresh_processes():
    assert 0.05 <= startup.seconds_in_a_fresh_process("time.sleep(0.05); print('x')") < 5
    with pytest.raises(subprocess.CalledProcessError):
        startup.seconds_in_a_fresh_process("import no_such_module_anywhere")
    steps = []
    row = startup.compare(
        startup.Startup(repeats=1), "time.sleep(0.2)", "time.sleep(0.1)", lambda *s: steps.append(s)
    )
    assert row.facts["added_s"] == pytest.approx(row.ours_s - row.theirs_s)
    assert row.target == pytest.approx(1 + 0.3 / row.theirs_s)
    assert record(row, {})["compile_s"] is None
    assert row.ours_s >= 0.2 > row.theirs_s >= 0.1
    assert steps[-1] == (4, 4)


# The lanes


def lane_row(name, seconds, compile_s=None, peer="none", theirs=None, jax="1"):
    timings = Timing(seconds + (compile_s or 0), (seconds,)), theirs and Timing(theirs, (theirs,))
    row = Row(name, timings[0], peer, timings[1], compiles=compile_s is not None)
    return record(row, {"versions": {"jax": jax}, "xla_flags": "", "load": 1.0, "device": "CPU"})


def test_rows_of_lanes_become_columns():
    """Of two works, one of which a lane lacks, and a peer that two rows share."""

    def lane(factor, version):
        pair = (("mapped", 2), ("vmapped", 3))
        rows = [lane_row(n, s * factor, s, "singles", 8 * factor, version) for n, s in pair]
        return [*rows, lane_row("import", factor)][: 3 if factor > 1 else 2]

    rounds = [
        {"floor": lane(8, "0"), "pinned": lane(4, "1"), "newest": lane(1, "2")},
        {"floor": lane(8, "0"), "pinned": lane(2, "1"), "newest": lane(1, "2")},
        {"floor": lane(8, "0"), "pinned": lane(3, "1")},  # stopped here
    ]
    works = lanes.merged(rounds)
    assert list(works) == [
        *("mapped", "vmapped", "singles", "import"),
        *("compiling: mapped", "compiling: vmapped"),
    ]
    assert works["mapped"] == {"floor": [16] * 3, "pinned": [8, 4, 6], "newest": [2, 2]}
    assert works["singles"] == {"floor": [64] * 3, "pinned": [32, 16, 24], "newest": [8, 8]}
    assert works["compiling: vmapped"]["pinned"] == [3, 3, 3]
    conditions, table = lanes.text(rounds).split("\n\n")
    assert "* floor: jax 0; no flags\n* pinned: jax 1; no flags\n" in conditions
    assert "over 3 round(s)" in conditions
    shown = {row["what"]: row for row in cells(table)}
    assert shown["mapped"] == {
        **{"what": "mapped", "floor s": "16 (16–16)", "pinned s": "6 (4–8)"},
        **{"newest s": "2 (2–2)", "floor / pinned": "2.67", "newest / pinned": "0.33"},
    }
    assert (shown["import"]["newest s"], shown["import"]["newest / pinned"]) == ("–", "–")


def test_lanes_take_turns(tmp_path, monkeypatch, capsys):
    called, path = [], tmp_path / "new" / "lanes.json"

    def rows_of(lane, command):
        called.append((lane, command))
        if len(called) == 2 * len(lanes.LANES) * len(lanes.COMMANDS):
            raise RuntimeError("out of memory")
        return [lane_row(command, 1.0)]

    monkeypatch.setattr(lanes, "rows_of", rows_of)
    with pytest.raises(RuntimeError, match="out of memory"):
        lanes.main(["--num-rounds", "2", "--json", str(path)])
    turns = [(lane, command) for command in lanes.COMMANDS for lane in lanes.LANES]
    assert called == turns * 2
    printed = capsys.readouterr().out
    lanes.main(["--read", str(path)])  # what was done before it failed is there
    assert capsys.readouterr().out == printed
    assert f"| {lanes.COMMANDS[-1]} " in printed


@pytest.mark.parametrize("line", lanes.COMMANDS)
def test_commands_of_the_lanes_need_no_torch(line):
    options = bench.parse(shlex.split(line))
    assert not getattr(options, "peers", False)


def test_a_lane_that_is_not_there_says_how_to_make_it(monkeypatch):
    monkeypatch.setitem(lanes.LANES, "floor", ".venv-nowhere")
    with pytest.raises(FileNotFoundError, match=r"\.venv-nowhere.*run make bench-lanes"):
        lanes.rows_of("floor", "startup")
