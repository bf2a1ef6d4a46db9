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
class YarnScaling:
    """YaRN: low frequencies are divided by ``factor``, high ones kept, those in between blended (arXiv 2309.00071)."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float  # of cosines and sines, so that scores are scaled by its square
    beta_fast: float = 32.0  # turns in the original context from which a frequency is kept
    beta_slow: float = 1.0  # turns below which it is divided
    truncate: bool = True  # round the indices of the two frequencies outward


@dataclass(frozen=True, kw_only=True)
class LongropeScaling:
    """LongRoPE in the original context: each frequency is divided by its factor (arXiv 2402.13753).

    Longer sequences have other factors, for all of their tokens, so no row of several sequences can have both.
    """

    factors: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float  # as in YaRN


@dataclass(frozen=True, kw_only=True)
class DynamicScaling:
    """Dynamic NTK scaling in the original context, where it has no effect; only longer sequences change the base."""

    original_max_position_embeddings: int


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongropeScaling | DynamicScaling


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embeddings (arXiv 2104.09864)."""

    theta: float
    scaling: Scaling | None = None


@dataclass(frozen=True, kw_only=True)
class LayerKind:
    """Options that may differ between the layers of a decoder; they add no parameters."""

    window: int | None = None  # a token sees keys at most window - 1 positions back
    rope: Rope | None = Rope(theta=10_000.0)  # None: the layer does not rotate


@dataclass(frozen=True, kw_only=True)
class ExpertConfig:
    """A mixture of experts in place of the feed-forward of every layer; each expert has ``DecoderConfig.ffn`` features.

    An expert computes down(g sigmoid(alpha g) (u + offset)), with gate g and up u clamped to ``limit``.
    """

    number: int  # E
    per_token: int  # k
    softmax: Literal["all", "chosen"] = "all"  # experts over which a token's weights are normalized first
    renormalize: bool = False  # divide the weights of the chosen experts by their sum
    router_bias: bool = False
    alpha: float = 1.0
    offset: float = 0.0
    limit: float | None = None  # g is at most this, u at most this in absolute value
    shared_ffn: int = 0  # features of the shared expert, scaled by a sigmoid of its own; 0: none
    balance_coef: float = 0.0  # of the load-balancing loss, in training


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """All options that define what the decoder computes."""

    vocab: int  # V
    hidden: int  # D
    layers: int  # L
    heads: int  # N
    kv_heads: int  # K
    head_dim: int  # H
    ffn: int  # F, of each expert in a mixture
    norm_eps: float
    norm: Literal["rms", "layer"] = "rms"  # layer: the mean is subtracted first
    norm_bias: bool = False
    norm_offset: float = 0.0  # added to the weight of every norm
    pre_norm: bool = True  # norm of the input of attention and feed-forward
    post_norm: bool = False  # norm of their output, before it is added to the residual stream
    # parallel: the feed-forward reads what attention reads, each by its norm; shared: by one norm
    residual: Literal["sequential", "parallel", "shared"] = "sequential"
    qk_norm: Literal["none", "head", "all"] = "none"  # norm of each query and key head, or of all heads at once
    activation: Activation = "silu"
    gated: bool = True  # the feed-forward has a gate, to which the activation applies
    qkv_bias: bool = False
    out_bias: bool = False  # bias of the projection after attention
    mlp_bias: bool = False
    unembed_bias: bool = False
    pattern: tuple[LayerKind, ...] = (LayerKind(),)  # kinds of the layers from the first on, repeated
    rotary_dims: int | None = None  # first dims of a head, which rotate; None: all
    rotary_interleaved: bool = False  # rotated pairs are neighbors; otherwise a dim of each half of the dims
    learned_positions: int = 0  # rows of a table of position embeddings
    attention_scale: float | None = None  # of scores; None: 1 / sqrt(H)
    sinks: bool = False  # each head has a score that its softmax counts as that of one more key, of value 0
    attention_softcap: float | None = None  # scores become cap * tanh(score / cap)
    logit_softcap: float | None = None
    embed_scale: float = 1.0  # factor of the embeddings
    residual_scale: float = 1.0  # factor of what attention and feed-forward add to the residual stream
    logit_scale: float = 1.0
    experts: ExpertConfig | None = None  # None: one feed-forward for all tokens
    tied: bool = False  # the unembedding is the embedding
    scores: int = 0  # outputs of a reward model's head, which replaces the unembedding; 0: a language model
    init_std: float = 0.02
    family: str = "llama"  # ``model_type`` that names the tensors in the files; it does not affect the computation

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The different kinds of layers, in the order in which they first occur."""
        return tuple(dict.fromkeys(self.pattern))

    @property
    def kind_of_layer(self) -> tuple[int, ...]:
        """Index into ``kinds`` of each layer."""
        return tuple(self.kinds.index(self.pattern[layer % len(self.pattern)]) for layer in range(self.layers))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Sliding window of each layer."""
        return tuple(self.kinds[kind].window for kind in self.kind_of_layer)

    @property
    def rotated(self) -> int:
        """Number of dims of a head that rotate."""
        return self.head_dim if self.rotary_dims is None else self.rotary_dims

    @property
    def max_positions(self) -> int | None:
        """Longest sequence for which the decoder is defined, or None if there is no limit."""
        scalings = [kind.rope.scaling for kind in self.kinds if kind.rope is not None]
        limits = [
            s.original_max_position_embeddings for s in scalings if isinstance(s, LongropeScaling | DynamicScaling)
        ]
        return min(limits + [self.learned_positions] * (self.learned_positions > 0), default=None)

    @property
    def score_scale(self) -> float:
        """Factor of attention scores."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def logits(self) -> int:
        """Number of logits per predicted token; 0 in a reward model."""
        return 0 if self.scores else self.vocab

    def size(self, axis: str) -> int:
        """Return the size of a logical parameter axis, which ``projections.AXES`` names."""
        if axis in ("embed", "expert_embed"):
            return self.hidden
        if self.experts is not None:
            sizes = {"experts": self.experts.number, "routes": self.experts.number}
            sizes |= {"shared_ffn": self.experts.shared_ffn, "single": 1}
            if axis in sizes:
                return sizes[axis]
        return getattr(self, axis)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: y += scale * (x A^T) B^T for every target projection (arXiv 2106.09685)."""

    rank: int
    scale: float
    targets: frozenset[str]  # names of projections
    shared: tuple[tuple[str, str], ...] = ()  # (name, other): both are in one module, so name has the A of other

    def owner(self, name: str) -> str:
        """Return the projection whose A is used by ``name``: itself or, in a fused module, the module's first one."""
        return dict(self.shared).get(name, name)
