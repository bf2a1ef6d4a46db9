#!/usr/bin/env bash
# The state of the queued resource, of the slice, and of the run on each worker.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

no_arguments "$@"
run "${tpus[@]}" queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)'
run "${tpus[@]}" tpu-vm describe "$NAME" "${where[@]}" --format='value(state,health)'
call all bash $tree/launch/worker-run.sh status "$RUN_ID" "$RUNS"
