"""What a workdir holds beside `results.csv`: the other tables, and the verdicts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jdistill import _validate
from jdistill._files import PathLike, as_path
from jdistill.report._networks import Network, subjects
from jdistill.report._table import TABLES, Row, checked, read_table
from jdistill.report._verdicts import checked_verdicts, read_verdicts

Measures = Mapping[str, Sequence[Row]]

KINDS = (*(kind for kind in TABLES if kind != "results"), "verdicts")
_GENERATIONS = ("generation", "source_generation", "target_generation", "baseline_generation")


def read_measures(workdir: PathLike) -> dict[str, list[dict[str, Any]]]:
    """Reads the tables and the verdicts that a workdir has beside its `results.csv`.

    Args:
        workdir: The folder.

    Returns:
        The rows of each file that is there, by its name without the ending: `curves`, `transfer`,
        `sensitivity`, `calibration`, `distances`, `comparisons` and `verdicts`.

    Raises:
        ValueError: As `read_table` and `read_verdicts`.
    """
    folder = as_path(workdir)
    rows: dict[str, list[dict[str, Any]]] = {}
    for kind in KINDS:
        path = folder / ("verdicts.json" if kind == "verdicts" else f"{kind}.csv")
        if path.exists():
            rows[kind] = read_verdicts(path) if kind == "verdicts" else read_table(path, kind)
    return rows


def complete(
    measures: Mapping[str, Iterable[Row]] | None, found: Sequence[Network]
) -> dict[str, list[dict[str, Any]]]:
    """Every kind of measure, empty where there is none, checked and about the networks found.

    Args:
        measures: Rows by kind, as `read_measures` gives them.
        found: The networks of `results.csv`.

    Raises:
        ValueError: A kind is unknown, a row is bad, or one is about a network that has no row in
            `results.csv`.
    """
    measures = {} if measures is None else measures
    _validate.mapping(measures=measures)
    unknown = [kind for kind in measures if kind not in KINDS]
    if unknown:
        raise ValueError(
            f"expected measures of the kinds {', '.join(KINDS)}, got {', '.join(unknown)}; "
            "rename or drop them"
        )
    known = {(net.dataset, net.temperature, net.generation) for net in found}
    rows = {}
    for kind in KINDS:
        given = measures.get(kind, ())
        found_rows = checked_verdicts(given) if kind == "verdicts" else checked(kind, given)
        rows[kind] = subjects(found_rows)
        for row in rows[kind]:
            for name in _GENERATIONS:
                if name not in row:
                    continue
                where = (str(row["dataset"]), float(row["temperature"]), int(row[name]))
                if where not in known:
                    raise ValueError(
                        f"expected {kind} about networks of results.csv, got dataset={where[0]}, "
                        f"temperature={where[1]:g}, {name}={where[2]}; measure that network too, "
                        f"or delete the file of {kind}"
                    )
    return rows
