"""Eight CPU devices, strict shapes, and where the shared test data lies."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real pairs, a real trained model and reference curves; tests that need it skip where it is not."""
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("DPO_JAX_SHARED", default))
    if not path.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{path} is missing: CI must run with the shared test data")
        pytest.skip(f"{path} is missing: set DPO_JAX_SHARED to the folder of shared test data")
    return path
