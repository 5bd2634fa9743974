"""Rows as a run would have them, and a reader of the page that is made of them."""

import html.parser
import math
import re

import numpy as np

from jdistill import report

FGSM = ("fgsm", "linf", 0.1)
PGD = ("pgd", "linf", 0.1)
MARGIN = ("pgd_margin", "linf", 0.1)
CW = ("carlini_wagner_l2", "l2", None)
JSMA = ("jsma", "l0", None)
SPATIAL = ("spatial", "linf", None)
UNIVERSAL = ("universal", "linf", 0.1)


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
    assert tuple(row) == report.COLUMNS
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
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.words))

    def table(self, index=0):
        """The cells of a table, without the small print of intervals."""
        body = re.findall(r"<table>.*?</table>", self.source, re.S)[index]
        body = re.sub(r"<small>.*?</small>", "", body, flags=re.S)
        lines = re.findall(r"<tr>(.*?)</tr>", body, re.S)
        return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.S) for line in lines]
