"""Processes on several hosts are as one, or end with an error that says which host and why."""

import functools
import signal
import time

import jax
import numpy as np
import pytest

from jdistill import parallel, report, runtime
from tests import one_of_several
from tests.processes import address, finished, start


def training(file, mode="jit", num_processes=2, changes=None, **options):
    """Processes that train together; `changes` of one, by its number."""
    shared, changes = ("-m", one_of_several.__name__, address(), num_processes), changes or {}
    return [
        start([*shared, number, mode, file, *changes.get(number, [])], **options)
        for number in range(num_processes)
    ]


@functools.cache
def by_one_process():
    return one_of_several.trained("jit", jax.devices()[:4])


@pytest.mark.slow
@pytest.mark.floor
@pytest.mark.parametrize(
    ("mode", "num_processes", "num_devices"),
    [("jit", 2, 2), ("shard_map", 2, 2), ("pmap", 2, 2), ("jit", 4, 1)],
)
def test_processes_train_as_one(mode, num_processes, num_devices, tmp_path):
    file = tmp_path / "trained.npz"
    found = finished(training(file, mode, num_processes, num_devices=num_devices))
    for process, _, errors in found:
        assert process.returncode == 0, errors
    losses, weights = by_one_process()
    with np.load(file) as content:
        own, *arrays = (content[name] for name in content.files)
    np.testing.assert_allclose(own, losses, rtol=1e-5)
    for one, other in zip(arrays, weights, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4 * np.abs(other).max())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "name"),
    [
        ("batch_size=10", "batch size"),
        ('mode="pmap"', "mode"),
        ("rate=0.2", "state"),
        ("temperature=3.0", "loss"),
    ],
)
def test_hosts_that_differ_are_named(change, name, tmp_path):
    for process, _, errors in finished(training(tmp_path / "none.npz", changes={1: [change]})):
        assert process.returncode == 2
        assert f"the same {name} on all 2 hosts, got another on host 1 than on host 0" in errors
    assert not (tmp_path / "none.npz").exists()


@pytest.mark.slow
def test_on_its_own_devices_a_host_agrees_with_nobody(tmp_path):
    changes = {0: ["alone", "num_epochs=1"], 1: ["alone", "temperature=3.0"]}
    for process, _, errors in finished(training(tmp_path / "mine.npz", changes=changes)):
        assert process.returncode == 0, errors
    assert (tmp_path / "mine.npz").exists()


@pytest.mark.slow
def test_a_host_that_leaves_ends_the_others(tmp_path):
    changes = {1: ["exit"]}
    (first, _, _), (second, _, errors) = finished(
        training(tmp_path / "none.npz", changes=changes), seconds=90
    )
    assert second.returncode == 1
    assert "ended by itself" in errors
    assert first.returncode not in (0, None)


@pytest.mark.slow
@pytest.mark.floor
def test_sigterm_ends_a_host_that_has_saved_nothing(tmp_path):
    first, second = training(tmp_path / "none.npz", changes={0: ["pause"], 1: ["pause"]})
    while first.stdout.readline() != "pausing\n":
        assert first.poll() is None
    began = time.monotonic()
    for process in (first, second):
        process.send_signal(signal.SIGTERM)
    found = finished([first, second], seconds=60)
    assert time.monotonic() - began < 20
    assert found[0][0].returncode == 143
    assert "stopped; run the same command again" in found[0][2]


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_refused(tmp_path):
    where = address()
    command = ["-m", "jdistill", "defend", "digits", "--smoke", "--coordinator-address", where]
    command += ["--num-processes", 2]
    processes = [
        start([*command, "--process-id", number, "--workdir", tmp_path / str(number)])
        for number in range(2)
    ]
    for process, _, errors in finished(processes):
        assert process.returncode == 2
        assert "expected one folder that all 2 hosts see" in errors


@pytest.mark.slow
def test_a_host_that_does_not_start_is_an_error(tmp_path):
    alone = start(["-m", one_of_several.__name__, address(), 2, 0, "jit", tmp_path / "none.npz"])
    [(process, _, errors)] = finished([alone], seconds=90)
    assert process.returncode not in (0, None)
    assert "start the same command on every host" in errors, errors


@pytest.mark.slow
def test_a_host_that_dies_ends_the_others(tmp_path):
    first, second = training(tmp_path / "none.npz", changes={1: ["pause"]})
    try:
        while second.stdout.readline() != "pausing\n":
            assert second.poll() is None
        second.send_signal(signal.SIGKILL)
        began = time.monotonic()
        [(process, _, errors)] = finished([first], seconds=90)
        assert time.monotonic() - began < 60
        assert process.returncode not in (0, None)
        assert "by peer" in errors or "another task died" in errors, errors
    finally:
        finished([second])


def test_alone_there_is_nobody_to_differ_from():
    parallel.check_same(batch_size=3, inputs=np.zeros(3))
    parallel.barrier("here")
    state = {"w": jax.numpy.ones(3), "n": 3}
    assert parallel.local(state) is not None
    assert parallel.local(state)["w"] is state["w"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", 2, None), "got no process_id; pass all three"),
        ((None, 2, 0), "got no coordinator_address; pass all three"),
        (("localhost:1", 2, 2), "expected process_id in 0..1, got 2"),
        (("localhost:1", 0, 0), "num_processes"),
        (("localhost:1", 2, -1), "process_id"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments, message):
    with pytest.raises(ValueError, match=message.replace(".", r"\.")):
        runtime.initialize(*arguments)


@pytest.mark.slow
def test_a_study_of_two_processes_is_that_of_one(tmp_path):
    command = ["-m", "jdistill", "defend", "digits", "--smoke", "--workdir"]
    where = ["--coordinator-address", address(), "--num-processes", 2, "--process-id"]
    both = [start([*command, tmp_path / "two", *where, number]) for number in range(2)]
    found = finished([*both, start([*command, tmp_path / "one"], num_devices=4)], seconds=600)
    for process, _, errors in found:
        assert process.returncode == 0, errors
    two, one = (report.read_tables(tmp_path / name) for name in ("two", "one"))
    assert [len(rows) for rows in two.values()] == [len(rows) for rows in one.values()]
    for kind in ("results", "transfer", "distances"):
        for ours, theirs in zip(two[kind], one[kind], strict=True):
            for name, value in theirs.items():
                expected = pytest.approx(value, rel=1e-3, abs=1e-6, nan_ok=True)
                assert ours[name] == (expected if isinstance(value, float) else value), (kind, name)
    labels = [[row["verdict"].label for row in each["verdicts"]] for each in (two, one)]
    assert labels[0] == labels[1]
    assert (tmp_path / "two" / "report.html").exists()
