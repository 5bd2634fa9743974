"""APGD against plain NumPy versions of its algorithms, and what its starts and targets do."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, losses, nets
from jdistill.attacks import _apgd, _apgd_l1
from tests import tiny

B, D, H, K = 8, 12, 9, 5
RNG = np.random.default_rng(3)
NET = tiny.Net(RNG.normal(0, 1.2, (D, H)), RNG.normal(0, 1, (H, K)))
make = NET.logits_fn
INPUTS = RNG.uniform(0.02, 0.98, (B, D))
INPUTS[0, :2] = [0, 1]  # on the box's faces
START = np.clip(INPUTS + RNG.uniform(-1, 1, (B, D)), 0, 1)
KEY = jax.random.key(1)
CLEAN = NET.logits(INPUTS)
LABELS = CLEAN.argmax(1)
ORDER = np.argsort(-CLEAN, axis=1)
TINY = {"linf": 0.03, "l2": 0.08, "l1": 0.2}  # most examples stand all steps
MIDDLING = {"linf": 0.12, "l2": 0.3, "l1": 0.7}


def value_and_slope(x, label, loss, target=None):
    """The loss at one point, its gradient, and the predicted class, in plain NumPy."""
    z, jacobian = NET.at(x)
    ranks = np.argsort(-z)
    unit = np.eye(K)
    if loss == "cross_entropy":
        probs = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        value, slope = -np.log(probs[label]), probs - unit[label]
    else:
        if loss == "dlr":
            other = ranks[0] if ranks[0] != label else ranks[1]
            low = unit[ranks[2]]
        else:
            other, low = target, (unit[ranks[2]] + unit[ranks[3]]) / 2
        above, below = unit[other] - unit[label], unit[ranks[0]] - low
        value = above @ z / (below @ z)
        slope = (above - value * below) / (below @ z)
    return value, slope @ jacobian, z.argmax()


def project(x, center, eps, norm):
    delta = x - center
    if norm == "linf":
        delta = np.clip(delta, -eps, eps)
    else:
        delta *= min(1, eps / max(np.linalg.norm(delta), 1e-300))
    return np.clip(center + delta, 0, 1)


def reference(center, x, eps, norm, num_steps, look):
    """The losses of a start until the first success, and the point it ends at."""
    period = max(int(0.22 * num_steps), 1)
    since = 0
    trace, best = [], None
    step_size, last_halved, previous = 2 * eps, True, x
    for step in range(num_steps + 1):
        value, slope, success = look(x)
        trace.append(value)
        if best is None or value > best[0]:
            best = value, x, slope
        if success:
            return trace, x
        if step == 0:
            checked = value
        elif (since := since + 1) == period:
            window = [0.0, *trace[1:]][-period - 1 :]  # the start counts as 0
            grown = sum(b > a for a, b in itertools.pairwise(window))
            halve = grown <= 0.75 * period or (not last_halved and checked >= best[0])
            last_halved, checked, since = halve, best[0], 0
            period = max(period - max(int(0.03 * num_steps), 1), max(int(0.06 * num_steps), 1))
            if halve:
                step_size /= 2
                _, x, slope = best
        direction = np.sign(slope) if norm == "linf" else slope / np.linalg.norm(slope)
        z = project(x + step_size * direction, center, eps, norm)
        share = 1.0 if step == 0 else 0.75
        moved = x + share * (z - x) + (1 - share) * (x - previous)
        previous, x = x, project(moved, center, eps, norm)
    return trace, best[1]


def project_l1(x, center, eps):
    """By the exact threshold, found among the points where a feature starts or stops to move."""
    delta = x - center
    size, room = np.abs(delta), np.where(delta > 0, 1 - center, center)
    total = lambda cut: np.clip(size - cut, 0, room).sum()  # noqa: E731
    if total(0.0) <= eps:
        return center + np.sign(delta) * np.clip(size, 0, room)
    cuts = np.sort(np.concatenate([[0], size, size - room]))
    cuts = cuts[cuts >= 0]
    after = next(place for place, cut in enumerate(cuts) if total(cut) <= eps)
    low, high = cuts[after - 1], cuts[after]
    cut = low + (high - low) * (total(low) - eps) / (total(low) - total(high))
    return center + np.sign(delta) * np.clip(size - cut, 0, room)


def reference_l1(center, x, eps, num_steps, look):
    early = math.ceil(0.3 * num_steps)
    counts = [early, early, num_steps - 2 * early]
    trace = []
    for radius, count in zip((3 * eps, 2 * eps, eps), counts, strict=True):
        x = project_l1(x, center, radius)
        period, best = max(int(0.04 * count), 1), None
        step_size, density = radius, np.count_nonzero(x - center)
        for step in range(count + 1):
            value, slope, success = look(x)
            trace.append(value)
            if best is None or value > best[0]:
                best = value, x, slope
            if success and radius == eps:
                return trace, x
            if step and step % period == 0:
                changed = np.count_nonzero(best[1] - center)
                if changed / density < 0.95:
                    step_size = radius
                    _, x, slope = best
                else:
                    step_size = max(step_size / 1.5, radius / 10)
                density = changed
            cut = np.sort(np.abs(slope))[min(D - math.ceil(2 * density / 3), D - 1)]
            direction = np.sign(slope) * (np.abs(slope) >= cut)
            x = project_l1(
                x + step_size * direction / max(np.abs(direction).sum(), 1), center, radius
            )
        x = best[1]
    return trace, x


def run_reference(norm, eps, num_steps, loss, target=None):
    runs = []
    for b in range(B):

        def look(x, b=b):
            aim = None if target is None else target[b]
            value, slope, predicted = value_and_slope(x, LABELS[b], loss, aim)
            return value, slope, predicted != LABELS[b]

        if norm == "l1":
            runs.append(reference_l1(INPUTS[b], START[b], eps, num_steps, look))
        else:
            start = project(START[b], INPUTS[b], eps, norm)
            runs.append(reference(INPUTS[b], start, eps, norm, num_steps, look))
    return runs


@pytest.mark.parametrize("size", [TINY, MIDDLING], ids=["tiny", "middling"])
@pytest.mark.parametrize(
    ("norm", "loss"),
    [
        *itertools.product(["linf", "l2"], ["cross_entropy", "dlr", "targeted_dlr"]),
        # Not the DLR loss: inside the larger balls its gradient is 0, and rounding has a sign.
        *itertools.product(["l1"], ["cross_entropy", "targeted_dlr"]),
    ],
)
def test_against_numpy_in_double_precision(loss, norm, size):
    eps, num_steps = size[norm], 40
    target = ORDER[:, 2] if loss == "targeted_dlr" else None
    runs = run_reference(norm, eps, num_steps, loss, target)
    kwargs = {"eps": eps, "norm": norm, "num_steps": num_steps, "init": START, "trace": True}
    with tiny.double_precision():
        model = make(dtype=jnp.float64)
        if target is None:
            result = attacks.apgd(model, None, INPUTS, LABELS, loss=getattr(losses, loss), **kwargs)
        else:
            result = attacks.apgd_targeted(
                model, None, INPUTS, LABELS, num_targets=1, first_target=1, **kwargs
            )
        result = jax.tree.map(np.asarray, result)
    assert result.success.sum() < B if size is TINY else result.success.any()
    for b, (trace, point) in enumerate(runs):
        found = result.info["trace"][b]
        assert np.isfinite(found).sum() == len(trace)
        np.testing.assert_allclose(found[: len(trace)], trace, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(result.inputs[b], point, atol=1e-8)
        assert result.success[b] == (len(trace) < len(found))
        assert result.info["first_success"][b] == (len(trace) if result.success[b] else -1)


def test_checkpoints_are_the_papers():
    places = np.flatnonzero(_apgd._checkpoints(100))
    assert places.tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert np.flatnonzero(_apgd._checkpoints(50)).tolist() == [11, 21, 30, 38, 45]
    assert np.flatnonzero(_apgd._checkpoints(10)).tolist() == list(range(2, 11))
    periods = _apgd._checkpoints(100)
    assert periods[periods > 0].tolist() == np.diff([0, *places]).tolist()


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 100])
def test_the_stages_of_l1_use_all_steps(num_steps):
    plan = _apgd_l1._Plan.of(num_steps)
    assert len(plan.radius) == num_steps + 3  # the points that the steps and the stages begin at
    assert np.all(np.diff(plan.radius) <= 0)
    assert plan.radius[plan.judged].tolist() == [1.0] * plan.judged.sum()
    assert plan.enters.sum() == 3
    assert plan.leaves.sum() == 2


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_starts_lie_on_the_sphere_and_are_the_examples_own(norm):
    middle = jnp.full((B, D), 0.5)
    flat = nets.callable_logits_fn(lambda x: jnp.stack([x[:, 0] * 0 + 1, x[:, 0] * 0], axis=1))
    run = functools.partial(attacks.apgd, eps=0.2, norm=norm, num_steps=1)
    labels = np.zeros(B, int)
    result = run(flat, KEY, middle, labels)  # no gradient: it stays at its start
    np.testing.assert_allclose(result.distance, 0.2, rtol=1e-5)
    np.testing.assert_array_equal(run(flat, KEY, middle[:3], labels[:3]).inputs, result.inputs[:3])
    assert len(np.unique(np.asarray(result.inputs), axis=0)) == B


def test_restarts_and_targets_are_for_survivors():
    kwargs = {"eps": 0.07, "num_steps": 10}
    inputs = INPUTS.astype(np.float32)
    three = attacks.apgd_targeted(make(), KEY, inputs, LABELS, num_targets=3, **kwargs)
    alone = [
        attacks.apgd_targeted(
            make(), KEY, inputs, LABELS, num_targets=1, first_target=rank, **kwargs
        )
        for rank in range(3)
    ]
    broken = np.stack([result.success for result in alone])
    np.testing.assert_array_equal(three.success, broken.any(0))
    first = np.where(broken.any(0), broken.argmax(0), 2)
    np.testing.assert_array_equal(three.info["restart"], first)
    np.testing.assert_array_equal(three.info["target"], ORDER[np.arange(B), first + 1])
    for b in range(B):
        np.testing.assert_allclose(three.inputs[b], alone[first[b]].inputs[b], atol=1e-6)
    assert len(set(first.tolist())) > 1
    many = attacks.apgd_targeted(make(), KEY, inputs, LABELS, num_targets=99, **kwargs)
    assert many.info["restart"].max() == K - 2  # no more classes than there are


def test_the_first_target_may_differ_by_example():
    kwargs = {"eps": 0.05, "num_steps": 5, "num_targets": 3}
    inputs = INPUTS.astype(np.float32)
    first = np.arange(B) % (K - 1)
    mixed = attacks.apgd_targeted(make(), KEY, inputs, LABELS, first_target=first, **kwargs)
    for rank in range(K - 1):  # the last ones have fewer classes left
        alone = attacks.apgd_targeted(make(), KEY, inputs, LABELS, first_target=rank, **kwargs)
        rows = first == rank
        for name in ("success", "queries"):
            np.testing.assert_array_equal(getattr(mixed, name)[rows], getattr(alone, name)[rows])
        np.testing.assert_allclose(mixed.inputs[rows], alone.inputs[rows], atol=1e-6)
        np.testing.assert_array_equal(mixed.info["target"][rows], alone.info["target"][rows])
    assert len(set(np.asarray(mixed.queries)[~np.asarray(mixed.success)].tolist())) == 3


def test_best_loss_goes_on_and_returns_the_worst_point():
    inputs = INPUTS.astype(np.float32)
    kwargs = {"eps": MIDDLING["linf"], "num_steps": 20, "num_restarts": 2, "trace": True}
    until = attacks.apgd(make(), KEY, inputs, LABELS, **kwargs)
    worst = attacks.apgd(make(), KEY, inputs, LABELS, best_loss=True, **kwargs)
    trace = np.asarray(worst.info["trace"])
    assert np.all(np.isfinite(trace))
    loss = losses.cross_entropy(make()(worst.inputs), LABELS)
    np.testing.assert_allclose(loss, trace.max(1), rtol=1e-4)
    assert np.all(loss >= losses.cross_entropy(make()(until.inputs), LABELS) - 1e-5)
    assert np.all(worst.queries == 2 * 21 + 2)
    np.testing.assert_array_equal(worst.info["first_success"] >= 0, until.success)


def test_best_loss_attacks_what_is_wrong_to_begin_with():
    wrong = (LABELS + 1) % K
    inputs = INPUTS.astype(np.float32)
    result = attacks.apgd(make(), KEY, inputs, wrong, eps=0.05, num_steps=5, best_loss=True)
    assert np.all(result.distance > 0)
    assert np.all(
        losses.cross_entropy(make()(result.inputs), wrong)
        > losses.cross_entropy(make()(inputs), wrong)
    )


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_logits_of_fewer_bits(norm):
    half = nets.callable_logits_fn(lambda x: make()(x).astype(jnp.bfloat16))
    kwargs = {"eps": MIDDLING[norm], "norm": norm, "num_steps": 5}
    result = attacks.apgd(half, KEY, INPUTS.astype(np.float32), LABELS, **kwargs)
    assert result.success.any()
    with tiny.double_precision():
        inputs = INPUTS.astype(np.float32)
        attacks.apgd(make(), jax.random.key(1), inputs, LABELS, **kwargs)


def test_a_traced_first_target_stays_among_the_classes():
    inputs = INPUTS.astype(np.float32)
    kwargs = {"eps": TINY["linf"], "num_steps": 2}
    traced = jax.jit(
        lambda rank: attacks.apgd_targeted(make(), KEY, inputs, LABELS, first_target=rank, **kwargs)
    )(2)
    assert np.all((traced.info["target"] >= 0) & (traced.info["target"] < K))
    known = attacks.apgd_targeted(make(), KEY, inputs, LABELS, first_target=2, **kwargs)
    np.testing.assert_array_equal(traced.queries, known.queries)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_few_classes_take_the_difference_of_two_logits(num_classes):
    model = NET._replace(second=NET.second[:, :num_classes]).logits_fn()
    inputs = INPUTS.astype(np.float32)
    labels = np.asarray(model(inputs)).argmax(1)
    kwargs = {"eps": MIDDLING["linf"], "num_steps": 20}
    result = attacks.apgd_targeted(model, KEY, inputs, labels, **kwargs)
    assert result.info["restart"].max() <= num_classes - 2
    margin = attacks.apgd(model, KEY, inputs, labels, loss=losses.margin, **kwargs)
    assert result.success.any()
    assert np.all(result.success >= margin.success)
    with pytest.raises(ValueError, match="expected logits of 3 classes or more for dlr, got 2"):
        losses.dlr(jnp.zeros((1, 2)), jnp.array([0]))


def test_a_saturated_softmax_hides_from_ce_and_not_from_dlr():
    inputs = INPUTS.astype(np.float32)
    kwargs = {"eps": MIDDLING["linf"], "num_steps": 20}
    distilled = make(scale=4096.0)
    ce = attacks.apgd(distilled, KEY, inputs, LABELS, **kwargs)
    for attack in (functools.partial(attacks.apgd, loss=losses.dlr), attacks.apgd_targeted):
        plain, scaled = (attack(net, KEY, inputs, LABELS, **kwargs) for net in (make(), distilled))
        np.testing.assert_array_equal(plain.success, scaled.success)
        assert scaled.success.sum() > ce.success.sum()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps": -0.1}, "expected eps"),
        ({"eps": 0.1, "norm": "l0"}, "expected norm to be one of 'linf', 'l2', 'l1'"),
        ({"eps": 0.1, "num_steps": 0}, "expected num_steps"),
        ({"eps": 0.1, "num_restarts": 0}, "expected num_restarts"),
        ({"eps": 0.1, "rho": 1.5}, "expected rho"),
        ({"eps": 0.1, "init": INPUTS[:2]}, "expected init of the inputs' shape"),
    ],
)
@pytest.mark.parametrize("attack", [attacks.apgd, attacks.apgd_targeted])
def test_bad_settings_are_named(attack, kwargs, message):
    with pytest.raises(ValueError, match=message):
        attack(make(), KEY, INPUTS.astype(np.float32), LABELS, **kwargs)


def test_bad_targets_are_named():
    run = functools.partial(
        attacks.apgd_targeted, make(), KEY, INPUTS.astype(np.float32), LABELS, eps=0.1
    )
    with pytest.raises(ValueError, match="expected num_targets"):
        run(num_targets=0)
    for wrong in (K - 1, -1, 1.5):
        with pytest.raises(ValueError, match="expected first_target"):
            run(first_target=wrong)
    with pytest.raises(ValueError, match="expected a PRNG key"):
        attacks.apgd(make(), None, INPUTS.astype(np.float32), LABELS, eps=0.1)
