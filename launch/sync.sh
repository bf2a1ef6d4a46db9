#!/usr/bin/env bash
# Send the committed tree to all workers and print its commit. With ALLOW_DIRTY=1 uncommitted changes of files that git
# knows go along, as a commit of their own that no branch holds.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

no_arguments "$@"
cd "$here/.."
commit=$(git rev-parse HEAD)
changes=$(git status --porcelain --untracked-files=no)
if [[ -n $changes ]]; then
  [[ ${ALLOW_DIRTY:-} == 1 ]] || refuse ALLOW_DIRTY "${ALLOW_DIRTY:-}" \
    "there are uncommitted changes: commit them, or set ALLOW_DIRTY=1 to send them too"
  commit=$(git stash create)
fi

archive=${TMPDIR:-/tmp}/dpo_jax-$commit.tar.gz
trap 'rm -f "$archive"' EXIT
run git archive --format=tar.gz --output="$archive" "$commit"
retry "${tpus[@]}" tpu-vm scp "$archive" "$NAME:dpo_jax.tar.gz" "${where[@]}" --worker=all
into=dpo_jax/trees/$commit
how=retry ssh_to all "mkdir -p $into && tar -xzf dpo_jax.tar.gz -C $into && ln -sfn trees/$commit $tree"
printf '%s\n' "$commit"
