"""Export the trained model or adapters of a run."""

from pathlib import Path
from typing import Literal

import jax

from dpo_jax.config import MeshConfig, ModelConfig
from dpo_jax.console import say
from dpo_jax.errors import UserError
from dpo_jax.parallel.sharding import make_mesh, platform_of
from dpo_jax.runs.directory import find_run
from dpo_jax.weights.open import export_run, export_run_adapters, load_saved, open_model
from dpo_jax.weights.output import export_target, exported_sizes


def export(run_dir: str | Path, out_dir: str | Path, which: Literal["newest", "best"], adapters: bool = False) -> None:
    """Write the newest or best checkpoint of a run as a Hugging Face directory in float32.

    Adapters are merged into the base model; with ``adapters`` only they are written, as a PEFT directory. One line on
    stderr reports what was written.

    Raises:
        UserError: no such run or checkpoint, no adapters to export, or ``out_dir`` already exists or cannot be written.
    """
    run = find_run(run_dir)
    target = export_target(out_dir)  # fails before the weights are loaded, which may take minutes
    root = run.location if isinstance(target, str) else run.root.resolve()
    if f"{target}/".startswith(f"{root}/") and str(target) != f"{root}/{run.export.name}":
        raise UserError(f"{out_dir}: it is inside the run {run.location}; export to a directory outside it")
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])  # one device is enough for weights of any size
    if adapters:
        step = export_run_adapters(run, out_dir, which, mesh)
    else:
        opened = open_model(ModelConfig(path=str(run_dir), checkpoint=which), platform_of(mesh))
        params, step = load_saved(run, opened.model, opened.config, mesh)
        export_run(run, out_dir, opened.model, params, overwrite=False)
    sizes = exported_sizes(target)
    label = f"{'adapters' if adapters else 'model'} of {run.location} at step {step}"
    say(True, f"exported the {label} to {target}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB, float32")
