"""Rollouts: answers that the policy samples to the prompts of a step, their scores, and their packed rows.

A rollout is a pure function of (data, seed, step, weights), so a resumed run samples the same answers.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dpo_jax.batch import Adapted, Params
from dpo_jax.batching.batches import Batches, StepData
from dpo_jax.config import JudgeConfig
from dpo_jax.data.schemas import Example
from dpo_jax.data.store import Source, Store, open_source
from dpo_jax.data.tokenize import TokenizedPrompt, make_tokenize_prompt
from dpo_jax.errors import UserError, from_outside, require
from dpo_jax.inference.answer_scores import make_answer_scores
from dpo_jax.inference.generate import Answer, generate
from dpo_jax.methods.setup import Setup
from dpo_jax.models.families import refuse_positions
from dpo_jax.parallel import hosts
from dpo_jax.parallel.sharding import local_mesh, platform_of
from dpo_jax.policy_gradient import Rollout
from dpo_jax.runs.checksums import weights_id
from dpo_jax.weights.reward_model import open_reward_model, stop_tokens

EVALUATION = 2**31 - 1  # in place of a step, for the keys of answers to evaluation prompts


class Graded(NamedTuple):
    """Answers to B prompts, K to each, and the score of every answer."""

    prompts: list[list[int]]
    answers: list[list[Answer]]
    scores: np.ndarray  # [B, K] float32

    @property
    def num_tokens(self) -> np.ndarray:
        """Number of tokens of each answer, [B, K]."""
        return np.array([[len(answer.tokens) for answer in answers] for answers in self.answers])

    @property
    def ended(self) -> np.ndarray:
        """Whether each answer has an end token, [B, K]."""
        return np.array([[answer.ended for answer in answers] for answers in self.answers])

    @property
    def sampled_sums(self) -> np.ndarray:
        """Log-prob of each answer as the sampler computed it, [B, K]."""
        sums = [[sum(answer.logps) for answer in answers] for answers in self.answers]
        return np.array(sums, np.float32)

    def take(self, indices: np.ndarray) -> "Graded":
        """Return the answers at ``indices`` [B, K'], so that each prompt has K'."""
        answers = [[row[i] for i in chosen] for row, chosen in zip(self.answers, indices.tolist(), strict=True)]
        return Graded(self.prompts, answers, np.take_along_axis(self.scores, indices, axis=1))

    def sampled_logps(self, max_tokens: int) -> np.ndarray:
        """Log-probs of the tokens as the sampler computed them, [B, K, N]; 0 after the end."""
        logps = np.zeros((*self.scores.shape, max_tokens), np.float32)
        for index in np.ndindex(self.scores.shape):
            values = self.answers[index[0]][index[1]].logps
            logps[index][: len(values)] = values
        return logps


Judge = Callable[[Store, np.ndarray, list[list[int]], list[list[Answer]]], np.ndarray]
"""(store, ids [B], prompts, answers to each) -> scores [B, K]."""


@dataclass(frozen=True)
class Sampler:
    """Samples and scores answers with the weights of a step."""

    setup: Setup
    num_answers: int  # to each prompt
    judge: Judge
    end_ids: Sequence[int]

    def with_one_answer(self) -> "Sampler":
        """Return a sampler of one answer to each prompt."""
        return replace(self, num_answers=1)

    def __call__(self, weights: Params | Adapted, store: Store, ids: np.ndarray, step: int) -> Graded:
        """Sample and score the policy's answers to the prompts ``ids`` [B]; ``weights`` come from `rollout_weights`."""
        setup, num_answers = self.setup, self.num_answers
        prompts = [prompt_tokens(store, i) for i in ids]
        repeated = [prompt for prompt in prompts for _ in range(num_answers)]
        answers = generate(
            setup.model,
            weights,
            repeated,
            setup.config.sampling,
            setup.mesh,
            end_ids=self.end_ids,
            seed=setup.config.run.seed,
            step=step,
        )
        per_prompt = [answers[i : i + num_answers] for i in range(0, len(answers), num_answers)]
        return Graded(prompts, per_prompt, self.judge(store, ids, prompts, per_prompt))


def make_sampler(setup: Setup, num_answers: int, reward: JudgeConfig) -> tuple[Sampler, dict[str, str]]:
    """Return the sampler and, for the manifest, the identities of the judge and of the end tokens.

    Raises:
        UserError: the reward model or the function cannot be used, or no token ends an answer.
    """
    tail = answer_tail(setup)
    end_ids = end_ids_of(setup, tail)
    judge, judge_id = make_judge(setup, reward, tail)
    return Sampler(setup, num_answers, judge, end_ids), {"reward": judge_id, "ends": str(end_ids)}


def prompt_tokens(store: Store, i: int | np.integer) -> list[int]:
    """Return the tokens of a prompt."""
    return store.tokens[store.starts[i] : store.starts[i] + store.lengths[i, 0]].tolist()


def in_slots(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Put the values of real prompts into the slots of a step; padding slots, with -1 in ``ids`` [B], are 0."""
    slots = np.zeros((len(ids), *values.shape[1:]), values.dtype)
    slots[ids >= 0] = values
    return slots


def pack_answers(batches: Batches, step: int, ids: np.ndarray, graded: Graded) -> StepData:
    """Pack answers into the rows of a step; ``ids`` [B] is -1 in empty slots, for which ``graded`` has no answers."""
    index = np.cumsum(ids >= 0) - 1  # in graded

    def example(slot: int) -> Any:
        answers = tuple(np.array(answer.tokens, np.int32) for answer in graded.answers[index[slot]])
        return np.array(graded.prompts[index[slot]], np.int32), answers, None

    num_tokens = in_slots(ids, graded.num_tokens)
    prompts = in_slots(ids, np.array([len(prompt) for prompt in graded.prompts]))
    return batches.pack(step, ids, np.concatenate([prompts[:, None], num_tokens], axis=1), num_tokens, example)


def make_rollout(ids: np.ndarray, graded: Graded, max_tokens: int, accumulation: int) -> Rollout:
    """Return the `Rollout` of a step on the host, still without its packed rows."""
    per_slot = {
        "mask": np.arange(max_tokens) < graded.num_tokens[..., None],
        "ended": graded.ended,
        "scores": graded.scores,
        "sampled_logps": graded.sampled_logps(max_tokens),
    }
    split = lambda x: x.reshape(accumulation, -1, *x.shape[1:])  # noqa: E731
    return Rollout(inputs=None, **{name: split(in_slots(ids, values)) for name, values in per_slot.items()})


def answer_tail(setup: Setup) -> list[int]:
    """Return the tokens that training puts after the text of an answer: EOS, or what the chat template writes.

    The latter counts if any data set has messages.

    Raises:
        UserError: the chat template cannot render a single message of a user.
    """
    stores = [setup.batches.store, *(batches.store for batches in setup.evals.values())]
    rendered = any(source["rendered"] for store in stores for source in store.report)
    prompt: Any = [{"role": "user", "content": "a"}] if rendered else "a"
    tokenized = make_tokenize_prompt(setup.config.data.template_date, setup.tokenizer)(Example(0, prompt, ()))
    if not isinstance(tokenized, TokenizedPrompt):
        raise UserError(f"data.chat_template: it cannot render a single user message: {tokenized.detail}; use another")
    return tokenized.tail


def end_ids_of(setup: Setup, tail: list[int]) -> list[int]:
    """Return the tokens that end an answer.

    Raises:
        UserError: the tokenizer has none.
    """
    end_ids = stop_tokens(setup.source, setup.tokenizer, [tail])
    require(bool(end_ids), "model.tokenizer", setup.config.model.path, "it has no end-of-sequence token to end answers")
    return end_ids


def make_judge(setup: Setup, config: JudgeConfig, tail: list[int]) -> tuple[Judge, str]:
    """Return the judge of the answers, and an identity that changes with it; ``tail`` comes from `answer_tail`.

    Raises:
        UserError: the reward model or the function cannot be used.
    """
    if config.function is not None:
        return _function_judge(setup, config.function, f"{config.section}.function"), config.function
    tokenizer, template_date = setup.tokenizer, setup.config.data.template_date
    reward = open_reward_model(config, setup.config.model, platform_of(setup.mesh), tokenizer, template_date)
    if reward.reads_tokens:  # an answer may end a turn after which the template writes more
        longest = setup.config.data.max_length + max(len(tail) - 1, 0)
        refuse_positions(reward.opened.model.config, longest, f"{config.section}.path", str(config.path))
    row_of = make_row_of(setup)
    weights = reward.opened.load(setup.mesh)
    answer_scores = make_answer_scores(reward.opened.model, weights, setup.mesh)

    def judge(store: Store, ids: np.ndarray, prompts: list[list[int]], answers: list[list[Answer]]) -> np.ndarray:
        def example(i: int) -> Example:
            source, row = row_of(store, i)
            parsed = source.parse(row, source.rows[row])
            if not isinstance(parsed, Example):
                problem = f"{parsed.detail}: the data changed since it was tokenized"
                raise UserError(f"{source.label}, row {row}: {problem}; restore it")
            return parsed

        def read_all() -> list[tuple[list[int], list[int]]]:
            each = zip(prompts, answers, ids, strict=True)
            read = reward.read_answer
            return [read(TokenizedPrompt(p, tail), answer, partial(example, i)) for p, row, i in each for answer in row]

        pairs = read_all() if reward.reads_tokens else hosts.on_writer(read_all, "answers")
        scores = answer_scores([prompt for prompt, _ in pairs], [answer for _, answer in pairs])
        refuse_not_finite(f"{config.section}.path", str(config.path), scores)
        return np.array(scores, np.float32).reshape(len(answers), -1)

    return judge, weights_id(weights) + reward.reading


def make_row_of(setup: Setup) -> Callable[[Store, int], tuple[Source, int]]:
    """Return a function that maps an example of a store to its source, which is opened once, and its row there."""
    source_of = cache(lambda key, index: open_source(setup.sources[key][index], index, setup.config.stage))
    return lambda store, i: (source_of(store.key, int(store.sources[i])), int(store.rows[i]))


def _function_judge(setup: Setup, name: str, option: str) -> Judge:
    """Return a judge that calls the Python function of ``option`` on the writer, once for all answers of a step."""
    module, _, attribute = name.partition(":")
    remedy = "install its module or set PYTHONPATH to its folder, and name a function in it"
    with from_outside(f"{option}: {name} cannot be imported", remedy):
        function = getattr(importlib.import_module(module), attribute)
    decode = partial(setup.tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    row_of, mesh = make_row_of(setup), local_mesh()

    def judge(store: Store, ids: np.ndarray, prompts: list[list[int]], answers: list[list[Answer]]) -> np.ndarray:
        def call() -> list[float]:
            examples = [(p, i, answer) for p, i, row in zip(prompts, ids, answers, strict=True) for answer in row]
            texts = [answer.text(setup.tokenizer, prompt) for prompt, _, answer in examples]
            rows = [dict(source.rows[row]) for source, row in (row_of(store, i) for _, i, _ in examples)]
            with from_outside(f"{option}: {name} failed", "fix the function"), jax.set_mesh(mesh):
                scores = function([decode(prompt) for prompt, _, _ in examples], texts, rows)
            return checked_scores(option, name, scores, len(texts))

        return np.array(hosts.on_writer(call, "scores"), np.float32).reshape(len(answers), -1)

    return judge


def checked_scores(option: str, name: str, scores: Any, num_answers: int) -> list[float]:
    """Return the scores of the reward function ``name``, which ``option`` selects, as floats.

    Raises:
        UserError: they are not ``num_answers`` finite numbers.
    """
    with from_outside(f"{option}: {name} returned {type(scores).__name__}", "return a list of numbers"):
        numbers = [float(score) for score in scores]
    remedy = f"it returned {len(numbers)} scores for {num_answers} answers; return one score per answer"
    require(len(numbers) == num_answers, option, name, remedy)
    refuse_not_finite(option, name, numbers)
    return numbers


def refuse_not_finite(option: str, value: str, scores: Sequence[float]) -> None:
    """Raise ``UserError`` about ``option`` if a score is NaN or infinite."""
    wrong = next((i for i, score in enumerate(scores) if not math.isfinite(score)), None)
    if wrong is not None:
        raise UserError(option, value, f"score {wrong} is {scores[wrong]}; scores must be finite")
