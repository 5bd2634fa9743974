"""Fingerprints: what computes the same has the same one, in every process, and nothing else has."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from jdistill import _fingerprint, attacks, losses, nets, train


class Scaled:
    def __init__(self, sign):
        self.sign = sign

    def __call__(self, logits, labels):
        return self.sign * losses.margin(logits, labels)


class Net(linen.Module):
    activation: object

    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(self.activation(x - 0.5))


def test_a_network_is_its_weights_and_its_functions():
    inputs = np.zeros((5, 4), np.float32)
    variables = Net(jnp.tanh).init(jax.random.key(0), inputs)
    made = {
        name: _fingerprint.fingerprint(nets.logits_fn(Net(activation), values))
        for name, activation, values in (
            ("one", jnp.tanh, variables),
            ("same", jnp.tanh, variables),
            ("a function", lambda x: x, variables),
            ("another function", lambda x: -x, variables),
            ("other weights", jnp.tanh, jax.tree.map(lambda w: w + 1, variables)),
        )
    }
    assert made["one"] == made["same"]
    assert len(set(made.values())) == 4
    jax.clear_caches()
    assert _fingerprint.fingerprint(nets.logits_fn(Net(jnp.tanh), variables)) == made["one"]


def test_losses_are_told_apart_whatever_holds_their_settings():
    def of(loss):
        attack = functools.partial(attacks.pgd, eps=0.1, loss=loss)
        return _fingerprint.fingerprint(_fingerprint.describe_attack(attack))

    assert of(Scaled(1.0)) == of(Scaled(1.0))
    assert len({of(loss) for loss in (Scaled(1.0), Scaled(-1.0), losses.margin)}) == 3


def test_an_object_is_its_class_and_what_it_holds():
    describe = _fingerprint.describe
    assert describe(Scaled(1.0)) == describe(Scaled(1.0)) != describe(Scaled(-1.0))

    class Scaled2(Scaled):
        def __call__(self, logits, labels):
            return 2 * self.sign * losses.margin(logits, labels)

    assert describe(Scaled2(1.0)) != describe(Scaled(1.0))


def test_every_process_finds_the_same():
    code = """
        import jax, numpy as np
        from jdistill import _fingerprint, attacks, losses, nets, train
        model = nets.digits_net()
        params, _ = nets.init(model, jax.random.key(0), (8, 8, 1))
        net = nets.logits_fn(model, jax.tree.map(np.zeros_like, {"params": params}))
        print(_fingerprint.fingerprint([net, _fingerprint.describe_attack(attacks.fmn)]))
    """
    printed = {
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            env=os.environ | {"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(printed) == 1


def states(stack):
    return lambda event: stack.append(jax.tree.map(np.array, event["state"]))


W = np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32)
INPUTS = np.random.default_rng(1).uniform(size=(12, 9)).astype(np.float32)
PLAIN = nets.callable_logits_fn(lambda w, x: (x - 0.5) @ w, jnp.asarray(W))
RIGHT = np.asarray(PLAIN(INPUTS)).argmax(1)


@pytest.mark.parametrize("driver", ["ensemble", "autoattack"])
@pytest.mark.parametrize("change", ["weights", "network", "eps", "loss"])
def test_a_start_of_another_run_is_refused(driver, change):
    def run(network, eps=0.01, loss=losses.margin, **more):
        if driver == "autoattack":
            return attacks.autoattack(
                network, jax.random.key(0), INPUTS, RIGHT, eps=eps, version="rand", **more
            )
        attack = functools.partial(attacks.pgd, eps=eps, num_steps=3, loss=loss)
        return attacks.ensemble(network, jax.random.key(0), INPUTS, RIGHT, attacks=[attack], **more)

    if driver == "autoattack" and change == "loss":
        pytest.skip("its losses are its own")
    kept = []
    whole = run(PLAIN, callback=states(kept))
    again = run(PLAIN, start=kept[-1])
    np.testing.assert_array_equal(again.success, whole.success)
    other = {
        "weights": {
            "network": nets.callable_logits_fn(lambda w, x: (x - 0.5) @ w, jnp.asarray(-W))
        },
        "network": {"network": nets.callable_logits_fn(lambda w, x: (x - 0.4) @ w, jnp.asarray(W))},
        "eps": {"network": PLAIN, "eps": 0.3},
        "loss": {"network": PLAIN, "loss": lambda z, y: -losses.margin(z, y)},
    }[change]
    with pytest.raises(ValueError, match="got the state of another one"):
        run(**other, start=kept[-1])


def test_settings_have_one_in_every_version_and_order():
    content = {"temperature": 20.0, "seeds": [0, 1], "data": {"name": "digits"}}
    of = _fingerprint.fingerprint
    assert of(content) == "09d9c1b6e4a3d73b"
    assert of(dict(reversed(content.items()))) == of({**content, "seeds": (0, 1)}) == of(content)
    for changed in ({"seeds": [1, 0]}, {"temperature": 20.5}, {"data": {"name": "mnist"}}):
        assert of({**content, **changed}) != of(content)


# Pairs that differ in nothing but code, made by one factory each.


def linen_class(act):
    class Network(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(act(x))

    return Network


def of_linen(act):
    return linen_class(act)()


def of_nnx_class(act):
    class Network(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(3, 3, rngs=rngs)

        def __call__(self, x):
            return act(self.layer(x))

    return nets.nnx_model(Network)


def of_dataclass(act):
    @dataclasses.dataclass(frozen=True)
    class Network:
        width: int = 3

        def __call__(self, x):
            return act(x)

    return Network()


def of_pytree(act):
    @jax.tree_util.register_pytree_node_class
    class Network:
        def __call__(self, x):
            return act(x)

        def tree_flatten(self):
            return (np.zeros(3), np.ones(2)), None

        @classmethod
        def tree_unflatten(cls, _, leaves):
            return cls()

    return Network()


def of_stateless_object(act):
    class Network:
        def __call__(self, x):
            return act(x)

    return Network()


def of_base_class(act):
    class Base:
        def __call__(self, x):
            return act(x)

    class Network(Base):
        pass

    return Network()


def of_wrapper(act):
    def inner(x):
        return x

    @functools.wraps(inner)
    def network(x):
        return act(inner(x))

    return network


def of_custom_rule(act):
    @jax.custom_jvp
    def network(x):
        return x

    network.defjvp(lambda primals, tangents: (primals[0], act(tangents[0])))
    return network


def of_global_function(act):
    space = {"act": act, "__name__": "mine"}
    act.__module__ = "mine"
    exec("def network(x):\n    return act(x)", space)
    return space["network"]


@pytest.mark.parametrize(
    "make",
    [
        of_linen,
        of_nnx_class,
        of_dataclass,
        of_pytree,
        of_stateless_object,
        of_base_class,
        of_wrapper,
        of_custom_rule,
        of_global_function,
    ],
)
def test_edited_code_is_another_network(make):
    def same(x):
        return jnp.tanh(x)

    def again(x):
        return jnp.tanh(x)

    again.__qualname__ = same.__qualname__
    one, twin, other = make(same), make(again), make(lambda x: 2 * jnp.tanh(x))
    of = _fingerprint.fingerprint
    assert of(one) == of(twin)
    assert of(one) != of(other)


def test_what_refers_to_itself_has_a_fingerprint():
    class Node:
        def __init__(self, number):
            self.number, self.me = number, self

    def even(n):
        return n == 0 or odd(n - 1)

    def odd(n):
        return n != 0 and even(n - 1)

    of = _fingerprint.fingerprint
    assert of(Node(1)) == of(Node(1)) != of(Node(2))
    assert of(even) != of(odd)


@pytest.mark.parametrize(
    "schedule",
    [
        lambda: optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100),
        lambda: optax.cosine_decay_schedule(1e-3, 100),
        lambda: optax.linear_schedule(1e-3, 0.0, 100),
        lambda: optax.piecewise_constant_schedule(1e-3, {10: 0.1}),
        lambda: optax.exponential_decay(1e-3, 10, 0.5),
    ],
)
def test_an_optimizer_is_the_same_after_it_was_used(schedule):
    """The schedules of optax write to what they close over."""
    optimizer = optax.adamw(schedule())
    before = _fingerprint.fingerprint(optimizer)
    params = {"w": jnp.ones(2)}
    state = optimizer.init(params)
    for _ in range(2):
        _, state = optimizer.update(params, state, params)
    assert (
        _fingerprint.fingerprint(optimizer)
        == before
        == _fingerprint.fingerprint(optax.adamw(schedule()))
    )
    assert before != _fingerprint.fingerprint(optax.adamw(2e-3))


# The same file as a program, by import, and under another name.


FILE = """
import dataclasses, enum, functools
import jax, jax.numpy as jnp, numpy as np
from flax import linen, nnx
from jdistill import losses, nets

class Kind(enum.Enum):
    ONE = 1

def act(x):
    return jnp.tanh(x)

class Linen(linen.Module):
    activation: object = act
    kind: object = Kind.ONE
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(self.activation(x))

class Base(nnx.Module):
    def __init__(self, rngs):
        self.layer, self.kind = nnx.Linear(4, 3, rngs=rngs), Kind.ONE
    def __call__(self, x):
        return act(self.layer(x))

class Nnx(Base):
    pass

@dataclasses.dataclass(frozen=True)
class Loss:
    scale: float = 2.0
    def __call__(self, logits, labels):
        return self.scale * losses.margin(logits, labels)

@jax.tree_util.register_pytree_node_class
class Node:
    def tree_flatten(self):
        return (np.zeros(3), np.ones(2)), (Kind.ONE, Linen, Loss(), act)
    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls()

class Slots:
    __slots__ = ()

@functools.wraps(act)
def wrapped(x):
    return act(x) + 1

@functools.wraps(losses.margin)
def mine(logits, labels):
    return 2 * losses.margin(logits, labels)

NUMPY = np.zeros((1, 4), np.float32)
MADE = {
    "function": act,
    "wrapper": wrapped,
    "wrapper of the library's": mine,
    "linen": Linen(),
    "linen with weights": nets.logits_fn(Linen(), Linen().init(jax.random.key(0), NUMPY)),
    "nnx": nets.nnx_model(Nnx),
    "nnx with weights": nets.nnx_logits_fn(Nnx(nnx.Rngs(0))),
    "dataclass": Loss(),
    "class": Loss,
    "method": Loss().__call__,
    "pytree": Node(),
    "object": Slots(),
    "set": {Kind.ONE, Loss},
}
"""


@pytest.fixture(scope="module")
def of_modules():
    """What a file makes as each of three modules."""
    made = []
    for name in ("__main__", "package.first", "second"):
        space = types.ModuleType(name)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, name, space)
            exec(FILE, space.__dict__)
            described = {n: _fingerprint.describe(each) for n, each in space.MADE.items()}
        made.append(described)
    return made


@pytest.mark.parametrize(
    "name",
    [
        "function",
        "wrapper",
        "wrapper of the library's",
        "linen",
        "linen with weights",
        "nnx",
        "nnx with weights",
        "dataclass",
        "class",
        "method",
        "pytree",
        "object",
        "set",
    ],
)
def test_the_users_code_is_the_same_from_any_module(of_modules, name):
    one, *others = (made[name] for made in of_modules)
    assert all(other == one for other in others)
    assert "__main__" not in json.dumps(one)
    assert "package" not in json.dumps(of_modules[1][name])


def test_the_librarys_code_goes_by_its_full_name_and_a_wrapper_of_it_does_not(of_modules):
    assert _fingerprint.describe(losses.margin) == "jdistill.losses.margin"
    assert of_modules[0]["wrapper of the library's"].startswith("margin ")


# What is said of two that differ.


def said(one, other, name=""):
    one, other = (json.loads(json.dumps(_fingerprint.describe(each))) for each in (one, other))
    return _fingerprint.differences(one, other, "this study's", name)


def scaled_by(number):
    return lambda logits, labels: number * losses.margin(logits, labels)


def at_step(number=1):
    return lambda logits, labels, step=number: losses.margin(logits, labels)


@pytest.mark.parametrize(
    ("one", "other", "place", "values"),
    [
        (train.sgd(0.05), train.sgd(0.1), "learning_rate", ("0.05", "0.1")),
        (optax.adam(1e-3), optax.adam(1e-2), "step_size", ("-0.001", "-0.01")),
        (
            optax.adam(optax.cosine_decay_schedule(1e-3, 9)),
            optax.adam(optax.cosine_decay_schedule(2e-3, 9)),
            "init_value",
            ("0.001", "0.002"),
        ),
        (scaled_by(1.0), scaled_by(2.0), "number", ("1.0", "2.0")),
        (at_step(1), at_step(2), "step", ("1", "2")),
        ({"eps": [*range(50), 1]}, {"eps": [*range(50), 2]}, "eps[50]", ("1", "2")),
        (
            {"loss": losses.margin},
            {"loss": losses.cross_entropy},
            "loss",
            ("margin'", "cross_entropy'"),
        ),
    ],
    ids=["sgd", "adam", "schedule", "closure", "default", "list", "name"],
)
def test_a_number_that_differs_is_shown(one, other, place, values):
    (text,) = said(one, other)
    before, found = text.split(" is ")
    assert before.endswith(place)
    mine, theirs = found.split(", this study's ")
    assert mine.endswith(values[0])
    assert theirs.endswith(values[1])


def test_code_that_differs_is_said_without_equal_texts():
    (text,) = said(lambda z: z, lambda z: z + 1, "loss")
    assert text.startswith("loss has other code or settings than this study's (")
    assert text.endswith("<lambda>)")
    (text,) = said(np.zeros(3), np.ones(3), "weights")
    assert text == "weights has other numbers than this study's (float64[3])"


def test_long_texts_are_shown_around_their_first_difference():
    (text,) = said("a" * 200 + "0.05" + "b" * 200, "a" * 200 + "0.1" + "b" * 200, "rates")
    mine, theirs = text.removeprefix("rates is ").split(", this study's ")
    assert "a0.05b" in mine
    assert "a0.1b" in theirs
    assert max(len(mine), len(theirs)) < 90


def test_what_differs_alike_is_said_once():
    def stages(rate, *more):
        return {f"stage {n}": {"rate": each} for n, each in enumerate((rate, rate, rate, *more))}

    assert said(stages(0.1), stages(0.2), "chain") == [
        "chain.(stage 0, stage 1, stage 2).rate is 0.1, this study's 0.2"
    ]
    assert said(stages(0.1, 1), stages(0.2, 2), "chain")[1:] == [
        "chain.stage 3.rate is 1, this study's 2"
    ]
    assert said({"a": {"rate": 1}, "rate": 1}, {"a": {"rate": 2}, "rate": 2}) == [
        "a.rate (and alike in 1 more) is 1, this study's 2"
    ]
