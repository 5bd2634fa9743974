"""What `python -m experiments.device` checks: attacks and training against numbers from a CPU.

Every attack of `jdistill.attacks` runs on small trained networks, in every norm that it is made
for. A CPU's success flags, losses and accuracies are written once (`write_reference`) and carried
along; `check_attacks`, `check_training` and `check_chain` compare another device's with them.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench_train, npz_network
from jdistill import attacks, data, distill, losses, nets, runtime, train
from jdistill.typing import Array, LogitsFn, PyTree

_ROOT = pathlib.Path(__file__).parents[1]
FILES = _ROOT / "tests" / "parity"
# Both have the same shapes, so that each attack is compiled once for the two of them.
NETWORKS = ("plain_small", "distilled_small")
NUM_IMAGES = 64  # of each network

# Radii at which some examples are fooled and some are not.
_EPS = {"linf": 0.1, "l2": 1.5, "l1": 15.0}
# Settings for whichever attack has an argument of the name, so that the check is short: counts
# bound what the default would be, and a coarse search needs fewer of them.
_COUNTS = {
    "num_steps": 20,
    "num_queries": 300,
    "num_searches": 3,
    "num_samples": 20,
    "num_starts": 20,
    "num_targets": 3,
    "num_epochs": 2,
    "num_angles": 7,
    "num_shifts": 3,
}
_COARSE = {"initial_const": 0.1, "const_factor": 10.0, "largest_const": 100.0}

# Where an image lies as near to the boundary as that, two devices may judge it differently.
TIE = 1e-5
SHARE = 0.99  # of the flags must be equal

LOSS_STEPS, LOSS_BATCH, LOSS_TOLERANCE = 15, 128, 1e-3
TEMPERATURE, GENERATIONS, EPOCHS = 20.0, ("teacher", "assistant", "student"), 16
ACCURACY_TOLERANCE = 0.02

PRECISIONS = ("highest", "TF32", "bf16")


class Case(NamedTuple):
    """An attack to check.

    Attributes:
        name: of the attack, and the norm where it has a choice.
        attack: the attack with its settings.
        settings: the same as text, so that a reference made with other ones is noticed.
    """

    name: str
    attack: Callable[..., attacks.AttackResult]
    settings: str


class Outcome(NamedTuple):
    """What an attack did on one network; arrays `[N]`.

    Attributes:
        success: bool.
        ties: bool, whether the returned input is so near to a boundary that rounding decides.
        distance: float.
    """

    success: np.ndarray
    ties: np.ndarray
    distance: np.ndarray


class Work(NamedTuple):
    """The networks and images to attack.

    Attributes:
        networks: by name.
        inputs: `[N, H, W, C]`.
        labels: `[N]`.
    """

    networks: Mapping[str, tuple[nets.ConvNet, PyTree]]
    inputs: Array
    labels: Array


Row = dict[str, Any]


# -------------------------------------------------------------------------------------------------
# Cases


def cases(names: Sequence[str] = ()) -> list[Case]:
    """Every attack in every norm that it is made for, with few steps.

    Args:
        names: of the attacks; empty: all that return an `AttackResult`.

    Raises:
        ValueError: a name that is not an attack's.
    """
    there = {
        name: function
        for name, function in vars(attacks).items()
        if name in attacks.__all__
        and inspect.isfunction(function)
        and inspect.signature(function).return_annotation is attacks.AttackResult
    }
    for name in names:
        if name not in there:
            raise ValueError(f"expected attacks among {', '.join(there)}, got {name!r}")
    return [case for name in names or there for case in _cases_of(there[name])]


def _cases_of(attack: Callable[..., attacks.AttackResult]) -> list[Case]:
    traits = attacks.traits(attack)
    parameters = inspect.signature(attack).parameters
    chosen: list[str | None] = [*traits.norms] if "norm" in parameters else [None]
    found = []
    for norm in chosen:
        settings: dict[str, Any] = {} if norm is None else {"norm": norm}
        if "eps" in parameters and parameters["eps"].default is inspect.Parameter.empty:
            settings["eps"] = _EPS[norm or traits.norm or "linf"]
        for name, value in _COUNTS.items():
            default = parameters[name].default if name in parameters else None
            if default is not None and default > value:
                settings[name] = value
        settings |= {name: value for name, value in _COARSE.items() if name in parameters}
        for name, value in _required().items():
            if name in parameters:
                settings[name] = value
        found.append(
            Case(
                traits.name if norm is None else f"{traits.name} {norm}",
                functools.partial(attack, **settings),
                ", ".join(f"{name}={_text(value)}" for name, value in sorted(settings.items())),
            )
        )
    return found


@functools.cache
def _required() -> dict[str, Any]:
    """What attacks take that are made of others."""
    pgd = functools.partial(attacks.pgd, eps=_EPS["linf"], num_steps=_COUNTS["num_steps"])
    deepfool = functools.partial(attacks.deepfool, norm="linf", num_steps=_COUNTS["num_steps"])
    model, variables = network(NETWORKS[0])
    return {
        "attack": pgd,
        "attacks": (pgd, deepfool),
        "minimum_norm": True,
        "source": nets.logits_fn(model, variables),
    }


def _text(value: Any) -> str:
    if isinstance(value, functools.partial):
        settings = {key: _text(one) for key, one in sorted(value.keywords.items())}
        return f"{attacks.traits(value).name}{settings}"
    if isinstance(value, tuple):
        return ", ".join(map(_text, value))
    return getattr(value, "__name__", type(value).__name__) if callable(value) else repr(value)


# -------------------------------------------------------------------------------------------------
# Networks


def network(name: str) -> tuple[nets.ConvNet, PyTree]:
    """A trained network of `tests/parity` and its variables."""
    params = npz_network.read_params(FILES / f"{name}.npz")
    model = npz_network.conv_net(params, (28, 28, 1))
    return model, {"params": jax.tree.map(jnp.asarray, params)}


def work(num_images: int) -> Work:
    """The networks, and the first images of `tests/parity`, also those classified wrongly."""
    inputs, labels = npz_network.read_images(FILES / "images.npz")
    return Work(
        {name: network(name) for name in NETWORKS},
        jnp.asarray(inputs[:num_images]),
        jnp.asarray(labels[:num_images]),
    )


def _logits_fn(model: nets.ConvNet, variables: PyTree, precision: str) -> LogitsFn:
    """The network whose products have that precision under `_multiplying`."""
    bits = {"TF32": 10, "bf16": 7}.get(precision)
    if precision == "TF32" and jax.default_backend() == "gpu":
        bits = None  # the device rounds by itself
    if bits is None:
        return nets.logits_fn(model, variables)
    return nets.callable_logits_fn(_Rounded(model, bits), variables)


def _multiplying(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Matrix products at a precision; at the highest, nothing is set, as for any user."""
    if precision == "highest":
        return contextlib.nullcontext()
    # JAX's "bfloat16" is TF32 on a GPU, so bf16 is what `_Rounded` makes of exact products.
    return jax.default_matmul_precision("tensorfloat32" if precision == "TF32" else "highest")


@dataclasses.dataclass(frozen=True)
class _Rounded:
    """Logits with the operands of all products rounded, and the products summed in float32.

    Attributes:
        model: the network.
        bits: of the mantissas that are left: 7 for bf16, 10 for TF32.
    """

    model: nets.ConvNet
    bits: int

    def __call__(self, variables: PyTree, inputs: Array) -> Array:
        def round_inputs(call: Any, arguments: Any, options: Any, context: Any) -> Any:
            if isinstance(context.module, nn.Conv | nn.Dense):
                arguments = (self._rounded(arguments[0]), *arguments[1:])
            return call(*arguments, **options)

        kernels = jax.tree.map(
            lambda leaf: self._rounded(leaf) if leaf.ndim > 1 else leaf, variables
        )
        with nn.intercept_methods(round_inputs):
            logits: Any = self.model.apply(kernels, inputs)
        return logits

    def _rounded(self, values: Array) -> Array:
        return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=self.bits)


# -------------------------------------------------------------------------------------------------
# Attacks


def attack_all(
    chosen: Sequence[Case],
    there: Work,
    *,
    precision: str = "highest",
    deadline: float = float("inf"),
) -> Iterator[tuple[Case, dict[str, Outcome] | Exception | None]]:
    """Run the cases side by side, since nearly all of the time goes into compiling.

    Args:
        chosen: the cases.
        there: the networks and images.
        precision: one of `PRECISIONS`.
        deadline: of `time.monotonic`; what is not done by then is left.

    Yields:
        Each case as it is done: its outcomes by network, or the error, or None where no time was
        left for it.
    """
    threads = concurrent.futures.ThreadPoolExecutor(_cores())
    try:
        futures = {
            threads.submit(_attack, case, there, precision, deadline): case for case in chosen
        }
        left = set(futures)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            timeout = None if deadline == float("inf") else max(deadline - time.monotonic(), 0.0)
            for future in concurrent.futures.as_completed(futures, timeout):
                left.remove(future)
                error = future.exception()
                if error is not None and not isinstance(error, Exception):
                    raise error
                yield futures[future], error if error is not None else future.result()
        for future in sorted(left, key=list(futures).index):
            yield futures[future], None
    finally:
        threads.shutdown(wait=False, cancel_futures=True)


def _attack(case: Case, there: Work, precision: str, deadline: float) -> dict[str, Outcome] | None:
    if time.monotonic() > deadline:
        return None
    found = {}
    for name, (model, variables) in there.networks.items():
        with _multiplying(precision):
            result = case.attack(
                _logits_fn(model, variables, precision),
                jax.random.key(0),
                there.inputs,
                there.labels,
            )
        with jax.default_matmul_precision("highest"):
            logits = nets.logits_fn(model, variables)(result.inputs)
        margins = np.abs(np.asarray(losses.margin(logits, there.labels)))
        ties = margins <= TIE * np.abs(np.asarray(logits)).max(-1)
        found[name] = Outcome(np.asarray(result.success), ties, np.asarray(result.distance))
    return found


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
    return {
        "attack": case.name,
        "examples": len(ties),
        "ties": int(ties.sum()),
        "success_cpu": float(theirs.success.mean()),
        "equal": int(equal.sum()),
        "share": share,
        "different": np.flatnonzero(~ties & (ours.success != theirs.success)),
        "mean_distance_ratio": float(ratio.mean()) if ratio.size else None,
        "passed": share is None or share >= SHARE,
    }


# -------------------------------------------------------------------------------------------------
# Training


def training_losses(precision: str | None) -> list[float]:
    """The mean losses of the first steps of the papers' network on the images.

    Args:
        precision: of matrix products; None is the device's default, which is what users train in.
    """
    inputs, labels = npz_network.read_images(FILES / "images.npz")
    shape = inputs.shape[1:]
    params, _ = nets.init(nets.mnist_net(), jax.random.key(0), shape)
    batches = bench_train.full_batches(inputs, labels, LOSS_BATCH, LOSS_STEPS)
    with jax.default_matmul_precision(precision):
        call = bench_train.our_training(jax.device_get(params), shape, learning_rate=0.1)
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
    return [float(np.mean(one.argmax(-1) == examples["test_labels"])) for one in logits]


def digits() -> dict[str, np.ndarray]:
    """The digits, small enough to be carried: a device's machine may lack scikit-learn."""
    there = data.load("digits")
    found = {}
    for prefix, split in (("", there.train), ("test_", there.test)):
        found[f"{prefix}inputs"] = np.rint(split.inputs * 16).astype(np.uint8)
        found[f"{prefix}labels"] = split.labels.astype(np.uint8)
    return found


# -------------------------------------------------------------------------------------------------
# The reference


class Reference(NamedTuple):
    """What a CPU gave.

    Attributes:
        meta: `versions`, `xla_flags`, `sources` (a hash of the library's), `num_images`, `losses`,
            `accuracies`, and `cases`: the settings by name.
        outcomes: by case, and then by network.
        digits: as `digits` gives them.
    """

    meta: dict[str, Any]
    outcomes: dict[str, dict[str, Outcome]]
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
    meta["accuracies"] = chain_accuracies(digits(), "highest", num_epochs)
    say(f"accuracies {', '.join(f'{accuracy:.4f}' for accuracy in meta['accuracies'])}")
    for case, outcomes in attack_all(cases(names), work(num_images)):
        if not isinstance(outcomes, Mapping):
            raise RuntimeError(f"expected an outcome of {case.name}, got an error") from outcomes
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
    """What `write_reference` wrote.

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
        for name in file.files:
            if name.startswith("digits/"):
                examples[name.removeprefix("digits/")] = file[name]
    return Reference(meta, outcomes, examples)


def stale(reference: Reference) -> bool:
    """Whether the library has changed since the reference was made."""
    return reference.meta["sources"] != _sources()


def _sources() -> str:
    """A hash of the library's source files."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted((_ROOT / "jdistill").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------
# The checks


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
        elif isinstance(found, Exception):
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


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
