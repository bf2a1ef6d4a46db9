#!/usr/bin/env bash
# On all workers: mount NFS, install the tree that sync.sh sent with what it needs, and start JAX once on all of them.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

no_arguments "$@"
how=retry call all bash $tree/launch/worker-setup.sh setup "$PYTHON" "$NFS" "$MOUNT"
call all "${hosts[@]}" bash $tree/launch/worker-setup.sh check
