"""Training all chains of a run, with checkpoints, a log and progress bars."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from experiments import workdir
from experiments.progress import Progress
from experiments.recipes import Recipe
from jdistill import data, distill, nets, runtime, sweep
from jdistill import train as training
from jdistill.checkpoint import Checkpointer
from jdistill.train import TrainState
from jdistill.typing import LogitsFn, PyTree


class Network(NamedTuple):
    """One trained network of a run."""

    temperature: float
    seed: int
    generation: int
    logits_fn: LogitsFn


def train(folder: epath.Path, recipe: Recipe, examples: data.Split, *, mode: str) -> list[Network]:
    """Train every seed and temperature of the recipe, from checkpoints where there are any.

    Args:
        folder: the workdir.
        recipe: what to train.
        examples: the training set.
        mode: `"jit"` or `"pmap"`, which spread each batch over the devices, chain after chain, or
            `"sweep"`: all chains as one stack.

    Returns:
        All networks, teacher to student, by seed and temperature; in a sweep without those of
        chains that have diverged.
    """
    step = training.make_train_step(
        nets.apply_fn(recipe.model()), training.sgd(recipe.learning_rate)
    )
    fit_mode = "jit" if mode == "sweep" else mode
    fit_options: dict[str, Any] = {"batch_size": recipe.batch_size, "mode": fit_mode}
    if mode == "sweep":
        if jax.process_count() > 1:  # each would train all chains into the same checkpoints
            raise ValueError(
                f"expected one process for a sweep, got {jax.process_count()}; start it on one "
                "host, whose devices share the chains, or use --parallel jit"
            )
        starts = {
            seed: initial_weights(folder, recipe, examples, step, seed, fit_options)
            for seed in recipe.seeds
        }
        return _train_as_stack(folder, recipe, examples, step, starts)
    networks = []
    for seed in recipe.seeds:
        params, key = initial_weights(folder, recipe, examples, step, seed, fit_options)
        for temperature in recipe.temperatures:
            generation = distill.Generation(
                step=step,
                params=params,
                num_epochs=recipe.epochs,
                hyperparams={"learning_rate": recipe.rate(temperature)},
            )
            like = training.create_state(step, params, key)
            labels = {"seed": seed, "temperature": temperature}
            with Chain(folder, labels) as chain:
                states = distill.chain(
                    [generation] * (recipe.num_assistants + 2),
                    examples,
                    key,
                    temperature=temperature,
                    start=chain.resume(like, recipe, len(examples.labels)),
                    callback=chain,
                    **fit_options,
                )
            networks += [
                Network(temperature, seed, number, training.logits_fn(step, state))
                for number, state in enumerate(states)
            ]
    return networks


def initial_weights(
    folder: epath.Path,
    recipe: Recipe,
    examples: data.Split,
    step: training.TrainStep,
    seed: int,
    fit_options: Mapping[str, Any],
) -> tuple[PyTree, jax.Array]:
    """The weights that a seed's generations start from, and the key of its chains."""
    weights_key, key = jax.random.split(jax.random.key(seed))
    params, _ = nets.init(recipe.model(), weights_key, examples.inputs.shape[1:])
    labels = {"seed": seed, "stage": "initial weights"}
    with Stage(folder, checkpoint_folder(folder, seed) / "initial", labels) as stage:
        state = distill.initial_weights(
            step,
            params,
            examples,
            key,
            num_epochs=recipe.initial_epochs,
            start=stage.resume(training.create_state(step, params, key), recipe.initial_epochs),
            callback=stage,
            **fit_options,
        )
    return state.params, key


def _train_as_stack(
    folder: epath.Path,
    recipe: Recipe,
    examples: data.Split,
    step: training.TrainStep,
    starts: Mapping[int, tuple[PyTree, jax.Array]],
) -> list[Network]:
    """All chains as one stack, saved chain by chain, so that any mode can go on from there."""
    num_generations = recipe.num_assistants + 2
    num_steps = recipe.epochs * data.num_batches(len(examples.labels), recipe.batch_size)

    def is_done(run: _Run) -> bool:
        return len(run.found) == num_generations and int(run.found[-1].step) >= num_steps

    with contextlib.ExitStack() as opened, Progress() as progress:
        runs = []
        for seed, (params, key) in starts.items():
            like = training.create_state(step, params, key)
            for temperature in recipe.temperatures:
                labels = {"seed": seed, "temperature": temperature}
                chain = opened.enter_context(Chain(folder, labels))
                found = chain.resume(like, recipe, len(examples.labels))
                runs.append(_Run(seed, temperature, params, key, chain, found))
        unfinished = [run for run in runs if not is_done(run)]
        if unfinished:
            done = _sweep(recipe, examples, step, unfinished, num_generations, progress)
            runs = [
                run._replace(found=done.get((run.seed, run.temperature), run.found)) for run in runs
            ]
        for run in runs:
            if not is_done(run):
                progress.say(
                    f"seed {run.seed}, T={run.temperature:g} has diverged and is left out; start "
                    "again in another workdir with a lower learning rate"
                )
    if not any(is_done(run) for run in runs):
        raise FloatingPointError(
            "expected a finite training loss in at least one chain, got none; "
            "lower the learning rate"
        )
    return [
        Network(run.temperature, run.seed, number, training.logits_fn(step, state))
        for run in runs
        if is_done(run)
        for number, state in enumerate(run.found)
    ]


class _Run(NamedTuple):
    """A chain of a sweep, and how far it is."""

    seed: int
    temperature: float
    params: PyTree
    key: jax.Array
    chain: "Chain"
    found: list[TrainState]


def _sweep(
    recipe: Recipe,
    examples: data.Split,
    step: training.TrainStep,
    runs: Sequence[_Run],
    num_generations: int,
    progress: Progress,
) -> dict[tuple[int, float], list[TrainState]]:
    """The states of the chains that come to their end, by seed and temperature."""
    temperatures = np.asarray([run.temperature for run in runs], np.float32)
    keys = jnp.stack([run.key for run in runs])
    generation = distill.Generation(
        step=step,
        params=nets.stack([run.params for run in runs]),
        num_epochs=recipe.epochs,
        hyperparams={"learning_rate": np.asarray([recipe.rate(run.temperature) for run in runs])},
    )

    def fresh(run: _Run, number: int) -> TrainState:
        return training.create_state(
            step,
            run.params,
            jax.random.fold_in(run.key, number),
            hyperparams={"learning_rate": recipe.rate(run.temperature)},
        )

    most = max(len(run.found) for run in runs)
    start = [
        nets.stack([(run.found[number : number + 1] or [fresh(run, number)])[0] for run in runs])
        for number in range(most)
    ]

    def callback(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            progress({**event, "stage": f"{event['stage']} of {len(runs)} chains"})
        if event["event"] == "generation":
            for run in runs:
                run.chain(event)
        if event["event"] != "epoch":
            return
        for position, number in enumerate(range(*event["runs"].indices(len(runs)))):
            state = nets.index(event["state"], number)
            # A run that was ahead waits, and one that has diverged stays where it was.
            if int(state.step) == event["step"] and np.isfinite(event["loss"][position]):
                own = {name: float(event[name][position]) for name in ("loss", "accuracy")}
                runs[number].chain.record({**event, "state": state, **own})

    result = sweep.chain(
        [generation] * num_generations,
        examples,
        keys,
        temperature=temperatures,
        start=start,
        batch_size=recipe.batch_size,
        callback=callback,
    )
    return {
        (run.seed, run.temperature): [nets.index(stack, number) for stack in result.states]
        for number, run in enumerate(runs)
        if not result.diverged[-1, number]
    }


class Stage:
    """The checkpoints, the log lines and the bar of one training stage; a callback of `fit`.

    Args:
        folder: the workdir.
        checkpoints: the stage's folder of checkpoints.
        labels: what its log lines and its bar say it is.
    """

    def __init__(
        self, folder: epath.Path, checkpoints: epath.Path, labels: Mapping[str, Any]
    ) -> None:
        self._log = folder / "metrics.jsonl"
        self._labels = dict(labels)
        self._checkpointer = Checkpointer(checkpoints)
        self._progress = Progress(_title(labels))

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *error: Any) -> None:
        self._progress.close()
        self._checkpointer.__exit__(*error)

    def resume(self, like: TrainState, num_epochs: int) -> TrainState | None:
        """The latest whole state, or None; what was logged after it is forgotten."""
        found = self._checkpointer.restore_latest(like)
        epoch = 0 if found is None else found.metadata["epoch"]
        workdir.forget_epochs(self._log, self._labels, after=epoch)
        if found is None:
            return None
        where = "done" if epoch >= num_epochs else f"going on after epoch {epoch} of {num_epochs}"
        self._progress.say(f"{_title(self._labels)}{self._labels['stage']}: {where}")
        return found.state

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Show every step; log and save every epoch."""
        self._progress(event)
        if event["event"] == "epoch":
            self.record(event)

    def record(self, event: Mapping[str, Any]) -> None:
        """Log and save an epoch."""
        # Logged first: of what a resumed run finds logged and not saved, it repeats the log.
        record = {name: event[name] for name in ("epoch", "step", "loss", "accuracy")}
        runtime.append_jsonl(self._log, {**self._labels, **record})
        self._checkpointer.save(event["step"], event["state"], {"epoch": event["epoch"]})


class Chain:
    """The stages of one chain; a callback of `distill.chain`.

    Args:
        folder: the workdir.
        labels: the seed and the temperature.
    """

    def __init__(self, folder: epath.Path, labels: Mapping[str, Any]) -> None:
        self._folder = folder
        self._labels = dict(labels)
        self._open: dict[int, Stage] = {}

    def __enter__(self) -> "Chain":
        return self

    def __exit__(self, *error: Any) -> None:
        for number in list(self._open):
            self._open.pop(number).__exit__(*error)

    def resume(self, like: TrainState, recipe: Recipe, num_examples: int) -> list[TrainState]:
        """The states of the generations that are there, up to the first unfinished one."""
        num_steps = recipe.epochs * data.num_batches(num_examples, recipe.batch_size)
        states: list[TrainState] = []
        for number in range(recipe.num_assistants + 2):
            state = self._stage(number).resume(like, recipe.epochs)
            if state is not None:
                states.append(state)
            if state is None or int(state.step) < num_steps:
                break
        # What was learned from a generation that is lost, or that fell back to an earlier epoch
        # because its last checkpoint is damaged, has to be learned again.
        for later in range(number + 1, recipe.num_assistants + 2):
            _remove(self._place(later))
            workdir.forget_epochs(
                self._folder / "metrics.jsonl", self._stage_labels(later), after=0
            )
        return states

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Hand the event to its generation's stage, which a finished generation closes."""
        number = event["generation"]
        if event["event"] == "generation":
            if number in self._open:
                self._open.pop(number).__exit__(None, None, None)
        else:
            self._stage(number)(event)

    def record(self, event: Mapping[str, Any]) -> None:
        """Log and save an epoch of a generation."""
        self._stage(event["generation"]).record(event)

    def _stage(self, number: int) -> Stage:
        if number not in self._open:
            self._open[number] = Stage(
                self._folder, self._place(number), self._stage_labels(number)
            )
        return self._open[number]

    def _stage_labels(self, number: int) -> dict[str, Any]:
        return {**self._labels, "stage": f"generation {number}", "generation": number}

    def _place(self, number: int) -> epath.Path:
        seed, temperature = self._labels["seed"], self._labels["temperature"]
        return checkpoint_folder(self._folder, seed, temperature, number)


def checkpoint_folder(
    folder: epath.Path,
    seed: int,
    temperature: float | None = None,
    generation: int | None = None,
) -> epath.Path:
    """Where a workdir keeps the checkpoints of a seed, of a chain, or of one generation."""
    place = folder / "checkpoints" / f"seed{seed}"
    if temperature is not None:
        place /= f"T{temperature_name(temperature)}"
    return place if generation is None else place / f"generation{generation}"


def temperature_name(temperature: float) -> str:
    """A temperature in file names: the shortest that no other temperature has."""
    return f"{temperature:g}" if float(f"{temperature:g}") == temperature else repr(temperature)


def _title(labels: Mapping[str, Any]) -> str:
    """What a bar begins with."""
    title = f"seed {labels['seed']}, "
    if "temperature" in labels:
        title += f"T={labels['temperature']:g}, "
    return title


def _remove(folder: epath.Path) -> None:
    if folder.exists():
        folder.rmtree()
