# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#     provenance: []
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
#   language_info:
#     name: python
# ---

# %% [markdown]
# # Why defensive distillation looks robust
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/jdistill/blob/main/colab/break_distillation.ipynb)
#
# A network that is distilled at a high temperature withstands attacks that an ordinary network does not withstand. This notebook takes that apart, step by step: what the usual attacks see, why they see nothing, and what happens when the attack knows about it. At the end the library's **verdict** is asked the same question.
#
# *Runtime → Run all* takes a few minutes, on a TPU, a GPU, or a CPU.

# %% cellView="form"
# @title Install: only what is missing; nothing that is there is upgraded
import glob
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile

REPOSITORY = "https://github.com/OWNER/jdistill"
SMOKE = os.environ.get("JDISTILL_SMOKE") == "1"  # set by the tests: least sizes, no installation
NEEDED = {  # packages by module; neither JAX nor TensorFlow, which belong to the runtime
    "PIL": "pillow",
    "array_record": "array_record",
    "etils": "etils",
    "flax": "flax",
    "importlib_resources": "importlib_resources",
    "jinja2": "jinja2",
    "matplotlib": "matplotlib",
    "optax": "optax",
    "orbax": "orbax-checkpoint",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tqdm": "tqdm",
    "tyro": "tyro",
}


def missing(packages):
    return [name for module, name in packages.items() if importlib.util.find_spec(module) is None]


def pip_install(*arguments):
    """Install beside what is there, every version of which is fixed."""
    plain = re.compile(r"\d+(\.\d+)*((a|b|rc)\d+)?(\.post\d+)?(\.dev\d+)?(\+[\w.]+)?")
    there = {}
    for each in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", each.metadata["Name"] or "").lower()
        there.setdefault(name, each.version)  # of copies Python imports the first
    fixed = [f"{name}=={v}\n" for name, v in there.items() if name and plain.fullmatch(v)]
    with tempfile.TemporaryDirectory() as folder:
        constraints = pathlib.Path(folder, "constraints.txt")
        constraints.write_text("".join(fixed))
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "-c", str(constraints)]
        subprocess.run([*pip, *arguments], check=True)


if not SMOKE:
    if missing({"jdistill": "jdistill"}):
        wheels = sorted(glob.glob("jdistill-*.whl"), key=os.path.getmtime)
        if not wheels and "/OWN" + "ER/" in REPOSITORY:  # the address is not fixed yet
            raise RuntimeError(
                "expected a wheel jdistill-*.whl in the working directory, got none; upload one "
                "(Files, at the left) that `pip wheel --no-deps .` made in a checkout, or put the "
                "repository's address into REPOSITORY above"
            )
        # Without dependencies: the runtime's own JAX, built for its device, stays as it is.
        pip_install("--no-deps", wheels[-1] if wheels else f"jdistill @ git+{REPOSITORY}")
    if missing(NEEDED):
        pip_install(*missing(NEEDED))
    importlib.invalidate_caches()

# %%
# @title The machine
from jdistill import runtime

runtime.add_cpu_flags()  # faster convolutions on a CPU, before JAX starts; nothing elsewhere
print(runtime.check_machine(min_free_gib=2))
programs = runtime.enable_compilation_cache()  # so that a second run compiles nothing

# %%
# @title Settings
TEMPERATURE = 100  # @param {type:"number"}
EPS = 0.2  # @param {type:"number"}
NUM_IMAGES = 200  # @param {type:"integer"}
EPOCHS = 30  # @param {type:"integer"}
USE_DRIVE = False  # @param {type:"boolean"}

if USE_DRIVE:  # Colab only: what was trained and found outlives the runtime
    from google.colab import drive

    drive.mount("/content/drive")
WORKDIR = pathlib.Path("/content/drive/MyDrive/jdistill" if USE_DRIVE else "runs", "break")
if SMOKE:
    EPOCHS, NUM_IMAGES = 1, 8

# %% [markdown]
# ## Two networks
#
# An **ordinary** one, trained on labels at T = 1, and a **distilled** one: a student that learns at `TEMPERATURE` from the softened predictions of a teacher of that temperature. Same architecture, same images (scikit-learn's digits, 8×8 pixels between 0 and 1), and both are used at T = 1, as the defense prescribes.
#
# Training goes through a study, so a second run of this notebook finds the networks in the workdir.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from jdistill import attacks, data, diagnose, evaluate, losses, metrics, nets, study, train

fgsm = partial(attacks.fgsm, eps=EPS)
stage = study.Stage(model=nets.digits_net(), optimizer=train.sgd(0.05), num_epochs=EPOCHS)
training = study.Study(
    data=partial(data.load, "digits"),
    chains=[stage, stage],
    temperatures=(1.0, TEMPERATURE),
    batch_size=32,
    initial_epochs=1,  # both start from the same weights, as in Mandal & Gao's code
    attacks={"fgsm": fgsm},
)
study.train(training, WORKDIR)
found = study.networks(training, WORKDIR)
networks = {
    "ordinary": next(each for each in found if (each.temperature, each.generation) == (1, 0)),
    "distilled": next(
        each for each in found if (each.temperature, each.generation) == (TEMPERATURE, 1)
    ),
}
ordinary, distilled = (each.logits_fn for each in networks.values())
digits = data.load("digits").test
inputs, labels = digits.inputs[:NUM_IMAGES], digits.labels[:NUM_IMAGES]
for name, each in networks.items():
    accuracy = metrics.correct(train.predict(each.logits_fn, inputs), labels).mean()
    print(f"{name:<10} accuracy on {len(labels)} test images: {accuracy:.1%}")

# %% [markdown]
# ## Step 1: the usual attacks
#
# FGSM takes one step along the sign of the gradient of the cross-entropy with respect to the image; PGD takes 40 smaller ones. Neither may change a pixel by more than `EPS`. The table says how many images are still classified correctly.

# %%
COLORS = {"ordinary": "#0072B2", "distilled": "#D55E00"}  # told apart by color-blind readers
key = jax.random.key(0)


def accuracy_under(suite, folder):
    """Share of images that each network gets right under each attack, and all that was found."""
    with runtime.progress() as bar:
        result = evaluate.evaluate(
            [ordinary, distilled],
            inputs,
            labels,
            attacks=suite,
            key=key,
            callback=bar,
            shards=runtime.ShardFolder(WORKDIR / folder),
            names=list(networks),
        )
    print(f"{'correct under':<28}" + "".join(f"{name:>12}" for name in networks))
    for name, outcome in result.attacks.items():
        shares = [1 - rate.value for rate in outcome.success_rate]
        print(f"{name:<28}" + "".join(f"{share:>12.1%}" for share in shares))
    return result


steps = {"num_steps": 3} if SMOKE else {}
usual = accuracy_under({"FGSM": fgsm, "PGD": partial(attacks.pgd, eps=EPS, **steps)}, "usual")

# %% [markdown]
# If the distilled network's column is the higher one, this is what was once reported as robustness. The next steps ask where it comes from.
#
# ## Step 2: the logits
#
# Training at T divides the logits by T before the softmax, and the loss asks for confident predictions all the same: so the network learns logits that are larger by about that factor. At T = 1 nothing divides them anymore. The histogram shows the largest logit minus the second largest, on a logarithmic axis. Right of the dashed line, exp(−gap) is below the smallest number of float32: the softmax is then exactly 1 for the first class and exactly 0 for every other.

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
gaps = {}
for name, each in networks.items():
    logits = np.sort(np.asarray(train.predict(each.logits_fn, inputs)), axis=-1)
    gaps[name] = logits[:, -1] - logits[:, -2]
    print(
        f"{name:<10} mean |logit| {np.abs(logits).mean():8.2f}, "
        f"median gap {np.median(gaps[name]):8.2f}"
    )
bins = np.geomspace(min(map(np.min, gaps.values())) + 1e-3, max(map(np.max, gaps.values())), 40)
for name, values in gaps.items():
    axes.hist(values, bins=bins, color=COLORS[name], alpha=0.7, label=name)
smallest = np.finfo(np.float32).smallest_subnormal.astype(float)
axes.axvline(-np.log(smallest), color="gray", linestyle="--")
axes.set_xscale("log")
axes.set(xlabel="largest logit minus second largest", ylabel="images")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Step 3: the gradient
#
# The gradient of the cross-entropy with respect to the logits is *softmax − label*. Where the softmax is exactly the label, it is exactly zero, and so is the gradient with respect to the image: FGSM has no sign to follow, and PGD stands where it started. The histogram shows the size of that gradient for each image (the largest absolute value over its pixels); gradients that are exactly zero are in the bar at the left.


# %%
@jax.jit
def gradient_size(network, inputs, labels):
    def total(inputs):
        return losses.cross_entropy(network(inputs), labels).sum()

    return jnp.abs(jax.grad(total)(inputs)).max(axis=(1, 2, 3))


sizes = {
    name: np.asarray(gradient_size(each.logits_fn, inputs, labels))
    for name, each in networks.items()
}
ZERO = 1e-46  # below all of float32: the place of the bar for zeros
bins = np.geomspace(1e-47, 1e3, 51)
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, values in sizes.items():
    print(f"{name:<10} gradient exactly zero on {np.mean(values == 0):.1%} of the images")
    shown = np.where(values == 0, ZERO, values.astype(float))
    axes.hist(shown, bins, color=COLORS[name], alpha=0.7, label=name)
axes.set_xscale("log")
axes.set_xticks([ZERO, 1e-30, 1e-20, 1e-10, 1], ["exactly 0", "1e-30", "1e-20", "1e-10", "1"])
axes.set(xlabel="largest |gradient| of the cross-entropy over the pixels", ylabel="images")
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# An attack that fails because its gradient is zero says nothing about the network. It would fail in the same way with `EPS` = 1, where it may paint any image at all.
#
# ## Step 4: an attack that knows
#
# The logits still have a gradient. Three ways to use it, and one that needs none, all with the same `EPS` as before:
#
# * **PGD at T**: inside the attack the logits are divided by `TEMPERATURE`, and the softmax is as soft as it was in training.
# * **PGD on the margin** climbs the largest other logit minus the label's. There is no softmax in it.
# * **APGD-T** climbs the difference of two logits divided by their spread, for each other class in turn.
# * **Square** asks for logits alone, so hidden gradients do not stop it; it needs many queries.
#
# All of them are judged on the network as it is used, at T = 1.

# %%
at_temperature = jax.tree_util.Partial(losses.cross_entropy, temperature=float(TEMPERATURE))
adaptive = accuracy_under(
    {
        "PGD at T": partial(attacks.pgd, eps=EPS, loss=at_temperature, **steps),
        "PGD on the margin": partial(attacks.pgd, eps=EPS, loss=losses.margin, **steps),
        "APGD-T": partial(attacks.apgd_targeted, eps=EPS, **(steps or {"num_steps": 50})),
        "Square": partial(attacks.square, eps=EPS, num_queries=10 if SMOKE else 1000),
    },
    "adaptive",
)

# %% [markdown]
# ## Step 5: how far is the nearest adversarial example?
#
# Two attacks look for the smallest change instead of staying within one.
#
# * **Carlini & Wagner's L2 attack** follows the logits. What counts is the distance that it needs; that is an upper bound, which more steps may lower, most of all where the logits are large.
# * **JSMA** changes few pixels, and those as far as it likes. Papernot et al. judged distillation by JSMA on the softmax; Carlini & Wagner broke it by JSMA on the softmax *at T* (`attacks.softmax_at`).
#
# The table has the share of images on which each attack succeeds, and the median over these: the distance of C&W, the number of pixels of JSMA. An image that is misclassified without an attack counts as a success at distance 0. *JSMA at T* is made for the distilled network.

# %%
searches = {"num_searches": 2, "num_steps": 5} if SMOKE else {"num_searches": 9, "num_steps": 200}
nearest = {
    "C&W L2": partial(attacks.carlini_wagner_l2, learning_rate=0.1, initial_const=0.01, **searches),
    "JSMA on the softmax": partial(attacks.jsma, output=attacks.softmax),
    "JSMA at T": partial(attacks.jsma, output=attacks.softmax_at(TEMPERATURE)),
}
few = {name: evaluate.AttackPlan(attack, 50, batch_size=25) for name, attack in nearest.items()}
with runtime.progress() as bar:
    shortest = evaluate.evaluate(
        [ordinary, distilled],
        inputs,
        labels,
        attacks=few,
        callback=bar,
        shards=runtime.ShardFolder(WORKDIR / "nearest"),
        names=list(networks),
    )
print(f"{'success, median':<22}" + "".join(f"{name:>18}" for name in networks))
for name, outcome in shortest.attacks.items():
    cells = zip(outcome.success_rate, outcome.median_distance, strict=True)
    print(f"{name:<22}" + "".join(f"{rate.value:>11.0%}, {far:5.2f}" for rate, far in cells))

# %% [markdown]
# ## Adversarial examples of the distilled network
#
# Top: test images. Below: what PGD on the margin made of them, within `EPS` of each pixel. Bottom: what C&W needed. Each picture has the digit that the distilled network reads.

# %%
rows = {
    "test image": inputs,
    "PGD on the margin": adaptive.attacks["PGD on the margin"].inputs[1],
    "C&W L2": shortest.attacks["C&W L2"].inputs[1],
}
figure, axes = plt.subplots(len(rows), 8, figsize=(8, 3.6), layout="constrained")
for line, (name, images) in zip(axes, rows.items(), strict=True):
    read = train.predict(distilled, images[:8]).argmax(axis=-1)
    for cell, image, digit in zip(line, images[:8], read, strict=True):
        cell.imshow(image[..., 0], cmap="gray", vmin=0, vmax=1)
        cell.set(xticks=[], yticks=[], title=f"reads {digit}")
    line[0].set_ylabel(name, fontsize=8)
plt.show()

# %% [markdown]
# ## Step 6: the verdict
#
# `diagnose.masking` does all this, and more, for any network: it runs the usual attack, others with the same budget, and fifteen checks. Its label says whether the usual attack's number may be reported.

# %%
with runtime.progress() as bar:
    verdicts = {
        name: diagnose.masking(
            each.logits_fn,
            key,
            inputs,
            labels,
            eps=EPS,
            train_temperature=each.temperature,
            surrogate=ordinary if name == "distilled" else None,
            callback=bar,
        )
        for name, each in networks.items()
    }
for name, verdict in verdicts.items():
    print(f"The {name} network\n{verdict}\n")

# %% [markdown]
# ## What to take home
#
# * An attack that fails has shown only that *this* attack failed. Look at the gradient that it followed.
# * Larger logits alone make no network harder to fool: divided by T, they make the same predictions.
# * Report the worst case over attacks of several kinds, and say what was tried.
#
# [A sweep over temperatures](https://github.com/OWNER/jdistill/blob/main/colab/temperature_sweep.ipynb) shows the same at every T, with intervals over seeds. [Attack your own model](https://github.com/OWNER/jdistill/blob/main/colab/attack_your_model.ipynb) has a place for yours.
#
# Papernot et al. 2016, [arXiv:1511.04508](https://arxiv.org/abs/1511.04508) · Carlini & Wagner 2016, [arXiv:1607.04311](https://arxiv.org/abs/1607.04311) · Carlini & Wagner 2017, [arXiv:1608.04644](https://arxiv.org/abs/1608.04644) · Athalye, Carlini & Wagner 2018, [arXiv:1802.00420](https://arxiv.org/abs/1802.00420)
