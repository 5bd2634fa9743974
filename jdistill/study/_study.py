"""Studies and their stages as values: what is trained, on what, and what is measured."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np
import optax

from jdistill import _fingerprint, _validate, attacks, data, distill, evaluate, nets, train
from jdistill.distill._chain import check_losses
from jdistill.distill._lessons import Lesson, lesson_of, periods
from jdistill.evaluate._distances import distance_plans_of, plans_of
from jdistill.train import TrainStep
from jdistill.typing import Array, LogitsFn, LossFn, PyTree

Hyperparams = Mapping[str, float | Callable[[float], float]]
Select = Literal["last", "best"]


# What a stage that does not learn has no use for.
_LESSON = (
    "hyperparams",
    "augment",
    "make_step",
    "teachers",
    "loss",
    "online",
    "temperature_schedule",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One network of a chain, and how it learns.

    Attributes:
        model: a Flax Linen module; or `(init, apply_fn)` for any other network, where
            `init(key, shape)` gives `(params, model_state)` of a network for inputs of that shape,
            and `apply_fn` is a `jdistill.typing.ApplyFn`; or `(init, apply)` of a plain function
            `apply(params, inputs) -> logits`, for which `init(key, shape)` gives the params alone.
        optimizer: any optax optimizer; its schedules count steps.
        num_epochs: passes over the training set; 0 leaves the network as it is drawn.
        hyperparams: numbers for an optimizer made with `optax.inject_hyperparams`
            (`jdistill.train.sgd` is), or functions of the temperature that give them.
        frozen: instead of all of these, a trained network, inputs `[B, ...]` to logits `[B, K]`:
            the first stage of its chain, a teacher that learns nothing.
        augment: of the inputs, see `train.make_train_step`.
        make_step: `(apply_fn, optimizer) -> TrainStep`, for training that is no plain loss;
            `functools.partial(train.make_train_step, objective=...)` for one.
        select: the epoch whose network is the stage's: the `"last"`, or the `"best"` by the
            accuracy on the data's validation examples at T = 1, of equal ones the earliest. The
            network that learns from it learns from that one. Not in a sweep.
        teachers: numbers of the earlier stages of its chain that it learns from; None is the one
            before, and `()` none: the labels alone. So a chain can have several teachers, or an
            assistant and its teacher both teach the student.
        loss: its own loss in the place of the study's `student_loss`, or `teacher_loss` where it
            has no teacher.
        online: whether its teachers label each batch as it comes; None is as the study has it.
        temperature_schedule: `(T, progress) -> temperature` of its loss and its soft labels epoch
            by epoch, see `distill.Generation`; None is T.

    Example:
        >>> from jdistill import nets, train
        >>> stage = Stage(
        ...     model=nets.digits_net(),
        ...     optimizer=train.sgd(0.05),
        ...     num_epochs=30,
        ...     hyperparams={"learning_rate": lambda temperature: 0.05 * temperature**0.5},
        ... )
        >>> stage.hyperparams_at(4.0)
        {'learning_rate': 0.1}
    """

    model: Any = None
    optimizer: optax.GradientTransformation | None = None
    num_epochs: int = 10
    hyperparams: Hyperparams = dataclasses.field(default_factory=dict)
    frozen: LogitsFn | None = None
    augment: Callable[[Array, Array], Array] | None = None
    make_step: Callable[..., TrainStep] | None = None
    select: Select = "last"
    teachers: Sequence[int] | None = None
    loss: Callable[..., LossFn] | None = None
    online: bool | None = None
    temperature_schedule: Callable[[float, float], float] | None = None

    def __post_init__(self) -> None:
        """Check what does not need the data."""
        _validate.one_of(get_args(Select), select=self.select)
        if self.frozen is not None:
            _validate.function(frozen=self.frozen)
            if self.select != "last":
                raise ValueError(
                    f"expected select='last' with frozen, got {self.select!r}; a frozen network "
                    "does not learn: drop one"
                )
            if self.model is not None or self.optimizer is not None:
                raise ValueError(
                    "expected either frozen or a model with its optimizer, got both; a frozen "
                    "network does not learn: drop one"
                )
            for name in _LESSON:
                if given := getattr(self, name):
                    raise ValueError(
                        f"expected no {name} with frozen, got {given!r:.60}; a frozen network does "
                        "not learn: drop one"
                    )
            return
        if self.model is None or self.optimizer is None:
            raise ValueError(
                "expected model and optimizer, got "
                f"model={self.model!r:.60}, optimizer={self.optimizer!r:.60}; pass both, such as "
                "Stage(model=nets.digits_net(), optimizer=train.sgd(0.05))"
            )
        _validate.count(minimum=0, num_epochs=self.num_epochs)
        object.__setattr__(self, "num_epochs", int(self.num_epochs))
        _validate.mapping(hyperparams=self.hyperparams)
        if self.make_step is not None:
            _validate.function(make_step=self.make_step)
            if self.augment is not None:
                raise ValueError(
                    "expected augment or make_step, got both; give augment to make_train_step there"
                )
        self.step()  # says what is wrong with the model or the optimizer

    def hyperparams_at(self, temperature: float) -> dict[str, float]:
        """The numbers for the optimizer at a temperature."""
        return {
            name: float(value(temperature) if callable(value) else value)
            for name, value in self.hyperparams.items()
        }

    def step(self) -> TrainStep:
        """The training step; equal ones share a compilation."""
        if self.make_step is None:
            return train.make_train_step(self.apply_fn(), self.optimizer, augment=self.augment)
        return self.make_step(self.apply_fn(), self.optimizer)

    def apply_fn(self) -> Any:
        """The network as training sees it."""
        if not isinstance(self.model, tuple):
            return nets.apply_fn(self.model)
        _, apply = _pair(self.model)
        return apply if _is_apply_fn(apply) else _PlainApply(apply)

    def init(self, key: Array, shape: Sequence[int]) -> tuple[PyTree, PyTree]:
        """Freshly drawn weights, and the model state.

        Args:
            key: PRNG key.
            shape: of one input.

        Returns:
            `(params, model_state)`.

        Raises:
            ValueError: the model's own `init` gives something else.
        """
        if not isinstance(self.model, tuple):
            return nets.init(self.model, key, tuple(shape))
        init, apply = _pair(self.model)
        found = init(key, tuple(shape))
        if not _is_apply_fn(apply):
            return found, {}
        if not isinstance(found, tuple) or len(found) != 2:
            raise ValueError(
                "expected init(key, shape) to give (params, model_state), got "
                f"{type(found).__name__}; give {{}} as the model state where there is none"
            )
        return found

    def describe(self, temperatures: Sequence[float]) -> dict[str, Any]:
        """JSON-able content of all that the stage computes, without its names."""
        if self.frozen is not None:
            return {"frozen": _fingerprint.describe(nets.callable_logits_fn(self.frozen))}
        return {
            "network": _fingerprint.describe(self.model),
            "optimizer": _fingerprint.describe(self.optimizer),
            "num_epochs": self.num_epochs,
            "hyperparams": {at(T): self.hyperparams_at(T) for T in temperatures},
            "augment": _fingerprint.describe(self.augment),
            "step": _fingerprint.describe(self.make_step),
            # Named where they are not the default, so that workdirs from before stay their own.
            **({} if self.select == "last" else {"select": self.select}),
            **self._describe_lesson(temperatures),
        }

    def _describe_lesson(self, temperatures: Sequence[float]) -> dict[str, Any]:
        """What it learns from, where it is not as the study has it."""
        found: dict[str, Any] = {}
        if self.teachers is not None:
            found["teachers"] = [int(teacher) for teacher in self.teachers]
        if self.loss is not None:
            found["loss"] = _fingerprint.describe(self.loss)
        if self.online is not None:
            found["online"] = bool(self.online)
        if self.temperature_schedule is not None:
            found["temperature_schedule"] = {
                at(T): [
                    float(period.temperature)
                    for period in periods(self.temperature_schedule, T, self.num_epochs, 0)
                ]
                for T in temperatures
            }
        return found


@dataclasses.dataclass(frozen=True)
class _PlainApply:
    """A function of weights and inputs as an `ApplyFn`; equal for the same function."""

    fun: Callable[[PyTree, Array], Any]

    def __call__(
        self, params: PyTree, model_state: PyTree, inputs: Array, *, train: bool, key: Array | None
    ) -> tuple[Any, PyTree]:
        del train, key
        return self.fun(params, inputs), model_state


def _pair(model: tuple[Any, ...]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    if len(model) != 2:
        raise ValueError(
            f"expected model to be a Flax module or (init, apply), got {len(model)} entries; pass "
            "two functions"
        )
    init, apply = model
    _validate.function(init=init, apply=apply)
    return init, apply


def _is_apply_fn(apply: Callable[..., Any]) -> bool:
    """Whether it takes the arguments of an `ApplyFn`, beside weights and inputs."""
    parameters = inspect.signature(apply).parameters
    return "train" in parameters and "key" in parameters


class Examples(NamedTuple):
    """The examples of a study.

    Attributes:
        name: of the data set.
        train: `(inputs [N, ...], labels [N])` to learn from.
        test: those that everything is measured on.
        checksum: of training and test examples.
        note: how they were made, for a report.
        validation: those that the best epoch is chosen by; None where no stage asks, or none are.
    """

    name: str
    train: data.Split
    test: data.Split
    checksum: str
    note: str
    validation: data.Split | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Study:
    """Chains of networks at several temperatures and seeds, and what is measured of them.

    Attributes:
        data: `((inputs, labels), (test_inputs, test_labels))` in NumPy, between these two
            `(validation_inputs, validation_labels)` where a stage selects its best epoch; or a
            `data.Dataset`; or a function without arguments that gives either.
        chains: by name, stages from teacher to student. Chains that begin alike share these
            stages: each is trained once. A chain that is the beginning of a longer one is reported
            within it. A single sequence stands for one chain.
        temperatures: T of training and soft labels, each above 0; every network is tested at 1.
        seeds: whole numbers; each has its own initial weights, order of examples, and dropout.
        name: of the data in tables; None takes the data set's.
        teacher_loss: `T -> loss_fn` of the first network that learns from labels.
        student_loss: `T -> loss_fn` on the soft labels of the network before, or with `online`
            `(T, teacher) -> loss_fn`.
        online: whether the teacher labels each batch as it comes, as augmentation needs.
        batch_size: examples per training step.
        initial_epochs: epochs at T = 1 on hard labels that all networks of an architecture start
            from, as the released recipe has it.
        attacks: by name, an `evaluate.AttackPlan` or an attack with its settings bound.
        distances: likewise by norm, minimum-norm attacks, `evaluate.distance_plans()` for some.
        transfer: names of attacks whose inputs the other networks of a chain judge as well.
        verdict: `diagnose.masking` with its settings bound, for the last network of each chain and
            the teacher at T = 1; None judges nothing.
        num_verdict: test examples for the verdict.
        num_sensitivity: test examples for the sensitivities; None takes all.
        deployed: whether the student of each chain, first seed, and its teacher are exported into
            `exports/` of the workdir, with sizes and milliseconds per image in `deployment.csv`.
            Nothing that is trained or measured depends on it: any workdir may turn it on or off.

    Example:
        >>> import functools
        >>> from jdistill import attacks, data, nets, train
        >>> stage = Stage(model=nets.digits_net(), optimizer=train.sgd(0.05), num_epochs=30)
        >>> study = Study(
        ...     data=functools.partial(data.load, "digits"),
        ...     chains={"no assistant": [stage] * 2, "1 assistant": [stage] * 3},
        ...     temperatures=(1.0, 20.0),
        ...     attacks={"pgd": functools.partial(attacks.pgd, eps=0.2)},
        ... )
        >>> study.examples().test.inputs.shape
        (400, 8, 8, 1)
    """

    data: Any
    chains: Any
    temperatures: Sequence[float] = (1.0,)
    seeds: Sequence[int] = (0,)
    name: str | None = None
    teacher_loss: Callable[[float], LossFn] = distill.soft_loss
    student_loss: Callable[..., LossFn] | None = None
    online: bool = False
    batch_size: int = 128
    initial_epochs: int = 0
    attacks: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    distances: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    transfer: Sequence[str] = ()
    verdict: Callable[..., Any] | None = None
    num_verdict: int = 200
    num_sensitivity: int | None = 1000
    deployed: bool = False

    def __post_init__(self) -> None:
        """Check everything but the data, and name what is wrong."""
        chains = self.chains
        if not isinstance(chains, Mapping):
            _validate.sequence(chains=chains)
            chains = {"chain": chains}
        if not chains:
            raise ValueError("expected at least one chain, got none; pass chains={name: stages}")
        named = {str(name): _chain(name, stages) for name, stages in chains.items()}
        if len(named) < len(chains):
            raise ValueError(f"expected names that differ as texts, got {list(chains)}; rename one")
        for name in [*named, *self.attacks, *self.distances]:
            # Names are those of files.
            if not str(name) or str(name).startswith(".") or "/" in str(name):
                raise ValueError(
                    f"expected names of chains and attacks without slashes, not empty, and not "
                    f"beginning with a dot, got {name!r}; rename it"
                )
        object.__setattr__(self, "chains", named)
        for name in ("temperatures", "seeds"):
            values = getattr(self, name)
            values = tuple(values) if isinstance(values, (Sequence, np.ndarray)) else (values,)
            if not values or len(set(values)) < len(values):
                raise ValueError(
                    f"expected {name} without repetition and not empty, got {values}; "
                    "name each value once"
                )
            object.__setattr__(self, name, values)
        for temperature in self.temperatures:
            _validate.scalar(temperatures=temperature)
            _validate.positive(temperatures=temperature)
        object.__setattr__(self, "temperatures", tuple(float(T) for T in self.temperatures))
        for seed in self.seeds:
            _validate.count(minimum=0, seeds=seed)
            _validate.within(0, 2**32 - 1, seeds=seed)  # larger ones would repeat smaller ones
        object.__setattr__(self, "seeds", tuple(int(seed) for seed in self.seeds))
        _validate.count(batch_size=self.batch_size, num_verdict=self.num_verdict)
        _validate.count(minimum=0, initial_epochs=self.initial_epochs)
        if self.num_sensitivity is not None:
            _validate.count(num_sensitivity=self.num_sensitivity)
        for name in ("batch_size", "num_verdict", "initial_epochs", "num_sensitivity"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else int(value))
        _validate.flag(online=self.online, deployed=self.deployed)
        check_losses(self.teacher_loss, self.student_loss, self.online, None)
        for stages in named.values():
            for number, stage in enumerate(stages):
                if stage.frozen is None:
                    self.lesson(stage, number)  # says what is wrong with it
        self._check_measures()

    def _check_measures(self) -> None:
        """Say now what would fail after hours of training."""
        plans = plans_of(self.attacks, "attacks")
        by_norm = distance_plans_of(self.distances)
        object.__setattr__(self, "attacks", plans)
        object.__setattr__(self, "distances", by_norm)
        if not plans and not by_norm:
            raise ValueError(
                "expected at least one attack, got none; an accuracy without an attack says "
                "nothing about a defense"
            )
        for name, plan in {**plans, **by_norm}.items():
            _check_bound(f"the attack {name!r}", plan.attack)
        if self.verdict is not None:
            _check_bound("verdict", self.verdict)
        _validate.sequence(transfer=self.transfer)
        for name in self.transfer:
            if name not in plans:
                raise ValueError(
                    f"expected transfer to name some of the attacks {', '.join(plans)}, got "
                    f"{name!r}; add it to attacks"
                )
        for name, stages in self.chains.items():
            kinds = {_fingerprint.fingerprint(_fingerprint.describe(each.model)) for each in stages}
            if self.transfer and len(kinds) > 1:
                raise ValueError(
                    f"expected transfer only in chains of one architecture, got {len(kinds)} in "
                    f"{name!r}; leave it out, and use evaluate.transfer_matrix on the networks"
                )

    def lesson(self, stage: Stage, number: int) -> Lesson:
        """Teachers, loss, and schedule of a stage of a chain.

        Args:
            stage: one of a chain's.
            number: its place in the chain, from 0.
        """
        return lesson_of(
            stage,
            number,
            teacher_loss=self.teacher_loss,
            student_loss=self.student_losses(),
            online=self.online,
        )

    def student_losses(self) -> Callable[..., LossFn]:
        """The students' loss, the default where none is given."""
        return check_losses(self.teacher_loss, self.student_loss, self.online, None)

    def loss_at(self, temperature: float) -> Any:
        """JSON-able content of what the losses at a temperature compute."""
        student = self.student_losses()
        return {
            "teacher": _fingerprint.describe(self.teacher_loss(temperature)),
            "student": _fingerprint.describe(student if self.online else student(temperature)),
            "online": self.online,
        }

    def examples(self) -> Examples:
        """The examples, loaded where they have to be, and checked.

        Raises:
            ValueError: what is given is no data set, its arrays do not belong together, or a stage
                selects its best epoch and there are no validation examples.
            MemoryError: the training set does not fit into this machine's memory.
        """
        found = self.data() if callable(self.data) else self.data
        if isinstance(found, data.Dataset):
            wanted = found.validation if self.selects_best() else None
            found = NamedArrays(found.name, found.train, found.test, found.note, wanted)
        examples = _from_arrays(found)
        validation = examples.validation
        if self.selects_best() and (validation is None or len(validation.labels) == 0):
            raise ValueError(
                "expected validation examples for select='best', got none in the data "
                f"{self.name or examples.name!r}; pass data=((inputs, labels), (validation_inputs, "
                "validation_labels), (test_inputs, test_labels)) or a data.Dataset"
            )
        _check_memory(examples.train)
        return examples if self.name is None else examples._replace(name=self.name)

    def selects_best(self) -> bool:
        """True where a stage ends with the network of its best epoch."""
        return any(stage.select == "best" for stages in self.chains.values() for stage in stages)

    def longest_chains(self) -> dict[str, tuple[Stage, ...]]:
        """The chains that are not the beginning of a longer one."""
        own = {name: self._described(stages) for name, stages in self.chains.items()}
        kept: dict[str, tuple[Stage, ...]] = {}
        for name, stages in self.chains.items():
            within = [other for other in own if own[other][: len(stages)] == own[name]]
            # Of equal chains the first stands for all.
            if all(own[other] == own[name] for other in within) and within[0] == name:
                kept[name] = stages
        return kept

    def _described(self, stages: Sequence[Stage]) -> list[str]:
        """Fingerprint of each stage at all temperatures."""
        return [_fingerprint.fingerprint(stage.describe(self.temperatures)) for stage in stages]

    def students(self) -> dict[str, tuple[str, int]]:
        """Chain and generation that name each chain's student in the tables.

        The chain is the longest one that has it, and is named where there are several.
        """
        longest = self.longest_chains()
        found = {}
        for name, stages in self.chains.items():
            own = self._described(stages)
            home = next(
                n for n, other in longest.items() if self._described(other)[: len(own)] == own
            )
            found[name] = home if len(longest) > 1 else "", len(stages) - 1
        return found

    def trained_stages(self) -> list[Stage]:
        """The stages trained at each temperature and seed; one that chains share counts once."""
        found: dict[tuple[str, ...], Stage] = {}
        for stages in self.longest_chains().values():
            own = self._described(stages)
            for number, stage in enumerate(stages, start=1):
                found.setdefault(tuple(own[:number]), stage)
        return [stage for stage in found.values() if stage.frozen is None]

    def describe(self, examples: Examples) -> dict[str, Any]:
        """JSON-able content of all that the study computes; it grows along temperatures and chains.

        Args:
            examples: those of the study.
        """
        plans = {**self.attacks, **{f"distance {n}": plan for n, plan in self.distances.items()}}
        held_out = {}
        if examples.validation is not None:
            held_out["validation_checksum"] = _fingerprint.fingerprint(examples.validation)
        return {
            "dataset": examples.name,
            "dataset_checksum": examples.checksum,
            "temperatures": list(self.temperatures),
            "seeds": list(self.seeds),
            "chains": {
                name: {
                    f"stage {number}": {
                        **stage.describe(self.temperatures),
                        **(held_out if stage.select == "best" else {}),
                    }
                    for number, stage in enumerate(stages)
                }
                for name, stages in self.chains.items()
            },
            "losses": {at(T): self.loss_at(T) for T in self.temperatures},
            "batch_size": self.batch_size,
            "initial_epochs": self.initial_epochs,
            "attacks": {name: _plan(attack) for name, attack in plans.items()},
            "transfer": list(self.transfer),
            "verdict": self.verdict and {**_plan(self.verdict), "num_examples": self.num_verdict},
            "num_sensitivity": self.num_sensitivity,
        }


def at(temperature: float) -> str:
    """A temperature as a key, the shortest that no other temperature has."""
    return f"T={temperature_name(temperature)}"


def temperature_name(temperature: float) -> str:
    """A temperature in file names: the shortest that no other temperature has."""
    return f"{temperature:g}" if float(f"{temperature:g}") == temperature else repr(temperature)


def smoke(study: Study) -> Study:
    """The study with every size at its least: seconds, and numbers that mean nothing.

    Two temperatures, one seed, one epoch, 64 training and 32 test examples, 8 for each attack; of
    the attacks' own settings `num_steps`, `num_searches`, `num_restarts` are small.

    Args:
        study: any study.

    Returns:
        The small study.

    Example:
        >>> from jdistill import nets, train
        >>> stage = Stage(model=nets.digits_net(), optimizer=train.sgd(0.05), num_epochs=30)
        >>> attack = functools.partial(attacks.pgd, eps=0.2, num_steps=40)
        >>> load = functools.partial(data.load, "digits")
        >>> small = smoke(Study(data=load, chains=[stage] * 2, attacks={"pgd": attack}))
        >>> small.attacks["pgd"].num_examples, small.attacks["pgd"].attack.keywords["num_steps"]
        (8, 3)
    """
    return dataclasses.replace(
        study,
        data=functools.partial(_few, study),
        chains={
            name: tuple(
                dataclasses.replace(stage, num_epochs=min(1, stage.num_epochs))
                if stage.frozen is None
                else stage
                for stage in stages
            )
            for name, stages in study.chains.items()
        },
        temperatures=study.temperatures[:2],
        seeds=study.seeds[:1],
        batch_size=min(32, study.batch_size),
        initial_epochs=min(1, study.initial_epochs),
        attacks={name: _few_steps(plan) for name, plan in study.attacks.items()},
        distances={norm: _few_steps(plan) for norm, plan in study.distances.items()},
        num_verdict=4,
        num_sensitivity=16,
    )


def _few(study: Study) -> Any:
    """The study's first examples."""
    examples = study.examples()
    train_split, test_split, validation = (
        split and data.Split(*(column[:size] for column in split))
        for split, size in ((examples.train, 64), (examples.test, 32), (examples.validation, 32))
    )
    return NamedArrays(examples.name, train_split, test_split, validation=validation)


class NamedArrays(NamedTuple):
    """Training and test arrays with the name of their data set."""

    name: str
    train: Any
    test: Any
    note: str = ""
    validation: Any = None


def _few_steps(plan: Any) -> evaluate.AttackPlan:
    plan = plan if isinstance(plan, evaluate.AttackPlan) else evaluate.AttackPlan(plan)
    settings = attacks.traits(plan.attack).settings
    least = {"num_steps": 3, "num_searches": 2, "num_restarts": 1}
    small = {name: count for name, count in least.items() if (settings.get(name) or 0) > count}
    attack = functools.partial(plan.attack, **small) if small else plan.attack
    return plan._replace(attack=attack, num_examples=min(8, plan.num_examples or 8))


def _plan(plan: Any) -> dict[str, Any]:
    if not isinstance(plan, evaluate.AttackPlan):
        return {"attack": _fingerprint.describe_attack(plan)}
    return {**plan._asdict(), "attack": _fingerprint.describe_attack(plan.attack)}


def fingerprints(stages: Sequence[Stage], temperature: float) -> list[str]:
    """Of each stage, a fingerprint of the chain up to it at a temperature."""
    own = [_fingerprint.fingerprint(stage.describe((temperature,))) for stage in stages]
    return [_fingerprint.fingerprint(own[: number + 1])[:8] for number in range(len(own))]


def _check_bound(name: str, function: Any) -> None:
    """An error for a function that needs more than the arguments that it will get."""
    _validate.function(**{name: function})
    try:
        inspect.signature(function).bind(None, None, None, None)
    except TypeError as error:
        raise ValueError(
            f"expected {name} with all its settings bound, got one of {error}; pass "
            "functools.partial(function, ...)"
        ) from None
    except ValueError:  # a callable that does not say
        return


def _chain(name: Any, stages: Any) -> tuple[Stage, ...]:
    if isinstance(stages, Stage):
        stages = (stages,)
    _validate.sequence(**{f"chains[{name!r}]": stages})
    for number, stage in enumerate(stages):
        _validate.instance(Stage, "a Stage", remedy="pass study.Stage(...)", stage=stage)
        if stage.frozen is not None and number:
            raise ValueError(
                f"expected a frozen network only as the first stage, got one as stage {number} of "
                f"{name!r}; the chain can begin there"
            )
    if not stages or stages[-1].frozen is not None:
        raise ValueError(
            f"expected a chain that ends with a network that learns, got "
            f"{'no stage' if not stages else 'a frozen one'} in {name!r}; add its student"
        )
    return tuple(stages)


def _from_arrays(found: Any) -> Examples:
    """Examples out of `((inputs, labels), (test_inputs, test_labels))`, or three such pairs."""
    name, note = "data", ""
    if isinstance(found, NamedArrays):
        name, note = found.name, found.note
        splits_there = [found.train, found.validation, found.test]
        found = [split for split in splits_there if split is not None]
    if not isinstance(found, Sequence) or len(found) not in (2, 3):
        raise ValueError(
            "expected data to be ((inputs, labels), (test_inputs, test_labels)) or a data.Dataset, "
            f"got {type(found).__name__}; pass the training and the test arrays"
        )
    splits = []
    names = ("train", "validation", "test") if len(found) == 3 else ("train", "test")
    for which, split in zip(names, found, strict=True):
        if not isinstance(split, Sequence) or len(split) != 2:
            raise ValueError(
                f"expected the {which} split to be (inputs, labels), got {type(split).__name__}; "
                "pass two arrays"
            )
        inputs, labels = np.asarray(split[0]), np.asarray(split[1])
        _validate.inputs_in_box(inputs, (-np.inf, np.inf))
        _validate.class_indices(labels, batch_size=len(inputs))
        splits.append(data.Split(inputs.astype(np.float32, copy=False), labels))
    train_split, *validation, test_split = splits
    for split in (*validation, test_split):
        if train_split.inputs.shape[1:] != split.inputs.shape[1:]:
            raise ValueError(
                "expected training and test inputs of one shape, got "
                f"{train_split.inputs.shape[1:]} and {split.inputs.shape[1:]}; pass the same kind"
            )
    checksum = _fingerprint.fingerprint([*train_split, *test_split])
    return Examples(name, train_split, test_split, checksum, note, *validation)


def _check_memory(split: data.Split) -> None:
    """An error before a training set that does not fit is copied: studies keep it in memory."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return
    if split.inputs.nbytes > 0.8 * memory:
        raise MemoryError(
            f"expected training inputs of at most {0.8 * memory / 2**30:.1f} GiB, 80% of this "
            f"machine's memory, got {split.inputs.nbytes / 2**30:.1f} GiB; a study keeps them in "
            "memory: pass fewer, or train in shares with train.fit"
        )


def keys_of(seed: int) -> tuple[Array, Array]:
    """The key of a seed's initial weights, and the key of its chains."""
    weights_key, key = jax.random.split(jax.random.key(seed))
    return weights_key, key
