"""The papers' tables, measured: `python -m experiments.reproduce mandal2023-accuracy`.

    python -m experiments.reproduce --list
    python -m experiments.reproduce train mnist --scale cpu --workdir runs/papers
    python -m experiments.reproduce plan mnist --scale full --topology v5e:1x1
    python -m experiments.reproduce carlini2017-plain --scale cpu --workdir runs/papers

Each item measures networks of a training study, which is trained where it is not yet, and writes
its table beside the published one. `train` trains, and nothing else; the study's own attacks run
for the items that need them; `plan` says what both take on a TPU, which need not be there.
Everything can be stopped at any moment and goes on when called again: every epoch of training and
every batch of an attack is kept. Scales: `full` has the papers' settings, for an accelerator; `cpu`
is smaller, for two cores; `smoke` shows that it runs, and its numbers mean nothing. The next ten
minutes of a long run:

    timeout --signal TERM 10m python -m experiments.reproduce train mnist --scale full
"""

import csv
import dataclasses
import datetime
import io
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, NamedTuple

import tyro
from etils import epath

from experiments.papers import (
    carlini,
    mandal2023,
    papernot2016,
    robust_chains,
    students,
    touvron,
)
from experiments.papers.measures import Line, Row, Source, markdown
from experiments.papers.training import TRAININGS, Scale, cost
from jdistill import _validate, runtime
from jdistill import study as studies
from jdistill.commands import _plan, _studies
from jdistill.study import _workdir

Spread = Literal["jit", "pmap", "sweep"]


class Item(NamedTuple):
    """A table of a paper.

    Attributes:
        title: what it shows.
        measure: its rows, from the networks of a training study.
        table: its lines, from the rows.
        full: names of its training studies at the papers' scale.
        cpu: at the scale of two cores.
        smoke: at the least scale.
        attacked: whether its rows have the training study's own attacks and verdicts in them; else
            the networks are enough.
    """

    title: str
    measure: Callable[[Source], list[Row]]
    table: Callable[[list[Row]], list[list[Line]]]
    full: tuple[str, ...]
    cpu: tuple[str, ...]
    smoke: str = "digits"
    attacked: bool = False


_BOTH = ("mnist", "cifar10")
_SEEDS = ("mnist-half", "digits", "cifar10-narrow")

ITEMS: Mapping[str, Item] = {
    "mandal2023-accuracy": Item(
        "Accuracy by temperature and chain length",
        mandal2023.accuracy,
        mandal2023.accuracy_table,
        _BOTH,
        _SEEDS,
    ),
    "mandal2023-sensitivity": Item(
        "Sensitivity by temperature and chain length",
        mandal2023.sensitivity,
        mandal2023.sensitivity_table,
        _BOTH,
        _SEEDS,
    ),
    "mandal2023-robustness": Item(
        "C&W L2, AutoAttack, and the verdict, with and without an assistant",
        mandal2023.robustness,
        mandal2023.robustness_table,
        _BOTH,
        _SEEDS,
        attacked=True,
    ),
    "mandal2023-multistep": Item(
        "Accuracy and robustness by chain length",
        mandal2023.multistep,
        mandal2023.multistep_table,
        _BOTH,
        _SEEDS,
        attacked=True,
    ),
    "papernot2016-success": Item(
        "JSMA success against T",
        papernot2016.jacobian,
        papernot2016.success_table,
        _BOTH,
        ("mnist",),
    ),
    "papernot2016-sensitivity": Item(
        "Histogram of the softmax gradient against T",
        papernot2016.sensitivity,
        papernot2016.sensitivity_table,
        _BOTH,
        ("mnist", "cifar10-narrow"),
    ),
    "papernot2016-robustness": Item(
        "Robustness ρ_adv by JSMA against T",
        papernot2016.jacobian,
        papernot2016.robustness_table,
        _BOTH,
        ("mnist",),
    ),
    "carlini2017-plain": Item(
        "Distances on the ordinary network (table IV)",
        carlini.plain,
        carlini.plain_table,
        _BOTH,
        ("mnist",),
    ),
    "carlini2017-distilled": Item(
        "Distances on the distilled network (table VI)",
        carlini.distilled,
        carlini.distilled_table,
        _BOTH,
        ("mnist",),
    ),
    "carlini2017-temperature": Item(
        "Mean L2 distance against T",
        carlini.temperature,
        carlini.temperature_table,
        _BOTH,
        ("mnist", "mnist-half", "digits"),
    ),
    "carlini2017-transfer": Item(
        "Transfer from the ordinary network against the confidence κ",
        carlini.transferred,
        carlini.transferred_table,
        ("mnist",),
        ("mnist",),
    ),
    "carlini2016-break": Item(
        "JSMA on softmax(z / T), and the size of the logits",
        carlini.broken,
        carlini.broken_table,
        ("mnist",),
        ("mnist",),
    ),
    "mirzadeh2019-plain": Item(
        "A small student alone, distilled, and through an assistant: plain CNNs",
        students.accuracies,
        students.plain_table,
        ("takd-plain",),
        ("takd-fashion",),
        "takd",
    ),
    "mirzadeh2019-resnet": Item(
        "The same for ResNets 110, 20, 8",
        students.accuracies,
        students.resnet_table,
        ("takd-resnet",),
        (),
        "takd",
    ),
    "mirzadeh2019-resnet26": Item(
        "The same for ResNets 26, 14, 8",
        students.accuracies,
        students.resnet26_table,
        ("takd-resnet26",),
        (),
        "takd",
    ),
    "ladder": Item(
        "Shrinking and equal chains by temperature",
        students.students,
        students.grid_table,
        ("ladder",),
        ("ladder",),
        "takd",
        attacked=True,
    ),
    "logit-standard": Item(
        "Students that learn from standardized logits",
        students.students,
        students.grid_table,
        ("standardized", "mnist"),
        ("standardized", "digits"),
        "standardized",
        attacked=True,
    ),
    "touvron2021": Item(
        "DeiT: transformers alone, from convolutional teachers, and from transformers",
        students.students,
        touvron.table,
        ("deit-cifar10",),
        ("deit-fashion", "deit-digits"),
        "deit",
        attacked=True,
    ),
    "robust-chains": Item(
        "Robust distillation with and without assistants, and what goes along with it",
        robust_chains.rows,
        robust_chains.table,
        ("robust-mnist", "robust-cifar10"),
        ("robust-fashion", "robust-mnist"),
        "robust",
        attacked=True,
    ),
}
# Done to a training study, and not to a table.
_OF_TRAININGS = ("train", "plan")
_IMAGES = {"full": 100, "cpu": 20, "smoke": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which table, at which scale."""

    item: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="ITEM")]] = None
    """An item of --list; or `train` or `plan`, with the name of a training study."""
    training: tyro.conf.Positional[Annotated[str | None, tyro.conf.arg(metavar="TRAINING")]] = None
    """Only networks of this training study (none: of all that the item has at the scale)."""
    scale: Scale = "cpu"
    """The papers' settings, smaller ones for two cores, or the least."""
    workdir: str = "runs/papers"
    """Folder of all training studies, one below it for each scale and study."""
    tables: str | None = None
    """Folder for the tables (none: WORKDIR/SCALE/tables)."""
    num_images: int | None = None
    """Test images for targeted attacks, each towards every class (none: 100, 20, 2 by scale)."""
    parallel: Spread | None = None
    """Spread of training over the devices, as in `jdistill defend`; a sweep has no best epochs
    (none: sweep at full scale where it can be, else jit)."""
    topology: str = "v5e:1x1"
    """Of `plan`: chip and how many along each axis, as in `jdistill plan`."""
    teacher: str | None = None
    """Folder of an exported network as DeiT's convolutional teacher, as in `jdistill defend
    deit-fashion` (none: trained on the same examples)."""
    transformer: str | None = None
    """Likewise as its transformer teacher."""
    data_dir: str | None = None
    """Folder of prepared TFDS sets (none: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    list: bool = False
    """Print the items, their training studies, and about how long these take to train."""

    def __post_init__(self) -> None:
        """Name what is wrong."""
        if self.list:
            return
        if self.num_images is not None:
            _validate.count(num_images=self.num_images)
        if self.item not in (*_OF_TRAININGS, *ITEMS):
            raise ValueError(
                f"expected an item among train, plan, {', '.join(ITEMS)}, got {self.item!r}; "
                "--list says what they show"
            )
        known = trainings(self)
        if not known:
            raise ValueError(
                f"expected an item with a training study at scale {self.scale}, got {self.item}, "
                "which has none; use --scale full"
            )
        if self.training is not None and self.training not in known:
            raise ValueError(
                f"expected one of the training studies {', '.join(known)}, got "
                f"{self.training!r}; choose one"
            )
        if self.item in _OF_TRAININGS and self.training is None:
            raise ValueError(f"expected the name of one of {', '.join(known)}, got none; add it")


def trainings(options: Options) -> tuple[str, ...]:
    """The training studies of an item at a scale."""
    if options.item in _OF_TRAININGS:
        return tuple(TRAININGS[options.scale])
    item = ITEMS[str(options.item)]
    return {"full": item.full, "cpu": item.cpu, "smoke": (item.smoke,)}[options.scale]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(
        Options, prog="python -m experiments.reproduce", description=__doc__, args=[*arguments]
    )
    if options.list:
        print(listing())
        return
    if options.item == "plan":
        _plan.show(
            TRAININGS[options.scale][str(options.training)].study(data_dir=options.data_dir),
            options.topology,
        )
        return
    runtime.add_cpu_flags()
    runtime.enable_compilation_cache()
    chosen = trainings(options) if options.training is None else (options.training,)
    for name in chosen:
        run(options, name)


def listing() -> str:
    """Items and training studies."""
    lines = [["item", "shows", "trained at full scale", "at cpu scale"]]
    for name, item in ITEMS.items():
        lines.append([name, item.title, ", ".join(item.full), ", ".join(item.cpu) or "–"])
    sizes = [["training study", "scale", "takes"]]
    for scale, found in TRAININGS.items():
        sizes += [[name, scale, str(cost(training))] for name, training in found.items()]
    return f"{markdown(lines)}\n\n{markdown(sizes)}"


def run(options: Options, name: str) -> None:
    """One item on one training study: train what is missing, measure, write, and print."""
    training = TRAININGS[options.scale][name]
    if isinstance(training, studies.DeitRecipe):
        training = dataclasses.replace(
            training, teacher=options.teacher, transformer=options.transformer
        )
    study = training.study(data_dir=options.data_dir)
    folder = _studies.workdir_path(options.workdir) / options.scale / name
    whole = options.scale == "full" and not study.selects_best()
    spread = options.parallel or ("sweep" if whole else "jit")
    item = ITEMS.get(str(options.item))
    if item is None or not _trained(study, folder):
        print(f"training {name}: {cost(training)}", flush=True)
        studies.train(study, folder, parallel=spread)
    if item is None:
        return
    if item.attacked:  # what is measured already is read
        studies.run(study, folder, parallel=spread)
    with _workdir.held(folder), runtime.progress() as progress:
        source = Source(
            name=name,
            training=training,
            study=study,
            folder=folder,
            num_images=_IMAGES[options.scale] if options.num_images is None else options.num_images,
            full=options.scale == "full",
            progress=progress,
        )
        rows = [{"dataset": training.dataset, **row} for row in item.measure(source)]
    tables = options.tables and epath.Path(options.tables)
    where = tables or folder.parent / "tables"
    written = _write(where, f"{options.item}-{name}", rows, page(options, source, rows))
    print(written.read_text())


def _trained(study: studies.Study, folder: epath.Path) -> bool:
    """True where every network is finished; training names what is wrong with a workdir."""
    try:
        found = studies.networks(study, folder, temperatures=study.temperatures, seeds=study.seeds)
    except (FileNotFoundError, ValueError):
        return False
    return bool(found)


def page(options: Options, source: Source, rows: list[Row]) -> str:
    """The item as Markdown: its tables, and what they were measured on."""
    item = ITEMS[str(options.item)]
    about = runtime.describe()
    seeds = len({row["seed"] for row in rows})
    note = (
        f"{source.study.examples().note or source.training.dataset}, training study "
        f"`{source.name}` at scale {options.scale}, {seeds} seed{'s' * (seeds > 1)}; "
        "mean over the seeds with its 95% t interval where there are several. "
        f"{datetime.date.today():%Y-%m-%d}, jdistill {about['versions']['jdistill']}, "
        f"JAX {about['versions']['jax']}, {about['devices'][0]['kind']}."
    )
    tables = "\n\n".join(markdown(lines) for lines in item.table(rows))
    return f"## {item.title}\n\n{tables}\n\n{note}\n"


def _write(folder: epath.Path, name: str, rows: list[Row], text: str) -> epath.Path:
    """Rows as CSV and the page, beside each other."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    content = io.StringIO()
    writer = csv.DictWriter(content, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    runtime.atomic_write_text(folder / f"{name}.csv", content.getvalue())
    runtime.atomic_write_text(folder / f"{name}.md", text)
    return folder / f"{name}.md"


if __name__ == "__main__":
    runtime.run_main(main)
