"""Training: one immutable state, one pure step, one host loop.

The step is compiled once an architecture: the temperature, the loss's weights and the learning
rate are data (`LossFn` is a pytree; optimizers made with `optax.inject_hyperparams` keep their
numbers in the state), so every generation at every temperature reuses it.
"""

from jdistill.train._augment import ShiftAndFlip
from jdistill.train._fit import fit, predict
from jdistill.train._mixup import mixup
from jdistill.train._optimizer import sgd
from jdistill.train._step import (
    EvalStep,
    TrainState,
    TrainStep,
    create_state,
    hard_loss,
    logits_fn,
    make_eval_step,
    make_train_step,
    outputs_fn,
)

__all__ = [
    "EvalStep",
    "ShiftAndFlip",
    "TrainState",
    "TrainStep",
    "create_state",
    "fit",
    "hard_loss",
    "logits_fn",
    "make_eval_step",
    "make_train_step",
    "mixup",
    "outputs_fn",
    "predict",
    "sgd",
]
