"""Checks that use the devices, in a process of their own: one that crashes or hangs there ends no other check.

The process sends its findings in the order of ``CHECKS``. Nothing here imports jax before a check runs.
"""

import math
import multiprocessing
import os
import secrets
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dpo_jax.bucket import PROBE, is_remote
from dpo_jax.commands.doctor.findings import Finding, fail, ok, run_check, size_text, warn
from dpo_jax.commands.doctor.machine import clock, closest_folder
from dpo_jax.commands.doctor.rates import all_gather, matrix_product, save
from dpo_jax.errors import reason

START_SECONDS = 60  # for the processes of a slice to connect, unless DPO_JAX_START_TIMEOUT is set
PATIENCE = 180.0  # seconds to wait for a check
EXPECTED_LOSS = math.log(2)  # of DPO at margin 0


def import_jax() -> Finding | None:
    """Import jax, which fails with errors of many types if its packages do not fit each other."""
    try:
        import jax  # noqa: F401
    except Exception as error:  # noqa: BLE001
        return fail(f"jax cannot be imported ({reason(error)})", "pip install --force-reinstall jax jaxlib")
    return None


def processes() -> Finding | None:
    """Connect the processes that the environment names, as a run does."""
    from dpo_jax.parallel.hosts import connected_process
    from dpo_jax.parallel.rendezvous import START_TIMEOUT, start_hosts

    start_hosts(timeout=None if os.environ.get(START_TIMEOUT) else START_SECONDS)
    connected = connected_process()
    if connected is None:
        return None
    process, count = connected
    return ok(f"process {process} of {count} connected", processes=count)


def devices() -> Finding:
    """Find the devices, and accelerators that JAX does not use."""
    import jax

    from dpo_jax.parallel.chips import attached_accelerator

    platforms = os.environ.get("JAX_PLATFORMS")
    try:
        all_devices = jax.devices()
    except (RuntimeError, AssertionError) as error:
        cause = f"JAX finds no device ({reason(error)})"
        if platforms:
            remedy = f"unset it, or where one is, {_install_command(platforms)}"
            return fail(f"JAX_PLATFORMS is {platforms}, but {cause}", remedy)
        return fail(cause, "end other programs that use the device, or set JAX_PLATFORMS=cpu")
    first = all_devices[0]
    facts = {
        "platform": first.platform,
        "kind": first.device_kind,
        "devices": len(all_devices),
        "local_devices": jax.local_device_count(),
        "memory": _memory(jax.local_devices()[0]),
    }
    unused = attached_accelerator() if first.platform == "cpu" else None
    if unused and "cpu" in (platforms or ""):
        return warn(f"a {unused} is attached, but JAX_PLATFORMS is {platforms}", "unset it to use the device", **facts)
    if unused:
        return fail(f"a {unused} is attached, but JAX uses the CPU", _install_command(unused), **facts)
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        text = f"this is one of {jax.process_count()} hosts of a slice, which must start together"
        return fail(text, "run the same command on all of them, with DPO_JAX_COORDINATOR=auto", **facts)
    hosts = f" on {jax.process_count()} hosts" if jax.process_count() > 1 else ""
    memory = f", {size_text(facts['memory'])} each" if facts["memory"] else ""
    return ok(f"{len(all_devices)} x {first.device_kind} ({first.platform}){hosts}{memory}", **facts)


def _install_command(platforms: str) -> str:
    extra = "tpu" if "tpu" in platforms.lower() else "cuda"
    return f"pip install 'dpo_jax[{extra}]'"


def _memory(device: Any) -> int | None:
    """Return the bytes that a device offers to programs, or None if it does not tell."""
    import jax

    try:
        return (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        return None


def clocks() -> Finding | None:
    """Compare the clocks of all hosts."""
    import jax

    from dpo_jax.parallel import hosts

    if jax.process_count() == 1:
        return None
    hosts.barrier("clocks")
    return compare_clocks(hosts.gather(time.time(), "clocks"))


def compare_clocks(times: list[float]) -> Finding:
    """Compare the times that the processes read at the same moment, in process order."""
    middle = statistics.median_low(times)
    worst = max(range(len(times)), key=lambda process: abs(times[process] - middle))
    return clock(times[worst] - middle, f"the clock of process {worst}", "that of the others")


def step() -> Finding:
    """Compile and run one step of DPO on a tiny model, whose loss is known."""
    import jax
    import jax.numpy as jnp
    import optax

    from dpo_jax.batch import pad_pairs
    from dpo_jax.config import LossConfig
    from dpo_jax.logprobs import make_padded_logps_fn
    from dpo_jax.step import init_state, make_train_step

    start, optimizer = time.perf_counter(), optax.sgd(1e-3)
    with jax.default_device(jax.local_devices()[0]):
        params = {"embed": jnp.full((64, 32), 0.1), "unembed": jnp.linspace(0, 1, 32 * 64).reshape(32, 64)}
        reference = jax.tree.map(jnp.copy, params)
        logps_fn = make_padded_logps_fn(lambda params, tokens: params["embed"][tokens] @ params["unembed"])
        train = make_train_step(logps_fn=logps_fn, loss=LossConfig(), optimizer=optimizer)
        _, metrics = train(init_state(params, optimizer), reference, pad_pairs([[1, 2]], [[3, 4]], [[5]]))
        loss = float(metrics["loss"])
    seconds = time.perf_counter() - start
    if not abs(loss - EXPECTED_LOSS) < 1e-5:
        return fail(f"a step has loss {loss:.7f}, expected {EXPECTED_LOSS:.7f}", "replace the device")
    return ok(f"compiled and run in {seconds:.1f} s", seconds=seconds, loss=loss)


Checks = dict[str, Callable[..., Finding | None]]
BEFORE_CONFIG: Checks = {"jax": import_jax, "processes": processes, "devices": devices, "clocks": clocks}
AFTER_CONFIG: Checks = {"step": step, "matrix product": matrix_product, "all-gather": all_gather, "save": save}
CHECKS = BEFORE_CONFIG | AFTER_CONFIG
NEEDED = ("jax", "processes", "devices")  # by all later checks
HANG_REMEDY = "end other programs that use the devices; on a slice of several hosts, run the same command on each"


def _serve(sender: Connection, log: str, folder: str | None, probe: str) -> None:
    """Run the checks in a new process, whose output goes to the file ``log``, and end it."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(descriptor, number)
    for name, check in (CHECKS | {"save": partial(save, folder, probe)}).items():
        finding = run_check(check)
        sender.send(finding)
        if name in NEEDED and finding is not None and finding.status == "FAIL":
            break
    else:
        from dpo_jax.parallel import hosts

        hosts.barrier("end of the checks")  # if one process ends, jax ends all others
    os._exit(0)  # jax would wait for the others once more


@contextmanager
def device_checks(folder: str | None) -> Iterator[Callable[[], Finding | None]]:
    """Context manager that starts the process and yields a function that returns the finding of its next check.

    After a crash or a timeout, and after a fault that all later checks would meet again, there are no more findings.
    ``folder``: directory or url for a trial save; None: there is none.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    with TemporaryDirectory(prefix="dpo-jax-doctor-") as temporary:
        log = Path(temporary) / "output"
        probe = f"{PROBE}{secrets.token_hex(8)}"
        process = context.Process(target=_serve, args=(sender, str(log), folder, probe), daemon=True)
        process.start()
        sender.close()
        has_ended = False

        def next_finding() -> Finding | None:
            nonlocal has_ended
            if has_ended:
                return None
            try:
                if receiver.poll(PATIENCE):
                    return receiver.recv()
                has_ended = True
                return fail(f"no answer within {PATIENCE:g} s", HANG_REMEDY)
            except EOFError:
                has_ended = True
                process.join()
                return None if process.exitcode == 0 else _crash(process.exitcode, log)

        try:
            yield next_finding
            if not has_ended:
                process.join(PATIENCE)
        finally:
            process.kill()
            process.join()
            if folder is not None and not is_remote(folder):
                shutil.rmtree(closest_folder(folder) / probe, ignore_errors=True)


def _crash(code: int | None, log: Path) -> Finding:
    last_line = next(iter(log.read_text(errors="replace").splitlines()[-1:]), "no message")
    text = f"the process that uses the devices ended with {code} ({last_line[:200]})"
    return fail(text, "correct XLA_FLAGS and LIBTPU_INIT_ARGS if they are set, else reinstall jax and jaxlib")
