"""How far inputs must be moved: the robustness ρ_adv in several norms."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jdistill import _validate, attacks
from jdistill._entries import Store
from jdistill.evaluate._attack import AttackOutcome, AttackPlan, Plan, under_attack
from jdistill.typing import Array, ArrayLike, Bounds, Callback, LogitsFn


def distance_plans(
    *,
    num_steps: int = 100,
    num_examples: int | None = None,
    batch_size: int = 250,
    bounds: Bounds = (0.0, 1.0),
) -> dict[str, AttackPlan]:
    """A minimum-norm attack for each of l0, l2 and linf: FMN.

    It takes one gradient a step, whatever the number of classes; it climbs a margin, which a
    saturated softmax does not stop; and it begins at the linearized boundary, so that small
    distances are found as well as large ones.

    Args:
        num_steps: of the attack; more come closer.
        num_examples: the first so many are attacked; None attacks all.
        batch_size: examples at a time.
        bounds: the box of valid inputs.

    Returns:
        The plans by norm, for `distances` and `evaluate`.

    Raises:
        ValueError: counts below 1, bounds whose lower end is not below the upper.

    Example:
        >>> list(distance_plans(num_steps=50))
        ['l0', 'l2', 'linf']
    """
    _validate.count(num_steps=num_steps, batch_size=batch_size)
    if num_examples is not None:
        _validate.count(num_examples=num_examples)
    _validate.bounds(bounds, open_box=True)
    return {
        norm: AttackPlan(
            functools.partial(attacks.fmn, norm=norm, num_steps=num_steps, bounds=bounds),
            num_examples,
            batch_size,
        )
        for norm in ("l0", "l2", "linf")
    }


def distances(
    stack: LogitsFn,
    inputs: np.ndarray,
    labels: np.ndarray,
    plans: Mapping[str, Plan] | None = None,
    *,
    key: Array | None = None,
    temperature: ArrayLike = 1.0,
    vmapped: bool | None = None,
    callback: Callback | None = None,
    shards: Store | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, AttackOutcome]:
    """The smallest perturbations found for every network of a stack, in several norms.

    Args:
        stack: a `logits_fn` pytree whose leaves lead with `R`.
        inputs: `[N, ...]` float, inside the attacks' bounds.
        labels: `[N]` int in `0..K-1`.
        plans: by norm, a minimum-norm attack with distances in that norm, or a plan of one; None
            takes `distance_plans()`.
        key: for random attacks.
        temperature: at which the networks are attacked, above 0; scalar or `[R]`.
        vmapped: whether to run the stack under `vmap`; None does so except on CPU.
        callback: see `evaluate`; the stage is `"distance l2"` and so on.
        shards: see `under_attack`.
        names: `[R]`, the networks' names for the shards.

    Returns:
        By norm the outcome: ρ_adv is `mean_distance`, read beside `median_distance` and
        `success_rate`. All are upper bounds of the true smallest distance.

    Raises:
        ValueError: an attack of another norm than that which it stands for, or one with a radius,
            which does not look for the smallest distance; else as the attacks.

    Example:
        >>> import jax.numpy as jnp
        >>> from jdistill import nets
        >>> linear = nets.callable_logits_fn(lambda w, x: x @ w, jnp.eye(2))
        >>> x, y = np.array([[0.7, 0.3]], np.float32), np.array([0])
        >>> found = distances(nets.stack([linear]), x, y, distance_plans(num_steps=30))
        >>> {norm: round(float(outcome.mean_distance[0]), 1) for norm, outcome in found.items()}
        {'l0': 1.0, 'l2': 0.3, 'linf': 0.2}

    References:
        Papernot et al. 2016, the definition of robustness. Pintor et al. 2021, "Fast
        Minimum-norm Adversarial Attacks through Adaptive Norm Constraints" (the attack by default).
    """
    plans = distance_plans_of(distance_plans() if plans is None else plans, "plans")
    return {
        norm: under_attack(
            stack,
            inputs,
            labels,
            plan,
            key=key,
            temperature=temperature,
            vmapped=vmapped,
            callback=callback,
            stage=f"distance {norm}",
            shards=shards,
            names=names,
        )
        for norm, plan in plans.items()
    }


def plans_of(given: Mapping[str, Plan], name: str) -> dict[str, AttackPlan]:
    """The plans by name, of attacks that may be bare; an error for anything else."""
    _validate.mapping(**{name: given})
    found = {}
    for key, each in given.items():
        _validate.text(**{f"each name in {name}": key})
        named: dict[str, Any] = {f"each of {name}": each}
        if not callable(each):
            _validate.instance(AttackPlan, "a function or an AttackPlan", **named)
        found[key] = each if isinstance(each, AttackPlan) else AttackPlan(each)
    return found


def distance_plans_of(given: Mapping[str, Plan], name: str = "distances") -> dict[str, AttackPlan]:
    """Plans by norm; an error for an attack of another norm, or with a fixed budget."""
    plans = plans_of(given, name)
    for norm, plan in plans.items():
        found = attacks.traits(plan.attack)
        if found.norm is not None and found.norm != norm:
            raise ValueError(
                f"expected in {name} an attack whose distances are {norm}, got one in "
                f"{found.norm}; bind norm={norm!r} where the attack has that norm, or pass it as "
                f"{found.norm!r}"
            )
        if not found.minimum_norm:
            within = "" if found.eps is None else f" with eps {found.eps:g}"
            raise ValueError(
                f"expected in {name} a minimum-norm attack for {norm}, got {found.title}{within}; "
                "pass one that looks for the smallest distance, such as attacks.fmn"
            )
    return plans
