"""Programs of a study as shapes: to be compiled for devices that need not be there."""

import functools
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jdistill import attacks, data, nets, parallel, train
from jdistill._jax import full_precision, unbound
from jdistill.attacks._core import engine
from jdistill.attacks._core.handlers import untried
from jdistill.runtime import tpu
from jdistill.study import _training
from jdistill.study._study import Examples, Stage, Study
from jdistill.sweep import _fit, _program
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
    stage: Stage
    step: Any
    state: Any
    loss: Any
    num_classes: int
    num_steps: int  # of all stages with it, for one run
    num_labeled: int  # stages that learn from its soft labels

    @property
    def name(self) -> str:
        """The network's roles and size."""
        weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(self.state.params))
        roles = (f"{n} {role}s" if n > 1 else role for role, n in self.roles.items())
        return f"{', '.join(roles)} ({weights:,} weights)"


def _passes(default: str) -> int:
    configured = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    return tpu.PASSES.get(configured or default, 6)


def _placed(tree: Any, sharding: Any) -> Any:
    """The shapes of a tree's arrays, on devices."""

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=sharding)

    return jax.tree.map(shape, tree)


def _everywhere(devices: Sequence[Any]) -> NamedSharding:
    return NamedSharding(parallel.make_mesh(devices), PartitionSpec())


def stacked(tree: Any, size: int) -> Any:
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
    fresh = functools.partial(_training._fresh, step, stage, shape=shape)
    state = jax.eval_shape(lambda key: fresh(key=key), jax.random.key(0))
    logits_fn = train.logits_fn(step, state)
    logits = jax.eval_shape(_forward, logits_fn, jax.ShapeDtypeStruct((1, *shape), np.float32))
    return step, state, logits_fn, logits.shape[-1]


def networks_of(study: Study, examples: Examples) -> list[Network]:
    """The architectures that are trained, each with the loss that its students or teachers have."""
    per_epoch = data.num_batches(len(examples.train.labels), study.batch_size)
    found: dict[Any, Network] = {}
    for chain in _training.chains_of(study):
        before = None
        for number, stage in enumerate(chain.stages):
            if stage.frozen is not None:
                before = nets.callable_logits_fn(stage.frozen)
                continue
            last, teacher = number == len(chain.stages) - 1, before
            step, state, before, num_classes = _abstract(stage, examples)
            if chain.owners[number] != chain.name:  # another chain's as well, and counted there
                continue
            role = "teacher" if number == 0 else "student" if last else "assistant"
            loss = _loss(study, teacher, online=study.online and number > 0)
            shapes = tuple((x.shape, x.dtype) for x in jax.tree.leaves((state, loss)))
            own = (step.apply_fn, jax.tree.structure((state, loss)), shapes)
            known = found.get(own)
            before_that = (Counter(), 0, 0) if known is None else (known.roles, *known[-2:])
            found[own] = Network(
                before_that[0] + Counter([role]),
                stage,
                step,
                state,
                loss,
                num_classes,
                before_that[1] + stage.num_epochs * per_epoch,
                before_that[2] + (0 if last or study.online else 1),
            )
    return list(found.values())


def _loss(study: Study, teacher: Any, *, online: bool) -> Any:
    """The loss of a network, as shapes; the temperature compiles nothing."""
    temperature = study.temperatures[0]
    if teacher is None:
        return _placed(study.teacher_loss(temperature), None)
    make = study.student_losses()
    if not online:
        return _placed(make(temperature), None)
    return jax.eval_shape(lambda network: make(temperature, network), _placed(teacher, None))


def training_programs(
    study: Study, examples: Examples, networks: Sequence[Network], devices: Sequence[Any]
) -> Iterator[Program]:
    """The step of each architecture, its batch split over the chips."""
    mesh = parallel.make_mesh(devices)
    everywhere = NamedSharding(mesh, PartitionSpec())
    by_example = NamedSharding(mesh, PartitionSpec(parallel.DATA_AXIS))
    runs = len(study.temperatures) * len(study.seeds)
    size = len(examples.train.labels)
    for network in networks:
        jitted = jax.jit(network.step, out_shardings=everywhere)
        num_classes = None if study.online else network.num_classes

        def made(
            batch: int, network: Any = network, jitted: Any = jitted, K: Any = num_classes
        ) -> Any:
            batch = -(-batch // len(devices)) * len(devices)
            columns = _batch(examples.train.inputs.shape[1:], K, batch)
            return Program(
                f"training step: {network.name}",
                "training",
                batch,
                len(devices),
                network.num_steps * runs,
                jitted,
                (
                    _placed(network.state, everywhere),
                    _placed(columns, by_example),
                    _placed(network.loss, everywhere),
                ),
                _passes("default"),
                most=max(batch, size // len(devices) * len(devices)),
            )

        yield made(study.batch_size)._replace(resized=made)


def sweep_programs(
    study: Study, examples: Examples, networks: Sequence[Network], devices: Sequence[Any]
) -> Iterator[Program]:
    """All runs of each architecture as one stack, a share on each chip."""
    runs = len(study.temperatures) * len(study.seeds)
    store = _program.store(*examples.train)
    mesh = _program.mesh(tuple(devices))
    spread = NamedSharding(mesh, PartitionSpec(_program.RUN_AXIS))
    everywhere = NamedSharding(mesh, PartitionSpec())
    for network in networks:
        jitted = _program.steps_program(_program.Kind(network.step, True, tuple(devices)))
        state, loss = stacked(network.state, 1), stacked(network.loss, 1)
        num_classes = None if study.online else network.num_classes

        def made(
            size: int,
            network: Any = network,
            jitted: Any = jitted,
            stacks: Any = (state, loss),
            K: Any = num_classes,
        ) -> Any:
            size = -(-size // len(devices)) * len(devices)
            state, loss = stacks
            shared, *others = _fit.shapes_of(state, store, loss, K, study.batch_size, size)
            return Program(
                f"sweep step: {network.name}",
                "sweep",
                size,
                len(devices),
                network.num_steps,
                jitted,
                (_placed(shared, everywhere), *(_placed(each, spread) for each in others)),
                _passes("default"),
                most=max(size, _MOST_RUNS * len(devices)),
            )

        yield made(runs)._replace(resized=made)


def forward_programs(
    study: Study, examples: Examples, networks: Sequence[Network], devices: Sequence[Any]
) -> Iterator[Program]:
    """Soft labels of the training set, and logits of the test set."""
    runs = len(study.temperatures) * len(study.seeds)
    sharding = _everywhere(devices)
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
            calls * runs,
            jax.jit(_forward),
            _placed((train.logits_fn(network.step, network.state), inputs), sharding),
            _passes("highest"),
        )


def _forward(logits_fn: Any, inputs: Any) -> Any:
    with full_precision():
        return logits_fn(inputs)


def attack_programs(
    study: Study, examples: Examples, devices: Sequence[Any], notes: list[str]
) -> Iterator[Program]:
    """Each attack on the networks of one run that have one architecture, as a stack."""
    runs = len(study.temperatures) * len(study.seeds)
    plans = {**study.attacks, **{f"distance {n}": each for n, each in study.distances.items()}}
    for (logits_fn, size), count in stacks(study, examples).items():
        tree = jax.tree.unflatten(logits_fn[0], [jax.ShapeDtypeStruct(*x) for x in logits_fn[1]])
        for name, each in plans.items():
            num_examples = min(each.num_examples or math.inf, len(examples.test.labels))
            batch = int(min(each.batch_size, num_examples))
            calls = -(-int(num_examples) // batch) * count * runs
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
    """Of each run, how many stacks of networks of one architecture are measured, and their size."""
    found: Counter[Any] = Counter()
    for chain in _training.chains_of(study):
        own: Counter[Any] = Counter()
        for stage in chain.stages:
            if stage.frozen is None:
                logits_fn = _abstract(stage, examples)[2]
            else:
                logits_fn = nets.callable_logits_fn(stage.frozen)
            leaves, structure = jax.tree.flatten(logits_fn)
            own[structure, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)] += 1
        found.update(own.items())
    return found


def whole(method: Any, problem: Any) -> Any:
    """A method from its start to its end, as `engine.run` compiles it."""
    carry = engine.start(method, problem, trace=False)
    return engine.finish(method, problem, engine.advance(method, problem, carry), trace=False)


class _Recorder:
    """Handler that keeps the methods of an attack as shapes, and runs them where it is asked to."""

    on_host = False

    def __init__(self, *, runs: bool) -> None:
        self.methods: list[tuple[Any, Any]] = []
        self._runs = runs

    def __call__(self, method: Any, problem: Any, trace: bool, /) -> Any:
        """The method's result, or the clean inputs."""
        del trace
        self.methods.append(_placed((method, problem), None))
        # Not jitted: that would give the trace for the device at hand.
        return whole(method, problem) if self._runs else untried(problem)


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
    recorder = _Recorder(runs=True)

    def call(stack: Any, keys: Any, inputs: Any, labels: Any) -> Any:
        recorder.methods.clear()
        with engine.handled_by(recorder):
            return jax.vmap(lambda network: attack(network, keys, inputs, labels))(stack)

    mesh = parallel.make_mesh(devices)
    split = NamedSharding(mesh, PartitionSpec(parallel.DATA_AXIS))
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
            _placed(stack, NamedSharding(mesh, PartitionSpec())),
            *_placed((keys, columns.inputs, columns.labels), split),
        ),
        _passes("highest"),
        methods=lambda: recorder.methods,
    )


def attack_parts(
    attack: Any, logits_fn: Any, batch_size: int, shape: Sequence[int], devices: Sequence[Any]
) -> list[Program]:
    """The programs of an attack that is a loop on the host, such as AutoAttack's parts.

    It is called with weights of zero and methods that do nothing, to see what it would run.
    Programs that differ in numbers alone are one, with as many calls.
    """
    settings = attacks.traits(attack).settings
    batch_size = min(batch_size, settings.get("batch_size") or batch_size)
    low, high = settings.get("bounds", (0.0, 1.0))
    inputs = np.clip(np.zeros((batch_size, *shape), np.float32), low, high)
    network = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), logits_fn)
    recorder = _Recorder(runs=False)
    with engine.handled_by(recorder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what the zero network's logits are
        attack(network, jax.random.key(0), inputs, np.zeros(batch_size, np.int32))
    found: dict[Any, tuple[Any, int]] = {}
    for each in recorder.methods:
        method = each[0]
        name = type(method).__name__.strip("_")
        if (loss := getattr(method, "loss", None)) is not None:
            name += f" on {getattr(unbound(loss)[0], '__name__', 'a loss')}"
        own = (name, method.num_events, tuple(x.shape for x in jax.tree.leaves(each)))
        found[own] = found.get(own, (each, 0))[0], found.get(own, (each, 0))[1] + 1
    everywhere = _everywhere(devices)
    return [
        Program(
            name if count == 1 else f"{name}, {count} times",
            "attack",
            batch_size,
            1,
            count,
            jax.jit(_at_full_precision),
            _placed(each, everywhere),
            _passes("highest"),
            methods=functools.partial(list, (each,)),
        )
        for (name, *_), (each, count) in found.items()
    ]


def _at_full_precision(method: Any, problem: Any) -> Any:
    with full_precision():
        return whole(method, problem)
