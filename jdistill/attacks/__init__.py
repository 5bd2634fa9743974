"""Attacks as pure functions: `(logits_fn, key, inputs, labels, *, …) -> AttackResult`.

The contract of every attack:

* `inputs [B, ...]` are floats inside `bounds=(low, high)`, the box of valid inputs: two numbers, or
  arrays that broadcast against one input, so that each feature has ends of its own. They may be
  infinite for an attack that needs no box (PGD and its kin, APGD, DeepFool, FAB, DDN, FMN, JSMA,
  Square, SPSA, NES); settings that default to a share of the box's width must then be given. With
  ends per feature that width is the smallest one. `labels [B]` are always the true classes; with
  `targets [B]`, none of which may be the label, success means that the prediction is the target.
* What can be checked is checked when the attack is called, and an error says what was expected.
  Shapes, types and static arguments always are. Values under a tracer cannot be: there an input
  that is NaN or outside the box, a setting out of its range, or a target that is the label gives
  a result that means nothing for that example (a NaN is never a success), and leaves the others
  alone.
* `logits_fn` is a pytree that carries its weights (`jdistill.nets.logits_fn`), so that new
  weights, a new `eps` or a new temperature compile nothing. A plain function works as well.
* Success: the best other logit is strictly above the true class's (targeted: the target's is
  strictly above all others), and the logits are a prediction (`metrics.predicts`: no NaN, a finite
  maximum; `-inf` masks a class out). It is checked again by a forward pass on the returned inputs.
* A clean example is wrong where `metrics.correct` says so, which is what accuracy counts: `argmax`
  is another class, ties included, or the logits are no prediction. It is returned unchanged, a
  success at distance 0 after one query, so robust accuracy is never above accuracy. A targeted
  attack begins there unless the prediction is the target.
* Every example stands alone: its randomness comes from its own key (`fold_in(key, index)`, or the
  `[B]` keys given), and no sum over the batch decides anything. A number that can differ by example
  is a scalar or `[B]`. Between batches of different sizes only rounding differs, where the
  network's own does (a matrix product may add in another order). An empty batch gives an empty
  result, where the `logits_fn` itself takes one.
* Examples that are done stop costing: an attack that may take 50 steps or more, and ends at a
  different time for each example, goes on in half as many rows when half of its examples are done,
  and so on while that is worth a compilation. So a `logits_fn`, a loss, and whatever else an
  attack calls must not hold arrays `[B, ...]` (but see `maximize`).
* Matrix products run at full float32 precision unless `jax_default_matmul_precision` is set.

Every result says in `info` how the search went:

* `first_success [B]` int32, the number of the first point judged a success: -1 never, 0 the clean
  input, `k >= 1` the k-th point after it, over all restarts and searches.
* `gradients [B]` int32, backward passes spent, as `queries` are the forward passes. `cost` says
  how many an attack can spend at most.
* with `trace=True`, `trace [B, events]`: a value of every point judged, which the attack's
  docstring names; NaN once an example is done.

`step_size` is always the length of a step in input units, and `decay` the share of the accumulated
direction that is kept. `init [B, ...]`, wherever an attack starts from a point, is the first start.

Three are drivers, loops on the host that refuse tracers: `ensemble` (the worst case over attacks),
`autoattack` (the standard one), and `universal` (one perturbation for all inputs, the exception to
"stands alone"). The first two can be stopped, inside a batch as well, and go on from their state.
`expectation` and `bpda` make a `logits_fn` of a defense that is random or not differentiable;
`transfer` judges on one network what an attack crafted on another; `maximize` is the inner loop of
adversarial training. `traits` reads the facts of an attack off its function.
"""

from jdistill.attacks._apgd import apgd, apgd_targeted
from jdistill.attacks._autoattack import autoattack, autoattack_names
from jdistill.attacks._boundary import boundary
from jdistill.attacks._carlini_wagner_l0 import carlini_wagner_l0
from jdistill.attacks._carlini_wagner_l2 import carlini_wagner_l2
from jdistill.attacks._carlini_wagner_linf import carlini_wagner_linf
from jdistill.attacks._core.driver import EnsembleState
from jdistill.attacks._core.engine import Passes
from jdistill.attacks._core.problem import AttackResult
from jdistill.attacks._core.traits import Traits, traits
from jdistill.attacks._cost import cost
from jdistill.attacks._ddn import ddn
from jdistill.attacks._deepfool import deepfool
from jdistill.attacks._ead import ead
from jdistill.attacks._ensemble import ensemble
from jdistill.attacks._estimated import nes, spsa
from jdistill.attacks._fab import fab, fab_targeted
from jdistill.attacks._fgsm import fgsm
from jdistill.attacks._fmn import fmn
from jdistill.attacks._hop_skip_jump import hop_skip_jump
from jdistill.attacks._jsma import jsma, softmax, softmax_at
from jdistill.attacks._maximize import maximize
from jdistill.attacks._pgd import bim, mim, pgd
from jdistill.attacks._sigma_zero import sigma_zero
from jdistill.attacks._spatial import spatial
from jdistill.attacks._square import square
from jdistill.attacks._transfer import transfer
from jdistill.attacks._universal import universal
from jdistill.attacks._wrappers import bpda, expectation

__all__ = [
    "AttackResult",
    "EnsembleState",
    "Passes",
    "Traits",
    "apgd",
    "apgd_targeted",
    "autoattack",
    "autoattack_names",
    "bim",
    "boundary",
    "bpda",
    "carlini_wagner_l0",
    "carlini_wagner_l2",
    "carlini_wagner_linf",
    "cost",
    "ddn",
    "deepfool",
    "ead",
    "ensemble",
    "expectation",
    "fab",
    "fab_targeted",
    "fgsm",
    "fmn",
    "hop_skip_jump",
    "jsma",
    "maximize",
    "mim",
    "nes",
    "pgd",
    "sigma_zero",
    "softmax",
    "softmax_at",
    "spatial",
    "spsa",
    "square",
    "traits",
    "transfer",
    "universal",
]
