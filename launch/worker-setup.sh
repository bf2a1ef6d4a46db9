#!/usr/bin/env bash
# A worker's half of setup.sh: the other scripts call it on every worker, in the tree that sync.sh sent.
# shellcheck source=worker-lib.sh
. "$(dirname "$0")/worker-lib.sh"

setup() { # PYTHON NFS MOUNT
  idle
  set -E
  trap 'exit 1' ERR # uv says 2 when it cannot reach the index; to the other scripts a 2 is final
  if [[ -n $2 ]] && ! mountpoint -q "$3"; then
    sudo apt-get -o DPkg::Lock::Timeout=300 install -qq -y nfs-common # the image updates itself when it starts
    sudo mkdir -p "$3"
    sudo mount -t nfs "$2" "$3"
    sudo chown "$USER" "$3"
  fi
  python3 -m pip install --quiet --user uv # the images bring Python 3.10, too old for JAX; uv fetches a newer one
  python3 -m uv venv --quiet --clear --python "$1" "$base/venv"
  python3 -m uv pip install --quiet --python "$base/venv/bin/python" "dpo_jax[tpu] @ file://$(readlink -f "$base/tree")"
  readlink "$base/tree" >"$base/installed"
}

check() { # RUN: whether each worker may do in a bucket what a run does there; then JAX, all workers together
  [[ $1 != gs://* ]] || try_bucket "$1"
  timeout 900 "$base/venv/bin/python" -c 'import jax; from dpo_jax.parallel.rendezvous import start_hosts; start_hosts()
print(f"process {jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} of {jax.device_count()} "
      f"devices, {jax.devices()[0].device_kind}")'
}

try_bucket() { # URL: in one line what is missing; a 2 says that asking again will not help
  "$base/venv/bin/python" -c 'import sys; from dpo_jax.bucket import Bucket, probe
from dpo_jax.errors import StorageUnreachable, UserError
try:
    probe(Bucket.named("RUNS", sys.argv[1]))
except UserError as error:
    print(sys.argv[2], error, sep=": ", file=sys.stderr)
    sys.exit(1 if isinstance(error, StorageUnreachable) else 2)' "$1" "$(hostname)"
}

"$@"
