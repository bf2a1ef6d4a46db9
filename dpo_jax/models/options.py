"""Options that define what a decoder computes; hashable, without arrays. Shape letters as in ``layers.py``."""

from dataclasses import dataclass
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_pytorch_tanh"]


@dataclass(frozen=True, kw_only=True)
class LinearScaling:
    """Linear scaling: rotary positions are divided by ``factor`` (arXiv 2306.15595)."""

    factor: float


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1 scaling: low frequencies are divided by ``factor``, high ones kept, those in between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Options of the layers at one position of the repeating layer pattern."""

    window: int | None = None  # a token sees keys at most window - 1 positions back


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """All options that define what the decoder computes."""

    vocab: int  # V
    hidden: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    ffn: int  # F
    rms_eps: float
    rope_theta: float
    rope_scaling: LinearScaling | Llama3Scaling | None = None
    activation: Activation = "silu"
    qkv_bias: bool = False
    out_bias: bool = False  # bias of the projection after attention
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm of each query and key head
    pattern: tuple[LayerKind, ...] = (LayerKind(),)  # repeated over the layers; only one kind is supported
    tied: bool = False  # the unembedding is the embedding
    scores: int = 0  # outputs of a reward model's head, which replaces the unembedding; 0: a language model
    init_std: float = 0.02

    @property
    def window(self) -> int | None:
        """Sliding window, the same in every layer."""
        (kind,) = self.pattern
        return kind.window

    @property
    def logits(self) -> int:
        """Number of logits per predicted token; 0 in a reward model."""
        return 0 if self.scores else self.vocab

    def size(self, axis: str) -> int:
        """Return the size of a logical parameter axis: the field of the same name, or ``hidden`` for ``embed``."""
        return self.hidden if axis == "embed" else getattr(self, axis)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: y += scale * (x A^T) B^T for every target projection (arXiv 2106.09685)."""

    rank: int
    scale: float
    targets: frozenset[str]  # names of `projections.LAYER`
