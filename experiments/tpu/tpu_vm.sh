#!/usr/bin/env bash
# One TPU VM: made where it is not there, given this checkout, and the command run on it.
#
#   NAME=jdistill ZONE=us-central1-a TYPE=v5litepod-1 VERSION=v2-alpha-tpuv5-lite \
#     experiments/tpu/tpu_vm.sh jdistill defend mnist --parallel sweep --workdir gs://BUCKET/mnist
#   … experiments/tpu/tpu_vm.sh delete
#
# Called again, it finds the VM, copies the checkout anew, and the run goes on.
source "$(dirname "$0")/_cloud.sh"
type="${TYPE:-v5litepod-1}"

if [ "$1" = delete ]; then
  exec "${vm[@]}" delete "$NAME" "${at[@]}" --quiet
fi
if ! "${vm[@]}" describe "$NAME" "${at[@]}" > /dev/null 2>&1; then
  "${vm[@]}" create "$NAME" "${at[@]}" --accelerator-type "$type" --version "$version" \
    ${SPOT:+--spot}
fi
copy_and_run "$@"
