"""What a compiled step holds, by its own account, at the shapes of Llama-3-8B: nothing here has values."""

import math
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import pytest

from dpo_jax.assemble import scoring_functions
from dpo_jax.batch import PairLogps, PreferenceBatch
from dpo_jax.config import LoraConfig, LossConfig, MeshConfig, OptimizerConfig
from dpo_jax.logprobs import BLOCK, make_logps_fn
from dpo_jax.models.adapters import make_lora
from dpo_jax.models.decoder import make_model
from dpo_jax.models.families import decoder_config
from dpo_jax.optimizer import make_optimizer
from dpo_jax.policy import placed_shapes, trained_shapes
from dpo_jax.sharding import make_mesh, replicated, row_sharding
from dpo_jax.step import Base, init_state, make_train_step, state_shardings

LLAMA_3_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_act": "silu",
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "initializer_range": 0.02,
}  # fmt: skip
DEVICES, ROWS, LENGTH, TARGETS, PAIRS, CHUNK = 8, 8, 2048, 1024, 16, 128


def shapes_of_batch(mesh) -> PreferenceBatch:
    """One row a device, filled to its end."""
    of = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)  # noqa: E731
    batch = PreferenceBatch(
        **{name: of(ROWS, LENGTH) for name in ("tokens", "positions", "segments", "branches")},
        **{f"target_{name}": of(ROWS, TARGETS) for name in ("tokens", "sources", "answers", "offsets")},
        target_mask=of(ROWS, TARGETS, dtype=bool),
        answer_slots=of(PAIRS, 2),
        weight=of(PAIRS, dtype=jnp.float32),
        valid=of(PAIRS, dtype=bool),
        blocks=of(ROWS, 256, 2),
        answers_per_row=4,
        longest=LENGTH,
        branch_length=LENGTH,
    )
    places = batch.place(row_sharding(mesh), replicated(mesh))
    return jax.tree.map(lambda x, own: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=own), batch, places)


@cache
def compiled(kind: str, loss: LossConfig):
    """The train step with a live or a cached reference, or of adapters; and the number of trained weights."""
    mesh = make_mesh(MeshConfig(), jax.devices()[:DEVICES])
    with jax.set_mesh(mesh):
        model = make_model(decoder_config(LLAMA_3_8B), platform="cpu", dtype="float32", param_dtype="float32",
                           attention="auto", remat="full", scan=True, matmul_precision="default")  # fmt: skip
        if kind == "lora":
            model = replace(model, lora=make_lora(LoraConfig(rank=16)))
        params = trained_shapes(model, mesh)
        optimizer = make_optimizer(OptimizerConfig(), 100)
        state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
        own = state_shardings(state, jax.tree.map(lambda x: x.sharding, params), replicated(mesh), optimizer)
        state = jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state, own)
        logps_fn = make_logps_fn(*scoring_functions(model), chunk=CHUNK, stats=True, squares=loss.weighting == "wpo")
        cached = PairLogps(
            sum=jnp.zeros((PAIRS, 2)),
            count=jnp.zeros((PAIRS, 2)),
            weight=jnp.zeros(PAIRS),
            valid=jnp.zeros(PAIRS, bool),
        )
        base = placed_shapes(model, mesh)
        reference = {"live": base, "cached": jax.eval_shape(lambda: cached), "lora": Base(base)}[kind]
        step = make_train_step(logps_fn=logps_fn, loss=loss, optimizer=optimizer, shardings=own,
                               metrics_sharding=replicated(mesh))  # fmt: skip
        return step.lower(state, reference, shapes_of_batch(mesh)).compile(), sum(
            x.size for x in jax.tree.leaves(params)
        )


def held(kind: str, loss: LossConfig) -> tuple[float, float]:
    """Bytes a device: of the arguments, and of what the step makes besides."""
    memory = compiled(kind, loss)[0].memory_analysis()
    return memory.argument_size_in_bytes, memory.temp_size_in_bytes


def test_a_cached_reference_saves_the_reference_tree():
    weights = 4 * compiled("live", LossConfig())[1] / DEVICES
    assert weights == pytest.approx(8.03e9 / 2, rel=1e-3)
    live, cached = held("live", LossConfig()), held("cached", LossConfig())
    assert live[0] - cached[0] == pytest.approx(weights, rel=1e-3)
    assert cached[0] == pytest.approx(3 * weights, rel=1e-3)  # weights and two moments
    assert cached[1] <= live[1]


def test_adapters_hold_no_second_model():
    """Policy and reference of rank 16 share one tree, and have moments for the adapters alone."""
    loss = LossConfig()
    whole, adapters = (compiled(kind, loss)[1] for kind in ("live", "lora"))
    assert 2 * adapters < 0.01 * 2 * whole  # two moments each
    base = 4 * whole / DEVICES
    assert base < held("lora", loss)[0] < base + 4 * 3 * adapters  # small enough to lie whole on each device
    assert held("lora", loss)[1] < held("live", loss)[1]
    assert sum(held("lora", loss)) < 0.7 * sum(held("cached", loss))


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
