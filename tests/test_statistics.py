"""Paired tests, intervals over seeds, calibration and the rest of `metrics`, against references."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jdistill import metrics

RNG = np.random.default_rng(0)
Z95 = 1.959963984540054


def columns(both, only_first, only_second, neither):
    first = np.repeat([True, True, False, False], [both, only_first, only_second, neither])
    second = np.repeat([True, False, True, False], [both, only_first, only_second, neither])
    return first, second


# -------------------------------------------------------------------------------------------------
# Two networks on the same examples


@pytest.mark.parametrize(
    ("only_first", "only_second"), [(0, 0), (1, 0), (6, 1), (3, 3), (10, 25), (0, 12)]
)
def test_mcnemars_test_is_a_coin(only_first, only_second):
    result = metrics.paired(*columns(40, only_first, only_second, 7))
    heads, throws = max(only_first, only_second), only_first + only_second
    tail = sum(math.comb(throws, k) for k in range(heads, throws + 1)) / 2**throws
    np.testing.assert_allclose(result.p_value, min(1.0, 2 * tail), rtol=1e-9)
    total = 47 + throws
    assert (result.num_pairs, result.first_higher, result.second_higher) == (
        total,
        only_first,
        only_second,
    )
    np.testing.assert_allclose(result.difference.value, (only_first - only_second) / total)
    assert "McNemar" in result.test


def test_the_interval_is_bonett_and_prices_closed_form():
    only_first, only_second, total = 12, 5, 80
    low, high = metrics.paired(*columns(50, only_first, only_second, 13)).difference[1:]
    up, down = (only_first + 1) / (total + 2), (only_second + 1) / (total + 2)
    half = Z95 * math.sqrt((up + down - (up - down) ** 2) / (total + 2))
    np.testing.assert_allclose((low, high), (up - down - half, up - down + half), rtol=1e-9)


@pytest.mark.parametrize("shares", [(0.85, 0.08, 0.05), (0.2, 0.02, 0.0), (0.3, 0.3, 0.3)])
def test_the_interval_covers_the_true_difference(shares):
    draws = np.random.default_rng(1).multinomial(60, [*shares, 1 - sum(shares)], size=1500)
    truth = shares[1] - shares[2]
    different = np.unique(draws[:, 1:3], axis=0, return_inverse=True)
    inside = []
    for only_first, only_second in different[0]:
        first, second = columns(0, only_first, only_second, 60 - only_first - only_second)
        low, high = metrics.paired(first, second).difference[1:]
        inside.append(low <= truth <= high)
    assert 0.93 <= np.array(inside)[different[1].ravel()].mean() <= 1.0


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=30))
def test_a_comparison_turned_around_is_its_mirror_image(pairs):
    first, second = np.array(pairs).T
    one, other = metrics.paired(first, second), metrics.paired(second, first)
    np.testing.assert_allclose(one.difference.value, -other.difference.value)
    np.testing.assert_allclose(one.difference.low, -other.difference.high, atol=1e-12)
    assert one.p_value == other.p_value
    assert -1 <= one.difference.low <= one.difference.value <= one.difference.high <= 1
    # The test and the interval err in the same direction, or nearly so.
    if one.p_value < 0.01:
        assert one.difference.low > 0 or one.difference.high < 0


def test_pairs_that_are_none_are_refused():
    for first, second in (([], []), ([True], [True, False]), ([[True]], [[True]])):
        with pytest.raises(ValueError, match="expected two columns"):
            metrics.paired(first, second)
    with pytest.raises(ValueError, match="confidence < 1, got 95"):
        metrics.paired([True], [False], confidence=95)


# -------------------------------------------------------------------------------------------------
# Seeds


@pytest.mark.floor
def test_the_interval_over_seeds_is_students():
    interval = metrics.seed_interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t of 2 degrees of freedom, spread 1
    np.testing.assert_allclose(interval, (2.0, 2.0 - half, 2.0 + half))
    wider = metrics.seed_interval([1.0, 2.0, 3.0], confidence=0.99)
    assert wider.low < interval.low
    assert metrics.seed_interval([0.0, 0.0, 0.0]) == (0.0, 0.0, 0.0)


def test_one_seed_has_no_interval_and_the_error_says_what_to_do():
    for call in (metrics.seed_interval, lambda one: metrics.paired_over_seeds(one, one)):
        with pytest.raises(ValueError, match=r"at least 2 seeds, got shape \(1,\).*train more"):
            call([0.5])
    with pytest.raises(ValueError, match="expected finite"):
        metrics.seed_interval([0.5, float("nan")])


@pytest.mark.parametrize("size", [2, 3, 8])
def test_pairs_of_seeds_are_scipys_paired_t_test(size):
    first = RNG.uniform(0, 1, size)
    second = first - 0.1 + 0.1 * RNG.normal(size=size)
    result = metrics.paired_over_seeds(first, second)
    reference = stats.ttest_rel(first, second)
    np.testing.assert_allclose(result.p_value, reference.pvalue)
    ends = reference.confidence_interval(0.95)
    np.testing.assert_allclose(result.difference[1:], (ends.low, ends.high))
    np.testing.assert_allclose(result.difference.value, (first - second).mean())
    assert result.num_pairs == size == result.first_higher + result.second_higher
    assert "seeds" in result.test


def test_seeds_without_a_spread_prove_nothing():
    same = metrics.paired_over_seeds([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    assert same.difference == (0.0, 0.0, 0.0)
    assert same.p_value == 1.0
    # 0.3 - 0.2 and 0.8 - 0.7 differ by rounding alone, which t would call overwhelming.
    alike = metrics.paired_over_seeds([0.3, 0.8], [0.2, 0.7])
    assert np.isnan([alike.p_value, *alike.difference[1:]]).all()
    np.testing.assert_allclose(alike.difference.value, 0.1)
    assert (alike.first_higher, alike.second_higher) == (2, 0)


# -------------------------------------------------------------------------------------------------
# Calibration


def looped_ece(probs, labels, num_bins):
    """As Guo et al. write it, bin by bin."""
    confidence, right = probs.max(1), probs.argmax(1) == labels
    total = 0.0
    for m in range(num_bins):
        inside = (confidence > m / num_bins) & (confidence <= (m + 1) / num_bins)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            total += inside.mean() * gap
    return total


@pytest.mark.parametrize("num_bins", [1, 5, 15])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_calibration_is_the_papers_loop(num_bins, scale):
    logits = scale * RNG.normal(size=(200, 6))
    labels = np.where(RNG.random(200) < 0.7, logits.argmax(1), RNG.integers(0, 6, 200))
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    result = metrics.calibration(logits, labels, num_bins=num_bins)
    np.testing.assert_allclose(result.ece, looped_ece(probs, labels, num_bins), atol=1e-12)
    np.testing.assert_allclose(result.mean_confidence, probs.max(1).mean())
    one_hot = np.eye(6)[labels]
    np.testing.assert_allclose(result.brier, ((probs - one_hot) ** 2).sum(1).mean())
    np.testing.assert_allclose(result.nll, -np.log(probs[np.arange(200), labels]).mean(), rtol=1e-7)
    assert (result.num_examples, result.num_nonfinite) == (200, 0)


def test_a_network_that_is_right_as_often_as_it_says_is_calibrated():
    confidence = 0.8
    logits = np.tile([math.log(confidence / (1 - confidence)), 0.0], (100, 1))
    assert metrics.calibration(logits, np.repeat([0, 1], [80, 20])).ece < 1e-12
    np.testing.assert_allclose(metrics.calibration(logits, np.zeros(100, int)).ece, 0.2)
    sure = metrics.calibration(1000 * logits, np.repeat([0, 1], [80, 20]))
    np.testing.assert_allclose(sure.ece, 0.2)
    np.testing.assert_allclose(sure.nll, 0.2 * 1000 * math.log(4))  # no overflow


def test_logits_that_are_not_finite_count_as_the_worst_prediction():
    logits = np.zeros((4, 2))
    logits[0], logits[1, 1] = np.nan, np.inf
    result = metrics.calibration(logits, np.array([0, 1, 0, 1]))
    assert (result.num_examples, result.num_nonfinite) == (4, 2)
    np.testing.assert_allclose(result.brier, (2 + 2 + 0.5 + 0.5) / 4)
    np.testing.assert_allclose(result.ece, 0.5)  # sure and wrong; half sure and half right
    assert result.mean_confidence == 0.75
    assert result.nll == math.inf


def test_calibration_refuses():
    with pytest.raises(ValueError, match="at least one example"):
        metrics.calibration(np.zeros((0, 3)), np.zeros(0, int))
    with pytest.raises(ValueError, match=r"labels in 0\.\.2"):
        metrics.calibration(np.zeros((2, 3)), np.array([0, 3]))
    with pytest.raises(ValueError, match="num_bins"):
        metrics.calibration(np.zeros((2, 3)), np.array([0, 1]), num_bins=0)


# -------------------------------------------------------------------------------------------------
# Papernot's bins, and the worst case


def test_every_sensitivity_has_its_bin():
    edges = [0, 1e-40, 1e-35, 1e-30, 1e-25, 1e-20, 1e-15, 1e-10, 1e-5, 1e-3, 1]  # the paper's
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(metrics.SENSITIVITY_EDGES[:-1], np.log10(edges))
    values = RNG.uniform(-60, 2, 500)
    values[:3] = -np.inf
    values[3], values[4] = np.nan, -3.0
    result = metrics.sensitivity_histogram(values)
    for low, high, count in zip(result.edges, result.edges[1:], result.counts, strict=False):
        assert count == ((values >= low) & (values < high)).sum()
    assert result.counts[0] >= 3
    assert result.num_nonfinite == 1
    assert result.counts.sum() + result.num_nonfinite == 500
    assert metrics.sensitivity_histogram([]).counts.sum() == 0


def test_bins_that_would_leave_some_out_are_refused():
    with pytest.raises(ValueError, match=r"values in \[-40, 0\), got -41 to 1"):
        metrics.sensitivity_histogram([-41.0, 1.0], edges=(-40, -10, 0))
    with pytest.raises(ValueError, match="rising edges"):
        metrics.sensitivity_histogram([-1.0], edges=(0, -10))


def test_the_worst_case_is_over_examples_and_not_over_attacks():
    hits = {name: RNG.random(50) < 0.4 for name in ("a", "b", "c")}
    worst = metrics.worst_case(hits)
    union = hits["a"] | hits["b"] | hits["c"]
    np.testing.assert_array_equal(worst.success, union)
    assert worst.robust_accuracy == metrics.proportion(int((~union).sum()), 50)
    assert worst.robust_accuracy.value < min(1 - row.mean() for row in hits.values())
    for place, name in enumerate(worst.names):
        mine = worst.broken_by == place
        assert hits[name][mine].all()
        assert not any(hits[other][mine].any() for other in worst.names[:place])
    assert (worst.broken_by[~union] == -1).all()
    for bad in ({}, {"a": [True], "b": [True, False]}):
        with pytest.raises(ValueError, match="same examples"):
            metrics.worst_case(bad)
