"""Attacks as pure functions: `(logits_fn, key, inputs, labels, *, …) -> AttackResult`.

The contract of every attack:

* `inputs [B, ...]` are floats inside `bounds`; `labels [B]` are always the true classes; with
  `targets [B]`, none of which may be the label, success means that the prediction is the target.
* What can be checked is checked when the attack is called, and an error says what was expected.
  Shapes, types and static arguments always are. Values under a tracer cannot be: there an input
  that is NaN or outside the box, a setting out of its range, or a target that is the label gives
  a result that means nothing for that example (a NaN is never a success), and leaves the others
  alone.
* `logits_fn` is a pytree that carries its weights (`jdistill.nets.logits_fn`), so that new
  weights, a new `eps` or a new temperature compile nothing. A plain function works as well.
* Success: the best other logit is strictly above the true class's (targeted: the target's is
  strictly above all others), and every logit is finite. It is checked again by a forward pass on
  the returned inputs. An example that already succeeds is returned unchanged, at distance 0
  after one query. Clean logits that are not finite count as misclassified: for an untargeted
  attack that is a success already, for a targeted one it is none, and the search begins there.
* Every example stands alone: its randomness comes from its own key (`fold_in(key, index)`, or the
  `[B]` keys given), and no sum over the batch decides anything. Between batches of different sizes
  only rounding differs, where the network's own does (a matrix product may add in another order).
  An empty batch gives an empty result, where the `logits_fn` itself takes one.
* Matrix products run at full float32 precision unless `jax_default_matmul_precision` is set.

Three are drivers, loops on the host that refuse tracers: `ensemble` (the worst case over attacks),
`autoattack` (the standard one), and `universal` (one perturbation for all inputs, the exception to
"stands alone"). The first two can be stopped and go on from their state. `expectation` and `bpda`
make a `logits_fn` of a defense that is random or not differentiable; `transfer` judges on one
network what an attack crafted on another.
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
    "softmax",
    "softmax_at",
    "spatial",
    "spsa",
    "square",
    "traits",
    "transfer",
    "universal",
]
