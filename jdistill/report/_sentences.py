"""Every sentence of the page, whole, by case; what may be said is decided in `_claims`.

Numbers stand in braces with their format (`Stat`): `{worst:%}` is a share, `{worst:ends}` where it
may lie.
"""

from typing import Any

ANSWERS = {
    "masked": "Do not trust the {naive:%} that {name} keeps under the usual attack: its gradients "
    "are masked. Everything tried together leaves {worst:%} ({worst:ends}) of {number:count} "
    "examples within {limit}.",
    "weak attack": "{name} keeps {worst:%} ({worst:ends}) of {number:count} examples within "
    "{limit}, not the {naive:%} that the usual attack leaves: stronger attacks find more. No check "
    "points to masked gradients.",
    "no sign of masking": "{name} keeps {worst:%} ({worst:ends}) of {number:count} examples within "
    "{limit} against everything tried; the usual attack leaves {naive:%}, and no check points to "
    "masked gradients.",
    "inconclusive": "What was tried cannot tell how far to trust the {naive:%} that {name} keeps "
    "under the usual attack within {limit}; everything tried together leaves {worst:%} "
    "({worst:ends}) of {number:count} examples.",
    "attack": "{attack} within {limit} succeeds on {success:%} ({success:ends}) of the examples "
    "against {name}, the most of the attacks here. Whether its gradients are masked was not "
    "checked: no verdict was asked for.",
    "distance": "{attack} succeeds on {success:%} of the examples against {name}, at a median "
    "{norm} distance of {median:number}. No attack had a fixed budget, and no verdict was asked "
    "for.",
    "no attack": "No attack was made, so nothing here says how robust {name} is.",
}

GAINS = {
    "higher": "By the same measure {other} keeps {base:%}: on these examples the defense gains "
    "{gain} points against everything tried, where the usual attack would claim {claimed}.",
    "lower": "By the same measure {other} keeps {base:%}: against everything tried the defense "
    "loses {gain} points, where the usual attack would claim {claimed}.",
    "overlap": "No gain shows: by the same measure {other} keeps {base:%}, and the intervals "
    "overlap. The usual attack would claim {claimed} points.",
    "other examples": "{other} was judged on other examples, so no difference is drawn.",
    "not judged": "No verdict was asked for on {other}, so no gain is claimed.",
}

WARNINGS = {
    "hardly learned": "Fewer than half of the test examples are right with {names}: little can "
    "be said of the robustness of a network that has hardly learned.",
    "costs": "{name} classifies {accuracy:%} of the test examples right, {other} {base:%}: the "
    "defense costs accuracy.",
    "unbounded": "{attack} may change an input as far as it needs, and yet fails on some examples "
    "against {names} (success {success:%}): the attack is at fault there, not the network robust.",
    "unbounded check": "Even without a bound on the distance the usual attack fails on examples "
    "against {names}: its failures within the bound say little.",
    "nonfinite": "{name} gives NaN or infinite logits on some examples, which count as wrong.",
    "few": "A verdict rests on {number:count} examples only; the intervals are wide.",
    "one seed": "One seed: the intervals are over examples, and say nothing of the networks that "
    "another seed would give.",
}

COMPARISONS = {
    "higher": "higher",
    "lower": "lower",
    "one seed": "these two networks differ; a second seed is missing to say so of the method",
    "many": "not shown: one of {number} comparisons, and p is not below 0.05 / {number}",
    "disagree": "not settled: the interval and the test disagree",
    "not shown": "none shown",
    "untested": "not tested",
}

EFFECTS = {
    "shown": "Of {number} comparisons of chains {shown} show a difference over the seeds.",
    "none": "Of {number} comparisons of chains none shows a difference.",
    "one seed": "{differing} of {number} comparisons of chains differ on these networks, but each "
    "rests on one seed, so none is called an effect.",
}

LIMITS = {
    "proof": "A proof. Every success rate is a lower bound on what a better attack would reach, "
    "and every distance an upper bound.",
    "missing": "Not done in this run: {kinds}.",
    "black box": "An attack without gradients: none here is known to be one.",
    "test set": "The whole test set: the attacks saw at most {most:count} of {tested:count} "
    "examples.",
    "norms": "Perturbations other than {norms}.",
    "baseline": "A comparison with ordinary training: no teacher at T = 1 was measured.",
}

TERMS = {
    "Ordinary network": "The teacher at T = 1.",
    "Usual attack": "PGD with 40 steps on the cross-entropy at T = 1, as papers usually report.",
    "Everything tried": "The share of the same examples that no attack of the verdict broke: an "
    "upper bound on what a better attack would leave.",
    "Masked": "The usual attack fails for reasons of its own, most often a gradient of exactly "
    "zero; its number says nothing about the network.",
    "Weak attack": "No check points to masking, and yet other attacks find many more examples.",
    "No sign of masking": "No check points to masking. How robust the network is, the number says "
    "and not this label.",
    "Inconclusive": "What was spent cannot tell; the reason says what would.",
    "Success": "The share of attacked examples that end up misclassified, those that were so from "
    "the start included, at distance 0.",
    "Zero gradients": "The share of examples whose gradient of the cross-entropy at T = 1 is "
    "exactly zero in float32.",
    "Sensitivity": "Of the logits: mean |∂ Σ logits / ∂x| (Mandal & Gao 2023). Of the softmax: "
    "log10 of mean |∂ softmax / ∂x| at T = 1 (Papernot et al. 2016).",
    "Teacher, assistant, student": "The teacher learns from labels with its logits divided by T, "
    "each later network from the soft labels, at the same T, of the one before it.",
}


def say(sentences: dict[str, str], case: str, **fields: Any) -> Any:
    """The sentence of a case, as HTML, with a capital in front."""
    from markupsafe import Markup

    text = Markup(sentences[case]).format(**fields)
    return Markup(text[:1].upper() + text[1:]) if not text.startswith("<") else text
