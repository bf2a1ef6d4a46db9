# Sourced by a worker's scripts: where things lie, and what a run is doing here.
# shellcheck shell=bash
set -euo pipefail
base=$HOME/dpo_jax

say() { printf '%s: %s\n' "$(hostname)" "$1"; }

refuse() {
  say "$1" >&2
  exit 2
}

alive() { # RUN_FOLDER: whether its trainer runs; a number that another program has got since is none
  [[ -f $1/pid && $(ps -o args= -p "$(<"$1/pid")") == *dpo-jax* ]]
}

state() { # RUN_FOLDER
  local id=${1##*/} tenth
  for ((tenth = 0; tenth < 30; tenth++)); do # its parent may be about to write the exit code
    if alive "$1"; then
      say "$id runs, process $(<"$1/pid")"
      return
    elif [[ -f $1/exit_code ]]; then
      say "$id ended, exit code $(<"$1/exit_code")"
      return
    fi
    [[ -f $1/pid ]] || break
    sleep 0.1
  done
  say "$id does not run: it was not started here, or its machine was restarted"
}

idle() { # refuse if any run goes on here
  local run
  for run in "$base"/launched/*; do
    ! alive "$run" || refuse "RUN_ID: ${run##*/} runs here: launch/stop.sh first"
  done
}
