"""The field's distillation losses against NumPy in float64, and their laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from jdistill import losses
from tests.tiny import double_precision

B, K = 6, 5
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 3, (B, K)).astype(np.float32)
TEACHER = RNG.normal(2, 6, (B, K)).astype(np.float32)
LABELS = np.array([0, 4, 2, 1, 3, 3])
MASK = np.array([1, 1, 0, 1, 1, 0], np.float32)
REAL = MASK > 0


def softmax(logits, temperature=1.0):
    scaled = np.asarray(logits, np.float64) / temperature
    powers = np.exp(scaled - scaled.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def kl(targets, probs):
    return (targets * np.log(targets / probs)).sum(-1)


def numpy_decoupled(logits, teacher, labels, temperature):
    """TCKD and NCKD, example by example."""
    found = []
    for z, t, y in zip(logits, teacher, labels, strict=True):
        p, q = softmax(t, temperature), softmax(z, temperature)
        binary = kl(np.array([p[y], 1 - p[y]]), np.array([q[y], 1 - q[y]]))
        rest = np.delete(p, y) / (1 - p[y]), np.delete(q, y) / (1 - q[y])
        found.append((binary, kl(*rest)))
    return np.array(found).T


# Decoupled


@pytest.mark.floor
@pytest.mark.parametrize("temperature", [1.0, 4.0, 100.0])
def test_decoupled_against_numpy(temperature):
    binary, others = numpy_decoupled(LOGITS, TEACHER, LABELS, temperature)
    close = dict(rtol=1e-4, atol=1e-6)
    found = losses.decoupled_kl(LOGITS, TEACHER, LABELS, temperature=temperature)
    assert found.shape == (B,)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, binary + 8 * others, **close)
    alpha, beta = np.float32([0, 1, 2, 0, 1, 0.5]), np.float32([1, 0, 3, 0, 1, 0.25])
    weighed = losses.decoupled_kl(
        LOGITS, TEACHER, LABELS, temperature=np.full((B, 1), temperature), alpha=alpha, beta=beta
    )
    np.testing.assert_allclose(weighed, alpha * binary + beta * others, **close)


@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_the_divergence_of_all_classes_is_decoupled_exactly(temperature):
    with double_precision():
        logits, teacher = LOGITS.astype(np.float64), TEACHER.astype(np.float64)
        targets = softmax(teacher, temperature)
        found = losses.decoupled_kl(
            logits,
            teacher,
            LABELS,
            temperature=temperature,
            alpha=1.0,
            beta=1 - targets[np.arange(B), LABELS],
        )
        whole = losses.kl_divergence(logits, targets, temperature=temperature)
        np.testing.assert_allclose(found, whole, rtol=1e-12, atol=1e-14)


@pytest.mark.floor
def test_of_two_classes_the_other_is_alone():
    logits = np.array([[0.0, 3.0], [1e3, -1e3], [-1e3, 1e3], [5.0, 5.0]], np.float32)
    teacher = np.array([[2.0, 1.0], [-1e3, 1e3], [-1e3, 1e3], [1e3, -1e3]], np.float32)
    labels = np.array([0, 1, 1, 0])

    def loss(z, t, alpha=1.0, beta=8.0):
        settings = dict(temperature=2.0, alpha=alpha, beta=beta)
        return losses.decoupled_kl(z, t, labels, **settings)

    np.testing.assert_array_equal(loss(logits, teacher, alpha=0.0), np.zeros(4))
    targets = softmax(teacher, 2.0).astype(np.float32)
    whole = losses.kl_divergence(logits, targets, temperature=2.0)
    np.testing.assert_allclose(loss(logits, teacher), whole, rtol=1e-5)
    own, its = jax.grad(lambda z, t: loss(z, t).sum(), argnums=(0, 1))(logits, teacher)
    np.testing.assert_allclose(own, (softmax(logits, 2.0) - targets) / 2, atol=1e-6)
    assert np.isfinite(its).all()


def test_no_logit_is_too_large_to_be_taken_out():
    # After subtracting 1,000 the label of the first would still be the largest of the others.
    logits = np.array([[5e3, 0.0, 1.0], [-1e3, 1e3, 0.0], [1e3, -1e3, -1e3]], np.float32)
    teacher = np.array([[4e3, 1.0, 0.0], [1e3, -1e3, 0.0], [-1e3, 0.0, 1e3]], np.float32)
    labels = np.array([0, 1, 2])

    def others(z, t):
        return losses.decoupled_kl(z, t, labels, temperature=1.0, alpha=0.0, beta=1.0)

    p = softmax(np.array([[1.0, 0.0]]))
    expected = [kl(p, p[:, ::-1])[0], 1e3, 2e3]
    np.testing.assert_allclose(others(logits, teacher), expected, rtol=1e-6)
    both = losses.decoupled_kl(logits, teacher, labels, temperature=1.0, beta=1.0)
    np.testing.assert_allclose(both, np.add(expected, [0.0, 1e3, 2e3]), rtol=1e-6)
    for order in (0, 1):
        gradient = jax.grad(lambda *args: others(*args).sum(), argnums=order)(logits, teacher)
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[np.arange(3), labels], 0.0)


@pytest.mark.floor
def test_a_masked_class_is_no_class():
    more = jnp.full((B, 2), -jnp.inf)

    def widened(z, t, labels=LABELS):
        z, t = (jnp.concatenate([each, more], axis=1) for each in (z, t))
        return losses.decoupled_kl(z, t, labels, temperature=2.0)

    def plain(z, t):
        return losses.decoupled_kl(z, t, LABELS, temperature=2.0)

    np.testing.assert_allclose(widened(LOGITS, TEACHER), plain(LOGITS, TEACHER), rtol=1e-5)
    for order in (0, 1):
        ours, theirs = (
            jax.grad(lambda *args, f=f: f(*args).sum(), argnums=order)(LOGITS, TEACHER)
            for f in (widened, plain)
        )
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    # No other class is left, or the label itself is masked: the same in both is no divergence.
    rows = jnp.array([[3.0, -jnp.inf, -jnp.inf], [-jnp.inf, 1.0, 2.0]])
    labels = np.array([0, 0])
    same = lambda z, t: losses.decoupled_kl(z, t, labels, temperature=1.0)  # noqa: E731
    expected = [0.0, 8 * kl(softmax([2.0, 4.0]), softmax([1.0, 2.0]))]
    np.testing.assert_allclose(same(rows, 2 * rows), expected, rtol=1e-5)
    for order in (0, 1):
        gradient = jax.grad(lambda *args: same(*args).sum(), argnums=order)(rows, 2 * rows)
        assert np.isfinite(gradient).all()


# Correlations


def correlation_distance(one, two):
    return 1 - np.corrcoef(np.asarray(one, np.float64), np.asarray(two, np.float64))[0, 1]


def numpy_inter(logits, teacher, temperature):
    rows = zip(softmax(logits, temperature), softmax(teacher, temperature), strict=True)
    return np.array([correlation_distance(*pair) for pair in rows])


def numpy_intra(logits, teacher, temperature):
    columns = softmax(logits, temperature).T, softmax(teacher, temperature).T
    return np.mean([correlation_distance(*pair) for pair in zip(*columns, strict=True)])


@pytest.mark.floor
@pytest.mark.parametrize("temperature", [1.0, 4.0, 1e5])
def test_correlations_against_numpy(temperature):
    found = losses.inter_class_distance(LOGITS, TEACHER, temperature=temperature)
    assert found.shape == (B,)
    assert found.dtype == jnp.float32
    expected = numpy_inter(LOGITS, TEACHER, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    found = losses.intra_class_distance(LOGITS, TEACHER, MASK, temperature=temperature)
    assert found.dtype == jnp.float32
    expected = numpy_intra(LOGITS[REAL], TEACHER[REAL], temperature)
    np.testing.assert_allclose(found, np.where(REAL, expected, 0.0), rtol=1e-4, atol=1e-6)
    column = losses.intra_class_distance(
        LOGITS, TEACHER, MASK > 0, temperature=np.full((B, 1), temperature)
    )
    np.testing.assert_allclose(column, found, rtol=1e-6)
    bare = losses.pearson_distance(LOGITS, TEACHER)
    rows = zip(LOGITS, TEACHER, strict=True)
    np.testing.assert_allclose(bare, [correlation_distance(*pair) for pair in rows], rtol=1e-5)
    if temperature == 1e5:  # the limit
        hot = losses.inter_class_distance(LOGITS, TEACHER, temperature=temperature)
        np.testing.assert_allclose(hot, bare, rtol=1e-3)


@pytest.mark.floor
def test_a_class_that_is_rare_in_all_rows_has_its_correlation():
    # 1 / K and a billionth is 1 / K in float32.
    away = np.float32([25, 0, 0, 0, 0])[None]
    found = losses.intra_class_distance(LOGITS - away, TEACHER - away, MASK)
    expected = numpy_intra((LOGITS - away)[REAL], (TEACHER - away)[REAL], 1.0)
    np.testing.assert_allclose(found[0], expected, rtol=1e-4)


def test_pearson_knows_neither_scale_nor_shift_and_dist_no_shift():
    bare = losses.pearson_distance(LOGITS, TEACHER)
    inter = losses.inter_class_distance(LOGITS, TEACHER)
    intra = losses.intra_class_distance(LOGITS, TEACHER, MASK)
    shift = np.arange(B, dtype=np.float32)[:, None] * 64 - 100
    for own, its in ((LOGITS + shift, TEACHER), (LOGITS, TEACHER - shift)):
        for scale in (2.0**-100, 0.13, 1024.0, 2.0**110):
            found = losses.pearson_distance(np.float32(scale) * own, its)
            np.testing.assert_allclose(found, bare, rtol=1e-4, atol=1e-5)
        found = losses.inter_class_distance(own, its)
        np.testing.assert_allclose(found, inter, rtol=1e-3, atol=1e-5)
        found = losses.intra_class_distance(own, its, MASK)
        np.testing.assert_allclose(found, intra, rtol=1e-3, atol=1e-5)
    # The scale of the logits is no scale of probabilities.
    assert np.abs(losses.inter_class_distance(3 * LOGITS, TEACHER) - inter).max() > 0.05
    np.testing.assert_allclose(losses.pearson_distance(LOGITS, -LOGITS), 2.0, rtol=1e-6)
    gradient = jax.grad(lambda z: losses.pearson_distance(z, TEACHER).sum())(LOGITS)
    np.testing.assert_allclose((gradient * LOGITS).sum(1), 0.0, atol=1e-6)
    np.testing.assert_allclose(gradient.sum(1), 0.0, atol=1e-6)


def test_correlations_are_0_at_the_teacher_and_at_linear_functions_of_its_probabilities():
    for loss in (losses.pearson_distance, losses.inter_class_distance):
        np.testing.assert_allclose(loss(LOGITS, LOGITS), 0.0, atol=1e-9)
        assert loss(LOGITS, TEACHER).min() > 0.01
    probs = softmax(TEACHER)
    less_sure = np.log(0.4 * probs + 0.6 / K).astype(np.float32)
    np.testing.assert_allclose(losses.inter_class_distance(less_sure, TEACHER), 0.0, atol=1e-6)
    found = losses.intra_class_distance(less_sure, TEACHER, np.ones(B))
    np.testing.assert_allclose(found, 0.0, atol=1e-6)


@pytest.mark.floor
def test_padding_counts_for_nothing_whatever_it_holds():
    def value(z, t, mask):
        return jnp.sum(losses.intra_class_distance(z, t, mask) * jnp.asarray(mask)) / 4

    alone = value(LOGITS[REAL], TEACHER[REAL], np.ones(4))
    expected = jax.grad(value, argnums=(0, 1))(LOGITS[REAL], TEACHER[REAL], np.ones(4))
    for junk in (0.0, 1e30, np.nan, np.inf, -np.inf):
        own, its = LOGITS.copy(), TEACHER.copy()
        own[~REAL], its[~REAL] = junk, -junk
        np.testing.assert_allclose(value(own, its, MASK), alone, rtol=1e-6)
        found = jax.grad(value, argnums=(0, 1))(own, its, MASK)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours[REAL], theirs, rtol=1e-5, atol=1e-8)
            np.testing.assert_array_equal(ours[~REAL], 0.0)
    # In any order, and with a mask that is traced.
    order = np.array([3, 5, 0, 1, 2, 4])
    turned = value(LOGITS[order], TEACHER[order], MASK[order])
    np.testing.assert_allclose(turned, alone, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(value)(LOGITS, TEACHER, MASK), alone, rtol=1e-6)


@pytest.mark.floor
@pytest.mark.parametrize("constant", [0.0, 0.1, 1e30])
def test_rows_and_columns_without_a_spread(constant):
    equal = np.full((B, K), constant, np.float32)
    for loss in (losses.pearson_distance, losses.inter_class_distance):
        for pair in ((equal, TEACHER), (TEACHER, equal), (equal, equal)):
            np.testing.assert_allclose(loss(*pair), 1.0, rtol=1e-6)
        gradient = jax.grad(lambda z, loss=loss: loss(z, TEACHER).sum())(equal)
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0.01  # a student that starts there can leave
    found = losses.intra_class_distance(equal, TEACHER, MASK)
    np.testing.assert_allclose(found, MASK, rtol=1e-6)
    gradient = jax.grad(lambda z: losses.intra_class_distance(z, TEACHER, MASK).sum())(equal)
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0.01
    # One example has no correlation.
    alone = np.eye(B, dtype=np.float32)[2]
    np.testing.assert_array_equal(losses.intra_class_distance(LOGITS, TEACHER, alone), alone)
    gradient = jax.grad(lambda z: losses.intra_class_distance(z, TEACHER, alone).sum())(LOGITS)
    np.testing.assert_array_equal(gradient, np.zeros((B, K)))


def test_correlations_of_masked_classes():
    more = np.full((B, 2), -np.inf, np.float32)
    own, its = np.concatenate([LOGITS, more], 1), np.concatenate([TEACHER, more], 1)
    junk = np.concatenate([TEACHER, RNG.normal(size=(B, 2)).astype(np.float32)], 1)
    every = {
        "pearson": losses.pearson_distance,
        "inter": losses.inter_class_distance,
        "intra": lambda z, t: losses.intra_class_distance(z, t, MASK),
    }
    for name, loss in every.items():
        expected = loss(LOGITS, TEACHER)
        np.testing.assert_allclose(loss(own, its), expected, rtol=1e-5, err_msg=name)
        if name == "pearson":
            np.testing.assert_allclose(loss(own, junk), expected, rtol=1e-5)
        for order in (0, 1):
            grad = jax.grad(lambda *args, f=loss: f(*args).sum(), argnums=order)
            found, plain = grad(own, its), grad(LOGITS, TEACHER)
            np.testing.assert_allclose(found[:, :K], plain, rtol=1e-4, atol=1e-6, err_msg=name)
            np.testing.assert_array_equal(found[:, K:], 0.0)
    # A class that one row alone lacks leaves that class's correlation to the other rows.
    rows = TEACHER.copy()
    rows[0, 0] = -np.inf
    gradient = jax.grad(lambda z: losses.intra_class_distance(z, rows, MASK).sum())(LOGITS)
    assert np.isfinite(gradient).all()


# Features

FEATURES = RNG.normal(size=(B, 4, 3, 7)).astype(np.float32)
TAUGHT = RNG.normal(size=(B, 4, 3, 5)).astype(np.float32)


@pytest.mark.floor
def test_hint_against_numpy():
    other = RNG.normal(size=FEATURES.shape).astype(np.float32)
    found = losses.hint(FEATURES, other)
    assert found.shape == (B,)
    assert found.dtype == jnp.float32
    gap = FEATURES.astype(np.float64) - other
    np.testing.assert_allclose(found, (gap**2).reshape(B, -1).mean(1), rtol=1e-5)
    np.testing.assert_array_equal(losses.hint(FEATURES, FEATURES), np.zeros(B))
    moved = FEATURES.copy()
    moved[2, 1, 1, 1] += 0.5
    np.testing.assert_allclose(losses.hint(moved, FEATURES), 0.25 / 84 * np.eye(B)[2], rtol=1e-5)
    flat = losses.hint(FEATURES.reshape(B, -1), other.reshape(B, -1))
    np.testing.assert_allclose(flat, found, rtol=1e-6)


def numpy_attention(features):
    maps = (np.asarray(features, np.float64) ** 2).sum(-1).reshape(len(features), -1)
    return maps / np.linalg.norm(maps, axis=1, keepdims=True)


@pytest.mark.floor
def test_attention_transfer_against_numpy():
    found = losses.attention_transfer(FEATURES, TAUGHT)
    assert found.shape == (B,)
    assert found.dtype == jnp.float32
    expected = ((numpy_attention(FEATURES) - numpy_attention(TAUGHT)) ** 2).sum(1)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_array_equal(losses.attention_transfer(FEATURES, FEATURES), np.zeros(B))
    # A factor, signs, and the order of the channels make no other map; the order of pixels does.
    for scale in (-1e-30, 3.0, 1e30):
        moved = np.float32(scale) * FEATURES[..., ::-1]
        np.testing.assert_allclose(losses.attention_transfer(moved, TAUGHT), found, rtol=1e-4)
    assert losses.attention_transfer(FEATURES[:, ::-1], FEATURES).min() > 0.05
    # Maps without a common pixel, and a map of zeros.
    left, right = np.zeros((2, 1, 4, 2), np.float32), np.zeros((2, 1, 4, 2), np.float32)
    left[:, 0, 0], right[0, 0, 3] = 2.0, -1.0
    np.testing.assert_array_equal(losses.attention_transfer(left, right), [2.0, 1.0])
    for order in (0, 1):
        grad = jax.grad(lambda *args: losses.attention_transfer(*args).sum(), argnums=order)
        assert np.isfinite(grad(left, right)).all()
        np.testing.assert_array_equal(grad(left, right)[1], np.zeros((1, 4, 2)) * order)


N, HEADS = 5, 3
QUERY, KEY, VALUE = (RNG.normal(size=(B, N, 2 * HEADS)).astype(np.float32) for _ in range(3))
ITS = tuple(RNG.normal(size=(B, N, 4 * HEADS)).astype(np.float32) for _ in range(3))


def numpy_relations(left, right, num_heads):
    size = left.shape[-1] // num_heads
    heads = [slice(h * size, (h + 1) * size) for h in range(num_heads)]
    scores = [left[..., h].astype(np.float64) @ right[..., h].transpose(0, 2, 1) for h in heads]
    return softmax(np.stack(scores, 1) / np.sqrt(size))


@pytest.mark.floor
@pytest.mark.parametrize("num_heads", [1, 3])
def test_relations_against_numpy(num_heads):
    pairs = {"Q-K": (QUERY, KEY, *ITS[:2]), "V-V": (VALUE, VALUE, ITS[2], ITS[2])}
    for name, arrays in pairs.items():
        found = losses.relation_kl(*arrays, num_heads=num_heads)
        assert found.shape == (B,)
        assert found.dtype == jnp.float32
        theirs, ours = (numpy_relations(*arrays[at : at + 2], num_heads) for at in (2, 0))
        expected = kl(theirs, ours).mean((1, 2))
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)
        itself = losses.relation_kl(*arrays[:2], *arrays[:2], num_heads=num_heads)
        np.testing.assert_array_equal(itself, np.zeros(B))


def test_relations_of_a_wider_teacher_and_of_its_own_attention():
    # Rotating queries and keys alike leaves the relations as they are; so does a wider teacher
    # whose parts are repeated, scaled by what the root of its size takes.
    rotation, _ = np.linalg.qr(RNG.normal(size=(2, 2)))
    turn = np.kron(np.eye(HEADS), rotation).astype(np.float32)
    found = losses.relation_kl(QUERY @ turn, KEY @ turn, QUERY, KEY, num_heads=HEADS)
    np.testing.assert_allclose(found, 0.0, atol=1e-6)
    wide = [
        np.tile(each.reshape(B, N, HEADS, 2), 2).reshape(B, N, -1) * 2**-0.25
        for each in (QUERY, KEY)
    ]
    found = losses.relation_kl(QUERY, KEY, *wide, num_heads=HEADS)
    np.testing.assert_allclose(found, 0.0, atol=1e-6)
    assert losses.relation_kl(QUERY, KEY, KEY, QUERY, num_heads=HEADS).min() > 0.01
    large = losses.relation_kl(300 * QUERY, KEY, -300 * QUERY, KEY, num_heads=HEADS)
    assert np.isfinite(large).all()
    grad = jax.grad(
        lambda q: losses.relation_kl(300 * q, KEY, -300 * QUERY, KEY, num_heads=HEADS).sum()
    )
    assert np.isfinite(grad(QUERY)).all()


# All of them

ALL = {
    "decoupled": (
        lambda z, t: losses.decoupled_kl(z, t, LABELS, temperature=2.0),
        (LOGITS, TEACHER),
    ),
    "pearson": (losses.pearson_distance, (LOGITS, TEACHER)),
    "inter": (lambda z, t: losses.inter_class_distance(z, t, temperature=2.0), (LOGITS, TEACHER)),
    "intra": (
        lambda z, t: losses.intra_class_distance(z, t, MASK, temperature=2.0),
        (LOGITS, TEACHER),
    ),
    "hint": (losses.hint, (FEATURES, 2 * FEATURES[::-1])),
    "attention": (losses.attention_transfer, (FEATURES, TAUGHT)),
    "Q-K": (lambda *args: losses.relation_kl(*args, num_heads=3), (QUERY, KEY, *ITS[:2])),
    "V-V": (
        lambda v, t: losses.relation_kl(v, v, t, t, num_heads=3),
        (VALUE, ITS[2]),
    ),
}


@pytest.mark.parametrize("name", ALL)
def test_gradients_against_finite_differences(name):
    loss, arrays = ALL[name]
    weights = RNG.uniform(0.5, 1.5, B)
    with double_precision():
        wide = tuple(jnp.asarray(each, jnp.float64) for each in arrays)
        check_grads(
            lambda *args: jnp.sum(weights * loss(*args)), wide, 1, ["rev"], rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("name", sorted(ALL.keys() - {"intra"}))
def test_one_value_per_example_and_no_more(name):
    loss, arrays = ALL[name]
    whole = loss(*arrays)
    changed = [each.copy() for each in arrays]
    for each in changed:
        each[1:] = np.nan
    np.testing.assert_array_equal(loss(*changed)[0], whole[0])
    np.testing.assert_allclose(jax.jit(loss)(*arrays), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_large_logits_have_finite_losses_and_gradients(name):
    loss, arrays = ALL[name]
    for scale in (1e-3, 1e3):
        large = [np.float32(scale) * np.sign(each) * np.abs(each) for each in arrays]
        assert np.isfinite(loss(*large)).all()
        gradients = jax.grad(lambda *a, f=loss: f(*a).sum(), argnums=tuple(range(len(arrays))))
        assert all(np.isfinite(each).all() for each in gradients(*large))


def test_a_traced_temperature_compiles_once():
    traces = []

    @jax.jit
    def loss(temperature, beta):
        traces.append(temperature)
        return (
            losses.decoupled_kl(LOGITS, TEACHER, LABELS, temperature=temperature, beta=beta)
            + losses.inter_class_distance(LOGITS, TEACHER, temperature=temperature)
            + losses.intra_class_distance(LOGITS, TEACHER, MASK, temperature=temperature)
        )

    first, second = loss(1.0, 8.0), loss(20.0, 1.0)
    assert len(traces) == 1
    assert not np.allclose(first, second)


def test_bad_shapes_are_named_with_a_remedy():
    with pytest.raises(ValueError, match=r"teacher_logits of the shape of logits, \(6, 5\), got"):
        losses.decoupled_kl(LOGITS, TEACHER[:, 1:], LABELS, temperature=1.0)
    with pytest.raises(ValueError, match=r"expected beta to be a scalar or of shape \[B\] = \(6,"):
        losses.decoupled_kl(LOGITS, TEACHER, LABELS, temperature=1.0, beta=np.ones((B, 1)))
    for loss in (losses.pearson_distance, losses.inter_class_distance):
        with pytest.raises(ValueError, match="expected teacher_logits of the shape of logits"):
            loss(LOGITS, TEACHER[1:])
    with pytest.raises(ValueError, match=r"mask of shape \[B\] = \(6,\) with a real example, got"):
        losses.intra_class_distance(LOGITS, TEACHER, np.zeros(B))
    with pytest.raises(ValueError, match=r"mask of shape \[B\] = \(6,\)"):
        losses.intra_class_distance(LOGITS, TEACHER, np.ones((B, 1)))
    with pytest.raises(ValueError, match="give the student a layer whose outputs have the shape"):
        losses.hint(FEATURES, TAUGHT)
    with pytest.raises(ValueError, match=r"= \(6, 4, 3\) as features are, got .*resize"):
        losses.attention_transfer(FEATURES, TAUGHT[:, :2])
    with pytest.raises(ValueError, match="expected features of rank 4"):
        losses.attention_transfer(FEATURES[..., 0], TAUGHT)
    with pytest.raises(ValueError, match="num_heads to divide the last axis of left, 6, got 4"):
        losses.relation_kl(QUERY, KEY, *ITS[:2], num_heads=4)
    with pytest.raises(ValueError, match=r"expected teacher_right of shape \(6, 5, 12\), got"):
        losses.relation_kl(QUERY, KEY, ITS[0], ITS[1][:, 1:], num_heads=3)
    with pytest.raises(ValueError, match=r"expected right of shape \(6, 5, 6\), got \(6, 5, 12\)"):
        losses.relation_kl(QUERY, ITS[1], *ITS[:2], num_heads=3)
