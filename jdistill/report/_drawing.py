"""Drawing with matplotlib's object interface (no pyplot, no display): style, panels and lines.

A line has the gid `"<quantity> generation=<g>"`, so that a caller can find and restyle it.
"""

import functools
import io
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from etils import epath

from jdistill._files import PathLike, write_whole
from jdistill.report import _text
from jdistill.report._networks import Network, Stat
from jdistill.report._optional import optional

_DPI = 160
_WIDTH = 6.4  # inches; one panel alone is narrower, so that a phone shows it legibly
INK, _FAINT = "#222222", "#dddddd"
# Okabe and Ito's colors, in an order in which neighbors differ in lightness too; the teacher is
# ink. Markers repeat the distinction for print and for eyes that see few colors.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5195")
MARKERS = ("o", "^", "D", "v", "P", "X", "*")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
}

Draws = TypeVar("Draws", bound=Callable[..., Any])
StatOf = Callable[[Network], Stat | None]


def styled(draw: Draws) -> Draws:
    """Runs a drawing function under the report's style, whatever the caller's settings are."""

    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        matplotlib = optional("matplotlib")
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return cast(Draws, drawn)


@styled
def write_png(figure: Any, path: PathLike) -> epath.Path:
    """Saves a figure whole or not at all."""
    backend = optional("matplotlib.backends.backend_agg")
    data = io.BytesIO()
    backend.FigureCanvasAgg(figure)
    # Without matplotlib's version in the file, the same rows give the same bytes.
    figure.savefig(data, format="png", dpi=_DPI, metadata={"Software": None})
    return write_whole(path, data.getvalue())


def panels(number: int, height: float = 2.6) -> tuple[Any, list[Any]]:
    """A figure of equal panels, at most three a row; `height` in inches each."""
    columns = 2 if number == 4 else min(number, 3)
    rows = math.ceil(number / columns)
    size = ({1: 5.7, 2: _WIDTH}.get(columns, 8.8), 3.6 if number == 1 else 0.6 + height * rows)
    figure_module = optional("matplotlib.figure")
    figure = figure_module.Figure(figsize=size, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    cells = list(grid.flat)
    for unused in cells[number:]:
        unused.remove()
    return figure, cells[:number]


def lines(
    axes: Any,
    found: Sequence[Network],
    name: str,
    quantity: StatOf,
    *,
    scale: float = 1,
    faint: bool = False,
) -> None:
    """One line a generation, with what is known of its uncertainty."""
    generations = sorted({network.generation for network in found})
    step = _shift(found)
    for generation in generations:
        points = []
        for network in found:
            stat = quantity(network) if network.generation == generation else None
            if stat is not None and stat.known:
                points.append((network.temperature, stat))
        if not points:
            continue
        # Generations at one temperature stand beside each other: bars on one spot cannot be read.
        place = step ** (generation - (generations[0] + generations[-1]) / 2)
        x = np.array([temperature * place for temperature, _ in points])
        y, low, high = (
            scale * np.array([getattr(stat, end) for _, stat in points])
            for end in ("mean", "low", "high")
        )
        color, marker = _look(generation)
        (line,) = axes.plot(
            x,
            y,
            color=color,
            marker=marker,
            markersize=3 if faint else 5,
            linestyle=":" if faint else "--" if generation == 0 else "-",
            linewidth=1.2 if faint else 1.7,
            # The dashed teacher on top, so that a student's line on the same spot does not hide it.
            zorder=4 if generation == 0 else 3,
        )
        line.set_gid(f"{name} generation={generation}")
        if faint:
            continue
        several = np.array([stat.seeds > 1 for _, stat in points])
        if several.all() and len(points) > 1:
            axes.fill_between(x, low, high, color=color, alpha=0.18, linewidth=0, zorder=2)
        else:
            # max: rounding may put the end of an interval on the wrong side of its middle.
            bars = [np.maximum(y - low, 0), np.maximum(high - y, 0)]
            axes.errorbar(x, y, yerr=bars, fmt="none", ecolor=color, capsize=2.5, linewidth=1)


def _look(generation: int) -> tuple[str, str]:
    if generation == 0:
        return INK, "s"
    index = (generation - 1) % len(COLORS)
    return COLORS[index], MARKERS[index]


def _span(found: Sequence[Network]) -> float:
    temperatures = [network.temperature for network in found]
    return max(math.log10(max(temperatures) / min(temperatures)), 0.6)


def _shift(found: Sequence[Network]) -> float:
    generations = [network.generation for network in found]
    return 10 ** (_span(found) * min(0.012, 0.045 / max(max(generations) - min(generations), 1)))


def handle(**look: Any) -> Any:
    return optional("matplotlib.lines").Line2D([], [], linewidth=1.7, **look)


def finish(
    figure: Any, cells: Sequence[Any], found: Sequence[Network], extra: Sequence[Any] = ()
) -> Any:
    """The temperature axis and the legend, which all panels share."""
    ticker = optional("matplotlib.ticker")
    temperatures = sorted({network.temperature for network in found})
    pad = 10 ** (0.07 * _span(found))
    for axes in cells:
        axes.set_xscale("log")
        axes.set_xlim(temperatures[0] / pad, temperatures[-1] * pad)
        axes.xaxis.set_major_locator(ticker.FixedLocator(temperatures))
        axes.xaxis.set_major_formatter(ticker.FixedFormatter(_tick_labels(temperatures)))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel("distillation temperature T")
    handles = [
        handle(
            color=_look(generation)[0],
            marker=_look(generation)[1],
            markersize=5,
            linestyle="--" if generation == 0 else "-",
            label=_text.line_name(generation),
        )
        for generation in sorted({network.generation for network in found})
    ]
    figure.legend(
        handles=[*handles, *extra],
        loc="outside upper center",
        ncols=2 if len(cells) == 1 or len(handles) + len(extra) == 4 else 3,
        frameon=False,
        fontsize=9.5,
        handlelength=2.8,
    )
    return figure


def _tick_labels(temperatures: Sequence[float]) -> list[str]:
    """The temperatures, without those that would be written over the one before."""
    labels, last = [], -math.inf
    span = max(math.log10(temperatures[-1] / temperatures[0]), 0.6)
    for temperature in temperatures:
        place = math.log10(temperature) / span
        wanted = place - last > 0.075
        labels.append(f"{temperature:g}" if wanted else "")
        last = place if wanted else last
    return labels
