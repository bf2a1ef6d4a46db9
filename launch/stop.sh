#!/usr/bin/env bash
# Ask the run on all workers to save its state and stop, and wait for that. Nothing is deleted. `stop.sh kill` is for a
# run that hangs: it kills what has not stopped after HALT_SECONDS.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

case ${1:-} in
  '') call all bash $tree/launch/worker-run.sh stop "$RUN_ID" "$STOP_SECONDS" ;;
  kill) call all bash $tree/launch/worker-run.sh halt "$RUN_ID" "$HALT_SECONDS" ;;
  *) refuse ARGUMENT "$1" "kill, or nothing" ;;
esac
