"""Eight CPU devices, strict shapes, where the shared test data lies, and a cloud to launch into."""

import os
import shutil
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

import fake_cloud
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


@pytest.fixture(scope="session")
def tpus():
    """Devices of TPU slices that programs can be compiled for, but not run on: ``tpus("v5e:4x4", num_slices=2)``."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu")
    from jax.experimental import topologies

    from dpo_jax.chips import parse_topology

    os.environ |= {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

    def devices(text: str, num_slices: int = 1):
        slices = {"num_slices": num_slices} if num_slices > 1 else {}
        topology = parse_topology(text)
        return topologies.get_topology_desc(topology.name, platform="tpu", **topology.options, **slices).devices

    return devices


@pytest.fixture
def for_tpus(tpus):
    """As ``tpus``, where a test compiles for them itself."""
    from dpo_jax.compiler import not_kept

    with not_kept():
        yield tpus


@pytest.fixture(scope="session")
def empty_cloud(tmp_path_factory) -> Path:
    """A cloud as it is at the start, to be copied."""
    return fake_cloud.build(tmp_path_factory.mktemp("cloud")).root


@pytest.fixture
def cloud(empty_cloud, tmp_path):
    """A cloud without slices, whose settings keep runs on this machine."""
    shutil.copytree(empty_cloud, tmp_path, dirs_exist_ok=True)
    cloud = fake_cloud.Cloud(tmp_path)
    yield cloud
    cloud.clean()
