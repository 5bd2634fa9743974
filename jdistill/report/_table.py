"""The rows of a workdir: `results.csv`, and the networks that the rows describe.

`COLUMNS` is the format. Everything else in this package reads rows through `networks`, which
averages the seeds and sorts, so that the table, the figures and the words agree.
"""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from etils import epath

from jdistill._files import PathLike, as_path, write_whole

Row = Mapping[str, Any]

COLUMNS = (
    "dataset",
    "temperature",
    "seed",
    "generation",
    "num_test",
    "test_accuracy",
    "test_accuracy_low",
    "test_accuracy_high",
    "mean_abs_logit",
    "num_sensitivity",
    "sensitivity_logits",
    "log10_sensitivity_softmax",
    "zero_gradient_fraction",
    "attack",
    "norm",
    "eps",
    "num_attacked",
    "success_rate",
    "success_rate_low",
    "success_rate_high",
    "mean_distance",
    "median_distance",
    "mean_queries",
)
_TEXT = frozenset({"dataset", "attack", "norm"})
_WHOLE = frozenset({"seed", "generation", "num_test", "num_sensitivity", "num_attacked"})
_NEEDED = ("dataset", "temperature", "seed", "generation")
_SHARES = frozenset(
    {
        *("test_accuracy", "test_accuracy_low", "test_accuracy_high", "zero_gradient_fraction"),
        *("success_rate", "success_rate_low", "success_rate_high"),
    }
)
_KEY = (*_NEEDED, "attack", "norm", "eps")


def write_results(path: PathLike, rows: Iterable[Row]) -> epath.Path:
    """Writes rows as CSV: sorted, whole or not at all, the same bytes for the same values.

    Floats are written with the fewest digits that read back as the same float. None and NaN (no
    `eps`, no distance because nothing succeeded) are blank. Columns beyond `COLUMNS` follow them
    in alphabetical order.

    Args:
        path: The file to write; its folder is made.
        rows: One mapping per (dataset, temperature, seed, generation, attack), with at least
            `COLUMNS`. Rates and shares are in [0, 1], distances in units of the input.

    Returns:
        The path.

    Raises:
        ValueError: A row lacks a column, a number is none or out of its range, or two rows
            describe the same attack on the same network. Nothing is written.
    """
    rows = checked(rows)
    extra = sorted({name for row in rows for name in row} - set(COLUMNS))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *extra])
    for row in sorted(rows, key=_sort_key):
        writer.writerow([_to_cell(name, row.get(name)) for name in (*COLUMNS, *extra)])
    return write_whole(path, text.getvalue().encode())


def read_results(path: PathLike) -> list[dict[str, Any]]:
    """Reads what `write_results` wrote: numbers as int and float, blanks as None.

    Args:
        path: A `results.csv`.

    Returns:
        One dictionary a row, in the file's order. Columns beyond `COLUMNS` are kept, as numbers
        where every filled cell is one and as text otherwise.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a cell of a number column is no number; the message
            names the line.
    """
    source = as_path(path)
    # Decoded at once, and split by the csv module: a bucket opens no file by lines of its choice.
    reader = csv.DictReader(io.StringIO(source.read_bytes().decode(), newline=""))
    header = reader.fieldnames or ()
    missing = [name for name in COLUMNS if name not in header]
    if missing:
        raise ValueError(
            f"expected the columns of jdistill.report.COLUMNS in {source}, got none named "
            f"{', '.join(missing)}; write the file with jdistill.report.write_results"
        )
    lines = [(reader.line_num, line) for line in reader]
    extra = [name for name in header if name not in COLUMNS]
    text = {name for name in extra if not all(_is_number(line[name]) for _, line in lines)}
    return [
        {name: _from_cell(source, number, name, line[name], text) for name in header}
        for number, line in lines
    ]


def checked(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The rows as a list of dictionaries, after the checks that `write_results` documents."""
    checked_rows = [dict(row) for row in rows]
    seen: set[tuple[Any, ...]] = set()
    for index, row in enumerate(checked_rows):
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise ValueError(
                f"expected rows with the columns of jdistill.report.COLUMNS, got row {index} "
                f"without {', '.join(missing)}; add them, None where there is no value"
            )
        for name in _NEEDED:
            if _blank(row[name]):
                raise ValueError(
                    f"expected {name} in every row, got {row[name]!r} in row {index}; "
                    "it says which network the row describes"
                )
        _check_numbers(index, row)
        key = _sort_key(row)
        if key in seen:
            raise ValueError(
                "expected one row per dataset, temperature, seed, generation and attack, got two "
                f"for {', '.join(f'{name}={row[name]}' for name in _KEY)}; drop one, or name the "
                "attacks apart"
            )
        seen.add(key)
    return checked_rows


def _check_numbers(index: int, row: Row) -> None:
    for name in COLUMNS:
        value = row[name]
        if name in _TEXT or _blank(value):
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if math.isnan(number):
            wanted, remedy = "to be a number", "pass a number, or None where there is no value"
        elif name in _WHOLE and not number.is_integer():
            wanted, remedy = "to be a whole number", "pass an int"
        elif name in _SHARES and not 0 <= number <= 1:
            wanted, remedy = "in [0, 1]", "it is a share: divide percent by 100"
        elif name == "temperature" and not 0 < number < math.inf:
            wanted, remedy = "> 0", "pass the temperature that the network was trained at"
        else:
            continue
        raise ValueError(f"expected {name} {wanted}, got {value!r} in row {index}; {remedy}")


def _blank(value: Any) -> bool:
    return value is None or value == "" or (not isinstance(value, str) and math.isnan(value))


def _is_number(cell: str) -> bool:
    try:
        float(cell or "0")
    except ValueError:
        return False
    return True


def _sort_key(row: Row) -> tuple[Any, ...]:
    values: list[Any] = []
    for name in _KEY:
        value = row[name]
        if name in _TEXT:
            values.append(str(value or ""))
        else:
            values.append(-math.inf if _blank(value) else float(value))
    return tuple(values)


def _to_cell(name: str, value: Any) -> str:
    if _blank(value):
        return ""
    if name in _TEXT or isinstance(value, str):
        return str(value)
    if name in _WHOLE:
        return str(int(value))
    if name not in COLUMNS and float(value).is_integer():
        return str(int(value))
    return repr(float(value))


def _from_cell(path: epath.Path, line: int, name: str, cell: str | None, text: set[str]) -> Any:
    if not cell:
        return None
    if name in _TEXT or name in text:
        return cell
    try:
        return int(cell) if name in _WHOLE else float(cell)
    except ValueError:
        kind = "a whole number" if name in _WHOLE else "a number"
        raise ValueError(
            f"expected {kind} in column {name} of {path}, got {cell!r} in line {line}; "
            "repair that line, or delete the file and run the evaluation again"
        ) from None


# --- What the rows describe ----------------------------------------------------------------------


class AttackKey(NamedTuple):
    """What tells two attacks of a report apart; `eps` is None for a minimum-norm attack."""

    attack: str
    norm: str
    eps: float | None


@dataclass(frozen=True)
class Stat:
    """One quantity of one network.

    Attributes:
        mean: The mean over seeds; NaN where nothing was measured.
        low: With several seeds the lowest of them; with one, the lower end of its 95 % interval
            (the value itself where there is no interval).
        high: The upper end, likewise.
        seeds: How many seeds have a value.
    """

    mean: float
    low: float
    high: float
    seeds: int

    @property
    def spread(self) -> float:
        """How far the seed furthest from the mean lies from it; 0 with one seed."""
        return max(self.mean - self.low, self.high - self.mean) if self.seeds > 1 else 0.0

    @property
    def known(self) -> bool:
        """Whether there is a number to show."""
        return math.isfinite(self.mean)


@dataclass(frozen=True)
class Attacked:
    """One attack on one network, over its seeds; `interval` is 95 %, averaged over seeds."""

    key: AttackKey
    num_attacked: int
    success: Stat
    interval: tuple[float, float]
    mean_distance: Stat
    median_distance: Stat
    mean_queries: Stat


@dataclass(frozen=True)
class Network:
    """One generation of a chain at one temperature, over its seeds.

    Attributes:
        generation: 0 is the teacher, `g` the student of `g - 1` assistants.
        is_last: Whether the chain ends here; the generations in between are its assistants.
        attacks: The attacks made on it, in the order of `attack_keys`.
    """

    dataset: str
    temperature: float
    generation: int
    is_last: bool
    seeds: tuple[int, ...]
    num_test: int
    accuracy: Stat
    mean_abs_logit: Stat
    num_sensitivity: int
    sensitivity_logits: Stat
    log10_sensitivity_softmax: Stat
    zero_gradients: Stat
    attacks: dict[AttackKey, Attacked]

    @property
    def role(self) -> str:
        """Teacher, assistant or student: what the network is in the longest chain that has it."""
        if self.generation == 0:
            return "teacher"
        return "student" if self.is_last else f"assistant {self.generation}"


def networks(rows: Iterable[Row]) -> list[Network]:
    """The networks that the rows describe, sorted by dataset, temperature and generation.

    Args:
        rows: As for `write_results`. A row whose `attack` is blank describes a network that was
            not attacked.

    Returns:
        One `Network` for each dataset, temperature and generation, averaged over its seeds.

    Raises:
        ValueError: As `write_results`; or there is no row.
    """
    groups: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for row in sorted(checked(rows), key=_sort_key):
        where = (str(row["dataset"]), float(row["temperature"]), int(row["generation"]))
        groups.setdefault(where, []).append(row)
    if not groups:
        raise ValueError("expected at least one row of results, got none; run an evaluation first")
    last: dict[tuple[str, float], int] = {}
    for dataset, temperature, generation in groups:
        chain = (dataset, temperature)
        last[chain] = max(last.get(chain, 0), generation)
    return [
        _network(*where, generation_last=last[where[:2]], rows=group)
        for where, group in sorted(groups.items())
    ]


def _network(
    dataset: str,
    temperature: float,
    generation: int,
    *,
    generation_last: int,
    rows: list[dict[str, Any]],
) -> Network:
    # What was measured once for a network stands in each of its attacks' rows: one row a seed.
    by_seed = list({int(row["seed"]): row for row in rows}.values())
    by_attack: dict[AttackKey, list[dict[str, Any]]] = {}
    for row in rows:
        if not _blank(row["attack"]):
            by_attack.setdefault(_attack_key(row), []).append(row)
    return Network(
        dataset=dataset,
        temperature=temperature,
        generation=generation,
        is_last=generation == generation_last,
        seeds=tuple(sorted(int(row["seed"]) for row in by_seed)),
        num_test=_most(by_seed, "num_test"),
        accuracy=_stat(by_seed, "test_accuracy", interval=True),
        mean_abs_logit=_stat(by_seed, "mean_abs_logit"),
        num_sensitivity=_most(by_seed, "num_sensitivity"),
        sensitivity_logits=_stat(by_seed, "sensitivity_logits"),
        log10_sensitivity_softmax=_stat(by_seed, "log10_sensitivity_softmax"),
        zero_gradients=_stat(by_seed, "zero_gradient_fraction"),
        attacks={
            key: Attacked(
                key=key,
                num_attacked=_most(by_attack[key], "num_attacked"),
                success=_stat(by_attack[key], "success_rate", interval=True),
                interval=(
                    _mean(_values(by_attack[key], "success_rate_low")),
                    _mean(_values(by_attack[key], "success_rate_high")),
                ),
                mean_distance=_stat(by_attack[key], "mean_distance"),
                median_distance=_stat(by_attack[key], "median_distance"),
                mean_queries=_stat(by_attack[key], "mean_queries"),
            )
            for key in sorted(by_attack, key=_attack_order)
        },
    )


def attack_keys(found: Sequence[Network]) -> list[AttackKey]:
    """Every attack made on any of the networks: budgeted ones first, then minimum-norm ones."""
    return sorted({key for network in found for key in network.attacks}, key=_attack_order)


def _attack_key(row: Row) -> AttackKey:
    # A budget kept as float32 and the same one kept as float64 are one budget.
    eps = None if _blank(row["eps"]) else float(f"{float(row['eps']):.6g}")
    return AttackKey(str(row["attack"]), str(row["norm"] or ""), eps)


def _attack_order(key: AttackKey) -> tuple[Any, ...]:
    return key.eps is None, key.norm != "linf", key.norm, key.attack, key.eps or 0.0


def _values(rows: list[dict[str, Any]], name: str) -> list[float]:
    values = (math.nan if _blank(row[name]) else float(row[name]) for row in rows)
    return [value for value in values if math.isfinite(value)]


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _most(rows: list[dict[str, Any]], name: str) -> int:
    return int(max(_values(rows, name), default=0))


def _stat(rows: list[dict[str, Any]], name: str, *, interval: bool = False) -> Stat:
    values = _values(rows, name)
    low, high = values, values
    if interval and len(values) == 1:
        low = _values(rows, f"{name}_low") or values
        high = _values(rows, f"{name}_high") or values
    return Stat(
        mean=_mean(values),
        low=min(low, default=math.nan),
        high=max(high, default=math.nan),
        seeds=len(values),
    )
