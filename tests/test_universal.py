"""The universal perturbation against closed forms, and the laws of a driver."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, losses, nets

B, D = 40, 6
RNG = np.random.default_rng(1)
WEIGHTS = RNG.normal(0, 1, (D, 2)).astype(np.float32)
INPUTS = RNG.uniform(0.3, 0.7, (B, D)).astype(np.float32)
KEY = jax.random.key(3)
TRACES = []


def network(weights, inputs):
    TRACES.append(inputs.shape)
    return (inputs - 0.5) @ weights


def make(weights=WEIGHTS):
    return nets.callable_logits_fn(network, jnp.asarray(weights))


def logits_of(x):
    return (x.astype(np.float64) - 0.5) @ WEIGHTS


# All of one class, since no perturbation turns a linear network's two classes at once.
CHOSEN = logits_of(INPUTS).argmax(1) == 0
INPUTS = INPUTS[CHOSEN]
LABELS = np.zeros(len(INPUTS), int)
DIRECTION = (WEIGHTS[:, 1] - WEIGHTS[:, 0]).astype(np.float64)
GAP = logits_of(INPUTS)[:, 0] - logits_of(INPUTS)[:, 1]
BEST = {
    "linf": np.sign(DIRECTION),
    "l2": DIRECTION / np.linalg.norm(DIRECTION),
}
EPS = {norm: np.median(GAP) / (DIRECTION @ best) for norm, best in BEST.items()}


@pytest.mark.floor
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targets", [None, LABELS + 1], ids=["untargeted", "targeted"])
@pytest.mark.parametrize("batch_size", [7, 100])
def test_the_best_one_for_a_linear_network(norm, targets, batch_size):
    eps = 0.98 * EPS[norm]  # not on an example's boundary
    result = attacks.universal(
        make(), KEY, INPUTS, LABELS, eps=eps, norm=norm, targets=targets, batch_size=batch_size
    )
    expected = eps * BEST[norm]
    assert np.abs(expected).max() < 0.3  # the box is far
    np.testing.assert_allclose(
        result.info["perturbation"], np.tile(expected, (len(INPUTS), 1)), atol=1e-5
    )
    np.testing.assert_allclose(result.inputs, INPUTS + expected, atol=1e-5)
    success = eps * (DIRECTION @ BEST[norm]) > GAP
    assert 0.4 < np.mean(success) < 0.6
    np.testing.assert_array_equal(result.success, success)
    np.testing.assert_allclose(result.distance, eps, rtol=1e-5)
    np.testing.assert_array_equal(result.queries, np.full(len(INPUTS), 1 + 10 + 1))


def test_the_box_and_what_is_wrong_already():
    inputs = INPUTS.copy()
    inputs[0] = np.where(DIRECTION > 0, 1.0, 0.0)  # class 1's corner
    labels = LABELS.copy()
    labels[1] = 1  # misclassified
    result = attacks.universal(make(), KEY, inputs, labels, eps=0.6, num_epochs=3)
    assert np.all((result.inputs >= 0) & (result.inputs <= 1))
    assert np.all(result.distance <= 0.6 + 1e-6)
    for b in (0, 1):
        assert (result.success[b], result.distance[b], result.queries[b]) == (True, 0, 1)
        np.testing.assert_array_equal(result.inputs[b], inputs[b])
    np.testing.assert_allclose(
        result.inputs[2:], (inputs + result.info["perturbation"]).clip(0, 1)[2:], atol=1e-6
    )
    nothing = attacks.universal(make(), KEY, INPUTS, LABELS, eps=0.0)
    np.testing.assert_array_equal(nothing.inputs, INPUTS)
    assert not np.any(nothing.success)
    empty = attacks.universal(make(), KEY, INPUTS[:0], LABELS[:0], eps=0.1)
    assert empty.inputs.shape == (0, D)


def test_the_cap_serves_the_many():
    # One example has a steep slope along the first input, the others a gentle one along the second.
    def logits_fn(x):
        score = jnp.where(x[:, 2] > 0.5, 1e3 * (x[:, 0] - 0.5), x[:, 1] - 0.5)
        return jnp.stack([0.05 - score, score], axis=1)

    inputs = np.full((5, 3), [0.5, 0.5, 0.2], np.float32)
    inputs[0, 2] = 0.8
    run = functools.partial(attacks.universal, logits_fn, KEY, inputs, np.zeros(5, int))
    run = functools.partial(run, eps=0.05, norm="l2", loss=losses.margin)
    capped, plain = run(loss_cap=0.01), run(loss_cap=None)
    np.testing.assert_array_equal(plain.success, [True, False, False, False, False])
    np.testing.assert_array_equal(capped.success, [True] * 5)


def test_an_example_that_overflows_does_not_silence_the_others():
    def broken(x):
        return jnp.where(x[:, :1] < 0.31, jnp.log(x[:, :1] - 2), network(jnp.asarray(WEIGHTS), x))

    inputs = INPUTS.copy()
    inputs[:, 0] = inputs[:, 0].clip(0.5, None)
    inputs[0, 0] = 0.1
    labels = logits_of(inputs).argmax(1)
    inputs, labels = inputs[labels == 0], labels[labels == 0]
    targets = labels + 1  # so that the broken one takes part
    eps = 0.05
    result = attacks.universal(broken, KEY, inputs, labels, eps=eps, targets=targets)
    np.testing.assert_allclose(result.info["perturbation"][0], eps * BEST["linf"], atol=1e-5)
    assert not result.success[0]


def test_same_key_same_result_and_nothing_compiled_twice():
    run = functools.partial(attacks.universal, batch_size=8, num_epochs=2)
    first = run(make(), KEY, INPUTS, LABELS, eps=0.1)
    count = len(TRACES)
    jax.tree.map(np.testing.assert_array_equal, first, run(make(), KEY, INPUTS, LABELS, eps=0.1))
    run(make(2 * WEIGHTS), jax.random.key(0), INPUTS, LABELS, eps=0.2, step_size=0.01, loss_cap=1.0)
    assert len(TRACES) == count


def test_the_callback_hears_of_every_epoch():
    events = []
    attacks.universal(make(), KEY, INPUTS, LABELS, eps=0.1, num_epochs=3, callback=events.append)
    assert [(e["event"], e["stage"], e["done"], e["total"]) for e in events] == [
        ("attack", "universal", done, 3) for done in (1, 2, 3)
    ]


def test_a_driver_refuses_tracers():
    call = functools.partial(attacks.universal, eps=0.1)
    with pytest.raises(ValueError, match="expected concrete arrays, got a tracer; universal is"):
        jax.jit(call)(make(), KEY, INPUTS, LABELS)
    with pytest.raises(ValueError, match="call it outside jit and vmap"):
        jax.vmap(lambda f: call(f, KEY, INPUTS, LABELS))(nets.stack([make(), make()]))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps": -0.1}, r"expected eps >= 0, got -0\.1"),
        ({"eps": np.ones(3)}, "expected eps of rank 0"),
        ({"norm": "l1"}, "expected norm to be one of 'linf', 'l2', got 'l1'"),
        ({"step_size": np.nan}, "expected step_size >= 0, got nan"),
        ({"loss_cap": 0.0}, r"expected loss_cap > 0, got 0\.0"),
        ({"num_epochs": 0}, "expected num_epochs to be a whole number >= 1, got 0"),
        ({"batch_size": 0}, "expected batch_size to be a whole number >= 1, got 0"),
        ({"key": None}, "expected a PRNG key, got None"),
        ({"key": jax.random.split(KEY, 2)}, r"expected one key, got keys of shape \(2,\)"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    key = kwargs.pop("key", KEY)
    with pytest.raises(ValueError, match=message):
        attacks.universal(make(), key, INPUTS, LABELS, **{"eps": 0.1} | kwargs)
