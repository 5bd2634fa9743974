"""Mandal & Gao 2023: accuracy, sensitivity, and robustness of chains, by temperature and length.

Their tables could not be had, so their claims are tested: an assistant improves robustness "in most
cases", more of them improve it further, and accuracy hardly changes. The plain student, without an
assistant, is the control; seeds are pairs.
"""

import functools
from typing import Any

from experiments.papers.measures import (
    Form,
    Hits,
    Row,
    Source,
    by_length,
    named,
    over_lengths,
    targeted,
)
from jdistill import attacks

_PERCENT = 100.0
_ACCURACY = Form("test accuracy (%)", 2, _PERCENT)
_DISTANCE = Form("C&W L2, mean over 9 targets", 3)


def accuracy(source: Source) -> list[Row]:
    """Test accuracy of every network."""
    return [
        {
            **named(network._asdict()),
            "test_accuracy": found.accuracy[0].value,
            "mean_abs_logit": float(found.mean_abs_logit[0]),
        }
        for network, found in source.clean()
    ]


def accuracy_table(rows: list[Row]) -> list[Any]:
    """By temperature and chain length."""
    return [
        by_length(rows, "test_accuracy", _ACCURACY),
        by_length(rows, "mean_abs_logit", Form("mean abs. logit", 1)),
    ]


def sensitivity(source: Source) -> list[Row]:
    """Sensitivity of the logits (the released code's) and of the softmax (Papernot et al.)."""
    return [
        {
            **named(network._asdict()),
            **{name: float(getattr(found, name)[0]) for name in _SENSITIVITIES},
        }
        for network, found in source.clean()
    ]


_SENSITIVITIES = {
    "sensitivity_logits": Form("mean abs. gradient of the summed logits", 3),
    "log10_sensitivity_softmax": Form("log10 of the mean abs. gradient of the softmax", 2),
    "zero_gradient_fraction": Form("gradient exactly zero (% of images)", 1, _PERCENT),
}


def sensitivity_table(rows: list[Row]) -> list[Any]:
    """By temperature and chain length."""
    return [by_length(rows, name, form) for name, form in _SENSITIVITIES.items()]


# Fewer searches from a larger constant would not do: at T = 100 the logits are a hundred times as
# large, the constant that fits a hundredth, and 5 searches from 0.1 end at distances a fifth too
# large, which looks like robustness that grows with T.
FEW_STEPS = functools.partial(
    attacks.carlini_wagner_l2, num_searches=9, num_steps=200, learning_rate=0.1, initial_const=0.01
)


def carlini_wagner(source: Source) -> Any:
    """The attack as the scale has it: the released code's settings, or fewer steps."""
    return attacks.carlini_wagner_l2 if source.full else FEW_STEPS


def hits(source: Source, **where: Any) -> list[Hits]:
    """C&W L2 on networks, towards every class."""
    networks = source.networks(**where)
    return targeted(source, networks, "carlini_wagner_l2", carlini_wagner(source))


def robustness(source: Source) -> list[Row]:
    """C&W L2 towards 9 targets, AutoAttack, and the verdict, with 0 and 1 assistants."""
    return _robustness(source, generations=[0, 1, 2])


def multistep(source: Source) -> list[Row]:
    """The same of all chain lengths."""
    return _robustness(source)


def _robustness(source: Source, **where: Any) -> list[Row]:
    measured = {tuple(named(row).values()): row for row in source.measured()}
    labels = {tuple(named(row).values()): row["verdict"].label for row in source.rows("verdicts")}
    rows = []
    for hit in hits(source, **where):
        row = hit.row()
        place = tuple(named(row).values())
        rows.append(
            {
                **row,
                "rho_adv": row["best"],  # the mean of the least distance over the targets
                "test_accuracy": measured[place]["test_accuracy"],
                "robust_accuracy": measured[place]["robust_accuracy"],
                "verdict": labels.get(place, ""),
            }
        )
    return rows


def robustness_table(rows: list[Row]) -> list[Any]:
    """By temperature and chain length, with the verdicts of the first seed."""
    verdicts = [["verdict (first seed)", "no assistant", "1 assistant"]]
    for temperature in sorted({row["temperature"] for row in rows}):
        found = {
            row["generation"]: row["verdict"]
            for row in rows
            if row["temperature"] == temperature and row["verdict"]
        }
        verdicts.append([f"T = {temperature:g}", found.get(1, "–"), found.get(2, "–")])
    return [
        by_length(rows, "success", Form("C&W L2 success (%)", 1, _PERCENT)),
        by_length(rows, "average", _DISTANCE),
        by_length(rows, "rho_adv", Form("ρ_adv: C&W L2, least over targets", 3)),
        by_length(rows, "robust_accuracy", Form("accuracy under AutoAttack (%)", 1, _PERCENT)),
        verdicts,
    ]


def multistep_table(rows: list[Row]) -> list[Any]:
    """By chain length, over all temperatures."""
    forms = {
        "test_accuracy": _ACCURACY,
        "average": _DISTANCE,
        "robust_accuracy": Form("accuracy under AutoAttack (%)", 1, _PERCENT),
    }
    return [over_lengths(rows, forms)]
