"""A prepared run on an accelerator: is everything right there, and how fast is it?

    make device-reference                       # before, on a CPU with the pinned packages
    make device                                 # on the device's machine: at most 8 minutes
    python -m experiments.device run --size small --budget-s 1500      # to try it out on a CPU

It compares with a CPU's numbers, which the first command computes: the success flags of every
attack (with products in float32, as they always are, and then in TF32 and bf16, to show what these
would change), the losses of the first training steps, and the accuracies of a distillation chain.
Then it times steps, attacks and a sweep, and trains chains below full precision over several seeds.
A table is printed row by row, and `device.json` is written anew after every row, so a run that is
cut loses nothing. A part that fails does not stop the others; the exit code is 1 if anything
failed. Parts for which no time is left are skipped.

The device's machine needs Python 3.11 or newer, its own JAX, this checkout, the reference, and

    absl-py etils flax msgpack optax PyYAML rich typing_extensions

`make device-wheels` downloads them for Python 3.12 on x86-64 Linux; `pip install --no-index
--no-deps runs/device/wheels/*.whl` installs them there. It needs no network, TFDS or scikit-learn.
"""

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from experiments import device_checks, device_precisions, device_times
from experiments.bench.rows import table
from experiments.device_attacks import PRECISIONS
from experiments.device_checks import Reference, Row
from experiments.device_times import SIZES, Peak, Sizes
from jdistill import runtime

FOLDER = "runs/device"


class Run(NamedTuple):
    """Context of the parts.

    Attributes:
        reference: gives the CPU's numbers, or raises why there are none.
        sizes: of what is timed.
        peak: of the device; None where it is not known.
        deadline: of the part, by `time.monotonic`.
    """

    reference: Callable[[], Reference]
    sizes: Sizes
    peak: Peak | None
    deadline: float


class Part(NamedTuple):
    """A part of the run.

    Attributes:
        title: above its table.
        columns: of the table: the text of a row.
        rows: the part itself.
        least_s: it is not begun with fewer seconds left; about what it takes on a GPU.
        share: of the whole time, how much may be over when it ends, if it can tell.
    """

    title: str
    columns: Mapping[str, Callable[[Row], str]]
    rows: Callable[[Run], Iterator[Row]]
    least_s: float
    share: float = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run; the exit code."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    if options.command == "reference":
        jax.config.update("jax_platforms", "cpu")
        runtime.add_cpu_flags()
        try:
            device_checks.write_reference(
                options.output,
                names=options.attacks,
                num_images=options.images,
                say=functools.partial(print, flush=True),
            )
        except KeyboardInterrupt as error:
            error.args = ("stopped; nothing was written, a new run starts from the beginning",)
            raise
        return 0
    # What is compiled is to be timed, not read from a disk.
    jax.config.update("jax_enable_compilation_cache", False)
    runtime.add_cpu_flags()
    return run(options)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line; `--help` explains each."""
    # Not tyro, as the other programs have: a device's machine need not have it.
    parser = argparse.ArgumentParser(
        prog="python -m experiments.device",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reference = commands.add_parser("reference", help="compute the CPU's numbers")
    reference.add_argument("--output", default=f"{FOLDER}/reference.npz", help="the file to write")
    reference.add_argument("--attacks", nargs="*", default=(), help="only these (default: all)")
    reference.add_argument(
        "--images", type=int, default=device_checks.NUM_IMAGES, help="per network (%(default)s)"
    )
    command = commands.add_parser("run", help="check and time the device")
    command.add_argument("--reference", default=f"{FOLDER}/reference.npz", help="the CPU's numbers")
    command.add_argument("--output", default=FOLDER, help="folder of device.json (%(default)s)")
    command.add_argument(
        "--size", choices=SIZES, default="full", help="how much is timed (%(default)s)"
    )
    command.add_argument(
        "--budget-s", type=float, default=450.0, help="seconds for all parts (%(default)s)"
    )
    command.add_argument(
        "--parts", nargs="+", choices=PARTS, default=tuple(PARTS), metavar="PART",
        help=f"only these, of: {', '.join(PARTS)}",
    )  # fmt: skip
    command.add_argument(
        "--peak", nargs=3, type=float, metavar=("FLOAT32", "DEFAULT", "GBS"),
        help="the device's stated TFLOP/s in float32 and in JAX's default precision, and GB/s "
        "(default: those of its kind, where they are known)",
    )  # fmt: skip
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> int:
    """All parts; the exit code."""
    started = time.monotonic()
    output = pathlib.Path(options.output).expanduser() / "device.json"
    runtime.check_writable(output.parent, remedy="choose another --output")
    conditions = runtime.describe()
    kind = conditions["devices"][0]["kind"]
    peak = device_times.known_peak(kind)
    if options.peak:
        float32, default, gbs = options.peak
        peak = Peak(float32 * 1e12, default * 1e12, gbs * 1e9)
    reference = functools.cache(lambda: device_checks.read_reference(options.reference))
    parts: dict[str, dict[str, Any]] = {}
    record: dict[str, Any] = {
        "conditions": conditions,
        "size": options.size,
        "budget_s": options.budget_s,
        "peak": None if peak is None else peak._asdict(),
        "parts": parts,
    }
    save = functools.partial(runtime.write_json, output, record)
    versions = ", ".join(f"{name} {number}" for name, number in conditions["versions"].items())
    _say(f"* {kind}, {conditions['platform']}; size {options.size}\n* {versions}")
    try:
        against = reference().meta["versions"]
        record["reference"] = {"versions": against, "stale": device_checks.stale(reference())}
        _say(f"* the reference: jax {against['jax']}, on a CPU")
        if record["reference"]["stale"]:
            _say("* **the library has changed since the reference was made**")
    except Exception:
        pass  # every part that needs it says what is wrong
    for name in options.parts:
        part, elapsed = PARTS[name], time.monotonic() - started
        entry: dict[str, Any] = {"title": part.title, "status": "running", "rows": []}
        parts[name] = entry
        _say(f"\n## {part.title}\n")
        if options.budget_s - elapsed < part.least_s:
            entry["status"] = "skipped"
            _say(f"skipped: of {options.budget_s:g} s {elapsed:.0f} are over")
            save()
            continue
        deadline = started + options.budget_s * part.share
        subject = Run(reference, SIZES[options.size], peak, deadline)
        begun = time.monotonic()
        try:
            for row in part.rows(subject):
                if not entry["rows"]:
                    _say(_line(part.columns), _line(["---"] * len(part.columns)))
                entry["rows"].append(row)
                _say(_line([text(row) for text in part.columns.values()]))
                save()
            entry["status"] = "done"
        except KeyboardInterrupt as error:
            entry["status"] = "cut"
            error.args = (f"stopped; {output} holds what was done",)
            raise
        except Exception as error:
            entry["status"] = "failed"
            entry["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
            _say(f"failed: {entry['error']}")
        finally:
            entry["seconds"] = time.monotonic() - begun
            save()
        _say(f"\n{entry['seconds']:.0f} s")
    _say(f"\n## In short\n\n{_precision_table(parts)}")
    failures = failed(parts)
    record["failures"], record["seconds"] = failures, time.monotonic() - started
    save()
    skipped = [name for name, entry in parts.items() if entry["status"] == "skipped"]
    if skipped:
        _say(f"skipped: {', '.join(skipped)}")
    _say(f"failed: {'; '.join(failures)}" if failures else "every check that was made passed")
    _say(f"{record['seconds']:.0f} s; {output}")
    return 1 if failures else 0


def failed(parts: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Failures: parts that raised, and rows that did not pass."""
    found = []
    for name, entry in parts.items():
        if entry["status"] == "failed":
            found.append(f"{name} ({entry['error']})")
        for row in entry["rows"]:
            if row.get("passed") is False:
                found.append(f"{name}: {next(iter(row.values()))}")
    return found


# -------------------------------------------------------------------------------------------------
# Tables


def _number(key: str, form: str = ".3g") -> Callable[[Row], str]:
    """The text of a number in a row, a dash where there is none."""

    def text(row: Row) -> str:
        return "–" if row.get(key) is None else format(row[key], form)

    return text


def _attack_note(row: Row) -> str:
    if "equal" not in row:
        return row.get("error") or row["skipped"]
    different = ", ".join(map(str, row["different"][:5]))
    return f"{'differ' if row['passed'] is not False else '**differ**'}: {different}" * bool(
        different
    )


def _range(row: Row) -> str:
    low, high = row["ours_range_s"]
    return f"{low:.3g}–{high:.3g}"


def _megabytes(size: float | None) -> str:
    return "–" if size is None else f"{size:,.1f}"


def _rate(key: str) -> Callable[[Row], str]:
    def text(row: Row) -> str:
        return "–" if row[key] is None else f"{row[key] / 1e9:,.0f} G{row['unit']}"

    return text


_ATTACKS: Mapping[str, Callable[[Row], str]] = {
    "attack": lambda row: row["attack"],
    "examples": _number("examples", "d"),
    "ties": _number("ties", "d"),
    "success on the CPU": _number("success_cpu", ".0%"),
    "equal": _number("share", ".1%"),
    "other distances": _number("other_distances", "d"),
    "distance over the CPU's": _number("mean_distance_ratio", ".4f"),
    "note": _attack_note,
}
_TIMES: Mapping[str, Callable[[Row], str]] = {
    "what": lambda row: row["name"],
    "s": _number("ours_s"),
    "from–to": _range,
    "compile s": _number("compile_s", ".1f"),
    "success": _number("success", ".0%"),
    "peer": lambda row: row["peer"],
    "peer s": _number("theirs_s"),
    "ratio": _number("ratio", ".2f"),
}
_SWEEP: Mapping[str, Callable[[Row], str]] = {
    "what": lambda row: row["name"],
    "s": _number("ours_s"),
    "from–to": _range,
    "compile s": _number("compile_s", ".1f"),
    "MB": lambda row: _megabytes(row["facts"]["megabytes"][0]),
    "peer": lambda row: row["peer"],
    "peer s": _number("theirs_s"),
    "peer compile s": _number("theirs_compile_s", ".1f"),
    "peer MB": lambda row: _megabytes(row["facts"]["megabytes"][1]),
    "ratio": _number("ratio", ".2f"),
}
_PRECISIONS: Mapping[str, Callable[[Row], str]] = {
    "training in": lambda row: row["precision"],
    "what": lambda row: row["quantity"],
    "seeds": _number("seeds", "d"),
    "float32": _number("float32", ".4f"),
    "here": _number("here", ".4f"),
    "difference": _number("difference", "+.4f"),
    "95% interval": lambda row: (
        "–" if row["interval"] is None else "{:+.4f} to {:+.4f}".format(*row["interval"])
    ),
    "note": lambda row: row["note"],
}
_ROOFLINE: Mapping[str, Callable[[Row], str]] = {
    "what": lambda row: row["name"],
    "s": _number("ours_s"),
    "compile s": _number("compile_s", ".1f"),
    "rate": _rate("rate"),
    "stated": _rate("peak"),
    "of stated": _number("of_peak", ".1%"),
    "limit, measured": lambda row: row.get("limit", "–"),
    "of the limit": _number("achieved", ".1%"),
}


def _precision_table(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Attack by attack, how many flags are equal at each precision."""
    found: dict[str, dict[str, Row]] = {}
    for precision in PRECISIONS:
        for row in parts.get(_attacks_part(precision), {}).get("rows", ()):
            found.setdefault(row["attack"], {})[precision] = row
    if not found:
        return ""
    cells = []
    for name, rows in found.items():
        first = rows.get(PRECISIONS[0], {})
        equal = [_number("share", ".1%")(rows.get(precision, {})) for precision in PRECISIONS]
        counts = [_number(key, "d")(first) for key in ("examples", "ties")]
        cells.append([name, *counts, *equal])
    head = ["attack", "examples", "ties", *(f"equal at {precision}" for precision in PRECISIONS)]
    return table(head, sorted(cells))


def _line(cells: Sequence[str] | Mapping[str, Any]) -> str:
    return f"| {' | '.join(cells)} |"


def _say(*lines: str) -> None:
    print("\n".join(lines), flush=True)


# -------------------------------------------------------------------------------------------------
# The parts, most important first


def _attacks_part(precision: str) -> str:
    return "attacks" if precision == PRECISIONS[0] else f"attacks_{precision.lower()}"


def _attacks_at(precision: str, share: float) -> Part:
    return Part(
        f"Attacks, products at {precision}: success flags equal to a CPU's at full precision",
        _ATTACKS,
        lambda run: device_checks.check_attacks(run.reference(), precision, run.deadline),
        least_s=20,
        share=share,
    )


PARTS: dict[str, Part] = {
    "attacks": _attacks_at("highest", share=0.5),
    "logits": Part(
        "Largest difference of a logit from the CPU's, over the largest logit of its image",
        {
            "network": lambda row: row["network"],
            "precision": lambda row: row["precision"],
            "batch": _number("batch_size", "d"),
            "difference": _number("difference", ".1e"),
        },
        lambda run: device_checks.check_logits(run.reference()),
        least_s=20,
    ),
    "training": Part(
        "Loss of the first training steps, at full precision and at the device's default",
        {
            "step": _number("step", "d"),
            "CPU": _number("cpu", ".6f"),
            "full precision": _number("device", ".6f"),
            "relative difference": _number("difference", ".1e"),
            "default precision": _number("device_default", ".6f"),
        },
        lambda run: device_checks.check_training(run.reference()),
        least_s=20,
    ),
    "chain": Part(
        "Test accuracy along a distillation chain on the digits",
        {
            "generation": lambda row: row["generation"],
            "CPU": _number("cpu", ".2%"),
            "full precision": _number("device", ".2%"),
            "default precision": _number("device_default", ".2%"),
        },
        lambda run: device_checks.check_chain(run.reference()),
        least_s=20,
    ),
    "export": Part(
        "Networks written and read back: difference of a logit from the CPU's, over the largest",
        {
            "network": lambda row: row["network"],
            "read by": lambda row: row["read"],
            "save s": _number("save_s", ".2f"),
            "read s": _number("read_s", ".2f"),
            "difference": _number("difference", ".1e"),
        },
        lambda run: device_checks.check_export(run.reference()),
        least_s=20,
    ),
    "cache": Part(
        "Programs of a few training steps, compiled and then read from the cache on disk",
        {
            "compiled": _number("compiled", "d"),
            "read": _number("from_cache", "d"),
            "first s": _number("first_s", ".1f"),
            "second s": _number("second_s", ".1f"),
        },
        lambda run: device_checks.check_cache(),
        least_s=20,
    ),
    "steps": Part(
        "Seconds of a step", _TIMES, lambda run: device_times.training_step(run.sizes), 20
    ),
    "sweep": Part(
        "Seconds and memory of a sweep", _SWEEP, lambda run: device_times.sweep(run.sizes), 40
    ),
    "precisions": Part(
        "Training below full precision beside float32: chains on the digits, paired over seeds",
        _PRECISIONS,
        lambda run: device_precisions.compare(run.reference().digits, *run.sizes.precisions),
        60,
    ),
    "pgd": Part("Seconds of PGD", _TIMES, lambda run: device_times.pgd(run.sizes), 20),
    "roofline": Part(
        "Rates beside what the device's maker states",
        _ROOFLINE,
        lambda run: device_times.roofline(run.sizes, run.peak),
        30,
    ),
    "autoattack": Part(
        "Seconds of AutoAttack", _TIMES, lambda run: device_times.autoattack(run.sizes), 50
    ),
    "carlini_wagner": Part(
        "Seconds of Carlini & Wagner's attack",
        _TIMES,
        lambda run: device_times.carlini_wagner(run.sizes),
        40,
    ),
    "attacks_tf32": _attacks_at("TF32", share=1.0),
    "attacks_bf16": _attacks_at("bf16", share=1.0),
}

if __name__ == "__main__":
    runtime.run_main(main)
