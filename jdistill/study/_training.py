"""Training all chains of a study, from checkpoints where there are any."""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jdistill import _fingerprint, data, distill, nets, parallel, runtime, sweep
from jdistill import train as training
from jdistill.checkpoint import Checkpointer, Restored
from jdistill.study import _workdir
from jdistill.study._study import Examples, Stage, Study, fingerprints, keys_of, temperature_name
from jdistill.train import TrainState, TrainStep
from jdistill.typing import Array, LogitsFn, PyTree


class Trained(NamedTuple):
    """A network of a study.

    Attributes:
        chain: that it belongs to; empty where the study has one chain.
        temperature: of its training.
        seed: of its run.
        generation: 0 is the teacher.
        step: the training step after which it was saved.
        weights: a short hash of its weights.
        logits_fn: the network.
        owner: the first chain that has the network, which others share.
    """

    chain: str
    temperature: float
    seed: int
    generation: int
    step: int
    weights: str
    logits_fn: LogitsFn
    owner: str = ""

    @property
    def title(self) -> str:
        """The network's name for people."""
        chain = f"{self.chain}, " if self.chain else ""
        return f"{chain}T={self.temperature:g}, seed {self.seed}, generation {self.generation}"

    @property
    def stem(self) -> str:
        """The network's name in file names; another one after another training.

        In all chains that share the network it is the same, so that it is measured once.
        """
        chain = f"{self.owner}_" if self.owner else ""
        temperature = temperature_name(self.temperature)
        return f"{chain}T{temperature}_seed{self.seed}_g{self.generation}_{self.weights}"


class Chain(NamedTuple):
    """A longest chain of a study, and where its generations are kept.

    Attributes:
        name: empty where the study has one.
        stages: teacher to student.
        prints: by temperature, of each generation the fingerprint of the chain up to it.
        owners: of each generation, the name of the first chain that has it.
    """

    name: str
    stages: tuple[Stage, ...]
    prints: Mapping[float, tuple[str, ...]]
    owners: tuple[str, ...]

    @property
    def first(self) -> int:
        """The number of the first generation that learns."""
        return 0 if self.stages[0].frozen is None else 1

    def folder(self, run: "Run", number: int) -> epath.Path:
        """Where the checkpoints of a generation are."""
        place = run.folder / "checkpoints" / f"seed{run.seed}"
        place /= f"T{temperature_name(run.temperature)}"
        return place / f"generation{number}-{self.prints[run.temperature][number]}"


class Run(NamedTuple):
    """One seed at one temperature in a workdir."""

    folder: epath.Path
    study: Study
    examples: Examples
    seed: int
    temperature: float

    @property
    def labels(self) -> dict[str, Any]:
        """The run's name in the log."""
        return {"seed": self.seed, "temperature": self.temperature}

    def num_steps(self, stage: Stage) -> int:
        """The steps of a stage that is finished."""
        size = len(self.examples.train.labels)
        return stage.num_epochs * data.num_batches(size, self.study.batch_size)

    def losses(self) -> dict[str, Any]:
        """The losses and the ways of labeling, as `distill.chain` takes them."""
        study = self.study
        losses = {"teacher_loss": study.teacher_loss, "student_loss": study.student_losses()}
        return {**losses, "online": study.online}


def chains_of(study: Study) -> list[Chain]:
    """The longest chains of a study."""
    longest = study.longest_chains()
    owners: dict[Any, str] = {}
    chains = []
    for name, stages in longest.items():
        name = name if len(longest) > 1 else ""
        prints = {T: tuple(fingerprints(stages, T)) for T in study.temperatures}
        beginnings = [
            tuple(own[number] for own in prints.values()) for number in range(len(stages))
        ]
        for each in beginnings:
            owners.setdefault(each, name)
        chains.append(Chain(name, stages, prints, tuple(owners[each] for each in beginnings)))
    return chains


def weights_hash(tree: Any) -> str:
    """A short hash of the leaves of a pytree, such as a network's weights."""
    return _fingerprint.fingerprint(jax.tree.leaves(tree))


def train(
    folder: epath.Path,
    study: Study,
    examples: Examples,
    *,
    parallel: str,
    progress: Any,
) -> list[Trained]:
    """Train every chain at every seed and temperature.

    Args:
        folder: the workdir.
        study: what to train.
        examples: on which.
        parallel: `"jit"` or `"pmap"`, which spread each batch over the devices, chain after chain;
            or `"sweep"`: all seeds and temperatures of a chain as one stack.
        progress: a callback with `say`.

    Returns:
        All networks, chain by chain, teacher to student, by seed and temperature; in a sweep
        without those of runs that have diverged.
    """
    if parallel == "sweep" and jax.process_count() > 1:
        # Each would train all runs into the same checkpoints.
        raise ValueError(
            f"expected one process for a sweep, got {jax.process_count()}; start it on one "
            "host, whose devices share the runs, or use parallel='jit'"
        )
    if parallel == "sweep" and study.selects_best():
        raise ValueError(
            "expected stages with select='last' in a sweep, got one with 'best'; use parallel='jit'"
        )
    mode = "jit" if parallel == "sweep" else parallel
    starts = {seed: _Starts(folder, study, examples, seed, mode, progress) for seed in study.seeds}
    runs = [
        Run(folder, study, examples, seed, temperature)
        for seed in study.seeds
        for temperature in study.temperatures
    ]
    networks = []
    progress.begin(1)
    chains = chains_of(study)
    number = 1
    for chain in chains:
        length = len(chain.stages) - chain.first
        if parallel == "sweep":
            progress.begin(number, num_parts=length)
            networks += _train_as_stack(chain, runs, starts, progress)
            number += length * len(runs)
            continue
        for run in runs:
            start = starts[run.seed]
            with Keeper(chain, run, progress, first=number) as keeper:
                states = distill.chain(
                    [
                        _generation(stage, start, run, keeper.selector(place))
                        for place, stage in enumerate(chain.stages)
                        if place >= chain.first
                    ],
                    examples.train,
                    start.key,
                    temperature=run.temperature,
                    teacher=chain.stages[0].frozen,
                    start=keeper.resume(start.like),
                    batch_size=study.batch_size,
                    callback=keeper,
                    mode=mode,
                    **run.losses(),
                )
            networks += _networks(chain, run, states)
            number += length
    return networks


def num_networks(study: Study) -> int:
    """Networks that are trained."""
    per_run = sum(len(chain.stages) - chain.first for chain in chains_of(study))
    return per_run * len(study.temperatures) * len(study.seeds)


def _networks(chain: Chain, run: Run, states: Sequence[TrainState]) -> list[Trained]:
    """The networks of a chain that has ended, the frozen one as well."""
    networks = []
    for number, stage in enumerate(chain.stages):
        if stage.frozen is not None:
            logits_fn, step = frozen_logits_fn(stage, run.examples), 0
            weights = _fingerprint.fingerprint(logits_fn)
        else:
            state = states[number - chain.first]
            state = parallel.local(state)  # hosts attack different networks
            logits_fn, step = training.logits_fn(stage.step(), state), int(state.step)
            weights = weights_hash((state.params, state.model_state))
        where = (chain.name, run.temperature, run.seed, number)
        networks.append(Trained(*where, step, weights, logits_fn, chain.owners[number]))
    return networks


def frozen_logits_fn(stage: Stage, examples: Examples) -> Any:
    """A frozen network as it is measured: its logits alone, where it returns others with them."""
    assert stage.frozen is not None
    network: Any = nets.callable_logits_fn(stage.frozen)
    one = jax.ShapeDtypeStruct((1, *examples.train.inputs.shape[1:]), np.float32)
    if hasattr(jax.eval_shape(network, one), "shape"):
        return network
    return jax.tree_util.Partial(_logits_alone, network)


def _logits_alone(network: Any, inputs: Array) -> Array:
    return nets.logits_of(network(inputs))


def _generation(
    stage: Stage,
    start: "_Starts",
    run: Run,
    select: Callable[[TrainState], TrainState] | None = None,
) -> distill.Generation:
    params, model_state = start(stage)
    return distill.Generation(
        step=stage.step(),
        params=params,
        model_state=model_state,
        num_epochs=stage.num_epochs,
        hyperparams=stage.hyperparams_at(run.temperature),
        select=select,
        teachers=stage.teachers,
        loss=stage.loss,
        online=stage.online,
        temperature_schedule=stage.temperature_schedule,
    )


class _Starts:
    """The weights that a seed's networks start from, the same for equal architectures."""

    def __init__(
        self,
        folder: epath.Path,
        study: Study,
        examples: Examples,
        seed: int,
        mode: str,
        progress: Any,
    ) -> None:
        self._weights_key, self.key = keys_of(seed)
        self._run = Run(folder, study, examples, seed, 1.0)
        self._mode = mode
        self._progress = progress
        self._found: dict[str, tuple[PyTree, PyTree]] = {}

    def __call__(self, stage: Stage) -> tuple[PyTree, PyTree]:
        """Weights and model state of a stage's network."""
        rates = stage.hyperparams_at(1.0)
        parts = [_fingerprint.describe(part) for part in (stage.model, stage.optimizer, rates)]
        name = _fingerprint.fingerprint(parts)[:8]
        if name not in self._found:
            self._found[name] = self._draw(stage, name)
        return self._found[name]

    def like(self, stage: Stage) -> TrainState:
        """A state of the structure of the stage's own."""
        params, model_state = self(stage)
        return training.create_state(stage.step(), params, self.key, model_state=model_state)

    def _draw(self, stage: Stage, name: str) -> tuple[PyTree, PyTree]:
        run = self._run
        examples, num_epochs = run.examples.train, run.study.initial_epochs
        params, model_state = stage.init(self._weights_key, examples.inputs.shape[1:])
        if num_epochs == 0:
            return params, model_state
        step = training.make_train_step(stage.apply_fn(), stage.optimizer)
        like = training.create_state(step, params, self.key, model_state=model_state)
        place = run.folder / "checkpoints" / f"seed{run.seed}" / f"initial-{name}"
        labels = {"seed": run.seed, "stage": "initial weights", "network": name}
        identity = {**run_identity(run), "network": name}
        with _Log(run.folder, place, labels, identity, self._progress) as log:
            found = log.restore(like)
            state = distill.initial_weights(
                step,
                params,
                examples,
                self.key,
                model_state=model_state,
                num_epochs=num_epochs,
                hyperparams=stage.hyperparams_at(1.0),
                start=None if found is None else found.state,
                callback=log,
                batch_size=run.study.batch_size,
                mode=self._mode,
            )
        return state.params, state.model_state


def run_identity(run: Run) -> dict[str, Any]:
    """What a checkpoint of a run says of itself, beside its network."""
    return {
        "dataset_checksum": run.examples.checksum,
        "seed": run.seed,
        "batch_size": run.study.batch_size,
        "initial_epochs": run.study.initial_epochs,
    }


class _Log:
    """The checkpoints and the log lines of one training stage; a callback of `fit`."""

    def __init__(
        self,
        folder: epath.Path,
        checkpoints: epath.Path,
        labels: Mapping[str, Any],
        identity: Mapping[str, Any],
        progress: Any,
        *,
        keep_best: int = 0,
    ) -> None:
        self._log = folder / "metrics.jsonl"
        self._labels = dict(labels)
        self._identity = dict(identity)
        self._checkpointer = Checkpointer(checkpoints, keep_best=keep_best)
        self._best: tuple[float, int] | None = None  # score and step of the best epoch so far
        self._progress = progress

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *error: Any) -> None:
        self._checkpointer.__exit__(*error)

    def restore(self, like: TrainState) -> Restored | None:
        """The latest whole state; what was logged after it is forgotten.

        None where the best epoch up to it was damaged: another would take its place, and the
        network be another one than without the damage.

        Raises:
            ValueError: the checkpoint is of another study.
        """
        found = self._checkpointer.restore_latest(like)
        if runtime.is_main_process():
            epoch = 0 if found is None else found.metadata["epoch"]
            _workdir.forget_epochs(self._log, self._labels, after=epoch)
        if found is not None:
            held = {name: found.metadata.get(name) for name in self._identity}
            if different := _fingerprint.differences(held, self._identity, "this study's"):
                raise ValueError(
                    f"expected a checkpoint of this study in {self._checkpointer.directory}, got "
                    f"one whose {different[0]}; delete it, or choose another workdir"
                )
            if best := found.metadata.get("best"):
                self._best = best[0], best[1]
                if self._whole_best(like) is None:
                    return None
        return found

    def best(self, state: TrainState) -> TrainState:
        """The state of the best epoch, given the last one; that where no epoch has a score.

        Raises:
            OSError: its checkpoint has been damaged since it was written.
        """
        if self._best is None:
            return state
        # Its shapes alone, so that the state lies where a resumed run has it as well.
        found = self._whole_best(jax.eval_shape(lambda leaves: leaves, state))
        if found is None:
            raise OSError(
                f"expected the checkpoint of the best epoch, step {self._best[1]}, in "
                f"{self._checkpointer.directory}, got a damaged one; run the same command again, "
                "which learns the network anew"
            )
        return found.state

    def _whole_best(self, like: TrainState) -> Restored | None:
        """The checkpoint of the best epoch; None where that one is damaged."""
        assert self._best is not None
        found = self._checkpointer.restore_best(like)
        return found if found is not None and found.step == self._best[1] else None

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show every step; log and save every epoch."""
        self._progress(event)
        if event["event"] == "epoch":
            self.record(event)

    def record(
        self, event: Mapping[str, Any], *, score: float | None = None, **metadata: Any
    ) -> None:
        """Log and save an epoch, and where it has a score which one is the best so far."""
        # Logged first: of what a resumed run finds logged and not saved, it repeats the log.
        record = {name: event[name] for name in ("epoch", "step", "loss", "accuracy")}
        if score is not None:
            record["validation_accuracy"] = score
            if self._best is None or score > self._best[0]:
                self._best = score, int(event["state"].step)
            metadata["best"] = self._best
        if runtime.is_main_process():
            runtime.append_jsonl(self._log, {**self._labels, **record})
        self.keep(event["state"], epoch=event["epoch"], score=score, **metadata)

    def keep(
        self, state: TrainState, *, epoch: int, score: float | None = None, **metadata: Any
    ) -> None:
        """Save a state."""
        metadata = {**self._identity, **metadata, "epoch": epoch}
        self._checkpointer.save(int(state.step), state, metadata, score=score)

    def keep_first(self, state: TrainState, **metadata: Any) -> None:
        """Save the state of a network that stays as it was drawn, unless it is there."""
        if not self._checkpointer.steps():
            self.keep(state, epoch=0, **metadata)


class Keeper:
    """Checkpoints, log, and progress of the generations of one chain and run; a callback.

    Of each generation it keeps which teacher it has learned from: one whose teacher is another
    by now is learned again.
    """

    def __init__(self, chain: Chain, run: Run, progress: Any, *, first: int | None = None) -> None:
        self.chain, self.run = chain, run
        self._first = first  # number of the first network among all of the study
        self._progress = progress
        self._open: dict[int, _Log] = {}
        frozen = chain.stages[0].frozen
        self._teachers = {} if frozen is None else {0: _fingerprint.fingerprint(frozen)}

    def __enter__(self) -> "Keeper":
        return self

    def __exit__(self, *error: Any) -> None:
        for number in list(self._open):
            self._open.pop(number).__exit__(*error)

    def resume(self, like: Callable[[Stage], TrainState]) -> list[TrainState]:
        """The states of the generations that are there, up to the first unfinished one."""
        states: list[TrainState] = []
        numbers = range(self.chain.first, len(self.chain.stages))
        for number in numbers:
            stage = self.chain.stages[number]
            found = self._log(number).restore(like(stage))
            if found is not None and found.metadata.get("teacher") != self._teacher_of(number):
                found = None
            if found is None:
                self._forget(range(number, numbers.stop))
                break
            states.append(found.state)
            select = self.selector(number)
            self._learned(number, found.state if select is None else select(found.state))
            if int(found.state.step) < self.run.num_steps(stage):
                # What had learned from it, before its last checkpoints were damaged.
                self._forget(range(number + 1, numbers.stop))
                break
        return states

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show and keep an event; the end of a generation closes its checkpoints."""
        number = event["generation"]
        if event["event"] == "generation":
            self.end(number, event["state"])
            return
        run, chain = self.run, f"{self.chain.name}, " if self.chain.name else ""
        where = f"{chain}T={run.temperature:g}, seed {run.seed}"
        if self._first is not None:
            self._progress.begin(self._first + number - self.chain.first)
        self._progress({**event, "stage": f"{where}, {event['stage']}"})
        if event["event"] == "epoch":
            self.record(event)

    def selector(self, number: int) -> Callable[[TrainState], TrainState] | None:
        """Function from a generation's last state to that of its best epoch, or None."""
        if self.chain.stages[number].select == "last":
            return None
        return lambda state: self._log(number).best(state)

    def end(self, number: int, state: TrainState) -> None:
        """A generation has ended in a state."""
        if int(state.step) == 0:  # as it was drawn, which no epoch has kept
            self._log(number).keep_first(state, teacher=self._teacher_of(number))
        self._learned(number, state)
        if number in self._open:
            self._open.pop(number).__exit__(None, None, None)

    def record(self, event: Mapping[str, Any]) -> None:
        """Log and save an epoch of a generation."""
        number = event["generation"]
        score = None
        if self.chain.stages[number].select == "best":
            score = self._validation_accuracy(number, event["state"])
        self._log(number).record(event, score=score, teacher=self._teacher_of(number))

    def _validation_accuracy(self, number: int, state: TrainState) -> float:
        split = self.run.examples.validation
        assert split is not None  # `Study.examples` has seen to it
        network = training.logits_fn(self.chain.stages[number].step(), parallel.local(state))
        return float(np.mean(training.predict(network, split.inputs).argmax(-1) == split.labels))

    def _learned(self, number: int, state: TrainState) -> None:
        self._teachers[number] = weights_hash((state.params, state.model_state))

    def _teacher_of(self, number: int) -> str:
        """Which networks a generation learns from, by their weights."""
        lesson = self.run.study.lesson(self.chain.stages[number], number)
        return "+".join(self._teachers.get(teacher, "") for teacher in lesson.teachers)

    def _forget(self, numbers: range) -> None:
        for number in numbers:
            if number in self._open:
                self._open.pop(number).__exit__(None, None, None)
            place = self.chain.folder(self.run, number)
            if runtime.is_main_process():
                if place.exists():
                    place.rmtree()
                log = self.run.folder / "metrics.jsonl"
                _workdir.forget_epochs(log, self._labels(number), after=0)
        parallel.barrier("stale checkpoints removed")

    def _log(self, number: int) -> _Log:
        if number not in self._open:
            run = self.run
            identity = {
                **run_identity(run),
                "network": self.chain.prints[run.temperature][number],
                "losses": _fingerprint.fingerprint(run.study.loss_at(run.temperature)),
            }
            place = self.chain.folder(run, number)
            self._open[number] = _Log(
                run.folder,
                place,
                self._labels(number),
                identity,
                self._progress,
                keep_best=int(self.chain.stages[number].select == "best"),
            )
        return self._open[number]

    def _labels(self, number: int) -> dict[str, Any]:
        stage = {"stage": f"generation {number}", "generation": number}
        return {**self.run.labels, "chain": self.chain.owners[number], **stage}


def _train_as_stack(
    chain: Chain, runs: Sequence[Run], starts: Mapping[int, _Starts], progress: Any
) -> list[Trained]:
    """All runs as one stack, saved run by run, so that any mode can go on from there."""
    learning = chain.stages[chain.first :]
    found: dict[int, list[TrainState]] = {}

    def is_done(number: int) -> bool:
        states = found[number]
        last = runs[number].num_steps(learning[-1])
        return len(states) == len(learning) and int(states[-1].step) >= last

    with contextlib.ExitStack() as opened:
        keepers = [opened.enter_context(Keeper(chain, run, progress)) for run in runs]
        for number, keeper in enumerate(keepers):
            found[number] = keeper.resume(starts[keeper.run.seed].like)
        unfinished = [number for number in found if not is_done(number)]
        if unfinished:
            kept = [(keepers[number], found[number]) for number in unfinished]
            done = _sweep(chain, kept, starts, progress)
            found |= {unfinished[place]: states for place, states in done.items()}
    for number, run in enumerate(runs):
        if not is_done(number):
            progress.say(
                f"seed {run.seed}, T={run.temperature:g} has diverged and is left out; start "
                "again in another workdir with a lower learning rate"
            )
    if not any(map(is_done, found)):
        raise FloatingPointError(
            "expected a finite training loss in at least one run, got none; lower the learning rate"
        )
    return [
        network
        for number, run in enumerate(runs)
        if is_done(number)
        for network in _networks(chain, run, found[number])
    ]


def _sweep(
    chain: Chain,
    kept: Sequence[tuple[Keeper, list[TrainState]]],
    starts: Mapping[int, _Starts],
    progress: Any,
) -> dict[int, list[TrainState]]:
    """The states of the runs that come to their end, by their places."""
    runs = [keeper.run for keeper, _ in kept]
    learning = list(enumerate(chain.stages))[chain.first :]
    generations = [
        [_generation(stage, starts[run.seed], run) for run in runs] for _, stage in learning
    ]

    def fresh(place: int, run: Run) -> TrainState:
        own = generations[place][runs.index(run)]
        key = jax.random.fold_in(starts[run.seed].key, chain.first + place)
        return training.create_state(
            own.step, own.params, key, model_state=own.model_state, hyperparams=own.hyperparams
        )

    most = max(len(states) for _, states in kept)
    start = [
        nets.stack(
            [
                states[place] if place < len(states) else fresh(place, keeper.run)
                for keeper, states in kept
            ]
        )
        for place in range(most)
    ]

    def callback(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            progress({**event, "stage": f"{event['stage']} of {len(runs)} runs"})
        if event["event"] == "generation":
            for place, (keeper, _) in enumerate(kept):
                keeper.end(event["generation"], nets.index(event["state"], place))
        if event["event"] != "epoch":
            return
        for position, place in enumerate(range(*event["runs"].indices(len(runs)))):
            state = nets.index(event["state"], place)
            # A run that was ahead waits, and one that has diverged stays where it was.
            if int(state.step) == event["step"] and np.isfinite(event["loss"][position]):
                own = {name: float(event[name][position]) for name in ("loss", "accuracy")}
                kept[place][0].record({**event, "state": state, **own})

    study = runs[0].study
    result = sweep.chain(
        [_stacked(stage, own) for (_, stage), own in zip(learning, generations, strict=True)],
        runs[0].examples.train,
        jnp.stack([starts[run.seed].key for run in runs]),
        temperature=np.asarray([run.temperature for run in runs]),
        teacher=chain.stages[0].frozen,
        start=start,
        batch_size=study.batch_size,
        callback=callback,
        **runs[0].losses(),
    )
    return {
        place: [nets.index(stack, place) for stack in result.states]
        for place in range(len(runs))
        if not result.diverged[-1, place]
    }


def _stacked(stage: Stage, own: Sequence[distill.Generation]) -> distill.Generation:
    """The generations of all runs as one."""
    names = own[0].hyperparams
    return distill.Generation(
        step=own[0].step,
        params=nets.stack([each.params for each in own]),
        model_state=nets.stack([each.model_state for each in own]) if own[0].model_state else {},
        num_epochs=stage.num_epochs,
        hyperparams={name: np.asarray([each.hyperparams[name] for each in own]) for name in names},
        teachers=stage.teachers,
        loss=stage.loss,
        online=stage.online,
        temperature_schedule=stage.temperature_schedule,
    )


def restored(
    folder: epath.Path,
    study: Study,
    examples: Examples,
    wanted: Mapping[str, Sequence[Any]],
    *,
    step: int | None = None,
) -> Iterator[tuple[Trained, str]]:
    """The networks of a workdir, each with what keeps it from being finished, or `""`.

    Args:
        folder: the workdir.
        study: what was trained there.
        examples: on which.
        wanted: by `chain`, `seed`, `temperature` and `generation`, the values to take.
        step: as they were after this training step; None: when they were finished.
    """
    for chain in chains_of(study):
        if chain.name not in wanted["chain"]:
            continue
        for seed, temperature in itertools.product(wanted["seed"], wanted["temperature"]):
            run = Run(folder, study, examples, seed, temperature)
            for number in wanted["generation"]:
                if number < len(chain.stages):
                    yield _restored(chain, run, number, step)


def _restored(chain: Chain, run: Run, number: int, step: int | None) -> tuple[Trained, str]:
    stage = chain.stages[number]
    shape = run.examples.train.inputs.shape[1:]
    if stage.frozen is not None:
        return _networks(chain._replace(stages=chain.stages[:1]), run, [])[0], ""
    train_step = stage.step()
    like = jax.eval_shape(lambda key: fresh_state(train_step, stage, key, shape), jax.random.key(0))
    saved = Checkpointer(chain.folder(run, number))
    found = saved.restore_latest(like) if step is None else saved.restore(step, like)
    where = (chain.name, run.temperature, run.seed, number)
    if found is None:
        return Trained(*where, 0, "", lambda inputs: inputs), "without a whole checkpoint"
    missing = ""
    if step is None and found.step < run.num_steps(stage):
        epoch = found.metadata["epoch"]
        missing = f"after epoch {epoch} of {stage.num_epochs} (step {found.step})"
    if step is None and "best" in found.metadata:
        best = saved.restore_best(like)
        if best is None or best.step != found.metadata["best"][1]:
            missing = missing or "without a whole checkpoint of its best epoch"
        else:
            found = best
    state = found.state
    weights = weights_hash((state.params, state.model_state))
    logits_fn = training.logits_fn(train_step, state)
    return Trained(*where, found.step, weights, logits_fn, chain.owners[number]), missing


def fresh_state(step: TrainStep, stage: Stage, key: Array, shape: Sequence[int]) -> TrainState:
    """State of a stage at step 0, as a key draws it."""
    params, model_state = stage.init(key, shape)
    return training.create_state(step, params, key, model_state=model_state)
