"""A small random model and random pairs, for tests of equalities."""

from functools import cache

import jax
import numpy as np

from dpo_jax.batch import PreferenceBatch
from dpo_jax.batching.packing import Packer, pack_rows
from dpo_jax.logprobs import make_logps_fn
from dpo_jax.models.decoder import Model
from dpo_jax.models.families import decoder_config

HF_CONFIG = {
    "model_type": "llama", "vocab_size": 160, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 8, "hidden_act": "silu", "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": False, "initializer_range": 0.15,
}  # fmt: skip

Pair = tuple[np.ndarray, tuple[np.ndarray, np.ndarray], None]


def small_model(kv_heads: int = 8, **options) -> Model:
    """The model, by default as a run on one CPU device has it."""
    return Model(config=decoder_config(HF_CONFIG | {"num_key_value_heads": kv_heads}), **options)


@cache
def small_params(seed: int = 0, kv_heads: int = 8):
    """Random weights, numpy's, at home on any mesh; ``seed`` 1 is another model, to be a reference."""
    return random_params(small_model(kv_heads), seed)


def random_params(model: Model, seed: int = 0):
    """Random weights, numpy's, of any model; those of a head of scores are the largest."""
    draw = np.random.Generator(np.random.Philox(seed))
    deviation = HF_CONFIG["initializer_range"]

    def weights(path, leaf):
        name = path[-1].key
        scale = 2 * deviation if name == "score" else deviation
        return (np.ones(leaf.shape) if name.endswith("norm") else draw.normal(0, scale, leaf.shape)).astype(leaf.dtype)

    return jax.tree.map_with_path(weights, model.param_shapes())


def random_pairs(count: int = 8, seed: int = 0) -> list[Pair]:
    """Pairs of unequal lengths, some of whose prompts and answers fill or cross blocks of attention."""
    draw = np.random.Generator(np.random.Philox(seed))
    ids = lambda n: draw.integers(1, HF_CONFIG["vocab_size"], n).astype(np.int32)  # noqa: E731
    lengths = np.stack([draw.integers(1, 90, count), draw.integers(1, 40, count), draw.integers(1, 70, count)], axis=1)
    lengths[0], lengths[1] = (64, 64, 64), (1, 1, 2)
    return [(ids(prompt), (ids(chosen), ids(rejected)), None) for prompt, chosen, rejected in lengths]


def pack(pairs: list[Pair], *, layout="shared", rows=1, row_length=None, accumulation=1, valid=None) -> PreferenceBatch:
    """Pairs as one packed batch; pairs beyond ``valid`` become empty slots."""
    held = [pair if valid is None or i < valid else None for i, pair in enumerate(pairs)]
    lengths = np.array([[0] * 3 if p is None else [len(p[0]), len(p[1][0]), len(p[1][1])] for p in held])
    packer = Packer(layout, rows, row_length, accumulation)
    parts = packer.rows(lengths, lengths[:, 1:])
    shape, size = packer.shape(parts), len(pairs) // accumulation
    weight = np.array([p is not None for p in held], np.float32)
    packed = [
        pack_rows(part, shape, held[start : start + size], weight[start : start + size], 2)
        for part, start in zip(parts, range(0, len(pairs), size), strict=True)
    ]
    return packed[0] if accumulation == 1 else jax.tree.map(lambda *arrays: np.stack(arrays), *packed)


def logps_fn(model: Model | None = None, *, chunk: int = 64, **wanted: bool):
    """Log-probs of the small model."""
    model = model or small_model()
    return make_logps_fn(model.hidden, model.unembedding, chunk=chunk, **wanted)
