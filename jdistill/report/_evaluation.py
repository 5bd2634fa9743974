"""Evaluations as the rows of the report's tables, and as a whole report in one call."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from jdistill import _validate, evaluate, metrics
from jdistill._files import PathLike, as_path
from jdistill.diagnose import Verdict
from jdistill.report._page import write_report
from jdistill.report._table import FACTS, TABLES, write_table
from jdistill.report._verdicts import write_verdicts

Row = dict[str, Any]

# A curve of more points would draw the same line.
_MOST_POINTS = 60
_NUM_PICTURES = 8
_IMAGE_AXES = ((0, 1, 2, 3), (0, 2, 3, 1))  # to [N, H, W, C], from it or from [N, C, H, W]


class NetworkName(NamedTuple):
    """The columns that name a network in every table.

    Attributes:
        dataset: the data that it was trained on.
        temperature: T of its training, above 0.
        seed: of its run, from 0.
        generation: its place in its chain; 0 is the teacher.
        chain: the name of its chain, empty where there is one chain.

    Example:
        >>> student = NetworkName("digits", temperature=20.0, generation=1)
        >>> student.columns()
        {'dataset': 'digits', 'temperature': 20.0, 'seed': 0, 'generation': 1}
    """

    dataset: str
    temperature: float = 1.0
    seed: int = 0
    generation: int = 0
    chain: str = ""

    def columns(self) -> Row:
        """The name as the columns of a row; `chain` where it has one."""
        row = self._asdict()
        return row if self.chain else {name: row[name] for name in row if name != "chain"}

    @property
    def run(self) -> Row:
        """The columns of its chain, temperature, and seed."""
        return {name: value for name, value in self.columns().items() if name != "generation"}


Measured = tuple[evaluate.Evaluation, Sequence[NetworkName]]


class _Network(NamedTuple):
    """A network's place in what was measured."""

    name: NetworkName
    result: evaluate.Evaluation
    place: int


def tables(
    measured: Sequence[Measured],
    *,
    compared: Sequence[tuple[NetworkName, NetworkName]] = (),
    agreements: Mapping[tuple[NetworkName, NetworkName], evaluate.Agreement] | None = None,
) -> dict[str, list[Row]]:
    """The rows of every kind of table (`TABLES`) that evaluations give.

    Args:
        measured: evaluations on the same examples, each with the names of its networks in order.
        compared: pairs of networks, each with its baseline; over several seeds, pairs that are the
            same but for the seed are also compared over their means.
        agreements: by student and teacher, what `evaluate.agreement` has found; both of one
            temperature and seed.

    Returns:
        Rows by kind; none where nothing of the kind was measured. Those of `deployment` are not of
        evaluations: a study writes them.

    Raises:
        ValueError: as many names as networks are expected; a pair that was not measured; an
            agreement of networks of two runs.

    Example:
        >>> import functools
        >>> import jax.numpy as jnp
        >>> from jdistill import attacks, nets
        >>> net = nets.callable_logits_fn(lambda w, x: x @ w, jnp.eye(2))
        >>> fgsm = functools.partial(attacks.fgsm, eps=0.6)
        >>> x, y = np.eye(2, dtype=np.float32), np.arange(2)
        >>> result = evaluate.evaluate(net, x, y, attacks={"fgsm": fgsm})
        >>> rows = tables([(result, [NetworkName("toy")])])["results"]
        >>> rows[0]["attack"], rows[0]["success_rate"]
        ('fgsm', 1.0)
    """
    networks = []
    _validate.sequence(measured=measured, compared=compared)
    for each in measured:
        _validate.instance((tuple, list), "pairs (evaluation, names)", measured=each)
        _validate.instance(evaluate.Evaluation, "pairs (evaluation, names)", measured=each[0])
    for result, names in measured:
        if len(names) != len(result.clean.accuracy):
            raise ValueError(
                f"expected a name for each of {len(result.clean.accuracy)} networks, got "
                f"{len(names)}; name them in the order of the evaluation"
            )
        networks += [_Network(name, result, place) for place, name in enumerate(names)]
    return {
        "results": [row for network in networks for row in _results(network)],
        "curves": _curves(networks),
        "transfer": [row for result, names in measured for row in _transfer(result, names)],
        "sensitivity": [row for network in networks for row in _sensitivity(network)],
        "calibration": [_calibration(network) for network in networks],
        "agreement": _agreements({} if agreements is None else agreements),
        "distances": [row for network in networks for row in _distances(network)],
        "comparisons": _comparisons(networks, compared),
    }


def from_evaluation(
    result: evaluate.Evaluation,
    *,
    verdicts: Verdict | Sequence[Verdict | None] | Mapping[str, Verdict] | None = None,
    names: Sequence[str | NetworkName] | None = None,
    folder: PathLike = "report",
    dataset: str = "data",
    config: Mapping[str, Any] | None = None,
) -> dict[str, epath.Path]:
    """Writes tables, figures, pictures, and the page of an evaluation.

    Args:
        result: what `evaluate.evaluate` has measured of `R` networks.
        verdicts: of `diagnose.masking`: one per network (None for those not judged), or by name;
            a single one for a single network.
        names: `[R]`, texts or `NetworkName` values; None numbers the networks.
        folder: where to write; it is made.
        dataset: the name of the data, for networks named by a text.
        config: settings to show on the page.

    Returns:
        The path of everything written; `"report"` is the page.

    Raises:
        ValueError: names or verdicts that do not fit the networks.
        ModuleNotFoundError: a package that the page needs is missing.

    Example:
        >>> import functools, tempfile
        >>> import jax.numpy as jnp
        >>> from jdistill import attacks, nets
        >>> net = nets.callable_logits_fn(lambda w, x: x @ w, jnp.eye(2))
        >>> fgsm = functools.partial(attacks.fgsm, eps=0.6)
        >>> x, y = np.eye(2, dtype=np.float32), np.arange(2)
        >>> result = evaluate.evaluate(net, x, y, attacks={"fgsm": fgsm})
        >>> written = from_evaluation(result, names=["mine"], folder=tempfile.mkdtemp())
        >>> written["report"].name
        'report.html'
    """
    _check_evaluation(result)
    num_networks = len(result.clean.accuracy)
    _validate.text(dataset=dataset)
    if names is None:
        names = [f"network {place}" for place in range(num_networks)]
    _validate.sequence(names=names)
    labels = [name if isinstance(name, NetworkName) else str(name) for name in names]
    if len(set(labels)) < len(labels) or len(labels) != num_networks:
        raise ValueError(
            f"expected names, a different one for each of {num_networks} networks, got {names}; "
            "name them in the order of the evaluation"
        )
    if result.transfer and not all(isinstance(name, NetworkName) for name in names):
        raise ValueError(
            "expected NetworkNames, with generations, for the table of what transfers, got texts; "
            "pass report.NetworkName(dataset, generation=...)"
        )
    full = [
        name if isinstance(name, NetworkName) else NetworkName(dataset, chain=str(name))
        for name in names
    ]
    if len(full) == 1 and not isinstance(names[0], NetworkName):
        full = [NetworkName(str(names[0]))]
    rows = tables([(result, full)])
    where = as_path(folder)
    for kind in rows:
        if rows[kind] or kind == "results":
            write_table(where / f"{kind}.csv", kind, rows[kind])
        else:
            (where / f"{kind}.csv").unlink(missing_ok=True)
    judged = _judged(verdicts, labels)
    path = where / "verdicts.json"
    if judged:
        write_verdicts(
            path, [{**full[place].columns(), "verdict": v} for place, v in judged.items()]
        )
    else:
        path.unlink(missing_ok=True)
    shown = {_title(label): pictures(result, place) for place, label in enumerate(labels)}
    written = write_report(
        where,
        config={} if config is None else config,
        pictures={label: arrays for label, arrays in shown.items() if arrays is not None},
    )
    return {"results": where / "results.csv", **written}


def pictures(result: evaluate.Evaluation, place: int) -> dict[str, np.ndarray] | None:
    """A few adversarial images of a network, by its first attack in l2.

    Args:
        result: an evaluation.
        place: of the network.

    Returns:
        What `write_picture_grid` takes; None where the inputs are no images of 1 or 3 channels,
        first or last, or no attack was in l2.

    Raises:
        ValueError: `result` is no evaluation, or has no such place.

    Example:
        >>> import functools
        >>> import jax.numpy as jnp
        >>> from jdistill import attacks, nets
        >>> pixels = lambda weights, x: x.reshape(len(x), 4) @ weights
        >>> net = nets.callable_logits_fn(pixels, jnp.eye(4)[:, :2])
        >>> attack = functools.partial(attacks.fgsm, eps=1.5, norm="l2")
        >>> x = np.eye(2, 4, dtype=np.float32).reshape(2, 2, 2, 1)
        >>> result = evaluate.evaluate(net, x, np.arange(2), attacks={"fgsm": attack})
        >>> pictures(result, 0)["adversarial"].shape
        (2, 2, 2, 1)
    """
    _check_evaluation(result)
    _validate.count(minimum=0, place=place)
    if place >= len(result.clean.accuracy):
        raise ValueError(
            f"expected place in 0..{len(result.clean.accuracy) - 1}, the networks measured, got "
            f"{place}; count from 0"
        )
    if result.inputs.ndim != 4:
        return None
    axes = next((axes for axes in _IMAGE_AXES if result.inputs.shape[axes[-1]] in (1, 3)), None)
    outcome = next((found for found in result.attacks.values() if found.norm == "l2"), None)
    if axes is None or outcome is None or outcome.predictions is None:
        return None
    size = min(_NUM_PICTURES, outcome.success.shape[1])
    return {
        "clean": result.inputs[:size].transpose(axes),
        "adversarial": outcome.inputs[place, :size].transpose(axes),
        "labels": result.labels[:size],
        "predictions": outcome.predictions[place, :size],
        "distance": outcome.distance[place, :size],
    }


def _check_evaluation(result: Any) -> None:
    remedy = "pass what evaluate.evaluate returned"
    _validate.instance(evaluate.Evaluation, "an Evaluation", remedy=remedy, result=result)


def _title(label: str | NetworkName) -> str:
    if isinstance(label, str):
        return label
    chain = f"{label.chain}, " if label.chain else ""
    return f"{chain}T={label.temperature:g}, seed {label.seed}, generation {label.generation}"


def _judged(verdicts: Any, labels: Sequence[str | NetworkName]) -> dict[int, Verdict]:
    """The verdicts by the places of their networks."""
    if verdicts is None:
        return {}
    if isinstance(verdicts, Verdict):
        verdicts = [verdicts]
    if isinstance(verdicts, Mapping):
        unknown = [name for name in verdicts if name not in labels]
        if unknown:
            raise ValueError(
                f"expected verdicts on {', '.join(map(str, labels))}, got one on {unknown[0]}; use "
                "the networks' names"
            )
        verdicts = [verdicts.get(label) for label in labels]
    _validate.sequence(verdicts=verdicts)
    if len(verdicts) != len(labels):
        raise ValueError(
            f"expected a verdict for each of {len(labels)} networks, got {len(verdicts)}; pass "
            "None for those not judged"
        )
    found = {place: verdict for place, verdict in enumerate(verdicts) if verdict is not None}
    for verdict in found.values():
        _validate.instance(Verdict, "a diagnose.Verdict", verdict=verdict)
    return found


def _results(network: _Network) -> list[Row]:
    """A row for each attack on a network, or one without an attack."""
    _, result, place = network
    clean, facts = result.clean, _facts(result.attacks)
    accuracy = clean.accuracy[place]
    own = {
        **network.name.columns(),
        "num_test": clean.correct.shape[1],
        **_ends("test_accuracy", accuracy),
        "mean_abs_logit": float(clean.mean_abs_logit[place]),
        "num_sensitivity": clean.log10_sensitivity_softmax_examples.shape[1],
        "sensitivity_logits": float(clean.sensitivity_logits[place]),
        "log10_sensitivity_softmax": float(clean.log10_sensitivity_softmax[place]),
        "zero_gradient_fraction": float(clean.zero_gradient_fraction[place]),
    }
    rows = [
        {
            **own,
            "attack": name,
            **facts[name],
            "norm": outcome.norm,
            "eps": outcome.eps,
            "num_attacked": outcome.success.shape[1],
            **_ends("success_rate", outcome.success_rate[place]),
            "mean_distance": float(outcome.mean_distance[place]),
            "median_distance": float(outcome.median_distance[place]),
            "mean_queries": float(outcome.queries[place].mean()),
        }
        for name, outcome in result.attacks.items()
    ]
    empty = {name: None for name in TABLES["results"] if name not in own}
    return rows or [{**own, **empty}]


def _facts(outcomes: Mapping[str, evaluate.AttackOutcome]) -> dict[str, Row]:
    """The columns on each attack, by name; nothing on an attack that is not the library's."""
    found = {
        name: {fact: getattr(outcome.traits, fact) for fact in FACTS}
        for name, outcome in outcomes.items()
        if outcome.traits is not None and outcome.traits.access is not None
    }
    titles = [facts["title"] for facts in found.values()]
    for name, facts in found.items():
        if titles.count(facts["title"]) > 1:
            facts["title"] += f" ({name})"
    return {name: found.get(name, {}) for name in outcomes}


def _sensitivity(network: _Network) -> list[Row]:
    """The histogram of a network's sensitivities, in the bins of Papernot et al."""
    examples = network.result.clean.log10_sensitivity_softmax_examples[network.place]
    histogram = metrics.sensitivity_histogram(examples)
    edges = [float(edge) if np.isfinite(edge) else None for edge in histogram.edges]
    bins = zip(edges, edges[1:], histogram.counts, strict=False)
    name = network.name.columns()
    return [{**name, "low": low, "high": high, "count": int(count)} for low, high, count in bins]


def _calibration(network: _Network) -> Row:
    found = network.result.clean.calibration[network.place]
    wanted = TABLES["calibration"][4:]
    return {**network.name.columns(), **{column: getattr(found, column) for column in wanted}}


def _agreements(
    found: Mapping[tuple[NetworkName, NetworkName], evaluate.Agreement],
) -> list[Row]:
    """A row for each student and one of its teachers."""
    _validate.mapping(agreements=found)
    rows = []
    for pair, agreement in found.items():
        fits = isinstance(pair, tuple) and len(pair) == 2
        if not fits or not all(isinstance(name, NetworkName) for name in pair):
            raise ValueError(
                "expected agreements by (student, teacher), two NetworkNames, got "
                f"{pair!r:.60}; pass {{(student, teacher): evaluate.agreement(...)}}"
            )
        remedy = "pass what evaluate.agreement returned"
        _validate.instance(evaluate.Agreement, "an Agreement", remedy=remedy, agreements=agreement)
        student, teacher = pair
        if any(getattr(student, name) != getattr(teacher, name) for name in _OF_A_RUN):
            raise ValueError(
                f"expected a student and its teacher of one data set, temperature, and seed, got "
                f"{student} and {teacher}; pass the teacher that the student has learned from"
            )
        rows.append(
            {
                **student.columns(),
                **({"teacher_chain": teacher.chain} if teacher.chain else {}),
                "teacher_generation": teacher.generation,
                "num_examples": agreement.num_examples,
                **_ends("top1_agreement", agreement.top1_agreement),
                "num_teacher_mistakes": agreement.num_teacher_mistakes,
                **_ends("repeated_mistakes", agreement.repeated_mistakes),
                "mean_kl": agreement.mean_kl,
                "logits_cka": agreement.logits_cka,
            }
        )
    return rows


_OF_A_RUN = ("dataset", "temperature", "seed")


def _distances(network: _Network) -> list[Row]:
    """The robustness ρ_adv of a network, by norm."""
    return [
        {
            **network.name.columns(),
            "norm": norm,
            **_named(norm, outcome),
            "success_rate": outcome.success_rate[network.place].value,
            "mean": float(outcome.mean_distance[network.place]),
            "median": float(outcome.median_distance[network.place]),
            "num_examples": outcome.success.shape[1],
        }
        for norm, outcome in network.result.distances.items()
    ]


def _named(name: str, outcome: evaluate.AttackOutcome) -> Row:
    """The columns that name an attack by itself."""
    known = outcome.traits
    if known is None or known.access is None:
        return {"attack": name}
    return {"attack": known.name, "title": known.title}


def _curves(networks: Sequence[_Network]) -> list[Row]:
    """Robust accuracy against the radius, and against the steps of the attacks that count them.

    At the same radii and steps for all networks, so that seeds can be averaged.
    """
    rows = []
    for norm in ("linf", "l2"):
        reached = [
            float(outcome.distance[outcome.success].max(initial=0.0))
            for result in {id(network.result): network.result for network in networks}.values()
            for outcome in _in_norm(result, norm)
        ]
        radii = np.linspace(0.0, max(reached, default=0.0) or 1.0, _MOST_POINTS)
        for network in networks:
            outcomes = _in_norm(network.result, norm)
            if any(outcome.eps is None for outcome in outcomes):
                found = evaluate.accuracy_against_eps(outcomes, radii)[network.place]
                about: Row = {"curve": "eps", "attack": "worst_case", "norm": norm, "eps": None}
                rows += _points(network, found, about)
    for network in networks:
        facts = _facts(network.result.attacks)
        for name, outcome in network.result.attacks.items():
            num_steps = outcome.traits and outcome.traits.settings.get("num_steps")
            if num_steps is None or outcome.eps is None or "first_success" not in outcome.info:
                continue
            steps = np.arange(num_steps + 2)
            found = evaluate.accuracy_against_steps(outcome, steps)[network.place]
            about = {"curve": "steps", "attack": name, "title": facts[name].get("title")}
            rows += _points(network, found, {**about, "norm": outcome.norm, "eps": outcome.eps})
    return rows


def _in_norm(result: evaluate.Evaluation, norm: str) -> list[evaluate.AttackOutcome]:
    """The attacks in a norm."""
    found = [outcome for outcome in result.attacks.values() if outcome.norm == norm]
    return [*found, result.distances[norm]] if norm in result.distances else found


def _points(network: _Network, curve: evaluate.Curve, about: Row) -> list[Row]:
    columns = zip(curve.x, curve.robust_accuracy, curve.low, curve.high, strict=True)
    return [
        {
            **network.name.columns(),
            **about,
            "x": float(x),
            "robust_accuracy": float(value),
            "low": float(low),
            "high": float(high),
            "num_examples": curve.num_examples,
        }
        for x, value, low, high in columns
    ]


def _transfer(result: evaluate.Evaluation, names: Sequence[NetworkName]) -> Iterable[Row]:
    """Rows of what was crafted on each network, judged by those of the same chain and run."""
    facts = _facts(result.attacks)
    for attack, matrices in result.transfer.items():
        if len(matrices) != 1:
            continue  # of chains that the caller has named by places
        outcome = result.attacks[attack]
        for source, rates in zip(names, matrices[0].success_rate, strict=True):
            for target, rate in zip(names, rates, strict=True):
                if source.run == target.run:
                    yield {
                        **source.run,
                        "source_generation": source.generation,
                        "target_generation": target.generation,
                        "attack": attack,
                        "title": facts[attack].get("title"),
                        "norm": outcome.norm,
                        "eps": outcome.eps,
                        "num_examples": outcome.success.shape[1],
                        **_ends("success_rate", rate, "low", "high"),
                    }


class _Quantity(NamedTuple):
    """A quantity that networks are compared in, and the title of the attack where there is one."""

    name: str
    title: str | None


def _comparisons(
    networks: Sequence[_Network], compared: Sequence[tuple[NetworkName, NetworkName]]
) -> list[Row]:
    """Each pair on the same examples; and over the seeds, where there are several."""
    for pair in compared:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise ValueError(
                f"expected compared to be pairs of NetworkNames, got {pair!r:.60}; pass (name, "
                "baseline)"
            )
    known = {network.name: network for network in networks}
    missing = [name for pair in compared for name in pair if name not in known]
    if missing:
        raise ValueError(
            f"expected pairs of networks that were measured, got {missing[0]}; measure it too"
        )
    rows: list[Row] = []
    by_pair: dict[Any, list[dict[_Quantity, tuple[np.ndarray, np.ndarray]]]] = {}
    for one, other in compared:
        flags, baseline = _quantities(known[one]), _quantities(known[other])
        shared = {
            key: (flags[key], baseline[key])
            for key in flags
            if key in baseline and len(flags[key]) == len(baseline[key])
        }
        for quantity, columns in shared.items():
            rows.append(_compared(one, other, quantity, metrics.paired(*columns)))
        by_pair.setdefault((one._replace(seed=0), other._replace(seed=0)), []).append(shared)
    for (one, other), seeds in by_pair.items():
        if len(seeds) < 2:
            continue
        for quantity in [each for each in seeds[0] if all(each in other for other in seeds)]:
            means = np.array([[flags.mean() for flags in shared[quantity]] for shared in seeds])
            found = metrics.paired_over_seeds(means[:, 0], means[:, 1])
            row = _compared(one, other, quantity, found)
            rows.append({**row, "seed": None, "num_examples": None})
    return rows


def _quantities(network: _Network) -> dict[_Quantity, np.ndarray]:
    """Flags `[N]` of each quantity."""
    result, place = network.result, network.place
    found = {_Quantity("test_accuracy", None): result.clean.correct[place]}
    facts = _facts(result.attacks)
    for name, outcome in result.attacks.items():
        if outcome.eps is not None:
            at = f"robust_accuracy: {name} at {outcome.norm} {outcome.eps:g}"
            found[_Quantity(at, facts[name].get("title"))] = ~outcome.success[place]
    return found


def _compared(
    one: NetworkName, other: NetworkName, quantity: _Quantity, found: metrics.Comparison
) -> Row:
    chains = {"baseline_chain": other.chain} if other.chain else {}
    return {
        **one.run,
        **chains,
        "quantity": quantity.name,
        "title": quantity.title,
        "generation": one.generation,
        "baseline_generation": other.generation,
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
