"""Damage to every kind of file of a workdir, kills at any moment, and what comes of them.

    python -m experiments.reliability                       a table of files and damages, 3 kills
    python -m experiments.reliability --num-random 2000 --num-kills 20 --output docs/reliability.md

A small study is run once. Then each file of a copy is damaged, and the study is run again there.
The outcome is *remade* (every table, verdict, and weight as before), *refused* (an error of one
line that names the file), or wrong: other numbers, or a traceback. The kills are of `jdistill
defend digits --smoke` by SIGKILL; what a killed run goes on to must be the bytes of a run that was
not.
"""

import collections
import dataclasses
import functools
import pathlib
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import tyro

from jdistill import attacks, evaluate, report, runtime, study, train
from jdistill.study import Stage, Study

_TABLES = (*(f"{kind}.csv" for kind in report.TABLES), "verdicts.json")
# By kind, a pattern of its files.
KINDS = {
    "config.json": "config.json",
    "run.json": "run.json",
    "metrics.jsonl": "metrics.jsonl",
    "results.csv": "results.csv",
    "curves.csv": "curves.csv",
    "tables.json": "tables.json",
    "pictures.npz": "pictures.npz",
    "report.html": "report.html",
    "figures": "figures/*.svg",
    "clean measures": "shards/clean/*.npz",
    "attack shards": "shards/pgd/*/*.npz",
    "checkpoint, state": "checkpoints/seed0/T5/generation1-*/*/state/**/*",
    "checkpoint, metadata": "checkpoints/seed0/T5/generation1-*/*/metadata/*",
    "checkpoint of a teacher": "checkpoints/seed0/T5/generation0-*/*/state/**/*",
    "initial weights": "checkpoints/seed0/initial-*/*/state/**/*",
}


def _digit(content: bytes) -> bytes:
    """One digit in the middle changed."""
    places = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
    if not places:
        return content[::-1]
    place = min(places, key=lambda each: abs(each - len(content) // 2))
    other = b"1" if content[place : place + 1] != b"1" else b"2"
    return content[:place] + other + content[place + 1 :]


def _bit(content: bytes, place: int | None = None, bit: int = 2) -> bytes:
    place = len(content) // 2 if place is None else place
    return content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes] | None] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "garbage": lambda content: b"\x00\xff garbage \x80" * 4,
    "one bit": _bit,
    "a digit": _digit,
    "deleted": None,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Numbers of damages and of kills."""

    num_random: int = 0
    """Further random damages: a bit, a cut, or a byte of any file."""
    num_kills: int = 3
    """SIGKILLs of a running command."""
    num_kills_of_two: int = 0
    """SIGKILLs of two processes that run it together."""
    seed: int = 0
    """Of the random damages and the moments of the kills."""
    output: str | None = None
    """Markdown file to write the table into (none: it is printed)."""


def small_study() -> Study:
    """A study of seconds on three noisy classes."""
    rng = np.random.default_rng(0)
    centers = rng.uniform(0.2, 0.8, (3, 6))
    labels = np.arange(72) % 3
    inputs = np.clip(centers[labels] + rng.normal(0, 0.1, (72, 6)), 0, 1).astype(np.float32)
    stage = Stage(model=(_init, _apply), optimizer=train.sgd(0.05), num_epochs=2)
    plan = evaluate.AttackPlan(functools.partial(attacks.pgd, eps=0.1, num_steps=2), 8)
    return Study(
        data=((inputs[:48], labels[:48]), (inputs[48:], labels[48:])),
        chains=[stage] * 2,
        temperatures=(1.0, 5.0),
        batch_size=16,
        initial_epochs=1,
        attacks={"pgd": plan},
        num_sensitivity=8,
    )


def _init(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    return jax.random.normal(key, (shape[0], 3))


def _apply(weights: jax.Array, inputs: jax.Array) -> jax.Array:
    return inputs @ weights


def outcome(own: Study, reference: pathlib.Path, name: str, content: bytes | None) -> str:
    """Outcome of running the study where one file has another content, or is gone.

    Returns:
        `"remade"`, `"refused"`, or what went wrong.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "run"
        shutil.copytree(reference, folder)
        path = folder / name
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        try:
            study.run(own, folder)
        except (ValueError, OSError) as error:
            named = path.name in str(error) or any(part in str(error) for part in path.parts[-4:])
            return "refused" if named else f"WRONG: an error that names nothing: {error}"
        except Exception as error:
            return f"WRONG: {type(error).__name__}: {error}"
        different = [each for each in _TABLES if _bytes(folder / each) != _bytes(reference / each)]
        if different or _weights(own, folder) != _weights(own, reference):
            return f"WRONG: other {different or 'weights'}"
        return "remade"


def _bytes(path: pathlib.Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def _weights(own: Study, folder: pathlib.Path) -> list[str]:
    return [network.weights for network in study.networks(own, folder)]


def files(folder: pathlib.Path, pattern: str) -> list[pathlib.Path]:
    """The files of a kind, the largest first."""
    found = [path for path in folder.glob(pattern) if path.is_file() and path.stat().st_size]
    return sorted(found, key=lambda path: (-path.stat().st_size, path.name))


def table(own: Study, reference: pathlib.Path) -> Iterator[tuple[str, str, str]]:
    """Kind, damage, and outcome, for every kind and damage."""
    for kind, pattern in KINDS.items():
        path = files(reference, pattern)[0]
        for damage, change in DAMAGES.items():
            content = None if change is None else change(path.read_bytes())
            yield kind, damage, outcome(own, reference, str(path.relative_to(reference)), content)


def at_random(
    own: Study, reference: pathlib.Path, count: int, draw: random.Random
) -> Iterator[tuple[str, str]]:
    """File and outcome of random damages."""
    every = [path for path in files(reference, "**/*") if not path.name.startswith(".")]
    for _ in range(count):
        path = draw.choice(every)
        content = path.read_bytes()
        place = draw.randrange(len(content))
        content = draw.choice(
            [
                _bit(content, place, 1 << draw.randrange(8)),
                content[:place],
                content[:place] + bytes([draw.randrange(256)]) + content[place + 1 :],
            ]
        )
        name = str(path.relative_to(reference))
        yield name, outcome(own, reference, name, content)


def kills(count: int, draw: random.Random, num_processes: int = 1) -> str:
    """Outcome of a command that is killed again and again: `"same bytes"`, or what differs.

    Args:
        count: kills.
        draw: of their moments.
        num_processes: which run the command together, and are killed at once.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        started = time.monotonic()
        errors = _ended(_started(folder / "whole", num_processes))
        took = time.monotonic() - started
        for _ in range(count):
            processes = _started(folder / "killed", num_processes)
            time.sleep(draw.uniform(0.2 * took, 0.9 * took))
            for process in processes:
                process.kill()
            _ended(processes)
        errors = errors or _ended(_started(folder / "killed", num_processes))
        if errors:
            return f"WRONG: {errors[-300:]}"
        names = (*_TABLES, "metrics.jsonl")
        pairs = [(folder / "killed" / name, folder / "whole" / name) for name in names]
        different = [one.name for one, other in pairs if _bytes(one) != _bytes(other)]
        return f"WRONG: other {different}" if different else "same bytes"


def _started(workdir: pathlib.Path, num_processes: int) -> list[subprocess.Popen]:
    """The command, in processes of one host that know of each other."""
    command = [sys.executable, "-m", "jdistill", "defend", "digits", "--smoke"]
    command += ["--workdir", str(workdir)]
    if num_processes > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        command += ["--coordinator-address", address, "--num-processes", str(num_processes)]
    own = [["--process-id", str(n)] if num_processes > 1 else [] for n in range(num_processes)]
    return [
        subprocess.Popen(
            [*command, *each], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        for each in own
    ]


def _ended(processes: Sequence[subprocess.Popen]) -> str:
    """Once all have ended, what those that failed said."""
    said = [process.communicate()[1] for process in processes]
    return "".join(
        text for process, text in zip(processes, said, strict=True) if process.returncode
    )


def run(options: Options) -> int:
    """Try everything, write the table, and return how many went wrong."""
    draw = random.Random(options.seed)
    own = small_study()
    with tempfile.TemporaryDirectory() as temporary:
        reference = pathlib.Path(temporary) / "reference"
        study.run(own, reference)
        cells = list(table(own, reference))
        others = list(at_random(own, reference, options.num_random, draw))
    lines = [
        "# Damage to a workdir",
        "",
        f"Made by `python -m experiments.reliability --num-random {options.num_random} --num-kills "
        f"{options.num_kills} --num-kills-of-two {options.num_kills_of_two}`: what comes of",
        "running a study again whose file is damaged.",
        "*remade*: every table and weight is as before; *refused*: an error of one line names the",
        "file.",
        "",
        "| file | " + " | ".join(DAMAGES) + " |",
        "|---" * (len(DAMAGES) + 1) + "|",
    ]
    for kind in KINDS:
        own_cells = {damage: found for each, damage, found in cells if each == kind}
        lines.append(f"| {kind} | " + " | ".join(own_cells[damage] for damage in DAMAGES) + " |")
    counts = collections.Counter(found.partition(":")[0] for _, found in others)
    lines += ["", f"{len(cells)} cells."]
    if others:
        told = ", ".join(f"{count} {found}" for found, count in sorted(counts.items()))
        lines.append(f"{len(others)} random damages: {told}.")
    if options.num_kills:
        found = kills(options.num_kills, draw)
        lines.append(f"{options.num_kills} SIGKILLs of `jdistill defend digits --smoke`: {found}.")
        others.append(("kills", found))
    if options.num_kills_of_two:
        found = kills(options.num_kills_of_two, draw, num_processes=2)
        lines.append(f"{options.num_kills_of_two} of two processes of it at once: {found}.")
        others.append(("kills of two processes", found))
    text = "\n".join(lines) + "\n"
    if options.output:
        runtime.atomic_write_text(options.output, text)
    print(text)
    wrong = [each for each in [*cells, *others] if each[-1].startswith("WRONG")]
    for each in wrong:
        print(*each)
    return len(wrong)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    options = tyro.cli(
        Options, prog="python -m experiments.reliability", description=__doc__, args=arguments
    )
    return min(1, run(options))


if __name__ == "__main__":
    runtime.run_main(main)
