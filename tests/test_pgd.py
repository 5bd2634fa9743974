"""FGSM, BIM, MIM and PGD against a plain NumPy implementation, step by step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, losses, nets
from tests import tiny

B, D, H, K = 8, 5, 7, 4
RNG = np.random.default_rng(0)
FIRST = RNG.normal(0, 1.5, (D, H)).astype(np.float32)
SECOND = RNG.normal(0, 1, (H, K)).astype(np.float32)
INPUTS = RNG.uniform(0.05, 0.95, (B, D)).astype(np.float32)
KEYS = jax.random.split(jax.random.key(0), B)
NORMS = ["linf", "l2", "l1"]
CALLS = []


def network(weights, inputs):
    first, second = weights
    jax.debug.callback(lambda: CALLS.append(1))  # counts forward passes, not traces
    return jnp.tanh(inputs @ first) @ second


MODEL = nets.callable_logits_fn(network, (jnp.asarray(FIRST), jnp.asarray(SECOND)))


def numpy_forward(inputs):
    hidden = np.tanh(inputs @ FIRST.astype(np.float64))
    return hidden, hidden @ SECOND


LABELS = numpy_forward(INPUTS)[1].argmax(1)
TARGETS = (LABELS + 1) % K


def numpy_gradient(inputs, labels):
    """Of the cross-entropy, `[B, D]`."""
    hidden, logits = numpy_forward(inputs)
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    return ((probs - np.eye(K)[labels]) @ SECOND.T * (1 - hidden**2)) @ FIRST.T


def numpy_l1_step(x, direction, length):
    """Features move to the bounds of the unit box in the order of |direction|, one by one."""
    x, moved = x.copy(), 0.0
    for i in np.argsort(-np.abs(direction)):
        bound = 1.0 if direction[i] > 0 else 0.0
        move = min(abs(bound - x[i]), length - moved)
        x[i] += np.sign(bound - x[i]) * move
        moved += move
    return x


def numpy_l1_project(delta, eps):
    """Shrunk by the threshold that leaves eps, found by bisection."""
    low, high = 0.0, np.abs(delta).max()
    for _ in range(100):
        middle = (low + high) / 2
        if np.maximum(np.abs(delta) - middle, 0).sum() > eps:
            low = middle
        else:
            high = middle
    inside = np.abs(delta).sum() <= eps
    return delta if inside else np.sign(delta) * np.maximum(np.abs(delta) - high, 0)


def numpy_step(x, clean, direction, eps, step_size, norm):
    """One step along the direction and the projection into ball and box."""
    if norm == "linf":
        moved = clean + np.clip(x + step_size * np.sign(direction) - clean, -eps, eps)
    elif norm == "l2":
        delta = x + step_size * direction / np.linalg.norm(direction, axis=1, keepdims=True)
        delta -= clean
        length = np.linalg.norm(delta, axis=1, keepdims=True)
        moved = clean + delta * np.minimum(1, eps / length)
    else:
        pairs = zip(x, direction, strict=True)
        moved = np.stack([numpy_l1_step(*rows, step_size) for rows in pairs])
        moved = clean + np.stack([numpy_l1_project(row, eps) for row in moved - clean])
    return moved.clip(0, 1)


def numpy_pgd(inputs, labels, eps, step_size, num_steps, norm, start=None, sign=1, decay=None):
    """The textbook loop; each example stops at its first success.

    Returns the points, and the number of the first that succeeded: 1 is the start, -1 never.
    """
    velocity = 0.0
    clean = inputs.astype(np.float64)
    x = clean.copy() if start is None else start.astype(np.float64)
    first = np.full(len(x), -1)
    for step in range(num_steps + 1):
        wins = numpy_forward(x)[1].argmax(1)
        success = wins != labels if sign > 0 else wins == labels
        first = np.where((first < 0) & success, step + 1, first)
        active = first < 0
        direction = sign * numpy_gradient(x, labels)
        if decay is not None:
            unit = direction / np.abs(direction).sum(1, keepdims=True)
            direction = velocity = decay * velocity + unit
        moved = numpy_step(x, clean, direction, eps, step_size, norm)
        if step < num_steps:
            x = np.where(active[:, None], moved, x)
    return x, first


@pytest.mark.floor
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("targeted", [False, True])
def test_fgsm_against_numpy_and_one_step_of_pgd(norm, targeted):
    labels, sign, kwargs = (TARGETS, -1, {"targets": TARGETS}) if targeted else (LABELS, 1, {})
    eps = {"linf": 0.08, "l2": 0.2, "l1": 0.3}[norm]
    expected, first = numpy_pgd(INPUTS, labels, eps, eps, 1, norm, sign=sign)
    fgsm = attacks.fgsm(MODEL, None, INPUTS, LABELS, eps=eps, norm=norm, **kwargs)
    np.testing.assert_allclose(fgsm.inputs, expected, atol=1e-6)
    np.testing.assert_array_equal(fgsm.success, first >= 0)
    pgd = attacks.pgd(
        MODEL,
        None,
        INPUTS,
        LABELS,
        eps=eps,
        norm=norm,
        num_steps=1,
        step_size=eps,
        random_start=False,
        **kwargs,
    )
    np.testing.assert_array_equal(pgd.inputs, fgsm.inputs)
    np.testing.assert_array_equal(pgd.success, fgsm.success)


@pytest.mark.floor
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("injected", [False, True])
def test_pgd_against_numpy(norm, injected):
    eps = {"linf": 0.12, "l2": 0.3, "l1": 0.45}[norm]
    kwargs, start = {"init": None}, None
    if injected:
        start = (INPUTS + eps / 4 * np.sin(np.arange(B * D)).reshape(B, D)).astype(np.float32)
        start = start.clip(0, 1)
        kwargs = {"init": start}
    expected, first = numpy_pgd(INPUTS, LABELS, eps, eps / 4, 7, norm, start)
    assert 0 < np.sum(first < 0) < B  # some resist
    assert len(np.unique(first)) > 3  # the others fall at different steps
    result = attacks.pgd(
        MODEL,
        None,
        INPUTS,
        LABELS,
        eps=eps,
        norm=norm,
        num_steps=7,
        step_size=eps / 4,
        random_start=False,
        trace=True,
        **kwargs,
    )
    np.testing.assert_allclose(result.inputs, expected, atol=1e-5)
    np.testing.assert_array_equal(result.info["first_success"], first)
    np.testing.assert_array_equal(result.success, first >= 0)
    # Clean pass, one pass a judged iterate, verification; the last iterate is judged by it alone.
    np.testing.assert_array_equal(result.queries, 2 + np.where(first < 0, 7, np.minimum(first, 7)))
    # The trace: the cross-entropy at the start, then rising.
    loss = np.asarray(result.info["trace"])
    assert loss.shape == (B, 7)
    at_start = losses.cross_entropy(MODEL(INPUTS if start is None else start), LABELS)
    np.testing.assert_allclose(loss[:, 0], at_start, rtol=1e-5)
    assert np.all(loss[first < 0, 3] > loss[first < 0, 0])


def iterative(attack, num_steps=7, **kwargs):
    """BIM or MIM on the network of this file, the loss traced."""
    return attack(MODEL, None, INPUTS, LABELS, num_steps=num_steps, trace=True, **kwargs)


@pytest.mark.floor
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("decay", [None, 1.0, 0.5])
def test_bim_and_mim_against_numpy(norm, decay):
    eps = {"linf": 0.12, "l2": 0.3, "l1": 0.45}[norm]
    if decay is None:
        attack, path, kwargs = attacks.bim, 1.25, {}
    else:
        attack, path, kwargs = attacks.mim, 1.0, {"decay": decay}
    step_size = 1.5 * eps / 7
    expected, first = numpy_pgd(INPUTS, LABELS, eps, step_size, 7, norm, decay=decay)
    assert 0 < np.sum(first < 0) < B  # some resist
    assert len(np.unique(first)) > 2  # the others fall at different steps
    result = iterative(attack, eps=eps, norm=norm, step_size=step_size, **kwargs)
    np.testing.assert_allclose(result.inputs, expected, atol=1e-5)
    np.testing.assert_array_equal(result.info["first_success"], first)
    np.testing.assert_array_equal(result.success, first >= 0)
    assert result.info["trace"].shape == (B, 7)
    # The papers' steps are the default.
    expected, _ = numpy_pgd(INPUTS, LABELS, eps, path * eps / 7, 7, norm, decay=decay)
    result = iterative(attack, eps=eps, norm=norm, **kwargs)
    np.testing.assert_allclose(result.inputs, expected, atol=1e-5)


@pytest.mark.parametrize("norm", NORMS)
def test_one_step_of_bim_or_mim_is_fgsm_and_mim_without_memory_is_bim(norm):
    eps = {"linf": 0.12, "l2": 0.3, "l1": 0.45}[norm]
    fgsm = attacks.fgsm(MODEL, None, INPUTS, LABELS, eps=eps, norm=norm)
    for attack in (attacks.bim, attacks.mim):
        one = iterative(attack, num_steps=1, step_size=eps, eps=eps, norm=norm)
        np.testing.assert_allclose(one.inputs, fgsm.inputs, atol=1e-6)
        np.testing.assert_array_equal(one.success, fgsm.success)
    steps = {"eps": eps, "norm": norm, "step_size": eps / 4}
    forgetful = iterative(attacks.mim, decay=0, **steps)
    bim = iterative(attacks.bim, **steps)
    np.testing.assert_allclose(forgetful.inputs, bim.inputs, atol=1e-5)
    np.testing.assert_array_equal(forgetful.info["first_success"], bim.info["first_success"])
    remembering = iterative(attacks.mim, **steps)
    assert np.abs(remembering.inputs - bim.inputs).max() > 1e-3
    mixed = iterative(attacks.mim, decay=np.arange(B) % 2, **steps)
    np.testing.assert_allclose(mixed.inputs[::2], bim.inputs[::2], atol=1e-5)
    np.testing.assert_array_equal(mixed.inputs[1::2], remembering.inputs[1::2])


def test_bim_is_pgd_without_a_random_start_and_starts_where_told():
    start = (INPUTS + 0.03 * np.sin(np.arange(B * D)).reshape(B, D)).astype(np.float32)
    start = start.clip(0, 1)
    for init in (None, start):
        bim = iterative(attacks.bim, eps=0.1, step_size=0.03, init=init)
        pgd = iterative(attacks.pgd, eps=0.1, step_size=0.03, init=init, random_start=False)
        jax.tree.map(np.testing.assert_array_equal, bim, pgd)
    assert not np.allclose(bim.info["trace"][:, 0], losses.cross_entropy(MODEL(INPUTS), LABELS))


def plateau(slope, inputs):
    """Two logits; the second rises with the sum u, is flat for u in [0.1, 0.3], and rises again."""
    u = (inputs - 0.4) @ slope
    rising = jnp.minimum(u, 0.1) + 50 * jax.nn.relu(u - 0.3)
    return jnp.stack([jnp.ones(inputs.shape[:1]), rising], axis=1)


@pytest.mark.parametrize("norm", NORMS)
def test_momentum_crosses_a_plateau(norm):
    model = nets.callable_logits_fn(plateau, jnp.array([1.0, -2.0, 3.0]))
    inputs = np.full((2, 3), 0.4, np.float32)
    kwargs = {"eps": 0.3, "norm": norm, "num_steps": 20, "step_size": 0.02}
    stuck = attacks.bim(model, None, inputs, np.zeros(2, int), **kwargs)
    crossed = attacks.mim(model, None, inputs, np.zeros(2, int), **kwargs)
    assert not np.any(stuck.success)
    assert np.all(crossed.success)
    # A gradient that is 0 from the start leaves nothing to follow, and no 0 / 0 either.
    flat = attacks.mim(model, None, inputs + 0.1, np.zeros(2, int), **kwargs)
    np.testing.assert_array_equal(flat.inputs, inputs + np.float32(0.1))
    assert not np.any(flat.success)


@pytest.mark.floor
@pytest.mark.parametrize("loss", [losses.cross_entropy, losses.margin])
def test_l1_on_a_linear_model_is_the_exact_optimum(loss):
    # More features than steps, the random start spread over all of them, and the box inactive.
    rng = np.random.default_rng(3)
    linear = rng.normal(0, 1, (40, 2)).astype(np.float32)
    slopes = linear[:, 1] - linear[:, 0]
    inputs = rng.uniform(0.4, 0.6, (B, 40)).astype(np.float32)
    model = nets.callable_logits_fn(lambda w, x: x @ w + jnp.array([[9.0, 0.0]]), linear)
    for attack in (attacks.fgsm, attacks.bim, attacks.mim, attacks.pgd):
        result = attack(model, KEYS, inputs, np.zeros(B, int), eps=0.3, norm="l1", loss=loss)
        gains = (np.asarray(result.inputs, np.float64) - inputs) @ slopes
        np.testing.assert_allclose(gains, 0.3 * np.abs(slopes).max(), rtol=1e-4)


@pytest.mark.parametrize("attack", [attacks.fgsm, attacks.bim, attacks.mim, attacks.pgd])
def test_l1_wastes_nothing_on_features_at_their_bounds(attack):
    # The best features cannot move, or not far; the budget goes to the next ones.
    slopes = np.array([9.0, -8.0, 7.0, 5.0, 4.0, 1.0], np.float32)
    inputs = np.array([[1.0, 0.0, 0.75, 0.5, 0.5, 0.5]], np.float32)
    model = nets.callable_logits_fn(
        lambda w, x: jnp.stack([99.0 + 0 * x[:, 0], x @ w], axis=1), jnp.asarray(slopes)
    )
    result = attack(
        model, KEYS[:1], inputs, np.zeros(1, int), eps=1.0, norm="l1", loss=losses.margin
    )
    best = np.array([[1, 0, 1, 1, 0.75, 0.5]], np.float32)
    if attack in (attacks.fgsm, attacks.mim):  # their steps together are no longer than eps
        np.testing.assert_allclose(result.inputs, best, atol=1e-6)
    # Where steps go beyond the ball, its projection takes back from all features equally.
    gains = (np.asarray(result.inputs, np.float64) - inputs) @ slopes
    np.testing.assert_allclose(gains, (best - inputs) @ slopes, rtol=0.05)


@pytest.mark.parametrize("norm", NORMS)
def test_an_init_is_projected(norm):
    eps = 0.05
    result = attacks.pgd(
        MODEL,
        None,
        INPUTS,
        LABELS,
        eps=eps,
        norm=norm,
        num_steps=1,
        step_size=0,
        init=np.full((B, D), 7.0, np.float32),
        random_start=False,
    )
    delta = np.asarray(result.inputs) - INPUTS
    length = np.linalg.norm(delta, tiny.ORDER[norm], axis=1)
    np.testing.assert_allclose(length, eps, rtol=0.2)
    assert length.max() <= eps * (1 + 1e-5)


def count_calls(attack, index, **kwargs):
    """Forward passes truly run for one example alone, and what the result claims."""
    jax.effects_barrier()
    CALLS.clear()
    one = slice(index, index + 1)
    result = attack(MODEL, KEYS[one], INPUTS[one], LABELS[one], **kwargs)
    jax.block_until_ready(result)
    jax.effects_barrier()
    return len(CALLS), int(result.queries[0]), result


def test_queries_are_the_forward_passes_that_were_run():
    index = 3
    for eps in (0.001, 0.3):
        run, claimed, _ = count_calls(attacks.fgsm, index, eps=eps)
        assert run == claimed == 2
        run, claimed, result = count_calls(attacks.pgd, index, eps=eps, num_steps=6, num_restarts=2)
        assert run == claimed
        # Both starts used up: clean, 7 iterates judged, 6 judged, and the verification.
        assert result.success[0] or claimed == 1 + 7 + 6 + 1
    kwargs = {"num_searches": 2, "num_steps": 12, "learning_rate": 0.05}
    run, claimed, _ = count_calls(attacks.carlini_wagner_l2, index, **kwargs)
    assert run == claimed
    run, claimed, _ = count_calls(attacks.carlini_wagner_l2, index, abort_early=False, **kwargs)
    assert run == claimed == 1 + 2 * 12 + 1


def test_more_restarts_only_help_and_only_survivors_take_them():
    kwargs = {"eps": 0.1, "num_steps": 2, "step_size": 0.01}
    one = attacks.pgd(MODEL, KEYS, INPUTS, LABELS, **kwargs)
    many = attacks.pgd(MODEL, KEYS, INPUTS, LABELS, num_restarts=20, **kwargs)
    first_start = np.asarray(many.info["restart"]) == 0
    assert one.success.sum() < many.success.sum()
    np.testing.assert_array_equal(np.asarray(one.success), np.asarray(many.success) & first_start)
    np.testing.assert_allclose(
        many.inputs[np.asarray(one.success)], one.inputs[np.asarray(one.success)], atol=1e-6
    )


def test_random_starts_fill_the_ball():
    # No step is taken, so the result is the start: uniform, inside, other for every restart.
    flat = nets.callable_logits_fn(lambda x: jnp.stack([x[:, 0] * 0, x[:, 0] * 0 - 1], axis=1))
    inputs = np.full((500, 4), 0.5, np.float32)
    labels = np.zeros(500, int)
    starts = [
        np.asarray(
            attacks.pgd(
                flat, jax.random.key(seed), inputs, labels, eps=0.2, num_steps=1, step_size=0.0
            ).inputs
        )
        for seed in range(2)
    ]
    noise = (starts[0] - 0.5) / 0.2
    assert np.abs(noise).max() <= 1 + 1e-6
    np.testing.assert_allclose(np.sort(noise.ravel()), np.linspace(-1, 1, noise.size), atol=0.09)
    assert not np.array_equal(*starts)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 2.0}, r"got 2\.0; pass a Python int"),
        ({"step_size": -0.1}, r"expected step_size >= 0, got -0\.1"),
        ({"init": INPUTS * np.nan}, "got nan"),
        ({"num_restarts": 2, "random_start": False}, "expected num_restarts=1 without random"),
        ({"num_restarts": 2, "init": INPUTS, "key": None}, "expected a PRNG key for random"),
    ],
)
def test_bad_settings_are_named(kwargs, message):
    key = kwargs.pop("key", KEYS)
    with pytest.raises(ValueError, match=message):
        attacks.pgd(MODEL, key, INPUTS, LABELS, eps=0.1, **kwargs)


@pytest.mark.parametrize("attack", [attacks.bim, attacks.mim])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_steps": 0}, "expected num_steps to be a whole number >= 1, got 0"),
        ({"step_size": -0.1}, r"expected step_size >= 0, got -0\.1"),
        ({"norm": "l0"}, "expected norm to be one of 'linf', 'l2', 'l1', got 'l0'"),
    ],
)
def test_bad_settings_of_bim_and_mim_are_named(attack, kwargs, message):
    with pytest.raises(ValueError, match=message):
        attack(MODEL, None, INPUTS, LABELS, eps=0.1, **kwargs)
