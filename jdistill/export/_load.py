"""Reading an export: its network, its program, and the versions that read it."""

from typing import Any

import jax
from jax.tree_util import Partial

from jdistill._files import PathLike
from jdistill.export import _folder, _network, _probe, _program


def load(path: PathLike, model: Any = None) -> Partial:
    """The network that `save` wrote, from its weights and configuration, on any version of JAX.

    Args:
        path: the folder.
        model: of a network that is not the library's own: the Flax Linen module that it was, or
            any network of that structure as a pytree, such as `nets.nnx_logits_fn(Mine(rngs))` or
            `nets.callable_logits_fn(function, other_weights)`, whose weights are replaced.

    Returns:
        A pytree that maps inputs `[B, ...]` to logits `[B, K]`, as `nets.logits_fn` gives it.

    Raises:
        FileNotFoundError: no export in the folder.
        ValueError: a damaged file, one of a newer version of the library, or another model than
            was written.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from jdistill import export, nets
        >>> def linear(weights, inputs):
        ...     return inputs @ weights["kernel"]
        >>> network = nets.callable_logits_fn(linear, {"kernel": jnp.eye(3)})
        >>> folder = export.save(tempfile.mkdtemp(), network, input_shape=(3,))
        >>> blank = nets.callable_logits_fn(linear, {"kernel": jnp.zeros((3, 3))})
        >>> export.load(folder, blank)(jnp.array([[0.0, 1.0, 0.5]])).tolist()
        [[0.0, 1.0, 0.5]]
    """
    folder, config = _folder.read_config(path)
    weights = _folder.read_weights(folder, config)
    network = _network.blank(folder, config, model).filled(weights, folder)
    _probe.check(network, folder, config)
    return network


def load_stablehlo(path: PathLike) -> Partial:
    """The network that `save` wrote, from its program, within the window of versions.

    Its logits and gradients are those of the network at full float32 precision, and every attack
    and measure takes it. Its convolutions are XLA's own, whose gradients are slow on CPU; use
    `load` there. It has first derivatives, in reverse mode.

    Args:
        path: the folder.

    Returns:
        A pytree that maps inputs `[B, ...]` with `B >= 1` to logits `[B, K]`; its leaves are the
        weights. One program serves all batch sizes; JAX compiles it for each.

    Raises:
        FileNotFoundError: no export in the folder.
        ValueError: a damaged file, an export without a program, or a program outside the window.
        ImportError: no package `flatbuffers`, with which JAX reads programs.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from jdistill import export, nets
        >>> model = nets.digits_net(width=0.25)
        >>> params, model_state = nets.init(model, jax.random.key(0), (8, 8, 1))
        >>> student = nets.logits_fn(model, {"params": params, **model_state})
        >>> folder = export.save(tempfile.mkdtemp(), student, input_shape=(8, 8, 1))
        >>> network = export.load_stablehlo(folder)
        >>> network(jnp.ones((3, 8, 8, 1))).shape, network(jnp.ones((7, 8, 8, 1))).shape
        ((3, 10), (7, 10))
    """
    folder, config = _folder.read_config(path)
    record = _folder.program_of(folder, config)
    data = _folder.read_file(folder, record)
    weights = _folder.read_weights(folder, config)
    _program.check_flatbuffers()
    shape = tuple(config["input_shape"])
    try:
        network = Partial(_program.read(data, record, shape), weights)
        jax.block_until_ready(network(_probe.inputs(shape, config["bounds"])))
    # What another version wrote fails in many ways, from unknown operations to mixed-up fields.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"expected a program that JAX {jax.__version__} reads, got {folder / record['file']}, "
            f"which it does not ({type(error).__name__}: {reason:.200}); use export.load, or a "
            f"version within the window: {window(folder)}"
        ) from error
    _probe.check(network, folder, config)
    return network


def window(path: PathLike) -> str:
    """The versions of JAX that read an export's program, and the one at hand, as a sentence.

    JAX promises its exports 6 months of backward and 3 weeks of forward compatibility, by the dates
    of the releases. Weights and configuration have no such limit.

    Args:
        path: the folder.

    Returns:
        The text, for people.

    Raises:
        FileNotFoundError: no export in the folder.
        ValueError: a damaged configuration, or an export without a program.

    Example:
        >>> import tempfile
        >>> import jax.numpy as jnp
        >>> from jdistill import export, nets
        >>> network = nets.callable_logits_fn(lambda weights, inputs: inputs @ weights, jnp.eye(2))
        >>> folder = export.save(tempfile.mkdtemp(), network, input_shape=(2,))
        >>> print(export.window(folder))
        /...: written with JAX ... (calling convention ...), read by the JAX releases up to 6 months
        newer and up to 3 weeks older; this is JAX ... (calling conventions ... to ...).

    References:
        JAX's documentation, "Exporting and serializing staged-out computations", section
        "Compatibility guarantees".
    """
    folder, config = _folder.read_config(path)
    version = _folder.program_of(folder, config)["calling_convention_version"]
    return (
        f"{folder}: written with JAX {config['versions']['jax']} (calling convention {version}), "
        "read by the JAX releases up to 6 months newer and up to 3 weeks older; this is JAX "
        f"{jax.__version__} (calling conventions {_program.CONVENTIONS})."
    )
