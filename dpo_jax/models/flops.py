"""Floating-point operations of a decoder, in closed form, because compiler counts omit kernels and loops.

The product of an [a, b] and a [b, c] matrix is 2 a b c operations. Only matrix products count: projections and
feed-forward of each token, attention of each visible (query, key) pair, and the unembedding of each predicted token.
Norms, rotary embeddings, activations and softmax are left out, as is usual for MFU; they are a few percent in a small
model and negligible in a large one.

These are *model* operations, the same for every kernel and memory setting. ``recomputed_flops`` counts what the
backward pass recomputes to save memory; the hardware executes the sum of both.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from dpo_jax.models.options import DecoderConfig, Lora
from dpo_jax.models.projections import AXES, layer_projections


class Work(NamedTuple):
    """Workload of a forward pass, as counts over all rows of a batch."""

    tokens: int  # tokens through the layers: real ones for MFU, all slots for the cost of a layout
    seen: int  # visible (query, key) pairs, over all layers
    targets: int  # tokens to predict, each with logits over the whole vocabulary


class Flops(NamedTuple):
    """Operations by kind of matrix product."""

    linear: int  # projections and feed-forward
    attention: int  # scores and weighted values
    unembedding: int  # logits; 0 in a reward model, whose head costs nothing next to its layers

    @property
    def total(self) -> int:
        """Total number of operations."""
        return sum(self)


def causal_pairs(length: Int[np.ndarray, "*n"], windows: Sequence[int | None]) -> Int[np.ndarray, "*n"]:
    """Count the (query, key) pairs of a causal sequence, summed over layers with these sliding windows.

    Token p sees p + 1 keys, or the last ``window`` of them.
    """
    length = np.asarray(length, np.int64)
    total = np.zeros_like(length)
    for window, num_layers in Counter(windows).items():
        capped_length = length if window is None else np.minimum(length, window)
        total += num_layers * (capped_length * (capped_length + 1) // 2 + (length - capped_length) * capped_length)
    return total


def pairs_work(
    lengths: Int[np.ndarray, "B _"],
    num_targets: Int[np.ndarray, "B K"],
    *,
    layout: Literal["shared", "repeated", "padded"],
    windows: Sequence[int | None],
) -> Work:
    """Compute the workload of B prompts with K answers each, counting real tokens only; lengths 0 are padding.

    In layout ``shared`` a prompt is processed once and all its answers continue it; otherwise, once per answer.
    ``lengths`` [B, 1 + K]: tokens of prompt and answers; ``num_targets`` [B, K]: tokens to predict.
    ``windows``: sliding window of each layer.
    """
    lengths = np.asarray(lengths, np.int64)
    prompts, answers = lengths[:, :1], lengths[:, 1:]
    copies = 1 if layout == "shared" else answers.shape[1]
    unshared = causal_pairs(prompts + answers, windows).sum()
    saved = (answers.shape[1] - copies) * causal_pairs(prompts, windows).sum()
    tokens = copies * prompts.sum() + answers.sum()
    return Work(int(tokens), int(unshared - saved), int(np.sum(num_targets)))


def projections(config: DecoderConfig) -> dict[str, tuple[int, int]]:
    """Return the (input, output) size of each matrix of a layer, by name."""

    def size(letters: str) -> int:
        return math.prod(config.size(AXES[letter]) for letter in letters)

    return {row.name: (size(row.inputs), size(row.outputs)) for row in layer_projections(config).values()}


def copies(config: DecoderConfig, name: str) -> int:
    """Return how many matrices ``name`` of a layer multiply a token: those of its experts, or one."""
    is_expert = bool(layer_projections(config)[name].stack)
    return config.experts.per_token if is_expert and config.experts is not None else 1


def active_weights(config: DecoderConfig) -> dict[str, int]:
    """Return the number of weights of a layer that multiply a token, by the name of their matrix."""
    return {name: copies(config, name) * inputs * outputs for name, (inputs, outputs) in projections(config).items()}


def forward_flops(config: DecoderConfig, work: Work) -> Flops:
    """Count a forward pass's operations: 2 per weight and token (or target), 4 per head, feature and visible pair.

    Of a mixture's experts, only those of the token count.
    """
    return Flops(
        linear=2 * config.layers * sum(active_weights(config).values()) * work.tokens,
        attention=4 * config.heads * config.head_dim * work.seen,
        unembedding=2 * config.hidden * config.logits * work.targets,
    )


def adapter_flops(config: DecoderConfig, work: Work, lora: Lora) -> int:
    """Count the operations that adapters add to a forward pass: (x A^T) B^T, with x A^T computed once per module.

    Of the experts' adapters, only those of a token's experts count.
    """
    sizes = projections(config)
    num_inputs = sum(copies(config, name) * sizes[name][0] for name in lora.targets if lora.owner(name) == name)
    num_outputs = sum(copies(config, name) * sizes[name][1] for name in lora.targets)
    return 2 * config.layers * lora.rank * (num_inputs + num_outputs) * work.tokens


def step_flops(config: DecoderConfig, work: Work, *, live_reference: bool, lora: Lora | None = None) -> int:
    """Count the model operations of a training step over ``work``.

    Every product y = W x costs the same again for the gradient of x, and once more for that of W, so full training
    costs 3 forward passes. With adapters (``lora``) the base matrices, including the unembedding, need no gradient of
    W: they cost 2 forward passes, while attention, whose factors both have gradients, and the adapters cost 3. (The
    input gradient of the first layer, needed only by embeddings, is counted too.) A live reference adds one forward
    pass; a cached one costs nothing.
    """
    forward = forward_flops(config, work)
    products_per_matrix = 3 if lora is None else 2
    training = products_per_matrix * (forward.linear + forward.unembedding) + 3 * forward.attention
    adapters = 0 if lora is None else 3 * adapter_flops(config, work, lora)
    return training + adapters + (forward.total if live_reference else 0)


def recomputed_projections(config: DecoderConfig, remat: Literal["none", "dots", "full"]) -> set[str]:
    """Return the names of the matrices of a layer whose matmul the backward pass recomputes.

    ``full``: all matrices but those whose output nothing in the layer needs, since it is only added to the residual
    stream: the last and, where the feed-forward does not read the sum, that of attention. Otherwise none, as outputs
    are saved, but for those of a mixture's experts and, with ``dots``, router.
    """
    if remat == "full":
        unneeded = {"down"} if config.residual == "sequential" else {"out", "down"}
        return set(projections(config)) - (set() if config.post_norm else unneeded)
    if config.experts is None:
        return set()
    return {"gate", "up"} | ({"router"} if remat == "dots" else set())


def recomputed_flops(config: DecoderConfig, work: Work, remat: Literal["none", "dots", "full"]) -> int:
    """Count the operations that the policy's backward pass recomputes; ``remat`` as in `config.ModelConfig`.

    Always: the logits, chunk by chunk, and the attention scores, which every kernel but ``xla`` recomputes.
    ``dots``: also attention's forward pass, which ``blocks`` keeps. ``full``: also ``recomputed_projections``.
    """
    forward = forward_flops(config, work)
    weights = active_weights(config)
    num_weights = sum(weights[name] for name in recomputed_projections(config, remat))
    attention_ops = forward.attention // 2 + (0 if remat == "none" else forward.attention)
    return forward.unembedding + attention_ops + 2 * config.layers * num_weights * work.tokens
