"""Run training, from a config to an exported model, with one loop for all methods."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from dpo_jax.bucket import LAST_SECONDS
from dpo_jax.config import AnyConfig
from dpo_jax.config.file import config_to_yaml
from dpo_jax.console import lossy_streams, say
from dpo_jax.errors import RunStopped
from dpo_jax.methods import METHODS, Method
from dpo_jax.methods.setup import announce, assemble, data_report, keep_files
from dpo_jax.parallel import hosts
from dpo_jax.parallel.compiler import compiler_options
from dpo_jax.parallel.rendezvous import start_hosts
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.reports.run import report_done
from dpo_jax.runs.directory import RunDir, last_metrics, log_event
from dpo_jax.runs.profile import refuse_window
from dpo_jax.runs.session import NotFinite, Session, lock_run, open_session
from dpo_jax.step import recovered
from dpo_jax.weights.open import export_run

if TYPE_CHECKING:
    from datasets import Dataset


def train(
    config: AnyConfig,
    *,
    train_set: "Dataset | None" = None,
    eval_sets: "Mapping[str, Dataset] | None" = None,
    devices: Sequence[jax.Device] | None = None,
) -> dict[str, float]:
    """Train with the config's method; an interrupted run resumes from its latest checkpoint.

    ``train_set`` and ``eval_sets`` replace the data sets named in the config; ``devices`` defaults to all devices.
    Returns the last step's metrics and the last evaluation.

    Raises:
        UserError: config, data, model or run directory is invalid.
        Preempted: SIGTERM or Ctrl-C was received; the state is saved.
        RunStopped: loss or gradient became NaN or infinite; the state before that step is saved.
    """
    start_hosts()
    hosts.cache_compilations()
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh), lossy_streams(), lock_run(config.run.dir) as run:
        setup = assemble(config, mesh, train_set, eval_sets)  # model and data, without weights so far
        refuse_window(config.run.profile_steps, setup.batches.order.num_steps)
        flags = compiler_options(mesh, config.run.compiler_flags)  # refused before weights are loaded
        announce(setup, run)
        method, start = METHODS[type(config)](setup, flags)
        with open_session(run, config.run, config.checkpoint, method.manifest, method.num_steps) as session:
            restored = session.resume(method.abstract_state)
            state, first_step = restored or (method.first_state(start), 0)
            del start  # a resumed run has no use for these arrays
            if restored:
                session.say(method.resumed(state))
            else:
                session.begin()
                keep_files(method.setup, run)
                session.say(method.check_start(state))
                session.log_evaluation(0, method.evaluate(state))
            session.write_config(config_to_yaml(config))
            state = run_steps(session, method, state, first_step)
        finish(config, method, run, state)
    return last_metrics(run)


def run_steps(session: Session, method: Method, state: Any, first_step: int) -> Any:
    """Run all remaining steps and return the final state.

    Each step ends with metrics, evaluation, save and stop, in this order, so that a save covers what precedes it.
    """
    with session.steps(first_step, method.evaluates) as steps:
        try:
            for step in steps:
                data = method.batch(step, state)
                state, metrics = method.update(state, data)
                session.log(step, metrics, data.facts)
                if session.due.evaluation:
                    session.log_evaluation(step + 1, method.evaluate(state))
                if session.due.save:
                    session.save(step + 1, state)
                session.stop_if_asked(step + 1)
        except NotFinite as error:
            session.save(error.num_done, recovered(state), wait=True)
            raise RunStopped(str(error)) from error
    return state


def finish(config: AnyConfig, method: Method, run: RunDir, state: Any) -> None:
    """Export the model, write the report, and log their paths."""
    if config.run.export:
        export_run(run, run.export, method.setup.model, method.weights(state), overwrite=True)
        say(config.run.progress, f"export: {run.export}")
    if hosts.is_writer():
        log_event(run, "end", step=method.num_steps)
        if config.run.report:
            report_done(run.root, data_report(method.setup), config.run.progress)
        run.push(LAST_SECONDS)
    say(config.run.progress, f"done: {run.location}")
