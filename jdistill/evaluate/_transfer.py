"""Transfer: inputs crafted on one network of a chain, judged on all of them."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jdistill import _validate, metrics, nets
from jdistill.attacks._core.problem import Goal
from jdistill.evaluate._attack import AttackOutcome, AttackPlan, under_attack
from jdistill.evaluate._runs import Runs, check_inputs
from jdistill.typing import Array, ArrayLike, Callback, LogitsFn


class TransferMatrix(NamedTuple):
    """Transfer of crafted inputs between `G` networks.

    Attributes:
        success_rate: `[G][G]` intervals over the examples: `success_rate[g][h]` of what was
            crafted on `g`, judged on `h`. The diagonal is the white-box attack.
        success: `[G, G, M]` bool; what the judged network gets wrong by itself counts.
    """

    success_rate: list[list[metrics.Interval]]
    success: np.ndarray


def transfer_matrix(
    networks: LogitsFn | Sequence[LogitsFn],
    inputs: np.ndarray,
    labels: np.ndarray,
    plan: AttackPlan,
    *,
    outcome: AttackOutcome | None = None,
    key: Array | None = None,
    targets: np.ndarray | None = None,
    temperature: ArrayLike = 1.0,
    vmapped: bool | None = None,
    callback: Callback | None = None,
    stage: str = "transfer",
) -> TransferMatrix:
    """Success of what is crafted on each network, judged on each: one run of the attack a source.

    Where what is crafted on another generation breaks a network more often than the attack on the
    network itself, the latter was stopped by masking. An attack that ends just beyond the source's
    boundary transfers poorly: give it a margin to pass (`confidence` of `carlini_wagner_l2`).

    Args:
        networks: a stack, or a list of `logits_fn` of the same inputs and classes whose
            architectures may differ: the generations of a chain.
        inputs: `[N, ...]` float, inside the attack's bounds.
        labels: `[N]` int in `0..K-1`.
        plan: the attack.
        outcome: of this plan on these networks, where it was run already: nothing is run again.
        key: for random attacks; the same draws on every source.
        targets: `[N]` int, what the attack aims at; None does not.
        temperature: at which the networks are attacked, above 0; scalar or `[G]`. It changes no
            judgment.
        vmapped: whether to run a stack under `vmap`; None does so except on CPU.
        callback: see `evaluate`; told of the attack.
        stage: a name for the callback.

    Returns:
        The matrix. As in `attacks.transfer`, logits that are not finite count as a success on a
        clean input and as a failure on a crafted one.

    Raises:
        ValueError: an outcome of other networks; else as `under_attack`.

    Example:
        >>> import functools
        >>> from jdistill import attacks
        >>> source = nets.callable_logits_fn(lambda w, x: x @ w, jnp.eye(2))
        >>> farther = nets.callable_logits_fn(lambda w, x: x @ w + 0.3 * w[:1], jnp.eye(2))
        >>> x, y = np.array([[0.6, 0.4]], np.float32), np.array([0])
        >>> plan = AttackPlan(functools.partial(attacks.fgsm, eps=0.2))
        >>> matrix = transfer_matrix([source, farther], x, y, plan)
        >>> matrix.success[:, :, 0].tolist()
        [[True, False], [True, False]]

    References:
        Papernot, McDaniel & Goodfellow 2016, "Transferability in Machine Learning"; Carlini &
        Wagner 2017, section VIII.D and figure 10 (a plain network to a distilled one).
    """
    _validate.instance(AttackPlan, "an AttackPlan", remedy="pass AttackPlan(attack)", plan=plan)
    _validate.text(stage=stage)
    if not callable(networks):
        _validate.sequence(networks=networks, remedy="pass a stack, or a list of logits_fns")
        _validate.function(networks=None if not networks else networks[0])
        for network in networks:
            _validate.function(networks=network)
    check_inputs(networks if callable(networks) else nets.stack(networks[:1]), inputs)
    _validate.positive(temperature=temperature)
    stacks: list[LogitsFn]
    temperatures: Sequence[ArrayLike]
    if callable(networks):
        stacks, temperatures = [networks], [temperature]
    else:
        if np.shape(temperature) not in ((), (len(networks),)):
            raise ValueError(
                f"expected temperature to be a scalar or of shape [G] = ({len(networks)},), got "
                f"shape {np.shape(temperature)}; pass one number, or one per network"
            )
        stacks = [nets.stack([network]) for network in networks]
        temperatures = list(np.broadcast_to(np.asarray(temperature, np.float32), (len(stacks),)))
    runs = [
        Runs.of(stack, each, vmapped, None)
        for stack, each in zip(stacks, temperatures, strict=True)
    ]
    if outcome is not None:
        _validate.instance(AttackOutcome, "an AttackOutcome", outcome=outcome)
    if outcome is None:
        parts = [
            under_attack(
                stack,
                inputs,
                labels,
                plan,
                key=key,
                targets=targets,
                temperature=each,
                vmapped=vmapped,
                callback=callback,
                stage=stage,
            )
            for stack, each in zip(stacks, temperatures, strict=True)
        ]
        crafted = np.concatenate([part.inputs for part in parts])
        white_box = np.concatenate([part.success for part in parts])
    else:
        crafted, white_box = outcome.inputs, outcome.success
    count, size = white_box.shape
    num_networks = sum(len(run.temperatures) for run in runs)
    if count != num_networks:
        raise ValueError(
            f"expected an outcome of these {num_networks} networks, got one of {count}; pass the "
            "outcome of under_attack on the same stack"
        )
    columns = (np.asarray(labels[:size]), None if targets is None else np.asarray(targets[:size]))

    def judged(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Whether each network errs on the points, and whether it does on them as clean inputs."""
        found = [run.map(_errs, None, plan.batch_size, points, *columns) for run in runs]
        reached, wrong = (np.concatenate(flags) for flags in zip(*found, strict=True))
        return reached, wrong

    _, wrong = judged(np.asarray(inputs[:size]))
    success = np.stack([judged(points)[0] | wrong for points in crafted])
    # The attack's own verdict: at a boundary another program's rounding might see another one.
    success[np.arange(count), np.arange(count)] = white_box
    rates = [
        [metrics.proportion(int(row.sum()), row.size) for row in of_source] for of_source in success
    ]
    return TransferMatrix(rates, success)


def _errs(
    logits_fn: LogitsFn, inputs: Array, labels: Array, targets: Array | None
) -> tuple[Array, Array]:
    logits = logits_fn(inputs)
    goal = Goal(jnp.asarray(labels), None if targets is None else jnp.asarray(targets))
    return goal.reached(logits), goal.reached_clean(logits)
