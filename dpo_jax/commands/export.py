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
from dpo_jax.weights.open import (
    build_model,
    export_run,
    export_run_adapters,
    find_model,
    load_saved,
)


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
        raise UserError(f"{out_dir}: it lies inside the run {run.root}; export to a directory outside it")  # fmt: skip
    source = find_model(str(run_dir), None)
    mesh = make_mesh(MeshConfig(), jax.local_devices()[:1])  # weights pass through one device, whatever their sizes
    if adapters:
        step = export_run_adapters(run, out_dir, which, mesh)
    else:
        config = ModelConfig(path=str(run_dir), checkpoint=which)
        model = build_model(source, config, platform_of(mesh))
        params, step = load_saved(run, model, config, mesh)
        export_run(run, out_dir, model, params, overwrite=False)
    sizes = [path.stat().st_size for path in target.rglob("*") if path.is_file()]
    what = "adapters of" if adapters else "model of"
    say(True, f"exported the {what} {run.root} at step {step} to {target}: {len(sizes)} files, "
              f"{sum(sizes) / 1e6:,.1f} MB, float32")  # fmt: skip
