"""The diagnosis of one network, or of each of a stack."""

import collections

import jax.numpy as jnp
import numpy as np

from jdistill import _validate, _words, attacks, metrics, nets
from jdistill._jax import logits_shape
from jdistill.attacks._core import problem as _base
from jdistill.diagnose import _checks, _label
from jdistill.diagnose._attacks import Settings
from jdistill.diagnose._evidence import Evidence, gather
from jdistill.diagnose._rows import Rows
from jdistill.diagnose._verdict import Attempt, Verdict
from jdistill.typing import Array, ArrayLike, Bounds, Callback, Event, LogitsFn, Norm

_NORMS = ("linf", "l2", "l1")


def masking(
    logits_fn: LogitsFn,
    key: Array,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: float,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    train_temperature: float = 1.0,
    surrogate: LogitsFn | None = None,
    num_queries: int = 500,
    batch_size: int = 256,
    callback: Callback | None = None,
) -> Verdict:
    """Verdict on gradient masking: whether the usual attack's robust accuracy is to be believed.

    The usual (naive) attack is PGD-40 on the cross-entropy at T = 1 from one random start. Beside
    it run the same at the training temperature and on the margin, APGD-DLR, APGD-T, Square, FGSM,
    random noise, and transfer from a surrogate where there is one; the worst case is over all. The
    checks ask what the naive number rests on: gradients that are zero or do not say what the
    logits do, examples that another attack breaks although the naive one does not even at twice
    the radius, an attack that fails in the whole box. `docs/guides/verdict.md` explains each.

    This is a driver, a loop on the host; it cannot be called under `jit` or `vmap`. Each example
    keeps its own key: beyond ties and rounding nothing depends on `batch_size`.

    Args:
        logits_fn: inputs `[B, ...]` to logits `[B, K]`.
        key: one key, or `[N]` keys.
        inputs: `[N, ...]` float inside `bounds`; at least one. 200 give intervals of a few points.
        labels: `[N]` int, the true classes.
        eps: radius of the ball in input units, above 0; a number.
        norm: `"linf"`, `"l2"` or `"l1"` (without Square).
        bounds: the box of valid inputs.
        train_temperature: T of the network's training, above 0. At 1 the temperature probe divides
            the logits by their own scale instead.
        surrogate: another network of the same inputs and classes, such as the undistilled teacher,
            to craft examples on that are judged on this one. None leaves the check out.
        num_queries: of Square, at least 1.
        batch_size: the most examples at a time, at least 1.
        callback: called after every chunk with `event="diagnose"`, `stage` (the attack's or the
            probe's name), and the numbers of examples `done` and in `total` of this stage.

    Returns:
        The verdict; `print` it.

    Raises:
        ValueError: no examples, eps not above 0, an unknown norm, a temperature not above 0,
            counts below 1, no key, a tracer; inputs not finite or outside the box, labels outside
            `0..K-1`.

    Example:
        >>> import jax, numpy as np
        >>> from jdistill import nets
        >>> weights = np.array([[4.0, -4.0], [4.0, -4.0]], np.float32)
        >>> network = nets.callable_logits_fn(lambda w, x: (x - 0.5) @ w, weights)
        >>> masked = nets.callable_logits_fn(lambda w, x: 1000 * ((x - 0.5) @ w), weights)
        >>> x = np.random.default_rng(0).uniform(size=(40, 2)).astype(np.float32)
        >>> y = np.asarray(x.sum(axis=1) < 1, np.int32)
        >>> [masking(fun, jax.random.key(0), x, y, eps=0.1, num_queries=50).label
        ...  for fun in (network, masked)]
        ['no sign of masking', 'masked']

    References:
        Athalye, Carlini & Wagner 2018, "Obfuscated Gradients Give a False Sense of Security",
        section 3.1; Carlini et al. 2019, "On Evaluating Adversarial Robustness"; Pintor et al.
        2022, "Indicators of Attack Failure"; Carlini & Wagner 2016, "Defensive Distillation is
        Not Robust to Adversarial Examples".
    """
    return _masking(
        logits_fn,
        key,
        inputs,
        labels,
        eps=eps,
        norm=norm,
        bounds=bounds,
        train_temperature=train_temperature,
        surrogate=surrogate,
        num_queries=num_queries,
        batch_size=batch_size,
        callback=callback,
    )


def masking_of_stack(
    stack: LogitsFn,
    key: Array,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: float,
    norm: Norm = "linf",
    bounds: Bounds = (0.0, 1.0),
    train_temperature: ArrayLike = 1.0,
    surrogate: LogitsFn | None = None,
    num_queries: int = 500,
    batch_size: int = 256,
    callback: Callback | None = None,
) -> list[Verdict]:
    """`masking` of every network of a stack, one after another, on the same examples.

    The networks share the compiled attacks, and every example its draws.

    Args:
        stack: a `logits_fn` pytree whose leaves lead with `R` (`jdistill.nets.stack`).
        key: as in `masking`.
        inputs: as in `masking`.
        labels: as in `masking`.
        eps: as in `masking`.
        norm: as in `masking`.
        bounds: as in `masking`.
        train_temperature: of the networks' training, above 0; a scalar, or `[R]`.
        surrogate: one network, for all.
        num_queries: as in `masking`.
        batch_size: as in `masking`.
        callback: as in `masking`; its events also have `run` and `num_runs`.

    Returns:
        `R` verdicts.

    Raises:
        ValueError: no stack, a temperature of another shape; else as `masking`.

    Example:
        >>> import jax, jax.numpy as jnp, numpy as np
        >>> from jdistill import nets
        >>> def network(scale, x):
        ...     return scale * ((x - 0.5) @ jnp.array([[4.0, -4.0], [4.0, -4.0]]))
        >>> stack = nets.callable_logits_fn(network, jnp.array([1.0, 1000.0]))
        >>> x = np.random.default_rng(0).uniform(size=(40, 2)).astype(np.float32)
        >>> y = np.asarray(x.sum(axis=1) < 1, np.int32)
        >>> verdicts = masking_of_stack(stack, jax.random.key(0), x, y, eps=0.1, num_queries=50)
        >>> [verdict.label for verdict in verdicts]
        ['no sign of masking', 'masked']
    """
    _validate.function(stack=stack)
    num_runs = nets.stack_size(stack)
    _validate.inputs_in_box(inputs, _validate.bounds(bounds))
    logits_shape(nets.index(stack, 0), jnp.asarray(inputs), name="stack")
    _validate.positive(train_temperature=train_temperature)
    if np.shape(train_temperature) not in ((), (num_runs,)):
        raise ValueError(
            f"expected train_temperature to be a scalar or of shape [R] = ({num_runs},), got shape "
            f"{np.shape(train_temperature)}; pass one number, or one per network of the stack"
        )
    temperatures = np.broadcast_to(np.asarray(train_temperature, np.float64), (num_runs,))
    return [
        _masking(
            nets.index(stack, run),
            key,
            inputs,
            labels,
            eps=eps,
            norm=norm,
            bounds=bounds,
            train_temperature=float(temperatures[run]),
            surrogate=surrogate,
            num_queries=num_queries,
            batch_size=batch_size,
            callback=_of_run(callback, run, num_runs),
        )
        for run in range(num_runs)
    ]


def _of_run(callback: Callback | None, run: int, num_runs: int) -> Callback | None:
    """The callback, told of which network its events are."""
    _validate.callback(callback)
    if callback is None:
        return None

    def told(event: Event) -> None:
        callback({**event, "run": run, "num_runs": num_runs})

    return told


def _masking(
    logits_fn: LogitsFn,
    key: Array,
    inputs: ArrayLike,
    labels: ArrayLike,
    *,
    eps: float,
    norm: Norm,
    bounds: Bounds,
    train_temperature: float,
    surrogate: LogitsFn | None,
    num_queries: int,
    batch_size: int,
    callback: Callback | None,
) -> Verdict:
    """Check the arguments, try everything, and judge."""
    _base.refuse_tracers("masking", logits_fn, key, inputs, labels, eps, surrogate)
    _validate.one_of(_NORMS, norm=norm)
    _validate.count(batch_size=batch_size, num_queries=num_queries)
    _validate.scalar(eps=eps, train_temperature=train_temperature)
    _validate.positive(eps=eps, train_temperature=train_temperature)
    if not np.shape(inputs)[:1] or not np.shape(inputs)[0]:
        raise ValueError(
            f"expected at least one example, got inputs of shape {np.shape(inputs)}; pass inputs "
            "[N, ...], some hundred of them"
        )
    problem = _base.prepare(logits_fn, key, inputs, labels, targets=None, bounds=bounds)
    _validate.callback(callback)
    # Ends per feature as one row, which goes with any rows of the inputs.
    low, high = (end[:1] if end.ndim else end for end in problem.bounds)
    problem = problem._replace(bounds=(low, high))
    if surrogate is not None:
        _validate.function(surrogate=surrogate)
        surrogate = nets.callable_logits_fn(surrogate)
        logits = logits_shape(surrogate, problem.inputs, name="surrogate")
        if logits.shape[1] != _base.num_classes(problem):
            raise ValueError(
                f"expected a surrogate of {_base.num_classes(problem)} classes, got "
                f"{logits.shape[1]}; pass a network of the same classes"
            )
    settings = Settings(
        eps=float(eps),
        norm=norm,
        box=_validate.bounds(bounds),
        train_temperature=float(train_temperature),
        surrogate=surrogate,
        num_queries=num_queries,
    )
    rows = Rows(
        keys=_base.need_key(problem, "random starts"),
        inputs=problem.inputs,
        labels=problem.goal.labels,
        batch_size=batch_size,
        callback=callback,
    )
    evidence = gather(problem, rows, settings)
    checks = _checks.all_checks(evidence)
    attempts = _attempts(evidence)
    clean, naive, worst_case = (
        metrics.proportion(int(mask.sum()), mask.size)
        for mask in (evidence.correct, evidence.standing, evidence.survivors)
    )
    label, reason = _label.label(evidence, checks, naive, worst_case)
    return Verdict(
        label=label,
        reason=reason,
        naive=naive,
        worst_case=worst_case,
        clean=clean,
        eps=settings.eps,
        norm=norm,
        num_examples=evidence.labels.size,
        num_nonfinite=int(np.sum(~evidence.finite)),
        attacks=attempts,
        checks=checks,
        budget=f"{_tried(attempts)}, at {_words.within(norm, settings.eps)}, "
        f"{evidence.labels.size} examples",
    )


def _tried(attempts: tuple[Attempt, ...]) -> str:
    """The attacks in one line, those that differ in the class or the start alone counted."""
    counts = collections.Counter(attempt.name.split(" (")[0] for attempt in attempts)
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def _attempts(evidence: Evidence) -> tuple[Attempt, ...]:
    """The attacks of the worst case, in order, with what stands after each."""
    left, rows = evidence.correct, []
    for planned in evidence.plan:
        left = left & ~evidence.broken[planned.name]
        share = metrics.proportion(int(left.sum()), left.size)
        known = attacks.traits(planned.attack)
        rows.append(Attempt(planned.title, share, planned.settings, known.access, known.follows))
    return tuple(rows)
