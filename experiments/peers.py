"""The attacks of other toolkits beside ours: the same network, images and budget.

What `experiments.bench` times and what the parity tests judge. Everything of PyTorch is imported
where it is used; `make parity` installs it all.
"""

import functools
import sys
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jdistill import attacks
from jdistill.typing import Array

# (model, inputs [B, C, H, W] in [0, 1], labels [B]) -> what it found, of the inputs' shape
Peer = Callable[[Any, Any, Any], Any]


class Comparison(NamedTuple):
    """One attack, ours and theirs, at one budget.

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
    norm: str
    budget: str
    ours: Callable[..., attacks.AttackResult]
    peers: Mapping[str, Peer]
    targeted: bool = False
    num_images: int | None = None


def fgsm(eps: float) -> Comparison:
    """One step of the sign of the gradient."""
    return Comparison(
        "fgsm",
        "linf",
        f"eps {eps:g}",
        functools.partial(attacks.fgsm, eps=eps),
        {
            "torchattacks": _torchattacks("FGSM", eps=eps),
            "foolbox": _foolbox("LinfFastGradientAttack", eps),
        },
    )


def bim(eps: float, steps: int) -> Comparison:
    """Iterated FGSM."""
    return _iterated("bim", attacks.bim, "BIM", "LinfBasicIterativeAttack", eps, steps)


def mim(eps: float, steps: int) -> Comparison:
    """Iterated FGSM with momentum."""
    foolbox = "LinfMomentumIterativeFastGradientMethod"
    return _iterated("mim", attacks.mim, "MIFGSM", foolbox, eps, steps)


def _iterated(
    name: str, ours: Callable[..., Any], torchattacks: str, foolbox: str, eps: float, steps: int
) -> Comparison:
    rate = eps / 10
    return Comparison(
        name,
        "linf",
        f"eps {eps:g}, {steps} steps",
        functools.partial(ours, eps=eps, num_steps=steps, step_size=rate),
        {
            "torchattacks": _torchattacks(torchattacks, eps=eps, alpha=rate, steps=steps),
            "foolbox": _foolbox(foolbox, eps, abs_stepsize=rate, rel_stepsize=None, steps=steps),
        },
    )


def pgd(norm: str, eps: float, steps: int) -> Comparison:
    """Projected gradient descent from the image itself, so that all make the same steps."""
    rate = eps / 10
    name = {"linf": "LinfPGD", "l2": "L2PGD"}[norm]
    settings: dict[str, Any] = {"steps": steps, "random_start": False}
    return Comparison(
        "pgd",
        norm,
        f"eps {eps:g}, {steps} steps",
        functools.partial(
            attacks.pgd, norm=norm, eps=eps, num_steps=steps, step_size=rate, random_start=False
        ),
        {
            "torchattacks": _torchattacks(
                {"linf": "PGD", "l2": "PGDL2"}[norm], eps=eps, alpha=rate, **settings
            ),
            "foolbox": _foolbox(name, eps, abs_stepsize=rate, rel_stepsize=None, **settings),
        },
    )


def carlini_wagner_l2(
    searches: int, steps: int, rate: float, const: float, num_images: int | None = None
) -> Comparison:
    """Carlini & Wagner's L2 attack."""
    return Comparison(
        "carlini_wagner_l2",
        "l2",
        f"{searches} × {steps} steps",
        functools.partial(
            attacks.carlini_wagner_l2,
            num_searches=searches,
            num_steps=steps,
            learning_rate=rate,
            initial_const=const,
        ),
        {
            "foolbox": _foolbox(
                "L2CarliniWagnerAttack",
                None,
                binary_search_steps=searches,
                steps=steps,
                stepsize=rate,
                initial_const=const,
            ),
            "adv-lib": _adv_lib(
                "carlini_wagner_l2",
                binary_search_steps=searches,
                max_iterations=steps,
                learning_rate=rate,
                initial_const=const,
            ),
        },
        num_images=num_images,
    )


def carlini_wagner_l0(searches: int, steps: int, rate: float, const: float) -> Comparison:
    """Carlini & Wagner's L0 attack; ART's rounds search the constant, ours double it."""
    return Comparison(
        "carlini_wagner_l0",
        "l0",
        f"{steps} steps a constant",
        functools.partial(
            attacks.carlini_wagner_l0,
            num_steps=steps,
            learning_rate=rate,
            initial_const=const,
            const_factor=10.0,
        ),
        {
            "ART": _art(
                "CarliniL0Method",
                binary_search_steps=searches,
                max_iter=steps,
                learning_rate=rate,
                initial_const=const,
                batch_size=100,
            )
        },
    )


def carlini_wagner_linf(steps: int, rate: float, const: float, factor: float) -> Comparison:
    """Carlini & Wagner's Linf attack."""
    schedule: dict[str, Any] = {
        "initial_const": const,
        "largest_const": 20.0,
        "const_factor": factor,
    }
    return Comparison(
        "carlini_wagner_linf",
        "linf",
        f"{steps} steps a constant",
        functools.partial(
            attacks.carlini_wagner_linf, num_steps=steps, learning_rate=rate, **schedule
        ),
        {
            "ART": _art(
                "CarliniLInfMethod", max_iter=steps, learning_rate=rate, batch_size=100, **schedule
            ),
            "adv-lib": _adv_lib(
                "carlini_wagner_linf", max_iterations=steps, learning_rate=rate, **schedule
            ),
        },
    )


def ead(searches: int, steps: int, rate: float, const: float, beta: float) -> Comparison:
    """The elastic-net attack, keeping the smallest l1 norm."""
    # To the end of every search: others give one up by their sum over the batch, ours by example.
    common: dict[str, Any] = {
        "binary_search_steps": searches,
        "initial_const": const,
        "abort_early": False,
    }
    return Comparison(
        "ead",
        "l1",
        f"{searches} × {steps} steps",
        functools.partial(
            attacks.ead,
            num_searches=searches,
            num_steps=steps,
            learning_rate=rate,
            initial_const=const,
            beta=beta,
            abort_early=False,
        ),
        {
            "foolbox": _foolbox(
                "EADAttack",
                None,
                steps=steps,
                initial_stepsize=rate,
                regularization=beta,
                decision_rule="L1",
                **common,
            ),
            "torchattacks": _torchattacks(
                "EADL1", max_iterations=steps, lr=rate, beta=beta, **common
            ),
        },
    )


def ddn(steps: int) -> Comparison:
    """Decoupled direction and norm."""
    return Comparison(
        "ddn",
        "l2",
        f"{steps} steps",
        functools.partial(attacks.ddn, num_steps=steps),
        {
            "foolbox": _foolbox("DDNAttack", None, steps=steps),
            "adv-lib": _adv_lib("ddn", steps=steps, levels=None),
        },
    )


def fmn(norm: str, steps: int) -> Comparison:
    """Fast minimum norm."""
    name = {"l0": "L0", "l1": "L1", "l2": "L2", "linf": "LInf"}[norm]
    order = {"l0": 0, "l1": 1, "l2": 2, "linf": float("inf")}[norm]
    return Comparison(
        "fmn",
        norm,
        f"{steps} steps",
        functools.partial(attacks.fmn, norm=norm, num_steps=steps),
        {
            "foolbox": _foolbox(f"{name}FMNAttack", None, steps=steps),
            "adv-lib": _adv_lib("fmn", norm=order, steps=steps),
        },
    )


def deepfool(norm: str, steps: int) -> Comparison:
    """DeepFool over all ten classes."""
    name, order = {"l2": ("L2", 2), "linf": ("Linf", float("inf"))}[norm]
    return Comparison(
        "deepfool",
        norm,
        f"{steps} steps",
        functools.partial(attacks.deepfool, norm=norm, num_steps=steps),
        # torchattacks's takes minutes for 100 images, one after another, and gives up on half.
        {
            "foolbox": _foolbox(f"{name}DeepFoolAttack", None, steps=steps),
            "adv-lib": _adv_lib("df", norm=order, steps=steps, return_unsuccessful=True),
        },
    )


def autoattack(eps: float, num_images: int) -> Comparison:
    """The whole standard ensemble."""

    def theirs(model: Any, inputs: Any, labels: Any) -> Any:
        from pyautoattack import AutoAttack

        attack = AutoAttack(model, norm="Linf", eps=eps, version="standard", device="cpu", seed=0)
        attack.verbose = False
        found, _ = attack.run_standard_evaluation(inputs, labels, batch_size=len(labels))
        return found.detach()

    return Comparison(
        "autoattack",
        "linf",
        f"eps {eps:g}, standard, {num_images} images",
        functools.partial(attacks.autoattack, eps=eps, batch_size=num_images),
        {"pyautoattack": theirs},
        num_images=num_images,
    )


def next_class(labels: Any) -> Any:
    """The target of an example, of ten classes."""
    return (labels + 1) % 10


def jsma(features: int) -> Comparison:
    """The saliency map attack on the logits, towards the next class, as ART and torchattacks do."""

    def ours(logits_fn: Any, key: Array | None, inputs: Any, labels: Any) -> attacks.AttackResult:
        targets = next_class(jnp.asarray(labels))
        return attacks.jsma(
            logits_fn,
            key,
            inputs,
            labels,
            targets=targets,
            max_features=features,
            output=jnp.positive,
        )

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
