"""Caches, flags, files that survive a crash, exit codes."""

import getpass
import importlib.metadata
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill import _files, runtime
from jdistill.runtime import _flags, _jax, _progress

CONVOLUTION_FLAG = (
    "--xla_cpu_experimental_ynn_fusion_type=-LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION"
)


def python(code: str, *arguments, **environment):
    """Runs code in a fresh process on CPU, without the flags of this one."""
    clean = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**clean, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


# --- JAX ---


@pytest.mark.floor
@pytest.mark.slow
def test_import_starts_no_backend_and_the_flags_added_are_accepted(tmp_path):
    code = """
import os, subprocess
from jdistill import runtime
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
added = runtime.add_cpu_flags()
assert not xla_bridge.backends_are_initialized()
subprocess.run = None  # nothing is asked again
print(added, os.environ.get("XLA_FLAGS"), runtime.add_cpu_flags())
import jax.numpy as jnp
assert float(jnp.ones(3).sum()) == 3.0
"""
    # What jaxlib does with the flag, without the library.
    alone = python("import jax; jax.numpy.ones(3)", XLA_FLAGS=CONVOLUTION_FLAG)
    known = alone.returncode == 0
    assert known or "Unknown flag" in alone.stderr
    for _ in range(2):
        done = python(code, JDISTILL_CACHE=str(tmp_path))
        assert done.returncode == 0, done.stderr
        expected = [str(known), str(CONVOLUTION_FLAG if known else None), "False"]
        assert done.stdout.split() == expected
        assert done.stderr == ""
        code = code.replace("\nadded", "\nsubprocess.run = None  # nor by the next process\nadded")
    [kept] = tmp_path.iterdir()
    assert importlib.metadata.version("jaxlib") in kept.name
    assert json.loads(kept.read_text()) == {CONVOLUTION_FLAG: known}


def test_flags_set_after_the_import_are_parsed_so_that_accepted_means_something():
    done = python("""
import os, jax
os.environ["XLA_FLAGS"] = "--xla_cpu_no_such_flag=1"
jax.numpy.ones(3)
""")
    assert done.returncode != 0
    assert "xla_cpu_no_such_flag" in done.stderr


@pytest.fixture
def flag_is_wanted(monkeypatch):
    """All conditions for the flag hold; each test takes one away."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    monkeypatch.setattr(_flags, "accepted", lambda flag: True)
    monkeypatch.setattr(_jax, "_backend_started", lambda: False)
    monkeypatch.setattr(_jax, "_only_cpu", lambda: True)
    return monkeypatch


def test_the_flag_is_appended_to_the_users(flag_is_wanted):
    assert runtime.add_cpu_flags()
    assert os.environ["XLA_FLAGS"] == f"--xla_dump_to=/nowhere {CONVOLUTION_FLAG}"
    assert not runtime.add_cpu_flags()  # once


def test_the_flag_is_not_added_where_jaxlib_refuses_it(flag_is_wanted):
    asked = []
    flag_is_wanted.setattr(_flags, "accepted", asked.append)
    assert not runtime.add_cpu_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=/nowhere"
    assert asked == [CONVOLUTION_FLAG]


def test_the_flag_is_not_added_against_the_users_will(flag_is_wanted):
    flag_is_wanted.setenv("XLA_FLAGS", "--xla_cpu_experimental_ynn_fusion_type=")
    assert not runtime.add_cpu_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_cpu_experimental_ynn_fusion_type="


def test_the_flag_is_not_added_too_late_or_beside_an_accelerator(flag_is_wanted):
    flag_is_wanted.setattr(_flags, "accepted", None)  # no process is started in vain
    with flag_is_wanted.context() as patch:
        patch.setattr(_jax, "_backend_started", lambda: True)
        assert not runtime.add_cpu_flags()
    flag_is_wanted.setattr(_jax, "_only_cpu", lambda: False)
    assert not runtime.add_cpu_flags()
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=/nowhere"


FLAG = "--xla_some_flag=1"
COUNTED = "import os; open(os.environ['ASKED'], 'a').write('.'); "
ACCEPTS = COUNTED + "print('a word'); print('accepted')"
REFUSES = COUNTED + "raise SystemExit('Unknown flag in XLA_FLAGS: ' + os.environ['XLA_FLAGS'])"


@pytest.fixture
def asking(tmp_path, monkeypatch):
    """Sets what the process does that asks jaxlib; gives the folder, and how often it was asked."""
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.setenv("JDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
    (tmp_path / "asked").touch()

    def set_to(probe, **settings):
        for name, value in {"_PROBE": probe, **settings}.items():
            monkeypatch.setattr(_flags, name, value)
        return tmp_path / "cache", lambda: (tmp_path / "asked").stat().st_size

    return set_to


@pytest.mark.parametrize(
    ("probe", "answer"), [(ACCEPTS, True), (REFUSES, False)], ids=["yes", "no"]
)
def test_a_flag_is_asked_about_once_a_jaxlib(probe, answer, asking, monkeypatch, caplog):
    folder, count = asking(probe)
    assert [_flags.accepted(FLAG) for _ in range(3)] == [answer] * 3
    assert count() == 1
    assert os.environ["XLA_FLAGS"] == "--xla_dump_to=/nowhere"
    [kept] = folder.iterdir()
    assert importlib.metadata.version("jaxlib") in kept.name
    assert _flags.accepted(f"{FLAG}0") is answer  # another flag, in the same file
    assert [count(), list(folder.iterdir())] == [2, [kept]]
    monkeypatch.setattr(_flags, "version", lambda name: "99.1")
    assert _flags.accepted(FLAG) is answer
    assert [count(), len(list(folder.iterdir()))] == [3, 2]
    assert not caplog.records


@pytest.mark.parametrize(
    ("probe", "reason"),
    [
        (COUNTED + "import time; time.sleep(60)", "gave no answer within 2 s"),
        (COUNTED + "import no_such_module", r"a process that did ended with 1"),
        (COUNTED + "os.kill(os.getpid(), 9)", r"a process that did ended with -9"),
        (COUNTED, r"a process that did ended with 0"),  # without a word: not to be trusted
    ],
    ids=["slow", "without JAX", "killed", "silent"],
)
def test_without_an_answer_there_is_no_flag_for_a_day(probe, reason, asking, caplog, monkeypatch):
    folder, count = asking(probe, _SECONDS=2.0 if "sleep" in probe else 30.0)
    started = time.monotonic()
    assert not _flags.accepted(FLAG)
    assert not _flags.accepted(FLAG)
    assert time.monotonic() - started < 30
    assert count() == 1
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert re.search(rf"{FLAG}, .+ jaxlib .*{reason}", record.getMessage())
    later = time.time() + 25 * 3600
    monkeypatch.setattr(_flags.time, "time", lambda: later)
    asking(ACCEPTS)
    assert _flags.accepted(FLAG)
    [kept] = folder.iterdir()
    assert json.loads(kept.read_text()) == {FLAG: True}


@pytest.mark.parametrize("executable", ["/no/such/python", "", None])
def test_no_python_to_ask_with_is_no_answer(executable, asking, monkeypatch, caplog):
    asking(ACCEPTS)
    monkeypatch.setattr(_flags.sys, "executable", executable)
    assert not _flags.accepted(FLAG)
    assert "could not be asked" in caplog.text


@pytest.mark.parametrize("content", ["", "[1]", '{"--xla_some_flag=1": "yes"}', "\x00{"])
def test_a_damaged_answer_is_asked_for_again(content, asking):
    folder, count = asking(ACCEPTS)
    assert _flags.accepted(FLAG)
    [kept] = folder.iterdir()
    kept.write_text(content)
    assert _flags.accepted(FLAG)
    assert count() == 2
    assert json.loads(kept.read_text()) == {FLAG: True}


def test_an_answer_that_cannot_be_kept_counts(asking):
    folder, count = asking(ACCEPTS)
    folder.touch()
    assert [_flags.accepted(FLAG) for _ in range(2)] == [True, True]
    assert count() == 2


@pytest.mark.parametrize(
    ("platforms", "plugin", "expected"),
    [("cpu", "libtpu", True), ("tpu,cpu", None, False), (None, None, True)]
    + [(None, name, False) for name in ("libtpu", "jax_plugins")],
)
def test_only_cpu_sees_the_plugins(platforms, plugin, expected, monkeypatch):
    config = SimpleNamespace(jax_platforms=platforms)
    monkeypatch.setattr(_jax, "jax", SimpleNamespace(config=config))
    monkeypatch.setattr(_jax.importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.setattr(
        _jax.importlib.util, "find_spec", lambda name: name if name == plugin else None
    )
    assert _jax._only_cpu() is expected


def test_backend_started_is_true_once_it_has():
    jax.devices()
    assert _jax._backend_started()


CACHED = """
import os, sys, jax, jax.numpy as jnp
from jdistill import runtime
jax.config.update("jax_compilation_cache_dir", sys.argv[1] + "-before")
jnp.ones(3).block_until_ready()  # opens that one
print(runtime.enable_compilation_cache(*sys.argv[1:]))
jax.jit(lambda x: jnp.tanh(x @ x.T).sum())(jnp.ones((7, 7))).block_until_ready()
print(runtime.programs()["from_cache"], runtime.programs()["compiled"])
"""


@pytest.mark.floor
def test_a_second_process_compiles_nothing(tmp_path):
    runs = [python(CACHED, tmp_path / "cache") for _ in range(2)]
    assert [done.returncode for done in runs] == [0, 0], runs[0].stderr
    first, second = (done.stdout.split() for done in runs)
    assert first[:2] == [str(tmp_path / "cache"), "0"]
    assert int(first[2]) >= 1
    assert second == [str(tmp_path / "cache"), first[2], "0"]
    assert any("lambda" in path.name for path in (tmp_path / "cache").iterdir())
    assert [done.stderr for done in runs] == ["", ""]


def test_where_the_cache_lies(tmp_path, monkeypatch):
    recorded = {}
    config = SimpleNamespace(jax_compilation_cache_dir=None, update=recorded.__setitem__)
    monkeypatch.setattr(_jax, "jax", SimpleNamespace(config=config))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("JDISTILL_CACHE", raising=False)
    assert runtime.enable_compilation_cache() == tmp_path / "home/.cache/jdistill/xla"
    monkeypatch.setenv("JDISTILL_CACHE", str(tmp_path / "ours"))
    assert runtime.enable_compilation_cache() == tmp_path / "ours/xla"
    config.jax_compilation_cache_dir = str(tmp_path / "jax")
    assert runtime.enable_compilation_cache() == tmp_path / "jax"
    assert runtime.enable_compilation_cache(tmp_path / "given") == tmp_path / "given"
    assert recorded["jax_compilation_cache_dir"] == str(tmp_path / "given")


def test_a_cache_that_cannot_be_written_is_gone_without(tmp_path, caplog):
    (tmp_path / "file").touch()
    before = jax.config.jax_compilation_cache_dir
    assert runtime.enable_compilation_cache(tmp_path / "file/cache") is None
    assert jax.config.jax_compilation_cache_dir == before
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert str(tmp_path / "file/cache") in record.getMessage()
    assert record.getMessage().endswith("going on without the compilation cache")


def test_describe_tells_what_a_result_depends_on_and_not_where_it_ran():
    described = runtime.describe()
    text = json.dumps(described)
    assert described["versions"]["jax"] == jax.__version__
    assert described["versions"]["numpy"] == np.__version__
    assert {"jdistill", "python", "jaxlib", "flax", "optax", "orbax-checkpoint"} <= set(
        described["versions"]
    )
    assert sum(device["count"] for device in described["devices"]) == jax.device_count()
    assert described["devices"][0]["platform"] == jax.devices()[0].platform
    assert described["process_count"] == 1
    for private in (socket.gethostname(), os.path.expanduser("~"), getpass.getuser()):
        assert private not in text
    with jax.default_matmul_precision("highest"):
        assert runtime.describe()["matmul_precision"] == "highest"
    assert runtime.is_main_process()


# --- Files ---


def test_check_writable_makes_the_folder_and_leaves_it_empty(tmp_path):
    path = runtime.check_writable(tmp_path / "a/b")
    assert path == tmp_path / "a/b"
    assert list(path.iterdir()) == []
    assert runtime.check_writable(path) == path  # twice is fine


@pytest.mark.parametrize("where", ["file/runs/1", "file", "/proc/jdistill/runs"])
def test_check_writable_names_path_reason_and_remedy(where, tmp_path):
    (tmp_path / "file").write_text("precious")
    path = os.path.join(tmp_path, where)
    with pytest.raises(
        OSError,
        match=rf"^expected a writable folder, got {path} \(.+\); choose another `--workdir`",
    ):
        runtime.check_writable(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "precious"


def test_check_writable_leaves_nothing_behind(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "mine").mkdir()
    monkeypatch.setattr(type(_files.as_path("x")), "write_text", refuse)
    for where in ("a/b/c", "mine/d", "mine"):
        with pytest.raises(PermissionError, match=rf"{where} \(Permission denied\); do that"):
            runtime.check_writable(tmp_path / where, remedy="do that")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_the_old_file_alone(broken, error, tmp_path, monkeypatch):
    def fail(*_):
        raise error

    path = tmp_path / "config.json"
    runtime.write_json(path, {"version": 1})
    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(type(error)):
        runtime.write_json(path, {"version": 2})
    assert json.loads(path.read_text()) == {"version": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_write_json_takes_arrays_and_paths_and_refuses_the_rest(tmp_path):
    path = tmp_path / "run.json"
    content = {"a": np.float32(0.5), "b": jnp.arange(3), "c": Path("x/y"), "d": (1, None)}
    runtime.write_json(path, content)
    assert json.loads(path.read_text()) == {"a": 0.5, "b": [0, 1, 2], "c": "x/y", "d": [1, None]}
    for bad in ({"a": object()}, {(1, 2): 3}):
        with pytest.raises(ValueError, match="expected JSON-able content, got"):
            runtime.write_json(path, bad)
        with pytest.raises(ValueError, match="expected JSON-able content, got"):
            runtime.append_jsonl(path, bad)
    assert json.loads(path.read_text())["c"] == "x/y"


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_file_cut_anywhere_loses_only_what_was_half_written(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    records = [{"epoch": 1, "name": "é"}, {"epoch": 2, "text": "a\nb"}, {"epoch": 3, "x": [1.5]}]
    for record in records:
        runtime.append_jsonl(path, record)
    whole = path.read_bytes()
    assert runtime.read_jsonl(path) == records
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])
    kept = records[: whole[:cut].count(b"\n")]
    assert runtime.read_jsonl(path) == kept
    runtime.append_jsonl(path, {"epoch": 4})
    assert runtime.read_jsonl(path) == [*kept, {"epoch": 4}]


def test_read_jsonl_without_a_file_and_with_a_bad_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert runtime.read_jsonl(path) == []
    path.write_bytes(b'{"a": 1}\n\xff{"b": \n{"c": 3}\n')
    with pytest.raises(
        ValueError, match=r"JSON on every line, got .* in line 2 of .*metrics.jsonl"
    ):
        runtime.read_jsonl(path)


def test_remote_files_are_rewritten_whole(tmp_path, monkeypatch):
    """Buckets can neither rename in place nor append; a folder stands in for one."""
    monkeypatch.setattr(_files, "as_path", lambda path: tmp_path / os.path.basename(path))
    runtime.atomic_write_text("gs://bucket/a.txt", "text")
    runtime.append_jsonl("gs://bucket/b.jsonl", {"a": 1})
    with open(tmp_path / "b.jsonl", "a") as file:
        file.write('{"half')
    runtime.append_jsonl("gs://bucket/b.jsonl", {"a": 2})
    assert (tmp_path / "a.txt").read_text() == "text"
    assert runtime.read_jsonl("gs://bucket/b.jsonl") == [{"a": 1}, {"a": 2}]


def test_a_killed_writer_leaves_whole_files(tmp_path):
    code = """
import sys
from jdistill import runtime
number = 0
while True:
    number += 1
    runtime.write_json(sys.argv[1] + "/run.json", {"number": number, "fill": "x" * 300_000})
    runtime.append_jsonl(sys.argv[1] + "/metrics.jsonl", {"number": number, "fill": "x" * 30_000})
    print(number, flush=True)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 20:
                break
        process.kill()
    assert json.loads((tmp_path / "run.json").read_text())["number"] >= 20
    numbers = [record["number"] for record in runtime.read_jsonl(tmp_path / "metrics.jsonl")]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 20


# --- Programs ---


def ends(main, capsys):
    """The exit code of a program, and its stderr."""
    with pytest.raises(SystemExit) as caught:
        runtime.run_main(main)
    return caught.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (
            ValueError("expected T > 0,\n  got -1; pass more"),
            2,
            "expected T > 0, got -1; pass more",
        ),
        (FileNotFoundError(2, "No such file", "x"), 2, "[Errno 2] No such file: 'x'"),
        (PermissionError("expected a writable workdir"), 2, "expected a writable workdir"),
        (ValueError(), 2, "ValueError"),
    ],
)
def test_user_errors_are_one_line(error, code, line, capsys, monkeypatch):
    monkeypatch.delenv("JDISTILL_DEBUG", raising=False)
    assert ends(raising(error), capsys) == (code, f"error: {line}\n")
    monkeypatch.setenv("JDISTILL_DEBUG", "1")
    code, text = ends(raising(error), capsys)
    assert text.startswith("Traceback")
    assert text.endswith(f"error: {line}\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_clean_up_and_say_how_to_go_on(number, code, capsys):
    before = signal.getsignal(number)
    cleaned = []

    def main():
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            cleaned.append(True)

    assert ends(main, capsys) == (code, "stopped; run the same command again to go on\n")
    assert cleaned == [True]
    assert signal.getsignal(number) is before


def test_an_interrupt_may_have_a_text_of_its_own(capsys):
    error = KeyboardInterrupt("stopped; nothing to go on with")
    assert ends(raising(error), capsys) == (130, "stopped; nothing to go on with\n")


def test_other_endings():
    arguments = []
    runtime.run_main(lambda *args, **kwargs: arguments.append((args, kwargs)), 1, b=2)
    assert arguments == [((1,), {"b": 2})]
    runtime.run_main(lambda: 0)
    with pytest.raises(SystemExit) as caught:
        runtime.run_main(lambda: 3)
    assert caught.value.code == 3
    with pytest.raises(SystemExit, match="7"):
        runtime.run_main(raising(SystemExit(7)))
    with pytest.raises(RuntimeError, match="a bug"):
        runtime.run_main(raising(RuntimeError("a bug")))


def test_a_terminated_child_does_not_end_its_parent():
    code = """
import os, signal, time
from jdistill import runtime
from jdistill.runtime import _program

def main():
    child = os.fork()
    if child == 0:
        time.sleep(60)
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    os.waitpid(child, 0)
    time.sleep(1.5)
    print("alive", flush=True)

_program._GRACE = 0.5
runtime.run_main(main)
"""
    found = python(code)
    assert (found.returncode, found.stdout) == (0, "alive\n"), found.stderr


def test_a_computation_that_python_cannot_interrupt_ends_in_time():
    code = """
import jax
from jdistill import runtime
from jdistill.runtime import _program

def main():
    endless = jax.jit(lambda x: jax.lax.fori_loop(0, 2**31 - 1, lambda i, x: jax.numpy.sin(x), x))
    compiled = endless.lower(1.0).compile()
    print("computing", flush=True)
    compiled(1.0).block_until_ready()

_program._GRACE = 1.0
runtime.run_main(main)
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as program:
        assert program.stdout.readline() == "computing\n"
        time.sleep(0.5)
        program.send_signal(signal.SIGTERM)
        _, errors = program.communicate(timeout=20)
    assert program.returncode == 143
    assert errors.endswith("stopped; run the same command again to go on\n")


def test_a_program_stopped_while_it_trains_keeps_its_checkpoint(tmp_path):
    code = """
import sys, jax, jax.numpy as jnp
from jdistill import runtime
from jdistill.checkpoint import Checkpointer

def main():
    state = {"w": jnp.zeros((200, 200)), "key": jax.random.key(0)}
    step = jax.jit(lambda state: {**state, "w": jnp.tanh(state["w"] @ state["w"] + 1)})
    with Checkpointer(sys.argv[1]) as checkpointer:
        for number in range(1, 10**9):
            state = step(state)
            checkpointer.save(number, state)
            print(number, flush=True)

runtime.run_main(main)
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        while process.stdout.readline() != "3\n":
            assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)  # by then it is most likely inside a save
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    # On a slow disk absl says so before.
    assert errors.endswith("stopped; run the same command again to go on\n")
    assert "Traceback" not in errors
    last = int(["3", *output.split()][-1])
    steps = sorted(int(path.name) for path in tmp_path.iterdir())
    assert steps[-1] >= last  # what was said to be saved is


def test_progress_is_a_line_per_stage_where_there_is_no_terminal(capsys, monkeypatch):
    """Stages with a prefix have one line, others one per part; what took no time has none."""
    clock = iter(range(1000))
    slow = SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(_progress, "time", slow)

    def evaluate(bar, *parts):
        for part in parts:
            for done in (1, 2):
                bar({"event": "evaluate", "stage": part, "done": done, "total": 2})

    with runtime.progress() as bar:
        bar.begin(1, 3)
        evaluate(bar, "T=1, teacher", "T=1, student")
        bar.begin(2, 3, prefix="T=1, ", num_parts=2)
        evaluate(bar, "fgsm", "pgd")
        bar.say("between")
        monkeypatch.setattr(_progress, "time", SimpleNamespace(monotonic=lambda: 1000))
        bar.begin(3, 3, prefix="T=2, ", num_parts=2)
        evaluate(bar, "fgsm", "pgd")
    lines = [line.partition(": ")[0] for line in capsys.readouterr().err.splitlines()]
    assert lines == ["1/3 T=1, teacher", "1/3 T=1, student", "between", "2/3 T=1"]


def test_progress_of_a_command_names_each_part(capsys, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(_progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    with runtime.progress() as bar:
        bar.prefix = "student, "
        bar({"event": "evaluate", "stage": "pgd", "done": 2, "total": 2})
    assert capsys.readouterr().err.startswith("student, pgd: ")
