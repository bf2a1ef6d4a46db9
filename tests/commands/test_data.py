"""The command ``data``: a config's own tokenizer, sets and model."""

import json

from small_tokenizer import make_tokenizer

from dpo_jax.commands.data import describe_data
from dpo_jax.config import DataConfig, DPOConfig, ModelConfig, RunConfig, SourceConfig
from dpo_jax.methods.setup import sets_of
from dpo_jax.reports.data_audit import audit, render, show_step


def test_sets_are_read_with_the_tokenizer_of_the_config(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": f"question {i}:", "chosen": "yes", "rejected": "no"} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DPOConfig(
        model=ModelConfig(path="builtin:tiny", tokenizer=str(tmp_path / "tokenizer")),
        data=DataConfig(train=(SourceConfig(path=str(tmp_path / "pairs.jsonl")),), max_length=4096),
        run=RunConfig(dir=str(tmp_path / "run")),
    )
    sets = sets_of(config, tokenizer)
    assert describe_data(config, 1) == show_step(sets, 1, tokenizer)
    expected = audit(sets, tokenizer, ends=frozenset(), max_length=4096, max_positions=512)
    assert describe_data(config, None) == render(expected)
