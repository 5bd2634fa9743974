"""The launch files, with stand-ins for gcloud and Slurm that only note how they are called."""

import os
import pathlib
import shutil
import subprocess

import pytest

FOLDER = pathlib.Path(__file__).parent.parent / "experiments" / "tpu"
pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs git")


def stand_in(folder, name, lines):
    """A program of that name, first on the path."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "$CALLS"\n{lines}\n')
    file.chmod(0o755)


def checkout(tmp_path):
    """A small repository with the launch files."""
    root = tmp_path / "checkout"
    shutil.copytree(FOLDER, root / "experiments" / "tpu")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "launch files"]):
        names = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
        subprocess.run(["git", *names, *command], cwd=root, check=True)
    return root


def call(tmp_path, script, *arguments, **environment):
    """Exit code, calls, and errors of a script."""
    root = tmp_path / "checkout"
    if not root.exists():
        checkout(tmp_path)
    calls = tmp_path / "calls"
    calls.write_text("")
    found = subprocess.run(
        ["bash", root / "experiments" / "tpu" / script, *arguments],
        env={
            **os.environ,
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "STATE": str(tmp_path / "state"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return found.returncode, calls.read_text().splitlines(), found.stderr


HERE = {"NAME": "mine", "ZONE": "us-central1-a"}
COMMAND = ["jdistill", "defend", "my study.py"]
# Whether there is a VM is whether its file is there; a request goes through its states.
VM = """case "$*" in
  *" describe "*) [ -e "$STATE" ] ;;
  *" create "*) touch "$STATE" ;;
esac"""
QUEUE = """case "$*" in
  *queued-resources\\ describe*) head -n 1 "$STATE" 2> /dev/null; sed -i 1d "$STATE" 2> /dev/null ;;
  *queued-resources\\ create*) printf 'PROVISIONING\\nACTIVE\\n' > "$STATE" ;;
esac"""


def test_a_vm_is_made_once(tmp_path):
    stand_in(tmp_path / "bin", "gcloud", VM)
    code, calls, errors = call(tmp_path, "tpu_vm.sh", *COMMAND, **HERE)
    assert code == 0, errors
    verbs = [line.split()[4] for line in calls]
    assert verbs == ["describe", "create", "scp", "ssh"]
    assert "--accelerator-type v5litepod-1 --version v2-alpha-tpuv5-lite" in calls[1]
    assert calls[3].endswith("experiments/tpu/job.sh tpu jdistill defend my\\ study.py ")
    code, calls, _ = call(tmp_path, "tpu_vm.sh", *COMMAND, **HERE)
    assert [line.split()[4] for line in calls] == ["describe", "scp", "ssh"]
    code, calls, _ = call(tmp_path, "tpu_vm.sh", "delete", **HERE)
    assert calls == ["gcloud compute tpus tpu-vm delete mine --zone us-central1-a --quiet"]


@pytest.mark.parametrize(
    ("states", "verbs"),
    [
        ("", ["describe", "create", "describe", "describe", "scp", "ssh"]),
        ("ACTIVE\n", ["describe", "scp", "ssh"]),
        (
            "SUSPENDED\n",
            ["describe", "delete", "describe", "create", "describe", "describe", "scp", "ssh"],
        ),
    ],
)
def test_a_slice_is_asked_for_and_waited_for(states, verbs, tmp_path):
    stand_in(tmp_path / "bin", "gcloud", QUEUE)
    (tmp_path / "state").write_text(states)
    settings = {**HERE, "FLEX": "4h", "POLL_SECONDS": "0"}
    code, calls, errors = call(tmp_path, "queued_slice.sh", *COMMAND, **settings)
    assert code == 0, errors
    found = [line.split()[5 if "alpha" in line else 4] for line in calls]
    assert found == verbs
    assert "--worker all" in calls[-1]
    if "create" in verbs:
        [made] = [line for line in calls if " create " in line]
        assert made.endswith("--provisioning-model flex-start --max-run-duration 4h")


@pytest.mark.parametrize("script", ["tpu_vm.sh", "queued_slice.sh"])
def test_what_is_missing_is_named(script, tmp_path):
    stand_in(tmp_path / "bin", "gcloud", VM)
    assert "expected NAME" in call(tmp_path, script, *COMMAND)[2]
    code, calls, errors = call(tmp_path, script, **HERE)
    assert (code, calls) == (2, [])
    assert "expected a command" in errors


def test_a_job_runs_the_command_as_it_is(tmp_path):
    stand_in(tmp_path / "bin", "work", "exit 7")
    root = checkout(tmp_path)
    (root / ".venv-job").mkdir()
    (root / ".venv-job" / "installed").touch()
    code, calls, _ = call(tmp_path, "job.sh", "tpu", "work", "a b")
    assert (code, calls) == (7, ["work a b"])


def test_a_preempted_slurm_job_is_queued_again(tmp_path):
    stand_in(tmp_path / "bin", "srun", '[ "${@: -1}" = true ] || exit 143')
    stand_in(tmp_path / "bin", "scontrol", "")
    root = checkout(tmp_path)
    settings = {"SLURM_SUBMIT_DIR": str(root), "SLURM_JOB_ID": "7"}
    code, calls, _ = call(tmp_path, "slurm.sbatch", *COMMAND, **settings)
    assert code == 143
    assert calls[-1] == "scontrol requeue 7"
    assert calls[1].startswith("srun --kill-on-bad-exit=1 bash experiments/tpu/job.sh cuda13 jdist")
