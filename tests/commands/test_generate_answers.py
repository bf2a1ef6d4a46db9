"""Generated answers: what they are, that a stopped command resumes exactly, and that training reads the pairs."""

import json
import shutil
from pathlib import Path

import full_forward
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import num_lines, started, started_jointly
from small import HF_CONFIG, random_params
from small_tokenizer import CHAT_TEMPLATE, make_tokenizer

from dpo_jax import cli
from dpo_jax.commands import generate as module
from dpo_jax.config import DataConfig, GenerateConfig, MeshConfig, SourceConfig
from dpo_jax.config.file import parse_config
from dpo_jax.data.ranked import rank
from dpo_jax.data.store import build_or_open_store
from dpo_jax.data.tokenize import TokenizedPrompt
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.inference.answer_scores import make_answer_scores
from dpo_jax.inference.generate import Answer, generate, rollout_weights
from dpo_jax.models.decoder import Model, plain_batch
from dpo_jax.models.families import decoder_config
from dpo_jax.models.heads import reward_hf_config
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.runs.directory import read_json
from dpo_jax.weights.huggingface import export_params
from dpo_jax.weights.reward_model import with_tail

SIZES = HF_CONFIG | {"vocab_size": 264}  # 258 tokens, and six that stand for none
END, NEWLINE = 1, 2 + 198  # newline: the byte that the template writes after </s>
MORE_ENDS = list(range(20, 40))
PROMPTS = [  # of 17 to 32 tokens, for which one program is compiled
    {"prompt": "Once upon a time there was"},
    {"prompt": [{"role": "user", "content": "Hi"}]},
    {"prompt": [{"role": "user", "content": "Then?"}], "chat_template_kwargs": {"brief": True}},
    *({"prompt": f"{'so ' * (5 + i % 4)}{i}"} for i in range(7)),
]
TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = CHAT_TEMPLATE.replace("</s>", "</s>\n")


SEED = 14  # of the policy's weights: some answers end their turn, and each prompt has two that are not blank
POLICY, REWARD = (Model(config=decoder_config(hf), attention="xla") for hf in (SIZES, reward_hf_config(SIZES, 263)))


def save_model(folder: Path, model: Model, hf_config: dict, seed: int) -> None:
    params = jax.tree.map(jnp.asarray, random_params(model, seed))
    target = {"out_dir": folder, "source_dir": None, "overwrite": False}
    export_params(params, model, hf_config=hf_config, dtype="float32", **target)
    TOKENIZER.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a policy, a reward model, prompts, a config, and the answers of one command that ran through."""
    folder = tmp_path_factory.mktemp("made")
    save_model(folder / "policy", POLICY, SIZES, SEED)
    (folder / "policy" / "generation_config.json").write_text(json.dumps({"eos_token_id": MORE_ENDS}))
    save_model(folder / "reward", REWARD, reward_hf_config(SIZES, 263), 1)
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    config = {
        "model": {"path": str(folder / "policy")},
        "prompts": str(folder / "prompts.jsonl"),
        "n": 3,
        "reward": str(folder / "reward"),
        "sampling": {"max_tokens": 12, "temperature": 0.8, "top_p": 0.9},
        "batch": {"size": 4},
        "run": {"seed": 3, "progress": False},
    }
    (folder / "c.yaml").write_text(json.dumps(config))
    generated(folder, "whole.jsonl")
    return folder


def command(folder: Path, name: str, *options: str) -> list[str]:
    return ["generate", str(folder / "c.yaml"), "--output", str(folder / name), *options]


def generated(folder: Path, name: str, *options: str) -> list[dict]:
    assert cli.main(command(folder, name, *options)) == 0
    return read_json(folder / name)


def prompt_tokens(row: dict) -> list[int]:
    if isinstance(row["prompt"], str):
        return TOKENIZER(row["prompt"])["input_ids"]
    text = TOKENIZER.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_answers_log_probs_and_scores_are_those_of_full_forward_passes(made):
    """A draw depends on (seed, index of the answer, row); a score is read where training reads it, behind the turn."""
    rows, config = read_json(made / "whole.jsonl"), parse_config(made / "c.yaml", {}, GenerateConfig)
    mesh, params, reward_params = make_mesh(config.mesh), random_params(POLICY, SEED), random_params(REWARD, 1)
    weights = rollout_weights(POLICY, params, mesh)
    prompts, answers, sequences = [], [], []
    for row, columns in enumerate(PROMPTS):
        for index in range(3):
            prompts.append(prompt_tokens(columns))
            draw = {"end_ids": [END, *MORE_ENDS], "seed": 3, "step": index, "first_row": row}
            answers += generate(POLICY, weights, prompts[-1:], config.sampling, mesh, **draw)
            ends_turn = isinstance(columns["prompt"], list) and answers[-1].tokens[-1] == END
            sequences.append(prompts[-1] + answers[-1].tokens + [NEWLINE] * ends_turn)
    assert any(sequence[-1] == NEWLINE for sequence in sequences)
    lengths = np.array(list(map(len, sequences)))
    tokens = np.stack([np.pad(sequence, (0, 48 - len(sequence))) for sequence in sequences])
    logps = np.asarray(full_forward.log_probs(POLICY, params, tokens, lengths))
    hidden = np.asarray(jax.jit(REWARD.hidden)(reward_params, plain_batch(jnp.asarray(tokens), jnp.asarray(lengths))))
    scores = hidden[np.arange(len(tokens)), lengths - 1] @ np.asarray(reward_params["score"])[0]
    written = [answer for row in rows for answer in row["answers"]]
    for i, (prompt, answer, fields) in enumerate(zip(prompts, answers, written, strict=True)):
        sources = len(prompt) - 1 + np.arange(len(answer.tokens))
        content = answer.tokens[: -1 if answer.ended else None]
        assert fields == {
            "text": TOKENIZER.decode(content, skip_special_tokens=True),
            "num_tokens": len(answer.tokens),
            "logp": pytest.approx(logps[i, sources, answer.tokens].sum(), abs=2e-4),
            "finish_reason": "stop" if answer.ended else "length",
            "score": pytest.approx(scores[i], abs=2e-4),
        }
    assert [row["row"] for row in rows] == list(range(len(PROMPTS)))
    assert [{k: v for k, v in row.items() if k not in ("row", "answers")} for row in rows] == PROMPTS
    assert {fields["finish_reason"] for fields in written} == {"stop", "length"}
    assert len({fields["logp"] for fields in written}) == len(written)


def test_a_reward_model_with_another_tokenizer_reads_the_text(made):
    """It writes </s> and a newline only after answers that ended; its tokens are otherwise those of the same text."""
    other, folder = make_tokenizer(), made / "other"
    other.chat_template = TOKENIZER.chat_template
    other.add_special_tokens({"pad_token": "<pad>"})
    shutil.copytree(made / "reward", folder)
    other.save_pretrained(folder)
    rows = generated(made, "other.jsonl", "--reward", str(folder))
    params, mesh = random_params(REWARD, 1), make_mesh(MeshConfig())
    answer_scores = make_answer_scores(REWARD, params, mesh)
    for row, whole in zip(rows, read_json(made / "whole.jsonl"), strict=True):
        prompt, is_text = prompt_tokens(row), isinstance(row["prompt"], str)
        before = row["prompt"] if is_text else TOKENIZER.decode(prompt)
        for answer, by_tokens in zip(row["answers"], whole["answers"], strict=True):
            tokens = TOKENIZER(before + answer["text"], add_special_tokens=is_text)["input_ids"]
            tail = [END] if is_text else [END, NEWLINE]
            tokens = tokens[len(prompt) :] + tail * (answer["finish_reason"] == "stop")
            (score,) = answer_scores([prompt], [tokens])
            assert answer["score"] == pytest.approx(score, abs=2e-4)
            assert answer["text"] == by_tokens["text"]


def test_only_an_answer_that_ends_its_turn_is_scored_behind_it():
    prompt = TokenizedPrompt([5], [END, NEWLINE])
    for tokens, ended, expected in (([7, END], True, [7, END, NEWLINE]), ([7, 20], True, [7, 20]), ([7], False, [7])):
        assert with_tail(tokens, ended, prompt.tail) == expected


def test_an_interrupted_command_gives_the_same_bytes(made):
    whole = (made / "whole.jsonl").read_bytes()
    manifest = (made / "whole.manifest.json").read_bytes()
    (made / "cut.manifest.json").write_bytes(manifest)
    line_ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in (line_ends[3], line_ends[5] + 20, line_ends[9] - 1):
        (made / "cut.jsonl").write_bytes(whole[:size])
        generated(made, "cut.jsonl")
        assert (made / "cut.jsonl").read_bytes() == whole, size
        assert (made / "cut.manifest.json").read_bytes() == manifest


def test_a_killed_command_gives_the_same_bytes(made):
    with started(*command(made, "killed.jsonl"), output=made / "said", devices=8) as running:
        running.wait_for(lambda: num_lines(made / "killed.jsonl") > 0)
        running.kill()
    num_rows = num_lines(made / "killed.jsonl")
    assert 0 < num_rows < len(PROMPTS)
    generated(made, "killed.jsonl")
    assert (made / "killed.jsonl").read_bytes() == (made / "whole.jsonl").read_bytes()
    assert not (made / "killed.lock").exists()


@pytest.mark.slow
def test_two_processes_write_the_same_bytes(made):
    with started_jointly(2, *command(made, "joint.jsonl"), folder=made) as processes:
        assert [process.code() for process in processes] == [0, 0]
    assert (made / "joint.jsonl").read_bytes() == (made / "whole.jsonl").read_bytes()


def test_neither_batch_nor_number_of_answers_changes_an_answer(made):
    whole = read_json(made / "whole.jsonl")
    rounded = {"logp": 2e-4, "score": 2e-4}  # of another batch, the last digit may differ
    expected = [[fields | {k: pytest.approx(fields[k], abs=rounded[k]) for k in rounded} for fields in row["answers"]]
                for row in whole]  # fmt: skip
    batch = generated(made, "batch.jsonl", "--batch.size", "8")  # by the same program, which has a row a device
    assert [row["answers"] for row in batch] == expected
    single = generated(made, "single.jsonl", "--n", "1", "--prompts.limit", "5")
    assert [row["answers"] for row in single] == [answers[:1] for answers in expected[:5]]
    other = generated(made, "seed.jsonl", "--n", "1", "--run.seed", "4")
    assert not {row["answers"][0]["logp"] for row in other} & {row["answers"][0]["logp"] for row in whole}


def stored(folder: Path, name: str, stage):
    """What training makes of a file: (prompt, answers) as text, and the causes of rows that it drops."""
    source = SourceConfig(path=str(folder / name))
    data = DataConfig(train=(source,), append_eos=False)
    store = build_or_open_store(folder / "store", (source,), data, TOKENIZER, stage, 1)
    decode = lambda ids: TOKENIZER.decode(ids, skip_special_tokens=True)  # noqa: E731
    examples = [store.example(i) for i in range(len(store))]
    return [(decode(p), *map(decode, a)) for p, a, _ in examples], store.report[0]["dropped"]


def test_training_reads_the_pairs_of_best_and_worst_and_the_best_answers(made, capfd):
    options = ("--run.progress", "true", "--pairs")
    rows = generated(made, "whole.jsonl", *options, "best-worst")  # nothing is generated again
    assert "best-worst: " in capfd.readouterr().err
    generated(made, "whole.jsonl", *options, "best")
    with_text = [[answer for answer in row["answers"] if answer["text"].strip()] for row in rows]
    ranked = [sorted(answers, key=lambda answer: answer["score"]) for answers in with_text]
    assert min(map(len, ranked)) > 1
    prompts = [TOKENIZER.decode(prompt_tokens(row), skip_special_tokens=True) for row in PROMPTS]
    is_turn = [isinstance(row["prompt"], list) for row in PROMPTS]
    text = lambda answer, turn: answer["text"] + "\n" * turn  # noqa: E731
    triples = zip(prompts, ranked, is_turn, strict=True)
    best = [(prompt, text(answers[-1], turn), text(answers[0], turn)) for prompt, answers, turn in triples]
    assert stored(made, "whole.best-worst.jsonl", "dpo") == (best, {})
    assert stored(made, "whole.best.jsonl", "sft") == ([pair[:2] for pair in best], {})
    pairs = read_json(made / "whole.best-worst.jsonl")
    assert [(row["chosen_score"], row["rejected_score"]) for row in pairs] == [
        (answers[-1]["score"], answers[0]["score"]) for answers in ranked
    ]


def answer(text: str, score: float, finish_reason: str = "stop") -> dict:
    return {"text": text, "score": score, "finish_reason": finish_reason}


def test_prompts_without_a_pair_are_counted_by_cause():
    rows = [
        {"row": 0, "prompt": "p", "answers": [answer("a", 1), answer("b", 2), answer(" ", 3)]},
        {"row": 1, "prompt": "p", "answers": [answer("a", 1), answer("a", 2)]},
        {"row": 2, "prompt": "p", "answers": [answer("a", 1), answer("b", 1)]},
        {"row": 3, "prompt": "p", "answers": [answer("a", 1, "length"), answer("\n", 0)]},
        {"row": 4, "prompt": "p", "answers": [answer("", 1), answer("", 0)]},
    ]
    pairs = rank(rows, "best-worst")
    assert pairs.rows == [{"prompt": "p", "chosen": "b", "rejected": "a", "chosen_score": 2, "rejected_score": 1}]
    few = "fewer than two non-blank answers"
    assert pairs.skipped == {"equal best and worst answers": 1, "equal scores for all answers": 1, few: 2}
    best = rank(rows, "best")
    assert [(row["answer"], row["score"]) for row in best.rows] == [("b", 2), ("a", 2), ("a", 1), ("a", 1)]
    assert best.skipped == {"no non-blank answer": 1}
    assert best.summary == "4 rows; prompts skipped: 1 with no non-blank answer"
    assert (pairs.num_cut, best.num_cut) == (0, 1)


def test_the_space_between_prompt_and_answer_is_kept(shared):
    """Some tokenizers have it in the answer's first token, and drop it at the start of a text."""
    tokenizer = load_tokenizer(str(shared / "models" / "stories260K"), None, None)
    prompt, whole = "Once upon a time", "Once upon a time there was a dog"
    ids, full = (tokenizer(text)["input_ids"] for text in (prompt, whole))
    assert full[: len(ids)] == ids
    for more, ended in (([], False), ([tokenizer.eos_token_id], True)):
        generated_answer = Answer(full[len(ids) :] + more, [-1.0] * (len(full) - len(ids) + len(more)), ended)
        assert prompt + module.answer_fields(tokenizer, ids, generated_answer)["text"] == whole


REFUSED = [
    ("--n 1 --pairs best-worst", "pairs: 'best-worst' cannot be used: a pair needs two answers to the same prompt"),
    ("--reward.checkpoint best", "reward.checkpoint: 'best' cannot be used: "),
    (
        "--sampling.temperature 0 --sampling.top_p 1",
        "n: 3 cannot be used: at sampling.temperature 0 all answers are the same; set n to 1",
    ),
    ("--model.remat none", "model.remat: 'none' cannot be used: generation has no backward pass"),
    ("--prompts.weight 1", "prompts.weight: 1.0 cannot be used: prompts are not drawn by weight; remove the option"),
    ("--reward {policy}", "reward.path: '{policy}' cannot be used: it is a language model, which has no score head"),
    ("--model.path {reward}", "model.path: '{reward}' cannot be used: it is a reward model, without an unembedding"),
    ("--mesh.expert 8", "mesh.expert: 8 cannot be used: the model has no experts; use mesh.fsdp"),
    ("--reward {broken}", "reward.path: {broken}: its tokenizer cannot be loaded: "),
    ("--prompts {empty}", "the source has no rows; choose another"),
    ("--prompts {blank}", "row 1: missing field: prompt is absent or null, not text; fix or remove the row"),
    ("--prompts {answered}", "row 0: empty prompt: the prompt ends with an assistant message"),
    ("--output {taken}", "taken.jsonl exists, but taken.manifest.json does not: choose another name"),
    ("--output {edited}", "edited.jsonl was edited: line 1 does not hold row 0: restore the file"),
    ("--output {whole} --sampling.top_k 3", "made with other options: sampling.top_k: was 0, now 3: restore"),
    ("--output {whole} --prompts {fewer}", "has answers made with other options: prompts: was "),
    ("--output x.txt", "x.txt must end with .jsonl, as it has one JSON object per line"),
    ("--output s3://bucket/a/x.jsonl", "--output: s3://bucket/a is neither a local path nor in a bucket of Google"),
    ("--output gs://bucket/x.jsonl", "--output: gs://bucket names no folder in a bucket: give gs://BUCKET/FOLDER"),
    ("--loss.beta 1", "loss: belongs to `dpo-jax train`, not to `dpo-jax generate`: remove it"),
]


@pytest.fixture(scope="module")
def spoiled(made) -> dict[str, str]:
    """Names of the refusals -> paths."""
    lines = {
        "empty": [],
        "blank": [PROMPTS[0], {"chosen": "x"}],
        "answered": [{"prompt": [{"role": "assistant", "content": "I know."}]}],
        "fewer": PROMPTS[:3],
        "taken": [],
        "edited": [{"row": 1}],
    }
    for name, rows in lines.items():
        (made / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "edited.manifest.json").write_bytes((made / "whole.manifest.json").read_bytes())
    shutil.copytree(made / "reward", made / "broken")
    (made / "broken" / "tokenizer.json").write_text("{}")
    folders = {name: str(made / name) for name in ("policy", "reward", "broken")}
    return folders | {name: str(made / f"{name}.jsonl") for name in (*lines, "whole")}


@pytest.mark.parametrize(("options", "line"), REFUSED, ids=[options for options, _ in REFUSED])
def test_what_cannot_be_used_is_one_line(made, spoiled, capfd, options, line):
    before = {path: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    code = cli.main([*command(made, "new.jsonl"), *options.format(**spoiled).split()])
    said = capfd.readouterr().err
    assert (code, said.count("\n")) == (2, 1), said
    assert line.format(**spoiled) in said
    assert {path: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before
