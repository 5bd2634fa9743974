"""The tables of a workdir as CSV files: typed columns, checked when written and when read.

`TABLES` is the format: the columns of each kind of table. A kind's file is `<kind>.csv`.
"""

import csv
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np
from etils import epath

from jdistill import _validate
from jdistill._files import PathLike, as_path, read_whole, write_whole

Row = Mapping[str, Any]

NETWORK = ("dataset", "temperature", "seed", "generation")
COLUMNS = (
    *NETWORK,
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
# Rows may also name the chain of their network (`chain`), where there are several of a data set.

#: What rows may say of their attack: fields of `jdistill.attacks.Traits`. A report of rows that
#: lack them, or of an attack that is not known, is neutral where it would need them.
FACTS = ("title", "access", "follows", "minimum_norm", "handicap", "freedom")
#: What rows may say of how their network was trained (`training`): on adversarial examples, by an
#: objective that is not the library's, or it came trained. Rows of ordinary training are without.
TRAININGS = ("adversarial", "custom", "unknown")
_TEXT = frozenset(
    {
        *("dataset", "chain", "baseline_chain", "teacher_chain", "attack", "norm", "curve"),
        *("quantity", "test", "backend", "device", "export", "training", *FACTS),
    }
)
_TEXT -= {"minimum_norm"}
_SHARE = frozenset(
    {
        *("test_accuracy", "test_accuracy_low", "test_accuracy_high", "zero_gradient_fraction"),
        *("success_rate", "success_rate_low", "success_rate_high", "robust_accuracy"),
        *("mean_confidence", "ece", "p_value", "logits_cka"),
        *("top1_agreement", "top1_agreement_low", "top1_agreement_high"),
        *("repeated_mistakes", "repeated_mistakes_low", "repeated_mistakes_high"),
    }
)
_AMOUNTS = (
    *("num_test", "num_sensitivity", "num_attacked", "num_examples", "num_teacher_mistakes"),
    *("count", "parameters", "weights_bytes", "program_bytes", "num_calls"),
)
_MILLISECONDS = ("milliseconds_per_image_batch_1", "milliseconds_per_image_batch_128")
_WHOLE = frozenset(
    {
        *("seed", "generation", "source_generation", "target_generation", "baseline_generation"),
        "teacher_generation",
        *_AMOUNTS,
        "minimum_norm",  # 1 or 0
    }
)


@dataclass(frozen=True)
class _Format:
    """Format of a kind of table.

    Attributes:
        columns: The columns, in the file's order.
        key: The columns that tell two rows apart; rows are sorted by them.
        blank: The columns that may be blank (None, NaN or an empty cell).
        shares: The columns in [0, 1], beside those that are in every kind of table.
        differences: The columns in [-1, 1], differences of shares.
        choices: The texts that a column may hold, where they are limited.
        optional: The columns that a table may have beside these.
        more: Whether any further columns are kept.
    """

    columns: tuple[str, ...]
    key: tuple[str, ...]
    blank: frozenset[str]
    shares: frozenset[str] = frozenset()
    differences: frozenset[str] = frozenset()
    choices: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    more: bool = False


_CHAINS = ("chain", "baseline_chain", "teacher_chain")
_ENDS = frozenset({"low", "high"})
_FORMATS = {
    "results": _Format(
        columns=COLUMNS,
        key=(*NETWORK, "attack", "norm", "eps"),
        blank=frozenset(COLUMNS) - set(NETWORK),
        choices={
            "access": ("gradient", "scores", "decisions"),
            "follows": ("softmax", "logits"),
            "training": TRAININGS,
        },
        optional=("chain", "training", *FACTS),
        more=True,
    ),
    "curves": _Format(
        columns=(
            *(*NETWORK, "curve", "attack", "norm", "eps", "x"),
            *("robust_accuracy", "low", "high", "num_examples"),
        ),
        key=(*NETWORK, "curve", "attack", "norm", "eps", "x"),
        blank=_ENDS | {"eps"},
        shares=_ENDS,
        choices={"curve": ("eps", "steps", "queries")},
        optional=("chain", "title"),
    ),
    "transfer": _Format(
        columns=(
            *("dataset", "temperature", "seed", "source_generation", "target_generation"),
            *("attack", "norm", "eps", "num_examples", "success_rate", "low", "high"),
        ),
        key=(
            *("dataset", "temperature", "seed", "source_generation", "target_generation"),
            *("attack", "norm", "eps"),
        ),
        blank=_ENDS | {"eps"},
        shares=_ENDS,
        optional=("chain", "title"),
    ),
    "sensitivity": _Format(
        columns=(*NETWORK, "low", "high", "count"),
        key=(*NETWORK, "low", "high"),
        blank=_ENDS,
        optional=("chain",),
    ),
    "calibration": _Format(
        columns=(*NETWORK, "ece", "nll", "brier", "mean_confidence", "num_examples"),
        key=NETWORK,
        blank=frozenset(),
        optional=("chain",),
    ),
    "agreement": _Format(
        columns=(
            *(*NETWORK, "teacher_generation", "num_examples"),
            *("top1_agreement", "top1_agreement_low", "top1_agreement_high"),
            "num_teacher_mistakes",
            *("repeated_mistakes", "repeated_mistakes_low", "repeated_mistakes_high"),
            *("mean_kl", "logits_cka"),
        ),
        key=(*NETWORK, "teacher_generation"),
        blank=frozenset(
            {
                *("repeated_mistakes", "repeated_mistakes_low", "repeated_mistakes_high"),
                "logits_cka",
            }
        ),
        optional=("chain", "teacher_chain"),
    ),
    "deployment": _Format(
        columns=(
            *(*NETWORK, "parameters", "share_of_first", "weights_bytes", "program_bytes"),
            *(*_MILLISECONDS, "num_calls", "backend", "device", "export"),
        ),
        key=NETWORK,
        blank=frozenset({"share_of_first"}),
        optional=("chain",),
    ),
    "distances": _Format(
        columns=(*NETWORK, "norm", "attack", "success_rate", "mean", "median", "num_examples"),
        key=(*NETWORK, "norm", "attack"),
        blank=frozenset({"mean", "median"}),
        optional=("chain", "title"),
    ),
    "comparisons": _Format(
        columns=(
            *("dataset", "temperature", "seed", "quantity", "generation", "baseline_generation"),
            *("difference", "low", "high", "p_value", "num_examples", "test"),
        ),
        key=(
            *("dataset", "temperature", "quantity", "generation", "baseline_generation"),
            *("seed", "test"),
        ),
        blank=_ENDS | {"seed", "p_value", "num_examples", "test"},
        differences=frozenset({"difference"}),  # over few seeds its t interval goes beyond
        optional=("chain", "baseline_chain", "title"),
    ),
}
#: Columns of every kind of table, by the kind: `"results"`, `"curves"`, …
TABLES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {kind: form.columns for kind, form in _FORMATS.items()}
)


def write_table(path: PathLike, kind: str, rows: Iterable[Row]) -> epath.Path:
    """Writes rows as CSV: sorted, whole or not at all, the same bytes for the same values.

    Floats are written with the fewest digits that read back as the same float. None and NaN are
    blank, in the columns that may be.

    Args:
        path: the file to write; its folder is made.
        kind: what the rows are, a key of `TABLES`: "results", "curves", "transfer",
            "sensitivity", "calibration", "agreement", "deployment", "distances" or "comparisons".
        rows: one mapping per row with the columns `TABLES[kind]`; where they name an attack, a
            `title` that readers know it by may stand beside it. Rates, shares and their ends are in
            [0, 1], distances in units of the input; a share of the teacher's parameters may be
            above 1.

    Returns:
        The path.

    Raises:
        ValueError: a column lacks or is one too many, a number is none or out of its range, or two
            rows describe the same thing. Nothing is written.

    Example:
        >>> import tempfile
        >>> row = dict(dataset="digits", temperature=1.0, seed=0, generation=0, ece=0.01,
        ...            nll=0.04, brier=0.02, mean_confidence=0.98, num_examples=360)
        >>> path = write_table(tempfile.mkdtemp() + "/calibration.csv", "calibration", [row])
        >>> read_table(path, "calibration") == [row]
        True
    """
    form = _format(kind)
    rows = checked(kind, rows)
    extra = sorted({name for row in rows for name in row} - set(form.columns))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*form.columns, *extra])
    for row in sorted(rows, key=lambda row: sort_key(kind, row)):
        writer.writerow([_to_cell(form, name, row.get(name)) for name in (*form.columns, *extra)])
    return write_whole(path, text.getvalue().encode())


def read_table(path: PathLike, kind: str) -> list[dict[str, Any]]:
    """Reads what `write_table` wrote: numbers as int and float, blanks as None.

    Args:
        path: the CSV file.
        kind: what its rows are, a key of `TABLES`.

    Returns:
        One dictionary a row, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a column is missing or unknown, a cell of a number column is no number or out
            of its range, or two rows describe the same thing; the message names the line.

    Example:
        >>> import tempfile
        >>> row = dict(dataset="digits", temperature=20.0, seed=0, generation=1, ece=0.01,
        ...            nll=0.04, brier=0.02, mean_confidence=0.98, num_examples=360)
        >>> path = write_table(tempfile.mkdtemp() + "/calibration.csv", "calibration", [row])
        >>> [found] = read_table(path, "calibration")
        >>> found["temperature"], found["num_examples"]
        (20.0, 360)
    """
    form = _format(kind)
    source = as_path(path)
    # Decoded at once, and split by the csv module: a bucket opens no file by lines of its choice.
    reader = csv.DictReader(io.StringIO(read_whole(source).decode(), newline=""))
    header = reader.fieldnames or ()
    missing = [name for name in form.columns if name not in header]
    if missing:
        raise ValueError(
            f"expected the columns of jdistill.report.TABLES[{kind!r}] in {source}, got none named "
            f"{', '.join(missing)}; write the file with jdistill.report.write_table, or delete it "
            "and run the evaluation again"
        )
    lines = [(reader.line_num, line) for line in reader]
    extra = [name for name in header if name not in form.columns]
    text = {name for name in extra if not all(_is_number(line[name]) for _, line in lines)}
    rows = [
        {name: _from_cell(source, number, name, line[name], text) for name in header}
        for number, line in lines
    ]
    return checked(kind, rows, [f"line {number} of {source}" for number, _ in lines])


def checked(
    kind: str, rows: Iterable[Row], places: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """The rows as a list of dictionaries, after the checks that `write_table` documents."""
    form = _format(kind)
    checked_rows = [dict(row) for row in listed(rows)]
    seen: set[tuple[Any, ...]] = set()
    for index, row in enumerate(checked_rows):
        place = places[index] if places else f"row {index}"
        _check_columns(kind, form, row, place)
        _check_values(form, row, place)
        _check_order(row, place)
        key = sort_key(kind, row)
        if key in seen:
            raise ValueError(
                f"expected one row per {', '.join(form.key)} in {kind}, got two for "
                f"{', '.join(f'{name}={row[name]}' for name in form.key)}; drop one, or name them "
                "apart"
            )
        seen.add(key)
    return checked_rows


def listed(rows: Iterable[Row], name: str = "rows") -> list[Row]:
    """The rows as a list, each a mapping."""
    if isinstance(rows, (str, Mapping)) or not isinstance(rows, Iterable):
        raise ValueError(
            f"expected {name} to be a list of mappings, got {type(rows).__name__}; pass one a row"
        )
    found = list(rows)
    for row in found:
        _validate.mapping(**{f"each of {name}": row})
    return found


def blank(value: Any) -> bool:
    """Whether a value is none: None, NaN or an empty text."""
    return (
        value is None
        or value == ""
        or (isinstance(value, (float, np.floating)) and math.isnan(value))
    )


def sort_key(kind: str, row: Row) -> tuple[Any, ...]:
    """Key that tells a row from the others of its table, to sort by."""
    values: list[Any] = [str(row.get(name) or "") for name in _CHAINS]
    for name in _FORMATS[kind].key:
        value = row[name]
        if name in _TEXT:
            values.append(str(value or ""))
        else:
            values.append(-math.inf if blank(value) else float(value))
    return tuple(values)


def _format(kind: str) -> _Format:
    _validate.text(kind=kind)
    if kind not in _FORMATS:
        raise ValueError(
            f"expected kind to be one of {', '.join(_FORMATS)}, got {kind!r}; "
            "jdistill.report.TABLES has the columns of each"
        )
    return _FORMATS[kind]


def _check_columns(kind: str, form: _Format, row: Row, place: str) -> None:
    missing = [name for name in form.columns if name not in row]
    if missing:
        raise ValueError(
            f"expected rows with the columns of jdistill.report.TABLES[{kind!r}], got {place} "
            f"without {', '.join(missing)}; add them, None where there is no value"
        )
    unknown = [str(name) for name in row if name not in (*form.columns, *form.optional)]
    if unknown and not form.more:
        raise ValueError(
            f"expected rows with no columns but those of jdistill.report.TABLES[{kind!r}], got "
            f"{', '.join(unknown)} in {place}; drop them"
        )
    for name in form.columns:
        if name not in form.blank and blank(row[name]):
            why = "it says which network the row describes"
            raise ValueError(
                f"expected {name} in every row, got {row[name]!r} in {place}; "
                f"{why if name in NETWORK else 'leave the row out if it was not measured'}"
            )


def _check_values(form: _Format, row: Row, place: str) -> None:
    for name in (*form.columns, *form.optional):
        value: Any = row.get(name)
        if name in form.optional and blank(value):
            continue
        if name in form.choices and value not in form.choices[name]:
            wanted = f"to be {' or '.join(form.choices[name])}"
            raise ValueError(f"expected {name} {wanted}, got {value!r} in {place}; name one")
        if blank(value):
            continue
        if name in _TEXT:
            _validate.text(**{f"{name} in {place}": value})
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        shares = name in _SHARE or name in form.shares
        if math.isnan(number):
            wanted, remedy = "to be a number", "pass a number, or None where there is no value"
        elif name in _WHOLE and not number.is_integer():
            wanted, remedy = "to be a whole number", "pass an int"
        elif name in _AMOUNTS and number < 0:
            wanted, remedy = ">= 0", "pass how many there were"
        elif name in _MILLISECONDS and not 0 < number < math.inf:
            wanted, remedy = "> 0", "pass the milliseconds that were measured"
        elif name == "share_of_first" and not 0 < number < math.inf:
            wanted, remedy = "> 0", "it is a share: divide percent by 100"
        elif shares and not 0 <= number <= 1:
            wanted, remedy = "in [0, 1]", "it is a share: divide percent by 100"
        elif name == "eps" and not 0 <= number < math.inf:
            wanted, remedy = "finite and >= 0", "pass the radius, or None where there is none"
        elif name in form.differences and not -1 <= number <= 1:
            wanted, remedy = "in [-1, 1]", "it is a difference of shares: divide points by 100"
        elif name == "temperature" and not 0 < number < math.inf:
            wanted, remedy = "> 0", "pass the temperature that the network was trained at"
        else:
            continue
        raise ValueError(f"expected {name} {wanted}, got {value!r} in {place}; {remedy}")


def _check_order(row: Row, place: str) -> None:
    """Ends of intervals and bins must be in order."""
    names = ("", "test_accuracy_", "success_rate_", "top1_agreement_", "repeated_mistakes_")
    for name in names:
        low, high = (row.get(f"{name}{end}") for end in ("low", "high"))
        known = not blank(low) and not blank(high)
        if known and float(low) > float(high):  # type: ignore[arg-type]
            raise ValueError(
                f"expected {name}low <= {name}high, got {low} and {high} in {place}; swap them"
            )


def _is_number(cell: str) -> bool:
    try:
        float(cell or "0")
    except ValueError:
        return False
    return True


def _to_cell(form: _Format, name: str, value: Any) -> str:
    if blank(value):
        return ""
    if name in _TEXT or isinstance(value, str):
        return str(value)
    if name in _WHOLE:
        return str(int(value))
    if name not in form.columns and float(value).is_integer():
        return str(int(value))
    return repr(float(value))


def _from_cell(path: epath.Path, line: int, name: str, cell: str | None, text: set[str]) -> Any:
    if not cell:
        return None
    if name in _TEXT or name in text:
        return cell
    to_number: Callable[[str], float] = int if name in _WHOLE else float
    try:
        number = to_number(cell)
    except ValueError:
        number = math.nan
    if math.isnan(number):
        kind = "a whole number" if name in _WHOLE else "a number"
        raise ValueError(
            f"expected {kind} in column {name} of {path}, got {cell!r} in line {line}; "
            "repair that line, or delete the file and run the evaluation again"
        )
    return number
