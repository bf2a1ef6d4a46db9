"""Take a trained model out of its run."""

from pathlib import Path
from typing import Literal

import jax

from dpo_jax.config import MeshConfig, ModelConfig
from dpo_jax.console import say
from dpo_jax.errors import UserError
from dpo_jax.parallel.sharding import make_mesh, platform_of
from dpo_jax.runs.directory import find_run
from dpo_jax.weights.huggingface import export_target
from dpo_jax.weights.open import export_run, export_run_adapters, load_saved, open_model


def export(run_dir: Path, out_dir: Path, which: Literal["newest", "best"], adapters: bool = False) -> None:
    """Write the model of a run, its newest or best save, as a Hugging Face directory in float32.

    Adapters are merged into their model; with ``adapters`` they alone are written, as a PEFT directory. One line on
    stderr says what was written.

    Raises:
        UserError: there is no such run or save, it has no adapters, or ``out_dir`` is not free or cannot be written.
    """
    run = find_run(run_dir)
    target = export_target(out_dir)  # before minutes of loading
    if target.is_relative_to(run.root.resolve()) and target != run.export.resolve():
        raise UserError(f"{out_dir}: it lies inside the run {run.root}; export to a directory outside it")
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])  # weights pass through one device, whatever their sizes
    if adapters:
        step = export_run_adapters(run, out_dir, which, mesh)
    else:
        opened = open_model(ModelConfig(path=str(run_dir), checkpoint=which), platform_of(mesh))
        params, step = load_saved(run, opened.model, opened.config, mesh)
        export_run(run, out_dir, opened.model, params, overwrite=False)
    sizes = [path.stat().st_size for path in target.rglob("*") if path.is_file()]
    what = f"{'adapters' if adapters else 'model'} of {run.root} at step {step}"
    say(True, f"exported the {what} to {target}: {len(sizes)} files, {sum(sizes) / 1e6:,.1f} MB, float32")
