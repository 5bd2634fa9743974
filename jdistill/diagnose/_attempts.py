"""What was tried, in words."""

import numpy as np

from jdistill import metrics
from jdistill.diagnose import _evidence, _thresholds
from jdistill.diagnose._evidence import Evidence, Settings
from jdistill.diagnose._verdict import Attempt

_LEFT = "on what the usual attack left"


def attempts(evidence: Evidence, settings: Settings) -> tuple[Attempt, ...]:
    """The attacks of the worst case, in order, with what stands after each."""
    left, rows = evidence.correct, []
    for name, title, words in _described(evidence, settings):
        left = left & ~evidence.broken[name]
        share = metrics.proportion(int(left.sum()), left.size)
        rows.append(Attempt(title, share, words))
    return tuple(rows)


def budget(attempts: tuple[Attempt, ...], evidence: Evidence, settings: Settings) -> str:
    """What was tried, in one line."""
    names = ", ".join(attempt.name for attempt in attempts)
    return (
        f"{names}, at {settings.norm} {settings.eps:g}, {evidence.labels.size} examples of "
        f"{len(np.unique(evidence.labels))} classes"
    )


def _described(evidence: Evidence, settings: Settings) -> list[tuple[str, str, str]]:
    """Of each attack its key in the evidence, its title and its settings."""
    steps, auto = _evidence.NUM_STEPS, _evidence.NUM_AUTO_STEPS
    size = f"steps of {2.5 * settings.eps / steps:.3g}"
    smaller = _thresholds.SMALLER_RADIUS
    temperature = f"T = {evidence.probe_temperature:.3g}"
    auto_loss = "DLR" if evidence.num_classes >= 3 else "margin"
    targets = min(_evidence.NUM_TARGETS, evidence.num_classes - 1)
    every = [
        ("naive", f"PGD-{steps}", f"cross-entropy at T = 1, one random start, {size}"),
        ("half", f"PGD-{steps} at {smaller:g} eps", "the same in a smaller ball"),
        (
            "temperature",
            f"PGD-{steps} at {temperature}",
            f"cross-entropy at {temperature}, the same start and steps, {_LEFT}",
        ),
        (
            "margin",
            f"PGD-{steps} on the margin",
            f"max over i != y of z_i, minus z_y, the same start and steps, {_LEFT}",
        ),
        ("one_step", "FGSM", f"cross-entropy at T = 1, one step of eps, {_LEFT}"),
        ("noise", "random noise", f"{_evidence.NUM_NOISE} draws, {_LEFT}"),
        ("square", f"Square {settings.num_queries}", f"{settings.num_queries} queries, {_LEFT}"),
        (
            "transfer",
            "transfer",
            f"APGD with {auto} steps on the surrogate's margin, past its boundary, {_LEFT}",
        ),
        (
            "dlr",
            f"APGD-{auto_loss} {auto}",
            f"{auto} steps, on what PGD on the cross-entropy and on the margin left",
        ),
        (
            "targeted",
            f"APGD-T {targets} x {auto}",
            f"{targets} classes, {auto} steps each, on what everything before left",
        ),
        (
            "more",
            f"{_evidence.NUM_MORE} more starts",
            f"PGD-{steps} on the margin from {_evidence.NUM_MORE} further random starts, on what "
            "everything before left",
        ),
    ]
    return [row for row in every if row[0] in evidence.broken]
