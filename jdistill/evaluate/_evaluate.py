"""All measures of a stack in one call."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jdistill import _validate, metrics, nets
from jdistill._entries import Store
from jdistill.attacks import traits
from jdistill.evaluate import _curves
from jdistill.evaluate._attack import AttackOutcome, AttackPlan, Plan, under_attack
from jdistill.evaluate._clean import CleanMeasures, clean
from jdistill.evaluate._curves import Curve
from jdistill.evaluate._distances import distance_plans_of, distances, plans_of
from jdistill.evaluate._runs import check_inputs, first, refuse_tracers, shard_names, stacked
from jdistill.evaluate._transfer import TransferMatrix, transfer_matrix
from jdistill.typing import Array, ArrayLike, Callback, LogitsFn, Norm


class Budget(NamedTuple):
    """Budget of an attack: move an input by at most `eps` in a norm.

    Attributes:
        norm: of the change.
        eps: the largest change, at least 0, in units of the input.

    Example:
        >>> budget = Budget("linf", 0.1)
        >>> worst_cases = {budget: 0.4}  # as `Evaluation.worst_case` has them
        >>> worst_cases["linf", 0.1]
        0.4
    """

    norm: Norm
    eps: float


class Evaluation(NamedTuple):
    """All measures of a stack of `R` networks.

    Attributes:
        clean: on clean inputs, calibration and sensitivities included.
        attacks: by name, what each attack did.
        distances: by norm, the minimum-norm attacks: ρ_adv is `mean_distance`.
        worst_case: by budget of the fixed-budget attacks, `[R]`: what all attacks in that norm
            leave within that radius, the minimum-norm ones included.
        eps_curves: by norm of which there is a minimum-norm attack, `[R]`: robust accuracy against
            the radius, the worst case over all attacks in that norm.
        step_curves: by name of each fixed-budget attack that says at which step it succeeded, and
            needed one start only, `[R]`: robust accuracy after each step.
        query_curves: by name of each fixed-budget attack that counts its queries, `[R]`.
        transfer: by name of each attack asked for, one matrix for each chain.
        inputs: `[N, ...]`, what was measured on.
        labels: `[N]`.
    """

    clean: CleanMeasures
    attacks: dict[str, AttackOutcome]
    distances: dict[str, AttackOutcome]
    worst_case: dict[Budget, list[metrics.WorstCase]]
    eps_curves: dict[str, list[Curve]]
    step_curves: dict[str, list[Curve]]
    query_curves: dict[str, list[Curve]]
    transfer: dict[str, list[TransferMatrix]]
    inputs: np.ndarray
    labels: np.ndarray


def evaluate(
    networks: LogitsFn | Sequence[LogitsFn],
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    attacks: Mapping[str, Plan],
    distances: Mapping[str, Plan] | None = None,
    transfer: Iterable[str] = (),
    chains: Sequence[Sequence[int]] | None = None,
    eps_grids: Mapping[str, Sequence[float]] | None = None,
    key: Array | None = None,
    temperature: ArrayLike = 1.0,
    num_sensitivity: int | None = None,
    batch_size: int = 250,
    vmapped: bool | None = None,
    callback: Callback | None = None,
    shards: Store | None = None,
    names: Sequence[str] | None = None,
) -> Evaluation:
    """Measure networks on the same examples: all that one run of each attack says.

    It is `clean`, `under_attack` for each attack, `distances` and `transfer_matrix` where asked
    for; worst cases and curves are read off what these found and cost nothing.

    Args:
        networks: one network; or several of one structure; or a stack of them, a `logits_fn` pytree
            whose leaves lead with `R`.
        inputs: `[N, ...]` float, inside the attacks' bounds.
        labels: `[N]` int in `0..K-1`, of two classes at least.
        attacks: by name, each a plan, or an attack with its settings bound.
        distances: likewise by norm, minimum-norm attacks, such as `distance_plans()`.
        transfer: names of attacks to judge on the other networks as well.
        chains: of which networks a matrix is made, by their places in the stack: the generations
            of each chain. None takes all networks as one chain.
        eps_grids: by norm, the radii of its curve; None, and other norms, take every radius at
            which an example falls.
        key: for random attacks; example `n` uses `fold_in(key, n)`, whatever the batch size. None
            takes one that depends on the attack's name alone, so that networks are compared on the
            same draws.
        temperature: at which the networks are tested, above 0; scalar or `[R]`. 1 in every paper.
            The attacks, the softmax sensitivity, the calibration and the zero gradients are those
            of the divided logits; `mean_abs_logit` and `sensitivity_logits` are of the logits as
            they are.
        num_sensitivity: see `clean`.
        batch_size: see `clean`; the attacks have their own.
        vmapped: whether to run the stack under `vmap`; None does so except on CPU.
        callback: called after every chunk with `event="evaluate"`, `stage` (`"accuracy"`,
            `"sensitivity"`, the attack's name, `"distance l2"`), `done` and `total` (examples times
            networks).
        shards: where to keep what was measured, to go on from; see `under_attack`.
        names: `[R]`, the networks' names for the shards.

    Returns:
        The measures, on the host.

    Raises:
        ValueError: inputs that are not finite, labels out of range or all of one class (in the
            whole set, or among those that an attack takes), a temperature not above 0, a count
            that is no whole number above 0, an attack for distances in another norm, a transfer
            of an attack that is not there, a shard of other settings.

    Example:
        >>> import functools
        >>> import jax.numpy as jnp
        >>> import numpy as np
        >>> from jdistill import attacks, nets
        >>> linear = lambda weights, x: x @ weights
        >>> two = [nets.callable_logits_fn(linear, w) for w in (jnp.eye(2), -jnp.eye(2))]
        >>> x, y = np.eye(2, dtype=np.float32), np.arange(2)
        >>> fgsm = functools.partial(attacks.fgsm, eps=0.6)
        >>> result = evaluate(two, x, y, attacks={"fgsm": fgsm}, transfer=["fgsm"])
        >>> [share.value for share in result.clean.accuracy]
        [1.0, 0.0]
        >>> [share.value for share in result.attacks["fgsm"].success_rate]
        [1.0, 1.0]
        >>> result.worst_case["linf", 0.6][0].robust_accuracy.value
        0.0

    References:
        Papernot et al. 2016, section V; Mandal & Gao 2023 (accuracy, sensitivity and robustness
        at each temperature); Carlini et al. 2019, "On Evaluating Adversarial Robustness" (worst
        case per example, curves against the budget, transfer).
    """
    refuse_tracers(networks, inputs, labels, key)
    _validate.inputs_in_box(inputs, (-np.inf, np.inf))
    stack = stacked(networks, inputs)
    num_runs = nets.stack_size(stack)
    plans = plans_of(attacks, "attacks")
    by_norm = distance_plans_of({} if distances is None else distances)
    if isinstance(transfer, str) or not isinstance(transfer, Iterable):
        raise ValueError(f"expected transfer to be names, got {transfer!r}; pass a list of them")
    transfer = list(transfer)
    grids = {} if eps_grids is None else eps_grids
    _validate.mapping(eps_grids=grids)
    for norm, radii in grids.items():
        _validate.column(**{f"eps_grids[{norm!r}]": radii})
    shard_names(names, num_runs)
    num_classes = check_inputs(stack, inputs)
    _validate.class_indices(labels, batch_size=len(inputs), num_classes=num_classes)
    _check_names(plans, by_norm, transfer, chains, num_runs)
    named = {**plans, **{_of_norm(norm): plan for norm, plan in by_norm.items()}}
    check_classes(inputs, labels, named)
    measures = clean(
        stack,
        inputs,
        labels,
        temperature=temperature,
        num_sensitivity=num_sensitivity,
        batch_size=batch_size,
        vmapped=vmapped,
        callback=callback,
        shards=shards,
        names=names,
    )
    shared: dict[str, Any] = {
        "temperature": temperature,
        "vmapped": vmapped,
        "callback": callback,
        "shards": shards,
        "names": names,
    }
    outcomes = {
        name: under_attack(
            stack,
            inputs,
            labels,
            plan,
            stage=name,
            key=jax.random.key(zlib.crc32(name.encode())) if key is None else key,
            **shared,
        )
        for name, plan in plans.items()
    }
    found = _distances(
        stack,
        inputs,
        labels,
        by_norm,
        key=jax.random.key(zlib.crc32(b"distances")) if key is None else key,
        **shared,
    )
    everything = {**outcomes, **{_of_norm(norm): outcome for norm, outcome in found.items()}}
    return Evaluation(
        clean=measures,
        attacks=outcomes,
        distances=found,
        worst_case=_worst_cases(everything),
        eps_curves=_eps_curves(everything, named, grids),
        step_curves=_step_curves(outcomes, plans),
        query_curves={
            name: _curves.accuracy_against_queries(outcome)
            for name, outcome in outcomes.items()
            if outcome.eps is not None and "num_queries" in traits(plans[name].attack).settings
        },
        transfer={
            name: [
                _transferred(
                    np.array(chain), stack, inputs, labels, plans[name], outcomes[name], vmapped
                )
                for chain in (chains or [range(num_runs)])
            ]
            for name in transfer
        },
        inputs=np.asarray(inputs),
        labels=np.asarray(labels),
    )


# `evaluate` has an argument of this name.
_distances = distances


def _of_norm(norm: str) -> str:
    """Name of the attack for distances in a norm beside the others."""
    return f"distance {norm}"


def _worst_cases(outcomes: Mapping[str, AttackOutcome]) -> dict[Budget, list[metrics.WorstCase]]:
    """Worst cases over all attacks in a norm, within each radius that one of them was given."""
    budgets = dict.fromkeys(
        Budget(outcome.norm, outcome.eps)
        for outcome in outcomes.values()
        if outcome.norm is not None and outcome.eps is not None
    )
    return {
        budget: _curves.worst_case(_in_norm(outcomes, budget.norm), eps=budget.eps)
        for budget in budgets
    }


def _eps_curves(
    outcomes: Mapping[str, AttackOutcome],
    plans: Mapping[str, AttackPlan],
    grids: Mapping[str, Sequence[float]],
) -> dict[str, list[Curve]]:
    known = [traits(plan.attack) for plan in plans.values()]
    norms = dict.fromkeys(found.norm for found in known if found.minimum_norm and found.norm)
    return {
        norm: _curves.accuracy_against_eps(_in_norm(outcomes, norm).values(), grids.get(norm))
        for norm in norms
    }


def _step_curves(
    outcomes: Mapping[str, AttackOutcome], plans: Mapping[str, AttackPlan]
) -> dict[str, list[Curve]]:
    curves = {}
    for name, outcome in outcomes.items():
        num_steps = traits(plans[name].attack).settings.get("num_steps")
        if outcome.eps is None or num_steps is None or "first_success" not in outcome.info:
            continue
        last = max(num_steps + 1, int(outcome.info["first_success"].max()))
        curves[name] = _curves.accuracy_against_steps(outcome, range(last + 1))
    return curves


def _in_norm(outcomes: Mapping[str, AttackOutcome], norm: Norm) -> dict[str, AttackOutcome]:
    return {name: outcome for name, outcome in outcomes.items() if outcome.norm == norm}


def _transferred(
    chain: np.ndarray,
    stack: LogitsFn,
    inputs: np.ndarray,
    labels: np.ndarray,
    plan: AttackPlan,
    outcome: AttackOutcome,
    vmapped: bool | None,
) -> TransferMatrix:
    """The matrix of some networks of the stack, from what the attack did to all of them."""
    return transfer_matrix(
        jax.tree.map(lambda leaf: leaf[chain], stack),
        inputs,
        labels,
        plan,
        outcome=outcome._replace(inputs=outcome.inputs[chain], success=outcome.success[chain]),
        vmapped=vmapped,
    )


def _check_names(
    attacks: Mapping[str, AttackPlan],
    distances: Mapping[str, AttackPlan],
    transfer: Sequence[str],
    chains: Sequence[Sequence[int]] | None,
    num_runs: int,
) -> None:
    """Everything referred to is there, and once."""
    for norm in distances:
        if _of_norm(norm) in attacks:
            raise ValueError(
                f"expected names of attacks other than those for distances, got {_of_norm(norm)!r};"
                " rename the attack"
            )
    missing = [name for name in transfer if name not in attacks]
    if missing:
        raise ValueError(
            f"expected transfer to name some of the attacks {', '.join(attacks) or '(none)'}, got "
            f"{missing[0]!r}; add it to attacks"
        )
    _validate.sequence(chains=[] if chains is None else chains)
    for chain in chains or ():
        _validate.sequence(chains=chain)
        for place in chain:
            _validate.count(minimum=-num_runs, **{"each place in chains": place})
    outside = [place for chain in chains or () for place in chain if not 0 <= place < num_runs]
    if outside:
        raise ValueError(
            f"expected places in the stack of {num_runs} networks, 0..{num_runs - 1}, got "
            f"{outside[0]} in chains; count from 0 in the stack's order"
        )


def check_classes(inputs: np.ndarray, labels: np.ndarray, named: Mapping[str, AttackPlan]) -> None:
    """An error for a set of one class, which a network that knows nothing may get all right."""
    sizes = {"the test set": first(len(inputs), "num_examples", None)}
    sizes |= {
        f"attack {name!r}": first(len(inputs), "num_examples", plan.num_examples)
        for name, plan in named.items()
    }
    for what, size in sizes.items():
        classes = np.unique(np.asarray(labels)[:size])
        if size > 1 and classes.size == 1:
            raise ValueError(
                f"expected examples of two classes at least, got {size} of class {classes[0]} for "
                f"{what}; shuffle the set, which may be sorted by class, or measure one class by "
                "evaluate.clean and evaluate.under_attack"
            )
