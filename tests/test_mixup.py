"""Mixup: its views and losses against NumPy, its laws on padding, devices, and runs, bad input."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdistill import attacks, data, distill, evaluate, nets, parallel, study, sweep, train
from jdistill.typing import Batch

ONE = jax.devices()[:1]
N, D, H, K = 23, 4, 8, 3
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(N, D)).astype(np.float32)
LABELS = RNG.integers(0, K, N).astype(np.int32)
TARGETS = RNG.dirichlet(np.ones(K), N).astype(np.float32)
WEIGHTS = {
    "first": RNG.normal(size=(D, H)).astype(np.float32),
    "second": RNG.normal(size=(H, K)).astype(np.float32),
}
OTHER = RNG.normal(size=(D, K)).astype(np.float32)
KEY = jax.random.key(7)
KEYS = jax.random.split(KEY, N)
# Padding before, between, and after the real rows.
MASK = np.ones(N, np.float32)
MASK[[0, 5, 6, 21, 22]] = 0
REAL = np.flatnonzero(MASK)
TEACHER = nets.callable_logits_fn(lambda w, x: x @ w, OTHER)
LOSSES = {
    "hard": train.hard_loss(2.0),
    "offline": distill.soft_loss(2.0, hard_weight=0.3, temperature_squared=True),
    "online": distill.online_loss(2.0, TEACHER, hard_weight=0.3),
}


def mlp(params, model_state, inputs, *, train, key):
    """A hidden layer with dropout; row i is masked by `key[i]`."""
    hidden = jnp.tanh(inputs @ params["first"])
    if train:
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (H,)))(key)
        hidden = jnp.where(keep, 2 * hidden, 0.0)
    return hidden @ params["second"], model_state


def linear(params, model_state, inputs, *, train, key):
    del train, key
    return inputs @ params["w"], model_state


def batch_of(mask=MASK):
    return Batch(jnp.asarray(INPUTS), jnp.asarray(LABELS), jnp.asarray(TARGETS), jnp.asarray(mask))


def objective_of(alpha, loss_fn, *, mask=MASK, keys=KEYS):
    """The loss of each row, and the views that the network gets."""
    seen = []

    def network(params, model_state, inputs, *, train, key):
        assert train
        seen.append(inputs)
        return inputs @ params, model_state

    batch = batch_of(mask)
    loss, (outputs, _) = train.mixup(alpha)(network, OTHER, {}, batch, loss_fn, keys)
    (view,) = seen
    np.testing.assert_allclose(outputs, view @ OTHER, rtol=1e-5, atol=1e-5)
    return np.asarray(loss, np.float64), np.asarray(view, np.float64)


def partners(mask):
    """By a loop: who comes next among the real rows."""
    real = [row for row in range(len(mask)) if mask[row] > 0]
    found = list(range(len(mask)))
    for place, row in enumerate(real):
        found[row] = real[(place + 1) % len(real)]
    return np.array(found)


def shares_of(view, mask=MASK):
    """λ of each real row, from where its view lies between the two examples; and how far beside."""
    own, its = INPUTS.astype(float), INPUTS[partners(mask)].astype(float)
    rows = np.flatnonzero(mask)
    way = (own - its)[rows]
    shares = ((view - its)[rows] * way).sum(1) / (way**2).sum(1)
    beside = view[rows] - (shares[:, None] * own[rows] + (1 - shares[:, None]) * its[rows])
    return shares, np.abs(beside).max()


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def numpy_loss(kind, view, rows):
    """`LOSSES` of the views with the labels and soft labels of some rows."""
    logits = view @ OTHER.astype(float)
    hard = -log_softmax(logits)[np.arange(len(view)), LABELS[rows]]
    tempered = log_softmax(logits / 2)
    if kind == "hard":
        return -tempered[np.arange(len(view)), LABELS[rows]]
    # Teacher and student of the online loss are one network here.
    targets = TARGETS[rows] if kind == "offline" else np.exp(tempered)
    factor = 4 if kind == "offline" else 1
    return 0.7 * factor * -(targets * tempered).sum(1) + 0.3 * hard


# The view and its loss


@pytest.mark.floor
@pytest.mark.parametrize("kind", LOSSES)
def test_views_and_losses_are_numpys(kind):
    loss, view = objective_of(0.7, LOSSES[kind])
    shares, beside = shares_of(view)
    assert beside < 1e-5
    assert shares.min() > -1e-5
    assert shares.max() < 1 + 1e-5
    assert np.ptp(shares) > 0.5
    own, its = (numpy_loss(kind, view[REAL], rows[REAL]) for rows in (np.arange(N), partners(MASK)))
    np.testing.assert_allclose(loss[REAL], shares * own + (1 - shares) * its, rtol=1e-4, atol=1e-5)
    assert np.abs(own - its).max() > 0.1


@pytest.mark.floor
def test_images_are_mixed_as_vectors_are():
    images = batch_of()._replace(inputs=jnp.asarray(INPUTS).reshape(N, 2, 2, 1))

    def network(params, model_state, inputs, *, train, key):
        assert inputs.shape == (N, 2, 2, 1)
        return inputs.reshape(N, D) @ params, model_state

    loss, _ = train.mixup(0.7)(network, OTHER, {}, images, LOSSES["offline"], KEYS)
    np.testing.assert_allclose(loss, objective_of(0.7, LOSSES["offline"])[0], rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.3, 1.0, 5.0])
def test_shares_are_beta_distributed(alpha):
    """By the mean, the variance, and for alpha = 1 each decile."""
    many = 4000
    inputs = jnp.eye(2)[jnp.arange(many) % 2]  # the view of an even row is (λ, 1 - λ)
    batch = Batch(inputs, jnp.zeros(many, int), None, jnp.ones(many))
    keys = jax.random.split(jax.random.key(1), many)
    _, (view, _) = train.mixup(alpha)(
        lambda params, model_state, inputs, *, train, key: (inputs, model_state),
        *({}, {}, batch, train.hard_loss(), keys),
    )
    shares = np.asarray(view)[np.arange(many), np.arange(many) % 2]
    variance = 1 / (4 * (2 * alpha + 1))
    assert abs(shares.mean() - 0.5) < 4 * np.sqrt(variance / many)
    assert shares.var() == pytest.approx(variance, rel=0.1)
    if alpha == 1:
        deciles = np.histogram(shares, 10, (0, 1))[0] / many
        assert np.abs(deciles - 0.1).max() < 4 * np.sqrt(0.09 / many)


def test_a_share_is_of_the_examples_own_key():
    """It does not depend on where in which batch the example stands."""
    shares, _ = shares_of(objective_of(1.0, LOSSES["hard"])[1])
    order = np.roll(np.arange(N), 4)
    turned = Batch(*(leaf[order] for leaf in batch_of()))
    _, (view, _) = train.mixup(1.0)(
        lambda params, model_state, inputs, *, train, key: (inputs, model_state),
        *({}, {}, turned, LOSSES["hard"], KEYS[order]),
    )
    # The real rows follow each other as before, around the end.
    back = np.argsort(order)
    again, beside = shares_of(np.asarray(view, np.float64)[back])
    assert beside < 1e-5
    np.testing.assert_allclose(again, shares, atol=1e-5)


# Limits


@pytest.mark.parametrize("kind", LOSSES)
def test_a_share_of_one_is_the_plain_loss_and_of_zero_that_of_the_other(kind):
    loss, view = objective_of(1e-6, LOSSES[kind])
    shares, _ = shares_of(view)
    whole, none = REAL[shares > 1 - 1e-6], REAL[shares < 1e-6]
    assert len(whole) + len(none) == len(REAL)
    assert min(len(whole), len(none)) >= 3
    batch = batch_of()
    plain = np.asarray(LOSSES[kind](batch.inputs @ OTHER, batch))
    np.testing.assert_allclose(loss[whole], plain[whole], rtol=1e-5)
    np.testing.assert_allclose(loss[none], plain[partners(MASK)][none], rtol=1e-5)


@pytest.mark.parametrize("kind", LOSSES)
def test_one_real_example_is_the_plain_objective(kind):
    batch = batch_of(np.eye(N, dtype=np.float32)[7])
    states = [
        jax.jit(train.make_train_step(mlp, optax.sgd(1.0), objective=objective))(
            train.create_state(train.make_train_step(mlp, optax.sgd(1.0)), WEIGHTS, KEY),
            batch,
            LOSSES[kind],
        )
        for objective in (None, train.mixup(1.0))
    ]
    (plain, sums), (mixed, mixed_sums) = states
    assert float(mixed_sums["count"]) == 1
    np.testing.assert_allclose(mixed_sums["loss"], sums["loss"], rtol=1e-5)
    for name in WEIGHTS:
        np.testing.assert_allclose(mixed.params[name], plain.params[name], rtol=1e-5, atol=1e-6)
        assert np.abs(plain.params[name] - WEIGHTS[name]).max() > 1e-3


# Padding


@pytest.mark.floor
@pytest.mark.parametrize("kind", LOSSES)
def test_padding_counts_for_nothing(kind):
    """Whatever it holds: the weights after a step and the sums stay the same."""
    step = jax.jit(train.make_train_step(mlp, optax.sgd(1.0), objective=train.mixup(1.0)))
    state = train.create_state(train.make_train_step(mlp, optax.sgd(1.0)), WEIGHTS, KEY)
    after, sums = step(state, batch_of(), LOSSES[kind])
    assert float(sums["count"]) == len(REAL)
    pad = MASK == 0
    for fill in (np.nan, np.inf, 1e6):
        other = Batch(
            np.where(pad[:, None], np.float32(fill), INPUTS),
            np.where(pad, (LABELS + 1) % K, LABELS),
            np.where(pad[:, None], np.float32(fill), TARGETS),
            MASK,
        )
        again, again_sums = step(state, other, LOSSES[kind])
        jax.tree.map(np.testing.assert_array_equal, again_sums, sums)
        jax.tree.map(np.testing.assert_array_equal, again.params, after.params)


def test_a_batch_of_padding_changes_nothing():
    """A device may have no other rows."""
    step = train.make_train_step(mlp, optax.sgd(1.0), objective=train.mixup(1.0))
    state = train.create_state(step, WEIGHTS, KEY)
    after, sums = step(state, batch_of(np.zeros(N, np.float32)), LOSSES["hard"])
    assert float(sums["count"]) == float(sums["loss"]) == 0
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)


# The online teacher


def test_the_teacher_sees_what_the_student_sees_once():
    """After the augmentation; the loss here is how far one view is from the other."""
    calls = []

    def student(params, model_state, inputs, *, train, key):
        return {"logits": inputs @ params, "view": inputs}, model_state

    def teacher(inputs):
        calls.append(inputs.shape)
        return inputs

    def between(outputs, batch):
        return jnp.abs(outputs["view"] - teacher(batch.inputs)).sum(1)

    def from_example(outputs, batch):
        return jnp.abs(outputs["view"] - INPUTS).sum(1)

    def shifted(keys, inputs):
        return inputs + 100 * jax.vmap(lambda key: jax.random.uniform(key, (D,)))(keys)

    step = train.make_train_step(
        student, optax.sgd(1.0), augment=shifted, objective=train.mixup(1.0)
    )
    state = train.create_state(step, OTHER, KEY)
    compiled = jax.jit(step, static_argnums=2)
    assert float(compiled(state, batch_of(), between)[1]["loss"]) == 0
    assert calls == [(N, D)]
    assert float(compiled(state, batch_of(), from_example)[1]["loss"]) > 100 * len(REAL)


# Devices and runs

EXAMPLES = (INPUTS, LABELS, TARGETS)
STEP = train.make_train_step(mlp, train.sgd(0.1), objective=train.mixup(0.7))


def fit(state=None, *, num_epochs=3, kind="offline", **kwargs):
    state = train.create_state(STEP, WEIGHTS, KEY) if state is None else state
    kwargs = {"batch_size": 5, "devices": ONE, **kwargs}
    return train.fit(STEP, state, EXAMPLES, LOSSES[kind], num_epochs=num_epochs, **kwargs)


@pytest.fixture(scope="module")
def whole():
    """An uninterrupted run on one device: its last state, and that of each step."""
    events = []
    state = fit(callback=events.append)
    return state, [event["state"] for event in events if event["event"] == "step"]


def test_it_mixes_at_all(whole):
    plain = train.make_train_step(mlp, train.sgd(0.1))
    state = train.create_state(plain, WEIGHTS, KEY)
    state = train.fit(
        plain, state, EXAMPLES, LOSSES["offline"], num_epochs=3, batch_size=5, devices=ONE
    )
    assert np.abs(np.asarray(state.params["first"]) - whole[0].params["first"]).max() > 0.01


@pytest.mark.parametrize(("mode", "num_devices"), [("jit", 2), ("jit", 8), ("pmap", 1)])
def test_the_number_of_devices_makes_no_difference(whole, mode, num_devices):
    """Nor do the rows that fill a batch of 5 up to 8."""
    state = fit(mode=mode, devices=jax.devices()[:num_devices])
    for name in WEIGHTS:
        np.testing.assert_allclose(state.params[name], whole[0].params[name], rtol=1e-4, atol=1e-6)


def test_under_pmap_each_device_pairs_its_own_rows():
    """One step of 23 rows on 4 devices of 6, against the objective of each device's rows."""
    step = train.make_train_step(linear, optax.sgd(1.0), objective=train.mixup(1.0))
    state = train.create_state(step, {"w": OTHER}, KEY)
    batch = Batch(INPUTS, LABELS, TARGETS, np.ones(N, np.float32))
    compiled = parallel.compile_step(step, "pmap", jax.devices()[:4])
    after, sums = compiled(state, batch, LOSSES["hard"])
    padded = parallel.pad_batch(batch, 4)
    step_key = jax.random.fold_in(KEY, 0)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(step_key, jnp.arange(24))

    def total(params):
        losses = []
        for device in range(4):
            rows = slice(6 * device, 6 * device + 6)
            own = Batch(*(jnp.asarray(leaf[rows]) for leaf in padded))
            loss, _ = train.mixup(1.0)(linear, params, {}, own, LOSSES["hard"], keys[rows])
            losses.append(jnp.sum(loss * own.mask))
        return sum(losses)

    loss, gradient = jax.value_and_grad(total)(state.params)
    np.testing.assert_allclose(sums["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(
        OTHER - np.asarray(after.params["w"]), gradient["w"] / N, rtol=1e-4, atol=1e-6
    )


@pytest.mark.floor
@pytest.mark.parametrize("stopped", [1, 5, 9])
def test_resumed_is_uninterrupted(whole, stopped):
    reference, states = whole
    state = states[stopped - 1]
    assert int(state.step) == stopped
    state = fit(state)
    for leaf, other in zip(
        jax.tree.leaves(state._replace(key=None)),
        jax.tree.leaves(reference._replace(key=None)),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, other)


def test_equal_objectives_share_a_compilation():
    assert train.mixup(1) == train.mixup(1.0) == train.mixup(np.float32(1)) != train.mixup(0.5)
    assert hash(train.mixup(1)) == hash(train.mixup())
    traces = []

    def counted(params, model_state, inputs, *, train, key):
        if train:
            traces.append(inputs.shape)
        return mlp(params, model_state, inputs, train=train, key=key)

    for alpha in (1, 1.0):
        step = train.make_train_step(counted, STEP.optimizer, objective=train.mixup(alpha))
        state = train.create_state(step, WEIGHTS, KEY)
        for loss_fn in (train.hard_loss(1.0), train.hard_loss(30.0)):
            train.fit(step, state, (INPUTS, LABELS), loss_fn, num_epochs=1, batch_size=5)
    assert len(traces) == 1


@pytest.mark.parametrize("vmapped", [False, True])
def test_a_sweep_is_its_runs(vmapped):
    """Teacher and online student of two runs, each with its own views."""
    temperatures, keys = np.float32([1, 20]), jax.random.split(KEY, 2)
    many = distill.Generation(
        step=STEP,
        params=jax.tree.map(lambda leaf: np.stack([leaf, 0.5 * leaf]), WEIGHTS),
        num_epochs=2,
    )
    options = {"batch_size": 8, "devices": ONE, "online": True}
    result = sweep.chain(
        [many] * 2, (INPUTS, LABELS), keys, temperature=temperatures, vmapped=vmapped, **options
    )
    for run in range(2):
        one = distill.Generation(step=STEP, params=nets.index(many.params, run), num_epochs=2)
        states = distill.chain(
            [one] * 2, (INPUTS, LABELS), keys[run], temperature=float(temperatures[run]), **options
        )
        for stack, state in zip(result.states, states, strict=True):
            for name in WEIGHTS:
                np.testing.assert_allclose(
                    nets.index(stack, run).params[name], state.params[name], rtol=2e-3, atol=1e-4
                )


def test_a_study_with_function_matching(tmp_path):
    """Beside the student of the same teacher without mixup."""
    plain = study.Stage(model=nets.digits_net(width=0.1), optimizer=train.sgd(0.1), num_epochs=8)
    objective = train.mixup(1.0)
    mixing = dataclasses.replace(
        plain, make_step=functools.partial(train.make_train_step, objective=objective)
    )
    digits = data.load("digits")
    own = study.Study(
        data=tuple((split.inputs[:48], split.labels[:48]) for split in (digits.train, digits.test)),
        chains={"function matching": [plain, mixing], "plain": [plain, plain]},
        temperatures=(2.0,),
        online=True,
        batch_size=16,
        attacks={"fgsm": evaluate.AttackPlan(functools.partial(attacks.fgsm, eps=0.1), 8)},
        num_sensitivity=8,
    )
    tables = study.run(own, tmp_path / "run", parallel="jit")
    assert {row["chain"] for row in tables.rows["results"]} == set(own.chains)
    found = {
        (network.chain, network.generation): np.asarray(network.logits_fn(digits.test.inputs[:48]))
        for network in study.networks(own, tmp_path / "run")
    }
    np.testing.assert_array_equal(found["function matching", 0], found["plain", 0])
    assert np.abs(found["function matching", 1] - found["plain", 1]).max() > 1e-3


# Bad input


@pytest.mark.parametrize(
    ("alpha", "message"),
    [
        (0.0, "alpha > 0, got 0.0"),
        (-1, "alpha > 0, got -1"),
        (np.nan, "alpha > 0, got nan"),
        (np.inf, "alpha > 0, got inf"),
        ("1", "alpha to be a number, got '1'"),
        ([1.0, 2.0], "alpha"),
    ],
)
def test_what_is_no_alpha_is_named(alpha, message):
    with pytest.raises(ValueError, match=message):
        train.mixup(alpha)


def test_a_traced_alpha_is_named():
    with pytest.raises(ValueError, match=r"alpha to be a number, got a traced value; .*static"):
        jax.jit(lambda alpha: train.mixup(alpha).alpha)(1.0)
