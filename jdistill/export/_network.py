"""Networks by their parts: the module, its configuration, and the weights by their paths."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.tree_util import Partial

from jdistill import _fingerprint, nets
from jdistill.nets._adapters import _LinenApply, _LinenLogits
from jdistill.nets._features import _FeaturesApply
from jdistill.train._step import _Evaluation
from jdistill.typing import Array, PyTree

# The networks that can be made from a configuration, and the functions among their fields.
_NETWORKS: dict[str, Callable[..., Any]] = {
    "ConvNet": nets.ConvNet,
    "EMO": nets.EMO,
    "MobileNetV2": nets.MobileNetV2,
    "PlainNet": nets.PlainNet,
    "ProjectionResNet": nets.ProjectionResNet,
    "ResNet": nets.ResNet,
    "ViT": nets.ViT,
    "WideResNet": nets.WideResNet,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "jdistill.nets.conv_general_dilated": nets.conv_general_dilated,
    "jax.lax.conv_general_dilated": jax.lax.conv_general_dilated,
    "jax.nn.relu": jax.nn.relu,
    "jax.nn.relu6": jax.nn.relu6,
    "jdistill.nets.batch_norm": nets.batch_norm,
    "jdistill.nets.group_norm": nets.group_norm,
}


class Parts(NamedTuple):
    """A network, its weights apart."""

    model: Any  # the Linen module; None for any other network, which is all weights and structure
    weights: PyTree  # the leaves are arrays, or their shapes

    def filled(self, weights: Mapping[str, Any], folder: Any) -> Any:
        """The network with the weights of a folder, by their paths."""
        kinds = shapes(self.weights)
        there, here = (
            {name: list(each.shape) for name, each in held.items()} for held in (weights, kinds)
        )
        if there != here:
            different = [
                f"{name} is {there.get(name, 'absent')} there and {here.get(name, 'absent')} here"
                for name in {**here, **there}
                if there.get(name) != here.get(name)
            ]
            more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
            raise ValueError(
                f"expected a model with the weights of {folder}, got another one: "
                f"{'; '.join(different[:3])}{more}; pass the model that was written"
            )
        leaves = [_as_leaf(weights[name], leaf) for name, leaf in named(self.weights).items()]
        tree = jax.tree.unflatten(jax.tree.structure(self.weights), leaves)
        return tree if self.model is None else nets.logits_fn(self.model, tree)

    def record(self) -> dict[str, Any]:
        """Entry of the configuration, in the types of JSON."""
        if self.model is None:
            return {"kind": "pytree"}
        kind: Any = type(self.model)
        is_known = _NETWORKS.get(kind.__name__) is kind
        fields = {}
        for field in dataclasses.fields(self.model):
            held = getattr(self.model, field.name)
            if field.name not in ("parent", "name"):
                fields[field.name] = _named_function(held) if callable(held) else held
        # A convolution of the user's own has no name that it could be found by.
        if is_known and not any(map(callable, fields.values())):
            text = json.dumps({"kind": kind.__name__, **fields}, default=_number)
            record: dict[str, Any] = json.loads(text)
            return record
        return {"kind": "linen", "class": f"{kind.__module__}.{kind.__qualname__}"}


def _named_function(held: Any) -> Any:
    """A function's name, with the settings of a partial; itself where it has no such name."""
    names = {function: name for name, function in _FUNCTIONS.items()}
    if isinstance(held, functools.partial) and held.func in names and not held.args:
        return {"function": names[held.func], "settings": held.keywords}
    return names.get(held, held)


def _function(record: Any) -> Any:
    """The function of a record of one, and anything else as it is."""
    if isinstance(record, dict) and record.get("function") in _FUNCTIONS:
        return functools.partial(_FUNCTIONS[record["function"]], **record["settings"])
    return _FUNCTIONS.get(record, record) if isinstance(record, str) else record


def _number(value: Any) -> Any:
    return np.asarray(value).item()


def parts(network: Any) -> Parts:
    """The parts of a network, whoever of the library has made it."""
    function = getattr(network, "func", None)
    function = getattr(function, "fun", function)
    if isinstance(function, _LinenLogits):
        return Parts(function.model, network.args[0])
    if isinstance(function, _Evaluation):
        apply_fn = getattr(function.apply_fn, "fun", function.apply_fn)
        if isinstance(apply_fn, _LinenApply):
            params, model_state = network.args
            return Parts(apply_fn.model, {"params": params, **model_state})
        if isinstance(apply_fn, _FeaturesApply):  # without projections, which training alone needs
            params, model_state = network.args
            own = params["network"] if apply_fn.projections else params
            return Parts(apply_fn.model, {"params": own, **model_state})
    return Parts(None, network)


def blank(folder: epath.Path, config: Mapping[str, Any], model: Any) -> Parts:
    """The parts of the configuration's network, or of the user's own; the weights are any."""
    record = dict(config["network"])
    if model is not None and not jax.tree_util.all_leaves([model]):
        return parts(nets.callable_logits_fn(model))
    if model is None:
        kind = record.pop("kind")
        if kind not in _NETWORKS:
            what = f"a module {record['class']}" if kind == "linen" else "no Linen module"
            raise ValueError(
                f"expected the model of {folder}, which is {what}, got None; pass it as load(path, "
                "model): a Linen module, or any other network, whose weights are replaced"
            )
        fields = {name: _function(held) for name, held in record.items()}
        try:
            model = _NETWORKS[kind](**fields)
        except TypeError as error:
            raise ValueError(
                f"expected the fields of {kind}, got {', '.join(fields)} in {folder} ({error}); "
                f"install jdistill {config['versions']['jdistill']} or newer"
            ) from error
    else:
        nets.apply_fn(model)  # says so, where it is no module
        held = Parts(model, None).record()
        if record["kind"] in _NETWORKS and held != record:
            whose = "the written one's"
            different = _fingerprint.differences(held["kind"], record["kind"], whose, "kind")
            different = different or _fingerprint.differences(held, record, whose)
            raise ValueError(
                f"expected the model that was written to {folder}, got one whose "
                f"{'; '.join(different)}; leave the model out"
            )
    key, shape = jax.random.key(0), config["input_shape"]
    params, model_state = jax.eval_shape(lambda: nets.init(model, key, shape))
    return Parts(model, {"params": params, **model_state})


def portable(network: Any) -> Any:
    """The network by the operations of JAX itself.

    The library's convolution for CPUs asks more of the batch's size than a symbol tells.
    """
    model, weights = parts(network)
    if hasattr(model, "conv_general_dilated"):
        plain = model.clone(conv_general_dilated=jax.lax.conv_general_dilated)
        return nets.logits_fn(plain, weights)
    if isinstance(network, Partial):  # it may hold a network, as `nets.with_temperature` does
        return Partial(network.func, *map(portable, network.args), **network.keywords)
    return network


def named(tree: PyTree) -> dict[str, Any]:
    """The leaves by their paths, as `params/conv_0_0/kernel`."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    name = functools.partial(jax.tree_util.keystr, simple=True, separator="/")
    found = {name(path): leaf for path, leaf in leaves}
    if len(found) < len(leaves):
        raise ValueError(
            "expected weights whose paths differ, got two that are written alike; give them names "
            "without '/'"
        )
    return found


def shapes(tree: PyTree) -> dict[str, jax.ShapeDtypeStruct]:
    """Those of the leaves as arrays of numbers, by the leaves' paths."""
    return {name: jax.eval_shape(raw, leaf) for name, leaf in named(tree).items()}


def raw(leaf: Any) -> Array:
    """A leaf as an array of numbers: of a PRNG key, which a module's dropout may hold, its data."""
    return jax.random.key_data(leaf) if _is_key(leaf) else jnp.asarray(leaf)


def _as_leaf(value: Any, like: Any) -> Any:
    if _is_key(like):
        return jax.random.wrap_key_data(value, impl=jax.random.key_impl(like))
    return jnp.asarray(value)


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
