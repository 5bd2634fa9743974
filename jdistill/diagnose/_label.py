"""From the checks to the label and its reason."""

from collections.abc import Sequence

from jdistill._words import percent
from jdistill.diagnose import _thresholds as limits
from jdistill.diagnose._evidence import Evidence
from jdistill.diagnose._verdict import Check, Label
from jdistill.metrics import Interval

# An undecided check leaves the label open only where it concerns what the label says. A loss that
# still moves is none of these: it matters where more effort helps, and then that check speaks.
_REMEDIES = {
    "unbounded": "attack with more steps, or adapt the attack to the network",
    "more_effort": "attack with more steps and restarts",
    "classes": "pass examples of every class",
    "finite_logits": "repair the network where its logits are not finite",
}
_MORE_EXAMPLES = "pass more examples"


def label(
    evidence: Evidence, checks: Sequence[Check], naive: Interval, worst_case: Interval
) -> tuple[Label, str]:
    """The label, and one sentence."""
    masked = [check for check in checks if check.outcome == "masked"]
    if masked:
        count = "one check speaks" if len(masked) == 1 else f"{len(masked)} checks speak"
        return "masked", (
            f"do not trust the naive {percent(naive.value)}, since {count} against it "
            f"({', '.join(check.name for check in masked)}); the worst case of everything tried is "
            f"{percent(worst_case.value)}."
        )
    num_correct = int(evidence.correct.sum())
    if num_correct == 0:
        return "inconclusive", (
            f"the network is right on none of the {evidence.labels.size} examples, so there is "
            "nothing to attack; check the labels, the bounds and the network."
        )
    if num_correct < limits.MIN_CORRECT:
        return "inconclusive", (
            f"the network is right on {num_correct} examples only; {_MORE_EXAMPLES}, at least "
            f"{limits.MIN_CORRECT} that it gets right."
        )
    for check in checks:
        if check.outcome == "undecided" and _matters(check):
            remedy = _REMEDIES.get(check.name, _MORE_EXAMPLES)
            return "inconclusive", f"{check.finding.rstrip('.')}; to tell, {remedy}."
    if naive.value - worst_case.value >= limits.GAP:
        return "weak attack", (
            f"no check points to masking, but the usual attack is weak here: it leaves "
            f"{percent(naive.value)}, and the worst case of everything tried, the number to "
            f"report, is {percent(worst_case.value)}."
        )
    return "no sign of masking", (
        f"nothing that was tried speaks against the naive {percent(naive.value)}; the worst case "
        f"of everything tried is {percent(worst_case.value)}."
    )


def _matters(check: Check) -> bool:
    """Whether an undecided check leaves the label open."""
    if check.name == "still_moving":
        return False
    if check.name == "finite_logits":
        return check.figures["clean"] >= limits.GAP or check.figures["in_doubt"] >= limits.GAP
    return True
