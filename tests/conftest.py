"""Eight CPU devices, strict shapes, where the shared test data lies, and a cloud to launch into."""

import os
import shutil
import signal
import sys
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()
# What tests wait for is compilation: half of it would optimize programs that run for milliseconds.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# With its older code generator, XLA compiles most programs twice as fast; JAX 0.11 and later have the newer one alone.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0" and version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Each program is compiled once for all tests, their processes, and later calls.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "compiled"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# Of processes that tests start: an entry that another one is still writing is compiled instead.
os.environ["PYTHONWARNINGS"] = "ignore:Error reading persistent compilation cache entry:UserWarning"

import fake_cloud
import pytest
from fake_bucket import FakeBucket
from hastened import hasten


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder of real pairs, a real trained model and reference curves; tests that need it skip where it is not.

    It is no part of the repository. Where CI has no access to it, as in a fork, DPO_JAX_SHARED=none says so.
    """
    default = Path(__file__).parents[2] / "shared" / "data"
    path = Path(os.environ.get("DPO_JAX_SHARED", default))
    if str(path) == "none":
        pytest.skip("DPO_JAX_SHARED=none: the shared test data is not available here")
    if not path.is_dir():
        if os.environ.get("CI") == "true":
            pytest.fail(f"{path} is missing: CI must run with the shared test data")
        pytest.skip(f"{path} is missing: set DPO_JAX_SHARED to the folder of shared test data")
    return path


def compared_with(package: str):
    """A package that parity tests compare with, which the extra ``test`` installs on Python 3.11 only."""
    if find_spec(package) is None:
        if os.environ.get("CI") == "true" and sys.version_info < (3, 12):
            pytest.fail(f"{package} is missing: CI must run with the extra test")
        pytest.skip(f"{package} is missing: the extra test has it on Python 3.11 only")
    return import_module(package)


@pytest.fixture(scope="session")
def torch():
    """PyTorch; its tests skip where it is not."""
    return compared_with("torch")


@pytest.fixture(scope="session")
def peft():
    """PEFT, which needs PyTorch; its tests skip where it is not."""
    return compared_with("peft")


@pytest.fixture(scope="session")
def tpus():
    """Devices of TPU slices that programs can be compiled for, but not run on: ``tpus("v5e:4x4", slices=2)``."""
    if find_spec("libtpu") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("libtpu is missing: CI must run with the extra test, on Linux x86-64")
        pytest.skip("libtpu is missing: pip install '.[test]', on Linux x86-64")
    from dpo_jax.parallel.chips import parse_topology
    from dpo_jax.plan.ahead_of_time import slice_devices

    return lambda text, slices=1: slice_devices(parse_topology(text), slices)


@pytest.fixture(scope="session")
def fake_storage():
    """A storage with the bucket ``bucket``, to which all clients of this process talk: they ask once where it is."""
    if find_spec("gcsfs") is None:
        pytest.fail("gcsfs is missing: pip install '.[test]'")
    with FakeBucket("bucket") as storage, pytest.MonkeyPatch.context() as patch:
        for name, value in storage.env.items():
            patch.setenv(name, value)
        yield storage


@pytest.fixture
def storage(fake_storage, monkeypatch):
    """That storage, empty and without faults, and clients of it with little patience."""
    fake_storage.objects.clear()
    fake_storage.requests.clear()
    hasten(monkeypatch.setattr)
    yield fake_storage
    fake_storage.faults.clear()
    fake_storage.clock_offset = 0.0


@pytest.fixture
def optimized():
    """Programs of a test that run for longer than they compile are optimized as a run's are."""
    import jax

    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] != "0")


@pytest.fixture
def for_tpus(tpus):
    """As ``tpus``, where a test compiles for them itself."""
    from dpo_jax.parallel.compiler import no_cache_writes

    with no_cache_writes():
        yield tpus


@pytest.fixture
def default_handlers():
    """Signals as in a process of its own: a shell's background jobs ignore SIGINT."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of local copies of what is in a bucket."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def empty_cloud(tmp_path_factory) -> Path:
    """A cloud as it is at the start, to be copied."""
    return fake_cloud.build(tmp_path_factory.mktemp("cloud")).root


@pytest.fixture
def cloud(empty_cloud, tmp_path):
    """A cloud without slices, whose settings keep runs in its bucket."""
    shutil.copytree(empty_cloud, tmp_path, dirs_exist_ok=True)
    with fake_cloud.Cloud(tmp_path) as cloud:
        yield cloud
