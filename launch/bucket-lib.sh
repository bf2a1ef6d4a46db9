# Sourced by lib.sh: what a bucket is like, and what the run in it has come to. Nothing here writes to a bucket.
# shellcheck shell=bash disable=SC2154

url=$RUNS/$RUN_ID
[[ ! $url =~ ^gs://[^/]+ ]] || bucket=${BASH_REMATCH[0]}
roles='roles/storage.objectUser and roles/storage.legacyBucketReader'

stored() { # VERB WORD...: what gcloud storage says of what is there; a failure if it could not look
  local said code=0
  said=$(gcloud storage "$@" 2>&1) || [[ $said == *'matched no objects'* ]] || code=1
  printf '%s\n' "$said"
  return "$code"
}

remedy() { # WHAT GCLOUD SAID: its error in one line, with what to do about it; a failure if asking again may help
  local line=${1##*ERROR: } code=0
  line=${line%%$'\n'*} line=${line#(gcloud.*) }
  case $1 in
    *' 403'* | *'does not have'*) line="${line%.}: grant your account $roles on the bucket" ;;
    *'not found: 404'*) line="${line%.}: gcloud storage buckets create $bucket --location=${ZONE%-*}" ;;
    *'requester pays'*) line="${line%.}: use a bucket without requester pays" ;;
    *'auth login'*) line="${line%.}: gcloud auth login" ;;
    *) code=1 ;;
  esac
  printf '%s\n' "$line"
  return "$code"
}

unread() { # WHAT GCLOUD SAID: end, as the bucket cannot be read
  local why
  ! why=$(remedy "$1") || refuse RUNS "$RUNS" "$why"
  printf 'launch: RUNS: %s cannot be read: %s\n' "$RUNS" "$why" >&2
  exit 1
}

check_bucket() { # refuse one that no run can use, before a slice is paid for, and warn of what costs or deletes
  local said location payer versions seconds rules
  local fields=location,requester_pays,versioning_enabled
  fields+=',soft_delete_policy.retentionDurationSeconds,lifecycle_config.rule.len()'
  set -- gcloud storage buckets describe "$bucket" --format="csv[no-heading]($fields)"
  [[ ${DRY_RUN:-} != 1 ]] || { run "$@" && return; }
  said=$("$@" 2>&1) || unread "$said"
  # among what else gcloud has to say, such as that there is a newer one
  IFS=, read -r location payer versions seconds rules < <(grep -E '^[A-Z0-9-]+(,[A-Za-z0-9]*){4}$' <<<"$said") ||
    unread "$said"
  [[ $payer != True ]] || refuse RUNS "$RUNS" "use a bucket without requester pays"
  warn() { printf 'launch: RUNS: %s %s\n' "$bucket" "$1" >&2; }
  [[ ${location,,} == "${ZONE%-*}" ]] || warn "is in $location, not in ${ZONE%-*}: saves cross regions, at a price"
  local update="gcloud storage buckets update $bucket"
  [[ $versions != True ]] || warn "keeps and bills deleted checkpoints: $update --no-versioning"
  ((${seconds:-0} == 0)) ||
    warn "bills deleted checkpoints for $((seconds / 86400)) days: $update --clear-soft-delete"
  ((${rules:-0} == 0)) || warn "has lifecycle rules: none may delete what is below $RUNS, however old it is"
}

report_run() { # a line each: who has it, or how it ended; its newest steps. Not to be able to read is no failure.
  local said line event='' holder='' logged=0 saved=0
  local files=("$url/events.jsonl" "$url/metrics.jsonl" "$url/run.lock")
  local committed="$url/checkpoints/*/commit_success.txt"
  if [[ ${DRY_RUN:-} == 1 ]]; then
    run gcloud storage cat --range=-20000 "${files[@]}"
    run gcloud storage ls "$committed"
    return
  fi
  if ! said=$(stored cat --range=-20000 "${files[@]}" && stored ls "$committed"); then
    printf '%s: cannot be read: %s\n' "$url" "$(remedy "$said" || true)"
    return
  fi
  while IFS= read -r line; do # the first of a file may have lost its beginning
    case $line in
      '{"event": '*) event=$line ;;
      *'"step": '*) line=${line#*'"step": '} logged=${line%%[!0-9]*} ;;
      'process '*) holder=$line ;;
      */commit_success.txt)
        line=${line%/*} line=${line##*/}
        [[ ! $line =~ ^[0-9]+$ ]] || ((line <= saved)) || saved=$line
        ;;
    esac
  done <<<"$said"
  ended "$event" "$holder"
  [[ -z $event ]] || printf '%s: newest step: logged %s, saved %s\n' "$url" "$logged" "$saved"
}

ended() { # LAST_EVENT HOLDER: a line on how the run ended, if it did
  [[ $1 =~ '"time": '([0-9]+) ]] || true
  local at=${BASH_REMATCH[1]:-0} code=${1#*'"exit_code": '} text=${1#*'"text": "'}
  at=$(date -u -d "@$at" +%FT%TZ)
  case ${2:+held}$1 in
    held*) printf '%s: in use by %s, or it was killed there\n' "$url" "$2" ;;
    '') printf '%s: no run was saved there so far\n' "$url" ;;
    *'"event": "end"'*) printf '%s: done at %s\n' "$url" "$at" ;;
    *'"event": "preempt"'*) printf '%s: stopped and saved at %s\n' "$url" "$at" ;;
    *'"event": "error"'*)
      printf '%s: ended at %s with exit code %s: %s\n' "$url" "$at" "${code%%[!0-9]*}" "${text%'"}'}"
      ;;
  esac
}

show_run() { # LINES: the end of its events and of its metrics
  local name said
  for name in events metrics; do
    said=$(stored cat --range=-$(($1 * 4096)) "$url/$name.jsonl") || unread "$said"
    printf '==> %s <==\n' "$url/$name.jsonl"
    tail -n "$1" <<<"$said"
  done
}
