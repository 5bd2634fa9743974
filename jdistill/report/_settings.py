"""The settings and the machine of a run, as a list of names and values."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath


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
