"""Adapters: any network as an `ApplyFn` for training or a `LogitsFn` for everything else.

An adapter is a value. Its static part (module, graph or function) compares by what it holds, and
its weights are leaves of a pytree, so compiled code that takes the adapter as an argument is
reused for new weights, and `jax.vmap` maps over stacked ones.
"""

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jdistill import _validate
from jdistill._jax import static
from jdistill.nets._rewriting import Fast, call_pytree, fast_on_cpu, is_fast
from jdistill.typing import ApplyFn, Array, LogitsFn, PyTree

# Imported where it is used: it takes as long as all of this library.
if TYPE_CHECKING:
    from flax import nnx

# Names of the switch between training and evaluation, with its value for evaluation. A Linen module
# that takes one of these but not `train` would run in whichever mode is its default, so it is
# refused: training needs the switch, too.
_SWITCHES = {
    "train": False,
    "training": False,
    "is_training": False,
    "deterministic": True,
    "use_running_average": True,
}


def check_module(model: Any) -> nn.Module:
    """The module, which is one of Linen, in a form that can be the static part of an adapter."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"expected model to be a Flax Linen module, got {type(model).__name__}; use "
            "nnx_logits_fn or nnx_model for an NNX module and callable_logits_fn for a function"
        )
    try:
        hash(model)
        return model
    except TypeError as error:
        names = [field.name for field in dataclasses.fields(model) if field.name != "parent"]
        lists = {name: getattr(model, name, None) for name in names}
        tuples: dict[str, Any] = {
            name: tuple(held) for name, held in lists.items() if isinstance(held, list)
        }
        if tuples and model.scope is None:
            # `nn.Sequential([...])`, as everybody writes it.
            with contextlib.suppress(TypeError):
                model = model.clone(**tuples)
                hash(model)
                return model
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"expected model to be a hashable module, got {type(model).__name__} ({reason:.200}); "
            "make its fields tuples instead of lists or arrays"
        ) from None


def check_linen(model: Any) -> nn.Module:
    """The module, which can be called as an adapter does."""
    model = check_module(model)
    names = _parameter_names(model)
    switches = [name for name in _SWITCHES if name in names]
    if switches and "train" not in names:
        raise ValueError(
            f"expected {type(model).__name__}.__call__ to take `train`, got `{switches[0]}`; "
            "wrap it in a module whose `__call__(self, inputs, *, train=False)` sets that argument"
        )
    _check_needs(model, {"train", "dropout_keys"})
    return model


def _check_needs(model: Any, known: Collection[str]) -> None:
    """The module needs no further argument than its inputs and those that are known."""
    required = [
        parameter.name
        for parameter in list(inspect.signature(model.__call__).parameters.values())[1:]
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        and parameter.name not in known
    ]
    if required:
        raise ValueError(
            f"expected {type(model).__name__}.__call__ to need its inputs only, got the further "
            f"argument `{required[0]}`; wrap it in a module that sets that argument"
        )


def _parameter_names(model: Any) -> tuple[str, ...]:
    """Names of the arguments of the module's `__call__`, the inputs left out."""
    return tuple(inspect.signature(model.__call__).parameters)[1:]


def call_linen(model: nn.Module, variables: PyTree, inputs: Array, **options: Any) -> Any:
    """`model.apply`, with the options that its `__call__` does not take left out."""
    names = _parameter_names(model)
    for name in ("train", "dropout_keys"):
        if name not in names:
            options.pop(name, None)
    try:
        return model.apply(variables, inputs, **options)
    except flax.errors.ScopeCollectionNotFound as error:
        raise ValueError(
            f"expected all variables of {type(model).__name__}, got {', '.join(variables)} "
            f"({error}); pass the model state too, the second of what nets.init returns"
        ) from None


def training_options(model: nn.Module, key: Array | None) -> dict[str, Any]:
    """Options of `call_linen` in training, with the examples' keys."""
    options: dict[str, Any] = {"train": True, "dropout_keys": key}
    if key is not None and "dropout_keys" not in _parameter_names(model):
        # `nn.Dropout` draws one mask for the whole batch from one key.
        options["rngs"] = {"dropout": key[0]}
    return options


def check_variables(variables: Any) -> dict[str, PyTree]:
    """The variables of a network, its parameters among them."""
    if not isinstance(variables, Mapping) or "params" not in variables:
        shown = sorted(variables) if isinstance(variables, Mapping) else type(variables).__name__
        raise ValueError(
            f"expected variables with the key 'params', got {shown}; "
            'pass {"params": params, **model_state}'
        )
    return dict(variables)


@dataclasses.dataclass(frozen=True)
class _LinenApply:
    """The `ApplyFn` of a Linen module; equal where the modules are equal."""

    model: nn.Module

    def __call__(
        self,
        params: PyTree,
        model_state: PyTree,
        inputs: Array,
        /,
        *,
        train: bool,
        key: Array | None,
    ) -> tuple[Array, PyTree]:
        variables = {"params": params, **model_state}
        if not train:
            return call_linen(self.model, variables, inputs, train=False), model_state
        options = training_options(self.model, key)
        if not model_state:
            return call_linen(self.model, variables, inputs, **options), model_state
        logits, updated = call_linen(
            self.model, variables, inputs, mutable=list(model_state), **options
        )
        return logits, dict(updated)


@dataclasses.dataclass(frozen=True)
class _LinenLogits:
    """`(variables, inputs) -> logits` of a Linen module in evaluation mode."""

    model: nn.Module

    def __call__(self, variables: PyTree, inputs: Array, /) -> Array:
        return logits_of(call_linen(self.model, variables, inputs, train=False))


@dataclasses.dataclass(frozen=True)
class _NnxLogits:
    """`(state, inputs) -> logits` of an NNX graph in evaluation mode."""

    graphdef: Any

    def __call__(self, state: PyTree, inputs: Array, /) -> Array:
        from flax import nnx

        return logits_of(_called(nnx.merge(self.graphdef, state), inputs, train=False))


def _called(module: Any, inputs: Array, *, train: bool) -> Any:
    """The outputs of an NNX module, its mode passed on where it takes a switch for it."""
    names = _parameter_names(module)
    # What a module passes on wins over what `train()` or `eval()` has set in its parts.
    switches = {name: value != train for name, value in _SWITCHES.items() if name in names}
    return module(inputs, **switches)


@dataclasses.dataclass(frozen=True)
class _NnxApply:
    """The `ApplyFn` of the NNX modules that a function makes; equal for the same function."""

    make: Callable[..., Any]

    def parts(self) -> tuple[Any, Any, Any, Any]:
        """Graph, and the structure of weights, random state, and the rest."""
        from flax import nnx

        module = nnx.eval_shape(lambda: self.make(nnx.Rngs(0)))
        parts: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
        return parts

    def __call__(
        self,
        params: PyTree,
        model_state: PyTree,
        inputs: Array,
        /,
        *,
        train: bool,
        key: Array | None,
    ) -> tuple[PyTree, PyTree]:
        from flax import nnx

        graphdef, weights, random, rest = self.parts()
        draw = jax.random.key(0) if key is None else key[0]
        leaves, structure = jax.tree.flatten(random)
        drawn = [
            jax.random.fold_in(draw, number)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for number, leaf in enumerate(leaves)
        ]
        nnx.replace_by_pure_dict(weights, params)
        nnx.replace_by_pure_dict(rest, model_state)
        module = nnx.merge(graphdef, weights, jax.tree.unflatten(structure, drawn), rest)
        if train:
            module.train()
        else:
            module.eval()
        outputs = _called(module, inputs, train=train)
        parts: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
        after = parts[-1]
        return outputs, nnx.to_pure_dict(after) if train else model_state


@dataclasses.dataclass(frozen=True)
class _NnxInit:
    """`(key, shape) -> (params, model_state)` of the NNX modules that a function makes."""

    make: Callable[..., Any]

    def __call__(self, key: Array, shape: Any = ()) -> tuple[PyTree, PyTree]:
        del shape  # an NNX module knows its own
        from flax import nnx

        parts: Any = nnx.split(self.make(nnx.Rngs(key)), nnx.Param, nnx.RngState, ...)
        _, weights, _, rest = parts
        return nnx.to_pure_dict(weights), nnx.to_pure_dict(rest)


def nnx_model(make: Callable[..., Any]) -> tuple[Callable[..., Any], ApplyFn]:
    """The weights and the `ApplyFn` of a Flax NNX network, for training.

    Args:
        make: `rngs -> module`, with `rngs` an `nnx.Rngs`: the module's class, or a function that
            makes one. The module is called as `nnx_logits_fn` calls it. Its dropout draws one mask
            for the batch from the first example's key, as `nn.Dropout` does in `apply_fn`.

    Returns:
        `(init, apply_fn)`: `init(key, shape)` gives `(params, model_state)`, nested dicts of
        arrays. `apply_fn` is equal for the same `make`, so that a compiled step is shared.

    Raises:
        ValueError: `make` is no function.

    Example:
        >>> from flax import nnx
        >>> init, apply_fn = nnx_model(lambda rngs: nnx.Linear(3, 10, rngs=rngs))
        >>> params, model_state = init(jax.random.key(0), (3,))
        >>> logits, _ = apply_fn(params, model_state, jnp.ones((2, 3)), train=False, key=None)
        >>> logits.shape
        (2, 10)
    """
    _validate.function(make=make, remedy="pass a function of nnx.Rngs that makes the module")
    return _NnxInit(make), _NnxApply(make)


def apply_fn(model: nn.Module) -> ApplyFn:
    """The `ApplyFn` of a Flax Linen module, for training.

    The result is `(params, model_state, inputs, *, train, key) -> (logits, model_state)`, a
    frozen value: those of equal modules are equal, so that a compiled step is shared.

    What the module may look like: `__call__(self, inputs)`, with the optional keyword arguments

    * `train`: set to the mode. A module without it is called alike in both modes.
    * `dropout_keys`: set to the `[B]` keys in training (see `ConvNet`). A module without it gets
      `rngs={"dropout": key[0]}` instead, for `nn.Dropout`: that draws one mask for the batch from
      the first example's key, so its noise *does* depend on how a batch is split over devices.

    Every collection in `model_state` (such as `batch_stats`) is mutable in training and fixed in
    evaluation.

    Args:
        model: A Linen module with hashable fields.

    Returns:
        The `ApplyFn`.

    Raises:
        ValueError: Not a Linen module, not hashable, or a `__call__` that needs other arguments.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jdistill import nets
        >>> model = nets.digits_net()
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> apply = nets.apply_fn(model)
        >>> keys = jax.random.split(jax.random.key(1), 2)
        >>> logits, _ = apply(params, model_state, jnp.zeros((2, 8, 8, 1)), train=True, key=keys)
        >>> logits.shape, apply == nets.apply_fn(nets.digits_net())
        ((2, 10), True)
    """
    return _LinenApply(check_linen(model))


def logits_fn(model: nn.Module, variables: Mapping[str, PyTree]) -> Partial:
    """The `LogitsFn` of a Flax Linen module with its weights, in evaluation mode.

    Args:
        model: A Linen module, as `apply_fn` takes it.
        variables: `{"params": params, **model_state}`.

    Returns:
        A pytree that maps inputs `[B, ...]` to logits `[B, K]`. Its leaves are the variables, and
        new ones compile nothing.

    Raises:
        ValueError: A module that `apply_fn` refuses, or `variables` without `"params"`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jdistill import nets
        >>> model = nets.digits_net()
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> net = nets.logits_fn(model, {"params": params, **model_state})
        >>> jax.jit(lambda net, inputs: net(inputs))(net, jnp.zeros((2, 8, 8, 1))).shape
        (2, 10)
    """
    return Partial(Fast(_LinenLogits(check_linen(model))), check_variables(variables))


def nnx_logits_fn(module: "nnx.Module") -> Partial:
    """The `LogitsFn` of a Flax NNX module, in evaluation mode.

    The module's present weights are taken; the module itself is not changed, and later changes
    to it are not seen. Call this again on the trained module: that compiles nothing.

    Args:
        module: An NNX module called with one batch of inputs, and perhaps with a switch of its
            mode (`train`, `training`, `is_training`, `deterministic`, `use_running_average`).

    Returns:
        A pytree that maps inputs `[B, ...]` to logits `[B, K]`. Its leaves are the module's
        state.

    Raises:
        ValueError: Not an NNX module, or one that needs further arguments.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> net = nnx_logits_fn(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
        >>> net(jnp.zeros((4, 3))).shape
        (4, 2)
    """
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise ValueError(
            f"expected module to be a Flax NNX module, got {type(module).__name__}; use "
            "logits_fn for a Linen module and callable_logits_fn for a function"
        )
    _check_needs(module, _SWITCHES)
    graphdef, state = nnx.split(module)
    # `split` shares its variables with the module; mapping over their arrays makes new ones.
    # `eval()` writes into a module, so it is called on a copy too.
    copy = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf, state))
    copy.eval()
    return Partial(Fast(_NnxLogits(nnx.graphdef(copy))), nnx.state(copy))


def callable_logits_fn(fun: Callable[..., Array], *args: PyTree) -> Any:
    """Any callable as a `LogitsFn` pytree: `inputs -> fun(*args, inputs)`.

    Pass the weights as `args` rather than closing over them: arguments are leaves, so new ones
    compile nothing, while a closure's weights become constants of the compiled code, which is
    compiled anew when they change. A plain function compares by identity: keep one function and
    reuse it, since each new lambda is compiled anew.

    Args:
        fun: A function, or a callable that is a pytree (`jax.tree_util.Partial`, a registered
            class), whose leaves stay leaves.
        *args: Pytrees put in front of the inputs.

    Returns:
        A pytree that maps inputs `[B, ...]` to logits `[B, K]`, as `fast_on_cpu` makes it.

    Raises:
        ValueError: `fun` cannot be called or hashed, or is an object that holds arrays: compiled
            code would not see its changes.

    Example:
        >>> import jax.numpy as jnp
        >>> def linear(weights, inputs):
        ...     return inputs @ weights
        >>> callable_logits_fn(linear, jnp.ones((3, 2)))(jnp.ones((1, 3))).tolist()
        [[3.0, 3.0]]
    """
    if not callable(fun):
        raise ValueError(
            f"expected a callable, got {type(fun).__name__}; "
            "pass a function from inputs [B, ...] to logits [B, K]"
        )
    if not jax.tree_util.all_leaves([fun]):
        if not args:
            return fun if is_fast(fun) else fast_on_cpu(fun)
        return Partial(call_pytree if is_fast(fun) else Fast(call_pytree), fun, *args)
    try:
        hash(fun)
    except TypeError:
        raise ValueError(
            f"expected a hashable callable, got {type(fun).__name__}; pass a function with its "
            "weights as further arguments: callable_logits_fn(function, weights)"
        ) from None
    if isinstance(fun, Fast):
        return Partial(Fast(static(fun.fun), fun.enabled), *args)
    return Partial(Fast(static(fun)), *args)


def _divided(fun: LogitsFn, temperature: Array, inputs: Array) -> Array:
    """Logits over the temperature."""
    return fun(inputs) / temperature


def _both(fun: LogitsFn, inputs: Array) -> Array:
    logit = fun(inputs)
    if logit.shape[1:] not in ((), (1,)):
        raise ValueError(
            f"expected one logit per example, of shape [B] or [B, 1], got {logit.shape}; a network "
            "with a logit per class needs no adapter"
        )
    logit = logit.reshape(-1, 1)
    return jnp.concatenate([jnp.zeros_like(logit), logit], axis=1)


def logits_of(outputs: PyTree) -> Array:
    """The logits among a network's outputs.

    Args:
        outputs: logits `[B, K]`, or a pytree that holds them beside extras: a mapping with the key
            `"logits"`, or an object with that attribute.

    Returns:
        The logits.

    Raises:
        ValueError: a mapping without them.

    Example:
        >>> logits_of({"logits": jnp.zeros((2, 10)), "features": jnp.ones((2, 64))}).shape
        (2, 10)
    """
    if isinstance(outputs, Mapping):
        if "logits" not in outputs:
            raise ValueError(
                f"expected outputs with the key 'logits', got {', '.join(map(str, outputs))}; name "
                "the logits so"
            )
        return outputs["logits"]
    logits: Any = getattr(outputs, "logits", outputs)
    return logits


def binary(logits_fn: LogitsFn) -> Partial:
    """A `LogitsFn` of two classes from a network with a single logit, `(0, logit)`.

    Its softmax is `(1 - sigmoid(logit), sigmoid(logit))`: class 1 where the logit is above 0.

    Args:
        logits_fn: inputs `[B, ...]` to one logit per example, `[B]` or `[B, 1]`.

    Returns:
        A pytree that maps inputs `[B, ...]` to logits `[B, 2]`.

    Raises:
        ValueError: more than one logit per example, when it is called.

    Example:
        >>> import jax.numpy as jnp
        >>> net = binary(callable_logits_fn(lambda inputs: inputs[:, 0] - 0.5))
        >>> net(jnp.array([[0.75, 0.0], [0.25, 0.0]])).tolist()
        [[0.0, 0.25], [0.0, -0.25]]
    """
    return Partial(_both, callable_logits_fn(logits_fn))


def with_temperature(logits_fn: LogitsFn, temperature: Any) -> Partial:
    """A `LogitsFn` that returns `logits_fn(inputs) / temperature`.

    The softmax of the result is the distilled network's softmax at that temperature
    (Papernot et al. 2016, equation 1).

    Args:
        logits_fn: Any `LogitsFn`.
        temperature: `T > 0`, a scalar; `[R]` beside a stack of `R` networks under `jax.vmap`.
            A leaf: a new temperature compiles nothing.

    Returns:
        A pytree that maps inputs `[B, ...]` to logits `[B, K]`.

    Raises:
        ValueError: `temperature` is not a finite number above 0 (checked when concrete).

    Example:
        >>> import jax.numpy as jnp
        >>> net = callable_logits_fn(lambda inputs: inputs)
        >>> with_temperature(net, 20.0)(jnp.array([[10.0, 0.0]])).tolist()
        [[0.5, 0.0]]

    References:
        Papernot et al., "Distillation as a Defense to Adversarial Perturbations against Deep
        Neural Networks", 2016, equation 1.
    """
    _validate.positive(temperature=temperature, remedy="pass a temperature above 0; 1 is plain")
    if np.ndim(temperature) > 1:
        raise ValueError(
            f"expected temperature to be a scalar, or [R] beside a stack, got shape "
            f"{np.shape(temperature)}; pass one number, or one per network"
        )
    return Partial(
        _divided, callable_logits_fn(logits_fn), jnp.asarray(temperature, dtype=jnp.float32)
    )
