"""The random models of ``family_models.py`` here and in `transformers`: gradients, and choices left to rounding."""

import copy
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
from family_models import hf_logits, save_hf_model

from dpo_jax.batch import Params
from dpo_jax.models.decoder import Model
from dpo_jax.models.families import decoder_config
from dpo_jax.weights.hub import read_hf_config
from dpo_jax.weights.huggingface import load_params
from dpo_jax.weights.stored import leaves_by_name


class Loaded(NamedTuple):
    """A family's random model here, and that of transformers."""

    model: Model
    params: Params
    theirs: Any
    hf_config: dict[str, Any]
    folder: Path  # of transformers' making


def load_family(name: str, folder: Path) -> Loaded:
    """Make the model, save it in ``folder`` and load it here."""
    theirs = save_hf_model(name, folder)
    hf_config = read_hf_config(folder)
    model = Model(config=decoder_config(hf_config), attention="xla")
    return Loaded(model, load_params(folder, model, shardings=None, dtype="float32"), theirs, hf_config, folder)


def router_gap(model: Any, tokens: np.ndarray) -> float:
    """Return the smallest difference between the router logits of the last expert chosen and the first one not chosen.

    Where it is larger than rounding, two programs choose the same experts for every token.
    """
    gaps, num_chosen = [], model.config.num_experts_per_tok

    def record(_module: Any, _inputs: Any, outputs: Any) -> None:
        best = outputs[0].float().sort(dim=-1, descending=True).values
        gaps.append(float((best[:, num_chosen - 1] - best[:, num_chosen]).min()))

    routers = [module for module in model.modules() if type(module).__name__.endswith("TopKRouter")]
    hooks = [router.register_forward_hook(record) for router in routers]
    hf_logits(model, tokens)
    for hook in hooks:
        hook.remove()
    return min(gaps)


def limit_gap(model: Any, tokens: np.ndarray) -> float:
    """Return the smallest distance of a gate or up of gpt_oss's experts from their limit, where the gradient jumps."""
    gaps, limit = [], model.config.swiglu_limit
    experts = [module for module in model.modules() if type(module).__name__ == "GptOssExperts"]

    def recorded(apply: Any) -> Any:
        def apply_gate(gate_up: Any) -> Any:
            gaps.append(min(float((x - limit).abs().min()) for x in (gate_up[..., ::2], gate_up[..., 1::2].abs())))
            return apply(gate_up)

        return apply_gate

    for module in experts:
        module._apply_gate = recorded(module._apply_gate)
    hf_logits(model, tokens)
    for module in experts:
        del module._apply_gate
    return min(gaps)


def hf_gradient(theirs: Any, loss: Any, model: Model) -> Params:
    """Return the gradient of a loss of a model of transformers, as its weights would load into ``model``'s tree."""
    import torch

    theirs.zero_grad()
    loss.backward()
    gradient = copy.deepcopy(theirs)
    for parameter, original in zip(gradient.parameters(), theirs.parameters(), strict=True):
        parameter.data = torch.zeros_like(parameter) if original.grad is None else original.grad
    with TemporaryDirectory() as folder:
        gradient.save_pretrained(folder)
        return load_params(Path(folder), model, shardings=None, dtype="float32")


def gradient_errors(actual: Params, expected: Params) -> dict[str, float]:
    """Return |difference| / |expected| of each parameter of each layer, by name, and of the gradient as a whole.

    Those without a gradient to speak of, under 1e-5 of the whole, are left out: a bias of keys may have none.
    """
    actual, expected = (
        {
            f"{name} {i}": array
            for name, leaf in leaves_by_name(tree).items()
            for i, array in enumerate(np.asarray(leaf) if name.startswith("layers/") else [np.asarray(leaf)])
        }
        for tree in (actual, expected)
    )
    norms = {name: float(np.linalg.norm(array)) for name, array in expected.items()}
    differences = {name: float(np.linalg.norm(actual[name] - array)) for name, array in expected.items()}
    whole = math.hypot(*norms.values())
    errors = {name: differences[name] / norm for name, norm in norms.items() if norm > 1e-5 * whole}
    return errors | {"all": math.hypot(*differences.values()) / whole}
