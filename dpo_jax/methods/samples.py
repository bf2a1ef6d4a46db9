"""Samples of an evaluation: answers to a few of its prompts, so that a reader sees what training changes.

Keys are those of evaluation at every step, so two answers of equal weights are equal, and a resumed run samples the
same ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from dpo_jax.batch import Adapted, Params
from dpo_jax.batching.batches import Batches
from dpo_jax.inference.generate import NO_END, Answer, generate, rollout_weights
from dpo_jax.methods.rollouts import EVALUATION, Judge, answer_tail, prompt_tokens
from dpo_jax.methods.setup import Setup
from dpo_jax.models.decoder import Model
from dpo_jax.weights.reward_model import stop_tokens

MAX_ROWS = 32  # answers sampled at once; they do not depend on it
SCORE_DECIMALS = 6  # later digits of a float32 depend on the batch
Row = dict[str, Any]


class Questions(NamedTuple):
    """The prompts of an evaluation set that are answered."""

    batches: Batches
    ids: np.ndarray  # [n]
    prompts: list[list[int]]


@dataclass(frozen=True)
class Respondent:
    """Answers the first different prompts of each evaluation set, with any weights of a language model."""

    setup: Setup
    model: Model
    questions: Mapping[str, Questions]  # by the set's name
    end_ids: Sequence[int]

    def __call__(self, weights: Params | Adapted) -> dict[str, list[Answer]]:
        """Return an answer to each question of each set."""
        copied = rollout_weights(self.model, weights, self.setup.mesh)
        return {name: list(self._answers(copied, questions.prompts)) for name, questions in self.questions.items()}

    def _answers(self, weights: Any, prompts: list[list[int]]) -> Iterator[Answer]:
        config = self.setup.config
        sample = partial(generate, self.model, weights, end_ids=self.end_ids, seed=config.run.seed, step=EVALUATION)
        num_rows = min(MAX_ROWS, len(prompts))
        for first in range(0, len(prompts), num_rows):
            block = prompts[first : first + num_rows]
            full_block = [*block, *[block[0]] * (num_rows - len(block))]  # so that the program has one shape
            answers = sample(prompts=full_block, options=config.sampling, mesh=self.setup.mesh, first_row=first)
            yield from answers[: len(block)]

    def rows(self) -> Iterator[Row]:
        """Yield a row for each question: its set, its row in the data, and its text."""
        for name, (batches, ids, prompts) in self.questions.items():
            store = batches.store
            for i, prompt in zip(ids, prompts, strict=True):
                source = store.report[store.sources[i]]["source"]
                text = self.setup.tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                yield {"set": name, "source": source, "row": int(store.rows[i]), "prompt": text}

    def fields(self, answers: Mapping[str, list[Answer]]) -> Iterator[Row]:
        """Yield the answer to each question as it is written."""
        for name, (_, _, prompts) in self.questions.items():
            for prompt, answer in zip(prompts, answers[name], strict=True):
                text, finish = answer.text(self.setup.tokenizer, prompt), "stop" if answer.ended else "length"
                yield {"text": text, "num_tokens": len(answer.tokens), "finish_reason": finish}


def make_respondent(setup: Setup, model: Model) -> Respondent | None:
    """Return what answers evaluation prompts, or None if ``run.samples`` is 0 or there is no evaluation set."""
    num_samples = setup.config.run.samples
    if not num_samples or not setup.evals:
        return None
    questions = {name: first_questions(batches, num_samples) for name, batches in setup.evals.items()}
    end_ids = stop_tokens(setup.source, setup.tokenizer, [answer_tail(setup)]) or NO_END
    return Respondent(setup, model, questions, end_ids)


def first_questions(batches: Batches, count: int) -> Questions:
    """Return the first different prompts of an evaluation set, at most ``count``."""
    by_prompt: dict[tuple[int, ...], int] = {}
    for i in np.concatenate(batches.order.groups).tolist():
        by_prompt.setdefault(tuple(prompt_tokens(batches.store, i)), i)
        if len(by_prompt) == count:
            break
    return Questions(batches, np.array(list(by_prompt.values())), list(map(list, by_prompt)))


@dataclass(frozen=True)
class Samples:
    """Answers of the policy, next to those of the model that it is compared with."""

    respondent: Respondent
    compared: Literal["reference", "start"]
    answers: Mapping[str, list[Answer]] | None  # of the compared model; None: the reference moves
    judge: Judge | None = None  # scores all answers

    def rows(self, weights: Params | Adapted, reference: Params | None = None) -> list[Row]:
        """Return a row for each question; ``reference``: the weights of one that moves."""
        compared = self.respondent(reference) if self.answers is None else self.answers
        columns = [self._fields(answers) for answers in (self.respondent(weights), compared)]
        return [
            row | {"policy": policy, self.compared: other}
            for row, policy, other in zip(self.respondent.rows(), *columns, strict=True)
        ]

    def _fields(self, answers: Mapping[str, list[Answer]]) -> list[Row]:
        fields = list(self.respondent.fields(answers))
        if self.judge is None:
            return fields
        scores = [
            self.judge(batches.store, ids, prompts, [[answer] for answer in answers[name]])
            for name, (batches, ids, prompts) in self.respondent.questions.items()
        ]
        flat = np.concatenate(scores).ravel().tolist()
        return [row | {"score": round(score, SCORE_DECIMALS)} for row, score in zip(fields, flat, strict=True)]


def make_samples(
    setup: Setup, compared: Literal["reference", "start"], weights: Params | Adapted | None, judge: Judge | None = None
) -> Samples | None:
    """Return what samples answers at every evaluation, or None; ``weights``: None for a reference that moves."""
    respondent = make_respondent(setup, setup.model)
    if respondent is None:
        return None
    return Samples(respondent, compared, None if weights is None else respondent(weights), judge)
