"""Operations by closed form: against hand-worked numbers and XLA's own count; what layouts save on real data."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax.batch import Adapted
from dpo_jax.batching.batches import train_batches
from dpo_jax.config import BatchConfig, DataConfig, DPOConfig, LoraConfig, ModelConfig, RunConfig, SourceConfig
from dpo_jax.data.tokenizer import load_tokenizer
from dpo_jax.methods.setup import sets_of
from dpo_jax.models.adapters import make_lora
from dpo_jax.models.decoder import Model, plain_batch
from dpo_jax.models.families import decoder_config
from dpo_jax.models.flops import Flops, Work, causal_pairs, forward_flops, pairs_work, recomputed_flops, step_flops
from dpo_jax.models.options import Lora

SMALL = decoder_config({
    "model_type": "llama", "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
})  # fmt: skip
ROWS, LENGTH = 2, 256
DENSE = Work(ROWS * LENGTH, SMALL.layers * ROWS * LENGTH**2, ROWS * LENGTH)  # a dense mask computes the whole square


def test_a_worked_example():
    tiny = replace(SMALL, vocab=10, hidden=4, layers=3, heads=2, kv_heads=1, head_dim=6, ffn=5)
    # a layer: query 4 x 12, key and value 4 x 6 each, out 12 x 4, gate, up and down 4 x 5 each: 204 weights
    found = forward_flops(tiny, Work(tokens=7, seen=3 * 11, targets=2))
    assert found == Flops(linear=2 * 3 * 204 * 7, attention=4 * 2 * 6 * 33, unembedding=2 * 4 * 10 * 2)
    assert found.total == 8568 + 1584 + 160
    assert step_flops(tiny, Work(7, 33, 2), live_reference=False) == 3 * 10312
    assert step_flops(tiny, Work(7, 33, 2), live_reference=True) == 4 * 10312
    # rank 2 beside query (4 + 12) and down (5 + 4): 2 x 3 x 2 x 25 x 7 = 2100 operations forward
    lora = Lora(rank=2, scale=1.0, targets=frozenset({"query", "down"}))
    adapted = step_flops(tiny, Work(7, 33, 2), live_reference=True, lora=lora)
    assert adapted == 2 * (8568 + 160) + 3 * 1584 + 3 * 2100 + 10312


def test_six_operations_a_weight_and_token(shared):
    config = decoder_config(json.loads((shared / "model_configs" / "llama3-8b.json").read_text()))
    model, embeddings = Model(config=config), config.vocab * config.hidden
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.param_shapes())) - embeddings  # a look-up costs nothing
    found = step_flops(config, Work(tokens=1000, seen=0, targets=1000), live_reference=False)
    assert found / (6 * weights * 1000) == pytest.approx(1, abs=1e-4)  # norms are weights, too


@pytest.mark.parametrize("window", [None, 1, 3, 8])
def test_seen_pairs_are_those_of_a_mask(window):
    place = np.arange(8)
    mask = (place[:, None] >= place) & (place[:, None] - place < (window or 9))
    expected = [mask[:length, :length].sum() for length in range(9)]
    np.testing.assert_array_equal(causal_pairs(np.arange(9), [window] * 3), 3 * np.array(expected))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("layout", ["shared", "repeated", "padded"])
def test_work_of_pairs_is_what_their_units_hold(layout, window):
    lengths = np.array([[3, 2, 5], [0, 0, 0], [1, 1, 1]])
    found = pairs_work(lengths, np.array([[2, 4], [0, 0], [1, 1]]), layout=layout, windows=[window])
    seen = {None: {"shared": 6 + 9 + 30 + 1 + 2 + 2, "repeated": 15 + 36 + 3 + 3},
            4: {"shared": 6 + 8 + 20 + 1 + 2 + 2, "repeated": 14 + 26 + 3 + 3}}[window]  # fmt: skip
    expected = Work(13, seen["shared"], 8) if layout == "shared" else Work(17, seen["repeated"], 8)
    assert found == expected


def counted(function, *arguments) -> float:
    """What XLA counts, on this platform."""
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def scores(model):
    def run(params, batch, adapters=None):
        return model.hidden(Adapted(adapters, params), batch) @ model.unembedding(params).T

    return run


def gradient(model, by: int = 0):
    return jax.grad(lambda *args: jnp.sum(jnp.sin(scores(model)(*args))), argnums=by)


@pytest.fixture(scope="module")
def batch():
    return plain_batch(jnp.ones((ROWS, LENGTH), jnp.int32), jnp.full(ROWS, LENGTH))


def test_forward_and_gradient_are_what_xla_counts(batch):
    model = Model(config=SMALL, attention="xla", scan=False)
    shapes = model.param_shapes()
    assert counted(scores(model), shapes, batch) == pytest.approx(forward_flops(SMALL, DENSE).total, rel=0.02)
    model_flops = step_flops(SMALL, DENSE, live_reference=False)
    none = counted(gradient(model), shapes, batch)
    assert none == pytest.approx(model_flops, rel=0.02)
    for remat in ("dots", "full"):
        more = recomputed_flops(SMALL, DENSE, remat) - recomputed_flops(SMALL, DENSE, "none")
        # norms and activations are computed again, too
        assert counted(gradient(replace(model, remat=remat)), shapes, batch) == pytest.approx(none + more, rel=0.01)


LAYERS = {
    "plain": {"gated": False},
    "parallel": {"gated": False, "residual": "parallel", "norm": "layer"},
    "shared": {"residual": "shared"},
    "post norm": {"post_norm": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_other_layers_are_what_xla_counts(name, batch):
    config = replace(SMALL, **LAYERS[name])
    model = Model(config=config, attention="xla", scan=False)
    none = counted(gradient(model), model.param_shapes(), batch)
    assert none == pytest.approx(step_flops(config, DENSE, live_reference=False), rel=0.02)
    more = recomputed_flops(config, DENSE, "full") - recomputed_flops(config, DENSE, "none")
    full = counted(gradient(replace(model, remat="full")), model.param_shapes(), batch)
    assert full - none == pytest.approx(more, rel=0.05)


def test_adapters_are_what_xla_counts(batch):
    lora = make_lora(LoraConfig(rank=32, targets=("q_proj", "down_proj")), SMALL)
    model = Model(config=SMALL, attention="xla", scan=False, lora=lora)
    found = counted(gradient(model, by=2), model.param_shapes(), batch, model.adapter_shapes())
    expected = step_flops(SMALL, DENSE, live_reference=False, lora=lora)
    assert found == pytest.approx(expected, rel=0.04)  # XLA leaves out the gradient below the first adapter


def cost_a_pair(shared, folder, **batch) -> float:
    """Operations a pair of the token slots that steps of HH pairs compute, at the shapes of Llama-3-8B."""
    config = DPOConfig(
        model=ModelConfig(path="unused"),
        data=DataConfig(train=(SourceConfig(path=str(shared / "preference" / "hh_harmless_dev.jsonl")),),
                        store=str(folder), workers=1),
        batch=BatchConfig(**batch),
        run=RunConfig(dir=str(folder / "run"), epochs=1),
    )  # fmt: skip
    sets = sets_of(config, load_tokenizer(str(shared / "tokenizers" / "qwen3"), None, None))
    batches = train_batches(sets, config.batch, row_devices=1)
    model = decoder_config(json.loads((shared / "model_configs" / "llama3-8b.json").read_text()))
    total = 0
    for step in range(sets.order.num_steps):
        ids = sets.order.step_ids(step)
        ids = ids[ids >= 0]
        work = pairs_work(
            sets.train.lengths[ids], sets.train.num_targets[ids], layout=config.batch.layout, windows=model.windows
        )
        work = work._replace(tokens=batches(step).batch.tokens.size)
        total += step_flops(model, work, live_reference=True)
    return total / len(sets.train)


@pytest.mark.slow
@pytest.mark.parametrize(("pairs", "row_length"), [(64, "auto"), (128, 4096)])
def test_sharing_and_packing_save_operations_on_real_dialogues(shared, tmp_path_factory, pairs, row_length):
    folder = tmp_path_factory.getbasetemp() / "dialogues"  # tokenized once
    shared_rows, repeated = (
        cost_a_pair(shared, folder, pairs=pairs, layout=layout, row_length=row_length)
        for layout in ("shared", "repeated")
    )
    padded = cost_a_pair(shared, folder, pairs=pairs, layout="padded")  # to the longest of a step's sequences
    assert shared_rows <= 0.70 * repeated
    assert shared_rows <= 0.35 * padded
