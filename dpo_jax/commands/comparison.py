"""Compare methods on a user's own model, pairs and judge: train each as a run, judge its answers, and write a page.

What is done is not repeated: a comparison that was stopped resumes with the run that was training.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dpo_jax import storage
from dpo_jax.config import DPOConfig, JudgeConfig, PPOConfig
from dpo_jax.config.compare import REWARD_MODEL, CompareConfig, ComparedRun
from dpo_jax.config.file import config_to_yaml
from dpo_jax.console import lossy_streams, say
from dpo_jax.errors import UserError, reason
from dpo_jax.methods.judging import Answers, Judged, Judging, open_judging
from dpo_jax.methods.setup import Setup, assemble
from dpo_jax.parallel import hosts
from dpo_jax.parallel.rendezvous import start_hosts
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.reports.comparison import model_comparison_page
from dpo_jax.runs.directory import RunDir, is_run_dir, last_metrics, locked_directory, read_json, writing
from dpo_jax.runs.manifest import compare_manifest, make_manifest, rounding_changes
from dpo_jax.train import train

LOCK, MANIFEST, START, JUDGED = "comparison.lock", "comparison.manifest.json", "start.json", "judged.json"
Row = dict[str, Any]


def compare_methods(config: CompareConfig, devices: Sequence[jax.Device] | None = None) -> None:
    """Run the comparison in ``run.dir``, and write ``comparison.json`` and the page ``comparison.html`` there.

    ``devices`` defaults to all devices.

    Raises:
        UserError: an option, model, data set or the judge cannot be used, or the directory holds another comparison.
        Preempted: SIGTERM or Ctrl-C was received while a method trained; the same command resumes.
    """
    start_hosts()
    hosts.cache_compilations()
    mesh, root = make_mesh(config.mesh, devices), storage.expanded(config.run.dir).absolute()
    runs = list(config.runs)
    with ExitStack() as stack:
        stack.enter_context(lossy_streams())
        lock = locked_directory(config.run.dir, LOCK, has_comparison, "comparison")
        hosts.on_writer(lambda: str(stack.enter_context(lock)), "comparison directory")
        with jax.set_mesh(mesh):
            setup = assemble(config.judging, mesh)
            judging, identity = open_judging(setup, config.judge)
            hosts.on_writer(partial(check_manifest, root, config, identity), "comparison")
            answers = judging.start_answers
            if not hosts.on_writer((root / START).exists, "start"):
                write_json(root / START, start_results(judging, config.best_of))
            del judging  # and the weights, while others train
        for number, run in enumerate(runs, start=1):
            say(config.run.progress, f"run {number} of {len(runs)}: {run.title}")
            if not hosts.on_writer(partial(has_ended, root / run.folder), "run"):
                train(run.config, devices=devices)
            if run.name != REWARD_MODEL and not hosts.on_writer((root / run.folder / JUDGED).exists, "judged run"):
                with jax.set_mesh(mesh):
                    judge_run(root, config, run, setup, answers)
        if hosts.is_writer():
            finish(root, config, runs)


def has_comparison(root: Path) -> bool:
    """Return whether a comparison was ever started in the directory."""
    return (root / LOCK).exists() and not is_run_dir(root)


def check_manifest(root: Path, config: CompareConfig, identity: Mapping[str, Any]) -> None:
    """Write the manifest of the results, or compare it with the directory's; methods may be added or removed.

    Raises:
        UserError: an option that the results depend on has changed, or the model, the data or the judge.
    """
    path, environment = root / MANIFEST, {"platform": jax.default_backend(), "devices": jax.device_count()}
    manifest = make_manifest(result_options(config), identity, environment)
    if path.exists():
        remedy = "choose another run.dir"
        try:
            old = storage.unseal(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"run.dir: {path} cannot be read: {reason(error)}: restore it, or {remedy}") from error
        old_methods, methods = old["config"]["methods"], manifest["config"]["methods"]
        names = old_methods.keys() & methods.keys()
        configs = [
            {**x["config"], "methods": {name: x["config"]["methods"][name] for name in names}} for x in (old, manifest)
        ]
        changes = compare_manifest(
            {**old, "config": {"compare": configs[0]}}, {**manifest, "config": {"compare": configs[1]}}
        )
        if changes:
            changes_text = "; ".join(change.removeprefix("compare.") for change in changes)
            raise UserError(
                f"run.dir: {root} holds a comparison with other options: {changes_text}: restore them, or {remedy}"
            )
        for line in rounding_changes(old | {"config": {}}, manifest | {"config": {}}):
            say(config.run.progress, f"results are no longer bit-identical: {line}")
        manifest["config"]["methods"] = old_methods | methods
    with writing(path):
        storage.write_atomically(path, json.dumps(storage.seal(manifest), indent=1) + "\n", durable=True)
        storage.write_atomically(root / "config.yaml", config_to_yaml(config))


def result_options(config: CompareConfig) -> Row:
    """Return the options that all results depend on; adding seeds, methods or betas leaves the other results valid."""
    options: Row = asdict(config)
    for name in ("mesh", "checkpoint", "seeds"):
        del options[name]
    for method in options["methods"].values():
        del method["betas"]
    options["run"] = {name: options["run"][name] for name in ("steps", "epochs", "seed")}
    options["data"] = {name: value for name, value in options["data"].items() if name not in ("store", "workers")}
    return options


def has_ended(path: Path) -> bool:
    """Return whether the run in a directory is finished."""
    return any(event["event"] == "end" for event in read_json(RunDir(path).events))


def start_results(judging: Judging, best_of: Sequence[int]) -> Row:
    """Return the prompts, the judged answers of the initial policy, and its judged best-of-n answers."""
    best_answers = {str(n): as_json(judging, judged) for n, judged in judging.best_of(best_of).items()}
    return {"prompts": judging.prompts(), "start": as_json(judging, judging.judge_start()), "best_of": best_answers}


def judge_run(root: Path, config: CompareConfig, run: ComparedRun, setup: Setup, start_answers: Answers) -> None:
    """Judge a finished run, and write the result into its directory."""
    judging, _ = open_judging(setup, config.judge, start_answers)
    learned = None if run.reward_model is None else JudgeConfig(path=str(root / run.reward_model))
    judged = judging.judge_run(str(root / run.folder), learned)
    write_json(root / run.folder / JUDGED, as_json(judging, judged))
    means = {name: mean(values) for name, values in judged.values.items()}
    line = f"score {means['score']:.4g}, KL {means['sampled_kl']:.4g}, win rate {means['win_rate']:.1%}"
    say(config.run.progress, f"{run.title}: {line}")


def as_json(judging: Judging, judged: Judged) -> Row:
    """Return judged answers as a JSON object: the value of each metric for each prompt, and the answers."""
    values = {name: values.astype(np.float64).tolist() for name, values in judged.values.items()}
    return {"values": values, "answers": judging.texts(judged)}


def write_json(path: Path, content: Row) -> None:
    """Write a JSON file on the writer process."""
    if hosts.is_writer():
        with writing(path):
            storage.write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def read_object(path: Path) -> Row:
    """Read a JSON file that `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def finish(root: Path, config: CompareConfig, runs: Sequence[ComparedRun]) -> None:
    """Write ``comparison.json`` and the page from the files of finished runs."""
    results = comparison_results(root, config, runs)
    write_json(root / "comparison.json", results)
    path = root / "comparison.html"
    with writing(path):
        storage.write_atomically(path, model_comparison_page(results))
    say(config.run.progress, f"page: {path}")


def comparison_results(root: Path, config: CompareConfig, runs: Sequence[ComparedRun]) -> Row:
    """Return everything that the page shows, as JSON, from the files of finished runs."""
    start = read_object(root / START)
    groups = [list(group) for _, group in groupby(runs, key=lambda run: (run.name, run.beta))]
    judged = {run.folder: read_object(root / run.folder / JUDGED) for run in runs if run.name != REWARD_MODEL}
    methods = [group for group in groups if group[0].name != REWARD_MODEL]
    rows = [method_row(root, group, [judged[run.folder] for run in group]) for group in methods]
    best_rows = [best_row(int(n), each) for n, each in start["best_of"].items()]
    texts = {"Reference": start["start"]["answers"]}
    texts |= {f"Best of {n}": each["answers"] for n, each in start["best_of"].items()}
    texts |= {label_of(group[0]): judged[group[0].folder]["answers"] for group in methods}
    reward_models = [group for group in groups if group[0].name == REWARD_MODEL]
    return {
        "model": config.model.path,
        "judge": config.judge.function or config.judge.path,
        "pairs": config.held_out,
        "seeds": config.seeds,
        "experiment": {
            "title": config.model.path,
            "reference": reached([start["start"]]) | {"kl": 0.0},
            "optimum": [],
            "best_of": best_rows,
            "rows": rows,
        },
        "reward_model": cost_of(root, reward_models[0]) if reward_models else None,
        "rankings": {label_of(group[0]): ranking(root, config.held_out, group) for group in groups if ranks(group[0])},
        "learned": [
            learned_row(start["start"], row, [judged[run.folder] for run in group])
            for row, group in zip(rows, methods, strict=True)
            if group[0].reward_model is not None
        ],
        "texts": {"prompts": start["prompts"], "answers": texts},
    }


def label_of(run: ComparedRun) -> str:
    """Return a method's name, with its beta if it has one."""
    if run.name == REWARD_MODEL:
        return "Reward model"
    return run.name if run.beta is None else f"{run.name}, beta {run.beta:g}"


def reached(judged: Sequence[Row]) -> Row:
    """Return the metrics of judged answers as means over seeds and prompts.

    ``error`` is the standard error of the score over prompts, and ``spread`` the range of the seeds' scores.
    """
    metric_keys = {"score": "reward", "sampled_kl": "kl", "length": "length", "ended": "ended", "win_rate": "win_rate"}
    values = {
        key: np.array([each["values"][name] for each in judged])
        for name, key in metric_keys.items()
        if name in judged[0]["values"]
    }  # [seeds, prompts]
    seed_means = values["reward"].mean(1)
    row = {key: mean(value) for key, value in values.items()}
    row |= {"error": standard_error(values["reward"]), "spread": float(seed_means.max() - seed_means.min())}
    return row | ({"kl_error": standard_error(values["kl"])} if "kl" in values else {})


def standard_error(values: np.ndarray) -> float:
    """Return the standard error over prompts of the mean of ``values`` [seeds, prompts]."""
    return float(values.mean(0).std() / math.sqrt(values.shape[1]))


def mean(values: Any) -> float:
    """Return the mean in float64."""
    return float(np.mean(values, dtype=np.float64))


def best_row(n: int, judged: Row) -> Row:
    """Return the row of the best of n answers; its KL is an upper bound, because tied scores lower the true KL."""
    return reached([judged]) | {"n": n, "kl": math.log(n) - (n - 1) / n}


def method_row(root: Path, group: Sequence[ComparedRun], judged: Sequence[Row]) -> Row:
    """Return a method's results and costs as means over seeds."""
    run = group[0]
    return {
        "name": run.name,
        "beta": run.beta,
        "learned": run.reward_model is not None,
        "models": models_of(run),
        **reached(judged),
        **cost_of(root, group),
        "options": options_of(run),
    }


def models_of(run: ComparedRun) -> str:
    """Return the names of the models that are in memory while a run trains."""
    config = run.config
    value_model = config.ppo.trained_value if isinstance(config, PPOConfig) else None
    models = ["policy with a value head" if value_model == "shared" else "policy"]
    if config.reference_mode != "none":
        models.append("reference")
    if value_model in ("policy", "reward"):
        models.append("value")
    if config.judge is not None and config.judge.path is not None:
        models.append("reward")
    return ", ".join(models)


def options_of(run: ComparedRun) -> list[str]:
    """Return the learning rate, and the options of the objective that are not at their defaults, with their values."""
    config = run.config
    objectives = getattr(config, "ppo", None) or getattr(config, "loss", None), config.data.online
    texts = [f"learning rate {config.optimizer.learning_rate:g}"]
    for section in filter(None, objectives):
        values = [(option, getattr(section, option.name)) for option in fields(section)]
        texts += [
            f"{option.name} {value}" for option, value in values if option.default not in (value, dataclasses.MISSING)
        ]
    return texts


def cost_of(root: Path, group: Sequence[ComparedRun]) -> Row:
    """Return a method's costs as means over seeds: updates, pairs, sampled tokens, seconds and peak memory."""
    costs = []
    for run in group:
        run_dir = RunDir(root / run.folder)
        metrics, timings = last_metrics(run_dir), read_json(run_dir.timings)
        seconds = [row["step_seconds"] for row in timings]
        config, steps = run.config, timings[-1]["step"]
        updates = steps * (config.ppo.epochs if isinstance(config, PPOConfig) else 1)
        needs_pairs = run.reward_model is not None or config.planned.per_prompt == 0
        pairs = [event["train"] for event in read_json(run_dir.events) if event["event"] == "data"][-1]
        costs.append(
            {
                "updates": updates,
                "pairs": pairs if needs_pairs else 0,
                "sampled": metrics.get("sampled_tokens", 0),
                "seconds": mean(seconds) * steps,
                "gib": max(row.get("device_memory_gib", row["host_memory_gib"]) for row in timings),
            }
        )
    return {name: mean([cost[name] for cost in costs]) for name in costs[0]}


def ranks(run: ComparedRun) -> bool:
    """Return whether a run's evaluations rank the held-out pairs by a reward."""
    if run.name == REWARD_MODEL:
        return True
    return isinstance(run.config, DPOConfig) and run.config.data.online is None and run.config.loss.needs_reference


def ranking(root: Path, name: str, group: Sequence[ComparedRun]) -> Row:
    """Return the mean accuracy of a reward on the held-out pairs, and the first seed's calibration."""
    run_dirs = [RunDir(root / run.folder) for run in group]
    accuracies = [last_metrics(each)[f"eval_{name}_rewards/accuracies"] for each in run_dirs]
    calibration = [row for row in read_json(run_dirs[0].distributions) if row["set"] == name][-1]["calibration"]
    return {"labels": mean(accuracies), "calibration": calibration}


def learned_row(start: Row, row: Row, judged: Sequence[Row]) -> Row:
    """Return the learned and the judge's mean scores before and after training, and the correlation of the two."""
    columns = ("start_learned", "learned", "score")
    start_learned, learned, score = (np.array([each["values"][name] for each in judged]) for name in columns)
    start_score = np.broadcast_to(start["values"]["score"], score.shape)
    pairs = {"before": (start_learned, start_score), "after": (learned, score)}
    return {"name": row["name"], "beta": row["beta"]} | {
        when: {"learned": mean(x), "judge": mean(y), "correlation": correlation(x, y)} for when, (x, y) in pairs.items()
    }


def correlation(x: np.ndarray, y: np.ndarray) -> float | None:
    """Return the mean over seeds of the correlation over prompts of two scores, or None if one is constant."""
    if min(x.std(1).min(), y.std(1).min()) == 0:
        return None
    return mean([np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)])
