"""Arguments and result of an attack: checks of user input, keys, and success."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate, losses, metrics
from jdistill._jax import logits_shape, under_trace
from jdistill.nets import callable_logits_fn
from jdistill.typing import Array, ArrayLike, Bounds, LogitsFn


class AttackResult(NamedTuple):
    """Result of an attack, one row per example.

    Attributes:
        inputs: `[B, ...]` float, inside the box, and inside the ball where there is one.
        success: `[B]` bool, verified by a forward pass on `inputs` at full precision.
        distance: `[B]` float, to the clean input in the attack's own norm; `inf` where a
            minimum-norm attack found nothing.
        queries: `[B]` int32, forward passes spent on the example.
        info: further arrays, each `[B, ...]`; the attack's docstring lists them.
    """

    inputs: Array
    success: Array
    distance: Array
    queries: Array
    info: dict[str, Array]


class Goal(NamedTuple):
    """Goal of an attack: away from the labels, or towards the targets.

    Attributes:
        labels: `[B]` int32, the true classes.
        targets: `[B]` int32, or None for an untargeted attack.
    """

    labels: Array
    targets: Array | None

    def reached(self, logits: Array) -> Array:
        """Success of each example's logits `[B, K]`, `[B]` bool; a tie or a NaN is not one."""
        return metrics.predicts(logits) & (self.excess(logits) > 0)

    def reached_clean(self, logits: Array) -> Array:
        """`reached` for the clean input, where all that is not `metrics.correct` is."""
        if self.targets is not None:
            return self.reached(logits)
        return ~metrics.correct(logits, self.labels)

    def excess(self, logits: Array) -> Array:
        """Logits by which the goal is passed (negative: missed), `[B]`."""
        if self.targets is None:
            return losses.margin(logits, self.labels)
        return -losses.margin(logits, self.targets)

    def gain(self, loss: Callable[..., Array], logits: Array) -> Array:
        """Value to maximize: the labels' loss, or minus the targets' loss, `[B]`."""
        goal = self.labels if self.targets is None else self.targets
        values = loss(logits, goal)
        if jnp.shape(values) != goal.shape:
            raise ValueError(
                f"expected loss to return one value per example, [B] = {goal.shape}, got shape "
                f"{jnp.shape(values)}; pass a function such as jdistill.losses.margin, without a "
                "mean over the batch"
            )
        return values if self.targets is None else -values


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Spread:
    """Spread of the examples over devices: static, so that a program is for either."""

    over_devices: bool


class Problem(NamedTuple):
    """The checked and cast arguments of an attack, ready for its jitted core."""

    logits_fn: LogitsFn
    keys: Array | None  # [B]
    inputs: Array
    goal: Goal
    bounds: tuple[Array, Array]  # scalars, or [B, ...] where features have ends of their own
    spread: Spread

    @property
    def width(self) -> Array:
        """The smallest width of the box over the features, a scalar; `inf` where none has one."""
        low, high = self.bounds
        return jnp.min(high - low, initial=jnp.inf)

    @property
    def widest(self) -> Array:
        """The largest width of the box over the features, a scalar."""
        low, high = self.bounds
        return jnp.max(high - low, initial=0.0)


def prepare(
    logits_fn: LogitsFn,
    key: Array | None,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    targets: ArrayLike | None,
    bounds: Bounds,
    open_box: bool = False,
) -> Problem:
    """Check what every attack takes, and cast it; values under a tracer are not checked.

    Args:
        logits_fn: the network.
        key: of the attack.
        inputs: `[B, ...]`.
        labels: `[B]`.
        targets: `[B]`, or None.
        bounds: the box; numbers, or arrays that broadcast against one input.
        open_box: whether the attack can do with infinite bounds.
    """
    box = _validate.bounds(bounds, np.shape(inputs)[1:], open_box=open_box)
    _validate.inputs_in_box(inputs, box)
    inputs = jnp.asarray(inputs)
    if inputs.dtype not in (jnp.float32, jnp.float64):
        inputs = inputs.astype(jnp.float32)
    logits_fn = callable_logits_fn(logits_fn)
    num_classes = logits_shape(logits_fn, inputs).shape[1]
    batch_size = inputs.shape[0]
    _validate.class_indices(labels, batch_size=batch_size, num_classes=num_classes)
    if targets is not None:
        _validate.class_indices(
            targets, name="targets", batch_size=batch_size, num_classes=num_classes
        )
        _validate.other_than_labels(targets, labels)
        targets = jnp.asarray(targets).astype(jnp.int32)
    return Problem(
        logits_fn=logits_fn,
        keys=None if key is None else example_keys(key, batch_size),
        inputs=inputs,
        goal=Goal(jnp.asarray(labels).astype(jnp.int32), targets),
        bounds=_box_of(box, inputs),
        # Of a tracer this is not known.
        spread=Spread(not _validate.is_traced(inputs) and len(inputs.devices()) > 1),
    )


def _box_of(box: tuple[Any, Any], inputs: Array) -> tuple[Array, Array]:
    low, high = (jnp.asarray(end, inputs.dtype) for end in box)
    if low.ndim == high.ndim == 0:
        return low, high
    # Like the inputs, so that whatever takes rows of them or flattens them does so here.
    return jnp.broadcast_to(low, inputs.shape), jnp.broadcast_to(high, inputs.shape)


def num_classes(problem: Problem) -> int:
    """The network's K."""
    return int(logits_shape(problem.logits_fn, problem.inputs).shape[1])


def radius(eps: ArrayLike, inputs: Array, *, name: str = "eps") -> Array:
    """A radius or step as floats `[B]`, checked: at least 0, a scalar or one per example."""
    named: dict[str, Any] = {name: eps}
    _validate.non_negative(**named)
    return one_per_example(eps, inputs, name=name)


def one_per_example(value: ArrayLike, inputs: Array, *, name: str) -> Array:
    """A scalar or `[B]` numbers, as floats `[B]`."""
    _validate.per_example(inputs.shape[:1], **{name: value})
    return jnp.broadcast_to(jnp.asarray(value, inputs.dtype), inputs.shape[:1])


def start_point(init: ArrayLike, problem: Problem) -> Array:
    """An injected start `[B, ...]`, checked against the inputs."""
    box = (-np.inf, np.inf)  # it is projected into the ball and the box by whoever uses it
    _validate.inputs_in_box(init, box, name="init")
    if np.shape(init) != problem.inputs.shape:
        raise ValueError(
            f"expected init of the inputs' shape {problem.inputs.shape}, got {np.shape(init)}; "
            "pass one starting point per example"
        )
    return jnp.asarray(init, problem.inputs.dtype)


def example_keys(key: Array, batch_size: int) -> Array:
    """One key per example, `[B]`: `fold_in(key, index)`, or the `[B]` keys given.

    Raises:
        ValueError: keys of a wrong shape, or of an implementation other than Threefry, whose
            draws would depend on how the batch is split.
    """
    key = _validate.prng_key(key)
    if key.shape == ():
        return jax.vmap(lambda index: jax.random.fold_in(key, index))(jnp.arange(batch_size))
    if key.shape == (batch_size,):
        return key
    raise ValueError(
        f"expected one key or [B] = ({batch_size},) keys, got shape {key.shape}; pass one key, "
        "or one per example"
    )


def need_key(problem: Problem, why: str) -> Array:
    """The `[B]` keys, or an error that says what they are for."""
    if problem.keys is None:
        raise ValueError(f"expected a PRNG key for {why}, got None; pass jax.random.key(0)")
    return problem.keys


def refuse_tracers(name: str, *arguments: Any) -> None:
    """An error where a driver of this name is called under `jit` or `vmap`."""
    if under_trace(arguments):
        raise ValueError(
            f"expected concrete arrays, got a tracer; {name} is a loop on the host: call it "
            "outside jit and vmap"
        )
