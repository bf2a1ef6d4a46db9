#!/usr/bin/env bash
# run.sh CONFIG [--section.key VALUE ...]: start the run on all workers, detached. CONFIG is a path in the repository.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

config=${1:-}
[[ -n $config ]] || refuse CONFIG "" "name a config of the repository, such as configs/dpo.yaml"
[[ $config != /* && $config != -* && $config != *..* ]] || refuse CONFIG "$config" "a path from the repository's root"
shift
call all "${hosts[@]}" bash $tree/launch/worker-run.sh start "$RUN_ID" "$COMMAND" "$config" \
  --run.dir "$RUNS/$RUN_ID" --run.progress false "$@"
