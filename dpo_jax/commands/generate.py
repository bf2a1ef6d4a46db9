"""Generate answers to prompts, score them with a reward model, and turn the best and the worst into training data.

An answer depends on the options, the row of its prompt and its own index only, so a command that was stopped continues
where its output ends, and writes the file that it would have written without a stop.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from statistics import fmean
from typing import Any

import jax
from jax.sharding import Mesh

from dpo_jax.batch import Params
from dpo_jax.config import GenerateConfig
from dpo_jax.console import progress_line, say
from dpo_jax.data.ranked import rank
from dpo_jax.data.schemas import Example, Problem
from dpo_jax.data.store import open_source
from dpo_jax.data.tokenize import TokenizedPrompt, make_tokenize_prompt
from dpo_jax.data.tokenizer import tokenizer_hash
from dpo_jax.errors import RunStopped, UserError
from dpo_jax.inference.answer_scores import SCORE_DECIMALS, AnswerScores, make_answer_scores
from dpo_jax.inference.generate import NO_END, Answer, generate, rollout_weights
from dpo_jax.models.decoder import count_params, refuse_expert_axis
from dpo_jax.models.families import context_length, refuse_positions
from dpo_jax.parallel import hosts
from dpo_jax.parallel.rendezvous import start_hosts
from dpo_jax.parallel.sharding import make_mesh, platform_of
from dpo_jax.runs.answer_file import AnswerFile, Row
from dpo_jax.runs.checksums import weights_id
from dpo_jax.runs.directory import writing
from dpo_jax.runs.manifest import make_manifest
from dpo_jax.storage import write_atomically
from dpo_jax.weights.open import OpenModel, open_model
from dpo_jax.weights.reward_model import (
    ReadAnswer,
    open_reward_model,
    refuse_reward_model,
    stop_tokens,
)

LOGP_DECIMALS = 4  # later digits of a float32 depend on the batch


@dataclass(frozen=True)
class Prompt:
    """A prompt as read from its file, and its tokens."""

    example: Example
    tokenized: TokenizedPrompt

    @property
    def columns(self) -> Row:
        """The columns that state this prompt in a row of training data."""
        options = {"tools": self.example.tools, "chat_template_kwargs": self.example.template_kwargs}
        return {"prompt": self.example.prompt} | {name: value for name, value in options.items() if value is not None}


AnswerColumn = Callable[[Sequence[Prompt], int, int], list[Row]]  # (prompts, first row, index) -> an answer to each


def generate_answers(config: GenerateConfig, output: str) -> None:
    """Write ``config.n`` answers to each prompt to ``output`` and, next to it, the rows that ``config.pairs`` asks for.

    Raises:
        UserError: a prompt, model or option cannot be used, or ``output`` is not the output of the same command.
        RunStopped: a log-prob or score is not finite, or a file cannot be written.
    """
    file = AnswerFile.named(output)
    start_hosts()
    hosts.cache_compilations()
    mesh = make_mesh(config.mesh)
    with ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        hosts.on_writer(lambda: stack.enter_context(file.locked()), "output")
        policy, template = open_policy(config, mesh), config.data.chat_template
        tokenizer, reward = policy.tokenizer(template), None
        if config.reward.path is not None:
            date = config.data.template_date
            reward = open_reward_model(config.reward, config.model, platform_of(mesh), tokenizer, date)
        prompts = read_prompts(config, tokenizer)
        end_ids = stop_tokens(policy.source, tokenizer, [prompt.tokenized.tail for prompt in prompts])
        announce(config, policy, tokenizer, prompts, end_ids)
        params, reward_params = policy.load(mesh), {} if reward is None else reward.opened.load(mesh)
        identity = {
            "weights": weights_id(params),
            "reward": None if reward is None else weights_id(reward_params) + reward.reading,
            "tokenizer": tokenizer_hash(tokenizer),
            "template": tokenizer.chat_template,
            "prompts": prompts_hash(prompts),
            "ends": end_ids,
            "dtype": policy.model.dtype,
        }
        environment = {"platform": jax.default_backend(), "devices": jax.device_count()}
        manifest = make_manifest(asdict(config), identity, environment)
        num_done, rounding_lines = hosts.on_writer(partial(file.resume, manifest, len(prompts)), "output")
        if 0 < num_done < len(prompts):
            say(config.run.progress, f"resuming from prompt {num_done} of {len(prompts)}")
            for line in rounding_lines:
                say(config.run.progress, f"log-probs and scores are reproduced only within rounding: {line}")
        if num_done < len(prompts):
            scores = None
            if reward is not None:
                answer_scores = make_answer_scores(reward.opened.model, reward_params, mesh)
                scores = partial(score_answers, reward.read_answer, answer_scores)
            answer_column = make_answer_column(config, policy, params, tokenizer, end_ids, mesh, scores)
            del params
            for rows in answered_blocks(config, prompts, num_done, answer_column):
                hosts.on_writer(partial(file.append, rows), "output")
        if hosts.is_writer():
            finish(config, file)


def open_policy(config: GenerateConfig, mesh: Mesh) -> OpenModel:
    """Open the language model that generates the answers.

    Raises:
        UserError: it is a reward model, or has no experts for mesh axis `expert`.
    """
    policy = open_model(config.model, platform_of(mesh))
    refuse_reward_model(policy.model, config.model.path)
    refuse_expert_axis(policy.model.config, mesh)
    return policy


def read_prompts(config: GenerateConfig, tokenizer: Any) -> list[Prompt]:
    """Read and tokenize every prompt.

    Raises:
        UserError: the file cannot be read, or a row cannot be used; none is dropped, as answers stand in file order.
    """
    source = open_source(config.prompts, 0, "prompts")
    tokenize = make_tokenize_prompt(config.data.template_date, tokenizer)
    for hint in source.hints:
        say(config.run.progress, f"note: {source.label}: {hint}")

    def read(row: int) -> Prompt:
        problem = example = source.parse(row, source.rows[row])
        if isinstance(example, Example):
            try:
                problem = tokenized = tokenize(example)
            except UserError as error:
                raise UserError(f"{source.label}, {error}") from None
            if isinstance(tokenized, TokenizedPrompt):
                return Prompt(example, tokenized)
        assert isinstance(problem, Problem)
        raise UserError(
            f"{source.label}, row {row}: {problem.cause.replace('_', ' ')}: {problem.detail}; fix or remove the row"
        )

    return [read(row) for row in range(len(source.rows))]


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """Return a hash of the parts of the prompts that the output depends on."""
    content = [[prompt.columns, prompt.tokenized.tokens, prompt.tokenized.tail] for prompt in prompts]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def announce(
    config: GenerateConfig, policy: OpenModel, tokenizer: Any, prompts: Sequence[Prompt], ends: Sequence[int]
) -> None:
    """Print the sizes of model and prompts, the end tokens, and notes on options that may have unexpected effects."""
    lengths = [len(prompt.tokenized.tokens) for prompt in prompts]
    length_range = f"{min(lengths)} to {max(lengths)}" if min(lengths) < max(lengths) else max(lengths)
    end_names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(ends))) or "no token"
    lines = [
        f"model: {config.model.path}, {count_params(policy.model):,} parameters, {policy.model.dtype}",
        f"prompts: {len(prompts)} of {length_range} tokens",
        f"answers: {config.n} to each prompt; they end at {end_names}, or after {config.sampling.max_tokens} tokens",
    ]
    longest = max(lengths) + config.sampling.max_tokens
    refuse_positions(policy.model.config, longest, "sampling.max_tokens", config.sampling.max_tokens)
    positions = context_length(policy.source.hf_config) or longest
    if longest > positions:
        limit = f"but the model supports {positions} (max_position_embeddings)"
        lines.append(f"note: a prompt with its answer has up to {longest} tokens, {limit}: lower sampling.max_tokens")
    if tokenizer.chat_template is not None and all(isinstance(prompt.example.prompt, str) for prompt in prompts):
        remedy = "to use it, give messages, or rename the text column to instruction with prompts.columns"
        lines.append(f"note: the prompts are text, so the chat template is not used; {remedy}")
    for line in lines:
        say(config.run.progress, line)


def make_answer_column(
    config: GenerateConfig,
    policy: OpenModel,
    params: Params,
    tokenizer: Any,
    ends: Sequence[int],
    mesh: Mesh,
    scores: Callable[[Sequence[Prompt], Sequence[Answer]], list[float]] | None,
) -> AnswerColumn:
    """Return a function that generates answer number ``index`` to each of several consecutive prompts."""
    weights = rollout_weights(policy.model, params, mesh)

    def answer_column(prompts: Sequence[Prompt], first_row: int, index: int) -> list[Row]:
        tokens = [prompt.tokenized.tokens for prompt in prompts]
        answers = generate(
            policy.model,
            weights,
            tokens,
            config.sampling,
            mesh,
            end_ids=ends or NO_END,
            seed=config.run.seed,
            step=index,
            first_row=first_row,
        )
        column = [answer_fields(tokenizer, *each) for each in zip(tokens, answers, strict=True)]
        if scores is not None:
            for fields, score in zip(column, scores(prompts, answers), strict=True):
                fields["score"] = round(score, SCORE_DECIMALS)
        for row, fields in enumerate(column, start=first_row):
            if not all(map(math.isfinite, (fields["logp"], fields.get("score", 0.0)))):
                raise RunStopped(f"answer {index} to row {row}: its log-prob or score is not finite: check the weights")
        return column

    return answer_column


def score_answers(
    read_answer: ReadAnswer, answer_scores: AnswerScores, prompts: Sequence[Prompt], answers: Sequence[Answer]
) -> list[float]:
    """Score an answer to each prompt."""
    pairs = [
        read_answer(prompt.tokenized, answer, lambda prompt=prompt: prompt.example)
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    return answer_scores([prompt for prompt, _ in pairs], [answer for _, answer in pairs])


def answer_fields(tokenizer: Any, prompt: list[int], answer: Answer) -> Row:
    """Return an answer's fields in the output, except its score."""
    return {
        "text": answer.text(tokenizer, prompt),
        "num_tokens": len(answer.tokens),
        "logp": round(math.fsum(answer.logps), LOGP_DECIMALS),
        "finish_reason": answer.finish_reason,
    }


def answered_blocks(
    config: GenerateConfig, prompts: Sequence[Prompt], done: int, answer_column: AnswerColumn
) -> Iterator[list[Row]]:
    """Generate answers block by block, and yield the rows of each block of prompts, starting at row ``done``.

    Blocks start at multiples of their size, also on resume, and all have this size: a repeated block has the same bits.
    """
    size = min(config.batch.size, len(prompts))
    total, start = len(prompts) * config.n, done // size * size
    with progress_line(done * config.n, total, " answers", config.run.progress and hosts.is_writer()) as progress:
        for first in range(start, len(prompts), size):
            block = prompts[first : first + size]
            full_block = [*block, *[block[0]] * (size - len(block))]
            columns = []
            for index in range(config.n):
                columns.append(answer_column(full_block, first, index)[: len(block)])
                progress.update(len(block) - max(0, done - first))
            answers = map(list, zip(*columns, strict=True))
            rows = [
                {"row": row, **prompt.columns, "answers": column}
                for row, prompt, column in zip(range(first, len(prompts)), block, answers, strict=False)
            ]
            yield rows[max(0, done - first) :]


def finish(config: GenerateConfig, file: AnswerFile) -> None:
    """Write the rows that ``config.pairs`` asks for, and print a summary of the output."""
    print_line, max_tokens = partial(say, config.run.progress), config.sampling.max_tokens
    by_prompt = [row["answers"] for row in file.rows()]
    answers = [answer for answers in by_prompt for answer in answers]
    mean_tokens = fmean(answer["num_tokens"] for answer in answers)
    num_cut = sum(answer["finish_reason"] == "length" for answer in answers)
    summary = f"{len(answers)} of {mean_tokens:.1f} tokens on average, {num_cut} of them cut at {max_tokens}"
    if config.reward.path is not None:
        best_scores = [max(answer["score"] for answer in answers) for answers in by_prompt]
        summary += f"; mean score {fmean(answer['score'] for answer in answers):.4g}"
        summary += f", of the best of {config.n} {fmean(best_scores):.4g}" * (config.n > 1)
    print_line(f"answers: {file.location(file.path)}: {summary}")
    if config.pairs is None:
        return
    path, ranking = file.beside(f".{config.pairs}.jsonl"), rank(file.rows(), config.pairs)
    with writing(path):
        write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ranking.rows))
    if ranking.num_cut:
        cut_note = f"{ranking.num_cut} of the best answers were cut at {max_tokens} tokens; training ends them there"
        print_line(f"note: {cut_note}: raise sampling.max_tokens")
    print_line(f"{config.pairs}: {file.location(path)}: {ranking.summary}")
