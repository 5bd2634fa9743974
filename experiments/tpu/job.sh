#!/usr/bin/env bash
# What every host of a job runs: install once, then the command, again where it was interrupted.
#
#   job.sh EXTRA COMMAND...     EXTRA: tpu or cuda13, of JAX
#
# A workdir that all hosts share (gs://…, or a shared file system) makes it resumable: started again
# anywhere, it goes on where the last checkpoint is.
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

# 143: SIGTERM, as a supervisor sends it; 137: killed. All else that fails would fail again.
for attempt in 1 2 3 4 5; do
  code=0
  "$@" || code=$?
  case "$code" in
    143 | 137) echo "job.sh: attempt $attempt was interrupted (exit code $code)" >&2 ;;
    *) exit "$code" ;;
  esac
done
exit "$code"
