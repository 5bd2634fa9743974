"""The chain against the released recipe in NumPy, its laws, the losses' closed forms, bad input."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdistill import data, distill, losses, nets, train
from jdistill.typing import Batch

ONE = jax.devices()[:1]
N, D, H, K, BATCH = 37, 5, 8, 3, 8
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(N, D)).astype(np.float32)
LABELS = RNG.integers(0, K, N).astype(np.int32)
KEY = jax.random.key(11)
OPTIONS = {"batch_size": BATCH, "devices": ONE}
TRACES = []


def linear(params, model_state, inputs, *, train, key):
    if train:
        TRACES.append(inputs.shape)
    return inputs @ params["w"] + params["b"][None], model_state


def dropping(params, model_state, inputs, *, train, key):
    """A hidden layer with dropout, so that a wrong key shows."""
    hidden = jnp.tanh(inputs @ params["first"])
    if train:
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (H,)))(key)
        hidden = jnp.where(keep, 2 * hidden, 0.0)
    return hidden @ params["second"], model_state


LINEAR = {
    "w": RNG.normal(size=(D, K)).astype(np.float32),
    "b": RNG.normal(size=K).astype(np.float32),
}
HIDDEN = {
    "first": RNG.normal(size=(D, H)).astype(np.float32),
    "second": RNG.normal(size=(H, K)).astype(np.float32),
}
LINEAR_STEP = train.make_train_step(linear, train.sgd(0.5, decay=0.01))
STEP = train.make_train_step(dropping, train.sgd(0.3))
GENERATION = distill.Generation(step=STEP, params=HIDDEN, num_epochs=2)


def chain(num_generations, *, key=KEY, temperature=5.0, generation=GENERATION, **kwargs):
    return distill.chain(
        [generation] * num_generations,
        (INPUTS, LABELS),
        key,
        temperature=temperature,
        **OPTIONS,
        **kwargs,
    )


def assert_close(params, reference):
    for leaf, other in zip(jax.tree.leaves(params), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-4, atol=1e-5)


def assert_equal(state, reference):
    """Bit for bit, keys and counters included."""
    leaves = zip(
        jax.tree.leaves(state._replace(key=jax.random.key_data(state.key))),
        jax.tree.leaves(reference._replace(key=jax.random.key_data(reference.key))),
        strict=True,
    )
    for leaf, other in leaves:
        np.testing.assert_array_equal(leaf, other)


@pytest.fixture(scope="module")
def whole():
    """An uninterrupted chain of 3 generations: its states and its events."""
    events = []
    return chain(3, callback=events.append), events


# The recipe


def numpy_softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def numpy_train(weights, targets, temperature, key, *, rate, decay, num_epochs):
    """Keras's SGD on the mean of `-Σ q log softmax(z / T)`, in float64, with a fresh velocity."""
    weights = {name: leaf.astype(np.float64) for name, leaf in weights.items()}
    velocity = {name: np.zeros_like(leaf) for name, leaf in weights.items()}
    step, seed = 0, np.asarray(jax.random.key_data(key)).tolist()
    for epoch in range(num_epochs):
        order = data.epoch_order(seed, epoch, N)
        for first in range(0, N, BATCH):
            rows = order[first : first + BATCH]
            x, q = INPUTS[rows].astype(np.float64), targets[rows]
            error = numpy_softmax((x @ weights["w"] + weights["b"]) / temperature) - q
            error /= temperature * len(rows)
            lr = rate / (1 + decay * step)
            for name, gradient in (("w", x.T @ error), ("b", error.sum(0))):
                velocity[name] = 0.9 * velocity[name] - lr * gradient
                weights[name] += 0.9 * velocity[name] - lr * gradient
            step += 1
    return weights


@pytest.mark.floor
def test_chain_is_the_released_recipe():
    temperature, hard = 4.0, np.eye(K)[LABELS]
    initial = distill.initial_weights(LINEAR_STEP, LINEAR, (INPUTS, LABELS), KEY, **OPTIONS)
    generation = distill.Generation(
        step=LINEAR_STEP,
        params=initial.params,
        num_epochs=3,
        hyperparams={"learning_rate": 2.0},
    )
    states = chain(3, temperature=temperature, generation=generation)

    # One shared epoch at T = 1 on hard labels, then every generation from there.
    start = numpy_train(
        LINEAR,
        hard,
        1.0,
        jax.random.fold_in(KEY, 2**31 - 1),
        rate=0.5,
        decay=0.01,
        num_epochs=1,
    )
    for name, leaf in start.items():
        np.testing.assert_allclose(initial.params[name], leaf, rtol=1e-5, atol=1e-5)
    targets, found = hard, []
    for number, state in enumerate(states):
        key = jax.random.fold_in(KEY, number)
        weights = numpy_train(start, targets, temperature, key, rate=2.0, decay=0.01, num_epochs=3)
        for name, leaf in weights.items():
            np.testing.assert_allclose(state.params[name], leaf, rtol=1e-5, atol=1e-5)
        targets = numpy_softmax((INPUTS @ weights["w"] + weights["b"]) / temperature)
        found.append(weights["w"])
    # The generations are apart by far more than the tolerance.
    assert min(np.abs(found[0] - found[1]).max(), np.abs(found[1] - found[2]).max()) > 1e-2


@pytest.mark.floor
def test_a_generation_does_not_depend_on_the_chains_length(whole):
    for state, reference in zip(chain(2), whole[0][:2], strict=True):
        assert_equal(state, reference)
    for number, state in enumerate(whole[0]):
        key = jax.random.fold_in(KEY, number)
        np.testing.assert_array_equal(jax.random.key_data(state.key), jax.random.key_data(key))


def test_another_key_or_temperature_gives_another_chain(whole):
    for other in (chain(2, key=jax.random.key(12)), chain(2, temperature=6.0)):
        for state, reference in zip(other, whole[0][:2], strict=True):
            assert np.abs(state.params["first"] - reference.params["first"]).max() > 1e-4


@pytest.mark.floor
def test_the_teachers_loss_may_have_a_temperature_of_its_own():
    teacher, student = chain(2, temperature=5.0, teacher_loss=lambda _: distill.soft_loss(1.0))
    assert_equal(teacher, chain(1, temperature=1.0)[0])
    # The student learns at 5 from what that teacher says at 5.
    targets = distill.soft_labels(train.logits_fn(STEP, teacher), INPUTS, temperature=5.0)
    state = train.create_state(STEP, HIDDEN, jax.random.fold_in(KEY, 1))
    alone = train.fit(
        STEP, state, (INPUTS, LABELS, targets), distill.soft_loss(5.0), num_epochs=2, **OPTIONS
    )
    assert_equal(student, alone)


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_finished_generations_are_not_trained_again(whole, finished):
    events = []
    states = chain(3, start=whole[0][:finished], callback=events.append)
    assert {e["generation"] for e in events if e["event"] == "step"} == set(range(finished, 3))
    assert [e["generation"] for e in events if e["event"] == "generation"] == [0, 1, 2]
    for state, reference in zip(states, whole[0], strict=True):
        assert_equal(state, reference)


@pytest.mark.floor
@pytest.mark.parametrize(("generation", "step"), [(0, 3), (1, 5), (2, 1), (2, 9)])
def test_a_half_finished_generation_goes_on(whole, generation, step):
    states, events = whole
    half = next(
        e["state"]
        for e in events
        if e["event"] == "step" and (e["generation"], e["step"]) == (generation, step)
    )
    again = []
    resumed = chain(3, start=[*states[:generation], half], callback=again.append)
    for state, reference in zip(resumed, states, strict=True):
        assert_equal(state, reference)
    assert sum(e["event"] == "step" for e in again) == (3 - generation) * 10 - step


@pytest.mark.floor
def test_events_of_a_chain(whole):
    states, events = whole
    stages = ["teacher", "assistant 1", "student"]
    for number in range(3):
        own = [e for e in events if e["generation"] == number]
        assert [e["event"] for e in own] == (["step"] * 5 + ["epoch"]) * 2 + ["generation"]
        assert {e["stage"] for e in own} == {stages[number]}
        assert own[-1]["state"] is states[number]
    losses = [e["loss"] for e in events if e["event"] == "epoch"]
    assert np.isfinite(losses).all()
    assert distill.stage_name(1, 2) == "student"
    assert distill.stage_name(0, 1) == "teacher"


def test_initial_weights_are_shared_and_go_on_from_a_start():
    events = []
    options = {**OPTIONS, "num_epochs": 2}
    initial = distill.initial_weights(
        STEP, HIDDEN, (INPUTS, LABELS), KEY, callback=events.append, **options
    )
    assert {e["stage"] for e in events} == {"initial weights"}
    assert not np.array_equal(initial.params["first"], HIDDEN["first"])
    half = events[2]["state"]
    again = distill.initial_weights(STEP, HIDDEN, (INPUTS, LABELS), KEY, start=half, **options)
    assert_equal(again, initial)
    # No epochs: a generation is its initial weights, whatever its number.
    generation = distill.Generation(step=STEP, params=initial.params, num_epochs=0)
    for state in chain(3, generation=generation):
        jax.tree.map(np.testing.assert_array_equal, state.params, initial.params)


@pytest.mark.floor
def test_one_trace_serves_all_generations_temperatures_and_rates():
    TRACES.clear()
    step = train.make_train_step(linear, train.sgd(0.25))
    for temperature, rate in [(1.0, 0.1), (20.0, 0.1), (100.0, 1.0)]:
        generation = distill.Generation(
            step=step, params=LINEAR, num_epochs=1, hyperparams={"learning_rate": rate}
        )
        chain(3, temperature=temperature, generation=generation)
        mixed = functools.partial(distill.soft_loss, hard_weight=0.3)
        chain(3, temperature=temperature, generation=generation, student_loss=mixed)
    assert len(TRACES) == 1


def test_assistants_of_shrinking_width():
    inputs = RNG.uniform(0, 1, (24, 8, 8, 1)).astype(np.float32)
    labels = np.arange(24) % 10
    generations, models = [], [nets.digits_net(width=width) for width in (0.125, 0.0625)]
    for model in models:
        params, _ = jax.jit(nets.init, static_argnums=(0, 2))(model, KEY, (8, 8, 1))
        step = train.make_train_step(nets.apply_fn(model), train.sgd(0.05))
        generations.append(distill.Generation(step=step, params=params, num_epochs=2))
    states = distill.chain(
        generations,
        (inputs, labels),
        KEY,
        temperature=4.0,
        student_loss=functools.partial(
            distill.soft_loss, hard_weight=0.3, temperature_squared=True
        ),
        **OPTIONS,
    )
    sizes = []
    for model, state, generation in zip(models, states, generations, strict=True):
        logits = train.predict(nets.logits_fn(model, {"params": state.params}), inputs)
        assert logits.shape == (24, 10)
        assert np.isfinite(logits).all()
        assert not np.array_equal(
            state.params["logits"]["kernel"], generation.params["logits"]["kernel"]
        )
        sizes.append(sum(leaf.size for leaf in jax.tree.leaves(state.params)))
    assert sizes[0] > sizes[1]


# Soft labels


@pytest.mark.floor
@pytest.mark.parametrize("temperature", [0.5, 1.0, 20.0])
def test_soft_labels_are_the_tempered_softmax(temperature):
    network = nets.callable_logits_fn(_product, LINEAR["w"])
    labels = distill.soft_labels(network, INPUTS, temperature=temperature, batch_size=10)
    assert labels.shape == (N, K)
    assert labels.dtype == np.float32
    np.testing.assert_allclose(labels.sum(1), 1, rtol=1e-6)
    expected = numpy_softmax(INPUTS.astype(np.float64) @ LINEAR["w"] / temperature)
    np.testing.assert_allclose(labels, expected, rtol=1e-5)


def _product(weights, inputs):
    return inputs @ weights


@pytest.mark.floor
def test_soft_labels_end_in_the_uniform_and_in_the_hard_labels():
    network = nets.callable_logits_fn(_product, LINEAR["w"])
    flat = distill.soft_labels(network, INPUTS, temperature=1e8)
    np.testing.assert_allclose(flat, 1 / K, rtol=1e-6)
    sharp = distill.soft_labels(network, INPUTS, temperature=1e-5)
    np.testing.assert_array_equal(sharp, np.eye(K)[(INPUTS @ LINEAR["w"]).argmax(1)])


@pytest.mark.floor
def test_a_diverged_network_labels_nothing():
    """Not a number as a target adds nothing to the loss: a student would train on air."""
    network = nets.callable_logits_fn(_product, np.full((D, K), np.nan, np.float32))
    with pytest.raises(FloatingPointError, match=r"37 of 37 examples; .*lower learning rate"):
        distill.soft_labels(network, INPUTS, temperature=2.0)


def test_a_diverged_teacher_ends_the_chain():
    teacher = train.create_state(STEP, HIDDEN, KEY)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), HIDDEN)
    teacher = teacher._replace(step=jnp.int32(10), params=broken)
    with pytest.raises(FloatingPointError, match="diverged"):
        chain(2, start=[teacher])


# Losses

LOGITS = RNG.normal(0, 4, (6, K)).astype(np.float32)
TARGETS = RNG.dirichlet(np.ones(K), 6).astype(np.float32)
BATCH6 = Batch(INPUTS[:6], LABELS[:6], TARGETS, np.ones(6, np.float32))


def numpy_loss(temperature, weight, squared):
    """The loss of `LOGITS` and its gradient, from their formulas."""
    factor = temperature**2 if squared else 1.0
    soft = numpy_softmax(LOGITS.astype(np.float64) / temperature)
    hard = numpy_softmax(LOGITS.astype(np.float64))
    own = np.eye(K)[LABELS[:6]]
    loss = -(1 - weight) * factor * (TARGETS * np.log(soft)).sum(1)
    loss -= weight * (own * np.log(hard)).sum(1)
    gradient = (1 - weight) * factor / temperature * (soft - TARGETS) + weight * (hard - own)
    return loss, gradient


@pytest.mark.floor
@pytest.mark.parametrize("temperature", [1.0, 20.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("squared", [False, True])
def test_soft_loss_and_its_gradient_are_the_closed_form(temperature, weight, squared):
    loss_fn = distill.soft_loss(temperature, hard_weight=weight, temperature_squared=squared)
    value = loss_fn(LOGITS, BATCH6)
    assert value.shape == (6,)
    gradient = jax.grad(lambda z: loss_fn(z, BATCH6).sum())(LOGITS)
    expected, expected_gradient = numpy_loss(temperature, weight, squared)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.floor
def test_soft_loss_ends_in_the_soft_and_the_hard_term():
    hard = distill.soft_loss(7.0, hard_weight=1.0, temperature_squared=True)(LOGITS, BATCH6)
    np.testing.assert_allclose(hard, train.hard_loss(1.0)(LOGITS, BATCH6), rtol=1e-6)
    one_hot = BATCH6._replace(targets=np.eye(K, dtype=np.float32)[LABELS[:6]])
    soft = distill.soft_loss(7.0)(LOGITS, one_hot)
    np.testing.assert_allclose(soft, train.hard_loss(7.0)(LOGITS, BATCH6), rtol=1e-6)
    squared = distill.soft_loss(7.0, temperature_squared=True)(LOGITS, one_hot)
    np.testing.assert_allclose(squared, 49 * soft, rtol=1e-6)


def test_gradients_with_the_squared_temperature_keep_their_scale():
    """Hinton et al. 2015, section 2: at high T the gradient is (z - v) / K, without T."""
    teacher = RNG.normal(size=(6, K)).astype(np.float32)
    for temperature in (1e2, 1e3):
        batch = BATCH6._replace(targets=jax.nn.softmax(teacher / temperature))
        loss_fn = distill.soft_loss(temperature, temperature_squared=True)
        gradient = jax.grad(lambda z: loss_fn(z, batch).sum())(LOGITS)  # noqa: B023
        centered = [z - z.mean(1, keepdims=True) for z in (LOGITS, teacher)]
        expected = (centered[0] - centered[1]) / K
        np.testing.assert_allclose(gradient, expected, rtol=0.2, atol=0.1)


@pytest.mark.floor
@pytest.mark.parametrize("options", [{}, {"hard_weight": 0.4, "temperature_squared": True}])
def test_online_loss_is_the_soft_loss_of_that_teachers_labels(options):
    teacher = nets.callable_logits_fn(_product, LINEAR["w"])
    labels = distill.soft_labels(teacher, INPUTS[:6], temperature=3.0)
    offline = distill.soft_loss(3.0, **options)
    online = distill.online_loss(3.0, teacher, **options)
    batch = BATCH6._replace(targets=labels)
    blind = BATCH6._replace(targets=None)
    np.testing.assert_allclose(online(LOGITS, blind), offline(LOGITS, batch), rtol=1e-5)
    gradients = [
        jax.grad(lambda z, f=f, b=b: f(z, b).sum())(LOGITS)
        for f, b in ((online, blind), (offline, batch))
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-6)


@pytest.mark.floor
def test_no_gradient_flows_into_the_online_teacher():
    """Not even where the teacher is the student."""

    def loss(weights, own):
        teacher = nets.callable_logits_fn(_product, weights)
        logits = INPUTS[:6] @ (weights if own else LINEAR["w"])
        return distill.online_loss(2.0, teacher)(logits, BATCH6).sum()

    weights = jnp.asarray(RNG.normal(size=(D, K)), jnp.float32)
    assert float(loss(weights, False)) != float(loss(2 * weights, False))  # it does listen to it
    np.testing.assert_array_equal(jax.grad(loss)(weights, False), np.zeros((D, K)))
    # A network that teaches itself is at the minimum; only the teacher's part would be left.
    np.testing.assert_allclose(jax.grad(loss)(weights, True), np.zeros((D, K)), atol=1e-5)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_training_with_an_online_teacher_is_training_on_its_labels(mode):
    teacher = nets.callable_logits_fn(_product, 3 * LINEAR["w"])
    labels = distill.soft_labels(teacher, INPUTS, temperature=3.0)
    state = train.create_state(LINEAR_STEP, LINEAR, KEY)
    options = {"num_epochs": 1, "batch_size": BATCH, "mode": mode}
    online = train.fit(
        LINEAR_STEP, state, (INPUTS, LABELS), distill.online_loss(3.0, teacher), **options
    )
    offline = train.fit(
        LINEAR_STEP, state, (INPUTS, LABELS, labels), distill.soft_loss(3.0), **options
    )
    np.testing.assert_allclose(online.params["w"], offline.params["w"], rtol=1e-5, atol=1e-6)
    assert np.abs(online.params["w"] - LINEAR["w"]).max() > 1e-3


def numpy_standardized_loss(logits, teacher_logits, temperature, weight):
    def log_softmax(scaled):
        return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))

    def standardized(z):
        centered = np.asarray(z, np.float64) - np.mean(z, axis=1, keepdims=True, dtype=np.float64)
        return log_softmax(centered / np.sqrt((centered**2).mean(1, keepdims=True)) / temperature)

    own, its = standardized(logits), standardized(teacher_logits)
    soft = (np.exp(its) * (its - own)).sum(1)
    hard = -log_softmax(logits.astype(np.float64))[np.arange(len(logits)), LABELS[:6]]
    return (1 - weight) * soft + weight * hard


@pytest.mark.floor
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_standardized_loss_is_the_closed_form(temperature, weight):
    teacher = nets.callable_logits_fn(_product, 3 * LINEAR["w"])
    loss_fn = distill.standardized_loss(temperature, teacher, hard_weight=weight)
    batch = BATCH6._replace(targets=None)
    value = loss_fn(LOGITS, batch)
    assert value.shape == (6,)
    its = INPUTS[:6] @ (3 * LINEAR["w"])
    expected = numpy_standardized_loss(LOGITS, its, temperature, weight)
    np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-6)
    # Outputs may hold more than logits, and numbers are leaves: other ones compile nothing.
    np.testing.assert_array_equal(loss_fn({"logits": LOGITS}, batch), value)
    other = distill.standardized_loss(9.0, teacher, hard_weight=0.5)
    assert jax.tree.structure(loss_fn) == jax.tree.structure(other)


@pytest.mark.floor
def test_standardized_loss_does_not_pull_at_the_logits_scale():
    teacher = nets.callable_logits_fn(_product, LINEAR["w"])

    def loss(scale, weight):
        loss_fn = distill.standardized_loss(2.0, teacher, hard_weight=weight)
        return loss_fn(scale * LOGITS, BATCH6).sum()

    for scale in (0.5, 1.0, 8.0):
        np.testing.assert_allclose(jax.grad(loss)(scale, 0.0), 0.0, atol=1e-5)
        np.testing.assert_allclose(loss(scale, 0.0), loss(1.0, 0.0), rtol=1e-4)
    assert abs(jax.grad(loss)(1.0, 0.5)) > 1e-2


@pytest.mark.floor
def test_no_gradient_flows_into_the_teacher_of_standardized_logits():
    def loss(weights):
        teacher = nets.callable_logits_fn(_product, weights)
        return distill.standardized_loss(2.0, teacher)(LOGITS, BATCH6).sum()

    weights = jnp.asarray(RNG.normal(size=(D, K)), jnp.float32)
    assert float(loss(weights)) != float(loss(weights[:, ::-1]))  # it does listen to it
    np.testing.assert_array_equal(jax.grad(loss)(weights), np.zeros((D, K)))


def test_a_chain_learns_by_standardized_logits(whole):
    states = chain(2, online=True, student_loss=distill.standardized_loss)
    assert_close(states[0].params, whole[0][0].params)
    teacher = train.logits_fn(STEP, states[0])
    loss_fn = distill.standardized_loss(5.0, teacher)
    batch = Batch(INPUTS, LABELS, None, np.ones(N, np.float32))
    before = train.logits_fn(STEP, train.create_state(STEP, HIDDEN, KEY))
    after = train.logits_fn(STEP, states[1])
    assert loss_fn(after(INPUTS), batch).mean() < loss_fn(before(INPUTS), batch).mean()
    with pytest.raises(ValueError, match=r"hard_weight in \[0, 1\], got 2"):
        distill.standardized_loss(1.0, teacher, hard_weight=2)
    with pytest.raises(ValueError, match="temperature > 0, got 0"):
        distill.standardized_loss(0, teacher)


# The loss contract


def test_an_online_chain_is_the_offline_one(whole):
    """With no augmentation the labels of each batch are those made beforehand."""
    for state, reference in zip(chain(3, online=True), whole[0], strict=True):
        assert_close(state.params, reference.params)


def test_a_frozen_teacher_is_generation_0(whole):
    teacher = train.logits_fn(STEP, whole[0][0])
    events = []
    states = chain(2, teacher=teacher, callback=events.append)
    for state, reference in zip(states, whole[0][1:], strict=True):
        assert_close(state.params, reference.params)
    ends = [(e["generation"], e["stage"]) for e in events if e["event"] == "generation"]
    assert ends == [(1, "assistant 1"), (2, "student")]


def featured(params, model_state, inputs, *, train, key):
    del train, key
    hidden = jnp.tanh(inputs @ params["w"])
    return {"logits": hidden @ params["v"], "features": hidden}, model_state


def feature_loss(weight, teacher, outputs, batch):
    own, its = outputs["features"], teacher(batch.inputs)
    soft = losses.cross_entropy(outputs["logits"], batch.labels)
    return soft + weight * jnp.sum((own - jax.lax.stop_gradient(its)) ** 2, axis=1)


def test_a_loss_on_features_beside_the_logits():
    """One SGD step against NumPy."""
    rng = np.random.default_rng(5)
    params = {"w": rng.normal(size=(D, 7)), "v": rng.normal(size=(7, K))}
    params = jax.tree.map(lambda leaf: leaf.astype(np.float32), params)
    goal = rng.normal(size=(D, 7)).astype(np.float32)
    teacher = nets.callable_logits_fn(lambda w, x: jnp.tanh(x @ w), goal)
    loss = jax.tree_util.Partial(feature_loss, jnp.float32(0.5), teacher)
    step = train.make_train_step(featured, optax.sgd(1.0))
    state = train.create_state(step, params, KEY)
    after = train.fit(step, state, (INPUTS, LABELS), loss, num_epochs=1, batch_size=len(LABELS))
    hidden = np.tanh(INPUTS @ params["w"])
    softmax = numpy_softmax(hidden @ params["v"])
    by_logits = softmax - np.eye(K)[LABELS]
    by_hidden = by_logits @ params["v"].T + (hidden - np.tanh(INPUTS @ goal))
    gradients = {
        "v": hidden.T @ by_logits / len(LABELS),
        "w": INPUTS.T @ (by_hidden * (1 - hidden**2)) / len(LABELS),
    }
    for name, gradient in gradients.items():
        np.testing.assert_allclose(
            params[name] - after.params[name], gradient, rtol=1e-4, atol=1e-5
        )
    assert train.predict(train.logits_fn(step, after), INPUTS).shape == (len(INPUTS), K)


def adversarial(apply_fn, params, model_state, batch, loss_fn, keys, axis_name):
    """An objective: the loss where one gradient sign step leads."""

    def total(inputs):
        outputs, _ = apply_fn(params, model_state, inputs, train=True, key=keys)
        return loss_fn(outputs, batch).sum()

    moved = batch.inputs + 0.1 * jnp.sign(jax.lax.stop_gradient(jax.grad(total)(batch.inputs)))
    outputs, model_state = apply_fn(params, model_state, moved, train=True, key=keys)
    return loss_fn(outputs, batch), (outputs, model_state)


@pytest.mark.parametrize("mode", ["jit", "pmap"])
def test_an_objective_that_needs_the_network(mode):
    """One step of a linear network against NumPy, on any number of devices."""
    step = train.make_train_step(linear, optax.sgd(1.0), objective=adversarial)
    state = train.create_state(step, LINEAR, KEY)
    options = {"num_epochs": 1, "batch_size": len(LABELS), "mode": mode}
    after = train.fit(step, state, (INPUTS, LABELS), train.hard_loss(), **options)
    softmax = numpy_softmax(INPUTS @ LINEAR["w"] + LINEAR["b"])
    moved = INPUTS + 0.1 * np.sign((softmax - np.eye(K)[LABELS]) @ np.asarray(LINEAR["w"]).T)
    softmax = numpy_softmax(moved @ LINEAR["w"] + LINEAR["b"])
    gradient = moved.T @ (softmax - np.eye(K)[LABELS]) / len(LABELS)
    np.testing.assert_allclose(LINEAR["w"] - after.params["w"], gradient, rtol=1e-4, atol=1e-5)


# Bad input


def test_what_is_no_chain_is_named():
    one = distill.Generation(step=STEP, params=HIDDEN, num_epochs=1)
    with pytest.raises(ValueError, match=r"one Generation; pass \[generation\]"):
        distill.chain(one, (INPUTS, LABELS), KEY, temperature=1.0)
    with pytest.raises(ValueError, match=r"one temperature, got 2; .*sweep.chain"):
        distill.chain([one], (INPUTS, LABELS), KEY, temperature=[1.0, 20.0])
    with pytest.raises(ValueError, match="teacher_loss"):
        distill.chain([one], (INPUTS, LABELS), KEY, temperature=1.0, teacher_loss=3.0)


@pytest.mark.floor
@pytest.mark.parametrize("temperature", [0.0, -2.0, float("nan"), float("inf")])
def test_a_temperature_that_is_not_above_0_is_named(temperature):
    network = nets.callable_logits_fn(_product, LINEAR["w"])
    for call in (
        lambda: chain(2, temperature=temperature),
        lambda: distill.soft_loss(temperature),
        lambda: distill.online_loss(temperature, network),
        lambda: distill.soft_labels(network, INPUTS, temperature=temperature),
    ):
        with pytest.raises(ValueError, match=f"temperature > 0, got {temperature!r}"):
            call()


@pytest.mark.parametrize("weight", [-0.1, 1.1, float("nan")])
def test_a_hard_weight_outside_0_to_1_is_named(weight):
    for call in (
        lambda: distill.soft_loss(1.0, hard_weight=weight),
        lambda: distill.online_loss(1.0, lambda x: x, hard_weight=weight),
    ):
        with pytest.raises(ValueError, match=rf"hard_weight in \[0, 1\], got {weight!r}"):
            call()


@pytest.mark.floor
def test_chain_refuses_impossible_starts(whole):
    with pytest.raises(ValueError, match="at least one generation, got none"):
        chain(0)
    with pytest.raises(ValueError, match=r"at most 2 states in start .*got 3"):
        chain(2, start=whole[0])
    # With more epochs the teacher would train on, and the assistant has learned from the old one.
    longer = distill.Generation(step=STEP, params=HIDDEN, num_epochs=3)
    with pytest.raises(ValueError, match=r"generation 0 at step 10 of 15; pass start\[:1\]"):
        chain(3, generation=longer, start=whole[0][:2])


def test_soft_loss_without_soft_labels_is_an_error():
    with pytest.raises(ValueError, match=r"soft labels in batch.targets, got None; .*online_loss"):
        distill.soft_loss(2.0)(LOGITS, BATCH6._replace(targets=None))
