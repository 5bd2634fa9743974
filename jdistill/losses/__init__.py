"""Losses, one value per example: `(logits [B, K], …) -> [B]`. The mean is the caller's.

Training minimizes them; attacks maximize them (and minimize them towards a target class).
The temperature divides the logits: `softmax(z / T)`, and may be traced. A class whose logit is
`-inf` is masked out: the losses are those of the other classes alone.

`hint`, `attention_transfer`, and `relation_kl` are of features and not of logits. One loss is of a
whole batch, `intra_class_distance`.
"""

from jdistill.losses._classification import (
    cross_entropy,
    dlr,
    largest_other,
    margin,
    soft_cross_entropy,
    soft_margin,
    targeted_dlr,
    tempered_log_softmax,
)
from jdistill.losses._distillation import (
    decoupled_kl,
    inter_class_distance,
    intra_class_distance,
    pearson_distance,
)
from jdistill.losses._features import attention_transfer, hint, relation_kl
from jdistill.losses._soft import kl_divergence, standardize, standardized_kl

__all__ = [
    "attention_transfer",
    "cross_entropy",
    "decoupled_kl",
    "dlr",
    "hint",
    "inter_class_distance",
    "intra_class_distance",
    "kl_divergence",
    "largest_other",
    "margin",
    "pearson_distance",
    "relation_kl",
    "soft_cross_entropy",
    "soft_margin",
    "standardize",
    "standardized_kl",
    "targeted_dlr",
    "tempered_log_softmax",
]
