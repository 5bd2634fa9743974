"""Facts of an attack, read off its function."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np

from jdistill import _validate, losses
from jdistill._jax import parameters, unbound
from jdistill.typing import Norm

Access = Literal["gradient", "scores", "decisions"]
Follows = Literal["softmax", "logits"]
Settings = Mapping[str, Any]
_Function = TypeVar("_Function", bound=Callable[..., Any])

_ATTRIBUTE = "__attack_facts__"


class Traits(NamedTuple):
    """Facts of an attack with its settings.

    Attributes:
        name: of the function.
        title: the attack as readers know it, such as `"PGD"`.
        norms: those that the attack is made for; of one, or none, it has no argument `norm`.
        norm: of its distances; None where that is not known.
        eps: its radius; None for a minimum-norm attack, and for a radius per example.
        minimum_norm: whether it looks for the smallest distance; of an attack that says nothing of
            itself, whether it takes no `eps`.
        access: what it uses of the network: `"gradient"`, `"scores"` (logits without a gradient),
            or `"decisions"` (the predicted class); None where that is not known.
        follows: `"softmax"` if it climbs the softmax at T = 1, whose gradient a distilled network
            hides; `"logits"` if no scale of the logits stands in its way; None where that is not
            known, and of attacks that run others.
        host_loop: whether it is a loop on the host, which cannot be put under `jit` or `vmap`.
            True where that is not known.
        handicap: why it does worse than others on any network, such as `"one step"`; or None.
        freedom: what it may do where no norm limits that; or None.
        settings: every argument with a default or a bound value, by name.
    """

    name: str
    title: str
    norms: tuple[Norm, ...]
    norm: Norm | None
    eps: float | None
    minimum_norm: bool
    access: Access | None
    follows: Follows | None
    host_loop: bool
    handicap: str | None
    freedom: str | None
    settings: dict[str, Any]


class _Facts(NamedTuple):
    """Arguments of `facts`."""

    title: str | Callable[[Settings], str]
    norms: tuple[Norm, ...]
    minimum_norm: bool | Callable[[Settings], bool]
    access: Access
    follows: Follows | Callable[[Settings], Follows | None] | None
    host_loop: bool
    handicap: str | None
    freedom: str | None
    of: Callable[[Settings], Sequence[Callable[..., Any]]] | None


def facts(
    *,
    title: str | Callable[[Settings], str],
    norms: tuple[Norm, ...],
    access: Access = "gradient",
    follows: Follows | Callable[[Settings], Follows | None] | None = "logits",
    minimum_norm: bool | Callable[[Settings], bool] = False,
    host_loop: bool = False,
    handicap: str | None = None,
    freedom: str | None = None,
    of: Callable[[Settings], Sequence[Callable[..., Any]]] | None = None,
) -> Callable[[_Function], _Function]:
    """Decorator that puts facts on an attack, and changes nothing else about it.

    Args:
        title: as in `Traits`, as are all that follow; a function of the settings where it depends
            on them.
        norms: all that `norm` may be, or the one norm of an attack without that argument.
        access: what it uses.
        follows: what it climbs; `by_loss` for an attack with a `loss`.
        minimum_norm: whether it looks for the smallest distance.
        host_loop: whether it is one.
        handicap: why it does worse than others, or None.
        freedom: what it may do where no norm limits that, or None.
        of: of an attack that runs others: these, from the settings. Norms, radius, and access are
            then theirs, where they agree.
    """
    made = _Facts(title, norms, minimum_norm, access, follows, host_loop, handicap, freedom, of)

    def put(function: _Function) -> _Function:
        setattr(function, _ATTRIBUTE, made)
        return function

    return put


def traits(attack: Callable[..., Any]) -> Traits:
    """Facts of an attack: what it takes, uses, and is known by.

    They are read off the function, through any `functools.partial`, and bound settings count:
    `fab` looks for the smallest distance, `fab` with an `eps` within it.

    Args:
        attack: an attack, with or without settings bound; any callable.

    Returns:
        The traits. Of a callable from elsewhere, what its signature and its bound settings say,
        and cautious values otherwise.

    Raises:
        ValueError: `attack` is no function.

    Example:
        >>> import functools
        >>> from jdistill import attacks
        >>> pgd = functools.partial(attacks.pgd, eps=0.1, norm="l2")
        >>> attacks.traits(pgd)[:6]
        ('pgd', 'PGD', ('linf', 'l2', 'l1'), 'l2', 0.1, False)
        >>> attacks.traits(pgd).follows
        'softmax'
        >>> attacks.traits(functools.partial(pgd, loss=losses.margin)).follows
        'logits'
        >>> attacks.traits(lambda logits_fn, key, inputs, labels, eps=0.3: ...).eps
        0.3
    """
    _validate.function(attack=attack, remedy="pass an attack such as jdistill.attacks.pgd")
    function, settings = unbound(attack)
    known: _Facts | None = getattr(function, _ATTRIBUTE, None)
    name = getattr(function, "__name__", type(function).__name__)
    norm: Norm | None = settings["norm"] if isinstance(settings.get("norm"), str) else None
    eps = _number(settings.get("eps"))
    if known is None:
        return Traits(
            name=name,
            title=name.replace("_", " "),
            norms=(norm,) if norm else (),
            norm=norm,
            eps=eps,
            minimum_norm="eps" not in {*settings, *parameters(function)},
            access=None,
            follows=None,
            host_loop=True,
            handicap=None,
            freedom=None,
            settings=settings,
        )
    found = Traits(
        name=name,
        title=known.title(settings) if callable(known.title) else known.title,
        norms=known.norms,
        norm=settings.get("norm", known.norms[0] if len(known.norms) == 1 else None),
        eps=eps,
        minimum_norm=known.minimum_norm(settings)
        if callable(known.minimum_norm)
        else known.minimum_norm,
        access=known.access,
        follows=known.follows(settings) if callable(known.follows) else known.follows,
        host_loop=known.host_loop,
        handicap=known.handicap,
        freedom=known.freedom,
        settings=settings,
    )
    parts = [traits(part) for part in known.of(settings)] if known.of else []
    if not parts:
        return found
    return found._replace(
        norms=_shared(part.norms for part in parts) or (),
        norm=_shared(part.norm for part in parts),
        eps=_shared(part.eps for part in parts),
        access=_shared(part.access for part in parts),
        host_loop=found.host_loop or any(part.host_loop for part in parts),
    )


def has_facts(attack: Callable[..., Any]) -> bool:
    """Membership in the library: True for its attacks, with settings bound or not."""
    return hasattr(unbound(attack)[0], _ATTRIBUTE)


def _shared(values: Iterable[Any]) -> Any:
    """The one value of all; None where they differ."""
    first, *others = values
    return first if all(value == first for value in others) else None


def by_loss(settings: Settings) -> Follows | None:
    """Scores that an attack with these settings climbs, from its `loss`.

    A cross-entropy at another temperature is neither: it saturates on logits that are large beside
    that temperature. None is an attack's own loss, a margin.
    """
    if settings["loss"] is None:
        return "logits"
    function, bound = unbound(settings["loss"])
    if function is losses.cross_entropy and _number(bound.get("temperature")) == 1:
        return "softmax"
    return "logits" if function in _SCALE_FREE else None


_SCALE_FREE = (losses.margin, losses.soft_margin, losses.dlr, losses.targeted_dlr)


def with_loss(title: str, usual: Callable[..., Any]) -> Callable[[Settings], str]:
    """A title that names a loss other than the usual one, or a temperature other than 1."""

    def of(settings: Settings) -> str:
        function, bound = unbound(settings["loss"])
        temperature = _number(bound.get("temperature"))
        at = "" if temperature in (None, 1) else f" at T = {temperature:g}"
        if function is usual:
            return title + at
        name = getattr(function, "__name__", "<lambda>")
        return f"{title} {'other loss' if '<' in name else name.replace('_', ' ')}{at}"

    return of


def _number(value: Any) -> float | None:
    """A concrete scalar; one that came as float32 is meant as the short number that it rounds."""
    if isinstance(value, bool | int | float):
        return float(value)
    if not isinstance(value, jax.Array | np.ndarray | np.generic) or _validate.is_traced(value):
        return None
    if np.ndim(value) or np.asarray(value).dtype.kind not in "fiu":
        return None
    return float(str(np.asarray(value)[()]))
