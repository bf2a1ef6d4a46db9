# Sourced by babysit.sh: the state of slices and run, how it is found, and how things are waited for.
# shellcheck shell=bash disable=SC2034,SC2154

to() { # STATE WHY: one line a transition
  [[ $1 == "$before" ]] || printf '%s babysit: %s -> %s: %s\n' "$(date -u +%FT%TZ)" "$before" "$1" "$2"
  before=$1
}

leave() { # CODE STATE WHY
  to "$2" "$3"
  [[ $2 == deleted ]] || printf 'launch: what is there of %s is billed until launch/delete.sh\n' "$NAME" >&2
  exit "$1"
}

limited() { # SECONDS COMMAND...: in the background, so that Ctrl-C is heard at once; 0: without a limit
  timeout "$1" "${@:2}" 9>&- &
  child=$!
  wait "$child"
}

rest() { limited 0 sleep "$1"; } # SECONDS

look() { # sets state, slices, shown (why), step (the newest logged or saved), code (of the trainer, where it is final)
  local line word status=0 words='' verdict='' fate
  slices=unknown step=0 shown='gcloud did not say' code=1
  limited "$ASK_SECONDS" "$here/status.sh" >"$said" || status=$?
  while IFS= read -r line; do
    [[ $known || $line != "$url: "* || $line == *": cannot be read: "* ]] || known=$line
    case $line in
      "queued-resources $NAME: "*) slices=$(slices_are "${line##*: }") shown=$line ;;
      "tpu-vm $NAME"*": "*)
        slices=$(slices_are "${line##*: }") shown=$line
        [[ $REQUEST == direct || $slices != absent ]] || slices=gone # and its request is still there
        ;;
      *": $RUN_ID runs, process "*) words+=" running " ;;
      *": $RUN_ID does not run: "*) words+=" absent " ;;
      *": $RUN_ID ended, exit code "*)
        word=${line##* }
        case $word in
          0 | 42) words+=" $word " ;;
          2 | 43) words+=" final " code=$word ;;
          *) words+=" failed " ;;
        esac
        ;;
      "$url: done at "*) verdict=finished fate=$line ;;
      "$url: ended at "*" with exit code "*)
        word=${line#*with exit code } word=${word%%:*}
        # whoever starts babysit.sh again has seen to what was known then
        [[ $line == "$known" || ! $word =~ ^(2|43)$ ]] || verdict=final code=$word fate=$line
        ;;
      "$url: cannot be read: "*)
        [[ $line == "$unread" ]] || printf '%s\n' "$line" >&2
        unread=$line
        ;;
      *": newest step: logged "*)
        line=${line##*logged }
        for word in "${line%%,*}" "${line##* }"; do ((word <= step)) || step=$word; done
        ;;
    esac
  done <"$said"
  state=$slices
  if [[ $slices == ready ]]; then
    if ((status)); then words=; fi
    state=$(run_is "$words")
    words=${words//  /,} # " running  running " becomes " running,running "
    shown="workers:${words:- do not answer }at step $step"
  fi
  case $state in # workers know better, as long as any of them runs
    running | broken | finished | final) ;;
    *) [[ -z $verdict ]] || state=$verdict shown=$fate ;;
  esac
}

slices_are() { # STATE of a request or a slice, as Google names it
  case $1 in
    ACTIVE* | READY*) echo ready ;;
    NOT_FOUND) echo absent ;;
    FAILED | SUSPENDED | PREEMPTED* | TERMINATED* | STOPPED*) echo gone ;;
    *) echo waiting ;; # in a queue, or between two states
  esac
}

run_is() { # WORDS, one a worker. Whatever one of them has come to, nothing is decided while others still run.
  case $1 in
    *' running '*)
      case $1 in
        *' final '* | *' failed '* | *' absent '*) echo broken ;;
        *) echo running ;; # the others have come to the end, and these are about to
      esac
      ;;
    *' final '*) echo final ;;
    *' absent '*) echo missing ;; # on new machines, or on some that were restarted
    *' failed '*) echo failed ;;
    *' 42 '*) echo saved ;;
    *' 0 '*) echo finished ;;
    *) echo lost ;;
  esac
}
