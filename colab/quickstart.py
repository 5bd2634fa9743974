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
# # Defensive distillation: what it defends against, and what it does not
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/jdistill/blob/main/colab/quickstart.ipynb)
#
# A network is trained at a temperature T on images of digits (the **teacher**). A second one learns from the teacher's softened predictions, and so on to the **student**; whatever stands between them is an **assistant**. Then every network is attacked, and the **verdict** says whether the attacks' numbers mean anything.
#
# *Runtime → Run all* takes a few minutes, on a TPU, a GPU, or a CPU. Stopped and run again, it goes on where it was.

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

# %% [markdown]
# ## Settings
#
# * `TEMPERATURES` are those of training and of the soft labels. Every network is tested and attacked at T = 1, as in the papers. Keep 1 among them: a student at T = 1 is what the others are compared with.
# * `EPS` is how far an attack may change each pixel; pixels lie between 0 and 1.
# * `USE_DRIVE` keeps the results in your Google Drive (Colab only), so that they outlive the runtime.

# %%
# @title Settings
TEMPERATURES = [1, 20, 100]  # @param {type:"raw"}
EPOCHS = 30  # @param {type:"integer"}
EPS = 0.2  # @param {type:"number"}
NUM_ATTACKED = 100  # @param {type:"integer"}
SEED = 0  # @param {type:"integer"}
USE_DRIVE = False  # @param {type:"boolean"}

if USE_DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")
WORKDIR = pathlib.Path("/content/drive/MyDrive/jdistill" if USE_DRIVE else "runs", "quickstart")
FOLDER = WORKDIR / f"digits-{EPOCHS}-epochs-eps-{EPS:g}-{NUM_ATTACKED}-attacked"

# %% [markdown]
# ## The study
#
# A *stage* is one network and how it learns, and a *chain* is a list of stages. Two chains are compared: without an assistant, and with one. Because they begin alike, their teacher is trained once.
#
# * **FGSM** and **PGD** follow the gradient of the cross-entropy, one step of it or 40.
# * **PGD on the margin** has the same budget, and follows the difference of two logits instead.
# * **Carlini & Wagner's L2 attack** follows the logits as well, and may change an image as far as it needs: what counts is how far that is. Too few steps find a distance that is too large, most of all where the logits are large, so it gets many.

# %%
from functools import partial

from jdistill import attacks, data, diagnose, distill, losses, nets, study, train
from jdistill.evaluate import AttackPlan

stage = study.Stage(model=nets.digits_net(), optimizer=train.sgd(0.05), num_epochs=EPOCHS)
carlini_wagner = partial(
    attacks.carlini_wagner_l2, num_searches=9, num_steps=200, learning_rate=0.1, initial_const=0.01
)
defense = study.Study(
    data=partial(data.load, "digits"),  # scikit-learn's: 8x8 pixels, 17 levels of gray
    chains={"no assistant": [stage] * 2, "1 assistant": [stage] * 3},
    temperatures=TEMPERATURES,
    seeds=(SEED,),
    batch_size=32,
    initial_epochs=1,  # all networks start from the same weights, as in Mandal & Gao's code
    attacks={
        "fgsm": AttackPlan(partial(attacks.fgsm, eps=EPS), NUM_ATTACKED),
        "pgd": AttackPlan(partial(attacks.pgd, eps=EPS), NUM_ATTACKED),
        "pgd_margin": AttackPlan(partial(attacks.pgd, eps=EPS, loss=losses.margin), NUM_ATTACKED),
        "carlini_wagner_l2": AttackPlan(carlini_wagner, NUM_ATTACKED // 2, batch_size=25),
    },
    verdict=partial(diagnose.masking, eps=EPS),
    num_verdict=NUM_ATTACKED,
)
if SMOKE:
    defense = study.smoke(defense)

# %% [markdown]
# ## Train, attack, judge
#
# All of it is one call. Everything is kept in the folder: a second call finds it there and computes nothing twice, and another temperature or seed is added to what is there. A folder belongs to one study, so the settings that make another one are in its name.

# %%
tables = study.run(defense, FOLDER)

# %% [markdown]
# ## The table
#
# One row per network; the assistant is at the same time the student of the chain without one. *zero grad.* is the share of test images on which the gradient of the cross-entropy is **exactly zero** in float32: there FGSM and PGD have nothing to follow. The columns of the attacks say on which share of the images they succeed; an image that the network gets wrong without an attack counts as a success.

# %%
print(tables)

# %% [markdown]
# ## The students against the temperature
#
# How often each attack fools the student behind one assistant, with 95% intervals over the images, and in gray the share of images with a zero gradient. An attack that loses its grip where the gray line rises, while the others do not, has not met a robust network: it has lost its gradient.

# %%
import matplotlib.pyplot as plt

STYLES = {  # colors that color-blind readers tell apart, and markers
    "fgsm": ("FGSM", "#D55E00", "o"),
    "pgd": ("PGD", "#CC79A7", "D"),
    "pgd_margin": ("PGD on the margin", "#009E73", "^"),
    "carlini_wagner_l2": ("C&W L2", "#0072B2", "s"),
}
students = [row for row in tables.rows["results"] if row["generation"] == 2 and row["seed"] == SEED]
figure, axes = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
for name, (label, color, marker) in STYLES.items():
    rows = [row for row in students if row["attack"] == name]
    temperatures = [row["temperature"] for row in rows]
    rate = [100 * row["success_rate"] for row in rows]
    below = [100 * (row["success_rate"] - row["success_rate_low"]) for row in rows]
    above = [100 * (row["success_rate_high"] - row["success_rate"]) for row in rows]
    axes.errorbar(
        temperatures, rate, [below, above], color=color, marker=marker, capsize=3, label=label
    )
zeros = [100 * row["zero_gradient_fraction"] for row in rows]
axes.plot(temperatures, zeros, ":", color="gray", label="zero gradient")
axes.set_xscale("log")
axes.set_xticks(temperatures, [f"{T:g}" for T in temperatures])
axes.minorticks_off()
axes.set(xlabel="temperature T", ylabel="share of images (%)", ylim=(-3, 103))
axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
plt.show()

# %% [markdown]
# ## What Carlini & Wagner's attack changes
#
# The student at the highest temperature: eight test images, what the attack made of them, and the difference (red is brighter, blue is darker).

# %%
from IPython.display import Image, display

highest = max(row["temperature"] for row in students)
display(Image(tables.workdir / "figures" / f"pictures_T{highest:g}.png", width=760))

# %% [markdown]
# ## The verdict
#
# The last network of each chain, and the teacher at T = 1, are attacked in further ways, and fifteen checks ask what the usual attack's number rests on. The label is one of
#
# * **masked**: the gradient hides examples that are there; do not report the usual attack's number;
# * **weak attack**: no sign of that, but other attacks find many more within the same `EPS`; report the worst case;
# * **no sign of masking**: nothing that was tried speaks against the number, which proves nothing;
# * **inconclusive**: more examples or more steps are needed to tell.

# %%
NAMES = ("teacher", "student without an assistant", "student behind an assistant")
for row in tables.rows["verdicts"]:
    verdict = row["verdict"]
    name = f"T = {row['temperature']:g}, {NAMES[row['generation']]}"
    print(
        f"{name}: {verdict.label}; the usual attack leaves {verdict.naive.value:.0%} right, "
        f"everything together {verdict.worst_case.value:.0%}"
    )
print("\nThe last of them, in full:\n")
print(verdict)

# %% [markdown]
# ## The report
#
# One page with all tables, figures, verdicts, and the checklist of [Carlini et al. 2019](https://arxiv.org/abs/1902.06705), answered from this run. On Colab it is in the *Files* pane, at the left, under the path that the next cell prints: download it and open it in a browser.

# %%
print(tables.report)

# %% [markdown]
# ## MNIST
#
# The same with the papers' network on 28×28 images, with fewer epochs. The cell measures how long one training step takes here, after compiling, and says what the training would take: an **estimate**, and only of the training; attacks and verdicts come on top. Set `RUN_MNIST` to run it. The images must be there: jdistill does not bring them.

# %%
# @title MNIST
RUN_MNIST = False  # @param {type:"boolean"}

import dataclasses
import time

import jax
import numpy as np

recipe = dataclasses.replace(study.RECIPES["mnist"], temperatures=(1.0, 20.0, 100.0))
recipe = recipe.smallest() if SMOKE else recipe
step = train.make_train_step(nets.apply_fn(recipe.model()), train.sgd(0.02))
params, _ = nets.init(recipe.model(), jax.random.key(0), (28, 28, 1))
state = train.create_state(step, params, jax.random.key(0))
noise = np.random.default_rng(0).uniform(size=(4 * recipe.batch_size, 28, 28, 1))
labels = np.arange(len(noise)) % 10
examples = noise.astype(np.float32), labels, np.eye(10, dtype=np.float32)[labels]
ends = []  # of epochs, each of 4 steps; the first one compiles


def stopwatch(event):
    if event["event"] == "epoch":
        ends.append(time.perf_counter())


options = {"batch_size": recipe.batch_size, "callback": stopwatch}
train.fit(step, state, examples, distill.soft_loss(1.0), num_epochs=5, **options)
seconds = float(np.median(np.diff(ends))) / 4
steps_per_epoch = -(-(recipe.train_examples or 55_000) // recipe.batch_size)
epochs = len(recipe.temperatures) * (recipe.num_assistants + 2) * recipe.epochs
epochs += recipe.initial_epochs
total = seconds * steps_per_epoch * epochs
print(
    f"Estimate: {epochs} epochs of {steps_per_epoch} steps of {1000 * seconds:.0f} ms, "
    f"about {total / 60:.0f} minutes of training on this machine"
)
if RUN_MNIST:
    try:
        print(study.run(recipe.study(), WORKDIR / "mnist"))
        print(WORKDIR / "mnist" / "report.html")
    except (FileNotFoundError, ImportError) as error:
        print(error)

# %% [markdown]
# ## Go on
#
# * [Why distillation looks robust](https://github.com/OWNER/jdistill/blob/main/colab/break_distillation.ipynb), step by step.
# * [Attack your own model](https://github.com/OWNER/jdistill/blob/main/colab/attack_your_model.ipynb): Flax Linen, NNX, or any function.
# * [A sweep over temperatures and seeds](https://github.com/OWNER/jdistill/blob/main/colab/temperature_sweep.ipynb), with intervals.
#
# Papernot et al. 2016, [arXiv:1511.04508](https://arxiv.org/abs/1511.04508) · Carlini & Wagner 2017, [arXiv:1608.04644](https://arxiv.org/abs/1608.04644) · Mandal & Gao 2023, [arXiv:2305.08076](https://arxiv.org/abs/2305.08076)
