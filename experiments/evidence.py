"""What a run shows beside success rates, as the rows of the report's tables.

Every function takes what was measured on one chain and returns rows; none runs an attack, but
`transfer`, which lets the networks of a chain judge what was crafted already.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.training import Network
from jdistill import data, evaluate, metrics, nets, report

Row = dict[str, Any]

# A curve of more points would draw the same line.
_MOST_POINTS = 60
_PLAIN = 1  # the generation that is distilled without an assistant


class Clean(NamedTuple):
    """What was measured of one network without an attack.

    Attributes:
        correct: `[N]` bool.
        sensitivities: `[S]`, log10 of the softmax sensitivity of the first `S` examples.
        columns: those of `results.csv`.
        calibration: its columns in `calibration.csv`.
    """

    correct: np.ndarray
    sensitivities: np.ndarray
    columns: Row
    calibration: Row


class Chain(NamedTuple):
    """The generations of one temperature and seed, and what was done to them.

    Attributes:
        dataset: its name.
        networks: `G` of them, by generation.
        clean: of each network.
        attacks: by name, over all the networks.
        distances: by norm, the minimum-norm attacks.
        crafted: by an attack that goes on past the boundary, to be judged by the other
            generations; None where there is none.
    """

    dataset: str
    networks: Sequence[Network]
    clean: Sequence[Clean]
    attacks: Mapping[str, evaluate.AttackOutcome]
    distances: Mapping[str, evaluate.AttackOutcome]
    crafted: evaluate.AttackOutcome | None

    def names(self, index: int) -> Row:
        """The columns that name a network."""
        network = self.networks[index]
        return {**self.run, "generation": network.generation}

    @property
    def run(self) -> Row:
        """The columns that name the chain."""
        first = self.networks[0]
        return {"dataset": self.dataset, "temperature": first.temperature, "seed": first.seed}


def _facts(outcomes: Mapping[str, evaluate.AttackOutcome]) -> dict[str, Row]:
    """The columns on each attack, by name; nothing on an attack that is not the library's."""
    found = {
        name: {fact: getattr(outcome.traits, fact) for fact in report.FACTS}
        for name, outcome in outcomes.items()
        if outcome.traits is not None and outcome.traits.access is not None
    }
    titles = [facts["title"] for facts in found.values()]
    for name, facts in found.items():
        if titles.count(facts["title"]) > 1:
            facts["title"] += f" ({name})"
    return {name: found.get(name, {}) for name in outcomes}


def results(chain: Chain) -> list[Row]:
    """A row for each network and attack."""
    facts = _facts(chain.attacks)
    return [
        {
            **chain.names(index),
            **chain.clean[index].columns,
            "attack": name,
            **facts[name],
            "norm": outcome.norm,
            "eps": outcome.eps,
            "num_attacked": outcome.success.shape[1],
            **_ends("success_rate", outcome.success_rate[index]),
            "mean_distance": float(outcome.mean_distance[index]),
            "median_distance": float(outcome.median_distance[index]),
            "mean_queries": float(outcome.queries[index].mean()),
        }
        for name, outcome in chain.attacks.items()
        for index in range(len(chain.networks))
    ]


def sensitivity(chain: Chain) -> list[Row]:
    """The histogram of each network's sensitivities, in the bins of Papernot et al."""
    rows = []
    for index, clean in enumerate(chain.clean):
        histogram = metrics.sensitivity_histogram(clean.sensitivities)
        edges = [float(edge) if np.isfinite(edge) else None for edge in histogram.edges]
        bins = zip(edges, edges[1:], histogram.counts, strict=False)
        rows += [
            {**chain.names(index), "low": low, "high": high, "count": int(count)}
            for low, high, count in bins
        ]
    return rows


def calibration(chain: Chain) -> list[Row]:
    """A row for each network."""
    return [{**chain.names(index), **clean.calibration} for index, clean in enumerate(chain.clean)]


def distances(chain: Chain) -> list[Row]:
    """The robustness ρ_adv of each network, by norm."""
    return [
        {
            **chain.names(index),
            "norm": norm,
            **_named(outcome),
            "success_rate": outcome.success_rate[index].value,
            "mean": float(outcome.mean_distance[index]),
            "median": float(outcome.median_distance[index]),
            "num_examples": outcome.success.shape[1],
        }
        for norm, outcome in chain.distances.items()
        for index in range(len(chain.networks))
    ]


def _named(outcome: evaluate.AttackOutcome) -> Row:
    """The columns that name an attack which has no name in the run."""
    assert outcome.traits is not None
    return {"attack": outcome.traits.name, "title": outcome.traits.title}


def curves(chains: Sequence[Chain]) -> list[Row]:
    """Robust accuracy against the radius, and against the steps of the attacks that count them.

    At the same radii and steps for all chains, so that seeds can be averaged.
    """
    rows = []
    for norm in ("linf", "l2"):
        reached = [
            float(outcome.distance[outcome.success].max(initial=0.0))
            for chain in chains
            for outcome in _in_norm(chain, norm).values()
        ]
        radii = np.linspace(0.0, max(reached, default=0.0) or 1.0, _MOST_POINTS)
        for chain in chains:
            outcomes = _in_norm(chain, norm).values()
            if any(outcome.eps is None for outcome in outcomes):
                found = evaluate.accuracy_against_eps(outcomes, radii)
                about: Row = {"curve": "eps", "attack": "worst_case", "norm": norm, "eps": None}
                rows += _points(chain, found, about)
    for chain in chains:
        facts = _facts(chain.attacks)
        for name, outcome in chain.attacks.items():
            num_steps = outcome.traits and outcome.traits.settings.get("num_steps")
            if num_steps is None or outcome.eps is None or "first_success" not in outcome.info:
                continue
            found = evaluate.accuracy_against_steps(outcome, np.arange(num_steps + 2))
            about = {"curve": "steps", "attack": name, "title": facts[name].get("title")}
            about |= {"norm": outcome.norm, "eps": outcome.eps}
            rows += _points(chain, found, about)
    return rows


def _in_norm(chain: Chain, norm: str) -> dict[str, evaluate.AttackOutcome]:
    """The attacks in a norm, by name."""
    found = {name: outcome for name, outcome in chain.attacks.items() if outcome.norm == norm}
    if norm in chain.distances:
        found[f"distance {norm}"] = chain.distances[norm]
    return found


def _points(chain: Chain, found: Iterable[evaluate.Curve], about: Row) -> list[Row]:
    return [
        {
            **chain.names(index),
            **about,
            "x": float(x),
            "robust_accuracy": float(value),
            "low": float(low),
            "high": float(high),
            "num_examples": curve.num_examples,
        }
        for index, curve in enumerate(found)
        for x, value, low, high in zip(
            curve.x, curve.robust_accuracy, curve.low, curve.high, strict=True
        )
    ]


def transfer(chain: Chain, plan: evaluate.AttackPlan, examples: data.Split) -> list[Row]:
    """What was crafted on each generation, judged on all of them."""
    outcome = chain.crafted
    if outcome is None:
        return []
    matrix = evaluate.transfer_matrix(
        nets.stack([network.logits_fn for network in chain.networks]),
        *examples,
        plan,
        outcome=outcome,
    )
    return [
        {
            **chain.run,
            "source_generation": source.generation,
            "target_generation": target.generation,
            **_named(outcome),
            "norm": outcome.norm,
            "eps": outcome.eps,
            "num_examples": outcome.success.shape[1],
            **_ends("success_rate", rate, "low", "high"),
        }
        for source, rates in zip(chain.networks, matrix.success_rate, strict=True)
        for target, rate in zip(chain.networks, rates, strict=True)
    ]


def comparisons(chain: Chain) -> list[Row]:
    """Each student with assistants against the one without, on the same examples."""
    rows, quantities = [], _quantities(chain)
    for index, network in enumerate(chain.networks):
        if network.generation <= _PLAIN:
            continue
        for quantity, flags in quantities.items():
            found = metrics.paired(flags[index], flags[_PLAIN])
            rows.append({**chain.run, **_compared(quantity, network.generation, found)})
    return rows


def comparisons_over_seeds(chains: Sequence[Chain]) -> list[Row]:
    """The same over the seeds of each temperature, where there are several."""
    by_temperature: dict[float, list[Chain]] = {}
    for chain in chains:
        by_temperature.setdefault(chain.networks[0].temperature, []).append(chain)
    rows = []
    for seeds in by_temperature.values():
        if len(seeds) < 2:
            continue
        means = [
            {name: flags.mean(axis=1) for name, flags in _quantities(chain).items()}
            for chain in seeds
        ]
        for index, network in enumerate(seeds[0].networks):
            if network.generation <= _PLAIN:
                continue
            for quantity in means[0]:
                shares = np.array([of_seed[quantity] for of_seed in means])
                found = metrics.paired_over_seeds(shares[:, index], shares[:, _PLAIN])
                row = _compared(quantity, network.generation, found)
                rows.append({**seeds[0].run, "seed": None, **row, "num_examples": None})
    return rows


class _Quantity(NamedTuple):
    """Quantities that students are compared in, and the title of the attack where there is one."""

    name: str
    title: str | None


def _quantities(chain: Chain) -> dict[_Quantity, np.ndarray]:
    """Of each quantity `[G, N]` flags."""
    found = {_Quantity("test_accuracy", None): np.stack([clean.correct for clean in chain.clean])}
    facts = _facts(chain.attacks)
    for name, outcome in chain.attacks.items():
        if outcome.eps is not None:
            at = f"robust_accuracy: {name} at {outcome.norm} {outcome.eps:g}"
            found[_Quantity(at, facts[name].get("title"))] = ~outcome.success
    return found


def _compared(quantity: _Quantity, generation: int, found: metrics.Comparison) -> Row:
    return {
        "quantity": quantity.name,
        "title": quantity.title,
        "generation": generation,
        "baseline_generation": _PLAIN,
        "difference": found.difference.value,
        "low": found.difference.low,
        "high": found.difference.high,
        "p_value": found.p_value,
        "num_examples": found.num_pairs,
        "test": found.test,
    }


def _ends(
    name: str, interval: metrics.Interval, low: str | None = None, high: str | None = None
) -> Row:
    return {
        name: interval.value,
        low or f"{name}_low": interval.low,
        high or f"{name}_high": interval.high,
    }
