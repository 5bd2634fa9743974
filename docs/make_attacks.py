"""Writes the table of attacks into `docs/attacks.md`; `make docs` runs it.

Nothing in the table is typed by hand. What an attack takes is read from its signature and its own
error messages, the reference from its docstring; the rest is measured on two tiny networks, which
count their forward and backward passes.
"""

import collections
import functools
import inspect
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import attacks, nets, norms

PAGE = pathlib.Path(__file__).parent / "attacks.md"
BEGIN, END = "<!-- The table is written by `make docs`. -->", "<!-- The end of the table. -->"
COLUMNS = (
    "attack",
    "norms",
    "looks for",
    "targets",
    "uses",
    "kind",
    "default loss",
    "forward",
    "backward",
    "saturated softmax",
    "reference",
)

SHAPE, NUM_CLASSES = (28, 28, 1), 10  # MNIST's
# What attacks require beyond the four arguments that all of them take.
REQUIRED = {
    "eps": 0.3,
    "attacks": [functools.partial(attacks.fgsm, eps=0.3)],
    "attack": functools.partial(attacks.fgsm, eps=0.3),
    "source": lambda inputs: inputs.reshape(inputs.shape[0], -1)[:, :NUM_CLASSES],
}
# Otherwise an example may be given up early; the cost is the most that it can be.
TO_THE_END = {"abort_early": False}
# The logits of a network distilled at T are about T times as large as usual.
SATURATING = 1024.0
# An ensemble is what its attacks are, and what is transferred what it was crafted by.
COMPOSED = {"attacks": "its attacks'", "attack": "its attack's"}

Attack = Callable[..., attacks.AttackResult]
PASSES: collections.Counter[str] = collections.Counter()


def public_attacks() -> dict[str, Attack]:
    """The functions of `jdistill.attacks` that return an `AttackResult`, by name."""
    functions = {name: getattr(attacks, name) for name in attacks.__all__}
    return {
        name: function
        for name, function in functions.items()
        if inspect.isfunction(function)
        and inspect.signature(function).return_annotation is attacks.AttackResult
    }


def make_table() -> str:
    """The whole table; takes about two minutes."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for name, attack in public_attacks().items():
        cells = {"attack": f"`{name}`"} | read(attack) | measure(attack)
        lines.append([cells[column] for column in COLUMNS])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parse_table(page: str) -> dict[str, dict[str, str]]:
    """The rows of the page's table as cells by column, by the attack's name."""
    head, _, *lines = page.partition(BEGIN)[2].partition(END)[0].split("\n\n")[1].splitlines()
    columns, *rows = [line.strip("| ").split(" | ") for line in (head, *lines)]
    return {row[0].strip("`"): dict(zip(columns, row, strict=True)) for row in rows}


# -------------------------------------------------------------------------------------------------
# The columns


def read(attack: Attack) -> dict[str, str]:
    """The cells that need no run: from the signature, the checks and the docstring."""
    parameters = inspect.signature(attack).parameters
    losses = [parameters[name].default for name in ("loss", "output") if name in parameters]
    cells = {
        "targets": "yes" if "targets" in parameters else "no",
        "kind": "driver" if _refuses_tracers(attack) else "compiled",
        "default loss": f"`{losses[0].__name__}`" if losses else "–",
        "reference": _reference(attack),
    }
    if "norm" in parameters:
        cells["norms"] = ", ".join(_accepted_norms(attack))
    return cells


def measure(attack: Attack) -> dict[str, str]:
    """The cells that take three runs with the attack's defaults."""
    columns = ("norms", "looks for", "uses", "forward", "backward", "saturated softmax")
    parameters = inspect.signature(attack).parameters
    for name, words in COMPOSED.items():
        if name in parameters:
            return dict.fromkeys(columns, words)
    settings = {name: TO_THE_END[name] for name in TO_THE_END if name in parameters}
    resists = _run(attack, resisting_network(), **settings)
    forward, backward = PASSES["forward"], PASSES["backward"]
    if resists.success[0] or resists.queries[0] != forward:
        raise RuntimeError(
            f"expected {attack.__name__} to fail and to count its passes, got success "
            f"{resists.success[0]} and {resists.queries[0]} queries where {forward} forward passes "
            "ran; mend the attack, or the network here"
        )
    breaks = _run(attack, breakable_network())
    if not breaks.success[0]:
        raise RuntimeError(f"expected {attack.__name__} to succeed here; use an easier network")
    masked = _run(attack, breakable_network(scale=SATURATING))
    cells = {
        "looks for": "its range",
        "uses": "gradients" if backward else "queries",
        "forward": f"{forward:,}",
        "backward": f"{backward:,}",
        "saturated softmax": "succeeds" if masked.success[0] else "**fails**",
    }
    if np.isinf(resists.distance[0]):
        cells["looks for"] = "smallest, or within `eps`" if "eps" in parameters else "smallest"
    elif "eps" in parameters:
        cells["looks for"] = "within `eps`"
    if "norm" not in parameters:
        cells["norms"] = _norm_of(breaks)
    return cells


def _refuses_tracers(attack: Attack) -> bool:
    try:
        jax.eval_shape(functools.partial(_call, attack, resisting_network()), *example())
    except ValueError as error:
        if "got a tracer" in str(error):
            return True
        raise
    return False


def _accepted_norms(attack: Attack) -> list[str]:
    try:
        _call(attack, resisting_network(), *example(), norm="none")
    except ValueError as error:
        listed, _, _ = str(error).removeprefix("expected norm to be one of ").partition(", got")
        return re.findall(r"'(\w+)'", listed)
    raise RuntimeError(f"expected {attack.__name__} to refuse an unknown norm; check it there")


def _reference(attack: Attack) -> str:
    text = " ".join((inspect.getdoc(attack) or "").partition("References:")[2].split())
    found = re.match(r'([^"]+? \d{4}), "([^"]+)"', text)
    if not found:
        raise RuntimeError(
            f'expected authors, year and "title" first in the References of {attack.__name__}, got '
            f"{text[:80]!r}; write them so"
        )
    return f"{found[1]}, *{found[2]}*"


def _norm_of(result: attacks.AttackResult) -> str:
    """The norm in which the result's distance is given: the only one with that number."""
    delta = result.inputs - example()[0]
    names = [
        name
        for name in ("linf", "l2", "l1", "l0")
        if np.allclose(norms.distance(delta, name), result.distance, rtol=1e-5)
    ]
    if len(names) != 1:
        raise RuntimeError(f"expected a distance in one norm, got {names}; change the network here")
    return names[0]


def _run(attack: Attack, logits_fn: Any, **settings: Any) -> attacks.AttackResult:
    """The attack on the example, on the host; `PASSES` then has what it cost."""
    PASSES.clear()
    result = jax.block_until_ready(_call(attack, logits_fn, *example(), **settings))
    jax.effects_barrier()
    return result


def _call(
    attack: Attack, logits_fn: Any, inputs: jax.Array, labels: jax.Array, **settings: Any
) -> attacks.AttackResult:
    parameters = inspect.signature(attack).parameters
    settings |= {
        name: value
        for name, value in REQUIRED.items()
        if name in parameters and parameters[name].default is inspect.Parameter.empty
    }
    if "batch_size" in parameters:
        settings["batch_size"] = len(inputs)  # a driver pads no further
    return attack(logits_fn, jax.random.key(0), inputs, labels, **settings)


# -------------------------------------------------------------------------------------------------
# The networks


def example() -> tuple[jax.Array, jax.Array]:
    """One image, class 0's spot on gray, and its label."""
    image = 0.3 + 0.5 * _spots()[:, 0].reshape(1, *SHAPE)
    return jnp.asarray(image, jnp.float32), jnp.array([0])


def resisting_network() -> Any:
    """Class 0 wins by at least 1 logit whatever the input; no gradient is 0 or saturated."""
    matrix = np.random.default_rng(0).normal(0, 0.02, (np.prod(SHAPE), NUM_CLASSES))
    matrix[:, 0] = 0
    return _network(matrix, 2.0 * np.eye(NUM_CLASSES)[0], bounded=True)


def breakable_network(scale: float = 1.0) -> Any:
    """Linear: each logit is the brightness of a spot that has a place of its own."""
    return _network(scale * _spots(), np.zeros(NUM_CLASSES), bounded=False)


def _spots() -> np.ndarray:
    """Ten spots on a circle, `[pixels, classes]`; each overlaps with its neighbors."""
    angles = 2 * np.pi * np.arange(NUM_CLASSES) / NUM_CLASSES
    rows, columns = np.indices(SHAPE[:2])[..., None] - 13.5
    squares = (rows - 4 * np.cos(angles)) ** 2 + (columns - 4 * np.sin(angles)) ** 2
    return np.exp(-squares / 8).reshape(-1, NUM_CLASSES)


def _network(matrix: np.ndarray, bias: np.ndarray, *, bounded: bool) -> Any:
    weights = {"matrix": matrix.astype(np.float32), "bias": bias.astype(np.float32)}
    return nets.callable_logits_fn(_counted, {**weights, "bounded": np.asarray(bounded)})


def _logits(weights: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    sums = inputs.reshape(inputs.shape[0], -1) @ weights["matrix"]
    return jnp.where(weights["bounded"], jnp.tanh(sums), sums) + weights["bias"][None]


def _count(name: str, value: jax.Array) -> None:
    # Under vmap the callback runs for each row, because it is given something of each. A batch of
    # several rows, which all serve the one example, is as many passes.
    rows = value.shape[0]
    jax.debug.callback(lambda _: PASSES.update({name: rows}), jnp.sum(value))


@jax.custom_vjp
def _counted(weights: dict[str, jax.Array], inputs: jax.Array) -> jax.Array:
    _count("forward", inputs)
    return _logits(weights, inputs)


def _counted_forward(weights: Any, inputs: jax.Array) -> tuple[jax.Array, Any]:
    return _counted(weights, inputs), (weights, inputs)


def _counted_backward(saved: Any, cotangent: jax.Array) -> tuple[None, jax.Array]:
    _count("backward", cotangent)
    weights, inputs = saved
    _, pull = jax.vjp(functools.partial(_logits, weights), inputs)
    return None, *pull(cotangent)


_counted.defvjp(_counted_forward, _counted_backward)


def main() -> None:
    """Write the table between the two marks of the page."""
    before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"expected the lines {BEGIN!r} and {END!r} in {PAGE}; add them")
    PAGE.write_text(f"{before}{BEGIN}\n\n{make_table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
