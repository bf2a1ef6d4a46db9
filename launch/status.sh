#!/usr/bin/env bash
# The state of the request and of the slices, and where all slices are there, of the run on each worker.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

no_arguments "$@"
errors=$(mktemp)
trap 'rm -f "$errors"' EXIT
ready=1

ask() { # KIND NAME FIELDS: its state, NOT_FOUND too; other failures of gcloud are failures
  local told code=0
  told=$(run "${tpus[@]}" "$1" describe "$2" "${where[@]}" --format="value($3)" 2>"$errors") || code=$?
  if ((code)); then
    grep -q NOT_FOUND "$errors" || { cat "$errors" >&2 && exit "$code"; }
    told=NOT_FOUND
  fi
  if [[ ${DRY_RUN:-} == 1 ]]; then printf '%s\n' "$told"; else printf '%s %s: %s\n' "$1" "$2" "$told"; fi
  [[ ${DRY_RUN:-} == 1 || $told =~ ^(ACTIVE|READY) ]] || ready=0
}

[[ $REQUEST == direct ]] || ask queued-resources "$NAME" state.state
for node in "${nodes[@]}"; do
  ((ready)) || exit 0
  ask tpu-vm "$node" state,health
done
((ready)) || exit 0
printf -v runs %q "$RUNS"
ssh_to all "if [ -e $tree ]; then bash $tree/launch/worker-run.sh status $RUN_ID $runs; \
else echo \"\$(hostname): $RUN_ID does not run: nothing was sent here\"; fi"
