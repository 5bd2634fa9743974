"""Robust distillation: objective and losses against NumPy, their laws, bad input, and a study."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdistill import attacks, data, distill, evaluate, losses, nets, robust, study, sweep, train
from jdistill.typing import Batch

ONE = jax.devices()[:1]
N, D, H, K, EPS = 21, 6, 8, 3, 0.1
RNG = np.random.default_rng(0)
INPUTS = RNG.uniform(0, 1, (N, D)).astype(np.float32)
LABELS = RNG.integers(0, K, N).astype(np.int32)
WEIGHTS = {
    "first": RNG.normal(size=(D, H)).astype(np.float32),
    "second": RNG.normal(size=(H, K)).astype(np.float32),
}
STUDENT, CLEAN, ROBUST = RNG.normal(size=(3, D, K)).astype(np.float32)
KEY = jax.random.key(7)
KEYS = jax.random.split(KEY, N)
PGD = functools.partial(attacks.pgd, eps=EPS, num_steps=3)
FGSM = functools.partial(attacks.fgsm, eps=EPS)


def _product(weights, inputs):
    return inputs @ weights


TEACHERS = tuple(nets.callable_logits_fn(_product, weights) for weights in (CLEAN, ROBUST))
TEACHER = distill.together(TEACHERS)


def linear(params, model_state, inputs, *, train, key):
    del train, key
    return inputs @ params, model_state


def mlp(params, model_state, inputs, *, train, key):
    """A hidden layer with dropout; row i is masked by `key[i]`."""
    hidden = jnp.tanh(inputs @ params["first"])
    if train:
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 0.5, (H,)))(key)
        hidden = jnp.where(keep, 2 * hidden, 0.0)
    return hidden @ params["second"], model_state


def batch_of(num=N):
    return Batch(
        jnp.asarray(INPUTS[:num]), jnp.asarray(LABELS[:num]), None, jnp.ones(num, jnp.float32)
    )


def mtard(**options):
    return functools.partial(robust.two_teachers_loss, **options)


def outputs_of(network, params, loss_fn=None, *, attack=PGD, batch=None, keys=KEYS):
    """The loss of each row and the `Outputs`, of one call of the objective."""
    loss_fn = robust.on_adversarial(train.hard_loss)(1.0) if loss_fn is None else loss_fn
    objective = robust.adversarial(attack)
    loss, (outputs, _) = objective(network, params, {}, batch or batch_of(), loss_fn, keys)
    return loss, outputs


def softmax(logits):
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def cross_entropy(targets, logits):
    return -(targets * np.log(softmax(logits))).sum(-1)


def signed(direction):
    """Where a sign step of `EPS` along a direction leads, in the box."""
    return np.clip(INPUTS.astype(float) + EPS * np.sign(direction), 0, 1)


ONE_HOT = np.eye(K)[LABELS]
# A linear student's cross-entropy climbs along this.
CLIMB = (softmax(INPUTS.astype(float) @ STUDENT) - ONE_HOT) @ STUDENT.astype(float).T


# The losses


@pytest.mark.floor
def test_the_loss_of_two_teachers_is_numpys():
    rng = np.random.default_rng(1)
    z, moved = rng.normal(0, 3, (2, N, K)).astype(np.float32)
    there = rng.uniform(0, 1, (N, D)).astype(np.float32)
    outputs = robust.Outputs(z, moved, there)
    for weight, T, T_clean, T_robust in ((0.5, 1, None, None), (0.2, 3, None, 5), (0.9, 2, 4, 7)):
        loss_fn = robust.two_teachers_loss(
            T,
            TEACHER,
            robust_weight=weight,
            clean_temperature=T_clean,
            robust_temperature=T_robust,
        )
        q = softmax(INPUTS.astype(float) @ CLEAN / (T_clean or T))
        r = softmax(there.astype(float) @ ROBUST / (T_robust or T))
        expected = (1 - weight) * cross_entropy(q, z.astype(float) / T)
        expected += weight * cross_entropy(r, moved.astype(float) / T)
        np.testing.assert_allclose(loss_fn(outputs, batch_of()), expected, rtol=1e-5)


@pytest.mark.floor
def test_a_loss_on_adversarial_outputs_is_the_loss_there():
    rng = np.random.default_rng(2)
    z, moved = rng.normal(0, 3, (2, N, K)).astype(np.float32)
    there = rng.uniform(0, 1, (N, D)).astype(np.float32)
    outputs, batch = robust.Outputs(z, moved, there), batch_of()
    targets = softmax(rng.normal(size=(N, K))).astype(np.float32)
    hard = robust.on_adversarial(train.hard_loss)(2.0)(outputs, batch)
    expected = cross_entropy(ONE_HOT, moved.astype(float) / 2)
    np.testing.assert_allclose(hard, expected, rtol=1e-5)
    offline = robust.on_adversarial(distill.soft_loss)(2.0)
    found = offline(outputs, batch._replace(targets=targets))
    np.testing.assert_allclose(found, cross_entropy(targets, moved.astype(float) / 2), rtol=1e-5)
    online = robust.on_adversarial(distill.online_loss)(2.0, TEACHERS[1])(outputs, batch)
    its = softmax(there.astype(float) @ ROBUST / 2)
    np.testing.assert_allclose(online, cross_entropy(its, moved.astype(float) / 2), rtol=1e-5)


def test_no_gradient_flows_into_teachers():
    loss_fn = robust.two_teachers_loss(2.0, TEACHER)

    def total(loss_fn, params):
        outputs = robust.Outputs(INPUTS @ params, INPUTS @ params, jnp.asarray(INPUTS))
        return jnp.sum(loss_fn(outputs, batch_of()))

    of_teachers, of_student = jax.grad(total, argnums=(0, 1))(loss_fn, jnp.asarray(STUDENT))
    weights = [leaf for leaf in jax.tree.leaves(of_teachers) if leaf.shape == (D, K)]
    assert len(weights) == 2
    assert all(np.all(np.asarray(leaf) == 0) for leaf in weights)
    assert np.abs(of_student).max() > 0.1


# The step


@pytest.mark.floor
@pytest.mark.parametrize(("mode", "num_devices"), [("jit", 1), ("jit", 2), ("jit", 8), ("pmap", 8)])
def test_a_step_is_numpys(mode, num_devices):
    """Of a linear student, whose fast gradient sign is exact, with both teachers."""
    step = train.make_train_step(linear, optax.sgd(1.0), objective=robust.adversarial(FGSM))
    weight, T = 0.3, 2.0
    events = []
    after = train.fit(
        step,
        train.create_state(step, STUDENT, KEY),
        (INPUTS, LABELS),
        robust.two_teachers_loss(T, TEACHER, robust_weight=weight),
        num_epochs=1,
        batch_size=N,
        mode=mode,
        devices=jax.devices()[:num_devices],
        callback=events.append,
    )
    x, there, z = INPUTS.astype(float), signed(CLIMB), STUDENT.astype(float)
    q, r = softmax(x @ CLEAN / T), softmax(there @ ROBUST / T)
    loss = (1 - weight) * cross_entropy(q, x @ z / T) + weight * cross_entropy(r, there @ z / T)
    gradient = (1 - weight) * x.T @ (softmax(x @ z / T) - q)
    gradient += weight * there.T @ (softmax(there @ z / T) - r)
    np.testing.assert_allclose(events[-1]["loss"], loss.mean(), rtol=1e-5)
    assert events[-1]["accuracy"] == pytest.approx(((x @ z).argmax(1) == LABELS).mean())
    found = STUDENT - np.asarray(after.params)
    np.testing.assert_allclose(found, gradient / T / N, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_adversarial_inputs_lie_in_ball_and_box_and_climb(norm):
    attack = functools.partial(attacks.pgd, eps=0.3, norm=norm, num_steps=5)
    loss, outputs = outputs_of(linear, STUDENT, attack=attack)
    there = np.asarray(outputs.adversarial_inputs, np.float64)
    order = np.inf if norm == "linf" else 2
    distance = np.linalg.norm(there - INPUTS, order, axis=1)
    assert distance.max() <= 0.3 + 1e-5
    assert there.min() >= 0
    assert there.max() <= 1
    assert np.median(distance) > 0.2
    np.testing.assert_allclose(outputs.logits, INPUTS @ STUDENT, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs.adversarial_logits, there @ STUDENT, rtol=1e-5, atol=1e-5)
    clean = cross_entropy(ONE_HOT, INPUTS.astype(float) @ STUDENT)
    assert (np.asarray(loss) > clean).all()


def test_no_gradient_flows_through_the_attack():
    """Where a step depends smoothly on the weights, as it does for l2."""
    attack = functools.partial(attacks.pgd, eps=0.3, norm="l2", num_steps=2, random_start=False)
    gradient = jax.grad(lambda w: outputs_of(linear, w, attack=attack)[0].sum())(STUDENT)
    there = np.asarray(outputs_of(linear, STUDENT, attack=attack)[1].adversarial_inputs, float)
    expected = there.T @ (softmax(there @ STUDENT) - ONE_HOT)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-5)


def test_inputs_are_crafted_against_the_student_in_evaluation_mode():
    """And then it sees them, and after them the clean ones, in training mode, dropping apart."""
    modes, seen = [], []

    def noted(params, model_state, inputs, *, train, key):
        modes.append(train)
        if train:
            seen.append((inputs, key))
        return mlp(params, model_state, inputs, train=train, key=key)

    _, outputs = outputs_of(noted, WEIGHTS)
    assert modes[-2:] == [True, True]
    assert not any(modes[:-2])
    (first, first_keys), (second, second_keys) = seen
    np.testing.assert_array_equal(first, outputs.adversarial_inputs)
    np.testing.assert_array_equal(second, INPUTS)
    np.testing.assert_array_equal(jax.random.key_data(second_keys), jax.random.key_data(KEYS))
    assert (jax.random.key_data(first_keys) != jax.random.key_data(KEYS)).any(axis=1).all()

    def network(params, inputs):
        return mlp(params, {}, inputs, train=False, key=None)[0]

    fixed = functools.partial(PGD, random_start=False)
    _, outputs = outputs_of(mlp, WEIGHTS, attack=fixed)
    logits_fn = nets.callable_logits_fn(network, WEIGHTS)
    expected = attacks.maximize(fixed, logits_fn, None, INPUTS, LABELS)
    np.testing.assert_allclose(outputs.adversarial_inputs, expected, atol=1e-6)


def test_random_starts_are_of_the_examples_own_keys():
    attack = functools.partial(attacks.pgd, eps=EPS, num_steps=1, step_size=EPS / 10)
    _, outputs = outputs_of(linear, STUDENT, attack=attack)
    other = jax.random.split(jax.random.key(8), N)
    _, others = outputs_of(linear, STUDENT, attack=attack, keys=other)
    there = np.asarray(outputs.adversarial_inputs)
    assert np.abs(there - others.adversarial_inputs).max() > 1e-3
    rows = np.array([9, 3, 4])
    some = Batch(*(None if leaf is None else leaf[rows] for leaf in batch_of()))
    _, again = outputs_of(linear, STUDENT, attack=attack, batch=some, keys=KEYS[rows])
    np.testing.assert_allclose(again.adversarial_inputs, there[rows], atol=1e-6)


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, inputs, *, train=False):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(inputs)
        return nn.Dense(K, name="logits")(x)


@pytest.mark.parametrize(("mode", "num_devices"), [("jit", 1), ("jit", 8), ("pmap", 2)])
def test_running_statistics_are_of_adversarial_and_then_of_clean_inputs(mode, num_devices):
    """The attack leaves them alone, and uses those from before the step."""
    model = Normalized()
    step = train.make_train_step(
        nets.apply_fn(model), optax.sgd(1.0), objective=robust.adversarial(FGSM)
    )
    params, model_state = nets.init(model, KEY, (D,))
    kernel = np.asarray(params["logits"]["kernel"], float)
    state = train.create_state(step, params, KEY, model_state=model_state)
    loss_fn = robust.on_adversarial(train.hard_loss)(1.0)
    state = train.fit(
        *(step, state, (INPUTS[:16], LABELS[:16]), loss_fn),
        **{"num_epochs": 1, "batch_size": 16, "mode": mode},
        devices=jax.devices()[:num_devices],
    )
    # The running mean is 0 and the deviation 1 at the start, so the network is linear.
    x = INPUTS.astype(float)
    there = signed((softmax(x @ kernel / np.sqrt(1 + 1e-5)) - ONE_HOT) @ kernel.T)[:16]
    mean = state.model_state["batch_stats"]["norm"]["mean"]
    expected = 0.25 * there.mean(0) + 0.5 * x[:16].mean(0)
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-6)


# Runs

STEP = train.make_train_step(mlp, train.sgd(0.1), objective=robust.adversarial(PGD))
EXAMPLES = (INPUTS, LABELS)


def fit(state=None, *, step=STEP, num_epochs=3, loss_fn=None, **kwargs):
    state = train.create_state(step, WEIGHTS, KEY) if state is None else state
    loss_fn = robust.two_teachers_loss(2.0, TEACHER) if loss_fn is None else loss_fn
    kwargs = {"batch_size": 5, "devices": ONE, **kwargs}
    return train.fit(step, state, EXAMPLES, loss_fn, num_epochs=num_epochs, **kwargs)


@pytest.fixture(scope="module")
def whole():
    """An uninterrupted run on one device: its last state, and that of each step."""
    events = []
    state = fit(callback=events.append)
    return state, [event["state"] for event in events if event["event"] == "step"]


def assert_close(state, reference, rtol=1e-4, atol=1e-5):
    for name in WEIGHTS:
        np.testing.assert_allclose(state.params[name], reference.params[name], rtol=rtol, atol=atol)


@pytest.mark.floor
def test_no_radius_and_no_weight_is_plain_online_distillation(whole):
    """To its weights and its loss, dropout included."""
    nowhere = functools.partial(attacks.pgd, eps=0.0, num_steps=1)
    step = train.make_train_step(mlp, train.sgd(0.1), objective=robust.adversarial(nowhere))
    plain = train.make_train_step(mlp, train.sgd(0.1))
    events = {"robust": [], "plain": []}
    state = fit(
        step=step,
        loss_fn=robust.two_teachers_loss(2.0, TEACHER, robust_weight=0.0),
        callback=events["robust"].append,
    )
    reference = fit(
        step=plain,
        loss_fn=distill.online_loss(2.0, TEACHERS[0]),
        callback=events["plain"].append,
    )
    assert_close(state, reference)
    assert events["robust"][-1]["loss"] == pytest.approx(events["plain"][-1]["loss"], rel=1e-5)
    assert events["robust"][-1]["accuracy"] == events["plain"][-1]["accuracy"]
    assert np.abs(whole[0].params["first"] - reference.params["first"]).max() > 1e-3


@pytest.mark.parametrize(("mode", "num_devices"), [("jit", 2), ("jit", 8), ("pmap", 8)])
def test_the_number_of_devices_makes_no_difference(whole, mode, num_devices):
    """Nor do the rows that fill a batch of 5 up to 8."""
    assert_close(fit(mode=mode, devices=jax.devices()[:num_devices]), whole[0])


@pytest.mark.parametrize("stopped", [1, 6])
def test_resumed_is_uninterrupted(whole, stopped):
    reference, states = whole
    state = fit(states[stopped - 1])
    jax.tree.map(np.testing.assert_array_equal, state.params, reference.params)


def test_padding_counts_for_nothing():
    step = jax.jit(STEP)
    state = train.create_state(STEP, WEIGHTS, KEY)
    mask = (np.arange(N) % 4 > 0).astype(np.float32)
    loss_fn = robust.two_teachers_loss(2.0, TEACHER)
    after, sums = step(state, batch_of()._replace(mask=mask), loss_fn)
    filled = np.where(mask[:, None] > 0, INPUTS, np.float32(np.nan))
    again, others = step(
        state, Batch(filled, (LABELS + 1 - mask.astype(int)) % K, None, mask), loss_fn
    )
    assert float(sums["count"]) == mask.sum() < N
    jax.tree.map(np.testing.assert_array_equal, others, sums)
    jax.tree.map(np.testing.assert_array_equal, again.params, after.params)


def test_other_numbers_and_teachers_compile_nothing():
    assert robust.adversarial(PGD) == robust.adversarial(PGD)
    assert hash(robust.adversarial(PGD)) == hash(robust.adversarial(PGD))
    traces = []

    def counted(params, model_state, inputs, *, train, key):
        traces.append(train)
        return mlp(params, model_state, inputs, train=train, key=key)

    optimizer = train.sgd(0.1)
    for number in (1.0, 2.0):
        step = train.make_train_step(counted, optimizer, objective=robust.adversarial(PGD))
        teacher = distill.together(
            [nets.callable_logits_fn(_product, number * weights) for weights in (CLEAN, ROBUST)]
        )
        loss_fn = robust.two_teachers_loss(number, teacher, robust_weight=number / 4)
        state = train.create_state(step, WEIGHTS, KEY)
        train.fit(step, state, EXAMPLES, loss_fn, num_epochs=1, batch_size=5, devices=ONE)
        if number == 1:
            first = traces.count(True)
    assert traces.count(True) == first == 2  # on either kind of input


def generations(params, step=STEP):
    """A clean teacher, a robust one, and the student of both."""
    plain = train.make_train_step(mlp, train.sgd(0.1))
    options = {"params": params, "num_epochs": 2}
    return [
        distill.Generation(step=plain, **options),
        distill.Generation(
            step=step, teachers=(), loss=robust.on_adversarial(train.hard_loss), **options
        ),
        distill.Generation(
            step=step,
            teachers=(0, 1),
            online=True,
            loss=mtard(robust_weight=0.7),
            **options,
        ),
    ]


@pytest.mark.parametrize("vmapped", [False, True])
def test_a_sweep_is_its_chains(vmapped):
    temperatures, keys = np.float32([1, 5]), jax.random.split(KEY, 2)
    stacked = jax.tree.map(lambda leaf: np.stack([leaf, 0.5 * leaf]), WEIGHTS)
    options = {"batch_size": 8, "devices": ONE}
    result = sweep.chain(
        generations(stacked), EXAMPLES, keys, temperature=temperatures, vmapped=vmapped, **options
    )
    for run in range(2):
        alone = generations(nets.index(stacked, run))
        states = distill.chain(
            alone, EXAMPLES, keys[run], temperature=float(temperatures[run]), **options
        )
        for stack, state in zip(result.states, states, strict=True):
            assert_close(nets.index(stack, run), state, rtol=2e-3, atol=1e-4)
        # The last one learned from both: by hand.
        teacher = distill.together([train.logits_fn(STEP, state) for state in states[:2]])
        state = train.create_state(STEP, alone[2].params, jax.random.fold_in(keys[run], 2))
        loss_fn = mtard(robust_weight=0.7)(temperatures[run], teacher)
        state = train.fit(STEP, state, EXAMPLES, loss_fn, num_epochs=2, **options)
        assert_close(states[2], state)


# A study


@pytest.mark.slow
def test_a_student_of_a_clean_and_a_robust_teacher_is_more_robust(tmp_path):
    """On digits: PGD succeeds less often than on the student of the clean teacher alone."""
    digits = data.load("digits")
    craft = functools.partial(attacks.pgd, eps=0.1, num_steps=5)
    stage = functools.partial(
        study.Stage, model=nets.digits_net(width=0.5), optimizer=train.sgd(0.1), num_epochs=20
    )
    make_step = functools.partial(train.make_train_step, objective=robust.adversarial(craft))
    teacher = stage(make_step=make_step, teachers=(), loss=robust.on_adversarial(train.hard_loss))
    student = stage(
        make_step=make_step, teachers=(0, 1), loss=robust.two_teachers_loss, online=True
    )
    judge = functools.partial(attacks.pgd, eps=0.1, num_steps=20, loss=losses.margin)
    own = study.Study(
        data=tuple((part.inputs[:600], part.labels[:600]) for part in (digits.train, digits.test)),
        chains={"two teachers": [stage(), teacher, student], "one": [stage(), stage(online=True)]},
        temperatures=(1.0,),
        batch_size=32,
        attacks={"pgd": evaluate.AttackPlan(judge, 200)},
        num_sensitivity=8,
    )
    tables = study.run(own, tmp_path / "run", parallel="jit")
    found = {(row["chain"], row["generation"]): row for row in tables.rows["results"]}
    both, one = found["two teachers", 2], found["one", 1]
    assert both["test_accuracy"] > 0.7
    assert both["success_rate"] < one["success_rate"] - 0.1
    assert found["two teachers", 1]["success_rate"] < found["two teachers", 0]["success_rate"]


# Bad input


def test_what_is_no_attack_is_named():
    with pytest.raises(ValueError, match="expected a callable, got the text 'pgd' as attack"):
        robust.adversarial("pgd")
    with pytest.raises(ValueError, match="expected a fixed-budget attack"):
        outputs_of(linear, STUDENT, attack=functools.partial(attacks.ddn, num_steps=2))


def test_outputs_of_another_objective_are_named():
    step = train.make_train_step(linear, train.sgd(0.1))
    state = train.create_state(step, STUDENT, KEY)
    message = r"outputs with adversarial logits, got .*; train with .*robust.adversarial\(attack\)"
    for loss_fn in (
        robust.two_teachers_loss(1.0, TEACHER),
        robust.on_adversarial(train.hard_loss)(1.0),
    ):
        with pytest.raises(ValueError, match=message):
            train.fit(step, state, EXAMPLES, loss_fn, num_epochs=1)


@pytest.mark.parametrize("number", [1, 3])
def test_other_than_two_teachers_are_named(number):
    some = TEACHERS[0] if number == 1 else distill.together([*TEACHERS, TEACHERS[0]])
    with pytest.raises(ValueError, match=rf"two networks.* got {number}; pass distill.together"):
        outputs_of(linear, STUDENT, robust.two_teachers_loss(1.0, some))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"robust_weight": 1.5}, r"robust_weight in \[0, 1\], got 1.5"),
        ({"robust_weight": np.nan}, r"robust_weight in \[0, 1\], got nan"),
        ({"clean_temperature": 0.0}, "clean_temperature > 0, got 0.0"),
        ({"robust_temperature": -1}, "robust_temperature > 0, got -1"),
        ({"temperature": 0}, "temperature > 0, got 0"),
        ({"teacher": 3}, "got int as teacher"),
    ],
)
def test_numbers_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        robust.two_teachers_loss(**{"temperature": 1.0, "teacher": TEACHER, **options})


def test_what_is_no_loss_is_named():
    with pytest.raises(ValueError, match="got float as loss"):
        robust.on_adversarial(1.0)
    with pytest.raises(ValueError, match="got int as loss"):
        robust.on_adversarial(lambda T: 3)(1.0)
