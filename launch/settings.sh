# Sourced by lib.sh: reads the settings and refuses what is wrong, in one line.
# shellcheck shell=bash

settings=${LAUNCH_ENV:-$here/env.sh}

refuse() { # NAME VALUE REMEDY
  printf 'launch: %s: %q cannot be used: %s\n' "$1" "$2" "$3" >&2
  exit 2
}

need() { # NAME PATTERN REMEDY
  [[ ${!1:-} =~ ^($2)$ ]] || refuse "$1" "${!1:-}" "$3"
}

no_arguments() {
  (($# == 0)) || refuse ARGUMENT "$1" "this script takes none"
}

[[ -f $settings ]] || refuse LAUNCH_ENV "$settings" "no such file: copy launch/env.example and fill it in"
# shellcheck source=env.example
. "$settings"

: "${NFS:=}" "${MOUNT:=/mnt/dpo}" "${SECRETS:=}" "${SLICES:=1}" "${REQUEST:=queued}"

# Seconds and counts that are rarely changed; set them in env.sh or in front of a command.
: "${POLL_SECONDS:=30}"    # between two looks at a request or a run
: "${RETRY_SECONDS:=5}"    # before a command that failed is tried again; doubles
: "${HALT_SECONDS:=120}"   # that stop.sh kill waits before it kills
: "${ASK_SECONDS:=300}"    # babysit.sh: for an answer of status.sh
: "${START_SECONDS:=3600}" # babysit.sh: for each of sync.sh, setup.sh, run.sh, delete.sh
: "${LOST_SECONDS:=1800}"  # babysit.sh: without ssh to a slice that is there, until it is recreated
: "${STALL_SECONDS:=3600}" # babysit.sh: without a new step, until the run is started again; above compiling + log_every
: "${MAX_RESTARTS:=5}"     # babysit.sh: without a new step, until it gives up
: "${BACKOFF_SECONDS:=60}" # babysit.sh: after a request that came to nothing; doubles
: "${BACKOFF_CAP:=1800}"   # babysit.sh: up to this many seconds
: "${MAX_REQUESTS:=50}"    # babysit.sh: that come to nothing, until it gives up

for flag in DRY_RUN YES ALLOW_DIRTY FOLLOW DELETE_WHEN_DONE RUNS_SHARED; do
  need "$flag" '[01]?' "1 for yes, 0 or nothing for no"
done
need PROJECT '[a-z][-a-z0-9.:]*' "the id of your Google Cloud project"
[[ $PROJECT != my-project ]] || refuse PROJECT "$PROJECT" "this is the example's: the id of your Google Cloud project"
need ZONE '[a-z]+-[a-z]+[0-9]+-[a-z]' "a zone such as us-west4-a"
need NAME '[a-z]([-a-z0-9]{0,60}[a-z0-9])?' "lower-case letters, digits and dashes, at most 62"
[[ ! ${TYPE:-} =~ ^(tpu|v)?([7-9]|[1-9][0-9])[a-z]*- ]] || refuse TYPE "$TYPE" \
  "the TPU API, which these scripts use, ends at v6e: launch/gke/README.md, or a managed instance group"
need TYPE '(v4|v5litepod|v5p|v6e)-[1-9][0-9]{0,4}' "v4-N, v5litepod-N, v5p-N or v6e-N"
[[ $TYPE =~ ^(v4|v5p)- || " 1 4 8 16 32 64 128 256 " == *" ${TYPE#*-} "* ]] ||
  refuse TYPE "$TYPE" "there are slices of 1, 4, 8, 16, 32, 64, 128 and 256 chips"
need RUNTIME '[a-z0-9][-a-z0-9.]*' "the image that belongs to TYPE, see launch/env.example"
declare -A images=([v4]=tpu-ubuntu2204-base [v5litepod]=v2-alpha-tpuv5-lite [v5p]=v2-alpha-tpuv5 [v6e]=v2-alpha-tpuv6e)
[[ $RUNTIME == "${images[${TYPE%-*}]}" || " ${images[*]} " != *" $RUNTIME "* ]] ||
  refuse RUNTIME "$RUNTIME" "it is another TPU's image: $TYPE needs ${images[${TYPE%-*}]}"
need CAPACITY 'spot|reserved|on-demand' "spot, reserved or on-demand"
need REQUEST 'queued|direct' "queued or direct"
[[ $REQUEST == queued || " ${CREATE_FLAGS[*]:-} " != *" --valid-"* ]] ||
  refuse CREATE_FLAGS "${CREATE_FLAGS[*]}" "with REQUEST=direct nothing waits in a queue: leave out --valid-..."
need SLICES '[1-9][0-9]{0,2}' "the number of slices"
[[ $SLICES == 1 || $REQUEST == queued ]] || refuse REQUEST "$REQUEST" "several slices come from a queued request only"
in_bucket() { [[ $RUNS == gs://* ]]; }
[[ ${RUNS:-} != gs://my-bucket* ]] || refuse RUNS "$RUNS" "this is the example's: a folder of your own bucket"
need RUNS 'gs://[a-z0-9][-a-z0-9._]+[a-z0-9](/[-A-Za-z0-9_.=]+)*|/[^[:space:]]*' \
  "gs://BUCKET/FOLDER, or an absolute path that every worker sees"
[[ $RUNS != */../* && $RUNS != */.. ]] || refuse RUNS "$RUNS" "a path without .."
need NFS '([^:[:space:]]+:/[^[:space:]]*)?' "host:/share, or nothing"
! in_bucket || [[ ${RUNS_SHARED:-} != 1 ]] || refuse RUNS_SHARED 1 "a bucket needs no share: leave it empty"
in_bucket || [[ -n $NFS || ${RUNS_SHARED:-} == 1 ]] || ((SLICES == 1 && ${TYPE#*-} <= 8)) || # 8: one host
  refuse NFS "" "RUNS is in no bucket: several hosts need host:/share, or RUNS_SHARED=1 if they share it otherwise"
in_bucket || [[ -n $NFS || ${RUNS_SHARED:-} == 1 || ${DELETE_WHEN_DONE:-} != 1 ]] || refuse DELETE_WHEN_DONE 1 \
  "RUNS is on the slice's own disk, and the result with it; name a bucket, or a share by NFS, or say RUNS_SHARED=1"
need MOUNT '/[^[:space:]]*[^/[:space:]]' "an absolute path without spaces, and without / at its end"
in_bucket || [[ -z $NFS || $RUNS/ == "$MOUNT"/* ]] ||
  refuse RUNS "$RUNS" "with NFS it lies under MOUNT, $MOUNT, or in a bucket"
need RUN_ID '[A-Za-z0-9][-A-Za-z0-9_.]*' "letters, digits, dashes, dots and underscores"
need COMMAND 'train|sft|reward|ppo' "train, sft, reward or ppo"
need PYTHON '3\.(1[1-9]|[2-9][0-9])' "3.11 or newer"
need COORDINATOR_PORT '[1-9][0-9]{0,4}' "the number of a port"
((COORDINATOR_PORT < 65536)) || refuse COORDINATOR_PORT "$COORDINATOR_PORT" "ports end at 65535"
[[ -z $SECRETS || -f $SECRETS ]] || refuse SECRETS "$SECRETS" "no such file: name one of lines NAME=value, or nothing"
[[ -z $SECRETS ]] ||
  ! line=$(LC_ALL=C grep -anvE -m 1 '^((export )?[A-Za-z_][A-Za-z0-9_]*=.*|#.*|[[:space:]]*)$' "$SECRETS") ||
  refuse SECRETS "$SECRETS" "line ${line%%:*} is not NAME=value"
need POLL_SECONDS '[0-9]+(\.[0-9]+)?' "a number of seconds"
for count in STOP_SECONDS HALT_SECONDS ASK_SECONDS START_SECONDS; do
  need "$count" '[1-9][0-9]{0,8}' "a number of seconds"
done
for count in RETRY_SECONDS LOST_SECONDS STALL_SECONDS BACKOFF_SECONDS BACKOFF_CAP; do
  need "$count" '0|[1-9][0-9]{0,8}' "a number of seconds"
done
for count in MAX_RESTARTS MAX_REQUESTS; do
  need "$count" '0|[1-9][0-9]{0,8}' "a number"
done
