"""`verdicts.json`: the masking verdict of each network, and its evidence.

The verdicts are plain dictionaries, as `jdistill.diagnose.Verdict.as_dict` gives them; what is read
is checked, because a report of a half-understood verdict would be worse than none. Of its attacks
`access` and `follows` may be missing: then nothing is said of what they use and climb.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from jdistill._files import PathLike, as_path, read_whole, write_whole
from jdistill.report import _text
from jdistill.report._networks import Network, Stat, budget_of, widest
from jdistill.report._table import NETWORK, Row, blank, listed

LABELS = ("masked", "inconclusive", "no sign of masking")
OUTCOMES = ("masked", "clear", "undecided", "not run")
_NEEDED = (
    *("label", "reason", "naive", "worst_case", "clean", "eps", "norm", "num_examples"),
    *("num_nonfinite", "attacks", "checks", "budget"),
)
_CHECK = ("name", "title", "outcome", "figures", "threshold", "finding", "source")
_ATTACK = ("name", "robust_accuracy", "settings")
_INTERVAL = ("value", "low", "high")
_AGAIN = "write it again with the verdicts of this version of jdistill.diagnose"


def write_verdicts(path: PathLike, verdicts: Iterable[Row]) -> epath.Path:
    """Writes `verdicts.json`: sorted, whole or not at all, the same bytes for the same values.

    Args:
        path: The file to write; its folder is made.
        verdicts: One mapping per network with `dataset`, `temperature`, `seed`, `generation` and
            `verdict`, a `jdistill.diagnose.Verdict.as_dict()`.

    Returns:
        The path.

    Raises:
        ValueError: A verdict lacks something, a number is NaN or infinite, a label or an outcome
            is unknown, or two verdicts are about the same network and budget. Nothing is written.
    """
    rows = [
        {**{name: row[name] for name in (*NETWORK, "verdict")}, **row}
        for row in sorted(checked_verdicts(verdicts), key=_key)
    ]
    text = json.dumps(rows, indent=1, allow_nan=False, ensure_ascii=False)
    return write_whole(path, f"{text}\n".encode())


def read_verdicts(path: PathLike) -> list[dict[str, Any]]:
    """Reads what `write_verdicts` wrote.

    Args:
        path: A `verdicts.json`.

    Returns:
        One dictionary per network, as `write_verdicts` takes them.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is no JSON, or as `write_verdicts`; the message names the file.
    """
    source = as_path(path)
    try:
        rows = json.loads(read_whole(source).decode())
    except ValueError as error:
        raise ValueError(
            f"expected JSON in {source}, got text that is none ({error}); delete the file and run "
            "the evaluation again"
        ) from None
    if not isinstance(rows, list):
        raise ValueError(
            f"expected a list of verdicts in {source}, got a {type(rows).__name__}; {_AGAIN}"
        )
    return checked_verdicts(rows, f"of {source}")


def checked_verdicts(verdicts: Iterable[Row], source: str = "") -> list[dict[str, Any]]:
    """The verdicts as a list of dictionaries, after the checks of `write_verdicts`."""
    rows, seen = [], set()
    for index, row in enumerate(listed(verdicts, "verdicts")):
        place = f"verdict {index} {source}".rstrip()
        _fields(row, (*NETWORK, "verdict"), place)
        for name in NETWORK:
            if name != "dataset":
                _number(row[name], f"{name} of {place}")
        _check_verdict(row["verdict"], place)
        key = _key(row)
        if key in seen:
            raise ValueError(
                f"expected one verdict per network, norm and eps, got two for "
                f"{', '.join(f'{name}={row[name]}' for name in NETWORK)} ({place}); drop one"
            )
        seen.add(key)
        rows.append(dict(row))
    return rows


def _key(row: Row) -> tuple[Any, ...]:
    found = row["verdict"]
    numbers = [float(row[name]) for name in NETWORK[1:]]
    return (
        str(row["dataset"]),
        str(row.get("chain") or ""),
        *numbers,
        str(found["norm"]),
        float(found["eps"]),
    )


def _check_verdict(verdict: Any, place: str) -> None:
    _fields(verdict, _NEEDED, place)
    _choice(verdict["label"], LABELS, f"the label of {place}")
    for name in ("naive", "worst_case", "clean"):
        _interval(verdict[name], f"{name} of {place}")
    for name in ("eps", "num_examples", "num_nonfinite"):
        _number(verdict[name], f"{name} of {place}")
    for part in ("attacks", "checks"):
        if not isinstance(verdict[part], Sequence) or isinstance(verdict[part], str):
            raise ValueError(
                f"expected a list of {part} in {place}, got {verdict[part]!r}; {_AGAIN}"
            )
    for attack in verdict["attacks"]:
        _fields(attack, _ATTACK, f"an attack of {place}")
        _interval(attack["robust_accuracy"], f"the attack {attack['name']} of {place}")
    for check in verdict["checks"]:
        _fields(check, _CHECK, f"a check of {place}")
        where = f"the check {check['name']} of {place}"
        _choice(check["outcome"], OUTCOMES, f"the outcome of {where}")
        _fields(check["figures"], (), f"the figures of {where}")
        for name, value in check["figures"].items():
            if value is not None:
                _number(value, f"{name} of {where}")


def _fields(value: Any, names: Sequence[str], place: str) -> None:
    if not isinstance(value, Mapping):
        raise ValueError(f"expected a mapping for {place}, got {value!r}; {_AGAIN}")
    missing = [
        name for name in names if name not in value or (name in NETWORK and not _is(value, name))
    ]
    if missing:
        raise ValueError(f"expected {', '.join(missing)} in {place}, got none; {_AGAIN}")


def _is(value: Mapping[str, Any], name: str) -> bool:
    return value[name] is not None and value[name] != ""


def _choice(value: Any, choices: Sequence[str], place: str) -> None:
    if value not in choices:
        raise ValueError(
            f"expected {place} to be one of {', '.join(choices)}, got {value!r}; {_AGAIN}"
        )


def _interval(value: Any, place: str) -> None:
    _fields(value, _INTERVAL, place)
    for end in _INTERVAL:
        if value[end] is None and end != "value":
            continue
        _number(value[end], f"{end} of {place}")
        if not 0 <= value[end] <= 1:
            raise ValueError(
                f"expected {end} of {place} in [0, 1], got {value[end]!r}; it is a share: divide "
                "percent by 100"
            )


def _number(value: Any, place: str) -> None:
    # Infinite is no number here either: JSON has neither, and no verdict needs them.
    if isinstance(value, str) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"expected {place} to be a finite number, got {value!r}; {_AGAIN}")


# --- What the verdicts say of each network -------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """The verdicts on one network at one budget, over its seeds.

    Attributes:
        network: The network.
        norm: The norm of the budget.
        eps: The budget.
        seeds: The seeds that were judged.
        verdicts: Their verdicts, in the same order.
        naive: Accuracy under the usual attack.
        worst_case: The share of examples that no attack of the verdict broke.
        clean: Accuracy on the same examples without an attack.
    """

    network: Network
    norm: str
    eps: float
    seeds: tuple[int, ...]
    verdicts: tuple[Mapping[str, Any], ...]
    naive: Stat
    worst_case: Stat
    clean: Stat

    @property
    def labels(self) -> tuple[str, ...]:
        """The label of each seed."""
        return tuple(str(verdict["label"]) for verdict in self.verdicts)

    @property
    def label(self) -> str:
        """The gravest label of any seed: one masked network is enough not to trust the number."""
        return min(self.labels, key=LABELS.index)

    @property
    def shown(self) -> int:
        """The position of the first seed with that label, whose evidence the report shows."""
        return self.labels.index(self.label)

    @property
    def budget(self) -> str:
        """The norm and its bound, as the report writes them."""
        return f"{_text.norm_name(self.norm)} ≤ {_text.eps_text(self.eps)}"

    @property
    def num_examples(self) -> int:
        """How many examples a verdict rests on."""
        return int(self.verdicts[0]["num_examples"])


def judge(found: Sequence[Network], verdicts: Iterable[Row]) -> list[Judged]:
    """The verdicts by network, in the networks' order, at the budget that most of them have.

    Args:
        found: The networks of the rows.
        verdicts: As for `write_verdicts`, about these networks.

    Returns:
        One `Judged` per judged network.
    """
    rows = checked_verdicts(verdicts)
    budgets = [(str(row["verdict"]["norm"]), budget_of(row["verdict"]["eps"])) for row in rows]
    if not rows:
        return []
    norm, eps = max(dict.fromkeys(budgets), key=budgets.count)
    judged = []
    for network in found:
        own = [
            row
            for row, budget in zip(rows, budgets, strict=True)
            if budget == (norm, eps) and is_of(row, network)
        ]
        if own:
            own.sort(key=lambda row: int(row["seed"]))
            judged.append(_judged(network, norm, eps or 0.0, own))
    return judged


def _judged(network: Network, norm: str, eps: float, rows: list[dict[str, Any]]) -> Judged:
    stats = {
        name: widest([row["verdict"][name] for row in rows], "value")
        for name in ("naive", "worst_case", "clean")
    }
    return Judged(
        network=network,
        norm=norm,
        eps=eps,
        seeds=tuple(int(row["seed"]) for row in rows),
        verdicts=tuple(row["verdict"] for row in rows),
        **stats,
    )


def is_of(row: Row, network: Network, generation: str = "generation") -> bool:
    """Whether a row is about this network, at whatever seed."""
    return (
        str(row["dataset"]) == network.dataset
        and float(row["temperature"]) == network.temperature
        and not blank(row[generation])
        and int(row[generation]) == network.generation
    )
