"""FAB against a NumPy version in float64, and its projections against exact solutions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize

from jdistill import attacks, nets
from jdistill.attacks import _fab
from jdistill.attacks._core import hyperplane as _hyperplane
from jdistill.attacks._core import problem as _base
from jdistill.attacks._core import targets
from tests import tiny
from tests.tiny import DUAL, ORDER

NORMS = ("linf", "l2", "l1")
all_norms = pytest.mark.parametrize("norm", NORMS)


# -------------------------------------------------------------------------------------------------
# The projections


def shortest(point, normal, gap, norm):
    """The shortest `d` with `normal · d = gap` and `point + d` in [0, 1], by bisection, `[D]`."""
    sign = np.sign(normal) * (1 if gap >= 0 else -1)
    weight = np.abs(normal)
    room = np.where(sign > 0, 1 - point, np.where(sign < 0, point, 0))
    if weight @ room <= abs(gap):
        return sign * room
    if norm == "l1":  # greedily, the heaviest entry first
        moves, rest = np.zeros_like(point), abs(gap)
        for index in np.argsort(-weight):
            if weight[index] > 0:
                moves[index] = min(room[index], rest / weight[index])
                rest -= weight[index] * moves[index]
        return sign * moves
    rate = weight if norm == "l2" else (weight > 0).astype(float)
    low, high = 0.0, 1 / rate[rate > 0].min()
    for _ in range(200):
        middle = (low + high) / 2
        if weight @ np.minimum(middle * rate, room) < abs(gap):
            low = middle
        else:
            high = middle
    return sign * np.minimum(high * rate, room)


def least_by_linear_program(point, normal, gap, norm):
    """The least norm, by SciPy; the hyperplane crosses the box."""
    size = len(point)
    if norm == "linf":  # over (d, t): least t with -t <= d <= t
        cost = np.r_[np.zeros(size), 1.0]
        upper = np.c_[np.r_[np.eye(size), -np.eye(size)], -np.ones(2 * size)]
        bounds = [*zip(-point, 1 - point, strict=True), (0, None)]
        equal = np.r_[normal, 0.0][None]
        found = optimize.linprog(cost, upper, np.zeros(2 * size), equal, [gap], bounds)
    else:  # over (d⁺, d⁻)
        bounds = [*zip(np.zeros(size), 1 - point, strict=True)]
        bounds += [*zip(np.zeros(size), point, strict=True)]
        equal = np.r_[normal, -normal][None]
        found = optimize.linprog(np.ones(2 * size), A_eq=equal, b_eq=[gap], bounds=bounds)
    assert found.status == 0
    return found.fun


def cases(num_cases=60, size=12, seed=0):
    """Points, some on the box's faces; normals, some entries 0; gaps, some beyond the box."""
    rng = np.random.default_rng(seed)
    points = rng.uniform(0, 1, (num_cases, size))
    points = np.where(rng.uniform(size=points.shape) < 0.3, np.round(points), points)
    normals = rng.normal(0, 1, points.shape) * 10.0 ** rng.uniform(-3, 0, points.shape)
    normals = np.where(rng.uniform(size=points.shape) < 0.2, 0, normals)
    signs = rng.choice([-1.0, 1.0], num_cases)
    rooms = np.where(normals * signs[:, None] > 0, 1 - points, points)
    shares = rng.choice([0.0, 0.01, 0.3, 0.9, 0.999, 1.001, 5.0], num_cases)
    gaps = signs * shares * np.sum(np.abs(normals) * rooms, axis=1)
    points, normals, gaps = (value.astype(np.float32) for value in (points, normals, gaps))
    return points, normals, gaps, shares


@functools.partial(jax.jit, static_argnames="norm")
def jitted(points, normals, gaps, norm, bounds):
    plane = _hyperplane.unit(normals, gaps)
    return _hyperplane.project(points, *plane, norm, bounds), _hyperplane.distance(*plane, norm)


def project(points, normals, gaps, norm, bounds=(0.0, 1.0)):
    return np.asarray(jitted(points, normals, gaps, norm, bounds)[0])


def distance(normals, gaps, norm):
    return np.asarray(jitted(np.zeros_like(normals), normals, gaps, norm, (0.0, 1.0))[1])


def doubles(points, normals, gaps, norm, bounds=(0.0, 1.0)):
    """The same in double precision."""
    with tiny.double_precision():
        arrays = (jnp.asarray(value, jnp.float64) for value in (points, normals, gaps))
        return project(*arrays, norm, bounds)


@pytest.mark.floor
@all_norms
def test_projections_are_exact(norm):
    points, normals, gaps, shares = cases()
    exact = (value.astype(float) for value in (points, normals, gaps))
    expected = np.stack([shortest(*row, norm) for row in zip(*exact, strict=True)])
    np.testing.assert_allclose(doubles(points, normals, gaps, norm), expected, atol=1e-9)
    # Where only entries of small weights have room left, a gap's rounding moves them far.
    found = project(points, normals, gaps, norm)
    weights = np.abs(normals) / np.abs(normals).max(axis=1, keepdims=True)
    np.testing.assert_allclose(weights * found, weights * expected, atol=2e-6)
    assert np.all(found[normals == 0] == 0)
    assert np.all((points + found >= -1e-7) & (points + found <= 1 + 1e-7))
    # Beyond the box: the corner nearest to the hyperplane.
    beyond = (shares > 1)[:, None] & (normals != 0)
    assert beyond.any(axis=1).sum() >= 10
    corner = (normals * gaps[:, None] > 0).astype(float)
    np.testing.assert_allclose((points + found)[beyond], corner[beyond], atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_no_way_is_shorter(norm):
    points, normals, gaps, shares = cases(seed=1)
    found = np.linalg.norm(doubles(points, normals, gaps, norm), ORDER[norm], axis=1)
    inside = np.flatnonzero((shares > 0) & (shares < 1))[:12]
    assert len(inside) == 12
    for b in inside:
        row = (value[b].astype(float) for value in (points, normals, gaps))
        np.testing.assert_allclose(found[b], least_by_linear_program(*row, norm), rtol=1e-6)


@all_norms
def test_projections_in_another_box_and_shape(norm):
    points, normals, gaps, _ = cases(seed=2)
    found = doubles(points, normals, gaps, norm)
    image = (len(points), 3, 2, 2)
    points = (4 * points.astype(float) - 1).reshape(image)
    wide = doubles(points, normals.reshape(image), 4 * gaps, norm, (-1.0, 3.0))
    np.testing.assert_allclose(wide.reshape(found.shape) / 4, found, atol=1e-9)


@all_norms
def test_no_scale_of_the_normal_matters(norm):
    points, normals, gaps, _ = cases(seed=3)
    plain = project(points, normals, gaps, norm)
    for scale in (2.0**-90, 2.0**60):  # far below what the reference takes for 0
        np.testing.assert_array_equal(project(points, normals * scale, gaps * scale, norm), plain)
        np.testing.assert_array_equal(
            distance(normals * scale, gaps * scale, norm), distance(normals, gaps, norm)
        )
    exact = np.abs(gaps) / np.linalg.norm(normals.astype(float), DUAL[norm], axis=1)
    np.testing.assert_allclose(distance(normals, gaps, norm), exact, rtol=1e-5)


@all_norms
def test_where_there_is_no_hyperplane_nothing_moves(norm):
    points, normals, gaps, _ = cases(seed=4)
    normals[0], gaps[1], gaps[2], normals[3, 5] = 0, np.nan, np.inf, np.nan
    found = project(points, normals, gaps, norm)
    np.testing.assert_array_equal(found[:3], 0)
    assert np.all(np.isfinite(found))
    none = np.isinf(distance(normals, gaps, norm))
    np.testing.assert_array_equal(none, np.arange(len(points)) < 3)


# -------------------------------------------------------------------------------------------------
# The attack

B, D, H, K = 8, 6, 10, 5
RNG = np.random.default_rng(5)
NET = tiny.Net(RNG.normal(0, 1.5, (D, H)), RNG.normal(0, 1, (H, K)))
make, logits_of = NET.logits_fn, NET.logits
INPUTS = RNG.uniform(0.05, 0.95, (B, D)).astype(np.float32)
INPUTS[0, :2] = [0, 1]  # on the box's faces
KEY = jax.random.key(3)
LABELS = logits_of(INPUTS).argmax(1)


def run(attack, **settings):
    arguments = {"logits_fn": make(), "key": None, "inputs": INPUTS, "labels": LABELS} | settings
    return jax.tree.map(np.asarray, attack(**arguments))


def one_start(x, label, aim, norm, num_steps, begin=None):
    """One start of one example in float64: the distance and the point, `inf` and None if none.

    `aim` is a class, or None for the nearest boundary.
    """
    point, best, best_point = (x if begin is None else begin), np.inf, None
    for _ in range(num_steps):
        logits, jacobian = NET.at(point)
        classes = [k for k in range(K) if k != label] if aim is None else [aim]
        boundaries = [(jacobian[k] - jacobian[label], logits[label] - logits[k]) for k in classes]
        normal, gap = min(
            boundaries, key=lambda row: abs(row[1]) / np.linalg.norm(row[0], DUAL[norm])
        )
        own = shortest(point, normal, gap, norm)
        other = shortest(x, normal, gap + normal @ (point - x), norm)
        near, far = np.linalg.norm(own, ORDER[norm]), np.linalg.norm(other, ORDER[norm])
        alpha = min(near / (near + far), 0.1)
        point = np.clip((point + 1.05 * own) * (1 - alpha) + (x + 1.05 * other) * alpha, 0, 1)
        if logits_of(point).argmax() != label:
            distance = np.linalg.norm(point - x, ORDER[norm])
            if distance < best:
                best, best_point = distance, point
            point = x + 0.9 * (point - x)
    return best, best_point


def starts(b, norm, num_steps, num_targets):
    """Every start of an example, one for each class by its clean logit."""
    x, label = INPUTS[b].astype(float), LABELS[b]
    if num_targets is None:
        return [one_start(x, label, None, norm, num_steps)]
    ranked = [k for k in np.argsort(-logits_of(x)) if k != label][:num_targets]
    return [one_start(x, label, k, norm, num_steps) for k in ranked]


@pytest.mark.floor
@all_norms
@pytest.mark.parametrize("num_targets", [None, 3], ids=["untargeted", "targeted"])
def test_against_numpy(norm, num_targets):
    expected = [starts(b, norm, 20, num_targets) for b in range(B)]
    nearest = [min(found, key=lambda row: row[0]) for found in expected]
    distances = np.array([distance for distance, _ in nearest])
    assert np.isfinite(distances).sum() >= B - 1
    attack, more = attacks.fab, {}
    if num_targets is not None:
        attack, more = attacks.fab_targeted, {"num_targets": num_targets}
        assert len({np.argmin([row[0] for row in found]) for found in expected}) >= 2
    result = run(attack, norm=norm, num_steps=20, trace=True, **more)
    np.testing.assert_allclose(result.distance, distances, rtol=1e-4)
    trace = result.info["trace"]
    np.testing.assert_allclose(trace.min(1), result.distance, rtol=1e-5, atol=1e-6)
    first = np.where(result.success, np.isfinite(trace).argmax(1) + 1, -1)
    np.testing.assert_array_equal(result.info["first_success"], first)
    for b, (distance, point) in enumerate(nearest):
        if np.isfinite(distance):
            np.testing.assert_allclose(result.inputs[b], point, atol=1e-4)
    if num_targets is not None:
        start = np.array([np.argmin([row[0] for row in found]) for found in expected])
        order = np.argsort(-logits_of(INPUTS), axis=1)
        np.testing.assert_array_equal(result.info["restart"], start)
        np.testing.assert_array_equal(result.info["target"], order[np.arange(B), start + 1])
    np.testing.assert_array_equal(result.queries, 2 + 2 * 20 * (num_targets or 1))
    gradients = 20 * (K - 1 if num_targets is None else num_targets)
    np.testing.assert_array_equal(result.info["gradients"], gradients)


def test_a_radius_ends_the_search_with_the_start_that_succeeds():
    found = [starts(b, "linf", 20, K - 1) for b in range(B)]
    distances = np.array([[distance for distance, _ in row] for row in found])
    # Between the smallest distance of all starts and the first one's, where that is larger.
    eps = np.where(
        distances.argmin(1) > 0, (distances.min(1) + distances[:, 0]) / 2, 1.01 * distances[:, 0]
    )
    eps[1] = 0.99 * distances[1].min()  # out of reach
    eps = np.minimum(eps, 1.0)
    first = np.array([np.argmax(row <= e) for row, e in zip(distances, eps, strict=True)])
    assert len(np.unique(first)) >= 2
    result = run(attacks.fab_targeted, eps=eps, num_steps=20)
    np.testing.assert_array_equal(result.success, np.arange(B) != 1)
    rows = np.arange(B)
    expected = np.where(result.success, distances[rows, first], np.inf)
    np.testing.assert_allclose(result.distance, expected, rtol=1e-4)
    np.testing.assert_array_equal(result.info["restart"], np.where(result.success, first, 0))
    used = np.where(result.success, first + 1, K - 1)
    np.testing.assert_array_equal(result.queries, 2 + 2 * 20 * used)
    np.testing.assert_array_equal(result.inputs[1], INPUTS[1])
    assert result.info["first_success"][1] == -1
    assert np.all(result.info["first_success"][result.success] > 20 * first[result.success])


@all_norms
def test_on_a_linear_network_it_ends_beside_the_optimum(norm):
    logits_fn, inputs, logits, weights = tiny.linear_problem()
    exact = tiny.exact_distances(logits, weights, norm).min(1)
    result = attacks.fab(logits_fn, None, inputs, logits.argmax(1), norm=norm, num_steps=5)
    ratio = np.asarray(result.distance) / exact
    assert ratio.min() >= 1 - 1e-5
    assert np.median(ratio) <= 1.01  # 1.05 after the first step


def test_further_starts_are_random_and_no_worse():
    one = run(attacks.fab, num_steps=20)
    three = run(attacks.fab, num_steps=20, num_restarts=3, key=KEY)
    assert np.all(three.distance <= one.distance)
    assert np.any(three.distance < one.distance)
    assert np.any(three.info["restart"] > 0)
    another = run(attacks.fab, num_steps=20, num_restarts=3, key=jax.random.key(4))
    assert not np.array_equal(three.inputs, another.inputs)
    # With a radius they are for those that resisted.
    easy = np.arange(B) < 4
    eps = np.where(easy, 1.001, 0.999) * one.distance
    bounded = run(attacks.fab, num_steps=20, num_restarts=3, key=KEY, eps=eps)
    assert np.all(bounded.success[easy])
    assert np.all(bounded.queries[easy] == 2 + 2 * 20)
    assert np.all(bounded.queries[~easy] > 2 + 2 * 20)
    with pytest.raises(ValueError, match="expected a PRNG key for random starts, got None"):
        run(attacks.fab, num_restarts=2)


def test_random_starts_are_at_half_the_radius():
    inputs = np.full((3, 40), 0.5, np.float32)
    model = nets.callable_logits_fn(lambda _, x: x, ())
    problem = _base.prepare(model, KEY, inputs, np.zeros(3, int), targets=None, bounds=(0, 1))
    eps = jnp.array([0.4, 0.4, jnp.inf])
    starts = targets.Starts.of(problem, 3)
    method = _fab._method(problem, starts, None, 0.1, 1.05, 0.9, "linf", num_steps=1)
    for norm, widest in (("linf", 1.0), ("l2", 40**0.5)):
        begin = jax.jit(dataclasses.replace(method, eps=eps, norm=norm)._begin)
        # Within eps; within the smallest distance so far; and where nothing is known, the box's.
        smallest = jnp.array([jnp.inf, 0.1, jnp.inf])
        moved = begin(problem, jnp.array([1, 4, 2]), smallest) - inputs
        found = np.linalg.norm(moved, ORDER[norm], axis=1)
        np.testing.assert_allclose(found[:2], [0.2, 0.05], rtol=1e-5)
        assert 0.1 * widest < found[2] <= widest / 2 * (1 + 1e-5)
        np.testing.assert_array_equal(begin(problem, jnp.array([0, 3, 6]), eps), inputs)


def test_targets_are_reached_past_a_third_class():
    # z₂ wins in the middle: the boundary between the label 0 and the target 1 lies inside it.
    weights = np.array([[-1.0, 1.0, 0.0]], np.float32)
    logits_fn = nets.callable_logits_fn(
        lambda w, x: x @ w + jnp.array([[0.5, -0.5, 0.15]]), jnp.asarray(weights)
    )
    inputs, labels = np.full((1, 1), 0.1, np.float32), np.array([0])
    for attack in (attacks.fab, attacks.fab_targeted):
        for target, exact in ((1, 0.55), (2, 0.25)):
            settings = {"num_steps": 40, "targets": np.array([target])}
            result = attack(logits_fn, None, inputs, labels, **settings)
            assert bool(result.success[0])
            assert exact <= float(result.distance[0]) <= 1.02 * exact
            assert int(result.info["target"][0]) == target


def test_few_classes_have_few_targets():
    result = run(attacks.fab_targeted, num_steps=3, num_targets=99)
    np.testing.assert_array_equal(result.queries, 2 + 2 * 3 * (K - 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": -0.1}, "expected eps >= 0, got -0.1"),
        ({"eps": np.nan}, "expected eps >= 0, got nan"),
        (
            {"eps": np.ones(3)},
            r"expected eps to be a scalar or of shape \[B\] = \(8,\), got \(3,\)",
        ),
        ({"norm": "l0"}, "expected norm to be one of 'linf', 'l2', 'l1', got 'l0'"),
        ({"alpha_max": 1.5}, r"expected alpha_max in \[0, 1\], got 1.5"),
        ({"beta": -0.5}, r"expected beta in \[0, 1\], got -0.5"),
    ],
)
@pytest.mark.parametrize("attack", [attacks.fab, attacks.fab_targeted])
def test_bad_settings_are_named(attack, change, message):
    with pytest.raises(ValueError, match=message):
        run(attack, **change)
