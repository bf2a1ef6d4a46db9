#!/usr/bin/env bash
# run.sh CONFIG [--section.key VALUE ...]: start the run on all workers, detached. CONFIG is a path in the repository.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

check_run "${COMMIT:-$(ALLOW_DIRTY=1 commit_to_send)}" "$@" # what is changed since sync.sh is no reason to refuse
call all "${hosts[@]}" bash $tree/launch/worker-run.sh start "$RUN_ID" "$COMMAND" "$1" \
  --run.dir "$RUNS/$RUN_ID" --run.progress false "${@:2}"
