"""The saliency map attack against a plain NumPy version, closed forms and its three outputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, nets
from jdistill.attacks import _jsma
from tests import tiny

B, D, H, K = 20, 9, 8, 4
RNG = np.random.default_rng(11)
NET = tiny.Net(RNG.normal(0, 1.0, (D, H)), RNG.normal(0, 1, (H, K)))
make, logits_of = NET.logits_fn, NET.logits
INPUTS = RNG.uniform(0, 1, (B, D)).astype(np.float32)
INPUTS[0, :3] = [0, 1, 1]  # on the box's faces
LABELS = logits_of(INPUTS).argmax(1)
TARGETS = np.argsort(logits_of(INPUTS), axis=1)[:, 1]  # the third best
OUTPUTS = {
    "softmax": attacks.softmax,
    "logits": jnp.positive,
    "softmax_at": attacks.softmax_at(5.0),
}


def jacobian(x, output):
    """Of the output's scores, `[K, D]`, in float64."""
    logits, of_logits = NET.at(x)
    if output == "logits":
        return of_logits
    temperature = {"softmax": 1, "softmax_at": 5}[output]
    exponents = logits / temperature
    probs = np.exp(exponents - exponents.max())
    probs /= probs.sum()
    return (np.diag(probs) - np.outer(probs, probs)) @ of_logits / temperature


def reference(x, target, succeeded, output, theta, num_steps):
    """The paper's algorithms 2 and 3 for one example: the final point and the pairs."""
    x, pairs = x.astype(np.float64), []
    while not succeeded(logits_of(x)) and len(pairs) < num_steps:
        slopes = jacobian(x, output) * np.sign(theta)
        best, chosen = 0.0, None
        room = x < 1 if theta > 0 else x > 0
        for p in range(D):
            for q in range(p + 1, D):
                alpha = slopes[target, p] + slopes[target, q]
                beta = slopes[:, p].sum() + slopes[:, q].sum() - alpha
                if room[p] and room[q] and alpha > 0 and beta < 0 and -alpha * beta > best:
                    best, chosen = -alpha * beta, (p, q)
        if chosen is None:
            break
        x[list(chosen)] = (x[list(chosen)] + theta).clip(0, 1)
        pairs.append(chosen)
    return x, pairs


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("theta", [1.0, -1.0, 0.3])
def test_the_same_pixels_in_the_same_order_as_numpy(output, targeted, theta):
    num_steps = 4
    result = attacks.jsma(
        make(),
        None,
        INPUTS,
        LABELS,
        theta=theta,
        max_features=2 * num_steps + 1,  # rounded down to pairs
        output=OUTPUTS[output],
        targets=TARGETS if targeted else None,
        trace=True,
    )
    successes = 0
    for b in range(B):
        target = TARGETS[b] if targeted else np.argsort(logits_of(INPUTS[b]))[-2]

        def succeeded(logits, b=b, target=target):
            return logits.argmax() == target if targeted else logits.argmax() != LABELS[b]

        expected, pairs = reference(INPUTS[b], target, succeeded, output, theta, num_steps)
        found = np.asarray(result.info["pairs"][b])
        assert result.info["target"][b] == target
        assert result.info["num_pairs"][b] == len(pairs)
        np.testing.assert_array_equal(found[: len(pairs)], np.reshape(pairs, (-1, 2)))
        assert np.all(found[len(pairs) :] == -1)
        success = succeeded(logits_of(expected))
        # The clean input is judged again, and one iterate per pair.
        points = [INPUTS[b].astype(float)]
        for pair in pairs:
            points.append(points[-1].copy())
            points[-1][list(pair)] = (points[-1][list(pair)] + theta).clip(0, 1)
        assert result.info["first_success"][b] == (len(points) if success else -1)
        judged = logits_of(np.array(points[:num_steps]))
        goal = target if targeted else LABELS[b]
        excess = tiny.margins(judged, goal)
        trace = np.asarray(result.info["trace"][b])
        np.testing.assert_allclose(
            trace[: len(judged)], -excess if targeted else excess, rtol=1e-4, atol=1e-5
        )
        assert np.all(np.isnan(trace[len(judged) :]))
        assert result.success[b] == success
        successes += success
        point = expected if success else INPUTS[b]
        np.testing.assert_allclose(result.inputs[b], point, atol=1e-6)
        changed = np.sum(expected != INPUTS[b].astype(np.float64))
        assert result.distance[b] == (changed if success else np.inf)
    assert successes >= 2


def test_an_injected_start_is_where_it_begins():
    init = INPUTS.copy()
    init[:, :2], init[:, 2] = 2.0, -1.0  # to be clipped into the box
    start = init.clip(0, 1)
    result = attacks.jsma(make(), None, INPUTS, LABELS, init=init, max_features=6, trace=True)
    successes = 0
    for b in range(B):
        target = np.argsort(logits_of(INPUTS[b]))[-2]  # of the clean input

        def succeeded(logits, b=b):
            return logits.argmax() != LABELS[b]

        expected, pairs = reference(start[b], target, succeeded, "softmax", 1.0, 3)
        assert result.info["target"][b] == target
        np.testing.assert_array_equal(
            result.info["pairs"][b, : len(pairs)], np.reshape(pairs, (-1, 2))
        )
        success = succeeded(logits_of(expected))
        assert result.success[b] == success
        successes += success
        if success:
            np.testing.assert_allclose(result.inputs[b], expected, atol=1e-6)
            assert result.distance[b] == np.sum(expected != INPUTS[b].astype(np.float64))
            assert result.info["first_success"][b] == len(pairs) + 1
    assert successes >= B // 2


@pytest.mark.parametrize(
    ("output", "follows"),
    [
        (attacks.softmax, "softmax"),
        (attacks.softmax_at(1), "softmax"),
        (attacks.softmax_at(20.0), None),  # another network may saturate there
        (jnp.positive, "logits"),
        (jnp.tanh, None),
    ],
    ids=["softmax", "at 1", "at 20", "logits", "other"],
)
def test_what_it_follows_depends_on_the_output(output, follows):
    assert attacks.traits(functools.partial(attacks.jsma, output=output)).follows == follows
    assert attacks.traits(attacks.jsma).follows == "softmax"


def test_the_softmax_and_its_derivative():
    rng = np.random.default_rng(3)
    logits = rng.normal(0, 1, (B, K)) * np.logspace(0, 1.5, B)[:, None]  # ever more sure
    weights = rng.normal(0, 1, (B, K))
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    expected = probs * (probs[:, None] * (weights[:, :, None] - weights[:, None])).sum(2)
    values, pull = jax.vjp(attacks.softmax, jnp.asarray(logits, jnp.float32))
    np.testing.assert_allclose(values, probs, rtol=1e-4, atol=1e-37)
    # Relatively, so for classes of a probability far below float32's resolution at 1 as well.
    assert probs.min() < 1e-12
    (found,) = pull(jnp.asarray(weights, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-37)


def test_rows_at_a_time_change_nothing(monkeypatch):
    alpha, beta = jnp.asarray(RNG.normal(0, 1, (2, 5, 33)), jnp.float32)
    movable = jnp.asarray(RNG.random((5, 33)) < 0.8)
    whole = _jsma._best_pair(alpha, beta, movable)
    for size in (1, 5 * 33 * 4):
        monkeypatch.setattr(_jsma, "_PAIRS_AT_A_TIME", size)
        for one, other in zip(whole, _jsma._best_pair(alpha, beta, movable), strict=True):
            np.testing.assert_array_equal(one, other)


def test_of_equal_pairs_the_first():
    alpha = jnp.array([[1.0, 2.0, 2.0, 2.0, 1.0]])
    everywhere = jnp.ones((1, 5), bool)
    score, first, second = _jsma._best_pair(alpha, alpha, everywhere)
    assert (score[0], first[0], second[0]) == (16, 1, 2)
    score, _, _ = _jsma._best_pair(alpha, -alpha, everywhere)
    assert score[0] == 0


@pytest.mark.parametrize(
    ("threshold", "distance", "pairs"),
    [
        (5.4, 2, [[1, 3], [-1, -1]]),  # the two largest weights sum to 5.5
        (5.6, 4, [[1, 3], [2, 5]]),
        (8.4, 4, [[1, 3], [2, 5]]),  # and the four largest to 8.5
        (8.6, np.inf, [[1, 3], [2, 5]]),
    ],
)
def test_a_linear_network_takes_its_largest_weights(threshold, distance, pairs):
    weights = jnp.array([0.5, 3.0, 1.0, 2.5, 0.1, 2.0])
    linear = jnp.stack([-weights, weights], axis=1) / 2

    def logits_fn(x):
        return x @ linear - jnp.array([[0.0, threshold]])

    inputs, labels = np.zeros((1, 6), np.float32), np.zeros(1, int)
    result = attacks.jsma(
        logits_fn, None, inputs, labels, output=jnp.positive, max_features=4, trace=True
    )
    np.testing.assert_array_equal(result.info["pairs"], [pairs])
    assert (result.success[0], result.distance[0]) == (distance < np.inf, distance)
    changed = np.isin(np.arange(6), pairs) & result.success[0]
    np.testing.assert_array_equal(result.inputs, changed[None])


@pytest.mark.floor
def test_a_saturated_softmax_stops_it_and_the_temperature_does_not():
    # Distillation's masking: at T = 1 the logits times 10^4 leave no gradient in float32.
    kwargs = {"max_features": 8}
    hot = make(1e4)
    plain = attacks.jsma(make(), None, INPUTS, LABELS, **kwargs)
    masked = attacks.jsma(hot, None, INPUTS, LABELS, **kwargs)
    honest = attacks.jsma(hot, None, INPUTS, LABELS, output=attacks.softmax_at(1e4), **kwargs)
    on_logits = attacks.jsma(hot, None, INPUTS, LABELS, output=jnp.positive, **kwargs)
    assert np.mean(plain.success) > 0.7
    assert np.mean(masked.success) < 0.1
    assert np.all(masked.info["num_pairs"][~np.asarray(masked.success)] <= 1)
    np.testing.assert_array_equal(honest.success, plain.success)
    np.testing.assert_allclose(honest.inputs, plain.inputs, atol=1e-6)
    assert np.mean(on_logits.success) > 0.5


def test_small_gradients_are_no_masking():
    # The probabilities are 1e-25: their gradients' products round to 0, but not the gradients.
    linear = jnp.zeros((2, 2)).at[:, 1].set(40.0)

    def logits_fn(x):
        return x @ linear - jnp.array([[0.0, 60.0]])

    result = attacks.jsma(logits_fn, None, np.zeros((1, 2), np.float32), np.zeros(1, int))
    assert result.success[0]
    np.testing.assert_array_equal(result.inputs, [[1, 1]])


def test_the_share_of_the_paper():
    # No pair ever suffices: the steps taken are half of 14.5% of 784 features, rounded down.
    weights = jnp.stack([-jnp.ones(784), jnp.ones(784)], axis=1)

    def logits_fn(x):
        return x @ weights - jnp.array([[0.0, 1e3]])

    inputs = np.zeros((1, 784), np.float32)
    result = attacks.jsma(
        logits_fn, None, inputs, np.zeros(1, int), output=jnp.positive, trace=True
    )
    assert not result.success[0]
    assert result.info["num_pairs"][0] == 56
    # All features are equal, so the first ones fall first.
    np.testing.assert_array_equal(result.info["pairs"].ravel(), np.arange(112))


def test_a_new_temperature_and_theta_compile_nothing():
    traced, counts = [], []

    def counted(weights, x):
        traced.append(1)
        return tiny.network(weights, x)

    logits_fn = nets.callable_logits_fn(counted, make().args[0])
    for temperature, theta in [(1.0, 1.0), (7.0, -0.5), (np.float64(9), np.linspace(0.1, 1, B))]:
        attacks.jsma(
            logits_fn,
            None,
            INPUTS,
            LABELS,
            theta=theta,
            output=attacks.softmax_at(temperature),
            max_features=4,
        )
        counts.append(len(traced))
    assert counts[0] > 0
    assert counts[1:] == counts[:1] * 2


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"theta": 0.0}, r"expected theta finite and not 0, got 0\.0"),
        ({"max_features": 1}, "expected max_features to be a whole number >= 2, got 1"),
        ({"output": lambda z: z[:, 0]}, r"expected output to keep the logits' shape \(20, 4\)"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        attacks.jsma(make(), None, INPUTS, LABELS, **kwargs)


def test_bad_shapes_and_temperatures_are_named():
    with pytest.raises(ValueError, match="expected at least 2 features per example"):
        attacks.jsma(lambda x: x * jnp.ones((1, 2)), None, INPUTS[:, :1], np.zeros(B, int))
    with pytest.raises(ValueError, match="expected temperature > 0, got 0"):
        attacks.softmax_at(0)
    with pytest.raises(ValueError, match="expected temperature of rank 0"):
        attacks.softmax_at(np.ones(2))
