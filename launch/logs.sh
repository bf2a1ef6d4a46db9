#!/usr/bin/env bash
# logs.sh [WORKER|all]: the end of the run's log on worker 0, another, or all. LINES=100; FOLLOW=1 goes on with it;
# SLICE=0 says which slice's worker, where there are several. When the slice is gone: what the run left in its bucket.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

which=${1:-0} lines=${LINES:-100} slice=${SLICE:-0}
[[ $which =~ ^([0-9]+|all)$ ]] || refuse WORKER "$which" "the number of a worker, or all"
[[ $lines =~ ^[1-9][0-9]*$ ]] || refuse LINES "$lines" "a number of lines"
[[ $slice =~ ^[0-9]+$ && $slice -lt $SLICES ]] || refuse SLICE "$slice" "the number of a slice, below $SLICES"
[[ $which == all ]] || nodes=("${nodes[slice]}")
((${#nodes[@]} == 1)) || [[ ${FOLLOW:-} != 1 ]] || refuse FOLLOW 1 "follow a worker of one slice"
if in_bucket && [[ ${DRY_RUN:-} != 1 ]] && state=$(state_of tpu-vm "${nodes[0]}" state) && [[ $state != READY ]]; then
  [[ ${FOLLOW:-} != 1 ]] || refuse FOLLOW 1 "${nodes[0]} is $state: there is nothing to follow"
  printf 'launch: %s is %s, and its logs with it; this is in the bucket:\n' "${nodes[0]}" "$state" >&2
  show_run "$lines"
  exit
fi
call "$which" bash $tree/launch/worker-run.sh logs "$RUN_ID" "$lines" "${FOLLOW:-0}"
