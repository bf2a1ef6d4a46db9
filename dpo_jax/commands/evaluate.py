"""Evaluate a model on preference pairs without training it."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from dpo_jax.batch import CHOSEN, REJECTED, Adapted, Params
from dpo_jax.config import DPOConfig, LossConfig, PairConfig
from dpo_jax.console import say
from dpo_jax.errors import UserError, require
from dpo_jax.inference.evaluation import ScoredSet, score_sets
from dpo_jax.inference.reference import LiveReference, Reference
from dpo_jax.inference.token_rewards import token_fields, token_log_ratios
from dpo_jax.logprobs import make_token_logps_fn
from dpo_jax.losses import sequence_logps
from dpo_jax.methods.dpo import make_reference, reference_weights, reward_model_scores
from dpo_jax.methods.setup import Setup, assemble
from dpo_jax.models.adapters import make_lora
from dpo_jax.parallel import hosts
from dpo_jax.parallel.rendezvous import start_hosts
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.reports.tokens import token_page
from dpo_jax.runs.checksums import weights_id
from dpo_jax.runs.directory import find_run, is_run_dir
from dpo_jax.runs.output_file import refuse_existing, write_output
from dpo_jax.runs.restore import restore_part
from dpo_jax.weights.open import decoder_of, find_model, load_start, load_weights, lora_of, trained_shapes

NO_TOKEN_REWARDS = {  # reference.mode -> why it does not allow --per-token
    "cached": "cached stores only sums over whole answers; add --reference.mode live",
    "none": "none provides nothing to compare tokens with; omit --per-token, or use a loss that has a reference, and "
    "reference.mode live",
}


def evaluate(
    config: PairConfig, output: str | Path, which: Literal["newest", "best"] = "newest", per_token: bool = False
) -> dict:
    """Score every evaluation pair; write one JSON line per pair to ``output``, also a url; return the summary.

    The policy, or the reward model, is the newest or best checkpoint, by ``which``, of the run in ``run.dir``, or the
    model of ``model.path`` if there is no run; the reference is the one that the run trains against. No run is changed.
    ``per_token`` adds each token's contribution to the reward (``token_fields``) and writes a page of colored answers
    next to ``output``.

    Raises:
        UserError: the config names no evaluation set or has an unusable value, or ``output`` already exists.
    """
    config = config.without_online()
    output, page = str(output), os.path.splitext(output)[0] + ".html"
    for path in (output, page) if per_token else (output,):
        refuse_existing(path)
    if per_token:
        if config.scores:
            raise UserError("--per-token: a reward model scores whole answers; omit --per-token")
        if config.reference_mode in NO_TOKEN_REWARDS:
            raise UserError(f"--per-token: reference.mode {NO_TOKEN_REWARDS[config.reference_mode]}")
        if page == output:
            raise UserError(f"--output: {output} is also the path of the token page; choose a .jsonl name")
    start_hosts()
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        setup = assemble(config, mesh)
        if not setup.evals:
            raise UserError("data.eval: there is no evaluation set; add one or set data.eval_fraction")
        scores = reward_model_scores(setup, config.eval.reward)[0] if isinstance(config, DPOConfig) else {}
        policy_name, weights, reference = load_policy_and_reference(setup, which)
        run_note = "" if is_run_dir(config.run.dir) else f" (no run in {config.run.dir})"
        say(config.run.progress, f"evaluating {policy_name}{run_note}")
        model, chunk, loss = setup.model, config.batch.target_chunk, config.objective
        token_logps_fn = make_token_logps_fn(model.hidden, model.unembedding, chunk=chunk, **model.logit_options)
        summary: dict = {"policy": policy_name, "sets": {}}
        lines = []
        for scored in score_sets(setup.evals, setup.logps_step, setup.to_devices, weights, reference, scores):
            metrics: dict[str, Any] = dict(scored.metrics(loss))
            metrics["distributions"] = scored.distributions(loss)
            summary["sets"][scored.name] = {"pairs": len(scored.ids)} | metrics
            set_lines = pair_lines(scored, loss)
            if per_token:
                assert isinstance(reference, LiveReference)
                arguments = (weights, reference, setup.evals[scored.name], setup.to_devices, mesh)
                ratios = token_log_ratios(token_logps_fn, *arguments, loss.ld_alpha)
                token_rewards = dict(token_fields(ratios, scored.store, setup.tokenizer))
                set_lines = [line | token_rewards[int(i)] for i, line in zip(scored.ids, set_lines, strict=True)]
            lines += set_lines
    if hosts.is_writer():
        write_output(output, "".join(json.dumps(line) + "\n" for line in lines))
        say(config.run.progress, f"pairs: {output}")
        if per_token:
            write_output(page, token_page(lines, config.objective.beta, policy_name))
            say(config.run.progress, f"tokens: {page}")
    return summary


def load_policy_and_reference(setup: Setup, which: Literal["newest", "best"]) -> tuple[str, Params, Reference | None]:
    """Load the policy, from the run or else from ``model.path``; return its name, its weights and the reference."""
    config, scores, has_run = setup.config, setup.model.config.scores, is_run_dir(setup.config.run.dir)
    if not has_run:
        remedy = f"it is a language model, which gives no scores, and {config.run.dir} has no run; give a reward model"
        has_head = decoder_of(setup.source).scores or config.lora.path is not None
        require(bool(has_head or not scores), "model.path", config.model.path, remedy)
    elif scores != decoder_of(find_model(config.run.dir, None)).scores:
        kind, command = ("language", "train") if scores else ("reward", "reward")
        raise UserError("run.dir", config.run.dir, f"it holds a {kind} model; use its config.yaml with --for {command}")
    model_weights = None  # not needed for a reward model without adapters
    if not (scores and has_run and setup.model.lora is None):
        model_weights = load_weights(setup.source, setup.model, config.model, setup.mesh)
    weights = reference_weights(setup, model_weights)
    if not has_run:
        if setup.model.lora is not None:
            adapters = load_start(config.lora, setup.model, model_weights, config.run.seed, setup.mesh)
            model_weights = Adapted(adapters, model_weights)
        return config.model.path, model_weights, make_reference(setup, weights, setup.evals.values())
    shapes = {"params": trained_shapes(setup.model, setup.mesh)}
    if config.reference.sync_every:
        shapes["reference"] = shapes["params"]
    saved_state, manifest = restore_part(find_run(config.run.dir).checkpoints, which, shapes)
    run_error = partial(UserError, "run.dir", config.run.dir)
    name = f"{config.run.dir} step {manifest['step']}"
    if scores and weights is not None and manifest["identity"]["weights"] != weights_id(weights):
        raise run_error("its adapters were trained on other weights; use its config.yaml or another run.dir")
    if not scores:
        if "reference" not in manifest["identity"]:
            raise run_error("it is a fine-tuning run; give it as model.path and choose another run.dir")
        was_synced = manifest["config"]["reference"].get("sync_every", 0) > 0
        if manifest["identity"]["reference"] != weights_id(weights) or was_synced != (config.reference.sync_every > 0):
            raise run_error("it was trained against another reference; use its config.yaml or another run.dir")
    run_lora = make_lora(lora_of(manifest["config"]), setup.model.config)
    if run_lora != setup.model.lora:
        difference = f"it was trained with other adapters ({run_lora}, now {setup.model.lora})"
        raise run_error(f"{difference}; use its config.yaml or another run.dir")
    params = saved_state["params"]
    policy = params if setup.model.lora is None else Adapted(params, model_weights)
    is_saved = config.reference.sync_every > 0
    reference = (
        LiveReference(saved_state["reference"]) if is_saved else make_reference(setup, weights, setup.evals.values())
    )
    return name, policy, reference


def pair_lines(scored: ScoredSet, loss: LossConfig) -> list[dict[str, Any]]:
    """Return one JSON object per pair: its row in the data, and its answers' token counts, log-probs and rewards.

    A reward model's scores are its rewards; it has no log-probs. Scores of ``eval.reward`` stand next to the rewards.
    """
    logps = np.asarray(sequence_logps(scored.policy, loss))
    reference = scored.reference
    reference_logps = None if reference is None else np.asarray(sequence_logps(reference, loss))
    rewards = loss.beta * (logps if reference_logps is None else logps - reference_logps)
    lines = []
    for position, i in enumerate(scored.ids):
        source = scored.store.report[scored.store.sources[i]]["source"]
        line: dict[str, Any] = {"set": scored.name, "source": source, "row": int(scored.store.rows[i])}
        for answer, k in (("chosen", CHOSEN), ("rejected", REJECTED)):
            line[f"tokens/{answer}"] = int(scored.policy.count[position, k])
            if not scored.policy.scored:
                line[f"logps/{answer}"] = float(logps[position, k])
            if reference_logps is not None:
                line[f"reference_logps/{answer}"] = float(reference_logps[position, k])
            line[f"rewards/{answer}"] = float(rewards[position, k])
            if scored.scores is not None:
                line[f"reward_model/{answer}"] = float(scored.scores.sum[position, k])
        lines.append(line | {"rewards/margin": float(rewards[position, CHOSEN] - rewards[position, REJECTED])})
    return lines
