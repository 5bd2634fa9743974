"""Draw the figures of the pages from tables: `python docs/make_figures.py`.

Those of docs/findings.md are of the tables in experiments/results, those of docs/gallery.md are the
report's own, of docs/example.
"""

import csv
import pathlib
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdistill import metrics, report
from jdistill.report._figures import INK, _look, report_style

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "results"
EXAMPLE, IMAGES = ROOT / "docs" / "example", ROOT / "docs" / "images"

_TICKS = (1.0, 5.0, 20.0, 100.0)

_LABELS = ("teacher", "no assistant", "1 assistant", "2 assistants", "3 assistants")

Row = dict[str, Any]


def main() -> None:
    """Draw every figure into docs/images."""
    draw("chains", chains("mandal2023-robustness-digits"))
    draw("chains-mnist", chains("mandal2023-multistep-mnist-half"))
    draw("standardized", standardized())
    example()


def read(name: str) -> list[Row]:
    """A table, numbers as floats where all of a column are."""
    with (RESULTS / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{column: _number(cell) for column, cell in row.items()} for row in rows]


def _number(cell: str) -> Any:
    try:
        return float(cell)
    except ValueError:
        return cell


def chains(name: str) -> Any:
    """Accuracy, distance, and AutoAttack of students against T, by chain length."""
    rows = read(name)
    figure, panels = _panels(3)
    for axes, (column, scale, title) in zip(
        panels,
        (
            ("test_accuracy", 100.0, "test accuracy (%)"),
            ("average", 1.0, "C&W L2, mean over 9 targets"),
            ("robust_accuracy", 100.0, "left under AutoAttack (%)"),
        ),
        strict=True,
    ):
        for generation in sorted({int(row["generation"]) for row in rows}):
            label = _LABELS[generation]
            own = [row for row in rows if row["generation"] == generation]
            _line(axes, own, "temperature", column, scale, label=label, **_look(generation))
        axes.set(title=title, xlabel="temperature T")
    panels[1].set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=5)
    return figure


def standardized() -> Any:
    """Zero gradients, and accuracy under AutoAttack, with the logits' scale and without."""
    plain, other = (read(f"logit-standard-{name}") for name in ("digits", "standardized"))
    figure, panels = _panels(3)
    for axes, (column, title) in zip(
        panels,
        (
            ("zero_gradient_fraction", "gradient exactly zero (%)"),
            ("fgsm", "left under FGSM (%)"),
            ("autoattack", "left under AutoAttack (%)"),
        ),
        strict=True,
    ):
        for rows, label, color, marker in (
            (plain, "soft labels at T", "#7f2a72", "o"),
            (other, "standardized logits", INK, "s"),
        ):
            own = [row for row in rows if row["chain"] == "1 assistant"]
            _line(axes, own, "temperature", column, 100.0, label=label, color=color, marker=marker)
        axes.set(title=title, xlabel="temperature T", ylim=(-4, 104))
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    return figure


def example() -> None:
    """The report's figures of docs/example, on white, as GitHub's dark pages need."""
    with tempfile.TemporaryDirectory() as folder:
        for path in EXAMPLE.glob("*.csv"):
            shutil.copy(path, folder)
        shutil.copy(EXAMPLE / "verdicts.json", folder)
        report.write_report(folder)
        for path in sorted((pathlib.Path(folder) / "figures").glob("*.svg")):
            svg = path.read_text()
            body = svg.index(">", svg.index("<svg")) + 1
            paper = '<rect width="100%" height="100%" fill="#ffffff"/>'
            target = IMAGES / f"example-{path.name}"
            target.write_text(svg[:body] + paper + svg[body:])


def _panels(number: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.1 * number, 3.1), layout="constrained")
    return figure, figure.subplots(1, number)


def _line(
    axes: Any, rows: Sequence[Mapping[str, Any]], x: str, y: str, scale: float, **look: Any
) -> None:
    """Means over the seeds, with the band of their 95% t interval, or with three each seed."""
    places = sorted({row[x] for row in rows})
    found = [
        metrics.seed_interval(np.array([scale * row[y] for row in rows if row[x] == place]))
        for place in places
    ]
    mean, low, high = (
        np.array([getattr(f, end) for f in found]) for end in ("value", "low", "high")
    )
    if scale == 100:  # a share, whose interval ends at 0 and 100, as in the tables
        low, high = np.clip([low, high], 0, 100)
    axes.plot(places, mean, markersize=4.5, **look)
    if len({row["seed"] for row in rows}) > 3:
        axes.fill_between(places, low, high, color=look["color"], alpha=0.15, linewidth=0)
    else:
        dots = {"s": 9, "color": look["color"], "marker": look["marker"], "alpha": 0.4}
        axes.scatter([row[x] for row in rows], [scale * row[y] for row in rows], **dots)
    axes.set_xscale("log")
    axes.set_xticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    axes.minorticks_off()


def draw(name: str, figure: Any) -> None:
    """One figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(IMAGES / f"{name}.png", dpi=160, metadata={"Software": None})


if __name__ == "__main__":
    with report_style():
        main()
