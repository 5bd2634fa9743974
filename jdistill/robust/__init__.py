"""Adversarial training and robust distillation: students that withstand attacks.

`adversarial(attack)` is an objective for `train.make_train_step`: each step crafts adversarial
inputs against the student as it is, and gives its loss the logits on both. The losses here take
these `Outputs`, and say what the attack climbs; any other loss sees the clean logits alone.

* From labels: `on_adversarial(train.hard_loss)` (PGD-AT; fast adversarial training with one step
  from a random start), `trades_loss`, `mart_loss`; `adversarial(..., weight_perturbation=)` adds
  AWP to any.
* From a teacher: `ard_loss`, `iad_loss`, `rslad_loss`, `adaad_loss`, `igdm_loss`, `saad_loss`,
  `low_temperature_loss`, and from a clean and a robust one `two_teachers_loss`. They are
  `(T, teacher) -> loss_fn`, the loss of a generation with `online=True`: with assistants between,
  in `distill.chain`, `sweep.chain` and studies, as any other.
"""

from jdistill.robust._from_teacher import (
    adaad_loss,
    ard_loss,
    iad_loss,
    low_temperature_loss,
    rslad_loss,
)
from jdistill.robust._gradients import igdm_loss, saad_loss
from jdistill.robust._losses import on_adversarial
from jdistill.robust._objective import Outputs, adversarial
from jdistill.robust._training import mart_loss, trades_loss
from jdistill.robust._two_teachers import two_teachers_loss

__all__ = [
    "Outputs",
    "adaad_loss",
    "adversarial",
    "ard_loss",
    "iad_loss",
    "igdm_loss",
    "low_temperature_loss",
    "mart_loss",
    "on_adversarial",
    "rslad_loss",
    "saad_loss",
    "trades_loss",
    "two_teachers_loss",
]
