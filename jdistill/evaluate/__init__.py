"""One call that measures a whole stack of trained networks: accuracy, sensitivities, attacks.

A stack is a `logits_fn` pytree whose leaves have a leading axis `R` (`jdistill.nets.stack`): the
students of several temperatures, seeds or generations of one architecture. On accelerators the
stack is evaluated under `vmap`; on CPU, where a convolution with batched weights is far slower
than single ones, by a host loop through one compiled function. The numbers are the same.

Memory is bounded by `batch_size`: the functions are host loops over chunks of examples, and are
not themselves to be put under `jit` or `vmap`.
"""

from jdistill.evaluate._attack import AttackOutcome, AttackPlan, summarize, under_attack
from jdistill.evaluate._clean import CleanMeasures, clean
from jdistill.evaluate._evaluate import Evaluation, evaluate

__all__ = [
    "AttackOutcome",
    "AttackPlan",
    "CleanMeasures",
    "Evaluation",
    "clean",
    "evaluate",
    "summarize",
    "under_attack",
]
