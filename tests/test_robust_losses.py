"""Losses of robust training against NumPy in float64, what they climb, and their laws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdistill import _fingerprint, attacks, distill, nets, robust, sweep, train
from jdistill.typing import Batch

N, D, K, EPS = 13, 6, 4, 0.1
RNG = np.random.default_rng(0)
INPUTS = RNG.uniform(0.2, 0.8, (N, D)).astype(np.float32)
LABELS = RNG.integers(0, K, N).astype(np.int32)
ONE_HOT = np.eye(K)[LABELS]
STUDENT, ITS = RNG.normal(0, 2, (2, D, K)).astype(np.float32)
THERE = np.clip(INPUTS + RNG.uniform(-EPS, EPS, (N, D)), 0, 1).astype(np.float32)
KEY = jax.random.key(5)
KEYS = jax.random.split(KEY, N)
FGSM = functools.partial(attacks.fgsm, eps=EPS)
NOWHERE = functools.partial(attacks.pgd, eps=0.0, num_steps=1)
PGD = functools.partial(attacks.pgd, eps=EPS, num_steps=3)


def squashed(weights, inputs):
    """A teacher that is not linear."""
    return jnp.tanh(inputs @ weights) * 3


TEACHER = nets.callable_logits_fn(squashed, ITS)


def teacher(inputs):
    """Likewise in NumPy."""
    return np.tanh(inputs @ ITS.astype(float)) * 3


def linear(params, model_state, inputs, *, train, key):
    del train, key
    return inputs @ params, model_state


def batch_of(mask=None):
    mask = np.ones(N, np.float32) if mask is None else mask
    return Batch(jnp.asarray(INPUTS), jnp.asarray(LABELS), None, jnp.asarray(mask))


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def softmax(logits):
    return np.exp(log_softmax(logits))


def cross_entropy(logits):
    return -(ONE_HOT * log_softmax(logits)).sum(-1)


def kl(target_logits, logits):
    p = log_softmax(target_logits)
    return (np.exp(p) * (p - log_softmax(logits))).sum(-1)


# The published formulas: `(z(x), z(x'), z(2x - x'), x') -> [N]`.
X = INPUTS.astype(float)


def trades(z, moved, _, there):
    return cross_entropy(z / 2) + 4 * kl(z / 2, moved / 2)


def mart(z, moved, _, there):
    p, q = softmax(z), softmax(moved)
    others = np.where(ONE_HOT > 0, -np.inf, q).max(1)
    boosted = -np.log((q * ONE_HOT).sum(1)) - np.log(1 - others)
    return boosted + 5 * kl(z, moved) * (1 - (p * ONE_HOT).sum(1))


def ard(z, moved, _, there):
    return 0.7 * 9 * kl(teacher(X) / 3, moved / 3) + 0.3 * cross_entropy(z)


def iad(z, moved, _, there):
    trust = (softmax(teacher(there)) * ONE_HOT).sum(1) ** 0.4
    return 9 * kl(teacher(X) / 3, moved / 3) + (1 - trust) * kl(z, moved)


def rslad(z, moved, _, there):
    return 5 / 6 * kl(teacher(X), moved) + 1 / 6 * kl(teacher(X), z)


def adaad(z, moved, _, there):
    return 0.9 * kl(teacher(there) / 2, moved / 2) + 0.1 * kl(teacher(X) / 2, z / 2)


def change(moved, reflected, there):
    return kl(teacher(there) - teacher(2 * X - there), moved - reflected)


def igdm(z, moved, reflected, there):
    return kl(teacher(there), moved) + 3 * change(moved, reflected, there)


def igdm_of_ard(z, moved, reflected, there):
    return 9 * kl(teacher(X) / 3, moved / 3) + 3 * change(moved, reflected, there)


def saad(z, moved, reflected, there):
    its = softmax(teacher(there))
    entropy = -(its * np.log(its)).sum(1)
    w = 5 * (entropy - entropy.min())
    attacked = kl(teacher(there), moved) + 2 * change(moved, reflected, there)
    return w * attacked + 0.5 * (1 - w / w.max()) * kl(teacher(X), z)


def low_temperature(z, moved, _, there):
    return -(softmax(teacher(X) / 0.5) * log_softmax(moved)).sum(1)


def low_temperature_trades(z, moved, _, there):
    return -(softmax(teacher(X) / 0.5) * log_softmax(z)).sum(1) + 3 * kl(z, moved)


FORMULAS = {
    "trades": (robust.trades_loss(2.0, weight=4.0), trades),
    "mart": (robust.mart_loss(), mart),
    "ard": (robust.ard_loss(3.0, TEACHER, hard_weight=0.3), ard),
    "iad": (robust.iad_loss(3.0, TEACHER, power=0.4), iad),
    "rslad": (robust.rslad_loss(1.0, TEACHER), rslad),
    "adaad": (robust.adaad_loss(2.0, TEACHER, robust_weight=0.9), adaad),
    "igdm": (robust.igdm_loss(1.0, TEACHER, gradient_weight=3.0), igdm),
    "igdm of ard": (
        robust.igdm_loss(3.0, TEACHER, loss=robust.ard_loss, gradient_weight=3.0),
        igdm_of_ard,
    ),
    "saad": (robust.saad_loss(1.0, TEACHER, gradient_weight=2.0, clean_weight=0.5), saad),
    "low temperature": (robust.low_temperature_loss(0.5, TEACHER), low_temperature),
    "low temperature, TRADES": (
        robust.low_temperature_loss(0.5, TEACHER, trades_weight=3.0),
        low_temperature_trades,
    ),
}
LOSSES = {name: loss_fn for name, (loss_fn, _) in FORMULAS.items()}


def total(loss_fn, logits):
    outputs = robust.Outputs(logits[0], logits[1], jnp.asarray(THERE), logits[2])
    found = loss_fn(outputs, batch_of())
    return jnp.sum(found), found


@pytest.mark.floor
@pytest.mark.parametrize("name", FORMULAS)
def test_a_loss_and_its_gradient_are_numpys(name):
    """The gradient by differences of the formula, in all three passes of the student."""
    loss_fn, formula = FORMULAS[name]
    logits = np.random.default_rng(1).normal(0, 2, (3, N, K)).astype(np.float32)
    (_, found), gradient = jax.value_and_grad(total, argnums=1, has_aux=True)(loss_fn, logits)
    there = THERE.astype(float)
    np.testing.assert_allclose(found, formula(*logits.astype(float), there), rtol=2e-5, atol=1e-6)
    step = 1e-5
    for place in range(3):
        for k in range(K):
            up, down = logits.astype(float), logits.astype(float)
            up[place, :, k] += step
            down[place, :, k] -= step
            slope = (formula(*up, there) - formula(*down, there)) / (2 * step)
            np.testing.assert_allclose(gradient[place, :, k], slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in ("trades", "mart")])
def test_no_gradient_flows_into_the_teacher(name):
    logits = np.random.default_rng(1).normal(0, 2, (3, N, K)).astype(np.float32)
    of_loss = jax.grad(lambda loss_fn: total(loss_fn, logits)[0])(LOSSES[name])
    weights = [leaf for leaf in jax.tree.leaves(of_loss) if leaf.shape == (D, K)]
    assert weights
    assert all(not np.asarray(leaf).any() for leaf in weights)


def outputs_of(params, loss_fn, *, attack=FGSM, batch=None, axis_name=None):
    objective = robust.adversarial(attack)
    batch = batch or batch_of()
    loss, (outputs, _) = objective(linear, params, {}, batch, loss_fn, KEYS, axis_name)
    return loss, outputs


def away_from_itself(there):
    return kl(X @ STUDENT / 2, there @ STUDENT.astype(float) / 2)


def from_corrected(there):
    """SAAD: the label's logit of the teacher follows its tangent."""
    slopes = np.empty_like(X)
    for d in range(D):
        step = np.eye(D)[d] * 1e-6
        slopes[:, d] = ((teacher(X + step) - teacher(X - step)) * ONE_HOT).sum(1) / 2e-6
    tangent = (slopes * (there - X)).sum(1, keepdims=True)
    return kl(teacher(X) + tangent * ONE_HOT, there @ STUDENT.astype(float))


# What the attack climbs, `x' -> [N]`.
CLIMBED = {
    "trades": away_from_itself,
    "mart": lambda there: cross_entropy(there @ STUDENT),
    "ard": lambda there: cross_entropy(there @ STUDENT),
    "iad": lambda there: cross_entropy(there @ STUDENT),
    "rslad": lambda there: kl(teacher(X), there @ STUDENT),
    "adaad": lambda there: kl(teacher(there) / 2, there @ STUDENT / 2),
    "igdm": lambda there: kl(teacher(there), there @ STUDENT),
    "igdm of ard": lambda there: cross_entropy(there @ STUDENT),
    "saad": from_corrected,
    "low temperature, TRADES": lambda there: kl(X @ STUDENT, there @ STUDENT.astype(float)),
    "low temperature": lambda there: (
        -(softmax(teacher(X) / 0.5) * log_softmax(there @ STUDENT)).sum(1)
    ),
}


@pytest.mark.floor
@pytest.mark.parametrize("name", CLIMBED)
def test_the_attack_climbs_what_the_loss_says(name):
    """One sign step from beside the inputs, against differences of the formula."""
    start = (X + 0.3 * EPS * np.random.default_rng(2).choice([-1, 1], X.shape)).astype(np.float32)
    one = functools.partial(
        attacks.pgd, eps=EPS, num_steps=1, step_size=2 * EPS, random_start=False, init=start
    )
    _, outputs = outputs_of(STUDENT, LOSSES[name], attack=one)
    slopes = np.empty_like(X)
    for d in range(D):
        step = np.eye(D)[d] * 1e-5
        slopes[:, d] = CLIMBED[name](start + step) - CLIMBED[name](start - step)
    expected = np.clip(start + 2 * EPS * np.sign(slopes), X - EPS, X + EPS)
    clear = np.abs(slopes) > 1e-3 * np.abs(slopes).max(1, keepdims=True)
    assert clear.mean() > 0.9
    found = np.asarray(outputs.adversarial_inputs)
    np.testing.assert_allclose(found[clear], expected[clear], atol=1e-6)


@pytest.mark.parametrize("name", ["igdm", "saad", "rslad"])
def test_the_reflected_pass_is_made_for_losses_that_ask(name):
    _, outputs = outputs_of(STUDENT, LOSSES[name])
    if name == "rslad":
        assert outputs.reflected_logits is None
        return
    reflected = 2 * X - np.asarray(outputs.adversarial_inputs)
    np.testing.assert_allclose(outputs.reflected_logits, reflected @ STUDENT, rtol=1e-4, atol=1e-5)


# Laws


def fit(loss_fn, *, objective=None, axis=None, **kwargs):
    step = train.make_train_step(linear, optax.sgd(0.3), objective=objective)
    events = []
    state = train.fit(
        step,
        train.create_state(step, STUDENT, KEY),
        (INPUTS, LABELS),
        loss_fn,
        **{"num_epochs": 3, "batch_size": 5, "devices": jax.devices()[:1], **kwargs},
        callback=events.append,
    )
    return np.asarray(state.params), events[-1]


@pytest.mark.floor
def test_trades_of_weight_0_is_ordinary_training():
    found, event = fit(robust.trades_loss(weight=0.0), objective=robust.adversarial(PGD))
    expected, plain = fit(train.hard_loss())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert event["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    other, _ = fit(robust.trades_loss(weight=2.0), objective=robust.adversarial(PGD))
    assert np.abs(other - expected).max() > 1e-2


@pytest.mark.floor
def test_ard_without_an_attack_is_distillation():
    """Up to the entropy of the teacher's labels, which no student changes."""
    found, event = fit(
        robust.ard_loss(4.0, TEACHER, hard_weight=0.2), objective=robust.adversarial(NOWHERE)
    )
    online = functools.partial(distill.online_loss, hard_weight=0.2, temperature_squared=True)
    expected, plain = fit(online(4.0, TEACHER))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    its = softmax(teacher(X) / 4)
    entropy = -(its * np.log(its)).sum(1).mean()
    assert event["loss"] == pytest.approx(plain["loss"] - 0.8 * 16 * entropy, abs=1e-4)


def test_a_student_of_itself_has_nothing_to_learn():
    """RSLAD and ARD without an attack, AdaAD and IGDM wherever the attack leads."""
    itself = nets.callable_logits_fn(lambda weights, inputs: inputs @ weights, STUDENT)
    for loss, attack in (
        (robust.rslad_loss, NOWHERE),
        (robust.ard_loss, NOWHERE),
        (robust.adaad_loss, PGD),
        (robust.igdm_loss, PGD),
    ):
        found, event = fit(loss(1.0, itself), objective=robust.adversarial(attack), num_epochs=1)
        np.testing.assert_allclose(found, STUDENT, atol=1e-5)
        assert event["loss"] == pytest.approx(0, abs=1e-5)
    _, event = fit(robust.rslad_loss(1.0, itself), objective=robust.adversarial(PGD), num_epochs=1)
    assert event["loss"] > 1e-3


@pytest.mark.parametrize(("mode", "num_devices"), [("jit", 1), ("jit", 8), ("pmap", 8)])
def test_a_step_at_perturbed_weights_is_numpys(mode, num_devices):
    """Of all rows together, on however many devices they lie."""
    share = 0.05
    found, event = fit(
        robust.on_adversarial(train.hard_loss)(1.0),
        objective=robust.adversarial(FGSM, weight_perturbation=share),
        num_epochs=1,
        batch_size=N,
        mode=mode,
        devices=jax.devices()[:num_devices],
    )
    weights = STUDENT.astype(float)

    def gradient(there, at):
        return there.T @ (softmax(there @ at) - ONE_HOT) / N

    climb = (softmax(X @ weights) - ONE_HOT) @ weights.T
    there = np.clip(X + EPS * np.sign(climb), 0, 1)
    up = gradient(there, weights)
    moved = weights + share * np.linalg.norm(weights) * up / np.linalg.norm(up)
    expected = weights - 0.3 * gradient(there, moved)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert event["loss"] == pytest.approx(cross_entropy(there @ moved).mean(), rel=1e-4)
    assert np.abs(gradient(there, moved) - up).max() > 1e-2


def test_biases_are_not_perturbed():
    def biased(params, model_state, inputs, *, train, key):
        del train, key
        return inputs @ params["kernel"] + params["bias"][None], model_state

    seen = []

    def noted(params, model_state, inputs, *, train, key):
        seen.append(params)
        return biased(params, model_state, inputs, train=train, key=key)

    params = {"kernel": jnp.asarray(STUDENT), "bias": jnp.ones(K)}
    objective = robust.adversarial(FGSM, weight_perturbation=0.1)
    objective(noted, params, {}, batch_of(), robust.trades_loss(), KEYS)
    np.testing.assert_array_equal(seen[-1]["bias"], params["bias"])
    moved = np.linalg.norm(seen[-1]["kernel"] - params["kernel"])
    assert moved == pytest.approx(0.1 * np.linalg.norm(STUDENT), rel=1e-4)


@pytest.mark.parametrize(("mode", "num_devices"), [("jit", 8), ("pmap", 8)])
@pytest.mark.parametrize("name", ["saad", "igdm", "adaad"])
def test_the_number_of_devices_makes_no_difference(name, mode, num_devices):
    """Nor do the rows that fill a batch of 5 up to 8: SAAD's weights are of the whole batch."""
    expected, _ = fit(LOSSES[name], objective=robust.adversarial(PGD))
    found, _ = fit(
        LOSSES[name],
        objective=robust.adversarial(PGD),
        mode=mode,
        devices=jax.devices()[:num_devices],
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_padding_counts_for_nothing(name):
    step = train.make_train_step(linear, optax.sgd(1.0), objective=robust.adversarial(PGD))
    state = train.create_state(step, STUDENT, KEY)
    mask = (np.arange(N) % 4 > 0).astype(np.float32)
    after, sums = jax.jit(step)(state, batch_of(mask), LOSSES[name])
    filled = np.where(mask[:, None] > 0, INPUTS, np.float32(np.nan))
    other = Batch(filled, (LABELS + 1 - mask.astype(int)) % K, None, mask)
    again, others = jax.jit(step)(state, other, LOSSES[name])
    assert 0 < float(sums["count"]) < N
    np.testing.assert_allclose(again.params, after.params, atol=1e-6)
    assert float(others["loss"]) == pytest.approx(float(sums["loss"]), rel=1e-5)


@pytest.mark.parametrize("confident", [20.0, 200.0])
def test_losses_are_finite_where_predictions_are_certain(confident):
    """Right and wrong ones, with finite gradients: MART's complement of 1 above all."""
    right = confident * np.eye(K, dtype=np.float32)[LABELS]
    wrong = np.roll(right, 1, axis=1)
    for z, moved in ((right, right), (right, wrong), (wrong, wrong)):
        for name, loss_fn in LOSSES.items():
            logits = np.stack([z, moved, z])
            (_, found), gradient = jax.value_and_grad(total, argnums=1, has_aux=True)(
                loss_fn, logits
            )
            assert np.isfinite(found).all(), name
            assert np.isfinite(gradient).all(), name


@pytest.mark.parametrize("name", ["rslad_loss", "adaad_loss", "igdm_loss", "saad_loss", "iad_loss"])
@pytest.mark.parametrize("vmapped", [False, True])
def test_a_sweep_of_robust_chains_is_its_chains(name, vmapped):
    """Teacher by TRADES, assistant and student by the loss; two runs as one program."""
    step = train.make_train_step(linear, optax.sgd(0.1), objective=robust.adversarial(PGD))

    def generations(params):
        options = {"step": step, "params": params, "num_epochs": 2}
        loss = getattr(robust, name)
        teacher = distill.Generation(loss=robust.trades_loss, **options)
        student = distill.Generation(loss=loss, online=True, **options)
        return [teacher, student, student]

    temperatures, keys = np.float32([1, 3]), jax.random.split(KEY, 2)
    stacked = np.stack([STUDENT, 0.5 * STUDENT])
    options = {"batch_size": 8, "devices": jax.devices()[:1]}
    result = sweep.chain(
        generations(stacked),
        (INPUTS, LABELS),
        keys,
        temperature=temperatures,
        vmapped=vmapped,
        **options,
    )
    for run in range(2):
        states = distill.chain(
            generations(stacked[run]),
            (INPUTS, LABELS),
            keys[run],
            temperature=float(temperatures[run]),
            **options,
        )
        for stack, state in zip(result.states, states, strict=True):
            np.testing.assert_allclose(stack.params[run], state.params, rtol=2e-3, atol=1e-4)
        # Each has learned something other than the one before.
        assert np.abs(states[1].params - states[0].params).max() > 1e-3


def test_other_numbers_are_other_losses():
    def fingerprint(loss_fn):
        return _fingerprint.fingerprint(_fingerprint.describe(loss_fn))

    found = {fingerprint(loss_fn) for loss_fn in LOSSES.values()}
    assert len(found) == len(LOSSES)
    same = robust.rslad_loss(1.0, TEACHER, robust_weight=0.5)
    assert fingerprint(same) == fingerprint(robust.rslad_loss(1.0, TEACHER, robust_weight=0.5))
    assert fingerprint(same) != fingerprint(LOSSES["rslad"])


@pytest.mark.parametrize("confident", [10.0, 16.0, 18.0, 40.0, 80.0])
def test_mart_is_exact_where_a_wrong_class_is_certain(confident):
    """Its loss and gradient, against float64 from the logits' exponentials."""
    z = np.zeros((1, 3))
    z[0, 1] = confident
    batch = Batch(jnp.zeros((1, 2)), jnp.array([0]), None, jnp.ones(1))

    def loss(moved):
        outputs = robust.Outputs(jnp.zeros((1, 3)), moved, jnp.zeros((1, 2)))
        return robust.mart_loss(weight=0.0)(outputs, batch)[0]

    found, gradient = jax.value_and_grad(loss)(jnp.asarray(z, jnp.float32))
    powers = np.exp(z[0] - confident)
    total = powers.sum()
    expected = -np.log(powers[0] / total) - np.log((powers[0] + powers[2]) / total)
    assert float(found) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient[0], [-1.5, 2, -0.5], atol=2e-3)


def test_igdm_leaves_the_attack_its_own_loss_where_the_other_one_does():
    def towards_the_first(logits, labels):
        del labels
        return logits[:, 0]

    attack = functools.partial(attacks.fgsm, eps=EPS, loss=towards_the_first)
    found = [
        outputs_of(STUDENT, loss_fn, attack=attack)[1].adversarial_inputs
        for loss_fn in (
            robust.ard_loss(1.0, TEACHER),
            robust.igdm_loss(1.0, TEACHER, loss=robust.ard_loss),
        )
    ]
    np.testing.assert_array_equal(*found)
    expected = np.clip(X + EPS * np.sign(STUDENT[:, 0].astype(float)), 0, 1)
    np.testing.assert_allclose(found[0], expected, atol=1e-6)


# Bad input


def test_an_attack_that_would_not_climb_the_loss_is_named():
    bound = functools.partial(PGD, loss=lambda logits, labels: logits[:, 0])
    with pytest.raises(ValueError, match="an attack without a loss of its own, got PGD other"):
        outputs_of(STUDENT, LOSSES["rslad"], attack=bound)
    with pytest.raises(ValueError, match=r"an attack that takes a loss, got .*; pass one such as"):
        outputs_of(STUDENT, LOSSES["trades"], attack=functools.partial(attacks.square, eps=EPS))


def test_a_loss_of_another_kind_within_igdm_is_named():
    with pytest.raises(ValueError, match=r"loss to take \(temperature, teacher\), got one that"):
        robust.igdm_loss(1.0, TEACHER, loss=train.hard_loss)


def test_a_robust_loss_within_on_adversarial_is_named():
    loss_fn = robust.on_adversarial(robust.rslad_loss)(1.0, TEACHER)
    with pytest.raises(ValueError, match="as they are, not within on_adversarial"):
        outputs_of(STUDENT, loss_fn)


@pytest.mark.parametrize("name", ["ard", "rslad", "igdm", "saad", "low temperature"])
def test_several_teachers_are_named(name):
    both = distill.together([TEACHER, TEACHER])
    loss = {"low temperature": "low_temperature_loss"}.get(name, f"{name}_loss")
    with pytest.raises(ValueError, match="expected one teacher, got 2 together; name one"):
        outputs_of(STUDENT, getattr(robust, loss)(1.0, both))


@pytest.mark.parametrize("name", LOSSES)
def test_outputs_of_another_objective_are_named(name):
    step = train.make_train_step(linear, optax.sgd(0.1))
    state = train.create_state(step, STUDENT, KEY)
    with pytest.raises(ValueError, match=r"train with .*robust.adversarial\(attack\)"):
        train.fit(step, state, (INPUTS, LABELS), LOSSES[name], num_epochs=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: robust.trades_loss(0.0), "temperature > 0, got 0.0"),
        (lambda: robust.trades_loss(weight=-1.0), "weight >= 0, got -1.0"),
        (lambda: robust.mart_loss(weight=np.nan), "weight >= 0, got nan"),
        (lambda: robust.ard_loss(1.0, 3), "got int as teacher"),
        (lambda: robust.ard_loss(1.0, TEACHER, hard_weight=2), r"hard_weight in \[0, 1\], got 2"),
        (lambda: robust.iad_loss(1.0, TEACHER, power=-1), "power >= 0, got -1"),
        (lambda: robust.rslad_loss(1.0, TEACHER, robust_weight=-0.1), "robust_weight in"),
        (lambda: robust.igdm_loss(1.0, TEACHER, loss=3), "got int as loss"),
        (lambda: robust.saad_loss(1.0, TEACHER, entropy_scale=-1), "entropy_scale >= 0"),
        (lambda: robust.adversarial(FGSM, weight_perturbation=-1), "weight_perturbation"),
        (lambda: robust.adversarial(FGSM, weight_perturbation="a"), "weight_perturbation"),
    ],
)
def test_numbers_out_of_range_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
