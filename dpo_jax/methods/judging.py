"""Judge policies by one answer to each evaluation prompt: always the same prompts, with the same sampling keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from dpo_jax.batch import Params
from dpo_jax.config import JudgeConfig, ModelConfig
from dpo_jax.data.tokenizer import tokenizer_hash
from dpo_jax.inference.answer_scores import SCORE_DECIMALS
from dpo_jax.inference.generate import rollout_weights
from dpo_jax.methods.on_policy import AnswerEvaluation, eval_answers
from dpo_jax.methods.rollouts import EVALUATION, Graded, Judge, Sampler, answer_tail, make_judge, make_sampler
from dpo_jax.methods.setup import Setup, load_policy
from dpo_jax.weights.open import find_model, load_weights

Answers = Mapping[str, list[Graded]]  # by evaluation set; one entry per batch


class Judged(NamedTuple):
    """Answers to the prompts of an evaluation set, and their metrics."""

    answers: list[Graded]  # one entry per batch
    values: dict[str, np.ndarray]  # by metric, each [prompts]


@dataclass(frozen=True)
class Judging:
    """Judges policies against the initial policy, the baseline of `sampled_kl` and `win_rate`."""

    name: str  # of the evaluation set
    setup: Setup
    start: Params
    sampler: Sampler
    evaluation: AnswerEvaluation

    @property
    def start_answers(self) -> Answers:
        """The answers of the initial policy."""
        return self.evaluation.reference_answers

    def judge_start(self) -> Judged:
        """Return the metrics of the initial policy's answers."""
        answers = self.start_answers[self.name]
        return Judged(answers, self.evaluation.of_answers(self.name, answers))

    def judge_run(self, path: str, learned: JudgeConfig | None) -> Judged:
        """Judge a run's newest checkpoint; also score its and the initial policy's answers by ``learned``, if given."""
        setup, name = self.setup, self.name
        options = ModelConfig(path=path, param_dtype=setup.config.model.param_dtype)
        weights = load_weights(find_model(path, None), setup.model, options, setup.mesh)
        answers = eval_answers(setup, self.sampler, weights)[name]
        log_ratios = self.evaluation.log_ratios(name, answers, weights, self.start)
        values = self.evaluation.of_answers(name, answers, log_ratios)
        if learned is not None:
            del weights
            judge, _ = make_judge(setup, learned, answer_tail(setup))
            values["learned"] = self._scores(judge, answers)
            values["start_learned"] = self._scores(judge, self.start_answers[name])
        return Judged(answers, values)

    def _scores(self, judge: Judge, answers: Sequence[Graded]) -> np.ndarray:
        batches = self.setup.evals[self.name]
        ids = [batches.order.step_ids(step) for step in range(len(answers))]
        id_answers = zip(ids, answers, strict=True)
        return np.concatenate([judge(batches.store, i[i >= 0], g.prompts, g.answers).ravel() for i, g in id_answers])

    def best_of(self, counts: Sequence[int]) -> dict[int, Judged]:
        """Return, for each count n, the highest-scoring of n answers of the initial policy to each prompt."""
        if not counts:
            return {}
        batches, weights = self.setup.evals[self.name], rollout_weights(self.setup.model, self.start, self.setup.mesh)
        num_steps = batches.order.num_steps
        draws = []  # per batch, Graded with all answers
        for step in range(num_steps):
            ids = batches.order.step_ids(step)
            # keys of their own; draw by draw, so that memory does not grow with the number of answers
            keys = [EVALUATION - step - num_steps * (draw + 1) for draw in range(max(counts))]
            draws.append(_joined([self.sampler(weights, batches.store, ids[ids >= 0], key) for key in keys]))
        best_answers = {}
        for count in counts:
            answers = [graded.take(graded.scores[:, :count].argmax(1)[:, None]) for graded in draws]
            best_answers[count] = Judged(answers, self.evaluation.of_answers(self.name, answers))
        return best_answers

    def texts(self, judged: Judged) -> list[dict[str, Any]]:
        """Return the text, score, length and finish reason of each answer."""
        answers = [
            (prompt, answer)
            for graded in judged.answers
            for prompt, (answer,) in zip(graded.prompts, graded.answers, strict=True)
        ]
        scores = judged.values["score"].tolist()
        return [
            {**answer.fields(self.setup.tokenizer, prompt), "score": round(score, SCORE_DECIMALS)}
            for (prompt, answer), score in zip(answers, scores, strict=True)
        ]

    def prompts(self) -> list[dict[str, Any]]:
        """Return the text of each prompt, and its row in the data."""
        batches, tokenizer, rows = self.setup.evals[self.name], self.setup.tokenizer, []
        for step, graded in enumerate(self.start_answers[self.name]):
            ids = batches.order.step_ids(step)
            for i, prompt in zip(ids[ids >= 0], graded.prompts, strict=True):
                text = tokenizer.decode(prompt, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                rows.append({"row": int(batches.store.rows[i]), "prompt": text})
        return rows


def _joined(draws: Sequence[Graded]) -> Graded:
    """Return one `Graded` with the answers of several draws to the same prompts."""
    answers = [[row[0] for row in rows] for rows in zip(*(draw.answers for draw in draws), strict=True)]
    return Graded(draws[0].prompts, answers, np.concatenate([draw.scores for draw in draws], axis=1))


def open_judging(setup: Setup, reward: JudgeConfig, start_answers: Answers | None = None) -> tuple[Judging, dict]:
    """Load the initial policy and the judge; also return what identifies models and data, for a manifest.

    ``setup``: that of a run on prompts, with one evaluation set. The policy's answers are sampled if
    ``start_answers`` is None.

    Raises:
        UserError: the judge cannot be used, or no token ends an answer.
    """
    (name,) = setup.evals
    policy = load_policy(setup)
    sampler, ids = make_sampler(setup, 1, reward)
    if reward.function is not None:
        del ids["reward"]  # which is the option itself
    if start_answers is None:
        start_answers = eval_answers(setup, sampler, policy.weights)
    identity = policy.ids | ids | {
        "tokenizer": tokenizer_hash(setup.tokenizer),
        "template": getattr(setup.tokenizer, "chat_template", None),
        "store": setup.batches.store.key,
        "prompts": setup.evals[name].store.key,
        "dtype": setup.model.dtype,
    }  # fmt: skip
    return Judging(name, setup, policy.weights, sampler, AnswerEvaluation(setup, sampler, start_answers)), identity
