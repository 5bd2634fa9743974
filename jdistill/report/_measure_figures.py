"""The figures of what a workdir holds beside `results.csv`.

Each `*_figure` function returns a `Figure`, or None where there is nothing to draw. They show the
networks of `shown`: more lines could not be told apart, and the tables have all of them.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jdistill.report import _text, _verdict_words
from jdistill.report._drawing import COLORS, INK, MARKERS, finish, handle, lines, panels, styled
from jdistill.report._networks import AttackKey, Network, Stat, attack_key, stat, widest
from jdistill.report._optional import optional
from jdistill.report._table import Row
from jdistill.report._verdicts import Judged, is_of

_MANY_POINTS = 14  # from here on markers hide the line
_TONES = {"masked": "#B33C00", "no sign of masking": "#00664B", "inconclusive": "#555555"}
_AXES = {
    "eps": "budget eps",
    "steps": "steps of the attack",
    "queries": "queries to the network",
}


def shown(found: Sequence[Network]) -> list[Network]:
    """The teacher at T = 1, and the student of the longest chain at each temperature."""
    teachers = [net for net in found if net.generation == 0 and net.temperature == 1]
    return [*teachers, *(net for net in found if net.is_last and net not in teachers)]


@styled
def verdict_figure(judged: Sequence[Judged]) -> Any:
    """The usual attack's number against the worst case, with the verdict: the answer at a glance.

    A line a network: the teacher at T = 1 and the last student of each temperature.
    """
    if not judged:
        return None
    chosen = headline(judged)
    figure_module = optional("matplotlib.figure")
    figure = figure_module.Figure(figsize=(5.2, 1.15 + 0.74 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    for position, item in enumerate(chosen):
        y = -float(position)
        color = _TONES[item.label]
        name = f"T = {item.network.temperature:g}, {_text.line_name(item.network.generation)}"
        axes.text(-3, y + 0.33, name, fontsize=9.5, va="center", zorder=5)
        words = {"ha": "right", "va": "center", "color": color, "weight": "bold", "zorder": 5}
        axes.text(103, y + 0.33, _verdict_words.label(item), fontsize=9.5, **words)
        naive, worst = 100 * item.naive.mean, 100 * item.worst_case.mean
        axes.plot([worst, naive], [y, y], color=color, linewidth=2.2, alpha=0.55, zorder=2)
        for side, value, ends, face in (
            ("naive", naive, item.naive, "white"),
            ("worst_case", worst, item.worst_case, color),
        ):
            low, high = 100 * min(ends.low, ends.mean), 100 * max(ends.high, ends.mean)
            axes.plot([low, high], [y, y], color=color, linewidth=0.9, zorder=1)
            dot = axes.plot(value, y, "o", ms=8.5, mfc=face, mec=color, mew=1.8, zorder=4)
            dot[0].set_gid(f"{side} temperature={item.network.temperature:g}")
        if item.clean.known:
            axes.plot(100 * item.clean.mean, y, "|", ms=13, color="#777777", mew=1.6, zorder=3)
        above, below = {"ha": "center", "fontsize": 8.5, "color": color, "zorder": 5}, y - 0.26
        near = abs(naive - worst) < 7
        if near:  # one label for both, or they would be written over each other
            both = [_text.percent(item.naive.mean), _text.percent(item.worst_case.mean)]
            text = " → ".join(dict.fromkeys(both))
            axes.text((naive + worst) / 2, below, text, va="center", **above)
        else:
            axes.text(naive, below, _text.percent(item.naive.mean), va="center", **above)
            axes.text(worst, below, _text.percent(item.worst_case.mean), va="center", **above)
    axes.set(xlim=(-4, 104), ylim=(-len(chosen) + 0.5, 0.6), yticks=[])
    axes.set_xlabel(f"accuracy (%) within {chosen[0].budget}")
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    blank = {"linestyle": "none", "markersize": 8, "markeredgecolor": INK, "markeredgewidth": 1.6}
    marks = [
        handle(marker="o", markerfacecolor="white", label="the usual attack", **blank),
        handle(marker="o", markerfacecolor=INK, label="everything tried", **blank),
        handle(marker="|", label="no attack", **{**blank, "markeredgecolor": "#777777"}),
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=3, fontsize=9, handletextpad=0.2)
    return figure


def headline(judged: Sequence[Judged]) -> list[Judged]:
    """The judged networks that the first figure shows: as `shown`, of those that were judged."""
    last = _verdict_words.last_judged(judged)
    plain = [item for item in judged if not item.network.generation]
    plain = [item for item in plain if item.network.temperature == 1 and item not in last]
    return [*plain, *last]


class Line(NamedTuple):
    """One network's line in a panel of curves."""

    network: Network
    x: np.ndarray
    stats: tuple[Stat, ...]

    def values(self, end: str) -> np.ndarray:
        """The mean, low or high of each point, in percent."""
        return 100 * np.array([getattr(point, end) for point in self.stats])


def curve_lines(
    found: Sequence[Network], rows: Sequence[Row], curve: str
) -> dict[AttackKey, list[Line]]:
    """The curves of one kind by attack, one line a shown network."""
    rows = [row for row in rows if row["curve"] == curve]
    keys = list(dict.fromkeys(attack_key(row) for row in rows))
    drawn: dict[AttackKey, list[Line]] = {}
    for key in keys:
        for network in shown(found):
            own = [row for row in rows if attack_key(row) == key and is_of(row, network)]
            points: dict[float, list[Row]] = {}
            for row in own:
                points.setdefault(float(f"{float(row['x']):.6g}"), []).append(row)
            places = sorted(points)
            stats = tuple(widest(points[place], "robust_accuracy") for place in places)
            if places:
                drawn.setdefault(key, []).append(Line(network, np.array(places), stats))
    return drawn


@styled
def curve_figure(found: Sequence[Network], rows: Sequence[Row], curve: str) -> Any:
    """Accuracy under attack against its budget, steps or queries; a panel an attack."""
    drawn = curve_lines(found, rows, curve)
    if not drawn:
        return None
    networks = shown(found)
    figure, cells = panels(len(drawn))
    for axes, (key, own) in zip(cells, drawn.items(), strict=True):
        for line in own:
            look = _look(networks.index(line.network), line.network)
            if len(line.x) > _MANY_POINTS:
                look["marker"] = ""
            axes.plot(line.x, line.values("mean"), linewidth=1.7, markersize=4.5, zorder=3, **look)
            axes.lines[-1].set_gid(f"{curve} {key.attack} T={line.network.temperature:g}")
            low, high = line.values("low"), line.values("high")
            band = {"color": look["color"], "alpha": 0.15, "linewidth": 0, "zorder": 2}
            axes.fill_between(line.x, low, high, **band)
        x = np.concatenate([line.x for line in own])
        if curve == "queries" and x[x > 0].size and x.max() > 50 * x[x > 0].min():
            axes.set_xscale("symlog", linthresh=float(x[x > 0].min()))
        title = _text.attack_name(key)
        title += f" ({_text.norm_name(key.norm)})" if curve == "eps" else f" ({_text.budget(key)})"
        axes.set(title=title, ylim=(-4, 104), xlabel=_AXES[curve])
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("accuracy under attack (%)")
    _legend(figure, networks)
    return figure


def bins(rows: Sequence[Row]) -> list[tuple[float, float]]:
    """The bins of the sensitivity in order, as log10; unbounded ends are infinite.

    A bin above all others is left out where nothing is in it: no softmax is that sensitive.
    """
    counts: dict[tuple[float, float], int] = {}
    for row in rows:
        counts[_bin(row)] = counts.get(_bin(row), 0) + int(row["count"])
    return sorted(edge for edge, count in counts.items() if count or math.isfinite(edge[1]))


def shares(network: Network, rows: Sequence[Row], edges: Sequence[tuple[float, float]]) -> Any:
    """The share of a network's examples in each bin, over all seeds; None without a row."""
    counts = dict.fromkeys(edges, 0)
    for row in rows:
        if is_of(row, network) and row["count"]:
            counts[_bin(row)] += int(row["count"])
    total = sum(counts.values())
    return np.array([count / total for count in counts.values()]) if total else None


def bin_name(edge: tuple[float, float]) -> str:
    """A bin of log10 sensitivities as an axis names it.

    >>> bin_name((-math.inf, -40.0)), bin_name((-3.0, 0.0))
    ('< −40', '−3 to 0')
    """
    low, high = (f"{end:g}".replace("-", "−") for end in edge)
    if math.isinf(edge[0]):
        return f"< {high}"
    return f"≥ {low}" if math.isinf(edge[1]) else f"{low} to {high}"


@styled
def bins_figure(found: Sequence[Network], rows: Sequence[Row]) -> Any:
    """Histograms of the softmax sensitivity, one below the other, on one scale."""
    edges = bins(rows)
    drawn = [(net, shares(net, rows, edges)) for net in shown(found)]
    drawn = [(net, share) for net, share in drawn if share is not None]
    if not drawn:
        return None
    figure_module = optional("matplotlib.figure")
    figure = figure_module.Figure(figsize=(5.4, 0.7 + 0.85 * len(drawn)), layout="constrained")
    grid = figure.subplots(len(drawn), 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    networks = shown(found)
    for axes, (network, share) in zip(grid, drawn, strict=True):
        look = _look(networks.index(network), network)
        bars = axes.bar(range(len(edges)), 100 * share, color=look["color"], width=0.86)
        for bar, value in zip(bars, share, strict=True):
            if value > 0:
                place = (bar.get_x() + bar.get_width() / 2, bar.get_height() + 3)
                axes.text(*place, _text.percent(value, 0), ha="center", fontsize=7.5)
        axes.set(ylim=(0, 125), yticks=[0, 50, 100])
        axes.set_title(_short(network), loc="left", fontsize=9.5, pad=3)
    grid[-1].set_xticks(range(len(edges)), [bin_name(edge) for edge in edges], rotation=45)
    for tick in grid[-1].get_xticklabels():
        tick.set(ha="right", rotation_mode="anchor", fontsize=8.5)
    grid[-1].set_xlabel("log₁₀ mean |∂ softmax / ∂x| of an example")
    figure.supylabel("examples (%)", fontsize=10)
    return figure


class Matrix(NamedTuple):
    """Success of adversarial examples from one generation on another, at one temperature."""

    temperature: float
    key: AttackKey
    generations: tuple[int, ...]
    stats: dict[tuple[int, int], Stat]
    num_examples: int


def matrices(dataset: str, rows: Sequence[Row]) -> list[Matrix]:
    """The transfer matrices of a data set, by attack and temperature."""
    groups: dict[tuple[float, AttackKey], list[Row]] = {}
    for row in rows:
        if row["dataset"] == dataset:
            groups.setdefault((float(row["temperature"]), attack_key(row)), []).append(row)
    found = []
    for (temperature, key), own in sorted(groups.items(), key=lambda item: str(item[0][1])):
        cells: dict[tuple[int, int], list[Row]] = {}
        for row in own:
            where = (int(row["source_generation"]), int(row["target_generation"]))
            cells.setdefault(where, []).append(row)
        generations = tuple(sorted({generation for where in cells for generation in where}))
        stats = {where: widest(group, "success_rate") for where, group in cells.items()}
        number = max(int(row["num_examples"]) for row in own)
        found.append(Matrix(temperature, key, generations, stats, number))
    return sorted(found, key=lambda matrix: (str(matrix.key), matrix.temperature))


@styled
def transfer_figure(found: Sequence[Network], rows: Sequence[Row]) -> Any:
    """The transfer matrices as heat maps: rows craft, columns are judged."""
    drawn = matrices(found[0].dataset, rows)
    if not drawn:
        return None
    figure, cells = panels(len(drawn), height=2.9)
    image = None
    for axes, matrix in zip(cells, drawn, strict=True):
        names = ["teacher" if not g else f"{g - 1} assist." for g in matrix.generations]
        values = np.full((len(names), len(names)), np.nan)
        for (source, target), value in matrix.stats.items():
            row, column = (matrix.generations.index(g) for g in (source, target))
            values[row, column] = 100 * value.mean
            ink = "white" if value.mean > 0.55 else INK
            text = _text.percent(value.mean, 0)
            axes.text(column, row, text, ha="center", va="center", color=ink, fontsize=9)
        image = axes.imshow(values, cmap="Blues", vmin=0, vmax=110)
        axes.set_xticks(range(len(names)), names, rotation=30, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.grid(False)
        axes.set_title(f"T = {matrix.temperature:g}, {_text.attack_label(matrix.key)}", fontsize=9)
        axes.set_xlabel("judged on", fontsize=9)
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("crafted on", fontsize=9)
    del image
    return figure


def distance_stats(network: Network, rows: Sequence[Row], key: AttackKey, name: str) -> Stat:
    """A column of `distances.csv` for one network and attack, over its seeds."""
    return stat([row for row in rows if is_of(row, network) and distance_key(row) == key], name)


def distance_key(row: Row) -> AttackKey:
    """Which attack a row of `distances.csv` is about."""
    return attack_key({**row, "eps": None})


@styled
def distances_figure(found: Sequence[Network], rows: Sequence[Row]) -> Any:
    """Mean and median distance in each norm against temperature."""
    own = [row for row in rows if any(is_of(row, network) for network in found)]
    keys = sorted({distance_key(row) for row in own}, key=lambda key: (key.norm, key.attack))
    if not keys:
        return None
    figure, cells = panels(len(keys))
    for axes, key in zip(cells, keys, strict=True):
        for name, faint in (("mean", False), ("median", True)):
            quantity = partial(distance_stats, rows=own, key=key, name=name)
            lines(axes, found, f"{key.attack} {key.norm} {name}", quantity, faint=faint)
        unit = "features changed" if key.norm == "l0" else "input units"
        axes.set(title=_text.attack_name(key), ylabel=f"{_text.norm_name(key.norm)} ({unit})")
        axes.set_ylim(bottom=0)
    extra = [
        handle(color="#777777", linestyle="-", label="mean over successes"),
        handle(color="#777777", linestyle=":", label="median"),
    ]
    return finish(figure, cells, found, extra=extra)


def _bin(row: Row) -> tuple[float, float]:
    low, high = row["low"], row["high"]
    return (
        -math.inf if low is None else float(low),
        math.inf if high is None else float(high),
    )


def _short(network: Network) -> str:
    return f"T = {network.temperature:g}, {_text.line_name(network.generation)}"


def _look(index: int, network: Network) -> dict[str, Any]:
    if not network.generation:
        return {"color": INK, "marker": "s", "linestyle": "--"}
    place = index % len(COLORS)
    return {"color": COLORS[place], "marker": MARKERS[place], "linestyle": "-"}


def _legend(figure: Any, networks: Sequence[Network]) -> None:
    handles = [
        handle(markersize=5, label=_short(network), **_look(index, network))
        for index, network in enumerate(networks)
    ]
    figure.legend(
        handles=handles, loc="outside upper center", ncols=2, fontsize=9, handlelength=2.6
    )
