#!/usr/bin/env bash
# On all workers: mount NFS, if any; install the tree that sync.sh sent with what it needs; try the bucket; start JAX
# once on all of them.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

no_arguments "$@"
how=retry call all bash $tree/launch/worker-setup.sh setup "$PYTHON" "$NFS" "$MOUNT"
call all "${hosts[@]}" bash $tree/launch/worker-setup.sh check "$url"
