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
# # A sweep over temperatures, with and without an assistant
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/jdistill/blob/main/colab/temperature_sweep.ipynb)
#
# Mandal & Gao 2023 compare plain distillation with distillation through teacher assistants by three plots against the temperature T: test accuracy, sensitivity, and robustness ρ<sub>adv</sub>. This notebook draws the three on scikit-learn's digits, over several **seeds**: only these tell a difference between methods from one between two runs.
#
# All runs of the sweep, temperatures times seeds, are trained as **one program**: on a TPU or a GPU at the same time under `vmap`, on a CPU one after another inside it. *Runtime → Run all* takes a few minutes.

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
TEMPERATURES = [1, 2, 5, 10, 20, 50, 100]  # @param {type:"raw"}
NUM_SEEDS = 3  # @param {type:"integer"}
EPOCHS = 30  # @param {type:"integer"}
NUM_ATTACKED = 100  # @param {type:"integer"}
EPS = 0.2  # @param {type:"number"}
USE_DRIVE = False  # @param {type:"boolean"}

if USE_DRIVE:  # Colab only: what was trained and measured outlives the runtime
    from google.colab import drive

    drive.mount("/content/drive")
WORKDIR = pathlib.Path("/content/drive/MyDrive/jdistill" if USE_DRIVE else "runs", "sweep")
if SMOKE:
    TEMPERATURES, NUM_SEEDS, EPOCHS, NUM_ATTACKED = [1, 20], 2, 1, 8

# %% [markdown]
# ## The sweep
#
# A chain of three: teacher, assistant, student. Its middle network is at the same time the student of plain distillation, so one chain gives both curves.
#
# The learning rate grows with √T, since the gradient of the loss shrinks with T: otherwise networks at a high T would not be done after `EPOCHS`.
#
# Stopped and run again, the sweep goes on from its workdir; more temperatures or seeds are added to what is there.

# %%
from functools import partial

import matplotlib.pyplot as plt
import numpy as np

from jdistill import attacks, data, evaluate, losses, metrics, nets, study, train
from jdistill.evaluate import AttackPlan


def learning_rate(T):
    return 0.02 * T**0.5


stage = study.Stage(
    model=nets.digits_net(),
    optimizer=train.sgd(0.02),
    num_epochs=EPOCHS,
    hyperparams={"learning_rate": learning_rate},
)
plans = evaluate.distance_plans(num_steps=5 if SMOKE else 100, num_examples=NUM_ATTACKED)
pgd = partial(attacks.pgd, eps=EPS, num_steps=3 if SMOKE else 40)
sweep = study.Study(
    data=partial(data.load, "digits"),
    chains={"no assistant": [stage] * 2, "1 assistant": [stage] * 3},
    temperatures=TEMPERATURES,
    seeds=range(NUM_SEEDS),
    batch_size=32,
    initial_epochs=1,
    attacks={
        "pgd": AttackPlan(pgd, NUM_ATTACKED),
        "pgd_margin": AttackPlan(partial(pgd, loss=losses.margin), NUM_ATTACKED),
    },
    distances={"l2": plans["l2"]},
)
FOLDER = WORKDIR / f"{EPOCHS}-epochs-eps-{EPS:g}-{NUM_ATTACKED}-attacked"
tables = study.run(sweep, FOLDER, parallel="sweep")
print(f"{len({(row['temperature'], row['seed']) for row in tables.rows['results']})} runs")

# %% [markdown]
# ## Means and intervals over seeds
#
# For each temperature and number of assistants: the mean over the seeds, with its 95% interval (Student's t). With few seeds the intervals are wide; one that goes beyond 100% says that the seeds are too few.


# %%
def over_seeds(rows, column):
    """By generation the mean, low, and high of a column against the temperature."""
    curves = {}
    for generation in (1, 2):
        at = {T: [] for T in sorted({row["temperature"] for row in rows})}
        for row in rows:
            if row["generation"] == generation:
                at[row["temperature"]].append(row[column])
        curves[generation] = {T: metrics.seed_interval(values) for T, values in at.items()}
    return curves


networks = [row for row in tables.rows["results"] if row["attack"] == "pgd"]
on_margin = [row for row in tables.rows["results"] if row["attack"] == "pgd_margin"]
accuracy = over_seeds(networks, "test_accuracy")
sensitivity = over_seeds(networks, "sensitivity_logits")
distances = over_seeds(tables.rows["distances"], "mean")
print(
    f"{'T':>4}  {'assistants':>10}  {'accuracy %':>18}  {'sensitivity':>20}  {'rho_adv (l2)':>20}"
)
for T in accuracy[1]:
    for generation in (1, 2):
        cells = [accuracy[generation][T], sensitivity[generation][T], distances[generation][T]]
        (a, s, r) = ([cell.value, cell.low, cell.high] for cell in cells)
        print(
            f"{T:>4g}  {generation - 1:>10}  "
            f"{100 * a[0]:5.1f} [{100 * a[1]:4.1f}, {100 * a[2]:5.1f}]  "
            f"{s[0]:6.3g} [{s[1]:6.3g}, {s[2]:6.3g}]  {r[0]:4.2f} [{r[1]:5.2f}, {r[2]:5.2f}]"
        )

# %% [markdown]
# ## The three plots
#
# From left to right, against the temperature, for the students without and behind an assistant, with 95% intervals over seeds:
#
# * **test accuracy**;
# * **sensitivity**, as the paper's code computes it: the mean absolute gradient of the sum of the logits with respect to the image, on a logarithmic axis. It grows with the scale of the logits, whatever that does to robustness;
# * **robustness ρ<sub>adv</sub>**: the mean distance to the nearest adversarial example, here in L2 by the attack FMN, which follows the logits. Every attack gives an upper bound of it.

# %%
STYLES = {1: ("no assistant", "#0072B2", "o-"), 2: ("1 assistant", "#D55E00", "s--")}


def draw(axes, curves, title, *, scale=1):
    for generation, (label, color, style) in STYLES.items():
        curve = curves[generation]
        mean, low, high = scale * np.array([list(each) for each in curve.values()]).T
        axes.errorbar(
            list(curve),
            mean,
            [mean - low, high - mean],
            fmt=style,
            color=color,
            capsize=3,
            markersize=4,
            label=label,
        )
    axes.set_xscale("log")
    axes.set_xticks(list(curve), [f"{T:g}" for T in curve])
    axes.minorticks_off()
    axes.set(xlabel="temperature T", title=title)


figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
draw(left, accuracy, "test accuracy (%)", scale=100)
draw(middle, sensitivity, "sensitivity of the logits")
middle.set_yscale("log")
draw(right, distances, "robustness ρ_adv (mean L2)")
right.set_ylim(bottom=0)
left.legend(frameon=False)
plt.show()

# %% [markdown]
# ## Does an assistant help?
#
# The same seed with and without an assistant makes a pair, so the differences are what to look at: their mean over the seeds and its 95% interval. Where 0 is inside, this sweep does not tell the two apart. Of many such intervals one in twenty leaves out the truth by chance alone, so a single one with 0 outside is no finding yet.

# %%
rho = {
    (row["temperature"], row["generation"], row["seed"]): row["mean"]
    for row in tables.rows["distances"]
}
paired = {
    (T, "rho_adv (l2)"): metrics.seed_interval(
        [
            rho[T, 2, row["seed"]] - rho[T, 1, row["seed"]]
            for row in networks
            if (row["temperature"], row["generation"]) == (T, 0)
        ]
    )
    for T in accuracy[1]
}
for row in tables.rows["comparisons"]:
    if row["seed"] is None and row["generation"] == 2:
        interval = metrics.Interval(row["difference"], row["low"], row["high"])
        paired[row["temperature"], row["quantity"]] = interval
for quantity in dict.fromkeys(name for _, name in paired):
    print(f"{quantity}, with an assistant minus without:")
    for (T, name), (value, low, high) in paired.items():
        if name == quantity:
            where = "0 is inside" if low <= 0 <= high else "0 is outside"
            print(f"  T = {T:>3g}: {value:+.3f} [{low:+.3f}, {high:+.3f}]  {where}")

# %% [markdown]
# ## What the sweep would look like to a weak attack
#
# The students' accuracy under PGD at one budget (`EPS` per pixel), once on the cross-entropy and once on the margin of the logits. If only the first one rises with T, what rises is not robustness: it is the share of images on which the gradient of the cross-entropy is exactly zero, in gray.

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
for axes, rows, title in zip(
    panels, (networks, on_margin), ("PGD on the cross-entropy", "PGD on the margin"), strict=True
):
    left_over = [{**row, "correct": 1 - row["success_rate"]} for row in rows]
    draw(axes, over_seeds(left_over, "correct"), title, scale=100)
    zeros = over_seeds(rows, "zero_gradient_fraction")[1]
    axes.plot(
        list(zeros),
        [100 * each.value for each in zeros.values()],
        ":",
        color="gray",
        label="zero gradient, no assistant",
    )
    axes.set_ylim(-3, 103)
panels[0].set_ylabel("share of images (%)")
panels[0].legend(frameon=False, fontsize=8, loc="center right")
plt.show()

# %% [markdown]
# ## Go on
#
# * The report of the sweep, one page with everything, is at the path below: on Colab in the *Files* pane, at the left.
# * Without a study, `sweep.chain` trains such a stack of runs from states and keys of your own.
# * The paper's networks: `jdistill defend mnist --parallel sweep` on an accelerator.
#
# Mandal & Gao 2023, [arXiv:2305.08076](https://arxiv.org/abs/2305.08076) · Papernot et al. 2016, [arXiv:1511.04508](https://arxiv.org/abs/1511.04508) · Pintor et al. 2021, [arXiv:2102.12827](https://arxiv.org/abs/2102.12827)

# %%
print(tables.report)
