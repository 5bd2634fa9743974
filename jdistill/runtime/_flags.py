"""Whether jaxlib's XLA accepts a flag, asked once in a process of its own, and kept."""

import json
import logging
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from typing import Any

from etils import epath

from jdistill import _files

logger = logging.getLogger("jdistill")

# It compiles and runs a convolution, so that a flag that is known and does harm is left out too.
# An XLA that refuses a flag aborts: without a core file.
_PROBE = """
try:
    import resource
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
except (ImportError, OSError, ValueError):
    pass
import jax
import jax.numpy as jnp
ones = jnp.ones((2, 2, 8, 8), "float32")
out = jax.jit(lambda x, y: jax.lax.conv(x, y, (1, 1), "VALID"))(ones, ones)
assert out.shape == (2, 2, 1, 1) and bool((out == 128).all())
print("accepted")
"""
_SECONDS = 30.0  # about 2 are needed
_ASK_AGAIN = 24 * 3600.0  # seconds after which what was not to be known is asked again


def accepted(flag: str) -> bool:
    """Whether XLA takes the flag on CPU, `--name=value`; it aborts a process on one it does not.

    The answer is kept in the library's cache folder, one file for each jaxlib: a file is read where
    it is known, and else a process is started, which takes about two seconds. An answer that could
    not be had (no process can be started, it took too long, it failed for another reason) counts as
    no for a day.
    """
    try:
        kept = _files.user_cache() / f"xla-flags-{_jaxlib()}.json"
    except (OSError, RuntimeError):  # no home
        return _ask(flag) is True
    answers = _read(kept)
    known = answers.get(flag)
    if isinstance(known, bool):
        return known
    if isinstance(known, int | float) and 0 <= time.time() - known < _ASK_AGAIN:
        return False
    answer = _ask(flag)
    answers[flag] = time.time() if answer is None else answer
    try:
        _files.write_whole(kept, json.dumps(answers, indent=2).encode())
    except OSError as error:
        logger.debug("the answer about XLA's flag %s is not kept: %s", flag, error)
    return answer is True


def _jaxlib() -> str:
    """Library and machine that an answer holds for."""
    return f"{version('jaxlib')}-{platform.system()}-{platform.machine()}".lower()


def _read(path: epath.Path) -> dict[str, Any]:
    """The answers that are kept: True, False, or when it could not be told; empty if damaged."""
    try:
        answers = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return answers if isinstance(answers, dict) else {}


def _ask(flag: str) -> bool | None:
    """XLA's answer; None where it gave none, after a warning in the log."""
    # Neither the user's flags nor a shared cache have a part in it.
    environment = {
        **os.environ,
        "XLA_FLAGS": flag,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"gave no answer within {_SECONDS:g} s"
    except (OSError, TypeError, ValueError) as error:  # no Python to ask with
        reason = f"could not be asked ({error})"
    else:
        if done.returncode == 0 and done.stdout.split()[-1:] == ["accepted"]:
            return True
        if done.returncode != 0 and flag.partition("=")[0] in done.stderr:
            return False
        reason = f"could not be asked (a process that did ended with {done.returncode})"
    logger.warning(
        "going on without the XLA flag %s, which makes convolutions on CPU faster: jaxlib %s; to "
        "have it nevertheless, set XLA_FLAGS to it",
        flag,
        reason,
    )
    return None
