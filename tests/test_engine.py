"""The engine's laws, on a method made for them; and that no attack depends on how it is run."""

import functools
import inspect
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdistill import attacks, losses, nets, parallel
from jdistill._jax import register, static_field
from jdistill.attacks._core import chunks, engine, handlers
from jdistill.attacks._core import problem as problems
from jdistill.attacks._core import rows as row_loop
from jdistill.attacks._core.engine import Method, Passes, Seen
from jdistill.attacks._core.handlers import Counter
from tests import tiny

BATCH = 70


# -------------------------------------------------------------------------------------------------
# A method whose course is known: each example walks along a line at its own speed


class Place(NamedTuple):
    at: jax.Array
    steps: jax.Array


@register
class Walk(Method):
    """From the input `x` by `speed` per step; class 1 begins beyond 0.5."""

    speed: jax.Array
    patience: jax.Array  # steps after which nothing more is tried
    num_events: int = static_field()
    keeps_closest: bool = static_field(default=False)
    minimum_norm: bool = static_field(default=False)
    moves_first: bool = static_field(default=False)
    maximizes: bool = static_field(default=False)
    norm = "linf"
    passes_at_start = Passes(1, 1)
    passes = Passes(2, 1)

    def init(self, problem):
        return Place(problem.inputs, jnp.zeros(self.speed.shape)), problem.logits_fn(problem.inputs)

    def no_note(self, problem):
        return jnp.full(self.speed.shape, -1)

    def step(self, problem, state, event):
        # What is done must not matter: it is poisoned where the engine should not look.
        new = Place(state.at + self.speed[:, None], state.steps + 1)
        judged = (new if self.moves_first else state).at
        success = problem.goal.reached(problem.logits_fn(judged))
        spent = event + 1 == self.patience
        if not self.keeps_closest:
            return new, Seen(success, judged[:, 0], spent)
        distance = jnp.abs(judged - problem.inputs)[:, 0]
        return new, Seen(success, judged[:, 0], spent, judged, distance, note=event)

    def point(self, problem, state):
        return state.at

    def info(self, problem, state, progress, result):
        more = {} if progress.best is None else {"note": progress.best[2]}
        return {"steps": state.steps, **more}


def logits_fn(inputs):
    return jnp.concatenate([0.5 - inputs, jnp.zeros_like(inputs)], axis=1)


def walk(speed, *, start=0.0, patience=99, num_events=10, trace=True, **kinds):
    speed = np.asarray(speed, np.float32)
    inputs = np.broadcast_to(np.asarray(start, np.float32), speed.shape)[:, None]
    labels = np.zeros(len(speed), int)
    problem = problems.prepare(logits_fn, None, inputs, labels, targets=None, bounds=(-9.0, 9.0))
    patience = jnp.broadcast_to(jnp.asarray(patience), speed.shape)
    method = Walk(speed=jnp.asarray(speed), patience=patience, num_events=num_events, **kinds)
    return method, problem


def result_of(*args, trace=True, **kwargs):
    return jax.tree.map(np.asarray, engine.run(*walk(*args, **kwargs), trace=trace))


def test_an_example_ends_at_its_first_success():
    # Judged at 0, s, 2 s, …: beyond 0.5 first at the point 1 + ceil(0.5 / s), exactly 0.5 is a tie.
    result = result_of([0.3, 0.2, 0.25, 0.01, 0.0], start=[0.0, 0.0, 0.0, 0.0, 0.7])
    np.testing.assert_array_equal(result.info["first_success"], [3, 4, 4, -1, 0])
    np.testing.assert_array_equal(result.success, [1, 1, 1, 0, 1])
    np.testing.assert_allclose(result.inputs[:, 0], [0.6, 0.6, 0.75, 0.1, 0.7], atol=1e-6)
    np.testing.assert_allclose(result.distance, [0.6, 0.6, 0.75, 0.1, 0.0], atol=1e-6)
    # Steps taken: the one that would lead on from a success is not.
    np.testing.assert_array_equal(result.info["steps"], [2, 3, 3, 10, 0])
    events = np.array([3, 4, 4, 10, 0])
    np.testing.assert_array_equal(result.queries, np.where(events > 0, 1 + 2 * events + 1, 1))
    np.testing.assert_array_equal(result.info["gradients"], 1 + events)
    trace = result.info["trace"]
    assert trace.shape == (5, 10)
    np.testing.assert_array_equal(np.isfinite(trace).sum(1), events)
    np.testing.assert_allclose(trace[0, :3], [0.0, 0.3, 0.6], atol=1e-6)
    assert "trace" not in result_of([0.3], trace=False).info


def test_the_last_point_is_judged_by_the_verification():
    result = result_of([0.3, 0.1], num_events=2)
    np.testing.assert_array_equal(result.info["first_success"], [3, -1])
    np.testing.assert_array_equal(result.success, [True, False])


def test_a_method_may_judge_what_its_step_leads_to():
    result = result_of([0.3, 0.01], moves_first=True)
    np.testing.assert_array_equal(result.info["first_success"], [2, -1])
    np.testing.assert_array_equal(result.info["steps"], [2, 10])
    np.testing.assert_allclose(result.inputs[:, 0], [0.6, 0.1], atol=1e-6)


def test_the_closest_success_is_kept_with_its_note():
    result = result_of(
        [0.3, 0.01, -0.2], start=[0.0, 0.0, 0.7], keeps_closest=True, minimum_norm=True
    )
    np.testing.assert_array_equal(result.info["first_success"], [3, -1, 0])
    np.testing.assert_array_equal(result.info["steps"], [10, 10, 0])  # on after the success
    np.testing.assert_array_equal(result.info["note"], [2, -1, -1])
    np.testing.assert_allclose(result.inputs[:, 0], [0.6, 0.0, 0.7], atol=1e-6)
    np.testing.assert_allclose(result.distance, [0.6, np.inf, 0.0], atol=1e-6)


def test_a_failure_is_the_last_point_or_the_clean_input():
    assert result_of([0.01]).inputs[0, 0] == pytest.approx(0.1)
    failed = result_of([0.01], minimum_norm=True)
    assert (failed.inputs[0, 0], failed.distance[0], failed.success[0]) == (0, np.inf, False)
    found = result_of([0.3], minimum_norm=True)  # the first success, where the closest is not kept
    assert found.inputs[0, 0] == pytest.approx(0.6)


def test_an_example_that_is_spent_costs_nothing_more():
    result = result_of([0.3, 0.3, 0.01], patience=[2, 3, 4])
    np.testing.assert_array_equal(result.info["steps"], [2, 2, 4])
    np.testing.assert_array_equal(result.info["first_success"], [3, 3, -1])
    np.testing.assert_array_equal(np.isfinite(result.info["trace"]).sum(1), [2, 3, 4])


def test_a_method_may_know_its_end_alone():
    result = result_of([0.01, 0.3], patience=7, num_events=None, trace=False)
    np.testing.assert_array_equal(result.info["steps"], [7, 2])


def test_a_method_that_maximizes_goes_on_for_all():
    result = result_of([0.3, 0.01, -0.3], start=[0.0, 0.0, 0.7], maximizes=True)
    np.testing.assert_array_equal(result.info["steps"], [10, 10, 10])
    np.testing.assert_array_equal(result.info["first_success"], [3, -1, 0])
    np.testing.assert_array_equal(result.success, [True, False, False])
    np.testing.assert_array_equal(result.queries, 1 + 20 + 1)


@pytest.fixture
def narrowing(monkeypatch):
    """Small networks go on in fewer rows, as large ones do."""
    monkeypatch.setattr(row_loop, "_LEAST_WORK", 0)


def test_neighbors_and_rows_change_nothing(narrowing):
    speed = np.random.default_rng(0).uniform(0.004, 0.3, 200)
    kinds = {"num_events": 80, "patience": np.arange(200) % 90 + 1}
    whole = result_of(speed, **kinds)
    assert row_loop.row_counts(200, 80, 0) == [100, 50, 0]
    for rows in (slice(0, 3), slice(3, 50)):
        part = result_of(speed[rows], num_events=80, patience=kinds["patience"][rows])
        jax.tree.map(
            np.testing.assert_array_equal, part, jax.tree.map(lambda x, r=rows: x[r], whole)
        )


# -------------------------------------------------------------------------------------------------
# In chunks, as a maximization, and only counted


def in_chunks(method, problem, size, monkeypatch, stop_at=None, saved=None, told=None):
    monkeypatch.setattr(chunks, "_SHORTEST", 0.0)
    monkeypatch.setattr(chunks, "_LONGEST", 0.0 if size == 1 else 9.0)
    told = [] if told is None else told

    def callback(event):
        told.append((event["done"], event["total"], int(event["active"].sum())))
        if event["done"] == stop_at:
            told.append(event["save"]())
            raise KeyboardInterrupt

    run = functools.partial(engine.run, method, problem, trace=True)
    return jax.tree.map(np.asarray, chunks.run_in_chunks(run, callback, saved))


@pytest.mark.parametrize("keeps_closest", [False, True])
def test_chunks_change_nothing(keeps_closest, narrowing, monkeypatch):
    speed = np.random.default_rng(1).uniform(0.004, 0.3, 100)
    method, problem = walk(speed, num_events=60, keeps_closest=keeps_closest)
    whole = jax.tree.map(np.asarray, engine.run(method, problem, trace=True))
    told = []
    part = in_chunks(method, problem, 1, monkeypatch, told=told)
    jax.tree.map(np.testing.assert_array_equal, part, whole)
    assert [done for done, _, _ in told] == list(range(60))
    assert {total for _, total, _ in told} == {60}
    active = [number for _, _, number in told]
    assert active == sorted(active, reverse=True)
    assert (active[-1] < 100) != keeps_closest


def test_chunks_of_examples_in_turn_change_nothing(narrowing, monkeypatch):
    method, problem = walk(np.random.default_rng(1).uniform(0.004, 0.3, 100), num_events=60)
    whole = jax.tree.map(np.asarray, engine.run(method, problem, trace=True))
    monkeypatch.setattr(type(method), "passes", Passes(2, 3))  # costly, so they take turns
    jax.clear_caches()
    told = []
    part = in_chunks(method, problem, 1, monkeypatch, told=told)
    jax.clear_caches()
    events = whole.info["gradients"] - 1
    np.testing.assert_array_equal(part.info.pop("gradients"), 1 + 3 * events)
    whole.info.pop("gradients")
    jax.tree.map(np.testing.assert_array_equal, part, whole)
    done = [number for number, _, _ in told]
    assert len(told) > 60
    assert done == sorted(done)


@pytest.mark.parametrize("stop_at", [0, 17])
def test_what_was_saved_goes_on_from_there(stop_at, narrowing, monkeypatch):
    speed = np.random.default_rng(1).uniform(0.004, 0.3, 100)
    method, problem = walk(speed, num_events=60)
    told, later = [], []
    with pytest.raises(KeyboardInterrupt):
        in_chunks(method, problem, 1, monkeypatch, stop_at, told=told)
    whole = jax.tree.map(np.asarray, engine.run(method, problem, trace=True))
    resumed = in_chunks(method, problem, 1, monkeypatch, saved=told[-1], told=later)
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert later[0][0] == stop_at
    # Of other shapes: from the beginning.
    method, problem = walk(speed[:50], num_events=60)
    later.clear()
    in_chunks(method, problem, 1, monkeypatch, saved=told[-1], told=later)
    assert later[0][0] == 0


def test_of_several_methods_those_that_are_through_are_not_run_again(monkeypatch):
    first, problem = walk([0.05, 0.3], num_events=12)
    second, _ = walk([0.02, 0.01], num_events=30)
    told, later = [], []

    def both(callback, saved=None):
        def run():
            one = engine.run(first, problem)
            return one, engine.run(second, problem)

        return chunks.run_in_chunks(run, callback, saved)

    monkeypatch.setattr(chunks, "_SHORTEST", 0.0)
    monkeypatch.setattr(chunks, "_LONGEST", 0.0)

    def stop(event):
        told.append(event["save"]())
        if (event["total"], event["done"]) == (30, 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        both(stop)
    result = both(lambda event: later.append((event["total"], event["done"])), told[-1])
    assert later[0] == (30, 5)
    expected = engine.run(first, problem), engine.run(second, problem)
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def test_chunks_leave_traced_calls_alone():
    def fail(event):  # pragma: no cover
        raise AssertionError("a traced call cannot be stopped")

    method, problem = walk([0.3, 0.01])
    with engine.handled_by(chunks.Chunks(fail)):
        result = jax.jit(lambda m: engine.run(m, problem))(method)
    np.testing.assert_array_equal(result.info["first_success"], [3, -1])


def test_the_maximizing_form_takes_all_steps_and_judges_nothing():
    method, problem = walk([0.3, 0.01, -0.3], start=[0.0, 0.0, 0.7])
    points = handlers.maximized(method, problem)
    np.testing.assert_allclose(points[:, 0], [3.0, 0.1, -2.3], atol=1e-5)
    refused = pytest.raises(ValueError, match="expected a fixed-budget attack")
    with refused, engine.handled_by(handlers.Maximizer()):
        engine.run(*walk([0.3], minimum_norm=True))


KEY = jax.random.key(0)
COMPILED = {
    name: getattr(attacks, name)
    for name in attacks.__all__
    if attacks.traits(getattr(attacks, name)).access
    and name not in ("autoattack", "ensemble", "transfer", "universal")
}


@pytest.mark.parametrize("name", COMPILED)
def test_maximize_takes_every_fixed_budget_attack_and_no_other(name):
    inputs = jnp.full((2, 3, 3, 1), 0.5)
    net = nets.callable_logits_fn(lambda w, x: x.reshape(len(x), -1) @ w, jnp.eye(9)[:, :4])
    labels = jnp.array([1, 2])  # wrong already
    takes_eps = "eps" in inspect.signature(COMPILED[name]).parameters
    attack = functools.partial(COMPILED[name], **{"eps": 0.1} if takes_eps else {})
    if attacks.traits(COMPILED[name]).minimum_norm:  # FAB with eps looks for it within eps
        with pytest.raises(ValueError, match="expected a fixed-budget attack"):
            attacks.maximize(attack, net, KEY, inputs, labels)
    else:
        points = attacks.maximize(attack, net, KEY, inputs, labels)
        assert np.all(np.any(points != inputs, axis=(1, 2, 3)))


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (functools.partial(attacks.universal, eps=0.1), "expected one compiled attack, got Univ"),
        (functools.partial(attacks.autoattack, eps=0.1), "expected one compiled attack, got Auto"),
        (
            functools.partial(attacks.transfer, source=lambda x: x, attack=attacks.fgsm),
            "expected one compiled attack, got Transfer",
        ),
        (lambda f, key, x, y: untouched(x), "expected an attack that runs one of jdistill.attacks"),
    ],
)
def test_maximize_refuses_what_it_cannot_run(attack, message):
    with pytest.raises(ValueError, match=message):
        attacks.maximize(attack, lambda x: x, KEY, jnp.full((2, 3), 0.5), jnp.array([1, 2]))


def untouched(inputs):
    nothing = jnp.zeros(len(inputs), jnp.int32)
    return attacks.AttackResult(inputs, nothing > 0, nothing * 0.5, nothing, {})


def test_maximize_is_the_inner_loop_of_adversarial_training():
    rng = np.random.default_rng(0)
    weights = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    traces = []

    def network(weights, x):
        traces.append(1)
        return jnp.tanh(x - 0.5) @ weights

    inputs = rng.uniform(0.2, 0.8, (9, 6)).astype(np.float32)
    labels = rng.integers(0, 4, 9)

    def by_hand(weights, loss, steps=5, eps=0.1, step_size=0.03):
        x = jnp.asarray(inputs)
        for _ in range(steps):
            gradient = jax.grad(lambda x: jnp.sum(loss(network(weights, x), labels)))(x)
            x = jnp.clip(x + step_size * jnp.sign(gradient), inputs - eps, inputs + eps)
            x = jnp.clip(x, 0, 1)
        return x

    def away(clean, logits, labels):  # TRADES: away from the clean prediction, label or not
        return -jnp.sum(clean * jax.nn.log_softmax(logits), axis=1)

    @jax.jit
    def step(weights, key):
        f = nets.callable_logits_fn(network, weights)
        clean = jax.lax.stop_gradient(jax.nn.softmax(f(inputs)))
        loss = jax.tree_util.Partial(away, clean)
        attack = functools.partial(
            attacks.pgd,
            eps=0.1,
            num_steps=5,
            step_size=0.03,
            random_start=False,
            init=inputs + 0.01,
        )
        points = attacks.maximize(attack, f, key, inputs, labels, loss=loss)
        return points, jax.grad(lambda w: jnp.sum(network(w, points)))(weights)

    points, gradient = step(weights, jax.random.key(0))
    clean = jax.nn.softmax(network(weights, inputs))

    def moved(weights):
        x = jnp.clip(inputs + 0.01, inputs - 0.1, inputs + 0.1)
        for _ in range(5):
            gradient = jax.grad(lambda x: jnp.sum(away(clean, network(weights, x), labels)))(x)
            x = jnp.clip(x + 0.03 * jnp.sign(gradient), inputs - 0.1, inputs + 0.1)
        return x

    np.testing.assert_allclose(points, moved(weights), atol=1e-6)
    # Nothing flows through the attack: the gradient is that of fixed points.
    expected = jax.grad(lambda w: jnp.sum(network(w, points)))(weights)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    count = len(traces)
    step(2 * weights, jax.random.key(1))
    assert len(traces) == count
    # PGD-AT's: examples that are wrong already move as all others do.
    f = nets.callable_logits_fn(network, weights)
    bim = functools.partial(attacks.bim, eps=0.1, num_steps=5, step_size=0.03)
    points = attacks.maximize(bim, f, None, inputs, labels)
    np.testing.assert_allclose(points, by_hand(weights, losses.cross_entropy), atol=1e-6)
    assert np.any(np.asarray(f(inputs)).argmax(1) != labels)


def test_cost_counts_without_running():
    def unasked(inputs):
        assert isinstance(inputs, jax.core.Tracer)  # shapes alone
        return jnp.zeros((inputs.shape[0], 4))

    counter = Counter()
    method, problem = walk([0.3])
    with engine.handled_by(counter):
        result = engine.run(method, problem._replace(logits_fn=unasked))
    assert counter.total == Passes(1 + 20 + 1, 1 + 10)
    assert not result.success[0]


# -------------------------------------------------------------------------------------------------
# The loop over rows


def test_rows_are_halved_twice_and_quartered_then():
    assert row_loop.row_counts(1000, 100, 1e12) == [500, 250, 63, 0]
    assert row_loop.row_counts(500, 100, 1e12) == [250, 125, 32, 0]
    assert row_loop.row_counts(70, 50, 1e12) == [35, 0]
    assert row_loop.row_counts(62, 1000, 1e12) == [0]
    assert row_loop.row_counts(512, 49, 1e12) == [0]
    # A step on fewer rows is cheap.
    assert row_loop.row_counts(1000, 100, 2 * row_loop._LEAST_WORK) == [500, 0]
    assert row_loop.row_counts(1000, 100, 1.9 * row_loop._LEAST_WORK) == [0]


def test_multiplications_are_counted():
    def network(weights, x):
        x = jax.lax.conv_general_dilated(
            x, weights["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ weights["wide"][:, :2], lambda x: x[..., :2], x)
        x, _ = jax.lax.scan(lambda x, _: (x @ weights["square"], None), x, length=5)
        return jax.jit(jax.vmap(lambda row: row.reshape(-1) @ weights["last"]))(x)

    shapes = {"kernel": (3, 3, 4, 8), "wide": (8, 6), "square": (2, 2), "last": (98, 10)}
    weights = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    count = row_loop.multiplications(network, weights, jnp.zeros((6, 7, 7, 4)))
    each = 7 * 7 * 8 * 3 * 3 * 4 + 7 * 7 * 8 * 2 + 5 * 7 * 7 * 2 * 2 + 98 * 10
    assert count == 6 * each


def test_each_example_takes_its_own_number_of_steps_in_few_rows(narrowing):
    """Counted in the loop: the rows of all steps, and which examples each of them had."""
    rng = np.random.default_rng(0)
    needed = rng.integers(0, 100, size=BATCH)
    rows = []

    def step(needed, scale, double, carry):
        taken, done = carry
        jax.debug.callback(lambda done: rows.append(len(done)), done, ordered=True)
        taken = taken + ~done * scale
        return taken, double(taken) >= 2 * needed

    @jax.jit
    def run(needed):
        start = (jnp.zeros(BATCH, jnp.int32), needed <= 0)
        fixed = (needed, jnp.int32(1), nets.callable_logits_fn(lambda x: 2 * x))
        sizes = row_loop.row_counts(BATCH, 100, 0)
        return row_loop.until_done(
            lambda fixed, carry: (carry[0] + 1, step(*fixed, carry[1])),
            fixed,
            (jnp.int32(0), start),
            goes_on=lambda carry: carry[0] < 1000,
            done=lambda carry: carry[1][1],
            sizes=sizes,
        )

    turns, (taken, done) = run(jnp.asarray(needed))
    assert turns == needed.max()
    np.testing.assert_array_equal(taken, needed)
    assert np.all(done)
    assert set(rows) == {BATCH, 35}
    assert len(rows) == needed.max()
    assert rows.count(BATCH) == np.sort(needed)[-36]  # until 35 are left


def test_examples_in_turn_do_not_wait_for_each_other():
    """Steps with work for all their rows, but for those near the end."""
    rng = np.random.default_rng(0)
    needed = np.where(rng.uniform(size=BATCH) < 0.1, 90, rng.integers(0, 10, size=BATCH))
    worked = []

    @jax.jit
    def run(needed):
        def step(fixed, carry):
            turn, (taken, done) = carry
            active = jnp.sum(~done), len(done)
            jax.debug.callback(lambda *both: worked.append(both), *active, ordered=True)
            taken = taken + ~done
            return turn + 1, (taken, taken >= fixed[0])

        start = (jnp.zeros(BATCH, jnp.int32), needed <= 0)
        return row_loop.in_turn(
            step,
            (needed,),
            (jnp.int32(0), start),
            goes_on=lambda carry: carry[0] < 1000,
            done=lambda carry: carry[1][1],
        )

    _, (taken, done) = run(jnp.asarray(needed))
    jax.effects_barrier()
    np.testing.assert_array_equal(taken, needed)
    assert np.all(done)
    assert {int(size) for _, size in worked} == {32, 8}
    assert sum(int(active) for active, _ in worked) == needed.sum()
    # Until eight are left, those are the rows that worked.
    assert sum(int(size) for _, size in worked) < 1.5 * needed.sum()


@pytest.fixture
def problem():
    """A network with borders at very different distances, in float64: rounding must not decide."""
    with tiny.double_precision():
        yield _problem()


def _problem():
    rng = np.random.default_rng(0)
    net = tiny.Net(3 * rng.normal(size=(6, 16)), rng.normal(size=(16, 4)))
    logits_fn = net.logits_fn(dtype=jnp.float64)
    inputs = jax.random.uniform(jax.random.key(0), (BATCH, 6), jnp.float64)
    return logits_fn, jax.random.key(2), inputs, jnp.argmax(logits_fn(inputs), axis=-1)


ATTACKS = {
    "pgd": functools.partial(attacks.pgd, eps=0.1, num_steps=60, num_restarts=2, trace=True),
    "apgd": functools.partial(attacks.apgd, eps=0.1, num_steps=60, trace=True),
    "apgd_targeted": functools.partial(attacks.apgd_targeted, eps=0.1, num_steps=20, trace=True),
    "apgd l1": functools.partial(attacks.apgd, eps=0.3, norm="l1", num_steps=60),
    "square": functools.partial(attacks.square, eps=0.1, num_queries=60, trace=True),
    "carlini_wagner_l2": functools.partial(
        attacks.carlini_wagner_l2, num_searches=3, num_steps=30, trace=True
    ),
    "carlini_wagner_linf": functools.partial(attacks.carlini_wagner_linf, num_steps=50),
    "carlini_wagner_l0": functools.partial(attacks.carlini_wagner_l0, num_steps=50),
    "ead": functools.partial(attacks.ead, num_searches=3, num_steps=30, trace=True),
    "deepfool": functools.partial(attacks.deepfool, num_steps=60, overshoot=0.001),
    "jsma": functools.partial(attacks.jsma, theta=0.02, max_features=120),
    "spsa": functools.partial(attacks.spsa, eps=0.1, num_steps=60, num_samples=8, trace=True),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ATTACKS)
def test_the_result_is_that_of_all_rows_to_the_end(name, problem, narrowing, monkeypatch):
    attack = ATTACKS[name]
    narrowed = attack(*problem)
    loops = str(jax.make_jaxpr(attack)(*problem)).count(" while[")
    monkeypatch.setattr(row_loop, "_LEAST_ROWS", 10**6)
    jax.clear_caches()  # the attack's own program is narrowed still
    whole = attack(*problem)
    assert str(jax.make_jaxpr(attack)(*problem)).count(" while[") < loops
    jax.clear_caches()
    np.testing.assert_array_equal(narrowed.success, whole.success)
    np.testing.assert_array_equal(narrowed.queries, whole.queries)
    assert len(set(np.asarray(whole.queries).tolist())) > 3  # or nothing could be narrowed
    for got, expected in zip(jax.tree.leaves(narrowed), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_examples_on_several_devices_stay_there(problem, narrowing):
    logits_fn, key, *rest = problem
    attack = functools.partial(attacks.pgd, eps=0.1, num_steps=60, num_restarts=2)
    expected = attack(*problem)
    devices = jax.devices()[:2]
    keys = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(BATCH))
    found = attack(parallel.replicate(logits_fn, devices), *parallel.split((keys, *rest), devices))
    assert found.inputs.sharding.shard_shape(found.inputs.shape)[0] == BATCH // 2
    np.testing.assert_array_equal(found.success, expected.success)
    inputs, labels = parallel.split(tuple(rest), devices)
    spread = functools.partial(problems.prepare, logits_fn, None, targets=None, bounds=(0.0, 1.0))
    assert spread(inputs, labels).spread.over_devices
    assert not spread(*rest).spread.over_devices
