"""The shipped configs for slices: parsed strictly, of known models, and such that the slice divides them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_jax.config import DPOConfig, PPOConfig, RewardConfig
from dpo_jax.config.file import parse_config
from dpo_jax.models.decoder import Model
from dpo_jax.models.families import decoder_config
from dpo_jax.parallel.chips import parse_topology
from dpo_jax.parallel.sharding import abstract_mesh, row_devices, weight_shardings
from dpo_jax.weights.known import known_config

CONFIGS = Path(__file__).parents[2] / "configs"
TABLE = re.findall(
    r"^\| \[([\w.]+)\]\(([\w.]+)\) \| (.+?) \| (.+?) \| (\d+) \|", (CONFIGS / "README.md").read_text(), re.M
)
SLICES = {name: (model, kind, int(pairs)) for name, _, model, kind, pairs in TABLE if kind != "CPU"}
KINDS = {"reward": RewardConfig, "ppo": PPOConfig}


def test_the_table_has_every_config():
    assert {file for _, file, *_ in TABLE} == {path.name for path in CONFIGS.glob("*.yaml")}
    assert all(file == f"{name}.yaml" for name, file, *_ in TABLE)
    assert len(SLICES) == 14


@pytest.mark.parametrize("name", SLICES)
def test_a_recipe_fits_its_slice(name):
    model_name, kind, examples = SLICES[name]
    config = parse_config(CONFIGS / f"{name}.yaml", {}, KINDS.get(name.split("_")[0], DPOConfig))
    assert config.model.path.split("/")[-1] in (model_name, f"Meta-{model_name}")
    assert config.batch.size == examples

    topology = parse_topology(kind)
    mesh = abstract_mesh(config.mesh, topology.devices)

    hf = known_config(config.model.path)
    assert hf is not None
    decoder = decoder_config(hf)
    assert decoder.kv_heads % config.mesh.tensor == 0  # else each chip would hold all of them
    assert min(window or 1 << 20 for window in decoder.windows) >= config.data.max_length
    model = Model(config=replace(decoder, scores=config.scores))
    weight_shardings(model.param_shapes(), model.param_axes(), mesh)  # refuses what an axis does not divide

    # the longest pair, or prompt with its sampled answers, fits a row, and there are some for every row of a part
    planned = config.planned
    others = (planned.per_prompt - 1) * planned.num_tokens if planned.per_prompt else config.data.max_length
    assert config.data.max_length + others <= config.batch.row_length
    assert config.batch.size // config.batch.accumulation >= row_devices(mesh)
