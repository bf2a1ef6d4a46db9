#!/usr/bin/env bash
# Delete the slices, with the disks of their workers, and list what is left in the zone. YES=1: without asking.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

no_arguments "$@"
if [[ ${YES:-} != 1 && ${DRY_RUN:-} != 1 ]]; then
  printf 'This deletes %s in %s and its disks. A run there loses what it did since its last save.\n' "$NAME" "$ZONE" >&2
  ! in_bucket || report_run >&2
  read -r -p "Type $NAME to delete it: " answer || true
  [[ ${answer:-} == "$NAME" ]] || refuse NAME "${answer:-}" "nothing was deleted: type $NAME, or set YES=1"
fi
if [[ $REQUEST == direct ]]; then
  retry "${tpus[@]}" tpu-vm delete "$NAME" "${where[@]}" --quiet
else
  retry "${tpus[@]}" queued-resources delete "$NAME" "${where[@]}" --force --quiet
fi
printf 'Still there in %s, and billed where it is up:\n' "$ZONE"
run "${tpus[@]}" queued-resources list "${where[@]}"
run "${tpus[@]}" tpu-vm list "${where[@]}"
! in_bucket || printf '%s, billed by size until you delete it: gcloud storage rm --recursive %s\n' "$url" "$url"
