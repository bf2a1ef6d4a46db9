"""Floating-point operations of a decoder, by closed form: what compilers count leaves out kernels and loops.

A product of an [a, b] and a [b, c] matrix is 2 a b c operations. Only the matrix products count: projections and
feed-forward of each token, attention of each (query, key) pair that is seen, and the vocabulary's scores of each
predicted token. Norms, rotations, activations and softmax are left out, as in everybody's MFU; they are some percent of
a small model and next to nothing in a large one.

These are *model* operations, the same for every kernel and memory setting. What the backward pass computes a second
time, to save memory, is ``recomputed_flops``; model and recomputed ones together are what the hardware does.
"""

import math
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from dpo_jax.models.options import DecoderConfig, Lora
from dpo_jax.models.projections import AXES, LAYER


class Work(NamedTuple):
    """What a forward pass is asked for; counts over all rows of a batch."""

    tokens: int  # that pass through the layers: real ones for an MFU, slots for what a layout costs
    seen: int  # (query, key) pairs between which attention looks, in each layer
    targets: int  # tokens that are predicted, each from scores of the whole vocabulary


class Flops(NamedTuple):
    """Operations by where they arise."""

    linear: int  # projections and feed-forward
    attention: int  # scores and weighted values
    unembedding: int  # scores over the vocabulary

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


def causal_pairs(length: Int[np.ndarray, "*n"], window: int | None) -> Int[np.ndarray, "*n"]:
    """(query, key) pairs of a causal sequence: token p sees p + 1 keys, or the last ``window`` of them."""
    length = np.asarray(length, np.int64)
    inside = length if window is None else np.minimum(length, window)
    return inside * (inside + 1) // 2 + (length - inside) * inside


def pairs_work(
    lengths: Int[np.ndarray, "B _"],
    num_targets: Int[np.ndarray, "B K"],
    *,
    layout: Literal["shared", "repeated", "padded"],
    window: int | None,
) -> Work:
    """Work of the real tokens of B prompts with K answers each; a slot whose lengths are 0 is empty.

    In layout ``shared`` a prompt passes once and its answers each continue it; else it passes once an answer.

    Args:
        lengths: [B, 1 + K], tokens of prompt and answers.
        num_targets: tokens of each answer that are learned.
        layout: as in `config.BatchConfig`.
        window: of the model; None: a token sees all before it.
    """
    lengths = np.asarray(lengths, np.int64)
    prompts, answers = lengths[:, :1], lengths[:, 1:]
    copies = 1 if layout == "shared" else answers.shape[1]
    unshared = causal_pairs(prompts + answers, window).sum()
    spared = (answers.shape[1] - copies) * causal_pairs(prompts, window).sum()
    tokens = copies * prompts.sum() + answers.sum()
    return Work(int(tokens), int(unshared - spared), int(np.sum(num_targets)))


def projections(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each matrix of a layer."""

    def size(letters: str) -> int:
        return math.prod(config.size(AXES[letter]) for letter in letters)

    return {row.name: (size(row.inputs), size(row.outputs)) for row in LAYER.values()}


def forward_flops(config: DecoderConfig, work: Work) -> Flops:
    """A forward pass: 2 operations a weight and token, 4 a head, feature and seen pair, 2 a vocabulary weight."""
    weights = sum(inputs * outputs for inputs, outputs in projections(config).values())
    return Flops(
        linear=2 * config.layers * weights * work.tokens,
        attention=4 * config.layers * config.heads * config.head_dim * work.seen,
        unembedding=2 * config.hidden * config.vocab * work.targets,
    )


def adapter_flops(config: DecoderConfig, work: Work, lora: Lora) -> int:
    """What adapters add to a forward pass: (x A^T) B^T."""
    sizes = projections(config)
    return 2 * config.layers * lora.rank * sum(sum(sizes[name]) for name in lora.targets) * work.tokens


def step_flops(config: DecoderConfig, work: Work, *, live_reference: bool, lora: Lora | None = None) -> int:
    """Model operations of a training step over ``work``.

    Every product y = W x costs as much again for the gradient by x, and once more for that by W. So training is 3
    forward passes where all weights are trained. With adapters (``lora``) the model's own matrices, the
    unembedding among them, need no gradient by W: 2 forward passes of them, 3 of attention, whose both factors have
    gradients, and 3 of the adapters. (The gradient by the input of the first layer, which only embeddings need, is
    counted there too.) A live reference is one forward pass more, a cached one costs nothing.
    """
    forward = forward_flops(config, work)
    trained = 3 if lora is None else 2
    training = trained * (forward.linear + forward.unembedding) + 3 * forward.attention
    adapters = 0 if lora is None else 3 * adapter_flops(config, work, lora)
    return training + adapters + (forward.total if live_reference else 0)


def recomputed_projections(config: DecoderConfig, remat: Literal["none", "dots", "full"]) -> dict[str, tuple[int, int]]:
    """(inputs, outputs) of each matrix of a layer whose product the backward pass computes a second time.

    ``full``: of all but the last, whose result nothing in the layer needs. Else the products are kept.
    """
    *all_but_last, _ = projections(config).items()
    return dict(all_but_last) if remat == "full" else {}


def recomputed_flops(config: DecoderConfig, work: Work, remat: Literal["none", "dots", "full"]) -> int:
    """Operations that the backward pass of the policy computes a second time; ``remat`` as in `config.ModelConfig`.

    Always: the vocabulary's scores, chunk by chunk, and attention's scores, which every kernel but the oracle makes
    again. ``dots``: attention's forward pass too. ``full``: ``recomputed_projections``, too.
    """
    forward = forward_flops(config, work)
    weights = sum(inputs * outputs for inputs, outputs in recomputed_projections(config, remat).values())
    attention = 0 if remat == "none" else forward.attention
    return forward.unembedding + forward.attention // 2 + attention + 2 * config.layers * weights * work.tokens
