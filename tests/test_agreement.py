"""Agreement of two networks: against NumPy's definitions, by laws, and bad input."""

import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import metrics

RNG = np.random.default_rng(0)
N, D, E = 40, 6, 9
FEATURES = RNG.normal(2, 3, (N, D))
OTHER = FEATURES @ RNG.normal(size=(D, E)) + RNG.normal(0, 4, (N, E))


def by_kernels(features, other):
    """CKA of two linear kernels by its definition: HSIC with a centering matrix."""
    size = len(features)
    center = np.eye(size) - np.full((size, size), 1 / size)
    first = center @ (features @ features.T) @ center
    second = center @ (other @ other.T) @ center
    return np.trace(first @ second) / np.sqrt(np.trace(first @ first) * np.trace(second @ second))


@pytest.mark.floor
@pytest.mark.parametrize("size", [2, 5, 7, 8, N])
def test_cka_against_kernels(size):
    # Fewer rows than features, and more: the two ways to compute it.
    found = metrics.linear_cka(FEATURES[:size], OTHER[:size])
    np.testing.assert_allclose(found, by_kernels(FEATURES[:size], OTHER[:size]), rtol=1e-10)
    assert metrics.linear_cka(OTHER[:size], FEATURES[:size]) == pytest.approx(found, rel=1e-12)
    single = metrics.linear_cka(
        FEATURES[:size].astype(np.float32), jnp.asarray(OTHER[:size], jnp.float32)
    )
    assert single == pytest.approx(found, rel=1e-5)


@pytest.mark.parametrize("size", [5, N])
def test_what_cka_does_not_see_and_what_it_does(size):
    features, other = FEATURES[:size], OTHER[:size]
    value = metrics.linear_cka(features, other)
    assert 0.1 < value < 0.95
    rotation, _ = np.linalg.qr(RNG.normal(size=(D, D)))
    for scale in (1e-150, 0.3, -7.0, 1e150):
        turned = scale * (features @ rotation + RNG.normal(size=D))
        assert metrics.linear_cka(turned, other) == pytest.approx(value, rel=1e-9)
        assert metrics.linear_cka(features, turned) == pytest.approx(1.0, rel=1e-12)
    # More zeros beside them change nothing; another linear map, or another order, does.
    wide = np.pad(features, ((0, 0), (0, 3)))
    assert metrics.linear_cka(wide, other) == pytest.approx(value, rel=1e-12)
    stretched = features * np.array([30, 1, 1, 1, 1, 1.0])
    assert abs(metrics.linear_cka(stretched, other) - value) > 0.005
    assert metrics.linear_cka(features, features[::-1]) < 0.99


def test_cka_of_features_that_have_nothing_in_common():
    # Columns of a Hadamard matrix: centered and orthogonal.
    two = np.array([[1.0, 1.0], [1.0, -1.0]])
    columns = np.kron(np.kron(two, two), two)[:, 1:]
    assert metrics.linear_cka(columns[:, :3], columns[:, 3:]) == 0.0
    # One of two columns of the same length is shared: 1 / 2.
    assert metrics.linear_cka(columns[:, :2], columns[:, 1:3]) == pytest.approx(0.5)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e30])
def test_cka_of_constant_features_is_0(constant):
    # The mean of ten times 0.1 is not 0.1: noise must not be taken for features.
    for width in (3, 30):
        same = np.full((10, width), constant, np.float32)
        assert metrics.linear_cka(same, FEATURES[:10]) == 0.0
        assert metrics.linear_cka(FEATURES[:10], same) == 0.0
        assert metrics.linear_cka(same, same) == 0.0


def test_cka_names_what_is_wrong():
    with pytest.raises(ValueError, match="the same two examples or more, got 40 and 39 rows"):
        metrics.linear_cka(FEATURES, OTHER[1:])
    with pytest.raises(ValueError, match="the same two examples or more, got 1 and 1 rows"):
        metrics.linear_cka(FEATURES[:1], OTHER[:1])
    with pytest.raises(ValueError, match="expected finite other, got inf at index"):
        metrics.linear_cka(FEATURES, np.where(np.eye(N, E) == 1, np.inf, OTHER))
    with pytest.raises(ValueError, match="expected features of rank 2"):
        metrics.linear_cka(FEATURES.reshape(N, 3, 2), OTHER)


@pytest.mark.floor
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_agreement_against_python(array):
    logits, other = (RNG.normal(size=(200, 4)).astype(np.float32) for _ in range(2))
    expected = [
        max(range(4), key=lambda k, row=one: row[k]) == max(range(4), key=lambda k, row=two: row[k])
        for one, two in zip(logits, other, strict=True)
    ]
    found = metrics.top1_agreement(array(logits), array(other))
    assert found.dtype == bool
    np.testing.assert_array_equal(found, expected)
    assert 20 < sum(expected) < 80  # a quarter by chance
    # Of any temperature and shift, in both orders, and with oneself.
    moved = metrics.top1_agreement(array(logits / 64 - 3), array(1024 * other))
    np.testing.assert_array_equal(moved, expected)
    np.testing.assert_array_equal(metrics.top1_agreement(array(other), array(logits)), expected)
    assert metrics.top1_agreement(array(logits), array(logits)).all()


def test_a_broken_row_agrees_with_nothing():
    fine, ties = [0.0, 1.0, 1.0], [1.0, 2.0, 2.0]
    broken = [[np.nan, 1.0, 0.0], [0.0, np.inf, 0.0], [-np.inf] * 3]
    rows, good = np.array([*broken, fine, [0.0, 1.0, -np.inf]]), np.array([ties] * 5)
    expected = [False, False, False, True, True]
    assert metrics.top1_agreement(rows, good).tolist() == expected
    assert metrics.top1_agreement(good, rows).tolist() == expected
    assert metrics.top1_agreement(rows, rows).tolist() == expected


def test_agreement_names_what_is_wrong():
    with pytest.raises(ValueError, match=r"other of the shape of logits, \(2, 3\), got \(2, 4\)"):
        metrics.top1_agreement(np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ValueError, match="expected floating-point other"):
        metrics.top1_agreement(np.zeros((2, 3)), np.zeros((2, 3), int))
