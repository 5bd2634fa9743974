"""Checks of `experiments.device`: attacks and training against numbers from a CPU.

A CPU's success flags, losses and accuracies are written once (`write_reference`) and carried along;
`check_attacks`, `check_training` and `check_chain` compare another device's with them.
"""

import hashlib
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.compilation_cache import compilation_cache

from experiments.bench import subjects
from experiments.bench.train import full_batches, our_training
from experiments.device_attacks import (
    FILES,
    NETWORKS,
    PRECISIONS,
    Case,
    Outcome,
    attack_all,
    cases,
    logits_of,
    work,
)
from jdistill import data, distill, export, metrics, nets, runtime, train

NUM_IMAGES = 64  # of each network
SHARE = 0.99  # of the flags must be equal

# Rounding alone parts the losses by 5e-4 between two releases of JAX on a CPU (twelve steps).
LOSS_STEPS, LOSS_BATCH, LOSS_TOLERANCE = 12, 128, 2e-3
TEMPERATURE, GENERATIONS, EPOCHS = 20.0, ("teacher", "assistant", "student"), 16
ACCURACY_TOLERANCE = 0.03  # 1.5 points between those two releases
LOGITS_TOLERANCE = 1e-4  # of the largest, at full precision

Row = dict[str, Any]


class Reference(NamedTuple):
    """Reference of a CPU.

    Attributes:
        meta: `versions`, `xla_flags`, `sources` (a hash of the library's), `num_images`, `losses`,
            `accuracies`, and `cases`: the settings by name.
        outcomes: by case, and then by network.
        logits: of the images, `[N, K]`, by network.
        digits: as `digits` gives them.
    """

    meta: dict[str, Any]
    outcomes: dict[str, dict[str, Outcome]]
    logits: dict[str, np.ndarray]
    digits: dict[str, np.ndarray]


def write_reference(
    path: str | os.PathLike,
    *,
    names: Sequence[str] = (),
    num_images: int = NUM_IMAGES,
    num_epochs: int = EPOCHS,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Compute everything that is compared, on this machine's CPU, and write it to an `.npz` file.

    Args:
        path: of the file.
        names: of attacks; empty: all.
        num_images: per network.
        num_epochs: per generation of the chain.
        say: told what is done.

    Raises:
        RuntimeError: an attack failed.
    """
    described = runtime.describe()
    meta: dict[str, Any] = {
        "versions": described["versions"],
        "xla_flags": described["xla_flags"],
        "sources": _sources(),
        "num_images": num_images,
        "num_epochs": num_epochs,
        "losses": training_losses("highest"),
        "cases": {},
    }
    say(f"losses {', '.join(f'{loss:.4f}' for loss in meta['losses'])}")
    arrays = {f"digits/{name}": value for name, value in digits().items()}
    there = work(num_images)
    for name in NETWORKS:
        arrays[f"logits/{name}"] = logits_of(there, name, "highest", num_images)
    meta["accuracies"] = chain_accuracies(digits(), "highest", num_epochs)
    say(f"accuracies {', '.join(f'{accuracy:.4f}' for accuracy in meta['accuracies'])}")
    for case, outcomes in attack_all(cases(names), there):
        if not isinstance(outcomes, Mapping):
            raise RuntimeError(
                f"expected an outcome of {case.name}, got {outcomes!r}"
            ) from outcomes
        meta["cases"][case.name] = case.settings
        for name, outcome in outcomes.items():
            for field, value in outcome._asdict().items():
                arrays[f"outcomes/{case.name}/{name}/{field}"] = value
        shares = ", ".join(f"{outcome.success.mean():.0%}" for outcome in outcomes.values())
        say(f"{case.name}: success {shares}")
    folder = pathlib.Path(path).expanduser().parent
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, meta=json.dumps(meta), **arrays)  # type: ignore[arg-type]


def read_reference(path: str | os.PathLike) -> Reference:
    """Reference that `write_reference` wrote.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"expected the CPU's reference, got no such file: {os.fspath(path)}; run "
            "make device-reference on a machine with the pinned packages, and carry the file along"
        )
    outcomes: dict[str, dict[str, Outcome]] = {}
    examples = {}
    with np.load(path) as file:
        meta = json.loads(file["meta"].item())
        for case in meta["cases"]:
            outcomes[case] = {
                name: Outcome(
                    *(file[f"outcomes/{case}/{name}/{field}"] for field in Outcome._fields)
                )
                for name in NETWORKS
            }
        logits = {name: file[f"logits/{name}"] for name in NETWORKS if f"logits/{name}" in file}
        for name in file.files:
            if name.startswith("digits/"):
                examples[name.removeprefix("digits/")] = file[name]
    return Reference(meta, outcomes, logits, examples)


def stale(reference: Reference) -> bool:
    """Check for a library that has changed since the reference was made."""
    return reference.meta["sources"] != _sources()


def _sources() -> str:
    """A hash of the library's source files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted((pathlib.Path(__file__).parents[1] / "jdistill").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------
# Training


def training_losses(precision: str | None) -> list[float]:
    """The mean losses of the first steps of the papers' network on the images.

    Args:
        precision: of matrix products; None is the device's default, which is what users train in.
    """
    images = subjects.read_images(FILES / "images.npz")
    shape = images.inputs.shape[1:]
    params, _ = nets.init(nets.mnist_net(), jax.random.key(0), shape)
    batches = full_batches(images, LOSS_BATCH, LOSS_STEPS)
    with jax.default_matmul_precision(precision):
        call = our_training(jax.device_get(params), shape, learning_rate=0.1)
        return call(batches).tolist()


def chain_accuracies(
    examples: Mapping[str, np.ndarray], precision: str | None, num_epochs: int = EPOCHS
) -> list[float]:
    """The test accuracy of each generation of a short chain on the digits.

    Args:
        examples: `inputs`, `labels`, `test_inputs`, `test_labels` of `digits`.
        precision: as of `training_losses`.
        num_epochs: per generation.
    """
    inputs, test_inputs = (
        examples[name].astype(np.float32) / 16 for name in ("inputs", "test_inputs")
    )
    model = nets.digits_net()
    step = train.make_train_step(nets.apply_fn(model), train.sgd(0.2))
    params, _ = nets.init(model, jax.random.key(0), inputs.shape[1:])
    generation = distill.Generation(step=step, params=params, num_epochs=num_epochs)
    with jax.default_matmul_precision(precision):
        states = distill.chain(
            [generation] * len(GENERATIONS),
            (inputs, examples["labels"].astype(np.int32)),
            jax.random.key(0),
            temperature=TEMPERATURE,
            batch_size=32,
        )
        logits = [train.predict(train.logits_fn(step, state), test_inputs) for state in states]
    return [metrics.accuracy(one, examples["test_labels"]).value for one in logits]


def digits() -> dict[str, np.ndarray]:
    """The digits, small enough to be carried: a device's machine may lack scikit-learn."""
    there = data.load("digits")
    found = {}
    for prefix, split in (("", there.train), ("test_", there.test)):
        found[f"{prefix}inputs"] = np.rint(split.inputs * 16).astype(np.uint8)
        found[f"{prefix}labels"] = split.labels.astype(np.uint8)
    return found


# -------------------------------------------------------------------------------------------------
# The checks


def compared(case: Case, outcomes: Mapping[str, Outcome], expected: Mapping[str, Outcome]) -> Row:
    """A row: how many flags are equal, over all networks.

    Args:
        case: the attack.
        outcomes: by network.
        expected: those of the CPU.
    """
    ours, theirs = (
        Outcome(*(np.concatenate([one[name][field] for name in NETWORKS]) for field in range(3)))
        for one in (outcomes, expected)
    )
    ties = ours.ties | theirs.ties
    equal = (ours.success == theirs.success)[~ties]
    both = ours.success & theirs.success & (theirs.distance > 0)
    ratio = ours.distance[both] / theirs.distance[both]
    share = float(equal.mean()) if equal.size else None
    different = np.flatnonzero(~ties & (ours.success != theirs.success))
    return {
        "attack": case.name,
        "examples": len(ties),
        "ties": int(ties.sum()),
        "success_cpu": float(theirs.success.mean()),
        "equal": int(equal.sum()),
        "share": share,
        "different": different,
        "different_distances": np.stack([ours.distance, theirs.distance], 1)[different],
        # Where a search took another path, whether or not it led to another flag.
        "other_distances": int((np.abs(ratio - 1) > 1e-4).sum()),
        "mean_distance_ratio": float(ratio.mean()) if ratio.size else None,
        "passed": share is None or share >= SHARE,
    }


def check_logits(reference: Reference) -> Iterator[Row]:
    """A row per network, precision and batch: how far the logits are from the CPU's.

    Args:
        reference: the CPU's.
    """
    num_images = reference.meta["num_images"]
    there = work(num_images)
    for name in NETWORKS:
        if name not in reference.logits:
            raise ValueError(
                f"expected the CPU's logits of {name}, got a reference without them; run "
                "make device-reference again"
            )
        theirs = reference.logits[name]
        scale = np.abs(theirs).max(-1, keepdims=True)
        for precision in PRECISIONS:
            for batch_size in sorted({1, 7, num_images}):
                ours = logits_of(there, name, precision, batch_size)
                yield {
                    "network": name,
                    "precision": precision,
                    "batch_size": batch_size,
                    "difference": float((np.abs(ours - theirs) / scale).max()),
                    "passed": None,
                }


def check_attacks(reference: Reference, precision: str, deadline: float) -> Iterator[Row]:
    """A row for each attack of the reference; an attack that is not in it as it is here fails.

    Args:
        reference: the CPU's.
        precision: one of `PRECISIONS`; below the highest, nothing passes or fails.
        deadline: of `time.monotonic`.
    """
    wanted = []
    for case in cases():
        settings = reference.meta["cases"].get(case.name)
        if settings == case.settings:
            wanted.append(case)
        elif settings is not None:
            yield {
                "attack": case.name,
                "error": f"the reference was made with {settings}; make it anew",
                "passed": False,
            }
    there = work(reference.meta["num_images"])
    judged = precision == PRECISIONS[0]
    for case, found in attack_all(wanted, there, precision=precision, deadline=deadline):
        if found is None:
            yield {"attack": case.name, "skipped": "no time left"}
        elif isinstance(found, BaseException):
            error = f"{type(found).__name__}: {' '.join(str(found).split())}"
            yield {"attack": case.name, "error": error, "passed": False}
        else:
            row = compared(case, found, reference.outcomes[case.name])
            yield row if judged else {**row, "passed": None}


def check_training(reference: Reference) -> Iterator[Row]:
    """A row for each step: the losses at full precision must be the CPU's."""
    found, usual = training_losses("highest"), training_losses(None)
    for step, (theirs, ours, default) in enumerate(
        zip(reference.meta["losses"], found, usual, strict=True), start=1
    ):
        difference = abs(ours - theirs) / abs(theirs)
        yield {
            "step": step,
            "cpu": theirs,
            "device": ours,
            "difference": difference,
            "device_default": default,
            "passed": difference <= LOSS_TOLERANCE,
        }


def check_chain(reference: Reference) -> Iterator[Row]:
    """A row for each generation: its accuracy must be the CPU's, at both precisions."""
    arguments = reference.digits, reference.meta["num_epochs"]
    found = [chain_accuracies(arguments[0], one, arguments[1]) for one in ("highest", None)]
    for name, theirs, ours, default in zip(
        GENERATIONS, reference.meta["accuracies"], *found, strict=True
    ):
        yield {
            "generation": name,
            "cpu": theirs,
            "device": ours,
            "device_default": default,
            "passed": max(abs(ours - theirs), abs(default - theirs)) <= ACCURACY_TOLERANCE,
        }


def check_export(reference: Reference) -> Iterator[Row]:
    """A row per network and way of reading it back: its logits must be the CPU's.

    Args:
        reference: the CPU's.
    """
    there = work(reference.meta["num_images"])
    for name in NETWORKS:
        model, variables = there.networks[name]
        theirs = reference.logits[name]
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            export.save(
                folder, nets.logits_fn(model, variables), input_shape=there.inputs.shape[1:]
            )
            saved = time.perf_counter() - began
            for read in (export.load, export.load_stablehlo):
                began = time.perf_counter()
                network = read(folder)
                seconds = time.perf_counter() - began
                ours = train.predict(network, np.asarray(there.inputs))
                difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
                yield {
                    "network": name,
                    "read": read.__name__,
                    "save_s": saved,
                    "read_s": seconds,
                    "difference": difference,
                    "passed": difference <= LOGITS_TOLERANCE,
                }


def check_cache() -> Iterator[Row]:
    """One row: a program that was compiled is read back from the cache on disk."""
    config: Any = jax.config
    before = config.jax_compilation_cache_dir, config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", True)  # off where compiling is timed
    with tempfile.TemporaryDirectory() as folder:
        runtime.enable_compilation_cache(folder)
        seconds, counts = [], []
        for _ in range(2):
            jax.clear_caches()
            started, earlier = time.perf_counter(), runtime.programs()
            training_losses("highest")
            seconds.append(time.perf_counter() - started)
            counts.append({key: n - earlier[key] for key, n in runtime.programs().items()})
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_enable_compilation_cache", before[1])
    compilation_cache.reset_cache()
    first, second = counts
    yield {
        "compiled": first["compiled"],
        "from_cache": second["from_cache"],
        "first_s": seconds[0],
        "second_s": seconds[1],
        "passed": first["compiled"] > 0 and second["compiled"] == 0,
    }
