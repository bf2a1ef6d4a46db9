"""The audit finds what was planted, and nothing else; a step shows what it holds."""

import json
import random
import re
from collections import Counter
from cProfile import Profile
from pathlib import Path

import numpy as np
import pytest
from small_tokenizer import make_tokenizer

from dpo_jax.batching.sets import store_folder
from dpo_jax.config import (
    DataConfig,
    DPOConfig,
    InvalidRowsConfig,
    ModelConfig,
    RunConfig,
    SFTBatchConfig,
    SFTConfig,
    SourceConfig,
)
from dpo_jax.errors import UserError
from dpo_jax.methods.setup import sets_of
from dpo_jax.reports import duplicates
from dpo_jax.reports.data_audit import audit, render, show_step

TOKENIZER = make_tokenizer()
STEMS = ["barn", "cliff", "dove", "earl", "fork", "golf", "hatch"]
WORDS = [stem + end for stem in STEMS for end in ("ing", "er", "ly", "est", "ous")]


def text(seed: str, size: int) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=size))


def pair(i: int) -> dict:
    return {"prompt": f"{text(f'p{i}', 12)}:", "chosen": text(f"c{i}", 25), "rejected": text(f"r{i}", 20)}


def config(tmp_path: Path, rows: dict[str, list[dict]], make=DPOConfig, **options):
    """A config over written files: `train` and, under any other name, evaluation sets."""
    paths = {}
    for name, given in rows.items():
        paths[name] = SourceConfig(path=str(tmp_path / f"{name}.jsonl"))
        Path(paths[name].path).write_text("".join(json.dumps(row) + "\n" for row in given))
    batch = options.pop("batch", None)
    data = DataConfig(train=(paths.pop("train"),), eval=paths, **{"max_length": 1024} | options)
    more = {} if batch is None else {"batch": batch}
    return make(model=ModelConfig(path="/nowhere"), data=data, run=RunConfig(dir=str(tmp_path / "runs" / "a")), **more)


def audited(given, **options):
    """The audit of a config's sets."""
    return audit(sets_of(given, TOKENIZER), TOKENIZER, max_length=given.data.max_length, **options)


def rows_named(groups) -> list[list[int]]:
    return [[one["row"] for one in group] for group in groups]


def test_what_was_planted_is_found_and_nothing_else(tmp_path):
    rows = [pair(i) for i in range(60)]
    rows += [rows[3], rows[3], rows[7]]  # 60, 61, 62: exact copies
    rows.append(rows[11] | {"chosen": rows[11]["rejected"], "rejected": rows[11]["chosen"]})  # 63: the other label
    rows.append({name: value.upper().replace(" ", "  ") for name, value in rows[20].items()})  # 64: case and space
    rows.append(rows[25] | {"chosen": rows[25]["chosen"] + " indeed"})  # 65: a word more
    rows.append(rows[30] | {"chosen": text("x", 25), "rejected": text("y", 25)})  # 66: the same prompt only
    rows.append(
        {"prompt": text("z", 12), "chosen": rows[31]["chosen"], "rejected": rows[31]["rejected"]}
    )  # 67: answers
    found = audited(config(tmp_path, {"train": rows}))["train"]
    assert rows_named(found["duplicates"]["first"]) == [[3, 60, 61], [7, 62]]
    assert (found["duplicates"]["groups"], found["duplicates"]["examples"]) == (2, 5)
    assert rows_named(found["both_labels"]["first"]) == [[11, 63]]
    assert rows_named(found["near_duplicates"]["first"]) == [[20, 64], [25, 65]]


@pytest.mark.parametrize("sources", [DPOConfig, SFTConfig])
def test_duplicates_and_contradictions_are_those_of_a_plain_comparison(tmp_path, monkeypatch, sources):
    """On rows of few words, most of them several times, as arrays of hashes and as the tokens themselves."""
    monkeypatch.setattr(duplicates, "BLOCK", 7)
    chance, words = random.Random(0), ("a", "b", "ab", "ba")
    names = ("prompt", "chosen", "rejected") if sources is DPOConfig else ("prompt", "completion")
    rows = [{name: chance.choice(words) for name in names} for _ in range(90)]
    kept = {"invalid_rows": InvalidRowsConfig(equal_answers="keep")} if sources is DPOConfig else {}
    batch = {} if sources is DPOConfig else {"batch": SFTBatchConfig(examples=2)}
    store = sets_of(config(tmp_path, {"train": rows}, sources, **kept, **batch), TOKENIZER).train
    ids = np.array([i for i in range(len(store)) if i % 5])
    examples = {i: tuple(part.tobytes() for part in (store.example(i)[0], *store.example(i)[1])) for i in ids.tolist()}
    groups: dict[tuple, list[int]] = {}
    found = {}
    for i, (prompt, *answers) in examples.items():
        first_opposite = groups.get((prompt, *answers[::-1]), [None])[0]
        if answers != answers[::-1] and first_opposite is not None:
            found.setdefault(frozenset(((prompt, *answers), (prompt, *answers[::-1]))), (first_opposite, i))
        groups.setdefault((prompt, *answers), []).append(i)
    contents, opposites = duplicates.content_hashes(store)
    assert duplicates.exact_duplicates(contents, ids) == [group for group in groups.values() if len(group) > 1]
    assert duplicates.contradictions(contents, opposites, ids) == list(found.values())
    assert len(groups) > 10
    assert (len(found) > 5) == (sources is DPOConfig)


def test_near_duplicates_are_the_pairs_that_a_full_comparison_finds(shared, tmp_path):
    """On real pairs, some of them changed a little: the words of every two examples, compared in plain Python."""
    lines = (shared / "preference" / "hh_harmless_dev.jsonl").read_text().splitlines()[:150]
    rows = [json.loads(line) for line in lines]
    chance = random.Random(0)
    for row in rows[:40]:
        words = row["chosen"].split(" ")
        words[-1] += chance.choice([".", "!", " indeed", ", I think."])
        rows.append(row | {"chosen": " ".join(words)})

    def shingles(texts):
        found = set()
        for given in texts:
            tokens = [t for t in TOKENIZER.tokenize(given.lower()) if t not in "\u0120\u010a"]
            found |= {tuple(tokens[i : i + 4]) for i in range(max(1, len(tokens) - 3))}
        return found

    parts = []
    for row in rows:
        turns = [row[name].rsplit("\n\nAssistant:", 1) for name in ("chosen", "rejected")]
        parts.append((shingles([turns[0][0] + "\n\nAssistant:"]), shingles([turns[0][1], turns[1][1]])))
    alike = lambda a, b: len(a & b) >= 0.8 * len(a | b)  # noqa: E731
    expected = {(i, j) for i in range(len(rows)) for j in range(i) if all(map(alike, parts[i], parts[j]))}
    sets = sets_of(config(tmp_path, {"train": rows}, max_length=100_000), TOKENIZER)
    assert len(sets.train) == len(rows)
    found = audit(sets, TOKENIZER)["train"]["near_duplicates"]
    assert found["groups"] == len(expected) >= 30  # of two each
    assert {tuple(reversed(group)) for group in rows_named(found["first"])} <= expected


def test_work_follows_the_rows_and_not_their_square(tmp_path):
    calls = []
    for rows in (100, 400):
        sets = sets_of(config(tmp_path, {"train": [pair(i) for i in range(rows)]}), TOKENIZER)
        with Profile() as profile:
            assert audit(sets, TOKENIZER)["train"]["near_duplicates"]["groups"] == 0
        calls.append(sum(entry.callcount for entry in profile.getstats()))
    assert calls[1] < 6 * calls[0]  # of Python: four times as many, sixteen times if pairs of rows were compared


def test_prompts_shared_with_an_evaluation_set(tmp_path):
    held = [pair(2) | {"chosen": "other"}, pair(100), pair(5)]
    given = config(tmp_path, {"train": [pair(i) for i in range(20)], "fresh": [pair(200)], "known": held})
    found = audited(given)
    assert found["shared_prompts"]["fresh"]["examples"] == 0
    shared = found["shared_prompts"]["known"]
    assert shared["examples"] == 2
    assert rows_named(shared["first"]) == [[0, 2], [2, 5]]
    lines = render(found).splitlines()
    assert "  prompts also in the training set: none" in lines
    assert "  prompts also in the training set: 2, known.jsonl:0, train.jsonl:2; known.jsonl:2, train.jsonl:5" in lines


def test_held_out_rows_share_no_prompt(tmp_path):
    rows = [pair(i // 2) | {"chosen": text(f"a{i}", 20)} for i in range(60)]
    found = audited(config(tmp_path, {"train": rows}, eval_fraction=0.2))
    assert found["train"]["examples"] == 48
    assert found["evals"]["held_out"]["examples"] == 12
    assert found["shared_prompts"]["held_out"]["examples"] == 0
    assert "eval held_out: 12 examples of the training sets" in render(found)


def test_lengths_and_their_bias(tmp_path):
    """Bytes, one BOS, one EOS an answer: prompt 1 + 4; chosen 10 + 1 thrice and 2 + 1 once; rejected 4 + 1."""
    rows = [{"prompt": f"q00{i}", "chosen": "c" * (2 if i == 3 else 10), "rejected": "r" * 4} for i in range(4)]
    rows.append({"prompt": "q004", "chosen": "s" * 4, "rejected": "r" * 4})
    found = audited(config(tmp_path, {"train": rows}))["train"]
    bias = {"pairs": 4, "longer_wins": 0.75, "mean_chosen": (33 + 3 + 5) / 5, "mean_rejected": 5.0}
    assert found["length_bias"] == bias
    chosen = found["lengths"]["tokens"]["chosen"]
    assert (chosen["min"], chosen["median"], chosen["max"], chosen["mean"]) == (3, 11, 11, 41 / 5)
    assert found["lengths"]["share"] == {"prompt": 25 / 91, "chosen": 41 / 91, "rejected": 25 / 91}
    assert found["lengths"]["sharing_saves"] == (91 + 25) / 91


def test_the_text_names_every_cause_and_shows_the_boundary(tmp_path):
    rows = [
        pair(0),
        pair(1) | {"chosen": ""},
        pair(2) | {"rejected": "x" * 2000},
        pair(3) | {"rejected": pair(3)["chosen"]},
    ]
    shown = render(audited(config(tmp_path, {"train": rows}, shuffle=False)))
    assert re.search(r"dropped +empty_answer +1 +rows 1\n", shown)
    assert re.search(r"dropped +equal_answers +1 +rows 3\n", shown)
    assert re.search(r"truncated +too_long +1 +rows 2\n", shown)
    assert "train.jsonl: 4 rows, 2 kept" in shown
    assert "run: 1 steps of 64, 1.00 epochs" in shown
    assert f"\nprompt\n  | <s>{pair(0)['prompt']}\nchosen, " in shown
    before, after = pair(0)["prompt"][-4:], pair(0)["chosen"][:4]
    boundary = f"{' '.join(map(repr, before))} || {' '.join(map(repr, after))}"
    assert f"\nchosen, whose tokens begin at ||: {boundary}\n  | {pair(0)['chosen']}</s>\nrejected, " in shown


def test_what_is_read_otherwise_than_one_may_think_is_said(tmp_path):
    """A pair reads as text, whatever is in it; columns that are not read and lengths beyond the model are named."""
    chosen = "one\n\n\ttwo\x1b[31m\u202e é"
    rows = [{"system": "s", "prompt": "x" * 20, "chosen": chosen, "rejected": '[{"role": "user"}]'}, pair(1)]
    given = config(tmp_path, {"train": rows}, shuffle=False)
    found = audited(given, max_positions=50)
    assert found["positions"] == {"max_length": 1024, "made_for": 50, "longer": 1}
    shown = render(found)
    assert "\nchosen, whose tokens begin at ||: 'x' 'x' 'x' 'x' || 'o' 'n' 'e' '\u010a'\n  | one\n  | \n" in shown
    assert "\n  | \ttwo\\x1b[31m\\u202e é</s>\nrejected, " in shown
    assert "\n    columns that are not read: system\n    system is not part of the prompt: " in shown
    assert "\n    rejected looks like JSON text in 1 of the first 2 rows, and is read as plain text" in shown
    assert (
        "\nnote: data.max_length is 1024, but the model supports 50 (max_position_embeddings); 1 examples are " in shown
    )
    assert "positions" not in audited(given, max_positions=1024)


def test_fine_tuning_data(tmp_path):
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"},
            {"role": "user", "content": "so"}, {"role": "assistant", "content": "c"}]  # fmt: skip
    given = config(tmp_path, {"train": [{"messages": talk}] * 2}, make=SFTConfig, batch=SFTBatchConfig(examples=1))
    found = audited(given)
    assert found["example"]["learned"] == ["ab</s>", "c</s>"]
    assert "both_labels" not in found["train"]
    assert found["train"]["duplicates"]["examples"] == 2
    shown = render(found)
    assert shown.endswith("\nlearned\n  | ab</s>\n  ...\n  | c</s>")
    assert "rejected" not in shown
    assert show_step(sets_of(given, TOKENIZER), 1, TOKENIZER).startswith("step 1 of 2, ")


def test_answers_that_teach_no_end_are_found(tmp_path):
    """A chat template may end turns with a token that the model's generation config does not know."""
    rows = [pair(0), pair(1) | {"rejected": "x" * 2000}, pair(2)]
    given = config(tmp_path, {"train": rows}, shuffle=False)
    assert rows_named([audited(given)["train"]["unterminated"]["first"]]) == [[1]]  # cut by max_length
    found = audited(given, ends={5, 6})
    assert found["train"]["unterminated"]["examples"] == 3
    assert f"({TOKENIZER.decode([5])} {TOKENIZER.decode([6])}): in 3 examples, the first: 0, 1, 2\n" in render(found)
    assert f"the first ends with {pair(0)['chosen'][-2:] + '</s>'!r}" in render(found)
    assert "(the model has none): in 3 examples" in render(audited(given, ends=frozenset()))


def test_a_step_shows_exactly_its_examples(tmp_path):
    given = config(tmp_path, {"train": [pair(i) for i in range(70)]})
    sets = sets_of(given, TOKENIZER)
    shown = []
    for step in range(sets.order.num_steps):
        block = show_step(sets, step + 1, TOKENIZER)
        ids = [int(i) for i in re.findall(r"example (\d+), ", block)]
        assert ids == [i for i in sets.order.step_ids(step).tolist() if i >= 0]
        assert [int(row) for row in re.findall(r"row (\d+), ", block)] == sets.train.rows[ids].tolist()
        for i in ids:
            assert f"chosen    {pair(sets.train.rows[i])['chosen'][:60]!r}" in block
        shown += ids
    assert Counter(shown) == Counter(range(70))
    assert block.count("empty, the data ends here") == 128 - 70
    with pytest.raises(UserError, match="--step must be from 1 to 2, the run's last step, got 3"):
        show_step(sets, 3, TOKENIZER)


def test_weighted_sets_reach_the_order(tmp_path):
    rows = {name: [pair(base + i) for i in range(30)] for name, base in (("a", 0), ("b", 100))}
    for name, given in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    train = tuple(SourceConfig(path=str(tmp_path / f"{n}.jsonl"), weight=w) for n, w in (("a", 3), ("b", 1)))
    given = DPOConfig(
        model=ModelConfig(path="/nowhere"), data=DataConfig(train=train), run=RunConfig(dir=str(tmp_path / "r"))
    )
    sets = sets_of(given, TOKENIZER)
    ids = sets.order.step_ids(0)
    assert np.bincount(sets.train.sources[ids[ids >= 0]]).tolist() == [45, 15]


def test_a_bucket_is_no_place_for_the_store(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert store_folder(None, str(tmp_path / "runs" / "a")) == tmp_path / "runs" / "store"
    with pytest.raises(UserError, match=r"data.store: gs://bucket/store is not a local folder"):
        store_folder("gs://bucket/store", "gs://bucket/runs/a")
    ours = store_folder(None, "gs://bucket/runs/a")  # which runs next to each other share, on each machine
    assert ours == store_folder(None, "gs://bucket/runs/b/") != store_folder(None, "gs://bucket/others/a")
    assert ours.is_relative_to(tmp_path / "cache")
    assert store_folder("elsewhere", "gs://bucket/run") == Path("elsewhere")
