"""Papernot et al. 2016, "Distillation as a Defense": JSMA, sensitivity, and robustness against T.

"None" is the ordinary network; the distilled ones are students without an assistant.
"""

import math
from typing import Any

import numpy as np

from experiments.papers.measures import Row, Source, named, shown, targeted
from jdistill import attacks, metrics

# JSMA success (%), at most 112 changed features, read off a picture of their table.
_SUCCESS = {
    "mnist": dict(
        zip(
            ("none", 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 100.0),
            (95.89, 91, 82.23, 24.67, 6.78, 1.34, 1.44, 0.45, 1.45, 0.45),
            strict=True,
        )
    ),
    "cifar10": dict(
        zip(
            ("none", 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 100.0),
            (87.89, 92.78, 87.67, 67, 47.56, 18.23, 13.23, 9.34, 6.23, 5.11),
            strict=True,
        )
    ),
}
# Robustness (% of the features), read off figures; "none" and the largest T from their text.
_ROBUSTNESS = {
    "mnist": {"none": 1.55, 1.0: 1.2, 2.0: 1.5, 5.0: 9.6, 10.0: 11.7, 20.0: 13.8, 40.0: 14.1},
    "cifar10": {"none": 0.39, 1.0: 0.45, 2.0: 0.4, 5.0: 0.9, 10.0: 1.4, 20.0: 2.1, 40.0: 2.5},
}
# Share of the images (%) whose mean gradient is below 1e-40 and above 1e-3, CIFAR-10, off bars.
_BELOW = {"none": 0, 1.0: 0, 2.0: 0, 5.0: 1, 10.0: 17, 20.0: 43, 30.0: 53, 40.0: 63, 50.0: 68}
_BELOW[100.0] = 79
_ABOVE = {"none": 48, 1.0: 47, 2.0: 31, 5.0: 16, 10.0: 10, 20.0: 6, 30.0: 5, 40.0: 4, 50.0: 3}
_ABOVE[100.0] = 2


def jacobian(source: Source) -> list[Row]:
    """JSMA on the softmax at T = 1, towards 9 targets."""
    networks = [*source.networks(**source.plain), *source.networks(generations=[1])]
    size = int(np.prod(source.test.inputs.shape[1:]))
    return [
        {**hit.row(), "name": _name(hit.network), "num_features": size}
        for hit in targeted(source, networks, "jsma", attacks.jsma)
    ]


def success_table(rows: list[Row]) -> list[Any]:
    """Success against T, beside the published one."""
    lines = [["network", "JSMA success (%)", "published, MNIST", "published, CIFAR-10"]]
    for name, own in _by_name(rows):
        lines.append(
            [
                _shown(name),
                shown([100 * row["success"] for row in own], 1, share=True),
                *(str(_SUCCESS[dataset].get(name, "–")) for dataset in ("mnist", "cifar10")),
            ]
        )
    return [lines]


def robustness_table(rows: list[Row]) -> list[Any]:
    """ρ_adv: the least share of changed features over the targets, in the mean over images.

    An image on which JSMA fails towards every target counts with its limit, 14.5%, as it must for
    the published curve to end near 14%; and alone, over the successes.
    """
    lines = [["network", "ρ_adv (%)", "over successes (%)", "published, MNIST", "CIFAR-10"]]
    for name, own in _by_name(rows):
        lines.append(
            [
                _shown(name),
                shown([_robustness(row) for row in own], 2),
                shown([100 * row["best"] / row["num_features"] for row in own], 2),
                *(str(_ROBUSTNESS[dataset].get(name, "–")) for dataset in ("mnist", "cifar10")),
            ]
        )
    return [lines]


def _robustness(row: Row) -> float:
    some = row["images_with_success"] / row["num_images"] if row["num_images"] else math.nan
    found = row["best"] / row["num_features"] if some else 0.0
    return float(100 * (some * found + (1 - some) * 0.145))


def sensitivity(source: Source) -> list[Row]:
    """The histogram of mean absolute gradients of the softmax, in ten bins."""
    rows = []
    for network, found in [*source.clean(**source.plain), *source.clean(generations=[1])]:
        histogram = metrics.sensitivity_histogram(found.log10_sensitivity_softmax_examples[0])
        bins = zip(histogram.edges, histogram.edges[1:], histogram.counts, strict=False)
        rows += [
            {
                **named(network._asdict()),
                "name": _name(network),
                "low": float(low),
                "high": float(high),
                "count": int(count),
            }
            for low, high, count in bins
        ]
    return rows


def sensitivity_table(rows: list[Row]) -> list[Any]:
    """The shares of the lowest and the highest bins, beside the published ones."""
    lines = [
        ["network", "below 1e-40 (%)", "above 1e-3 (%)", "published, CIFAR-10: below", "above"]
    ]
    for name, own in _by_name(rows):
        shares: dict[str, list[float]] = {"below": [], "above": []}
        for seed in sorted({row["seed"] for row in own}):
            bins = [row for row in own if row["seed"] == seed]
            total = sum(row["count"] for row in bins)
            below = sum(row["count"] for row in bins if row["high"] <= -40)
            above = sum(row["count"] for row in bins if row["low"] >= -3)
            shares["below"].append(100 * below / total)
            shares["above"].append(100 * above / total)
        published = [str(found.get(name, "–")) for found in (_BELOW, _ABOVE)]
        lines.append(
            [_shown(name), *(shown(each, 1, share=True) for each in shares.values()), *published]
        )
    return [lines]


def _name(network: Any) -> Any:
    return "none" if network.generation == 0 else network.temperature


def _by_name(rows: list[Row]) -> list[tuple[Any, list[Row]]]:
    names = sorted({row["name"] for row in rows}, key=lambda name: 0.0 if name == "none" else name)
    return [(name, [row for row in rows if row["name"] == name]) for name in names]


def _shown(name: Any) -> str:
    return "plain" if name == "none" else f"T = {name:g}"
