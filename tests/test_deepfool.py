"""DeepFool against a NumPy version, iterate by iterate, and against exact distances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, nets
from jdistill.attacks import _deepfool
from jdistill.attacks._core import engine
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core import rows as row_loop
from tests import tiny
from tests.tiny import DUAL

B, D, H, K = 8, 5, 7, 5
RNG = np.random.default_rng(2)
NET = tiny.Net(RNG.normal(0, 2.5, (D, H)), RNG.normal(0, 1, (H, K)))
make, logits_of = NET.logits_fn, NET.logits
INPUTS = RNG.uniform(0.05, 0.95, (B, D)).astype(np.float32)
INPUTS[0, :2] = [0, 1]  # on the box's faces
LABELS = logits_of(INPUTS).argmax(1)
TARGETS = np.argsort(logits_of(INPUTS), axis=1)[:, 0]  # the least likely class
both_norms = pytest.mark.parametrize("norm", ["l2", "linf"])


def reference(x, label, target, *, norm, num_steps, overshoot, num_candidates):
    """All iterates of one example up to its first success, in float64, and whether it came."""
    order = [k for k in np.argsort(-logits_of(x)) if k != label][: num_candidates - 1]
    total, iterates = np.zeros(D), [x]
    for step in range(num_steps + 1):
        point = iterates[-1]
        logits, jacobian = NET.at(point)
        winner = logits.argmax()
        if winner != label if target is None else winner == target:
            return iterates, True
        if step == num_steps:
            break
        pairs = [(k, label) for k in order] if target is None else [(target, winner)]
        rows = []
        for up, down in pairs:
            w = jacobian[up] - jacobian[down]
            distance = abs(logits[up] - logits[down]) / np.linalg.norm(w, DUAL[norm])
            rows.append((distance, np.sign(w) if norm == "linf" else w / np.linalg.norm(w)))
        distance, direction = min(rows, key=lambda row: row[0])
        total = np.clip(total + max(distance, 1e-5) * direction, -x, 1 - x)
        iterates.append(np.clip(x + (1 + overshoot) * total, 0, 1))
    return iterates, False


@both_norms
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize(
    "kwargs",
    [{"overshoot": 0.02, "num_candidates": 10}, {"overshoot": 1e-3, "num_candidates": 3}],
    ids=str,
)
def test_every_iterate_is_that_of_numpy(norm, targeted, kwargs):
    targets = TARGETS if targeted else None
    settings = {"norm": norm, "num_steps": 12} | kwargs
    expected = [
        reference(INPUTS[b].astype(float), LABELS[b], TARGETS[b] if targeted else None, **settings)
        for b in range(B)
    ]
    steps = np.array([len(iterates) - 1 for iterates, _ in expected])
    success = np.array([reached for _, reached in expected])
    assert success.sum() >= B - 2
    assert len(np.unique(steps)) >= 3
    with tiny.double_precision():
        model, inputs = make(dtype=jnp.float64), INPUTS.astype(np.float64)
        # The loop's own steps, one by one.
        problem = _base.prepare(model, None, inputs, LABELS, targets=targets, bounds=(0.0, 1.0))
        method = _deepfool._DeepFool(
            overshoot=jnp.full(B, kwargs["overshoot"]),
            start=jnp.zeros_like(problem.inputs),
            norm=norm,
            num_events=12,
            num_boundaries=1 if targeted else min(kwargs["num_candidates"], K) - 1,
        )
        carry = engine.start(method, problem, trace=False)
        step = jax.jit(lambda carry: engine.advance(method, problem, carry, jnp.int32(1)))
        for index in range(13):
            points = np.asarray(method.point(problem, carry[0]))
            rows = [iterates[min(index, len(iterates) - 1)] for iterates, _ in expected]
            np.testing.assert_allclose(points, rows, rtol=1e-6, atol=1e-9)
            carry = step(carry)
        # And all of it.
        result = attacks.deepfool(
            model, None, inputs, LABELS, targets=targets, trace=True, **settings
        )
        result = jax.tree.map(np.asarray, result)
    np.testing.assert_array_equal(result.success, success)
    np.testing.assert_array_equal(result.info["first_success"], np.where(success, steps + 1, -1))
    for b, (iterates, _) in enumerate(expected):
        logits = logits_of(np.array(iterates[:12]))
        goal = TARGETS[b] if targeted else LABELS[b]
        excess = tiny.margins(logits, goal)
        trace = np.full(12, np.nan)
        trace[: len(excess)] = -excess if targeted else excess
        np.testing.assert_allclose(result.info["trace"][b], trace, rtol=1e-5, atol=1e-8)
    last = np.array([iterates[-1] for iterates, _ in expected])
    last[~success] = INPUTS[~success]
    np.testing.assert_allclose(result.inputs, last, rtol=1e-6, atol=1e-9)


@pytest.mark.floor
@both_norms
def test_against_numpy_in_single_precision(norm):
    settings = {"norm": norm, "num_steps": 12, "overshoot": 0.02, "num_candidates": 10}
    result = attacks.deepfool(make(), None, INPUTS, LABELS, **settings)
    assert np.all(result.success)
    last = [
        reference(x.astype(float), label, None, **settings)[0][-1]
        for x, label in zip(INPUTS, LABELS, strict=True)
    ]
    np.testing.assert_allclose(result.inputs, last, atol=2e-4)


@pytest.mark.floor
@both_norms
@pytest.mark.parametrize("overshoot", [0.02, 0.1])
def test_on_a_linear_network_one_step_and_the_overshoot(norm, overshoot):
    logits_fn, inputs, logits, weights = tiny.linear_problem()
    exact = tiny.exact_distances(logits, weights, norm)
    labels = logits.argmax(1)
    result = attacks.deepfool(logits_fn, None, inputs, labels, norm=norm, overshoot=overshoot)
    assert np.all(result.success)
    ratio = result.distance / exact.min(1)
    np.testing.assert_allclose(ratio, 1 + overshoot, rtol=2e-3)
    # A clean pass, the two iterates, and the verification.
    np.testing.assert_array_equal(result.queries, 4)
    np.testing.assert_array_equal(result.info["first_success"], 2)
    nearest = attacks.deepfool(
        logits_fn, None, inputs, labels, norm=norm, overshoot=overshoot, targets=exact.argmin(1)
    )
    np.testing.assert_allclose(nearest.inputs, result.inputs, atol=1e-6)


@both_norms
def test_the_candidates_are_the_largest_logits(norm):
    # The runner-up's boundary is 0.25 away along the first input, the other one 0.05 along the
    # second.
    weights = jnp.asarray([[0.0, 0.2, 0.0], [0.0, 0.0, 4.0]])
    bias = jnp.asarray([0.0, -0.15, -2.2])
    logits_fn = nets.callable_logits_fn(lambda w, x: x @ w[0] + w[1][None], (weights, bias))
    inputs, label = np.full((1, 2), 0.5, np.float32), np.zeros(1, int)
    for num_candidates, winner, distance in [(2, 1, 0.25), (3, 2, 0.05), (10, 2, 0.05)]:
        result = attacks.deepfool(
            logits_fn, None, inputs, label, norm=norm, num_candidates=num_candidates
        )
        assert logits_fn(result.inputs)[0].argmax() == winner
        np.testing.assert_allclose(result.distance, 1.02 * distance, rtol=1e-4)


@both_norms
def test_the_scale_of_the_logits_changes_nothing_for_targets(norm):
    kwargs = {"norm": norm, "targets": TARGETS}
    plain = attacks.deepfool(make(), None, INPUTS, LABELS, **kwargs)
    assert plain.success.sum() >= B - 2
    for scale in (16.0, 2.0**-60, 2.0**60):
        scaled = attacks.deepfool(make(scale), None, INPUTS, LABELS, **kwargs)
        jax.tree.map(np.testing.assert_array_equal, plain, scaled)


@both_norms
def test_an_entry_at_its_bound_holds_nobody_up(norm):
    # The first input has the largest gradient and cannot move; the second one must do it all.
    weights = jnp.asarray([[0.0, 2.0], [0.0, 1.0]])
    bias = jnp.asarray([2.8, 0.0])  # at the input: 2.8 against 2.5
    logits_fn = nets.callable_logits_fn(lambda w, x: x @ w[0] + w[1][None], (weights, bias))
    inputs = np.array([[1.0, 0.5]], np.float32)
    result = attacks.deepfool(logits_fn, None, inputs, np.zeros(1, int), norm=norm)
    assert result.success[0]
    assert result.inputs[0, 0] == 1
    assert 0.3 < result.distance[0] < 0.3 * 1.03


@both_norms
def test_a_start_on_the_boundary_is_left(norm):
    flat = nets.callable_logits_fn(lambda x: jnp.stack([x[:, 0], x[:, 1]], axis=1))
    inputs = np.full((1, 2), 0.25, np.float32)
    result = attacks.deepfool(flat, None, inputs, np.array([0]), norm=norm)
    assert result.success[0]
    assert 0 < result.distance[0] < 2e-5
    # A tie is the first class's, so the other is wrong to begin with.
    assert attacks.deepfool(flat, None, inputs, np.array([1]), norm=norm).distance[0] == 0


@both_norms
def test_a_success_by_rounding_is_not_lost(norm, monkeypatch):
    monkeypatch.setattr(row_loop, "_LEAST_WORK", 0)  # so that the loop goes on in half the rows

    # The whole batch rounds class 0 up, and the half that is left after a while does not.
    def logits_of(x):
        rounding = 4e-7 if len(x) == 70 else 0.0
        return jnp.stack([1.5 - x[:, 0] + rounding, jnp.ones_like(x[:, 0])], axis=1)

    inputs = np.full((70, 2), 0.25, np.float32)
    labels = np.where(np.arange(70) < 35, 1, 0)  # half of them wrong to begin with
    result = attacks.deepfool(
        logits_of, None, inputs, labels, norm=norm, overshoot=1e-6, trace=True
    )
    assert np.all(result.success)
    np.testing.assert_allclose(result.distance[35:], 0.25, atol=3e-5)
    # The second iterate is past the boundary by rounding alone, the third one by a step.
    trace = np.asarray(result.info["trace"])[35:]
    assert np.all((trace[:, 1] > 0) & (trace[:, 1] < 4e-7) & (trace[:, 2] > 9e-6))
    np.testing.assert_array_equal(result.info["first_success"][35:], 3)


@both_norms
def test_an_injected_start_is_where_the_sum_begins(norm):
    logits_fn, inputs, logits, weights = tiny.linear_problem(num_classes=2)
    labels = logits.argmax(1)
    slope = weights.T[1 - labels] - weights.T[labels]
    delta = np.random.default_rng(1).normal(0, 0.02, inputs.shape)
    result = attacks.deepfool(
        logits_fn, None, inputs, labels, norm=norm, overshoot=0.1, init=inputs + delta, trace=True
    )
    assert np.all(result.success)
    first = inputs + 1.1 * delta
    excess = np.sum(first * slope, axis=1) - 0.5 * slope.sum(1)
    np.testing.assert_allclose(result.info["trace"][:, 0], excess, atol=1e-5)
    # On a linear network either the start is adversarial, or the point after one step.
    distance = -excess[:, None] / np.linalg.norm(slope, DUAL[norm], axis=1, keepdims=True)
    unit = np.sign(slope) if norm == "linf" else slope / np.linalg.norm(slope, axis=1)[:, None]
    step = np.where(excess[:, None] > 0, 0.0, distance * unit)
    np.testing.assert_allclose(result.inputs, inputs + 1.1 * (delta + step), atol=1e-5)
    np.testing.assert_array_equal(result.info["first_success"], np.where(excess > 0, 1, 2))
    assert 0 < np.sum(excess > 0) < len(excess)


@both_norms
def test_the_unreachable_is_a_failure_that_ends_early(norm):
    # Class 0 wins by at least 1 everywhere in the box; for the second example nothing moves.
    def fixed(x):
        return jnp.stack([x[:, 0] + 1, jnp.where(x[:, 1] > 0, x[:, 1], 0.0)], axis=1)

    inputs = np.array([[0.5, 0.5], [0.5, 0.5]], np.float32)
    labels = np.zeros(2, int)
    result = attacks.deepfool(fixed, None, inputs, labels, norm=norm, num_steps=7)
    np.testing.assert_array_equal(result.inputs, inputs)
    assert not np.any(result.success)
    assert np.all(np.isinf(result.distance))
    np.testing.assert_array_equal(result.info["first_success"], [-1, -1])
    np.testing.assert_array_equal(result.queries, 1 + 7 + 1)
    still = nets.callable_logits_fn(lambda x: jnp.stack([x[:, 0] * 0 + 1, x[:, 0] * 0], axis=1))
    result = attacks.deepfool(still, None, inputs, labels, norm=norm)
    np.testing.assert_array_equal(result.queries, 1 + 1 + 1)


CALLS = []


def counting(net, inputs):
    jax.debug.callback(lambda: CALLS.append(1))  # counts forward passes, not traces
    return tiny.network(net, inputs)


@both_norms
def test_queries_are_the_forward_passes_that_were_run(norm):
    claims, counted = set(), nets.callable_logits_fn(counting, make().args[0])
    for index in range(B):
        one = slice(index, index + 1)
        jax.effects_barrier()
        CALLS.clear()
        result = attacks.deepfool(
            counted, None, INPUTS[one], LABELS[one], norm=norm, targets=TARGETS[one], num_steps=4
        )
        jax.block_until_ready(result)
        jax.effects_barrier()
        assert len(CALLS) == int(result.queries[0])
        claims.add(len(CALLS))
        first = int(result.info["first_success"][0])
        assert len(CALLS) == 2 + (4 if first < 0 else min(first, 4))
    assert len(claims) >= 2


def test_a_convolutional_network_of_the_library():
    model = nets.ConvNet(features=((4,),), hidden=(8,), num_classes=12, dropout_rate=0.0)
    inputs = np.random.default_rng(0).uniform(0, 1, (4, 6, 6, 1)).astype(np.float32)
    params, _ = nets.init(model, jax.random.key(0), (6, 6, 1))
    logits_fn = nets.logits_fn(model, {"params": params})
    labels = np.argmax(logits_fn(inputs), axis=1)
    result = attacks.deepfool(logits_fn, None, inputs, labels)
    assert np.all(result.success)
    assert np.all(np.argmax(logits_fn(result.inputs), axis=1) != labels)
    # Not the minimum, but near it.
    closest = attacks.fmn(logits_fn, None, inputs, labels, norm="l2", num_steps=50)
    ratio = result.distance / closest.distance
    assert np.all((ratio > 0.98) & (ratio < 1.5))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"norm": "l1"}, "expected norm to be one of 'l2', 'linf', got 'l1'"),
        ({"num_candidates": 1}, "expected num_candidates to be a whole number >= 2, got 1"),
        ({"overshoot": -0.1}, r"expected overshoot >= 0, got -0\.1"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attacks.deepfool(make(), None, INPUTS, LABELS, **kwargs)
