"""The checklist of "On Evaluating Adversarial Robustness", answered from what the run has.

Every item is a rule on which rows and checks exist, and what they say; nothing is taken on trust.

References:
    Carlini et al. 2019, "On Evaluating Adversarial Robustness" (arXiv:1902.06705), sections 3 to 5.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jdistill import _words
from jdistill.report import _claims
from jdistill.report._networks import (
    AttackKey,
    Judged,
    Network,
    attack_keys,
    of_network,
    shown,
)
from jdistill.report._table import Row

State = Literal["passed", "problem found", "not done"]


class Item(NamedTuple):
    """An item, and what became of it.

    Attributes:
        title: what is asked for.
        state: `"passed"`: done, and nothing found; `"problem found"`; or `"not done"`.
        text: what was done, or what is missing.
    """

    title: str
    state: State
    text: str


class Run(NamedTuple):
    """Tables, verdicts, and settings that the rules look at."""

    found: Sequence[Network]
    judged: Sequence[Judged]
    measures: Mapping[str, Sequence[Row]]
    config: Mapping[str, Any]
    has_weights: bool

    @property
    def keys(self) -> list[AttackKey]:
        """All attacks of the results."""
        return attack_keys(self.found)

    def tried(self, fact: str, *values: str) -> list[str]:
        """Attacks, those of verdicts included, of which a fact is one of the values."""
        found = _claims.facts_tried(fact, self.keys, self.judged)
        return list(dict.fromkeys(name for value in values for name in found.get(value, [])))


Answer = tuple[State, str]


def checklist(run: Run) -> list[Item]:
    """The items in order."""
    return [Item(title, *rule(run)) for title, rule in _ITEMS]


def _check(*names: str) -> Callable[[Run], Answer]:
    """The rule of what the verdicts' checks of these names found."""

    def rule(run: Run) -> Answer:
        made = [
            check
            for item in run.judged
            for verdict in item.verdicts
            for check in verdict.checks
            if check.name in names and check.outcome != "not run"
        ]
        bad = [check for check in made if check.outcome == "masked"]
        undecided = sum(check.outcome == "undecided" for check in made)
        if not made:
            return "not done", "That check of a verdict was not run."
        if bad:
            return "problem found", f"{len(bad)} of {len(made)} checks; see the evidence."
        if undecided == len(made):
            return "not done", f"None of {len(made)} checks could be decided."
        open_ones = f", {undecided} of them undecided" if undecided else ""
        return "passed", f"{_words.count(len(made), 'check')}{open_ones}."

    return rule


def _either(*rules: Callable[[Run], Answer]) -> Callable[[Run], Answer]:
    """The rule of several that say the same: a problem in one is a problem."""

    def rule(run: Run) -> Answer:
        answers = [each(run) for each in rules]
        for state in ("problem found", "passed"):
            texts = [text for own, text in answers if own == state]
            if texts:
                return state, " ".join(texts)
        return answers[-1]

    return rule


def _made(fact: str, values: tuple[str, ...], missing: str) -> Callable[[Run], Answer]:
    """The rule that an attack of some kind was made."""

    def rule(run: Run) -> Answer:
        names = run.tried(fact, *values)
        return ("passed", f"{_words.join(names)}.") if names else ("not done", missing)

    return rule


def _threat_model(run: Run) -> Answer:
    limits = [key.limit for key in run.keys if key.eps is not None]
    limits += [item.limit for item in run.judged]
    if not limits:
        return "not done", "No attack with a budget was made."
    known = "The attacker knows all weights; " if run.tried("access", "gradient") else ""
    return "passed", f"{known}{' or '.join(dict.fromkeys(limits))}."


def _clean(run: Run) -> Answer:
    known = [net for net in run.found if net.accuracy.known]
    if len(known) < len(run.found):
        return "not done", "Not measured on every network."
    return "passed", "Of every network."


def _undefended(run: Run) -> Answer:
    if not run.found[0].distilled:
        return "not done", "The tables do not say how the networks were trained."
    plain = [net for net in run.found if net.is_ordinary]
    attacked = any(net.attacks for net in plain) or any(i.network in plain for i in run.judged)
    if not attacked:
        return "not done", "No network known to be ordinarily trained was attacked."
    return "passed", "The teacher at T = 1."


def _one_step(run: Run) -> Answer:
    compared, better = set(), set()
    for net in run.found:
        for key, hit in net.attacks.items():
            many = [other for other in net.attacks.values() if _more_steps(other.key, key)]
            ends = [hit.interval[0], *(other.interval[1] for other in many)]
            if key.facts.handicap == "one step" and many and not any(map(math.isnan, ends)):
                compared.add(net.name)
                if all(ends[0] > end for end in ends[1:]):
                    better.add(net.name)
    if not compared:
        return "not done", "No attack of one step stands beside one of many, with intervals."
    if better:
        return "problem found", f"One step succeeds more often on {_words.join(sorted(better))}."
    return "passed", f"Compared on {_words.count(len(compared), 'network')}."


def _more_steps(key: AttackKey, of: AttackKey) -> bool:
    """Attacks that are as another one of a single step, and take more of them."""
    same = key.budget == of.budget and key.facts.access == of.facts.access
    return same and key.facts.follows == of.facts.follows and key.facts.handicap is None


def _unbounded(run: Run) -> Answer:
    made = list(_claims.unbounded(run.found, run.measures["distances"]))
    failing = list(_claims.failing(run.found, run.measures["distances"]))
    if not made:
        return "not done", "No attack without a bound was made."
    if failing:
        return "problem found", f"{_words.join(failing)} fails on some examples."
    return "passed", f"{_words.join(made)}."


def _curve(run: Run) -> Answer:
    rows = [row for row in run.measures["curves"] if row["curve"] == "eps"]
    drawn = any(of_network(rows, network) for network in shown(run.found))
    return ("passed", "Drawn above.") if drawn else ("not done", "No curve was measured.")


def _transfer(run: Run) -> Answer:
    rows = run.measures["transfer"]
    if not rows:
        return "not done", "No transfer between networks was measured."
    own = {_place(r): r for r in rows if r["source_generation"] == r["target_generation"]}
    moved = [
        (row, own[_place(row)])
        for row in rows
        if row["source_generation"] != row["target_generation"] and _place(row) in own
    ]
    moved = [pair for pair in moved if None not in (pair[0]["low"], pair[1]["high"])]
    if not moved:
        return "not done", "No intervals of transfer and of the attack itself were measured."
    better = [pair for pair in moved if pair[0]["low"] > pair[1]["high"]]
    if better:
        return "problem found", f"{len(better)} of {len(moved)} pairs beat the attack itself."
    return "passed", f"{_words.count(len(moved), 'pair')}."


def _place(row: Row) -> tuple[Any, ...]:
    names = ("dataset", "temperature", "seed", "attack", "norm", "eps", "target_generation")
    return (*(row[name] for name in names), row.get("chain"))


def _worst_case(run: Run) -> Answer:
    if not run.judged:
        return "not done", "No verdict was asked for."
    networks = {item.network.name for item in run.judged}
    return "passed", f"On {_words.count(len(networks), 'network')}."


def _distances(run: Run) -> Answer:
    norms = {str(row["norm"]) for row in run.measures["distances"] if row["mean"] is not None}
    for net in run.found:
        norms |= {
            key.norm
            for key, hit in net.attacks.items()
            if key.eps is None and not key.has_no_norm and hit.mean_distance.known
        }
    if not norms:
        return "not done", "No distance of an attack without a bound was measured."
    return "passed", f"In {_words.join(sorted(_words.norm_name(norm) for norm in norms))}."


def _norms(run: Run) -> Answer:
    norms = _claims.norms_tried(run.found, run.judged, run.measures)
    if len(norms) < 2:
        return "not done", "One norm at most."
    return "passed", f"{_words.join(norms)}."


def _settings(run: Run) -> Answer:
    beside = any(each.settings for i in run.judged for v in i.verdicts for each in v.attacks)
    if not run.config and not beside:
        return "not done", "No settings were recorded."
    return "passed", "Below."


def _weights(run: Run) -> Answer:
    if not run.has_weights:
        return "not done", "No weights lie beside this report."
    return "passed", "In checkpoints/ beside this report."


_ITEMS: tuple[tuple[str, Callable[[Run], Answer]], ...] = (
    ("State a threat model", _threat_model),
    ("Report accuracy without an attack", _clean),
    ("Attack an undefended network with the same code", _undefended),
    (
        "Adapt the attack: avoid the softmax at T = 1",
        _either(
            _check("temperature_probe"),
            _made("follows", ("logits",), "No attack here is known to avoid it."),
        ),
    ),
    ("One step is not stronger than many", _either(_check("one_step"), _one_step)),
    ("More steps and restarts change nothing", _check("more_effort")),
    ("The attacks have converged", _check("still_moving")),
    ("Success grows with the budget", _check("eps_curve")),
    ("Draw accuracy against the budget", _curve),
    ("Full success without a bound", _either(_check("unbounded"), _unbounded)),
    ("Gradients are of use", _check("gradient_agreement", "zero_gradients")),
    (
        "Try an attack without gradients",
        _either(
            _check("black_box"),
            _made("access", ("scores", "decisions"), "None here is known to be one."),
        ),
    ),
    (
        "Try an attack that sees the predicted class alone",
        _made("access", ("decisions",), "None here is known to be one."),
    ),
    ("Try adversarial examples of another network", _either(_check("transfer"), _transfer)),
    ("Random noise is not stronger", _check("random_noise")),
    ("The worst case of every example over all attacks", _worst_case),
    ("More than one norm", _norms),
    ("Distances of attacks without a bound", _distances),
    ("Settings of the attacks", _settings),
    ("Weights for others to attack", _weights),
)
