"""Measures of a network and of an attack's result, and their intervals and tests.

The two sensitivities are different quantities, and both papers call theirs "sensitivity":

* `sensitivity_logits`: mean ``|∂(sum of the logits)/∂x|``, what Mandal & Gao's released code
  computes. It grows with the scale of the logits, so it grows with the training temperature.
* `log10_sensitivity_softmax`: mean ``|∂ softmax(z)_k/∂x_d|``, Papernot et al.'s. On most examples
  it collapses with the training temperature, to below 1e-40 and far beyond the range of float32:
  gradient masking.

Statistics come in three kinds: over examples (`proportion`, a Wilson interval), over the same
examples under two networks (`paired`, McNemar's test), and over seeds (`seed_interval` and
`paired_over_seeds`, Student's t).
"""

from jdistill.metrics._agreement import linear_cka, top1_agreement
from jdistill.metrics._calibration import Calibration, calibration
from jdistill.metrics._comparison import Comparison, paired, paired_over_seeds, seed_interval
from jdistill.metrics._sensitivity import (
    SENSITIVITY_EDGES,
    Histogram,
    log10_mean,
    log10_sensitivity_softmax,
    sensitivity_histogram,
    sensitivity_logits,
    zero_gradient,
)
from jdistill.metrics._shares import (
    Interval,
    Robustness,
    WorstCase,
    accuracy,
    correct,
    predicts,
    proportion,
    robustness,
    worst_case,
)

__all__ = [
    "SENSITIVITY_EDGES",
    "Calibration",
    "Comparison",
    "Histogram",
    "Interval",
    "Robustness",
    "WorstCase",
    "accuracy",
    "calibration",
    "correct",
    "linear_cka",
    "log10_mean",
    "log10_sensitivity_softmax",
    "paired",
    "paired_over_seeds",
    "predicts",
    "proportion",
    "robustness",
    "seed_interval",
    "sensitivity_histogram",
    "sensitivity_logits",
    "top1_agreement",
    "worst_case",
    "zero_gradient",
]
