"""Student losses on features beside the logits: hints, attention maps, relations of tokens."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jdistill import _validate, losses, nets
from jdistill._jax import as_pytree
from jdistill.distill._losses import as_argument, online_loss
from jdistill.distill._several import one_teacher
from jdistill.typing import Array, ArrayLike, Batch, LogitsFn, LossFn

# `(features [B, ...], teacher_features [B, ...]) -> [B]`.
Distance = Callable[[Any, Any], Array]


def feature_loss(
    temperature: ArrayLike,
    teacher: LogitsFn,
    *,
    layers: Mapping[str, str],
    distance: Distance = losses.hint,
    weight: ArrayLike = 1.0,
    base: Callable[..., LossFn] | None = online_loss,
) -> LossFn:
    """A student loss with a distance between features, against a teacher that sees each batch.

    The loss is::

        base(T, teacher) + w · Σ over layers of d(features, teacher's features)

    Student and teacher are networks whose outputs are a mapping with `"logits"` and `"features"`,
    itself a mapping from names to arrays `[B, ...]`. Where the two have other sizes the student
    needs a layer of its own from one to the other, whose outputs are among its features: its
    weights are the student's and are trained with it. No gradient flows into the teacher. As a
    `student_loss` of `chain` or of a study it wants `online=True`.

    Args:
        temperature: above 0; of `base`.
        teacher: inputs `[B, ...]` to outputs as above, in evaluation mode.
        layers: which features are compared: the student's name to the teacher's, at least one.
        distance: `(features, teacher_features) -> [B]`, such as `losses.hint` (FitNets) or
            `losses.attention_transfer`. Keep one function and reuse it: each new one compiles anew.
        weight: w, at least 0. Attention transfer's paper has about `1000 / (H W)`.
        base: `(T, teacher) -> loss_fn`, the loss of the logits, such as `online_loss` with its
            weights bound, or None for the features alone (FitNets' first stage). It asks the
            teacher for `teacher(batch.inputs)` and may use the inputs for nothing else.

    Returns:
        `(outputs, batch) -> [B]`, a pytree that carries the teacher's weights: other numbers
        compile nothing.

    Raises:
        ValueError: numbers out of range, no layers; and from the loss, outputs without these
            features, several teachers, or a distance that is not one value per example.

    Example:
        >>> def network(x):
        ...     return {"logits": x, "features": {"last": 2 * x}}
        >>> batch = Batch(jnp.array([[1.0, 2.0]]), jnp.array([1]), None, jnp.ones(1))
        >>> loss = feature_loss(1.0, network, layers={"last": "last"}, base=None)
        >>> loss(network(jnp.array([[1.0, 1.0]])), batch).tolist()
        [2.0]

    References:
        Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", section 2; Zagoruyko & Komodakis
        2017, "Paying More Attention to Attention", section 3.1.
    """
    _validate.mapping(layers=layers)
    if not layers:
        raise ValueError(
            "expected layers to compare, at least one, got none; pass the student's name of a "
            "feature to the teacher's, such as {'hint': 'hint'}"
        )
    for pair in layers.items():
        for name in pair:
            _validate.text(**{"each name in layers": name})
    compare = jax.tree_util.Partial(
        _Layers(tuple(layers.items())), as_pytree(distance, name="distance")
    )
    return _with_features(compare, temperature, teacher, weight, base)


def relation_loss(
    temperature: ArrayLike,
    teacher: LogitsFn,
    *,
    num_heads: int,
    names: Sequence[str] = ("query", "key", "value"),
    teacher_names: Sequence[str] = ("query", "key", "value"),
    weight: ArrayLike = 1.0,
    base: Callable[..., LossFn] | None = online_loss,
) -> LossFn:
    """A student loss with relations between tokens (TinyMIM), against a teacher of each batch.

    The loss is::

        base(T, teacher) + w · (KL of Q-K relations + KL of V-V relations)

    each the mean over heads and tokens (`losses.relation_kl`), at no temperature. Student and
    teacher are transformers whose outputs hold `"features"`, with the queries, keys, and values
    `[B, N, heads · d]` of one block each among them; their widths may differ. No gradient flows
    into the teacher. As a `student_loss` of `chain` or of a study it wants `online=True`.

    Args:
        temperature: above 0; of `base`.
        teacher: inputs `[B, ...]` to a mapping with `"logits"` and `"features"`, in evaluation
            mode.
        num_heads: at least 1; queries, keys, and values of both are cut into that many heads.
        names: of the student's queries, keys, and values among its features.
        teacher_names: of the teacher's; the paper takes a block in the middle of a large one.
        weight: w, at least 0.
        base: as in `feature_loss`; None for the relations alone, as TinyMIM trains.

    Returns:
        `(outputs, batch) -> [B]`, a pytree that carries the teacher's weights: other numbers
        compile nothing.

    Raises:
        ValueError: numbers out of range, not three names; and from the loss, outputs without these
            features, several teachers, or sizes that do not fit.

    Example:
        >>> def network(x):
        ...     return {"logits": x[:, 0], "features": {"query": x, "key": x, "value": x}}
        >>> batch = Batch(jnp.ones((1, 3, 4)), jnp.array([1]), None, jnp.ones(1))
        >>> loss = relation_loss(1.0, network, num_heads=2, base=None)
        >>> loss(network(jnp.zeros((1, 3, 4))), batch).tolist()  # all tokens alike in both
        [0.0]

    References:
        Ren, Wei, Zhang & Hu 2023, "TinyMIM: An Empirical Study of Distilling MIM Pre-trained
        Models", section 3.
    """
    _validate.count(num_heads=num_heads)
    _validate.sequence(names=names, teacher_names=teacher_names)
    for name, value in (("names", names), ("teacher_names", teacher_names)):
        if len(value) != 3:
            raise ValueError(
                f"expected {name} of queries, keys, and values, got {len(value)} of them; pass "
                "three names of features"
            )
        for each in value:
            _validate.text(**{f"each of {name}": each})
    compare = jax.tree_util.Partial(_Relations(tuple(names), tuple(teacher_names), num_heads))
    return _with_features(compare, temperature, teacher, weight, base)


@dataclasses.dataclass(frozen=True)
class _Layers:
    """The sum of a distance over pairs of features; equal pairs share a trace."""

    layers: tuple[tuple[str, str], ...]

    def __call__(self, distance: Distance, outputs: Any, its: Any) -> Array:
        total: Any = 0.0
        for name, teacher_name in self.layers:
            features = _feature(outputs, name, "the student")
            found = distance(features, _feature(its, teacher_name, "the teacher"))
            if jnp.shape(found) != features.shape[:1]:
                raise ValueError(
                    f"expected distance to give one value per example, [B] = {features.shape[:1]}, "
                    f"got shape {jnp.shape(found)}; take no mean over the batch"
                )
            total += found
        return total


@dataclasses.dataclass(frozen=True)
class _Relations:
    """The divergence of Q-K and of V-V relations."""

    names: tuple[str, ...]
    teacher_names: tuple[str, ...]
    num_heads: int

    def __call__(self, outputs: Any, its: Any) -> Array:
        ours = [_feature(outputs, name, "the student") for name in self.names]
        theirs = [_feature(its, name, "the teacher") for name in self.teacher_names]
        total = jnp.zeros(ours[0].shape[:1])
        for left, right in ((0, 1), (2, 2)):
            four = ours[left], ours[right], theirs[left], theirs[right]
            total += losses.relation_kl(*four, num_heads=self.num_heads)
        return total


def _with_features(
    compare: Any,
    temperature: ArrayLike,
    teacher: LogitsFn,
    weight: ArrayLike,
    base: Callable[..., LossFn] | None,
) -> LossFn:
    _validate.function(teacher=teacher)
    _validate.positive(temperature=temperature)
    _validate.non_negative(weight=weight)
    of_logits = None
    if base is not None:
        remedy = "pass a function of temperature and teacher, such as distill.online_loss, or None"
        _validate.function(remedy=remedy, base=base)
        # Its teacher has been asked already, so that the weights are held once.
        of_logits = as_argument(base(temperature, jax.tree_util.Partial(_already)))
    return jax.tree_util.Partial(
        _feature_loss,
        compare,
        of_logits,
        nets.callable_logits_fn(teacher),
        # Without a base no temperature is used; runs of a sweep differ in it all the same.
        jnp.asarray(temperature, jnp.float32),
        jnp.asarray(weight, jnp.float32),
    )


def _already(outputs: Any) -> Any:
    """The outputs of a teacher in the place of its inputs."""
    return outputs


def _feature_loss(
    compare: Any,
    of_logits: LossFn | None,
    teacher: LogitsFn,
    temperature: Array,
    weight: Array,
    outputs: Any,
    batch: Batch,
) -> Array:
    del temperature
    its = jax.lax.stop_gradient(one_teacher(teacher(batch.inputs), "a loss on features"))
    loss = weight * compare(outputs, its)
    return loss if of_logits is None else loss + of_logits(outputs, batch._replace(inputs=its))


def _feature(outputs: Any, name: str, whose: str) -> Array:
    """One of a network's features."""
    held: Any = outputs.get("features") if isinstance(outputs, Mapping) else None
    if not isinstance(held, Mapping) or name not in held:
        got = ", ".join(held) if isinstance(held, Mapping) else "none"
        raise ValueError(
            f"expected the feature {name!r} among outputs['features'] of {whose}, got {got}; use a "
            "network that returns {'logits': ..., 'features': {name: array}}"
        )
    feature: Array = held[name]
    return feature
