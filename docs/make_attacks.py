"""Writes the table of attacks into `docs/attacks.md`; `make attack-table` runs it.

Nothing in the table is typed by hand. The facts of an attack are those of `attacks.traits`, what it
takes is read from its signature, the reference from its docstring; the rest is measured on two tiny
networks, which count their forward and backward passes. The facts that can be are measured as well.
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
BEGIN, END = (
    "<!-- The table is written by `make attack-table`. -->",
    "<!-- The end of the table. -->",
)
COLUMNS = (
    "attack",
    "in reports",
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
USES = {"gradient": "gradients", "scores": "logits", "decisions": "the class"}
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
    """The whole table; takes about four minutes."""
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
    """The cells that need no run: from the facts, the signature and the docstring."""
    parameters, facts = inspect.signature(attack).parameters, attacks.traits(attack)
    losses = [parameters[name].default for name in ("loss", "output") if name in parameters]
    looks_for = ["smallest"] * facts.minimum_norm + ["within `eps`"] * ("eps" in parameters)
    cells = {
        "in reports": facts.title,
        "norms": ", ".join(facts.norms),
        "looks for": ", or ".join(looks_for) or "its range",
        "targets": "yes" if "targets" in parameters else "no",
        "uses": USES[facts.access],
        "kind": "driver" if facts.host_loop else "compiled",
        "default loss": _loss_name(losses[0]) if losses else "–",
        "reference": _reference(attack),
    }
    if words := _composed(attack):
        cells |= dict.fromkeys(("norms", "looks for", "uses"), words)
    return cells


def _loss_name(loss: Callable[..., Any] | None) -> str:
    return "`soft_margin`, hardening" if loss is None else f"`{loss.__name__}`"


def measure(attack: Attack) -> dict[str, str]:
    """The cells that take three runs with the attack's defaults.

    What is measured is compared with what the attack, its facts and `attacks.cost` say.
    """
    parameters, facts = inspect.signature(attack).parameters, attacks.traits(attack)
    if words := _composed(attack):
        return dict.fromkeys(("forward", "backward", "saturated softmax"), words)
    settings = {name: TO_THE_END[name] for name in TO_THE_END if name in parameters}
    bound = functools.partial(attack, **_required(attack), **settings)
    most = attacks.cost(bound, shape=SHAPE, num_classes=NUM_CLASSES)
    resists = _run(attack, resisting_network(), **settings)
    forward, backward = PASSES["forward"], PASSES["backward"]
    breaks = _run(attack, breakable_network())
    masked = bool(_run(attack, breakable_network(scale=SATURATING)).success[0])
    said = {
        "success on a network that resists": (bool(resists.success[0]), False),
        "success on one that does not": (bool(breaks.success[0]), True),
        "queries": (int(resists.queries[0]), forward),
        "gradients": (int(resists.info["gradients"][0]), backward),
        "at least the cost": (most.forward >= forward and most.backward >= backward, True),
        "a failure at infinity": (bool(np.isinf(resists.distance[0])), facts.minimum_norm),
        "backward passes": (backward > 0, facts.access == "gradient"),
        "success where the softmax saturates": (masked, facts.follows != "softmax"),
        "distances in its norm": (facts.norm in _norms_of(breaks), True),
    }
    for what, (found, expected) in said.items():
        if found != expected:
            raise RuntimeError(
                f"expected {attack.__name__} to have {what}: {expected}, got {found}; mend the "
                "attack, its facts, or the network here"
            )
    return {
        "forward": _passes(forward, most.forward),
        "backward": _passes(backward, most.backward),
        "saturated softmax": "succeeds" if masked else "**fails**",
    }


def _composed(attack: Attack) -> str:
    """Words on an attack that is what those are which it runs."""
    parameters = inspect.signature(attack).parameters
    return next((words for name, words in COMPOSED.items() if name in parameters), "")


def _passes(found: int, most: int) -> str:
    return f"{found:,}" if found == most else f"{found:,} (at most {most:,})"


def _reference(attack: Attack) -> str:
    text = " ".join((inspect.getdoc(attack) or "").partition("References:")[2].split())
    found = re.match(r'([^"]+? \d{4}), "([^"]+)"', text)
    if not found:
        raise RuntimeError(
            f'expected authors, year and "title" first in the References of {attack.__name__}, got '
            f"{text[:80]!r}; write them so"
        )
    return f"{found[1]}, *{found[2]}*"


def _norms_of(result: attacks.AttackResult) -> list[str]:
    """The norms in which the result's distance may be given."""
    delta = result.inputs - example()[0]
    return [
        name
        for name in ("linf", "l2", "l1", "l0")
        if np.allclose(norms.distance(delta, name), result.distance, rtol=1e-5)
    ]


def _run(attack: Attack, logits_fn: Any, **settings: Any) -> attacks.AttackResult:
    """The attack on the example, on the host; `PASSES` then has what it cost."""
    PASSES.clear()
    result = jax.block_until_ready(_call(attack, logits_fn, *example(), **settings))
    jax.effects_barrier()
    return result


def _call(
    attack: Attack, logits_fn: Any, inputs: jax.Array, labels: jax.Array, **settings: Any
) -> attacks.AttackResult:
    if "batch_size" in inspect.signature(attack).parameters:
        settings["batch_size"] = len(inputs)  # a driver pads no further
    return attack(logits_fn, jax.random.key(0), inputs, labels, **_required(attack), **settings)


def _required(attack: Attack) -> dict[str, Any]:
    """Values of the settings without a default."""
    parameters = inspect.signature(attack).parameters
    return {
        name: value
        for name, value in REQUIRED.items()
        if name in parameters and parameters[name].default is inspect.Parameter.empty
    }


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
