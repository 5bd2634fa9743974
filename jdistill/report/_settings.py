"""The settings and the machine of a run, as a list of names and values."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from jdistill.report._networks import Network


def read_json(path: epath.Path) -> dict[str, Any]:
    """A JSON file of the run; nothing where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"expected JSON in {path}, got text that is none ({error}); repair or delete the file"
        ) from None
    return value if isinstance(value, dict) else {"value": value}


def flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as a list of names and values."""
    lines: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            lines += flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(v, Mapping) for v in value):
            numbered = {str(number): item for number, item in enumerate(value, start=1)}
            lines += flat(numbered, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            lines.append((f"{prefix}{name}", ", ".join(_plain(item) for item in value) or "none"))
        else:
            lines.append((f"{prefix}{name}", _plain(value)))
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.6g}"
    return str(value)


def glance(found: Sequence[Network], run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What somebody needs first who wants to run it again; only what was recorded."""
    seeds = sorted({seed for net in found for seed in net.seeds})
    lines = [("seeds", ", ".join(map(str, seeds)))]
    versions = run.get("versions")
    if isinstance(versions, Mapping):
        names = [name for name in ("jdistill", "jax", "flax", "python") if name in versions]
        lines.append(("versions", ", ".join(f"{name} {versions[name]}" for name in names)))
    devices = run.get("devices")
    if isinstance(devices, (list, tuple)) and all(isinstance(d, Mapping) for d in devices):
        texts = [f"{d.get('count', 1)} × {d.get('kind', d.get('platform', '?'))}" for d in devices]
        lines.append(("devices", ", ".join(texts)))
    if "matmul_precision" in run:
        precision = run["matmul_precision"]
        text = f"matrix products at {precision}"
        if precision is None:
            text = "measured at full float32 precision, trained at the device's default"
        lines.append(("precision", f"{text}{', x64 enabled' if run.get('x64') else ''}"))
    if isinstance(run.get("seconds"), (int, float)):
        lines.append(("wall time", duration(float(run.get("seconds_all_starts", run["seconds"])))))
    return lines


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(3.2), duration(75.0), duration(3210.8), duration(7322.0)
    ('3.2 s', '1 min 15 s', '53 min 31 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
