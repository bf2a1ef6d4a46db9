"""Load weights from Hugging Face directories and export them, tensor by tensor.

Shape letters as in ``layers.py``. A parameter stacks the tensors of all layers along its first dim [L]. It is assembled
in host buffers that hold only this process's shards, and moved to the devices before the next parameter is read.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.bucket_cache import read_ahead
from dpo_jax.errors import UserError
from dpo_jax.models.decoder import Model, Params
from dpo_jax.models.families import FAMILIES, tensor_name
from dpo_jax.parallel.hosts import is_writer
from dpo_jax.weights.output import COMPANIONS, export_directory
from dpo_jax.weights.safetensors import INDEX, WEIGHTS, Tensor, copy_tensors, find_tensors, read_header, write_file
from dpo_jax.weights.stored import Part, Stored, leaf_name, leaves_by_name, stored_tensors

# Ends of names of buffers in files of old models, which this program computes from the config.
_BUFFERS = ("rotary_emb.inv_freq",)

CARRIED_FILE = "carried.safetensors"  # `carried_tensors` in a run's copy of the files next to its model


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Stored], model: Model) -> None:
    def mismatch(why: str) -> UserError:
        return UserError(f"{folder}: {why}; check that the weights and config.json belong together")

    missing_names = [name for name in expected if name not in tensors]
    if missing_names:
        raise mismatch(f"config.json requires {_name_list(missing_names)}, which the weights do not contain")
    embed, unembed = (tensor_name(model.config, leaf) for leaf in ("embed", "unembed"))
    allowed_names = expected.keys() | ({unembed} if model.config.tied else set())
    family = FAMILIES[model.config.family]
    ignored, carried = (*_BUFFERS, *family.ignored), tuple(family.carried)
    unknown_names = (name for name in tensors if name not in allowed_names)
    extra_names = [name for name in unknown_names if not name.endswith(ignored) and not name.startswith(carried)]
    if extra_names:
        raise mismatch(f"the weights contain {_name_list(extra_names)}, which config.json does not define")
    for name, stored in expected.items():
        shape = tensors[name].shape
        if shape != stored.shape:
            raise mismatch(f"tensor {name} has shape {list(shape)}, but config.json implies {list(stored.shape)}")
    if model.config.tied and unembed in tensors:
        _check_tied(folder, tensors[unembed], tensors[embed])


def _name_list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_tied(folder: Path, unembed: Tensor, embed: Tensor) -> None:
    chunk = 4096  # rows, so that neither matrix is ever in memory as a whole
    is_equal = unembed.shape == embed.shape and all(
        np.array_equal(unembed.read(rows), embed.read(rows))
        for rows in (slice(start, start + chunk) for start in range(0, embed.shape[0], chunk))
    )
    if not is_equal:
        remedy = f"{unembed.name} differs from {embed.name}; set it to false in config.json"
        raise UserError(f"{folder}: tie_word_embeddings", True, remedy)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an uninitialized array aligned to 64 bytes, which a CPU device takes over without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def _load_leaf(
    sources: list[tuple[Stored, Part, Tensor]], struct: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.Array:
    """Load one parameter; the host buffers hold only this process's shards, and each slice is read once."""
    spans = {
        device: tuple(s.indices(n)[:2] for s, n in zip(index or (), struct.shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(struct.shape).items()
    }
    sizes = {span: tuple(stop - start for start, stop in span) for span in spans.values()}
    buffers = {span: _aligned(size, np.dtype(struct.dtype)) for span, size in sizes.items()}

    def holds(span: tuple[tuple[int, int], ...], part: Part) -> bool:
        return all(start <= i < stop for i, (start, stop) in zip(part.index, span, strict=False))

    needed = [(stored, part, tensor) for stored, part, tensor in sources if any(holds(span, part) for span in buffers)]
    reads = ((tensor.end - tensor.start, partial(stored.read, tensor, part)) for stored, part, tensor in needed)
    is_remote = any(tensor.remote for _, _, tensor in needed)
    values = read_ahead(reads) if is_remote else (read() for _, read in reads)
    for (_, part, _), value in zip(needed, values, strict=True):
        for span, buffer in buffers.items():
            if holds(span, part):
                index = tuple(i - start for i, (start, _) in zip(part.index, span, strict=False))
                buffer[(*index, ...)] = value[tuple(slice(*s) for s in span[len(part.index) :])]
    shards = [jax.device_put(buffers[span], device) for device, span in spans.items()]
    return jax.make_array_from_single_device_arrays(struct.shape, sharding, shards)


def load_tree(tensors: Mapping[str, Tensor], stored: Mapping[str, Stored], structs: Params, shardings: Any) -> Params:
    """Load the parameters ``structs`` from the tensors named in ``stored``, each shard directly onto its device."""
    sources: dict[str, list[tuple[Stored, Part, Tensor]]] = {}
    for name, entry in stored.items():
        for i, single in enumerate(entry.entries()):
            tensor = tensors[name].at(i) if entry.stack else tensors[name]
            for part in single.parts:
                sources.setdefault(part.leaf, []).append((single, part, tensor))

    def load(path, struct, sharding):
        # block, so that these buffers are on the devices before the next are allocated
        return jax.block_until_ready(_load_leaf(sources[leaf_name(path)], struct, sharding))

    return jax.tree_util.tree_map_with_path(load, structs, shardings)


def load_params(path: Path, model: Model, *, shardings: Any | None, dtype: Any) -> Params:
    """Load the weights of a Hugging Face directory as the model's parameter tree, each shard directly onto its device.

    Args:
        path: directory with ``model.safetensors``, or with an index and its shard files.
        shardings: tree of `jax.sharding.Sharding`, one per parameter; None: all on the first device.
        dtype: of the parameters; tensors of another dtype are converted.

    Raises:
        UserError: tensors are missing, unknown, of the wrong shape, quantized, truncated, or tied but not equal.
    """
    stored = stored_tensors(model)
    tensors = _rename(find_tensors(Path(path)), stored, model)
    embed, unembed = (tensor_name(model.config, leaf) for leaf in ("embed", "unembed"))
    if model.config.tied and embed not in tensors and unembed in tensors:
        tensors[embed] = tensors.pop(unembed)  # the tied matrix, stored under the name of the unembedding
    _check_tensors(path, tensors, stored, model)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model.param_shapes())
    if shardings is None:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), structs)
    return load_tree(tensors, stored, structs, shardings)


def _rename(tensors: dict[str, Tensor], expected: Mapping[str, Stored], model: Model) -> dict[str, Tensor]:
    """Rename tensors of files with another naming scheme to the names that this program expects."""

    def name_here(name: str) -> str:
        prefixes = {} if name in expected else FAMILIES[model.config.family].renamed
        names = (new + name.removeprefix(old) for old, new in prefixes.items() if name.startswith(old))
        return next((new for new in names if new in expected), name)

    return {name_here(name): tensor for name, tensor in tensors.items()}


@partial(jax.jit, static_argnums=(2, 3))
def _slice(
    leaf: jax.Array, index: tuple[jax.Array, ...], shape: tuple[int, ...], sharding: NamedSharding | None
) -> jax.Array:
    """Copy ``leaf[index]`` to a new array; ``leaf`` itself would cache a host copy when fetched."""
    start = (*index, *(0,) * len(shape))  # the index is traced: one compilation per shape
    value = jax.lax.dynamic_slice(leaf, start, (*(1,) * len(index), *shape)).reshape(shape)
    return value if sharding is None else jax.lax.with_sharding_constraint(value, sharding)


def _gather_sharding(leaf: jax.Array) -> NamedSharding | None:
    """Return the replicated sharding that lets every process read ``leaf``; None if this process already can."""
    if leaf.is_fully_addressable:
        return None
    assert isinstance(leaf.sharding, NamedSharding)
    return NamedSharding(leaf.sharding.mesh, PartitionSpec())


def fetch_tensors(params: Params, stored: Mapping[str, Stored], dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and host array of each tensor in ``stored``, fetched from the devices one at a time."""
    leaves = leaves_by_name(params)

    def fetch(part: Part) -> np.ndarray:
        leaf = leaves[part.leaf]
        value = _slice(leaf, part.index, part.shape, _gather_sharding(leaf))
        return np.asarray(value).astype(dtype, copy=False)

    for name, entry in stored.items():
        arrays = [single.join([fetch(part) for part in single.parts]) for single in entry.entries()]
        yield name, np.stack(arrays) if entry.stack else arrays[0]


def _split(stored: Mapping[str, Stored], itemsize: int, max_shard_bytes: int) -> list[dict[str, Stored]]:
    """Assign tensors to files in order, starting a new file when the next tensor would not fit."""
    files, free_bytes = [{}], max_shard_bytes
    for name, entry in stored.items():
        size = math.prod(entry.shape) * itemsize
        if files[-1] and size > free_bytes:
            files.append({})
            free_bytes = max_shard_bytes
        files[-1][name] = entry
        free_bytes -= size
    return files


def export_params(
    params: Params,
    model: Model,
    *,
    hf_config: Mapping[str, Any],
    out_dir: str | Path,
    dtype: Any,
    source_dir: Path | None,
    overwrite: bool,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Export the parameters as a directory that `transformers` and inference servers can load.

    `export_directory` says how ``out_dir`` becomes complete. Every process must call this and one writes: while a
    tensor is being fetched, every host holds a copy of it.

    Args:
        params: parameters of ``model``, on any devices.
        hf_config: the ``config.json`` that the model was built from.
        dtype: of the tensors in the files: float32, bfloat16 or float16.
        source_dir: directory to copy tokenizer, chat template, generation config and `carried_tensors` from; None:
            copy nothing.
        overwrite: replace an earlier export; other files in ``out_dir`` stay.
        max_shard_bytes: maximum size of a file, unless a single tensor is larger.

    Raises:
        UserError: ``out_dir`` is not empty and ``overwrite`` is false, or it cannot be written.
    """
    dtype = np.dtype(dtype)
    if not is_writer():
        for _ in fetch_tensors(params, stored_tensors(model), dtype):
            pass  # fetching is collective
        return
    with export_directory(out_dir, overwrite) as (staging, finish):
        carried = {} if source_dir is None else carried_tensors(source_dir, model.config.family)
        _write_tensors(params, model, carried, staging, dtype, max_shard_bytes, finish)
        dtype_keys = {"dtype", "torch_dtype"} & hf_config.keys() or {"torch_dtype"}
        config = {**hf_config, **dict.fromkeys(dtype_keys, dtype.name)}
        (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if source_dir is not None:
            _copy_companions(source_dir, staging)


def _copy_companions(source_dir: Path, folder: Path) -> None:
    for name in COMPANIONS:
        source = Path(source_dir) / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.is_file():
            shutil.copyfile(source, folder / name)


def carried_tensors(folder: Path, family: str) -> dict[str, Tensor]:
    """Find the tensors of a model's other parts, such as vision, which are copied from its directory to an export."""
    prefixes = tuple(FAMILIES[family].carried)
    if not prefixes:
        return {}
    if (folder / CARRIED_FILE).is_file():
        return read_header(folder / CARRIED_FILE)
    has_weights = (folder / WEIGHTS).is_file() or (folder / INDEX).is_file()
    tensors = find_tensors(folder) if has_weights else {}
    return {name: tensor for name, tensor in tensors.items() if name.startswith(prefixes)}


def _write_tensors(
    params: Params,
    model: Model,
    carried: Mapping[str, Tensor],
    folder: Path,
    dtype: np.dtype,
    max_shard_bytes: int,
    finish: Callable[[Path], None],
) -> None:
    """Write the files of tensors and their index; ``finish`` is called with each file of tensors."""
    stored = stored_tensors(model)
    files = _split(stored, dtype.itemsize, max_shard_bytes)
    num_files = len(files) + bool(carried)
    names = [f"model-{index:05d}-of-{num_files:05d}.safetensors" for index in range(1, num_files + 1)]
    weight_map: dict[str, str] = {}
    for file_tensors, file in zip(files, [WEIGHTS] if num_files == 1 else names, strict=False):
        shapes = {name: entry.shape for name, entry in file_tensors.items()}
        write_file(folder / file, shapes, dtype, fetch_tensors(params, file_tensors, dtype))
        finish(folder / file)
        weight_map |= dict.fromkeys(file_tensors, file)
    if carried:
        copy_tensors(folder / names[-1], carried)
        finish(folder / names[-1])
        weight_map |= dict.fromkeys(carried, names[-1])
    if num_files > 1:
        total = sum(math.prod(entry.shape) for entry in stored.values()) * dtype.itemsize
        total += sum(tensor.end - tensor.start for tensor in carried.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
