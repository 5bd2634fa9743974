# What the scripts beside it begin with, and how the command gets to the hosts. Sourced.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${NAME:?expected NAME, of the VM or slice}" "${ZONE:?expected ZONE, such as us-central1-a}"
if [ $# = 0 ]; then
  echo "expected a command for $NAME, got none; add jdistill defend …, or delete" >&2
  exit 2
fi
version="${VERSION:-v2-alpha-tpuv5-lite}"
vm=(gcloud compute tpus tpu-vm)
at=(--zone "$ZONE")

# This checkout goes to every host of the VM, and the command runs there.
copy_and_run() {
  local archive command
  archive="$(mktemp -d)/checkout.tar.gz"
  git archive --format tar.gz --output "$archive" HEAD
  "${vm[@]}" scp "$archive" "$NAME:checkout.tar.gz" "${at[@]}" --worker all
  # Quoted once more: it is read by a shell over there.
  command="mkdir -p jdistill && tar xzf checkout.tar.gz -C jdistill && bash jdistill/experiments/tpu/job.sh"
  "${vm[@]}" ssh "$NAME" "${at[@]}" --worker all --command "$command tpu $(printf '%q ' "$@")"
}
