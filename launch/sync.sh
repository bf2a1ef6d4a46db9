#!/usr/bin/env bash
# Send the committed tree to all workers and print its commit. With ALLOW_DIRTY=1 uncommitted changes of files that git
# knows go along, as a commit of their own that no branch holds. COMMIT=... sends that one; SECRETS goes along.
# shellcheck source=lib.sh
. "$(dirname "$0")/lib.sh"

no_arguments "$@"
commit=${COMMIT:-$(commit_to_send)}
archive=${TMPDIR:-/tmp}/dpo_jax-$commit.$$.tar.gz # another sync.sh may send the same commit elsewhere
trap 'rm -f "$archive"' EXIT
cd "$here/.."
run git archive --format=tar.gz --output="$archive" "$commit"
on_slices scp_slice "$archive" dpo_jax.tar.gz
into=dpo_jax/trees/$commit
# What tar says with a 2, such as a full disk, is no wrong command.
how=retry ssh_to all "mkdir -p $into && tar -xzf dpo_jax.tar.gz -C $into && ln -sfn trees/$commit $tree || exit 1"
[[ -z $SECRETS ]] || on_slices scp_slice "$SECRETS" dpo_jax/secrets.env
printf '%s\n' "$commit"
