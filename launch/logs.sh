#!/usr/bin/env bash
# logs.sh [WORKER|all]: the end of the run's log on worker 0, another, or all. LINES=100; FOLLOW=1 goes on with it.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

which=${1:-0} lines=${LINES:-100}
[[ $which =~ ^([0-9]+|all)$ ]] || refuse WORKER "$which" "the number of a worker, or all"
[[ $lines =~ ^[1-9][0-9]*$ ]] || refuse LINES "$lines" "a number of lines"
call "$which" bash $tree/launch/worker-run.sh logs "$RUN_ID" "$lines" "${FOLLOW:-0}"
