"""Students of teachers that are sure of unlearnable examples, and what an assistant changes.

    python -m experiments.unlearnable --output experiments/results/unlearnable

Networks of the recipe `unlearnable` for shares of such examples, seeds, and ways of training.
A seed has its own examples, too. Of each student: accuracy on clean inputs and under PGD-20, the
entropy of its teacher's labels on the unlearnable training examples, and the share of these that it
remembers. Writes rows (CSV) and tables (Markdown). What is trained stays in the workdir, so it can
be stopped and called again.
"""

import csv
import dataclasses
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tyro
from etils import epath

from jdistill import evaluate, metrics, nets, runtime, train
from jdistill import study as studies
from jdistill.study import UnlearnableRecipe
from jdistill.study._unlearnable import is_unlearnable

Row = dict[str, Any]


class Setting(NamedTuple):
    """A way of training.

    Attributes:
        attack_steps: of PGD; 0 is the paper's adversary.
        epochs: of each network.
    """

    attack_steps: int
    epochs: int

    @property
    def title(self) -> str:
        """Name in a heading."""
        attack = f"PGD, {self.attack_steps} steps" if self.attack_steps else "the paper's adversary"
        return f"{attack}, {self.epochs} epochs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Networks to train, and their folder."""

    shares: tuple[float, ...] = (0.0, 0.05, 0.1, 0.15, 0.2)
    """Probabilities that an example is unlearnable."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of examples, initial weights, and order."""
    settings: tuple[tuple[int, int], ...] = ((0, 10), (0, 20))
    """Ways of training at every share: pairs of the steps of PGD (0: the paper's adversary) and
    epochs."""
    others: tuple[tuple[int, int], ...] = ((0, 40), (10, 40))
    """Further ones, at the last share alone."""
    workdir: str = "runs/unlearnable"
    """Folder of the trained networks."""
    output: str | None = None
    """Path of the files .csv and .md, without ending (none: the rows are only printed)."""


# Column, heading, and factor of each table.
_MEASURES = (
    ("robust_accuracy", "Accuracy under PGD-20 (%)", 100),
    ("clean_accuracy", "Accuracy on clean inputs (%)", 100),
    ("teacher_entropy", "Entropy of the labels learned from, unlearnable examples (nats)", 1),
    ("remembered", "Unlearnable training examples that the student has right (%)", 100),
)


def rows(options: Options, base: UnlearnableRecipe) -> Iterator[Row]:
    """A row for each student."""
    cases = [
        *itertools.product(options.settings, options.shares, options.seeds),
        *itertools.product(options.others, options.shares[-1:], options.seeds),
    ]
    for (attack_steps, epochs), share, seed in cases:
        recipe = dataclasses.replace(
            base,
            attack_steps=attack_steps,
            epochs=epochs,
            share=share,
            data_seed=seed,
            seeds=(seed,),
        )
        place = epath.Path(options.workdir) / f"steps{attack_steps}-epochs{epochs}"
        yield from students(recipe, place / f"share{share:g}-seed{seed}")


def students(recipe: UnlearnableRecipe, folder: epath.Path) -> Iterator[Row]:
    """A row for the student of each chain of a recipe with one seed."""
    study, examples = recipe.study(), recipe.examples()
    networks = {(n.chain, n.generation): n.logits_fn for n in studies.train(study, folder)}
    places = study.students()
    stack = nets.stack([networks[place] for place in places.values()])
    pgd, (tested, true) = study.attacks["pgd-20"], examples.test
    outcome = evaluate.under_attack(stack, tested, true, pgd, key=jax.random.key(0))
    unlearnable = is_unlearnable(examples.train.inputs)
    inputs, labels = (column[unlearnable] for column in examples.train)
    learnable = ~is_unlearnable(tested)
    for number, (chain, (longest, generation)) in enumerate(places.items()):
        network, left = networks[longest, generation], ~np.asarray(outcome.success[number])
        right = np.asarray(metrics.correct(train.predict(network, tested), true))
        row: Row = {
            "attack_steps": recipe.attack_steps,
            "epochs": recipe.epochs,
            "share": recipe.share,
            "seed": recipe.seeds[0],
            "chain": chain,
            "clean_accuracy": float(np.mean(right)),
            "robust_accuracy": float(np.mean(left)),
            "robust_accuracy_learnable": float(np.mean(left[learnable])),
            "num_unlearnable": len(labels),
            "teacher_entropy": None,
            "remembered": None,
        }
        if len(labels):
            own = train.predict(network, inputs)
            row["remembered"] = float(np.mean(np.asarray(metrics.correct(own, labels))))
            # True labels are sure.
            row["teacher_entropy"] = 0.0
            if generation:
                row["teacher_entropy"] = entropy(
                    train.predict(networks[longest, generation - 1], inputs)
                )
        yield row


def entropy(logits: np.ndarray) -> float:
    """Mean entropy of the softmax of logits `[N, K]` at T = 1, in nats."""
    log_shares = np.asarray(jax.nn.log_softmax(logits.astype(np.float32), axis=-1))
    return float(-np.mean(np.sum(np.exp(log_shares) * log_shares, axis=-1)))


def table(found: Sequence[Row]) -> str:
    """Tables of means over the seeds with half the width of their 95% t interval."""
    settings = dict.fromkeys(Setting(row["attack_steps"], row["epochs"]) for row in found)
    chains = list(dict.fromkeys(row["chain"] for row in found))
    lines = ["# Unlearnable examples: teachers that are sure of them, and assistants", ""]
    for setting in settings:
        own = [row for row in found if Setting(row["attack_steps"], row["epochs"]) == setting]
        shares = list(dict.fromkeys(row["share"] for row in own))
        lines += [f"## Trained against {setting.title}", ""]
        for column, title, factor in _MEASURES:
            heading = [title, *(_share(own, share) for share in shares)]
            lines += [_line(heading), _line(["---"] * len(heading))]
            for chain in chains:
                values = [
                    [factor * row[column] for row in own if _is(row, chain, share)]
                    if all(row[column] is not None for row in own if _is(row, chain, share))
                    else []
                    for share in shares
                ]
                lines.append(_line([chain, *(_cell(each, factor) for each in values)]))
            lines.append("")
    return "\n".join(lines)


def _share(own: Sequence[Row], share: float) -> str:
    """Heading of a column, with its number of seeds."""
    num_seeds = len({row["seed"] for row in own if row["share"] == share})
    return f"{100 * share:g}% unlearnable, {num_seeds} seed{'s' if num_seeds > 1 else ''}"


def _is(row: Row, chain: str, share: float) -> bool:
    return bool(row["chain"] == chain and row["share"] == share)


def _cell(values: Sequence[float], factor: int) -> str:
    digits = 1 if factor == 100 else 3
    if not values:
        return "–"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    found = metrics.seed_interval(np.array(values))
    return f"{found.value:.{digits}f} ± {found.high - found.value:.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def note(base: UnlearnableRecipe) -> str:
    """Sentence on what the tables are of."""
    return (
        f"Each seed has its own {base.train_examples} training and {base.test_examples:,} test "
        "examples; mean over the seeds ± half of its 95% t interval. "
        f"PGD-20 within l∞ ≤ {base.eps:g}, accuracy over all test examples, of which the share is "
        "unlearnable and can be right by chance alone. – where there are no such examples. "
        f"JAX {jax.__version__}, {jax.default_backend()}.\n"
    )


def main() -> None:
    """Parse the command line, and print or write the rows."""
    options = tyro.cli(Options, prog="python -m experiments.unlearnable", description=__doc__)
    runtime.add_cpu_flags()
    runtime.enable_compilation_cache()
    base, found = UnlearnableRecipe(dataset="patches"), []
    for row in rows(options, base):
        print(row, flush=True)
        found.append(row)
    if options.output is not None:
        content = io.StringIO()
        writer = csv.DictWriter(content, found[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
        output = epath.Path(options.output)
        runtime.atomic_write_text(output.with_suffix(".csv"), content.getvalue())
        text = f"{table(found)}\n{note(base)}"
        runtime.atomic_write_text(output.with_suffix(".md"), text)


if __name__ == "__main__":
    runtime.run_main(main)
