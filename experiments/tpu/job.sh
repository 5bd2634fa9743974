#!/usr/bin/env bash
# What every host of a job runs: install once, then the command.
#
#   job.sh EXTRA COMMAND...     EXTRA: tpu or cuda13, of JAX
#
# With a workdir that all hosts share (gs://…, or a shared file system) the job can be started again
# anywhere, on all of its hosts, and goes on where its last checkpoint is. Exit code 143 is SIGTERM.
set -euo pipefail
cd "$(dirname "$0")/../.."
extra="$1"
shift

if [ ! -e .venv-job/installed ]; then
  "${PYTHON:-python3}" -m venv .venv-job
  .venv-job/bin/python -m pip install --quiet "jax[$extra]" -e '.[study]'
  touch .venv-job/installed
fi
export PATH="$PWD/.venv-job/bin:$PATH"
exec "$@"
