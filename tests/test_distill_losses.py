"""Student losses of the field: against NumPy in float64, their laws as factories, bad input."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import distill, losses, nets, sweep, train
from jdistill.typing import Batch

ONE = jax.devices()[:1]
B, N, D, K, HEADS = 6, 3, 4, 5, 2
RNG = np.random.default_rng(0)
INPUTS = RNG.normal(size=(B, N, D)).astype(np.float32)
LABELS = np.array([0, 4, 2, 1, 3, 3], np.int32)
MASK = np.array([1, 1, 1, 1, 0, 1], np.float32)
BATCH = Batch(INPUTS, LABELS, None, MASK)
LOGITS = RNG.normal(0, 2, (B, K)).astype(np.float32)
NAMES = ("query", "key", "value")
CALLS = []


def weights(seed, width=8):
    rng = np.random.default_rng(seed)
    held = {name: rng.normal(size=(D, width)) for name in NAMES}
    held |= {"out": rng.normal(size=(N * D, K)), "wide": rng.normal(size=(N * D, 12))}
    return {name: jnp.asarray(each, jnp.float32) for name, each in held.items()}


def network(params, inputs):
    """Logits, tokens' projections, and a feature like an image's."""
    flat = inputs.reshape(len(inputs), -1)
    features = {name: jnp.tanh(inputs @ params[name]) for name in NAMES}
    features["image"] = jnp.tanh(flat @ params["wide"]).reshape(-1, 2, 3, 2)
    return {"logits": 3 * flat @ params["out"], "features": features}


def counted(params, inputs):
    CALLS.append(inputs.shape)
    return network(params, inputs)


TEACHER = nets.callable_logits_fn(network, weights(1))
OTHER = nets.callable_logits_fn(network, weights(2))
BOTH = distill.together([TEACHER, OTHER])
OUTPUTS = {**network(weights(3), INPUTS), "logits": jnp.asarray(LOGITS)}
LAYERS = {"image": "image", "query": "value"}
TAUGHT = {name: np.asarray(each, np.float64) for name, each in TEACHER(INPUTS)["features"].items()}
OWN = {name: np.asarray(each, np.float64) for name, each in OUTPUTS["features"].items()}


def log_softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))


def teacher_logits(teacher):
    return np.asarray(teacher(INPUTS)["logits"], np.float64)


def kl(log_targets, log_probs):
    return (np.exp(log_targets) * (log_targets - log_probs)).sum(-1)


def mixed(soft, temperature, weight, squared):
    hard = -log_softmax(LOGITS)[np.arange(B), LABELS]
    return (1 - weight) * (temperature**2 if squared else 1) * soft + weight * hard


def numpy_decoupled(temperature, weight, squared, alpha=1.0, beta=8.0):
    targets = np.exp(log_softmax(teacher_logits(TEACHER), temperature))
    probs = np.exp(log_softmax(LOGITS, temperature))
    soft = []
    for p, q, y in zip(targets, probs, LABELS, strict=True):
        pair, others = np.array([[p[y], 1 - p[y]], [q[y], 1 - q[y]]]), np.delete([p, q], y, 1)
        rest = np.log(others / others.sum(1, keepdims=True))
        soft.append(alpha * kl(*np.log(pair)) + beta * kl(*rest))
    return mixed(np.array(soft), temperature, weight, squared)


def numpy_dist(temperature, weight, squared, beta=2.0, gamma=2.0):
    ours, theirs = (
        np.exp(log_softmax(each, temperature)) for each in (LOGITS, teacher_logits(TEACHER))
    )
    rows = zip(ours, theirs, strict=True)
    inter = np.array([1 - np.corrcoef(*pair)[0, 1] for pair in rows])
    real = MASK > 0
    columns = zip(ours[real].T, theirs[real].T, strict=True)
    intra = np.mean([1 - np.corrcoef(*pair)[0, 1] for pair in columns]) * MASK
    return mixed(beta * inter + gamma * intra, temperature, weight, squared)


def numpy_online(teachers, shares, temperature, weight, squared):
    log_probs = log_softmax(LOGITS, temperature)
    each = [np.exp(log_softmax(teacher_logits(one), temperature)) for one in teachers]
    soft = sum(share * -(one * log_probs).sum(1) for share, one in zip(shares, each, strict=True))
    return mixed(soft, temperature, weight, squared)


def numpy_hints():
    pairs = ((OWN[name], TAUGHT[other]) for name, other in LAYERS.items())
    return sum(((one - two) ** 2).reshape(B, -1).mean(1) for one, two in pairs)


def numpy_relations(num_heads):
    def relations(left, right):
        size = left.shape[-1] // num_heads
        parts = [slice(at * size, (at + 1) * size) for at in range(num_heads)]
        scores = [left[..., part] @ right[..., part].transpose(0, 2, 1) for part in parts]
        return log_softmax(np.stack(scores, 1), np.sqrt(size))

    return sum(
        kl(relations(TAUGHT[one], TAUGHT[two]), relations(OWN[one], OWN[two])).mean((1, 2))
        for one, two in (("query", "key"), ("value", "value"))
    )


OPTIONS = [{}, {"hard_weight": 0.3, "temperature_squared": True}, {"hard_weight": 1.0}]


@pytest.mark.floor
@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("options", OPTIONS)
def test_losses_on_logits_are_the_closed_forms(temperature, options):
    held = (temperature, options.get("hard_weight", 0.0), "temperature_squared" in options)
    found = distill.decoupled_loss(temperature, TEACHER, **options)(OUTPUTS, BATCH)
    assert found.shape == (B,)
    np.testing.assert_allclose(found, numpy_decoupled(*held), rtol=1e-4)
    weighed = distill.decoupled_loss(temperature, TEACHER, alpha=0.5, beta=2.0, **options)
    np.testing.assert_allclose(
        weighed(LOGITS, BATCH), numpy_decoupled(*held, alpha=0.5, beta=2.0), rtol=1e-4
    )
    found = distill.dist_loss(temperature, TEACHER, **options)(OUTPUTS, BATCH)
    assert found.shape == (B,)
    np.testing.assert_allclose(found, numpy_dist(*held), rtol=1e-4, atol=1e-6)
    weighed = distill.dist_loss(temperature, TEACHER, beta=0.5, gamma=3.0, **options)
    np.testing.assert_allclose(
        weighed(LOGITS, BATCH), numpy_dist(*held, beta=0.5, gamma=3.0), rtol=1e-4, atol=1e-6
    )


@pytest.mark.floor
@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_of_several_teachers_is_the_closed_form(options):
    held = (4.0, options.get("hard_weight", 0.0), "temperature_squared" in options)
    make = functools.partial(distill.several_teachers_loss, 4.0, BOTH, **options)
    close = dict(rtol=1e-5)
    own = np.stack([-log_softmax(teacher_logits(one)) for one in (TEACHER, OTHER)])
    own = np.exp(own[:, np.arange(B), LABELS])
    sure = 1 - own / own.sum(0)  # M - 1 is 1
    cases = {
        "mean": (None, [0.5, 0.5]),
        "numbers": ([0.25, 0.75], [0.25, 0.75]),
        "confidence": (distill.confidence_weights, sure),
        "function": (first_alone, [1.0, 0.0]),
    }
    for name, (given, shares) in cases.items():
        found = make(weights=given)(OUTPUTS, BATCH)
        assert found.shape == (B,)
        expected = numpy_online((TEACHER, OTHER), shares, *held)
        np.testing.assert_allclose(found, expected, err_msg=name, **close)
    # One of one, or the same twice, is that one's.
    online = distill.online_loss(4.0, TEACHER, **options)(OUTPUTS, BATCH)
    for teacher in (TEACHER, distill.together([TEACHER]), distill.together([TEACHER] * 2)):
        found = distill.several_teachers_loss(4.0, teacher, **options)(OUTPUTS, BATCH)
        np.testing.assert_allclose(found, online, rtol=1e-5)


def first_alone(logits, labels):
    assert logits.shape == (2, B, K)
    assert labels.shape == (B,)
    return jnp.stack([jnp.ones(B), jnp.zeros(B)])


@pytest.mark.floor
def test_confidence_weights_against_numpy():
    logits = RNG.normal(0, 3, (4, B, K)).astype(np.float32)
    entropy = -log_softmax(logits)[:, np.arange(B), LABELS]
    powers = np.exp(entropy - entropy.max(0))
    expected = (1 - powers / powers.sum(0)) / 3
    found = distill.confidence_weights(logits, LABELS)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.sum(0), 1.0, rtol=1e-6)
    assert np.all(found.argmin(0) == entropy.argmax(0))
    np.testing.assert_allclose(
        jax.jit(distill.confidence_weights)(logits, LABELS), found, rtol=1e-5
    )
    # Teachers that agree count alike; one that excludes the label counts for nothing.
    alike = distill.confidence_weights(np.stack([logits[0]] * 3), LABELS)
    np.testing.assert_allclose(alike, 1 / 3, rtol=1e-6)
    excluded = logits.copy()
    excluded[1, 2, LABELS[2]], excluded[3, 0, LABELS[0]] = -np.inf, -1e30
    found = distill.confidence_weights(excluded, LABELS)
    np.testing.assert_allclose(found[:, 2], np.array([1, 0, 1, 1]) / 3, atol=1e-6)
    np.testing.assert_allclose(found[:, 0], np.array([1, 1, 1, 0]) / 3, atol=1e-6)


@pytest.mark.floor
def test_losses_on_features_are_the_closed_forms():
    base = numpy_online((TEACHER,), [1.0], 4.0, 0.0, False)
    hints = distill.feature_loss(4.0, TEACHER, layers=LAYERS, weight=0.7)(OUTPUTS, BATCH)
    np.testing.assert_allclose(hints, base + 0.7 * numpy_hints(), rtol=1e-5)
    alone = distill.feature_loss(4.0, TEACHER, layers=LAYERS, base=None)(OUTPUTS, BATCH)
    np.testing.assert_allclose(alone, numpy_hints(), rtol=1e-5)
    maps = distill.feature_loss(
        4.0,
        TEACHER,
        layers={"image": "image"},
        distance=losses.attention_transfer,
        base=functools.partial(distill.online_loss, hard_weight=0.3, temperature_squared=True),
    )(OUTPUTS, BATCH)
    ours, theirs = ((each["image"] ** 2).sum(-1).reshape(B, -1) for each in (OWN, TAUGHT))
    ours, theirs = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (ours, theirs))
    base = numpy_online((TEACHER,), [1.0], 4.0, 0.3, True)
    np.testing.assert_allclose(maps, base + ((ours - theirs) ** 2).sum(1), rtol=1e-5)
    # Relations, also of a teacher of twice the width, and under other names.
    found = distill.relation_loss(4.0, TEACHER, num_heads=HEADS, base=None, weight=2.0)
    assert found(OUTPUTS, BATCH).shape == (B,)
    expected = 2 * numpy_relations(HEADS)
    np.testing.assert_allclose(found(OUTPUTS, BATCH), expected, rtol=1e-4)
    base = numpy_decoupled(4.0, 0.0, False)
    with_logits = distill.relation_loss(
        4.0, TEACHER, num_heads=HEADS, weight=2.0, base=distill.decoupled_loss
    )
    np.testing.assert_allclose(with_logits(OUTPUTS, BATCH), base + expected, rtol=1e-4)
    wide = nets.callable_logits_fn(network, weights(1, width=16))
    assert distill.relation_loss(4.0, wide, num_heads=4, base=None)(OUTPUTS, BATCH).min() > 0
    turned = dict(zip(NAMES, (OUTPUTS["features"][name] for name in NAMES[::-1]), strict=True))
    again = distill.relation_loss(4.0, TEACHER, num_heads=HEADS, base=None, names=NAMES[::-1])
    np.testing.assert_allclose(
        2 * again({**OUTPUTS, "features": turned}, BATCH), expected, rtol=1e-4
    )


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    outputs = TEACHER(INPUTS)
    same = {"image": "image", "key": "key"}
    for loss in (
        distill.decoupled_loss(2.0, TEACHER),
        distill.dist_loss(2.0, TEACHER),
        distill.feature_loss(2.0, TEACHER, layers=same, base=None),
        distill.relation_loss(2.0, TEACHER, num_heads=1, base=None),
    ):
        np.testing.assert_allclose(loss(outputs, BATCH), 0.0, atol=1e-5)


FACTORIES = {
    "decoupled": distill.decoupled_loss,
    "dist": distill.dist_loss,
    "hints": functools.partial(distill.feature_loss, layers=LAYERS),
    "maps": functools.partial(
        distill.feature_loss, layers={"image": "image"}, distance=losses.attention_transfer
    ),
    "relations": functools.partial(distill.relation_loss, num_heads=HEADS),
    "relations alone": functools.partial(distill.relation_loss, num_heads=HEADS, base=None),
    "several": distill.several_teachers_loss,
    "confidence": functools.partial(
        distill.several_teachers_loss, weights=distill.confidence_weights
    ),
}
SEVERAL = ("several", "confidence")


def teacher_for(name, params=None, fun=network):
    params = weights(1) if params is None else params
    one = nets.callable_logits_fn(fun, params)
    return distill.together([one, OTHER]) if name in SEVERAL else one


@pytest.mark.floor
@pytest.mark.parametrize("name", FACTORIES)
def test_no_gradient_flows_into_the_teacher(name):
    """Not even where the teacher is the student."""

    def loss(params, own):
        outputs = network(params, INPUTS) if own else OUTPUTS
        return FACTORIES[name](2.0, teacher_for(name, params))(outputs, BATCH).sum()

    params = weights(1)
    twice = jax.tree.map(lambda leaf: 2 * leaf, params)
    assert not np.isclose(loss(params, False), loss(twice, False))  # it does listen to it
    for leaf in jax.tree.leaves(jax.grad(loss)(params, False)):
        np.testing.assert_array_equal(leaf, np.zeros(leaf.shape))
    if name in ("decoupled", "dist"):  # at its minimum only the teacher's part would be left
        for leaf in jax.tree.leaves(jax.grad(loss)(params, True)):
            np.testing.assert_allclose(leaf, np.zeros(leaf.shape), atol=2e-3)


@pytest.mark.parametrize("name", FACTORIES)
def test_gradients_reach_the_student(name):
    loss = FACTORIES[name](2.0, teacher_for(name))
    gradient = jax.grad(lambda outputs: loss(outputs, BATCH).sum())(OUTPUTS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    if name == "relations alone":
        np.testing.assert_array_equal(gradient["logits"], np.zeros((B, K)))
    else:
        assert np.abs(gradient["logits"]).max() > 1e-3
    reached = {each for each, leaf in gradient["features"].items() if np.abs(leaf).max() > 1e-6}
    expected = {"hints": LAYERS.keys(), "maps": {"image"}}
    wanted = {*NAMES} if name.startswith("relations") else expected.get(name, set())
    assert reached == set(wanted)


@pytest.mark.parametrize("name", FACTORIES)
def test_other_numbers_and_weights_compile_nothing(name):
    traces = []

    @jax.jit
    def value(loss_fn, batch):
        traces.append(name)
        return loss_fn(OUTPUTS, batch)

    CALLS.clear()
    factory, teacher = FACTORIES[name], teacher_for(name, fun=counted)
    first = value(factory(2.0, teacher), BATCH)
    np.testing.assert_allclose(first, factory(2.0, teacher)(OUTPUTS, BATCH), rtol=1e-4, atol=1e-6)
    calls = len(CALLS)
    assert calls == 2  # one trace and one call: a base asks no second time
    found = [value(factory(20.0, teacher), BATCH)]
    found += [value(factory(2.0, teacher_for(name, weights(7), fun=counted)), BATCH)]
    for number in ("hard_weight", "alpha", "beta", "gamma", "weight"):
        if takes(factory, number):
            found.append(value(factory(2.0, teacher, **{number: 0.5}), BATCH))
    assert len(traces) == 1
    assert len(CALLS) == calls
    changed = [not np.allclose(first, other, rtol=1e-3) for other in found]
    assert changed[1:] == [True] * len(found[1:])
    assert changed[0] == (name != "relations alone")  # which have no temperature


def takes(factory, number):
    return number in inspect.signature(factory).parameters


@pytest.mark.floor
@pytest.mark.parametrize("name", FACTORIES)
def test_stacked_runs_are_the_runs_alone(name):
    temperatures = (1.0, 3.0, 20.0)
    each = [
        FACTORIES[name](T, teacher_for(name, weights(seed)))
        for seed, T in enumerate(temperatures, start=4)
    ]
    stack = nets.stack([jax.tree.map(jnp.asarray, loss) for loss in each])
    assert jax.tree.structure(stack) == jax.tree.structure(each[0])
    outputs = [{**OUTPUTS, "logits": scale * OUTPUTS["logits"]} for scale in (1.0, 2.0, 0.5)]
    together = jax.jit(jax.vmap(lambda loss, one: loss(one, BATCH)))(stack, nets.stack(outputs))
    alone = [loss(one, BATCH) for loss, one in zip(each, outputs, strict=True)]
    np.testing.assert_allclose(together, np.stack(alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(FACTORIES.keys() - {"dist"}))
def test_one_value_per_example_and_no_more(name):
    loss = FACTORIES[name](2.0, teacher_for(name))
    whole = loss(OUTPUTS, BATCH)
    first = jax.tree.map(lambda leaf: leaf[:2], (OUTPUTS, BATCH))
    np.testing.assert_allclose(loss(*first), whole[:2], rtol=1e-5)


@pytest.mark.floor
def test_the_part_of_dist_over_the_batch_is_of_its_real_rows():
    alone = distill.dist_loss(2.0, TEACHER, gamma=0.0)
    whole = alone(OUTPUTS, BATCH)
    first = jax.tree.map(lambda leaf: leaf[:2], (OUTPUTS, BATCH))
    np.testing.assert_allclose(alone(*first), whole[:2], rtol=1e-5)
    loss = distill.dist_loss(2.0, TEACHER)
    assert np.abs(loss(*first) - loss(OUTPUTS, BATCH)[:2]).max() > 1e-3
    real = MASK > 0
    fewer = jax.tree.map(lambda leaf: leaf[real], (OUTPUTS, BATCH))
    np.testing.assert_allclose(loss(OUTPUTS, BATCH)[real], loss(*fewer), rtol=1e-4)


# In training


def apply(params, model_state, inputs, *, train, key):
    return network(params, inputs), model_state


STEP = train.make_train_step(apply, train.sgd(0.05))
MANY = RNG.normal(size=(22, N, D)).astype(np.float32)
EXAMPLES = MANY, RNG.integers(0, K, 22).astype(np.int32)
GENERATION = distill.Generation(step=STEP, params=weights(3), num_epochs=1)


@pytest.mark.parametrize("name", ["decoupled", "dist", "hints", "relations"])
def test_a_sweep_of_chains_learns_as_the_chains_alone(name):
    temperatures, seeds = np.float32([1, 4]), (3, 4)
    options = {"student_loss": FACTORIES[name], "online": True, "batch_size": 8, "devices": ONE}
    keys = jax.vmap(jax.random.key)(np.array([5, 6]))

    def generations(make):
        # A student that starts as its teacher did would have its features already.
        return [distill.Generation(step=STEP, params=make(more), num_epochs=1) for more in (0, 10)]

    stacks = generations(lambda more: nets.stack([weights(seed + more) for seed in seeds]))
    swept = sweep.chain(stacks, EXAMPLES, keys, temperature=temperatures, **options)
    assert not swept.diverged.any()
    for run, seed in enumerate(seeds):
        chain = generations(lambda more, seed=seed: weights(seed + more))
        alone = distill.chain(
            chain, EXAMPLES, keys[run], temperature=float(temperatures[run]), **options
        )
        found, expected, start = swept.states[1].params, alone[1].params, chain[1].params
        for leaf in expected:
            np.testing.assert_allclose(found[leaf][run], expected[leaf], rtol=1e-3, atol=1e-4)
        assert np.abs(expected["out"] - start["out"]).max() > 1e-4
        moved = np.abs(expected["query"] - start["query"]).max()
        assert (moved > 1e-4) == (name in ("hints", "relations"))


@pytest.mark.parametrize("name", ["decoupled", "hints"])
def test_devices_make_no_difference(name):
    loss = FACTORIES[name](2.0, TEACHER)
    state = train.create_state(STEP, weights(3), jax.random.key(0))
    each = [
        train.fit(STEP, state, EXAMPLES, loss, num_epochs=1, batch_size=8, mode=mode).params
        for mode in ("jit", "pmap")
    ]
    for leaf in each[0]:
        np.testing.assert_allclose(each[0][leaf], each[1][leaf], rtol=1e-4, atol=1e-5)


def test_a_generation_learns_from_several():
    def last(**settings):
        student = distill.Generation(
            step=STEP, params=weights(3), num_epochs=1, teachers=(0, 1), online=True, **settings
        )
        chain = [
            GENERATION,
            distill.Generation(step=STEP, params=weights(4), num_epochs=1),
            student,
        ]
        states = distill.chain(
            chain, EXAMPLES, jax.random.key(1), temperature=2.0, batch_size=8, devices=ONE
        )
        return states[-1].params["out"]

    mean = last(loss=distill.several_teachers_loss)
    offline = last(loss=distill.online(distill.soft_loss))
    np.testing.assert_allclose(mean, offline, rtol=1e-4, atol=1e-5)
    sure = last(
        loss=functools.partial(distill.several_teachers_loss, weights=distill.confidence_weights)
    )
    assert np.abs(sure - mean).max() > 1e-4
    with pytest.raises(ValueError, match="expected one teacher for dist_loss, got 2; name one"):
        last(loss=distill.dist_loss)


def test_through_the_distillation_token():
    heads = {"class_logits": LOGITS[::-1], "distillation_logits": LOGITS}
    outputs = {"logits": (LOGITS + LOGITS[::-1]) / 2, **heads}
    loss = distill.through_token(distill.decoupled_loss)(4.0, TEACHER)
    hard = -log_softmax(LOGITS[::-1])[np.arange(B), LABELS]
    expected = 0.5 * numpy_decoupled(4.0, 0.0, False) + 0.5 * hard
    np.testing.assert_allclose(loss(outputs, BATCH), expected, rtol=1e-4)


# Bad input


@pytest.mark.parametrize("name", sorted(FACTORIES.keys() - {*SEVERAL}))
def test_losses_of_one_teacher_refuse_several(name):
    with pytest.raises(ValueError, match=r"expected one teacher for .*, got 2; name one of them"):
        FACTORIES[name](2.0, BOTH)(OUTPUTS, BATCH)


def test_what_has_no_features_is_named():
    loss = distill.feature_loss(1.0, TEACHER, layers={"image": "hint"})
    with pytest.raises(ValueError, match=r"'hint' among .* of the teacher, got .*image"):
        loss(OUTPUTS, BATCH)
    loss = distill.feature_loss(1.0, TEACHER, layers={"hint": "image"})
    with pytest.raises(ValueError, match=r"'hint' among .* of the student, got query, key, value"):
        loss({**OUTPUTS, "features": {name: INPUTS for name in NAMES}}, BATCH)
    for outputs in (LOGITS, {"logits": LOGITS}):
        with pytest.raises(ValueError, match="of the student, got none; use a network that"):
            loss(outputs, BATCH)
    mean = distill.feature_loss(
        1.0, TEACHER, layers={"image": "image"}, distance=lambda a, b: jnp.mean((a - b) ** 2)
    )
    with pytest.raises(ValueError, match=r"one value per example, \[B\] = \(6,\), got shape \(\)"):
        mean(OUTPUTS, BATCH)


def test_arguments_out_of_range_are_named():
    with pytest.raises(ValueError, match="expected layers to compare, at least one, got none"):
        distill.feature_loss(1.0, TEACHER, layers={})
    with pytest.raises(ValueError, match="each name in layers to be text, got int"):
        distill.feature_loss(1.0, TEACHER, layers={"hint": 3})
    with pytest.raises(ValueError, match="names of queries, keys, and values, got 2 of them"):
        distill.relation_loss(1.0, TEACHER, num_heads=2, names=("query", "key"))
    for factory in (distill.decoupled_loss, distill.dist_loss):
        with pytest.raises(ValueError, match=r"expected beta >= 0, got -1\.0"):
            factory(1.0, TEACHER, beta=-1.0)
    with pytest.raises(ValueError, match=r"expected weights >= 0, got -0\.5 at index 0"):
        distill.several_teachers_loss(1.0, BOTH, weights=[-0.5, 1.5])
    with pytest.raises(ValueError, match=r"weights \[M\] that sum to 1, got a sum of 2; divide"):
        distill.several_teachers_loss(1.0, BOTH, weights=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"weights \[M\] of 2 teachers, got shape \(3,\)"):
        distill.several_teachers_loss(1.0, BOTH, weights=[0.5, 0.25, 0.25])(OUTPUTS, BATCH)
    with pytest.raises(ValueError, match=r"weights \[M, B\] = \(2, 6\), got shape \(2,\)"):
        distill.several_teachers_loss(1.0, BOTH, weights=lambda z, y: jnp.ones(2) / 2)(
            OUTPUTS, BATCH
        )
    with pytest.raises(ValueError, match="of two teachers or more, got 1; a single one needs no"):
        distill.confidence_weights(LOGITS[None], LABELS)
    fewer = distill.together([TEACHER, lambda x: x[:, 0]])
    with pytest.raises(ValueError, match=r"logits of one shape, got \[\(6, 5\), \(6, 4\)\]"):
        distill.several_teachers_loss(1.0, fewer)(OUTPUTS, BATCH)
