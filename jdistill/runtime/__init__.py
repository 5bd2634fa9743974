"""Helpers for programs around the library: caches, flags, files that survive a crash, exit codes.

Importing this module initializes no JAX backend, so that `add_cpu_flags` can still take effect.
The library logs to the logger `"jdistill"`; it adds no handler and sets no level: the program does.
"""

from jdistill.runtime._distributed import initialize
from jdistill.runtime._jax import (
    add_cpu_flags,
    describe,
    enable_compilation_cache,
    is_main_process,
    programs,
)
from jdistill.runtime._machine import Machine, check_machine
from jdistill.runtime._program import run_main
from jdistill.runtime._progress import progress
from jdistill.runtime._records import (
    append_jsonl,
    atomic_write,
    atomic_write_text,
    check_writable,
    read_jsonl,
    write_json,
)
from jdistill.runtime._shards import ShardFolder

__all__ = [
    "Machine",
    "ShardFolder",
    "add_cpu_flags",
    "append_jsonl",
    "atomic_write",
    "atomic_write_text",
    "check_machine",
    "check_writable",
    "describe",
    "enable_compilation_cache",
    "initialize",
    "is_main_process",
    "programs",
    "progress",
    "read_jsonl",
    "run_main",
    "write_json",
]
