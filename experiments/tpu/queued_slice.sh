#!/usr/bin/env bash
# A slice of several hosts through a queued resource: asked for, waited for, and the command run on
# every host at once.
#
#   NAME=jdistill ZONE=us-west4-a TYPE=v5litepod-16 VERSION=v2-alpha-tpuv5-lite SPOT=1 \
#     experiments/tpu/queued_slice.sh jdistill defend cifar10 --distributed --workdir gs://BUCKET/c
#   … experiments/tpu/queued_slice.sh delete
#
# SPOT=1 may be preempted; FLEX=4h is Flex-start, for at most that long. Called again, it finds the
# request; one that was preempted or has failed is deleted and made anew, and the run goes on.
source "$(dirname "$0")/_cloud.sh"
type="${TYPE:-v5litepod-16}"
queue=(gcloud alpha compute tpus queued-resources)

state() {
  "${queue[@]}" describe "$NAME" "${at[@]}" --format 'value(state.state)' 2> /dev/null || true
}
if [ "$1" = delete ]; then
  exec "${queue[@]}" delete "$NAME" "${at[@]}" --quiet --force
fi
while true; do
  case "$(state)" in
    ACTIVE) break ;;
    FAILED | SUSPENDED) "${queue[@]}" delete "$NAME" "${at[@]}" --quiet --force ;;
    "")
      "${queue[@]}" create "$NAME" --node-id "$NAME" "${at[@]}" --accelerator-type "$type" \
        --runtime-version "$version" ${SPOT:+--spot} \
        ${FLEX:+--provisioning-model flex-start --max-run-duration "$FLEX"}
      ;;
    *) sleep "${POLL_SECONDS:-30}" ;;
  esac
done
copy_and_run "$@"
