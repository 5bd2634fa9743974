"""A stack evaluated at once against its networks one by one, and against direct calls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, evaluate, losses, metrics, nets, train

N, D, H, K, R = 23, 6, 8, 4, 3
RNG = np.random.default_rng(0)
INPUTS = RNG.uniform(0, 1, (N, 3, 2)).astype(np.float32)
KEY = jax.random.key(5)
SCALES = (1.0, 3.0, 30.0)  # as after training at three temperatures
TRACES = []


def network(weights, inputs):
    """A small smooth network; counts how often it is traced."""
    TRACES.append(inputs.shape)
    first, second = weights
    return jnp.tanh((inputs.reshape(inputs.shape[0], -1) - 0.5) @ first) @ second


def make(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    first = rng.normal(0, 1.5, (D, H)).astype(np.float32)
    second = (scale * rng.normal(0, 1.0, (H, K))).astype(np.float32)
    return nets.callable_logits_fn(network, (jnp.asarray(first), jnp.asarray(second)))


NETWORKS = [make(seed, scale) for seed, scale in enumerate(SCALES)]
STACK = nets.stack(NETWORKS)
call = jax.jit(lambda run, inputs: run(inputs))
# Mostly the first network's own predictions, so that the networks' accuracies differ.
LABELS = np.asarray(call(NETWORKS[0], INPUTS)).argmax(1)
LABELS[::7] = (LABELS[::7] + 1) % K

FGSM = functools.partial(attacks.fgsm, eps=0.1)
PGD = functools.partial(attacks.pgd, eps=0.1, num_steps=4)
CW = functools.partial(
    attacks.carlini_wagner_l2, num_searches=3, num_steps=30, learning_rate=0.05, initial_const=0.1
)
PLANS = {
    "fgsm": evaluate.AttackPlan(FGSM, batch_size=10),
    "pgd": evaluate.AttackPlan(PGD, num_examples=17, batch_size=5),
    "cw": evaluate.AttackPlan(CW, num_examples=9, batch_size=6),
}
both = pytest.mark.parametrize("vmapped", [False, True], ids=["looped", "vmapped"])


@jax.jit
def direct_measures(run, inputs, labels):
    return (
        metrics.sensitivity_logits(run, inputs),
        metrics.log10_sensitivity_softmax(run, inputs),
        metrics.zero_gradient(run, inputs, labels),
    )


def clear(logits, labels):
    """Examples that are no ties, whose flag rounding cannot change."""
    excess = np.asarray(losses.margin(jnp.asarray(logits), labels))
    return np.abs(excess) > 1e-5 * np.abs(logits).max(-1)


@pytest.fixture(scope="module")
def results():
    """The whole evaluation, looped and vmapped, with its progress events."""
    found = {}
    for vmapped in (False, True):
        events = []
        result = evaluate.evaluate(
            STACK,
            INPUTS,
            LABELS,
            attacks=PLANS,
            key=KEY,
            num_sensitivity=11,
            batch_size=7,
            vmapped=vmapped,
            callback=events.append,
        )
        found[vmapped] = result, events
    return found


@pytest.mark.slow
@pytest.mark.floor
def test_vmapped_is_looped(results):
    looped, vmapped = results[False][0], results[True][0]
    np.testing.assert_array_equal(looped.clean.correct, vmapped.clean.correct)
    assert looped.clean.accuracy == vmapped.clean.accuracy
    for name in evaluate.CleanMeasures._fields[2:]:
        one, other = getattr(looped.clean, name), getattr(vmapped.clean, name)
        atol = 1e-6 if name == "logits" else 0  # single ones may be near 0
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=atol, err_msg=name)
    assert list(looped.attacks) == list(PLANS)
    for name, outcome in looped.attacks.items():
        other = vmapped.attacks[name]
        plain = np.stack(
            [
                clear(call(run, outcome.inputs[r]), LABELS[: outcome.success.shape[1]])
                for r, run in enumerate(NETWORKS)
            ]
        )
        assert plain.mean() > 0.9
        np.testing.assert_array_equal(outcome.success[plain], other.success[plain])
        np.testing.assert_array_equal(outcome.queries[plain], other.queries[plain])
        np.testing.assert_allclose(
            outcome.distance[plain], other.distance[plain], rtol=1e-3, atol=1e-6
        )
        np.testing.assert_allclose(outcome.mean_distance, other.mean_distance, rtol=1e-3)


@pytest.mark.floor
def test_clean_measures_are_those_of_each_network(results):
    clean = results[False][0].clean
    assert len({interval.value for interval in clean.accuracy}) == R
    for r, run in enumerate(NETWORKS):
        logits = np.asarray(call(run, INPUTS))
        np.testing.assert_allclose(clean.logits[r], logits, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(clean.correct[r], logits.argmax(1) == LABELS)
        assert clean.accuracy[r] == metrics.accuracy(logits, LABELS)
        np.testing.assert_allclose(clean.mean_abs_logit[r], np.abs(logits).mean(), rtol=1e-5)
        by_logits, by_softmax, zero = map(
            np.asarray, direct_measures(run, INPUTS[:11], LABELS[:11])
        )
        np.testing.assert_allclose(clean.sensitivity_logits[r], by_logits.mean(), rtol=1e-4)
        np.testing.assert_allclose(
            clean.log10_sensitivity_softmax_examples[r], by_softmax, rtol=1e-3, atol=1e-3
        )
        np.testing.assert_allclose(
            clean.log10_sensitivity_softmax[r],
            np.log10(np.mean(10.0 ** by_softmax.astype(np.float64))),
            rtol=1e-3,
            atol=1e-3,
        )
        np.testing.assert_allclose(clean.zero_gradient_fraction[r], zero.mean())


@pytest.mark.floor
@pytest.mark.parametrize("name", PLANS)
def test_attacks_are_direct_calls_on_each_network(results, name):
    plan, outcome = PLANS[name], results[False][0].attacks[name]
    size = plan.num_examples or N
    assert outcome.success.shape == outcome.distance.shape == (R, size)
    assert outcome.inputs.shape == (R, size, 3, 2)
    assert 0 < outcome.success.mean() < 1 or name == "cw"
    for r, run in enumerate(NETWORKS):
        direct = plan.attack(run, KEY, INPUTS[:size], LABELS[:size])
        plain = clear(call(run, direct.inputs), LABELS[:size])
        success = np.asarray(direct.success)
        np.testing.assert_array_equal(outcome.success[r][plain], success[plain])
        np.testing.assert_array_equal(outcome.queries[r][plain], np.asarray(direct.queries)[plain])
        np.testing.assert_allclose(
            outcome.inputs[r][plain], np.asarray(direct.inputs)[plain], atol=1e-4
        )
        if plain.all():
            assert outcome.success_rate[r] == metrics.proportion(int(success.sum()), size)
            reached = np.asarray(direct.distance)[success]
            np.testing.assert_allclose(outcome.mean_distance[r], reached.mean(), rtol=1e-4)
            np.testing.assert_allclose(outcome.median_distance[r], np.median(reached), rtol=1e-4)


@both
def test_progress_adds_up_to_all_examples_of_all_networks(results, vmapped):
    events = [event for event in results[vmapped][1] if "step" not in event]  # after a batch
    assert all(event["event"] == "evaluate" for event in events)
    totals = {"accuracy": N, "sensitivity": 11, "fgsm": N, "pgd": 17, "cw": 9}
    assert list(dict.fromkeys(event["stage"] for event in events)) == list(totals)
    for stage, size in totals.items():
        done = [event["done"] for event in events if event["stage"] == stage]
        assert done == sorted(set(done))
        assert done[-1] == size * R
        assert {e["total"] for e in events if e["stage"] == stage} == {size * R}
    chunks = -(-N // 7)
    assert sum(e["stage"] == "accuracy" for e in events) == (chunks if vmapped else chunks * R)


@pytest.mark.floor
@pytest.mark.parametrize(("vmapped", "batch_size"), [(False, 4), (False, 100), (True, 4)])
def test_flags_do_not_depend_on_the_batch_size(results, vmapped, batch_size):
    reference = results[False][0].attacks["pgd"]
    plan = PLANS["pgd"]._replace(batch_size=batch_size)
    outcome = evaluate.under_attack(STACK, INPUTS, LABELS, plan, key=KEY, vmapped=vmapped)
    np.testing.assert_array_equal(outcome.success, reference.success)
    np.testing.assert_allclose(outcome.inputs, reference.inputs, atol=1e-5)


def test_the_key_decides_a_random_start(results):
    plan = PLANS["pgd"]
    other = evaluate.under_attack(STACK, INPUTS, LABELS, plan, key=jax.random.key(6))
    assert np.abs(other.inputs - results[False][0].attacks["pgd"].inputs).max() > 1e-2
    with pytest.raises(ValueError, match="PRNG key"):
        evaluate.under_attack(STACK, INPUTS, LABELS, plan)


@pytest.mark.floor
@both
@pytest.mark.parametrize("batch_size", [7, 24])
def test_every_example_counts_once(vmapped, batch_size):
    clean = evaluate.clean(STACK, INPUTS, LABELS, batch_size=batch_size, vmapped=vmapped)
    expected = np.stack([np.asarray(call(run, INPUTS)).argmax(1) == LABELS for run in NETWORKS])
    np.testing.assert_array_equal(clean.correct, expected)
    assert clean.log10_sensitivity_softmax_examples.shape == (R, N)
    assert [interval.value for interval in clean.accuracy] == list(expected.mean(1))


@both
def test_more_examples_than_there_are_is_all_of_them(vmapped):
    plan = evaluate.AttackPlan(FGSM, num_examples=1000, batch_size=1000)
    outcome = evaluate.under_attack(STACK, INPUTS, LABELS, plan, vmapped=vmapped)
    assert outcome.success.shape == (R, N)
    clean = evaluate.clean(STACK, INPUTS, LABELS, num_sensitivity=1000, vmapped=vmapped)
    assert clean.log10_sensitivity_softmax_examples.shape == (R, N)


# Temperatures


@pytest.mark.floor
@both
def test_each_network_is_tested_at_its_temperature(vmapped):
    temperatures = np.array([1.0, 2.0, 40.0])
    result = evaluate.evaluate(
        STACK,
        INPUTS,
        LABELS,
        attacks={"fgsm": PLANS["fgsm"]},
        temperature=temperatures,
        batch_size=7,
        vmapped=vmapped,
    )
    plain = evaluate.clean(STACK, INPUTS, LABELS, batch_size=7, vmapped=vmapped)
    # The predictions and the logits' own measures do not depend on it …
    np.testing.assert_array_equal(result.clean.correct, plain.correct)
    np.testing.assert_allclose(result.clean.mean_abs_logit, plain.mean_abs_logit, rtol=1e-5)
    np.testing.assert_allclose(result.clean.logits, plain.logits, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.clean.sensitivity_logits, plain.sensitivity_logits, rtol=1e-4)
    # … the softmax's and the attacks' do.
    for r, temperature in enumerate(temperatures):
        divided = nets.with_temperature(NETWORKS[r], temperature)
        _, expected, _ = direct_measures(divided, INPUTS, LABELS)
        found = result.clean.log10_sensitivity_softmax_examples[r]
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
        attacked = FGSM(divided, None, INPUTS[:10], LABELS[:10])
        found = result.attacks["fgsm"].inputs[r, :10]
        np.testing.assert_allclose(found, attacked.inputs, atol=1e-6)
    change = result.clean.log10_sensitivity_softmax - plain.log10_sensitivity_softmax
    assert abs(change[0]) < 1e-5
    assert np.abs(change[1:]).min() > 0.01


def linear(weights, inputs):
    return inputs @ weights


@pytest.mark.floor
def test_masking_in_miniature():
    """Large logits blind the gradient of the softmax at T = 1, and nothing else."""
    rng = np.random.default_rng(3)
    weights = rng.normal(size=(D, K)).astype(np.float32)
    inputs = rng.uniform(0.3, 0.7, (30, D)).astype(np.float32)
    logits = inputs @ weights
    order = np.sort(logits, axis=1)
    inputs, logits = (
        inputs[order[:, -1] - order[:, -2] > 0.2],
        logits[order[:, -1] - order[:, -2] > 0.2],
    )
    labels = logits.argmax(1)
    assert len(labels) > 8
    stack = nets.stack(
        [nets.callable_logits_fn(linear, jnp.asarray(weights * s)) for s in (1.0, 1000.0)]
    )
    result = evaluate.evaluate(
        stack,
        inputs,
        labels,
        attacks={
            "fgsm": evaluate.AttackPlan(functools.partial(attacks.fgsm, eps=0.25)),
            "cw": evaluate.AttackPlan(
                functools.partial(
                    attacks.carlini_wagner_l2, num_searches=5, num_steps=100, learning_rate=0.05
                )
            ),
        },
    )
    plain, masked = (share.value for share in result.attacks["fgsm"].success_rate)
    assert plain > 0.8
    assert masked == 0.0
    assert [share.value for share in result.attacks["cw"].success_rate] == [1.0, 1.0]
    # The two networks have one decision boundary, at one distance.
    robustness = result.attacks["cw"].mean_distance
    np.testing.assert_allclose(robustness[0], robustness[1], rtol=0.2)
    assert result.clean.zero_gradient_fraction.tolist() == [0.0, 1.0]
    assert (
        result.clean.log10_sensitivity_softmax[1] < -40 < result.clean.log10_sensitivity_softmax[0]
    )
    np.testing.assert_allclose(
        result.clean.sensitivity_logits[1] / result.clean.sensitivity_logits[0], 1000, rtol=1e-4
    )
    # Tested at the temperature that undoes the scale, the gradient is back.
    undone = evaluate.under_attack(
        stack,
        inputs,
        labels,
        evaluate.AttackPlan(functools.partial(attacks.fgsm, eps=0.25)),
        temperature=[1.0, 1000.0],
    )
    assert [share.value for share in undone.success_rate] == [plain, plain]


# Precision


@pytest.mark.floor
@pytest.mark.parametrize("chosen", [None, "bfloat16"])
def test_all_is_measured_at_full_precision_unless_chosen(chosen):
    seen = set()

    def noting(weights, inputs):
        seen.add(jax.config.jax_default_matmul_precision)
        return inputs.reshape(inputs.shape[0], -1) @ weights

    weights = np.ones((D, K), np.float32)
    stack = nets.stack([nets.callable_logits_fn(noting, weights)])
    with jax.default_matmul_precision(chosen):
        evaluate.evaluate(stack, INPUTS, LABELS, attacks={"fgsm": PLANS["fgsm"]})
        assert seen == {chosen or "highest"}
        seen.clear()
        train.predict(nets.callable_logits_fn(noting, weights), INPUTS)
    assert seen == {chosen or "highest"}


# Targets, and what an attack says beside its result


@both
def test_targets_and_info_are_those_of_direct_calls(vmapped):
    targets = (LABELS + 1) % K
    plan = evaluate.AttackPlan(functools.partial(PGD, eps=0.3), num_examples=17, batch_size=5)
    outcome = evaluate.under_attack(
        STACK, INPUTS, LABELS, plan, key=KEY, targets=targets, vmapped=vmapped
    )
    assert set(outcome.info) == {"first_success", "gradients", "restart"}
    hits = 0
    for r, run in enumerate(NETWORKS):
        direct = plan.attack(run, KEY, INPUTS[:17], LABELS[:17], targets=targets[:17])
        plain = clear(call(run, direct.inputs), LABELS[:17])
        np.testing.assert_array_equal(outcome.success[r][plain], direct.success[plain])
        np.testing.assert_array_equal(
            outcome.info["first_success"][r][plain], direct.info["first_success"][plain]
        )
        reached = np.asarray(call(run, outcome.inputs[r])).argmax(1) == targets[:17]
        np.testing.assert_array_equal(outcome.success[r][plain], reached[plain])
        hits += int(direct.success.sum())
    assert 5 < hits < R * 17  # neither everything nor next to nothing


def test_targets_of_a_wrong_shape_are_refused():
    with pytest.raises(ValueError, match=r"targets of shape \[B\] = \(23,\), got shape \(17,\)"):
        evaluate.under_attack(STACK, INPUTS, LABELS, PLANS["pgd"], key=KEY, targets=LABELS[:17])


# Compilation


@both
def test_new_weights_and_a_new_radius_compile_nothing(vmapped):
    def run(seed, eps):
        stack = nets.stack([make(seed + r) for r in range(R)])
        attack = functools.partial(attacks.pgd, eps=eps, num_steps=4)
        plan = evaluate.AttackPlan(attack, num_examples=10, batch_size=5)
        evaluate.evaluate(
            stack, INPUTS, LABELS, attacks={"pgd": plan}, key=KEY, batch_size=7, vmapped=vmapped
        )
        return len(TRACES)

    run(10, 0.1)
    assert run(20, 0.1) == run(30, 0.2)


# Summaries


@pytest.mark.floor
def test_summary_counts_only_successes():
    result = attacks.AttackResult(
        inputs=jnp.zeros((3, 4, 2)),
        success=jnp.array([[True, True, False, True], [False] * 4, [True] * 4]),
        distance=jnp.array([[0.0, 1.0, jnp.inf, 5.0], [jnp.inf] * 4, [2.0] * 4]),
        queries=jnp.ones((3, 4), jnp.int32),
        info={},
    )
    outcome = evaluate.summarize(result)
    assert [share.value for share in outcome.success_rate] == [0.75, 0.0, 1.0]
    np.testing.assert_array_equal(outcome.mean_distance, [2.0, np.nan, 2.0])
    np.testing.assert_array_equal(outcome.median_distance, [1.0, np.nan, 2.0])
    assert np.isinf(outcome.distance[0, 2])  # kept: not a zero, and in no mean
    assert outcome.success_rate[0] == metrics.proportion(3, 4)


def test_an_attack_that_finds_nothing_has_no_distance():
    constant = nets.callable_logits_fn(_constant, jnp.array([1.0, 0.0]))
    plan = evaluate.AttackPlan(
        functools.partial(attacks.carlini_wagner_l2, num_searches=1, num_steps=2)
    )
    outcome = evaluate.under_attack(
        nets.stack([constant, constant]), INPUTS[:3], np.array([0, 0, 1]), plan
    )
    np.testing.assert_array_equal(outcome.distance, [[np.inf, np.inf, 0.0]] * 2)
    np.testing.assert_array_equal(outcome.mean_distance, [0.0, 0.0])  # the one wrong to begin with
    outcome = evaluate.under_attack(
        nets.stack([constant, constant]), INPUTS[:3], np.array([0, 0, 0]), plan
    )
    assert np.isnan(outcome.mean_distance).all()
    assert [share.value for share in outcome.success_rate] == [0.0, 0.0]
    np.testing.assert_array_equal(outcome.inputs, np.stack([INPUTS[:3]] * 2))


def _constant(row, inputs):
    return (
        jnp.broadcast_to(row, (inputs.shape[0], 2)) + 0 * inputs.reshape(inputs.shape[0], -1)[:, :1]
    )


# Bad input


@both
@pytest.mark.parametrize("bad", [-1, K])
def test_labels_out_of_range_are_named(vmapped, bad):
    labels = LABELS.copy()
    labels[2] = bad
    message = rf"labels in 0..3 .*got {bad} at index 2"
    with pytest.raises(ValueError, match=message):
        evaluate.clean(STACK, INPUTS, labels, vmapped=vmapped)
    with pytest.raises(ValueError, match=message):
        evaluate.under_attack(STACK, INPUTS, labels, PLANS["fgsm"], vmapped=vmapped)


@both
def test_inputs_outside_the_attacks_box_are_named(vmapped):
    with pytest.raises(ValueError, match=r"inputs in \[0, 1\], got 255"):
        evaluate.under_attack(STACK, 255 + INPUTS, LABELS, PLANS["fgsm"], vmapped=vmapped)
    inputs = INPUTS.copy()
    inputs[1, 2, 0] = np.nan
    with pytest.raises(ValueError, match=r"finite inputs, got nan at index \(1, 2, 0\)"):
        evaluate.clean(STACK, inputs, LABELS, vmapped=vmapped)


@pytest.mark.floor
def test_a_single_network_is_no_stack():
    single = nets.callable_logits_fn(network, {"a": jnp.ones((D, H)), "b": jnp.ones((H, K))})
    with pytest.raises(ValueError, match=r"leading axis R, got .*nets.stack"):
        evaluate.clean(single, INPUTS, LABELS)
    with pytest.raises(ValueError, match="leading axis R"):
        evaluate.clean(nets.callable_logits_fn(lambda x: x), INPUTS, LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature > 0, got 0.0"),
        ({"temperature": [1.0, float("nan"), 1.0]}, "temperature > 0, got nan at index 1"),
        ({"temperature": [1.0, 2.0]}, r"temperature .* of shape \[R\] = \(3,\), got shape \(2,\)"),
        ({"batch_size": 0}, "batch_size .*got 0"),
        ({"num_sensitivity": 0}, "num_sensitivity .*got 0"),
        ({"num_sensitivity": -5}, "num_sensitivity .*got -5"),
    ],
)
def test_clean_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.clean(STACK, INPUTS, LABELS, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 0}, "num_examples .*got 0"),
        ({"num_examples": -3}, "num_examples .*got -3"),
        ({"batch_size": 0}, "batch_size .*got 0"),
    ],
)
def test_under_attack_refuses_a_plan(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.under_attack(STACK, INPUTS, LABELS, evaluate.AttackPlan(FGSM, **options))


def test_no_examples_is_an_error():
    with pytest.raises(ValueError, match="at least one example, got none"):
        evaluate.clean(STACK, INPUTS[:0], LABELS[:0])
    with pytest.raises(ValueError, match="at least one example, got none"):
        evaluate.under_attack(STACK, INPUTS[:0], LABELS[:0], PLANS["fgsm"])


def test_labels_that_do_not_fit_and_other_keys_are_refused():
    for labels in (LABELS[:-1], np.concatenate([LABELS, LABELS[:1]])):
        with pytest.raises(ValueError, match=r"expected labels of shape \[B\] = \(23,\)"):
            evaluate.under_attack(STACK, INPUTS, labels, PLANS["fgsm"])
    for key in (5, jax.random.key(0, impl="rbg"), jax.random.split(KEY, 3)):
        with pytest.raises(ValueError, match="key"):
            evaluate.under_attack(STACK, INPUTS, LABELS, PLANS["pgd"], key=key)


def test_one_key_an_example_is_taken_as_it_is():
    keys = jax.vmap(functools.partial(jax.random.fold_in, KEY))(np.arange(N))
    one = evaluate.under_attack(STACK, INPUTS, LABELS, PLANS["pgd"], key=KEY)
    each = evaluate.under_attack(STACK, INPUTS, LABELS, PLANS["pgd"], key=keys)
    np.testing.assert_array_equal(one.inputs, each.inputs)


def test_tracers_are_refused():
    with pytest.raises(ValueError, match="expected concrete arrays, got tracers"):
        jax.jit(lambda stack: evaluate.clean(stack, INPUTS, LABELS).correct)(STACK)
    with pytest.raises(ValueError, match="expected concrete arrays, got tracers"):
        jax.jit(lambda x: evaluate.under_attack(STACK, x, LABELS, PLANS["fgsm"]).inputs)(INPUTS)
