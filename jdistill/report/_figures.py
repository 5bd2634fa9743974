"""The figures of a report, as SVG: one function per figure, and one style.

Colors: a generation of a chain has a shade of blue and a marker, a temperature a shade from light
to dark, a verdict's label its own tone; none of the three uses another's. In the page each color is
a CSS variable, so that a dark page has lighter ones. A line has the gid
`"<quantity> generation=<g>"` or `"<curve> <attack> T=<T> generation=<g>"`.
"""

import contextlib
import hashlib
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from jdistill import _words
from jdistill.report import _claims
from jdistill.report._networks import (
    AttackKey,
    Judged,
    Network,
    Stat,
    attack_key,
    attack_keys,
    of_network,
    shown,
)
from jdistill.report._networks import stat as stat_of
from jdistill.report._optional import optional
from jdistill.report._table import Row

_WIDTH = 6.4  # inches; one panel alone is narrower, so that a phone shows it legibly
INK, SOFT, LINE = "#222222", "#767676", "#dddddd"
_GENERATIONS = (INK, "#2b7bba", "#0a4f94", "#5f8fc7", "#083471")
_MARKERS = ("s", "o", "^", "D", "v")
_TEMPERATURES = ("#c0569b", "#a03a86", "#7f2a72", "#5d1c5c", "#3b0f45")
TONES = {
    "masked": "#b3261e",
    "weak attack": "#8f5a00",
    "inconclusive": "#5f6368",
    "no sign of masking": "#37474f",
}
# Color in the light, and in the dark.
DARK = {
    INK: "#e4e8ec",
    SOFT: "#9aa5b0",
    LINE: "#3a434c",
    **dict(zip(_GENERATIONS[1:], ("#6db3ee", "#a8d1f7", "#86a9d8", "#d5e8fb"), strict=True)),
    **dict(
        zip(_TEMPERATURES, ("#a9659a", "#b874a6", "#d184bb", "#e6a6d4", "#f5cdea"), strict=True)
    ),
    **dict(zip(TONES.values(), ("#ff8a80", "#f0b95c", "#b6bcc2", "#c3d0d8"), strict=True)),
}
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "text.parse_math": False,  # titles of attacks are text from outside
}
_MANY_POINTS = 14  # from here on markers hide the line
_AXES = {"eps": "radius ε", "steps": "steps (the start is 1)", "queries": "queries"}


class Figure(NamedTuple):
    """A figure.

    Attributes:
        title: what it shows.
        svg: its file.
        inline: the same for a page, with CSS variables as colors.
    """

    title: str
    svg: str
    inline: str


def figures(
    found: Sequence[Network], judged: Sequence[Judged], rows: Mapping[str, Sequence[Row]]
) -> dict[str, Figure]:
    """Every figure of a data set for which there is something to draw, by name."""
    curves = {
        f"curve-{curve}": (
            f"Accuracy against {axis.partition(' (')[0]}",
            partial(_curves, rows["curves"], rows["distances"], curve),
        )
        for curve, axis in _AXES.items()
    }
    draw: dict[str, tuple[str, Callable[[Sequence[Network]], Any]]] = {
        "verdict": ("The usual attack against everything tried", lambda found: _verdict(judged)),
        "attacks": ("Success of every attack against T", _attacks),
        "accuracy": ("Accuracy and sensitivity against T", _accuracy),
        "robustness": ("Distance of minimum-norm attacks against T", _robustness),
        **curves,
        "distances": ("Distance in each norm against T", partial(_distances, rows["distances"])),
    }
    drawn = {}
    for name, (title, function) in draw.items():
        # The same rows give the same bytes: no date, and ids out of the figure's name.
        with report_style(**{"svg.hashsalt": f"{found[0].dataset} {name}"}):
            figure = function(found)
            if figure is not None:
                drawn[name] = _written(figure, title, f"{found[0].dataset} {name}")
    return drawn


@contextlib.contextmanager
def report_style(**more: Any) -> Iterator[None]:
    """Draws in the report's style, whatever the user's settings."""
    matplotlib = optional("matplotlib")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, **more})
        yield


def network_look(
    temperatures: Sequence[float], temperature: float, generation: int
) -> dict[str, Any]:
    """Color and line by temperature, marker by generation; ink for the teacher at T = 1."""
    look = _look(generation)
    if temperature == 1 and generation == 0:
        return {**look, "color": INK}
    place = temperatures.index(temperature) / max(len(temperatures) - 1, 1)
    return {**look, "color": _TEMPERATURES[round(place * (len(_TEMPERATURES) - 1))]}


def _written(figure: Any, title: str, salt: str) -> Figure:
    optional("matplotlib.backends.backend_svg").FigureCanvasSVG(figure)
    data = io.StringIO()
    figure.savefig(data, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = data.getvalue()
    inline = svg[svg.index("<svg") :]
    # Ids of glyphs and groups are unique within a figure alone.
    prefix = "f" + hashlib.sha256(salt.encode()).hexdigest()[:6]
    inline = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", inline)
    box = re.search(r'viewBox="([^"]*)"', inline)
    assert box is not None
    width = 1.35 * float(box[1].split()[2])  # a small figure is not blown up
    opening = f'<svg viewBox="{box[1]}" style="max-width: {width:.0f}px" role="img">'
    inline = re.sub(r"<svg [^>]*>", opening, inline, count=1).replace("#ffffff", "var(--page)")
    for color in DARK:
        inline = inline.replace(color, f"var(--{name_of(color)})")
    return Figure(title, svg, inline)


def name_of(color: str) -> str:
    """A color's CSS variable."""
    return f"fig-{color[1:]}"


def _verdict(judged: Sequence[Judged]) -> Any:
    """The usual attack's number against the worst case: the answer at a glance."""
    chosen = _claims.last_judged(judged)
    if not chosen:
        return None
    figure_module = optional("matplotlib.figure")
    figure = figure_module.Figure(figsize=(5.2, 1.15 + 0.74 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    for position, item in enumerate(chosen):
        y, color = -float(position), TONES[item.label]
        name = _short(item.network) + f", {item.limit}" * item.several
        axes.text(-3, y + 0.33, name, fontsize=9.5, va="center", zorder=5)
        words = {"ha": "right", "va": "center", "color": color, "weight": "bold", "zorder": 5}
        axes.text(103, y + 0.33, item.label, fontsize=9.5, **words)
        naive, worst = 100 * item.naive.mean, 100 * item.worst_case.mean
        axes.plot([worst, naive], [y, y], color=color, linewidth=2.2, zorder=2)
        for side, place, ends, face in (
            ("naive", naive, item.naive, "#ffffff"),
            ("worst_case", worst, item.worst_case, color),
        ):
            axes.plot([100 * ends.low, 100 * ends.high], [y, y], color=color, linewidth=0.9)
            dot = axes.plot(place, y, "o", ms=8.5, mfc=face, mec=color, mew=1.8, zorder=4)
            dot[0].set_gid(f"{side} {item.network.chain} {_place(item.network)}")
        axes.plot(100 * item.clean.mean, y, "|", ms=13, color=SOFT, mew=1.6, zorder=3)
        look = {"ha": "center", "fontsize": 8.5, "color": color, "zorder": 5, "va": "center"}
        texts = [_words.percent(item.naive.mean), _words.percent(item.worst_case.mean)]
        if abs(naive - worst) < 9:  # one label for both, or one would be written over the other
            axes.text((naive + worst) / 2, y - 0.26, " → ".join(dict.fromkeys(texts)), **look)
        else:
            axes.text(naive, y - 0.26, texts[0], **look)
            axes.text(worst, y - 0.26, texts[1], **look)
    axes.set(xlim=(-4, 104), ylim=(-len(chosen) + 0.5, 0.6), yticks=[])
    within = "" if chosen[0].several else f" within {chosen[0].limit}"
    axes.set_xlabel(f"accuracy (%){within}")
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.spines["left"].set_visible(False)
    blank = {"linestyle": "none", "markersize": 8, "markeredgecolor": INK, "markeredgewidth": 1.6}
    marks = [
        _handle(marker="o", markerfacecolor="#ffffff", label="usual attack", **blank),
        _handle(marker="o", markerfacecolor=INK, label="everything tried", **blank),
        _handle(marker="|", label="no attack", **{**blank, "markeredgecolor": SOFT}),
    ]
    figure.legend(handles=marks, loc="outside upper center", ncols=3, fontsize=9, handletextpad=0.2)
    return figure


class _Panel(NamedTuple):
    """A panel against the temperature: its quantities, the first solid, others dotted."""

    title: str
    ylabel: str
    quantities: dict[str, Callable[[Network], Stat | None]]
    scale: float = 1.0
    options: Mapping[str, Any] = MappingProxyType({})


def _attacks(found: Sequence[Network]) -> Any:
    """Success of every attack, beside the share of zero gradients that explains it."""
    shares = {"scale": 100.0, "options": {"ylim": (-4, 104)}}
    made = [
        _Panel(
            f"{key.name} ({key.limit})",
            "examples (%)",
            {f"{key.attack} {key.norm} {key.eps} success": _of_attack(key, "success")},
            **shares,  # type: ignore[arg-type]
        )
        for key in attack_keys(found)
    ]
    zero = _Panel(
        "Input gradient exactly zero",
        "examples (%)",
        {"zero_gradient_fraction": lambda network: network.zero_gradients},
        **shares,  # type: ignore[arg-type]
    )
    return _against_temperature(found, [*made, zero] if made else [])


def _accuracy(found: Sequence[Network]) -> Any:
    panels = [
        _Panel("Accuracy on the test set", "%", {"accuracy": lambda net: net.accuracy}, 100.0),
        _Panel(
            "Sensitivity of the logits",
            "mean |∂ Σ logits / ∂x|",
            {"sensitivity_logits": lambda network: network.sensitivity_logits},
            options={"yscale": "log"},
        ),
        _Panel(
            "Sensitivity of the softmax",
            "log₁₀ mean |∂ softmax / ∂x|",
            {"log10_sensitivity_softmax": lambda network: network.log10_sensitivity_softmax},
        ),
    ]
    return _against_temperature(found, panels)


def _robustness(found: Sequence[Network]) -> Any:
    keys = [key for key in attack_keys(found) if key.eps is None and not key.has_no_norm]
    panels = [
        _Panel(
            key.name,
            f"{_words.norm_name(key.norm)} distance",
            {
                f"{key.attack} {key.norm} mean": _of_attack(key, "mean_distance"),
                f"{key.attack} {key.norm} median": _of_attack(key, "median_distance"),
            },
        )
        for key in keys
    ]
    return _against_temperature(found, panels, dotted="median")


def _distances(rows: Sequence[Row], found: Sequence[Network]) -> Any:
    keys = sorted(
        {attack_key({**row, "eps": None}) for row in rows}, key=lambda key: (key.norm, key.attack)
    )
    panels = [
        _Panel(
            key.name,
            f"{_words.norm_name(key.norm)} distance",
            {f"{key.attack} {key.norm} {name}": _of_distance(rows, key, name)},
        )
        for key in keys
        for name in ("median",)
    ]
    return _against_temperature(found, panels)


def _of_attack(key: AttackKey, name: str) -> Callable[[Network], Stat | None]:
    return lambda network: getattr(network.attacks[key], name) if key in network.attacks else None


def _of_distance(
    rows: Sequence[Row], key: AttackKey, name: str
) -> Callable[[Network], Stat | None]:
    own = [row for row in rows if attack_key({**row, "eps": None}) == key]
    return lambda network: stat_of(of_network(own, network), name, file="distances.csv")


def _against_temperature(
    found: Sequence[Network], panels: Sequence[_Panel], dotted: str = ""
) -> Any:
    """Panels of one line per generation; None where one temperature makes no line."""
    ticker = optional("matplotlib.ticker")
    chain = found[-1].chain
    found = [network for network in found if network.chain == chain]
    temperatures = sorted({network.temperature for network in found})
    panels = [panel for panel in panels if _any_known(found, panel)]
    if len(temperatures) < 2 or not panels:
        return None
    figure, cells = _panels(len(panels))
    generations = sorted({network.generation for network in found})
    # Of temperatures that are not finished the last generation is not the chain's.
    lines = {net.generation: net.line for net in sorted(found, key=lambda net: not net.is_last)}
    span = math.log10(temperatures[-1] / temperatures[0])
    for axes, panel in zip(cells, panels, strict=True):
        for number, (name, quantity) in enumerate(panel.quantities.items()):
            for generation in generations:
                own = [net for net in found if net.generation == generation]
                _line(axes, own, quantity, f"{name} generation={generation}", panel, number > 0)
        options = dict(panel.options)
        if options.get("yscale") == "log" and not axes.dataLim.y0 > 0:
            options.pop("yscale")
        axes.set(title=panel.title, xscale="log", xlabel="temperature T", **options)
        pad = 10 ** (0.07 * max(span, 0.6))
        if axes.get_yscale() == "log":
            axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlim(temperatures[0] / pad, temperatures[-1] * pad)
        axes.xaxis.set_major_locator(ticker.FixedLocator(temperatures))
        axes.xaxis.set_major_formatter(ticker.FixedFormatter(_tick_labels(temperatures)))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        if axes.get_subplotspec().is_first_col() or panel.ylabel != panels[0].ylabel:
            axes.set_ylabel(panel.ylabel)
    handles = [
        _handle(label=lines[generation], markersize=5, **_look(generation))
        for generation in generations
    ]
    if dotted:
        handles.append(_handle(color=SOFT, linestyle=":", label=dotted))
    if chain:
        figure.suptitle(f"chain: {chain}", fontsize=9.5)
    figure.legend(handles=handles, loc="outside upper center", ncols=3, fontsize=9.5)
    return figure


def _line(
    axes: Any,
    found: Sequence[Network],
    quantity: Callable[[Network], Stat | None],
    gid: str,
    panel: _Panel,
    faint: bool,
) -> None:
    stats = [(network.temperature, quantity(network)) for network in found]
    points = [(T, stat) for T, stat in stats if stat is not None and stat.known]
    if not points:
        return
    x = np.array([temperature for temperature, _ in points])
    y, low, high = (
        panel.scale * np.array([getattr(stat, end) for _, stat in points])
        for end in ("mean", "low", "high")
    )
    look = _look(found[0].generation)
    look = {**look, "linestyle": ":", "marker": ""} if faint else look
    (line,) = axes.plot(x, y, markersize=5, linewidth=1.2 if faint else 1.7, zorder=3, **look)
    line.set_gid(gid)
    if not faint:
        bars = [np.maximum(y - low, 0), np.maximum(high - y, 0)]
        axes.errorbar(x, y, yerr=bars, fmt="none", ecolor=look["color"], capsize=2.5, linewidth=1)


def _look(generation: int) -> dict[str, Any]:
    place = generation if generation < len(_GENERATIONS) else 1 + (generation - 1) % 4
    style = "--" if generation == 0 else "-"
    return {"color": _GENERATIONS[place], "marker": _MARKERS[place], "linestyle": style}


def _any_known(found: Sequence[Network], panel: _Panel) -> bool:
    stats = [quantity(network) for network in found for quantity in panel.quantities.values()]
    return any(stat is not None and stat.known for stat in stats)


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


def _curves(
    rows: Sequence[Row], distances: Sequence[Row], curve: str, found: Sequence[Network]
) -> Any:
    """Accuracy under attack against its radius, steps, or queries; a panel per attack."""
    rows = [row for row in rows if row["curve"] == curve]
    keys = list(dict.fromkeys(attack_key(row) for row in rows))
    networks = shown(found)
    made: dict[str, set[str]] = {}
    beside = [attack_key({**row, "eps": None}) for row in distances]
    for key in [*attack_keys(found), *beside]:
        made.setdefault(key.norm, set()).add(key.name)
    drawn = {}
    for key in keys:
        lines = [
            (network, _points([row for row in rows if attack_key(row) == key], network))
            for network in networks
        ]
        if own := [(network, points) for network, points in lines if points]:
            drawn[key] = own
    if not drawn:
        return None
    figure, cells = _panels(len(drawn))
    temperatures = sorted({network.temperature for network in networks})
    for axes, (key, own) in zip(cells, drawn.items(), strict=True):
        for network, points in own:
            x = np.array(list(points))
            mean, low, high = (
                100 * np.array([getattr(stat, end) for stat in points.values()])
                for end in ("mean", "low", "high")
            )
            color = network_look(temperatures, network.temperature, network.generation)["color"]
            style = {"color": color, "linestyle": "--" if network.is_reference else "-"}
            marker = "" if len(x) > _MANY_POINTS else "o"
            axes.plot(x, mean, marker=marker, markersize=4.5, linewidth=1.7, zorder=3, **style)
            axes.lines[-1].set_gid(f"{curve} {key.attack} {_place(network)}")
            axes.fill_between(x, low, high, color=color, alpha=0.15, linewidth=0, zorder=2)
        limit = _words.norm_name(key.norm) if curve == "eps" else key.limit
        name = key.name
        if key.attack == "worst_case":  # of all attacks in the norm, which may be one
            own_names = made.get(key.norm, set())
            name = next(iter(own_names)) if len(own_names) == 1 else "everything"
        axes.set(title=f"{name} ({limit})", ylim=(-4, 104), xlabel=_AXES[curve])
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("accuracy left (%)")
    handles = [
        _handle(
            color=network_look(temperatures, network.temperature, network.generation)["color"],
            linestyle="--" if network.is_reference else "-",
            label=_short(network),
        )
        for network in networks
    ]
    _legend(figure, handles)
    return figure


def _legend(figure: Any, handles: Sequence[Any]) -> None:
    """A legend above everything, in as many columns as the figure is wide enough for."""
    columns = 3
    while True:
        legend = figure.legend(
            handles=handles, loc="outside upper center", ncols=columns, fontsize=9
        )
        figure.draw_without_rendering()
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()
        columns -= 1


def _points(rows: Sequence[Row], network: Network) -> dict[float, Stat]:
    """By place, what is left."""
    points: dict[float, list[Row]] = {}
    for row in of_network(rows, network):
        points.setdefault(float(f"{float(row['x']):.6g}"), []).append(row)
    return {
        place: stat_of(
            points[place], "robust_accuracy", file="curves.csv", over_all=("low", "high")
        )
        for place in sorted(points)
    }


def _place(network: Network) -> str:
    return f"T={network.temperature:g} generation={network.generation}"


def _short(network: Network) -> str:
    if not network.distilled:
        return network.name
    parts = [network.chain, f"T = {network.temperature:g}", network.line]
    return ", ".join(filter(None, parts))


def _panels(number: int, height: float = 2.6) -> tuple[Any, list[Any]]:
    """A figure of equal panels, at most three per row; `height` in inches each."""
    columns = 2 if number == 4 else min(number, 3)
    rows = math.ceil(number / columns)
    size = ({1: 5.7, 2: _WIDTH}.get(columns, 8.8), 3.6 if number == 1 else 0.6 + height * rows)
    figure = optional("matplotlib.figure").Figure(figsize=size, layout="constrained")
    cells = list(figure.subplots(rows, columns, squeeze=False).flat)
    for unused in cells[number:]:
        unused.remove()
    return figure, cells[:number]


def _handle(**look: Any) -> Any:
    return optional("matplotlib.lines").Line2D([], [], linewidth=1.7, **look)
