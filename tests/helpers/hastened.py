"""Clients of a bucket whose patience is a hundredth of what it is, for tests of storage that does not answer."""

import asyncio
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

FACTOR = 100


class Clock:
    """The module ``time``, so many times as fast where a program waits."""

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)

    def monotonic(self) -> float:
        """Seconds that seem to have passed."""
        return time.monotonic() * FACTOR

    def sleep(self, seconds: float) -> None:
        """Wait for what seems so long."""
        time.sleep(seconds / FACTOR)


def hasten(patch: Callable[[Any, str, Any], None] = setattr) -> None:
    """Make waiting short in this process; ``patch`` is ``setattr``, or one that can be undone."""
    from gcsfs import retry
    from orbax.checkpoint._src.serialization import tensorstore_utils

    from dpo_jax import bucket
    from dpo_jax.runs import bucket_lock, checkpoint, session

    for module in (bucket, bucket_lock, checkpoint, session):
        patch(module, "time", Clock())
    patch(bucket_lock, "BEAT_SECONDS", bucket_lock.BEAT_SECONDS / FACTOR)  # which is waited for by an event
    delays = {"initial_delay": f"{1000 // FACTOR}ms", "max_delay": f"{32_000 // FACTOR}ms"}
    for name in ("_BASE_TS_CONTEXT", "_DEFAULT_OCDBT_TS_CONTEXT"):  # from which Orbax makes tensorstore's
        patch(tensorstore_utils, name, {**getattr(tensorstore_utils, name), "gcs_request_retries": delays})
    patch(retry, "asyncio", SimpleNamespace(sleep=lambda seconds: asyncio.sleep(seconds / FACTOR)))


def hastened_command(argv: list[str]) -> int:
    """``dpo-jax`` with these arguments and little patience."""
    from dpo_jax.cli import main

    hasten()
    return main(argv)
