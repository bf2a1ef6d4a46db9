#!/usr/bin/env bash
# doctor.sh CONFIG [--section.key VALUE ...]: check on all workers at once what a run of it needs, before run.sh.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

check_run "${COMMIT:-$(ALLOW_DIRTY=1 commit_to_send)}" "$@"
call all "${hosts[@]}" bash $tree/launch/worker-run.sh doctor "$COMMAND" "$1" --run.dir "$RUNS/$RUN_ID" "${@:2}"
