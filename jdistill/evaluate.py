"""One call that measures a whole stack of trained networks: accuracy, sensitivities, attacks.

A stack is a `logits_fn` pytree whose leaves have a leading axis `R` (`jdistill.nets.stack`): the
students of several temperatures, seeds or generations of one architecture. On accelerators the
stack is evaluated under `vmap`; on CPU, where a convolution with batched weights is far slower
than single ones, by a host loop through one compiled function. The numbers are the same.

Memory is bounded by `batch_size`: the functions are host loops over chunks of examples, and are
not themselves to be put under `jit` or `vmap`.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import _validate, data, metrics, nets
from jdistill.attacks import AttackResult
from jdistill.typing import Array, ArrayLike, AttackFn, Callback, LogitsFn


class AttackPlan(NamedTuple):
    """An attack with its settings bound, and on how many examples to run it.

    Attributes:
        attack: `(logits_fn, key, inputs, labels) -> AttackResult`, such as
            `functools.partial(attacks.pgd, eps=0.1)`.
        num_examples: the first so many examples are attacked; None attacks all.
        batch_size: examples at a time.
    """

    attack: AttackFn
    num_examples: int | None = None
    batch_size: int = 250


class AttackOutcome(NamedTuple):
    """What an attack did to each network of a stack, over the first `M` examples.

    Attributes:
        success: `[R, M]` bool; examples misclassified to begin with count as successes.
        distance: `[R, M]`, in the attack's norm; `inf` where a minimum-norm attack failed.
        queries: `[R, M]` int32, forward passes.
        inputs: `[R, M, ...]`, what the attack returned.
        success_rate: `[R]` intervals over the examples.
        mean_distance: `[R]`, over the successes; for a minimum-norm attack this is the
            robustness ρ_adv. NaN without a success. Always read it beside the success rate.
        median_distance: `[R]`, over the successes; NaN without one.
    """

    success: np.ndarray
    distance: np.ndarray
    queries: np.ndarray
    inputs: np.ndarray
    success_rate: list[metrics.Interval]
    mean_distance: np.ndarray
    median_distance: np.ndarray


class CleanMeasures(NamedTuple):
    """The measures of each network of a stack on clean inputs.

    Attributes:
        accuracy: `[R]` intervals over the `N` examples.
        correct: `[R, N]` bool.
        mean_abs_logit: `[R]`, mean |z| over examples and classes: the logits' scale.
        sensitivity_logits: `[R]`, see `metrics.sensitivity_logits`.
        log10_sensitivity_softmax: `[R]`, log10 of the mean over examples, see
            `metrics.log10_sensitivity_softmax`.
        log10_sensitivity_softmax_examples: `[R, S]`, the same for each of the first `S` examples.
        zero_gradient_fraction: `[R]`, share of those `S` examples whose cross-entropy has an
            exactly zero input gradient: what blinds FGSM and PGD.
    """

    accuracy: list[metrics.Interval]
    correct: np.ndarray
    mean_abs_logit: np.ndarray
    sensitivity_logits: np.ndarray
    log10_sensitivity_softmax: np.ndarray
    log10_sensitivity_softmax_examples: np.ndarray
    zero_gradient_fraction: np.ndarray


class Evaluation(NamedTuple):
    """All measures of a stack: on clean inputs, and under each attack by name."""

    clean: CleanMeasures
    attacks: dict[str, AttackOutcome]


def evaluate(
    stack: LogitsFn,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    attacks: Mapping[str, AttackPlan],
    key: Array | None = None,
    temperature: ArrayLike = 1.0,
    num_sensitivity: int | None = None,
    batch_size: int = 250,
    vmapped: bool | None = None,
    callback: Callback | None = None,
) -> Evaluation:
    """Measure every network of a stack on the same examples: `clean`, then `under_attack`.

    Args:
        stack: a `logits_fn` pytree whose leaves lead with `R`; `nets.stack([f, g])` makes one.
        inputs: `[N, ...]` float, inside the attacks' bounds.
        labels: `[N]` int in `0..K-1`.
        attacks: by name.
        key: for random attacks; example `n` uses `fold_in(key, n)`, whatever the batch size.
        temperature: at which the networks are tested, above 0; scalar or `[R]`. 1 in every paper.
            The attacks, the softmax sensitivity and the zero gradients are those of the divided
            logits; `mean_abs_logit` and `sensitivity_logits` are of the logits as they are.
        num_sensitivity: see `clean`.
        batch_size: see `clean`; the attacks have their own.
        vmapped: whether to run the stack under `vmap`; None does so except on CPU.
        callback: called after every chunk with `event="evaluate"`, `stage` (`"accuracy"`,
            `"sensitivity"` or the attack's name), `done` and `total` (examples times networks).

    Returns:
        The measures, on the host.

    Raises:
        ValueError: inputs that are not finite, labels out of range, a temperature not above 0, a
            count that is no whole number above 0.

    Example:
        >>> from jdistill import attacks
        >>> linear = lambda weights, x: x @ weights
        >>> stack = nets.stack(
        ...     [nets.callable_logits_fn(linear, w) for w in (jnp.eye(2), -jnp.eye(2))])
        >>> x, y = np.eye(2, dtype=np.float32), np.arange(2)
        >>> fgsm = AttackPlan(functools.partial(attacks.fgsm, eps=0.6))
        >>> result = evaluate(stack, x, y, attacks={"fgsm": fgsm})
        >>> [share.value for share in result.clean.accuracy]
        [1.0, 0.0]
        >>> [share.value for share in result.attacks["fgsm"].success_rate]
        [1.0, 1.0]

    References:
        Papernot et al. 2016, section V; Mandal & Gao 2023 (accuracy, sensitivity and robustness
        at each temperature).
    """
    measures = clean(
        stack,
        inputs,
        labels,
        temperature=temperature,
        num_sensitivity=num_sensitivity,
        batch_size=batch_size,
        vmapped=vmapped,
        callback=callback,
    )
    outcomes = {
        name: under_attack(
            stack,
            inputs,
            labels,
            plan,
            key=key,
            temperature=temperature,
            vmapped=vmapped,
            callback=callback,
            stage=name,
        )
        for name, plan in attacks.items()
    }
    return Evaluation(measures, outcomes)


def clean(
    stack: LogitsFn,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    temperature: ArrayLike = 1.0,
    num_sensitivity: int | None = None,
    batch_size: int = 250,
    vmapped: bool | None = None,
    callback: Callback | None = None,
) -> CleanMeasures:
    """Accuracy, logit scale, both sensitivities and the share of zero gradients of a stack.

    Args:
        stack: a `logits_fn` pytree whose leaves lead with `R`.
        inputs: `[N, ...]` float.
        labels: `[N]` int in `0..K-1`.
        temperature: at which the networks are tested, above 0; scalar or `[R]`.
        num_sensitivity: the first so many examples enter the sensitivities and the share of zero
            gradients; None takes all.
        batch_size: examples at a time, at least 1.
        vmapped: whether to run the stack under `vmap`; None does so except on CPU.
        callback: see `evaluate`.

    Returns:
        The measures, on the host.

    Raises:
        ValueError: as `evaluate`.
    """
    runs = _Runs.of(stack, temperature, vmapped, callback)
    _validate.count(batch_size=batch_size)
    _validate.inputs_in_box(inputs, (-np.inf, np.inf))
    size = _first(len(inputs), "num_sensitivity", num_sensitivity)
    logits = runs.map(_logits, "accuracy", batch_size, inputs) * runs.temperatures[:, None, None]
    _validate.class_indices(labels, batch_size=len(inputs), num_classes=logits.shape[-1])
    correct = np.stack([np.asarray(metrics.correct(rows, labels)) for rows in logits])
    by_logits, by_softmax, zero = runs.map(
        _sensitivities, "sensitivity", batch_size, inputs[:size], labels[:size]
    )
    return CleanMeasures(
        accuracy=[metrics.proportion(int(row.sum()), row.size) for row in correct],
        correct=correct,
        mean_abs_logit=np.abs(logits).mean(axis=(1, 2)),
        sensitivity_logits=by_logits.mean(axis=1) * runs.temperatures,
        log10_sensitivity_softmax=np.array([metrics.log10_mean(row) for row in by_softmax]),
        log10_sensitivity_softmax_examples=by_softmax,
        zero_gradient_fraction=zero.mean(axis=1),
    )


def under_attack(
    stack: LogitsFn,
    inputs: np.ndarray,
    labels: np.ndarray,
    plan: AttackPlan,
    *,
    key: Array | None = None,
    temperature: ArrayLike = 1.0,
    vmapped: bool | None = None,
    callback: Callback | None = None,
    stage: str = "attack",
) -> AttackOutcome:
    """What one attack does to every network of a stack.

    Args:
        stack: a `logits_fn` pytree whose leaves lead with `R`.
        inputs: `[N, ...]` float, inside the attack's bounds.
        labels: `[N]` int in `0..K-1`.
        plan: the attack and its number of examples.
        key: for random attacks; example `n` uses `fold_in(key, n)`.
        temperature: at which the networks are attacked, above 0; scalar or `[R]`.
        vmapped: whether to run the stack under `vmap`; None does so except on CPU.
        callback: see `evaluate`.
        stage: a name for the callback.

    Returns:
        The outcome, on the host.

    Raises:
        ValueError: as the attack.
    """
    runs = _Runs.of(stack, temperature, vmapped, callback)
    _validate.count(batch_size=plan.batch_size)
    size = _first(len(inputs), "num_examples", plan.num_examples)
    columns: list[Any] = [inputs[:size], labels[:size]]
    if key is not None:  # keys travel with their examples, so batches do not change the draws
        columns.append(jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(size)))
    result = runs.map(_Attacked(plan.attack), stage, plan.batch_size, *columns, eager=True)
    return summarise(result)


def summarise(result: AttackResult) -> AttackOutcome:
    """The success rates and distances of attack results stacked along `R`.

    Args:
        result: every leaf leads with `[R, M]`.

    Returns:
        The outcome, on the host.

    Example:
        >>> row = lambda *values: jnp.array([values])
        >>> result = AttackResult(jnp.zeros((1, 2, 3)), row(True, False), row(2.0, jnp.inf),
        ...                       row(5, 9), {})
        >>> outcome = summarise(result)
        >>> outcome.success_rate[0].value, float(outcome.mean_distance[0])
        (0.5, 2.0)
    """
    success, distance = np.asarray(result.success), np.asarray(result.distance)
    runs = [metrics.robustness(*row) for row in zip(distance, success, strict=True)]
    return AttackOutcome(
        success=success,
        distance=distance,
        queries=np.asarray(result.queries),
        inputs=np.asarray(result.inputs),
        success_rate=[run.success_rate for run in runs],
        mean_distance=np.array([run.mean for run in runs]),
        median_distance=np.array([run.median for run in runs]),
    )


@dataclasses.dataclass(frozen=True)
class _Attacked:
    """The attack in the form `_Runs.map` takes; equal attacks share a compilation."""

    attack: AttackFn

    def __call__(
        self, logits_fn: LogitsFn, inputs: Array, labels: Array, keys: Array | None = None
    ) -> AttackResult:
        return self.attack(logits_fn, keys, inputs, labels)._replace(info={})


def _logits(logits_fn: LogitsFn, inputs: Array) -> Array:
    return logits_fn(inputs)


def _sensitivities(logits_fn: LogitsFn, inputs: Array, labels: Array) -> tuple[Array, Array, Array]:
    return (
        metrics.sensitivity_logits(logits_fn, inputs),
        metrics.log10_sensitivity_softmax(logits_fn, inputs),
        metrics.zero_gradient(logits_fn, inputs, labels),
    )


class _Runs(NamedTuple):
    """A stack, and how to run functions of `(logits_fn, *columns)` over it in chunks."""

    stack: LogitsFn
    temperatures: np.ndarray  # [R]
    vmapped: bool
    callback: Callback | None

    @classmethod
    def of(
        cls,
        stack: LogitsFn,
        temperature: ArrayLike,
        vmapped: bool | None,
        callback: Callback | None,
    ) -> "_Runs":
        """The checked stack, its logits divided by the test temperature."""
        _validate.positive(temperature=temperature)
        num_runs = _num_runs(stack)
        if np.shape(temperature) not in ((), (num_runs,)):
            raise ValueError(
                f"expected temperature to be a scalar or of shape [R] = ({num_runs},), got shape "
                f"{np.shape(temperature)}; pass one number, or one per network of the stack"
            )
        temperatures = np.broadcast_to(np.asarray(temperature, np.float32), (num_runs,))
        if vmapped is None:
            vmapped = jax.default_backend() != "cpu"
        return cls(nets.with_temperature(stack, temperatures), temperatures, vmapped, callback)

    def map(
        self,
        fun: Callable[..., Any],
        stage: str,
        batch_size: int,
        *columns: Any,
        eager: bool = False,
    ) -> Any:
        """Every output leaf as NumPy, `[R, N, ...]`.

        `eager` is for functions that check concrete values and are compiled inside.
        """
        size, num_runs = len(columns[0]), len(self.temperatures)
        if self.vmapped:
            networks = [(self.stack, num_runs)]
        else:
            networks = [(nets.index(self.stack, run), 1) for run in range(num_runs)]
        fun = _over_runs(fun) if self.vmapped else fun
        compiled = fun if eager else _jit(fun)
        done, outputs = 0, []
        for network, count in networks:
            chunks = []
            for chunk, real in _padded_chunks(columns, size, batch_size):
                chunks.append((jax.device_get(compiled(network, *chunk)), real))
                done += real * count
                if self.callback is not None:
                    progress = {"stage": stage, "done": done, "total": size * num_runs}
                    self.callback({"event": "evaluate", **progress})
            outputs.append(_join(chunks, axis=1 if self.vmapped else 0))
        if self.vmapped:
            return outputs[0]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *outputs)


@functools.lru_cache(maxsize=64)
def _jit(fun: Callable[..., Any]) -> Callable[..., Any]:
    """One compiled function for each `fun`."""
    return jax.jit(fun)


@functools.lru_cache(maxsize=64)
def _over_runs(fun: Callable[..., Any]) -> Callable[..., Any]:
    """`fun` of a single network as one of a stack; the columns stay concrete, to be checked."""

    def over_runs(stack: LogitsFn, *columns: Array) -> Any:
        return jax.vmap(lambda network: fun(network, *columns))(stack)

    return over_runs


def _first(size: int, name: str, count: int | None) -> int:
    """How many of a set's first examples to take: the count, at most all of them."""
    if size == 0:
        raise ValueError("expected at least one example, got none; pass inputs [N, ...]")
    if count is None:
        return size
    _validate.count(**{name: count})
    return min(count, size)


def _padded_chunks(
    columns: tuple[Any, ...], size: int, batch_size: int
) -> Iterator[tuple[list[Any], int]]:
    """The columns in chunks of one shape, each with its number of real rows.

    The columns may hold PRNG keys, which NumPy does not know, hence indices and not
    `data.batches` on the columns themselves.
    """
    indices = np.arange(size)[:, None]
    for batch in data.batches(indices, batch_size=min(batch_size, size)):
        rows = batch.inputs[:, 0]
        yield [column[rows] for column in columns], int(batch.mask.sum())


def _join(chunks: list[tuple[Any, int]], axis: int) -> Any:
    """The chunks' outputs one after another along the example axis, without their padding."""

    def joined(*leaves: np.ndarray) -> np.ndarray:
        real = [
            np.take(leaf, np.arange(count), axis=axis)
            for leaf, (_, count) in zip(leaves, chunks, strict=True)
        ]
        return np.concatenate(real, axis=axis)

    return jax.tree.map(joined, *(output for output, _ in chunks))


def _num_runs(stack: LogitsFn) -> int:
    """The length of the stack's leading axis."""
    sizes = {np.shape(leaf)[:1] for leaf in jax.tree.leaves(stack)}
    if len(sizes) != 1 or sizes == {()}:
        raise ValueError(
            "expected a stack of logits_fns whose leaves share a leading axis R, got leaves of "
            f"leading sizes {sorted(str(size) for size in sizes)}; "
            "make one with jdistill.nets.stack([logits_fn, ...])"
        )
    return sizes.pop()[0]
