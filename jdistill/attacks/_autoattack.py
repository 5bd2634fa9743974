"""AutoAttack: the standard ensemble of parameter-free attacks, on survivors only."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate, losses
from jdistill.attacks._apgd import apgd, apgd_targeted
from jdistill.attacks._core import driver
from jdistill.attacks._core.driver import EnsembleState
from jdistill.attacks._core.problem import (
    AttackResult,
    need_key,
    num_classes,
    prepare,
    refuse_tracers,
)
from jdistill.attacks._core.traits import facts
from jdistill.attacks._fab import fab, fab_targeted
from jdistill.attacks._square import square
from jdistill.typing import Array, ArrayLike, Bounds, Callback, LogitsFn, Norm

_NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
_VERSIONS = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
_NUM_TARGETS = 9
# Two losses differ by some points on any network. Where the second breaks this share of all
# examples, and this many, after the cross-entropy did not, the cross-entropy is what failed.
_GAP, _GAP_EXAMPLES = 0.1, 5

Attack = Callable[..., AttackResult]


@facts(title="AutoAttack", norms=_NORMS, host_loop=True)
def autoattack(
    logits_fn: LogitsFn,
    key: Array,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: ArrayLike,
    norm: Norm = "linf",
    version: str = "standard",
    batch_size: int = 250,
    bounds: Bounds = (0.0, 1.0),
    targets: ArrayLike | None = None,
    devices: Sequence[jax.Device] | None = None,
    start: EnsembleState | None = None,
    callback: Callback | None = None,
) -> AttackResult:
    """AutoAttack: APGD-CE, APGD-T, FAB-T and Square, one after another, on the survivors.

    ==========  ===================================================================================
    version     attacks, in this order
    ==========  ===================================================================================
    `standard`  `apgd-ce`, `apgd-t` on 9 classes, `fab-t` on 9 classes, `square`, 5000 queries
    `plus`      `apgd-ce` and `apgd-dlr` with 5 starts, `fab` with 5, `square`, `apgd-t`, `fab-t`
    `rand`      `apgd-ce`, `apgd-dlr`: for random defenses, as `attacks.expectation` of 20 draws
    ==========  ===================================================================================

    All of 100 steps. For l1, `standard` gives `apgd-ce` 5 starts and `apgd-t` 5 classes, and there
    is no `square`. Fewer classes than aimed at are all aimed at. Below four classes the targeted
    DLR loss is not defined and below three the DLR loss: there the margin takes their place, with
    a warning.

    This is a driver, as `ensemble` is: a loop on the host over padded batches of few sizes.
    The classes of `apgd-t` and `fab-t` and the starts of `apgd-ce` and `apgd-dlr` are steps of
    their own, so that whatever breaks leaves before the next one. Each example keeps its own
    key: beyond ties and rounding the flags do not depend on `batch_size`, nor on stopping and
    resuming.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[B]` keys.
        inputs: `[B, ...]` float inside `bounds`; any number of examples.
        labels: `[B]` int, the true classes.
        eps: radius of the ball in input units, at least 0; a scalar.
        norm: `"linf"`, `"l2"` or `"l1"`.
        version: `"standard"`, `"plus"` or `"rand"`.
        batch_size: the most examples at a time, at least 1.
        bounds: the box of valid inputs.
        targets: `[B]` int, classes to reach; `apgd-t` and `fab-t` then aim at these alone. None
            takes any class but the label.
        devices: to spread each batch over; None leaves everything where it is. The flags do not
            depend on them.
        start: the state of an earlier run with the same arguments, to go on from: what was done is
            not done again.
        callback: called after every batch, and about once per second inside one, which is then
            run in chunks of steps, with `event="attack"`, `stage="autoattack"`, `attack` (such
            as `"apgd-t 3/9"`),
            the numbers of examples `done` and in `total` of this attack, `survivors` so far, and
            `state`, an `EnsembleState`: its arrays change as the run goes on, so save them, or copy
            them. Inside a batch also `step` and `num_steps` (None where that is not fixed) of the
            loop that runs.

    Returns:
        The result; robust accuracy is `1 - mean(success)`. `info`: `broken_by [B]` int32, the
        place of the attack in the version's order (`autoattack_names`), -1 where none was needed
        or none succeeded; `robust_after [B, attacks]` bool, whether the example stood after each;
        `gradients [B]` int32, backward passes of all attacks.
        A warning says where `apgd-ce` left a tenth of the examples or more that the attack after
        it then broke.

    Raises:
        ValueError: eps below 0, NaN or not a scalar, an unknown norm or version, batch_size below
            1, no key, a tracer, a start of other examples; inputs not finite or outside the box,
            labels or targets outside `0..K-1`.

    Example:
        >>> weights = jnp.array([[1.0, -1, 0, 0, 0.5], [1, -1, 0, 0.5, 0]])
        >>> logits_fn = lambda x: x @ weights - jnp.array([[0.3, 0, 0, 0, 0]])
        >>> x, y = jnp.array([[0.5, 0.5], [0.3, 0.3]]), jnp.array([0, 0])
        >>> result = autoattack(logits_fn, jax.random.key(0), x, y, eps=0.2)
        >>> result.success.tolist()
        [False, True]

    References:
        Croce & Hein 2020, "Reliable Evaluation of Adversarial Robustness with an Ensemble of
        Diverse Parameter-free Attacks", section 5; the version for l1 from Croce & Hein 2021,
        "Mind the box".
    """
    refuse_tracers("autoattack", logits_fn, key, inputs, labels, eps, targets)
    _validate.count(batch_size=batch_size)
    _validate.scalar(eps=eps)
    _validate.non_negative(eps=eps)
    problem = prepare(logits_fn, key, inputs, labels, targets=targets, bounds=bounds, open_box=True)
    need_key(problem, "random starts")
    named, component = _steps(
        norm, version, float(np.asarray(eps)), num_classes(problem), targets is not None
    )
    state = driver.run(
        named,
        problem,
        minimum_norm=False,
        batch_size=batch_size,
        bounds=bounds,
        devices=devices,
        start=start,
        callback=callback,
        stage="autoattack",
    )
    broken_by = np.where(state.broken_by < 0, -1, component[state.broken_by]).astype(np.int32)
    order = np.arange(component[-1] + 1)
    robust_after = ~state.success[:, None] | (broken_by[:, None] > order)
    _say_where_blind(robust_after, autoattack_names(version, norm))
    info = {"broken_by": jnp.asarray(broken_by), "robust_after": jnp.asarray(robust_after)}
    return driver.result(state, minimum_norm=False, info=info)


def autoattack_names(version: str = "standard", norm: Norm = "linf") -> tuple[str, ...]:
    """The attacks of a version, in their order.

    Args:
        version: `"standard"`, `"plus"` or `"rand"`.
        norm: `"linf"`, `"l2"` or `"l1"`.

    Returns:
        Their names; `broken_by` of `autoattack` is a place among them.

    Raises:
        ValueError: an unknown version or norm.

    Example:
        >>> autoattack_names()
        ('apgd-ce', 'apgd-t', 'fab-t', 'square')
    """
    _validate.one_of(_NORMS, norm=norm)
    _validate.one_of(_VERSIONS, version=version)
    return tuple(name for name in _VERSIONS[version] if (name, norm) != ("square", "l1"))


def _steps(
    norm: Norm, version: str, eps: float, num_classes: int, targeted: bool
) -> tuple[dict[str, Attack], np.ndarray]:
    """The steps by name, and of each the place of its attack in the version."""
    names = autoattack_names(version, norm)
    _say_what_is_undefined(names, num_classes)
    num_starts = 5 if version == "plus" or (version, norm) == ("standard", "l1") else 1
    few = 5 if (version, norm) == ("standard", "l1") else _NUM_TARGETS
    others = 1 if targeted else num_classes - 1
    targets = {"apgd-t": min(few, others), "fab-t": min(_NUM_TARGETS, others)}
    budget: dict[str, Any] = {"eps": eps, "norm": norm}
    dlr = losses.dlr if num_classes >= 3 else losses.margin
    of_name: dict[str, list[Attack]] = {
        "apgd-ce": [functools.partial(apgd, **budget)] * num_starts,
        "apgd-dlr": [functools.partial(apgd, loss=dlr, **budget)] * num_starts,
        "apgd-t": _by_target(apgd_targeted, targets["apgd-t"], budget),
        "fab": [functools.partial(fab, num_restarts=5, **budget)],
        "fab-t": _by_target(fab_targeted, targets["fab-t"], budget),
        "square": [functools.partial(square, **budget)],
    }
    named, component = {}, []
    for place, name in enumerate(names):
        count = len(of_name[name])
        for step, attack in enumerate(of_name[name], start=1):
            named[name if count == 1 else f"{name} {step}/{count}"] = attack
            component.append(place)
    return named, np.array(component, np.int32)


def _by_target(attack: Attack, count: int, budget: dict[str, Any]) -> list[Attack]:
    """The attack on one class after another."""
    return [
        functools.partial(attack, num_targets=1, first_target=rank, **budget)
        for rank in range(count)
    ]


def _say_what_is_undefined(names: tuple[str, ...], num_classes: int) -> None:
    replaced = [
        loss
        for loss, name, needed in (("DLR", "apgd-dlr", 3), ("targeted DLR", "apgd-t", 4))
        if name in names and num_classes < needed
    ]
    if replaced:
        warnings.warn(
            f"the {' and the '.join(replaced)} loss is not defined for {num_classes} classes; "
            "autoattack takes the margin instead",
            stacklevel=4,
        )


def _say_where_blind(robust_after: np.ndarray, names: tuple[str, ...]) -> None:
    """A warning where the cross-entropy leaves many examples that the next loss breaks."""
    by_cross_entropy, by_next = robust_after[:, :2].sum(axis=0)
    gap = int(by_cross_entropy - by_next)
    if gap >= max(_GAP_EXAMPLES, _GAP * len(robust_after)):
        warnings.warn(
            f"{names[0]} left {by_cross_entropy} of {len(robust_after)} examples standing and "
            f"{names[1]} then broke {gap} of them, so attacks on the cross-entropy alone (FGSM, "
            "PGD) overstate how much this network withstands. Either the cross-entropy saturates, "
            "which is gradient masking, or its gradient leads to another class than the nearest; "
            "the check `zero_gradients` of jdistill.diagnose.masking decides between them",
            stacklevel=3,
        )
