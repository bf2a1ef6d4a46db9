#!/usr/bin/env bash
# Ask the run on all workers to save its state and stop, and wait for that. Nothing is killed and nothing deleted.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

no_arguments "$@"
call all bash $tree/launch/worker-run.sh stop "$RUN_ID" "$STOP_SECONDS"
