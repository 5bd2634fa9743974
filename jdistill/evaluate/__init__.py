"""One call that measures a whole stack of trained networks: accuracy, sensitivities, attacks.

A stack is a `logits_fn` pytree whose leaves have a leading axis `R` (`jdistill.nets.stack`): the
students of several temperatures, seeds or generations of one architecture. On accelerators the
stack is evaluated under `vmap`; on CPU, where a convolution with batched weights is far slower
than single ones, by a host loop through one compiled function. The numbers are the same.

Memory is bounded by `batch_size`: the functions are host loops over chunks of examples, and are
not themselves to be put under `jit` or `vmap`. With `shards` they can be stopped and go on, and
several hosts share the work.

`evaluate` does it all; its parts are public: `clean`, `under_attack`, `distances`,
`transfer_matrix`; and what needs no further run: `worst_case`, `accuracy_against_eps`,
`accuracy_against_steps`, `accuracy_against_queries`. `agreement` compares a student with its
teacher.
"""

from jdistill.evaluate._agreement import Agreement, agreement
from jdistill.evaluate._attack import (
    AttackOutcome,
    AttackPlan,
    summarize,
    under_attack,
)
from jdistill.evaluate._clean import CleanMeasures, clean
from jdistill.evaluate._curves import (
    Curve,
    accuracy_against_eps,
    accuracy_against_queries,
    accuracy_against_steps,
    worst_case,
)
from jdistill.evaluate._distances import distance_plans, distances
from jdistill.evaluate._evaluate import Budget, Evaluation, evaluate
from jdistill.evaluate._transfer import TransferMatrix, transfer_matrix

__all__ = [
    "Agreement",
    "AttackOutcome",
    "AttackPlan",
    "Budget",
    "CleanMeasures",
    "Curve",
    "Evaluation",
    "TransferMatrix",
    "accuracy_against_eps",
    "accuracy_against_queries",
    "accuracy_against_steps",
    "agreement",
    "clean",
    "distance_plans",
    "distances",
    "evaluate",
    "summarize",
    "transfer_matrix",
    "under_attack",
    "worst_case",
]
