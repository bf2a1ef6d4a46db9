"""Saved steps of a run: written in the background, each whole or absent, proven when they are read.

The only file that knows Orbax. A step is a directory with two items that Orbax commits together: ``state``, the
arrays, and ``manifest``, JSON (see manifest.py) with the shape, type and checksum of every array. Nothing that is
read is trusted before its checksums agree.
"""

import asyncio
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from etils import epath

from dpo_jax import hosts
from dpo_jax.checksums import describe_leaves, leaf_checksums
from dpo_jax.config import CheckpointConfig
from dpo_jax.errors import RunStopped, UserError
from dpo_jax.manifest import FORMAT

STATE, MANIFEST, DAMAGED = "state", "manifest", ".damaged"
# Errors while reading that tell of the machine's or the storage's state and not of the checkpoint's: by type, by text.
NOT_DAMAGE = (MemoryError, PermissionError, TimeoutError, ConnectionError, jax.errors.JaxRuntimeError)
NOT_ITS_FAULT = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "UNAUTHENTICATED", "RESOURCE_EXHAUSTED")


class _Damaged(Exception):
    """This step cannot be used; the text is the reason."""


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Checkpoints:
    """The saved steps under one directory, for the run that writes them. Every process makes one and calls it alike.

    Use it as a context manager: leaving waits for the last save.
    """

    def __init__(self, directory, config: CheckpointConfig, notice: Callable[[str], None] = _say):
        """Open a directory, or make it.

        Args:
            directory: a path that every process sees.
            config: what is kept.
            notice: takes the one line that is said about each damaged step.

        Raises:
            UserError: it cannot be written, or some process sees another directory.
        """
        self.directory = epath.Path(directory)
        self.config = config
        self._notice = notice
        self._pending: int | None = None
        self._manager: ocp.CheckpointManager | None = None  # made by the first save, after damaged steps are set aside
        hosts.make_shared(self.directory, "checkpoints")
        self._metrics = _read_metrics(self.directory)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Steps that are on the disk, oldest first; a save still under way is not among them."""
        return _steps(self.directory)

    def newest(self) -> int | None:
        """The last saved step."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The saved step with the best ``best_metric``; of equals the later; None: no saved step has it."""
        saved = {step: self._metrics[step] for step in self.steps() if step in self._metrics}
        return next(iter(rank_steps(saved, self.config)), None)

    def manifest(self) -> dict | None:
        """Manifest of the newest step that has one, to be compared before any array is read; None: there is none."""
        for step in reversed(self.steps()):
            try:
                return _read_manifest(self.directory, step)
            except _Damaged:
                continue  # restore() says so, and sets it aside
        return None

    def save(self, step: int, state: Any, manifest: Mapping[str, Any], metrics: Mapping[str, Any] | None = None,
             wait: bool = False) -> bool:  # fmt: skip
        """Begin to save a step; the arrays may be donated to the next step as soon as this returns.

        Args:
            step: its number.
            state: pytree of jax arrays on one set of devices.
            manifest: of ``make_manifest``, with ``offsets`` and ``extras`` of this step.
            metrics: the evaluation at this step, if there was one; must hold ``best_metric``.
            wait: return only when the step is on the disk.

        Returns:
            False: this step was saved before (a step's state is a function of the run), and nothing was done.

        Raises:
            RunStopped: this save or the one before could not be written.
            UserError: ``best_metric`` is not among the metrics.
        """
        self.wait()
        if step in self.steps():
            return False
        if metrics is not None:
            metrics = {name: float(value) for name, value in metrics.items()}
            if self.config.best_metric is not None and self.config.best_metric not in metrics:
                raise UserError(f"checkpoint.best_metric: {self.config.best_metric!r} is not measured: "
                                f"use one of {', '.join(sorted(metrics)) or 'none: give data.eval'}")  # fmt: skip
            self._metrics[step] = metrics
        leaves = describe_leaves(state)
        for name, checksum in leaf_checksums(state).items():
            leaves[name]["checksum"] = checksum
        written = json.loads(json.dumps({**manifest, "step": step, "leaves": leaves, "metrics": metrics}))
        items = {STATE: ocp.args.PyTreeSave(state), MANIFEST: ocp.args.JsonSave(written)}
        self._manager = self._manager or _make_manager(self.directory, self._preserve)
        self._pending = step
        with _surfaced(self.directory, step):
            self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        if wait:
            self.wait()
        return True

    def wait(self) -> None:
        """Until the save under way is on the disk; raises ``RunStopped`` on every process if it was not written."""
        if self._manager is None or self._pending is None:
            return
        step, error = self._pending, None
        try:
            with _surfaced(self.directory, step):
                self._manager.wait_until_finished()
                if hosts.is_writer() and step not in self.steps():
                    raise FileNotFoundError("it was given up in the background")
        except RunStopped as stopped:
            error = stopped
            self._metrics.pop(step, None)
        self._pending = None
        hosts.agree(error, f"save of step {step}", 2 * hosts.TIMEOUT)

    def close(self) -> None:
        """Wait, and end the background threads."""
        self.wait()
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[Any, dict] | None:
        """The newest step that proves good, or the one named.

        A step that is not whole is renamed to ``STEP.damaged`` with one line that says why, and the next older one is
        tried. A named step is taken or refused.

        Args:
            abstract_state: the state's pytree of ``jax.ShapeDtypeStruct``, with the shardings wanted: any number of
                devices and processes.
            step: take this one.

        Returns:
            State and manifest; None: nothing was ever saved here.

        Raises:
            RunStopped: there were saves and none is good. The run never starts over by itself.
            UserError: the state has other arrays than this run, or the named step is absent or damaged.
        """
        assert self._pending is None, "restore before the first save"
        if step is not None:
            return self._restore_named(abstract_state, step)
        reasons = {}
        for candidate in reversed(self.steps()):
            try:
                return _read_step(self.directory, candidate, abstract_state)
            except _Damaged as damage:
                reasons[candidate] = str(damage)
                self._set_aside(candidate, str(damage))
        names = sorted(path.name for path in self.directory.iterdir() if DAMAGED in path.name)
        if names:
            told = "".join(f"; {number}: {reason}" for number, reason in reasons.items())
            raise RunStopped(f"checkpoints: no save in {self.directory} is good ({', '.join(names)}{told}): put a good "
                             "copy of a step back, or choose a new run.dir")  # fmt: skip
        return None

    def _restore_named(self, abstract_state: Any, step: int) -> tuple[Any, dict]:
        if step not in self.steps():
            raise UserError(f"checkpoint of step {step}: not in {self.directory}: use one of {self.steps()}")
        try:
            return _read_step(self.directory, step, abstract_state)
        except _Damaged as damage:
            raise UserError(f"checkpoint of step {step}: {self.directory / str(step)} is damaged ({damage}): "
                            f"use another of {self.steps()}") from damage  # fmt: skip

    def _set_aside(self, step: int, reason: str) -> None:
        path = self.directory / str(step)
        if hosts.is_writer():
            aside, copies = self.directory / f"{step}{DAMAGED}", 1
            while aside.exists():
                copies += 1
                aside = self.directory / f"{step}{DAMAGED}-{copies}"
            path.rename(aside)
            self._notice(f"checkpoint of step {step} is damaged ({reason}): set aside as {aside}")
        self._metrics.pop(step, None)
        hosts.barrier(f"setting aside step {step}")

    def _preserve(self, steps: list[int]) -> set[int]:
        saved = {step: self._metrics[step] for step in steps if step in self._metrics}
        return {*sorted(steps)[-self.config.keep :], *rank_steps(saved, self.config)[: self.config.keep_best]}


def rank_steps(metrics: Mapping[int, Mapping[str, float]], config: CheckpointConfig) -> list[int]:
    """Steps by ``best_metric``, best first, of equals the later first; those without it, or with NaN, are left out."""
    name = config.best_metric
    if name is None:
        return []
    values = {step: one[name] for step, one in metrics.items() if name in one and not math.isnan(one[name])}
    sign = -1 if config.best_mode == "max" else 1
    return sorted(values, key=lambda step: (sign * values[step], -step))


def restore_params(directory, which: Literal["newest", "best"], abstract_params: Any,
                   notice: Callable[[str], None] = _say) -> tuple[Any, dict]:  # fmt: skip
    """Parameters of a finished or running run, without its optimizer; changes nothing there.

    Args:
        directory: the run's checkpoints.
        which: newest, or best by the run's own ``checkpoint.best_metric``. A damaged step is passed over.
        abstract_params: pytree of ``jax.ShapeDtypeStruct`` with shardings; another dtype than the saved one is
            converted to, after the checksums have agreed.
        notice: takes the one line that is said about each damaged step.

    Returns:
        Parameters and manifest.

    Raises:
        UserError: no step is there or good, none is best, or the parameters have other shapes.
    """
    directory = epath.Path(directory)
    steps = _steps(directory)
    if not steps:
        raise UserError(f"{directory}: holds no saved step: check the path, or train first")
    order = list(reversed(steps))
    if which == "best":
        order = _best_order(directory, order)
    for step in order:
        try:
            state, manifest = _read_step(directory, step, {"params": abstract_params}, part=True)
            return state["params"], manifest
        except _Damaged as damage:
            notice(f"checkpoint of step {step} in {directory} is damaged ({damage}): passed over")
    raise UserError(f"{directory}: none of its saved steps {steps} can be used: see the lines above")


def _best_order(directory: epath.Path, steps: list[int]) -> list[int]:
    metrics = _read_metrics(directory)
    for step in steps:
        try:
            kept = _read_manifest(directory, step)["config"]["checkpoint"]
        except _Damaged:
            continue
        if kept["best_metric"] is None:
            raise UserError(f"{directory}: its run named no checkpoint.best_metric, so no step is best: use newest")
        order = rank_steps(metrics, CheckpointConfig(**kept))
        if not order:
            raise UserError(f"{directory}: no saved step has {kept['best_metric']!r}: use newest")
        return order
    raise UserError(f"{directory}: none of its saved steps {steps} has a readable manifest: use another run")


def _steps(directory: epath.Path) -> list[int]:
    return sorted(ocp.utils.checkpoint_steps(directory)) if directory.is_dir() else []


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        """Never: stopping belongs to hosts.py.

        Orbax asks from its background thread about steps long past, which sets jax's count of this process back, so
        that the processes agree on a step that one of them has left: it then never stops, and the others wait for it.
        """
        return False


class _Retention:
    """Orbax's policy protocol over a function from steps to those that stay."""

    def __init__(self, preserve: Callable[[list[int]], set[int]]):
        self._preserve = preserve

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        kept = self._preserve([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step in kept for checkpoint in checkpoints]


def _make_manager(directory: epath.Path, preserve: Callable[[list[int]], set[int]]) -> ocp.CheckpointManager:
    # Naming the processes makes Orbax wait at the coordination service, with timeouts, and not in a device collective.
    several = set(range(jax.process_count())) if jax.process_count() > 1 else None
    options = ocp.CheckpointManagerOptions(
        create=False,
        cleanup_tmp_directories=True,
        lightweight_initialize=True,  # metrics are read from our manifests
        preservation_policy=_Retention(preserve),
        multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes=several),
        async_options=ocp.options.AsyncOptions(timeout_secs=int(hosts.TIMEOUT)),
    )
    return _Manager(directory, options=options)


@contextmanager
def _surfaced(directory: epath.Path, step: int) -> Iterator[None]:
    """Whatever Orbax raises about a save becomes one line for the user."""
    try:
        yield
    except Exception as error:
        raise RunStopped(f"checkpoint of step {step}: could not be written to {directory} ({_first_line(error)}): "
                         "make room or mend the path, then run the same command again") from error  # fmt: skip


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _read_manifest(directory: epath.Path, step: int) -> dict:
    try:
        manifest = ocp.JsonCheckpointHandler().restore(directory / str(step) / MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _Damaged("it has no manifest") from error
    except ValueError as error:
        raise _Damaged("its manifest is no JSON") from error
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise _Damaged("its manifest is no manifest of this program")
    if manifest["format"] != FORMAT:
        raise UserError(f"checkpoint of step {step}: {directory} has format {manifest['format']!r}, this version reads "
                        f"{FORMAT}: use the version that wrote it")  # fmt: skip
    if manifest.get("step") != step:
        raise _Damaged(f"its manifest is that of step {manifest.get('step')}")
    return manifest


def _read_metrics(directory: epath.Path) -> dict[int, dict[str, float]]:
    metrics = {}
    for step in _steps(directory):
        try:
            metrics[step] = _read_manifest(directory, step)["metrics"]
        except _Damaged:
            continue  # restore() says so, and sets it aside
    return {step: one for step, one in metrics.items() if one is not None}


def _read_step(directory: epath.Path, step: int, abstract: Any, part: bool = False) -> tuple[Any, dict]:
    """State and manifest of one step, proven; all processes find the same. part: a part of the state is enough."""
    reason, state, manifest, saved = None, None, {}, {}
    try:
        manifest = _read_manifest(directory, step)
        _refuse_other_leaves(abstract, manifest["leaves"], directory / str(step), part)
        saved = {name: manifest["leaves"][name] for name in describe_leaves(abstract)}
        state = _read_arrays(directory / str(step) / STATE, abstract, saved, part)
    except _Damaged as damage:
        reason = str(damage)
    told = [one for one in hosts.gather(reason, f"reading step {step}", 2 * hosts.TIMEOUT) if one is not None]
    if told:
        raise _Damaged(told[0])
    wrong = [name for name, sum_ in leaf_checksums(state).items() if sum_ != saved[name]["checksum"]]
    if wrong:
        raise _Damaged(f"the checksum of {wrong[0]} is wrong" + f", and of {len(wrong) - 1} more" * (len(wrong) > 1))
    cast = jax.tree.map(lambda array, wanted: array.astype(wanted.dtype), state, abstract)
    return cast, manifest


def _read_arrays(path: epath.Path, abstract: Any, saved: Mapping[str, dict], part: bool) -> Any:
    names = list(saved)  # in the tree's own order
    leaves, tree = jax.tree.flatten(abstract)
    as_saved = [jax.ShapeDtypeStruct(leaf.shape, saved[name]["dtype"], sharding=leaf.sharding)
                for name, leaf in zip(names, leaves, strict=True)]  # fmt: skip
    item = jax.tree.unflatten(tree, as_saved)
    options = ocp.args.PyTreeRestore(item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item),
                                     partial_restore=part)  # fmt: skip
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, _PatientReader()))
    try:
        # The handler itself, not the manager: a process that fails must not leave the others at Orbax's barrier.
        return ocp.PyTreeCheckpointHandler(type_handler_registry=registry).restore(path, args=options)
    except Exception as error:  # Orbax raises a plain Exception for a chunk that cannot be decoded
        told = f"{error} {error.__cause__ or ''}"
        if isinstance(error, NOT_DAMAGE) or any(mark in told for mark in NOT_ITS_FAULT):
            raise
        raise _Damaged(f"its arrays cannot be read: {_first_line(error.__cause__ or error)}") from error


class _PatientReader(ocp.type_handlers.ArrayHandler):
    """Orbax's reader, which closes its event loop at the first error, while other reads still report to it."""

    async def deserialize(self, infos, args=None):
        before = asyncio.all_tasks()
        try:
            return await super().deserialize(infos, args)
        finally:
            await asyncio.gather(*asyncio.all_tasks() - before, return_exceptions=True)


def _refuse_other_leaves(abstract: Any, saved: Mapping[str, dict], path: epath.Path, part: bool) -> None:
    wanted = describe_leaves(abstract)
    names = wanted if part else {**wanted, **saved}
    differ = []
    for name in names:
        a, b = saved.get(name), wanted.get(name)
        equal = a is not None and b is not None and a["shape"] == b["shape"] and (part or a["dtype"] == b["dtype"])
        if not equal:
            differ.append(f"{name}: saved {_shown(a)}, needed {_shown(b)}")
    if differ:
        more = f"; and {len(differ) - 4} more" * (len(differ) > 4)
        raise UserError(f"checkpoint {path}: holds other arrays than this run: {'; '.join(differ[:4])}{more}: use the "
                        "options it was written with")  # fmt: skip


def _shown(leaf: Mapping | None) -> str:
    return "absent" if leaf is None else f"{leaf['dtype']}{leaf['shape']}"
