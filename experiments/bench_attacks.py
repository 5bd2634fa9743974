"""What `python -m experiments.bench attacks` times beside what, and its tables."""

import contextlib
import importlib.metadata
import importlib.util
import math
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import bench_rows, npz_network, peers, timing, torch_side
from experiments.bench_rows import BenchRow
from experiments.peers import Comparison
from jdistill import nets
from jdistill.typing import LogitsFn

COMPARISONS = (
    peers.fgsm(eps=0.1),
    peers.bim(eps=0.1, steps=10),
    peers.mim(eps=0.1, steps=10),
    peers.pgd("linf", eps=0.1, steps=40),
    peers.pgd("l2", eps=1.5, steps=40),
    peers.deepfool("l2", steps=50),
    peers.deepfool("linf", steps=50),
    peers.ddn(steps=100),
    peers.fmn("linf", steps=100),
    peers.fmn("l2", steps=100),
    peers.fmn("l1", steps=100),
    peers.fmn("l0", steps=100),
    peers.carlini_wagner_l2(searches=5, steps=100, rate=0.1, const=0.1),
    peers.carlini_wagner_l2(searches=9, steps=1000, rate=0.01, const=0.001, num_images=20),
    peers.ead(searches=5, steps=100, rate=0.02, const=0.1, beta=0.01),
    peers.jsma(features=112),
    peers.carlini_wagner_linf(steps=100, rate=0.05, const=0.1, factor=2.0),
    peers.carlini_wagner_l0(searches=1, steps=50, rate=0.1, const=1.0),
    peers.autoattack(eps=0.1, num_images=500),
)

# The toolkits of `peers`: the module to import, and the package that has the version.
_TOOLKITS = {
    "torchattacks": ("torchattacks", "torchattacks"),
    "foolbox": ("foolbox", "foolbox"),
    "adv-lib": ("adv_lib", "adv-lib"),
    "ART": ("art", "adversarial-robustness-toolbox"),
    "pyautoattack": ("pyautoattack", "pyautoattack"),
}

# The largest ratios that are wanted, by attack and norm.
_TARGETS = {
    ("pgd", "linf"): 1.0,
    ("ddn", "l2"): 0.7,
    **{("fmn", norm): 0.7 for norm in ("linf", "l2", "l1", "l0")},
    ("carlini_wagner_l2", "l2"): 0.7,
    ("jsma", "l0"): 0.7,
    ("autoattack", "linf"): 0.6,
}


class Subject(NamedTuple):
    """What is attacked: the same network and images for JAX and for PyTorch.

    Attributes:
        logits_fn: the network for us.
        inputs: `[B, H, W, C]` in [0, 1].
        labels: `[B]`.
        model: the network for the others.
        tensors: the inputs and labels for the others.
    """

    logits_fn: LogitsFn
    inputs: Any
    labels: Any
    model: Any
    tensors: tuple[Any, Any]


class Outcome(NamedTuple):
    """What an attack took and found.

    Attributes:
        timing: its seconds.
        distances: `[B]`, of each image's change; `inf` where the network is not fooled.
    """

    timing: timing.Timing
    distances: np.ndarray

    @property
    def success(self) -> float:
        """The share of images that fool the network."""
        return float(np.isfinite(self.distances).mean())


class Row(NamedTuple):
    """One attack at one budget, ours and theirs.

    Attributes:
        attack: our name for it.
        norm: of its distances.
        budget: in words.
        ours: what ours took and found.
        theirs: the same of each toolkit.
        skipped: by toolkit, why there is nothing of it.
    """

    attack: str
    norm: str
    budget: str
    ours: Outcome
    theirs: Mapping[str, Outcome]
    skipped: Mapping[str, str]

    @property
    def fastest(self) -> str | None:
        """The toolkit of the smallest median."""
        return min(self.theirs, key=lambda name: self.theirs[name].timing.median, default=None)

    def ratio(self, name: str) -> float:
        """Our median over a toolkit's."""
        return self.ours.timing.median / self.theirs[name].timing.median

    def means(self, name: str) -> tuple[float, float]:
        """Our mean distance and a toolkit's, over the images that both fool; NaN for none."""
        ours, theirs = self.ours.distances, self.theirs[name].distances
        shared = np.isfinite(ours) & np.isfinite(theirs)
        if not shared.any():
            return math.nan, math.nan
        return float(ours[shared].mean()), float(theirs[shared].mean())


def missing_toolkits() -> dict[str, str]:
    """Which toolkits are not installed, and what to do about it.

    Raises:
        ModuleNotFoundError: so is PyTorch, or all of them: there is nothing to compare with.
    """
    missing = {
        name: f"not installed; {torch_side.INSTALL}"
        for name, (module, _) in _TOOLKITS.items()
        if importlib.util.find_spec(module) is None
    }
    if importlib.util.find_spec("torch") is None or len(missing) == len(_TOOLKITS):
        raise ModuleNotFoundError(
            f"expected torch and at least one of {', '.join(_TOOLKITS)} to be installed, "
            f"got no such packages; {torch_side.INSTALL}"
        )
    return missing


def versions() -> dict[str, str]:
    """Of PyTorch and of the toolkits that are installed."""
    found = {}
    for package in ("torch", *(package for _, package in _TOOLKITS.values())):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def make_subject(
    params: npz_network.Params, inputs: np.ndarray, labels: np.ndarray, batch_size: int
) -> Subject:
    """A network, and the first `batch_size` images that it classifies correctly.

    Toolkits differ in what they do with an image that is wrong to begin with.

    Raises:
        ValueError: the weights do not fit the images, or the images are too few.
    """
    model = npz_network.conv_net(params, inputs.shape[1:])
    logits_fn = nets.logits_fn(model, {"params": params})
    inputs, labels = npz_network.correct_images(logits_fn, inputs, labels, batch_size)
    return Subject(
        logits_fn,
        jnp.asarray(inputs),
        jnp.asarray(labels),
        torch_side.torch_network(params),
        torch_side.torch_batch(inputs, labels),
    )


def compare(
    comparison: Comparison,
    subject: Subject,
    *,
    repeats: int,
    slow_seconds: float = math.inf,
    missing: Mapping[str, str] | None = None,
    after_call: Callable[[int, int], None] = lambda done, total: None,
) -> Row:
    """Time an attack beside those of the other toolkits, and measure what each found.

    Args:
        comparison: the attack.
        subject: the network and the images.
        repeats: timed calls of each, after one that warms up.
        slow_seconds: a toolkit whose first call takes longer is not called again.
        missing: toolkits to skip, and why.
        after_call: told how many calls are done, of how many.
    """
    missing = missing or {}
    present = {name: peer for name, peer in comparison.peers.items() if name not in missing}
    absent = {name: missing[name] for name in comparison.peers if name in missing}

    def ours() -> Any:
        key = jax.random.key(0)
        return jax.block_until_ready(
            comparison.ours(subject.logits_fn, key, subject.inputs, subject.labels)
        )

    def theirs(peer: peers.Peer) -> Callable[[], Any]:
        return lambda: peer(subject.model, *subject.tensors)

    jax.clear_caches()  # or the first call would not compile what an earlier attack has in common
    # The other toolkits warn, and print where the tables belong.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        timed = timing.interleaved(
            {"jdistill": ours} | {name: theirs(peer) for name, peer in present.items()},
            repeats=repeats,
            optional=present.keys(),
            slow_seconds=slow_seconds,
            after_call=after_call,
        )
        result = timed.results.pop("jdistill")
        targets = peers.next_class(subject.tensors[1]) if comparison.targeted else None
        # Each is judged by the network that it attacked: a smallest change may lie so near to the
        # boundary that the other framework's rounding decides.
        found = {
            name: torch_side.distances(
                subject.model,
                images,
                *subject.tensors,
                comparison.norm,
                targets,
            )
            for name, images in timed.results.items()
        }
    return Row(
        comparison.attack,
        comparison.norm,
        comparison.budget,
        Outcome(timed.timings["jdistill"], np.where(result.success, result.distance, np.inf)),
        {name: Outcome(timed.timings[name], distances) for name, distances in found.items()},
        absent | timed.failures,
    )


def text(rows: Sequence[Row]) -> str:
    """Both tables, and why anything is missing from them, in Markdown."""
    parts = [
        f"Beside the fastest toolkit:\n\n{fastest_table(rows)}",
        f"Beside every toolkit:\n\n{peers_table(rows)}",
        "".join(f"* {note}\n" for note in notes(rows)),
    ]
    return "\n".join(part for part in parts if part)


def fastest_table(rows: Sequence[Row]) -> str:
    """In Markdown: each attack against the fastest toolkit that has it."""
    head = ["attack", "norm", "budget", "compile s", "jdistill s", "fastest peer s"]
    cells = []
    for row in rows:
        name = row.fastest
        peer = ["–"] * len(_PEER_HEAD) if name is None else _peer_cells(row, name)
        compiling = f"{row.ours.timing.extra:.1f}"
        cells.append(
            [
                row.attack,
                row.norm,
                row.budget,
                compiling,
                bench_rows.seconds(row.ours.timing),
                *peer,
            ]
        )
    return bench_rows.table([*head, *_PEER_HEAD[1:]], cells)


def peers_table(rows: Sequence[Row]) -> str:
    """In Markdown: each attack against every toolkit that has it."""
    cells = [
        [row.attack, row.norm, row.budget, *_peer_cells(row, name)]
        for row in rows
        for name in row.theirs
    ]
    return bench_rows.table(["attack", "norm", "budget", *_PEER_HEAD], cells)


def notes(rows: Sequence[Row]) -> list[str]:
    """What the tables lack, and why."""
    return [
        f"{name} has no {row.attack} {row.norm} here: {reason}"
        for row in rows
        for name, reason in row.skipped.items()
    ]


def record(row: Row) -> dict[str, Any]:
    """JSON-able: everything that the tables show, and the seconds of every call."""

    def outcome(found: Outcome) -> dict[str, Any]:
        return {
            "median_seconds": found.timing.median,
            "seconds": found.timing.warm,
            "first_seconds": found.timing.first,
            "success_rate": found.success,
        }

    theirs = {}
    for name, found in row.theirs.items():
        ours, mean = (None if math.isnan(mean) else mean for mean in row.means(name))
        shared = {"jdistill_mean_distance": ours, "mean_distance": mean}
        theirs[name] = {**outcome(found), "ratio": row.ratio(name), **shared}
    return {
        "attack": row.attack,
        "norm": row.norm,
        "budget": row.budget,
        "compile_seconds": row.ours.timing.extra,
        "jdistill": outcome(row.ours),
        "peers": theirs,
        "fastest_peer": row.fastest,
        "skipped": dict(row.skipped),
    }


def bench_rows_of(rows: Sequence[Row]) -> list[BenchRow]:
    """Each attack against the fastest toolkit that has it, as the other commands' rows are."""
    found = []
    for row in rows:
        name = row.fastest
        reasons = "; ".join(f"{peer}: {reason}" for peer, reason in row.skipped.items())
        found.append(
            BenchRow(
                f"{row.attack} {row.norm}, {row.budget}, {len(row.ours.distances)} images",
                row.ours.timing,
                "none" if name is None else name,
                None if name is None else row.theirs[name].timing,
                target=_TARGETS.get((row.attack, row.norm)),
                note=reasons,
            )
        )
    return found


_PEER_HEAD = ["peer s", "peer", "ratio", "success %", "mean distance"]


def _peer_cells(row: Row, name: str) -> list[str]:
    """The cells of one toolkit beside ours, as `_PEER_HEAD` names them."""
    peer = row.theirs[name]
    rates = f"{100 * row.ours.success:.0f} / {100 * peer.success:.0f}"
    means = " / ".join("–" if math.isnan(mean) else f"{mean:.3g}" for mean in row.means(name))
    return [bench_rows.seconds(peer.timing), name, f"{row.ratio(name):.2f}", rates, means]
