"""The host loop over epochs for a stack of runs, in chunks of runs that fit into memory."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jdistill import _validate, data, nets
from jdistill._jax import shapes
from jdistill.sweep import _memory, _program
from jdistill.sweep._program import Kind, Store
from jdistill.sweep._states import check_runs
from jdistill.train import TrainState, TrainStep
from jdistill.train._fit import check_examples
from jdistill.train._step import check_state, check_step
from jdistill.typing import Array, Callback, Event, LossFn, PyTree

# Given some runs, their soft labels `[r, N, K]` on the devices, or None.
Labeler = Callable[[Kind, np.ndarray], Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How a stack is run; see `fit`."""

    batch_size: int = 128
    vmapped: bool | None = None
    devices: Sequence[jax.Device] | None = None
    memory_limit: int | None = None
    steps_per_call: int | None = None

    def __post_init__(self) -> None:
        _validate.count(batch_size=self.batch_size)
        if self.vmapped is not None:
            _validate.flag(vmapped=self.vmapped)
        if self.devices is not None:
            _validate.devices(self.devices)
        for name in ("memory_limit", "steps_per_call"):
            if (value := getattr(self, name)) is not None:
                _validate.count(**{name: value})

    def kind(self, step: TrainStep) -> Kind:
        """Kind of program that is compiled."""
        devices = tuple(jax.local_devices() if self.devices is None else self.devices)
        vmapped = self.vmapped
        if vmapped is None:
            # JAX 0.7 has no `vmap` of a convolution's gradient over a mesh.
            possible = len(devices) == 1 or jax.__version_info__ >= (0, 10)
            vmapped = devices[0].platform != "cpu" and possible
        return Kind(step, vmapped, devices)

    def steps_at_once(self, kind: Kind, num_runs: int) -> int | None:
        """Steps of a compiled loop; None is a whole epoch."""
        if self.steps_per_call is None and kind.devices[0].platform == "cpu":
            # A step takes long there and a call nothing: the callback, and Ctrl-C, get a word in.
            return max(1, 32 // num_runs)
        return self.steps_per_call


def fit(
    step: TrainStep,
    state: TrainState,
    examples: tuple[np.ndarray, np.ndarray] | tuple[np.ndarray, np.ndarray, np.ndarray | None],
    loss_fn: LossFn,
    *,
    num_epochs: int,
    batch_size: int = 128,
    vmapped: bool | None = None,
    devices: Sequence[jax.Device] | None = None,
    memory_limit: int | None = None,
    steps_per_call: int | None = None,
    callback: Callback | None = None,
    stage: str = "train",
) -> tuple[TrainState, np.ndarray]:
    """Train a stack of states to the end of an epoch, each as `train.fit` would alone.

    Every run visits the examples in the order that its own key draws, with its own learning rate
    (and whatever else its optimizer has as a hyperparameter, a schedule's numbers among them). A
    run whose loss or weights are no longer finite is frozen at its last finite state and reported;
    the others go on.

    Args:
        step: the training step, not compiled.
        state: the stack, every leaf `[R, ...]` (`create_state`); its runs may be anywhere on the
            way, and those that are ahead wait for the others.
        examples: `(inputs [N, ...], labels [N])`, or with soft labels as a third: `[N, K]`, the
            same for all runs, or `[R, N, K]`. NumPy. Inputs that are whole 255ths lie on the
            device as bytes.
        loss_fn: `(logits, batch) -> [B]`, a pytree whose every leaf is `[R, ...]`:
            `train.hard_loss(temperatures)` for one.
        num_epochs: of the whole run, those already done included; at least 0.
        batch_size: examples a step of each run; the last, smaller batch is padded and masked.
        vmapped: all runs at once, or one after the other inside the compiled loop. None is what
            is fastest: at once, but on CPU one after the other, as on several devices before JAX
            0.10, where convolutions have no other way.
        devices: which share the runs between them; None takes all of this process.
        memory_limit: bytes a device may use. None asks the device; where it does not know (CPU),
            all runs are taken at once. Runs that do not fit go in equal chunks.
        steps_per_call: steps of a compiled loop, after which the callback is called; None is an
            epoch, on CPU a few steps.
        callback: called with `event="step"` after every call of the compiled loop and
            `event="epoch"` after every epoch, each with `stage`, `step`, `num_steps`, `epoch`
            (from 1), `num_epochs` and `runs` (a slice: the chunk that was trained); an epoch's
            event also has `state` (of all runs), and `loss`, `accuracy` and `diverged`, one a run
            of the chunk.
        stage: a name for the callback.

    Returns:
        The stack after `num_epochs` epochs, and which runs have diverged, `[R]` bool: those are at
        an earlier step.

    Raises:
        ValueError: as `train.fit`; or leaves that do not lead with `[R]`.
        MemoryError: one run alone does not fit.

    Example:
        >>> from jdistill import nets, sweep, train
        >>> model = nets.digits_net(width=0.25)
        >>> step = train.make_train_step(nets.apply_fn(model), train.sgd(0.1))
        >>> keys = jax.random.split(jax.random.key(0), 2)
        >>> params, _ = jax.vmap(lambda key: nets.init(model, key, (8, 8, 1)))(keys)
        >>> examples = np.zeros((5, 8, 8, 1), np.float32), np.arange(5)
        >>> state, diverged = sweep.fit(
        ...     step,
        ...     sweep.create_state(step, params, keys),
        ...     examples,
        ...     train.hard_loss(np.float32([1, 20])),
        ...     num_epochs=2,
        ... )
        >>> state.step.tolist(), diverged.tolist()
        ([2, 2], [False, False])
    """
    options = Options(
        batch_size=batch_size,
        vmapped=vmapped,
        devices=devices,
        memory_limit=memory_limit,
        steps_per_call=steps_per_call,
    )
    check_step(step)
    check_state(state)
    _validate.function(loss_fn=loss_fn)
    _validate.callback(callback)
    _validate.text(stage=stage)
    _validate.count(minimum=0, num_epochs=num_epochs)
    inputs, labels, targets = _validate.examples(examples, 3)
    num_runs = (*np.shape(state.step), 0)[0]
    check_runs(state, num_runs, "state")
    check_runs(loss_fn, num_runs, "loss_fn")
    shared = targets is not None and np.ndim(targets) == 2
    check_examples(step, nets.index(state, 0), inputs, labels, targets if shared else None)
    if targets is not None and not shared:
        if np.shape(targets)[:1] != (num_runs,):
            raise ValueError(
                f"expected targets of shape [N, K], or [R, N, K] with R = {num_runs}, got "
                f"{np.shape(targets)}; pass those of every run"
            )
        for run in range(num_runs):
            check_examples(step, nets.index(state, 0), inputs, labels, targets[run])

    def labels_of(kind: Kind, runs: np.ndarray) -> Any:
        if targets is None:
            return None
        rows = np.broadcast_to(targets, (num_runs, *targets.shape)) if shared else targets
        return _program.placed_stack(kind, rows, runs)

    return train_stack(
        step,
        state,
        _program.store(np.asarray(inputs), np.asarray(labels)),
        loss_fn,
        labels_of,
        None if targets is None else np.shape(targets)[-1],
        num_epochs=num_epochs,
        options=options,
        callback=callback,
        stage=stage,
    )


def train_stack(
    step: TrainStep,
    state: TrainState,
    store: Store,
    loss_fn: LossFn,
    labels_of: Labeler,
    num_classes: int | None,
    *,
    num_epochs: int,
    options: Options,
    callback: Callback | None,
    stage: str,
    alive: np.ndarray | None = None,
) -> tuple[TrainState, np.ndarray]:
    """`fit` on checked arguments; the soft labels of a chunk of runs are made when it begins."""
    _validate.count(minimum=0, num_epochs=num_epochs)
    num_runs, num_examples = state.step.shape[0], len(store.labels)
    steps_per_epoch = data.num_batches(num_examples, options.batch_size)
    num_steps = num_epochs * steps_per_epoch
    alive = np.ones(num_runs, bool) if alive is None else alive
    kind = options.kind(step)
    state = jax.device_put(state, kind.devices[0])

    chunks = _memory.chunks(
        num_runs,
        len(kind.devices),
        lambda size: _bytes_needed(kind, state, store, loss_fn, num_classes, options, size),
        _memory.limit(kind.devices[0]) if options.memory_limit is None else options.memory_limit,
    )
    for runs, padding in chunks:
        if (np.asarray(state.step[runs])[alive[runs]] >= num_steps).all():
            continue
        chunk = _Chunk(kind, store, runs, padding, options)
        state = chunk.train(
            state, alive, loss_fn, labels_of, num_epochs, num_steps, callback, stage
        )
    return state, np.asarray(state.step) < num_steps


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Some runs of a stack that are trained together."""

    kind: Kind
    store: Store
    runs: slice
    padding: int  # copies of the first run, so that all chunks and devices have equally many
    options: Options

    @property
    def rows(self) -> np.ndarray:
        """The runs with the padding's, as indices."""
        own = np.arange(self.runs.start, self.runs.stop)
        return np.concatenate([own, np.repeat(own[:1], self.padding)])

    def take(self, tree: PyTree) -> PyTree:
        """These runs of a stack, on the devices."""
        return _program.placed_stack(self.kind, tree, self.rows)

    def train(
        self,
        state: TrainState,
        alive: np.ndarray,
        loss_fn: LossFn,
        labels_of: Labeler,
        num_epochs: int,
        num_steps: int,
        callback: Callback | None,
        stage: str,
    ) -> TrainState:
        """The whole stack, with these runs trained."""
        size = self.runs.stop - self.runs.start
        program = _program.steps_program(self.kind)
        store = _program.placed(self.kind, self.store, stacked=False)
        part, loss_fn, still = self.take(state), self.take(loss_fn), self.take(alive)
        targets = labels_of(self.kind, self.rows)
        seeds = [tuple(words) for words in np.asarray(jax.random.key_data(part.key)).tolist()]
        steps_per_epoch = num_steps // num_epochs
        at_once = self.options.steps_at_once(self.kind, len(seeds)) or steps_per_epoch
        done = int(np.min(np.asarray(part.step)[np.asarray(still)], initial=num_steps))
        while done < num_steps and np.asarray(still)[:size].any():
            epoch, first = divmod(done, steps_per_epoch)
            plan = _program.plan_of(seeds, epoch, len(self.store.labels), self.options.batch_size)
            rows = _program.placed(self.kind, plan.rows, stacked=True)
            mask = _program.placed(self.kind, plan.mask, stacked=False)
            totals = {name: np.zeros(size) for name in ("loss", "correct", "count")}
            for start in range(first, steps_per_epoch, at_once):
                stop = min(start + at_once, steps_per_epoch)
                numbers = (np.int32(epoch * steps_per_epoch), np.int32(start), np.int32(stop))
                shared = (store, mask, *numbers)
                part, still, sums = program(shared, part, still, loss_fn, targets, rows)
                for name in totals:
                    totals[name] += np.asarray(sums[name])[:size]
                done = epoch * steps_per_epoch + stop
                progress: Event = {
                    "event": "step",
                    "stage": stage,
                    "step": done,
                    "num_steps": num_steps,
                    "epoch": epoch + 1,
                    "num_epochs": num_epochs,
                    "runs": self.runs,
                }
                if callback is not None:
                    callback(progress)
            if callback is not None:
                count = np.maximum(totals["count"], 1)
                counted = totals["count"] > 0
                callback(
                    {
                        **progress,
                        "event": "epoch",
                        "state": self.merged(state, part),
                        "loss": np.where(counted, totals["loss"] / count, np.nan),
                        "accuracy": np.where(counted, totals["correct"] / count, np.nan),
                        "diverged": ~np.asarray(still)[:size],
                    }
                )
        return self.merged(state, part)

    def merged(self, state: TrainState, part: TrainState) -> TrainState:
        """The whole stack with these runs as they are now, on the first device."""
        size = self.runs.stop - self.runs.start
        part = jax.device_put(part, self.kind.devices[0])

        def merge(whole: Array, new: Array) -> Array:
            return new[:size] if size == len(whole) else whole.at[self.runs].set(new[:size])

        # Keys stay as they are, and cannot be set.
        step, params, model_state, opt_state = jax.tree.map(merge, state[:-1], part[:-1])
        return TrainState(step, params, model_state, opt_state, state.key)


def _bytes_needed(
    kind: Kind,
    state: TrainState,
    store: Store,
    loss_fn: LossFn,
    num_classes: int | None,
    options: Options,
    size: int,
) -> int:
    """Memory of the compiled program of that many runs on each device, by its own account."""
    arguments = _shapes_of(state, store, loss_fn, num_classes, options.batch_size, size)
    compiled = _program.steps_program(kind).lower(*arguments).compile()
    return _memory.bytes_of(compiled.memory_analysis())


def planned(
    kind: Kind,
    state: TrainState,
    store: Store,
    loss_fn: LossFn,
    num_classes: int | None,
    batch_size: int,
    size: int,
) -> tuple[Any, tuple[Any, ...]]:
    """The program of a stack of that many runs, jitted, and its arguments as shapes on the devices.

    Args:
        kind: what is compiled, for devices that need not be there.
        state: a stack of any size.
        store: the data.
        loss_fn: a stack of any size.
        num_classes: of the soft labels; None where there are none.
        batch_size: examples a step of each run.
        size: runs, a multiple of the number of devices.
    """
    shared, *stacked = _shapes_of(state, store, loss_fn, num_classes, batch_size, size)
    everywhere, spread = (_program.placement(kind, stacked=each) for each in (False, True))
    return _program.steps_program(kind), (shapes(shared, everywhere), *shapes(stacked, spread))


def _shapes_of(
    state: TrainState,
    store: Store,
    loss_fn: LossFn,
    num_classes: int | None,
    batch_size: int,
    size: int,
) -> tuple[Any, ...]:
    """The shapes of the arguments of `steps_program` for a stack of that many runs."""
    num_examples = len(store.labels)
    num_steps = data.num_batches(num_examples, batch_size)

    def stacked(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype)

    number = jax.ShapeDtypeStruct((), np.int32)
    mask = jax.ShapeDtypeStruct((num_steps, batch_size), np.float32)
    rows = jax.ShapeDtypeStruct((size, num_steps, batch_size), np.int32)
    alive = jax.ShapeDtypeStruct((size,), bool)
    targets = None
    if num_classes is not None:
        targets = jax.ShapeDtypeStruct((size, num_examples, num_classes), np.float32)
    return (
        (shapes(store), mask, number, number, number),
        jax.tree.map(stacked, state),
        alive,
        jax.tree.map(stacked, loss_fn),
        targets,
        rows,
    )
