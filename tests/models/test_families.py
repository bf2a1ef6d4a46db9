"""Every model family against `transformers` on torch, in every layout, and each of its features against its absence."""

from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import transformers
from family_models import FAMILIES as MODELS
from family_models import MIXTURES, SWITCHES, some_tokens
from parity import gradient_errors, hf_gradient, limit_gap, load_family, router_gap
from small import pack

from dpo_jax.batching.to_devices import make_to_devices
from dpo_jax.config import LossConfig, MeshConfig
from dpo_jax.logprobs import make_logps_fn
from dpo_jax.losses import mean_loss, preference_loss
from dpo_jax.models.decoder import Model, count_params, plain_batch, with_balance
from dpo_jax.models.families import FAMILIES, decoder_config
from dpo_jax.ops.softcap import soft_cap
from dpo_jax.parallel.sharding import make_mesh
from dpo_jax.weights.huggingface import export_params
from dpo_jax.weights.open import param_shardings

pytestmark = pytest.mark.usefixtures("torch")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return cache(lambda name: load_family(name, tmp_path_factory.mktemp(name)))


def logits(model: Model, params: Any) -> jax.Array:
    tokens = some_tokens()
    hidden = model.hidden(params, plain_batch(jnp.asarray(tokens), jnp.full(len(tokens), tokens.shape[1])))
    return soft_cap(hidden @ model.unembedding(params).T, model.config.logit_softcap)


NAMES = list(MODELS)
SLOW = {"mixtral", "olmoe"}  # what they have, other mixtures have, too
# Most that these compute, other families compute, too.
VARIANTS = {"gemma3", "smollm3_window", "qwen2_mixed", "gpt_neox_sequential", "phi3_longrope", "stablelm_parallel"}


PROMPT = 19  # tokens, so that in no mixture of experts a choice or a limit is a matter of rounding
WEIGHTS = np.array([[1.0, -0.7]], np.float32)  # of the log-probs of two answers


def slow(names: set[str]) -> list:
    """All families, as parameters of a test; with those named marked as slow."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in names)) for name in NAMES]


def sequences() -> np.ndarray:
    """A prompt followed by each of its two answers; sequences and answers are longer than every window."""
    tokens = some_tokens()
    tokens[1, :PROMPT] = tokens[0, :PROMPT]
    return tokens


@partial(jax.jit, static_argnums=0)
def logits_and_gradient(model: Model, params: Any, batch: Any) -> tuple[jax.Array, Any]:
    """Return logits [R, T, V], and the gradient of the weighted log-probs, which are computed as in training."""

    def objective(params):
        hidden = model.hidden(params, batch)
        fn = make_logps_fn(lambda *_: hidden, model.unembedding, chunk=64, block=50, **model.logit_options)
        logits = soft_cap(hidden @ model.unembedding(params).T, model.config.logit_softcap)
        return (WEIGHTS * fn(params, batch).sum).sum(), logits

    grads, logits = jax.grad(objective, has_aux=True)(params)
    return logits, grads


def hf_logits_and_gradient(theirs: Any, model: Model) -> tuple[np.ndarray, Any]:
    import torch

    tokens = torch.tensor(sequences(), dtype=torch.long)
    logits = theirs(tokens).logits
    logps = torch.log_softmax(logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])[:, PROMPT - 1 :, 0]
    loss = (torch.tensor(WEIGHTS[0]) * logps.sum(-1)).sum()
    return logits.detach().numpy(), hf_gradient(theirs, loss, model)


@pytest.mark.parametrize("name", slow(SLOW | VARIANTS))
def test_logits_and_gradient_are_those_of_transformers(load, name):
    """In the layout, and with the attention, that a run on a CPU has by default."""
    model, params, theirs, *_ = load(name)
    assert name not in MIXTURES or router_gap(theirs, sequences()) > 1e-3
    assert name != "gpt_oss" or limit_gap(theirs, sequences()) > 1e-4
    expected, expected_gradient = hf_logits_and_gradient(theirs, model)
    assert np.abs(expected).max() > 1  # or the tolerance would say little

    (prompt, *_), answers = np.split(sequences(), [PROMPT], axis=1)
    batch = pack([(prompt, tuple(answers), None)])
    logits, gradient = jax.device_get(logits_and_gradient(Model(config=model.config), params, batch))
    of_branch = [np.isin(batch.branches, (0, branch)) & (batch.segments > 0) for branch in (1, 2)]
    np.testing.assert_allclose([logits[tokens] for tokens in of_branch], expected, atol=1e-4, rtol=0)
    errors = gradient_errors(gradient, expected_gradient)
    assert max(errors.values()) < 1e-3, max(errors, key=errors.__getitem__)


@pytest.mark.parametrize("name", slow(SLOW))
def test_exported_tensors_are_those_of_transformers(load, name, tmp_path):
    model, params, theirs, hf_config, folder = load(name)
    own = theirs.model.language_model if name == "gemma3" else theirs  # the vision tensors are not parameters here
    assert count_params(model) == sum(parameter.numel() for parameter in own.parameters())

    options = {"hf_config": hf_config, "dtype": "float32", "source_dir": folder, "overwrite": False}
    export_params(params, model, out_dir=tmp_path / "out", **options)
    again = type(theirs).from_pretrained(tmp_path / "out")
    loaded = type(theirs).from_pretrained(folder)
    assert again.config.to_dict() == loaded.config.to_dict() | {"_name_or_path": str(tmp_path / "out")}
    tensors = again.state_dict()
    assert tensors.keys() == theirs.state_dict().keys()
    assert all(tensors[key].equal(tensor) for key, tensor in theirs.state_dict().items())


SMALL = {"vocab_size": 128, "hidden_size": 256, "intermediate_size": 96, "num_hidden_layers": 4,
         "num_attention_heads": 32, "max_position_embeddings": 256}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of tokens outside the small vocabulary
@pytest.mark.parametrize("model_type", [name for name, family in FAMILIES.items() if family.wraps is None])
def test_a_file_of_sizes_alone_means_what_it_means_in_transformers(model_type):
    family = FAMILIES[model_type]
    hf = {family.key(key): value for key, value in SMALL.items() if family.key(key) not in family.unused}
    full = transformers.AutoConfig.for_model(model_type, **hf).to_dict()
    assert decoder_config(hf | {"model_type": model_type}) == decoder_config(full)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_logits_change_when_a_feature_is_off(load, name):
    model, params, *_ = load(name)

    @jax.jit
    def all_logits(params):
        cases = {"all": (model.config, params)}
        cases |= {feature: SWITCHES[feature](model.config, params) for feature in MODELS[name].features}
        return {
            feature: logits(Model(config=config, attention="xla"), tree) for feature, (config, tree) in cases.items()
        }

    actual = jax.device_get(all_logits(params))
    unchanged = [feature for feature in MODELS[name].features if np.abs(actual[feature] - actual["all"]).max() < 0.01]
    assert not unchanged


def pairs() -> list:
    """Pairs of unequal lengths, longer than every window."""
    draw = np.random.default_rng(3)
    ids = lambda n: draw.integers(1, 125, n).astype(np.int32)  # noqa: E731
    return [(ids(p), (ids(c), ids(r)), None) for p, c, r in [(30, 9, 5), (1, 1, 12), (12, 20, 20), (45, 3, 8)] * 2]


LOSS = LossConfig(beta=0.3)


def gradient(model: Model, params: Any, batch: Any) -> Any:
    """Return (log-probs [B, K], loss, gradient), with a tenth more of the last norm's weight as the reference."""
    fn = make_logps_fn(model.routed_hidden, model.unembedding, chunk=64, block=50, **model.logit_options)

    def objective(params):
        reference = fn(params | {"final_norm": 1.1 * params["final_norm"]}, batch)  # which has the same experts
        policy, reference = fn(params, batch), jax.lax.stop_gradient(reference)
        return mean_loss(preference_loss(policy, reference, LOSS), policy), policy.sum

    (value, sums), grads = jax.value_and_grad(objective, has_aux=True)(params)
    return sums, value, grads


PACKED = {
    "shared": ({}, {}, None),
    "repeated": ({}, {"layout": "repeated", "rows": 2}, None),
    "unrolled": ({"scan": False, "remat": "full"}, {}, None),
}
MESHES = {
    "fsdp 8": ({}, {"rows": 8}, MeshConfig(fsdp=8)),
    "fsdp 4, tensor 2": ({}, {"rows": 4}, MeshConfig(fsdp=4, tensor=2)),
}
EXPERT_MESHES = {  # experts on an axis of their own
    "expert 8": ({}, {"rows": 8}, MeshConfig(expert=8)),
    "data 2, fsdp 2, expert 2": ({}, {"rows": 8}, MeshConfig(data=2, expert=2)),
    "fsdp 2, expert 4": ({}, {"rows": 8}, MeshConfig(expert=4)),
    "expert 4, tensor 2": ({}, {"rows": 4}, MeshConfig(expert=4, tensor=2)),
    "fsdp 2, expert 2, tensor 2": ({}, {"rows": 4}, MeshConfig(expert=2, tensor=2)),
}
LAYOUTS = PACKED | MESHES | EXPERT_MESHES
SLOW_MIXTURES = {"qwen2_moe": list(EXPERT_MESHES)[:2], "gpt_oss": list(EXPERT_MESHES)[2:4]}  # the others have all


def layouts_of(name: str) -> list[str]:
    return [*PACKED, *(SLOW_MIXTURES.get(name, EXPERT_MESHES) if name in MIXTURES else MESHES)]


QUICK = {
    "quick": ("gemma2", ["fsdp 4, tensor 2"]),  # caps of scores and logits, and windows in some layers
    "quick mixture": ("qwen3_moe", ["fsdp 2, expert 2, tensor 2"]),
}


# Together they have every feature that a layout or a mesh could get wrong; the others are weekly.
VARIED = {"gemma3_text", "olmo3", "gpt2", "phi", "cohere2", "gpt_oss", "qwen2_moe"}


@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        pytest.param(name, layouts_of(name), marks=pytest.mark.slow if name in VARIED else pytest.mark.weekly, id=name)
        for name in NAMES
    ]
    + [pytest.param(*case, id=name) for name, case in QUICK.items()],
)
def test_layouts_and_meshes_agree(load, name, layouts):
    model, params, theirs, *_ = load(name)
    if name in MIXTURES:
        assert (
            min(router_gap(theirs, np.concatenate([p, a])[None]) for p, answers, _ in pairs() for a in answers) > 1e-3
        )
    model = replace(model, config=with_balance(model.config, 0.1))
    run = jax.jit(gradient, static_argnums=0)
    expected = jax.device_get(run(model, params, pack(pairs(), layout="padded")))
    for layout in layouts:
        options, packing, mesh_config = LAYOUTS[layout]
        model_here, batch = Model(config=model.config, **options), pack(pairs(), **packing)
        if mesh_config is None:
            actual = run(model_here, params, batch)
        else:
            mesh = make_mesh(mesh_config)
            with jax.set_mesh(mesh):
                on_mesh = jax.device_put(params, param_shardings(model_here, mesh))
                actual = run(model_here, on_mesh, make_to_devices(mesh)(batch))
        (sums, value, grads), (sums_0, value_0, grads_0) = jax.device_get(actual), expected
        np.testing.assert_allclose(sums, sums_0, rtol=2e-6, err_msg=layout)
        assert abs(value - value_0) <= 2e-5, layout
        change = optax.tree.norm(jax.tree.map(jnp.subtract, grads, grads_0)) / optax.tree.norm(grads_0)
        assert float(change) <= 2e-5, layout


def test_reward_models_have_the_classes_of_transformers():
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES

    assert {name: family.reward_architecture for name, family in FAMILIES.items()} == {
        name: CLASSES.get(name) for name in FAMILIES
    }
