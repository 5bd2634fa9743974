"""The trained networks of a run, from the checkpoints in its workdir."""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from experiments.recipes import Recipe
from experiments.training import checkpoint_folder
from jdistill import data, nets, train
from jdistill.checkpoint import Checkpointer, Restored
from jdistill.train import TrainState, TrainStep
from jdistill.typing import LogitsFn


class Trained(NamedTuple):
    """A network out of a checkpoint.

    Attributes:
        temperature: of its training.
        seed: of its run.
        generation: 0 is the teacher.
        step: the training step after which it was saved.
        weights: a short hash of its weights.
        logits_fn: the network.
    """

    temperature: float
    seed: int
    generation: int
    step: int
    weights: str
    logits_fn: LogitsFn


def title(temperature: float, seed: int, generation: int) -> str:
    """How a network is named to people."""
    return f"T={temperature:g}, seed {seed}, generation {generation}"


def template(recipe: Recipe, shape: Sequence[int]) -> tuple[TrainStep, TrainState]:
    """The training step of a recipe's network, and a state that has shapes and no values.

    Args:
        recipe: whose network.
        shape: of one input.
    """
    model = recipe.model()
    step = train.make_train_step(nets.apply_fn(model), train.sgd(recipe.learning_rate))

    def fresh(key: jax.Array) -> TrainState:
        params, _ = nets.init(model, key, tuple(shape))
        return train.create_state(step, params, key)

    return step, jax.eval_shape(fresh, jax.random.key(0))


def load(
    folder: epath.Path,
    recipe: Recipe,
    dataset: data.Dataset,
    *,
    temperatures: Sequence[float] = (),
    seeds: Sequence[int] = (),
    generations: Sequence[int] = (),
    at_step: int | None = None,
) -> list[Trained]:
    """Restore networks of a run.

    Args:
        folder: the workdir.
        recipe: what was trained there.
        dataset: on which.
        temperatures: of these; empty: of all.
        seeds: likewise.
        generations: likewise.
        at_step: as they were after this training step; None: when they were finished.

    Returns:
        The networks, by temperature, seed and generation.

    Raises:
        ValueError: a temperature, seed or generation that the run does not have, or a network
            that is not finished.
        FileNotFoundError: no checkpoint of that step.
    """
    there = range(recipe.num_assistants + 2)
    wanted = [
        (temperature, seed, generation)
        for temperature in _chosen(folder, "temperature", temperatures, recipe.temperatures)
        for seed in _chosen(folder, "seed", seeds, recipe.seeds)
        for generation in _chosen(folder, "generation", generations, there)
    ]
    step, like = template(recipe, dataset.train.inputs.shape[1:])
    num_examples = len(dataset.train.labels[: recipe.train_examples])
    last_step = recipe.epochs * data.num_batches(num_examples, recipe.batch_size)
    found, unfinished = [], []
    for temperature, seed, generation in wanted:
        saved = Checkpointer(checkpoint_folder(folder, seed, temperature, generation))
        restored = saved.restore_latest(like) if at_step is None else saved.restore(at_step, like)
        if restored is None or (at_step is None and restored.step < last_step):
            name = title(temperature, seed, generation)
            unfinished.append(f"{name} {_progress(restored, recipe)}")
            continue
        found.append(
            Trained(
                temperature,
                seed,
                generation,
                restored.step,
                weights_hash((restored.state.params, restored.state.model_state)),
                train.logits_fn(step, restored.state),
            )
        )
    if unfinished:
        finished = "; ".join(title(*network[:3]) for network in found) or "none"
        raise ValueError(
            f"expected finished networks in {folder}, got {'; '.join(unfinished)} (finished: "
            f"{finished}); run its `experiments.defend` again to finish it, or choose by "
            "--temperature, --seed, --generation and --step"
        )
    return found


def _chosen(
    folder: epath.Path, name: str, wanted: Sequence[Any], there: Sequence[Any]
) -> list[Any]:
    """The values asked for, in the order of those that are there."""
    for value in wanted:
        if value not in there:
            raise ValueError(
                f"expected --{name} among {', '.join(f'{value:g}' for value in there)}, which are "
                f"in {folder}, got {value:g}; choose from these, or train it with "
                "`python -m experiments.defend`"
            )
    return [value for value in there if not wanted or value in wanted]


def _progress(restored: Restored | None, recipe: Recipe) -> str:
    """How far a network is that is not finished."""
    if restored is None:
        return "without a whole checkpoint"
    epoch = restored.metadata["epoch"]
    return f"after epoch {epoch} of {recipe.epochs} (step {restored.step})"


def weights_hash(tree: Any) -> str:
    """A short hash of the leaves of a pytree, such as a network's weights."""
    digest = hashlib.blake2b(digest_size=8)
    for leaf in jax.tree.leaves(tree):
        digest.update(np.ascontiguousarray(leaf).data)
    return digest.hexdigest()
