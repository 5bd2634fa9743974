"""The checks: pure functions of the evidence."""

from collections.abc import Mapping

import numpy as np

from jdistill import metrics
from jdistill._words import percent, temperature
from jdistill.diagnose import _thresholds as limits
from jdistill.diagnose._evidence import Evidence
from jdistill.diagnose._verdict import Check

_ATHALYE = 'Athalye, Carlini & Wagner 2018, "Obfuscated Gradients Give a False Sense of Security"'
_CARLINI = 'Carlini et al. 2019, "On Evaluating Adversarial Robustness"'
_PINTOR = 'Pintor et al. 2022, "Indicators of Attack Failure"'
_CROCE = 'Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness"'
_DISTILLED = 'Carlini & Wagner 2016, "Defensive Distillation is Not Robust to Adversarial Examples"'

_IN_DOUBT = (
    f"masked where at least {limits.GAP:.0%} of all examples, and {limits.GAP_EXAMPLES}, stand on "
    f"it, and the lower end of the interval is at least {limits.GAP_LOW:.0%}"
)
_GAP = (
    f"{_IN_DOUBT}; a gap that the usual attack closes by more than {1 - limits.GAP_REMAINS:.0%} at "
    f"{limits.LARGER_RADIUS:g} eps is one of strength"
)


def all_checks(evidence: Evidence) -> tuple[Check, ...]:
    """Every check, in the order of a report."""
    return (
        zero_gradients(evidence),
        temperature_probe(evidence),
        loss_gap(evidence),
        black_box(evidence),
        transfer(evidence),
        random_noise(evidence),
        one_step(evidence),
        gradient_agreement(evidence),
        unbounded(evidence),
        eps_curve(evidence),
        more_effort(evidence),
        still_moving(evidence),
        silent_success(evidence),
        finite_logits(evidence),
        classes(evidence),
    )


def _share(mask: np.ndarray) -> float:
    return float(np.mean(mask))


def _of(mask: np.ndarray, among: np.ndarray) -> float:
    """The share of the mask among some examples; 0 where there are none."""
    return float(np.mean(mask[among])) if among.any() else 0.0


def _doubt(in_doubt: np.ndarray) -> tuple[str, dict[str, float]]:
    """The outcome of a share of examples whose standing is in doubt, and its figures."""
    share = metrics.proportion(int(in_doubt.sum()), in_doubt.size)
    figures = {"in_doubt": share.value, "in_doubt_low": share.low, "in_doubt_high": share.high}
    if share.value < limits.GAP:
        return "clear", figures
    enough = share.low >= limits.GAP_LOW and in_doubt.sum() >= limits.GAP_EXAMPLES
    return ("masked" if enough else "undecided"), figures


def _gap(evidence: Evidence, by: np.ndarray) -> tuple[str, dict[str, float]]:
    """The outcome of what another attack breaks of those that the usual one left."""
    gap = evidence.standing & by
    outcome, figures = _doubt(gap)
    remains = _of(~evidence.double, gap)
    if remains < limits.GAP_REMAINS:
        outcome = "clear"
    share, low, high = figures.values()
    return outcome, {"gap": share, "gap_low": low, "gap_high": high, "remains_at_double": remains}


def _gap_finding(figures: Mapping[str, float], by: str) -> str:
    """The figures of a gap, as a sentence."""
    if figures["gap"] == 0:
        return f"Of what the usual attack left, {by} breaks nothing."
    text = f"Of what the usual attack left, {by} breaks {percent(figures['gap'])} of all examples"
    return (
        f"{text}; of these the usual attack leaves {percent(figures['remains_at_double'])} "
        f"even at {limits.LARGER_RADIUS:g} eps."
    )


def zero_gradients(evidence: Evidence) -> Check:
    """Exactly zero input gradients: nothing to follow."""
    correct, sizes = evidence.correct, evidence.gradients
    figures = {}
    for name, size in sizes._asdict().items():
        figures[f"zero_{name}"] = _of(size == 0, correct)
        figures[f"tiny_{name}"] = _of(size < limits.TINY_GRADIENT, correct)
        figures[f"nonfinite_{name}"] = _of(np.isnan(size), correct)
    figures["loss_never_changed"] = _of(evidence.flat, evidence.standing)
    blind = (sizes.cross_entropy == 0) | np.isnan(sizes.cross_entropy)
    outcome, shares = _doubt(evidence.standing & blind)
    every = [np.nan_to_num(size) == 0 for size in sizes]
    figures["zero_every_loss"] = _of(np.all(every, axis=0), correct)
    finding = (
        f"The gradient of the cross-entropy at T = 1 is exactly zero or not finite for "
        f"{percent(_of(blind, correct))} of the correct examples, that of the margin for "
        f"{percent(_of(every[2], correct))}."
    )
    return Check(
        "zero_gradients",
        "Gradients that are exactly zero",
        outcome,
        {**figures, **shares},
        f"{_IN_DOUBT}, by the cross-entropy at T = 1; tiny is below {limits.TINY_GRADIENT:g} and "
        "decides nothing",
        finding,
        f"{_DISTILLED}; {_ATHALYE}, section 3",
    )


def temperature_probe(evidence: Evidence) -> Check:
    """The same attack on the cross-entropy at a temperature."""
    outcome, figures = _gap(evidence, evidence.broken_by("temperature"))
    figures["temperature"] = evidence.probe_temperature
    name = f"the same attack at T = {temperature(evidence.probe_temperature)}"
    return Check(
        "temperature_probe",
        "The usual attack on the logits divided by T",
        outcome,
        figures,
        _GAP,
        _gap_finding(figures, name),
        _DISTILLED,
    )


def loss_gap(evidence: Evidence) -> Check:
    """The same attack on losses that do not know the logits' scale."""
    by = evidence.broken_by("margin", "dlr")
    outcome, figures = _gap(evidence, by)
    figures["margin_alone"] = _share(evidence.standing & evidence.broken["margin"])
    return Check(
        "loss_gap",
        "The usual attack on other losses",
        outcome,
        figures,
        _GAP,
        _gap_finding(figures, "PGD on the margin or APGD-DLR"),
        f"{_CROCE}, section 4",
    )


def black_box(evidence: Evidence) -> Check:
    """An attack that sees the logits only."""
    title, source = "An attack without gradients", f"{_ATHALYE}, section 3.1"
    if "square" not in evidence.broken:
        finding = "Square Attack is not defined for l1."
        return Check("black_box", title, "not run", {}, _GAP, finding, source)
    square = evidence.broken["square"]
    outcome, figures = _gap(evidence, square)
    by_gradients = evidence.broken_by("half", "temperature", "margin", "dlr", "target", "more")
    figures["beyond_every_gradient"] = _share(evidence.standing & square & ~by_gradients)
    finding = _gap_finding(figures, "Square Attack")
    if figures["gap"]:
        beyond = percent(figures["beyond_every_gradient"])
        finding += f" {beyond} of all fall to it and to no attack with gradients."
    return Check("black_box", title, outcome, figures, _GAP, finding, source)


def transfer(evidence: Evidence) -> Check:
    """Examples crafted on another network."""
    title = "Examples crafted on another network"
    source = f"{_CARLINI}; {_PINTOR}"
    if "transfer" not in evidence.broken:
        finding = "No surrogate was given; pass the undistilled network as surrogate."
        return Check("transfer", title, "not run", {}, _GAP, finding, source)
    outcome, figures = _gap(evidence, evidence.broken["transfer"])
    finding = _gap_finding(figures, "what was crafted on the surrogate")
    return Check("transfer", title, outcome, figures, _GAP, finding, source)


def random_noise(evidence: Evidence) -> Check:
    """Random points of the ball."""
    outcome, figures = _gap(evidence, evidence.broken["noise"])
    return Check(
        "random_noise",
        "Random noise of the same size",
        outcome,
        figures,
        _GAP,
        _gap_finding(figures, "random noise"),
        f"{_ATHALYE}, section 3.1; {_CARLINI}",
    )


def one_step(evidence: Evidence) -> Check:
    """A single step of the whole radius."""
    outcome, figures = _gap(evidence, evidence.broken["one_step"])
    return Check(
        "one_step",
        "One step instead of many",
        outcome,
        figures,
        _GAP,
        _gap_finding(figures, "a single step (FGSM)"),
        f"{_ATHALYE}, section 3.1",
    )


def gradient_agreement(evidence: Evidence) -> Check:
    """Differences of the margin against its gradient."""
    agreement, correct = evidence.agreement, evidence.correct
    differs = agreement.local | agreement.jump | agreement.unrepeated
    outcome, figures = _doubt(evidence.standing & differs)
    figures |= {
        "local_disagrees": _of(agreement.local, correct),
        "jumps": _of(agreement.jump, correct),
        "unrepeated": _of(agreement.unrepeated, correct),
    }
    return Check(
        "gradient_agreement",
        "Logits change as their gradient says",
        outcome,
        figures,
        f"{_IN_DOUBT}; disagree: more than {limits.DISAGREEMENT:.0%} off over a step of "
        f"{limits.LOCAL_STEP:g} eps, or {limits.JUMP:g} times the prediction over one of eps, or "
        "other logits for the same input",
        f"The margin does not change as its gradient says for {percent(_of(differs, correct))} of "
        "the correct examples.",
        f"{_ATHALYE}, section 3 (shattered and stochastic gradients)",
    )


def unbounded(evidence: Evidence) -> Check:
    """The usual attack with the whole box to move in."""
    outcome, figures = _doubt(evidence.unbounded)
    left = figures["in_doubt"]
    figures["left_by_margin_too"] = _share(evidence.unbounded_margin)
    if outcome == "clear" and figures["left_by_margin_too"] > limits.UNBOUNDED_LEFT:
        outcome = "undecided"
    return Check(
        "unbounded",
        "The usual attack without a bound",
        outcome,
        figures,
        f"{_IN_DOUBT}; undecided where margin too leaves more than {limits.UNBOUNDED_LEFT:.0%}",
        f"With the whole box to move in, the usual attack leaves {percent(left)} of all examples "
        "right, where nothing should be.",
        f"{_ATHALYE}, section 3.1; {_CARLINI}",
    )


def eps_curve(evidence: Evidence) -> Check:
    """Robust accuracy must fall as the radius grows."""
    gap, left = evidence.standing & ~evidence.survivors, evidence.correct & ~evidence.double
    rising = left & ~evidence.standing
    # As in `_gap`: a gap that mostly closes at the larger radius is one of strength.
    remains = _of(~evidence.double, gap)
    outcome, _ = _doubt(rising | (gap & left) if remains >= limits.GAP_REMAINS else rising)
    _, figures = _doubt(left & ~evidence.survivors)
    figures |= {
        "rising": _share(rising),
        "remains_at_double": remains,
        "robust_accuracy_at_half": _share(evidence.correct & ~evidence.broken["half"]),
        "robust_accuracy_at_eps": _share(evidence.standing),
        "robust_accuracy_at_double": _share(evidence.correct & ~evidence.double),
        "only_at_half": _share(evidence.standing & evidence.broken["half"]),
    }
    rates = " / ".join(
        percent(figures[f"robust_accuracy_at_{name}"]) for name in ("half", "eps", "double")
    )
    return Check(
        "eps_curve",
        "A smaller and a larger radius",
        outcome,
        figures,
        f"{_GAP}: broken by any attack at eps, yet not by the usual one at "
        f"{limits.LARGER_RADIUS:g} eps",
        f"The usual attack leaves {rates} right at {limits.SMALLER_RADIUS:g} / 1 / "
        f"{limits.LARGER_RADIUS:g} eps, and at {limits.LARGER_RADIUS:g} eps "
        f"{percent(figures['in_doubt'])} that others break at eps.",
        f"{_ATHALYE}, section 3.1; {_CARLINI}",
    )


def more_effort(evidence: Evidence) -> Check:
    """Further starts after everything else."""
    share = metrics.proportion(int(evidence.broken_by("more").sum()), evidence.labels.size)
    helps = share.value >= limits.MORE and share.low >= limits.MORE_LOW
    return Check(
        "more_effort",
        "More random starts after everything else",
        "undecided" if helps else "clear",
        {"broken": share.value, "broken_low": share.low, "broken_high": share.high},
        f"undecided where at least {limits.MORE:.0%} of all examples fall, and the lower end of "
        f"the interval is at least {limits.MORE_LOW:.0%}",
        f"Further random starts of PGD on the margin break {percent(share.value)} of all examples "
        "that stood against everything before.",
        f"{_CARLINI}",
    )


def still_moving(evidence: Evidence) -> Check:
    """The margin over the last steps of the attack on it."""
    share = _of(evidence.moving, evidence.standing & ~evidence.broken["margin"])
    return Check(
        "still_moving",
        "Progress in the last steps",
        "undecided" if share > limits.MOVING_SHARE else "clear",
        {"moving": share},
        f"undecided where more than {limits.MOVING_SHARE:.0%} of the examples left have a margin "
        f"whose best value rose by more than {limits.MOVING:.0%} of its whole rise in the last "
        f"{limits.LAST_STEPS} steps",
        f"The margin still rose in the last {limits.LAST_STEPS} steps for {percent(share)} of the "
        "examples that PGD on it left.",
        f"{_PINTOR}",
    )


def silent_success(evidence: Evidence) -> Check:
    """The usual attack's path, against its result."""
    outcome, figures = _doubt(evidence.on_path | evidence.lapsed)
    figures |= {"not_returned": _share(evidence.on_path), "lapsed": _share(evidence.lapsed)}
    return Check(
        "silent_success",
        "Successes that were not returned",
        outcome,
        figures,
        _IN_DOUBT,
        f"The usual attack met a success and did not return it for "
        f"{percent(figures['not_returned'])} of all examples, and returned one that is none when "
        f"asked again for {percent(figures['lapsed'])}.",
        f"{_PINTOR}",
    )


def finite_logits(evidence: Evidence) -> Check:
    """Logits that are no prediction (NaN, or no finite maximum), without and under attack."""
    outcome, figures = _doubt(evidence.standing & evidence.nonfinite)
    clean = _share(~evidence.finite)
    if outcome == "clear" and clean > 0:
        outcome = "undecided"
    return Check(
        "finite_logits",
        "NaN or infinite logits",
        outcome,
        {**figures, "clean": clean, "under_attack": _of(evidence.nonfinite, evidence.correct)},
        f"{_IN_DOUBT}; undecided where any clean logits are not finite",
        f"{int(np.sum(~evidence.finite))} of {evidence.finite.size} clean inputs have logits that "
        f"are not finite and count as wrong; where the usual attack ended, "
        f"{int(np.sum(evidence.nonfinite))} more.",
        f"{_CARLINI}",
    )


def classes(evidence: Evidence) -> Check:
    """Whether the examples are of more than one class."""
    count = len(np.unique(evidence.labels))
    return Check(
        "classes",
        "Classes among the examples",
        "undecided" if count == 1 else "clear",
        {"labels": float(count), "outputs": float(evidence.num_classes)},
        "undecided where all examples are of one class",
        f"The examples are of {count} of {evidence.num_classes} classes.",
        f"{_CARLINI}",
    )
