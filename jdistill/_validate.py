"""Every check of user input, with one wording: "expected X, got Y; do Z".

The checks read concrete values only. Under `jit` or `vmap` the values are tracers and a check
that needs them is skipped; checks of shapes and types always run.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

_REMEDY_INPUTS = "rescale the inputs, or pass the `bounds` they really have"


def is_traced(*values: Any) -> bool:
    """Whether any leaf of the values is a tracer, so that there is no number to check."""
    return any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def _show(value: Any) -> str:
    """A value as an error message prints it: short, and a plain number where it is one."""
    array = np.asarray(value)
    if array.ndim == 0:
        return repr(array.item())
    text = np.array2string(array, threshold=6, edgeitems=3, precision=6)
    return f"{text} of shape {array.shape}"


def _first_bad(value: Any, bad: np.ndarray) -> str:
    """The offending entry: the value itself, or the first bad one and where it stands."""
    array = np.asarray(value)
    if array.ndim == 0:
        return repr(array.item())
    index = tuple(int(i) for i in np.argwhere(bad)[0])
    return f"{array[index].item()!r} at index {index[0] if len(index) == 1 else index}"


def _numbers(name: str, value: Any) -> np.ndarray:
    """The value as float64; text and bools are no numbers, though NumPy would read them so."""
    try:
        array = np.asarray(value)
        without = array.dtype == object and None in array.ravel().tolist()  # NumPy's NaN
        if without or array.dtype.kind in "USbcmM":
            raise TypeError
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(
            f"expected {name} to be a number, got {str(value)[:40]!r}; pass a Python float or an "
            "array of them"
        ) from None


def _shape(name: str, value: Any) -> tuple[int, ...]:
    """The shape; of lists whose rows differ there is none."""
    try:
        return np.shape(value)
    except ValueError:
        raise ValueError(
            f"expected {name} to be an array, got lists of different lengths; make them equal"
        ) from None


def _dtype(name: str, value: Any) -> np.dtype:
    """The type of an array, or of what NumPy makes of the value."""
    try:
        return np.dtype(value.dtype) if hasattr(value, "dtype") else np.asarray(value).dtype
    except (TypeError, ValueError):  # PRNG keys among them
        shown = getattr(value, "dtype", type(value).__name__)
        raise ValueError(
            f"expected {name} to be an array of numbers, got {shown}; pass NumPy's or JAX's"
        ) from None


def _check(named: Mapping[str, Any], holds: Any, wanted: str, remedy: str) -> None:
    """Each value (scalar or array) is numbers of which `holds` is true; `{}` is the name."""
    for name, value in named.items():
        if is_traced(value):
            continue
        bad = ~holds(_numbers(name, value))
        if bad.any():
            raise ValueError(
                f"expected {wanted.format(name)}, got {_first_bad(value, bad)}; {remedy}"
            )


def positive(*, remedy: str = "pass a number above 0", **named: Any) -> None:
    """Each value (scalar or array) is finite and above 0."""
    _check(named, lambda x: np.isfinite(x) & (x > 0), "{} > 0", remedy)


def non_negative(*, remedy: str = "pass 0 or a number above it", **named: Any) -> None:
    """Each value (scalar or array) is finite and not below 0."""
    _check(named, lambda x: np.isfinite(x) & (x >= 0), "{} >= 0", remedy)


def non_zero(*, remedy: str = "pass any other number", **named: Any) -> None:
    """Each value (scalar or array) is finite and not 0."""
    _check(named, lambda x: np.isfinite(x) & (x != 0), "{} finite and not 0", remedy)


def within(low: float, high: float, **named: Any) -> None:
    """Each value (scalar or array) lies in `[low, high]`."""
    wanted = f"{{}} in [{low:g}, {high:g}]"
    remedy = "pass a number inside that range"
    _check(named, lambda x: (x >= low) & (x <= high), wanted, remedy)


def finite(**named: Any) -> None:
    """Each value (scalar or array) is finite."""
    _check(named, np.isfinite, "finite {}", "pass another")


def count(*, minimum: int = 1, **named: Any) -> None:
    """Each value is a whole Python number, at least `minimum`."""
    for name, value in named.items():
        whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if not whole or value < minimum:
            raise ValueError(
                f"expected {name} to be a whole number >= {minimum}, got {value!r}; "
                "pass a Python int"
            )


def flag(**named: Any) -> None:
    """Each value is True or False, and no text or number that Python takes for one."""
    for name, value in named.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"expected {name} to be True or False, got {value!r}; pass a bool")


def scalar(**named: Any) -> None:
    """Each value is one number, no array of them."""
    rank(0, **named)
    for name, value in named.items():
        if not is_traced(value):
            _numbers(name, value)


def numbers(**named: Any) -> np.ndarray:
    """The one value as float64, of any shape."""
    ((name, value),) = named.items()
    return _numbers(name, value)


def column(**named: Any) -> np.ndarray:
    """The one value as float64, checked to be a list of numbers, `[N]`."""
    array, (name,) = numbers(**named), named
    if array.ndim != 1:
        raise ValueError(
            f"expected {name} to be a list of numbers, got shape {array.shape}; pass one each"
        )
    return array


def arrays(**named: Any) -> None:
    """Each value is a pytree of arrays; of none is fine, and None is not."""
    for name, value in named.items():
        leaves: list[Any] = jax.tree.leaves(value) if value is not None else [None]
        for leaf in leaves:
            held = hasattr(leaf, "dtype") and getattr(leaf.dtype, "kind", "V") not in "USO"
            if not held and not isinstance(leaf, (int, float)):
                raise ValueError(
                    f"expected {name} to be a tree of arrays, got {type(leaf).__name__} in it; "
                    "convert it to an array"
                )


def function(*, remedy: str = "pass a function", **named: Any) -> None:
    """Each value can be called."""
    for name, value in named.items():
        if not callable(value):
            got = f"the text {value!r}" if isinstance(value, str) else type(value).__name__
            if name == "loss":
                remedy = "pass a function, such as jdistill.losses.margin"
            raise ValueError(f"expected a callable, got {got} as {name}; {remedy}")


def callback(value: Any, *, name: str = "callback") -> None:
    """The value can be called, or is None."""
    if value is not None:
        function(**{name: value}, remedy="pass a function of one event, or None")


def instance(kind: Any, wanted: str, /, *, remedy: str = "pass one", **named: Any) -> None:
    """Each value is of a kind, in words `wanted`."""
    for name, value in named.items():
        if not isinstance(value, kind):
            raise ValueError(
                f"expected {name} to be {wanted}, got {type(value).__name__}; {remedy}"
            )


def examples(value: Any, most: int) -> tuple[Any, ...]:
    """Columns of examples: inputs, labels, and targets where there may be three, else None."""
    if not isinstance(value, (tuple, list)) or not 2 <= len(value) <= most:
        if hasattr(value, "train") and hasattr(value, "test"):
            raise ValueError(
                f"expected examples to be (inputs, labels), got a {type(value).__name__}; pass its "
                "split, such as dataset.train"
            )
        third = ", or with targets as a third" if most > 2 else ""
        number = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
        raise ValueError(
            f"expected examples to be (inputs, labels){third}, got a {type(value).__name__}{number}"
            "; pass the columns as a tuple"
        )
    columns = (np.asarray(each) if isinstance(each, list) else each for each in value)
    return (*columns, None)[:most]


def text(**named: Any) -> None:
    """Each value is a str."""
    instance(str, "text", remedy="pass a str", **named)


def mapping(**named: Any) -> None:
    """Each value is a mapping."""
    instance(Mapping, "a mapping", remedy="pass a dict", **named)


def sequence(*, remedy: str = "pass a list", **named: Any) -> None:
    """Each value is a sequence, and no text."""
    for name, value in named.items():
        kind = () if isinstance(value, (str, bytes)) else (Sequence, np.ndarray, jax.Array)
        instance(kind, "a sequence", remedy=remedy, **{name: value})


def devices(value: Any, *, name: str = "devices") -> tuple[jax.Device, ...]:
    """Devices of JAX, at least one."""
    found = tuple(value) if isinstance(value, (Sequence, np.ndarray)) else ()
    if not found or not all(isinstance(device, jax.Device) for device in found):
        raise ValueError(
            f"expected {name} to be one device or more, got {str(value)[:40]!r}; pass "
            "jax.devices() or some of them"
        )
    return found


def shape(*, minimum: int = 1, **named: Any) -> tuple[int, ...]:
    """The one value as a shape: whole numbers, at least `minimum` each."""
    ((name, value),) = named.items()
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ValueError(
            f"expected {name} to be a tuple of sizes, got {value!r}; pass such as (28, 28, 1)"
        )
    sizes = tuple(value)
    for size in sizes:
        count(minimum=minimum, **{f"each size of {name}": size})
    return tuple(int(size) for size in sizes)


def booleans(value: Any, *, name: str) -> np.ndarray:
    """Truths as an array of bool: it, or 0 and 1; no shares, no NaN."""
    array = np.asarray(value)
    if array.dtype != bool:
        bad = ~np.isin(array, (0, 1)) if array.dtype.kind in "iuf" else np.ones(array.shape, bool)
        if bad.any() or array.dtype.kind not in "iuf":
            shown = _first_bad(array, bad) if array.dtype.kind in "iuf" else f"dtype {array.dtype}"
            raise ValueError(
                f"expected {name} to be True or False for each example, got {shown}; pass bools"
            )
    return array.astype(bool)


def one_of(options: Iterable[Any], **named: Any) -> None:
    """Each value is one of the options."""
    options = tuple(options)
    for name, value in named.items():
        # An array would be compared entry by entry.
        if not any(isinstance(value, type(option)) and value == option for option in options):
            listed = ", ".join(repr(option) for option in options)
            raise ValueError(f"expected {name} to be one of {listed}, got {value!r}; pick one")


_REMEDY_BOUNDS = "pass the range of the data, (0.0, 1.0) for images scaled to [0, 1]"


def bounds(
    value: Any, shape: tuple[int, ...] | None = None, *, open_box: bool = False
) -> tuple[Any, Any]:
    """The box `(low, high)`, the lower end first: each a float, or an array per feature.

    Args:
        value: what was given.
        shape: of one input, against which arrays must broadcast; None where it is not known.
        open_box: whether ends may be infinite.
    """
    try:
        low, high = (_as_end(_numbers("bounds", entry)) for entry in value)
    except (TypeError, ValueError):
        raise ValueError(f"expected bounds=(low, high), got {value!r}; {_REMEDY_BOUNDS}") from None
    if shape is not None:
        for end in (low, high):
            if end.ndim > len(shape) or any(
                size not in (1, wanted)
                for size, wanted in zip(end.shape[::-1], shape[::-1], strict=False)
            ):
                raise ValueError(
                    f"expected bounds that broadcast against one input {shape}, got shape "
                    f"{end.shape}; pass numbers, or one end per feature"
                )
    ends = f"{_short(low)}, {_short(high)}"
    width = _width(low, high)
    if not (low < high).all():  # NaN is not either
        raise ValueError(
            f"expected bounds=(low, high) with low < high, got ({ends}); {_REMEDY_BOUNDS}"
        )
    if not open_box and not np.isfinite(width).all():
        raise ValueError(
            f"expected bounds=(low, high) finite, got ({ends}); {_REMEDY_BOUNDS}, or use an attack "
            "that needs no box, such as PGD, APGD, DeepFool, DDN or FMN"
        )
    return tuple(end if end.ndim else float(end) for end in (low, high))  # type: ignore[return-value]


def box_width(value: Any, **named: Any) -> float:
    """The smallest width of a box over the features that have one, for settings in units of it.

    Args:
        value: bounds.
        **named: the setting that is asked for, for the message; its value is not looked at.
    """
    width = float(np.min(_width(*bounds(value, open_box=True))))
    if not math.isfinite(width):
        (name,) = named
        raise ValueError(
            f"expected {name} with infinite bounds, got None, which takes the width of the box; "
            "pass it in units of the inputs"
        )
    return width


def _as_end(end: np.ndarray) -> np.ndarray:
    """The end, infinite where the float32 of inputs has no number for it."""
    with np.errstate(over="ignore"):
        rounded = end.astype(np.float32)
    return np.where(np.isinf(rounded), rounded, end)


def _width(low: Any, high: Any) -> np.ndarray:
    """High minus low in the float32 of inputs, which has no number for all of it."""
    with np.errstate(over="ignore"):
        return np.asarray(high, np.float32) - np.asarray(low, np.float32)


def _short(end: np.ndarray) -> str:
    return f"{end:g}" if end.ndim == 0 else np.array2string(end, threshold=6, precision=4)


def inputs_in_box(value: Any, box: tuple[Any, Any], *, name: str = "inputs") -> None:
    """Inputs `[B, ...]`: floating, finite and inside the box."""
    if len(_shape(name, value)) < 2:
        raise ValueError(
            f"expected {name} of shape [B, ...] with rank >= 2, got shape {np.shape(value)}; "
            f"add the batch axis: {name}[None]"
        )
    dtype = _dtype(name, value)
    if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
        raise ValueError(
            f"expected floating-point {name}, got dtype {dtype}; "
            f"convert them, e.g. {name}.astype('float32') / 255"
        )
    if is_traced(value):
        return
    with np.errstate(over="ignore"):  # what float32 cannot hold is refused as infinite below
        array = np.asarray(value).astype(np.float32)
    if not np.isfinite(array).all():
        where = _first_bad(array, ~np.isfinite(array))
        raise ValueError(f"expected finite {name}, got {where}; remove or repair that example")
    low, high = (np.asarray(end, np.float32) for end in box)
    bad = (array < low) | (array > high)
    if bad.any():
        raise ValueError(
            f"expected {name} in [{_short(low)}, {_short(high)}], got {_first_bad(array, bad)}; "
            f"{_REMEDY_INPUTS}"
        )


def class_indices(
    value: Any,
    *,
    name: str = "labels",
    batch_size: int | tuple[int, ...],
    num_classes: int | None = None,
) -> None:
    """Class indices `[B]`, or of the shape that `batch_size` is: integers in `0..K-1`."""
    wanted = batch_size if isinstance(batch_size, tuple) else (batch_size,)
    shape = _shape(name, value)
    if shape != wanted:
        raise ValueError(
            f"expected {name} of shape [B] = {wanted}, got shape {shape}; "
            "pass one class index per example (argmax of one-hot rows)"
        )
    dtype = _dtype(name, value)
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(
            f"expected integer {name}, got dtype {dtype}; convert them: {name}.astype('int32')"
        )
    if is_traced(value):
        return
    array = np.asarray(value)
    if num_classes is None:
        bad, those = array < 0, ">= 0"
    else:
        bad = (array < 0) | (array >= num_classes)
        those = f"in 0..{num_classes - 1} (the network has {num_classes} outputs)"
    if bad.any():
        raise ValueError(
            f"expected {name} {those}, got {_first_bad(array, bad)}; check the label encoding or "
            "the network's num_classes"
        )


def floats(num_axes: int, **named: Any) -> None:
    """Each value is an array of floats with so many axes; `-n` is n or more."""
    for name, value in named.items():
        rank(num_axes, **{name: value})
        if not jax.numpy.issubdtype(_dtype(name, value), jax.numpy.floating):
            raise ValueError(
                f"expected floating-point {name}, got dtype {_dtype(name, value)}; convert it with "
                ".astype('float32')"
            )


def logits(value: Any, batch_size: int, *, name: str = "logits_fn") -> None:
    """Logits of a network: floats `[B, K]` with `K >= 2`."""
    shape, dtype = _shape("logits", value), _dtype("logits", value)
    if len(shape) != 2 or shape[0] != batch_size or shape[1] < 2:
        raise ValueError(
            f"expected logits of shape [B, K] = ({batch_size}, at least 2), got {shape}; pass a "
            f"{name} that maps inputs [B, ...] to one row of logits per example "
            "(jdistill.nets.binary makes one of a network with a single logit)"
        )
    if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
        raise ValueError(
            f"expected floating-point logits, got dtype {dtype} of {name}, which have no gradient; "
            "return the logits before they are rounded (jdistill.attacks.bpda attacks through a "
            "step that rounds its inputs)"
        )


def soft_labels(
    value: Any, shape: tuple[int, ...], *, name: str = "targets", allow_nan: bool = False
) -> None:
    """Class probabilities `[B, K]`; of values that are known also that rows sum to 1."""
    if _shape(name, value) != shape:
        raise ValueError(
            f"expected {name} of shape [B, K] = {shape}, got {np.shape(value)}; pass one row of "
            "class probabilities per example"
        )
    if is_traced(value):
        return
    array = _numbers(name, value)
    sums = np.where(array < 0, np.inf, array).sum(axis=1)
    dtype = _dtype(name, value)
    short = jax.numpy.issubdtype(dtype, jax.numpy.floating)  # bfloat16 rounds to 1 part in 256
    tolerance = max(1e-3, 2 * float(jax.numpy.finfo(dtype).eps)) if short else 1e-3
    right = (np.abs(sums - 1) < tolerance) | (np.isnan(sums) & allow_nan)
    wrong = np.flatnonzero(~right)
    if wrong.size:
        raise ValueError(
            f"expected {name} of class probabilities that sum to 1, got {array[wrong[0]]} in row "
            f"{wrong[0]}; pass softmax outputs, such as distill.soft_labels gives"
        )


def other_than_labels(targets: Any, labels: Any) -> None:
    """Targets `[B]` of an attack, none of which is the example's own label."""
    if is_traced(targets, labels):
        return
    array = np.asarray(targets)
    bad = array == np.asarray(labels)
    if bad.any():
        raise ValueError(
            f"expected targets other than the labels, got the label {_first_bad(array, bad)}; pass "
            "the class that the example should be taken for, e.g. (labels + 1) % num_classes"
        )


def per_example(batch: tuple[int, ...], **named: Any) -> None:
    """Each value is a scalar or one number per example, of the shape `batch`, `(B,)`."""
    for name, value in named.items():
        if np.shape(value) not in ((), batch):
            raise ValueError(
                f"expected {name} to be a scalar or of shape [B] = {batch}, got {np.shape(value)}; "
                "pass one number, or one per example"
            )


def rank(num_axes: int, **named: Any) -> None:
    """Each array has so many axes; `-n` is n or more."""
    for name, value in named.items():
        axes = len(_shape(name, value))
        if axes != num_axes and not axes >= -num_axes > 0:
            more = " or more" if num_axes < 0 else ""
            raise ValueError(
                f"expected {name} of rank {abs(num_axes)}{more}, got shape {np.shape(value)}; "
                "reshape it or add the missing axis"
            )


def prng_key(value: Any) -> jax.Array:
    """A typed Threefry key (or array of keys), made from raw key data where that is given."""
    if not hasattr(value, "dtype") or not jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
        try:
            value = jax.random.wrap_key_data(jax.numpy.asarray(value, jax.numpy.uint32))
        except (TypeError, ValueError, OverflowError):
            raise ValueError(
                f"expected a PRNG key, got {_show(value)}; make one with jax.random.key(0)"
            ) from None
    if "threefry" not in str(jax.random.key_impl(value)):
        raise ValueError(
            f"expected a Threefry key, got {jax.random.key_impl(value)}; other generators draw "
            "differently under vmap: make it with jax.random.key(0, impl='threefry2x32')"
        )
    return value
