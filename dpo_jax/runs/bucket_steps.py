"""The saved steps of a run in a bucket, as the storage has them.

They are found, set aside and cleaned up without Orbax, whose client takes a request that was not answered for an
object that is not there, and so a good step for a leftover.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from dpo_jax.bucket import PATIENCE, SCHEME, Bucket, fault_of, storage_error

COMMITTED = "commit_success.txt"  # which Orbax writes into a step last


def in_bucket(directory: object) -> bool:
    """Return whether checkpoints lie in a bucket."""
    return str(directory).startswith(SCHEME)


def bucket_of(directory: object) -> Bucket:
    """Return the folder of checkpoints in a bucket."""
    return Bucket(str(directory), PATIENCE)


@contextmanager
def storage_faults(directory: object, what: str) -> Iterator[None]:
    """Context manager that turns a fault of a bucket's storage, from any client, into its one-line error."""
    try:
        yield
    except Exception as error:
        failure = storage_error(f"{directory}: {what}", error) if in_bucket(directory) and fault_of(error) else None
        if failure is None or failure is error:
            raise
        raise failure from error


def step_folders(bucket: Bucket) -> dict[int, bool]:
    """Return the steps that were saved or begun, and whether each is complete."""
    numbers = [name.rstrip("/") for name in bucket.entries()[1]]
    return {int(name): bucket.stat(f"{name}/{COMMITTED}") is not None for name in numbers if name.isdigit()}


def remove_leftovers(bucket: Bucket) -> None:
    """Delete steps whose save did not finish."""
    for step, is_complete in step_folders(bucket).items():
        if not is_complete:
            for name in bucket.walk(f"{step}/"):
                bucket.delete(name)


def move_step(bucket: Bucket, step: int, suffix: str) -> str:
    """Move a step to ``STEP.suffix``, with a number if there is one, and return its new name."""
    folders, target, num_copies = bucket.entries()[1], f"{step}{suffix}", 1
    while f"{target}/" in folders:
        num_copies += 1
        target = f"{step}{suffix}-{num_copies}"
    names = sorted(bucket.walk(f"{step}/"), key=lambda name: name != f"{step}/{COMMITTED}")
    for name in names:
        bucket.copy(name, f"{target}/{name.partition('/')[2]}")
    for name in names:  # first what makes it complete
        bucket.delete(name)
    return target
