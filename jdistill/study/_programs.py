"""Programs of a study as shapes: to be compiled for devices that need not be there."""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jdistill import attacks, data, nets, parallel, train
from jdistill._jax import full_precision, shapes
from jdistill.attacks._core import planning
from jdistill.distill._chain import Taught, loss_at
from jdistill.distill._lessons import Lesson
from jdistill.runtime import tpu
from jdistill.study import _training
from jdistill.study._study import Examples, Stage, Study
from jdistill.sweep._fit import planned
from jdistill.sweep._program import Kind, Store, store
from jdistill.typing import Batch

_FORWARD = 512  # examples of a call of `train.predict`
_MOST_RUNS = 1024  # a stack that nobody has more runs for


class Program(NamedTuple):
    """Something to compile, and how often a study calls it."""

    name: str
    part: str
    size: int
    chips: int
    calls: int
    jitted: Any
    arguments: tuple[Any, ...]
    passes: int  # of bfloat16, for a product
    methods: Callable[[], list[Any]] | None = None  # of an attack, once it was traced
    resized: Callable[[int], "Program"] | None = None
    most: int = 0  # the largest size that is of use


class Network(NamedTuple):
    """An architecture of a study, as shapes."""

    roles: Counter[str]
    step: Any
    state: Any
    loss: Any
    num_targets: int | None  # classes of its soft labels; None where its teachers are online
    num_steps: int  # of all stages with it, for one run
    num_labeled: int  # stages that learn from its soft labels

    @property
    def name(self) -> str:
        """The network's roles and size."""
        weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.state.params))
        roles = (f"{n} {role}s" if n > 1 else role for role, n in self.roles.items())
        return f"{', '.join(roles)} ({weights:,} weights)"


def _num_runs(study: Study) -> int:
    return len(study.temperatures) * len(study.seeds)


def _passes(default: str) -> int:
    configured = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return tpu.PASSES.get(configured or default, 6)


def _placements(devices: Sequence[Any]) -> tuple[NamedSharding, NamedSharding]:
    """Whole on each of the devices, and split over them by example."""
    mesh = parallel.make_mesh(devices)
    specs = PartitionSpec(), PartitionSpec(parallel.DATA_AXIS)
    return NamedSharding(mesh, specs[0]), NamedSharding(mesh, specs[1])


def stacked(tree: Any, size: int) -> Any:
    """The shapes of a stack of that many trees."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((size, *x.shape), x.dtype), tree)


def _batch(shape: Sequence[int], num_classes: int | None, size: int) -> Batch:
    targets = None
    if num_classes is not None:
        targets = jax.ShapeDtypeStruct((size, num_classes), np.float32)
    return Batch(
        jax.ShapeDtypeStruct((size, *shape), np.float32),
        jax.ShapeDtypeStruct((size,), np.int32),
        targets,
        jax.ShapeDtypeStruct((size,), np.float32),
    )


def _abstract(stage: Stage, examples: Examples) -> tuple[Any, Any, Any, int]:
    """Step, state, network, and number of classes of a stage."""
    shape = examples.train.inputs.shape[1:]
    step = stage.step()
    fresh = functools.partial(_training.fresh_state, step, stage, shape=shape)
    state = jax.eval_shape(lambda key: fresh(key=key), jax.random.key(0))
    logits_fn = train.logits_fn(step, state)
    logits = jax.eval_shape(_forward, logits_fn, jax.ShapeDtypeStruct((1, *shape), np.float32))
    return step, state, logits_fn, logits.shape[-1]


def networks_of(study: Study, examples: Examples) -> list[Network]:
    """The architectures that are trained, each with the loss that its students or teachers have."""
    per_epoch = data.num_batches(len(examples.train.labels), study.batch_size)
    found: dict[Any, Network] = {}
    for chain in _training.chains_of(study):
        networks: list[Any] = []
        for number, stage in enumerate(chain.stages):
            if stage.frozen is not None:
                networks.append(nets.callable_logits_fn(stage.frozen))
                continue
            last, lesson = number == len(chain.stages) - 1, study.lesson(stage, number)
            teachers = [networks[teacher] for teacher in lesson.teachers]
            step, state, _, num_classes = _abstract(stage, examples)
            networks.append(train.outputs_fn(step, state))
            if chain.owners[number] != chain.name:  # another chain's as well, and counted there
                continue
            role = "teacher" if number == 0 else "student" if last else "assistant"
            loss = _loss(lesson, study.temperatures[0], teachers)
            leaves, structure = jax.tree.flatten((state, loss))
            shapes_of = tuple((x.shape, x.dtype) for x in leaves)
            own = (step, structure, shapes_of, lesson.online)
            known = found.get(own) or Network(
                Counter(), step, state, loss, None if lesson.online else num_classes, 0, 0
            )
            found[own] = known._replace(
                roles=known.roles + Counter([role]),
                num_steps=known.num_steps + stage.num_epochs * per_epoch,
                num_labeled=known.num_labeled + _num_students(study, chain.name, number),
            )
    return list(found.values())


def _num_students(study: Study, owner: str, number: int) -> int:
    """Networks for which a generation makes soft labels of the training set, of all chains."""
    lessons = [
        study.lesson(stage, place)
        for chain in _training.chains_of(study)
        if chain.owners[number : number + 1] == (owner,)
        for place, stage in enumerate(chain.stages)
        if chain.owners[place] == chain.name and stage.frozen is None
    ]
    return sum(number in lesson.teachers and not lesson.online for lesson in lessons)


def _loss(lesson: Lesson, temperature: float, teachers: Sequence[Any]) -> Any:
    """The loss of a network, as shapes; the temperature compiles nothing."""
    if not lesson.online:
        return shapes(lesson.loss(temperature))

    def make(own: Sequence[Any]) -> Any:
        return loss_at(lesson, temperature, [Taught(each, each) for each in own])

    return jax.eval_shape(make, shapes(list(teachers)))


def training_programs(
    study: Study, examples: Examples, networks: Sequence[Network], devices: Sequence[Any]
) -> list[Program]:
    """The step of each architecture, its batch split over the chips."""
    return [
        _training_program(study, examples, network, devices, study.batch_size)
        for network in networks
    ]


def _training_program(
    study: Study, examples: Examples, network: Network, devices: Sequence[Any], batch_size: int
) -> Program:
    everywhere, by_example = _placements(devices)
    count = len(devices)
    batch_size = -(-batch_size // count) * count
    return Program(
        f"training step: {network.name}",
        "training",
        batch_size,
        count,
        network.num_steps * _num_runs(study),
        jax.jit(network.step, out_shardings=everywhere),
        (
            shapes(network.state, everywhere),
            shapes(
                _batch(examples.train.inputs.shape[1:], network.num_targets, batch_size), by_example
            ),
            shapes(network.loss, everywhere),
        ),
        _passes("default"),
        resized=functools.partial(_training_program, study, examples, network, devices),
        most=max(batch_size, len(examples.train.labels) // count * count),
    )


def sweep_programs(
    study: Study, examples: Examples, networks: Sequence[Network], devices: Sequence[Any]
) -> list[Program]:
    """All runs of each architecture as one stack, a share on each chip."""
    held = store(*examples.train)
    return [
        _sweep_program(study, held, network, tuple(devices), _num_runs(study))
        for network in networks
    ]


def _sweep_program(
    study: Study, held: Store, network: Network, devices: tuple[Any, ...], size: int
) -> Program:
    size = -(-size // len(devices)) * len(devices)
    jitted, arguments = planned(
        Kind(network.step, True, devices),
        stacked(network.state, 1),
        held,
        stacked(network.loss, 1),
        network.num_targets,
        study.batch_size,
        size,
    )
    return Program(
        f"sweep step: {network.name}",
        "sweep",
        size,
        len(devices),
        network.num_steps,
        jitted,
        arguments,
        _passes("default"),
        resized=functools.partial(_sweep_program, study, held, network, devices),
        most=max(size, _MOST_RUNS * len(devices)),
    )


def forward_programs(
    study: Study, examples: Examples, networks: Sequence[Network], devices: Sequence[Any]
) -> Iterator[Program]:
    """Soft labels of the training set, and logits of the test set."""
    everywhere, _ = _placements(devices)
    num_train, num_test = (len(split.labels) for split in (examples.train, examples.test))
    for network in networks:
        inputs = _batch(examples.train.inputs.shape[1:], None, _FORWARD).inputs
        calls = network.num_labeled * -(-num_train // _FORWARD)
        calls += network.roles.total() * -(-num_test // _FORWARD)
        yield Program(
            f"forward: {network.name}",
            "forward",
            _FORWARD,
            1,
            calls * _num_runs(study),
            jax.jit(_forward),
            shapes((train.logits_fn(network.step, network.state), inputs), everywhere),
            _passes("highest"),
        )


def _forward(logits_fn: Any, inputs: Any) -> Any:
    with full_precision():
        return logits_fn(inputs)


def attack_programs(
    study: Study, examples: Examples, devices: Sequence[Any], notes: list[str]
) -> Iterator[Program]:
    """Each attack on the networks of one run that have one architecture, as a stack."""
    plans = {**study.attacks, **{f"distance {n}": each for n, each in study.distances.items()}}
    for (logits_fn, size), count in stacks(study, examples).items():
        tree = jax.tree.unflatten(logits_fn[0], [jax.ShapeDtypeStruct(*x) for x in logits_fn[1]])
        for name, each in plans.items():
            num_examples = min(each.num_examples or math.inf, len(examples.test.labels))
            batch = int(min(each.batch_size, num_examples))
            calls = -(-int(num_examples) // batch) * count * _num_runs(study)
            shape = examples.test.inputs.shape[1:]
            if not attacks.traits(each.attack).host_loop:
                made = attack_program(each.attack, stacked(tree, size), batch, shape, devices)
                yield made._replace(name=f"{name} of a stack of {size}", calls=calls)
                continue
            parts = attack_parts(each.attack, tree, batch, shape, devices)
            if not parts:
                notes.append(
                    f"not counted: {name}, a loop on the host that has none of our attacks"
                )
            for part in parts:
                yield part._replace(name=f"{name}: {part.name}", calls=calls * size * part.calls)


def stacks(study: Study, examples: Examples) -> Counter[Any]:
    """Number of stacks of networks of one architecture in each run, and their size."""
    found: Counter[Any] = Counter()
    for chain in _training.chains_of(study):
        own: Counter[Any] = Counter()
        for stage in chain.stages:
            if stage.frozen is None:
                logits_fn = _abstract(stage, examples)[2]
            else:
                logits_fn = _training.frozen_logits_fn(stage, examples)
            leaves, structure = jax.tree.flatten(logits_fn)
            own[structure, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)] += 1
        found.update(own.items())
    return found


def attack_program(
    attack: Any, stack: Any, batch_size: int, shape: Sequence[int], devices: Sequence[Any]
) -> Program:
    """An attack on a stack of networks, its examples split over the devices.

    Args:
        attack: with its settings bound; no loop on the host.
        stack: the networks, as shapes `[R, ...]`.
        batch_size: examples.
        shape: of one.
        devices: a study measures on one.
    """
    everywhere, by_example = _placements(devices)
    call, methods = planning.on_stack(attack)
    columns = _batch(shape, None, batch_size)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    return Program(
        "attack",
        "attack",
        batch_size,
        len(devices),
        1,
        jax.jit(call),
        (
            shapes(stack, everywhere),
            *shapes((keys, columns.inputs, columns.labels), by_example),
        ),
        _passes("highest"),
        methods=methods,
    )


def attack_parts(
    attack: Any, logits_fn: Any, batch_size: int, shape: Sequence[int], devices: Sequence[Any]
) -> list[Program]:
    """The programs of an attack that is a loop on the host, such as AutoAttack's parts."""
    everywhere, _ = _placements(devices)
    return [
        Program(
            name if count == 1 else f"{name}, {count} times",
            "attack",
            call[1].inputs.shape[0],
            1,
            count,
            jax.jit(planning.program),
            shapes(call, everywhere),
            _passes("highest"),
            methods=functools.partial(list, (call,)),
        )
        for name, count, call in planning.of_host_loop(attack, logits_fn, batch_size, shape)
    ]
