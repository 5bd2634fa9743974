"""Defensive distillation through teacher assistants.

A chain is generations 0, 1, 2, …: the teacher learns from hard labels at temperature `T`; every
later generation learns from `softmax(z / T)` of the one before, at the same `T`; all are tested
at `T = 1`. The student of `n` assistants is generation `n + 1`, so every chain contains the
shorter ones: generation 1 is the student of plain defensive distillation.

Generations of equal size give the chain of Mandal & Gao 2023; shrinking ones with a hard-label
weight and the factor `T²` give the teacher assistants of Mirzadeh et al. 2020 (TAKD).
"""

from jdistill.distill._chain import Generation, chain, initial_weights, stage_name
from jdistill.distill._feature_losses import feature_loss, relation_loss
from jdistill.distill._labels import soft_labels
from jdistill.distill._lessons import annealed
from jdistill.distill._logit_losses import decoupled_loss, dist_loss
from jdistill.distill._losses import (
    hard_label_loss,
    online,
    online_loss,
    soft_loss,
    standardized_loss,
    through_token,
)
from jdistill.distill._several import Several, together
from jdistill.distill._several_losses import confidence_weights, several_teachers_loss

__all__ = [
    "Generation",
    "Several",
    "annealed",
    "chain",
    "confidence_weights",
    "decoupled_loss",
    "dist_loss",
    "feature_loss",
    "hard_label_loss",
    "initial_weights",
    "online",
    "online_loss",
    "relation_loss",
    "several_teachers_loss",
    "soft_labels",
    "soft_loss",
    "stage_name",
    "standardized_loss",
    "through_token",
    "together",
]
