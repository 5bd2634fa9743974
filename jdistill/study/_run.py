"""Running a study into a workdir, and reading what is there."""

import contextlib
import dataclasses
import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jdistill import _files, _validate, attacks, nets, report, runtime
from jdistill.evaluate._evaluate import check_classes
from jdistill.parallel import barrier, check_same
from jdistill.study import _deploy, _measure, _training, _workdir
from jdistill.study._study import Examples, Study
from jdistill.study._training import Trained
from jdistill.typing import Event

Row = dict[str, Any]
Parallel = Literal["jit", "pmap", "sweep"]


class Tables(NamedTuple):
    """The results of a study.

    Attributes:
        workdir: where they lie.
        rows: by kind of table (`report.TABLES`) and `"verdicts"`.
        report: the page that shows them.
    """

    workdir: epath.Path
    rows: dict[str, list[Row]]
    report: epath.Path

    def __str__(self) -> str:
        return report.summary(self.rows["results"])


def run(
    study: Study,
    workdir: _files.PathLike,
    *,
    parallel: Parallel = "jit",
    recipe: Mapping[str, Any] | None = None,
) -> Tables:
    """Train what is not trained, measure what is not measured, and write the report.

    Stopped anywhere and called again with the same study and workdir, it goes on where it was.
    More temperatures, seeds, or chains extend a workdir; any other difference is refused by name.

    Args:
        study: what to do.
        workdir: the folder, local or `gs://…`, for one job at a time.
        parallel: how training is spread over the devices: `"jit"` and `"pmap"` by the examples of
            a batch, run after run; `"sweep"` by runs, all of them as one program.
        recipe: kept in the workdir, so that a command can make the study again from it.

    Returns:
        The tables and the page.

    Raises:
        ValueError: the workdir belongs to another study.
        OSError: it cannot be written, or another job writes it.
        FloatingPointError: a network has diverged.
        ModuleNotFoundError: a package that the report needs is missing.
        ImportError: one that exports need is.

    Example:
        >>> import functools, tempfile
        >>> import flax.linen as nn
        >>> from jdistill import study, train
        >>> examples = np.eye(2, dtype=np.float32), np.arange(2)
        >>> stage = study.Stage(model=nn.Dense(2), optimizer=train.sgd(0.5), num_epochs=20)
        >>> fgsm = functools.partial(attacks.fgsm, eps=0.6)
        >>> mine = study.Study(
        ...     data=(examples, examples), chains=[stage] * 2, attacks={"fgsm": fgsm}, name="mine")
        >>> tables = study.run(mine, tempfile.mkdtemp())
        >>> [(row["generation"], row["success_rate"]) for row in tables.rows["results"]]
        [(0, 1.0), (1, 1.0)]
    """
    report.check_packages()
    _validate.instance(Study, "a Study", remedy="pass study.Study(...)", study=study)
    _deploy.check_packages(study)
    with _begun(study, workdir, parallel, recipe, measures=True) as job:
        with job.timed():
            networks = job.train()
            shown = _measure.measure(
                job.folder,
                job.study,
                networks,
                job.examples,
                first=job.first,
                progress=job.follower,
            )
            if runtime.is_main_process():
                _deploy.deploy(job.folder, job.study, networks, job.examples, job.follower.say)
        if runtime.is_main_process():
            _save_pictures(job.folder, shown)
            _workdir.seal(job.folder, _DERIVED)
            write_report(job.folder)
        barrier("report")
    return load(job.folder)


def train(
    study: Study,
    workdir: _files.PathLike,
    *,
    parallel: Parallel = "jit",
    recipe: Mapping[str, Any] | None = None,
) -> list[Trained]:
    """Train what is not trained of a study, and measure nothing.

    `run` goes on from such a workdir: training and attacks can be two jobs, on two machines.

    Args:
        study: what to train.
        workdir: the folder, as of `run`.
        parallel: how training is spread over the devices, as of `run`.
        recipe: kept in the workdir, as of `run`.

    Returns:
        All trained networks of the workdir, as of `networks`.

    Raises:
        ValueError: the workdir belongs to another study.
        OSError: it cannot be written, or another job writes it.
        FloatingPointError: a network has diverged.

    Example:
        >>> import functools, tempfile
        >>> import flax.linen as nn
        >>> from jdistill import study, train
        >>> examples = np.eye(2, dtype=np.float32), np.arange(2)
        >>> stage = study.Stage(model=nn.Dense(2), optimizer=train.sgd(0.5), num_epochs=20)
        >>> fgsm = functools.partial(attacks.fgsm, eps=0.6)
        >>> mine = study.Study(
        ...     data=(examples, examples), chains=[stage] * 2, attacks={"fgsm": fgsm}, name="mine")
        >>> [network.title for network in study.train(mine, tempfile.mkdtemp())]
        ['T=1, seed 0, generation 0', 'T=1, seed 0, generation 1']
    """
    with _begun(study, workdir, parallel, recipe, measures=False) as job, job.timed():
        return job.train()


class _Job(NamedTuple):
    """A study whose workdir is held, to be trained and measured.

    Attributes:
        folder: the workdir.
        study: with what the workdir holds beside it.
        examples: of the study.
        parallel: how training is spread.
        times: what it takes, for run.json.
        follower: of its progress.
        first: number of the first stage after training.
    """

    folder: epath.Path
    study: Study
    examples: Examples
    parallel: Parallel
    times: _workdir.Times
    follower: "_Follower"
    first: int

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Writes the time also where it ends early; the report comes after, and shows it."""
        try:
            yield
        finally:
            self.times.write()

    def train(self) -> list[Trained]:
        return _training.train(
            self.folder, self.study, self.examples, parallel=self.parallel, progress=self.follower
        )


@contextlib.contextmanager
def _begun(
    study: Study,
    workdir: _files.PathLike,
    parallel: Parallel,
    recipe: Mapping[str, Any] | None,
    *,
    measures: bool,
) -> Iterator[_Job]:
    """Hold the workdir, and check that it is the study's."""
    _validate.instance(Study, "a Study", remedy="pass study.Study(...)", study=study)
    _validate.one_of(get_args(Parallel), parallel=parallel)
    with _workdir.reserved(workdir) as folder, runtime.progress() as progress:
        examples = study.examples()
        _check_examples(study, examples)
        with _workdir.held(folder):
            _workdir.check_shared(folder)
            check_same(versions=runtime.describe()["versions"])
            study = _extended(folder, study, examples, recipe)
            check_same(study=study.describe(examples), parallel=parallel)
            times = _workdir.Times(folder, parallel)
            before = _training.num_networks(study)
            later = _measure.num_stages(study) if measures else 0
            follower = _Follower(progress, times, before + later)
            yield _Job(folder, study, examples, parallel, times, follower, before + 1)


# What a report is made of.
_PICTURES = "pictures.npz"
_DERIVED = (*(f"{kind}.csv" for kind in report.TABLES), "verdicts.json", _PICTURES)


def _save_pictures(folder: epath.Path, shown: Mapping[Any, Mapping[str, np.ndarray]]) -> None:
    """Keep the pictures of a report, by `label/array`."""
    content = io.BytesIO()
    arrays = {
        f"{label}/{name}": values for label, one in shown.items() for name, values in one.items()
    }
    np.savez(content, **arrays)  # type: ignore[arg-type]
    runtime.atomic_write(folder / _PICTURES, content.getvalue())


def _pictures(folder: epath.Path) -> dict[Any, dict[str, np.ndarray]]:
    with np.load(io.BytesIO((folder / _PICTURES).read_bytes())) as file:
        arrays = {name: file[name] for name in file.files}
    found: dict[Any, dict[str, np.ndarray]] = {}
    for name, values in arrays.items():
        label, _, part = name.rpartition("/")
        try:
            key: Any = float(label)
        except ValueError:
            key = label
        found.setdefault(key, {})[part] = values
    return found


def write_report(workdir: _files.PathLike) -> epath.Path:
    """Writes the report of a study again, from its tables.

    Args:
        workdir: of `run`.

    Returns:
        The page.

    Raises:
        FileNotFoundError: there are no tables of a study.
        ValueError: a table is not as the run wrote it.
        ModuleNotFoundError: a package that the report needs is missing.

    Example:
        >>> import functools, tempfile
        >>> import flax.linen as nn
        >>> from jdistill import study, train
        >>> examples = np.eye(2, dtype=np.float32), np.arange(2)
        >>> stage = study.Stage(model=nn.Dense(2), optimizer=train.sgd(0.5), num_epochs=20)
        >>> fgsm = functools.partial(attacks.fgsm, eps=0.6)
        >>> mine = study.Study(
        ...     data=(examples, examples), chains=[stage] * 2, attacks={"fgsm": fgsm}, name="mine")
        >>> workdir = study.run(mine, tempfile.mkdtemp()).workdir
        >>> study.write_report(workdir).name
        'report.html'
    """
    folder = _files.as_path(workdir)
    _workdir.check_seal(folder)
    return report.write_report(folder, pictures=_pictures(folder))["report"]


class _Follower:
    """The progress of a study, which also keeps the time."""

    def __init__(self, progress: Any, times: _workdir.Times, num_stages: int) -> None:
        self._progress, self._times, self._num_stages = progress, times, num_stages
        self.say = progress.say

    def begin(self, number: int, **options: Any) -> None:
        """Begin the stage of this number, from 1."""
        self._progress.begin(number, self._num_stages, **options)

    def __call__(self, event: Event) -> None:
        self._progress(event)
        self._times.tick()


def _extended(
    folder: epath.Path, study: Study, examples: Examples, recipe: Mapping[str, Any] | None
) -> Study:
    """The study with what the workdir holds beside it; the workdir is the study's from now on."""
    config = _workdir.read_config(folder)
    check_same(workdir=config)  # all have read it before the first host writes it
    if config is not None:
        study = _with_held(study, config)
    elif (folder / "checkpoints").exists():
        raise ValueError(
            f"expected config.json beside the checkpoints in {folder}, got none, so that nobody "
            "knows what they are of; put it back, or choose another workdir"
        )
    wanted = study.describe(examples)
    if config is not None:
        _workdir.refuse_difference(folder, config, wanted)
    if runtime.is_main_process():
        note = {"note": examples.note} if examples.note else {}
        kept = recipe or (config or {}).get("recipe")
        _workdir.write_config(folder, wanted, {**note, "recipe": kept and dict(kept)})
    return study


def _with_held(study: Study, config: Mapping[str, Any]) -> Study:
    """The study with the temperatures and seeds that its workdir has."""
    held = config["study"]
    return dataclasses.replace(
        study,
        temperatures=sorted({*held["temperatures"], *study.temperatures}),
        # In the order in which they came: pictures and verdicts are of the first.
        seeds=list(dict.fromkeys([*held["seeds"], *study.seeds])),
    )


def _check_examples(study: Study, examples: Examples) -> None:
    """Say now what would fail after hours of training."""
    (inputs, labels), shape = examples.test, examples.train.inputs.shape[1:]
    stage = next(stage for stages in study.chains.values() for stage in reversed(stages))
    example = jax.ShapeDtypeStruct((1, *shape), np.float32)

    def logits(key: jax.Array) -> Any:
        outputs, _ = stage.apply_fn()(
            *stage.init(key, shape), jnp.zeros(example.shape), train=False, key=None
        )
        return nets.logits_of(outputs)

    num_classes = jax.eval_shape(logits, jax.random.key(0)).shape[-1]
    for name in ("train", "validation", "test"):
        split = getattr(examples, name)
        if split is None:
            continue
        size = len(split.labels)
        checked = {"batch_size": size, "num_classes": num_classes}
        _validate.class_indices(split.labels, name=f"{name} labels", **checked)
    plans = {**study.attacks, **{f"distance {norm}": p for norm, p in study.distances.items()}}
    check_classes(inputs, labels, plans)
    boxes = {
        name: bounds
        for name, plan in plans.items()
        if (bounds := attacks.traits(plan.attack).settings.get("bounds")) is not None
    }
    for name, bounds in boxes.items():
        _validate.inputs_in_box(inputs, bounds, name=f"test inputs, for {name},")
    _check_learned(examples, boxes)


def _check_learned(examples: Examples, boxes: Mapping[str, Any]) -> None:
    """Refuse examples to learn from that are not of the test examples' kind: in no attack's box.

    One box that holds them is enough: a box that is narrower by design is no mistake.
    """
    _check_in_a_box("training", examples.train.inputs, boxes)
    if examples.validation is not None:
        _check_in_a_box("validation", examples.validation.inputs, boxes)


def _check_in_a_box(which: str, inputs: np.ndarray, boxes: Mapping[str, Any]) -> None:
    errors = []
    for name, bounds in boxes.items():
        try:
            _validate.inputs_in_box(inputs, bounds, name=f"{which} inputs, for {name},")
            return
        except ValueError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def load(workdir: _files.PathLike) -> Tables:
    """The tables of a study that has been run, checked.

    Args:
        workdir: of `run`.

    Returns:
        The tables and the page.

    Raises:
        FileNotFoundError: there is no finished study.
        ValueError: a table is not as the run wrote it.

    Example:
        >>> import functools, tempfile
        >>> import flax.linen as nn
        >>> from jdistill import study, train
        >>> examples = np.eye(2, dtype=np.float32), np.arange(2)
        >>> stage = study.Stage(model=nn.Dense(2), optimizer=train.sgd(0.5), num_epochs=20)
        >>> fgsm = functools.partial(attacks.fgsm, eps=0.6)
        >>> mine = study.Study(
        ...     data=(examples, examples), chains=[stage] * 2, attacks={"fgsm": fgsm}, name="mine")
        >>> workdir = study.run(mine, tempfile.mkdtemp()).workdir
        >>> [row["test_accuracy"] for row in study.load(workdir).rows["results"]]
        [1.0, 1.0]
    """
    folder = _files.as_path(workdir)
    _workdir.check_seal(folder)
    return Tables(folder, report.read_tables(folder), folder / "report.html")


def networks(
    study: Study,
    workdir: _files.PathLike,
    *,
    chains: Sequence[str] = (),
    temperatures: Sequence[float] = (),
    seeds: Sequence[int] = (),
    generations: Sequence[int] = (),
    step: int | None = None,
) -> list[Trained]:
    """The trained networks of a study, from the checkpoints in its workdir.

    Args:
        study: that was run.
        workdir: where.
        chains: the networks of these chains, up to their students; none named: of all.
        temperatures: of these training temperatures; none named: of all.
        seeds: of these seeds; none named: of all.
        generations: of these generations, where 0 is the teacher; none named: of all.
        step: as they were after this training step; None: when they were finished.

    Returns:
        The networks, by chain, seed, temperature, and generation.

    Raises:
        ValueError: the workdir belongs to another study; a chain, temperature, seed, or generation
            that it does not have; a network that is not finished.
        FileNotFoundError: no workdir, or no checkpoint of that step.

    Example:
        >>> import functools, tempfile
        >>> import flax.linen as nn
        >>> from jdistill import study, train
        >>> examples = np.eye(2, dtype=np.float32), np.arange(2)
        >>> stage = study.Stage(model=nn.Dense(2), optimizer=train.sgd(0.5), num_epochs=20)
        >>> fgsm = functools.partial(attacks.fgsm, eps=0.6)
        >>> mine = study.Study(
        ...     data=(examples, examples), chains=[stage] * 2, attacks={"fgsm": fgsm}, name="mine")
        >>> workdir = tempfile.mkdtemp()
        >>> _ = study.train(mine, workdir)
        >>> [student] = study.networks(mine, workdir, generations=[1])
        >>> student.logits_fn(examples[0]).argmax(axis=1).tolist()
        [0, 1]
    """
    folder = _files.as_path(workdir)
    config = _workdir.read_config(folder)
    if config is None:
        raise FileNotFoundError(
            f"expected the workdir of a study, got {workdir}, which has no config.json; check the "
            "path, or make one with `jdistill defend`"
        )
    examples = study.examples()
    held = config["study"]
    study = _with_held(study, config)
    _workdir.refuse_difference(folder, config, study.describe(examples))
    study = dataclasses.replace(study, temperatures=held["temperatures"], seeds=held["seeds"])
    named = study.students()
    all_chains = _training.chains_of(study)
    there = range(max(len(chain.stages) for chain in all_chains))
    homes = [named[name] for name in _chosen(folder, "chain", chains, list(named))]
    wanted = {
        "chain": [chain for chain, _ in homes],
        "temperature": _chosen(folder, "temperature", temperatures, study.temperatures),
        "seed": _chosen(folder, "seed", seeds, study.seeds),
        "generation": [
            number
            for number in _chosen(folder, "generation", generations, list(there))
            if number <= max(last for _, last in homes)
        ],
    }
    found, unfinished = [], []
    for network, missing in _training.restored(folder, study, examples, wanted, step=step):
        if missing:
            unfinished.append(f"{network.title} {missing}")
        else:
            found.append(network)
    if unfinished:
        finished = "; ".join(network.title for network in found) or "none"
        raise ValueError(
            f"expected finished networks in {folder}, got {'; '.join(unfinished)} (finished: "
            f"{finished}); run the study again to finish it, or choose other networks"
        )
    return found


def _chosen(
    folder: epath.Path, name: str, wanted: Sequence[Any], there: Sequence[Any]
) -> list[Any]:
    """The values asked for, in the order of those that are there."""
    for value in wanted:
        if value not in there:
            raise ValueError(
                f"expected {name} among {', '.join(map(str, there))}, which are in {folder}, got "
                f"{value}; choose from these"
            )
    return [value for value in there if not wanted or value in wanted]
