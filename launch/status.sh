#!/usr/bin/env bash
# The state of the request and of the slices, of the run in its bucket, and where all slices are there, of the run on
# each worker.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

no_arguments "$@"
ready=1

ask() { # KIND NAME FIELDS
  local state
  state=$(state_of "$@")
  if [[ ${DRY_RUN:-} == 1 ]]; then printf '%s\n' "$state"; else printf '%s %s: %s\n' "$1" "$2" "$state"; fi
  [[ ${DRY_RUN:-} == 1 || $state =~ ^(ACTIVE|READY) ]] || ready=0
}

[[ $REQUEST == direct ]] || ask queued-resources "$NAME" state.state
for node in "${nodes[@]}"; do
  ((ready == 0)) || ask tpu-vm "$node" state,health
done
! in_bucket || report_run
((ready)) || exit 0
printf -v runs %q "$RUNS"
ssh_to all "if [ -e $tree ]; then bash $tree/launch/worker-run.sh status $RUN_ID $runs; \
else echo \"\$(hostname): $RUN_ID does not run: nothing was sent here\"; fi"
