"""`verdicts.json`: the masking verdict on each network, and its evidence."""

import json
from collections.abc import Iterable
from typing import Any

from etils import epath

from jdistill._files import PathLike, as_path, read_whole, write_whole
from jdistill.diagnose import Verdict
from jdistill.report._table import NETWORK, Row, blank, listed

_AGAIN = "delete the file and run the evaluation again"


def write_verdicts(path: PathLike, verdicts: Iterable[Row]) -> epath.Path:
    """Writes `verdicts.json`: sorted, whole or not at all, the same bytes for the same values.

    Args:
        path: the file to write; its folder is made.
        verdicts: one mapping per network with `dataset`, `temperature`, `seed`, `generation`,
            where there are several `chain`, and `verdict`, a `jdistill.diagnose.Verdict`.

    Returns:
        The path.

    Raises:
        ValueError: a network is not named, a value is no verdict, or two verdicts are about the
            same network and radius. Nothing is written.

    Example:
        >>> import tempfile
        >>> from jdistill import diagnose, metrics
        >>> share = metrics.proportion(4, 8)
        >>> verdict = diagnose.Verdict(  # `diagnose.masking` makes them
        ...     label="no sign of masking", reason="nothing was found", naive=share,
        ...     worst_case=share, clean=share, eps=0.1, norm="linf", num_examples=8,
        ...     num_nonfinite=0, attacks=(), checks=(), budget="PGD")
        >>> row = {"dataset": "mine", "temperature": 1.0, "seed": 0, "generation": 0}
        >>> path = tempfile.mkdtemp() + "/verdicts.json"
        >>> _ = write_verdicts(path, [{**row, "verdict": verdict}])
        >>> read_verdicts(path)[0]["verdict"].label
        'no sign of masking'
    """
    rows = sorted(_checked(verdicts, "verdicts"), key=_key)
    plain = [{**row, "verdict": row["verdict"].as_dict()} for row in rows]
    text = json.dumps(plain, indent=1, allow_nan=False, ensure_ascii=False)
    return write_whole(path, f"{text}\n".encode())


def read_verdicts(path: PathLike) -> list[dict[str, Any]]:
    """Reads what `write_verdicts` wrote.

    Args:
        path: a `verdicts.json`.

    Returns:
        One dictionary per network, as `write_verdicts` takes them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no JSON, or as `write_verdicts`; the message names the file.

    Example:
        >>> import tempfile
        >>> path = write_verdicts(tempfile.mkdtemp() + "/verdicts.json", [])  # none was judged
        >>> read_verdicts(path)
        []
    """
    source = as_path(path)
    try:
        rows = json.loads(read_whole(source).decode())
    except ValueError as error:
        raise ValueError(
            f"expected JSON in {source}, got text that is none ({error}); {_AGAIN}"
        ) from None
    found = [dict(row) for row in listed(rows, f"the verdicts of {source}")]
    for place, row in enumerate(found):
        try:
            row["verdict"] = Verdict.from_dict(row.get("verdict", {}))
        except ValueError as error:
            raise ValueError(f"{error} (verdict {place} of {source})") from None
    return _checked(found, f"the verdicts of {source}")


def _checked(verdicts: Iterable[Row], what: str) -> list[dict[str, Any]]:
    rows, seen = [], set()
    for place, row in enumerate(listed(verdicts, what)):
        missing = [name for name in (*NETWORK, "verdict") if blank(row.get(name))]
        if missing:
            raise ValueError(
                f"expected {', '.join(missing)} in verdict {place} of {what}, got none; name the "
                "network that it is on"
            )
        if not isinstance(row["verdict"], Verdict):
            raise ValueError(
                f"expected a diagnose.Verdict in verdict {place} of {what}, got "
                f"{type(row['verdict']).__name__}; pass what diagnose.masking returned"
            )
        try:
            key = _key(row)
        except (TypeError, ValueError):
            raise ValueError(
                f"expected numbers as {', '.join(NETWORK[1:])} of verdict {place} of {what}, got "
                f"{[row[name] for name in NETWORK[1:]]}; pass numbers"
            ) from None
        if key in seen:
            raise ValueError(
                f"expected one verdict per network, norm and eps, got two for {key}; drop one"
            )
        seen.add(key)
        rows.append(dict(row))
    return rows


def _key(row: Row) -> tuple[Any, ...]:
    chain = "" if blank(row.get("chain")) else str(row["chain"])
    numbers = [float(row[name]) for name in NETWORK[1:]]
    return str(row["dataset"]), chain, *numbers, row["verdict"].norm, float(row["verdict"].eps)
