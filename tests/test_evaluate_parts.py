"""What one run of an attack says: curves, distances, worst cases, transfer; and all in one call."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, evaluate, losses, metrics, nets
from jdistill.evaluate import _clean, _runs

N, D, K, R = 24, 5, 3, 3
RNG = np.random.default_rng(2)
INPUTS = RNG.uniform(0.3, 0.7, (N, D)).astype(np.float32)
KEY = jax.random.key(8)
TRACES = []


def linear(weights, inputs):
    TRACES.append(inputs.shape)
    return inputs.reshape(inputs.shape[0], -1) @ weights


WEIGHTS = [RNG.normal(size=(D, K)).astype(np.float32) * scale for scale in (1.0, 2.0, 50.0)]
WEIGHTS[2] = WEIGHTS[0] * 50 + 0.1 * WEIGHTS[1]  # nearly the first one's boundary, other logits
NETWORKS = [nets.callable_logits_fn(linear, jnp.asarray(weights)) for weights in WEIGHTS]
STACK = nets.stack(NETWORKS)
LABELS = (INPUTS @ WEIGHTS[0]).argmax(1)
LABELS[::6] = (LABELS[::6] + 1) % K
EPS = 0.05
STEPS = 4
both = pytest.mark.parametrize("vmapped", [False, True], ids=["looped", "vmapped"])

PGD = functools.partial(
    attacks.pgd, eps=EPS, num_steps=STEPS, step_size=0.02, random_start=False, loss=losses.margin
)
FGSM = functools.partial(attacks.fgsm, eps=EPS)
PLANS = {
    "pgd": evaluate.AttackPlan(PGD, batch_size=10),
    "fgsm": evaluate.AttackPlan(FGSM, batch_size=10),
}
DISTANCES = evaluate.distance_plans(num_steps=60, batch_size=16)


def clear(logits, labels):
    """Examples that are no ties, whose flag rounding cannot change."""
    excess = np.asarray(losses.margin(jnp.asarray(logits), labels))
    return np.abs(excess) > 1e-5 * np.abs(logits).max(-1)


@pytest.fixture(scope="module")
def results():
    """All measures in one call, looped and vmapped."""
    return {
        vmapped: evaluate.evaluate(
            STACK,
            INPUTS,
            LABELS,
            attacks=PLANS,
            distances=DISTANCES,
            transfer=["pgd"],
            eps_grids={"l2": np.linspace(0, 0.3, 7)},
            key=KEY,
            batch_size=10,
            vmapped=vmapped,
        )
        for vmapped in (False, True)
    }


def boundary_distance(weights, norm):
    """The exact distance of each example to the nearest boundary of a linear network, `[N]`."""
    found = np.full(N, np.inf)
    dual = {"l2": 2, "linf": 1}[norm]
    logits = INPUTS.astype(np.float64) @ weights
    for k in range(K):
        normal = weights[:, k][None] - weights.T[LABELS]  # [N, D]
        gap = logits[np.arange(N), LABELS] - logits[:, k]
        length = np.linalg.norm(normal, ord=dual, axis=1)
        other = k != LABELS
        found[other] = np.minimum(
            found[other], np.maximum(gap / np.maximum(length, 1e-9), 0)[other]
        )
    return found


# -------------------------------------------------------------------------------------------------
# Distances


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_distances_are_those_to_the_boundary_of_a_linear_network(results, norm):
    outcome = results[False].distances[norm]
    assert outcome.norm == norm
    assert outcome.eps is None
    for r, weights in enumerate(WEIGHTS):
        exact = boundary_distance(weights, norm)
        assert outcome.success[r].all()
        assert (outcome.distance[r] >= exact * (1 - 1e-4) - 1e-6).all()
        assert np.mean(outcome.distance[r] <= 1.05 * exact + 1e-3) > 0.9
        np.testing.assert_allclose(outcome.mean_distance[r], outcome.distance[r].mean(), rtol=1e-5)


def test_the_distance_in_l0_is_a_number_of_features(results):
    outcome = results[False].distances["l0"]
    changed = (np.abs(outcome.inputs - INPUTS) > 0).sum(-1)
    np.testing.assert_array_equal(outcome.distance[outcome.success], changed[outcome.success])
    for r, weights in enumerate(WEIGHTS):
        fewest = np.full(N, np.inf)
        for k in range(K):
            normal = weights[:, k][None] - weights.T[LABELS]
            gap = -(INPUTS * normal).sum(1, keepdims=True)
            gains = np.sort(np.maximum(-INPUTS * normal, (1 - INPUTS) * normal), axis=1)[:, ::-1]
            count = (np.cumsum(gains, axis=1) <= gap).sum(1) + 1
            count = np.where(gap[:, 0] < 0, 0, count)
            fewest = np.where(k == LABELS, fewest, np.minimum(fewest, count))
        assert outcome.success[r].all()
        assert (outcome.distance[r] >= fewest).all()
        assert (outcome.distance[r] == fewest).mean() > 0.9


def test_an_attack_of_another_norm_is_refused():
    fmn = evaluate.AttackPlan(functools.partial(attacks.fmn, norm="linf"))
    with pytest.raises(ValueError, match="whose distances are l2, got one in linf; bind norm='l2'"):
        evaluate.distances(STACK, INPUTS, LABELS, {"l2": fmn})
    with pytest.raises(ValueError, match="whose distances are linf, got one in l2"):
        evaluate.distances(STACK, INPUTS, LABELS, {"linf": evaluate.AttackPlan(attacks.ddn)})
    with pytest.raises(ValueError, match=r"for linf, got PGD margin with eps 0\.05"):
        evaluate.evaluate(STACK, INPUTS, LABELS, attacks={}, distances={"linf": PLANS["pgd"]})
    with pytest.raises(ValueError, match="minimum-norm attack for linf, got Spatial; pass one"):
        evaluate.distances(STACK, INPUTS, LABELS, {"linf": evaluate.AttackPlan(attacks.spatial)})
    unknown = evaluate.AttackPlan(functools.partial(attacks.fab, norm="l0"))
    with pytest.raises(ValueError, match="norm to be one of"):
        evaluate.distances(STACK, INPUTS, LABELS, {"l0": unknown})


def test_a_users_own_attack_is_measured():
    """A function, a lambda and a callable object, with the facts that their arguments tell."""

    def own(logits_fn, key, inputs, labels, *, eps=0.05, norm="linf"):
        return attacks.fgsm(logits_fn, key, inputs, labels, eps=eps, norm=norm)

    class Own:
        def __call__(self, logits_fn, key, inputs, labels):
            return own(logits_fn, key, inputs, labels)

    wanted = evaluate.under_attack(
        STACK, INPUTS, LABELS, evaluate.AttackPlan(functools.partial(attacks.fgsm, eps=0.05))
    )
    for attack, norm, eps in (
        (own, "linf", 0.05),
        (functools.partial(own, eps=0.05), "linf", 0.05),
        (lambda *arguments: own(*arguments), None, None),
        (Own(), None, None),
    ):
        plan = evaluate.AttackPlan(attack)
        found = evaluate.under_attack(STACK, INPUTS, LABELS, plan, shards={})
        np.testing.assert_array_equal(found.success, wanted.success)
        assert (found.norm, found.eps) == (norm, eps)


# -------------------------------------------------------------------------------------------------
# Curves from one run


def test_the_curve_against_eps_is_that_of_many_runs(results):
    """On a linear network PGD finds what there is, so a run for each radius is the reference."""
    grid = [0.01, 0.03, 0.08]
    curves = evaluate.accuracy_against_eps(results[False].distances["linf"], grid)
    for x, eps in enumerate(grid):
        plan = evaluate.AttackPlan(functools.partial(PGD, eps=eps, step_size=eps / 2))
        runs = evaluate.under_attack(STACK, INPUTS, LABELS, plan)
        for r in range(R):
            one = runs.success[r]
            # FMN is 5% beyond the boundary at most; the examples between the two may differ.
            near = np.abs(boundary_distance(WEIGHTS[r], "linf") / eps - 1) < 0.05
            broken = results[False].distances["linf"].distance[r] <= eps
            np.testing.assert_array_equal(broken[~near], one[~near])
            assert near.mean() < 0.2
            np.testing.assert_allclose(curves[r].robust_accuracy[x], 1 - broken.mean())
            share = metrics.proportion(int((~broken).sum()), N)
            found = (curves[r].robust_accuracy[x], curves[r].low[x], curves[r].high[x])
            np.testing.assert_allclose(found, share)


def test_curves_fall_and_have_every_step(results):
    outcome = results[False].distances["l2"]
    for r, curve in enumerate(evaluate.accuracy_against_eps(outcome)):
        assert curve.x[0] == 0.0
        assert (np.diff(curve.robust_accuracy) < 0).all()  # a point where an example falls
        assert curve.robust_accuracy[0] == results[False].clean.accuracy[r].value
        assert curve.robust_accuracy[-1] == 0.0
        assert ((curve.low <= curve.robust_accuracy) & (curve.robust_accuracy <= curve.high)).all()
        assert curve.num_examples == N


def outcome_of(distance, success=None, **options):
    distance = np.asarray(distance, np.float32)
    success = np.isfinite(distance) if success is None else np.asarray(success)
    result = attacks.AttackResult(distance, success, distance, np.ones(distance.shape, int), {})
    return evaluate.summarize(result, **options)


def test_the_curve_of_several_attacks_is_their_worst_case():
    first = outcome_of([[1.0, np.inf, 3.0, 0.0]], norm="l2")
    second = outcome_of([[2.0, np.inf, 1.0, 0.0, 5.0]], norm="l2")  # of one example more
    within = outcome_of([[2.5, 2.5, 2.5, 0.0]], [[False, True, False, True]], norm="l2", eps=2.5)
    grid = [0.0, 0.9, 1.0, 2.0, 2.5, 9.0]
    (curve,) = evaluate.accuracy_against_eps([first, second], grid)
    assert curve.robust_accuracy.tolist() == [0.75, 0.75, 0.25, 0.25, 0.25, 0.25]
    assert curve.num_examples == 4
    (curve,) = evaluate.accuracy_against_eps([first, second, within], grid)
    assert curve.robust_accuracy.tolist() == [0.75, 0.75, 0.25, 0.25, 0.0, 0.0]
    # A failure's distance is that of a point that broke nothing.
    (curve,) = evaluate.accuracy_against_eps(within, grid)
    assert curve.robust_accuracy.tolist() == [0.75, 0.75, 0.75, 0.75, 0.5, 0.5]
    (curve,) = evaluate.accuracy_against_eps(first, [0.0], correct=np.array([[True, False] * 2]))
    assert curve.robust_accuracy.tolist() == [0.5]
    # What rounding puts beyond a budget's radius is within it.
    rounded = outcome_of([[0.10000001]], norm="linf", eps=0.1)
    assert evaluate.accuracy_against_eps(rounded, [0.1])[0].robust_accuracy.tolist() == [0.0]


def test_the_curve_against_steps_is_that_of_shorter_runs(results):
    curves = results[False].step_curves["pgd"]
    assert set(results[False].step_curves) == {"pgd"}  # FGSM has no steps
    for steps in (1, 3):
        plan = evaluate.AttackPlan(functools.partial(PGD, num_steps=steps))
        shorter = evaluate.under_attack(STACK, INPUTS, LABELS, plan)
        for r in range(R):
            # The start is the first point.
            assert curves[r].robust_accuracy[steps + 1] == (~shorter.success[r]).mean()
    for r, curve in enumerate(curves):
        assert curve.x.tolist() == list(range(STEPS + 2))
        assert curve.robust_accuracy[0] == results[False].clean.accuracy[r].value
        assert curve.robust_accuracy[-1] == (~results[False].attacks["pgd"].success[r]).mean()
    assert len(set(curves[0].robust_accuracy)) > 2


def test_steps_of_several_starts_are_counted_one_after_another():
    attack = functools.partial(PGD, num_steps=2, step_size=0.004, num_restarts=4, random_start=True)
    outcome = evaluate.under_attack(STACK, INPUTS, LABELS, evaluate.AttackPlan(attack), key=KEY)
    for r, curve in enumerate(evaluate.accuracy_against_steps(outcome)):
        first = outcome.info["first_success"][r]
        assert np.any(first > 3)  # some fall in a later start
        np.testing.assert_array_equal(curve.x, np.unique(first[first >= 0]))
        assert curve.robust_accuracy[-1] == (~outcome.success[r]).mean()
    with pytest.raises(ValueError, match="no first_success in its info"):
        evaluate.accuracy_against_steps(outcome_of([[1.0]]), range(3))


def test_the_curve_against_queries_is_that_of_smaller_budgets():
    square = functools.partial(attacks.square, eps=0.08)
    plan = evaluate.AttackPlan(functools.partial(square, num_queries=30))
    one = NETWORKS[:1]
    outcome = evaluate.under_attack(nets.stack(one), INPUTS, LABELS, plan, key=KEY)
    curve = evaluate.accuracy_against_queries(outcome, range(40))[0]
    # Beside the proposals: the clean input, the first start and the verification.
    for budget in (1, 10):
        plan = evaluate.AttackPlan(functools.partial(square, num_queries=budget))
        smaller = evaluate.under_attack(nets.stack(one), INPUTS, LABELS, plan, key=KEY)
        assert curve.robust_accuracy[budget + 3] == (~smaller.success[0]).mean()
    assert curve.robust_accuracy[0] == 1.0
    assert len(set(curve.robust_accuracy)) > 3


@pytest.mark.parametrize("grid", [[], [0.2, 0.1], [0.1, 0.1], [-0.1, 0.1], [np.nan], [[0.1]]])
def test_a_grid_that_is_none_is_refused(grid):
    with pytest.raises(ValueError, match="eps"):
        evaluate.accuracy_against_eps(outcome_of([[1.0, 2.0]]), grid)


# -------------------------------------------------------------------------------------------------
# The worst case


def test_the_worst_case_is_over_all_attacks_in_the_norm(results):
    result = results[False]
    assert set(result.worst_case) == {("linf", EPS)}
    for r, worst in enumerate(result.worst_case["linf", EPS]):
        rows = {
            "pgd": result.attacks["pgd"].success[r],
            "fgsm": result.attacks["fgsm"].success[r],
            "distance linf": result.distances["linf"].distance[r] <= EPS,
        }
        assert worst.names == tuple(rows)
        union = np.any(list(rows.values()), axis=0)
        np.testing.assert_array_equal(worst.success, union)
        assert worst.robust_accuracy == metrics.proportion(int((~union).sum()), N)


def test_norms_and_radii_that_do_not_compare_are_refused():
    here = outcome_of([[0.1, np.inf]], norm="linf", eps=0.1)
    there = outcome_of([[1.0, 1.0]], norm="l2")
    wider = outcome_of([[0.3, 0.08]], norm="linf", eps=0.3)
    for combine in (
        evaluate.worst_case,
        lambda named: evaluate.accuracy_against_eps(named.values()),
    ):
        with pytest.raises(ValueError, match=r"one norm, got .*'linf', .*'l2'.; distances"):
            combine({"a": here, "b": there})
        with pytest.raises(ValueError, match="one outcome or more"):
            combine({})
        with pytest.raises(ValueError, match="outcomes of one stack"):
            combine({"a": here, "b": outcome_of([[1.0], [2.0]])})
    with pytest.raises(ValueError, match=r"within one radius, got eps {'a': 0\.1, 'b': 0\.3}"):
        evaluate.worst_case({"a": here, "b": wider})
    (worst,) = evaluate.worst_case({"a": here, "b": wider}, eps=0.1)
    assert worst.broken_by.tolist() == [0, 1]
    (worst,) = evaluate.worst_case({"b": wider}, eps=0.1)  # 0.3 is too far
    assert worst.success.tolist() == [False, True]
    (worst,) = evaluate.worst_case({"c": there})  # no radius: whatever was found
    assert worst.robust_accuracy.value == 0.0


# -------------------------------------------------------------------------------------------------
# Transfer


def test_the_matrix_is_a_transfer_for_each_pair(results):
    (matrix,) = results[False].transfer["pgd"]
    for g in range(R):
        for h in range(R):
            direct = attacks.transfer(
                NETWORKS[h], None, INPUTS, LABELS, source=NETWORKS[g], attack=PGD
            )
            plain = clear(INPUTS @ WEIGHTS[h], LABELS) & clear(
                np.asarray(direct.inputs) @ WEIGHTS[h], LABELS
            )
            np.testing.assert_array_equal(
                matrix.success[g, h][plain], np.asarray(direct.success)[plain]
            )
            share = metrics.proportion(int(matrix.success[g, h].sum()), N)
            assert matrix.success_rate[g][h] == share
    diagonal = matrix.success[np.arange(R), np.arange(R)]
    np.testing.assert_array_equal(diagonal, results[False].attacks["pgd"].success)
    right = results[False].clean.correct
    rates = [[matrix.success[g, h, right[h]].mean() for h in range(R)] for g in range(R)]
    assert rates[0][2] > rates[0][1]  # two networks of nearly one boundary, and another one
    assert rates[0][0] > 0.1


def test_networks_of_two_kinds_and_parts_of_a_stack(results):
    other = nets.callable_logits_fn(lambda w, x: 3 * linear(w, x), jnp.asarray(WEIGHTS[1]))
    matrix = evaluate.transfer_matrix([NETWORKS[0], other], INPUTS, LABELS, PLANS["pgd"])
    whole = results[False].transfer["pgd"][0].success
    np.testing.assert_array_equal(matrix.success, whole[:2, :2])
    chained = evaluate.evaluate(
        STACK,
        INPUTS,
        LABELS,
        attacks={"pgd": PLANS["pgd"]},
        transfer=["pgd"],
        chains=[[0, 2], [1]],
    )
    first, second = chained.transfer["pgd"]
    np.testing.assert_array_equal(first.success, whole[np.ix_([0, 2], [0, 2])])
    np.testing.assert_array_equal(second.success, whole[1:2, 1:2])


def test_transfers_of_what_is_not_there_are_refused(results):
    call = functools.partial(evaluate.evaluate, STACK, INPUTS, LABELS, attacks=PLANS)
    with pytest.raises(ValueError, match="some of the attacks pgd, fgsm, got 'cw'"):
        call(transfer=["cw"])
    with pytest.raises(ValueError, match=r"stack of 3 networks, 0\.\.2, got 3 in chains"):
        call(transfer=["pgd"], chains=[[0, 3]])
    with pytest.raises(ValueError, match="outcome of these 2 networks, got one of 3"):
        evaluate.transfer_matrix(
            NETWORKS[:2], INPUTS, LABELS, PLANS["pgd"], outcome=results[False].attacks["pgd"]
        )


# -------------------------------------------------------------------------------------------------
# One call


@pytest.mark.floor
def test_one_call_is_its_parts(results):
    result = results[False]
    assert list(result.distances) == ["l0", "l2", "linf"]
    assert list(result.eps_curves) == ["l0", "l2", "linf"]
    assert result.eps_curves["l2"][0].x.tolist() == np.linspace(0, 0.3, 7).tolist()
    apart = evaluate.distances(STACK, INPUTS, LABELS, DISTANCES, key=KEY)
    for norm, outcome in apart.items():
        np.testing.assert_array_equal(outcome.distance, result.distances[norm].distance)
    curves = evaluate.accuracy_against_eps(
        [*result.attacks.values(), apart["linf"]], result.eps_curves["linf"][0].x
    )
    np.testing.assert_array_equal(
        curves[0].robust_accuracy, result.eps_curves["linf"][0].robust_accuracy
    )
    for r, weights in enumerate(WEIGHTS):
        expected = metrics.calibration(INPUTS @ weights, LABELS)
        np.testing.assert_allclose(result.clean.calibration[r], expected, rtol=1e-4)
    nothing = evaluate.evaluate(STACK, INPUTS, LABELS, attacks={"fgsm": PLANS["fgsm"]})
    assert nothing.distances == nothing.eps_curves == nothing.transfer == {}


def test_names_of_attacks_and_distances_do_not_collide():
    named = {"distance l2": PLANS["pgd"]}
    with pytest.raises(ValueError, match="got 'distance l2'; rename the attack"):
        evaluate.evaluate(STACK, INPUTS, LABELS, attacks=named, distances=DISTANCES)


def test_queries_have_a_curve_where_the_attack_counts_them():
    square = functools.partial(attacks.square, eps=0.08, num_queries=30)
    plans = {"square": evaluate.AttackPlan(square), "fgsm": PLANS["fgsm"]}
    result = evaluate.evaluate(STACK, INPUTS, LABELS, attacks=plans, key=KEY)
    assert set(result.query_curves) == {"square"}
    for r, curve in enumerate(result.query_curves["square"]):
        assert curve.robust_accuracy[-1] == (~result.attacks["square"].success[r]).mean()
    assert set(result.worst_case) == {("linf", 0.08), ("linf", EPS)}
    # What FGSM did within 0.05 counts within 0.08 as well, but not the other way around.
    for r in range(R):
        wider = result.worst_case["linf", 0.08][r].success
        assert (wider >= result.attacks["fgsm"].success[r]).all()
        narrow = result.worst_case["linf", EPS][r].success
        far = result.attacks["square"].distance[r] > EPS * 1.001
        assert not (narrow & far & ~result.attacks["fgsm"].success[r]).any()


@pytest.mark.floor
def test_vmapped_is_looped(results):
    looped, vmapped = results[False], results[True]
    for norm, outcome in looped.distances.items():
        other = vmapped.distances[norm]
        np.testing.assert_array_equal(outcome.success, other.success)
        # A search that ends at a boundary takes other turns with other rounding.
        close = np.isclose(outcome.distance, other.distance, rtol=0.02, atol=1e-4)
        assert close.mean() > 0.95
    np.testing.assert_array_equal(
        looped.transfer["pgd"][0].success, vmapped.transfer["pgd"][0].success
    )
    for r in range(R):
        assert looped.clean.calibration[r].num_nonfinite == 0
        np.testing.assert_allclose(
            looped.clean.calibration[r], vmapped.clean.calibration[r], rtol=1e-4
        )
        for curves, others in (
            (looped.step_curves["pgd"], vmapped.step_curves["pgd"]),
            (looped.eps_curves["l2"], vmapped.eps_curves["l2"]),
        ):
            np.testing.assert_allclose(
                curves[r].robust_accuracy, others[r].robust_accuracy, atol=1.001 / N
            )
        np.testing.assert_array_equal(
            looped.worst_case["linf", EPS][r].success, vmapped.worst_case["linf", EPS][r].success
        )


def test_vmapped_logits_of_a_convolutional_network_are_the_looped_ones():
    model = nets.digits_net()
    networks = [
        nets.logits_fn(model, {"params": nets.init(model, jax.random.key(seed), (8, 8, 1))[0]})
        for seed in range(2)
    ]
    images = np.random.default_rng(0).uniform(0, 1, (9, 8, 8, 1)).astype(np.float32)
    looped, vmapped = (
        _runs.Runs.of(nets.stack(networks), [1.0, 0.01], vmapped, None).map(
            _clean._logits, None, 4, images
        )
        for vmapped in (False, True)
    )
    largest = np.abs(looped).max(axis=(1, 2), keepdims=True)
    assert largest[1] > 10 * largest[0]
    assert (np.abs(looped - vmapped) <= 1e-5 * largest).all()


def test_a_second_call_reads_the_shards_of_the_first(results):
    shards, options = {}, {"attacks": PLANS, "distances": DISTANCES, "key": KEY}
    first = evaluate.evaluate(STACK, INPUTS, LABELS, shards=shards, **options)
    kept = dict(shards)
    assert {name.split("/")[0] for name in kept} == {
        "clean",
        *PLANS,
        *(f"distance {norm}" for norm in DISTANCES),
    }
    second = evaluate.evaluate(STACK, INPUTS, LABELS, shards=shards, **options)
    assert all(shards[name] is kept[name] for name in kept)
    for norm in DISTANCES:
        found, read, direct = (
            each.distances[norm].inputs for each in (first, second, results[False])
        )
        np.testing.assert_array_equal(read, found)
        # Without shards it is one program, which may round the last bit differently.
        np.testing.assert_allclose(direct, found, rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------------------------------------
# Memory


def test_memory_does_not_grow_with_the_number_of_examples():
    """By the compiled programs' own account: they are those of a batch, however many there are."""
    many, few, batch_size = 10_000, 512, 127  # a size that no other test compiles for
    inputs = np.random.default_rng(0).uniform(0, 1, (many, D)).astype(np.float32)
    labels = (inputs @ WEIGHTS[1]).argmax(1)
    plan = evaluate.AttackPlan(functools.partial(PGD, num_steps=1), batch_size=batch_size)

    def traced(size):
        TRACES.clear()
        evaluate.evaluate(
            nets.stack(NETWORKS[:1]),
            inputs[:size],
            labels[:size],
            attacks={"pgd": plan},
            transfer=["pgd"],
            batch_size=batch_size,
        )
        return [shape for shape in TRACES if shape[0] > 1]  # `eval_shape` looks at one example

    assert set(traced(many)) == {(batch_size, D)}
    assert traced(few) == []  # the same programs

    def bytes_of(size):
        program = jax.jit(plan.attack).lower(NETWORKS[0], None, inputs[:size], labels[:size])
        analysis = program.compile().memory_analysis()
        return analysis.temp_size_in_bytes + analysis.output_size_in_bytes

    # And the batch is what a program's memory depends on: all examples at once would need more.
    assert bytes_of(many) > 10 * bytes_of(batch_size)


# -------------------------------------------------------------------------------------------------
# Logits that are not finite, one class, seeds


def hollow(weights, inputs):
    """Linear, and NaN where the first feature is large."""
    return jnp.where(inputs[:, :1] > 0.6, jnp.nan, linear(weights, inputs))


@pytest.mark.slow
@both
def test_logits_that_are_not_finite_are_counted(vmapped):
    stack = nets.stack([nets.callable_logits_fn(hollow, jnp.asarray(w)) for w in WEIGHTS])
    result = evaluate.evaluate(
        stack, INPUTS, LABELS, attacks=PLANS, distances={"l2": DISTANCES["l2"]}, vmapped=vmapped
    )
    holes = INPUTS[:, 0] > 0.6
    assert 0 < holes.sum() < N
    assert result.clean.num_nonfinite.tolist() == [holes.sum()] * R
    for r, weights in enumerate(WEIGHTS):
        right = (INPUTS @ weights).argmax(1) == LABELS
        np.testing.assert_array_equal(result.clean.correct[r], right & ~holes)
        assert result.clean.accuracy[r] == metrics.proportion(int((right & ~holes).sum()), N)
        assert result.clean.calibration[r].num_nonfinite == holes.sum()
    for outcome in (*result.attacks.values(), result.distances["l2"]):
        assert outcome.success.shape == (R, N)
        assert outcome.success[:, holes].all()  # wrong without an attack
        np.testing.assert_array_equal(outcome.distance[:, holes], 0.0)
        inside = outcome.inputs[..., 0] > 0.6
        np.testing.assert_array_equal(outcome.num_nonfinite, inside.sum(1))
        # An attack that walks into a hole has found nothing there.
        assert not outcome.success[inside & ~holes].any()
    assert (result.attacks["pgd"].num_nonfinite >= holes.sum()).all()
    hollow_one = nets.callable_logits_fn(hollow, jnp.asarray(WEIGHTS[0]))
    networks = [NETWORKS[0], hollow_one]
    matrix = evaluate.transfer_matrix(networks, INPUTS, LABELS, PLANS["pgd"], vmapped=vmapped)
    assert matrix.success[0, 1, holes].all()  # judged on the clean inputs already
    assert not matrix.success[0, 0, holes].all()


def test_a_set_of_one_class_is_refused():
    ordered = np.argsort(LABELS, kind="stable")
    call = functools.partial(evaluate.evaluate, STACK, attacks=PLANS)
    ones = np.flatnonzero(LABELS == 1)
    with pytest.raises(ValueError, match=r"got \d+ of class 1 for the test set; shuffle"):
        call(INPUTS[ones], LABELS[ones])
    few = {"pgd": PLANS["pgd"]._replace(num_examples=3)}
    with pytest.raises(ValueError, match="got 3 of class 0 for attack 'pgd'; shuffle"):
        call(INPUTS[ordered], LABELS[ordered], attacks=few)
    single = call(INPUTS[:1], LABELS[:1])  # no set, and so nobody takes it for one
    assert single.attacks["pgd"].success.shape == (R, 1)
    with pytest.raises(ValueError, match="at least one example, got none"):
        call(INPUTS[:0], LABELS[:0])


# One network, several, or a stack


def test_one_network_a_list_and_a_stack_are_measured_alike():
    plan = functools.partial(attacks.fgsm, eps=0.2)
    options = {"attacks": {"fgsm": plan}}
    whole = evaluate.evaluate(STACK, INPUTS, LABELS, **options)
    listed = evaluate.evaluate(NETWORKS, INPUTS, LABELS, **options)
    np.testing.assert_array_equal(whole.attacks["fgsm"].success, listed.attacks["fgsm"].success)
    for run, network in enumerate(NETWORKS):
        alone = evaluate.evaluate(network, INPUTS, LABELS, **options)
        np.testing.assert_array_equal(
            alone.attacks["fgsm"].success[0], whole.attacks["fgsm"].success[run]
        )
    assert alone.inputs is INPUTS
    assert alone.labels is LABELS


def test_a_function_without_weights_is_a_network():
    weights = np.asarray(WEIGHTS[0])
    result = evaluate.evaluate(
        lambda x: x @ weights,
        INPUTS,
        LABELS,
        attacks={"f": functools.partial(attacks.fgsm, eps=0.1)},
    )
    right = (INPUTS @ weights).argmax(1) == LABELS
    np.testing.assert_array_equal(result.clean.correct[0], right)


def test_networks_that_do_not_stack_are_named():
    options = {"attacks": {"f": functools.partial(attacks.fgsm, eps=0.1)}}
    other = nets.callable_logits_fn(lambda w, x: x @ w[0], (WEIGHTS[0],))
    with pytest.raises(ValueError, match="networks of one structure"):
        evaluate.evaluate([NETWORKS[0], other], INPUTS, LABELS, **options)
    scaled = nets.callable_logits_fn(
        lambda w, x: x * jnp.broadcast_to(w, x.shape), np.ones(D, np.float32)
    )
    with pytest.raises(ValueError, match=r"what can be either; pass \[network\]"):
        evaluate.evaluate(scaled, INPUTS, np.arange(len(INPUTS)) % D, **options)
    assert evaluate.evaluate([scaled], INPUTS, np.arange(len(INPUTS)) % D, **options)


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "edit", "foreign"])
def test_a_damaged_clean_shard_is_measured_again(tmp_path, damage):
    from jdistill import runtime

    shards = runtime.ShardFolder(tmp_path)
    options = {"attacks": {"f": functools.partial(attacks.fgsm, eps=0.1)}, "shards": shards}
    first = evaluate.evaluate(NETWORKS[:1], INPUTS, LABELS, **options)
    (path,) = (tmp_path / "clean").glob("*.npz")
    content = path.read_bytes()
    if damage == "edit":
        arrays = dict(np.load(path))
        np.savez(path, **{**arrays, "logits": -arrays["logits"]})
    elif damage == "foreign":
        np.savez(path, other=np.zeros(3))
    else:
        middle = len(content) // 2
        flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
        path.write_bytes({"cut": content[:middle], "empty": b"", "flip": flipped}[damage])
    second = evaluate.evaluate(NETWORKS[:1], INPUTS, LABELS, **options)
    assert first.clean.accuracy == second.clean.accuracy
    assert path.read_bytes() == content
