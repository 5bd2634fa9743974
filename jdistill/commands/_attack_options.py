"""The command line of each attack, out of the signature and the docstring of its function.

An attack that is exported by `jdistill.attacks` and needs no more than settings is offered as it
is; what is written here are only the functions that its options may name.
"""

import dataclasses
import functools
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

import jax.numpy as jnp
import tyro

from jdistill import _validate, attacks, losses
from jdistill.study._study import temperature_name
from jdistill.typing import ArrayLike, AttackFn, Norm

Settings = dict[str, Any]  # by argument, as JSON can hold them

# What stands for the functions that an option takes.
CHOICES: dict[str, dict[str, Callable[..., Any]]] = {
    "loss": {
        loss.__name__: loss
        for loss in (losses.cross_entropy, losses.margin, losses.soft_margin, losses.dlr)
    },
    "output": {
        "softmax": attacks.softmax,
        "softmax_at": attacks.softmax_at,
        "logits": jnp.positive,
    },
}
_CHOICE_HELP = {
    "loss": "What is maximized: a function of jdistill.losses (none: the attack's own, a soft "
    "margin that hardens).",
    "output": "What the saliency is of: softmax (Papernot), softmax_at, which is softmax(z / T) "
    "(Carlini & Wagner), or logits.",
}
_FIRST = ("logits_fn", "key", "inputs", "labels")
# Given otherwise, or not on a command line; every data set lies in the default bounds.
_NOT_OFFERED = ("bounds", "targets", "init", "batch_size", "devices", "start", "callback")
_KINDS = {
    bool: "flag",
    int: "whole number",
    int | None: "whole number",
    float: "number",
    float | None: "number",
    ArrayLike: "number",
    ArrayLike | None: "number",
    str: "name",
    Norm: "name",
}
_LONGEST_NAME = 200


def _is_offered(function: Any) -> bool:
    """Attacks that need settings alone: wrappers take functions, `universal` all examples."""
    parameters = inspect.signature(function).parameters
    if tuple(parameters)[: len(_FIRST)] != _FIRST:
        return False
    settings = parameters.keys() - {*_FIRST, *_NOT_OFFERED, *CHOICES}
    if any(parameters[name].annotation not in _KINDS for name in settings):
        return False
    # A loop on the host that goes on from where it was stopped batches and reports by itself.
    return not attacks.traits(function).host_loop or "start" in parameters


ATTACKS: dict[str, Callable[..., attacks.AttackResult]] = {
    name: function
    for name, function in ((name, getattr(attacks, name)) for name in attacks.__all__)
    if inspect.isfunction(function) and _is_offered(function)
}


class Option(NamedTuple):
    """One option of an attack.

    Attributes:
        name: of the argument.
        kind: `"flag"`, `"whole number"`, `"number"`, `"name"` or `"choice"`.
        default: as `Settings` have it; `inspect.Parameter.empty` where there is none.
        help: what it is.
    """

    name: str
    kind: str
    default: Any
    help: str

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is inspect.Parameter.empty

    @property
    def flag(self) -> str:
        """As it is written on a command line."""
        return f"--{self.name.replace('_', '-')}"


def check_name(attack: str) -> None:
    """An error that lists the attacks, where this is none of them."""
    if attack not in ATTACKS:
        raise ValueError(
            f"expected --attack to be one of {', '.join(sorted(ATTACKS))}, got "
            f"{repr(attack) if attack else 'none'}; pick one"
        )


def options(attack: str) -> list[Option]:
    """The options of an attack, in the order of its signature."""
    function = ATTACKS[attack]
    helps = _argument_helps(function)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        if name in (*_FIRST, *_NOT_OFFERED):
            continue
        default = parameter.default
        if name in CHOICES:
            words = (word for word, value in CHOICES[name].items() if value is default)
            default = next(words, default)
            found.append(Option(name, "choice", default, _CHOICE_HELP[name]))
        else:
            found.append(Option(name, _KINDS[parameter.annotation], default, helps[name]))
        if name == "output":
            text = "T of softmax_at, above 0. None takes the temperature of a network's training."
            found.append(Option("output_temperature", "number", None, text))
    return found


def is_host_loop(attack: str) -> bool:
    """Attacks that are loops on the host, which batch, report, and resume by themselves."""
    return attacks.traits(ATTACKS[attack]).host_loop


def summary(attack: str) -> str:
    """The first line of the attack's docstring."""
    return inspect.cleandoc(ATTACKS[attack].__doc__ or "").splitlines()[0]


def command_line(attack: str) -> type:
    """A dataclass of the attack's options for tyro: flags as bool, all else as text."""
    fields: list[Any] = []
    for option in options(attack):
        hint = "(required)" if option.required else f"(default: {_word(option.default)})"
        if option.kind == "flag":
            annotation = Annotated[bool, tyro.conf.arg(help=option.help)]
            fields.append((option.name, annotation, option.default))
            continue
        metavar = option.kind.upper().replace(" ", "-")
        if option.kind == "choice":
            metavar = f"{{{','.join(CHOICES[option.name])}}}"
        argument = tyro.conf.arg(help=option.help, metavar=metavar, help_behavior_hint=hint)
        fields.append((option.name, Annotated[str, argument], ""))
    made = dataclasses.make_dataclass("AttackOptions", fields, frozen=True, kw_only=True)
    made.__doc__ = summary(attack)
    return made


def read(attack: str, given: Mapping[str, Any]) -> Settings:
    """The settings of a command line, defaults included.

    Args:
        attack: its name.
        given: the values of `command_line`; empty text is an option that was not given.

    Raises:
        ValueError: a required option that is missing, or a value of the wrong kind.
    """
    settings: Settings = {}
    for option in options(attack):
        value = given[option.name]
        if value != "":
            settings[option.name] = _value(option, value)
        elif option.required:
            raise ValueError(
                f"expected {option.flag} with --attack {attack}, got none; pass it: {option.help}"
            )
        else:
            settings[option.name] = option.default
    temperature = settings.get("output_temperature")
    if temperature is not None:
        if settings["output"] != "softmax_at":
            raise ValueError(
                "expected --output softmax_at beside --output-temperature, got "
                f"{settings['output']!r}; pass both, or neither"
            )
        _validate.positive(output_temperature=temperature)
    return settings


def bind(attack: str, settings: Settings, temperature: float) -> AttackFn:
    """The attack with its settings.

    Args:
        attack: its name.
        settings: from `read`.
        temperature: of the training of the network that is attacked.
    """
    arguments = dict(settings)
    own_temperature = arguments.pop("output_temperature", None)
    for name in CHOICES.keys() & arguments.keys():
        arguments[name] = CHOICES[name].get(arguments[name])
    if arguments.get("output") is attacks.softmax_at:
        arguments["output"] = attacks.softmax_at(own_temperature or temperature)
    return functools.partial(ATTACKS[attack], **arguments)


def folder_name(attack: str, settings: Settings, more: Mapping[str, tuple[Any, Any]]) -> str:
    """A name that says the attack and every setting that is not its default.

    Args:
        attack: its name.
        settings: from `read`.
        more: further settings, each with its default.
    """
    changed = [
        (option.name, settings[option.name])
        for option in options(attack)
        if settings[option.name] != option.default
    ]
    changed += [(name, value) for name, (value, default) in more.items() if value != default]
    name = "_".join([attack, *(f"{name}={_word(value)}" for name, value in changed)])
    if len(name) > _LONGEST_NAME:  # file systems end at 255
        digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        name = f"{name[: _LONGEST_NAME - 17]}_{digest}"
    return name


def _argument_helps(function: Callable[..., Any]) -> dict[str, str]:
    """The texts of a docstring's Args, without what only a caller from Python needs."""
    sections = inspect.cleandoc(function.__doc__ or "").split("\nArgs:\n")
    texts = re.finditer(
        r"^    (\w+): (.*?)(?=^    \w|\Z)", sections[-1].split("\n\n")[0], re.MULTILINE | re.DOTALL
    )
    helps = {match[1]: " ".join(match[2].split()) for match in texts}
    from_python = r"[;,.] (?:(?:an? )?scalar(?: or `\[B\]`)?|may be traced|static)(?=[;.])"
    return {
        name: re.sub(from_python, "", text[0].upper() + text[1:], flags=re.IGNORECASE)
        for name, text in helps.items()
    }


def _value(option: Option, given: Any) -> Any:
    """The given value, as one of the option's kind."""
    if option.kind == "flag":
        return given
    if option.kind == "choice":
        _validate.one_of(CHOICES[option.name], **{option.flag: given})
        return given
    converters: dict[str, Callable[[str], Any]] = {"whole number": int, "number": _number}
    try:
        return converters.get(option.kind, str)(given)
    except (ValueError, ZeroDivisionError):
        example = "12" if option.kind == "whole number" else "0.03 or 8/255"
        raise ValueError(
            f"expected {option.flag} to be a {option.kind}, got {given!r}; pass one such as "
            f"{example}"
        ) from None


def _number(text: str) -> float:
    """A number or a fraction, such as 8/255."""
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)


def _word(value: Any) -> str:
    """A setting in a name."""
    return temperature_name(value) if isinstance(value, float) else str(value)
