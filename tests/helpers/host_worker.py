"""One of two real processes of a run, started by test_hosts.py with DPO_JAX_* set: python host_worker.py FOLDER."""

import json
import os
import sys
import time
from pathlib import Path

folder = Path(sys.argv[1])

from dpo_jax.parallel import hosts, rendezvous  # noqa: E402

rendezvous.start_hosts()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

from dpo_jax.config import CheckpointConfig  # noqa: E402
from dpo_jax.errors import RunStopped, UserError  # noqa: E402
from dpo_jax.runs.checkpoint import Checkpoints  # noqa: E402
from dpo_jax.runs.manifest import make_manifest  # noqa: E402

MANIFEST = {**make_manifest({}, {}, {}), "offsets": {}, "extras": {}}

me = jax.process_index()
hosts.VISIBILITY_TIMEOUT = 1.0
facts: dict = {"writer": hosts.is_writer(), "devices": [jax.local_device_count(), jax.device_count()]}


def caught(function, *arguments) -> str:
    try:
        function(*arguments)
    except UserError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def spread(values) -> jax.Array:
    sharding = NamedSharding(Mesh(np.array(jax.devices()), ("fsdp",)), P("fsdp"))
    return jax.make_array_from_callback(values.shape, sharding, lambda place: values[place])


facts["gathered"] = hosts.gather({"me": me}, "a test")
facts["agreed"] = caught(hosts.agree, RunStopped("only process 1 knows") if me else None, "a test")


def refused_by_1() -> None:
    if me == 1:
        raise UserError("process 1 cannot")
    (folder / "made").touch()


facts["made first"] = hosts.writer_first((folder / "made").exists, "a test")
facts["refused"] = caught(hosts.writer_first, refused_by_1, "a test")
facts["made then"] = hosts.writer_first((folder / "made").exists, "a test")
facts["not shared"] = caught(Checkpoints, folder / f"own-{me}", CheckpointConfig())
facts["no folder"] = caught(Checkpoints, folder / "file" / "checkpoints", CheckpointConfig())

asked: list[int] = []  # steps for which jax was asked whether to stop, by whomever
ask_jax = multihost_utils.reached_preemption_sync_point


def recorded(step: int) -> bool:
    asked.append(step)
    return ask_jax(step)


multihost_utils.reached_preemption_sync_point = recorded

# A run that is asked to stop, saves, and finds a damaged step when it goes on.
state = {"w": spread(np.zeros((64, 3), np.float32)), "step": jax.jit(lambda: jnp.int32(0))()}
update = jax.jit(lambda s: {"w": s["w"] * 0.5 + s["step"], "step": s["step"] + 1}, donate_argnums=0)
checkpoints = Checkpoints(folder / "checkpoints", CheckpointConfig(keep=5))
state = {**state, "step": jax.device_put(state["step"], NamedSharding(state["w"].sharding.mesh, P()))}
with hosts.stop_signals() as stop_requested:
    for step in range(1, 4000):
        state = update(state)
        if step % 50 == 0:
            jax.block_until_ready(state)
            checkpoints.save(step, state, MANIFEST)
        if step == 60:
            (folder / f"ready-{me}").touch()
        if stop_requested(step):
            break
        time.sleep(0.005)
facts["stopped"] = step
checkpoints.save(step, state, MANIFEST, wait=True)
expected = hosts.gather(np.concatenate([np.asarray(s.data) for s in state["w"].addressable_shards]).tolist(), "rows")
(folder / f"expected-{me}.json").write_text(json.dumps([row for part in expected for row in part]))

checkpoints.save(step + 1, update(state), MANIFEST, wait=True)
if me == 0:
    data = max((folder / "checkpoints" / str(step + 1) / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    os.truncate(data, 10)
hosts.barrier("damage")
target = {"w": jax.ShapeDtypeStruct((64, 3), np.float32, sharding=spread(np.zeros((64, 3), np.float32)).sharding)}
target["step"] = jax.ShapeDtypeStruct((), np.int32, sharding=NamedSharding(target["w"].sharding.mesh, P()))
state, manifest = checkpoints.restore(target)
facts["restored"] = [manifest["step"], int(state["step"])]
checkpoints.close()

if me == 1:
    time.sleep(3)
facts["absent"] = caught(hosts.barrier, "the end", 1)
facts["asked in order"] = asked == list(range(1, facts["stopped"] + 1))
(folder / f"facts-{me}.json").write_text(json.dumps(facts))
hosts.barrier("really the end")
