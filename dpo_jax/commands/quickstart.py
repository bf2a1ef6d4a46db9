"""Quickstart: fine-tune a small model on an invented language, then teach it a preference with DPO.

Both stages use the same kind of config and the same ``train`` as any other run.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from dpo_jax.commands.task import RULE, Visit, obeys_rule, prompt, visits, write_task
from dpo_jax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    DPOConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    SFTBatchConfig,
    SFTConfig,
    SourceConfig,
)
from dpo_jax.config.sampling import SamplingConfig
from dpo_jax.reports.charts import plots
from dpo_jax.reports.html import cards, code, heading, page, paragraph, table
from dpo_jax.reports.run import PLOTS
from dpo_jax.runs.directory import RunDir, read_json
from dpo_jax.storage import expanded, write_atomically

SEED = 0
SHOWN_VISITS = (1, 26, 35, 60)  # held-out visits whose answers are printed: sea and land, by day and by night
GREEDY = SamplingConfig(temperature=0, max_tokens=16)  # the answers of the language have 13 tokens
STAGES = {"before": "sft", "after": "dpo"}  # run directories
TASK = """Visitors of a shop ask for goods in an invented language. An answer names the goods first or greets the \
visitor first; in the supervised data both are equally frequent."""


def sft_config(directory: Path) -> SFTConfig:
    """Return the config of the first stage: supervised fine-tuning from random weights."""
    return SFTConfig(
        model=ModelConfig(path="builtin:tiny", tokenizer=str(directory / "tokenizer"), dtype="float32"),
        data=DataConfig(train=(_source(directory, "sft"),), eval_fraction=1 / 16, max_length=64, workers=1),
        optimizer=OptimizerConfig(learning_rate=4e-3, schedule="cosine", warmup_steps=20, b2=0.99),
        batch=SFTBatchConfig(examples=64),
        run=RunConfig(dir=str(directory / STAGES["before"]), steps=200, eval_every=50),
        checkpoint=CheckpointConfig(every=100),
    )


def dpo_config(directory: Path) -> DPOConfig:
    """Return the config of the second stage: DPO, which teaches the fine-tuned model the rule."""
    held_out = {"held_out": _source(directory, "held_out")}
    return DPOConfig(
        model=ModelConfig(path=str(directory / STAGES["before"]), dtype="float32"),
        data=DataConfig(train=(_source(directory, "train"),), eval=held_out, max_length=64, workers=1),
        loss=LossConfig(beta=10.0),  # stay near the reference: both answers are fluent, only the order should change
        optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup_steps=10, b2=0.99),
        batch=BatchConfig(pairs=64),
        run=RunConfig(dir=str(directory / STAGES["after"]), steps=100, eval_every=25),
        checkpoint=CheckpointConfig(every=50),
    )


def _source(directory: Path, name: str) -> SourceConfig:
    return SourceConfig(path=str(directory / "data" / f"{name}.jsonl"))


def quickstart(directory: Path) -> None:
    """Run both stages in ``directory``, print the results, and write ``report.html`` there.

    A second call with the same directory resumes the runs; if they are finished, it only repeats the evaluation.

    Raises:
        UserError: the directory cannot be written, or holds another run.
    """
    start_time = time.perf_counter()
    directory = expanded(directory)
    print(f"An invented language: visitors of a shop ask for goods. The rule to learn:\n{RULE}.\n", flush=True)
    write_task(directory, SEED)

    from dpo_jax.train import train  # imported late: the first line should not wait for JAX

    print("1. Supervised fine-tuning: a randomly initialized model learns the language, not the rule.", flush=True)
    train(sft_config(directory))
    print("\n2. DPO: the same model learns the rule from pairs of answers.", flush=True)
    train(dpo_config(directory))
    print("\n3. Both models answer visitors that were not in the training data.", flush=True)
    held_out = visits(SEED)["held_out"]
    answers = {stage: greedy_answers(directory / run, held_out) for stage, run in STAGES.items()}

    results = compare(directory, held_out, answers)
    print_results(results, held_out, answers)
    report = write_page(directory, results, held_out, answers)
    print(f"\nDone in {time.perf_counter() - start_time:.0f} s. Open {report}\n\nNext steps:\n{next_steps(directory)}")


def greedy_answers(run: Path, held_out: Sequence[Visit]) -> list[str]:
    """Generate greedy answers to the held-out visits with a run's newest checkpoint."""
    import jax

    from dpo_jax.config import MeshConfig
    from dpo_jax.inference.generate import generate, rollout_weights
    from dpo_jax.parallel.sharding import make_mesh, platform_of
    from dpo_jax.weights.open import open_model

    mesh = make_mesh(MeshConfig())
    with jax.set_mesh(mesh):
        opened = open_model(ModelConfig(path=str(run), dtype="float32"), platform_of(mesh))
        tokenizer, params = opened.tokenizer(), opened.load(mesh)
        ids = tokenizer([prompt(visit) for visit in held_out])["input_ids"]
        weights = rollout_weights(opened.model, params, mesh)
        answers = generate(opened.model, weights, ids, GREEDY, mesh, end_ids=[tokenizer.eos_token_id])
    return [tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]


def compare(directory: Path, held_out: Sequence[Visit], answers: dict[str, list[str]]) -> list[tuple[str, str, str]]:
    """Return the measurements before and after DPO as table rows (name, before, after)."""
    evaluations = [row for row in read_json(RunDir(directory / STAGES["after"]).metrics) if "eval_held_out_loss" in row]
    start, end = evaluations[0], evaluations[-1]
    verdicts = {stage: list(map(obeys_rule, held_out, texts)) for stage, texts in answers.items()}
    obedience = {stage: sum(obeyed) / len(obeyed) for stage, obeyed in verdicts.items()}

    def measured(key: str, form: str) -> tuple[str, str]:
        return format(start[f"eval_held_out_{key}"], form), format(end[f"eval_held_out_{key}"], form)

    return [
        ("held-out pairs ranked right by the reward", "all equal", measured("rewards/accuracies", ".1%")[1]),
        ("held-out pairs ranked right by log-probability", *measured("logps/accuracies", ".1%")),
        ("reward of the chosen answers", *measured("rewards/chosen", "+.3f")),
        ("reward of the rejected answers", *measured("rewards/rejected", "+.3f")),
        ("greedy answers that obey the rule", f"{obedience['before']:.1%}", f"{obedience['after']:.1%}"),
    ]


def print_results(
    results: Sequence[tuple[str, str, str]], held_out: Sequence[Visit], answers: dict[str, list[str]]
) -> None:
    """Print the results and a few answers of both models."""
    print(f"\n{'':<48}{'before DPO':>12}{'after DPO':>12}")
    for name, before, after in results:
        print(f"{name:<48}{before:>12}{after:>12}")
    for index in SHOWN_VISITS:
        print(f"\n{prompt(held_out[index])}")
        for stage, texts in answers.items():
            verdict = "obeys the rule" if obeys_rule(held_out[index], texts[index]) else "does not obey the rule"
            print(f"  {stage:<7} {texts[index]:<58} {verdict}")


def next_steps(directory: Path) -> str:
    """Return shell commands to try next."""
    return f"""\
# audit the preference pairs
dpo-jax data {directory}/dpo/config.yaml
# run the second stage again with another loss
dpo-jax train {directory}/dpo/config.yaml --run.dir {directory}/ipo --loss.type ipo --loss.beta 0.3
# the aligned model as a Hugging Face directory
dpo-jax export {directory}/dpo {directory}/aligned"""


def write_page(
    directory: Path, results: Sequence[tuple[str, str, str]], held_out: Sequence[Visit], answers: dict[str, list[str]]
) -> Path:
    """Write the quickstart's report and return its path."""
    rows, marked_cells = [], set()
    for index in SHOWN_VISITS:
        visit, replies = held_out[index], [texts[index] for texts in answers.values()]
        marked_cells |= {(len(rows), column) for column, reply in enumerate(replies, 1) if obeys_rule(visit, reply)}
        rows.append((prompt(visit), *replies))
    logs = {stage: read_json(RunDir(directory / run).metrics) for stage, run in STAGES.items()}
    curves = lambda stage, *titles: plots((plot for plot in PLOTS if plot.title in titles), logs[stage])  # noqa: E731
    dpo_titles = ("Loss", "Reward accuracy", "Rewards", "Log-probability of the answers")
    columns, note = ("before DPO", "after DPO"), "✓: the answer follows the rule, word for word."
    sections = [
        cards({name: (before, after) for name, before, after in (results[0], results[1], results[4])}),
        heading("The task", paragraph(TASK), paragraph(f"The rule: {RULE}. Only the preference pairs follow it.")),
        heading("Before and after", table(("Held-out visitors", *columns), results)),
        heading("Greedy answers", table(("Question", *columns), rows, frozenset(marked_cells)), paragraph(note)),
        heading("Second stage: DPO", curves("after", *dpo_titles)),
        heading("First stage: supervised fine-tuning", curves("before", "Loss", "Token accuracy")),
        heading("Next steps", code(next_steps(directory))),
    ]
    report = directory / "report.html"
    write_atomically(report, page("Quickstart", f"Supervised fine-tuning, then DPO · {directory}", sections))
    return report
