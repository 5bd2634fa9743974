"""Each check and the label, on evidence that is made up."""

import dataclasses

import numpy as np
import pytest

from jdistill import diagnose, metrics
from jdistill.diagnose import _checks, _label
from jdistill.diagnose._evidence import Evidence, own_temperature, still_moving
from jdistill.diagnose._probes import Agreement, Gradients

SIZE = 100


def first(count):
    """The first so many examples."""
    return np.arange(SIZE) < count


NONE, ALL = first(0), first(SIZE)
NAMES = ("naive", "half", "temperature", "margin", "one_step", "noise", "square", "dlr")
# An honest network: all right, the usual attack breaks 40, and at twice the radius 90.
HONEST = Evidence(
    labels=np.arange(SIZE) % 10,
    num_classes=10,
    plan=(),
    finite=ALL,
    correct=ALL,
    gradients=Gradients(*[np.ones(SIZE)] * 4),
    agreement=Agreement(NONE, NONE, NONE),
    probe_temperature=2.0,
    standing=~first(40),
    broken={"naive": first(40), **dict.fromkeys((*NAMES[1:], "target 0", "more 0"), NONE)},
    double=first(90),
    unbounded=NONE,
    unbounded_margin=NONE,
    on_path=NONE,
    lapsed=NONE,
    nonfinite=NONE,
    flat=NONE,
    moving=NONE,
)


def with_broken(evidence, **masks):
    return evidence._replace(broken={**evidence.broken, **masks})


def between(low, high):
    return first(high) & ~first(low)


def judge(evidence):
    """All checks by name, the label and its reason."""
    checks = _checks.all_checks(evidence)
    naive, worst = (
        metrics.proportion(int(mask.sum()), SIZE)
        for mask in (evidence.standing, evidence.survivors)
    )
    label, reason = _label.label(evidence, checks, naive, worst)
    return {check.name: check for check in checks}, label, reason


def masked(evidence):
    checks, label, _ = judge(evidence)
    names = {name for name, check in checks.items() if check.outcome == "masked"}
    assert (label == "masked") == bool(names)
    return names


def test_honest_evidence():
    checks, label, reason = judge(HONEST)
    assert label == "no sign of masking"
    assert "nothing that was tried speaks against the naive 60.0%" in reason
    assert {check.outcome for check in checks.values()} == {"clear", "not run"}
    assert [name for name, check in checks.items() if check.outcome == "not run"] == ["transfer"]
    for check in checks.values():
        assert check.title
        assert check.threshold
        assert check.source
        assert check.finding.endswith(".")
        assert all(isinstance(value, float) for value in check.figures.values())


GAPS = {
    "temperature": {"temperature_probe"},
    "margin": {"loss_gap"},
    "dlr": {"loss_gap"},
    "one_step": {"one_step"},
    "noise": {"random_noise"},
    "square": {"black_box"},
    "transfer": {"transfer"},
}


@pytest.mark.parametrize("name", GAPS)
def test_a_gap_that_a_larger_radius_does_not_close(name):
    gap = between(80, 100)  # 20 of those that stood; the usual attack at twice the radius: 10
    assert masked(with_broken(HONEST, **{name: gap})) == GAPS[name] | {"eps_curve"}
    # Six of those left at twice the radius are fewer than half of the gap: strength.
    assert not masked(with_broken(HONEST, **{name: between(76, 96)}))
    _, label, reason = judge(with_broken(HONEST, **{name: between(70, 90)}))
    assert label == "weak attack"
    assert "weak here: it leaves 60.0%" in reason
    assert "the number to report, is 40.0%" in reason
    # Nine examples are no gap.
    assert not masked(with_broken(HONEST, **{name: between(91, 100)}))
    # What the usual attack broke too is none either.
    assert not masked(with_broken(HONEST, **{name: first(40)}))


def test_a_gap_of_few_examples_is_undecided():
    few = HONEST._replace(
        **{
            name: getattr(HONEST, name)[-20:]
            for name in HONEST._fields
            if isinstance(getattr(HONEST, name), np.ndarray)
        },
        gradients=Gradients(*[np.ones(20)] * 4),
        agreement=Agreement(*[np.zeros(20, bool)] * 3),
        broken={name: mask[-20:] for name, mask in HONEST.broken.items()},
    )
    few = with_broken(few, margin=np.arange(20) >= 18)
    checks = {check.name: check for check in _checks.all_checks(few)}
    assert checks["loss_gap"].figures["gap"] == 0.1
    assert checks["loss_gap"].outcome == "undecided"
    share = metrics.proportion(20, 20)
    label, reason = _label.label(few, tuple(checks.values()), share, share)
    assert label == "inconclusive"
    assert reason.endswith("to tell, pass more examples.")


@pytest.mark.parametrize("bad", [0.0, np.nan])
def test_gradients_with_nothing_to_follow(bad):
    size = np.where(between(40, 55), bad, 1.0)
    gradients = HONEST.gradients._replace(cross_entropy=size)
    assert masked(HONEST._replace(gradients=gradients)) == {"zero_gradients"}
    # Where the attack succeeded all the same they hide nothing, and tiny ones are followed.
    for harmless in (np.where(first(40), bad, 1.0), np.full(SIZE, 1e-30)):
        gradients = HONEST.gradients._replace(cross_entropy=harmless)
        assert not masked(HONEST._replace(gradients=gradients))
    # Nor does a zero gradient of a loss that the usual attack does not follow.
    gradients = HONEST.gradients._replace(dlr=np.zeros(SIZE))
    assert not masked(HONEST._replace(gradients=gradients))


@pytest.mark.parametrize("field", Agreement._fields)
def test_gradients_that_say_something_else(field):
    wrong = HONEST.agreement._replace(**{field: ALL})
    assert masked(HONEST._replace(agreement=wrong)) == {"gradient_agreement"}
    wrong = HONEST.agreement._replace(**{field: first(40)})  # broken all the same
    assert not masked(HONEST._replace(agreement=wrong))


def test_an_attack_that_fails_in_the_whole_box():
    assert masked(HONEST._replace(unbounded=between(85, 100))) == {"unbounded"}
    checks, label, reason = judge(
        HONEST._replace(unbounded=between(92, 100), unbounded_margin=between(92, 100))
    )
    assert checks["unbounded"].outcome == "undecided"
    assert label == "inconclusive"
    assert "adapt the attack" in reason
    assert not masked(HONEST._replace(unbounded=between(92, 100)))


def test_success_that_does_not_rise_with_the_radius():
    evidence = with_broken(HONEST._replace(double=first(40)), half=between(40, 55))
    checks, label, _ = judge(evidence)
    assert label == "masked"
    assert checks["eps_curve"].outcome == "masked"
    assert checks["eps_curve"].figures["only_at_half"] == 0.15
    # A flat curve alone is none: it may be a network that nothing breaks at these radii.
    assert not masked(HONEST._replace(double=first(40)))


def test_more_effort():
    checks, label, reason = judge(with_broken(HONEST, **{"more 0": between(60, 66)}))
    assert checks["more_effort"].outcome == "undecided"
    assert label == "inconclusive"
    assert "more steps and restarts" in reason
    assert judge(with_broken(HONEST, **{"more 0": between(60, 64)}))[1] == "no sign of masking"
    # Steps that still climb matter where more of them help.
    checks, label, _ = judge(HONEST._replace(moving=between(40, 80)))
    assert checks["still_moving"].outcome == "undecided"
    assert checks["still_moving"].figures["moving"] == pytest.approx(2 / 3)
    assert label == "no sign of masking"


def test_successes_that_were_not_returned():
    for field in ("on_path", "lapsed"):
        assert masked(HONEST._replace(**{field: between(40, 60)})) == {"silent_success"}


def test_logits_that_are_not_finite():
    checks, label, _ = judge(HONEST._replace(finite=~first(3), correct=~first(3)))
    assert checks["finite_logits"].outcome == "undecided"
    assert checks["finite_logits"].finding.startswith("3 of 100 clean inputs")
    assert label == "no sign of masking"  # three examples do not decide
    assert masked(HONEST._replace(nonfinite=between(40, 60))) == {"finite_logits"}


def test_the_black_box_alone():
    evidence = with_broken(HONEST, square=between(80, 100), margin=between(90, 100))
    check = judge(evidence)[0]["black_box"]
    assert check.figures["gap"] == 0.2
    assert check.figures["beyond_every_gradient"] == 0.1
    without = {name: mask for name, mask in HONEST.broken.items() if name != "square"}
    assert judge(HONEST._replace(broken=without))[0]["black_box"].outcome == "not run"


def test_nothing_left_to_hide():
    broken = HONEST.broken | {"naive": ALL}
    zero = Gradients(*[np.zeros(SIZE)] * 4)
    evidence = HONEST._replace(standing=NONE, double=ALL, broken=broken, gradients=zero)
    assert judge(evidence)[1] == "no sign of masking"


def test_nothing_right_to_begin_with():
    evidence = HONEST._replace(correct=NONE, standing=NONE, double=NONE)
    evidence = evidence._replace(broken={name: NONE for name in HONEST.broken})
    _, label, reason = judge(evidence)
    assert label == "inconclusive"
    assert "right on none of the 100 examples" in reason


def test_still_moving():
    steps = np.arange(40.0)
    saturating = 1 - np.exp(-steps / 3)
    stopped = np.where(steps < 20, steps, np.nan)
    late = np.maximum(0, steps - 30)
    rows = np.stack([steps, saturating, np.zeros(40), stopped, late, -steps])
    assert still_moving(rows).tolist() == [True, False, False, False, True, False]


def test_own_temperature():
    logits = np.random.default_rng(0).normal(size=(50, 10))
    assert own_temperature(1000 * logits) == pytest.approx(1000 * own_temperature(logits))
    assert own_temperature(np.zeros((3, 10))) == own_temperature(np.zeros((0, 10))) == 1.0
    spread = np.array([[3.0, 0.0, 0.0]])
    assert own_temperature(spread) == pytest.approx(2.0 / (4 + np.log(2)))


def test_what_is_no_verdict():
    with pytest.raises(ValueError, match="expected a verdict with label, reason"):
        diagnose.Verdict.from_dict({"label": "masked"})
    with pytest.raises(ValueError, match="got list"):
        diagnose.Verdict.from_dict([])
    share = metrics.proportion(1, 2)
    checks = _checks.all_checks(HONEST)
    verdict = diagnose.Verdict(
        "masked", "because.", share, share, share, 0.1, "linf", 2, 0, (), checks, "nothing"
    )
    with pytest.raises(ValueError, match="expected the name of a check, got 'gap'; pick one of ze"):
        verdict.check("gap")
    assert verdict.check("loss_gap") is checks[2]
    with pytest.raises(dataclasses.FrozenInstanceError):
        verdict.label = "clear"


def test_one_rule_for_what_a_larger_radius_leaves():
    """A gap of 31 of which 11 remain is strength to every check; a rise at it never is."""
    honest = HONEST._replace(double=first(70))
    gap = between(50, 81)
    found = with_broken(honest, margin=gap)
    assert judge(found)[0]["eps_curve"].figures["in_doubt"] == 0.11
    assert not masked(found)
    assert judge(found)[1] == "weak attack"
    # Fewer than half of the gap may close.
    assert "eps_curve" in masked(with_broken(HONEST._replace(double=first(60)), margin=gap))
    # Broken at eps, and no longer at twice the radius.
    assert masked(HONEST._replace(double=between(15, 100))) == {"eps_curve"}
