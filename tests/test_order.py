"""The largest entry against JAX, and those whose weights reach an amount against a stable sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill._order import first_to_reach, largest
from tests import tiny


def by_sorting(size, weights, amount):
    before, last = np.zeros(size.shape, bool), np.zeros(size.shape, bool)
    for row, order in enumerate(np.argsort(-size, axis=1, kind="stable")):
        total = 0
        for place in order:
            if total >= amount[row, 0]:
                break
            total += weights[row, place]
            (last if total >= amount[row, 0] else before)[row, place] = True
    return before, last


def sizes(ties):
    drawn = np.abs(np.random.default_rng(3).standard_normal((40, 23)))
    return np.round(2 * drawn) / 2 if ties else drawn


@pytest.mark.floor
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_counts_against_a_stable_sort(dtype, ties):
    with tiny.double_precision():
        size = jnp.asarray(sizes(ties), dtype)
        amount = np.arange(40)[:, None] - 5  # from below none to more than all
        found = first_to_reach(size, jnp.ones(size.shape, jnp.int32), jnp.asarray(amount))
        expected = by_sorting(np.asarray(size.astype("float64")), np.ones(size.shape, int), amount)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("ties", [False, True])
def test_weighted_sums_against_a_stable_sort(ties):
    size = sizes(ties).astype(np.float32)
    # Whole weights: their sums are exact in any order. Some are 0.
    weights = np.random.default_rng(4).integers(0, 5, size.shape).astype(np.float32)
    amount = np.arange(40, dtype=np.float32)[:, None] * 1.5 - 3
    found = first_to_reach(jnp.asarray(size), jnp.asarray(weights), jnp.asarray(amount))
    for ours, theirs in zip(found, by_sorting(size, weights, amount), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_entries_that_differ_by_a_bit_and_denormal_ones_are_told_apart():
    one = np.float32(1)
    size = np.array([[one, np.nextafter(one, np.float32(2)), 2e-45, 1e-45, 0, 0]], np.float32)
    for count, expected in enumerate([1, 0, 2, 3, 4, 5], start=1):
        amount = jnp.array([[count]])
        _, last = first_to_reach(jnp.asarray(size), jnp.ones(size.shape, jnp.int32), amount)
        assert np.flatnonzero(last).tolist() == [expected]


def test_gradients_flow_around_the_search():
    def kept(size):
        before, last = first_to_reach(size, jnp.ones(size.shape, int), jnp.array([[2]]))
        return jnp.sum(jnp.where(before | last, size, 0.0) ** 2)

    assert jax.grad(kept)(jnp.array([[3.0, 1.0, 2.0]])).tolist() == [[6.0, 0.0, 4.0]]


@pytest.mark.floor
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_largest_is_that_of_jax_and_so_is_its_derivative(dtype):
    signs = np.random.default_rng(5).choice([-1, 1], (40, 23))
    size = jnp.asarray((signs * sizes(ties=False)).reshape(8, 5, 23), dtype)
    size = size.at[1, 0, 0].set(jnp.inf).at[2, 1, 1].set(jnp.nan).at[3].set(0)

    def as_jax(size):
        return jnp.max(jnp.abs(size), axis=(1, 2), keepdims=True)

    def exact(value):  # NumPy's own floats, which its assertion compares NaN of
        return np.asarray(value.astype(jnp.float32))

    np.testing.assert_array_equal(exact(largest(size)), exact(as_jax(size)))
    ours, expected = (jax.grad(lambda x, f=f: jnp.sum(f(x)))(size[3:]) for f in (largest, as_jax))
    np.testing.assert_array_equal(exact(ours), exact(expected))
