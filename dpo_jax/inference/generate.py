"""Generate answers with a cache of keys and values: one pass over the prompts, then one token of every row at a time.

A row's tokens depend on its prompt and key alone: not on the batch, the bucket of prompt lengths, or the mesh (in
float32; in bfloat16 rounding may break near ties differently).

Shape letters: R rows, P prompt tokens per row, N new tokens per row, V vocabulary.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from dpo_jax.batch import Adapted, Params, round_up
from dpo_jax.config.sampling import SamplingConfig
from dpo_jax.inference.sampling import row_keys, sample
from dpo_jax.models.decoder import Model
from dpo_jax.ops.softcap import soft_cap
from dpo_jax.parallel.sharding import replicated, rollout_mesh, row_devices, row_sharding, weight_shardings

NO_END = [-1]  # end tokens of a model that has none
SMALLEST_BUCKET = 16  # tokens; prompts are padded to a power of two, so that few programs are compiled


class Generated(NamedTuple):
    """Generated answers, one per row; values after the end of an answer are 0."""

    tokens: Int[Array, "R N"]
    logps: Float[Array, "R N"]  # log-prob of each token under the model, at temperature 1 without top-k or top-p
    lengths: Int[Array, " R"]  # tokens, with the end token
    ended: Bool[Array, " R"]  # the answer has an end token


class Answer(NamedTuple):
    """One generated answer, as Python values."""

    tokens: list[int]  # with the end token
    logps: list[float]
    ended: bool  # False: it was stopped at the maximum length

    def text(self, tokenizer: Any, prompt: list[int]) -> str:
        """Decode the answer without special tokens; its prompt is decoded with it, to keep a leading space."""
        decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        tokens = self.tokens[:-1] if self.ended else self.tokens
        prompt_text, text = decode(prompt), decode(prompt + tokens)
        return text[len(prompt_text) :] if text.startswith(prompt_text) else decode(tokens)

    @property
    def finish_reason(self) -> str:
        """Why generation ended: ``stop`` at an end token, ``length`` at the maximum length."""
        return "stop" if self.ended else "length"

    def fields(self, tokenizer: Any, prompt: list[int]) -> dict[str, Any]:
        """Return the answer's fields in output files: text, number of tokens and finish reason."""
        text = self.text(tokenizer, prompt)
        return {"text": text, "num_tokens": len(self.tokens), "finish_reason": self.finish_reason}


def answer_rows(
    model: Model,
    weights: Params | Adapted,
    prompts: Int[Array, "R P"],
    lengths: Int[Array, " R"],
    keys: Key[Array, " R"],
    end_ids: Int[Array, " _"],
    options: SamplingConfig,
) -> Generated:
    """Generate an answer to each right-padded prompt; ``lengths``: tokens in each prompt. This is a pure function."""
    num_rows, prompt_length = prompts.shape
    unembedding = model.unembedding(weights).astype(model.dtype)
    last_index = lengths - 1  # index of the token with which the loop begins
    positions = jnp.where(jnp.arange(prompt_length) < last_index[:, None], jnp.arange(prompt_length), -1)
    _, cache = model.extend(weights, prompts, positions, model.empty_cache(num_rows, prompt_length))
    token = jnp.take_along_axis(prompts, last_index[:, None], axis=1)[:, 0]
    zeros = jnp.zeros((num_rows, options.max_tokens))
    is_ended = jnp.zeros(num_rows, bool)
    answers = Generated(zeros.astype(jnp.int32), zeros, jnp.zeros(num_rows, jnp.int32), is_ended)

    def any_open(state):
        t, _, _, answers = state
        return (t < options.max_tokens) & ~answers.ended.all()

    def add_token(state):
        t, token, cache, answers = state
        hidden, cache = model.extend(weights, token[:, None], (last_index + t)[:, None], cache)
        logits = jnp.einsum(
            "RD,VD->RV", hidden[:, 0], unembedding, precision=model.precision, preferred_element_type=jnp.float32
        )
        logits = soft_cap(logits, model.config.logit_softcap)
        token = sample(logits, keys, t, options)
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=1)[:, 0]
        is_open = ~answers.ended
        answers = Generated(
            tokens=answers.tokens.at[:, t].set(jnp.where(is_open, token, 0)),
            logps=answers.logps.at[:, t].set(jnp.where(is_open, logp, 0.0)),
            lengths=answers.lengths + is_open,
            ended=answers.ended | jnp.isin(token, end_ids),
        )
        return t + 1, token, cache, answers

    state = jnp.int32(0), token, cache.grow(options.max_tokens), answers
    return jax.lax.while_loop(any_open, add_token, state)[-1]


def rollout_weights(model: Model, weights: Params | Adapted, mesh: Mesh) -> Any:
    """Copy the weights to the `rollout_mesh` of ``mesh`` in the compute dtype, as each new token reads them all."""
    return make_copy(model, rollout_mesh(mesh), isinstance(weights, Adapted))(weights)


def rollout_shardings(model: Model, mesh: Mesh | AbstractMesh, has_adapters: bool) -> Any:
    """Return the sharding, on a `rollout_mesh`, of each weight that `answer_rows` reads.

    Only the experts are sharded over `expert`: a token goes to them, and no device need hold all of them.
    """

    def shardings(shapes: Any, axes: Any) -> Any:
        without_embed = lambda names: tuple(None if name == "embed" else name for name in names)  # noqa: E731
        axes = jax.tree.map(without_embed, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
        return weight_shardings(shapes, axes, mesh)

    base_shardings = shardings(model.param_shapes(), model.param_axes())
    if not has_adapters:
        return base_shardings
    return Adapted(shardings(model.adapter_shapes(), model.adapter_axes()), base_shardings)


def to_compute_dtype(model: Model, weights: Any) -> Any:
    """Cast all weights to the compute dtype, except those of routers, whose rounding could change a token's experts."""
    is_router = lambda path: path[-1].key in ("router", "router_bias")  # noqa: E731
    to_dtype = lambda path, x: x if is_router(path) else x.astype(model.dtype)  # noqa: E731
    return jax.tree.map_with_path(to_dtype, weights)


@cache
def make_copy(model: Model, mesh: Mesh, has_adapters: bool) -> Callable[[Any], Any]:
    """Return the jitted function that copies weights to a `rollout_mesh`; ``plan`` compiles it ahead of time, too."""
    return jax.jit(partial(to_compute_dtype, model), out_shardings=rollout_shardings(model, mesh, has_adapters))


@cache
def make_answer_rows(model: Model, options: SamplingConfig, out_sharding: NamedSharding) -> Callable[..., Generated]:
    """Return `answer_rows`, jitted; ``plan`` compiles the same function ahead of time."""
    return jax.jit(partial(answer_rows, model, options=options), out_shardings=out_sharding)


def prompt_bucket(longest: int) -> int:
    """Return the length to which prompts of up to ``longest`` tokens are padded."""
    return max(SMALLEST_BUCKET, 1 << (longest - 1).bit_length())


def generate(
    model: Model,
    weights: Params | Adapted,
    prompts: Sequence[Sequence[int]],
    options: SamplingConfig,
    mesh: Mesh,
    *,
    end_ids: Sequence[int],
    seed: int = 0,
    step: int = 0,
    first_row: int = 0,
) -> list[Answer]:
    """Generate an answer to each prompt, as one batch on the devices of ``mesh``.

    ``weights``: from `rollout_weights` for the same mesh. The draw of a token of answer i depends on (``seed``,
    ``step``, ``first_row`` + i) and the token's index.
    """
    assert all(len(prompt) > 0 for prompt in prompts), "a prompt must have at least one token"
    mesh = rollout_mesh(mesh)
    num_rows = round_up(len(prompts), row_devices(mesh))
    tokens = np.zeros((num_rows, prompt_bucket(max(map(len, prompts)))), np.int32)
    lengths = np.ones(num_rows, np.int32)  # of rows that only fill up the devices, too
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    with jax.set_mesh(mesh):
        tokens, lengths = jax.device_put((tokens, lengths), row_sharding(mesh))
        keys = row_keys(seed, step, first_row + jnp.arange(num_rows))
        answer_rows_fn = make_answer_rows(model, options, replicated(mesh))
        answers = jax.device_get(answer_rows_fn(weights, tokens, lengths, keys, jnp.asarray(end_ids, jnp.int32)))
    return [
        Answer(tokens[:length].tolist(), logps[:length].tolist(), bool(ended))
        for tokens, logps, length, ended in zip(*answers, strict=True)
    ][: len(prompts)]
