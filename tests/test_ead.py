"""EAD against a plain NumPy version of its algorithm, and against exact minima of its objective."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks
from tests import tiny

B, D, H, K = 6, 5, 7, 4
RNG = np.random.default_rng(5)
NET = tiny.Net(RNG.normal(0, 1.2, (D, H)), RNG.normal(0, 1, (H, K)))
make, logits_of = NET.logits_fn, NET.logits
INPUTS = RNG.uniform(0.05, 0.95, (B, D)).astype(np.float32)
INPUTS[0, :2] = [0, 1]  # on the box's faces
LABELS = logits_of(INPUTS).argmax(1)
TARGETS = np.argsort(logits_of(INPUTS), axis=1)[:, -2]
SETTINGS = {"num_searches": 6, "num_steps": 60, "learning_rate": 0.02, "initial_const": 0.1}


def reference(
    x,
    label,
    target,
    *,
    beta,
    decision_rule,
    confidence,
    num_searches,
    num_steps,
    learning_rate,
    initial_const,
    abort_early=True,
):
    """The returned point's L1 distance, elastic net and constant, or (inf, inf, nan)."""
    goal, sign = (label, -1) if target is None else (target, 1)

    def judge(point):
        margin, slope = NET.margin(point, goal)
        return sign * margin + confidence, sign * slope  # below 0: the goal is passed

    lower, upper, const = 0.0, 1e10, initial_const
    best_value, best = np.inf, (np.inf, np.inf, np.nan)
    current = ahead = x
    for _ in range(num_searches):
        succeeded, previous = False, np.inf
        if abort_early:
            current = ahead = x
        for k in range(num_steps):
            gap, slope = judge(ahead)
            slope = 2 * (ahead - x) + const * slope * (gap > 0)
            z = ahead - learning_rate * np.sqrt(1 - k / num_steps) * slope
            shrunk = np.where(z - x > beta, z - beta, np.where(z - x < -beta, z + beta, x))
            following = shrunk.clip(0, 1)
            ahead = (following + k / (k + 3) * (following - current)).clip(0, 1)
            current = following
            gap, _ = judge(current)
            l1, squared = np.abs(current - x).sum(), np.sum((current - x) ** 2)
            elastic_net = squared + beta * l1
            if gap < 0:
                succeeded = True
                value = l1 if decision_rule == "l1" else elastic_net
                if value < best_value:
                    best_value, best = value, (l1, elastic_net, const)
            loss = elastic_net + const * max(0.0, gap)
            if abort_early and k % max(num_steps // 10, 1) == 0:
                if loss > 0.9999 * previous:
                    break
                previous = loss
        if succeeded:
            upper = min(upper, const)
        else:
            lower = max(lower, const)
        const = (lower + upper) / 2 if upper < 1e9 else const * 10
    return best


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"decision_rule": "elastic_net"},
        {"confidence": 0.3},
        {"targets": TARGETS, "confidence": 0.1},
        {"abort_early": False},
        {"beta": 0.0, "decision_rule": "elastic_net"},
        {"initial_const": 100.0, "num_searches": 4},
    ],
    ids=str,
)
def test_against_numpy_in_double_precision(kwargs):
    kwargs = SETTINGS | {"beta": 0.01, "decision_rule": "l1", "confidence": 0.0} | kwargs
    targets = kwargs.pop("targets", None)
    l1, elastic_net, const = tiny.each(reference, INPUTS, LABELS, targets, **kwargs)
    result = tiny.in_double(attacks.ead, NET, INPUTS, LABELS, targets=targets, **kwargs)
    np.testing.assert_array_equal(result.success, np.isfinite(l1))
    assert result.success.sum() >= B - 2
    np.testing.assert_allclose(result.distance, l1, rtol=1e-8)
    np.testing.assert_allclose(result.info["elastic_net"], elastic_net, rtol=1e-8)
    np.testing.assert_allclose(result.info["const"], const, rtol=1e-8)


@pytest.mark.floor
def test_against_numpy_in_single_precision():
    kwargs = SETTINGS | {"beta": 0.01, "decision_rule": "l1", "confidence": 0.0}
    l1, _, _ = tiny.each(reference, INPUTS, LABELS, **kwargs)
    result = attacks.ead(make(), None, INPUTS, LABELS, **kwargs)
    np.testing.assert_allclose(result.distance, l1, rtol=1e-3)


def least_elastic_net(weights, gap, low, high, beta):
    """The least `‖δ‖² + β‖δ‖₁` with `weights · δ = gap` and `low <= δ <= high`.

    Convex: the optimum is `δ(λ) = clip(shrink(λ · weights, β) / 2, low, high)`, and
    `weights · δ(λ)` rises with the multiplier λ, which bisection finds.
    """

    def solution(multiplier):
        pull = multiplier * weights
        return np.clip(np.sign(pull) * np.maximum(np.abs(pull) - beta, 0) / 2, low, high)

    least, most = 0.0, 1e6
    assert weights @ solution(most) > gap
    for _ in range(200):
        middle = (least + most) / 2
        least, most = (least, middle) if weights @ solution(middle) > gap else (middle, most)
    delta = solution(most)
    return np.sum(delta**2) + beta * np.abs(delta).sum()


def linear_problem():
    rng = np.random.default_rng(3)
    weights = rng.normal(0, 1, 12)
    inputs = rng.uniform(0.1, 0.9, (16, 12)).astype(np.float32)
    gaps = inputs.astype(np.float64) @ weights - 0.5 * weights.sum()
    inputs[gaps < 0] = 1 - inputs[gaps < 0]  # class 0 wins by the gap
    gaps = inputs.astype(np.float64) @ weights - 0.5 * weights.sum()

    def logits_fn(x):
        return jnp.stack([(x - 0.5) @ jnp.asarray(weights, x.dtype), 0 * x[:, 0]], axis=1)

    return logits_fn, inputs, -weights, gaps


@pytest.mark.parametrize("beta", [1e-5, 1e-3, 1e-2])
def test_the_exact_minima_of_a_linear_network(beta):
    logits_fn, inputs, weights, gaps = linear_problem()
    x = inputs.astype(np.float64)
    labels = np.zeros(len(x), int)
    least = np.array(
        [
            least_elastic_net(weights, gap, -row, 1 - row, beta)
            for row, gap in zip(x, gaps, strict=True)
        ]
    )
    # L1: the most effective entries first, each as far as the box lets it.
    room = np.where(weights > 0, 1 - x, x)
    order = np.argsort(-np.abs(weights))
    gains = np.cumsum((room * np.abs(weights))[:, order], axis=1)
    spent = np.cumsum(room[:, order], axis=1)
    full = (gains < gaps[:, None]).sum(1)
    rows = np.arange(len(x))
    before = (
        np.where(full > 0, gains[rows, full - 1], 0),
        np.where(full > 0, spent[rows, full - 1], 0),
    )
    least_l1 = before[1] + (gaps - before[0]) / np.abs(weights)[order][full]

    net = attacks.ead(
        logits_fn, None, inputs, labels, beta=beta, decision_rule="elastic_net", num_steps=400
    )
    short = attacks.ead(logits_fn, None, inputs, labels, beta=beta, num_steps=400)
    assert np.all(net.success)
    assert np.all(short.success)
    net_ratio = np.asarray(net.info["elastic_net"]) / least
    short_ratio = np.asarray(short.distance) / least_l1
    for ratio in (net_ratio, short_ratio):
        assert ratio.min() >= 1 - 1e-4
    # The published threshold of β a step means a weight of β / α or more: next to none for the
    # smallest β here, which so finds the least elastic net; far above the L2 term for the largest,
    # which so finds the least L1 distance.
    if beta == 1e-5:
        assert np.median(net_ratio) <= 1.01
        assert net_ratio.max() <= 1.15
    if beta == 1e-2:
        assert np.median(short_ratio) <= 1.06
        assert short_ratio.max() <= 1.15
    assert net_ratio.max() <= 1.5
    assert np.all(short.distance <= net.distance)
    assert np.all(net.info["elastic_net"] <= short.info["elastic_net"])


def test_the_unreachable_is_a_failure_and_not_zeros():
    run = functools.partial(attacks.ead, tiny.unbreakable, None, INPUTS, np.zeros(B, int))
    result = run(num_searches=3, num_steps=10)
    np.testing.assert_array_equal(result.inputs, INPUTS)
    assert not np.any(result.success)
    assert np.all(np.isinf(result.distance))
    assert np.all(np.isinf(result.info["elastic_net"]))
    without_l1 = run(num_searches=3, num_steps=10, beta=0)
    assert np.all(np.isinf(without_l1.info["elastic_net"]))
    assert np.all(np.isnan(result.info["const"]))


def test_untouched_inputs_are_equal_to_the_bit():
    result = attacks.ead(make(), None, INPUTS, LABELS, num_steps=200)
    changed = np.asarray(result.inputs) != INPUTS
    assert np.all(result.success)
    assert np.all((changed.sum(1) >= 1) & (changed.sum(1) < D))


def test_the_trace_holds_the_objective_of_every_step():
    kwargs = {"num_searches": 2, "num_steps": 20, "initial_const": 1.0, "abort_early": False}
    result = attacks.ead(make(), None, INPUTS, LABELS, trace=True, beta=1e3, **kwargs)
    # Nothing passes such a threshold: the objective stays the constant times the clean margin.
    expected = -tiny.margins(logits_of(INPUTS), LABELS)[:, None] * np.repeat([1, 10], 20)
    np.testing.assert_allclose(result.info["trace"], expected, rtol=1e-3)
    # Two forward passes and one backward pass per step.
    np.testing.assert_array_equal(result.queries, np.full(B, 1 + 2 * 2 * 20 + 1))
    np.testing.assert_array_equal(result.info["gradients"], np.full(B, 2 * 20))
    assert not np.any(result.success)


@pytest.mark.parametrize("abort_early", [True, False])
def test_searches_start_where_they_are_told(abort_early):
    settings = {"num_searches": 3, "num_steps": 20, "abort_early": abort_early}
    plain = attacks.ead(make(), None, INPUTS, LABELS, **settings)
    same = attacks.ead(make(), None, INPUTS, LABELS, init=INPUTS, **settings)
    jax.tree.map(np.testing.assert_array_equal, same, plain)
    # From far beyond the boundary already the first step is a success, at any constant.
    far = attacks.ead(make(), None, INPUTS, LABELS, num_steps=100, confidence=0.5).inputs
    warm = attacks.ead(make(), None, INPUTS, LABELS, init=far, **settings)
    assert np.all(warm.success)
    np.testing.assert_array_equal(warm.info["first_success"], np.ones(B))
    outside = attacks.ead(make(), None, INPUTS, LABELS, init=INPUTS + 9, trace=True, **settings)
    corner = attacks.ead(
        make(), None, INPUTS, LABELS, init=np.ones_like(INPUTS), trace=True, **settings
    )
    jax.tree.map(np.testing.assert_array_equal, outside, corner)
    # With `abort_early` every search starts there, otherwise only the first one.
    loss = np.asarray(corner.info["trace"])
    assert np.all((np.nanmax(loss[:, 10:], axis=1) > 0.9 * loss[:, 0]) == abort_early)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"beta": -1.0}, r"expected beta >= 0, got -1\.0"),
        ({"decision_rule": "EN"}, "expected decision_rule to be one of 'l1', 'elastic_net'"),
        ({"learning_rate": 0.0}, r"expected learning_rate > 0, got 0\.0"),
        ({"initial_const": 0}, "expected initial_const > 0, got 0"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attacks.ead(make(), None, INPUTS, LABELS, **kwargs)
