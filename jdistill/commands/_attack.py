"""Attack the networks of a workdir, and keep what happened to every example.

    jdistill attack runs/mnist --attack pgd --eps 0.1 --loss margin
    jdistill attack runs/mnist --attack fmn --norm l1 --temperature 100
    jdistill attack --attack jsma --help

All networks are attacked, or those that --chain, --temperature, --seed, and --generation choose.
WORKDIR/attacks has a folder for each attack and choice of settings: settings.json, and for each
network a CSV with a row per example and an NPZ with the adversarial inputs. Both are written again
from `shards` there, which are checked, and from which a stopped attack goes on.

Costs on 2 CPU cores, 100 images, the papers' MNIST network: PGD seconds, Carlini & Wagner half a
minute, AutoAttack a minute and a half, for each network.
"""

import csv
import dataclasses
import io
import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from etils import epath

from jdistill import _validate, evaluate, metrics, nets, runtime, train
from jdistill import study as studies
from jdistill.commands import _attack_options, _studies
from jdistill.study import Trained, _workdir
from jdistill.study._study import Examples, temperature_name

Row = dict[str, Any]

_ALL = tyro.conf.arg(help_behavior_hint="(default: all)")
_REQUIRED = "(required)"
_NOT_HERE = (
    "Not here, since they need more than settings: ensemble, transfer, universal, expectation, "
    "bpda. They are functions of jdistill.attacks."
)
_LEGEND = (
    "Percent, with Wilson intervals. of those right: of the examples that the network gets right\n"
    "without an attack. distance: over successes (0 where none was needed). queries: forward\n"
    "passes, mean. An attack that fails shows only that this attack failed: the workdir's\n"
    "report.html says where gradients are masked."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chosen:
    """Which networks, on which data."""

    workdir: tyro.conf.Positional[
        Annotated[str, tyro.conf.arg(metavar="WORKDIR", help_behavior_hint=_REQUIRED)]
    ] = ""
    """Folder of a run of `jdistill defend`."""
    chain: Annotated[tuple[str, ...], _ALL] = ()
    """Networks of these chains, where the study has several."""
    temperature: Annotated[tuple[float, ...], _ALL] = ()
    """Networks of these training temperatures."""
    seed: Annotated[tuple[int, ...], _ALL] = ()
    """Networks of these seeds."""
    generation: Annotated[tuple[int, ...], _ALL] = ()
    """Networks of these generations: 0 is the teacher."""
    step: int | None = None
    """Take the checkpoints of this training step (none: the finished networks)."""
    data_dir: str | None = None
    """Folder of prepared TFDS sets (none: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""

    def open(self, command: str) -> tuple[epath.Path, studies.Study, list[Trained]]:
        """The workdir, its study, and the networks."""
        if not self.workdir:
            raise ValueError(
                f"expected the workdir of a run, got none; pass it first: `jdistill {command} "
                "WORKDIR`"
            )
        folder = _studies.workdir_path(self.workdir)
        study = _studies.of_workdir(folder, self.data_dir)
        found = studies.networks(
            study,
            folder,
            chains=self.chain,
            temperatures=self.temperature,
            seeds=self.seed,
            generations=self.generation,
            step=self.step,
        )
        return folder, study, found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options(Chosen):
    """Which networks are attacked, on which examples."""

    attack: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint=_REQUIRED)] = ""
    """The attack: a function of jdistill.attacks; with --help, its options are explained too."""
    num_examples: int | None = None
    """The first so many test examples are attacked (none: 100, or all where there are fewer)."""
    targets: Literal["none", "random", "least_likely", "next", "all"] = "none"
    """Class to reach: none (any but the label), a random one, the least likely at the clean input,
    the label + 1, or all others, one after another: K - 1 rows per example, which the intervals
    take as independent."""
    batch_size: int = 50
    """Examples at a time; beyond rounding no result depends on it."""
    key: int = 0
    """Key of all random draws, the same for every network."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compute again what is there."""

    def check(self) -> None:
        """Name the number that is wrong, if there is one."""
        if self.num_examples is not None:
            _validate.count(num_examples=self.num_examples)
        _validate.count(batch_size=self.batch_size)
        _validate.count(minimum=0, key=self.key)
        _validate.within(0, 2**32 - 1, key=self.key)  # larger ones would repeat smaller ones


def run(arguments: Sequence[str]) -> None:
    """Attack what is not attacked yet, and print what came of it."""
    options, settings = parse(arguments)
    folder, study, chosen = options.open("attack")
    examples = study.examples()
    options = dataclasses.replace(options, num_examples=_num_examples(options, examples))
    _check(options, settings, chosen[0], examples.test.inputs.shape[1:])
    place = folder / "attacks" / folder_name(options, settings)
    if options.overwrite and place.exists():
        place.rmtree()
    tables: dict[str, list[Row]] = {}
    runtime.check_writable(place)
    with _workdir.held(place), runtime.progress() as progress:
        for network in chosen:
            rows, arrays = _attacked(place, network, options, settings, examples.test, progress)
            _write(place, _stem(network, options), rows, arrays)
            tables[network.title] = rows
        described: dict[str, Any] = {"settings": settings, "num_examples": options.num_examples}
        described |= {"attack": options.attack, "targets": options.targets, "key": options.key}
        runtime.write_json(place / "settings.json", {**described, **runtime.describe()})
    shown = ", ".join(f"{name}={value}" for name, value in settings.items())
    aimed = {"none": "untargeted", "all": "towards all other classes"}
    which = "" if options.step is None else f"; networks of step {options.step}"
    print(
        f"{options.attack} ({shown})\n"
        f"on the first {options.num_examples} test examples of {examples.name}, "
        f"{aimed.get(options.targets, f'targets: {options.targets}')}{which}"
    )
    print(table(tables))
    print(f"results: {place}")


def _check(
    options: Options,
    settings: _attack_options.Settings,
    network: Trained,
    shape: Sequence[int],
) -> None:
    """Everything that can be wrong with the settings, before anything is computed or written."""
    attack = _attack_options.bind(options.attack, settings, temperature=1.0)
    key = jax.random.key(0)
    if _attack_options.is_host_loop(options.attack):
        attack(network.logits_fn, key, np.zeros((0, *shape), np.float32), np.zeros(0, int))
        return
    # The attack checks its settings when it is traced, which takes no weights and no time.
    jax.eval_shape(
        lambda logits_fn, inputs: attack(logits_fn, key, inputs, np.zeros(1, int)),
        network.logits_fn,
        jax.ShapeDtypeStruct((1, *shape), np.float32),
    )


def parse(arguments: Sequence[str]) -> tuple[Options, _attack_options.Settings]:
    """The options of a command line and the attack's settings; `--help` explains each."""
    attack = _attack_named(arguments)
    if attack or not {"-h", "--help"} & set(arguments):
        _attack_options.check_name(attack)
    parts: list[Any] = [("run", Options, Options())]
    if attack:
        of_attack = _attack_options.command_line(attack)
        parts.append((attack, of_attack, of_attack()))
    command: Any = dataclasses.make_dataclass("Command", parts)
    parsed, unknown = tyro.cli(
        command,
        prog="jdistill attack",
        description=_description(attack),
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
        return_unknown_args=True,
    )
    if unknown:
        own = ", ".join(option.flag for option in _attack_options.options(attack)) or "none"
        general = ", ".join(
            f"--{field.name.replace('_', '-')}"
            for field in dataclasses.fields(Options)
            if field.name != "workdir"
        )
        raise ValueError(
            f"expected WORKDIR and options among {own} (of {attack}) and {general}, got "
            f"{' '.join(unknown)}; `jdistill attack --attack {attack} --help` explains them"
        )
    parsed.run.check()
    return parsed.run, _attack_options.read(attack, dataclasses.asdict(getattr(parsed, attack)))


def _attack_named(arguments: Sequence[str]) -> str:
    """The attack, whose options are not known before."""
    found = ""
    for place, argument in enumerate(arguments):
        if argument.startswith("--attack="):
            found = argument.partition("=")[2]
        elif argument == "--attack":
            found = next(iter(arguments[place + 1 : place + 2]), "")
    return found


def _description(attack: str) -> str:
    if attack:
        return __doc__ or ""
    listed = [
        f"    {name:<20} {_attack_options.summary(name)}"
        for name in sorted(_attack_options.ATTACKS)
    ]
    return "\n".join([__doc__ or "", "The attacks:", "", *listed, "", _NOT_HERE])


def _num_examples(options: Options, examples: Examples) -> int:
    """Number of test examples that are attacked."""
    there = len(examples.test.labels)
    if options.num_examples is None:
        return min(100, there)
    if options.num_examples > there:
        raise ValueError(
            f"expected num_examples <= {there}, the test set of {examples.name}, got "
            f"{options.num_examples}; pass fewer"
        )
    return options.num_examples


def folder_name(options: Options, settings: _attack_options.Settings) -> str:
    """The name of the folder of an attack and its settings."""
    more = {
        "targets": (options.targets, "none"),
        "examples": (options.num_examples, None),
        "key": (options.key, 0),
    }
    return _attack_options.folder_name(options.attack, settings, more)


def _stem(network: Trained, options: Options) -> str:
    """The network's name among the files of a folder."""
    chain = f"{network.chain}_" if network.chain else ""
    step = "" if options.step is None else f"_step{options.step}"
    temperature = temperature_name(network.temperature)
    return f"{chain}T{temperature}_seed{network.seed}_g{network.generation}{step}"


def _attacked(
    place: epath.Path,
    network: Trained,
    options: Options,
    settings: _attack_options.Settings,
    test: Any,
    progress: Any,
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """The rows and the arrays of one network, out of its shards or computed."""
    inputs, labels = (column[: options.num_examples] for column in test)
    key = jax.random.key(options.key)
    logits = train.predict(network.logits_fn, inputs)
    index, targets = aim(options.targets, labels, logits, key)
    # The bar is there from the beginning, so that it knows how long the first batch takes.
    progress({"event": "evaluate", "stage": network.title, "done": 0, "total": len(index)})
    outcome = evaluate.under_attack(
        nets.stack([network.logits_fn]),
        inputs[index],
        labels[index],
        evaluate.AttackPlan(
            _attack_options.bind(options.attack, settings, network.temperature),
            batch_size=options.batch_size,
        ),
        key=key,
        targets=targets,
        vmapped=False,
        callback=progress,
        stage=network.title,
        shards=runtime.ShardFolder(place / "shards"),
        shard_name=f"batches of {options.batch_size}",
        names=[network.stem],
    )
    names = ("chain", "temperature", "seed", "generation", "step")
    info = {f"info_{name}": values[0] for name, values in sorted(outcome.info.items())}
    assert outcome.predictions is not None
    columns = {
        **{name: np.full(len(index), getattr(network, name)) for name in names},
        "index": index,
        "label": labels[index],
        "target": targets,
        "clean_prediction": logits.argmax(axis=-1)[index],
        "prediction": outcome.predictions[0],
        "success": outcome.success[0],
        "distance": outcome.distance[0],
        "queries": outcome.queries[0],
        **{name: values for name, values in info.items() if values.ndim == 1},
    }
    rows = [
        {name: None if values is None else values[place] for name, values in columns.items()}
        for place in range(len(index))
    ]
    arrays = {"inputs": outcome.inputs[0], "index": index}
    return rows, arrays | {name: values for name, values in info.items() if values.ndim > 1}


def _write(
    place: epath.Path, stem: str, rows: Sequence[Row], arrays: Mapping[str, np.ndarray]
) -> None:
    content = io.BytesIO()
    np.savez(content, **dict(arrays))  # type: ignore[arg-type]
    runtime.atomic_write(place / f"{stem}.npz", content.getvalue())
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(rows[0])
    writer.writerows([_cell(value) for value in row.values()] for row in rows)
    runtime.atomic_write_text(place / f"{stem}.csv", text.getvalue())


def _cell(value: Any) -> str:
    """A value in a CSV: flags as 0 and 1, floats by the fewest digits that are the same float."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, np.bool_) else str(value)


def aim(
    targets: str, labels: np.ndarray, logits: np.ndarray, key: jax.Array
) -> tuple[np.ndarray, np.ndarray | None]:
    """The examples to attack, and the class that each is to reach.

    Args:
        targets: as in `Options`.
        labels: `[N]`, the true classes.
        logits: `[N, K]`, of the clean inputs.
        key: for random targets; an example's does not depend on how many there are.

    Returns:
        Indices `[M]` of the examples, and targets `[M]` or None.
    """
    size, num_classes = logits.shape
    index = np.arange(size)
    if targets == "none":
        return index, None
    if targets == "all":
        index = np.repeat(index, num_classes - 1)
        shift = np.tile(np.arange(1, num_classes), size)
    elif targets == "random":
        # Away from the keys of the examples, which are fold_ins of their indices.
        own = jax.random.fold_in(key, zlib.crc32(b"targets"))
        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(own, index)
        draw = jax.vmap(lambda one: jax.random.randint(one, (), 1, num_classes))
        shift = np.asarray(draw(keys))
    elif targets == "least_likely":
        others = np.where(np.arange(num_classes) == labels[:, None], np.inf, logits)
        return index, others.argmin(axis=1)
    else:
        shift = np.ones(size, int)
    return index, (labels[index] + shift) % num_classes


def table(rows_of: Mapping[str, Sequence[Row]]) -> str:
    """A line for each network: accuracy, success with its 95% interval, distance, queries."""
    head = ("network", "accuracy", "success [95%]", "of those right", "mean distance", "median")
    lines = [(*head, "queries"), *((name, *_entries(rows)) for name, rows in rows_of.items())]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [line[0].ljust(widths[0])]
        + [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        for line in lines
    ]
    return "\n".join(["  ".join(cells) for cells in aligned] + ["", _LEGEND])


def _entries(rows: Sequence[Row]) -> list[str]:
    success, prediction, label, distance, queries = (
        np.array([row[name] for row in rows])
        for name in ("success", "clean_prediction", "label", "distance", "queries")
    )
    right = prediction == label
    found = metrics.robustness(distance, success)
    spent = queries.mean()
    return [
        f"{100 * right.mean():.4g}",
        _share(success),
        _share(success[right]),
        *(f"{value:.4g}" if np.isfinite(value) else "–" for value in found[:2]),
        f"{spent:.4g}" if spent < 1000 else f"{spent:.0f}",
    ]


def _share(flags: np.ndarray) -> str:
    """A share in percent, with its interval."""
    if not flags.size:
        return "–"
    share = metrics.proportion(int(flags.sum()), flags.size)
    return f"{100 * share.value:.4g} [{100 * share.low:.1f}, {100 * share.high:.1f}]"
