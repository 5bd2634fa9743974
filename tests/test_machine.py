"""The first cell of a notebook: which device, how much memory, and what is refused."""

import pytest

from jdistill import runtime
from jdistill.runtime import _machine

GIB = 2**30
ON_CPU = runtime.Machine("cpu", "cpu", 1, "0.7.2", 10 * GIB)
ON_TPU = ON_CPU._replace(platform="tpu", kind="TPU v5 lite")


def files(root, content):
    """The files of a made-up machine, by their paths."""
    for name, text in content.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


GROUPS = "sys/kernel/iommu_groups"


@pytest.mark.parametrize(
    ("content", "environment", "expected"),
    [
        ({}, {}, []),
        ({"dev/accel0": ""}, {}, ["/dev/accel0"]),
        ({"dev/accel/accel0": ""}, {}, []),  # another maker's: a folder of this name
        ({"dev/nvidia0": "", "dev/nvidiactl": ""}, {}, ["/dev/nvidia0"]),
        ({"dev/nvidia0": ""}, {"CUDA_VISIBLE_DEVICES": "0"}, ["/dev/nvidia0"]),
        ({"dev/nvidia0": ""}, {"CUDA_VISIBLE_DEVICES": ""}, []),
        ({"dev/nvidia0": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}, []),
        ({}, {"TPU_ACCELERATOR_TYPE": "v5e-1", "COLAB_TPU_1VM": ""}, ["TPU_ACCELERATOR_TYPE"]),
        ({"dev/vfio/vfio": ""}, {}, []),
        ({"dev/vfio/0": "", "dev/vfio/vfio": ""}, {}, ["/dev/vfio/0"]),
        ({"dev/vfio/0": "", f"{GROUPS}/0/devices/a/vendor": "0x8086\n"}, {}, []),
        ({"dev/vfio/0": "", f"{GROUPS}/0/devices/a/vendor": "0x1ae0\n"}, {}, ["/dev/vfio/0"]),
        # Network cards of Google's cloud have its vendor too, and are no TPUs.
        (
            {
                "dev/vfio/0": "",
                f"{GROUPS}/0/devices/a/vendor": "0x10de\n",
                f"{GROUPS}/1/devices/b/vendor": "0x1ae0\n",
            },
            {},
            [],
        ),
        ({"dev/nvidia0": ""}, {"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, []),
        ({}, {"COLAB_TPU_1VM": "0"}, []),
    ],
)
def test_accelerators_are_found_by_their_devices(content, environment, expected, tmp_path):
    assert _machine.accelerators(files(tmp_path, content), environment) == expected


def test_an_accelerator_that_jax_does_not_use_is_an_error():
    with pytest.raises(RuntimeError, match=r"expected JAX to run .*\(/dev/accel0\), got the CPU; "):
        _machine.judged(ON_CPU, ["/dev/accel0"], "", 1.0)
    with pytest.raises(RuntimeError, match="JAX_PLATFORMS=cpu"):
        _machine.judged(ON_CPU, ["/dev/accel0"], "tpu,cpu", 1.0)


@pytest.mark.parametrize(
    ("machine", "found", "asked"),
    [
        (ON_CPU, [], ""),
        (ON_CPU, ["/dev/nvidia0"], "cpu"),  # on purpose
        (ON_TPU, ["/dev/vfio/0"], ""),
        (ON_CPU._replace(free_bytes=None), [], ""),  # not known: not refused
        (ON_CPU._replace(free_bytes=GIB), [], ""),
    ],
)
def test_what_is_as_it_should_be_passes(machine, found, asked):
    assert _machine.judged(machine, found, asked, 1.0) is machine


def test_too_little_memory_is_an_error():
    with pytest.raises(MemoryError, match=r"at least 2\.5 GiB of free memory, got 0\.5; close"):
        _machine.judged(ON_TPU._replace(free_bytes=GIB // 2), [], "", 2.5)


MEMINFO = "MemTotal: 16000000 kB\nMemFree: 1000 kB\nMemAvailable: 8388608 kB\n"
V2 = {
    "proc/self/cgroup": "0::/job/task\n",
    "sys/fs/cgroup/job/task/memory.max": "max\n",
    "sys/fs/cgroup/job/task/memory.current": str(GIB),
    "sys/fs/cgroup/job/memory.max": str(4 * GIB),
    "sys/fs/cgroup/job/memory.current": str(3 * GIB),
    "sys/fs/cgroup/job/memory.stat": f"anon 1\ninactive_file {GIB // 2}\n",
}
V1 = {
    "proc/self/cgroup": "3:cpu,cpuacct:/box\n2:memory:/box\n",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": str(2 * GIB),
    "sys/fs/cgroup/memory/memory.usage_in_bytes": str(GIB),
    "sys/fs/cgroup/memory/memory.stat": f"inactive_file 7\ntotal_inactive_file {GIB // 4}\n",
}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({}, None),
        ({"proc/meminfo": MEMINFO}, 8 * GIB),
        ({"proc/meminfo": MEMINFO, **V2}, 1.5 * GIB),  # the limit is the parent's
        ({"proc/meminfo": MEMINFO, **V1}, 1.25 * GIB),  # a container sees its group as the root
        ({"proc/meminfo": "MemAvailable: 4 kB\n", **V2}, 4096),
        ({**V2, "sys/fs/cgroup/job/memory.current": str(9 * GIB)}, 0),
    ],
)
def test_free_memory_is_what_system_and_containers_leave(content, expected, tmp_path):
    assert _machine.free_memory(files(tmp_path, content)) == expected


def test_the_machine_of_the_tests_is_told_in_a_line():
    machine = runtime.check_machine(min_free_gib=0)
    assert (machine.platform, machine.num_devices) == ("cpu", 8)  # conftest.py's
    assert str(machine).startswith(f"8 x cpu, JAX {machine.jax_version}, free memory: ")
    assert str(ON_TPU) == "tpu (TPU v5 lite), JAX 0.7.2, free memory: 10.0 GiB"
    assert str(ON_CPU._replace(free_bytes=None)).endswith("free memory: unknown")


@pytest.mark.parametrize("bad", [-1.0, "2"])
def test_the_least_memory_is_a_number(bad):
    with pytest.raises(ValueError, match="min_free_gib"):
        runtime.check_machine(min_free_gib=bad)
