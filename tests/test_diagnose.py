"""The masking verdict on known cases: small networks that mask, and that do not."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdistill import attacks, data, diagnose, distill, losses, nets, train

EPS, SIZE, KEY = 0.1, 60, jax.random.key(7)
DIGITS = data.load("digits")
INPUTS, LABELS = (column[:SIZE] for column in DIGITS.test)
SCALE, LEVELS = 1000.0, 8.0
# A ripple this flat changes no prediction, and so steep that it hides the slope beneath.
HEIGHT, FREQUENCY = 0.01, 700.0


class Dense(nn.Module):
    """A network of two layers, so that what is tried on it costs next to nothing."""

    @nn.compact
    def __call__(self, inputs):
        hidden = nn.relu(nn.Dense(64)(inputs.reshape(inputs.shape[0], -1) - 0.5))
        return nn.Dense(10)(hidden)


MODEL = Dense()
STEP = train.make_train_step(nets.apply_fn(MODEL), optax.adam(0.02))


def quantize(levels, inputs):
    """The inputs rounded to so many steps; untouched for 0."""
    return jnp.where(levels > 0, jnp.round(inputs * levels) / jnp.maximum(levels, 1), inputs)


def add_noise(height, key, inputs):
    """A ripple whose phase is random for every pixel."""
    phase = jax.random.uniform(key, inputs.shape, maxval=2 * jnp.pi)
    return inputs + height * jnp.sin(FREQUENCY * inputs + phase)


def add_own_noise(height, inputs):
    """Noise that the bits of each input decide: fresh for every input, and yet a pure function."""

    def one(x):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32).ravel()
        # Each place counts differently, so that pixels which change places change the draw.
        mixed = jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1))
        return add_noise(height, jax.random.key(mixed), x)

    return jax.lax.cond(height > 0, jax.vmap(one), lambda x: x, inputs)


def defended(network, scale, levels, height, inputs):
    """One function for all cases, so that they share their compiled attacks."""
    return scale * network(add_own_noise(height, quantize(levels, inputs)))


def case(network, *, scale=1.0, levels=0.0, height=0.0):
    numbers = [jnp.float32(number) for number in (scale, levels, height)]
    return nets.callable_logits_fn(defended, network, *numbers)


def adversarially_trained(params):
    """Trained on PGD examples of itself alone."""
    state = train.create_state(STEP, params, jax.random.key(3))
    compiled = jax.jit(STEP)
    for epoch in range(8):
        order = np.random.default_rng(epoch).permutation(len(DIGITS.train.labels))
        for batch in data.batches(*DIGITS.train, batch_size=64, order=order):
            found = attacks.pgd(
                train.logits_fn(STEP, state),
                jax.random.fold_in(jax.random.key(4), state.step),
                batch.inputs,
                batch.labels,
                eps=0.15,
                num_steps=5,
                step_size=0.05,
            )
            targets = np.eye(10, dtype=np.float32)[batch.labels]
            batch = batch._replace(inputs=found.inputs, targets=targets)
            state, _ = compiled(state, batch, distill.soft_loss(1.0))
    return state


@pytest.fixture(scope="module")
def cases():
    """Networks that hide nothing, a student at T = 100, and three planted maskers, stacked."""
    params, _ = nets.init(MODEL, jax.random.key(0), (8, 8, 1))

    def last(temperature, num_epochs, count):
        generation = distill.Generation(step=STEP, params=params, num_epochs=num_epochs)
        return distill.chain(
            [generation] * count, DIGITS.train, jax.random.key(1), temperature=temperature
        )[-1]

    states = [last(1.0, 10, 1), adversarially_trained(params), last(100.0, 30, 2)]
    plain, hardened, distilled = (train.logits_fn(STEP, state) for state in states)
    return {
        "plain": case(plain),
        "hardened": case(hardened),
        "distilled": case(distilled),
        "scaled": case(plain, scale=SCALE),
        "quantized": case(plain, levels=LEVELS),
        "noisy": case(plain, height=HEIGHT),
    }


EVENTS = []


@pytest.fixture(scope="module")
def verdicts(cases):
    stack = nets.stack(cases.values())
    found = diagnose.masking_of_stack(
        stack,
        KEY,
        INPUTS,
        LABELS,
        eps=EPS,
        train_temperature=[100.0 if name == "distilled" else 1.0 for name in cases],
        surrogate=nets.index(stack, 0),
        num_queries=100,
        callback=EVENTS.append,
    )
    return dict(zip(cases, found, strict=True))


def outcomes(verdict, outcome):
    return {check.name for check in verdict.checks if check.outcome == outcome}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", "hardened"])
def test_networks_that_hide_nothing(verdicts, name):
    verdict = verdicts[name]
    assert verdict.label == "no sign of masking", verdict
    assert not outcomes(verdict, "masked")
    assert verdict.clean.value >= 0.95
    assert 0.3 <= verdict.worst_case.value <= verdict.naive.value <= 0.9


# The checks that must speak, and those that must not.
MASKERS = {
    "distilled": (
        {"zero_gradients", "temperature_probe", "loss_gap", "unbounded", "eps_curve"},
        {"gradient_agreement", "silent_success", "finite_logits"},
    ),
    "scaled": (
        {"zero_gradients", "temperature_probe", "loss_gap", "transfer", "unbounded"},
        {"gradient_agreement", "silent_success", "finite_logits"},
    ),
    "quantized": (
        {"zero_gradients", "gradient_agreement", "transfer", "unbounded"},
        {"temperature_probe", "loss_gap", "one_step", "silent_success"},
    ),
    "noisy": (
        {"gradient_agreement", "transfer"},
        {"zero_gradients", "temperature_probe", "loss_gap", "silent_success"},
    ),
}


@pytest.mark.parametrize("name", MASKERS)
def test_networks_that_mask(verdicts, name):
    verdict, (speak, silent) = verdicts[name], MASKERS[name]
    assert verdict.label == "masked", verdict
    assert speak <= outcomes(verdict, "masked"), verdict
    assert silent <= outcomes(verdict, "clear"), verdict
    assert verdict.naive.value >= 0.9
    assert verdict.worst_case.value <= verdict.naive.value - 0.1
    assert "do not trust the naive" in verdict.reason


def test_the_gradients_of_each_masker(verdicts):
    figures = {name: verdicts[name].check("zero_gradients").figures for name in MASKERS}
    for name in ("distilled", "scaled"):  # the softmax's alone
        assert figures[name]["zero_cross_entropy"] >= 0.7
        assert figures[name]["zero_cross_entropy_at_temperature"] == 0
        assert figures[name]["zero_margin"] == figures[name]["zero_dlr"] == 0
        assert figures[name]["loss_never_changed"] >= 0.7
    assert figures["quantized"]["zero_every_loss"] == 1
    assert figures["noisy"]["zero_cross_entropy"] == 0
    assert verdicts["scaled"].check("temperature_probe").figures["temperature"] > 100
    assert verdicts["distilled"].check("temperature_probe").figures["temperature"] == 100


def robust_accuracy(logits_fn, points):
    return np.mean(np.asarray(logits_fn(points)).argmax(1) == LABELS)


def test_scaled_logits_attacked_adaptively(cases, verdicts):
    network, naive = cases["scaled"], verdicts["scaled"].naive.value
    by_margin = attacks.pgd(network, KEY, INPUTS, LABELS, eps=EPS, loss=losses.margin)
    divided = nets.with_temperature(network, SCALE)
    by_temperature = attacks.pgd(divided, KEY, INPUTS, LABELS, eps=EPS)
    for found in (by_margin, by_temperature):
        assert robust_accuracy(network, found.inputs) <= naive - 0.25


def test_quantized_inputs_attacked_adaptively(cases, verdicts):
    network, naive = cases["quantized"], verdicts["quantized"].naive.value
    through = attacks.bpda(cases["plain"], jax.tree_util.Partial(quantize, LEVELS))
    found = attacks.pgd(through, KEY, INPUTS, LABELS, eps=EPS, loss=losses.margin, num_restarts=3)
    np.testing.assert_array_equal(network(found.inputs), through(found.inputs))
    assert robust_accuracy(network, found.inputs) <= naive - 0.25


def test_noise_attacked_adaptively(cases, verdicts):
    network, naive = cases["noisy"], verdicts["noisy"].naive.value
    random = nets.callable_logits_fn(
        lambda plain, key, inputs: plain(add_noise(HEIGHT, key, inputs)), cases["plain"]
    )
    mean = attacks.expectation(random, jax.random.key(9), num_draws=64)
    found = attacks.apgd(
        mean, KEY, INPUTS, LABELS, eps=EPS, num_steps=40, loss=losses.margin, best_loss=True
    )
    assert robust_accuracy(network, found.inputs) <= naive - 0.25  # as deployed, not on average


def test_a_surrogate_is_not_needed(verdicts, cases):
    verdict = diagnose.masking(cases["scaled"], KEY, INPUTS, LABELS, eps=EPS, num_queries=100)
    assert verdict.check("transfer").outcome == "not run"
    assert "surrogate" in verdict.check("transfer").finding
    # Everything else draws as it did, and finds the same.
    beside = {check.name: check for check in verdicts["scaled"].checks}
    for check in verdict.checks:
        if check.name in ("zero_gradients", "loss_gap", "black_box", "gradient_agreement"):
            assert check == beside[check.name]


@pytest.mark.parametrize("name", ["plain", *MASKERS])
def test_the_numbers_are_those_of_the_attacks(verdicts, name):
    verdict = verdicts[name]
    shares = [attempt.robust_accuracy.value for attempt in verdict.attacks]
    assert verdict.attacks[0].name == "PGD-40"
    assert shares[0] == verdict.naive.value <= verdict.clean.value
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] == verdict.worst_case.value
    for interval in (verdict.clean, verdict.naive, verdict.worst_case):
        assert interval.low <= interval.value <= interval.high
    assert (verdict.num_examples, verdict.num_nonfinite) == (SIZE, 0)
    assert (verdict.eps, verdict.norm) == (EPS, "linf")
    assert verdict.budget.startswith("PGD-40, ")
    assert verdict.budget.endswith(", at l∞ ≤ 0.1, 60 examples")


def test_the_usual_attack_is_the_usual_attack(cases, verdicts):
    for name in ("plain", "scaled", "noisy"):
        direct = attacks.pgd(cases[name], jax.random.key(1), INPUTS, LABELS, eps=EPS)
        stands = 1 - float(np.mean(direct.success))
        assert abs(verdicts[name].naive.value - stands) <= 0.05  # the random start is another


def test_a_verdict_is_plain_json_and_back(verdicts):
    for verdict in verdicts.values():
        plain = json.loads(json.dumps(verdict.as_dict(), allow_nan=False))
        assert diagnose.Verdict.from_dict(plain) == verdict
        assert plain["label"] == verdict.label
        assert set(plain["naive"]) == {"value", "low", "high"}
        for attempt in plain["attacks"]:
            assert set(attempt) == {"name", "robust_accuracy", "settings", "access", "follows"}
            del attempt["access"], attempt["follows"]  # as an earlier version wrote it
        assert diagnose.Verdict.from_dict(plain).attacks[0].follows is None
        assert set(plain["checks"][0]) == {
            *("name", "title", "outcome", "figures", "threshold", "finding", "source")
        }


def test_a_verdict_has_the_facts_of_its_attacks(verdicts):
    made = {each.name: (each.access, each.follows) for each in verdicts["plain"].attacks}
    assert made["PGD-40"] == made["FGSM"] == ("gradient", "softmax")
    assert made["PGD-40 on the margin"] == made["APGD-T 50 (class 1)"] == ("gradient", "logits")
    assert made["random noise"] == (None, None)
    (square,) = (facts for name, facts in made.items() if name.startswith("Square"))
    assert square == ("scores", "logits")
    (probe,) = (facts for name, facts in made.items() if name.startswith("PGD-40 at T = "))
    assert probe == ("gradient", None)  # of a temperature that may saturate as well


def test_a_verdict_reads_well(verdicts):
    text = str(verdicts["scaled"])
    assert text.startswith("masked: do not trust the naive ")
    assert "zero_gradients, masked: The gradient of the cross-entropy" in text
    assert "PGD-40 on the cross-entropy at T = 1" in text
    assert "budget: PGD-40, " in text
    assert "e+0" not in text
    assert max(map(len, text.splitlines())) <= 100
    text = str(verdicts["plain"])
    assert text.startswith("no sign of masking: ")
    assert "clear: zero_gradients, " in text
    assert 8 <= len(text.splitlines()) <= 16
    for verdict in verdicts.values():
        words = str(verdict.as_dict()).replace("robust_accuracy", "")
        assert "robust " not in words.replace("robust accuracy", "")


def test_progress_is_told(verdicts):
    assert len(verdicts) == 6
    assert {event["event"] for event in EVENTS} == {"diagnose"}
    assert [event["run"] for event in EVENTS] == sorted(event["run"] for event in EVENTS)
    assert {event["num_runs"] for event in EVENTS} == {6}
    first = [event for event in EVENTS if event["run"] == 0]
    assert len({event["stage"] for event in first}) >= 15
    assert all(event["done"] == event["total"] <= SIZE for event in EVENTS)  # one chunk each
