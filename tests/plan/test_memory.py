"""What a compiled step holds, by its own account, at the shapes of Llama-3-8B: nothing here has values."""

import math
import re
from functools import cache

import jax
import pytest

from dpo_jax.config import (
    BatchConfig,
    DataConfig,
    DPOConfig,
    LoraConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    ReferenceConfig,
    RunConfig,
    SourceConfig,
)
from dpo_jax.logprobs import BLOCK
from dpo_jax.models.adapters import make_lora
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.plan.ahead_of_time import Load, lower_step, step_arguments

LLAMA_3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "initializer_range": 0.02,
}  # fmt: skip
DEVICES, ROWS, LENGTH, TARGETS, PAIRS, CHUNK = 8, 8, 2048, 1024, 16, 128


@cache
def compiled(kind: str, loss: LossConfig):
    """The train step with a live or a cached reference, or of adapters; and the number of trained weights."""
    config = DPOConfig(
        model=ModelConfig(path="unused"),
        data=DataConfig(train=(SourceConfig(path="unused"),)),
        lora=LoraConfig(rank=16 if kind == "lora" else 0),
        reference=ReferenceConfig(mode="auto" if kind == "lora" else kind),
        loss=loss,
        batch=BatchConfig(pairs=PAIRS, target_chunk=CHUNK),
        run=RunConfig(dir="unused"),
    )
    mesh = make_mesh(MeshConfig(), jax.devices()[:DEVICES])
    decoder = decoder_config(LLAMA_3_8B)
    model = make_model(decoder, config.model, "cpu", make_lora(config.lora, decoder))
    load = Load(examples=PAIRS, microbatches=1, rows=ROWS, row_length=LENGTH, longest=LENGTH,
                lengths=(LENGTH / 4, LENGTH / 8, LENGTH / 8))  # fmt: skip
    assert load.targets == TARGETS
    arguments = step_arguments(config, model, mesh, load)
    number = sum(x.size for x in jax.tree.leaves(arguments[0].params))
    return lower_step(config, model, mesh, arguments).compile(), number


def held(kind: str, loss: LossConfig) -> tuple[float, float]:
    """Bytes a device: of the arguments, and of what the step makes besides."""
    memory = compiled(kind, loss)[0].memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


@pytest.mark.slow
def test_a_cached_reference_saves_the_reference_tree():
    weights = 4 * compiled("live", LossConfig())[1] / DEVICES
    assert weights == pytest.approx(8.03e9 / 2, rel=1e-3)
    live, cached = held("live", LossConfig()), held("cached", LossConfig())
    assert live[0] - cached[0] == pytest.approx(weights, rel=1e-3)
    assert cached[0] == pytest.approx(3 * weights, rel=1e-3)  # weights and two moments
    assert cached[1] <= live[1]


@pytest.mark.slow
def test_adapters_hold_no_second_model():
    """Policy and reference of rank 16 share one tree, and have moments for the adapters alone."""
    loss = LossConfig()
    whole, adapters = (compiled(kind, loss)[1] for kind in ("live", "lora"))
    assert 2 * adapters < 0.01 * 2 * whole  # two moments each
    base = 4 * whole / DEVICES
    assert base < held("lora", loss)[0] < base + 4 * 3 * adapters  # small enough to lie whole on each device
    assert held("lora", loss)[1] < held("live", loss)[1]
    assert sum(held("lora", loss)) < 0.7 * sum(held("cached", loss))


@pytest.mark.slow
def test_scores_of_all_tokens_are_nowhere():
    """With token statistics and WPO's squares, too: of the vocabulary's dim are the matrices and no scores."""
    for loss in (LossConfig(), LossConfig(weighting="wpo", wpo_gradient=True)):
        text = compiled("cached", loss)[0].as_text()
        shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[([\d,]+)\]", text)}
        vocabulary, width = LLAMA_3_8B["vocab_size"], LLAMA_3_8B["hidden_size"]
        assert {shape for shape in shapes if vocabulary in shape} == {(vocabulary, width // DEVICES)}
        block = math.ceil(vocabulary / math.ceil(vocabulary / BLOCK))
        assert (CHUNK, block) in shapes
        assert max(math.prod(shape) for shape in shapes if block in shape) == block * width  # the block of the matrix
