"""Rows as a run would have them, and a reader of the page that is made of them."""

import functools
import html.parser
import math
import re

import numpy as np

from jdistill import attacks, losses, report
from jdistill.diagnose import Verdict

FGSM = ("fgsm", "linf", 0.1)
PGD = ("pgd", "linf", 0.1)
MARGIN = ("pgd_margin", "linf", 0.1)
CW = ("carlini_wagner_l2", "l2", None)
JSMA = ("jsma", "l0", None)
SPATIAL = ("spatial", "linf", None)
UNIVERSAL = ("universal", "linf", 0.1)


def facts_of(name):
    """The columns on an attack of a plan; none where that is not of the library."""
    function = getattr(attacks, name.removesuffix("_margin"), None)
    if function is None:
        return {}
    bound = {"loss": losses.margin} if name.endswith("_margin") else {}
    known = attacks.traits(functools.partial(function, **bound))
    return {fact: getattr(known, fact) for fact in report.FACTS}


def titled(name):
    """The attack and its title, as tables beside `results.csv` have them."""
    return {"attack": name, "title": facts_of(name)["title"]}


def make_row(attack=FGSM, success=0.5, distance=None, num_attacked=1000, **columns):
    name, norm, eps = attack
    half = 1.96 * math.sqrt(success * (1 - success) / (num_attacked or 1))
    row = {
        "dataset": "mnist",
        "temperature": 1.0,
        "seed": 0,
        "generation": 0,
        "num_test": 10000,
        "test_accuracy": 0.9912,
        "test_accuracy_low": 0.9892,
        "test_accuracy_high": 0.9929,
        "mean_abs_logit": 6.1,
        "num_sensitivity": 1000,
        "sensitivity_logits": 0.21,
        "log10_sensitivity_softmax": -2.6,
        "zero_gradient_fraction": 0.0,
        "attack": name,
        "norm": norm,
        "eps": eps,
        "num_attacked": num_attacked,
        "success_rate": success,
        "success_rate_low": max(success - half, 0.0),
        "success_rate_high": min(success + half, 1.0),
        "mean_distance": distance,
        "median_distance": None if distance is None else distance - 0.05,
        "mean_queries": 40.0,
    }
    assert tuple(row) == report.TABLES["results"]
    row |= facts_of(name)
    unknown = set(columns) - set(row)
    assert not unknown
    return {**row, **columns}


def make_rows(temperatures=(1.0, 20.0, 100.0), generations=3, seeds=(0, 1)):
    """A plausible distilled MNIST: the gradient dies with T, the adversarial examples do not."""
    rows = []
    for temperature in temperatures:
        for seed in seeds:
            for generation in range(generations):
                draw = np.random.default_rng([int(temperature), seed, generation]).normal
                level = math.log10(temperature) / 2
                zero = 0.985 / (1 + math.exp(-9 * (level - 0.55)))
                network = {
                    "temperature": temperature,
                    "seed": seed,
                    "generation": generation,
                    "test_accuracy": 0.9912 + 0.0005 * draw(),
                    "mean_abs_logit": 6.1 * temperature,
                    "sensitivity_logits": 0.21 * temperature + 0.01 * abs(draw()),
                    "log10_sensitivity_softmax": -2.6 - 34 * level**2 + 0.1 * draw(),
                    "zero_gradient_fraction": zero,
                }
                rows += [
                    make_row(FGSM, 0.48 * (1 - zero) + 0.004 + 0.002 * abs(draw()), **network),
                    make_row(PGD, 0.85 * (1 - zero) + 0.004, **network),
                    make_row(CW, 1.0, 1.4 + 0.3 * level + 0.03 * draw(), 100, **network),
                ]
    return rows


def make_pictures(number=4, channels=1, size=8):
    draw = np.random.default_rng(number)
    clean = draw.uniform(size=(number, size, size, channels)).astype(np.float32)
    adversarial = np.clip(clean + 0.1 * draw.normal(size=clean.shape), 0, 1).astype(np.float32)
    distance = np.sqrt(np.square(adversarial - clean).sum(axis=(1, 2, 3)))
    distance[-1] = np.inf
    labels, predictions = np.arange(number), np.arange(number) + 1
    names = ("clean", "adversarial", "labels", "predictions", "distance")
    return dict(zip(names, (clean, adversarial, labels, predictions, distance), strict=True))


class Page(html.parser.HTMLParser):
    """A page's tags and text, with every tag closed in order."""

    empty = frozenset({"meta", "link", "img", "br", "hr"})

    def __init__(self, path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.open, self.words = [], [], []
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.empty:
            self.open.append(tag)
        if tag in {"th", "td"}:
            self.words.append(" ")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "svg" not in self.open and (not self.open or self.open[-1] != "style"):
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))

    @property
    def numbers(self):
        """Every number with where it is from: value, cells, and text."""
        return re.findall(
            r'<data value="([^"]*)" data-of="([^"]*)"[^>]*>([^<]*)</data>', self.source
        )


# --- What a run measures beside results.csv ------------------------------------------------------

EDGES = (None, -40.0, -35.0, -30.0, -25.0, -20.0, -15.0, -10.0, -5.0, -3.0, 0.0, None)
CHECKS = {
    "zero_gradients": "Gradients that are exactly zero",
    "temperature_probe": "Cross-entropy at the temperature of training",
    "loss_gap": "Cross-entropy against losses without a scale",
    "black_box": "Attacks without gradients",
    "transfer": "Examples of another network",
    "unbounded": "Attack without a bound",
    "more_effort": "More steps and restarts",
    "still_moving": "Loss over the last steps",
    "eps_curve": "Accuracy against eps",
    "silent_success": "Success that was found and not returned",
    "gradient_agreement": "Gradients against finite differences",
    "random_noise": "Random noise",
    "finite_logits": "Logits that are no number",
}
BUDGET = "PGD-40, APGD-CE, APGD-T, Square (1,000 queries), at linf 0.1, 200 examples"


def share(value, number=200):
    """A share with an interval about as wide as the number of examples allows."""
    half = 1.96 * math.sqrt(max(value * (1 - value), 1e-3) / number)
    return {"value": value, "low": max(value - half, 0.0), "high": min(value + half, 1.0)}


def make_verdict(label, naive, worst_case, outcomes=None, **changes):
    """A verdict with every check."""
    outcomes = outcomes or {}
    if label == "masked":
        outcomes = {"zero_gradients": "masked", "temperature_probe": "masked", **outcomes}
    checks = [
        {
            "name": name,
            "title": title,
            "outcome": outcomes.get(name, "clear"),
            "figures": {"share": 0.985 if outcomes.get(name) == "masked" else 0.0, "num": 200},
            "threshold": "at least half of the examples",
            "finding": f"The check {name} came out as {outcomes.get(name, 'clear')}.",
            "source": "Athalye et al. 2018, section 3.1",
        }
        for name, title in CHECKS.items()
    ]
    settings = "40 steps, step size 0.01, 1 restart"
    tried = {
        "PGD-40": (naive, "gradient", "softmax"),
        "APGD-CE": (naive, "gradient", "softmax"),
        "APGD-T": (worst_case, "gradient", "logits"),
        "Square": (naive, "scores", "logits"),
    }
    verdict = {
        "label": label,
        "reason": {
            "masked": "the gradient of the usual loss is exactly zero on 98.5% of the examples",
            "inconclusive": "no attack without gradients was run, which would tell",
            "no sign of masking": "no check points to masking",
            "weak attack": "no check points to masking, but the usual attack is weak here",
        }[label],
        "naive": share(naive),
        "worst_case": share(worst_case),
        "clean": share(0.992),
        "eps": 0.1,
        "norm": "linf",
        "num_examples": 200,
        "num_nonfinite": 0,
        "attacks": [
            {
                **{"name": name, "robust_accuracy": share(value), "settings": settings},
                **{"access": access, "follows": follows},
            }
            for name, (value, access, follows) in tried.items()
        ],
        "checks": checks,
        "budget": BUDGET,
    }
    unknown = set(changes) - set(verdict)
    assert not unknown
    return Verdict.from_dict({**verdict, **changes})


def networks_of(rows):
    """The four columns of each network that the rows are about, once."""
    names = ("dataset", "temperature", "seed", "generation")
    return [
        dict(zip(names, key, strict=True))
        for key in dict.fromkeys(tuple(row[name] for name in names) for row in rows)
    ]


def make_measures(rows, label=None):
    """Everything a workdir may hold beside `results.csv`, about the networks of its rows.

    The worst case hardly depends on the temperature, the usual attack's number does: as measured
    on distilled MNIST networks. `label` overrides the verdicts' labels.
    """
    found = networks_of(rows)
    measures = {kind: [] for kind in (*report.TABLES, "verdicts") if kind != "results"}
    for network in found:
        temperature, generation = network["temperature"], network["generation"]
        draw = np.random.default_rng([round(temperature), network["seed"], generation])
        level = math.log10(max(temperature, 1.0)) / 2
        worst = round(0.73 + 0.06 * level + 0.01 * draw.normal(), 3)
        naive = round(min(worst + 0.27 * min(2 * level, 1), 0.99), 3)
        own = label or ("masked" if naive > worst + 0.1 else "no sign of masking")
        measures["verdicts"].append({**network, "verdict": make_verdict(own, naive, worst)})
        measures["curves"] += _curves(network, naive, worst)
        centre = -3.5 - 36 * level**2
        sizes = np.minimum(draw.normal(centre, 2 + 12 * level, 500), -0.1)
        edges = [-math.inf, *EDGES[1:-1], math.inf]
        for low, high in zip(range(11), range(1, 12), strict=True):
            inside = ((sizes >= edges[low]) & (sizes < edges[high])).sum()
            row = {"low": EDGES[low], "high": EDGES[high], "count": int(inside)}
            measures["sensitivity"].append({**network, **row})
        confidence = 0.985 + 0.014 * level
        calibration = {"ece": abs(confidence - 0.99), "nll": 0.03 + 0.4 * level, "brier": 0.015}
        row = {"mean_confidence": confidence, "num_examples": 10000}
        measures["calibration"].append({**network, **calibration, **row})
        if generation:
            measures["agreement"].append(make_agreement(network, 0.97 - 0.02 * level))
        if network["seed"] == found[0]["seed"]:
            measures["deployment"].append(make_deployment(network, 4.0**-generation))
        for norm, attack, mean in (
            ("l0", "carlini_wagner_l0", 10.0),
            ("l2", "carlini_wagner_l2", 1.4),
            ("linf", "fmn", 0.12),
        ):
            mean *= 1 + 0.1 * level + 0.01 * draw.normal()
            row = {"norm": norm, **titled(attack), "success_rate": 1.0, "mean": mean}
            row = {**row, "median": 0.95 * mean, "num_examples": 100}
            measures["distances"].append({**network, **row})
    for chain in dict.fromkeys((n["dataset"], n["temperature"], n["seed"]) for n in found):
        _chain(measures, chain, [n["generation"] for n in found if tuple(n.values())[:3] == chain])
    return measures


def make_agreement(network, agreed, **changes):
    """Agreement of a student with the network before it, whose mistakes it repeats in part."""
    same, repeated = share(agreed, 10000), share(0.4, 90)
    row = {"teacher_generation": network["generation"] - 1, "num_examples": 10000}
    for name, ends in (("top1_agreement", same), ("repeated_mistakes", repeated)):
        row |= {name: ends["value"], f"{name}_low": ends["low"], f"{name}_high": ends["high"]}
    row |= {"num_teacher_mistakes": 90, "mean_kl": 40.3 * (1 - agreed), "logits_cka": agreed - 0.01}
    return {**network, **row, **changes}


def make_deployment(network, size, **changes):
    """Size and times of an export with a share of 312,202 parameters."""
    parameters = round(312_202 * size)
    row = {"parameters": parameters, "share_of_first": parameters / 312_202}
    row |= {"weights_bytes": 4 * parameters + 2_000, "program_bytes": 20_000}
    row |= {"milliseconds_per_image_batch_1": 0.2 + size, "num_calls": 20}
    row |= {"milliseconds_per_image_batch_128": 0.5 * size, "backend": "cpu", "device": "cpu"}
    name = f"T{network['temperature']:g}_g{network['generation']}"
    return {**network, **row, "export": name, **changes}


def _curves(network, naive, worst):
    for eps in (0.0, 0.05, 0.1, 0.15, 0.2, 0.3):
        value = max(0.992 * (1 - (eps / 0.3) ** 1.2), 0.0)
        yield _point(network, "eps", "apgd_targeted", None, eps, value)
    for steps in (1, 5, 10, 20, 40):
        value = worst + (0.99 - worst) * math.exp(-steps / 6)
        yield _point(network, "steps", "pgd_margin", 0.1, steps, value)
        yield _point(network, "steps", "pgd", 0.1, steps, naive)
    for queries in (1, 10, 100, 1000):
        value = worst + 0.1 + 0.05 * (3 - math.log10(queries))
        yield _point(network, "queries", "square", 0.1, queries, min(value, 0.99))


def _point(network, curve, attack, eps, x, value):
    ends = share(value)
    return {
        **network,
        **{"curve": curve, **titled(attack), "norm": "linf", "eps": eps, "x": float(x)},
        **{"robust_accuracy": ends["value"], "low": ends["low"], "high": ends["high"]},
        "num_examples": 200,
    }


def _chain(measures, chain, generations):
    """The transfer matrix of a chain, and its comparisons with the student of no assistant."""
    where = dict(zip(("dataset", "temperature", "seed"), chain, strict=True))
    for source in generations:
        for target in generations:
            rate = share(0.25 if source == target else 0.12)
            row = {"source_generation": source, "target_generation": target}
            row |= {**titled("pgd_margin"), "norm": "linf", "eps": 0.1, "num_examples": 200}
            row = {**row, "success_rate": rate["value"], "low": rate["low"], "high": rate["high"]}
            measures["transfer"].append({**where, **row})
    for generation in generations:
        for quantity in ("test_accuracy", "robust_accuracy: APGD-T at linf 0.1"):
            if generation >= 2:
                measures["comparisons"].append(make_comparison(quantity, generation, **where))


def make_comparison(quantity="test_accuracy", generation=2, **changes):
    """A paired comparison that shows nothing."""
    row = {
        "dataset": "mnist",
        "temperature": 20.0,
        "seed": None,
        "quantity": quantity,
        "generation": generation,
        "baseline_generation": 1,
        "difference": 0.002,
        "low": -0.003,
        "high": 0.007,
        "p_value": 0.4,
        "num_examples": 10000 if quantity == "test_accuracy" else 500,
        "test": "exact McNemar test and Bonett-Price interval over examples",
    }
    return {**row, **changes}
