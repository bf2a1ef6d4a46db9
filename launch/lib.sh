# Sourced by the other scripts: how commands are run, here and on the workers.
# shellcheck shell=bash disable=SC2034
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/settings.sh"
. "$here/bucket-lib.sh"

tpus=(gcloud compute tpus)
where=(--project="$PROJECT" --zone="$ZONE")
nodes=("$NAME") # the slices; where there are several, Google numbers them
((SLICES == 1)) || for ((i = 0; i < SLICES; i++)); do nodes[i]=$NAME-$i; done

run() { # COMMAND...: with DRY_RUN=1 only print it, ready to be pasted
  if [[ ${DRY_RUN:-} == 1 ]]; then
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
  else
    "$@"
  fi
}

retry() { # COMMAND...: five times, ever later; a 2 is final: it says that the command itself was wrong
  local attempt code delay=$RETRY_SECONDS
  for attempt in 1 2 3 4 5; do
    code=0
    run "$@" || code=$?
    ((code != 0 && code != 2 && attempt < 5)) || return "$code"
    printf 'launch: exit code %s, again in %s s: %s\n' "$code" "$delay" "${*:1:5}" >&2
    sleep "$delay"
    delay=$((delay * 2))
  done
}

on_slices() { # FUNCTION ARGUMENT...: on all slices at once, a slice's name before the arguments; 2 if any said 2
  local node pid code worst=0 pids=()
  if ((${#nodes[@]} == 1)) || [[ ${DRY_RUN:-} == 1 ]]; then # in the foreground, where Ctrl-C reaches it
    for node in "${nodes[@]}"; do "$1" "$node" "${@:2}"; done
    return
  fi
  for node in "${nodes[@]}"; do
    "$1" "$node" "${@:2}" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do
    code=0
    wait "$pid" || code=$?
    ((code == 0 || worst == 2)) || worst=$code
  done
  return "$worst"
}

ssh_slice() { # SLICE WORKERS LINE
  "${how:-run}" "${tpus[@]}" tpu-vm ssh "$1" "${where[@]}" --worker="$2" --command="$3" -- -o ServerAliveInterval=30
}

scp_slice() { # SLICE FILE PATH: to all its workers
  retry "${tpus[@]}" tpu-vm scp "$2" "$1:$3" "${where[@]}" --worker=all
}

ssh_to() { # WORKERS LINE: a line for the workers' shell, on every slice; how=retry to repeat it
  on_slices ssh_slice "$@"
}

call() { # WORKERS WORD...: the words reach the workers as they are here
  local workers=$1 line
  shift
  printf -v line '%q ' "$@"
  ssh_to "$workers" "${line% }"
}

state_of() { # KIND NAME FIELDS: its state, NOT_FOUND too; other failures of gcloud are failures
  local state errors code=0
  errors=$(mktemp)
  state=$(run "${tpus[@]}" "$1" describe "$2" "${where[@]}" --format="value($3)" 2>"$errors") || code=$?
  ! grep -q NOT_FOUND "$errors" || { state=NOT_FOUND && code=0; }
  ((code == 0)) || cat "$errors" >&2
  rm "$errors"
  printf '%s\n' "$state"
  return "$code"
}

commit_to_send() { # of the committed tree; with ALLOW_DIRTY=1 of one with the changes, that no branch holds
  local changes
  changes=$(git -C "$here" status --porcelain --untracked-files=no)
  if [[ -z $changes ]]; then
    git -C "$here" rev-parse HEAD
  else
    [[ ${ALLOW_DIRTY:-} == 1 ]] || refuse ALLOW_DIRTY "${ALLOW_DIRTY:-}" \
      "there are uncommitted changes: commit them, or set ALLOW_DIRTY=1 to send them too"
    git -C "$here" stash create
  fi
}

check_run() { # COMMIT CONFIG [--section.key VALUE ...]: refuse what cannot start, or is not found again
  local config=${2:-} word
  [[ -n $config ]] || refuse CONFIG "" "name a config of the repository, such as configs/llama3_8b_v5e16.yaml"
  [[ $config == *.y*ml ]] || refuse CONFIG "$config" "a config ends in .yaml"
  [[ $config != /* && $config != -* && $config != *..* ]] || refuse CONFIG "$config" "a path from the repository's root"
  git -C "$here/.." cat-file blob "$1:./$config" >/dev/null 2>&1 ||
    refuse CONFIG "$config" "commit $1 holds no such file: commit it, or take one of configs/README.md"
  for word in "${@:3}"; do
    [[ ! $word =~ ^--run(\.dir)?(=|$) ]] || refuse ARGUMENT "$word" "the run directory is RUNS/RUN_ID: set these"
  done
}

tree=dpo_jax/tree # what sync.sh sent last, seen from a worker's home
# JAX asks the TPU who takes part; its own default port is 8482
hosts=(env DPO_JAX_COORDINATOR=auto JAX_COORDINATOR_PORT="$COORDINATOR_PORT")
