"""Rendezvous of the processes of a run: each connects to process 0 before ``jax.distributed`` starts."""

import os
import socket
import time

import jax
from jax._src import clusters  # cluster detection has no public API

from dpo_jax.errors import UserError, must_be
from dpo_jax.parallel.hosts import TIMEOUT, HostsMissing, timeout_message

COORDINATOR, NUM_PROCESSES, PROCESS_ID = "DPO_JAX_COORDINATOR", "DPO_JAX_NUM_PROCESSES", "DPO_JAX_PROCESS_ID"
START_TIMEOUT = "DPO_JAX_START_TIMEOUT"
ALL_CONNECTED, START_ALL = "all connected", "start every process, and open that port between the hosts"


def start_hosts(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    timeout: int | None = None,
) -> None:
    """Connect the processes of this run; call it before anything else uses jax. No-op for a single process.

    Arguments default to the environment variables ``DPO_JAX_COORDINATOR``, ``DPO_JAX_NUM_PROCESSES``,
    ``DPO_JAX_PROCESS_ID`` and ``DPO_JAX_START_TIMEOUT``.

    Args:
        coordinator: ``host:port`` of process 0, with a free port that the other processes can reach; or ``auto``: jax
            gets all three settings from the TPU's or cluster's services and chooses the port.
        timeout: seconds to wait until all processes have connected.

    Raises:
        HostsMissing: some processes did not connect; the message names them, whereas jax would just abort.
        UserError: a setting is missing or invalid, or two processes have the same id.
    """
    coordinator = coordinator or os.environ.get(COORDINATOR)
    num_processes = _number(num_processes, NUM_PROCESSES)
    process_id = _number(process_id, PROCESS_ID)
    timeout = _number(timeout, START_TIMEOUT) or TIMEOUT
    is_auto = coordinator == "auto"
    if is_auto:
        coordinator, num_processes, process_id = _ask_cluster(timeout)
    if coordinator is None and num_processes is None and process_id is None:
        return
    if coordinator is None or num_processes is None or process_id is None:
        settings = {COORDINATOR: coordinator, NUM_PROCESSES: num_processes, PROCESS_ID: process_id}
        missing = [name for name, value in settings.items() if value is None]
        raise UserError(f"{', '.join(missing)}: not set, unlike other host settings: set all three, or none")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(COORDINATOR, coordinator, "write host:port, such as 10.0.0.2:8476")
    if not 0 <= process_id < num_processes:
        raise UserError(PROCESS_ID, process_id, f"it must be at least 0 and below {NUM_PROCESSES}, {num_processes}")
    if num_processes == 1:
        return
    if process_id == 0:
        _wait_for_all(int(port), num_processes, timeout)
    else:
        _connect(host, int(port), num_processes, process_id, timeout)
    if is_auto:  # jax detects the same settings again, and the devices of this process
        jax.distributed.initialize(initialization_timeout=timeout)
    else:
        options = {"initialization_timeout": timeout, "cluster_detection_method": "deactivate"}
        jax.distributed.initialize(coordinator, num_processes, process_id, **options)


def _ask_cluster(timeout: int) -> tuple[str, int, int]:
    """Return the coordinator, number of processes and id of this process, as detected by jax."""
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    try:
        coordinator, num_processes, process_id, _ = detect(address, None, None, None, None, timeout)
    except (OSError, RuntimeError) as error:  # no answer from the services, or process 0 has no address yet
        cause = " ".join(str(error).split())
        raise HostsMissing(f"{COORDINATOR}: auto could not detect the processes ({cause}): restart them all") from error
    if coordinator is None or num_processes is None or process_id is None:
        remedy = f"set it to host:port, and {NUM_PROCESSES} and {PROCESS_ID} too"
        raise UserError(f"{COORDINATOR}: auto found neither a TPU nor a cluster that jax supports: {remedy}")
    return coordinator, num_processes, process_id


def _number(value: int | None, name: str) -> int | None:
    text = os.environ.get(name)
    if value is not None or not text:
        return value
    if not text.isdigit():
        raise must_be(name, "an integer", text)
    return int(text)


def _wait_for_all(port: int, num_processes: int, timeout: int) -> None:
    """Listen on the coordinator's port until every process has sent its id, then send the outcome to all of them."""
    deadline = time.monotonic() + timeout
    try:
        server = socket.create_server(("", port), backlog=max(num_processes, 128))
    except OSError as error:
        remedy = "free the port, or choose another"
        raise UserError(f"{COORDINATOR}: port {port} cannot be opened ({error.strerror}): {remedy}") from error
    callers: dict[int, socket.socket] = {}
    outcome = ""
    with server:
        while not outcome and len(callers) < num_processes - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                caller, _ = server.accept()
            except TimeoutError:
                break
            process_id, outcome = _receive_id(caller, num_processes, callers)
            if process_id is not None:
                callers[process_id] = caller
        missing_ids = sorted(set(range(1, num_processes)) - set(callers))
        if missing_ids and not outcome:
            address = f"{socket.gethostname()}:{port}"
            outcome = f"{timeout_message(timeout, missing_ids, num_processes)} at {address}: {START_ALL}"
        for caller in callers.values():
            _send(caller, outcome or ALL_CONNECTED)
    if outcome:
        raise HostsMissing(outcome)


def _receive_id(caller: socket.socket, num_processes: int, callers: dict) -> tuple[int | None, str]:
    """Return the caller's process id and the error for all processes ("" if none); disconnect unrelated clients."""
    try:
        caller.settimeout(2.0)
        prefix, size, process_id = caller.makefile("r").readline().split()
        size, process_id = int(size), int(process_id)
    except (OSError, ValueError):
        prefix, size, process_id = "", 0, -1
    if prefix != "dpo_jax" or process_id < 0:
        caller.close()
        return None, ""
    if size != num_processes:
        outcome = f"process {process_id} expects {size} processes and process 0 expects {num_processes}: "
        return process_id, outcome + f"give every process the same {NUM_PROCESSES}"
    if process_id == 0 or process_id in callers:
        outcome = f"two processes have process id {process_id}: give each its own {PROCESS_ID}"
        _send(caller, outcome)
        return None, outcome
    return process_id, ""


def _send(caller: socket.socket, outcome: str) -> None:
    """Send the outcome and let the caller close first, so that jax's service can bind the port immediately."""
    with caller:
        try:
            caller.sendall((outcome + "\n").encode())
            caller.settimeout(1.0)
            caller.recv(1)
        except OSError:
            pass  # that process died while waiting; jax.distributed will time out on it


def _connect(host: str, port: int, num_processes: int, process_id: int, timeout: int) -> None:
    deadline = time.monotonic() + timeout
    while True:
        try:
            with socket.create_connection((host, port), timeout=5.0) as connection:
                connection.sendall(f"dpo_jax {num_processes} {process_id}\n".encode())
                connection.settimeout(max(deadline - time.monotonic(), 0) + 10.0)  # process 0 may have started later
                outcome = connection.makefile("r").readline().strip()
                if outcome == ALL_CONNECTED:
                    return
                if outcome:
                    raise HostsMissing(outcome)
        except OSError:
            pass  # process 0 is not listening yet
        if time.monotonic() > deadline:
            problem = f"process {process_id} {timeout_message(timeout, [0], num_processes)}"
            raise HostsMissing(f"{problem} at {host}:{port}: {START_ALL}")
        time.sleep(0.2)
