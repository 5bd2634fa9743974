"""Training: the optimizer against Keras's by hand, the loop's laws, bad input."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdistill import nets, parallel, train
from jdistill.typing import Batch

ONE = jax.devices()[:1]
N, D, H, K = 23, 4, 8, 3
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(N, D)).astype(np.float32)
LABELS = RNG.integers(0, K, N).astype(np.int32)
KEY = jax.random.key(7)
WEIGHTS = {
    "first": RNG.normal(size=(D, H)).astype(np.float32),
    "second": RNG.normal(size=(H, K)).astype(np.float32),
}


def mlp(params, model_state, inputs, *, train, key):
    """A hidden layer with dropout; row i is masked by `key[i]`."""
    hidden = jax.nn.relu(inputs @ params["first"])
    if train:
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (H,)))(key)
        hidden = jnp.where(keep, 2 * hidden, 0.0)
    return hidden @ params["second"], model_state


STEP = train.make_train_step(mlp, train.sgd(0.1))


def fit(state=None, *, key=KEY, num_epochs=3, examples=(INPUTS, LABELS), **kwargs):
    state = train.create_state(STEP, WEIGHTS, key) if state is None else state
    kwargs = {"batch_size": 5, "devices": ONE, **kwargs}
    return train.fit(STEP, state, examples, train.hard_loss(), num_epochs=num_epochs, **kwargs)


def assert_equal(state, reference):
    """Bit for bit."""
    leaves = zip(
        jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))),
        jax.tree.leaves(reference._replace(key=jax.random.key_data(reference.key))),
        strict=True,
    )
    for leaf, other in leaves:
        np.testing.assert_array_equal(leaf, other)


@pytest.fixture(scope="module")
def whole():
    """An uninterrupted run of 3 epochs of 5 steps: its events and its last state."""
    events = []
    return fit(callback=events.append), events


# The optimizer


@pytest.mark.floor
@pytest.mark.parametrize(
    ("rate", "decay", "momentum"), [(0.01, 1e-6, 0.9), (0.3, 0.5, 0.7), (0.1, 0.0, 0.0)]
)
def test_sgd_is_kerass(rate, decay, momentum):
    rng = np.random.default_rng(1)
    weights = rng.normal(size=5)
    velocity = np.zeros(5)
    optimizer = train.sgd(rate, decay=decay, momentum=momentum)
    params = jnp.asarray(weights, jnp.float32)
    state = optimizer.init(params)
    for t in range(6):
        gradient = rng.normal(size=5)
        updates, state = optimizer.update(jnp.asarray(gradient, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        # keras/optimizers.py, SGD.get_updates with nesterov=True
        lr = rate * (1.0 / (1.0 + decay * t))
        velocity = momentum * velocity - lr * gradient
        weights = weights + momentum * velocity - lr * gradient
        np.testing.assert_allclose(params, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.floor
def test_injected_learning_rate_is_the_rate():
    state = train.create_state(STEP, WEIGHTS, KEY, hyperparams={"learning_rate": 0.25})
    fresh = train.create_state(train.make_train_step(mlp, train.sgd(0.25)), WEIGHTS, KEY)
    gradient = jax.tree.map(jnp.ones_like, WEIGHTS)
    updates, _ = STEP.optimizer.update(gradient, state.opt_state, WEIGHTS)
    expected, _ = train.sgd(0.25).update(gradient, fresh.opt_state, WEIGHTS)
    jax.tree.map(np.testing.assert_array_equal, updates, expected)
    np.testing.assert_allclose(updates["first"], -0.25 * 1.9, rtol=1e-6)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate > 0, got 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate > 0, got nan"),
        ({"decay": -1e-6}, "decay >= 0, got -1e-06"),
        ({"momentum": 1.5}, r"momentum in \[0, 1\], got 1.5"),
        ({"momentum": 1.0}, r"momentum in \[0, 1\), got 1.0"),
    ],
)
def test_sgd_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        train.sgd(**kwargs)


@pytest.mark.floor
@pytest.mark.parametrize("optimizer", [train.sgd(0.1), optax.sgd(0.1)], ids=["injected", "plain"])
def test_unknown_hyperparameter_is_named(optimizer):
    step = train.make_train_step(mlp, optimizer)
    with pytest.raises(ValueError, match=r"got \['rate'\]; .*inject_hyperparams"):
        train.create_state(step, WEIGHTS, KEY, hyperparams={"rate": 0.1})


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (jax.random.key(0, impl="rbg"), "expected a Threefry key, got rbg"),
        (0, "PRNG key"),
    ],
)
def test_create_state_refuses_other_keys(key, message):
    with pytest.raises(ValueError, match=message):
        train.create_state(STEP, WEIGHTS, key)


# The loop


@pytest.mark.floor
def test_every_example_is_seen_once_an_epoch(monkeypatch):
    seen = []

    def spy(step, mode, devices):
        def run(state, batch, loss_fn):
            seen.append((np.asarray(batch.inputs[:, 0]), np.asarray(batch.mask), batch.labels))
            sums = {"loss": 0.0, "correct": 0.0, "count": 1.0}
            return state._replace(step=state.step + 1), sums

        return run

    monkeypatch.setattr(parallel, "compile_step", spy)
    inputs = np.repeat(np.arange(N, dtype=np.float32)[:, None], D, axis=1)
    fit(examples=(inputs, LABELS))
    other = len(seen)
    fit(examples=(inputs, LABELS), key=jax.random.key(8))
    epochs = []
    for first in range(0, len(seen), 5):
        rows = seen[first : first + 5]
        order = np.concatenate([ids[mask > 0] for ids, mask, _ in rows]).astype(int)
        np.testing.assert_array_equal(np.sort(order), np.arange(N))
        labels = np.concatenate([labels[mask > 0] for _, mask, labels in rows])
        np.testing.assert_array_equal(labels, LABELS[order])
        epochs.append(tuple(order))
    assert len(epochs) == 6  # two keys, three epochs each
    assert other == 15
    assert len(set(epochs)) == 6  # all in different orders


@pytest.mark.floor
def test_fit_is_deterministic_for_a_key(whole):
    assert_equal(fit(), whole[0])
    other = fit(key=jax.random.key(8))
    assert np.abs(np.asarray(other.params["first"]) - whole[0].params["first"]).max() > 1e-3


@pytest.mark.floor
@pytest.mark.parametrize("stopped", [1, 4, 5, 9, 10, 14, 15])
def test_resumed_is_uninterrupted(whole, stopped):
    reference, events = whole
    states = [event["state"] for event in events if event["event"] == "step"]
    state = states[stopped - 1]
    assert int(state.step) == stopped
    # Through the host, as a checkpoint would go.
    state = jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))
    state = state._replace(key=jax.random.wrap_key_data(state.key))
    again = []
    assert_equal(fit(state, callback=again.append), reference)
    assert [e["step"] for e in again if e["event"] == "step"] == list(range(stopped + 1, 16))


def test_more_epochs_go_on_from_the_end(whole):
    assert_equal(fit(fit(num_epochs=1)), whole[0])


@pytest.mark.floor
def test_events(whole):
    state, events = whole
    assert [e["event"] for e in events] == (["step"] * 5 + ["epoch"]) * 3
    assert [e["step"] for e in events if e["event"] == "step"] == list(range(1, 16))
    for event in events:
        assert event["stage"] == "train"
        assert (event["num_steps"], event["num_epochs"]) == (15, 3)
        assert int(event["state"].step) == event["step"]
    epochs = [e for e in events if e["event"] == "epoch"]
    assert [(e["epoch"], e["step"]) for e in epochs] == [(1, 5), (2, 10), (3, 15)]
    assert all(type(e["loss"]) is float and 0 <= e["accuracy"] <= 1 for e in epochs)
    assert epochs[-1]["state"] is state


def test_the_epochs_loss_is_the_mean_over_its_examples():
    """With a rate of nearly 0 and no dropout it is the loss of the initial weights."""
    step = train.make_train_step(linear, train.sgd(1e-12))
    events = []
    state = train.create_state(step, {"w": WEIGHTS["first"][:, :K]}, KEY)
    loss_fn = train.hard_loss(2.0)
    train.fit(
        step, state, (INPUTS, LABELS), loss_fn, num_epochs=1, batch_size=5, callback=events.append
    )
    logits = INPUTS @ WEIGHTS["first"][:, :K]
    log_probs = logits / 2 - np.log(np.exp(logits / 2).sum(1, keepdims=True))
    expected = -log_probs[np.arange(N), LABELS].mean()
    np.testing.assert_allclose(events[-1]["loss"], expected, rtol=1e-5)
    assert events[-1]["accuracy"] == pytest.approx((logits.argmax(1) == LABELS).mean())


def linear(params, model_state, inputs, *, train, key):
    return inputs @ params["w"], model_state


@pytest.mark.floor
def test_no_epochs_is_the_identity():
    state = train.create_state(STEP, WEIGHTS, KEY)
    assert fit(state, num_epochs=0) is state


@pytest.mark.floor
def test_a_loss_that_is_not_finite_is_an_error_with_a_remedy():
    events = []
    step = train.make_train_step(linear, train.sgd(0.1))
    state = train.create_state(step, {"w": np.full((D, K), np.inf, np.float32)}, KEY)
    with pytest.raises(FloatingPointError, match="got nan in epoch 1 of warm-up; lower the learn"):
        train.fit(
            step,
            state,
            (INPUTS, LABELS),
            train.hard_loss(),
            num_epochs=2,
            stage="warm-up",
            callback=events.append,
        )
    assert [e["event"] for e in events] == ["step"]  # no "epoch": nobody saves that state


BAD_LABELS, BAD_INPUTS = LABELS.copy(), INPUTS.copy()
BAD_LABELS[3], BAD_INPUTS[4, 1] = -1, np.nan
UNIFORM = np.full((N, K), 1 / K, np.float32)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ((INPUTS, BAD_LABELS), r"labels in 0..2 .*got -1 at index 3"),
        ((INPUTS, np.where(LABELS == 2, K, LABELS)), r"labels in 0..2 .*got 3 at index"),
        ((INPUTS, LABELS.astype(np.float32)), "integer labels"),
        ((INPUTS, LABELS[:-1]), r"labels of shape \[B\] = \(23,\)"),
        ((BAD_INPUTS, LABELS), r"finite inputs, got nan at index \(4, 1\)"),
        ((INPUTS, LABELS, UNIFORM[:, :1]), r"targets of shape \[B, K\] = \(23, 3\), got \(23, 1\)"),
        ((INPUTS, LABELS, np.full((N, K), np.nan)), "probabilities that sum to 1, got .* in row 0"),
        ((INPUTS, LABELS, 2 * UNIFORM), "probabilities that sum to 1, got .* in row 0"),
        ((INPUTS, LABELS, UNIFORM - np.eye(N, K)), "probabilities that sum to 1, got .* in row 0"),
        (((255 * INPUTS).astype(np.uint8), LABELS), "floating-point inputs, got dtype uint8"),
        ((INPUTS[:0], LABELS[:0]), "at least one example, got none"),
    ],
)
def test_fit_refuses_examples_that_would_train_on_silently(examples, message):
    with pytest.raises(ValueError, match=message):
        fit(examples=examples)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_epochs": -1}, "num_epochs to be a whole number >= 0, got -1"),
        ({"num_epochs": 1.5}, "num_epochs .*got 1.5"),
        ({"batch_size": 0}, "batch_size to be a whole number >= 1, got 0"),
        ({"mode": "xmap"}, "mode to be one of 'jit', 'shard_map', 'pmap', got 'xmap'"),
    ],
)
def test_fit_refuses_options(kwargs, message):
    with pytest.raises(ValueError, match=message):
        fit(**kwargs)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_hard_loss_refuses_a_temperature(temperature):
    with pytest.raises(ValueError, match=f"temperature > 0, got {temperature!r}"):
        train.hard_loss(temperature)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_fit_gives_the_same_on_eight_devices(whole, mode):
    events = []
    state = fit(mode=mode, devices=None, callback=events.append)
    for event, reference in zip(events, whole[1], strict=True):
        if event["event"] == "epoch":
            np.testing.assert_allclose(event["loss"], reference["loss"], rtol=1e-5)
    np.testing.assert_allclose(state.params["first"], whole[0].params["first"], rtol=1e-4)


@pytest.mark.floor
def test_learns_a_separable_set():
    rng = np.random.default_rng(2)
    labels = rng.integers(0, K, 60).astype(np.int32)
    inputs = (4 * np.eye(K, D)[labels] + rng.normal(0, 0.3, (60, D))).astype(np.float32)
    step = train.make_train_step(linear, train.sgd(0.1))
    state = train.create_state(step, {"w": np.zeros((D, K), np.float32)}, KEY)
    state = train.fit(
        step, state, (inputs, labels), train.hard_loss(), num_epochs=5, batch_size=8, devices=ONE
    )
    _, sums = train.make_eval_step(linear)(
        state, Batch(inputs, labels, None, np.ones(60, np.float32)), train.hard_loss()
    )
    assert float(sums["correct"]) == 60
    assert float(sums["loss"]) / 60 < 0.1 < np.log(K)


def test_compiles_nothing_for_a_second_fit():
    traces = []

    def counted(params, model_state, inputs, *, train, key):
        if train:
            traces.append(inputs.shape)
        return mlp(params, model_state, inputs, train=train, key=key)

    step = train.make_train_step(counted, train.sgd(0.1))
    for rate, temperature in [(0.1, 1.0), (0.2, 30.0)]:
        state = train.create_state(step, WEIGHTS, KEY, hyperparams={"learning_rate": rate})
        loss_fn = train.hard_loss(temperature)
        train.fit(step, state, (INPUTS, LABELS), loss_fn, num_epochs=2, batch_size=5)
    assert len(traces) == 1


# Evaluation


@pytest.mark.floor
def test_eval_step_sums_without_dropout_and_without_padding():
    state = train.create_state(STEP, WEIGHTS, KEY)
    inputs = np.concatenate([INPUTS[:6], np.full((2, D), np.nan, np.float32)])
    batch = Batch(inputs, LABELS[:8], None, np.repeat(np.array([1, 0], np.float32), [6, 2]))
    _, sums = jax.jit(train.make_eval_step(mlp))(state, batch, train.hard_loss(3.0))
    logits = np.maximum(INPUTS[:6] @ WEIGHTS["first"], 0) @ WEIGHTS["second"]
    log_probs = logits / 3 - np.log(np.exp(logits / 3).sum(1, keepdims=True))
    assert float(sums["count"]) == 6
    assert float(sums["correct"]) == (logits.argmax(1) == LABELS[:6]).sum()
    np.testing.assert_allclose(sums["loss"], -log_probs[np.arange(6), LABELS[:6]].sum(), rtol=1e-5)


@pytest.mark.parametrize(("mode", "num_devices"), [("jit", 8), ("pmap", 1), ("pmap", 8)])
def test_eval_step_compiles_over_devices_and_leaves_the_state(mode, num_devices):
    state = train.create_state(STEP, WEIGHTS, KEY)
    batch = Batch(INPUTS[:21], LABELS[:21], None, np.ones(21, np.float32))  # 21 do not divide by 8
    step = train.make_eval_step(mlp)
    _, expected = step(state, batch, train.hard_loss())
    after, sums = parallel.compile_step(step, mode, jax.devices()[:num_devices])(
        state, batch, train.hard_loss()
    )
    chex.assert_trees_all_close(sums, expected, rtol=1e-5)
    chex.assert_trees_all_equal(after.params, state.params)
    assert int(after.step) == 0


@pytest.mark.floor
@pytest.mark.parametrize("batch_size", [1, 4, 22, 23, 100])
def test_predict_is_the_unbatched_network(batch_size):
    network = nets.callable_logits_fn(lambda w, x: jnp.tanh(x @ w), WEIGHTS["first"])
    logits = train.predict(network, INPUTS, batch_size=batch_size)
    assert isinstance(logits, np.ndarray)
    assert logits.shape == (N, H)
    np.testing.assert_allclose(logits, np.tanh(INPUTS @ WEIGHTS["first"]), rtol=1e-5, atol=1e-6)


def test_predict_of_nothing_has_the_networks_classes():
    network = nets.callable_logits_fn(lambda w, x: x @ w, WEIGHTS["first"])
    assert train.predict(network, INPUTS[:0]).shape == (0, H)


def test_predict_compiles_one_shape_and_nothing_for_new_weights():
    shapes = []

    def counted(weights, inputs):
        shapes.append(inputs.shape)
        return inputs @ weights

    for scale in (1, 2):
        network = nets.callable_logits_fn(counted, scale * WEIGHTS["first"])
        train.predict(network, INPUTS, batch_size=5)
    assert shapes == [(5, D)]


# Batch statistics


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, inputs, *, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(inputs)
        return nn.Dense(K, name="logits")(x)


@pytest.fixture(scope="module")
def normalized():
    model = Normalized()
    step = train.make_train_step(nets.apply_fn(model), train.sgd(0.1))
    params, model_state = nets.init(model, KEY, (D,))
    return model, step, train.create_state(step, params, KEY, model_state=model_state)


@pytest.mark.parametrize(("mode", "num_devices"), [("jit", 1), ("jit", 8), ("pmap", 8)])
def test_batch_statistics_are_state(normalized, mode, num_devices):
    _, step, state = normalized
    batch = Batch(INPUTS[:16], LABELS[:16], None, np.ones(16, np.float32))
    run = parallel.compile_step(step, mode, jax.devices()[:num_devices])
    after, _ = run(state, batch, train.hard_loss())
    statistics = after.model_state["batch_stats"]["norm"]
    np.testing.assert_allclose(statistics["mean"], 0.5 * INPUTS[:16].mean(0), rtol=1e-4, atol=1e-6)
    # Under pmap the variance is the mean of each device's own (here of 2 rows each).
    groups = INPUTS[:16].reshape(num_devices if mode == "pmap" else 1, -1, D)
    np.testing.assert_allclose(statistics["var"], 0.5 + 0.5 * groups.var(1).mean(0), rtol=1e-4)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_fit_carries_batch_statistics_to_evaluation(normalized, mode):
    model, step, state = normalized
    state = train.fit(
        step,
        state,
        (INPUTS[:16], LABELS[:16]),
        train.hard_loss(),
        num_epochs=3,
        batch_size=8,
        mode=mode,
    )
    network = nets.logits_fn(model, {"params": state.params, **state.model_state})
    statistics = jax.tree.map(np.asarray, state.model_state["batch_stats"]["norm"])
    params = jax.tree.map(np.asarray, state.params)
    x = (INPUTS - statistics["mean"]) / np.sqrt(statistics["var"] + 1e-5)
    x = x * params["norm"]["scale"] + params["norm"]["bias"]
    expected = x @ params["logits"]["kernel"] + params["logits"]["bias"]
    np.testing.assert_allclose(train.predict(network, INPUTS), expected, rtol=1e-3, atol=1e-4)
    assert np.abs(statistics["mean"]).max() > 0.01


def test_what_is_no_apply_fn_is_named():
    for wrong in (nets.digits_net(), lambda params, inputs: inputs):
        with pytest.raises(ValueError, match=r"expected apply_fn\(params.*nets.apply_fn\(model\)"):
            train.make_train_step(wrong, train.sgd(0.1))

    def alone(params, model_state, inputs, *, train, key):
        return inputs @ params

    step = train.make_train_step(alone, optax.sgd(0.1))
    state = train.create_state(step, np.ones((3, 2), np.float32), jax.random.key(0))
    examples = np.ones((4, 3), np.float32), np.zeros(4, int)
    with pytest.raises(ValueError, match=r"\(outputs, model_state\), got .*Tracer|ArrayImpl"):
        train.fit(step, state, examples, train.hard_loss(), num_epochs=1)
