"""Samples of an evaluation: answers to a few of its prompts, so that a reader can see what training changes.

Keys are those of evaluation at every step, so two answers of equal weights are equal, and a resumed run samples the
same ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_jax.batch import Adapted, Params
from dpo_jax.batching.batches import Batches
from dpo_jax.errors import require
from dpo_jax.inference.answer_scores import SCORE_DECIMALS, make_answer_scores
from dpo_jax.inference.generate import NO_END, Answer, generate, rollout_weights
from dpo_jax.methods.rollouts import EVALUATION, Judge, answer_tail, prompt_tokens
from dpo_jax.methods.setup import Setup
from dpo_jax.models.decoder import Model
from dpo_jax.weights.open import decoder_of, load_weights
from dpo_jax.weights.reward_model import stop_tokens, with_tail

MAX_ROWS = 32  # answers sampled at once; they do not depend on it
Row = dict[str, Any]


class SamplePrompts(NamedTuple):
    """The prompts of an evaluation set to which answers are sampled."""

    batches: Batches
    ids: np.ndarray  # [n]
    prompts: list[list[int]]


@dataclass(frozen=True)
class PromptAnswerer:
    """Answers the first distinct prompts of each evaluation set, with any weights of a language model."""

    setup: Setup
    model: Model
    sets: Mapping[str, SamplePrompts]  # by the set's name
    end_ids: Sequence[int]

    def __call__(self, weights: Params | Adapted) -> dict[str, list[Answer]]:
        """Return an answer to each prompt of each set."""
        rollout_copy = rollout_weights(self.model, weights, self.setup.mesh)
        return {
            name: list(self._answers(rollout_copy, sample.prompts))[: len(sample.prompts)]
            for name, sample in self.sets.items()
        }

    def _answers(self, weights: Any, prompts: list[list[int]]) -> Iterator[Answer]:
        config = self.setup.config
        sample = partial(generate, self.model, weights, end_ids=self.end_ids, seed=config.run.seed, step=EVALUATION)
        for first, block in blocks(prompts):
            yield from sample(prompts=block, options=config.sampling, mesh=self.setup.mesh, first_row=first)

    def rows(self) -> Iterator[Row]:
        """Yield a row for each prompt: its set, its row in the data, and its text."""
        for name, (batches, ids, prompts) in self.sets.items():
            store = batches.store
            for i, prompt in zip(ids, prompts, strict=True):
                source = store.report[store.sources[i]]["source"]
                text = self.setup.tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                yield {"set": name, "source": source, "row": int(store.rows[i]), "prompt": text}

    def fields(self, answers: Mapping[str, list[Answer]]) -> Iterator[Row]:
        """Yield the fields of samples.jsonl that describe the answer to each prompt."""
        for name, (_, _, prompts) in self.sets.items():
            for prompt, answer in zip(prompts, answers[name], strict=True):
                yield answer.fields(self.setup.tokenizer, prompt)


def blocks(items: Sequence[Any]) -> Iterator[tuple[int, list[Any]]]:
    """Yield (first index, items) of consecutive blocks of equal length, so that one program serves all of them.

    Repetitions of an item fill the last list.
    """
    size = min(MAX_ROWS, len(items))
    for first in range(0, len(items), size):
        block = list(items[first : first + size])
        yield first, block + block[:1] * (size - len(block))


def make_answerer(setup: Setup, model: Model) -> PromptAnswerer | None:
    """Return the `PromptAnswerer` of a run, or None if ``run.samples`` is 0 or there is no evaluation set."""
    num_samples = setup.config.run.samples
    if not num_samples or not setup.evals:
        return None
    sets = {name: first_prompts(batches, num_samples) for name, batches in setup.evals.items()}
    end_ids = stop_tokens(setup.source, setup.tokenizer, [answer_tail(setup)]) or NO_END
    return PromptAnswerer(setup, model, sets, end_ids)


def first_prompts(batches: Batches, count: int) -> SamplePrompts:
    """Return the first distinct prompts of an evaluation set, at most ``count``."""
    by_prompt: dict[tuple[int, ...], int] = {}
    for i in np.concatenate(batches.order.groups).tolist():
        by_prompt.setdefault(tuple(prompt_tokens(batches.store, i)), i)
        if len(by_prompt) == count:
            break
    return SamplePrompts(batches, np.array(list(by_prompt.values())), list(map(list, by_prompt)))


@dataclass(frozen=True)
class Samples:
    """Answers of the policy, next to those of the model that it is compared with."""

    answerer: PromptAnswerer
    judge: Judge | None  # scores all answers
    compared: Literal["reference", "start"]
    compared_fields: list[Row] | None  # None: the reference moves

    def evaluate(
        self, weights: Params | Adapted, reference: Params | None = None
    ) -> tuple[dict[str, float], list[Row]]:
        """Return no metrics, and a row for each prompt; ``reference``: the current weights of a moving reference."""
        compared_fields = self.compared_fields
        if compared_fields is None:
            compared_fields = answer_fields(self.answerer, self.judge, reference)
        columns = self.answerer.rows(), answer_fields(self.answerer, self.judge, weights), compared_fields
        return {}, [
            row | {"policy": policy, self.compared: compared} for row, policy, compared in zip(*columns, strict=True)
        ]


def answer_fields(answerer: PromptAnswerer, judge: Judge | None, weights: Params | Adapted) -> list[Row]:
    """Answer each prompt; return the fields of samples.jsonl for the answers, with the judge's scores, if any."""
    answers = answerer(weights)
    fields = list(answerer.fields(answers))
    if judge is None:
        return fields
    scores = [
        judge(batches.store, ids, prompts, [[answer] for answer in answers[name]])
        for name, (batches, ids, prompts) in answerer.sets.items()
    ]
    flat_scores = np.concatenate(scores).ravel().tolist()
    return [row | {"score": round(score, SCORE_DECIMALS)} for row, score in zip(fields, flat_scores, strict=True)]


def make_samples(
    setup: Setup, compared: Literal["reference", "start"], weights: Params | Adapted | None, judge: Judge | None = None
) -> Samples | None:
    """Return a run's `Samples`, or None without prompts; ``weights``: None if the reference follows the policy."""
    answerer = make_answerer(setup, setup.model)
    if answerer is None:
        return None
    fields = None if weights is None else answer_fields(answerer, judge, weights)
    return Samples(answerer, judge, compared, fields)


@dataclass(frozen=True)
class StartAnswers:
    """Answers of the language model that a reward model starts from; the reward model scores them at evaluations.

    Mean and deviation of these scores are what a policy gradient from the same model begins with.
    """

    answerer: PromptAnswerer
    answers: Mapping[str, list[Answer]]
    tail: list[int]  # what training puts after the text of an answer

    def evaluate(self, weights: Params | Adapted, _: Params | None) -> tuple[dict[str, float], list[Row]]:
        """Return mean and standard deviation of the scores of each set, and a row for each prompt."""
        metrics, scores = {}, []
        for name, (_, _, prompts) in self.answerer.sets.items():
            values = self._scores(weights, prompts, self.answers[name])
            metrics |= {f"eval_{name}_samples/score_mean": float(values.mean())}
            metrics |= {f"eval_{name}_samples/score_std": float(values.std())}
            scores += values.tolist()
        columns = self.answerer.rows(), self.answerer.fields(self.answers), scores
        return metrics, [
            row | {"start": fields | {"score": round(score, SCORE_DECIMALS)}}
            for row, fields, score in zip(*columns, strict=True)
        ]

    def _scores(self, weights: Params | Adapted, prompts: list[list[int]], answers: list[Answer]) -> np.ndarray:
        answer_scores = make_answer_scores(self.answerer.setup.model, weights, self.answerer.setup.mesh)
        tokens = [with_tail(answer.tokens, answer.ended, self.tail) for answer in answers]
        scores: list[float] = []
        for _, block in blocks(list(zip(prompts, tokens, strict=True))):
            scores += answer_scores(*zip(*block, strict=True))
        return np.array(scores[: len(prompts)])


def make_start_answers(setup: Setup) -> StartAnswers | None:
    """Sample answers of the language model that the reward model starts from; return None without prompts.

    Raises:
        UserError: the run starts from a reward model.
    """
    num_samples, model = setup.config.run.samples, setup.model
    require(
        not (num_samples and decoder_of(setup.source).scores),
        "run.samples",
        num_samples,
        "model.path is a reward model, which cannot generate answers to score; use 0",
    )
    language_model = replace(model, config=replace(model.config, scores=0), lora=None)
    answerer = make_answerer(setup, language_model)
    if answerer is None:
        return None
    weights = load_weights(setup.source, language_model, setup.config.model, setup.mesh)
    return StartAnswers(answerer, answerer(weights), answer_tail(setup))
