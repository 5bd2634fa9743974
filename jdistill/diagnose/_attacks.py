"""The attacks of a diagnosis: the usual one, and what else is tried at the same radius."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.tree_util import Partial

from jdistill import _words, attacks, losses, norms
from jdistill.attacks import AttackResult
from jdistill.attacks._core.problem import Problem
from jdistill.attacks._core.traits import by_loss, facts
from jdistill.diagnose import _probes, _thresholds
from jdistill.typing import Array, Bounds, LogitsFn, Norm

NUM_STEPS = 40  # of the usual attack, and of those that differ from it in one thing
NUM_AUTO_STEPS = 50
NUM_TARGETS = 3
NUM_DRAWS = 64
NUM_MORE = 2

Attack = Callable[[Array, Array, Array], AttackResult]
Loss = Callable[..., Array]


class Settings(NamedTuple):
    """Settings of a diagnosis, beside the examples.

    Attributes:
        eps: the radius.
        norm: of the radius.
        box: of the inputs.
        train_temperature: of the network's training.
        surrogate: to craft examples on, or None.
        num_queries: of Square.
    """

    eps: float
    norm: Norm
    box: Bounds
    train_temperature: float
    surrogate: LogitsFn | None
    num_queries: int


class Planned(NamedTuple):
    """An attack within eps.

    Attributes:
        name: its key in the evidence.
        title: for people.
        settings: in words.
        attack: `(keys, inputs, labels) -> AttackResult`; `attacks.traits` reads its facts.
        skips: the names of attacks whose successes it leaves out; None: whatever was broken before.
        draws: the name of the attack to draw the same as.
    """

    name: str
    title: str
    settings: str
    attack: Attack
    skips: tuple[str, ...] | None = ("naive",)
    draws: str | None = None


def at(temperature: float) -> Partial:
    """The cross-entropy at a temperature; another one compiles nothing."""
    return Partial(losses.cross_entropy, temperature=jnp.float32(temperature))


def per_feature(norm: Norm, shape: tuple[int, ...]) -> float:
    """The radius of the smallest ball that holds the unit box's corner, from the opposite one."""
    size = math.prod(shape)
    return {"linf": 1.0, "l2": math.sqrt(size), "l1": float(size)}[norm]


def descend(
    problem: Problem,
    settings: Settings,
    loss: Loss,
    *,
    radius: float,
    random_start: bool = True,
) -> Attack:
    """`attacks.pgd` with its default settings: one program for all radii, starts, temperatures."""
    return functools.partial(
        _descent, problem, settings, loss=loss, radius=radius, random_start=random_start
    )


@facts(title="PGD", norms=("linf", "l2", "l1"), follows=by_loss)
def _descent(
    problem: Problem,
    settings: Settings,
    keys: Array,
    inputs: Array,
    labels: Array,
    *,
    loss: Loss,
    radius: float,
    random_start: bool,
) -> AttackResult:
    init = inputs
    if random_start:
        init = inputs + norms.random_start(keys, inputs, radius, settings.norm)
    return attacks.pgd(
        problem.logits_fn,
        None,
        inputs,
        labels,
        eps=radius,
        norm=settings.norm,
        num_steps=NUM_STEPS,
        init=jnp.clip(init, *problem.bounds),
        bounds=settings.box,
        loss=loss,
        trace=True,
    )


def usual(problem: Problem, settings: Settings) -> Planned:
    """The attack whose number is judged."""
    step = 2.5 * settings.eps / NUM_STEPS
    return Planned(
        "naive",
        f"PGD-{NUM_STEPS}",
        f"cross-entropy at T = 1, one random start, steps of {step:.3g}",
        descend(problem, settings, at(1.0), radius=settings.eps),
    )


def others(
    problem: Problem, settings: Settings, probe_temperature: float, num_classes: int
) -> list[Planned]:
    """Further attacks on the examples that the usual one left, cheap and comparable first.

    The first ones see all of these examples, so that what each breaks there is its gap to the
    usual attack, and differ from it in one thing alone.
    """
    network, eps = problem.logits_fn, settings.eps
    budget: dict[str, Any] = {"eps": eps, "norm": settings.norm, "bounds": settings.box}
    automatic = budget | {"num_steps": NUM_AUTO_STEPS}
    smaller = _thresholds.SMALLER_RADIUS
    temperature = f"T = {_words.temperature(probe_temperature)}"
    num_targets = min(NUM_TARGETS, num_classes - 1)
    auto_title, auto_loss = ("DLR", losses.dlr) if num_classes >= 3 else ("margin", losses.margin)
    on_margin = descend(problem, settings, losses.margin, radius=eps)

    plan = [
        Planned(
            "half",
            f"PGD-{NUM_STEPS} at {smaller:g} eps",
            "as the usual attack, in a smaller ball",
            descend(problem, settings, at(1.0), radius=smaller * eps),
            skips=(),  # a point of the curve
        ),
        Planned(
            "temperature",
            f"PGD-{NUM_STEPS} at {temperature}",
            f"cross-entropy at {temperature}; start and steps as the usual attack",
            descend(problem, settings, at(probe_temperature), radius=eps),
            draws="naive",
        ),
        Planned(
            "margin",
            f"PGD-{NUM_STEPS} on the margin",
            "the difference of logits; start and steps as the usual attack",
            on_margin,
            draws="naive",
        ),
        Planned(
            "one_step",
            "FGSM",
            "cross-entropy at T = 1, one step of eps",
            functools.partial(attacks.fgsm, network, loss=at(1.0), **budget),
        ),
        Planned(
            "noise",
            "random noise",
            f"{NUM_DRAWS} draws",
            functools.partial(_noise, problem, eps=eps, norm=settings.norm),
        ),
    ]
    if settings.norm != "l1":
        queries = settings.num_queries
        square = functools.partial(attacks.square, network, num_queries=queries, **budget)
        plan.append(Planned("square", f"Square {queries}", f"{queries} queries", square))
    if settings.surrogate is not None:
        far = functools.partial(
            attacks.apgd,
            eps=eps,
            norm=settings.norm,
            num_steps=NUM_AUTO_STEPS,
            loss=losses.margin,
            best_loss=True,  # what barely passes the source's boundary does not transfer
        )
        transfer = functools.partial(
            attacks.transfer, network, source=settings.surrogate, attack=far, bounds=settings.box
        )
        words = f"APGD on the surrogate's margin, past its boundary, {NUM_AUTO_STEPS} steps"
        plan.append(Planned("transfer", "transfer", words, transfer))
    plan.append(
        Planned(
            "dlr",
            f"APGD-{auto_title} {NUM_AUTO_STEPS}",
            f"{NUM_AUTO_STEPS} steps, on what PGD on the margin left",
            functools.partial(attacks.apgd, network, loss=auto_loss, **automatic),
            skips=("naive", "margin"),
        )
    )
    for rank in range(num_targets):
        attack = functools.partial(
            attacks.apgd_targeted, network, num_targets=1, first_target=rank, **automatic
        )
        words = f"towards class {rank + 1} in the order of the clean logits, on what is left"
        plan.append(
            Planned(
                f"target {rank}", f"APGD-T {NUM_AUTO_STEPS} (class {rank + 1})", words, attack, None
            )
        )
    for number in range(NUM_MORE):
        words = "another random start, on what is left"
        title = f"PGD-{NUM_STEPS} on the margin (start {number + 2})"
        plan.append(Planned(f"more {number}", title, words, on_margin, None))
    return plan


def _noise(
    problem: Problem, keys: Array, inputs: Array, labels: Array, *, eps: float, norm: Norm
) -> AttackResult:
    """Random noise in the form of an attack."""
    broken = _probes.noise_breaks(
        problem.logits_fn,
        keys,
        inputs,
        labels,
        jnp.asarray(eps, inputs.dtype),
        problem.bounds,
        norm=norm,
        num_draws=NUM_DRAWS,
    )
    distance = jnp.where(broken, jnp.asarray(eps, inputs.dtype), jnp.inf)
    return AttackResult(inputs, broken, distance, jnp.full(broken.shape, NUM_DRAWS), {})
