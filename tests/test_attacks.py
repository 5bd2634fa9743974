"""One battery over all attacks: the contract of `jdistill.attacks`, law by law.

A new attack is one more line in `CASES`. References for single attacks are in their own files.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jdistill import attacks, losses, nets, norms


class Case(NamedTuple):
    attack: Callable  # with its settings bound, all but eps
    norm: str
    budget: bool  # takes eps; otherwise it looks for the smallest distance
    random: bool  # its result depends on the key


CASES = {
    "fgsm-linf": Case(attacks.fgsm, "linf", True, False),
    "fgsm-l2": Case(functools.partial(attacks.fgsm, norm="l2"), "l2", True, False),
    "pgd-linf": Case(functools.partial(attacks.pgd, num_steps=8), "linf", True, True),
    "pgd-l2": Case(
        functools.partial(attacks.pgd, norm="l2", num_steps=8, num_restarts=2), "l2", True, True
    ),
    "carlini_wagner_l2": Case(
        functools.partial(
            attacks.carlini_wagner_l2,
            num_searches=5,
            num_steps=40,
            learning_rate=0.05,
            initial_const=0.01,
        ),
        "l2",
        False,
        False,
    ),
}
BUDGETS = {"linf": 0.1, "l2": 0.25}  # about half of the test network's examples fall

all_cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
budget_cases = pytest.mark.parametrize(
    "case", [c for c in CASES.values() if c.budget], ids=[n for n, c in CASES.items() if c.budget]
)
minimum_cases = pytest.mark.parametrize(
    "case",
    [c for c in CASES.values() if not c.budget],
    ids=[n for n, c in CASES.items() if not c.budget],
)

B, SHAPE, D, H, K = 8, (3, 2), 6, 8, 4
KEY = jax.random.key(7)


def run(case, logits_fn, inputs, labels, *, key=KEY, eps=None, **kwargs):
    if case.budget:
        kwargs["eps"] = BUDGETS[case.norm] if eps is None else eps
    return case.attack(logits_fn, key, inputs, labels, **kwargs)


TRACES = []


def network(weights, inputs):
    """A small smooth network; counts how often it is traced."""
    TRACES.append(inputs.shape)
    first, second = weights
    return jnp.tanh((inputs.reshape(inputs.shape[0], -1) - 0.5) @ first) @ second


def make(seed=0, scale=1.0):
    rng = np.random.default_rng(seed)
    first = rng.normal(0, 1.5, (D, H)).astype(np.float32)
    second = rng.normal(0, scale, (H, K)).astype(np.float32)
    return nets.callable_logits_fn(network, (jnp.asarray(first), jnp.asarray(second)))


def numpy_logits(logits_fn, inputs):
    first, second = (np.asarray(w, np.float64) for w in jax.tree.leaves(logits_fn))
    return np.tanh((np.asarray(inputs, np.float64).reshape(-1, D) - 0.5) @ first) @ second


def numpy_excess(logits, labels, targets=None):
    """By how much the goal is passed; above 0 is a success."""
    rows = np.arange(len(logits))
    goal = labels if targets is None else targets
    others = logits.copy()
    others[rows, goal] = -np.inf
    excess = others.max(1) - logits[rows, goal]
    return excess if targets is None else -excess


def numpy_distance(delta, norm):
    order = {"linf": np.inf, "l2": 2}[norm]
    return np.linalg.norm(np.asarray(delta, np.float64).reshape(len(delta), -1), order, axis=1)


MODEL = make()
INPUTS = np.random.default_rng(10).uniform(0, 1, (B, *SHAPE)).astype(np.float32)
CLEAN = numpy_logits(MODEL, INPUTS)
LABELS = CLEAN.argmax(1)  # all right, but for the last one
LABELS[-1] = CLEAN[-1].argmin()
WRONG = B - 1
TARGETS = np.argsort(CLEAN, axis=1)[:, -2]  # the runner-up


def not_tied(*excesses, logits=CLEAN):
    """Examples whose flag rounding cannot change."""
    scale = np.abs(logits).max(1)
    return np.all([np.abs(excess) > 1e-5 * scale for excess in excesses], axis=0)


def assert_same(first, second, *, labels=LABELS, logits_fn=MODEL, rtol=1e-4, targets=None):
    """Equal flags outside ties, equal distances."""
    excesses = [
        numpy_excess(numpy_logits(logits_fn, r.inputs), labels, targets) for r in (first, second)
    ]
    clear = not_tied(*excesses, logits=numpy_logits(logits_fn, first.inputs))
    assert clear.sum() >= len(clear) - 1
    np.testing.assert_array_equal(
        np.asarray(first.success)[clear], np.asarray(second.success)[clear]
    )
    np.testing.assert_allclose(
        np.asarray(first.distance)[clear], np.asarray(second.distance)[clear], rtol=rtol, atol=1e-6
    )


# -------------------------------------------------------------------------------------------------
# The result


@pytest.mark.floor
@all_cases
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_result_is_what_it_says(case, targeted):
    targets = TARGETS if targeted else None
    result = run(case, MODEL, INPUTS, LABELS, targets=targets)
    assert isinstance(result, attacks.AttackResult)
    assert result.inputs.shape == INPUTS.shape
    assert result.inputs.dtype == jnp.float32
    assert result.success.dtype == bool
    assert result.queries.dtype == jnp.int32
    for leaf in jax.tree.leaves(result):
        assert leaf.shape[0] == B
    # In the box, and in the ball where there is one.
    assert np.all((result.inputs >= 0) & (result.inputs <= 1))
    # The distance is that of the returned point, and `inf` where nothing was found.
    distance = numpy_distance(result.inputs - INPUTS, case.norm)
    if case.budget:
        assert np.all(distance <= BUDGETS[case.norm] * (1 + 1e-5))
        np.testing.assert_allclose(result.distance, distance, rtol=1e-5, atol=1e-7)
    else:
        expected = np.where(result.success, distance, np.inf)
        np.testing.assert_allclose(result.distance, expected, rtol=1e-5, atol=1e-7)
    # Success, computed anew in float64.
    excess = numpy_excess(numpy_logits(MODEL, result.inputs), LABELS, targets)
    clear = not_tied(excess)
    np.testing.assert_array_equal(np.asarray(result.success)[clear], excess[clear] > 0)
    # The attack did something: it broke examples that were right.
    before = numpy_excess(CLEAN, LABELS, targets) > 0
    assert np.asarray(result.success)[~before].sum() >= 2
    assert np.all(result.queries[~before] >= 2)


@all_cases
def test_an_example_already_wrong_is_left_alone(case):
    result = run(case, MODEL, INPUTS, LABELS)
    np.testing.assert_array_equal(result.inputs[WRONG], INPUTS[WRONG])
    assert (result.success[WRONG], result.distance[WRONG], result.queries[WRONG]) == (True, 0, 1)
    assert np.all(result.queries[:WRONG] > 1)


@all_cases
def test_an_example_already_at_its_target_is_left_alone(case):
    # The last example's label is wrong, but a targeted attack is after the target alone.
    targets = TARGETS.copy()
    targets[0] = CLEAN[0].argmax()
    result = run(case, MODEL, INPUTS, LABELS, targets=targets)
    np.testing.assert_array_equal(result.inputs[0], INPUTS[0])
    assert (result.success[0], result.distance[0], result.queries[0]) == (True, 0, 1)
    assert result.queries[WRONG] > 1


@budget_cases
def test_no_budget_no_change(case):
    eps = np.full(B, BUDGETS[case.norm], np.float32)
    eps[:4] = 0
    result = run(case, MODEL, INPUTS, LABELS, eps=eps)
    np.testing.assert_array_equal(result.inputs[:4], INPUTS[:4])
    np.testing.assert_array_equal(result.distance[:4], 0)
    assert not np.any(result.success[:4])
    assert np.all(result.distance[4:WRONG] > 0)


@budget_cases
def test_a_budget_per_example(case):
    eps = np.linspace(0.5, 1.5, B).astype(np.float32) * BUDGETS[case.norm]
    together = run(case, MODEL, INPUTS, LABELS, eps=eps, key=jax.random.split(KEY, B))
    assert np.all(together.distance <= eps * (1 + 1e-5))
    for b in (0, 5):
        alone = run(case, MODEL, INPUTS, LABELS, eps=float(eps[b]), key=jax.random.split(KEY, B))
        np.testing.assert_allclose(together.inputs[b], alone.inputs[b], atol=1e-6)


@all_cases
def test_the_box_may_be_any(case):
    # Rounding in mid + half * tanh(w) leaves such a box by one bit; so does a careless clip.
    low, high = -1.55, 2.46
    inputs = (low + (high - low) * INPUTS).clip(np.float32(low), np.float32(high))
    inputs[0], inputs[1] = np.float32(low), np.float32(high)  # on its faces
    bounds = (low, high)
    sums = nets.callable_logits_fn(corner, jnp.float32(2.46))
    result = run(
        case, MODEL, inputs, LABELS, bounds=bounds, **({"eps": 3.0} if case.budget else {})
    )
    far = run(
        case, sums, inputs, np.zeros(B, int), bounds=bounds, **({"eps": 9.0} if case.budget else {})
    )
    for one in (result, far):
        assert np.all((one.inputs >= np.float32(low)) & (one.inputs <= np.float32(high)))
        assert np.all(np.isfinite(one.inputs))


def corner(high, inputs):
    """Right (class 0) but in the corner where every input is within 1e-3 of `high`."""
    excess = jnp.sum(inputs.reshape(inputs.shape[0], -1) - high, axis=1) + 1e-3
    return jnp.stack([-excess, excess], axis=1)


@all_cases
def test_one_input_axis_and_two_classes(case):
    # Tabular inputs [B, D]; K = 2.
    weights = jnp.array([[1.0, -1.0], [-2.0, 0.5], [0.3, 0.3]])
    inputs = np.random.default_rng(0).uniform(0.3, 0.7, (5, 3)).astype(np.float32)
    logits_fn = nets.callable_logits_fn(linear, (weights, jnp.zeros(2)))
    labels = np.argmax(logits_fn(inputs), axis=1)
    result = run(case, logits_fn, inputs, labels, eps=0.9)
    assert np.all(result.success)
    assert np.all(np.argmax(inputs @ weights, 1) != np.argmax(result.inputs @ weights, 1))


def linear(weights, inputs):
    matrix, bias = weights
    return inputs.reshape(inputs.shape[0], -1) @ matrix + bias[None]


# -------------------------------------------------------------------------------------------------
# Exact optima: a linear network, the box inactive


def linear_problem(num_classes, seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(0, 1, (D, num_classes)).astype(np.float32)
    inputs = rng.uniform(0.45, 0.55, (B, *SHAPE)).astype(np.float32)
    bias = -(0.5 * matrix.sum(0)).astype(np.float32)
    logits = inputs.reshape(B, D).astype(np.float64) @ matrix + bias
    labels = logits.argmax(1)
    logits_fn = nets.callable_logits_fn(linear, (jnp.asarray(matrix), jnp.asarray(bias)))
    return logits_fn, inputs, labels, matrix.astype(np.float64), logits


def exact_distances(matrix, logits, labels, norm):
    """The distance to each other class's boundary, |f| / ‖Δw‖ in the dual norm, `[B, K]`."""
    dual = {"linf": 1, "l2": 2}[norm]
    gaps = logits[np.arange(len(labels)), labels][:, None] - logits
    slopes = matrix.T[labels][:, None] - matrix.T[None]  # [B, K, D]
    lengths = np.linalg.norm(slopes, dual, axis=2)
    return np.where(lengths > 0, gaps / np.where(lengths > 0, lengths, 1), np.inf)


@pytest.mark.floor
@budget_cases
def test_budget_attacks_on_two_classes_succeed_exactly_beyond_the_boundary(case):
    logits_fn, inputs, labels, matrix, logits = linear_problem(2, seed=3)
    exact = exact_distances(matrix, logits, labels, case.norm).min(1)
    assert exact.max() < 0.2  # far from the box
    for factor, expected in [(0.999, False), (1.001 if not case.random else 1.05, True)]:
        result = run(case, logits_fn, inputs, labels, eps=(factor * exact).astype(np.float32))
        np.testing.assert_array_equal(result.success, np.full(B, expected))


@budget_cases
def test_budget_attacks_on_many_classes_never_beat_the_optimum(case):
    logits_fn, inputs, labels, matrix, logits = linear_problem(5, seed=4)
    exact = exact_distances(matrix, logits, labels, case.norm).min(1)
    assert not np.any(run(case, logits_fn, inputs, labels, eps=0.999 * exact).success)
    assert np.sum(run(case, logits_fn, inputs, labels, eps=1.5 * exact).success) >= B // 2


@minimum_cases
@pytest.mark.parametrize("targeted", [False, True], ids=["untargeted", "targeted"])
def test_minimum_norm_attacks_find_the_optimum(case, targeted):
    logits_fn, inputs, labels, matrix, logits = linear_problem(5, seed=4)
    exact = exact_distances(matrix, logits, labels, case.norm)
    kwargs = {"targets": exact.argmin(1)} if targeted else {}
    result = run(
        case, logits_fn, inputs, labels, num_searches=9, num_steps=100, learning_rate=0.01, **kwargs
    )
    assert np.all(result.success)
    ratio = np.asarray(result.distance) / exact.min(1)
    assert ratio.min() >= 1 - 1e-5
    assert ratio.max() <= 1.02


# -------------------------------------------------------------------------------------------------
# What is no success, and broken networks


@all_cases
def test_a_tie_is_no_success(case):
    def tied(inputs):
        total = jnp.sum(inputs, axis=(1, 2))
        return jnp.stack([total, total, total - 1], axis=1)

    for label in (0, 1):
        result = run(case, tied, INPUTS, np.full(B, label))
        assert not np.any(result.success)
        targeted = run(case, tied, INPUTS, np.full(B, 2), targets=np.full(B, label))
        assert not np.any(targeted.success)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@all_cases
def test_broken_logits_of_an_adversarial_are_no_success(case, bad):
    # Right where the total is small; across the boundary one logit is broken.
    def broken(inputs):
        gap = jnp.sum(inputs, axis=(1, 2)) - D / 2
        return jnp.stack([-gap, gap, jnp.where(gap > 0, bad, -5.0)], axis=1)

    inputs = np.full((B, *SHAPE), 0.48, np.float32)
    result = run(case, broken, inputs, np.zeros(B, int), eps=0.5)
    assert not np.any(result.success)
    assert np.all(np.isfinite(result.inputs))
    if not case.budget:
        np.testing.assert_array_equal(result.inputs, inputs)
        assert np.all(np.isinf(result.distance))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@all_cases
def test_broken_clean_logits_count_as_misclassified_and_stay_alone(case, bad):
    def fragile(weights, inputs):
        hit = inputs[:, :1, 0] == 1.0
        return jnp.where(hit, bad, network(weights, inputs))

    inputs = INPUTS.copy()
    inputs[2, 0, 0] = 1.0
    logits_fn = nets.callable_logits_fn(fragile, jax.tree.leaves(MODEL))
    keys = jax.random.split(KEY, B)
    result = run(case, logits_fn, inputs, LABELS, key=keys)
    assert (result.success[2], result.distance[2], result.queries[2]) == (True, 0, 1)
    np.testing.assert_array_equal(result.inputs[2], inputs[2])
    # The neighbours fare as they do without it.
    others = np.arange(B) != 2
    healthy = run(case, MODEL, INPUTS, LABELS, key=keys)
    np.testing.assert_array_equal(result.success[others], healthy.success[others])
    np.testing.assert_allclose(result.inputs[others], healthy.inputs[others], atol=1e-5)


@all_cases
def test_nothing_to_follow_ends_cleanly(case):
    def constant(inputs):
        return jnp.zeros((inputs.shape[0], 3)).at[:, 1].set(1.0) + 0 * inputs[:, 0, :1]

    result = run(case, constant, INPUTS, np.ones(B, int))
    assert not np.any(result.success)
    assert np.all((result.inputs >= 0) & (result.inputs <= 1))
    if case.budget:
        assert np.all(result.distance <= BUDGETS[case.norm] * (1 + 1e-5))
        assert case.random or np.all(result.distance == 0)
    else:
        np.testing.assert_array_equal(result.inputs, INPUTS)
        assert np.all(np.isinf(result.distance))


@all_cases
def test_inputs_that_are_traced_and_broken_stay_alone(case):
    # Under jit no check can see the NaN; it must not reach the other rows.
    inputs = INPUTS.copy()
    inputs[2] = np.nan
    keys = jax.random.split(KEY, B)
    result = jax.jit(lambda x: run(case, MODEL, x, LABELS, key=keys))(inputs)
    healthy = run(case, MODEL, INPUTS, LABELS, key=keys)
    others = np.arange(B) != 2
    np.testing.assert_array_equal(result.success[others], healthy.success[others])
    np.testing.assert_allclose(result.inputs[others], healthy.inputs[others], atol=1e-5)


def test_a_saturated_softmax_stops_the_cross_entropy_and_not_the_margin():
    # The claim about distillation in one test: logits times 10^4 leave no gradient to FGSM.
    hot = make(scale=1e4)
    right = LABELS.copy()
    right[WRONG] = CLEAN[WRONG].argmax()
    masked = attacks.fgsm(hot, None, INPUTS, right, eps=0.3)
    np.testing.assert_array_equal(masked.inputs, INPUTS)
    assert not np.any(masked.success)
    honest = attacks.fgsm(hot, None, INPUTS, right, eps=0.3, loss=losses.margin)
    plain = attacks.fgsm(MODEL, None, INPUTS, right, eps=0.3, loss=losses.margin)
    assert np.mean(honest.success) > 0.7
    np.testing.assert_array_equal(honest.success, plain.success)
    found = run(CASES["carlini_wagner_l2"], hot, INPUTS, right)
    assert np.all(found.success)


# -------------------------------------------------------------------------------------------------
# Keys and batches


@all_cases
def test_one_key_is_folded_with_the_position(case):
    one = run(case, MODEL, INPUTS, LABELS, key=KEY)
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(B))
    many = run(case, MODEL, INPUTS, LABELS, key=keys)
    raw = run(case, MODEL, INPUTS, LABELS, key=jax.random.key_data(KEY))  # an old-style key
    for leaf, *same in zip(*map(jax.tree.leaves, (one, many, raw)), strict=True):
        for other in same:
            np.testing.assert_array_equal(leaf, other)


@all_cases
def test_same_key_same_result_and_another_key_another(case):
    first = run(case, MODEL, INPUTS, LABELS)
    again = run(case, MODEL, INPUTS, LABELS)
    other = run(case, MODEL, INPUTS, LABELS, key=jax.random.key(8))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert np.array_equal(first.inputs, other.inputs) != case.random
    if not case.random:
        jax.tree.map(
            np.testing.assert_array_equal, first, run(case, MODEL, INPUTS, LABELS, key=None)
        )


@pytest.mark.floor
@all_cases
def test_order_split_and_padding_of_the_batch_change_nothing(case):
    keys = jax.random.split(KEY, B)
    whole = run(case, MODEL, INPUTS, LABELS, key=keys)

    order = np.random.default_rng(1).permutation(B)
    permuted = run(case, MODEL, INPUTS[order], LABELS[order], key=keys[order])
    back = np.argsort(order)
    assert_same(jax.tree.map(lambda leaf: leaf[back], permuted), whole)

    halves = [slice(0, 3), slice(3, B)]
    split = [run(case, MODEL, INPUTS[h], LABELS[h], key=keys[h]) for h in halves]
    assert_same(jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *split), whole)

    padding = np.concatenate([np.arange(B), np.zeros(5, int)])
    padded = run(case, MODEL, INPUTS[padding], LABELS[padding], key=keys[padding])
    assert_same(jax.tree.map(lambda leaf: leaf[:B], padded), whole)
    np.testing.assert_array_equal(padded.queries[B:], padded.queries[:1].repeat(5))


@pytest.mark.parametrize("name", ["pgd-linf", "pgd-l2", "carlini_wagner_l2"])
def test_the_trace_does_not_depend_on_the_neighbours(name):
    # An example that stops early keeps what it recorded while the others go on.
    keys = jax.random.split(KEY, B)
    whole = run(CASES[name], MODEL, INPUTS, LABELS, key=keys, trace=True)
    recorded = np.isfinite(whole.info["loss"]).reshape(B, -1).sum(1)
    # One forward pass before the loop, and the verification after it.
    queries = np.where(np.arange(B) == WRONG, 0, np.asarray(whole.queries) - 2)
    restarts = np.asarray(whole.info.get("restart", np.zeros(B, int)))  # a restart judges once more
    np.testing.assert_array_equal(recorded, queries - restarts)
    early = int(np.argmin(np.where(recorded > 0, recorded, 999)))
    alone = run(CASES[name], MODEL, INPUTS[[early]], LABELS[[early]], key=keys[[early]], trace=True)
    np.testing.assert_allclose(alone.info["loss"][0], whole.info["loss"][early], rtol=1e-4)


@all_cases
def test_an_empty_batch_is_an_empty_result(case):
    result = run(case, MODEL, INPUTS[:0], LABELS[:0])
    assert result.inputs.shape == (0, *SHAPE)
    assert result.success.shape == (0,)


# -------------------------------------------------------------------------------------------------
# Compilation: jit, vmap, and nothing compiled twice


@all_cases
def test_under_jit_with_everything_traced(case):
    @jax.jit
    def call(logits_fn, key, inputs, labels, targets, scale):
        eps = scale * BUDGETS[case.norm]
        return run(case, logits_fn, inputs, labels, key=key, targets=targets, eps=eps)

    eager = run(case, MODEL, INPUTS, LABELS, targets=TARGETS)
    assert_same(call(MODEL, KEY, INPUTS, LABELS, TARGETS, 1.0), eager, targets=TARGETS)


@pytest.mark.floor
@all_cases
def test_vmapped_over_networks_is_looped(case):
    models = [make(seed) for seed in range(3)]
    # Labels for all three: some right, some wrong.
    vmapped = jax.vmap(lambda f: run(case, f, INPUTS, LABELS))(nets.stack(models))
    for r, model in enumerate(models):
        assert_same(
            jax.tree.map(lambda leaf, r=r: leaf[r], vmapped),
            run(case, model, INPUTS, LABELS),
            logits_fn=model,
        )


@pytest.mark.floor
@all_cases
def test_new_weights_eps_and_temperature_compile_nothing(case):
    keyed = jax.random.split(KEY, B)

    def call(model, temperature, eps, key=KEY):
        return run(
            case, nets.with_temperature(model, temperature), INPUTS, LABELS, eps=eps, key=key
        )

    first = call(MODEL, 1.0, 0.05)
    count = len(TRACES)
    assert count > 0
    second = call(make(1), 20.0, 0.1)
    call(MODEL, 1.0, np.linspace(0, 0.1, B).astype(np.float32), keyed)
    call(make(2), np.float64(3.0), 0, jax.random.key(1))
    if not case.budget:
        run(
            case,
            nets.with_temperature(MODEL, 2.0),
            INPUTS,
            LABELS,
            confidence=0.5,
            learning_rate=0.02,
            initial_const=0.1,
        )
    assert len(TRACES) == count
    assert not np.array_equal(first.inputs, second.inputs)


@all_cases
def test_a_plain_function_will_do_and_is_traced_once(case):
    first, second = jax.tree.leaves(MODEL)
    calls = []

    def plain(inputs):
        calls.append(1)
        return jnp.tanh((inputs.reshape(inputs.shape[0], -1) - 0.5) @ first) @ second

    result = run(case, plain, INPUTS, LABELS)
    count = len(calls)
    run(case, plain, INPUTS, LABELS)
    assert len(calls) == count
    assert_same(result, run(case, MODEL, INPUTS, LABELS))


@pytest.mark.parametrize("name", ["fgsm-linf", "pgd-linf"])
def test_a_loss_with_a_traced_temperature(name):
    case = CASES[name]
    partial = jax.tree_util.Partial(losses.cross_entropy, temperature=jnp.float32(20.0))
    result = run(case, MODEL, INPUTS, LABELS, loss=partial)
    count = len(TRACES)
    hotter = jax.tree_util.Partial(losses.cross_entropy, temperature=jnp.float32(50.0))
    run(case, MODEL, INPUTS, LABELS, loss=hotter)
    assert len(TRACES) == count
    bound = functools.partial(losses.cross_entropy, temperature=20.0)
    np.testing.assert_allclose(
        run(case, MODEL, INPUTS, LABELS, loss=bound).inputs, result.inputs, atol=1e-6
    )


def equations(jaxpr):
    """Every equation, those of inner functions and loops included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


@pytest.mark.floor
@all_cases
def test_products_are_at_full_precision_unless_chosen(case):
    def precisions():
        # A fresh function: the trace of an old one would be reused.
        traced = jax.make_jaxpr(
            lambda x: run(case, lambda z: network(jax.tree.leaves(MODEL), z), x, LABELS)
        )(INPUTS)
        found = [
            e.params["precision"]
            for e in equations(traced.jaxpr)
            if e.primitive.name == "dot_general"
        ]
        assert len(found) >= 6  # clean or first forward pass, gradient, verification
        return {str(entry) for entry in found}

    highest = jax.lax.Precision.HIGHEST
    assert precisions() == {str((highest, highest))}
    with jax.default_matmul_precision("bfloat16"):
        assert str((highest, highest)) not in precisions()


@all_cases
def test_double_precision_is_kept(case):
    with jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64():
        model = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), make(0))
        result = run(case, model, INPUTS.astype(np.float64), LABELS)
        assert result.inputs.dtype == result.distance.dtype == np.float64
        assert result.queries.dtype == np.int32
        assert np.any(result.success[:WRONG])


# -------------------------------------------------------------------------------------------------
# Bad input: the error names the value


@all_cases
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": np.where(np.arange(D).reshape(SHAPE) == 3, np.nan, INPUTS)}, "got nan at"),
        ({"inputs": INPUTS + 1}, r"expected inputs in \[0, 1\], got 1\.\d+ at index \(0, 0, 0\)"),
        ({"inputs": INPUTS, "bounds": (0.25, 0.75)}, r"expected inputs in \[0.25, 0.75\]"),
        ({"inputs": (INPUTS * 255).astype(np.uint8)}, "expected floating-point inputs, got dtype"),
        ({"inputs": INPUTS[0, 0]}, "expected inputs of shape"),
        ({"labels": LABELS + K}, r"expected labels in 0\.\.3 .*, got \d at index 0"),
        ({"labels": LABELS - 5}, r"expected labels in 0\.\.3 .*, got -\d at index 0"),
        ({"labels": np.eye(K)[LABELS]}, r"expected labels of shape \[B\] = \(8,\), got .*\(8, 4\)"),
        ({"labels": LABELS[:-1]}, r"expected labels of shape .* got shape \(7,\)"),
        ({"labels": LABELS.astype(float)}, "expected integer labels, got dtype float64"),
        ({"targets": LABELS + K}, r"expected targets in 0\.\.3"),
        ({"bounds": (1.0, 0.0)}, r"expected bounds=\(low, high\) finite .*got \(1.0, 0.0\)"),
        ({"logits_fn": lambda x: x}, r"expected logits of shape \[B, K\]"),
        ({"logits_fn": lambda x: x[:, 0, :1]}, "at least 2"),
        ({"logits_fn": 3}, "expected a callable, got int"),
    ],
)
def test_bad_input_is_named(case, change, message):
    arguments = {"logits_fn": MODEL, "inputs": INPUTS, "labels": LABELS} | change
    with pytest.raises(ValueError, match=message):
        run(case, **arguments)


@budget_cases
@settings(max_examples=12, deadline=None)
@given(eps=st.floats().filter(lambda e: not 0 <= e < np.inf))
def test_a_bad_eps_is_named(case, eps):
    with pytest.raises(ValueError, match="expected eps >= 0, got") as error:
        run(case, MODEL, INPUTS, LABELS, eps=eps)
    assert repr(eps) in str(error.value)


@budget_cases
def test_bad_eps_arrays_and_norms_are_named(case):
    eps = np.full(B, 0.1)
    eps[3] = -0.5
    with pytest.raises(ValueError, match="got -0.5 at index 3"):
        run(case, MODEL, INPUTS, LABELS, eps=eps)
    with pytest.raises(ValueError, match=r"scalar or of shape \[B\] = \(8,\), got \(3,\)"):
        run(case, MODEL, INPUTS, LABELS, eps=eps[:3])
    with pytest.raises(ValueError, match="expected norm to be one of 'linf', 'l2', got 'l7'"):
        run(case, MODEL, INPUTS, LABELS, norm="l7")
    with pytest.raises(TypeError, match="eps"):
        case.attack(MODEL, KEY, INPUTS, LABELS)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.random])
@pytest.mark.parametrize(
    ("key", "message"),
    [
        (jax.random.key(0, impl="rbg"), "expected a Threefry key, got rbg"),
        (jax.random.split(jax.random.key(0), 3), r"expected one key or \[B\] = \(8,\) keys, got"),
        (None, "expected a PRNG key for random starts, got None"),
        (0, "expected a PRNG key, got 0"),
        ("key", "expected a PRNG key, got 'key'"),
    ],
)
def test_bad_keys_are_named(name, key, message):
    with pytest.raises(ValueError, match=message):
        run(CASES[name], MODEL, INPUTS, LABELS, key=key)


# -------------------------------------------------------------------------------------------------
# A convolutional network of the library


@all_cases
def test_a_network_of_the_library(case):
    model = nets.ConvNet(features=((4,),), hidden=(8,), num_classes=3, dropout_rate=0.0)
    params = [nets.init(model, jax.random.key(seed), (6, 6, 1))[0] for seed in range(2)]
    inputs = np.random.default_rng(0).uniform(0, 1, (4, 6, 6, 1)).astype(np.float32)
    wide = {"eps": 0.5 if case.norm == "linf" else 3.0}
    stacked = nets.stack([nets.logits_fn(model, {"params": p}) for p in params])
    labels = np.argmax(nets.index(stacked, 0)(inputs), axis=1)
    vmapped = jax.vmap(lambda f: run(case, f, inputs, labels, **wide))(stacked)
    assert np.any(vmapped.success[0])
    for r in range(2):
        logits_fn = nets.index(stacked, r)
        looped = run(case, logits_fn, inputs, labels, **wide)
        np.testing.assert_array_equal(vmapped.success[r], looped.success)
        np.testing.assert_allclose(vmapped.distance[r], looped.distance, rtol=1e-3)
        excess = losses.margin(logits_fn(looped.inputs), labels)
        np.testing.assert_array_equal(looped.success, excess > 0)
        assert np.all(
            norms.distance(looped.inputs - inputs, case.norm)
            <= (wide["eps"] + 1e-5 if case.budget else np.inf)
        )
