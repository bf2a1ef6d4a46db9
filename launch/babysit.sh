#!/usr/bin/env bash
# babysit.sh CONFIG [--section.key VALUE ...]: keep a run going until it is done. Makes the slices, starts the run, and
# does both again whenever they are taken away. Every transition is a line on stdout; all else goes to stderr.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"
# shellcheck source=babysit-lib.sh
. "$here/babysit-lib.sh"

arguments=("$@")
COMMIT=${COMMIT:-$(commit_to_send)} # a slice that is recreated gets the same program
export COMMIT YES=1
check_run "$COMMIT" "$@"

if [[ ${DRY_RUN:-} == 1 ]]; then # a life without accidents
  for script in create sync setup; do "$here/$script.sh"; done
  "$here/run.sh" "$@"
  "$here/status.sh"
  [[ ${DELETE_WHEN_DONE:-} != 1 ]] || "$here/delete.sh"
  exit
fi

lock=${XDG_CACHE_HOME:-$HOME/.cache}/dpo_jax/babysit.$PROJECT.$ZONE.$NAME
mkdir -p "${lock%/*}"
exec 9>"$lock"
flock -n 9 || refuse NAME "$NAME" "another babysit.sh of this machine looks after it: end that one first"

state=begin before=begin slices= # state: see babysit-lib.sh; before: the last that was told
known='' unread=''               # of a bucket: what it said first; why it could not be read
requests=0                       # in a row that came to nothing
starts=0 newest=0                # of the run since the newest step, and that step
last=0 moved=0 heard=0           # the last step seen; seconds when it changed, and when ssh last answered
said=$(mktemp)
trap 'rm -f "$said"' EXIT
child=
trap '[[ -z $child ]] || kill "$child"; leave 130 interrupted "slices and run stay as they are"' INT TERM

request() {
  local delay code=0
  ((requests < MAX_REQUESTS)) || leave 1 "given up" "$requests requests came to nothing"
  if ((requests)); then
    delay=$((BACKOFF_SECONDS * 2 ** (requests < 20 ? requests - 1 : 19)))
    ((delay <= BACKOFF_CAP)) || delay=$BACKOFF_CAP
    to "backing off" "$requests requests came to nothing, the next in $delay s"
    rest "$delay"
  fi
  requests=$((requests + 1))
  to requested "create.sh, request $requests"
  limited 0 "$here/create.sh" >&2 || code=$?
  ((code != 2)) || leave 2 stopped "create.sh cannot do that: see above"
  ((code == 0)) || to refused "create.sh ended with $code: see above"
}

remove() { # WHY
  local code=0
  to deleting "$1"
  limited "$START_SECONDS" "$here/delete.sh" >&2 || code=$?
  ((code == 0)) || to undeleted "delete.sh ended with $code: see above"
  return "$code"
}

halt() { # stop on all workers, whatever each is doing; who cannot be stopped goes with its slice
  to halting "$1"
  limited "$START_SECONDS" "$here/stop.sh" kill >&2 || remove "stop.sh kill ended with $?"
}

start() { # SCRIPT...: that lead to a run
  local script words code=0
  ((starts <= MAX_RESTARTS)) || leave 1 "given up" "$starts starts without a new step after step $newest"
  starts=$((starts + 1)) moved=$SECONDS
  for script in "$@"; do
    to "$script" "start $starts since step $newest"
    words=()
    [[ $script != run ]] || words=("${arguments[@]}")
    limited "$START_SECONDS" "$here/$script.sh" "${words[@]}" >&2 || code=$?
    ((code != 2)) || { look && [[ $state == final ]]; } || leave 2 stopped "$script.sh refused: see above"
    ((code == 0)) || { to unstarted "$script.sh ended with $code: see above" && rest "$POLL_SECONDS" && return; }
  done
}

done_with() { # the run is done
  [[ $slices != absent ]] || leave 0 deleted "the run is done, at step $newest"
  [[ ${DELETE_WHEN_DONE:-} == 1 ]] || leave 0 kept "the run is done, at step $newest"
  remove "the run is done" || leave 1 undeleted "the run is done"
  leave 0 deleted "the run is done, at step $newest"
}

while :; do
  look
  to "$state" "$shown"
  ((step == last)) || last=$step moved=$SECONDS
  ((step <= newest)) || { newest=$step && starts=$((starts > 0)); }
  [[ $state == lost ]] || heard=$SECONDS
  [[ $state =~ ^(absent|gone|waiting|unknown)$ ]] || requests=0
  next=$state
  [[ $state != running ]] || ((SECONDS - moved < STALL_SECONDS)) || next=stalled
  [[ $state != lost ]] || ((SECONDS - heard < LOST_SECONDS)) || next=gone
  case $next in
    absent) request ;;
    gone) remove "$shown" || rest "$POLL_SECONDS" ;;
    broken | stalled) halt "$next: $shown" || rest "$POLL_SECONDS" ;;
    missing) start sync setup run ;;
    failed | saved) start run ;;
    finished) done_with ;;
    final)
      LINES=20 limited "$ASK_SECONDS" "$here/logs.sh" 0 >&2 || true
      leave "$code" stopped "the trainer's exit code is $code, which a restart will not cure"
      ;;
    *) # running, waiting, lost, or gcloud does not answer; a run that was found is asked whether it is the one meant
      if [[ $next == running ]] && ((starts == 0)); then start run; else rest "$POLL_SECONDS"; fi
      ;;
  esac
done
