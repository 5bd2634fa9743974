"""Evaluations that are stopped and go on: what is kept, what is refused, what is done anew."""

import functools
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen

from jdistill import _fingerprint, attacks, evaluate, nets, runtime
from jdistill.attacks._core import chunks

N, D, K, R, BATCH = 11, 4, 3, 2, 4
NUM_BATCHES = 3
RNG = np.random.default_rng(1)
INPUTS = RNG.uniform(0, 1, (N, D)).astype(np.float32)
LABELS = RNG.integers(0, K, N)
KEY = jax.random.key(3)
CALLS = []


def linear(weights, inputs):
    return inputs @ weights


def networks(seed=0):
    rng = np.random.default_rng(seed)
    return [
        nets.callable_logits_fn(linear, jnp.asarray(rng.normal(size=(D, K)), jnp.float32))
        for _ in range(R)
    ]


STACK = nets.stack(networks())
PGD = functools.partial(attacks.pgd, eps=0.1, num_steps=3)


def counted(*arguments, **settings):
    """PGD that notes how often it is run."""
    CALLS.append(1)
    return attacks.pgd(*arguments, eps=0.1, num_steps=3, **settings)


PLAN = evaluate.AttackPlan(PGD, batch_size=BATCH)


def run(shards=None, plan=PLAN, **options):
    arguments = {"key": KEY, "stage": "pgd", "shards": shards, **options}
    stack, inputs, labels = (
        arguments.pop(name, default)
        for name, default in (("stack", STACK), ("inputs", INPUTS), ("labels", LABELS))
    )
    return evaluate.under_attack(stack, inputs, labels, plan, **arguments)


def assert_same(one, other):
    for name in ("success", "distance", "queries", "inputs", "mean_distance", "num_nonfinite"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), err_msg=name)
    assert (
        one.info.keys()
        == other.info.keys()
        == {
            "first_success",
            "gradients",
            "restart",
        }
    )
    for name in one.info:
        np.testing.assert_array_equal(one.info[name], other.info[name])
    assert one.success_rate == other.success_rate
    assert (one.norm, one.eps) == (other.norm, other.eps) == ("linf", 0.1)


def places(shards):
    return {tuple(name.split("/")) for name in shards}


@pytest.fixture(scope="module")
def made():
    """The shards of a whole run."""
    shards = {}
    run(shards)
    return shards


class Stop(Exception):
    """What stops a run from its callback."""


def stopped_after(number, shards, **options):
    """A run that ends after so many of its units."""
    events = []

    def stop(event):
        events.append(event)
        if len(events) == number:
            raise Stop

    with pytest.raises(Stop):
        run(shards, callback=stop, **options)


@pytest.mark.parametrize("vmapped", [False, True], ids=["looped", "vmapped"])
@pytest.mark.parametrize("number", [1, 2])
def test_stopped_and_started_again_is_the_run_without_a_stop(number, vmapped):
    whole = run(vmapped=vmapped)
    assert 0 < whole.success.mean() < 1
    shards = {}
    stopped_after(number, shards, vmapped=vmapped)
    assert len(shards) == number * (R if vmapped else 1)
    kept = dict(shards)
    assert_same(run(shards, vmapped=vmapped), whole)
    assert places(shards) == {
        ("pgd", f"network-{r}", f"{b:05d}") for r in range(R) for b in range(NUM_BATCHES)
    }
    assert all(shards[name] is kept[name] for name in kept)  # read, and not made again


def test_what_is_there_is_not_computed_again():
    shards, plan = {}, evaluate.AttackPlan(counted, batch_size=BATCH)
    CALLS.clear()
    stopped_after(2, shards, plan=plan)
    assert len(CALLS) == 2
    first = run(shards, plan)
    assert len(CALLS) == R * NUM_BATCHES
    events = []
    second = run(shards, plan, callback=events.append)
    assert len(CALLS) == R * NUM_BATCHES
    assert events[-1]["done"] == events[-1]["total"] == R * N  # what is read counts as done
    np.testing.assert_array_equal(first.inputs, second.inputs)


@pytest.mark.parametrize("vmapped", [False, True], ids=["looped", "vmapped"])
def test_one_missing_shard_leaves_the_others_as_they_are(made, vmapped):
    shards, name = dict(made), "pgd/network-1/00001"
    del shards[name]
    assert_same(run(shards, vmapped=vmapped), run(vmapped=vmapped))
    assert {other for other in shards if shards[other] is not made[other]} == {name}


def dense_run(shards, callback=None):
    """A run that another process does alike."""
    dense = linen.Dense(K)
    variables = [dense.init(jax.random.key(seed), INPUTS) for seed in range(R)]
    stack = nets.stack([nets.logits_fn(dense, each) for each in variables])
    return run(shards, stack=stack, callback=callback)


KILLED = """
    import os, signal, sys
    sys.path.insert(0, sys.argv[1])
    import conftest
    import test_evaluate_shards
    from jdistill import runtime

    def kill(event):
        if event["done"] == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    test_evaluate_shards.dense_run(runtime.ShardFolder(sys.argv[2]), kill)
"""


def test_what_a_killed_process_did_is_not_done_again(tmp_path):
    here = os.path.dirname(__file__)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), here, os.fspath(tmp_path)]
    killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    shards = runtime.ShardFolder(tmp_path)
    assert list(shards) == ["pgd/network-0/00000", "pgd/network-0/00001"]
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.npz")}
    assert_same(dense_run(shards), dense_run(None))
    assert len(shards) == R * NUM_BATCHES
    assert all(path.stat().st_mtime_ns == kept[path] for path in kept)


# What is refused


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        (
            {"plan": PLAN._replace(attack=functools.partial(PGD, eps=0.2))},
            r"attack.settings.eps is 0.1, this run's 0.2",
        ),
        (
            {"plan": PLAN._replace(attack=functools.partial(attacks.bim, eps=0.1, num_steps=3))},
            "attack is .*pgd', this run's '.*bim'",
        ),
        ({"plan": PLAN._replace(batch_size=5)}, "batch_size is 4, this run's 5"),
        ({"plan": PLAN._replace(num_examples=3)}, "examples.count is 4, this run's 3"),
        ({"stack": nets.stack(networks(seed=7))}, "network.weights"),
        ({"temperature": 2.0}, "network.temperature is 1.0, this run's 2.0"),
        ({"inputs": 0.5 * INPUTS}, "inputs"),
        ({"labels": (LABELS + 1) % K}, "labels"),
        ({"key": jax.random.key(4)}, "key"),
        ({"targets": (LABELS + 1) % K}, "targets is None, this run's"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_a_shard_of_another_run_is_refused_and_the_difference_named(made, changes, difference):
    before = dict(made)
    message = f"expected shard 'pgd/network-0/00000' to be of this run, got .*{difference}"
    with pytest.raises(ValueError, match=message):
        run(made, **changes)
    assert made == before


def test_precision_is_part_of_what_a_shard_says(made):
    with (
        jax.default_matmul_precision("bfloat16"),
        pytest.raises(ValueError, match="matmul_precision is 'highest', this run's 'bfloat16'"),
    ):
        run(made)


def test_attacks_that_close_over_different_numbers_differ():
    def attack_of(eps):
        return lambda f, key, x, y: attacks.fgsm(f, key, x, y, eps=eps)

    shards = {}
    run(shards, evaluate.AttackPlan(attack_of(0.1)))
    run(shards, evaluate.AttackPlan(attack_of(0.1)))  # another function that does the same
    for other in (
        attack_of(0.2),
        lambda f, key, x, y: attacks.fgsm(f, key, x, y, eps=0.1),
        lambda f, key, x, y: attacks.bim(f, key, x, y, eps=0.1),
    ):
        with pytest.raises(
            ValueError, match=r"got one whose attack(\.eps is 0\.1| is | has other code)"
        ):
            run(shards, evaluate.AttackPlan(other))


def test_functions_are_told_apart_by_what_they_do():
    describe = _fingerprint.describe
    functions = [
        lambda x: x + 1,
        lambda x: x + 2,
        lambda x: jnp.sin(x),
        lambda x: jnp.cos(x),
        lambda x, y=1: x + y,
        lambda x, y=2: x + y,
        lambda x, *, y=1: x + y,
        lambda x, *, y=2: x + y,
        lambda x: [jnp.sin(each) for each in x],
        lambda x: [jnp.cos(each) for each in x],
        functools.partial(linear, 1.0),
        functools.partial(linear, np.ones(2)),
        functools.partial(linear, np.zeros(2)),
        jax.tree_util.Partial(linear, jnp.full(2, np.nan)),
        jax.jit(linear),
        linen.Dense(3).apply,
        linen.Dense(4).apply,
    ]
    texts = [json.dumps(describe(function)) for function in functions]
    assert len(set(texts)) == len(functions)
    assert not [text for text in texts if " 0x" in text]

    def recursive(n):
        return recursive(n - 1) if n else 0

    described = describe(recursive)
    assert "recursive" in described["function"]
    assert described["holds"] == {"recursive": "cycle 1"}
    assert describe(attacks.pgd) == "jdistill.attacks._pgd.pgd"  # the version says the rest
    assert describe({"b", "a"}) == describe({"a", "b"})
    assert describe(jax.random.key(0)) == describe(jax.random.key(0)) != describe(jax.random.key(1))


def test_names_tell_networks_apart():
    shards = {}
    whole = run()
    for r, name in enumerate(("first", "second")):
        options = {"names": [name], "stage": f"pgd {r + 1}/2", "shard_name": "pgd"}
        alone = run(shards, stack=nets.stack([networks()[r]]), **options)
        np.testing.assert_array_equal(alone.inputs[0], whole.inputs[r])
    size = len(shards)
    assert_same(run(shards, names=["first", "second"]), whole)
    assert len(shards) == size == R * NUM_BATCHES
    with pytest.raises(ValueError, match="different name for each of the 2 networks"):
        run(shards, names=["same", "same"])


# What is done anew


@pytest.mark.parametrize("damage", ["changed", "half", "no settings", "empty"])
def test_a_damaged_shard_is_done_anew(made, caplog, damage):
    shards, name = dict(made), "pgd/network-1/00001"
    shard = dict(shards[name])
    if damage == "changed":
        shard["success"] = ~shard["success"]
    elif damage == "half":
        del shard["inputs"]
    elif damage == "no settings":
        del shard["settings"]
    else:
        shard = {}
    shards[name] = shard
    with caplog.at_level(logging.WARNING, "jdistill"):
        assert_same(run(shards), run())
    assert f"shard '{name}' is damaged" in caplog.text
    assert shards[name].keys() == made[name].keys()
    np.testing.assert_array_equal(shards[name]["success"], made[name]["success"])


@pytest.mark.parametrize("damage", ["half", "empty", "garbage", "bit"])
def test_a_damaged_file_is_done_anew(made, caplog, tmp_path, damage):
    shards = runtime.ShardFolder(tmp_path)
    for name in made:
        shards[name] = made[name]
    path = tmp_path / "pgd" / "network-0" / "00002.npz"
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 0xFF
    path.write_bytes(
        {
            "half": content[: len(content) // 2],
            "empty": b"",
            "garbage": b"PK\x03\x04" + b"no archive" * 9,
            "bit": bytes(flipped),
        }[damage]
    )
    with caplog.at_level(logging.WARNING, "jdistill"):
        assert_same(run(shards), run())
    assert "00002" in caplog.text
    np.testing.assert_array_equal(
        shards["pgd/network-0/00002"]["inputs"], made["pgd/network-0/00002"]["inputs"]
    )


def test_a_folder_is_a_dict(made, tmp_path):
    shards = runtime.ShardFolder(tmp_path / "new")
    assert list(shards) == []
    assert len(shards) == 0
    outcome = run(shards)
    assert_same(outcome, run())
    assert list(shards) == sorted(made)
    for name in made:
        assert shards[name].keys() == made[name].keys()
        for entry in made[name]:
            np.testing.assert_array_equal(shards[name][entry], made[name][entry])
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]
    odd = "PGD 40: 1/2 * ü/net=1"
    shards[odd] = {"a": np.arange(2)}
    assert odd in shards
    assert odd in list(shards)
    del shards[odd]
    assert odd not in shards
    for missing in ("pgd", "pgd/network-0/00000/deeper"):
        with pytest.raises(KeyError):
            del shards[missing]
        with pytest.raises(KeyError):
            shards[missing]
    for bad in ("../x", "a//b", "", ".hidden"):
        with pytest.raises(ValueError, match="expected a name such as"):
            shards[bad] = {}


# Several hosts


@pytest.mark.parametrize("vmapped", [False, True], ids=["looped", "vmapped"])
def test_hosts_of_one_job_read_what_the_others_did(monkeypatch, vmapped):
    from jax.experimental import multihost_utils

    shards, waited = {}, []
    monkeypatch.setattr(jax, "process_count", lambda *_: 2)
    monkeypatch.setattr(jax, "process_index", lambda *_: 1)
    monkeypatch.setattr(multihost_utils, "sync_global_devices", waited.append)
    with pytest.raises(FileNotFoundError, match="shards of all hosts, got none"):
        run(shards, vmapped=vmapped)
    done = dict(shards)
    assert len(done) == (2 if vmapped else 3)  # a batch of the stack, or of each network
    monkeypatch.setattr(jax, "process_index", lambda *_: 0)
    outcome = run(shards, vmapped=vmapped)
    assert len(shards) == R * NUM_BATCHES
    assert len(waited) == 2
    monkeypatch.undo()
    assert_same(outcome, run(vmapped=vmapped))
    assert_same(run(shards, vmapped=vmapped), outcome)
    assert all(shards[name] is kept for name, kept in done.items())  # read, and not written again


@pytest.mark.parametrize("driver", [False, True], ids=["attack", "autoattack"])
def test_killed_inside_a_batch_goes_on_inside_it(driver, monkeypatch):
    monkeypatch.setattr(chunks, "_SHORTEST", 0.0)
    monkeypatch.setattr(chunks, "_LONGEST", 0.0)  # one event per chunk
    monkeypatch.setattr("jdistill.evaluate._attack._SECONDS_BETWEEN_SAVES", 0.0)
    attack = functools.partial(attacks.pgd, eps=0.1, num_steps=12, step_size=0.001)
    if driver:  # several methods one after the other; the last one is interrupted
        first = functools.partial(attacks.fgsm, eps=0.01)
        attack = functools.partial(attacks.ensemble, attacks=[first, attack])
    plan = evaluate.AttackPlan(attack)
    stack = nets.stack(networks()[:1])
    whole = run(stack=stack, plan=plan)
    shards, steps = {}, []

    def stop(event):
        steps.append(event.get("step"))
        if event.get("step") == 7:
            raise Stop

    with pytest.raises(Stop):
        run(shards, stack=stack, plan=plan, callback=stop)
    assert list(shards) == ["pgd/network-0/00000.part"]
    killed, steps = steps, []
    again = run(shards, stack=stack, plan=plan, callback=lambda e: steps.append(e.get("step")))
    assert killed[-1] == 7
    assert steps[0] == 7  # and not 0
    assert list(shards) == ["pgd/network-0/00000"]  # what was kept on the way is gone
    for name in ("success", "distance", "queries", "inputs"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name), err_msg=name)
    for name in whole.info:
        np.testing.assert_array_equal(again.info[name], whole.info[name], err_msg=name)


def test_what_was_kept_of_another_attack_is_done_anew(monkeypatch):
    shards = {"pgd/network-0/00000.part": {"part": np.zeros(3, np.uint8), "settings": "other"}}
    outcome = run(shards)
    np.testing.assert_array_equal(outcome.success, run().success)
