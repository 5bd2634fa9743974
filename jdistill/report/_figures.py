"""The figures of a report: what they show of the rows of `results.csv`, and all of them as files.

Each `*_figure` function returns a `Figure` and draws from `Network`s; `write_figures` saves them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from etils import epath

from jdistill._files import PathLike, as_path
from jdistill.report import _measure_figures, _text
from jdistill.report._drawing import StatOf, finish, handle, lines, panels, styled, write_png
from jdistill.report._measures import complete
from jdistill.report._networks import AttackKey, Network, Stat, attack_keys, networks
from jdistill.report._optional import optional
from jdistill.report._table import Row
from jdistill.report._verdicts import judge


def write_figures(
    rows: Iterable[Row],
    directory: PathLike,
    measures: Mapping[str, Iterable[Row]] | None = None,
) -> dict[str, epath.Path]:
    """Draws accuracy, sensitivity and robustness against temperature, as PNG files.

    In every figure a line is a chain length (the teacher; the student of 0, 1, 2, … assistants).
    With one seed the bars are 95 % intervals where the rows have them; with several, the line is
    their mean and the band reaches from the lowest to the highest.

    Args:
        rows: As for `write_results`.
        directory: Where the files go; it is made.
        measures: What else was measured, as `read_measures` gives it.

    Returns:
        The path of each figure by its name: `attacks` (the success rate of every attack, and the
        share of zero gradients that explains it), `robustness` (mean and median distance of the
        minimum-norm attacks), `accuracy`, `sensitivity` (of the logits and of the softmax); of the
        measures `verdict`, `curve-eps`, `curve-steps`, `curve-queries`, `distances`,
        `sensitivity-bins` and `transfer`. A figure without anything to draw is left out. With
        several data sets the names end in theirs: `accuracy_mnist`.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: As `write_results`; or there is no row.
    """
    optional("matplotlib")
    found = networks(rows)
    folder = as_path(directory)
    every = complete(measures, found)
    datasets = sorted({network.dataset for network in found})
    written = {}
    for dataset in datasets:
        chosen = [network for network in found if network.dataset == dataset]
        for name, draw in {**_FIGURES, **_of_measures(every)}.items():
            figure = draw(chosen)
            if figure is None:
                continue
            full = name if len(datasets) == 1 else f"{name}_{dataset}"
            written[full] = write_png(figure, folder / f"{full}.png")
    return written


def _of_measures(
    every: Mapping[str, Sequence[Row]],
) -> dict[str, Callable[[Sequence[Network]], Any]]:
    """What draws each figure of the measures, from a data set's networks."""
    curves = {
        f"curve-{curve}": partial(_measure_figures.curve_figure, rows=every["curves"], curve=curve)
        for curve in ("eps", "steps", "queries")
    }
    # The same quantity in more norms: one of the two figures is enough.
    replaced = {"robustness": lambda found: None} if every["distances"] else {}
    return {
        **replaced,
        "verdict": lambda found: _measure_figures.verdict_figure(judge(found, every["verdicts"])),
        **curves,
        "sensitivity-bins": partial(_measure_figures.bins_figure, rows=every["sensitivity"]),
        "distances": partial(_measure_figures.distances_figure, rows=every["distances"]),
        "transfer": partial(_measure_figures.transfer_figure, rows=every["transfer"]),
    }


@styled
def accuracy_figure(found: Sequence[Network]) -> Any:
    """Test accuracy in percent against temperature."""
    figure, (axes,) = panels(1)
    lines(axes, found, "accuracy", lambda net: net.accuracy, scale=100)
    axes.set(title="Accuracy on the clean test set", ylabel="test accuracy (%)")
    low, high = axes.get_ylim()
    # A narrower window would make the noise of a test set look like an effect.
    middle = min((low + high) / 2, 99.2)
    half = max((high - low) / 2, 1.0)
    axes.set_ylim(max(middle - half, -2), min(middle + half, 101))
    return finish(figure, [axes], found)


@styled
def sensitivity_figure(found: Sequence[Network]) -> Any:
    """Both sensitivities against temperature, one panel each; None where neither is known."""
    if not _any_known(found, [_logit_sensitivity, _softmax_sensitivity]):
        return None
    figure, (left, right) = panels(2)
    lines(left, found, "sensitivity_logits", _logit_sensitivity)
    lines(right, found, "log10_sensitivity_softmax", _softmax_sensitivity)
    if any(stat(net).mean > 0 for net in found for stat in [_logit_sensitivity]):
        left.set_yscale("log")
    left.set(title="of the logits", ylabel="mean |∂ Σ logits / ∂x|")
    right.set(title="of the softmax at T = 1", ylabel="log₁₀ mean |∂ softmax / ∂x|")
    return finish(figure, [left, right], found)


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
    figure, cells = panels(len(keys))
    for axes, key in zip(cells, keys, strict=True):
        name = f"{key.attack} {key.norm}"
        lines(axes, found, f"{name} mean", _distance(key, "mean_distance"))
        lines(axes, found, f"{name} median", _distance(key, "median_distance"), faint=True)
        unit = f"{_text.norm_name(key.norm)} distance (input units)"
        axes.set(title=_text.attack_name(key), ylabel=unit)
        axes.set_ylim(bottom=0)
    handles = [
        handle(color="#777777", linestyle="-", label="mean over successes"),
        handle(color="#777777", linestyle=":", label="median"),
    ]
    return finish(figure, cells, found, extra=handles)


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
    figure, cells = panels(len(keys) + zero)
    for axes, key in zip(cells, keys, strict=False):
        name = f"{key.attack} {key.norm} {key.eps} success"
        lines(axes, found, name, _success(key), scale=100)
        axes.set(title=_text.attack_label(key), ylim=(-4, 104))
    if zero:
        lines(cells[-1], found, "zero_gradient_fraction", _zero_gradients, scale=100)
        cells[-1].set(title="Input gradient exactly zero", ylim=(-4, 104))
        cells[-1].set_facecolor("#f1f1f1")  # evidence, not an attack
    for axes in cells:
        if axes.get_subplotspec().is_first_col():
            axes.set_ylabel("share of examples (%)")
    return finish(figure, cells, found)


_FIGURES: dict[str, Callable[[Sequence[Network]], Any]] = {
    "attacks": attacks_figure,
    "robustness": robustness_figure,
    "accuracy": accuracy_figure,
    "sensitivity": sensitivity_figure,
}


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
