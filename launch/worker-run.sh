#!/usr/bin/env bash
# A worker's half of a run: the other scripts call it on every worker, in the tree that sync.sh sent.
# shellcheck source=worker-lib.sh
. "$(dirname "$0")/worker-lib.sh"

check_sent() { # CONFIG
  [[ -f $base/tree/$1 ]] || refuse "CONFIG: $1 is not in the tree that was sent: commit it, then launch/sync.sh"
  [[ $(cat "$base/installed" 2>&1) == "$(readlink "$base/tree")" ]] ||
    refuse "$base/tree: what was sent last is not installed: launch/setup.sh"
}

doctor() { # COMMAND CONFIG OVERRIDES...: each line after the worker's name. A run has the devices and the port.
  idle
  check_sent "$2"
  cd "$base"
  with_secrets venv/bin/dpo-jax doctor "$(readlink -f "tree/$2")" --for "$1" "${@:3}" 2>&1 | sed -u "s/^/$(hostname): /"
}

start() { # RUN_ID COMMAND CONFIG OVERRIDES...
  local run=$base/launched/$1 line
  check_sent "$3"
  set -- "$2" "$(readlink -f "$base/tree/$3")" "${@:4}"
  printf -v line '%q ' "$@"
  if alive "$run"; then # ssh may have been lost and tried again
    [[ $(<"$run/command") == "$line" ]] || refuse "RUN_ID: ${run##*/} runs with other settings: launch/stop.sh"
    say "runs already, process $(<"$run/pid")"
    return
  fi
  mkdir -p "$run"
  rm -f "$run/pid" "$run/exit_code"
  printf '%s' "$line" >"$run/command"
  setsid nohup bash "$(readlink -f "$0")" supervise "$run" "$@" </dev/null >>"$run/log" 2>&1 &
  local tenth supervisor=$!
  for ((tenth = 0; tenth < 100; tenth++)); do # until it is there; then whether it stays
    kill -0 "$supervisor" 2>/dev/null && ! alive "$run" && [[ ! -f $run/exit_code ]] || break
    sleep 0.1
  done
  for ((tenth = 0; tenth < 10 * ${WATCH_SECONDS:-5}; tenth++)); do
    [[ ! -f $run/exit_code ]] || break
    sleep 0.1
  done
  line=$(state "$run")
  printf '%s\n' "$line"
  case $line in
    *' runs, process '*) ;;
    *' exit code '*) tail -n 20 "$run/log" && exit "${line##* }" ;;
    *) tail -n 20 "$run/log" >&2 && exit 1 ;; # neither started nor ended
  esac
}

supervise() { # RUN_FOLDER WORD...: the trainer's parent; it outlives the ssh that started it
  local run=$1 code=0
  cd "$base"
  with_secrets venv/bin/dpo-jax "${@:2}" &
  echo $! >"$run/pid.new" && mv "$run/pid.new" "$run/pid"
  wait $! || code=$?
  echo "$code" >"$run/exit_code"
}

with_secrets() { # COMMAND...: becomes it, with the lines NAME=value of secrets.env as variables; values are data
  [[ ! -f secrets.env ]] || while IFS= read -r || [[ -n $REPLY ]]; do
    [[ ${REPLY%$'\r'} =~ ^(export\ )?([A-Za-z_][A-Za-z0-9_]*)=(.*)$ ]] || continue # settings.sh refuses other lines
    export "${BASH_REMATCH[2]}=$(unquoted "${BASH_REMATCH[3]}")"
  done <secrets.env
  exec "$@"
}

unquoted() { # VALUE: without the one pair of quotes around it, if there is one
  [[ $1 != \"*\" && $1 != \'*\' ]] || set -- "${1:1:${#1}-2}"
  printf '%s' "$1"
}

status() { # RUN_ID RUNS
  local run=$2/$1 logged=0 saved=0 step steps
  state "$base/launched/$1"
  [[ $2 != gs://* ]] || run=$(local_copy "$2/$1")
  [[ ! -f $run/metrics.jsonl ]] || logged=$(tail -n 1 "$run/metrics.jsonl" | sed -n 's/.*"step": \([0-9]*\).*/\1/p')
  for step in "$run"/checkpoints/*; do
    [[ ! ${step##*/} =~ ^[0-9]+$ ]] || ((${step##*/} <= saved)) || saved=${step##*/}
  done
  steps="newest step: logged ${logged:-0}"
  [[ $2 == gs://* ]] || steps+=", saved $saved" # of a bucket, status.sh has seen that
  say "$steps"
}

local_copy() { # URL: the folder here with the logs of a run in a bucket, which gets them before each save only
  local copy newest=/nonexistent name
  name=$(printf %s "$1" | sha256sum | head -c 16) # as local_copy in dpo_jax/storage.py says; one a process
  for copy in "$HOME/.cache/dpo_jax/runs/$name"-*; do
    [[ ! $copy/metrics.jsonl -nt $newest/metrics.jsonl ]] || newest=$copy
  done
  printf '%s\n' "$newest"
}

logs() { # RUN_ID LINES FOLLOW
  local log=$base/launched/$1/log
  [[ -f $log ]] || refuse "RUN_ID: $1 has no log here: it was not started"
  if (($3)); then tail -n "$2" -F "$log"; else tail -n "$2" "$log"; fi
}

stop() { # RUN_ID SECONDS
  local run=$base/launched/$1 deadline=$((SECONDS + $2))
  ! alive "$run" || kill -TERM "$(<"$run/pid")"
  while alive "$run" && ((SECONDS < deadline)); do sleep 0.1; done
  state "$run"
  ! alive "$run"
}

halt() { # RUN_ID SECONDS: stop, then kill: a process that waits for one that is gone hears no SIGTERM
  stop "$@" || { kill -KILL "$(<"$base/launched/$1/pid")" && stop "$1" 10; }
}

"$@"
