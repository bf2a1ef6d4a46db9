"""The value model of PPO: whose layers it uses, how they are initialized, and what it computes with the policy."""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dpo_jax.batch import Adapted, Params, PreferenceBatch
from dpo_jax.config import PPOConfig
from dpo_jax.errors import require
from dpo_jax.inference.reference import copy_weights
from dpo_jax.logprobs import make_token_logps_fn
from dpo_jax.methods.setup import Policy, Setup
from dpo_jax.models.adapters import make_lora
from dpo_jax.models.decoder import Model
from dpo_jax.models.heads import without_unembedding
from dpo_jax.models.options import Lora
from dpo_jax.parallel.sharding import platform_of
from dpo_jax.policy_gradient import ActorCritic, OutputsFn, TokensFn, separate_outputs
from dpo_jax.runs.checksums import weights_id
from dpo_jax.weights.open import OpenModel, adapted_run, load_start, restore_params, trained_shapes
from dpo_jax.weights.reward_model import open_reward_model


class ValueModel(NamedTuple):
    """A decoder with a head; if it is ``shared``, its layers are the policy's, and only the head is its own.

    With LoRA its base is the policy's, too.
    """

    model: Model
    shared: bool = False

    def trained(self, params: Params) -> Params:
        """Return which of the model's trained parameters are the value model's own."""
        return {"score": params["score"]} if self.shared else params


def value_model_of(config: PPOConfig, policy: Model, reward: OpenModel | None = None) -> ValueModel | None:
    """Return the value model, or None if the estimator has none.

    ``reward``: the reward model, if the value model starts from it; None: it is taken to be as the policy, with a head.
    """
    kind, scored = config.ppo.trained_value, replace(policy, config=replace(policy.config, scores=1))
    if kind is None:
        return None
    if kind != "reward" or reward is None:
        return ValueModel(scored, shared=kind == "shared")
    if policy.lora is None:
        return ValueModel(reward.model)
    return ValueModel(replace(scored, lora=reward_adapters(config, policy, reward)))


def reward_adapters(config: PPOConfig, policy: Model, reward: OpenModel) -> Lora | None:
    """Return the adapter options of the reward model, whose base must be the policy's.

    Raises:
        UserError: the reward model is no run that trained adapters on the model of ``model.path``.
    """
    adapted = None if reward.source.run is None else adapted_run(reward.source.run)
    require_adapters(config, adapted is not None and adapted.lora.rank > 0)
    assert adapted is not None
    return make_lora(adapted.lora, policy.config)


def require_adapters(config: PPOConfig, holds: bool) -> None:
    """Raise ``UserError`` unless the reward model's adapters are on the policy's base, as ``holds`` says."""
    base = f"with lora.rank, policy and value model share the weights of {config.model.path}"
    problem = f"{base}, but {config.reward.path} did not train adapters on them"
    remedy = f"{problem}; use policy, or train the reward model with lora.rank"
    require(holds, "ppo.value_model", "reward", remedy)


def open_value_source(setup: Setup) -> OpenModel | None:
    """Open the reward model if the value model starts from it.

    Raises:
        UserError: it reads text instead of the policy's tokens.
    """
    config = setup.config
    assert isinstance(config, PPOConfig)
    if config.ppo.trained_value != "reward":
        return None
    platform, template_date = platform_of(setup.mesh), config.data.template_date
    reward = open_reward_model(config.reward, config.model, platform, setup.tokenizer, template_date)
    reason = f"{config.reward.path} cannot read the policy's tokens: its tokenizer or chat template differs"
    require(reward.reads_tokens, "ppo.value_model", "reward", f"{reason}; use policy")
    return reward.opened


def start_value(setup: Setup, policy: Policy, value: ValueModel, reward: OpenModel | None) -> Params:
    """Return the value model's trained parameters at the start of a run; ``reward`` as `open_value_source` returns it.

    They share no array with the policy. A head that is not the reward model's is 0.
    """
    if reward is not None:
        return load_from_reward_model(setup, policy, value, reward)
    head = trained_shapes(value.model, setup.mesh)["score"]
    score = {"score": jnp.zeros(head.shape, head.dtype, device=head.sharding)}
    if value.shared:
        return score
    if policy.adapters is not None:
        config = replace(setup.config.lora, path=None)
        return load_start(config, value.model, score, setup.config.run.seed + 1, setup.mesh)
    return copy_weights(without_unembedding(policy.weights), None) | score


def load_from_reward_model(setup: Setup, policy: Policy, value: ValueModel, reward: OpenModel) -> Params:
    """Load the weights of the reward model or, with LoRA, its adapters and head.

    Raises:
        UserError: the adapters were trained on other weights than those of the policy.
    """
    config = setup.config
    assert isinstance(config, PPOConfig)
    if policy.adapters is None:
        return reward.load(setup.mesh)
    assert reward.source.run is not None
    shapes = trained_shapes(value.model, setup.mesh)
    adapters, manifest = restore_params(reward.source.run, config.reward.checkpoint, shapes)
    head = value.model.param_shapes()["score"]  # a reward model's base has one of zeros
    base = without_unembedding(policy.weights) | {"score": jnp.zeros(head.shape, head.dtype)}
    require_adapters(config, weights_id(base) == manifest["identity"]["weights"])
    return adapters


def make_outputs_fn(model: Model, value: ValueModel | None, max_tokens: int, *, chunk: int) -> OutputsFn:
    """Return a function that computes log-probs and values of the answers in packed rows, each [B, K, N].

    ``max_tokens``: N; ``chunk``: targets per device whose logits are in memory at a time. A shared value model is
    computed in the policy's forward pass.
    """
    if value is None or not value.shared:
        logps_fn = make_answer_logps_fn(model, max_tokens, chunk=chunk)
        return separate_outputs(logps_fn, None if value is None else make_values_fn(value.model, max_tokens))

    def outputs_fn(weights: ActorCritic, batch: PreferenceBatch) -> tuple[Array, Array]:
        hidden = model.hidden(weights.policy, batch)
        logps_fn = make_token_logps_fn(lambda *_: hidden, model.unembedding, chunk=chunk, **model.logit_options)
        logps = batch.gather_tokens(logps_fn(weights.policy, batch), max_tokens)
        return logps, head_values(value.model.head(weights.value), hidden, batch, max_tokens)

    return outputs_fn


def make_answer_logps_fn(model: Model, max_tokens: int, *, chunk: int) -> TokensFn:
    """Return a function that computes the log-prob of each token of the answers in packed rows, [B, K, N].

    ``max_tokens``: N; ``chunk``: targets per device whose logits are in memory at a time.
    """
    logps_fn = make_token_logps_fn(model.hidden, model.unembedding, chunk=chunk, **model.logit_options)
    return lambda weights, batch: batch.gather_tokens(logps_fn(weights, batch), max_tokens)


def make_values_fn(model: Model, max_tokens: int) -> TokensFn:
    """Return a function that computes the value before each token of the answers in packed rows, [B, K, N]."""

    def values_fn(weights: Params | Adapted, batch: PreferenceBatch) -> jax.Array:
        head = model.head(weights)
        if isinstance(weights, Adapted):  # to the policy's base, which has no head
            weights = Adapted(weights.adapters, without_unembedding(weights.base) | {"score": head})
        return head_values(head, model.hidden(weights, batch), batch, max_tokens)

    return values_fn


def head_values(
    head: Float[Array, "1 D"], hidden: Float[Array, "R T _"], batch: PreferenceBatch, max_tokens: int
) -> Float[Array, "B K N"]:
    """Return the value before each token of the answers, in float32.

    ``hidden``: of a language model, whose bias of the unembedding, if any, has dims behind the D of the decoder.
    """
    states = jnp.take_along_axis(hidden, batch.target_sources[..., None], axis=1)[..., : head.shape[1]]
    values = jnp.einsum(
        "RMD,D->RM", states.astype(jnp.float32), head[0].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return batch.gather_tokens(values, max_tokens)
