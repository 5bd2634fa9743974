"""What a notebook should know of its machine before it starts: the device, and free memory."""

import os
import pathlib
from collections.abc import Mapping
from typing import NamedTuple

import jax

from jdistill import _validate

_GIB = 2**30
_GOOGLE = "0x1ae0"
# Set on a TPU machine of Google Cloud, and on Colab.
_TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "COLAB_TPU_1VM")


class Machine(NamedTuple):
    """The device that JAX runs on, and the memory that is free.

    Attributes:
        platform: `"cpu"`, `"gpu"`, or `"tpu"`.
        kind: of the device, in its maker's words.
        num_devices: of this process.
        jax_version: of the package.
        free_bytes: of memory of the host that this process may still take; None where the system
            does not say.
    """

    platform: str
    kind: str
    num_devices: int
    jax_version: str
    free_bytes: int | None

    def __str__(self) -> str:
        count = f"{self.num_devices} x " if self.num_devices > 1 else ""
        kind = "" if self.kind == self.platform else f" ({self.kind})"
        free = "unknown" if self.free_bytes is None else f"{self.free_bytes / _GIB:.1f} GiB"
        return f"{count}{self.platform}{kind}, JAX {self.jax_version}, free memory: {free}"


def check_machine(*, min_free_gib: float = 1.0) -> Machine:
    """The machine that JAX runs on; an error where it is not what one would think.

    JAX falls back to the CPU with no more than a line in the log where it cannot use an
    accelerator, and a hosted notebook that runs out of memory is killed without a word. Both are
    better known in the first cell than an hour later. Starts the backend.

    Args:
        min_free_gib: the least memory of the host that must be free, in GiB (2**30 bytes), at
            least 0; limits of a container count.

    Returns:
        The machine; `print` it.

    Raises:
        ValueError: `min_free_gib` is no number of at least 0.
        RuntimeError: there is a TPU or an NVIDIA GPU, and JAX runs on the CPU although nobody asked
            for it (`JAX_PLATFORMS=cpu`, or `CUDA_VISIBLE_DEVICES` that names no GPU).
        MemoryError: less memory is free.

    Example:
        >>> machine = check_machine(min_free_gib=0.1)
        >>> machine.num_devices >= 1
        True
    """
    _validate.scalar(min_free_gib=min_free_gib)
    _validate.non_negative(min_free_gib=min_free_gib)
    device = jax.devices()[0]
    machine = Machine(
        device.platform,
        device.device_kind,
        jax.local_device_count(),
        jax.__version__,
        free_memory(),
    )
    # JAX's own types do not know its settings.
    asked = getattr(jax.config, "jax_platforms", None) or ""
    asked = asked or getattr(jax.config, "jax_platform_name", None) or ""
    return judged(machine, accelerators(), asked, min_free_gib)


def judged(machine: Machine, found: list[str], asked: str, min_free_gib: float) -> Machine:
    """The machine, or the error that the facts give.

    Args:
        machine: as it is.
        found: signs of accelerators on it.
        asked: the platforms that JAX was told to use, separated by commas; empty where it chose.
        min_free_gib: the least memory, in GiB.
    """
    if machine.platform == "cpu" and found and asked.split(",")[0] != "cpu":
        raise RuntimeError(
            f"expected JAX to run on the accelerator of this machine ({', '.join(found)}), got the "
            "CPU; install JAX for it, such as `pip install 'jax[cuda13]'`, or, on Colab, restart "
            "the runtime and undo what was installed over its JAX (another jax, jaxlib, libtpu, or "
            "TensorFlow for TPUs); to use the CPU on purpose, set JAX_PLATFORMS=cpu before JAX is "
            "imported (%env JAX_PLATFORMS=cpu in a notebook)"
        )
    if machine.free_bytes is not None and machine.free_bytes < min_free_gib * _GIB:
        raise MemoryError(
            f"expected at least {min_free_gib:g} GiB of free memory, got "
            f"{machine.free_bytes / _GIB:.1f}; close other notebooks and restart this runtime, or "
            "choose one with more memory"
        )
    return machine


def accelerators(
    root: pathlib.Path = pathlib.Path("/"), environment: Mapping[str, str] | None = None
) -> list[str]:
    """Signs of a TPU or an NVIDIA GPU that JAX should run on, whether it does or not.

    Args:
        root: of the file system.
        environment: None is that of the process.
    """
    environment = os.environ if environment is None else environment
    found = [name for name in _TPU_VARIABLES if environment.get(name, "0") not in ("", "0")]
    found += _paths(root, "dev/accel[0-9]*")
    # Groups of devices that are passed through, which need not be TPUs.
    for group in _paths(root, "dev/vfio/[0-9]*"):
        members = f"sys/kernel/iommu_groups/{group.rpartition('/')[2]}/devices/*/vendor"
        vendors = {_text(path) for path in root.glob(members)}
        if not vendors or _GOOGLE in vendors:
            found.append(group)
    # Set to nothing, to -1, or as Slurm does where a job has none, it hides them on purpose.
    visible = environment.get("CUDA_VISIBLE_DEVICES", "all").strip()
    if visible and not visible.startswith(("-", "NoDevFiles")):
        found += _paths(root, "dev/nvidia[0-9]*")
    return found


def free_memory(root: pathlib.Path = pathlib.Path("/")) -> int | None:
    """Bytes that this process may still take, by the system and by its control groups.

    Args:
        root: of the file system.

    Returns:
        The bytes; None where the system does not say, as on macOS and Windows.
    """
    left = _in_groups(root)
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            left.append(int(value.split()[0]) * 1024)
    return max(0, min(left)) if left else None


def _in_groups(root: pathlib.Path) -> list[int]:
    """What the limit of each control group of the process leaves, of both versions."""
    left = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            home, limit, usage = root / "sys/fs/cgroup", "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            home = root / "sys/fs/cgroup/memory"
            limit, usage = "memory.limit_in_bytes", "memory.usage_in_bytes"
        else:
            continue
        inside = home / path.strip("/")
        # A container may see its own group as the root, whatever the path says.
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(home):
                break
            most, used = _text(folder / limit), _text(folder / usage)
            if most.isdigit() and used.isdigit():
                left.append(int(most) - int(used) + _cache(folder))
    return left


def _cache(folder: pathlib.Path) -> int:
    """Bytes of files that the group counts and the system gives back when asked."""
    names = ("total_inactive_file", "inactive_file")
    stats = dict(line.split()[:2] for line in _text(folder / "memory.stat").splitlines())
    return next((int(stats[name]) for name in names if name in stats), 0)


def _paths(root: pathlib.Path, pattern: str) -> list[str]:
    return sorted(f"/{path.relative_to(root)}" for path in root.glob(pattern))


def _text(path: pathlib.Path) -> str:
    """Content of a small file; empty where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
