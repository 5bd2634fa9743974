"""Attacks of other toolkits beside ours, at one budget.

What `experiments.bench` times and what the parity tests judge. Everything of PyTorch is imported
where it is used; `make parity` installs it all.
"""

import functools
import importlib.metadata
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jdistill import attacks
from jdistill.typing import Array, Norm

# (model, inputs [B, C, H, W] in [0, 1], labels [B]) -> what it found, of the inputs' shape
Peer = Callable[[Any, Any, Any], Any]

# The toolkits: the module to import, and the package that has the version.
TOOLKITS = {
    "torchattacks": ("torchattacks", "torchattacks"),
    "foolbox": ("foolbox", "foolbox"),
    "adv-lib": ("adv_lib", "adv-lib"),
    "ART": ("art", "adversarial-robustness-toolbox"),
    "pyautoattack": ("pyautoattack", "pyautoattack"),
}


class Comparison(NamedTuple):
    """Comparison of one attack, ours and theirs, at one budget.

    Attributes:
        attack: our name for it.
        norm: of its distances.
        budget: in words.
        ours: `(logits_fn, key, inputs, labels) -> AttackResult`.
        peers: by toolkit.
        targeted: whether only the next class will do.
        num_images: of its own, where others would mean little or take too long, and it is timed
            once; None: as many as the others.
    """

    attack: str
    norm: Norm
    budget: str
    ours: Callable[..., attacks.AttackResult]
    peers: Mapping[str, Peer]
    targeted: bool = False
    num_images: int | None = None


def versions() -> dict[str, str]:
    """Versions of PyTorch and of the toolkits that are installed."""
    found = {}
    for package in ("torch", *(package for _, package in TOOLKITS.values())):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def next_class(labels: Any) -> Any:
    """Target of an example, of ten classes."""
    return (labels + 1) % 10


def fgsm(eps: float) -> Comparison:
    """One step of the sign of the gradient."""
    toolkits = {
        "torchattacks": _torchattacks("FGSM", eps=eps),
        "foolbox": _foolbox("LinfFastGradientAttack", eps),
    }
    return Comparison(
        "fgsm", "linf", f"eps {eps:g}", functools.partial(attacks.fgsm, eps=eps), toolkits
    )


def bim(eps: float, steps: int) -> Comparison:
    """Iterated FGSM."""
    return _iterated(attacks.bim, "linf", eps, steps, "BIM", "LinfBasicIterativeAttack")


def mim(eps: float, steps: int) -> Comparison:
    """Iterated FGSM with momentum."""
    foolbox = "LinfMomentumIterativeFastGradientMethod"
    return _iterated(attacks.mim, "linf", eps, steps, "MIFGSM", foolbox)


def pgd(norm: Norm, eps: float, steps: int) -> Comparison:
    """Projected gradient descent from the image itself, so that all make the same steps."""
    names = {"linf": ("PGD", "LinfPGD"), "l2": ("PGDL2", "L2PGD")}[norm]
    ours = functools.partial(attacks.pgd, norm=norm, random_start=False)
    return _iterated(ours, norm, eps, steps, *names, random_start=False)


def _iterated(
    ours: Any, norm: Norm, eps: float, steps: int, torchattacks: str, foolbox: str, **settings: Any
) -> Comparison:
    rate = eps / 10
    attack = functools.partial(ours, eps=eps, num_steps=steps, step_size=rate)
    settings |= {"steps": steps}
    toolkits = {
        "torchattacks": _torchattacks(torchattacks, eps=eps, alpha=rate, **settings),
        "foolbox": _foolbox(foolbox, eps, abs_stepsize=rate, rel_stepsize=None, **settings),
    }
    budget = f"eps {eps:g}, {steps} steps"
    return Comparison(attacks.traits(attack).name, norm, budget, attack, toolkits)


def carlini_wagner_l2(
    searches: int, steps: int, rate: float, const: float, num_images: int | None = None
) -> Comparison:
    """Carlini & Wagner's L2 attack."""
    ours = functools.partial(
        attacks.carlini_wagner_l2,
        num_searches=searches,
        num_steps=steps,
        learning_rate=rate,
        initial_const=const,
    )
    common: dict[str, Any] = {"binary_search_steps": searches, "initial_const": const}
    foolbox = _foolbox("L2CarliniWagnerAttack", None, steps=steps, stepsize=rate, **common)
    adv_lib = _adv_lib("carlini_wagner_l2", max_iterations=steps, learning_rate=rate, **common)
    toolkits = {"foolbox": foolbox, "adv-lib": adv_lib}
    budget = f"{searches} × {steps} steps"
    return Comparison("carlini_wagner_l2", "l2", budget, ours, toolkits, num_images=num_images)


def carlini_wagner_l0(searches: int, steps: int, rate: float, const: float) -> Comparison:
    """Carlini & Wagner's L0 attack; ART's rounds search the constant, ours double it."""
    common: dict[str, Any] = {"learning_rate": rate, "initial_const": const}
    ours = functools.partial(
        attacks.carlini_wagner_l0, num_steps=steps, const_factor=10.0, **common
    )
    art = _art(
        "CarliniL0Method",
        binary_search_steps=searches,
        max_iter=steps,
        batch_size=100,
        **common,
    )
    return Comparison("carlini_wagner_l0", "l0", f"{steps} steps a constant", ours, {"ART": art})


def carlini_wagner_linf(steps: int, rate: float, const: float, factor: float) -> Comparison:
    """Carlini & Wagner's Linf attack."""
    common: dict[str, Any] = {
        "learning_rate": rate,
        "initial_const": const,
        "largest_const": 20.0,
        "const_factor": factor,
    }
    ours = functools.partial(attacks.carlini_wagner_linf, num_steps=steps, **common)
    toolkits = {
        "ART": _art("CarliniLInfMethod", max_iter=steps, batch_size=100, **common),
        "adv-lib": _adv_lib("carlini_wagner_linf", max_iterations=steps, **common),
    }
    return Comparison("carlini_wagner_linf", "linf", f"{steps} steps a constant", ours, toolkits)


def ead(searches: int, steps: int, rate: float, const: float, beta: float) -> Comparison:
    """Elastic-net attack, keeping the smallest l1 norm."""
    # To the end of every search: others give one up by their sum over the batch, ours by example.
    common: dict[str, Any] = {"initial_const": const, "abort_early": False}
    ours = functools.partial(
        attacks.ead,
        num_searches=searches,
        num_steps=steps,
        learning_rate=rate,
        beta=beta,
        **common,
    )
    common |= {"binary_search_steps": searches}
    settings: dict[str, Any] = {"steps": steps, "initial_stepsize": rate, "regularization": beta}
    toolkits = {
        "foolbox": _foolbox("EADAttack", None, decision_rule="L1", **settings, **common),
        "torchattacks": _torchattacks("EADL1", max_iterations=steps, lr=rate, beta=beta, **common),
    }
    return Comparison("ead", "l1", f"{searches} × {steps} steps", ours, toolkits)


def ddn(steps: int) -> Comparison:
    """Decoupled direction and norm."""
    toolkits = {
        "foolbox": _foolbox("DDNAttack", None, steps=steps),
        "adv-lib": _adv_lib("ddn", steps=steps, levels=None),
    }
    ours = functools.partial(attacks.ddn, num_steps=steps)
    return Comparison("ddn", "l2", f"{steps} steps", ours, toolkits)


def fmn(norm: Norm, steps: int) -> Comparison:
    """Fast minimum norm."""
    name = {"l0": "L0", "l1": "L1", "l2": "L2", "linf": "LInf"}[norm]
    order = {"l0": 0, "l1": 1, "l2": 2, "linf": float("inf")}[norm]
    toolkits = {
        "foolbox": _foolbox(f"{name}FMNAttack", None, steps=steps),
        "adv-lib": _adv_lib("fmn", norm=order, steps=steps),
    }
    ours = functools.partial(attacks.fmn, norm=norm, num_steps=steps)
    return Comparison("fmn", norm, f"{steps} steps", ours, toolkits)


def deepfool(norm: Norm, steps: int) -> Comparison:
    """DeepFool over all ten classes."""
    name, order = {"l2": ("L2", 2), "linf": ("Linf", float("inf"))}[norm]
    # torchattacks's takes minutes for 100 images, one after another, and gives up on half.
    toolkits = {
        "foolbox": _foolbox(f"{name}DeepFoolAttack", None, steps=steps),
        "adv-lib": _adv_lib("df", norm=order, steps=steps, return_unsuccessful=True),
    }
    ours = functools.partial(attacks.deepfool, norm=norm, num_steps=steps)
    return Comparison("deepfool", norm, f"{steps} steps", ours, toolkits)


def autoattack(eps: float, num_images: int) -> Comparison:
    """Standard AutoAttack, all of it."""

    def theirs(model: Any, inputs: Any, labels: Any) -> Any:
        from pyautoattack import AutoAttack

        attack = AutoAttack(model, norm="Linf", eps=eps, version="standard", device="cpu", seed=0)
        attack.verbose = False
        found, _ = attack.run_standard_evaluation(inputs, labels, batch_size=len(labels))
        return found.detach()

    ours = functools.partial(attacks.autoattack, eps=eps, batch_size=num_images)
    toolkits = {"pyautoattack": theirs}
    budget = f"eps {eps:g}, standard, {num_images} images"
    return Comparison("autoattack", "linf", budget, ours, toolkits, num_images=num_images)


def jsma(features: int) -> Comparison:
    """Saliency map attack on the logits, towards the next class, as ART and torchattacks do."""

    def ours(logits_fn: Any, key: Array | None, inputs: Any, labels: Any) -> attacks.AttackResult:
        settings: dict[str, Any] = {"max_features": features, "output": jnp.positive}
        targets = next_class(jnp.asarray(labels))
        return attacks.jsma(logits_fn, key, inputs, labels, targets=targets, **settings)

    def art(model: Any, inputs: Any, labels: Any) -> Any:
        share = features / inputs[0].numel()
        attack = _art("SaliencyMapMethod", theta=1.0, gamma=share, batch_size=len(labels))
        return attack(model, inputs, next_class(labels))

    def torchattacks(model: Any, inputs: Any, labels: Any) -> Any:
        import torchattacks

        share = features / inputs[0].numel()
        attack = torchattacks.JSMA(model, theta=1.0, gamma=share)
        attack.set_mode_targeted_by_function(lambda images, labels: next_class(labels))
        return attack(inputs, labels)

    toolkits = {"ART": art, "torchattacks": torchattacks}
    return Comparison("jsma", "l0", f"{features} features", ours, toolkits, targeted=True)


def _torchattacks(name: str, **settings: Any) -> Peer:
    def run(model: Any, inputs: Any, labels: Any) -> Any:
        import torchattacks

        return getattr(torchattacks, name)(model, **settings)(inputs, labels)

    return run


def _foolbox(name: str, eps: float | None, **settings: Any) -> Peer:
    def run(model: Any, inputs: Any, labels: Any) -> Any:
        import foolbox

        bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        attack = getattr(foolbox.attacks, name)(**settings)
        _, found, _ = attack(bounded, inputs, labels, epsilons=eps)
        return found

    return run


def _adv_lib(name: str, **settings: Any) -> Peer:
    def run(model: Any, inputs: Any, labels: Any) -> Any:
        # Its loggers and perceptual distances, unused here, want two more packages.
        for package in ("torchvision", "torchvision.models", "visdom"):
            sys.modules.setdefault(package, types.ModuleType(package))
        if not hasattr(sys.modules["torchvision"], "models"):
            sys.modules["torchvision"].models = sys.modules["torchvision.models"]  # type: ignore
        import adv_lib.attacks

        return getattr(adv_lib.attacks, name)(model, inputs, labels, **settings).detach()

    return run


def _art(name: str, **settings: Any) -> Peer:
    def run(model: Any, inputs: Any, labels: Any) -> Any:
        import art.attacks.evasion
        import torch
        from art.estimators.classification import PyTorchClassifier

        num_classes = model(inputs[:1]).shape[1]
        classifier = PyTorchClassifier(
            model=model,
            loss=torch.nn.CrossEntropyLoss(),
            input_shape=tuple(inputs.shape[1:]),
            nb_classes=num_classes,
            clip_values=(0.0, 1.0),
            device_type="cpu",
        )
        attack = getattr(art.attacks.evasion, name)(classifier, verbose=False, **settings)
        one_hot = np.eye(num_classes, dtype=np.float32)[labels.numpy()]
        found = attack.generate(x=inputs.numpy(), y=one_hot)
        return torch.tensor(found.astype(np.float32))  # some of its attacks return float64

    return run
