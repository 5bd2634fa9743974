"""The figures of a report, drawn with matplotlib's object interface (no pyplot, no display).

Each `*_figure` function returns a `Figure` and draws from `Network`s; `write_figures` saves them.
A line has the gid `"<quantity> generation=<g>"`, so that a caller can find and restyle it.
"""

import functools
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from etils import epath

from jdistill._files import PathLike, as_path, write_whole
from jdistill.report import _text
from jdistill.report._optional import optional
from jdistill.report._table import AttackKey, Network, Row, Stat, attack_keys, networks

_DPI = 160
_WIDTH = 6.4  # inches
_INK, _FAINT = "#222222", "#dddddd"
# Okabe and Ito's colors, in an order in which neighbors differ in lightness too; the teacher is
# ink. Markers repeat the distinction for print and for eyes that see few colors.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#7A5195")
_MARKERS = ("o", "^", "D", "v", "P", "X", "*")
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": _FAINT,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
}

Draws = TypeVar("Draws", bound=Callable[..., Any])
StatOf = Callable[[Network], Stat | None]


def write_figures(rows: Iterable[Row], directory: PathLike) -> dict[str, epath.Path]:
    """Draws accuracy, sensitivity and robustness against temperature, as PNG files.

    In every figure a line is a chain length (the teacher; the student of 0, 1, 2, … assistants).
    With one seed the bars are 95 % intervals where the rows have them; with several, the line is
    their mean and the band reaches from the lowest to the highest.

    Args:
        rows: As for `write_results`.
        directory: Where the files go; it is made.

    Returns:
        The path of each figure by its name: `attacks` (the success rate of every attack, and the
        share of zero gradients that explains it), `robustness` (mean and median distance of the
        minimum-norm attacks), `accuracy`, `sensitivity` (of the logits and of the softmax). A
        figure without anything to draw is left out. With several data sets the names end in
        theirs: `accuracy_mnist`.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: As `write_results`; or there is no row.
    """
    optional("matplotlib")
    found = networks(rows)
    datasets = sorted({network.dataset for network in found})
    written = {}
    for dataset in datasets:
        chosen = [network for network in found if network.dataset == dataset]
        for name, draw in _FIGURES.items():
            figure = draw(chosen)
            if figure is None:
                continue
            full = name if len(datasets) == 1 else f"{name}_{dataset}"
            written[full] = write_png(figure, as_path(directory) / f"{full}.png")
    return written


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


@styled
def accuracy_figure(found: Sequence[Network]) -> Any:
    """Test accuracy in percent against temperature."""
    figure, (axes,) = _panels(1)
    _lines(axes, found, "accuracy", lambda net: net.accuracy, scale=100)
    axes.set(title="Accuracy on the clean test set", ylabel="test accuracy (%)")
    low, high = axes.get_ylim()
    # A narrower window would make the noise of a test set look like an effect.
    middle = min((low + high) / 2, 99.2)
    half = max((high - low) / 2, 1.0)
    axes.set_ylim(max(middle - half, -2), min(middle + half, 101))
    return _finish(figure, [axes], found)


@styled
def sensitivity_figure(found: Sequence[Network]) -> Any:
    """Both sensitivities against temperature, one panel each; None where neither is known."""
    if not _any_known(found, [_logit_sensitivity, _softmax_sensitivity]):
        return None
    figure, (left, right) = _panels(2)
    _lines(left, found, "sensitivity_logits", _logit_sensitivity)
    _lines(right, found, "log10_sensitivity_softmax", _softmax_sensitivity)
    if any(stat(net).mean > 0 for net in found for stat in [_logit_sensitivity]):
        left.set_yscale("log")
    left.set(title="of the logits", ylabel="mean |∂ Σ logits / ∂x|")
    right.set(title="of the softmax at T = 1", ylabel="log₁₀ mean |∂ softmax / ∂x|")
    return _finish(figure, [left, right], found)


@styled
def robustness_figure(found: Sequence[Network]) -> Any:
    """Distance of the adversarial examples of each minimum-norm attack; None without one."""
    keys = [
        key
        for key in attack_keys(found)
        if key.eps is None and _any_known(found, [_distance(key, "mean_distance")])
    ]
    if not keys:
        return None
    figure, panels = _panels(len(keys))
    for axes, key in zip(panels, keys, strict=True):
        name = f"{key.attack} {key.norm}"
        _lines(axes, found, f"{name} mean", _distance(key, "mean_distance"))
        _lines(axes, found, f"{name} median", _distance(key, "median_distance"), faint=True)
        unit = f"{_text.norm_name(key.norm)} distance (input units)"
        axes.set(title=_text.attack_name(key), ylabel=unit)
        axes.set_ylim(bottom=0)
    handles = [
        _handle(color="#777777", linestyle="-", label="mean over successes"),
        _handle(color="#777777", linestyle=":", label="median"),
    ]
    return _finish(figure, panels, found, extra=handles)


@styled
def attacks_figure(found: Sequence[Network]) -> Any:
    """Success rate of every attack, and the share of zero gradients; None without an attack.

    Side by side on one scale, because that is where masking shows: the attacks that follow the
    gradient fail exactly where the gradient is zero, and the others do not.
    """
    keys = attack_keys(found)
    if not keys:
        return None
    zero = _any_known(found, [_zero_gradients])
    figure, panels = _panels(len(keys) + zero)
    for axes, key in zip(panels, keys, strict=False):
        name = f"{key.attack} {key.norm} {key.eps} success"
        _lines(axes, found, name, _success(key), scale=100)
        axes.set(title=_text.attack_label(key), ylim=(-4, 104))
    if zero:
        _lines(panels[-1], found, "zero_gradient_fraction", _zero_gradients, scale=100)
        panels[-1].set(title="Input gradient exactly zero", ylim=(-4, 104))
        panels[-1].set_facecolor("#f1f1f1")  # evidence, not an attack
    for axes in panels:
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("share of examples (%)")
    return _finish(figure, panels, found)


_FIGURES: dict[str, Callable[[Sequence[Network]], Any]] = {
    "attacks": attacks_figure,
    "robustness": robustness_figure,
    "accuracy": accuracy_figure,
    "sensitivity": sensitivity_figure,
}


def line_name(generation: int) -> str:
    """A chain length, as a legend names it."""
    if generation == 0:
        return "teacher"
    return f"student, {_text.count(generation - 1, 'assistant')}"


def _logit_sensitivity(network: Network) -> Stat:
    return network.sensitivity_logits


def _softmax_sensitivity(network: Network) -> Stat:
    return network.log10_sensitivity_softmax


def _zero_gradients(network: Network) -> Stat:
    return network.zero_gradients


def _success(key: AttackKey) -> StatOf:
    return lambda network: network.attacks[key].success if key in network.attacks else None


def _distance(key: AttackKey, name: str) -> StatOf:
    return lambda network: getattr(network.attacks[key], name) if key in network.attacks else None


def _any_known(found: Sequence[Network], quantities: Sequence[StatOf]) -> bool:
    stats = (quantity(network) for network in found for quantity in quantities)
    return any(stat is not None and stat.known for stat in stats)


def _panels(number: int) -> tuple[Any, list[Any]]:
    """A figure of equal panels, at most three a row."""
    columns = 2 if number == 4 else min(number, 3)
    lines = math.ceil(number / columns)
    size = (_WIDTH if columns < 3 else 8.8, 3.6 if number == 1 else 0.6 + 2.6 * lines)
    figure_module = optional("matplotlib.figure")
    figure = figure_module.Figure(figsize=size, layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    panels = list(grid.flat)
    for unused in panels[number:]:
        unused.remove()
    return figure, panels[:number]


def _lines(
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
        return _INK, "s"
    index = (generation - 1) % len(_COLORS)
    return _COLORS[index], _MARKERS[index]


def _span(found: Sequence[Network]) -> float:
    temperatures = [network.temperature for network in found]
    return max(math.log10(max(temperatures) / min(temperatures)), 0.6)


def _shift(found: Sequence[Network]) -> float:
    generations = [network.generation for network in found]
    return 10 ** (_span(found) * min(0.012, 0.045 / max(max(generations) - min(generations), 1)))


def _handle(**look: Any) -> Any:
    return optional("matplotlib.lines").Line2D([], [], linewidth=1.7, **look)


def _finish(
    figure: Any, panels: Sequence[Any], found: Sequence[Network], extra: Sequence[Any] = ()
) -> Any:
    """The temperature axis and the legend, which all panels share."""
    ticker = optional("matplotlib.ticker")
    temperatures = sorted({network.temperature for network in found})
    pad = 10 ** (0.07 * _span(found))
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xlim(temperatures[0] / pad, temperatures[-1] * pad)
        axes.xaxis.set_major_locator(ticker.FixedLocator(temperatures))
        axes.xaxis.set_major_formatter(ticker.FixedFormatter(_tick_labels(temperatures)))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        axes.set_xlabel("distillation temperature T")
    handles = [
        _handle(
            color=_look(generation)[0],
            marker=_look(generation)[1],
            markersize=5,
            linestyle="--" if generation == 0 else "-",
            label=line_name(generation),
        )
        for generation in sorted({network.generation for network in found})
    ]
    figure.legend(
        handles=[*handles, *extra],
        loc="outside upper center",
        ncols=3 if len(handles) + len(extra) != 4 else 2,
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
