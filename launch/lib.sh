# Sourced by the other scripts: how commands are run, here and on the workers.
# shellcheck shell=bash disable=SC2034
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
. "$here/settings.sh"

tpus=(gcloud compute tpus)
where=(--project="$PROJECT" --zone="$ZONE")

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
  local attempt code delay=${RETRY_SECONDS:-5}
  for attempt in 1 2 3 4 5; do
    code=0
    run "$@" || code=$?
    ((code != 0 && code != 2 && attempt < 5)) || return "$code"
    printf 'launch: exit code %s, again in %s s: %s\n' "$code" "$delay" "${*:1:5}" >&2
    sleep "$delay"
    delay=$((delay * 2))
  done
}

ssh_to() { # WORKERS LINE: a line for the workers' shell; how=retry to repeat it
  "${how:-run}" "${tpus[@]}" tpu-vm ssh "$NAME" "${where[@]}" --worker="$1" --command="$2" -- -o ServerAliveInterval=30
}

call() { # WORKERS WORD...: the words reach the workers as they are here
  local workers=$1 line
  shift
  printf -v line '%q ' "$@"
  ssh_to "$workers" "${line% }"
}

tree=dpo_jax/tree # what sync.sh sent last, seen from a worker's home
# JAX asks the TPU who takes part; its own default port is 8482
hosts=(env DPO_JAX_COORDINATOR=auto JAX_COORDINATOR_PORT="$COORDINATOR_PORT")
