"""Attack the networks of a workdir, and keep what happened to every example.

    python -m experiments.attack runs/mnist --attack pgd --eps 0.1 --loss margin
    python -m experiments.attack runs/mnist --attack fmn --norm l1 --temperature 100
    python -m experiments.attack --attack jsma --help

The workdir is one of `python -m experiments.defend`; all of its networks are attacked, or those
that --temperature, --seed and --generation choose. The results lie in WORKDIR/attacks, in a folder
for each attack and choice of settings: a CSV with a row an example, the adversarial inputs as NPZ,
and settings.json. What is there is not computed again, and autoattack, the longest of them, goes on
where it was stopped.
"""

import dataclasses
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from etils import epath

from experiments import attack_options, attack_results, networks, workdir
from experiments.progress import Progress
from experiments.recipes import Recipe
from jdistill import _validate, data, evaluate, nets, runtime, train
from jdistill.typing import AttackFn

_SECONDS_BETWEEN_SAVES = 20.0
_ALL = tyro.conf.arg(help_behavior_hint="(default: all)")
_PROGRAM = "python -m experiments.attack"
_NOT_HERE = (
    "Not here, since they need more than settings: ensemble, transfer, universal, expectation, "
    "bpda. They are functions of jdistill.attacks."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which networks are attacked, on which examples."""

    workdir: tyro.conf.Positional[
        Annotated[str, tyro.conf.arg(metavar="WORKDIR", help_behavior_hint="(required)")]
    ] = ""
    """Folder of a run of experiments.defend."""
    attack: Annotated[str, tyro.conf.arg(metavar="NAME", help_behavior_hint="(required)")] = ""
    """The attack: a function of jdistill.attacks; with --help, its options are explained too."""
    temperature: Annotated[tuple[float, ...], _ALL] = ()
    """Networks of these training temperatures."""
    seed: Annotated[tuple[int, ...], _ALL] = ()
    """Networks of these seeds."""
    generation: Annotated[tuple[int, ...], _ALL] = ()
    """Networks of these generations: 0 is the teacher."""
    step: int | None = None
    """Take the checkpoints of this training step (none: the finished networks)."""
    num_examples: int = 100
    """The first so many test examples are attacked."""
    targets: Literal["none", "random", "least_likely", "next", "all"] = "none"
    """Class to reach: none (any but the label), a random one, the least likely at the clean input,
    the label + 1, or all others, one after another: K - 1 rows an example, which the intervals
    take as independent."""
    batch_size: int = 50
    """Examples at a time; beyond rounding no result depends on it."""
    key: int = 0
    """Key of all random draws, the same for every network."""
    data_dir: str | None = None
    """Folder of prepared TFDS sets (none: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compute again what is there."""

    def check(self) -> None:
        """Name the number that is wrong, if there is one."""
        _validate.count(num_examples=self.num_examples, batch_size=self.batch_size)
        _validate.count(minimum=0, key=self.key)
        _validate.within(0, 2**32 - 1, key=self.key)  # larger ones would repeat smaller ones


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    options, settings = parse(sys.argv[1:] if arguments is None else arguments)
    runtime.add_cpu_flags()
    runtime.enable_compilation_cache()
    run(options, settings)


def parse(arguments: Sequence[str]) -> tuple[Options, attack_options.Settings]:
    """The options of a command line and the attack's settings; `--help` explains each."""
    attack = _attack_named(arguments)
    if attack or not {"-h", "--help"} & set(arguments):
        attack_options.check_name(attack)
    parts: list[Any] = [("run", Options, Options())]
    if attack:
        of_attack = attack_options.command_line(attack)
        parts.append((attack, of_attack, of_attack()))
    command: Any = dataclasses.make_dataclass("Command", parts)
    parsed, unknown = tyro.cli(
        command,
        prog=_PROGRAM,
        description=_description(attack),
        args=list(arguments),
        config=(tyro.conf.OmitArgPrefixes,),
        return_unknown_args=True,
    )
    if unknown:
        own = ", ".join(option.flag for option in attack_options.options(attack)) or "none"
        general = ", ".join(
            f"--{field.name.replace('_', '-')}"
            for field in dataclasses.fields(Options)
            if field.name != "workdir"
        )
        raise ValueError(
            f"expected WORKDIR and options among {own} (of {attack}) and {general}, got "
            f"{' '.join(unknown)}; `{_PROGRAM} --attack {attack} --help` explains them"
        )
    if not parsed.run.workdir:
        raise ValueError(
            f"expected the workdir of a run, got none; pass it first: `{_PROGRAM} WORKDIR --attack "
            f"{attack}`"
        )
    parsed.run.check()
    given = dataclasses.asdict(getattr(parsed, attack))
    return parsed.run, attack_options.read(attack, given)


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
        f"    {name:<20} {attack_options.summary(name)}" for name in sorted(attack_options.ATTACKS)
    ]
    return "\n".join([__doc__ or "", "The attacks:", "", *listed, "", _NOT_HERE])


def run(options: Options, settings: attack_options.Settings) -> None:
    """Attack what is not attacked yet, and print what came of it."""
    folder, recipe, checksum = workdir.read_workdir(options.workdir)
    with Progress() as progress:
        dataset = data.load(recipe.dataset, data_dir=options.data_dir, progress=progress)
        _check(options, settings, recipe, dataset, checksum)
        chosen = networks.load(
            folder,
            recipe,
            dataset,
            temperatures=options.temperature,
            seeds=options.seed,
            generations=options.generation,
            at_step=options.step,
        )
        results = _results(folder, options, settings, dataset)
        if options.overwrite:
            results.forget(chosen)
        pending = [network for network in chosen if not results.has(network)]
        if pending:
            runtime.check_writable(results.path)
        if len(pending) < len(chosen):
            done = len(chosen) - len(pending)
            progress.say(f"{done} of {len(chosen)} networks were attacked before")
        for network in pending:
            _attack(results, network, options, settings, dataset, progress)
    print(_heading(options, settings, dataset))
    print(
        attack_results.table(
            {networks.title(*network[:3]): results.rows(network) for network in chosen}
        )
    )
    print(f"results: {results.path}")


def _check(
    options: Options,
    settings: attack_options.Settings,
    recipe: Recipe,
    dataset: data.Dataset,
    checksum: str,
) -> None:
    """Everything that can be wrong, before anything is computed or written."""
    workdir.check_dataset(dataset, checksum)
    if options.num_examples > len(dataset.test.labels):
        raise ValueError(
            f"expected num_examples <= {len(dataset.test.labels)}, the test set of "
            f"{dataset.name}, got {options.num_examples}; pass fewer"
        )
    # The attack checks its settings when it is traced, which takes no weights and no time.
    shape = dataset.test.inputs.shape[1:]
    step, state = networks.template(recipe, shape)
    attack = attack_options.bind(options.attack, settings, temperature=1.0)
    if attack_options.is_host_loop(options.attack):
        nobody = np.zeros((0, *shape), np.float32)
        attack(train.logits_fn(step, state), jax.random.key(0), nobody, np.zeros(0, int))
        return
    jax.eval_shape(
        lambda logits_fn, inputs: attack(logits_fn, jax.random.key(0), inputs, np.zeros(1, int)),
        train.logits_fn(step, state),
        jax.ShapeDtypeStruct((1, *shape), np.float32),
    )


def _results(
    folder: epath.Path,
    options: Options,
    settings: attack_options.Settings,
    dataset: data.Dataset,
) -> attack_results.Folder:
    """The folder of this attack, with these settings."""
    name = attack_options.folder_name(
        options.attack,
        settings,
        {
            "targets": (options.targets, "none"),
            "examples": (options.num_examples, None),
            "key": (options.key, 0),
        },
    )
    identity = {
        "attack": options.attack,
        "settings": settings,
        "targets": options.targets,
        "num_examples": options.num_examples,
        "key": options.key,
        "dataset": dataset.name,
        "dataset_checksum": dataset.checksum,
    }
    return attack_results.Folder(folder / "attacks" / name, identity, overwrite=options.overwrite)


def _attack(
    results: attack_results.Folder,
    network: networks.Trained,
    options: Options,
    settings: attack_options.Settings,
    dataset: data.Dataset,
    progress: Progress,
) -> None:
    """Attack one network and keep what happened."""
    inputs, labels = (column[: options.num_examples] for column in dataset.test)
    key = jax.random.key(options.key)
    logits = train.predict(network.logits_fn, inputs)
    index, targets = aim(options.targets, labels, logits, key)
    attack = attack_options.bind(options.attack, settings, network.temperature)
    stage = networks.title(*network[:3])
    if attack_options.is_host_loop(options.attack):
        examples = (inputs[index], labels[index])
        outcome = _drive(results, network, attack, examples, targets, options, progress)
    else:
        # The bar is there from the beginning, so that it knows how long the first batch takes.
        progress({"event": "evaluate", "stage": stage, "done": 0, "total": len(index)})
        outcome = evaluate.under_attack(
            nets.stack([network.logits_fn]),
            inputs[index],
            labels[index],
            evaluate.AttackPlan(attack, batch_size=options.batch_size),
            key=key,
            targets=targets,
            vmapped=False,
            callback=progress,
            stage=stage,
            shards=results.shards,
            shard_name=f"batches of {options.batch_size}",
            names=[results.stem(network)],
        )
    rows, arrays = attack_results.per_example(
        network,
        outcome,
        index,
        {
            "label": labels[index],
            "target": targets,
            "clean_prediction": logits.argmax(axis=-1)[index],
            "prediction": train.predict(network.logits_fn, outcome.inputs[0]).argmax(axis=-1),
        },
    )
    results.save(network, rows, arrays, batch_size=options.batch_size)


def _drive(
    results: attack_results.Folder,
    network: networks.Trained,
    attack: AttackFn,
    examples: tuple[np.ndarray, np.ndarray],
    targets: np.ndarray | None,
    options: Options,
    progress: Progress,
) -> evaluate.AttackOutcome:
    """Run an attack that is a loop on the host, and keep its state on the way."""
    stage = networks.title(*network[:3])
    saved = time.monotonic()

    def follow(event: Mapping[str, Any]) -> None:
        nonlocal saved
        progress({**event, "stage": f"{stage}, {event['attack']}"})
        if time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
            results.save_state(network, event["state"])
            saved = time.monotonic()

    start = results.load_state(network)
    if start is not None:
        progress.say(f"{stage}: going on where it was stopped")
    driver: Any = attack
    found = driver(
        network.logits_fn,
        jax.random.key(options.key),
        *examples,
        targets=targets,
        batch_size=options.batch_size,
        devices=jax.local_devices(),
        start=start,
        callback=follow,
    )
    return evaluate.summarize(jax.tree.map(lambda leaf: leaf[None], found))


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


def _heading(options: Options, settings: attack_options.Settings, dataset: data.Dataset) -> str:
    shown = ", ".join(f"{name}={value}" for name, value in settings.items())
    aimed = {"none": "untargeted", "all": "towards all other classes"}
    which = "" if options.step is None else f"; networks of step {options.step}"
    return (
        f"{options.attack} ({shown})\n"
        f"on the first {options.num_examples} test examples of {dataset.name}, "
        f"{aimed.get(options.targets, f'targets: {options.targets}')}{which}"
    )


if __name__ == "__main__":
    runtime.run_main(main)
