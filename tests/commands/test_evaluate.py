"""What comes after a run: its evaluation pair by pair, its export, and another run that starts from it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from etils import epath
from runs import ended, saved_arrays, write_config

from dpo_jax.models.decoder import Model, plain_batch
from dpo_jax.models.families import decoder_config
from dpo_jax.runs.checksums import weights_id
from dpo_jax.runs.directory import read_json
from dpo_jax.runs.restore import read_manifest
from dpo_jax.weights.hub import read_hf_config

BETA = 0.3
KEPT = {"every": 2, "keep": 1, "keep_best": 1, "best_metric": "eval_dev_loss"}


def weights(run, step):
    """The saved weights of a step, as the model's tree."""
    tree: dict = {}
    for name, value in saved_arrays(run, step).items():
        first, *places = name.split("/")
        if first == "params":
            node = tree
            for place in places[:-1]:
                node = node.setdefault(place, {})
            node[places[-1]] = jnp.asarray(value)
    return tree


def steps(run) -> list[int]:
    return sorted(int(path.name) for path in (run / "checkpoints").iterdir())


def started_from(run) -> str:
    """The identity of the weights that a run started from, as its newest save has it."""
    return read_manifest(epath.Path(run / "checkpoints"), steps(run)[-1])["identity"]["weights"]


@pytest.fixture(scope="module")
def made(shared, tmp_path_factory):
    """A folder with a fine-tuning run, `sft`, and a run of DPO that started from it, `dpo`, each with its config."""
    folder = tmp_path_factory.mktemp("made")
    pairs = shared / "reference_curves" / "pairs.jsonl"
    lines = pairs.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(lines[:60]))
    (folder / "dev.jsonl").write_text("".join(lines[60:90]))
    common = {
        "data": {"train": str(folder / "train.jsonl"), "eval": {"dev": str(folder / "dev.jsonl")}, "max_length": 160,
                 "workers": 1},
        "optimizer": {"learning_rate": 1e-4, "schedule": "constant"},
    }  # fmt: skip
    run = {"steps": 4, "eval_every": 2, "progress": False, "report": False}
    sft = common | {
        "model": {"path": str(shared / "models" / "stories260K")},
        "batch": {"examples": 4},
        "run": {"dir": str(folder / "sft"), **run},
        "checkpoint": {**KEPT, "best_mode": "max"},  # so that the first is the best
    }
    dpo = common | {
        "model": {"path": str(folder / "sft")},
        "loss": {"beta": BETA},
        "batch": {"pairs": 4},
        "run": {"dir": str(folder / "dpo"), **run},
        "checkpoint": {**KEPT, "best_mode": "min"},
    }
    assert ended("sft", write_config(folder / "sft.yaml", sft), output=folder / "said") == (0, "")
    assert ended("train", write_config(folder / "dpo.yaml", dpo), output=folder / "said") == (0, "")
    assert steps(folder / "sft") == steps(folder / "dpo") == [2, 4]
    return folder


@pytest.mark.slow
def test_a_run_starts_from_the_newest_or_best_step_of_another(made, tmp_path):
    best, newest = steps(made / "sft")
    assert started_from(made / "dpo") == weights_id(weights(made / "sft", newest))
    assert read_json(made / "dpo" / "metrics.jsonl")[1]["loss"] == pytest.approx(np.log(2), abs=3e-6)
    options = ["--model.checkpoint", "best", "--run.steps", "1", "--run.dir", tmp_path / "run"]
    assert ended("train", made / "dpo.yaml", *options, output=made / "said") == (0, "")
    assert started_from(tmp_path / "run") == weights_id(weights(made / "sft", best))
    assert started_from(tmp_path / "run") != started_from(made / "dpo")


@pytest.mark.parametrize("which", ["newest", "best"])
def test_eval_is_the_evaluation_of_the_run_pair_by_pair(made, tmp_path, which):
    before = {path: path.read_bytes() for path in (made / "dpo").rglob("*") if path.is_file()}
    output = tmp_path / "new" / "pairs.jsonl"
    arguments = [made / "dpo.yaml", "--output", output, "--which", which]
    code, said = ended("eval", *arguments, output=made / "said")
    assert code == 0, said
    assert {path: path.read_bytes() for path in (made / "dpo").rglob("*") if path.is_file()} == before

    summary = json.loads(said)
    step = {"newest": 4, "best": 2}[which]
    assert summary["policy"] == f"{made / 'dpo'} step {step}"
    rows = read_json(made / "dpo" / "metrics.jsonl")
    (logged,) = [row for row in rows if row["step"] == step and "eval_dev_loss" in row]
    found = summary["sets"]["dev"]
    (spread,) = [row for row in read_json(made / "dpo" / "distributions.jsonl") if row["step"] == step]
    assert {"step": step, "set": "dev", "pairs": found["pairs"], **found.pop("distributions")} == spread
    assert {f"eval_dev_{key}": value for key, value in found.items() if key != "pairs"} == {
        key: value for key, value in logged.items() if key != "step"
    }

    pairs = read_json(output)
    assert len(pairs) == found["pairs"]
    assert len({pair["row"] for pair in pairs}) == len(pairs)
    column = {key: np.array([pair[key] for pair in pairs]) for key in pairs[0] if key not in ("set", "source")}
    margin = column["rewards/chosen"] - column["rewards/rejected"]
    means = {
        **{key: column[key].mean() for key in ("rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")},
        "rewards/margins": margin.mean(),
        "rewards/accuracies": (margin > 0).mean(),
        "loss": np.log1p(np.exp(-margin)).mean(),
    }
    for key, value in means.items():
        assert found[key] == pytest.approx(value, rel=2e-6, abs=2e-6), key
    for answer in ("chosen", "rejected"):
        reward = BETA * (column[f"logps/{answer}"] - column[f"reference_logps/{answer}"])
        np.testing.assert_allclose(column[f"rewards/{answer}"], reward, atol=1e-6)
        start = rows[0][f"eval_dev_logps/{answer}"]
        assert column[f"reference_logps/{answer}"].mean() == pytest.approx(start, rel=2e-6)
    assert np.abs(margin).max() > 1e-3


def test_the_export_is_the_trained_model_for_transformers(made, shared, torch, tmp_path):
    code, said = ended("export", made / "dpo", tmp_path / "out", output=made / "said")
    assert (code, said.count("\n")) == (0, 1)
    assert said.startswith(f"exported the model of {made / 'dpo'} at step 4 to {tmp_path / 'out'}: ")
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())  # nothing missing or left over
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = [pair["prompt"] + pair["chosen"] for pair in read_json(made / "dev.jsonl")[:3]]
    model = Model(config=decoder_config(read_hf_config(tmp_path / "out")), attention="xla")
    start = transformers.AutoModelForCausalLM.from_pretrained(shared / "models" / "stories260K", dtype=torch.float32)
    params = weights(made / "dpo", 4)
    for text in texts:
        tokens = np.array([tokenizer(text).input_ids], np.int32)
        assert tokens.shape[1] > 20
        batch = plain_batch(jnp.asarray(tokens), jnp.full(1, tokens.shape[1]))
        ours = jax.jit(model.hidden)(params, batch) @ model.unembedding(params).T
        with torch.no_grad():
            ids = torch.tensor(tokens, dtype=torch.long)
            np.testing.assert_allclose(ours, theirs(ids).logits.numpy(), atol=1e-4, rtol=0)
            assert np.abs(np.asarray(ours) - start(ids).logits.numpy()).max() > 0.01  # it was trained
    again = ended("export", made / "dpo", tmp_path / "out", output=made / "said")
    assert again[0] == 2
    assert "it is not empty; name another directory to export to, or empty this one" in again[1]
