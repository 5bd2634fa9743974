"""Small networks with NumPy twins, and what tests of attacks compute from them."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdistill import nets

ORDER = {"linf": np.inf, "l2": 2, "l1": 1, "l0": 0}
DUAL = {"linf": 1, "l2": 2, "l1": np.inf}  # of gradients


def double_precision():
    """A context with 64-bit types."""
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64()


def network(net, inputs):
    """The logits of a `Net` of JAX arrays."""
    flat = inputs.reshape(inputs.shape[0], net.first.shape[0])
    logits = jnp.tanh((flat - 0.5) @ net.first) @ net.second
    if net.linear is not None:
        logits = logits + flat @ net.linear
    return logits if net.bias is None else logits + net.bias[None]


class Net(NamedTuple):
    """`tanh((x - 0.5) @ first) @ second + x @ linear + bias`, without the terms that are None."""

    first: Any  # [D, H]
    second: Any  # [H, K]
    linear: Any = None  # [D, K]
    bias: Any = None  # [K]

    def logits_fn(self, scale=1.0, dtype=jnp.float32):
        """The network as attacks take it, its logits times the scale."""
        first, *rest = self
        net = Net(first, *(None if weights is None else weights * scale for weights in rest))
        return nets.callable_logits_fn(network, jax.tree.map(lambda w: jnp.asarray(w, dtype), net))

    def logits(self, inputs):
        """In NumPy and float64, of a batch or of one flat example."""
        x = np.asarray(inputs, np.float64)
        x = x.reshape(len(x), -1) if x.ndim > 1 else x
        logits = np.tanh((x - 0.5) @ self.first) @ self.second
        if self.linear is not None:
            logits += x @ self.linear
        return logits if self.bias is None else logits + self.bias

    def at(self, x):
        """The logits `[K]` at one point `[D]` and their Jacobian `[K, D]`, of the two layers."""
        hidden = np.tanh((x - 0.5) @ self.first)
        return hidden @ self.second, (self.second.T * (1 - hidden**2)) @ self.first.T

    def margin(self, x, goal):
        """By how much the best other class leads the goal at one point, and the gradient."""
        logits, jacobian = self.at(x)
        other = np.where(np.arange(len(logits)) == goal, -np.inf, logits).argmax()
        return logits[other] - logits[goal], jacobian[other] - jacobian[goal]


def margins(logits, goals):
    """By how much the best other class leads the goal, `[B]`."""
    rows, others = np.arange(len(logits)), np.array(logits)
    others[rows, goals] = -np.inf
    return others.max(1) - logits[rows, goals]


def secretive(logits_fn, rows):
    """The logits alone, since their gradient cannot be had; the rows are counted in `rows`."""

    @jax.custom_vjp
    def logits_alone(inputs):
        jax.debug.callback(lambda _: rows.update(rows=inputs.shape[0]), inputs[0].sum())
        return logits_fn(inputs)

    def no_gradient(*_):
        raise AssertionError("a gradient was asked for")

    logits_alone.defvjp(no_gradient, no_gradient)
    return logits_alone


def unbreakable(inputs):
    """Class 0 leads by at least 1 in the whole box, and by less where the first input is less."""
    return jnp.stack([inputs[:, 0] + 1, inputs[:, 0] * 0], axis=1)


def linear_problem(
    num_examples=30, num_inputs=20, num_classes=6, *, low=0.45, high=0.55, lead=0.0, seed=0
):
    """A linear network, inputs, their logits and the weights in float64; class 0 has the lead."""
    rng = np.random.default_rng(seed)
    weights = rng.normal(0, 1, (num_inputs, num_classes)).astype(np.float32)
    inputs = rng.uniform(low, high, (num_examples, num_inputs)).astype(np.float32)
    bias = -0.5 * weights.sum(0) + np.where(np.arange(num_classes) == 0, lead, 0)
    logits_fn = nets.callable_logits_fn(
        lambda w, x: x @ w[0] + w[1][None], (jnp.asarray(weights), jnp.asarray(bias, jnp.float32))
    )
    return logits_fn, inputs, inputs.astype(np.float64) @ weights + bias, weights.astype(np.float64)


def exact_distances(logits, weights, norm):
    """From the best class to each other class's boundary of a linear network, `[B, K]`."""
    gaps = logits.max(1, keepdims=True) - logits
    slopes = weights.T[logits.argmax(1)][:, None] - weights.T[None]
    lengths = np.linalg.norm(slopes, DUAL[norm], axis=2)
    return np.where(lengths > 0, gaps / np.where(lengths > 0, lengths, 1), np.inf)


def each(reference, inputs, labels, targets=None, **settings):
    """What a reference gives for every example in float64, each result as an array `[B, ...]`."""
    targets = [None] * len(inputs) if targets is None else targets
    rows = zip(inputs.astype(np.float64), labels, targets, strict=True)
    results = [reference(*row, **settings) for row in rows]
    return [np.array(column) for column in zip(*results, strict=True)]


def in_double(attack, net, inputs, labels, *, scale=1.0, **settings):
    """The result of an attack without a key in double precision, as NumPy arrays."""
    with double_precision():
        model = net.logits_fn(scale, jnp.float64)
        result = attack(model, None, inputs.astype(np.float64), labels, **settings)
        return jax.tree.map(np.asarray, result)


def many_classes(num_classes, norm, batch_size=12, features=12):
    """A linear network of so many classes, inputs, labels, and the exact smallest distances."""
    rng = np.random.default_rng(1)
    inputs = rng.uniform(0.2, 0.8, (batch_size, features)).astype(np.float32)
    weights = rng.normal(size=(features, num_classes))
    logits = (inputs.astype(float) - 0.5) @ weights
    labels, exact = logits.argmax(1), []
    for row, label in zip(logits, labels, strict=True):
        gaps = np.delete(row[label] - row, label)
        differences = np.delete(weights - weights[:, [label]], label, axis=1)
        exact.append((gaps / np.linalg.norm(differences, DUAL[norm], axis=0)).min())
    logits_fn = nets.callable_logits_fn(
        lambda weights, x: (x - 0.5) @ weights, jnp.asarray(weights, jnp.float32)
    )
    return logits_fn, inputs, labels, np.asarray(exact)
