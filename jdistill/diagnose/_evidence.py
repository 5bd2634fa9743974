"""Evidence from everything that is tried on a network, example by example."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jdistill import losses, metrics
from jdistill._jax import call, full_precision
from jdistill.attacks._core.problem import Problem
from jdistill.diagnose import _attacks, _probes, _thresholds
from jdistill.diagnose._attacks import Planned, Settings
from jdistill.diagnose._rows import Found, Rows
from jdistill.typing import Array


class Evidence(NamedTuple):
    """Findings on each example, NumPy arrays `[N]`, bool unless said otherwise.

    Attributes:
        labels: int.
        num_classes: a number.
        plan: the attacks within eps, the usual one first.
        finite: the clean logits are.
        correct: right without an attack.
        gradients: of each loss, the largest entry (float); NaN where one is not finite.
        agreement: of gradient and function.
        probe_temperature: of the temperature probe, a number.
        standing: right under the usual attack.
        broken: by each attack of the plan, by name; False where it was not run.
        double: the usual attack breaks it at the larger radius, or at eps.
        unbounded: it stands against the usual attack in the whole box.
        unbounded_margin: ... and against everything else, and the margin in the whole box.
        on_path: the usual attack met a success, and did not return it.
        lapsed: the usual attack returned a success that is none when asked again.
        nonfinite: the logits where the usual attack ended are not finite.
        flat: the usual attack's loss never changed.
        moving: the margin still rose over the last steps of the attack on it; False where that
            succeeded. The cross-entropy would not do: it grows exponentially with the margin, so
            that its last steps are always the largest.
    """

    labels: np.ndarray
    num_classes: int
    plan: tuple[Planned, ...]
    finite: np.ndarray
    correct: np.ndarray
    gradients: _probes.Gradients
    agreement: _probes.Agreement
    probe_temperature: float
    standing: np.ndarray
    broken: dict[str, np.ndarray]
    double: np.ndarray
    unbounded: np.ndarray
    unbounded_margin: np.ndarray
    on_path: np.ndarray
    lapsed: np.ndarray
    nonfinite: np.ndarray
    flat: np.ndarray
    moving: np.ndarray

    def broken_by(self, *names: str) -> np.ndarray:
        """Which examples an attack whose name begins so broke, `[N]`."""
        return _any(self.broken, names, self.correct)

    @property
    def survivors(self) -> np.ndarray:
        """Which examples are right under everything, `[N]`."""
        return self.correct & ~np.any(list(self.broken.values()), axis=0)


def gather(problem: Problem, rows: Rows, settings: Settings) -> Evidence:
    """Try everything.

    Args:
        problem: the checked arguments.
        rows: runs functions on some of the examples.
        settings: what is asked.
    """
    labels = np.asarray(problem.goal.labels)
    everything = np.ones(len(labels), bool)

    def logits_of(keys: Array, inputs: Array, labels: Array) -> Array:
        del keys, labels
        with full_precision():
            return call(problem.logits_fn, inputs)

    logits = rows.run("clean", logits_of, everything)
    finite, correct = metrics.predicts(logits), metrics.correct(logits, labels)
    probe_temperature = settings.train_temperature
    if probe_temperature == 1:
        probe_temperature = own_temperature(logits[correct])

    usual = _attacks.usual(problem, settings)
    naive = rows.attack(usual.name, usual.attack, correct)
    on_path = (naive.info["first_success"] >= 0) & correct & ~naive.success
    standing = correct & ~naive.success
    # Where it ended, seen once more, by another program.
    ended = rows.run("recheck", logits_of, correct, inputs=naive.inputs)
    ended_finite = metrics.predicts(ended)
    right_again = ~ended_finite | metrics.correct(ended, labels)

    broken = {usual.name: naive.success | on_path}
    plan = _attacks.others(problem, settings, probe_temperature, logits.shape[1])
    results: dict[str, Found] = {}
    for planned in plan:
        skipped = list(broken) if planned.skips is None else planned.skips
        mask = correct & ~_any(broken, skipped, correct)
        results[planned.name] = rows.attack(planned.name, planned.attack, mask, draws=planned.draws)
        broken[planned.name] = results[planned.name].success

    larger = _thresholds.LARGER_RADIUS * settings.eps
    double = _attacks.descend(problem, settings, _attacks.at(1.0), radius=larger)
    left = standing & ~rows.attack("double", double, standing).success
    unbounded, unbounded_margin = _unbounded(problem, rows, settings, left, broken)
    resisted = standing & ~broken["margin"]
    return Evidence(
        labels=labels,
        num_classes=logits.shape[1],
        plan=(usual, *plan),
        finite=finite,
        correct=correct,
        gradients=_gradients(problem, rows, probe_temperature),
        agreement=_agreement(problem, rows, settings),
        probe_temperature=probe_temperature,
        standing=standing,
        broken=broken,
        double=correct & ~left,
        unbounded=unbounded,
        unbounded_margin=unbounded_margin,
        on_path=on_path,
        lapsed=correct & naive.success & right_again,
        nonfinite=correct & ~ended_finite,
        flat=standing & (np.ptp(naive.info["trace"], axis=1) == 0),
        moving=resisted & still_moving(results["margin"].info["trace"]),
    )


def own_temperature(logits: np.ndarray) -> float:
    """A temperature at which the softmax of the logits `[M, K]` is not saturated.

    The median over examples of what `losses.soft_margin` divides by.
    """
    if not len(logits):
        return 1.0
    spread = float(np.median(logits.max(axis=1) - logits.mean(axis=1)))
    return spread / (4.0 + math.log(logits.shape[1] - 1)) if spread > 0 else 1.0


def still_moving(trace: np.ndarray) -> np.ndarray:
    """Whether the best loss so far still rose in the last steps, `[N]`.

    Args:
        trace: `[N, num_steps]`; a row with a NaN, where the example had stopped, gives False.
    """
    best = np.maximum.accumulate(trace, axis=1)
    last = best[:, -1] - best[:, -1 - _thresholds.LAST_STEPS]
    return last > _thresholds.MOVING * (best[:, -1] - best[:, 0])


def _any(
    broken: dict[str, np.ndarray], prefixes: list[str] | tuple[str, ...], like: np.ndarray
) -> np.ndarray:
    """Which examples any of the attacks whose names begin so broke."""
    masks = [mask for name, mask in broken.items() if name.startswith(tuple(prefixes))]
    return np.any([np.zeros_like(like), *masks], axis=0)


def _gradients(problem: Problem, rows: Rows, temperature: float) -> _probes.Gradients:
    """The sizes of the losses' gradients at the clean inputs, of all examples."""

    def probe(keys: Array, inputs: Array, labels: Array) -> _probes.Gradients:
        del keys
        return _probes.gradients(problem.logits_fn, inputs, labels, jnp.float32(temperature))

    return rows.run("gradients", probe, np.ones(len(problem.inputs), bool))


def _agreement(problem: Problem, rows: Rows, settings: Settings) -> _probes.Agreement:
    """Gradient and function at the clean inputs, of all examples."""
    step = settings.eps / _attacks.per_feature(settings.norm, problem.inputs.shape[1:])

    def probe(keys: Array, inputs: Array, labels: Array) -> _probes.Agreement:
        radius = jnp.asarray(step, inputs.dtype)
        return _probes.agreement(problem.logits_fn, keys, inputs, labels, radius, problem.bounds)

    return rows.run("agreement", probe, np.ones(len(problem.inputs), bool))


def _unbounded(
    problem: Problem,
    rows: Rows,
    settings: Settings,
    left: np.ndarray,
    broken: dict[str, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Examples that stand in the whole box against the usual attack, and against any.

    From the input itself: a random point of the box is of another class without any attack.
    """
    unit = _attacks.per_feature(settings.norm, problem.inputs.shape[1:])
    whole = float(problem.widest) * unit

    def without(stage: str, loss: _attacks.Loss, mask: np.ndarray) -> np.ndarray:
        attack = _attacks.descend(problem, settings, loss, radius=whole, random_start=False)
        return mask & ~rows.attack(stage, attack, mask).success

    unbounded = without("whole box", _attacks.at(1.0), left)
    unbroken = unbounded & ~_any(broken, list(broken), unbounded)
    return unbounded, without("whole box, margin", losses.margin, unbroken)
