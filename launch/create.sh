#!/usr/bin/env bash
# Ask for the slices and wait until they are there. `create.sh wait` only waits, for a request made before.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

[[ ${1:-} =~ ^(wait)?$ ]] || refuse ARGUMENT "$1" "wait, or nothing"

flags=(--accelerator-type="$TYPE")
[[ $CAPACITY == on-demand ]] || flags+=("--$CAPACITY")
for flag in ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"}; do [[ -z $flag ]] || flags+=("$flag"); done

[[ ${1:-} == wait ]] || ! in_bucket || check_bucket
if [[ $REQUEST == direct ]]; then # answered at once: the slice, or that there is none
  [[ ${1:-} != wait ]] || refuse REQUEST direct "nothing waits in a queue: create.sh"
  run "${tpus[@]}" tpu-vm create "$NAME" "${where[@]}" --version="$RUNTIME" "${flags[@]}"
  exit
fi

if [[ ${1:-} != wait ]]; then
  named=(--node-id="$NAME")
  ((SLICES == 1)) || named=(--node-count="$SLICES" --node-prefix="$NAME")
  run "${tpus[@]}" queued-resources create "$NAME" "${named[@]}" "${where[@]}" --runtime-version="$RUNTIME" --async \
    "${flags[@]}"
fi

before=
while :; do
  state=$(retry "${tpus[@]}" queued-resources describe "$NAME" "${where[@]}" --format='value(state.state)')
  [[ $state == "$before" ]] || printf '%s\n' "$state"
  [[ ${DRY_RUN:-} != 1 ]] || exit 0
  case $state in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDING | SUSPENDED | DELETING)
      printf 'launch: NAME: %s is %s: launch/delete.sh, then launch/create.sh again\n' "$NAME" "$state" >&2
      exit 1
      ;;
  esac
  before=$state
  sleep "$POLL_SECONDS"
done
