"""Training below full precision beside float32, for `experiments.device`: over seeds."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.device_checks import GENERATIONS, TEMPERATURE, Row
from jdistill import distill, metrics, nets, sweep, train
from jdistill.typing import ApplyFn, Array, Event, PyTree

FULL, TF32, BF16, HALF = (
    "float32",
    "TF32 products",
    "bfloat16 products",
    "bfloat16 activations",
)
# As `jax.default_matmul_precision` calls it. Of bfloat16 operands all precisions are one.
_PRODUCTS = {FULL: "float32", TF32: "tensorfloat32", BF16: "bfloat16", HALF: "bfloat16"}
_NOTES = {
    ("cpu", TF32): "float32 on a CPU; not measured on an accelerator",
    ("cpu", BF16): "float32 on a CPU; not measured on an accelerator",
    ("cpu", HALF): "emulated on a CPU; not measured on an accelerator",
    ("gpu", BF16): "TF32 on a GPU",  # what JAX's "bfloat16" asks for there
}


def compare(examples: Mapping[str, np.ndarray], num_seeds: int, num_epochs: int) -> Iterator[Row]:
    """A row for each precision below float32 and each quantity: the paired difference over seeds.

    Args:
        examples: `inputs`, `labels`, `test_inputs`, `test_labels` of `device_checks.digits`.
        num_seeds: chains at each precision, all trained as one stack.
        num_epochs: per generation.
    """
    full = chains(examples, FULL, num_seeds, num_epochs)
    for precision in (TF32, BF16, HALF):
        found = chains(examples, precision, num_seeds, num_epochs)
        note = _NOTES.get((jax.default_backend(), precision), "")
        for quantity, values in found.items():
            difference = metrics.paired_over_seeds(values, full[quantity]).difference
            yield {
                "precision": precision,
                "quantity": quantity,
                "float32": float(full[quantity].mean()),
                "here": float(values.mean()),
                "difference": difference.value,
                # Equal differences, other than 0, have no interval.
                "interval": [difference.low, difference.high]
                if math.isfinite(difference.low)
                else None,
                "seeds": num_seeds,
                "note": note,
            }


def chains(
    examples: Mapping[str, np.ndarray], precision: str, num_seeds: int, num_epochs: int
) -> dict[str, np.ndarray]:
    """The teacher's last training loss, and each generation's test accuracy, one a seed.

    The weights that come out are measured in float32: only training, and the soft labels for it,
    are less precise.

    Args:
        examples: as of `compare`.
        precision: one of the names above.
        num_seeds: chains.
        num_epochs: per generation.
    """
    inputs, test_inputs = (
        examples[name].astype(np.float32) / 16 for name in ("inputs", "test_inputs")
    )
    model = nets.digits_net()
    apply_fn = nets.apply_fn(model)
    step = train.make_train_step(_Half(apply_fn) if precision == HALF else apply_fn, train.sgd(0.2))
    keys = jax.vmap(jax.random.key)(np.arange(num_seeds))
    params = nets.stack([nets.init(model, key, inputs.shape[1:])[0] for key in keys])
    generation = distill.Generation(step=step, params=params, num_epochs=num_epochs)
    losses = []

    def keep(event: Event) -> None:
        if event["event"] == "epoch" and event["generation"] == 0:
            losses.append(event["loss"])

    with jax.default_matmul_precision(_PRODUCTS[precision]):
        states = sweep.chain(
            [generation] * len(GENERATIONS),
            (inputs, examples["labels"].astype(np.int32)),
            keys,
            temperature=TEMPERATURE,
            batch_size=32,
            devices=jax.devices()[:1],
            callback=keep,
        ).states
    found = {f"teacher's training loss, epoch {num_epochs}": np.asarray(losses[-1])}
    for name, state in zip(GENERATIONS, states, strict=True):
        networks = [
            nets.logits_fn(model, {"params": nets.index(state.params, seed)})
            for seed in range(num_seeds)
        ]
        found[f"test accuracy, {name}"] = np.array(
            [
                metrics.accuracy(train.predict(one, test_inputs), examples["test_labels"]).value
                for one in networks
            ]
        )
    return found


@dataclasses.dataclass(frozen=True)
class _Half:
    """Network that computes in bfloat16, from weights and to logits in float32."""

    apply_fn: ApplyFn

    def __call__(
        self, params: PyTree, model_state: PyTree, inputs: Array, *, train: bool, key: Array | None
    ) -> tuple[Any, PyTree]:
        params, inputs = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), (params, inputs))
        logits, model_state = self.apply_fn(params, model_state, inputs, train=train, key=key)
        return logits.astype(jnp.float32), model_state
