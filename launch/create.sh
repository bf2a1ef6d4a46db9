#!/usr/bin/env bash
# Ask for the slice and wait until it is there. `create.sh wait` only waits, for a request made before.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

[[ ${1:-} =~ ^(wait)?$ ]] || refuse ARGUMENT "$1" "wait, or nothing"

case $CAPACITY in
  on-demand) tier= ;;
  *) tier=--$CAPACITY ;;
esac

if [[ ${1:-} != wait ]]; then
  run "${tpus[@]}" queued-resources create "$NAME" --node-id="$NAME" "${where[@]}" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" --async ${tier:+"$tier"} ${CREATE_FLAGS[@]+"${CREATE_FLAGS[@]}"}
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
  sleep "${POLL_SECONDS:-30}"
done
