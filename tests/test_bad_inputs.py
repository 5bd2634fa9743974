"""A table of bad inputs over the whole public API: each is refused in words, or means something.

Every public function has a call that works, from `GOOD`; every argument a sort, from `SORT`; every
sort its bad values, from `KINDS`. A bad value must raise one of the library's own errors, "expected
X, got Y; do Z", that names the argument; or it is in `FINE`, with the reason why it is no mistake.
The keys of `GOOD` and `SORT` are `argument`, `module.argument` or `module.function.argument`.
"""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import math
import pathlib
import re
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jdistill import (
    attacks,
    checkpoint,
    diagnose,
    distill,
    evaluate,
    nets,
    parallel,
    report,
    robust,
    sweep,
    train,
)
from tests.report_rows import make_rows

MODULES = "attacks data diagnose distill evaluate losses metrics nets norms parallel report runtime"
MODULES = [*MODULES.split(), "robust", "sweep", "train"]
OWN = (ValueError, TypeError, FloatingPointError, FileNotFoundError)
B, K, SHAPE = 3, 4, (4, 4, 1)
rng = np.random.default_rng(0)
INPUTS = rng.uniform(0.3, 0.7, (B, *SHAPE)).astype(np.float32)
LABELS, LOGITS = np.arange(B, dtype=np.int32), rng.normal(size=(B, K)).astype(np.float32)
WEIGHTS = rng.normal(size=(math.prod(SHAPE), K)).astype(np.float32)
SHARES = np.full((B, K), 1 / K, np.float32)
KEY, DEVICES = jax.random.key(0), jax.devices()[:1]
KEYS = jax.random.split(KEY, 2)
FLAGS = np.array([True, False, True])
HELD = tempfile.TemporaryDirectory()  # gone with the process
FOLDER = pathlib.Path(HELD.name)


def linear(weights, inputs):
    return inputs.reshape(inputs.shape[0], -1) @ weights


def of_logits(change):
    return lambda inputs: change(linear(WEIGHTS, inputs))


def apply(params, model_state, inputs, *, train, key):
    return linear(params, inputs), model_state


class Stopped(Exception):
    """A call that would take long is past its checks."""


def stop(event):
    raise Stopped


NETWORK = nets.callable_logits_fn(linear, WEIGHTS)
STACK, PARAMS = nets.stack([NETWORK, NETWORK]), np.stack([WEIGHTS, WEIGHTS])
STEP = train.make_train_step(apply, train.sgd(0.1))
STATE, STATES = train.create_state(STEP, WEIGHTS, KEY), sweep.create_state(STEP, PARAMS, KEYS)
BATCH = parallel.Batch(INPUTS, LABELS, SHARES, np.ones(B, np.float32))
GENERATION = distill.Generation(step=STEP, params=WEIGHTS, num_epochs=1)
GENERATIONS = dataclasses.replace(GENERATION, params=PARAMS)
FGSM = functools.partial(attacks.fgsm, eps=0.1)
PLAN = evaluate.AttackPlan(FGSM, batch_size=4)
FMN = evaluate.AttackPlan(functools.partial(attacks.fmn, norm="l2", num_steps=2), batch_size=4)
RESULT = attacks.AttackResult(
    *(INPUTS[None], np.array([[True, True, False]]), np.array([[1.0, 2.0, np.inf]])),
    *(np.array([[3, 4, 9]]), {"first_success": np.array([[1, 2, -1]])}),
)
EVALUATION = evaluate.evaluate(
    [nets.callable_logits_fn(linear, WEIGHTS)],
    INPUTS,
    LABELS,
    attacks={"fgsm": functools.partial(attacks.fgsm, eps=0.1)},
)
OUTCOME = evaluate.summarize(RESULT, norm="l2")
ROWS = make_rows(temperatures=(1.0,), seeds=(0,))
NET = {"dataset": "digits", "temperature": 1.0, "seed": 0, "generation": 0}
CALIBRATION = {"ece": 0.01, "nll": 0.04, "brier": 0.02, "mean_confidence": 0.98}
CALIBRATION = [{**NET, **CALIBRATION, "num_examples": 360}]
HALF = {"value": 0.5, "low": 0.4, "high": 0.6}
VERDICT = {"label": "masked", "reason": "why", "eps": 0.1, "norm": "linf", "num_examples": 10}
VERDICT |= {"num_nonfinite": 0, "attacks": [], "checks": [], "budget": "", "naive": HALF}
VERDICT = diagnose.Verdict.from_dict({**VERDICT, "worst_case": HALF, "clean": HALF})
VERDICTS = [{**NET, "verdict": VERDICT}]
PICTURES = {"clean": INPUTS, "adversarial": INPUTS, "labels": LABELS, "predictions": LABELS}
PICTURES |= {"distance": np.ones(B)}
PROJECTIONS = ("left", "right", "teacher_left", "teacher_right")
SAVED = {"w": np.ones(2)}
FILES = {name: FOLDER / name for name in ("a.jsonl", "t.csv", "r.csv", "v.json", "none")}
FILES["a.jsonl"].write_text('{"a": 1}\n')
report.write_table(FILES["t.csv"], "calibration", CALIBRATION)
(FOLDER / "w").mkdir()
report.write_table(FOLDER / "w" / "results.csv", "results", ROWS)
report.write_verdicts(FILES["v.json"], VERDICTS)
with checkpoint.Checkpointer(FOLDER / "kept") as KEPT:
    KEPT.save(1, SAVED, score=1.0)


def save(step, state, metadata=None, score=None):
    with checkpoint.Checkpointer(tempfile.mkdtemp(dir=FOLDER)) as keeper:
        keeper.save(step, state, metadata, score=score)


def nnx_module():
    from flax import nnx

    return nnx.Linear(3, 2, rngs=nnx.Rngs(0))


# --- Calls that work ------------------------------------------------------------------------------

GOOD = {
    **{"logits_fn": NETWORK, "inputs": INPUTS, "labels": LABELS, "logits": LOGITS, "key": KEY},
    **{"targets": SHARES, "eps": 0.1, "norm": "l2", "source": NETWORK, "attack": FGSM},
    **{"attacks": {"fgsm": PLAN}, "num_draws": 2, "temperature": 2.0, "num_classes": K},
    **{"preprocess": jnp.round, "random_logits_fn": lambda key, x: linear(WEIGHTS, x)},
    **{"shape": SHAPE, "batch_size": 2, "num_examples": 5, "seed_words": [1, 2], "epoch": 0},
    **{
        "stack": STACK,
        "teacher": NETWORK,
        "student": NETWORK,
        "step": STEP,
        "params": WEIGHTS,
        "state": STATE,
    },
    **{"examples": (INPUTS, LABELS), "generation": 0, "num_generations": 2, "callback": print},
    **{"number": 0, "generations": [GENERATION], "num_epochs": 1, "loss_fn": train.hard_loss()},
    **{"report.result": EVALUATION, "place": 0, "report.from_evaluation.folder": FOLDER / "page"},
    "make": lambda rngs: nnx.Linear(2, 2, rngs=rngs),
    "measured": [(EVALUATION, [report.NetworkName("d")])],
    **{"outcome": OUTCOME, "outcomes": {"a": OUTCOME}, "plan": PLAN, "result": RESULT},
    **{"shards": {}, "host": 0, "num_hosts": 2, "values": [0.1, 0.2], "groups": ["a", "a"]},
    **{"networks": [NETWORK, NETWORK], "log10_values": [-1.0, -2.0], "first": FLAGS},
    **{"second": ~FLAGS, "successes": 2, "total": 4, "distance": [1.0, 2.0, 3.0]},
    **{"success": FLAGS, "fun": NETWORK, "trees": [{"w": np.ones(2)}] * 2, "i": 0},
    **{"tree": {"w": np.ones((2, 3))}, "input_shape": (8, 8, 1), "variables": {"params": {}}},
    **{"model": nets.digits_net(width=0.1), "module": nnx_module(), "keys": KEYS},
    **{"delta": INPUTS, "value": INPUTS, "gradient": INPUTS, "like": INPUTS, "center": INPUTS},
    **{"length": 0.1, "bounds": (0.0, 1.0), "batch": BATCH, "multiple": 2, "devices": DEVICES},
    **{"num_rows": 3, "axis_name": None, "path": FOLDER / "file", "rows": ROWS, "main": int},
    **{"kind": "calibration", "directory": FOLDER / "d", "workdir": FOLDER, "record": {"a": 1}},
    **{"content": {"a": 1}, "text": "a", "verdicts": VERDICTS, "pictures": PICTURES},
    **{"apply_fn": apply, "optimizer": optax.sgd(0.1), "name": "digits", "metadata": {}},
    **{"like": INPUTS, "attacks.autoattack.version": "rand", "attacks.ensemble.attacks": [FGSM]},
    **{"attacks.num_steps": 2, "attacks.num_queries": 60, "attacks.num_starts": 2},
    **{"attacks.num_searches": 1, "attacks.num_samples": 2, "attacks.num_angles": 2},
    **{"attacks.num_shifts": 2, "attacks.num_epochs": 1, "attacks.norm": "linf"},
    **{
        "attacks.sigma_zero.norm": "l0",
        "data.batches.labels": LABELS,
        "data.batches.targets": SHARES,
    },
    **{"diagnose.callback": stop, "evaluate.accuracy_against_eps.outcomes": OUTCOME},
    **{"evaluate.accuracy_against_eps.correct": OUTCOME.success, "evaluate.eps": [0.0, 1.0]},
    **{"evaluate.accuracy_against_queries.queries": [0, 1], "evaluate.worst_case.eps": 1.0},
    **{"evaluate.accuracy_against_steps.steps": [0, 1], "evaluate.distances.plans": {"l2": FMN}},
    **{"evaluate.summarize.eps": 0.1, "losses.targeted_dlr.targets": LABELS + 1},
    **{"metrics.accuracy.mask": np.ones(B), "metrics.worst_case.success": {"a": FLAGS}},
    **{"metrics.paired_over_seeds.first": [0.1, 0.2], "metrics.paired_over_seeds.second": [1, 2.0]},
    **{"metrics.sensitivity_histogram.edges": [-3.0, 0.0], "nets.ConvNet.features": ((4,),)},
    **{"nets.ConvNet.hidden": (8,), "norms.keys": jax.random.split(KEY, B)},
    **{"layers": {"hint": "hint"}, "num_heads": 2, "teachers": [NETWORK, NETWORK], "progress": 0.5},
    **{f"distill.{name}.student_loss": distill.soft_loss for name in ("online", "through_token")},
    **{"distill.confidence_weights.teacher_logits": np.stack([LOGITS, 2 * LOGITS])},
    **{"losses.mask": np.ones(B), "losses.features": INPUTS, "losses.teacher_features": 2 * INPUTS},
    **{f"losses.relation_kl.{name}": INPUTS[..., 0] for name in PROJECTIONS},
    **{"metrics.features": LOGITS, "metrics.other": 2 * LOGITS},
    **{"losses.teacher_logits": 2 * LOGITS, "nets.ResNet.depth": 8, "nets.resnet.depth": 8},
    **{"nets.PlainNet.depth": 2, "nets.plain_net.depth": 2, "nets.ViT.depth": 1},
    **{"nets.with_features.layers": {"hint": "conv_0_1"}},
    **{"nets.ViT.patch_size": 2, "nets.ViT.width": 8, "nets.ViT.num_heads": 2},
    **{"nets.train": False, "nets.WideResNet.depth": 10, "nets.WideResNet.width": 0.25},
    **{"nets.wide_resnet.depth": 10, "nets.wide_resnet.width": 0.25},
    **{"norms.per_example.value": 0.1, "parallel.tree": INPUTS, "parallel.split.tree": INPUTS},
    **{"parallel.split.devices": jax.devices()[:3], "report.read_table.path": FILES["t.csv"]},
    **{"report.read_verdicts.path": FILES["v.json"], "report.read_tables.folder": FOLDER / "w"},
    **{"report.write_report.folder": FOLDER / "w"},
    **{"report.write_table.rows": CALIBRATION, "report.write_picture_grid.max_examples": 1},
    **{"runtime.read_jsonl.path": FILES["a.jsonl"], "runtime.atomic_write.content": b"a"},
    **{"runtime.enable_compilation_cache.directory": jax.config.jax_compilation_cache_dir},
    **{"train.fit.devices": DEVICES, "sweep.fit.devices": DEVICES, "sweep.params": PARAMS},
    **{"sweep.fit.state": STATES, "sweep.loss_fn": train.hard_loss(np.ones(2))},
    **{"sweep.generations": [GENERATIONS], "checkpoint.save.state": SAVED},
    **{"robust.loss": train.hard_loss, "robust.igdm_loss.loss": robust.ard_loss},
    **{"checkpoint.save.step": 9, "checkpoint.like": SAVED, "checkpoint.restore.step": 1},
}
# What bad values are made of where nothing is passed.
MODEL = {"targets": (LABELS + 1) % K, "init": INPUTS, "norm": "l2", "order": np.arange(B)}

# --- The bad values of each sort of argument ------------------------------------------------------

JUNK = {"text": "no", "none": None, "number": 3, "object": object()}
NO_NUMBER = {"text": "0.1", "none": None, "bool": True, "complex": 1j, "NaN": math.nan}
NO_NUMBER |= {"mapping": {}, "object": object(), "ragged": [[1.0], [1.0, 2.0]]}
NO_NUMBER |= {"infinite": math.inf, "minus infinite": -math.inf, "matrix": np.full((B, 1), 0.5)}
NO_SCALAR = {**NO_NUMBER, "no numbers": np.zeros(0), "one a row": np.full(B, 0.5)}
NO_ROW = {**NO_NUMBER, "too many": np.full(B + 2, 0.5)}
LESS, MORE = {"below": -0.5}, {"above": 1.5}


def parts(good, **of):
    """Copies of a named tuple with one bad field each."""
    return {
        f"{name}: {kind}": good._replace(**{name: bad})
        for name in of
        for kind, bad in of[name].items()
    }


def first(rows, **columns):
    return [{**rows[0], **columns}]


def array(good):
    good = np.asarray(good)
    nan = np.where(np.arange(good.size).reshape(good.shape) == 1, np.nan, good)
    bad = {**JUNK, "complex": good.astype(np.complex64), "of text": good.astype(str), "NaN": nan}
    return {**bad, "scalar": good.flat[0]}


def inputs(good):
    bad = {**array(good), "infinite": np.where(good > good.min(), good, np.inf), "empty list": []}
    bad |= {"one example": good[:, 0, 0, 0], "bytes": (good * 255).astype(np.uint8)}
    return {**bad, "bool": good > 0.5, "labels": LABELS}


def labels(good):
    bad = {**JUNK, "float": good.astype(float), "NaN": np.full(B, np.nan), "bool": good > 0}
    bad |= {"negative": -1 - good, "beyond": good + K, "one too few": good[:-1], "scalar": 1}
    bad |= {"one-hot": np.eye(K, dtype=int)[good % K], "column": good[:, None], "inputs": INPUTS}
    return {**bad, "of text": good.astype(str), "empty": good[:0]}


def soft(good):
    bad = {**array(good), "one row": good[0], "one too few": good[:-1], "sum 2": good * 2}
    bad |= {"negative": np.array([[2, -1, 0, 0]] * B, np.float32), "a column less": good[:, 1:]}
    return {**bad, "labels": LABELS, "logits": LOGITS}


def logits(good):
    bad = {**array(good), "labels": LABELS, "one row": good[0], "whole": good.astype(int)}
    return {**bad, "bool": good > 0, "cube": good[None]}


def count(good, least=1):
    bad = {"text": "2", "none": None, "bool": True, "NaN": math.nan, "infinite": math.inf}
    bad |= {"float": 2.0, "fraction": 2.5, "negative": -1, "list": [2], "complex": 2j}
    return {**bad, "array": np.array([2, 3]), "mapping": {}, "below": least - 1}


def key(good):
    bad = {**JUNK, "NaN": math.nan, "negative": -1, "generator": np.random.default_rng(0)}
    bad |= {"too many": jax.random.split(KEY, B + 2), "matrix": jax.random.split(KEY, (B, 2))}
    return {**bad, "bool": True, "other generator": jax.random.key(0, impl="rbg")}


def network(good):
    bad = {**JUNK, "list": [good], "mapping": {"params": WEIGHTS}, "inputs": INPUTS}
    bad |= {"a number a row": of_logits(lambda z: z.mean(1)), "one row": of_logits(lambda z: z[:1])}
    bad |= {"whole logits": of_logits(lambda z: z.astype(int))}
    return {**bad, "one class": of_logits(lambda z: z[:, :1])}


def choice(good):
    bad = {**JUNK, "array": np.array(["linf", "l2"]), "list": [good], "empty": ""}
    return {**bad, "upper case": str(good).upper(), "bytes": str(good).encode()}


def flags(good):
    bad = {**JUNK, "shares": np.linspace(0, 1, good.size).reshape(good.shape), "empty": good[:0]}
    bad |= {"NaN": np.where(good, np.nan, 0.0), "of text": good.astype(str)}
    return {**bad, "others": good.astype(int) + 1, "matrix": good[None, None]}


def numbers(good):
    return {**array(good), "matrix": np.array([good], float), "empty": np.zeros(0)}


def rows(good, column="test_accuracy"):
    bad = {**JUNK, "row": good[0], "empty": [], "texts": ["rows"], "numbers": [1, 2]}
    bad |= {"a column less": [{name: good[0][name] for name in good[0] if name != column}]}
    bad |= {f"{column} {value!r}": first(good, **{column: value}) for value in ("high", 2.0, [0.5])}
    bad |= {f"temperature {value}": first(good, temperature=value) for value in (-1.0, math.inf)}
    bad |= {"seed 0.5": first(good, seed=0.5), "twice": [good[0], good[0]]}
    return {**bad, **{f"dataset {value}": first(good, dataset=value) for value in (None, 3)}}


def verdicts(good):
    bad = {**JUNK, "row": good[0], "numbers": [1], "twice": good * 2, "bare": [NET]}
    bad["plain values for a verdict"] = first(good, verdict=good[0]["verdict"].as_dict())
    return {**bad, "text for a verdict": first(good, verdict="masked")}


def examples(good, targets=()):
    bad = {**JUNK, "one": (INPUTS,), "four": (INPUTS, LABELS, SHARES, SHARES)}
    bad |= {f"inputs: {kind}": (wrong, LABELS) for kind, wrong in inputs(INPUTS).items()}
    bad |= {f"labels: {kind}": (INPUTS, wrong) for kind, wrong in labels(LABELS).items()}
    return {**bad, **{f"targets: {kind}": (INPUTS, LABELS, targets[kind]) for kind in targets}}


def triples(good):
    return examples(good, {kind: bad for kind, bad in soft(SHARES).items() if bad is not None})


def plan(good):
    counts = {kind: bad for kind, bad in count(1).items() if bad is not None}
    bad = parts(good, num_examples=counts, batch_size=count(1), attack={"text": "fgsm"})
    return {**JUNK, "attack": FGSM, **bad}


def result(good):
    wrong = {"NaN": np.full((1, B), np.nan), "negative": np.full((1, B), -1.0), "text": "no"}
    wrong |= {"too few": good.distance[:, :-1]}
    hits = {"shares": np.full((1, B), 0.5), "flat": good.success[0]}
    return {**JUNK, **parts(good, distance=wrong, success=hits, info={"none": None})}


def pictures(good):
    bad = {**JUNK, "list": [1], "empty": {}, "clean alone": {"clean": INPUTS}}
    bad |= {"labels: one too few": {**good, "labels": LABELS[:-1]}}
    return {
        **bad,
        **{f"clean: {kind}": {**good, "clean": wrong} for kind, wrong in array(INPUTS).items()},
    }


KINDS = {
    **{"inputs": inputs, "box": lambda good: {**inputs(good), "outside": good * 255}},
    **{"labels": labels, "targets": lambda good: {**labels(good), "the labels": LABELS}},
    **{"soft": soft, "logits": logits, "key": key, "network": network, "choice": choice},
    **{"count": count, "count from 0": functools.partial(count, least=0)},
    "depth": lambda good: {**count(good), "odd": 9, "three": 3},
    **{"count from 2": functools.partial(count, least=2), "flags": flags, "numbers": numbers},
    **{"rows": rows, "table": functools.partial(rows, column="ece"), "verdicts": verdicts},
    **{"examples": examples, "triples": triples, "plan": plan, "result": result},
    **{"init": lambda good: {**inputs(good), "one too few": good[:-1]}, "pictures": pictures},
    "floats": lambda good: {kind: bad for kind, bad in array(good).items() if kind != "NaN"},
    "stack": lambda good: {**network(good), "no stack": NETWORK},
    **{"radius": {**NO_ROW, **LESS}, "above 0": {**NO_ROW, "below": 0.0}, "any": NO_SCALAR},
    **{"share": {**NO_ROW, **LESS, **MORE}, "one from 0": {**NO_SCALAR, **LESS}},
    **{"one above 0": {**NO_SCALAR, "below": 0.0}, "one share": {**NO_SCALAR, **LESS, **MORE}},
    "confidence": {**NO_SCALAR, "below": 0.0, "above": 1.0, "percent": 95},
    "judged": {"text": "no", "number": 3, "list": [1], "mapping": {"x": 1}, "object": object()},
    "flag": {"text": "no", "none": None, "one": 1, "float": 0.0, "array": FLAGS},
    "function": {**JUNK, "list": [print], "mapping": {}},
    "text": {"none": None, "number": 3, "list": ["a"], "bytes": b"a", "bool": True},
    "path": {"none": None, "number": 3, "bool": True, "list": ["a"], "object": object()},
    "file": {"none": None, "number": 3, "no file": FILES["none"], "other": FILES["a.jsonl"]},
    "bounds": {
        **{**JUNK, "turned": (1.0, 0.0), "equal": (0.5, 0.5), "NaN": (0.0, math.nan)},
        **{
            "one": (0.0,),
            "endless": (0.0, math.inf),
            "three": (0.0, 0.5, 1.0),
            "texts": ("0", "1"),
        },
        **{"bools": (False, True), "nones": (None, None), "arrays": (np.zeros(B), np.ones(B))},
    },
    "devices": {**JUNK, "empty": [], "texts": ["cpu"], "numbers": [0]},
    "mapping": {**JUNK, "list": [1, 2]},
    "own": {**JUNK, "list": [1], "mapping": {}},  # something of the library's own
    "attacks": {**JUNK, "empty": [], "numbers": [1], "of text": ["fgsm"]},
    "order": {
        **{**JUNK, "float": np.arange(3.0), "beyond": np.array([3]), "negative": np.array([-1])},
        **{"matrix": np.eye(3, dtype=int), "bools": FLAGS},
    },
    "words": {**JUNK, "texts": ["a"], "negative": [-1], "fractions": [0.5], "matrix": [[1]]},
    "shape": {**JUNK, "negative": (-1, 4), "fractions": (1.5,), "texts": ("a",), "bools": (True,)},
    "window": {**JUNK, "one": (2,), "three": (2, 2, 2), "zero": (0, 2), "fractions": (1.5, 2.0)},
    "padding": {
        **{**JUNK, "name": "FULL", "one": ((0, 0),), "flat": (0, 0), "fractions": ((0.5, 0),) * 2},
        **{"negative": ((-1, 0), (0, 0)), "beyond": ((2, 0), (0, 0)), "bools": ((True, True),) * 2},
    },
    "image": {**JUNK, "flat": (64,), "small": (2, 2, 1), "negative": (-8, 8, 1)},
    "blocks": {**JUNK, "flat": (4, 4), "negative": ((-1,),), "fractions": ((1.5,),)},
    "sequence": {**JUNK, "empty": [], "numbers": [1], "mappings": [{}], "texts": ["a"]},
    "starts": {**JUNK, "numbers": [1], "too many": [STATE, STATE]},
    "grid": {
        **{"text": "no", "number": 1.0, "object": object(), "falling": [1.0, 0.5], "empty": []},
        **{"twice": [1.0, 1.0], "negative": [-1.0, 1.0], "NaN": [0.0, math.nan], "bools": FLAGS},
        **{"infinite": [0.0, math.inf], "matrix": [[0.0, 1.0]], "texts": ["0", "1"]},
    },
    "outcomes": {**JUNK, "empty": {}, "numbers": {"a": 1}, "list": [1]},
    "plans": {**JUNK, "attack": {"l2": FGSM}, "numbers": {"l2": 1}, "list": [PLAN]},
    "store": {"text": "folder", "number": 3, "list": [], "object": object()},
    "names": {"text": "ab", "number": 3, "too few": ["a"], "twice": ["a", "a"], "numbers": [1, 2]},
    "chosen": {**JUNK, "other": ["pgd"], "numbers": [1]},
    "chains": {**JUNK, "flat": [0, 1], "beyond": [[0, 2]], "texts": ["ab"], "fractions": [[0.5]]},
    "groups": {**JUNK, "too few": ["a"], "alone": ["a", "b"], "lists": [["a"], ["a"]]},
    "counts": {"text": "no", "negative": [-1], "too many": [0, 0], "fractions": [0.5]},
    "mask": {
        **{"text": "no", "number": 1, "too few": np.ones(2), "NaN": np.full(B, np.nan)},
        **{"column": np.ones((B, 1)), "zeros": np.zeros(B), "shares": np.full(B, 0.5)},
    },
    "sizes": {"text": "no", "number": 3, "list": ["hint"], "other": {"a": 3}, "zero": {"hint": 0}},
    "layers": {**JUNK, "empty": {}, "list": ["hint"], "numbers": {"hint": 3}, "turned": {3: "a"}},
    "three names": {**JUNK, "text": "abc", "two": ("a", "b"), "numbers": (1, 2, 3)},
    "shares": {
        **{"text": "no", "number": 1.0, "object": object(), "sum 2": [1.0, 1.0], "empty": []},
        **{"negative": [-0.5, 1.5], "NaN": [np.nan, 1.0], "mapping": {}, "bools": [True, False]},
    },
    "edges": {
        **{**JUNK, "one": [1.0], "falling": [0.0, -3.0], "NaN": [-3.0, math.nan]},
        **{"matrix": [[-3, 0]], "texts": ["-3", "0"], "narrow": [-1.5, 0.0]},
    },
    "successes": {
        **{**JUNK, "empty": {}, "list": [FLAGS], "lengths": {"a": FLAGS, "b": FLAGS[:1]}},
        **{f"of {kind}": {"a": bad} for kind, bad in flags(FLAGS).items()},
    },
    "module": {**JUNK, "function": linear, "class": nets.ConvNet},
    "tree": {**JUNK, "scalars": {"w": 1.0}, "lengths": [np.ones(2), np.ones(3)], "empty": {}},
    "trees": {
        **{**JUNK, "empty": [], "other names": [{"w": np.ones(2)}, {"v": np.ones(2)}]},
        **{"texts": ["a", "b"], "lengths": [np.ones(2), np.ones(3)], "nones": [None, None]},
    },
    "place": {**JUNK, "below": -3, "fraction": 0.5, "bool": True, "list": [0], "slice": slice(1)},
    "variables": {**JUNK, "empty": {}, "weights": {"w": 1}},
    "pixels": {**JUNK, "matrix": LOGITS, "labels": LABELS, "bool": INPUTS > 0},
    "batch": {
        **{**JUNK, "tuple": (INPUTS, LABELS), "no mask": BATCH._replace(mask=None)},
        "lengths": BATCH._replace(labels=LABELS[:-1]),
        "empty": parallel.Batch(INPUTS[:0], LABELS[:0], None, np.ones(0)),
    },
    "arrays": {"text": "no", "object": object(), "texts": ["a"]},
    "rows of arrays": {"text": "no", "texts": ["a"], "scalar": 1.0, "rows": INPUTS[:2]},
    "axis": {"number": 3, "list": ["a"]},
    "record": {**JUNK, "list": [1], "object inside": {"a": object()}, "keys": {(1, 2): 3}},
    "json": {"object": object(), "keys": {(1, 2): 3}, "set": {1}, "function": linear},
    "bytes": {**JUNK, "list": [1]},
    "saved": {"text": "no", "none": None, "object": object(), "empty": {}, "texts": {"w": "a"}},
    "like": {"text": "no", "none": None, "empty": {}, "shape": {"w": np.ones(3)}, "name": {"v": 1}},
    "hyperparams": {
        **{"text": "no", "number": 3, "object": object(), "list": [1], "unknown": {"a": 1.0}},
        **{
            f"learning_rate: {kind}": {"learning_rate": bad}
            for kind, bad in {**NO_SCALAR, "below": 0.0}.items()
        },
    },
    "fingerprint": {"number": 3, "other": "abc", "list": ["a"]},
    "optimizer": {**JUNK, "maker": optax.sgd},
    "run keys": lambda good: {**key(good), "one": KEY},
}


# Each sort, and the arguments that are of it; then those that are called as their sort is.
SORTS = """
network: logits_fn source surrogate
function: student teacher loss preprocess substitute apply_fn loss_fn augment objective progress
    exchange output fun attack make teacher_loss student_loss inner
    random_logits_fn main conv_general_dilated callback attacks.bpda.logits_fn nets.logits_fn
    parallel.compile_step.step base distill.distance nets.norm nets.activation
radius: eps step_size decay max_angle max_shift alpha beta overshoot eta weight distill.gamma
    power clean_weight entropy_scale correction weight_perturbation trades_weight gradient_weight
    attacks.carlini_wagner_l0.confidence attacks.carlini_wagner_l2.confidence
    attacks.carlini_wagner_linf.confidence attacks.ead.confidence norms.eps norms.length
    norms.per_example.value
share: progress rho gamma alpha_max p_init hard_weight threshold threshold_step final_gamma shrink
    robust_weight
above 0: learning_rate initial_const largest_const sigma delta orthogonal_step source_step
    const_factor initial_norm temperature theta softness clean_temperature robust_temperature
    attacks.hop_skip_jump.gamma
count: num_steps num_restarts num_targets num_queries num_samples max_samples num_starts
    num_searches num_angles num_shifts num_draws num_parallel batch_size num_examples
    num_sensitivity num_bins multiple num_hosts max_to_keep max_examples memory_limit
    steps_per_call num_generations total block_size nets.num_classes report.summary.width
    nets.ViT.depth nets.ViT.width patch_size num_heads mlp_ratio num_groups
    channels stem_size stem_stride stem_channels head_channels
depth: depth
logits: teacher_logits metrics.linear_cka.features metrics.other
count from 2: num_candidates num_classes max_features
count from 0: first_target num_epochs host epoch generation number successes num_rows data.start
    data.num_examples place checkpoint.step keep_best nets.EMO.window
flag: enabled best_loss trace random_start abort_early minimum_norm temperature_squared vmapped
    online distillation_token nets.train stem_pool projections
text: stage shard_name remedy report.write_picture_grid.attack report.write_picture_grid.norm
    report.from_evaluation.dataset parallel.barrier.name nets.name
path: directory folder workdir data_dir cache_dir
choice: norm decision_rule version mode name kind
mapping: measures config run figures pictures eps_grids metadata agreements
one above 0: loss_cap width train_temperature attacks.softmax_at.temperature diagnose.eps
    distill.soft_labels.temperature distill.chain.temperature train.mixup.alpha
    metrics.temperature metrics.log10_sensitivity_softmax.temperature train.sgd.learning_rate
    nets.epsilon
any: fill shift checkpoint.save.score
own: start step state params outcome distill.initial_weights.start report.result
    report.pictures.result report.from_evaluation.result
judged: report.from_evaluation.verdicts
numbers: log10_values values distance metrics.paired_over_seeds.first
    metrics.paired_over_seeds.second
flags: success first second evaluate.correct
floats: value gradient center norms.delta norms.like norms.inputs losses.features
    losses.teacher_features left right teacher_left teacher_right
axis: axis_name
box: inputs
json: content
place: i
words: seed_words
sequence: generations networks teachers measured compared
store: shards
chosen: transfer
layers: layers
sizes: nets.with_features.projections
three names: distill.names teacher_names
shares: weights
counts: num_nonfinite
shape: hidden blocks
window: window_shape strides
padding: padding
module: model
image: input_shape
plans: distances evaluate.attacks
one share: dropout_rate drop_path_rate train.sgd.momentum nets.momentum
run keys: keys
one from 0: attacks.autoattack.eps attacks.universal.eps attacks.universal.step_size
    evaluate.summarize.eps evaluate.worst_case.eps train.sgd.decay min_free_gib
inputs: data.inputs distill.inputs evaluate.clean.inputs evaluate.agreement.inputs metrics.inputs
    train.inputs
soft: data.targets losses.targets
starts: distill.start sweep.start
arrays: distill.model_state parallel.replicate.tree train.params train.model_state sweep.params
    sweep.model_state
grid: evaluate.eps evaluate.steps evaluate.queries
labels: losses.targeted_dlr.targets
successes: metrics.worst_case.success
key: nets.init.key
pixels: nets.max_pool.inputs
blocks: nets.ConvNet.features stages
variables: nets.logits_fn.variables nets.outputs_fn.variables
rows of arrays: parallel.split.tree
table: report.write_table.rows
pictures: report.write_picture_grid.pictures
file: report.read_table.path report.read_verdicts.path
bytes: runtime.atomic_write.content
triples: train.fit.examples sweep.fit.examples
like: checkpoint.like
saved: checkpoint.state
"""
ALIKE = """
    text path attacks order module labels targets logits key bounds init devices shape batch
    groups names edges mask tree trees record verdicts rows examples plan result chains
    confidence hyperparams fingerprint optimizer stack plans outcomes
"""
SORT = {arg: arg for arg in ALIKE.split()} | {
    arg: line.partition(": ")[0]
    for line in SORTS.replace("\n    ", " ").strip().splitlines()
    for arg in line.partition(": ")[2].split()
}
# Other words that name an argument in a message.
ALIASES = {
    **dict.fromkeys(("logits_fn", "source", "fun"), "logits|callable"),
    **dict.fromkeys(("data_dir", "cache_dir", "directory", "folder", "workdir"), "path"),
    **{"stack": "logits", "networks": "stack", "logits": "labels", "input_shape": "inputs"},
    **{"keys": "key", "generations": "params", "record": "content", "like": "state"},
    **{"groups": "group", "verdicts": "verdict", "rows": "row", "path": "/", "pictures": "path"},
}
ONES = "apgd_?.*|bim|mim|fgsm|fmn|ddn|deepfool|ead|carlini.*|jsma|sigma_zero|spatial|maximize|fab"
FINE = {
    (rf"attacks\.({ONES}|fab_targeted|transfer|ensemble)", "key", ".*"): "nothing is drawn",
    (r"attacks\.universal", "loss_cap", "none"): "no cap",
    (r"attacks\..*|evaluate\.distance_plans", "bounds", "endless"): "for attacks without a box",
    (r"evaluate\.distance_plans", "bounds", "arrays"): "an end for each feature",
    (r"norms\.per_example", "value", "NaN|.*infinite|negative|below"): "any number may be shaped",
    (r"norms\..*", "bounds", "endless"): "a box without an end",
    (r"losses\..*", "(teacher_)?logits|targets", "NaN"): "a loss of NaN says so",
    (r"metrics\..*", "logits", "NaN"): "counts as no prediction",
    (r"metrics\.top1_agreement", "other", "NaN"): "agrees with nothing",
    (r"losses\..*", "temperature", "matrix"): "one number each, as a column",
    (
        r"(distill|robust|train)\..*_loss",
        ".*temperature|.*weight|alpha|beta|gamma|power|entropy_scale|correction",
        "matrix|too many",
    ): "one a run",
    (r"distill\.(feature|relation)_loss", "base", "none"): "no loss on the logits",
    (r"distill\.confidence_weights", "teacher_logits", "NaN"): "weights of NaN say so",
    (r"nets\.with_temperature", "temperature", "too many"): "one a network of a stack",
    (r"metrics\.predicts", "logits", "one row|cube"): "any number of rows",
    (
        r"metrics\..*",
        "log10_values",
        "NaN|empty",
    ): "the mean is NaN; the histogram counts them apart",
    (r"metrics\.robustness", "distance", "NaN"): "where the attack failed",
    (r"metrics\.proportion", "successes|total", "float"): "a whole number of another type",
    (r"data\.batches", "inputs", ".*"): "batches are of whatever array is given",
    (r"data\.batches", "labels", "beyond"): "the number of classes is not known",
    (r"data\.batches", "targets", ".*"): "train.fit checks what they say",
    (r"nets\.max_pool", "strides", "none"): "as the windows",
    (r"nets\.stack", "trees", "nones"): "trees without arrays make one",
    (r"nets\.index", "tree", "none|empty"): "without arrays there is nothing to index",
    (r"evaluate\.evaluate", "attacks", "attack"): "an attack without a plan",
    (r"report\.tables", "measured|compared", "empty"): "nothing was measured or compared",
    (r"report\.from_evaluation", "names", "too few"): "one name for one network",
    (r"evaluate\.summarize", "norm", "text|upper case|empty"): "a norm may have any name",
    (r"distill\.with_generation", "callback", "none"): "no callback",
    (r"report\.write_(results|table)", "rows", "empty"): "a table without rows",
}
WITHOUT_CHECKS = {
    "nets.logits_of": "it takes whatever a network gives",
    "parallel.local": "any tree may hold arrays of several processes, or none",
    "runtime.initialize": "what fits starts JAX's runtime; tests/test_processes.py has its errors",
    "nets.conv_general_dilated": "its errors are those of jax.lax, whose place it takes",
}

# Classes, whose fields are checked.
NETWORKS = {f"nets.{name}": kind for name, kind in vars(nets).items() if isinstance(kind, type)}


def public():
    """The public functions by name; an object such as `attacks.softmax` is none."""
    for name in MODULES:
        module = importlib.import_module(f"jdistill.{name}")
        for attribute, value in vars(module).items():
            listed = getattr(module, "__all__", None)
            own = attribute in listed if listed else value_of(value, module)
            if own and inspect.isfunction(value) and f"{name}.{attribute}" not in WITHOUT_CHECKS:
                yield f"{name}.{attribute}", value
    yield from NETWORKS.items()
    yield "runtime.ShardFolder", importlib.import_module("jdistill.runtime").ShardFolder
    yield "checkpoint.Checkpointer", checkpoint.Checkpointer
    yield "checkpoint.save", save
    yield "checkpoint.restore", KEPT.restore
    yield "checkpoint.restore_latest", KEPT.restore_latest
    yield "checkpoint.restore_best", KEPT.restore_best


def value_of(value, module):
    name = getattr(value, "__name__", "_")
    return not name.startswith("_") and getattr(value, "__module__", "") == module.__name__


FUNCTIONS = {
    name: function for name, function in public() if inspect.signature(function).parameters
}


def lookup(table, name, arg):
    keys = (f"{name}.{arg}", f"{name.partition('.')[0]}.{arg}", arg)
    return next((table[key] for key in keys if key in table), None)


def parameters(name):
    for arg, parameter in inspect.signature(FUNCTIONS[name]).parameters.items():
        variable = parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if not variable and not (name in NETWORKS and arg in ("parent", "name")):
            yield arg, parameter


def good_call(name):
    """Arguments with which the function works."""
    found = {}
    for arg, parameter in parameters(name):
        keys = {f"{name}.{arg}", f"{name.partition('.')[0]}.{arg}"}
        if parameter.default is parameter.empty or keys & GOOD.keys():
            found[arg] = lookup(GOOD, name, arg)
    return found


def entries(name):
    """`(argument, kind, value)` of all bad values of a function's arguments."""
    good = good_call(name)
    for arg, parameter in parameters(name):
        sort = lookup(SORT, name, arg)
        assert sort in KINDS, f"{name}: give {arg} a sort"
        kinds, base = KINDS[sort], good.get(arg, parameter.default)
        for kind, bad in (
            kinds(MODEL.get(arg) if base is None else base) if callable(kinds) else kinds
        ).items():
            if not (bad is None and parameter.default is None):
                yield arg, kind, bad


def is_clear(error, arg, kind):
    """One of the library's own errors, in its words, that names the argument or its part."""
    words = "|".join([arg, ALIASES.get(arg, arg), *kind.split(": ")[:-1]])
    said = re.search(r"(?s)expected .+ got .+", str(error)) and re.search(words, str(error))
    return isinstance(error, OWN) and bool(said)


def why_fine(name, arg, kind):
    for patterns, why in FINE.items():
        if all(map(re.fullmatch, patterns, (name, arg, kind))):
            return why
    return None


def outcome(name, arg, kind, bad):
    """In a word, and what was raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            FUNCTIONS[name](**{**good_call(name), arg: bad})
    except Exception as error:
        if not isinstance(error, Stopped):
            return "clear" if is_clear(error, arg, kind) else "raw", repr(error)[:300]
    return "silent" if why_fine(name, arg, kind) is None else "fine", ""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bad_inputs_are_refused_in_words(name):
    wrong = []
    for arg, kind, bad in entries(name):
        found, said = outcome(name, arg, kind, bad)
        if found in ("raw", "silent"):
            wrong.append(f"{name}({arg}=<{kind}>) is {found}: {said}")
    assert not wrong, "\n".join(wrong)


def test_the_table_is_large_and_its_calls_work():
    assert sum(1 for name in FUNCTIONS for _ in entries(name)) >= 600
    for name, function in FUNCTIONS.items():
        with contextlib.suppress(Stopped):
            function(**good_call(name))
