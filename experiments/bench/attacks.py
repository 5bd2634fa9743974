"""Attacks beside those of the toolkits for PyTorch: same network, images and budget."""

import contextlib
import dataclasses
import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.bench import peers, subjects, timing, torch_side
from experiments.bench.options import TorchOptions, command
from experiments.bench.peers import Comparison
from experiments.bench.rows import Row
from experiments.bench.subjects import Images, Params
from experiments.bench.timing import AfterCall, Timing
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
OURS = "jdistill"
_NAMES = tuple(dict.fromkeys(comparison.attack for comparison in COMPARISONS))

# The largest ratios that are wanted, by attack and norm.
TARGETS = {
    ("pgd", "linf"): 0.85,
    **{("deepfool", norm): 1.3 for norm in ("l2", "linf")},
    ("ddn", "l2"): 0.95,
    **{("fmn", norm): 0.95 for norm in ("linf", "l2", "l1")},
    ("fmn", "l0"): 1.0,
    ("carlini_wagner_l2", "l2"): 0.6,
    ("jsma", "l0"): 0.3,
    ("autoattack", "linf"): 0.45,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attacks(TorchOptions):
    """Attacks beside the toolkits for PyTorch that have them too: same network, images, budget.

    A row for each toolkit, the fastest first, with success rates, and mean distances over the
    images that both fool: an attack can be fast by finding less.
    """

    attacks: tuple[Literal[_NAMES], ...] = _NAMES  # type: ignore[valid-type]
    """Attacks to time."""
    batch_size: int = 100
    """Images per call: the first so many that the network classifies correctly. AutoAttack and
    the longest of Carlini & Wagner's have their own number, and are timed once."""
    long: bool = True
    """Also these two, which take minutes."""
    slow_seconds: float = 120.0
    """Seconds; a toolkit whose first call takes longer is not called again."""


class Subject(NamedTuple):
    """Network and images to attack, the same for us and for the others.

    Attributes:
        logits_fn: the network for us.
        inputs: `[B, H, W, C]` in [0, 1].
        labels: `[B]`.
        model: the network for the others; None where there are none.
        tensors: the inputs and labels for the others.
    """

    logits_fn: LogitsFn
    inputs: Any
    labels: Any
    model: Any
    tensors: tuple[Any, Any]


def run(options: Attacks, after_call: AfterCall) -> Iterator[list[Row]]:
    """Rows of the command, attack by attack."""
    missing = missing_toolkits() if options.peers else {}
    params, images = subjects.load(options)
    subject_of = functools.cache(
        functools.partial(make_subject, params, images, beside_torch=options.peers)
    )
    chosen = [
        comparison if options.peers else comparison._replace(peers={})
        for comparison in COMPARISONS
        if comparison.attack in options.attacks and (options.long or not comparison.num_images)
    ]
    if not chosen:
        raise ValueError(
            f"expected an attack that is not long, got {', '.join(options.attacks)}; "
            "leave out --no-long"
        )
    for comparison in chosen:  # or too few images would be noticed after the first attacks
        subject_of(comparison.num_images or options.batch_size)
    for comparison in chosen:
        subject = subject_of(comparison.num_images or options.batch_size)
        yield compare(comparison, subject, options, missing, after_call)


def missing_toolkits(
    find: Callable[[str], Any] = importlib.util.find_spec,
) -> dict[str, str]:
    """Toolkits that are not installed, and what to do about it.

    Args:
        find: gives None for a module that is not there.

    Raises:
        ModuleNotFoundError: PyTorch or all toolkits are missing: there is nothing to compare with.
    """
    missing = {
        name: f"not installed; {torch_side.INSTALL}"
        for name, (module, _) in peers.TOOLKITS.items()
        if find(module) is None
    }
    if find("torch") is None or len(missing) == len(peers.TOOLKITS):
        raise ModuleNotFoundError(
            f"expected torch and at least one of {', '.join(peers.TOOLKITS)} to be installed, "
            f"got no such packages; {torch_side.INSTALL}"
        )
    return missing


def make_subject(
    params: Params, images: Images, batch_size: int, *, beside_torch: bool = True
) -> Subject:
    """Network, and the first `batch_size` images that it classifies correctly.

    Raises:
        ValueError: the weights do not fit the images, or the images are too few.
    """
    logits_fn = subjects.logits_fn(params, images.inputs.shape[1:])
    right = subjects.correct_images(logits_fn, images, batch_size)
    inputs, labels = (jnp.asarray(column) for column in right)
    if not beside_torch:
        return Subject(logits_fn, inputs, labels, None, (inputs, labels))
    model = torch_side.torch_network(params)
    return Subject(logits_fn, inputs, labels, model, torch_side.torch_batch(*right))


def compare(
    comparison: Comparison,
    subject: Subject,
    options: Attacks,
    missing: Mapping[str, str],
    after_call: AfterCall = lambda done, total: None,
) -> list[Row]:
    """Rows of an attack beside those of the other toolkits, with what each found.

    Args:
        comparison: the attack.
        subject: the network and the images.
        options: the repeats, and when a toolkit is too slow.
        missing: toolkits to skip, and why.
        after_call: told how many calls are done, of how many.
    """
    skipped = {name: missing[name] for name in comparison.peers if name in missing}
    present = {
        name: functools.partial(peer, subject.model, *subject.tensors)
        for name, peer in comparison.peers.items()
        if name not in missing
    }

    def ours() -> Any:
        inputs = subject.inputs, subject.labels
        return jax.block_until_ready(comparison.ours(subject.logits_fn, jax.random.key(0), *inputs))

    jax.clear_caches()  # or the first call would not compile what an earlier attack has in common
    # The other toolkits warn, and print where the table belongs.
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        timed = timing.interleaved(
            {OURS: ours, **present},
            repeats=1 if comparison.num_images else options.repeats,
            optional=present.keys(),
            slow_seconds=options.slow_seconds,
            after_call=after_call,
        )
        result = timed.results.pop(OURS)
        targets = peers.next_class(subject.tensors[1]) if comparison.targeted else None
        # Each is judged by the network that it attacked: a smallest change may lie so near to the
        # boundary that the other framework's rounding decides.
        distances = {
            name: torch_side.distances(
                subject.model, found, *subject.tensors, comparison.norm, targets
            )
            for name, found in timed.results.items()
        }
    distances[OURS] = np.where(result.success, result.distance, np.inf)
    line = command(options, attacks=(comparison.attack,))
    return rows(comparison, timed.timings, distances, skipped | timed.failures, line)


def rows(
    comparison: Comparison,
    timings: Mapping[str, Timing],
    distances: Mapping[str, np.ndarray],
    skipped: Mapping[str, str],
    command: str,
) -> list[Row]:
    """Rows of the toolkits, the fastest first and with the target, those without a result last.

    Of none at all there is one row, of ours alone.

    Args:
        comparison: the attack.
        timings: of ours, and by toolkit.
        distances: `[B]`, of each image's change; `inf` where the network is not fooled.
        skipped: by toolkit, why there is no result.
        command: that makes these rows.
    """
    attack, norm, ours = comparison.attack, comparison.norm, distances[OURS]
    parts = [f"{attack} {norm}", *comparison.budget.split(", "), f"{len(ours)} images"]
    name = ", ".join(dict.fromkeys(parts))  # a budget may say how many images there are
    target = TARGETS.get((attack, norm))
    ranked = sorted(timings.keys() - {OURS}, key=lambda peer: timings[peer].median)
    success = {side: float(np.isfinite(found).mean()) for side, found in distances.items()}
    return [
        Row(
            name,
            timings[OURS],
            peer,
            timings.get(peer),
            command,
            target=target if [peer] == ranked[:1] else None,
            note=skipped.get(peer, ""),
            facts={
                "success": [success[OURS], success.get(peer)],
                "mean_distance": (
                    mean_distances(ours, distances[peer]) if peer in distances else [None, None]
                ),
            },
        )
        for peer in [*ranked, *skipped] or ["none"]
    ]


def mean_distances(ours: np.ndarray, theirs: np.ndarray) -> list[float | None]:
    """Mean of our distances and of a toolkit's, over the images that both fool."""
    shared = np.isfinite(ours) & np.isfinite(theirs)
    return [float(side[shared].mean()) if shared.any() else None for side in (ours, theirs)]
