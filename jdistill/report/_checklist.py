"""The checklist of "On Evaluating Adversarial Robustness", answered from what the run has.

Every item is a rule on which rows and checks exist, and what they say; nothing is taken on trust.

References:
    Carlini et al. 2019, "On Evaluating Adversarial Robustness" (arXiv:1902.06705), sections 3 to 5.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jdistill.report import _text
from jdistill.report._blocks import Card
from jdistill.report._networks import AttackKey, Network
from jdistill.report._run import Run
from jdistill.report._table import Row
from jdistill.report._verdicts import Judged


def checklist(
    found: Sequence[Network],
    judged: Sequence[Judged],
    measures: Mapping[str, Sequence[Row]],
    config: Mapping[str, Any],
    *,
    has_weights: bool,
) -> tuple[Card, ...]:
    """The items in order, each "done" with what was found or "not done" with what is missing.

    Args:
        found: The networks of `results.csv`.
        judged: Those of them that have a verdict.
        measures: The other tables, all kinds.
        config: The settings of the run.
        has_weights: Whether the networks' weights lie beside the report.
    """
    run = Run(found, judged, measures, config, has_weights)
    cards = []
    for title, rule, missing in _ITEMS:
        text = rule(run)
        done = bool(text)
        badge, tone = ("done", "good") if done else ("not done", "open")
        cards.append(Card(title, badge, tone, text or missing))
    return tuple(cards)


# --- The rules: what was found, or nothing -------------------------------------------------------


def _threat_model(run: Run) -> str:
    limits = [_text.budget(key) for key in run.keys if key.eps is not None]
    limits += [item.budget for item in run.judged]
    if not limits:
        return ""
    return (
        f"Whoever attacks knows the network and its weights and may change an input within "
        f"{' or '.join(dict.fromkeys(limits))}, inside the range of the data."
    )


def _adaptive(run: Run) -> str:
    probe = run.check("temperature_probe")
    made = run.tried("follows", "logits")
    if not probe and not made:
        return ""
    text = "The known weakness of distillation is a softmax that saturates at T = 1. "
    if made:
        verb = "does" if len(made) == 1 else "do"
        text += f"{_text.join(made)} {verb} not depend on the scale of the logits. "
    return (text + (f"Temperature probe: {probe}" if probe else "")).strip()


def _clean(run: Run) -> str:
    known = [net.accuracy.mean for net in run.found if net.accuracy.known]
    if len(known) < len(run.found):
        return ""
    tested = _text.of(max(net.num_test for net in run.found), "test example")
    low, high = _text.percent(min(known), 2), _text.percent(max(known), 2)
    return f"{low} to {high} % of {tested}." if low != high else f"{low} % of {tested}."


def _one_step(run: Run) -> str:
    better, compared = [], []
    for net in run.found:
        for key, hit in net.attacks.items():
            if key.facts.handicap != "one step":
                continue
            many = [other for other in net.attacks.values() if _more_steps(other.key, key)]
            if many:
                compared.append(_text.attack_name(key))
                if all(hit.interval[0] > other.interval[1] for other in many):
                    better.append(f"T = {net.temperature:g} ({net.role})")
    checked = run.check("one_step")
    if not compared:
        return checked
    text = f"{checked} Compared {_text.count(len(compared), 'time')} at the same budget: ".lstrip()
    text += f"one step of {_text.join(list(dict.fromkeys(compared)))} "
    if better:
        return f"{text}succeeds clearly more often at {_text.join(better)}, a sign of masking."
    return f"{text}nowhere succeeds clearly more often (95 % intervals apart)."


def _more_steps(key: AttackKey, of: AttackKey) -> bool:
    """Attacks that are as another one of a single step, and take more of them."""
    same = key.budget == of.budget and key.facts.access == of.facts.access
    return same and key.facts.follows == of.facts.follows and key.facts.handicap is None


def _more_effort(run: Run) -> str:
    text = run.check("more_effort")
    drops = []
    for (_, _), points in run.curves("steps").items():
        half = [y for x, y in points if x <= points[-1][0] / 2]
        if half and len(points) > 1:
            drops.append(half[-1] - points[-1][1])
    if drops:
        worst = f"{100 * max(drops):.1f}"
        text += f" In the curves against steps the second half of them takes at most {worst} "
        text += "points more."
    return text.strip()


def _growing(run: Run) -> str:
    # The curves say nothing here: read off the distances of one run, they cannot rise.
    return run.check("eps_curve")


def _unbounded(run: Run) -> str:
    text = run.check("unbounded")
    rates = [
        hit.success.mean
        for net in run.found
        for key, hit in net.attacks.items()
        if key.eps is None and key.facts.follows == "logits" and not key.has_no_norm
    ]
    if rates:
        least = f"{_text.percent(min(rates))} %{'' if min(rates) == 1 else ' or more'}"
        text += f" On every network the attacks without a bound on the distance succeed on {least}."
    return text.strip()


def _curve_drawn(run: Run) -> str:
    number = len(run.curves("eps"))
    return f"{_text.sentence(_text.count(number, 'curve'))[:-1]}, drawn above." if number else ""


def _gradient_free(run: Run) -> str:
    made, text = run.tried("access", "scores", "decisions"), run.check("black_box")
    return f"{_text.join(made)}. {text}".lstrip(". ").strip() if made or text else ""


def _hard_label(run: Run) -> str:
    made = run.tried("access", "decisions")
    return f"{_text.join(made)}." if made else ""


def _transfer(run: Run) -> str:
    text, rows = run.check("transfer"), run.measures["transfer"]
    if rows:
        white = {
            (*_place(row), row["target_generation"]): row["success_rate"]
            for row in rows
            if row["source_generation"] == row["target_generation"]
        }
        moved = [row for row in rows if row["source_generation"] != row["target_generation"]]
        better = [
            row
            for row in moved
            if row["low"] is not None
            and row["low"] > white.get((*_place(row), row["target_generation"]), 1.0)
        ]
        text += f" Between the generations of a chain, {_text.count(len(moved), 'pair')}: "
        text += f"{len(better) or 'none'} succeed clearly more often than the attack on the network"
        text += " itself, a sign of masking." if better else " itself."
    return text.strip()


def _noise(run: Run) -> str:
    return run.check("random_noise")


def _undefended(run: Run) -> str:
    plain = [net for net in run.found if net.generation == 0 and net.temperature == 1]
    judged = [item for item in run.judged if item.network in plain]
    if not judged and not any(net.attacks for net in plain):
        return ""
    return "The teacher at T = 1, an ordinarily trained network, was attacked in the same way."


def _worst_case(run: Run) -> str:
    if not run.judged:
        return ""
    return (
        f"On {_text.count(len(run.judged), 'network')}: an example counts as broken if any attack "
        "of the verdict breaks it."
    )


def _gradients(run: Run) -> str:
    return run.check("gradient_agreement", "zero_gradients")


def _converged(run: Run) -> str:
    return run.check("still_moving")


def _settings(run: Run) -> str:
    settings = any(
        a["settings"] for item in run.judged for v in item.verdicts for a in v["attacks"]
    )
    if not run.config and not settings:
        return ""
    return "Under “What was run”" + (" and beside each attack of a verdict." if settings else ".")


def _by_distance(run: Run) -> str:
    norms = [row["norm"] for row in run.measures["distances"] if row["mean"] is not None]
    for net in run.found:
        for key, hit in net.attacks.items():
            if key.eps is None and hit.mean_distance.known:
                norms.append(key.norm)
    if not norms:
        return ""
    names = _text.join([_text.norm_name(norm) for norm in sorted(set(norms))])
    return f"Mean and median distance in {names}, beside the success rate."


def _norms(run: Run) -> str:
    norms = {key.norm for key in run.keys if key.norm and not key.has_no_norm}
    norms |= {item.norm for item in run.judged}
    norms |= {str(row["norm"]) for row in run.measures["distances"]}
    if len(norms) < 2:
        return ""
    return f"{_text.join([_text.norm_name(norm) for norm in sorted(norms)])}."


def _weights(run: Run) -> str:
    return "In checkpoints/ beside this report; publish them with it." if run.has_weights else ""


def _prior_work(run: Run) -> str:
    del run  # a report knows its own run alone
    return ""


def _place(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("dataset", "temperature", "seed", "attack", "norm", "eps"))


_ITEMS: tuple[tuple[str, Callable[[Run], str], str], ...] = (
    (
        "State a precise threat model",
        _threat_model,
        "No attack with a budget was made, so nothing bounds what an attacker may do.",
    ),
    (
        "Attack in a way that is adapted to the defense",
        _adaptive,
        "No attack here is known to avoid the softmax at T = 1, which distillation saturates.",
    ),
    ("Report accuracy without an attack", _clean, "Not measured on every network."),
    (
        "Attack an undefended network with the same code",
        _undefended,
        "No teacher at T = 1 was attacked.",
    ),
    (
        "Compare one step with many",
        _one_step,
        "Neither that check of the verdict, nor an attack that is known to take one step and one "
        "that takes many at the same budget.",
    ),
    (
        "Show that more steps and restarts change nothing",
        _more_effort,
        "Neither that check of the verdict nor a curve against steps.",
    ),
    (
        "Verify that the attacks have converged",
        _converged,
        "That check of the verdict was not run.",
    ),
    (
        "Show that success grows with the budget",
        _growing,
        "Not that check of the verdict.",
    ),
    ("Draw accuracy against the budget", _curve_drawn, "No curve against eps was measured."),
    (
        "Reach full success without a bound",
        _unbounded,
        "No attack without a bound is known here to avoid the softmax at T = 1.",
    ),
    (
        "Check that the gradients are of use",
        _gradients,
        "Neither zeros nor the agreement with finite differences were checked by a verdict.",
    ),
    (
        "Try an attack without gradients",
        _gradient_free,
        "No attack here is known to work without gradients.",
    ),
    (
        "Try an attack that sees the predicted class alone",
        _hard_label,
        "No attack here is known to see the predicted class alone.",
    ),
    (
        "Try adversarial examples of another network",
        _transfer,
        "No transfer was measured.",
    ),
    ("Compare with random noise", _noise, "That check of the verdict was not run."),
    (
        "Report the worst case of every example over all attacks",
        _worst_case,
        "No verdict was asked for; success rates stand by attack.",
    ),
    ("Test more than one norm", _norms, "One norm alone, or none."),
    (
        "Judge attacks without a bound by distance",
        _by_distance,
        "No distance was measured.",
    ),
    ("List the attacks' settings", _settings, "No settings were recorded."),
    (
        "Keep code and weights for others",
        _weights,
        "No weights lie beside this report.",
    ),
    (
        "Compare with earlier work and explain differences",
        _prior_work,
        "This report knows its own run alone.",
    ),
)
