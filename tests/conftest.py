"""What every test shares: 8 CPU devices, strict broadcasting, a compilation cache on disk."""

import gc
import os
import pathlib
import signal

import jax
import pytest

jax.config.update("jax_platforms", "cpu")
# One process plays 8 devices, so that sharded code is tested everywhere. Code that places nothing
# runs on the first device alone, at its usual speed.
jax.config.update("jax_num_cpu_devices", 8)
# [B] against [B, K] must never broadcast by accident.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Compiling is most of a run's time, and a third of it buys speed that no test needs.
jax.config.update("jax_disable_most_optimizations", True)
# Half of the rest, which `jdistill._jax.jit` saves for what it compiles itself; XLA ends the
# process on a flag it does not know, and that of JAX 0.12 does not.
if jax.__version_info__ < (0, 11):
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
    )
# A second run finds its programs here. The workers of pytest-xdist share them: two that write one
# entry at once are rare (see `pytest_collection_modifyitems`), and a torn entry is compiled again.
_CACHE = pathlib.Path(__file__).parents[1] / ".jax_cache" / jax.__version__
jax.config.update("jax_compilation_cache_dir", str(_CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# A shell that starts the tests in the background lets them, and all processes that they start,
# ignore Ctrl-C; the tests of Ctrl-C need it heard.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config):
    # A cache entry that cannot be read or written costs a compilation, never a test.
    config.addinivalue_line(
        "filterwarnings", "ignore:Error (reading|writing) persistent compilation cache"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    # With --dist loadgroup a file's tests run on one worker, so that what they share is compiled
    # and trained once; the battery's go by attack.
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.path.name))


# A compiled attack takes about 165 maps of memory, and Linux allows a process 65,530: XLA ends with
# a segmentation fault where it gets no more.
MOST_MAPS, MAPS = 30_000, pathlib.Path("/proc/self/maps")
_finished = 0


def pytest_runtest_teardown():
    global _finished
    _finished += 1
    if _finished % 20 == 0 and MAPS.exists():
        with MAPS.open("rb") as lines:
            count = sum(1 for _ in lines)
        if count > MOST_MAPS:
            jax.clear_caches()
            gc.collect()
