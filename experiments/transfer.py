"""Carlini & Wagner's transfer figure: what is crafted on one network, judged on the others.

    python -m experiments.transfer runs/mnist
    python -m experiments.transfer runs/mnist --confidences 0 10 20 40 --num-examples 200

The adversarial inputs are crafted on the teacher of the lowest temperature by Carlini & Wagner's L2
attack, once for each confidence κ: by how many logits it must pass the source's boundary. Every
network of the workdir judges them. The larger κ, the more transfers, to a distilled network too.
Written into WORKDIR/transfer: a CSV with a row for each κ and network, and the figure.
"""

import csv
import dataclasses
import functools
import io
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import tyro
from etils import epath

from jdistill import _validate, attacks, data, evaluate, metrics, nets, report, runtime, train
from jdistill import study as studies
from jdistill.commands import _studies
from jdistill.report._figures import network_look, report_style
from jdistill.study import Trained

_COLUMNS = (
    *("source", "confidence", "network", "temperature", "seed", "generation", "num_examples"),
    *("success_rate", "success_rate_low", "success_rate_high", "mean_distance"),
)
_MOST_BANDS = 5  # more of them hide each other; the table has every interval

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Which examples are crafted, and how far beyond the boundary."""

    workdir: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="WORKDIR")]]
    """Folder of a run of `jdistill defend`."""
    confidences: tuple[float, ...] = (0.0, 5.0, 10.0, 20.0, 40.0)
    """Confidences κ, in logits of the source, each at least 0."""
    num_examples: int = 100
    """The first so many test examples; counted are those that source and judge get right."""
    num_searches: int = 5
    """Values of the constant c that the attack tries."""
    num_steps: int = 100
    """Adam steps for each value of c."""
    learning_rate: float = 0.1
    """Adam's learning rate, in tanh space."""
    initial_const: float = 0.1
    """The first value of c."""
    batch_size: int = 50
    """Examples at a time; beyond rounding no result depends on it."""
    data_dir: str | None = None
    """Folder of prepared TFDS sets (none: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""

    def __post_init__(self) -> None:
        """Name the number that is wrong, if there is one."""
        counts = ("num_examples", "num_searches", "num_steps", "batch_size")
        _validate.count(**{name: getattr(self, name) for name in counts})
        if not self.confidences:
            raise ValueError("expected at least one confidence, got none; pass 0 20 40")
        if len(set(self.confidences)) < len(self.confidences):
            raise ValueError(
                f"expected confidences without repetition, got {self.confidences}; name each once"
            )
        for confidence in self.confidences:
            _validate.non_negative(confidences=confidence)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and run."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = tyro.cli(
        Options, prog="python -m experiments.transfer", description=__doc__, args=list(arguments)
    )
    runtime.add_cpu_flags()
    runtime.enable_compilation_cache()
    run(options)


def run(options: Options) -> None:
    """Craft, judge, write the table and the figure, and print the table."""
    report.check_packages()
    folder = _studies.workdir_path(options.workdir)
    study = _studies.of_workdir(folder, options.data_dir)
    with runtime.progress() as progress:
        found = studies.networks(study, folder)
        source = min(found, key=lambda one: (one.generation > 0, one.temperature, one.seed))
        runtime.check_writable(folder)
        rows = measured(source, found, study.examples().test, options, progress)
    written = _write(folder / "transfer", rows)
    print(table(rows))
    print(f"figure: {written}")


def measured(
    source: Trained,
    judges: Sequence[Trained],
    examples: data.Split,
    options: Options,
    progress: Any = None,
) -> list[Row]:
    """Rows of inputs crafted on the source at each confidence, judged by each network."""
    rows: list[Row] = []
    examples = data.Split(*(column[: options.num_examples] for column in examples))
    for confidence in sorted(options.confidences):
        crafted = _craft(source, examples, confidence, options, progress)
        judged = (_judge(network, source, crafted, examples) for network in judges)
        rows += [{"confidence": confidence, **row} for row in judged]
    return rows


def _craft(
    source: Trained,
    examples: data.Split,
    confidence: float,
    options: Options,
    progress: Any,
) -> evaluate.AttackOutcome:
    """The source's adversarial inputs at one confidence."""
    attack = functools.partial(
        attacks.carlini_wagner_l2,
        confidence=confidence,
        num_searches=options.num_searches,
        num_steps=options.num_steps,
        learning_rate=options.learning_rate,
        initial_const=options.initial_const,
    )
    return evaluate.under_attack(
        nets.stack([source.logits_fn]),
        *examples,
        evaluate.AttackPlan(attack, batch_size=options.batch_size),
        callback=progress,
        stage=f"confidence {confidence:g}",
    )


def _judge(
    network: Trained,
    source: Trained,
    crafted: evaluate.AttackOutcome,
    examples: data.Split,
) -> Row:
    """How much of what the source was fooled by fools a network too."""
    inputs, labels = examples
    counted = np.logical_and(
        *(
            metrics.correct(train.predict(one.logits_fn, inputs), labels)
            for one in (network, source)
        )
    )
    logits = train.predict(network.logits_fn, crafted.inputs[0])
    fooled = metrics.predicts(logits) & ~metrics.correct(logits, labels)
    if not counted.any():
        raise ValueError(
            f"expected examples that {source.title} and "
            f"{network.title} both get right, got none of {len(labels)}; pass a "
            "larger --num-examples"
        )
    share = metrics.proportion(int((fooled & counted).sum()), int(counted.sum()))
    reached = crafted.distance[0][counted & crafted.success[0]]
    return {
        "source": source.title,
        "network": network.title,
        "temperature": network.temperature,
        "seed": network.seed,
        "generation": network.generation,
        "num_examples": int(counted.sum()),
        "success_rate": share.value,
        "success_rate_low": share.low,
        "success_rate_high": share.high,
        "mean_distance": float(reached.mean()) if reached.size else float("nan"),
    }


def table(rows: Sequence[Row]) -> str:
    """A line for each network, a column for each confidence; percent."""
    confidences = sorted({row["confidence"] for row in rows})
    lines = [["network", *(f"κ = {confidence:g}" for confidence in confidences)]]
    for name, found in _by_network(rows).items():
        lines.append([name, *(f"{100 * row['success_rate']:.4g}" for row in found)])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    body = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    ]
    legend = (
        f"Percent fooled by what was crafted on {rows[0]['source']}, of the examples that both get "
        "right."
    )
    return "\n".join([*body, "", legend])


def _by_network(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each network, by rising confidence."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["confidence"]):
        found.setdefault(row["network"], []).append(row)
    return found


def _write(folder: epath.Path, rows: Sequence[Row]) -> epath.Path:
    text = io.StringIO()
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    folder.mkdir(parents=True, exist_ok=True)
    runtime.atomic_write_text(folder / "transfer.csv", text.getvalue())
    path = folder / "transfer.png"
    content = io.BytesIO()
    with report_style():
        _figure(rows).savefig(content, format="png", dpi=160)
    runtime.atomic_write(path, content.getvalue())
    return path


def _figure(rows: Sequence[Row]) -> Any:
    """Success against confidence, a line for each network, in the style of the report."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    temperatures = sorted({row["temperature"] for row in rows})
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    networks = _by_network(rows)
    for name, found in networks.items():
        x = [row["confidence"] for row in found]
        low, middle, high = (
            [100 * row[column] for row in found]
            for column in ("success_rate_low", "success_rate", "success_rate_high")
        )
        look = network_look(temperatures, found[0]["temperature"], found[0]["generation"])
        axes.plot(x, middle, markersize=5, label=name, **look)
        if len(networks) <= _MOST_BANDS:
            axes.fill_between(x, low, high, color=look["color"], alpha=0.12, linewidth=0)
    axes.set(
        title=f"Crafted on {rows[0]['source']}, judged on each",
        xlabel="confidence κ (logits of the source)",
        ylabel="fooled (% of those right)",
        ylim=(-2, 102),
    )
    figure.legend(loc="outside right center", fontsize=8)
    return figure


if __name__ == "__main__":
    runtime.run_main(main)
