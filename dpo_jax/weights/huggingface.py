"""Weights from and to Hugging Face directories, tensor by tensor, and their hash.

Shape letters as in ``layers.py``. A layer's tensors are the slices [L] of one parameter; a parameter is built in host
buffers that hold only what this process's devices own of it, and is handed over before the next is begun.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dpo_jax.errors import UserError, reason
from dpo_jax.models.decoder import Model, Params
from dpo_jax.models.flops import projections
from dpo_jax.models.projections import TENSORS, TURNED
from dpo_jax.parallel.hosts import is_writer
from dpo_jax.weights.safetensors import INDEX, SINGLE, Tensor, find_tensors, write_file

# Files of old models hold what is computed here from the config.
_COMPUTED = "rotary_emb.inv_freq"
# What a directory has beside weights and config.json, for tokenizers, chat templates and generation.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "additional_chat_templates",
    "generation_config.json",
)  # fmt: skip

_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


class Slot(NamedTuple):
    """What a file's tensor is of the parameters."""

    leaf: str
    layer: int | None  # the slice of the parameter; None: all of it
    shape: tuple[int, ...]  # in the file


def _leaves(tree: Params) -> dict[str, Any]:
    return {_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _path(path: tuple[Any, ...]) -> str:
    return "/".join(part.key for part in path)


def _slots(model: Model) -> dict[str, Slot]:
    """Every tensor that the model's directory must hold; heads and their dims are one dim there."""
    slots, sizes = {}, projections(model.config)
    for leaf, struct in _leaves(model.param_shapes()).items():
        stacked, _, name = leaf.rpartition("/")
        dims = sizes.get(name, (math.prod(struct.shape[1:]),))
        shape = dims[::-1] if stacked else struct.shape
        for layer in range(model.config.layers) if stacked else (None,):
            slots[TENSORS[leaf].format(layer)] = Slot(leaf, layer, shape)
    return slots


def _check_tensors(folder: Path, tensors: Mapping[str, Tensor], model: Model) -> None:
    def refuse(why: str) -> UserError:
        return UserError(f"{folder}: {why}; check that they belong together")

    expected = _slots(model)
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise refuse(f"config.json asks for {_list(missing)}, which the weights do not hold")
    allowed = expected.keys() | ({TENSORS["unembed"]} if model.config.tied else set())
    extra = [name for name in tensors if name not in allowed and not name.endswith(_COMPUTED)]
    if extra:
        raise refuse(f"the weights hold {_list(extra)}, which config.json does not ask for")
    for name, slot in expected.items():
        actual = tensors[name].shape
        if actual != slot.shape:
            raise refuse(f"tensor {name} has shape {list(actual)}, but config.json makes it {list(slot.shape)}")
    if model.config.tied and TENSORS["unembed"] in tensors:
        _check_tied(folder, tensors[TENSORS["unembed"]], tensors[TENSORS["embed"]])


def _list(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_tied(folder: Path, unembed: Tensor, embed: Tensor) -> None:
    chunk = 4096  # rows: the two are never in memory as a whole
    same = unembed.shape == embed.shape and all(
        np.array_equal(unembed.read(rows), embed.read(rows))
        for rows in (slice(start, start + chunk) for start in range(0, embed.shape[0], chunk))
    )
    if not same:
        remedy = f"{TENSORS['unembed']} differs from {TENSORS['embed']}; set it to false in config.json"
        raise UserError(f"{folder}: tie_word_embeddings", True, remedy)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that a CPU device takes over without a copy, which asks for a 64-byte boundary."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)


def _load_leaf(
    leaf: str, tensors: list[Tensor], struct: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding
) -> jax.Array:
    """One parameter, of which only the slices of this process's devices are held; each tensor is read once."""
    stacked = "/" in leaf
    spans = {
        device: tuple(s.indices(n)[:2] for s, n in zip(index or (), struct.shape, strict=True))
        for device, index in sharding.addressable_devices_indices_map(struct.shape).items()
    }
    sizes = {span: tuple(stop - start for start, stop in span) for span in spans.values()}
    buffers = {span: _aligned(size, np.dtype(struct.dtype)) for span, size in sizes.items()}
    for layer, tensor in enumerate(tensors):
        needed = {span: buffer for span, buffer in buffers.items() if not stacked or span[0][0] <= layer < span[0][1]}
        if not needed:
            continue
        value = tensor.read().T if leaf in TURNED else tensor.read()
        value = value.reshape(struct.shape[1:] if stacked else struct.shape)
        for span, buffer in needed.items():
            target, rest = (layer - span[0][0], span[1:]) if stacked else (..., span)
            buffer[target] = value[tuple(slice(*s) for s in rest)]
    shards = [jax.device_put(buffers[span], device) for device, span in spans.items()]
    return jax.make_array_from_single_device_arrays(struct.shape, sharding, shards)


def load_tree(tensors: Mapping[str, Tensor], slots: Mapping[str, Slot], structs: Params, shardings: Any) -> Params:
    """The parameters ``structs`` from the tensors of ``slots``, each shard straight to its device."""
    by_leaf: dict[str, list[Tensor]] = {}
    for name, slot in slots.items():  # in the order of the layers
        by_leaf.setdefault(slot.leaf, []).append(tensors[name])

    def load(path, struct, sharding):
        leaf = _path(path)  # the next buffers are made when these are the device's
        return jax.block_until_ready(_load_leaf(leaf, by_leaf[leaf], struct, sharding))

    return jax.tree_util.tree_map_with_path(load, structs, shardings)


def load_params(path: Path, model: Model, *, shardings: Any | None, dtype: Any) -> Params:
    """Weights of a Hugging Face directory as the model's parameter tree, each shard straight to its device.

    Args:
        path: directory with ``model.safetensors``, or its index and files.
        shardings: a `jax.sharding.Sharding` for each parameter; None: all on the first device.
        dtype: of the parameters, whatever the files hold.

    Raises:
        UserError: tensors are missing, unknown, of a wrong shape, quantised, cut short, or tied though they differ.
    """
    tensors, embed, unembed = find_tensors(Path(path)), TENSORS["embed"], TENSORS["unembed"]
    if model.config.tied and embed not in tensors and unembed in tensors:
        tensors[embed] = tensors.pop(unembed)  # one matrix, stored under its other name
    _check_tensors(path, tensors, model)
    structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), model.param_shapes())
    if shardings is None:
        shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), structs)
    return load_tree(tensors, _slots(model), structs, shardings)


@partial(jax.jit, static_argnums=(2, 3))
def _rows(leaf: jax.Array, start: jax.Array, count: int, sharding: NamedSharding | None) -> jax.Array:
    """``count`` slices of the first dim, as a new array: a host copy stays with the array it was made of."""
    rows = jax.lax.dynamic_slice_in_dim(leaf, start, count)  # start is traced: one compilation a shape
    return rows if sharding is None else jax.lax.with_sharding_constraint(rows, sharding)


def _everywhere(leaf: jax.Array) -> NamedSharding | None:
    """Where an array of several processes must lie for each of them to read it; None: this one holds it all."""
    if leaf.is_fully_addressable:
        return None
    assert isinstance(leaf.sharding, NamedSharding)
    return NamedSharding(leaf.sharding.mesh, PartitionSpec())


def fetch_tensors(params: Params, slots: Mapping[str, Slot], dtype: np.dtype) -> Iterator[tuple[str, np.ndarray]]:
    """The file's tensors, in the order of ``slots``, each fetched from the devices when it is asked for."""
    leaves = _leaves(params)
    for name, slot in slots.items():
        value = leaves[slot.leaf]
        start, count = (0, len(value)) if slot.layer is None else (slot.layer, 1)
        value = _rows(value, start, count, _everywhere(value))
        value = np.asarray(value).astype(dtype, copy=False)
        yield name, np.ascontiguousarray(value[0].T) if slot.leaf in TURNED else value.reshape(slot.shape)


def _split(slots: Mapping[str, Slot], itemsize: int, max_shard_bytes: int) -> list[dict[str, Slot]]:
    """The tensors of each file: in order, a new file when the next tensor would not fit."""
    files, room = [{}], max_shard_bytes
    for name, slot in slots.items():
        size = math.prod(slot.shape) * itemsize
        if files[-1] and size > room:
            files.append({})
            room = max_shard_bytes
        files[-1][name] = slot
        room -= size
    return files


def export_params(
    params: Params,
    model: Model,
    *,
    hf_config: Mapping[str, Any],
    out_dir: Path,
    dtype: Any,
    source_dir: Path | None,
    overwrite: bool,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a directory that `transformers` and inference servers load.

    It is written beside ``out_dir`` and takes its name when it is whole. Of several processes that hold the parameters
    all call this, and one writes: each tensor is on every host for the moment that it is fetched.

    Args:
        params: of ``model``, on any devices.
        hf_config: the ``config.json`` that the model was made from.
        dtype: of the tensors in the files: float32, bfloat16 or float16.
        source_dir: directory to copy tokenizer, chat template and generation config from; None: copy nothing.
        overwrite: replace an earlier export; other files in ``out_dir`` stay.
        max_shard_bytes: size of a file at which the next one begins; a file holds at least one tensor.

    Raises:
        UserError: ``out_dir`` is not free and ``overwrite`` is false, or it cannot be written.
    """
    dtype = np.dtype(dtype)
    if not is_writer():
        for _ in fetch_tensors(params, _slots(model), dtype):
            pass  # the devices of all processes fetch together
        return
    with whole_directory(Path(out_dir), overwrite) as unfinished:
        _write_tensors(params, model, unfinished, dtype, max_shard_bytes)
        dtype_keys = {"dtype", "torch_dtype"} & hf_config.keys() or {"torch_dtype"}
        config = {**hf_config, **dict.fromkeys(dtype_keys, dtype.name)}
        (unfinished / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if source_dir is not None:
            _copy_companions(source_dir, unfinished)


def export_target(out_dir: Path, overwrite: bool = False) -> Path:
    """The directory of an export to ``out_dir``, links resolved.

    Raises:
        UserError: something is there and ``overwrite`` is false, or it cannot be a directory.
    """
    if out_dir.parts and out_dir.parts[0].endswith(":"):
        raise UserError(f"{out_dir}: this is no local path; export to a local directory and copy that")
    target = Path(os.path.realpath(os.path.expanduser(out_dir)))
    with _writing(target):
        if target.exists() and not target.is_dir():
            raise UserError(f"{out_dir}: this is a file; name a directory to export to")
        if not overwrite and target.is_dir() and any(target.iterdir()):
            raise UserError(f"{out_dir}: it is not empty; name another directory to export to, or empty this one")
        if not overwrite and target == Path.cwd():  # replaced, it would leave the shell in one that is gone
            raise UserError(f"{out_dir}: this is the current directory; name a new one to export to")
    return target


@contextmanager
def whole_directory(out_dir: Path, overwrite: bool) -> Iterator[Path]:
    """A directory to write to, next to ``out_dir``, whose name it takes at the end of the block; removed on an error.

    Raises:
        UserError: ``out_dir`` is not free and ``overwrite`` is false, another export to it is under way, or it cannot
            be written.
    """
    target = export_target(out_dir, overwrite)
    unfinished = target.parent / f".{target.name}.partial"
    with _writing(target):
        if overwrite:  # into a directory that is this process's: a killed one left it
            shutil.rmtree(unfinished, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            unfinished.mkdir()
        except FileExistsError:
            why = f"another export to {target} is running, or one was killed; wait, or remove this directory"
            raise UserError(f"{unfinished}: {why}") from None
        try:
            yield unfinished
            if overwrite:
                _replace(target, unfinished)
            else:
                os.rename(unfinished, target)  # fails if something is there by now
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise


@contextmanager
def _writing(target: Path) -> Iterator[None]:
    """Inside, an error of the file system becomes one line."""
    try:
        yield
    except OSError as error:
        remedy = "free space, grant access or name another directory"
        raise UserError(f"{target}: the export cannot be written ({reason(error)}); {remedy}") from error


def _replace(target: Path, unfinished: Path) -> None:
    """Replace an older export, if there is one, by the new one."""
    replaced = target.parent / f".{target.name}.replaced"
    if target.exists():
        _keep_others(replaced, target)  # of an export that was killed below
        os.rename(target, replaced)
    os.rename(unfinished, target)
    _keep_others(replaced, target)


def _keep_others(replaced: Path, target: Path) -> None:
    """Move what no export writes from a replaced directory to ``target``, and remove the rest."""
    if not replaced.is_dir():
        return
    for path in replaced.iterdir():
        if path.name not in (*COMPANIONS, "config.json", INDEX, SINGLE) and not _SHARD.fullmatch(path.name):
            os.rename(path, target / path.name)
    shutil.rmtree(replaced)


def _copy_companions(source_dir: Path, folder: Path) -> None:
    for name in COMPANIONS:
        source = Path(source_dir) / name
        if source.is_dir():
            shutil.copytree(source, folder / name)
        elif source.is_file():
            shutil.copyfile(source, folder / name)


def _write_tensors(params: Params, model: Model, folder: Path, dtype: np.dtype, max_shard_bytes: int) -> None:
    slots = _slots(model)
    files = _split(slots, dtype.itemsize, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for index, part in enumerate(files, start=1):
        file = SINGLE if len(files) == 1 else f"model-{index:05d}-of-{len(files):05d}.safetensors"
        shapes = {name: slot.shape for name, slot in part.items()}
        write_file(folder / file, shapes, dtype, fetch_tensors(params, part, dtype))
        weight_map |= dict.fromkeys(part, file)
    if len(files) > 1:
        total = sum(math.prod(slot.shape) for slot in slots.values()) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
