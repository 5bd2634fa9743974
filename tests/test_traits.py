"""Facts on attacks: what `traits` reads through partials, and that they agree with the attacks."""

import functools
import inspect
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jdistill import attacks, losses

traits = attacks.traits
ATTACKS = {
    name: getattr(attacks, name)
    for name in attacks.__all__
    if inspect.isfunction(getattr(attacks, name))
    and inspect.signature(getattr(attacks, name)).return_annotation is attacks.AttackResult
}
# Attacks that run others have the norms and the kind of theirs.
ALONE = [
    name
    for name, function in ATTACKS.items()
    if not {"attack", "attacks"} & {*inspect.signature(function).parameters}
]
INPUTS, LABELS = jnp.full((2, 4, 4, 1), 0.5), jnp.array([0, 1])


def logits_fn(inputs):
    flat = inputs.reshape(inputs.shape[0], -1)
    return flat @ jnp.asarray(np.random.default_rng(0).normal(size=(16, 3)), flat.dtype)


def required(function):
    """Settings without a default, but norm."""
    fgsm = functools.partial(attacks.fgsm, eps=0.1)
    values = {"eps": 0.1, "attacks": [fgsm], "attack": fgsm, "source": logits_fn}
    parameters = inspect.signature(function).parameters
    return {
        name: values[name]
        for name, parameter in list(parameters.items())[4:]
        if parameter.default is parameter.empty
    }


def call(function, inputs, labels, **settings):
    return function(logits_fn, jax.random.key(0), inputs, labels, **required(function), **settings)


# -------------------------------------------------------------------------------------------------
# The facts agree with the functions


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_has_facts(name):
    found = traits(ATTACKS[name])
    assert found.name == name
    assert found.title != name.replace("_", " ")  # as that of an attack without facts
    assert found.access in ("gradient", "scores", "decisions")
    assert found.settings.keys() < inspect.signature(ATTACKS[name]).parameters.keys()


def test_titles_are_unique():
    titles = [traits(function).title for function in ATTACKS.values()]
    assert len(set(titles)) == len(titles)


@pytest.mark.parametrize("name", ALONE)
def test_norms_are_those_that_the_attack_takes(name):
    function, found = ATTACKS[name], traits(ATTACKS[name])
    if "norm" not in inspect.signature(function).parameters:
        assert found.norms == (found.norm,)
        return
    assert found.norm == inspect.signature(function).parameters["norm"].default
    with pytest.raises(ValueError, match="expected norm to be one of") as error:
        call(function, INPUTS, LABELS, norm="none")
    listed = str(error.value).partition(", got")[0]
    assert sorted(re.findall(r"'(\w+)'", listed)) == sorted(found.norms)
    assert traits(functools.partial(function, norm=found.norms[-1])).norm == found.norms[-1]


@pytest.mark.parametrize("name", ALONE)
def test_a_radius_is_what_a_fixed_budget_needs(name):
    parameters, found = inspect.signature(ATTACKS[name]).parameters, traits(ATTACKS[name])
    needs_eps = "eps" in parameters and parameters["eps"].default is inspect.Parameter.empty
    assert needs_eps == (not found.minimum_norm and found.freedom is None)
    assert found.eps is None
    if "eps" in parameters:
        within = traits(functools.partial(ATTACKS[name], eps=0.1))
        assert (within.eps, within.minimum_norm) == (0.1, False)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_host_loop_refuses_tracers(name):
    function = ATTACKS[name]
    trace = functools.partial(jax.eval_shape, functools.partial(call, function), INPUTS, LABELS)
    if traits(function).host_loop:
        with pytest.raises(ValueError, match="got a tracer"):
            trace()
    else:
        trace()


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_with_a_loss_follows_it(name):
    function = ATTACKS[name]
    usual = inspect.signature(function).parameters.get("loss")
    if usual is None:
        return
    for loss, follows in (
        (usual.default, "softmax" if usual.default is losses.cross_entropy else "logits"),
        (losses.cross_entropy, "softmax"),
        (Partial(losses.cross_entropy, temperature=jnp.float32(1.0)), "softmax"),
        (functools.partial(losses.cross_entropy, temperature=20.0), None),
        (losses.margin, "logits"),
        (losses.dlr, "logits"),
        (lambda logits, labels: -logits[:, 0], None),
    ):
        assert traits(functools.partial(function, loss=loss)).follows == follows


# -------------------------------------------------------------------------------------------------
# Through partials, and from any callable


def test_bound_settings_count_through_partials():
    inner = functools.partial(attacks.pgd, eps=0.3, norm="l2", num_steps=7)
    for outer in (functools.partial(inner, norm="l1"), Partial(inner, norm="l1")):
        found = traits(outer)
        assert (found.name, found.norm, found.eps) == ("pgd", "l1", 0.3)
        assert found.settings["num_steps"] == 7
        assert found.settings["num_restarts"] == 1  # a default
    twice = traits(functools.partial(Partial(attacks.fgsm, eps=0.1), eps=0.2))
    assert (twice.title, twice.eps) == ("FGSM", 0.2)


def test_a_radius_is_a_number_or_unknown():
    def eps(value):
        return traits(functools.partial(attacks.pgd, eps=value)).eps

    assert eps(np.float32(0.1)) == eps(jnp.float32(0.1)) == 0.1  # the short number it rounds
    assert eps(1) == 1.0
    assert eps(jnp.full(4, 0.1)) is None
    seen = []
    jax.jit(lambda value: seen.append(eps(value)))(0.1)
    assert seen == [None]


def test_a_loss_may_hold_a_temperature():
    def pgd(**settings):
        return traits(functools.partial(attacks.pgd, **settings))

    probe = pgd(loss=Partial(losses.cross_entropy, temperature=20.0))
    assert (probe.title, probe.follows) == ("PGD at T = 20", None)
    assert pgd(loss=losses.margin).title == "PGD margin"
    assert pgd(loss=lambda logits, labels: logits[:, 0]).title == "PGD other loss"


def test_fab_looks_for_the_smallest_distance_or_within_a_radius():
    for function in (attacks.fab, attacks.fab_targeted):
        assert traits(function).minimum_norm
        assert traits(function).eps is None
        within = traits(functools.partial(function, eps=0.2, norm="l2"))
        assert (within.minimum_norm, within.eps, within.norm) == (False, 0.2, "l2")


def test_what_is_transferred_is_as_what_crafts_it():
    alone = traits(attacks.transfer)
    assert (alone.title, alone.norm, alone.eps, alone.host_loop) == ("Transfer", None, None, False)
    for crafter in (
        functools.partial(attacks.pgd, eps=0.3, norm="l1"),
        functools.partial(attacks.square, eps=0.1),
        attacks.carlini_wagner_l2,
        functools.partial(attacks.autoattack, eps=0.1),
    ):
        own = traits(crafter)
        moved = traits(functools.partial(attacks.transfer, source=logits_fn, attack=crafter))
        for fact in ("norms", "norm", "eps", "minimum_norm", "access", "host_loop"):
            assert getattr(moved, fact) == getattr(own, fact), fact
        assert (moved.title, moved.follows) == ("Transfer", None)


def test_an_ensemble_is_what_its_attacks_share():
    pgd = functools.partial(attacks.pgd, eps=0.1)
    square = functools.partial(attacks.square, eps=0.1)
    for members in ([pgd, square], {"a": pgd, "b": square}):
        found = traits(functools.partial(attacks.ensemble, attacks=members))
        assert (found.norm, found.eps, found.access) == ("linf", 0.1, None)
        assert found.host_loop
        assert not found.minimum_norm
    found = traits(
        functools.partial(attacks.ensemble, attacks=[attacks.ddn, attacks.fmn], minimum_norm=True)
    )
    assert (found.norm, found.norms, found.minimum_norm) == (None, (), True)
    assert traits(attacks.ensemble).norm is None


class Own:
    """A callable object, with a setting."""

    def __call__(self, logits_fn, key, inputs, labels, *, norm="l2", eps=None):
        return attacks.fgsm(logits_fn, key, inputs, labels, norm=norm, eps=eps)


def own_attack(logits_fn, key, inputs, labels, *, eps=0.1):
    return attacks.fgsm(logits_fn, key, inputs, labels, eps=eps)


@pytest.mark.parametrize(
    ("attack", "name", "norm", "eps"),
    [
        (own_attack, "own_attack", None, 0.1),
        (functools.partial(own_attack, eps=0.2), "own_attack", None, 0.2),
        (functools.partial(Partial(own_attack), eps=0.2), "own_attack", None, 0.2),
        (lambda logits_fn, key, inputs, labels: None, "<lambda>", None, None),
        (Own(), "Own", "l2", None),
        (functools.partial(Own(), norm="linf", eps=1), "Own", "linf", 1.0),
        (max, "max", None, None),  # a callable that has no signature to tell
    ],
)
def test_a_users_own_attack_is_taken_with_care(attack, name, norm, eps):
    found = traits(attack)
    assert (found.name, found.norm, found.eps) == (name, norm, eps)
    assert found.title == name.replace("_", " ")
    assert found.minimum_norm == (eps is None and not isinstance(attack, Own))  # which takes one
    assert found.host_loop
    assert (found.access, found.follows, found.handicap, found.freedom) == (None,) * 4


def test_facts_change_nothing_else():
    for function in ATTACKS.values():
        assert isinstance(function, Callable)
        assert function.__module__.startswith("jdistill.attacks.")
        assert list(inspect.signature(function).parameters)[:2] == ["logits_fn", "key"]


@pytest.mark.parametrize("eps", ["8/255", {"linf": 0.1}, object(), np.array("a"), 1j])
def test_a_radius_of_another_kind_is_unknown(eps):
    assert attacks.traits(functools.partial(own_attack, eps=eps)).eps is None


def test_a_users_attack_looks_for_the_smallest_distance_where_it_takes_no_eps():
    def bounded(logits_fn, key, inputs, labels, *, eps): ...

    def unbounded(logits_fn, key, inputs, labels, *, steps=3): ...

    assert not attacks.traits(bounded).minimum_norm
    assert not attacks.traits(functools.partial(bounded, eps=None)).minimum_norm
    assert attacks.traits(unbounded).minimum_norm


def test_the_cost_of_an_attack_in_a_box_without_zero():
    attack = functools.partial(attacks.pgd, eps=0.1, num_steps=5, bounds=(1.0, 2.0))
    assert attacks.cost(attack, shape=(3,), num_classes=2) == (7, 5)


def test_a_concrete_radius_is_known_under_jit_too():
    attack, found = functools.partial(attacks.pgd, eps=np.float32(0.1)), []

    @jax.jit
    def compiled(x):
        found.append(attacks.traits(attack).eps)
        found.append(attacks.traits(functools.partial(attacks.pgd, eps=x)).eps)
        return x

    compiled(0.3)
    assert found == [0.1, None]
