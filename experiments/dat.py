"""Adversarial training in large batches over several devices: SGD, LARS, LAMB, 8-bit gradients.

    python -m experiments.dat --output experiments/results/dat

Distributed adversarial training (Zhang et al. 2022) on scikit-learn's digits, on devices that one
CPU plays: PGD-AT with equal epochs in batches of 64 and of 512, and rates that rise linearly for a
tenth of the steps and fall along a cosine. Each optimizer's rate is the one of its grid with the
highest accuracy under PGD-20 on the validation set, on the first seed; what is reported is of the
test set.
Writes a row for each run (CSV) and the means (Markdown).
"""

import csv
import dataclasses
import functools
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import tyro
from etils import epath
from jax.sharding import PartitionSpec

from jdistill import attacks, data, evaluate, metrics, nets, parallel, robust, runtime, train
from jdistill.typing import Batch, LogitsFn, LossFn

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_COLLECTIVE = re.compile(
    r"= (.+?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-\w+)(-start)?\("
)


class Way(NamedTuple):
    """An optimizer at a batch size, and the peak rates to choose from."""

    batch_size: int
    optimizer: Callable[..., optax.GradientTransformation]
    rates: tuple[float, ...]
    exchange: parallel.QuantizedSum | None = None


_sgd = functools.partial(optax.sgd, momentum=0.9)
_LAMB = (0.01, 0.03, 0.1)
WAYS = {
    "SGD": Way(64, _sgd, (0.03, 0.1, 0.3)),
    "SGD, large batch": Way(512, _sgd, (0.1, 0.3, 1.0)),
    "LARS": Way(512, optax.lars, (3.0, 10.0, 30.0)),
    "LAMB": Way(512, optax.lamb, _LAMB),
    "LAMB, 8-bit gradients": Way(512, optax.lamb, _LAMB, parallel.quantized_psum()),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The runs, and the attack."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of the weights, the order of the examples, and the random starts."""
    num_epochs: int = 40
    """Epochs of every run."""
    num_devices: int = 8
    """Devices that share each batch, at least 2."""
    width: float = 0.5
    """Factor on the sizes of `nets.digits_net`."""
    eps: float = 0.15
    """Radius of the attack (l-inf)."""
    train_steps: int = 7
    """Steps of PGD in training."""
    ways: tuple[str, ...] = tuple(WAYS)
    """Names of the ways to train."""
    rates_per_way: int | None = None
    """Use only the first so many rates of each grid (none: all)."""
    output: str | None = None
    """Write this path with .csv and .md added (none: the rows are only printed)."""


def bytes_sent(text: str, num_devices: int) -> float:
    """Bytes that a device sends in one run of a compiled program, by the usual (ring) algorithms.

    From the results of the collectives in XLA's text: all-reduce sends its result twice, the others
    once, each without the device's own share.
    """
    total = 0.0
    for kind, operation, start in _COLLECTIVE.findall(text):
        if start or operation not in ("all-reduce", "all-gather", "all-to-all"):
            raise ValueError(
                f"expected all-reduce, all-gather, and all-to-all, got {operation}{start}; count it"
            )
        size = sum(
            _BYTES[dtype] * int(np.prod([int(each) for each in shape.split(",") if each]))
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", kind)
        )
        total += size * (2 if operation == "all-reduce" else 1) * (num_devices - 1) / num_devices
    return total


def compiled_text(
    step: train.TrainStep,
    state: train.TrainState,
    batch: Batch,
    loss_fn: LossFn,
    devices: Sequence[jax.Device],
) -> str:
    """XLA's text of one step under `shard_map`."""
    whole, split = PartitionSpec(), PartitionSpec(parallel.DATA_AXIS)
    mapped = jax.shard_map(
        functools.partial(dataclasses.replace(step, axis_name=parallel.DATA_AXIS)),
        mesh=parallel.make_mesh(devices),
        in_specs=(whole, split, whole),
        out_specs=whole,
        check_vma=False,
    )
    return str(jax.jit(mapped).lower(state, batch, loss_fn).compile().as_text())


class Prepared(NamedTuple):
    """Parts that all runs of a way share, so that they are compiled once."""

    step: train.TrainStep
    loss_fn: LossFn
    devices: tuple[jax.Device, ...]
    kilobytes: float


def _model(options: Options) -> nets.ConvNet:
    return nets.digits_net(options.width, dropout_rate=0.0)


def prepared(options: Options, digits: data.Dataset, way: Way) -> Prepared:
    """The training step of a way, and what a device sends in it."""
    num_steps = options.num_epochs * data.num_batches(len(digits.train.labels), way.batch_size)
    shape = optax.warmup_cosine_decay_schedule(0.0, 1.0, max(1, num_steps // 10), num_steps)
    attack = functools.partial(attacks.pgd, eps=options.eps, num_steps=options.train_steps)

    def with_peak(peak: Any) -> optax.GradientTransformation:
        return way.optimizer(lambda count: peak * shape(count))

    step = train.make_train_step(
        nets.apply_fn(_model(options)),
        optax.inject_hyperparams(with_peak)(peak=1.0),
        objective=robust.adversarial(attack),
        exchange=way.exchange,
    )
    devices = tuple(jax.devices()[: options.num_devices])
    loss_fn = robust.on_adversarial(train.hard_loss)(1.0)
    batch = next(iter(data.batches(*digits.train, None, batch_size=way.batch_size)))
    text = compiled_text(step, initial(options, step, 1.0, 0), batch, loss_fn, devices)
    return Prepared(step, loss_fn, devices, bytes_sent(text, len(devices)) / 1000)


def initial(options: Options, step: train.TrainStep, rate: float, seed: int) -> train.TrainState:
    """State that a run starts from."""
    params, model_state = nets.init(_model(options), jax.random.key(seed), (8, 8, 1))
    return train.create_state(
        step,
        params,
        jax.random.key(100 + seed),
        model_state=model_state,
        hyperparams={"peak": rate},
    )


def trained(
    options: Options, digits: data.Dataset, way: Way, own: Prepared, rate: float, seed: int
) -> LogitsFn:
    """Train one network over the devices."""
    state = train.fit(
        own.step,
        initial(options, own.step, rate, seed),
        digits.train,
        own.loss_fn,
        num_epochs=options.num_epochs,
        batch_size=way.batch_size,
        mode="shard_map",
        devices=own.devices,
    )
    return train.logits_fn(own.step, jax.device_get(state))


def shares(options: Options, network: LogitsFn, examples: data.Split) -> tuple[float, float]:
    """Accuracy, and what PGD-20 leaves of it."""
    right = metrics.correct(train.predict(network, examples.inputs), examples.labels)
    attack = functools.partial(attacks.pgd, eps=options.eps, num_steps=20)
    plan = evaluate.AttackPlan(attack, batch_size=200)
    found = evaluate.under_attack(nets.stack([network]), *examples, plan, key=jax.random.key(0))
    return float(np.mean(right)), float(np.mean(np.asarray(right) & ~found.success[0]))


def rows(options: Options) -> Iterator[dict[str, Any]]:
    """A row for each run: those that choose a rate, and those of the chosen one."""
    digits = data.load("digits")
    for name in options.ways:
        way, grid = WAYS[name], []
        own = prepared(options, digits, way)
        for rate in way.rates[: options.rates_per_way]:
            network = trained(options, digits, way, own, rate, options.seeds[0])
            grid.append((shares(options, network, digits.validation)[1], rate, network))
            print(f"{name}, rate {rate:g}: {grid[-1][0]:.1%} on the validation set", flush=True)
        _, rate, first = max(grid, key=lambda each: each[0])
        for seed in options.seeds:
            again = seed != options.seeds[0]
            network = trained(options, digits, way, own, rate, seed) if again else first
            accuracy, under_pgd = shares(options, network, digits.test)
            yield {
                "way": name,
                "batch_size": way.batch_size,
                "learning_rate": rate,
                "seed": seed,
                "test_accuracy": accuracy,
                "accuracy_under_pgd": under_pgd,
                "kilobytes_sent_per_step": own.kilobytes,
            }


def table(found: Sequence[dict[str, Any]], options: Options) -> str:
    """The means over the seeds, in Markdown."""
    lines = [
        "## Adversarial training in large batches, and with 8-bit gradients",
        "",
        f"scikit-learn's digits, PGD-AT (l∞ ≤ {options.eps:g}, {options.train_steps} steps), "
        f"{options.num_epochs} epochs over {options.num_devices} devices, "
        f"{len(options.seeds)} seeds: mean and the range over the seeds. Kilobytes are those that "
        "a device sends in a step. The rate is chosen on the first seed alone; a run with the same "
        "figure of about 10% in both columns predicts one class for all.",
        "",
        "| optimizer | batch | rate | test accuracy (%) | under PGD-20 (%) | kB a step |",
        "|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row["way"] for row in found):
        own = [row for row in found if row["way"] == name]
        cells = []
        for column in ("test_accuracy", "accuracy_under_pgd"):
            values = 100 * np.array([row[column] for row in own])
            cells.append(f"{values.mean():.1f} ({values.min():.1f} to {values.max():.1f})")
        lines.append(
            f"| {name} | {own[0]['batch_size']} | {own[0]['learning_rate']:g} | "
            f"{' | '.join(cells)} | {own[0]['kilobytes_sent_per_step']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, and print or write the rows."""
    options = tyro.cli(Options, prog="python -m experiments.dat", description=__doc__)
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", options.num_devices)
    runtime.enable_compilation_cache()
    found = []
    for row in rows(options):
        print(row, flush=True)
        found.append(row)
    print(table(found, options))
    if options.output is not None:
        content = io.StringIO()
        writer = csv.DictWriter(content, found[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
        runtime.atomic_write_text(epath.Path(f"{options.output}.csv"), content.getvalue())
        runtime.atomic_write_text(epath.Path(f"{options.output}.md"), table(found, options))


if __name__ == "__main__":
    runtime.run_main(main)
