# Of the scripts beside it: this checkout goes to every host of the VM, and the command runs there.

copy_and_run() {
  local archive command
  archive="$(mktemp -d)/checkout.tar.gz"
  git archive --format tar.gz --output "$archive" HEAD
  "${vm[@]}" scp "$archive" "$NAME:checkout.tar.gz" "${at[@]}" --worker all
  # Quoted once more: it is read by a shell over there.
  command="mkdir -p jdistill && tar xzf checkout.tar.gz -C jdistill && bash jdistill/experiments/tpu/job.sh"
  "${vm[@]}" ssh "$NAME" "${at[@]}" --worker all --command "$command $(printf '%q ' "$@")"
}
