"""What a generation learns from: its teachers, its loss, its temperature; against `train.fit`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import distill, nets, sweep, train
from jdistill.typing import Batch
from tests.test_distill import INPUTS, KEY, LABELS, OPTIONS, RNG, K, assert_close, assert_equal
from tests.tiny import double_precision

D, H = INPUTS.shape[1], 6


def network(params, model_state, inputs, *, train, key):
    """Two heads and a hidden layer, as a transformer with a distillation token has them."""
    hidden = jnp.tanh(inputs @ params["first"])
    one, other = hidden @ params["class"], hidden @ params["distillation"]
    heads = {"class_logits": one, "distillation_logits": other}
    return {"logits": (one + other) / 2, **heads, "features": {"hidden": hidden}}, model_state


PARAMS = {
    "first": RNG.normal(size=(D, H)).astype(np.float32),
    "class": RNG.normal(size=(H, K)).astype(np.float32),
    "distillation": RNG.normal(size=(H, K)).astype(np.float32),
}
STEP = train.make_train_step(network, train.sgd(0.3))
EXAMPLES = INPUTS, LABELS
ONE_HOT = np.eye(K, dtype=np.float32)[LABELS]


def generation(num_epochs=2, **lesson):
    return distill.Generation(step=STEP, params=PARAMS, num_epochs=num_epochs, **lesson)


def chain(*generations, temperature=5.0, **options):
    return distill.chain(generations, EXAMPLES, KEY, temperature=temperature, **OPTIONS, **options)


def fit(number, targets, loss_fn, num_epochs=2, state=None):
    """What generation `number` of a chain is, by the training loop alone."""
    if state is None:
        state = train.create_state(STEP, PARAMS, jax.random.fold_in(KEY, number))
    examples = (*EXAMPLES, targets)
    return train.fit(STEP, state, examples, loss_fn, num_epochs=num_epochs, **OPTIONS)


def labels_at(state, temperature):
    return distill.soft_labels(train.logits_fn(STEP, state), INPUTS, temperature=temperature)


@pytest.fixture(scope="module")
def teacher():
    return fit(0, ONE_HOT, distill.soft_loss(5.0))


@pytest.fixture(scope="module")
def other():
    """A second teacher: generation 1, from the labels alone."""
    return fit(1, ONE_HOT, distill.soft_loss(5.0))


def test_a_chain_without_assistants_is_plain_distillation(teacher):
    first, student = chain(generation(), generation())
    assert_equal(first, teacher)
    assert_equal(student, fit(1, labels_at(teacher, 5.0), distill.soft_loss(5.0)))


def test_a_generation_without_teachers_learns_from_the_labels(teacher, other):
    first, second = chain(generation(), generation(teachers=()))
    assert_equal(first, teacher)
    assert_equal(second, other)


def test_several_teachers_label_by_the_mean(teacher, other):
    states = chain(generation(), generation(teachers=()), generation(teachers=(0, 1)))
    labels = [labels_at(state, 5.0) for state in (teacher, other)]
    assert_equal(states[2], fit(2, (labels[0] + labels[1]) / 2, distill.soft_loss(5.0)))


def test_several_online_teachers_are_one_teacher(teacher, other):
    states = chain(generation(), generation(teachers=()), generation(teachers=(1, 0), online=True))
    labels = [labels_at(state, 5.0) for state in (teacher, other)]
    reference = fit(2, (labels[0] + labels[1]) / 2, distill.soft_loss(5.0))
    assert_close(states[2].params, reference.params)


def test_a_student_of_the_teacher_and_not_of_the_assistant(teacher):
    *_, student = chain(generation(), generation(), generation(teachers=(0,)))
    assert_equal(student, fit(2, labels_at(teacher, 5.0), distill.soft_loss(5.0)))


def test_a_generation_has_its_own_loss(teacher):
    loss = functools.partial(distill.hard_label_loss, hard_weight=0.25)
    *_, student = chain(generation(), generation(loss=loss))
    assert_equal(student, fit(1, labels_at(teacher, 5.0), loss(5.0)))


def test_the_first_generation_has_its_own_loss():
    (state,) = chain(generation(loss=lambda T: train.hard_loss(2 * T)))
    assert_equal(state, fit(0, ONE_HOT, train.hard_loss(10.0)))


@pytest.mark.parametrize("online", [False, True])
def test_one_generation_is_online_and_another_not(teacher, online):
    """In a chain that is the other of the two."""
    _, _, student = chain(
        generation(), generation(), generation(teachers=(0,), online=online), online=not online
    )
    reference = fit(2, labels_at(teacher, 5.0), distill.soft_loss(5.0))
    assert_close(student.params, reference.params)


def test_online_losses_see_all_outputs_of_the_teacher(teacher):
    def loss(temperature, network):
        def hint(network, outputs, batch):
            its = network(batch.inputs)["features"]["hidden"]
            return jnp.mean(jnp.square(outputs["features"]["hidden"] - its), axis=-1)

        return jax.tree_util.Partial(hint, network)

    *_, student = chain(generation(), generation(num_epochs=40, loss=loss, online=True))
    hidden = [np.tanh(INPUTS @ np.asarray(state.params["first"])) for state in (teacher, student)]
    start = np.tanh(INPUTS @ PARAMS["first"])
    assert np.abs(hidden[1] - hidden[0]).mean() < 0.5 * np.abs(start - hidden[0]).mean()


# Temperature


def test_a_schedule_sets_the_temperature_of_each_epoch(teacher):
    *_, student = chain(generation(), generation(3, temperature_schedule=distill.annealed))
    state = None
    for epoch, temperature in enumerate((5.0, 3.0, 1.0)):
        labels, loss = labels_at(teacher, temperature), distill.soft_loss(temperature)
        state = fit(1, labels, loss, num_epochs=epoch + 1, state=state)
    assert_equal(student, state)


@pytest.mark.parametrize("online", [False, True])
def test_a_schedule_goes_on_where_it_was(online):
    stages = [generation(), generation(3, temperature_schedule=distill.annealed)]
    saved, events = [], []

    def stop_later(event):
        events.append(event)
        saved.append(event["state"])

    whole = chain(*stages, online=online, callback=stop_later)
    states = [e["state"] for e in events if e["event"] == "step" and e["generation"] == 1]
    assert len(states) == 15  # three epochs of five steps
    # In the middle of the second epoch, and at its end.
    for state in (states[6], states[9]):
        assert_equal(chain(*stages, online=online, start=[whole[0], state])[1], whole[1])


def test_events_of_a_schedule_are_those_of_the_whole_generation():
    events = []
    chain(
        generation(), generation(3, temperature_schedule=distill.annealed), callback=events.append
    )
    epochs = [e for e in events if e["event"] == "epoch" and e["generation"] == 1]
    assert [(e["epoch"], e["num_epochs"], e["step"], e["num_steps"]) for e in epochs] == [
        (1, 3, 5, 15),
        (2, 3, 10, 15),
        (3, 3, 15, 15),
    ]


def test_annealed_falls_to_one_in_equal_steps():
    found = [distill.annealed(9.0, progress) for progress in np.linspace(0, 1, 5)]
    np.testing.assert_allclose(found, [9, 7, 5, 3, 1])


# Sweeps


LESSONS = {
    "from two": {"teachers": (0, 1)},
    "from two, online": {"teachers": (0, 1), "online": True},
    "hard labels": {"loss": distill.hard_label_loss, "teachers": (0,)},
    "annealed": {"temperature_schedule": distill.annealed},
    "through the token": {
        "loss": distill.through_token(distill.online(distill.soft_loss)),
        "online": True,
    },
}


@pytest.mark.parametrize("name", LESSONS)
def test_a_sweep_teaches_as_a_chain_does(name):
    temperatures = (1.0, 5.0)
    stages = [generation(), generation(teachers=()), generation(**LESSONS[name])]
    stacked = [
        distill.Generation(**{**vars(stage), "params": nets.stack([PARAMS] * len(temperatures))})
        for stage in stages
    ]
    keys = jnp.stack([KEY] * len(temperatures))
    found = sweep.chain(
        stacked, EXAMPLES, keys, temperature=np.asarray(temperatures), **OPTIONS
    ).states
    for place, temperature in enumerate(temperatures):
        states = chain(*stages, temperature=temperature)
        for stack, state in zip(found, states, strict=True):
            assert_close(nets.index(stack, place).params, state.params)


# The losses


def softmax(logits):
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def cross_entropy(logits, classes):
    return -np.log(softmax(logits))[np.arange(len(classes)), classes]


def batch_and_heads(size=7):
    rng = np.random.default_rng(3)
    labels, targets = rng.integers(0, K, size), softmax(3 * rng.normal(size=(size, K)))
    one, other = (2 * rng.normal(size=(size, K)) for _ in range(2))
    batch = Batch(rng.normal(size=(size, D)), labels, targets, np.ones(size))
    return batch, {"logits": (one + other) / 2, "class_logits": one, "distillation_logits": other}


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_hard_label_loss_in_numpy(weight):
    batch, outputs = batch_and_heads()
    logits = outputs["logits"]
    predicted = batch.targets.argmax(-1)
    expected = (1 - weight) * cross_entropy(logits, predicted)
    expected += weight * cross_entropy(logits, batch.labels)
    with double_precision():
        for temperature in (1.0, 20.0):
            loss = distill.hard_label_loss(temperature, hard_weight=weight)(logits, batch)
            np.testing.assert_allclose(loss, expected, rtol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_each_head_of_a_token_has_its_own_teacher(weight):
    batch, outputs = batch_and_heads()
    hard = cross_entropy(outputs["class_logits"], batch.labels)
    predicted = cross_entropy(outputs["distillation_logits"], batch.targets.argmax(-1))
    soft = -9.0 * (batch.targets * np.log(softmax(outputs["distillation_logits"] / 3))).sum(-1)
    squared = functools.partial(distill.soft_loss, temperature_squared=True)
    with double_precision():
        for inner, expected in ((distill.hard_label_loss, predicted), (squared, soft)):
            loss = distill.through_token(inner, hard_weight=weight)(3.0)(outputs, batch)
            np.testing.assert_allclose(loss, (1 - weight) * expected + weight * hard, rtol=1e-6)


def test_no_head_learns_what_is_the_others():
    batch, outputs = batch_and_heads()
    heads = {name: jnp.asarray(outputs[name], jnp.float32) for name in outputs}
    batch = Batch(*(jnp.asarray(column) for column in batch))
    grad = jax.grad(
        lambda heads, weight: distill.through_token(distill.hard_label_loss, hard_weight=weight)(
            1.0
        )(heads, batch).sum()
    )
    for weight, idle in ((0.0, "class_logits"), (1.0, "distillation_logits")):
        found = grad(heads, weight)
        assert not np.any(found[idle])
        assert not np.any(found["logits"])
        assert all(np.any(found[name]) for name in heads if name not in (idle, "logits"))


def teacher_network(weights, inputs):
    return inputs @ weights


@pytest.mark.parametrize("loss", [distill.soft_loss, distill.hard_label_loss])
@pytest.mark.parametrize("count", [1, 2])
def test_an_online_loss_is_the_offline_one_with_the_teachers_labels(loss, count):
    batch, outputs = batch_and_heads()
    rng = np.random.default_rng(4)
    weights = [rng.normal(size=(D, K)) for _ in range(count)]
    labels = np.mean([softmax(batch.inputs @ each / 5) for each in weights], axis=0)
    with double_precision():
        networks = [nets.callable_logits_fn(teacher_network, jnp.asarray(w)) for w in weights]
        network = networks[0] if count == 1 else distill.together(networks)
        found = distill.online(loss)(5.0, network)(outputs, batch._replace(targets=None))
        expected = loss(5.0)(outputs, batch._replace(targets=labels))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_no_gradient_flows_into_an_online_teacher():
    batch, outputs = batch_and_heads()
    logits = jnp.asarray(outputs["logits"], jnp.float32)
    batch = Batch(*(jnp.asarray(column) for column in batch))

    def total(weights):
        network = nets.callable_logits_fn(teacher_network, weights)
        return distill.online(distill.soft_loss)(5.0, network)(logits, batch).sum()

    assert not np.any(jax.grad(total)(jnp.ones((D, K))))


def test_wrapped_losses_are_values():
    once, again = (distill.through_token(distill.online(distill.hard_label_loss)) for _ in range(2))
    assert jax.tree.structure(once(1.0, teacher_network)) == jax.tree.structure(
        again(5.0, teacher_network)
    )
    traces = []

    @jax.jit
    def value(loss_fn, outputs, batch):
        traces.append(1)
        return loss_fn(outputs, batch)

    batch, outputs = batch_and_heads()
    for temperature in (1.0, 5.0):
        network = nets.callable_logits_fn(teacher_network, jnp.full((D, K), temperature))
        value(once(temperature, network), outputs, batch._replace(targets=None))
    assert len(traces) == 1


# Bad input


@pytest.mark.parametrize(
    ("lesson", "message"),
    [
        ({"teachers": (1,)}, "expected teachers of generation 1 to be different earlier ones"),
        ({"teachers": (0, 0)}, "different earlier ones"),
        ({"teachers": (-1,)}, "expected teachers"),
        ({"teachers": 0}, "expected teachers"),
        ({"loss": 3.0}, "as loss; pass a function"),
        ({"online": "yes"}, "expected online"),
        ({"teachers": (), "online": True}, "expected online only of a generation with teachers"),
        ({"temperature_schedule": 3.0}, "as temperature_schedule; pass a function"),
        ({"temperature_schedule": lambda T, progress: -1.0}, "expected temperature_schedule > 0"),
        ({"loss": distill.through_token(lambda T: 3)}, "as student_loss; pass a function"),
    ],
)
def test_bad_lessons(lesson, message):
    with pytest.raises(ValueError, match=message):
        chain(generation(), generation(**lesson))


def test_the_first_generation_has_no_teachers():
    with pytest.raises(ValueError, match="expected no teachers for the first generation"):
        chain(generation(teachers=(0,)))


def test_a_loss_through_the_token_wants_two_heads():
    batch, outputs = batch_and_heads()
    loss = distill.through_token(distill.soft_loss)(1.0)
    for given in (outputs["logits"], {"logits": outputs["logits"]}):
        with pytest.raises(ValueError, match="expected outputs with class_logits and distillation"):
            loss(given, batch)


def test_losses_of_labels_want_labels():
    batch, outputs = batch_and_heads()
    with pytest.raises(ValueError, match="expected soft labels in batch"):
        distill.hard_label_loss(1.0)(outputs["logits"], batch._replace(targets=None))
