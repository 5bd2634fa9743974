"""Everything that is tried on a network, and what came of it, example by example."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jdistill import attacks, losses, norms
from jdistill._precision import full_precision
from jdistill._pytree import call
from jdistill.attacks import AttackResult
from jdistill.attacks._base import Problem
from jdistill.diagnose import _probes, _thresholds
from jdistill.diagnose._rows import Rows
from jdistill.typing import Array, LogitsFn

NUM_STEPS = 40  # of the usual attack, and of those that differ from it in one thing
NUM_AUTO_STEPS = 50
NUM_TARGETS = 3
NUM_NOISE = 64
NUM_MORE = 2


class Settings(NamedTuple):
    """What is asked, beside the examples."""

    eps: float
    norm: str
    box: tuple[float, float]
    train_temperature: float
    surrogate: LogitsFn | None
    num_queries: int


class Evidence(NamedTuple):
    """What is known of each example, NumPy arrays `[N]`, bool unless said otherwise.

    Attributes:
        labels: int.
        num_classes: a number.
        finite: the clean logits are.
        correct: right without an attack.
        gradients: of each loss, the largest entry (float); NaN where one is not finite.
        agreement: of gradient and function.
        probe_temperature: of the temperature probe, a number.
        standing: right under the usual attack.
        broken: by each attack within eps, the usual one and those on the path included.
        half: the usual attack breaks it at the smaller radius.
        double: the usual attack breaks it at the larger radius, or did at a smaller one.
        unbounded: it stands against the usual attack in the whole box.
        unbounded_margin: ... and against the same on the margin.
        on_path: the usual attack met a success, and did not return it.
        lapsed: the usual attack returned a success that is none when asked again.
        nonfinite: the logits where the usual attack ended are not finite.
        moving: the usual attack's loss still rose over its last steps.
        flat: it never changed.
        moving_margin: as `moving`, of the margin; False where that attack succeeded.
    """

    labels: np.ndarray
    num_classes: int
    finite: np.ndarray
    correct: np.ndarray
    gradients: _probes.Gradients
    agreement: _probes.Agreement
    probe_temperature: float
    standing: np.ndarray
    broken: dict[str, np.ndarray]
    half: np.ndarray
    double: np.ndarray
    unbounded: np.ndarray
    unbounded_margin: np.ndarray
    on_path: np.ndarray
    lapsed: np.ndarray
    nonfinite: np.ndarray
    moving: np.ndarray
    flat: np.ndarray
    moving_margin: np.ndarray


def gather(problem: Problem, rows: Rows, settings: Settings) -> Evidence:
    """Try everything.

    Args:
        problem: the checked arguments.
        rows: runs functions on some of the examples.
        settings: what is asked.
    """
    eps, norm = settings.eps, settings.norm
    network, num_inputs = problem.logits_fn, math.prod(problem.inputs.shape[1:])
    everything = np.ones(len(problem.inputs), bool)

    logits = rows.run("clean", functools.partial(_logits, network), everything)
    finite = np.isfinite(logits).all(axis=1)
    correct = finite & (logits.argmax(axis=1) == np.asarray(problem.goal.labels))
    probe_temperature = settings.train_temperature
    if probe_temperature == 1:
        probe_temperature = own_temperature(logits[correct])

    sizes = rows.run(
        "gradients",
        lambda keys, x, y: _probes.gradients(network, x, y, jnp.float32(probe_temperature)),
        everything,
    )
    feature = {"linf": 1.0, "l2": math.sqrt(num_inputs), "l1": float(num_inputs)}[norm]
    agrees = rows.run(
        "agreement",
        lambda keys, x, y: _probes.agreement(
            network, keys, x, y, jnp.asarray(eps / feature, x.dtype), problem.bounds
        ),
        everything,
    )

    whole = (settings.box[1] - settings.box[0]) * feature
    at_one = Partial(losses.cross_entropy, temperature=jnp.float32(1.0))
    tempered = Partial(losses.cross_entropy, temperature=jnp.float32(probe_temperature))

    def descend(loss: Callable[..., Array], radius: float, *, random: bool = True) -> Any:
        """PGD, one program for all radii, starts and temperatures."""

        def attack(keys: Array, x: Array, y: Array) -> AttackResult:
            init = x + norms.random_start(keys, x, radius, norm) if random else x
            return attacks.pgd(
                network,
                None,
                x,
                y,
                eps=radius,
                norm=norm,
                num_steps=NUM_STEPS,
                init=jnp.clip(init, *problem.bounds),
                bounds=settings.box,
                loss=loss,
                trace=True,
            )

        return attack

    broken: dict[str, np.ndarray] = {}
    naive = rows.attack("naive", descend(at_one, eps), correct)
    on_path = (naive.info["first_success"] >= 0) & correct & ~naive.success
    standing = correct & ~naive.success
    broken["naive"] = naive.success | on_path
    # Where the usual attack ended, seen once more, in another program.
    ended = rows.run(
        "recheck", functools.partial(_logits, network), correct, inputs=naive.inputs
    )
    reached = np.isfinite(ended).all(axis=1) & (
        ended.argmax(axis=1) != np.asarray(problem.goal.labels)
    )
    lapsed = correct & naive.success & ~reached
    nonfinite = correct & ~np.isfinite(ended).all(axis=1)

    # Each of these sees all that the usual attack left, so that what it breaks there is the gap;
    # the first ones differ from it in one thing alone, and start where it did.
    broken["half"] = rows.attack(
        "half eps", descend(at_one, _thresholds.SMALLER_RADIUS * eps), correct
    ).success
    broken["temperature"] = rows.attack(
        "temperature", descend(tempered, eps), standing, draws="naive"
    ).success
    on_margin = rows.attack("margin", descend(losses.margin, eps), standing, draws="naive")
    broken["margin"] = on_margin.success
    one_step = functools.partial(
        attacks.fgsm, network, eps=eps, norm=norm, bounds=settings.box, loss=at_one
    )
    broken["one_step"] = rows.attack("one step", one_step, standing).success
    broken["noise"] = rows.run(
        "noise",
        lambda keys, x, y: _probes.noise_breaks(
            network,
            keys,
            x,
            y,
            jnp.asarray(eps, x.dtype),
            problem.bounds,
            norm=norm,
            num_draws=NUM_NOISE,
        ),
        standing,
    )
    if norm != "l1":
        square = functools.partial(
            attacks.square,
            network,
            eps=eps,
            norm=norm,
            num_queries=settings.num_queries,
            bounds=settings.box,
        )
        broken["square"] = rows.attack("square", square, standing).success
    if settings.surrogate is not None:
        transfer = functools.partial(
            attacks.transfer,
            network,
            source=settings.surrogate,
            attack=functools.partial(_far, eps=eps, norm=norm),
            bounds=settings.box,
        )
        broken["transfer"] = rows.attack("transfer", transfer, standing).success
    automatic: dict[str, Any] = {
        "eps": eps,
        "norm": norm,
        "num_steps": NUM_AUTO_STEPS,
        "bounds": settings.box,
    }
    num_classes = logits.shape[1]
    dlr = functools.partial(
        attacks.apgd, network, loss=losses.dlr if num_classes >= 3 else losses.margin, **automatic
    )
    broken["dlr"] = rows.attack("APGD-DLR", dlr, standing & ~broken["margin"]).success

    # And these what everything before left.
    left = survivors(standing, broken)
    for rank in range(min(NUM_TARGETS, num_classes - 1)):
        targeted = functools.partial(
            attacks.apgd_targeted, network, num_targets=1, first_target=rank, **automatic
        )
        found = rows.attack(f"APGD-T {rank + 1}", targeted, left)
        broken["targeted"] = broken.get("targeted", np.zeros_like(left)) | found.success
        left &= ~found.success
    for again in range(NUM_MORE):
        found = rows.attack(f"more {again + 1}", descend(losses.margin, eps), left)
        broken["more"] = broken.get("more", np.zeros_like(left)) | found.success
        left &= ~found.success

    double = rows.attack(
        "double eps", descend(at_one, _thresholds.LARGER_RADIUS * eps), standing
    ).success
    everywhere = rows.attack(
        "whole box", descend(at_one, whole, random=False), standing & ~double
    ).success
    unbounded = standing & ~double & ~everywhere
    everywhere = rows.attack(
        "whole box, margin",
        descend(losses.margin, whole, random=False),
        unbounded & survivors(standing, broken),
    ).success

    moving, flat = still_moving(naive.info["loss"][:, 0])
    return Evidence(
        labels=np.asarray(problem.goal.labels),
        num_classes=num_classes,
        finite=finite,
        correct=correct,
        gradients=sizes,
        agreement=agrees,
        probe_temperature=probe_temperature,
        standing=standing,
        broken=broken,
        half=broken["half"],
        double=correct & ~(standing & ~double),
        unbounded=unbounded,
        unbounded_margin=unbounded & survivors(standing, broken) & ~everywhere,
        on_path=on_path,
        lapsed=lapsed,
        nonfinite=nonfinite,
        moving=moving & standing,
        flat=flat & standing,
        moving_margin=still_moving(on_margin.info["loss"][:, 0])[0] & standing & ~broken["margin"],
    )


def survivors(standing: np.ndarray, broken: dict[str, np.ndarray]) -> np.ndarray:
    """Which of those standing none of the attacks broke, `[N]`."""
    return standing & ~np.any(list(broken.values()), axis=0)


def own_temperature(logits: np.ndarray) -> float:
    """The temperature that brings the logits `[M, K]` to a scale where the softmax is not saturated.

    The median over examples of what `losses.soft_margin` divides by.
    """
    if not len(logits):
        return 1.0
    spread = float(np.median(logits.max(axis=1) - logits.mean(axis=1)))
    return spread / (4.0 + math.log(logits.shape[1] - 1)) if spread > 0 else 1.0


def still_moving(trace: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Whether the best loss so far rose in the last steps, and whether it never changed, `[N]`.

    Args:
        trace: `[N, num_steps]`, NaN where the example had stopped.
    """
    complete = np.isfinite(trace).all(axis=1)
    best = np.maximum.accumulate(np.where(complete[:, None], trace, 0.0), axis=1)
    rise = best[:, -1] - best[:, 0]
    last = best[:, -1] - best[:, -1 - _thresholds.LAST_STEPS]
    constant = np.ptp(np.where(complete[:, None], trace, 0.0), axis=1) == 0
    return complete & (last > _thresholds.MOVING * rise), complete & constant


def _logits(network: LogitsFn, keys: Array, x: Array, y: Array) -> Array:
    del keys, y
    with full_precision():
        return call(network, x)


def _far(
    source: LogitsFn, keys: Array, x: Array, y: Array, *, eps: float, norm: str, **options: Any
) -> AttackResult:
    """As far beyond the source's boundary as the ball allows: what only just passes stays behind."""
    return attacks.apgd(
        source,
        keys,
        x,
        y,
        eps=eps,
        norm=norm,
        num_steps=NUM_AUTO_STEPS,
        loss=losses.margin,
        best_loss=True,
        **options,
    )
