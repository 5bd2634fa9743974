"""Robust distillation: students that learn from adversarial examples as well as from clean ones.

`adversarial(attack)` is an objective for `train.make_train_step`: each step crafts adversarial
inputs against the student as it is, and gives its loss the logits on both. The losses here take
these `Outputs`; any other loss sees the clean logits alone.
"""

from jdistill.robust._losses import on_adversarial, two_teachers_loss
from jdistill.robust._objective import Outputs, adversarial

__all__ = [
    "Outputs",
    "adversarial",
    "on_adversarial",
    "two_teachers_loss",
]
