"""One call that measures a whole stack of trained networks: accuracy, sensitivities, attacks.

A stack is a `logits_fn` pytree whose leaves have a leading axis `R` (`jdistill.nets.stack`): the
students of several temperatures, seeds or generations of one architecture. On accelerators the
stack is evaluated under `vmap`; on CPU, where a convolution with batched weights is far slower
than single ones, by a host loop through one compiled function. The numbers are the same.

Memory is bounded by `batch_size`: the functions are host loops over chunks of examples, and are
not themselves to be put under `jit` or `vmap`.
"""

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


class Evaluation(NamedTuple):
    """The measures of each network of a stack.

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
        attacks: the outcome of each attack, by name.
    """

    accuracy: list[metrics.Interval]
    correct: np.ndarray
    mean_abs_logit: np.ndarray
    sensitivity_logits: np.ndarray
    log10_sensitivity_softmax: np.ndarray
    log10_sensitivity_softmax_examples: np.ndarray
    zero_gradient_fraction: np.ndarray
    attacks: dict[str, AttackOutcome]


def evaluate(
    stack: LogitsFn,
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    key: Array | None = None,
    temperature: ArrayLike = 1.0,
    attacks: Mapping[str, AttackPlan] | None = None,
    num_sensitivity: int | None = None,
    batch_size: int = 250,
    vmapped: bool | None = None,
    callback: Callback | None = None,
) -> Evaluation:
    """Measure every network of a stack on the same examples.

    Args:
        stack: a `logits_fn` pytree whose leaves lead with `R`; `nets.stack([f, g])` makes one.
        inputs: `[N, ...]` float, inside the attacks' bounds.
        labels: `[N]` int in `0..K-1`.
        key: for random attacks; example `n` uses `fold_in(key, n)`, whatever the batch size.
        temperature: at which the networks are tested, above 0; scalar or `[R]`. 1 in every paper.
            The sensitivities and the attacks see the divided logits.
        attacks: by name; none by default.
        num_sensitivity: the first so many examples enter the sensitivities and the share of zero
            gradients; None takes all.
        batch_size: examples at a time, at least 1.
        vmapped: whether to run the stack under `vmap`; None does so except on CPU.
        callback: called after every chunk with `event="evaluate"`, `stage` (`"accuracy"`,
            `"sensitivity"` or the attack's name), `done` and `total` (examples times networks).

    Returns:
        The measures, on the host.

    Raises:
        ValueError: inputs that are not finite, labels out of range, a temperature not above 0.

    Example:
        >>> linear = lambda weights, x: x @ weights
        >>> stack = nets.stack(
        ...     [nets.callable_logits_fn(linear, w) for w in (jnp.eye(2), -jnp.eye(2))])
        >>> x, y = np.eye(2, dtype=np.float32), np.arange(2)
        >>> [share.value for share in evaluate(stack, x, y).accuracy]
        [1.0, 0.0]

    References:
        Papernot et al. 2016, section V; Mandal & Gao 2023 (accuracy, sensitivity and robustness
        at each temperature).
    """
    _validate.positive(temperature=temperature)
    _validate.count(batch_size=batch_size)
    _validate.inputs_in_box(inputs, (-np.inf, np.inf))
    num_runs = _num_runs(stack)
    temperatures = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (num_runs,))
    tempered = nets.with_temperature(stack, temperatures)
    if vmapped is None:
        vmapped = jax.default_backend() != "cpu"
    over_stack = _Chunks(num_runs, vmapped, callback)

    logits = over_stack(_logits, stack, "accuracy", batch_size, inputs)
    _validate.class_indices(labels, batch_size=len(inputs), num_classes=logits.shape[-1])
    correct = np.stack([np.asarray(metrics.correct(rows, labels)) for rows in logits])
    size = len(inputs) if num_sensitivity is None else min(num_sensitivity, len(inputs))
    by_logits, by_softmax, zero = over_stack(
        _sensitivities, tempered, "sensitivity", batch_size, inputs[:size], labels[:size]
    )
    return Evaluation(
        accuracy=[metrics.proportion(int(row.sum()), row.size) for row in correct],
        correct=correct,
        mean_abs_logit=np.abs(logits).mean(axis=(1, 2)),
        sensitivity_logits=by_logits.mean(axis=1),
        log10_sensitivity_softmax=np.array([metrics.log10_mean(row) for row in by_softmax]),
        log10_sensitivity_softmax_examples=by_softmax,
        zero_gradient_fraction=zero.mean(axis=1),
        attacks={
            name: _run_attack(over_stack, name, plan, tempered, key, inputs, labels)
            for name, plan in (attacks or {}).items()
        },
    )


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
    reached = [row[hit] for row, hit in zip(distance, success, strict=True)]
    return AttackOutcome(
        success=success,
        distance=distance,
        queries=np.asarray(result.queries),
        inputs=np.asarray(result.inputs),
        success_rate=[metrics.proportion(int(row.sum()), row.size) for row in success],
        mean_distance=np.array([row.mean() if row.size else np.nan for row in reached]),
        median_distance=np.array([np.median(row) if row.size else np.nan for row in reached]),
    )


def _run_attack(
    over_stack: "_Chunks",
    name: str,
    plan: AttackPlan,
    stack: LogitsFn,
    key: Array | None,
    inputs: np.ndarray,
    labels: np.ndarray,
) -> AttackOutcome:
    size = len(inputs) if plan.num_examples is None else min(plan.num_examples, len(inputs))
    columns: list[Any] = [inputs[:size], labels[:size]]
    attack = plan.attack
    if key is not None:  # keys travel with their examples, so batches do not change the draws
        columns.append(jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(size)))
    return summarise(
        over_stack(
            functools.partial(_attack, attack), stack, name, plan.batch_size, *columns, eager=True
        )
    )


def _attack(
    attack: AttackFn, logits_fn: LogitsFn, inputs: Array, labels: Array, keys: Array | None = None
) -> AttackResult:
    return attack(logits_fn, keys, inputs, labels)._replace(info={})


def _logits(logits_fn: LogitsFn, inputs: Array) -> Array:
    return logits_fn(inputs)


def _sensitivities(logits_fn: LogitsFn, inputs: Array, labels: Array) -> tuple[Array, Array, Array]:
    return (
        metrics.sensitivity_logits(logits_fn, inputs),
        metrics.log10_sensitivity_softmax(logits_fn, inputs),
        metrics.zero_gradient(logits_fn, inputs, labels),
    )


class _Chunks(NamedTuple):
    """Runs a function of `(logits_fn, *columns)` over chunks of examples and over the stack."""

    num_runs: int
    vmapped: bool
    callback: Callback | None

    def __call__(
        self,
        fun: Callable[..., Any],
        stack: LogitsFn,
        stage: str,
        batch_size: int,
        *columns: Any,
        eager: bool = False,
    ) -> Any:
        """Every output leaf as NumPy, `[R, N, ...]`.

        `eager` is for functions that check concrete values and are compiled inside; the vmapped
        stack is compiled as a whole in any case.
        """
        size = len(columns[0])
        if self.vmapped:
            compiled = _jit(fun, True)
            runs: Any = [(stack, self.num_runs)]
        else:
            compiled = fun if eager else _jit(fun, False)
            runs = [(nets.index(stack, run), 1) for run in range(self.num_runs)]
        done, outputs = 0, []
        for network, count in runs:
            chunks = []
            for chunk, real in _padded_chunks(columns, size, batch_size):
                chunks.append((jax.device_get(compiled(network, *chunk)), real))
                done += real * count
                if self.callback is not None:
                    self.callback(
                        {
                            "event": "evaluate",
                            "stage": stage,
                            "done": done,
                            "total": size * self.num_runs,
                        }
                    )
            axis = 1 if self.vmapped else 0
            outputs.append(_join(chunks, axis))
        if self.vmapped:
            return outputs[0]
        return jax.tree.map(lambda *leaves: np.stack(leaves), *outputs)


@functools.lru_cache(maxsize=64)
def _jit(fun: Callable[..., Any], vmapped: bool) -> Callable[..., Any]:
    """One compiled function for each `fun`, over a single network or over a stack."""
    if not vmapped:
        return jax.jit(fun)

    def over_runs(stack: LogitsFn, *columns: Array) -> Any:
        return jax.vmap(lambda network: fun(network, *columns))(stack)

    return jax.jit(over_runs)


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
