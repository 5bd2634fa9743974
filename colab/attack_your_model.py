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
# # Attack your own model
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/jdistill/blob/main/colab/attack_your_model.ipynb)
#
# A JAX model of any kind becomes a function from inputs to logits, and whatever that is, jdistill attacks it, judges it, and writes a report. Here are three kinds, each trained on scikit-learn's digits in a few seconds: a **Flax Linen** module with batch normalization, a **Flax NNX** module, and a **plain function** with weights. Then comes the place for yours, *Your model and your data*.
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
EPS = 0.1  # @param {type:"number"}
NUM_ATTACKED = 100  # @param {type:"integer"}
EPOCHS = 15  # @param {type:"integer"}
USE_DRIVE = False  # @param {type:"boolean"}

if USE_DRIVE:  # Colab only: what was trained and found outlives the runtime
    from google.colab import drive

    drive.mount("/content/drive")
WORKDIR = pathlib.Path("/content/drive/MyDrive/jdistill" if USE_DRIVE else "runs", "your-model")
if SMOKE:
    EPOCHS, NUM_ATTACKED = 1, 8

# %% [markdown]
# ## Three models
#
# Nothing in them knows of jdistill. Keep normalization of the inputs inside the model, so that `EPS` and the box of valid inputs are those of the data.

# %%
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from jdistill import attacks, data, diagnose, evaluate, losses, metrics, nets, report, study, train


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool = False):
        x = linen.Conv(16, (3, 3))(x - 0.5)
        x = linen.BatchNorm(use_running_average=not train)(x)
        x = linen.relu(x).reshape(len(x), -1)
        return linen.Dense(10)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.last = nnx.Linear(16 * 64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.first(x - 0.5))
        return self.last(x.reshape(len(x), -1))


def init(key, shape):
    """The weights of `perceptron`."""
    first, last = jax.random.split(key)
    size = int(np.prod(shape))
    return {
        "first": jax.random.normal(first, (size, 64)) / size**0.5,
        "last": jax.random.normal(last, (64, 10)) / 8,
    }


def perceptron(weights, x):
    hidden = jnp.maximum((x.reshape(len(x), -1) - 0.5) @ weights["first"], 0)
    return hidden @ weights["last"]


# %% [markdown]
# ## Train them
#
# Any training loop will do. This one is the library's, because it resumes: run the notebook again and the networks are read from the workdir.

# %%
kinds = {
    "Linen": LinenNet(),
    "NNX": nets.nnx_model(NnxNet),
    "function": (init, perceptron),
}
digits = data.load("digits")
lessons = study.Study(
    data=digits,
    chains={  # of one network each: nothing is distilled
        name: [study.Stage(model=model, optimizer=train.sgd(0.02), num_epochs=EPOCHS)]
        for name, model in kinds.items()
    },
    batch_size=32,
    attacks={"fgsm": partial(attacks.fgsm, eps=0.1)},  # a study wants one; it is not run here
)
study.train(lessons, WORKDIR / f"networks-{EPOCHS}-epochs")
trained = study.networks(lessons, WORKDIR / f"networks-{EPOCHS}-epochs")
for each in trained:
    right = metrics.correct(train.predict(each.logits_fn, digits.test.inputs), digits.test.labels)
    print(f"{each.chain:<10} test accuracy {right.mean():.1%}")

# %% [markdown]
# ## From a model to a `logits_fn`
#
# `study.networks` gives networks that can be attacked as they are. A model that was trained elsewhere takes one line:
#
# | model | `logits_fn` |
# |---|---|
# | Flax Linen, with its variables | `nets.logits_fn(model, variables)` |
# | Flax NNX, with its weights inside | `nets.nnx_logits_fn(module)` |
# | a function `apply(weights, inputs)` | `nets.callable_logits_fn(apply, weights)` |
#
# Linen's variables include the running statistics of batch normalization, `{"params": ..., "batch_stats": ...}`; all three use the model as it is used after training. The next cell makes one of each, with weights that are not trained.

# %%
few = digits.test.inputs[:4]
from_linen = nets.logits_fn(LinenNet(), LinenNet().init(jax.random.key(0), few))
from_nnx = nets.nnx_logits_fn(NnxNet(rngs=nnx.Rngs(0)))
from_function = nets.callable_logits_fn(perceptron, init(jax.random.key(0), few.shape[1:]))
for logits_fn in (from_linen, from_nnx, from_function):
    print(logits_fn(few).shape)

# %% [markdown]
# ## Your model and your data
#
# Put yours into this cell. Left as it is, the three models above are attacked.
#
# * `MY_MODEL`: a `logits_fn`, by one of the lines above. It maps inputs `[N, ...]` to logits `[N, classes]`, not to probabilities.
# * `MY_INPUTS`: NumPy, floats between 0 and 1, examples that the model has not been trained on. For another range pass `bounds=(low, high)` to the attacks and to the verdict.
# * `MY_LABELS`: NumPy, the true classes as whole numbers from 0.

# %%
MY_MODEL = None  # such as nets.logits_fn(model, variables)
MY_INPUTS = None  # such as x_test[:200]
MY_LABELS = None  # such as y_test[:200]

if MY_MODEL is None:
    models = {each.chain: each.logits_fn for each in trained}
    inputs, labels = digits.test.inputs[:NUM_ATTACKED], digits.test.labels[:NUM_ATTACKED]
    FOLDER = WORKDIR / f"digits-{EPOCHS}-epochs-eps-{EPS:g}-{NUM_ATTACKED}-attacked"
else:
    models = {"mine": MY_MODEL}
    inputs, labels = np.asarray(MY_INPUTS, np.float32), np.asarray(MY_LABELS)
    FOLDER = WORKDIR / f"mine-eps-{EPS:g}"

# %% [markdown]
# ## The attacks
#
# * **FGSM** and **PGD** follow the cross-entropy, which a saturated softmax stops.
# * **PGD on the margin** and **APGD-T** follow the logits.
# * **Square** needs no gradient at all.
# * **DeepFool** looks for the smallest change in L2 instead of staying within `EPS` of each input value.
#
# [All attacks](https://github.com/OWNER/jdistill/blob/main/docs/attacks.md) are called alike. What was found is kept in the workdir example by example, so a run that was stopped goes on.

# %%
num_steps = 3 if SMOKE else 40
suite = {
    "FGSM": partial(attacks.fgsm, eps=EPS),
    "PGD": partial(attacks.pgd, eps=EPS, num_steps=num_steps),
    "PGD on the margin": partial(attacks.pgd, eps=EPS, num_steps=num_steps, loss=losses.margin),
    "APGD-T": partial(attacks.apgd_targeted, eps=EPS, num_steps=num_steps),
    "Square": partial(attacks.square, eps=EPS, num_queries=10 if SMOKE else 1000),
    "DeepFool": partial(attacks.deepfool, norm="l2"),
}
results = {}
with runtime.progress() as bar:
    for name, logits_fn in models.items():
        bar.prefix = f"{name}, "
        results[name] = evaluate.evaluate(
            logits_fn,
            inputs,
            labels,
            attacks=suite,
            callback=bar,
            shards=runtime.ShardFolder(FOLDER / "shards"),
            names=[name],
        )
print(f"{'correct':<20}" + "".join(f"{name:>12}" for name in models))
clean = [result.clean.accuracy[0].value for result in results.values()]
print(f"{'without an attack':<20}" + "".join(f"{share:>12.1%}" for share in clean))
for attack in suite:
    left = [1 - result.attacks[attack].success_rate[0].value for result in results.values()]
    print(f"{attack:<20}" + "".join(f"{share:>12.1%}" for share in left))
worst = [result.worst_case["linf", EPS][0].robust_accuracy.value for result in results.values()]
print(f"{'worst case':<20}" + "".join(f"{share:>12.1%}" for share in worst))

# %% [markdown]
# The worst case counts an example as correct only if every attack within `EPS` has failed on it: it is the number to report. DeepFool is not limited to `EPS`, so its row says little by itself; the next cell has the distances that it needed.

# %%
for name, result in results.items():
    outcome = result.attacks["DeepFool"]
    print(
        f"{name:<10} DeepFool: median L2 {outcome.median_distance[0]:.2f} over "
        f"{outcome.success_rate[0].value:.0%} of the examples"
    )

# %% [markdown]
# ## The verdict
#
# May the usual attack's number be believed? `diagnose.masking` attacks in further ways and asks fifteen questions: *masked*, *weak attack*, *no sign of masking*, or *inconclusive*.

# %%
verdicts = {}
with runtime.progress() as bar:
    for name, logits_fn in list(models.items())[-1 if SMOKE else 0 :]:
        bar.prefix = f"{name}, "
        verdicts[name] = diagnose.masking(
            logits_fn, jax.random.key(0), inputs, labels, eps=EPS, callback=bar
        )
for name, verdict in verdicts.items():
    print(f"{name}: {verdict.label}")
print(f"\nThe last of them, in full:\n\n{verdict}")

# %% [markdown]
# ## What the attack changes
#
# The first model's examples under DeepFool, for inputs that are images of one or three channels; the bottom row is the difference.

# %%
from IPython.display import Image, display

name, result = next(iter(results.items()))
if (pictures := report.pictures(result, 0)) is not None:
    path = FOLDER / "pictures.png"
    report.write_picture_grid(pictures, path, attack="DeepFool")
    display(Image(path, width=760))

# %% [markdown]
# ## The report
#
# One page per model: tables, curves, the verdict, and the checklist of [Carlini et al. 2019](https://arxiv.org/abs/1902.06705). On Colab the pages are in the *Files* pane, at the left.

# %%
for name, result in results.items():
    written = report.from_evaluation(
        result, verdicts=verdicts.get(name), names=[name], folder=FOLDER / name
    )
    print(written["report"])

# %% [markdown]
# ## Go on
#
# * A step without a gradient, randomness, a detector: [adaptive evaluation](https://github.com/OWNER/jdistill/blob/main/docs/guides/adaptive_evaluation.md).
# * A number to publish: add `"AutoAttack": partial(attacks.autoattack, eps=EPS)` to the suite; it takes longer.
# * [Why distillation looks robust](https://github.com/OWNER/jdistill/blob/main/colab/break_distillation.ipynb): a network for which the verdict is *masked*.
