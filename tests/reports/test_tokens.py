"""What an implicit reward rewards: its parts by token, its distribution, and the pages that show them."""

import json
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import jax
import numpy as np
import pytest
from runs import ended, write_config
from small import logps_fn, pack, random_pairs, small_model, small_params
from small_tokenizer import make_tokenizer
from transformers import PreTrainedTokenizerFast

from dpo_jax.batch import PairLogps
from dpo_jax.cli import main
from dpo_jax.config import LossConfig
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.inference.distributions import BINS, calibration, nice_edges, reward_distributions
from dpo_jax.inference.token_rewards import decoder, token_pieces, weigh_tails
from dpo_jax.logprobs import answer_values, make_logps_fn, make_token_logps_fn
from dpo_jax.losses import preference_metrics, sequence_logps
from dpo_jax.reports.tokens import MAX_SHOWN, colored, saturation, token_page
from dpo_jax.runs.directory import read_json
from dpo_jax.runs.logs import clipped

PAIRS = random_pairs()
ANSWERS = ("chosen", "rejected")
BETA = 0.3
TEXT = "Zoë paid 5 € for 日本 tea 🍵🍵\n\n"


# ------------------------------------------------------------------------------------- tokens of an answer


@pytest.mark.parametrize("layout", ["shared", "repeated", "padded"])
def test_log_probs_of_tokens_are_those_of_their_answers_in_every_layout(layout):
    model = small_model()
    batch = pack(PAIRS, layout=layout, rows=2, valid=7)
    tokens = jax.jit(make_token_logps_fn(model.hidden, model.unembedding, chunk=64))(small_params(), batch)
    sums = np.asarray(jax.jit(logps_fn(model))(small_params(), batch).sum)
    found = answer_values(np.asarray(tokens), batch)
    assert [[len(own) for own in pair] for pair in found] == [[*map(len, pair[1])] for pair in PAIRS[:7]] + [[0, 0]]
    np.testing.assert_allclose([[own.sum() for own in pair] for pair in found], sums, rtol=2e-6, atol=1e-5)
    turned = {name: getattr(batch, name)[:, ::-1] for name in ("target_answers", "target_offsets", "target_mask")}
    jax.tree.map(
        np.testing.assert_array_equal, answer_values(np.asarray(tokens)[:, ::-1], batch.replace(**turned)), found
    )
    alone = pack(PAIRS[3:4], layout="padded")
    (pair,) = answer_values(
        np.asarray(jax.jit(make_token_logps_fn(model.hidden, model.unembedding, chunk=64))(small_params(), alone)),
        alone,
    )
    for own, other in zip(pair, found[3], strict=True):  # token by token, in their order
        np.testing.assert_allclose(own, other, rtol=2e-5, atol=2e-5)


def test_tails_weigh_as_in_the_loss():
    model, loss = small_model(), LossConfig(ld_alpha=0.25)
    batch = pack(PAIRS)
    tokens = jax.jit(make_token_logps_fn(model.hidden, model.unembedding, chunk=64))(small_params(), batch)
    logps = jax.jit(make_logps_fn(model.hidden, model.unembedding, chunk=64, tail=True))(small_params(), batch)
    found = [[own.sum() for own in weigh_tails(pair, 0.25)] for pair in answer_values(np.asarray(tokens), batch)]
    np.testing.assert_allclose(found, sequence_logps(logps, loss), rtol=2e-6, atol=1e-5)
    assert np.abs(np.asarray(logps.sum) - found).max() > 1


def gpt2(shared):
    return PreTrainedTokenizerFast(tokenizer_file=str(shared / "tokenizers" / "gpt2" / "gpt2.json"))


def tokenizers_of(shared):
    yield make_tokenizer()
    yield load_tokenizer(str(shared / "models" / "stories260K"), None, None)  # SentencePiece, with bytes
    yield gpt2(shared)
    yield load_tokenizer(str(shared / "tokenizers" / "qwen3"), None, None)


def test_pieces_are_the_answer(shared):
    for tokenizer in tokenizers_of(shared):
        decode = decoder(tokenizer)
        prompt, whole = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Say: 🍵日", "Say: 🍵日" + TEXT)
        )
        size = next(n for n, (a, b) in enumerate(zip([*prompt, -1], whole, strict=False)) if a != b)
        pieces = token_pieces(decode, whole[:size], whole[size:])
        assert len(pieces) == len(whole) - size
        assert "".join(pieces) == TEXT
        assert "€" in "".join(piece for piece in pieces if "€" in piece)
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
        for part in range(size + 1, len(whole)):  # an answer that is cut off within a character loses no text
            cut = token_pieces(decode, whole[:size], whole[size:part])
            assert len(cut) == part - size
            assert "".join(cut).rstrip("\N{REPLACEMENT CHARACTER}") == TEXT[: len("".join(cut).rstrip("\ufffd"))]


def test_a_character_of_several_tokens_belongs_to_the_last():
    tokenizer = make_tokenizer()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "é€b")]
    assert token_pieces(decoder(tokenizer), *ids) == ["", "é", "", "", "€", "b"]
    assert token_pieces(decoder(tokenizer), ids[0], [*ids[1][:4], 1]) == ["", "é", "", "", "\ufffd</s>"]
    assert token_pieces(decoder(tokenizer), [*ids[0], *ids[1][:1]], ids[1][1:]) == ["é", "", "", "€", "b"]


def test_a_merged_token_at_the_boundary_is_the_answers(shared):
    tokenizer = gpt2(shared)
    ids = tokenizer("The capital is Paris.")["input_ids"]
    before = tokenizer("The capital is ")["input_ids"]
    assert before[:3] == ids[:3] != before  # the space alone is no token of the whole
    assert token_pieces(decoder(tokenizer), ids[:3], ids[3:]) == [" Paris", "."]


# ------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def made(shared, tmp_path_factory):
    """A folder with a short run and its config."""
    folder = tmp_path_factory.mktemp("watch")
    lines = (shared / "reference_curves" / "pairs.jsonl").read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:24]))
    (folder / "dev.jsonl").write_text("".join(lines[60:90]))
    config = {
        "model": {"path": str(shared / "models" / "stories260K")},
        "data": {"train": str(folder / "train.jsonl"), "eval": {"dev": str(folder / "dev.jsonl")}, "max_length": 160,
                 "workers": 1},
        "loss": {"beta": BETA},
        "optimizer": {"learning_rate": 1e-4, "schedule": "constant", "max_grad_norm": 0.01},
        "batch": {"pairs": 4},
        "run": {"dir": str(folder / "run"), "steps": 4, "eval_every": 2, "progress": False, "export": False},
    }  # fmt: skip
    assert ended("train", write_config(folder / "config.yaml", config), output=folder / "said") == (0, "")
    return folder


@pytest.mark.parametrize("options", [(), pytest.param(("--loss.ld_alpha", "0.5"), marks=pytest.mark.slow)])
def test_parts_of_the_reward_sum_to_it(made, tmp_path, options):
    output = tmp_path / "pairs.jsonl"
    code, said = ended("eval", made / "config.yaml", "--output", output, "--per-token", *options, output=made / "said")
    assert code == 0, said
    pairs = read_json(output)
    assert len(pairs) > 20  # the others are too long
    rows = [json.loads(line) for line in (made / "dev.jsonl").read_text().splitlines()]
    whole = 0
    for pair in pairs:
        assert pair["prompt"].endswith(rows[pair["row"]]["prompt"][-20:])
        for answer in ANSWERS:
            ratios = np.array(pair[f"log_ratios/{answer}"])
            assert len(ratios) == len(pair[f"pieces/{answer}"]) == pair[f"tokens/{answer}"]
            assert BETA * ratios.sum() == pytest.approx(pair[f"rewards/{answer}"], abs=1e-4)
            text = "".join(pair[f"pieces/{answer}"])
            assert (rows[pair["row"]][answer] + "<s>").startswith(text)  # <s> ends texts here; long ones are cut off
            whole += text.endswith("<s>")
    assert whole > len(pairs)
    assert max(abs(pair["rewards/margin"]) for pair in pairs) > 1e-3
    page = Page((tmp_path / "pairs.html").read_text())
    assert page.text.count("Margin ") == len(pairs)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--reference.mode", "cached"],
            "--per-token: reference.mode cached stores only sums over whole answers; add ",
        ),
        (["--loss.type", "simpo"], "--per-token: reference.mode none provides nothing to compare tokens with; "),
        (
            ["--output", "x.html"],
            "--output: x.html is also the path of the token page; choose a .jsonl name",
        ),
    ],
)
def test_what_has_no_parts_is_refused(made, tmp_path, monkeypatch, capsys, options, line):
    monkeypatch.chdir(tmp_path)
    own = [] if "--output" in options else ["--output", "x.jsonl"]
    assert main(["eval", str(made / "config.yaml"), "--per-token", *own, *options]) == 2
    assert capsys.readouterr().err.startswith(f"dpo-jax: error: {line}")
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------- the page


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects what matters."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.text, self.tags = [], "", []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def a_pair(row: int, margin: float, piece: str = "yes") -> dict:
    own = {"set": "dev", "source": "<b>.jsonl", "row": row, "prompt": "<script>alert(1)</script> &amp;"}
    for answer, reward in (("chosen", margin), ("rejected", 0.0)):
        own |= {f"tokens/{answer}": 2, f"rewards/{answer}": reward, f"pieces/{answer}": [piece, "</s>"],
                f"log_ratios/{answer}": [reward / BETA, 0.0]}  # fmt: skip
    return own | {"rewards/margin": margin}


def test_the_page_escapes_and_stands_alone():
    page = Page(token_page([a_pair(1, 0.5, '<i title="x">')], BETA, "run <x> step 3"))
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "i", "b", "x", "s", "link", "img"})
    assert not [attrs for _, attrs in page.tags if {"src", "href", "srcset"} & attrs.keys()]
    for text in ("<script>alert(1)</script> &amp;", '<i title="x">', "<b>.jsonl, row 1", "</s>", "run <x> step 3"):
        assert text in page.text


def test_both_ends_of_the_margins_are_shown():
    lines = [a_pair(row, (row * 37) % 101 - 50.0) for row in range(101)]
    text = Page(token_page(lines, BETA, "p")).text
    best, worst = text.split("The smallest margins")
    assert best.count("Margin ") == worst.count("Margin ") == MAX_SHOWN
    assert best.index("Margin 50.00") < best.index("Margin 49.00") < best.index("Margin 31.00")
    assert worst.index("Margin -50.00") < worst.index("Margin -31.00")
    assert "Margin 30.00" not in text
    few = Page(token_page(lines[: 2 * MAX_SHOWN], BETA, "p")).text
    assert few.count("Margin ") == 2 * MAX_SHOWN


def test_color_tells_sign_and_size():
    page = Page(colored(["a", "b", "c\n", "", "e"], [2.0, -2.0, 0.01, 0.0, 50.0], beta=0.5, full=1.0))
    assert [(attrs.get("class"), attrs["title"]) for _, attrs in page.tags] == [
        ("p8", "+1"), ("n8", "-1"), ("p1", "+0.005"), (None, "+0"), ("p8", "+25"),
    ]  # fmt: skip
    assert page.text == "abc↵\n·e"
    assert saturation([a_pair(0, 0.0)], BETA) > 0  # nothing to divide by
    assert saturation([a_pair(0, 1.5), a_pair(1, -90.0)] * 100, BETA) == pytest.approx(90)
    assert saturation([a_pair(0, 1.5)] * 199 + [a_pair(1, -90.0)], BETA) == pytest.approx(1.5)


# ------------------------------------------------------------------------------------- distributions


def scored(seed=0, count=200):
    """Log-probs of policy and reference, for ``count`` pairs of lengths 1 to 60."""
    draw = np.random.Generator(np.random.Philox(seed))
    lengths = draw.integers(1, 60, (count, 2)).astype(np.float32)
    ones = np.ones(count, np.float32)
    fixed = PairLogps(sum=-draw.random((count, 2), np.float32) * 90, count=lengths, weight=ones, valid=ones > 0)
    moved = fixed.sum + draw.normal(0, 3, (count, 2)).astype(np.float32)
    return replace(fixed, sum=moved), fixed


def test_histograms_count_every_pair():
    policy, fixed = scored()
    loss = LossConfig(beta=BETA)
    found = reward_distributions(policy, fixed, loss)
    means = jax.device_get(preference_metrics(policy, fixed, loss))
    for edges, counts, mean in [
        (found["margins"]["edges"], found["margins"]["counts"], means["rewards/margins"]),
        *((found["rewards"]["edges"], found["rewards"][own], means[f"rewards/{own}"]) for own in ANSWERS),
    ]:
        assert sum(counts) == 200
        assert 8 <= len(counts) == len(edges) - 1 <= BINS
        assert 0.0 in edges
        assert np.allclose(np.diff(edges), edges[1] - edges[0])
        centres = np.add(edges[1:], edges[:-1]) / 2
        assert np.dot(centres, counts) / 200 == pytest.approx(mean, abs=edges[1] - edges[0])
    above = sum(n for edge, n in zip(found["margins"]["edges"], found["margins"]["counts"], strict=False) if edge >= 0)
    assert above / 200 == pytest.approx(means["rewards/accuracies"])
    json.dumps(found)


@pytest.mark.parametrize("buckets", ["by_length", "by_longer"])
def test_buckets_part_the_pairs(buckets):
    policy, fixed = scored(1)
    found = reward_distributions(policy, fixed, LossConfig(beta=BETA))[buckets]
    means = preference_metrics(policy, fixed, LossConfig(beta=BETA))
    assert sum(one["pairs"] for one in found) == 200
    assert sum(one["share"] for one in found) == pytest.approx(1)
    for key, mean in (("accuracy", "rewards/accuracies"), ("margin", "rewards/margins")):
        assert sum(one["share"] * one[key] for one in found) == pytest.approx(float(means[mean]), abs=1e-5)
    if buckets == "by_length":
        assert len(found) == 5
        assert all(25 <= one["pairs"] <= 55 for one in found)
        assert found[0]["from"] == policy.count.max(1).min()
        assert found[-1]["to"] == policy.count.max(1).max()
        assert all(one["to"] + 1 == other["from"] for one, other in pairwise(found))
    else:
        assert [one["longer"] for one in found] == ["chosen", "rejected", "equal"]
        margins = BETA * np.diff(fixed.sum - policy.sum)[:, 0]
        longer = policy.count[:, 0] > policy.count[:, 1]
        assert found[0]["margin"] == pytest.approx(margins[longer].mean(), abs=1e-5)


def test_calibration_compares_confidence_with_accuracy():
    sure, unsure = np.log(9), np.log(0.54 / 0.46)  # confidences of 0.9 and 0.54
    margins = np.array([sure] * 8 + [-sure] * 2 + [unsure, -unsure])
    found = calibration(margins)
    assert [(one["pairs"], one["accuracy"]) for one in found["bins"]] == [(2, 0.5), (10, 0.8)]
    np.testing.assert_allclose([one["confidence"] for one in found["bins"]], [0.54, 0.9])
    assert found["ece"] == pytest.approx((2 * 0.04 + 10 * 0.1) / 12)
    assert calibration(np.zeros(4))["ece"] == 0  # ties are half right, as sure as they are


def test_equal_models_few_pairs_and_nan_have_distributions():
    policy, fixed = scored(2, count=3)
    same = reward_distributions(fixed, fixed, LossConfig())
    assert sum(same["margins"]["counts"]) == 3
    assert [one["accuracy"] for one in same["by_length"]] == [0] * len(same["by_length"])
    policy.sum[1, 0] = np.nan
    found = reward_distributions(policy, fixed, LossConfig())
    assert (sum(found["margins"]["counts"]), sum(found["rewards"]["rejected"]), found["not_finite"]) == (2, 2, 1)


@pytest.mark.parametrize(
    "values",
    [[0.0], [3.0, 3.0], [-1e-9, 0.0], [1e6, 1e6 + 1], [-5, 100.0], [0.1, 0.3], [1e-8], [-0.25, 0.25], [1e30, -7]],
)
def test_edges_hold_all_values(values):
    edges = nice_edges(np.array(values))
    assert 2 <= len(edges) <= BINS + 1
    assert (np.diff(edges) > 0).all()
    assert edges[0] <= min(values) <= max(values) <= edges[-1]


def test_clipping_is_told_step_by_step(made):
    steps = [row for row in read_json(made / "run" / "metrics.jsonl") if "loss" in row]
    assert [row["clipped"] for row in steps] == [1] * 4  # at 0.01
    assert clipped({"grad_norm": 0.5}, 0.5) == {"clipped": 0}
    assert clipped({"grad_norm": float(np.float32(0.1))}, 0.1) == {"clipped": 0}
    assert clipped({"grad_norm": 0.6}, None) == {}


def test_a_run_keeps_the_distributions_of_every_evaluation(made):
    found = read_json(made / "run" / "distributions.jsonl")
    assert [(one["step"], one["set"]) for one in found] == [(0, "dev"), (2, "dev"), (4, "dev")]
    for one in found:
        assert sum(one["margins"]["counts"]) == one["pairs"] > 20
    assert found[0]["by_length"][0]["margin"] == 0
    rows = [row for row in read_json(made / "run" / "metrics.jsonl") if "eval_dev_loss" in row]
    for row, one in zip(rows, found, strict=True):
        mean = sum(bucket["share"] * bucket["margin"] for bucket in one["by_length"])
        assert mean == pytest.approx(row["eval_dev_rewards/margins"], abs=1e-6)
