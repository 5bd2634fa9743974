"""Every sentence of the page, whole, by case; what may be said is decided in `_claims`.

Numbers stand in braces with their format (`Stat`): `{worst:%}` is a share, `{worst:ends}` where it
may lie.
"""

from typing import Any

ANSWERS = {
    "masked": "Do not trust the {naive:%} that {name} keeps under the usual attack: its gradients "
    "are masked. Everything tried together leaves {worst:%} ({worst:ends}) of "
    "{number:count example} within {limit}.",
    "weak attack": "{name} keeps {worst:%} ({worst:ends}) of {number:count example} within "
    "{limit}, not the {naive:%} that the usual attack leaves: stronger attacks find more. No check "
    "points to masked gradients.",
    "no sign of masking": "{name} keeps {worst:%} ({worst:ends}) of {number:count example} within "
    "{limit} against everything tried; the usual attack leaves {naive:%}, and no check points to "
    "masked gradients.",
    "inconclusive": "What was tried cannot tell how far to trust the {naive:%} that {name} keeps "
    "under the usual attack within {limit}; everything tried together leaves {worst:%} "
    "({worst:ends}) of {number:count example}.",
    "attack": "{attack} within {limit} succeeds on {success:%} ({success:ends}) of the examples "
    "against {name}; no other attack at this radius succeeds on more. Whether its gradients are "
    "masked was not checked: no verdict was asked for.",
    "distance": "{attack} succeeds on {success:%} of the examples against {name}, at a median "
    "{norm} distance of {median:number}. Whether its gradients are masked was not checked: no "
    "verdict was asked for.",
    "success": "{attack} succeeds on {success:%} ({success:ends}) of the examples against {name}. "
    "Whether its gradients are masked was not checked: no verdict was asked for.",
    "no attack": "No attack was made, so nothing here says how robust {name} is.",
    "seeds differ": "Its {number} seeds were not judged alike: {counts}. The numbers are means "
    "over the seeds.",
}

GAINS = {
    "higher": "By the same measure {other} keeps {base:%}. Between these networks the difference "
    "is {gain} points under everything tried, and {claimed} under the usual attack.",
    "lower": "By the same measure {other} keeps {base:%}, which is more. Between these networks "
    "the difference is {gain} points under everything tried, and {claimed} under the usual attack.",
    "overlap": "No gain shows: by the same measure {other} keeps {base:%}, and the intervals "
    "overlap. Under the usual attack alone the difference would be {claimed} points.",
    "judged otherwise": "{other} was judged on other examples, seeds, or radii, so no difference "
    "is drawn.",
    "not judged": "No verdict was asked for on {other}, so no gain is claimed.",
}

WARNINGS = {
    "hardly learned": "{names}: fewer than half of the test examples are classified correctly "
    "without any attack, so there is little for a defense to keep.",
    "costs": "{name} classifies {accuracy:%} of the test examples correctly, {other} {base:%}: "
    "the defense costs accuracy.",
    "unbounded": "{attack} may change an input as far as it needs, and yet fails on some examples "
    "against {names} (it succeeds on as few as {success:%}): a failure of the attack there, not "
    "robustness.",
    "unbounded check": "Even without a bound on the distance the usual attack fails on examples "
    "against {names}: its failures within the bound say little.",
    "nonfinite": "{name} gives NaN or infinite logits on some examples, which count as wrong.",
    "few": "A verdict rests on only {number:count example}; the intervals are wide.",
    "one seed": "One seed: the intervals are over examples, and say nothing of the networks that "
    "another seed would give.",
}

COMPARISONS = {
    "higher": "higher",
    "lower": "lower",
    "one seed": "these two networks differ; of the method one seed says nothing",
    "many": "not shown: one of {number} comparisons, and p is not below 0.05 / {number}",
    "disagree": "not settled: the interval and the test disagree",
    "not shown": "none shown",
    "untested": "not tested",
}

EFFECTS = {
    "shown": "{number} of chains showed {shown} over the seeds.",
    "none": "{number} of chains established no difference.",
    "one seed": "{number} of chains found {differing} between two networks, each on one seed, so "
    "none is called an effect of the chain.",
    "untested": "Chains were compared, but no comparison could be tested.",
}

LIMITS = {
    "proof": "A proof. Every success rate is a lower bound on what a better attack would reach, "
    "and every distance found is an upper bound for its example.",
    "missing": "Not done in this run: {kinds}.",
    "black box": "An attack without gradients: none here is known to be one.",
    "test set": "The whole test set: the {who} saw at most {most:count} of {tested:count example}.",
    "norms": "Perturbations other than {norms}.",
    "baseline": "A comparison with ordinary training: no teacher at T = 1 that is known to be "
    "trained so was measured.",
}

TERMS = {
    "Ordinary network": "The teacher at T = 1, where it was trained neither on adversarial "
    "examples nor in a way that the rows do not tell.",
    "Usual attack": "PGD with 40 steps on the cross-entropy at T = 1, as papers usually report.",
    "Everything tried": "The share of the same examples that no attack of the verdict broke: an "
    "upper bound on what a better attack would leave.",
    "Masked": "The usual attack fails for reasons of its own, most often a gradient of exactly "
    "zero; its number says nothing about the network.",
    "Weak attack": "No check points to masking, and yet other attacks find many more examples.",
    "No sign of masking": "No check points to masking. The label is no praise: the number says "
    "how robust the network is.",
    "Inconclusive": "What was spent cannot tell; the reason says what would.",
    "Success": "The share of attacked examples that end up misclassified, those that were so from "
    "the start included, at distance 0.",
    "Zero gradients": "The share of examples whose gradient of the cross-entropy at T = 1 is "
    "exactly zero in float32.",
    "Sensitivity": "Of the logits: mean |∂ Σ logits / ∂x| (Mandal & Gao 2023). Of the softmax: "
    "log10 of mean |∂ softmax / ∂x| at T = 1 (Papernot et al. 2016).",
    "Teacher, assistant, student": "The teacher learns from labels with its logits divided by T, "
    "each later network from the soft labels, at the same T, of the one before it; where a stage "
    "has another loss or other teachers, config.json says so.",
}

AGREEMENT = (
    "How alike two networks are on the clean test examples, which says nothing about the "
    "robustness of either. Same class: the share of the examples that both put into one class, "
    "right or wrong. Mistakes repeated: the share of the teacher's mistakes that the student makes "
    "too, with the same class. KL: mean KL(teacher ‖ student) of the softmax at T = 1. CKA: linear "
    "centered kernel alignment of the logits, not of hidden features (Kornblith et al. 2019)."
)

DEPLOYMENT = {
    "": "Each student and its teacher as files in exports/, of one seed. Times, measured on "
    "{devices}, are an image's in the median of repeated calls of the compiled program; they "
    "differ between machines and runs. A smaller network is not a more robust one."
}

_OF_DISTILLATION = ("Ordinary network", "Teacher, assistant, student")


def terms_of_attacks() -> dict[str, str]:
    """The terms without those of distillation."""
    return {term: text for term, text in TERMS.items() if term not in _OF_DISTILLATION}


def say(sentences: dict[str, str], case: str, **fields: Any) -> Any:
    """The sentence of a case, as HTML; "the" is capitalized in front, names are not."""
    from markupsafe import Markup

    text = Markup(sentences[case]).format(**fields)
    return Markup("The" + text[3:]) if text.startswith("the ") else text
