"""The pictures of a report: clean examples, their adversarial versions and the differences."""

import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from jdistill import _validate
from jdistill._files import PathLike, as_path, read_whole, write_whole
from jdistill.report._optional import optional

_DPI = 160


def write_picture_grid(
    pictures: Mapping[str, Any] | PathLike,
    path: PathLike,
    *,
    max_examples: int = 8,
    attack: str = "C&W L2",
    norm: str = "l2",
) -> epath.Path:
    """Draws clean examples, their adversarial versions and the differences, as a PNG file.

    The difference is adversarial minus clean on a diverging scale with 0 in its middle, the same
    for all examples; of several channels, the one that changed most.

    Args:
        pictures: `clean [P, H, W, C]` and `adversarial [P, H, W, C]` floats in the box of the
            data, `labels [P]` and `predictions [P]` (on the adversarial examples) class indices,
            `distance [P]` (inf where the attack found nothing); or the path of an .npz of them.
        path: the file to write.
        max_examples: how many of the examples to show, the first ones.
        attack: the attack's name, for the row's label.
        norm: the norm of `distance`.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
        ValueError: an array is missing, or its shape does not fit the others'.

    Example:
        >>> import tempfile
        >>> clean = np.zeros((2, 4, 4, 1))
        >>> arrays = {"clean": clean, "adversarial": clean + 0.1, "labels": np.array([0, 1]),
        ...           "predictions": np.array([3, 1]), "distance": np.array([0.4, np.inf])}
        >>> write_picture_grid(arrays, tempfile.mkdtemp() + "/pictures.png", norm="l2").name
        'pictures.png'
    """
    _validate.count(max_examples=max_examples)
    _validate.text(attack=attack, norm=norm)
    target = as_path(path)
    arrays = load_pictures(pictures)
    matplotlib = optional("matplotlib")
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = _figure(arrays, max_examples, attack, norm)
        optional("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
        data = io.BytesIO()
        # Without matplotlib's version in the file, the same arrays give the same bytes.
        figure.savefig(data, format="png", dpi=_DPI, metadata={"Software": None})
    return write_whole(target, data.getvalue())


def load_pictures(pictures: Mapping[str, Any] | PathLike) -> dict[str, np.ndarray]:
    """The arrays of a picture file (or of a mapping), with their shapes checked."""
    names = ("clean", "adversarial", "labels", "predictions", "distance")
    if not isinstance(pictures, Mapping):
        with np.load(io.BytesIO(read_whole(pictures))) as file:
            pictures = {name: file[name] for name in file.files}
    missing = [name for name in names if name not in pictures]
    if missing:
        raise ValueError(
            f"expected pictures with the arrays {', '.join(names)}, got none named "
            f"{', '.join(missing)}; save them with numpy.savez"
        )
    arrays = {name: np.asarray(pictures[name]) for name in names}
    for name in names[:2]:
        _validate.inputs_in_box(arrays[name], (-np.inf, np.inf), name=name)
    _validate.numbers(distance=arrays["distance"])
    shape = arrays["clean"].shape
    if len(shape) != 4 or not shape[0]:
        raise ValueError(
            f"expected clean pictures of shape [P, H, W, C] with P >= 1, got shape {shape}; "
            "add the missing axis"
        )
    for name in names[1:]:
        wanted = shape if name == "adversarial" else shape[:1]
        if arrays[name].shape != wanted:
            raise ValueError(
                f"expected {name} of shape {wanted}, as the clean pictures have it, got shape "
                f"{arrays[name].shape}; pass one entry per picture"
            )
    return arrays


def _figure(arrays: Mapping[str, np.ndarray], max_examples: int, attack: str, norm: str) -> Any:
    clean = arrays["clean"][:max_examples].astype(np.float64)
    adversarial = arrays["adversarial"][:max_examples].astype(np.float64)
    change = adversarial - clean
    largest = np.abs(change).argmax(axis=-1)[..., None]
    change = np.take_along_axis(change, largest, axis=-1)[..., 0]
    limit = float(np.abs(change).max()) or 1.0
    low, high = min(0.0, clean.min(), adversarial.min()), max(1.0, clean.max(), adversarial.max())

    number = len(clean)
    figure_module = optional("matplotlib.figure")
    figure = figure_module.Figure(figsize=(0.95 + 0.95 * number, 3.7), layout="constrained")
    # The color bar has a column of its own: beside the last row alone it would shift that row.
    widths = [*[1.0] * number, 0.1]
    cells = figure.subplots(3, number + 1, squeeze=False, width_ratios=widths)
    grid = cells[:, :number]
    for unused in cells[:2, number]:
        unused.remove()
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.03, wspace=0.02, hspace=0.02)
    painted = None
    for column in range(number):
        top, middle, bottom = grid[:, column]
        for axes, picture in ((top, clean[column]), (middle, adversarial[column])):
            shown = (picture - low) / (high - low)
            # Networks with other than 1 or 3 channels exist; their mean is what can be seen.
            shown = shown if shown.shape[-1] == 3 else shown.mean(axis=-1)
            axes.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        painted = bottom.imshow(
            change[column], cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest"
        )
        distance = float(arrays["distance"][column])
        found = math.isfinite(distance)
        top.set_title(f"label {arrays['labels'][column]}", fontsize=8.5, pad=3)
        read = f"read as {arrays['predictions'][column]}" if found else "not found"
        middle.set_title(read, fontsize=8.5, pad=3)
        moved = f"{norm} {distance:.2f}" if found else "–"
        bottom.set_title(moved, fontsize=8.5, pad=3)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)
    for axes, label in zip(grid[:, 0], ("clean", attack, "difference"), strict=True):
        axes.set_ylabel(label, fontsize=9)
    bar = figure.colorbar(painted, cax=cells[2, number])
    bar.ax.tick_params(labelsize=7)
    bar.outline.set_visible(False)
    return figure
