"""Judging a model without training it, and taking a trained one out of its run."""

import json
from pathlib import Path
from typing import Literal

import jax
import numpy as np

from dpo_jax import hosts
from dpo_jax.assemble import assemble, make_reference, reference_weights
from dpo_jax.batch import CHOSEN, REJECTED
from dpo_jax.config import DPOConfig, MeshConfig, ModelConfig
from dpo_jax.errors import UserError
from dpo_jax.losses import preference_metrics
from dpo_jax.policy import build_model, export_run, find_model, load_weights, param_shardings
from dpo_jax.reference import weights_id
from dpo_jax.rundir import find_run, is_run_dir
from dpo_jax.saved import restore_params
from dpo_jax.scoring import dataset_logps
from dpo_jax.sharding import make_mesh


def evaluate(config: DPOConfig, output: Path, which: Literal["newest", "best"] = "newest") -> dict:
    """Score every pair of the config's evaluation sets; one JSON line a pair in ``output``, the summary returned.

    The policy is what the config's run has come to (its newest or best save, by ``which``) when ``run.dir`` holds one,
    else the model of ``model.path``; the reference is what the run trains against. Changes no run.

    Raises:
        UserError: the config names no evaluation set, or something in it cannot be used.
    """
    hosts.start_hosts()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        parts = assemble(config, mesh)
        if not parts.evals:
            raise UserError("data.eval: {} names nothing to evaluate on; name a set, or give data.eval_fraction")
        start = load_weights(parts.source, parts.model, config.model, mesh)
        weights = reference_weights(parts, start)
        policy_of, params = config.model.path, start
        if is_run_dir(config.run.dir):
            shapes = jax.tree.map(
                lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own),
                parts.model.param_shapes(),
                param_shardings(parts.model, mesh),
            )
            params, manifest = restore_params(find_run(config.run.dir).checkpoints, which, shapes)
            if manifest["identity"]["reference"] != weights_id(weights):
                raise UserError(f"run.dir: {config.run.dir} was trained against another reference than this config's: "
                                f"use {config.run.dir}/config.yaml, or another run.dir")  # fmt: skip
            policy_of = f"{config.run.dir} step {manifest['step']}"
        reference = make_reference(parts, weights)
        summary: dict = {"policy": policy_of, "sets": {}}
        lines = []
        for name, batches in parts.evals.items():
            ids, policy = dataset_logps(parts.logps_step, params, batches, parts.place)
            fixed = reference.dataset(parts.logps_step, batches, parts.place)
            values = jax.device_get(preference_metrics(policy, fixed, config.loss))
            summary["sets"][name] = {"pairs": len(ids)} | {key: float(value) for key, value in values.items()}
            rewards = config.loss.beta * (policy.sum - fixed.sum)
            for place, i in enumerate(ids):
                store = batches.store
                line = {"set": name, "source": store.report[store.sources[i]]["source"], "row": int(store.rows[i])}
                for answer, k in (("chosen", CHOSEN), ("rejected", REJECTED)):
                    line[f"tokens/{answer}"] = int(policy.count[place, k])
                    line[f"logps/{answer}"] = float(policy.sum[place, k])
                    line[f"reference_logps/{answer}"] = float(np.asarray(fixed.sum)[place, k])
                    line[f"rewards/{answer}"] = float(rewards[place, k])
                lines.append(line | {"rewards/margin": float(rewards[place, CHOSEN] - rewards[place, REJECTED])})
    if hosts.is_writer():
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            raise UserError(f"--output: {output} cannot be written: {error.strerror}; choose another file") from error
    return summary


def export(run_dir: Path, out_dir: Path, which: Literal["newest", "best"]) -> None:
    """Write the model of a run, its newest or best save, as a Hugging Face directory in float32.

    Raises:
        UserError: there is no such run or save, or ``out_dir`` holds something.
    """
    run = find_run(run_dir)
    source = find_model(str(run_dir), None)
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])  # weights pass through one device, whatever their sizes
    config = ModelConfig(path=str(run_dir), checkpoint=which)
    model = build_model(source, config)
    export_run(run, out_dir, model, load_weights(source, model, config, mesh), overwrite=False)
