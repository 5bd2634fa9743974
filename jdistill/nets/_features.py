"""Networks that return outputs of their layers beside the logits, for losses on features."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from jdistill import _validate
from jdistill.nets._adapters import (
    apply_fn,
    call_linen,
    check_linen,
    check_variables,
    logits_of,
    training_options,
)
from jdistill.nets._convnet import init
from jdistill.nets._rewriting import Fast
from jdistill.nets._rows import by_rows
from jdistill.typing import ApplyFn, Array, PyTree

# Names of layers that an error lists; a DeiT has more than a hundred.
_MOST_LISTED = 30


@dataclasses.dataclass(frozen=True)
class _FeaturesApply:
    """The `ApplyFn` of a Linen module that returns layers' outputs too."""

    model: nn.Module
    layers: tuple[tuple[str, str], ...]
    projections: tuple[tuple[str, int], ...]

    def __call__(
        self,
        params: PyTree,
        model_state: PyTree,
        inputs: Array,
        /,
        *,
        train: bool,
        key: Array | None,
    ) -> tuple[dict[str, Any], PyTree]:
        weights = params["network"] if self.projections else params
        outputs, features, state = self.captured(weights, model_state, inputs, train, key)
        for name, size in self.projections:
            layer = nn.Dense(size, dot_general=by_rows)
            features[name] = layer.apply({"params": params["projections"][name]}, features[name])
        if not isinstance(outputs, Mapping):
            outputs = {"logits": logits_of(outputs)}
        if "features" in outputs:
            raise ValueError(
                f"expected outputs of {type(self.model).__name__} without the key 'features', "
                f"got {', '.join(map(str, outputs))}; rename it there, or use the module as it is"
            )
        return {"logits": logits_of(outputs), **outputs, "features": features}, state

    def captured(
        self, params: PyTree, model_state: PyTree, inputs: Array, train: bool, key: Array | None
    ) -> tuple[Any, dict[str, Any], PyTree]:
        """The network's outputs, those of its layers by name, and the model state."""
        wanted, there = {path for _, path in self.layers}, set[str]()

        def keep(module: nn.Module, method: str) -> bool:
            path = "/".join(module.path)
            if method != "__call__" or not path:
                return False
            there.add(path)
            return path in wanted

        options = training_options(self.model, key) if train else {"train": False}
        changing = list(model_state) if train else []
        outputs, after = call_linen(
            self.model,
            {"params": params, **model_state},
            inputs,
            mutable=[*changing, "intermediates"],
            capture_intermediates=keep,
            **options,
        )
        after = dict(after)
        held = after.pop("intermediates", {})
        features = {name: self._output(held, path, sorted(there)) for name, path in self.layers}
        return outputs, features, after if changing else model_state

    def _output(self, held: Any, path: str, there: list[str]) -> Any:
        """What the layer at a path has returned, in what was captured."""
        if path not in there:
            listed = ", ".join(there[:_MOST_LISTED]) or "none"
            more = len(there) - _MOST_LISTED
            raise ValueError(
                f"expected layers of {type(self.model).__name__}, got {path!r}; pass one of "
                f"{listed}{f', and {more} more' if more > 0 else ''}"
            )
        for name in path.split("/"):
            held = held[name]
        found = held["__call__"]
        if len(found) != 1:
            raise ValueError(
                f"expected layers that are called once, got {path!r}, which "
                f"{type(self.model).__name__} calls {len(found)} times; name a layer around or "
                "after it"
            )
        return found[0]


@dataclasses.dataclass(frozen=True)
class _FeaturesInit:
    """`(key, shape) -> (params, model_state)` of a network and its projections."""

    features: _FeaturesApply

    def __call__(self, key: Array, shape: tuple[int, ...]) -> tuple[PyTree, PyTree]:
        params, model_state = init(self.features.model, key, shape)

        def features(params: PyTree, model_state: PyTree) -> dict[str, Any]:
            one = jnp.zeros((1, *shape), jnp.float32)
            return self.features.captured(params, model_state, one, False, None)[1]

        found = jax.eval_shape(features, params, model_state)
        if not self.features.projections:
            return params, model_state
        projections = {}
        for number, (name, size) in enumerate(self.features.projections):
            if not hasattr(found[name], "shape") or not found[name].shape[1:]:
                raise ValueError(
                    f"expected projections of features [B, ..., C], got {name!r}, which is "
                    f"{getattr(found[name], 'shape', type(found[name]).__name__)}; project others"
                )
            # The network itself is drawn as it is without projections.
            draw = jax.random.fold_in(key, number)
            like = jnp.zeros((1, found[name].shape[-1]), jnp.float32)
            projections[name] = nn.Dense(size).init(draw, like)["params"]
        return {"network": params, "projections": projections}, model_state


def with_features(
    model: nn.Module, layers: Mapping[str, str], *, projections: Mapping[str, int] | None = None
) -> tuple[Callable[..., Any], ApplyFn]:
    """A Flax Linen network that returns outputs of its layers beside its logits.

    For losses that compare a student's features with a teacher's (`distill.feature_loss`). The
    outputs are a dict of `"logits"`, what else the network returns where that is a mapping, and
    `"features"`, a dict of arrays. The network itself, its weights, and what it computes stay as
    they are; layers are looked at by Flax's own `capture_intermediates`.

    Where the sizes of student and teacher differ, the student has a linear layer from one to the
    other that is trained with it and thrown away afterwards, the regressor of FitNets: pass its
    size in `projections`. It acts on the last axis, so on images `[B, H, W, C]` it is a 1x1
    convolution.

    Args:
        model: A Linen module, as `apply_fn` takes it.
        layers: Which outputs to return: a name of one's own to the layer's path in the module,
            such as `{"hint": "conv_1_1", "queries": "block_3/query"}`; at least one. A layer is
            called once in a forward pass.
        projections: Names among those of `layers`, to the number of channels that the feature is
            mapped to.

    Returns:
        `(init, apply_fn)`, as `study.Stage` takes a model: `init(key, shape)` gives
        `(params, model_state)`, and `apply_fn` returns the outputs above and the model state. The
        params are the network's own, so that those of an ordinary training fit; with projections
        they are `{"network": ..., "projections": {name: {"kernel", "bias"}}}`. Pairs of equal
        arguments are equal, and share a compiled step.

    Raises:
        ValueError: A module that `apply_fn` refuses, no layers, names or sizes of another kind; and
            from `init` and `apply_fn` a layer that is not there (those that are there are named),
            or is called several times, and outputs that have the key `"features"` already.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jdistill import nets
        >>> layers = {"hint": "conv_0_1"}
        >>> init, apply = nets.with_features(nets.digits_net(), layers, projections={"hint": 8})
        >>> params, model_state = init(jax.random.key(0), (8, 8, 1))
        >>> outputs, _ = apply(params, model_state, jnp.zeros((2, 8, 8, 1)), train=False, key=None)
        >>> outputs["logits"].shape, outputs["features"]["hint"].shape
        ((2, 10), (2, 4, 4, 8))

    References:
        Romero, Ballas, Kahou, Chassang, Gatta & Bengio 2015, "FitNets: Hints for Thin Deep Nets",
        section 2.2.
    """
    model = check_linen(model)
    _validate.mapping(layers=layers)
    if not layers:
        raise ValueError("expected layers of the model, got none; name at least one")
    for name, path in layers.items():
        _validate.text(**{"a name of layers": name, f"layers[{name!r}]": path})
    sizes = {} if projections is None else projections
    _validate.mapping(projections=sizes)
    for name, size in sizes.items():
        if name not in layers:
            raise ValueError(
                f"expected projections of {', '.join(layers)}, got {name!r}; add it to layers"
            )
        _validate.count(**{f"projections[{name!r}]": size})
    features = _FeaturesApply(model, tuple(sorted(layers.items())), tuple(sorted(sizes.items())))
    return _FeaturesInit(features), features


@dataclasses.dataclass(frozen=True)
class _Outputs:
    """`(variables, inputs) -> outputs` of an `ApplyFn` in evaluation mode."""

    apply_fn: ApplyFn

    def __call__(self, variables: Mapping[str, PyTree], inputs: Array, /) -> PyTree:
        state = {name: value for name, value in variables.items() if name != "params"}
        outputs, _ = self.apply_fn(variables["params"], state, inputs, train=False, key=None)
        return outputs


def outputs_fn(model: Any, variables: Mapping[str, PyTree]) -> Partial:
    """All outputs of a network with its weights, in evaluation mode.

    As `logits_fn`, which returns the logits alone: for a frozen teacher whose features, or second
    head, a student learns from.

    Args:
        model: A Linen module, as `apply_fn` takes it, or a pair `(init, apply_fn)`, such as
            `with_features` and `nnx_model` give.
        variables: `{"params": params, **model_state}`.

    Returns:
        A pytree that maps inputs `[B, ...]` to what the network returns. Its leaves are the
        variables, and new ones compile nothing.

    Raises:
        ValueError: A module that `apply_fn` refuses, a tuple of something else, or `variables`
            without `"params"`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jdistill import nets
        >>> model = nets.with_features(nets.digits_net(), {"hint": "conv_0_1"})
        >>> params, model_state = model[0](jax.random.key(0), (8, 8, 1))
        >>> teacher = nets.outputs_fn(model, {"params": params, **model_state})
        >>> jax.jit(lambda net, x: net(x))(teacher, jnp.zeros((2, 8, 8, 1)))["features"].keys()
        dict_keys(['hint'])
    """
    if isinstance(model, tuple):
        if len(model) != 2 or not all(map(callable, model)):
            raise ValueError(
                f"expected model to be a Linen module or (init, apply_fn), got {len(model)} "
                "entries; pass what nets.with_features or nets.nnx_model gives"
            )
        apply = model[1]
    else:
        apply = apply_fn(model)
    return Partial(Fast(_Outputs(apply)), check_variables(variables))
