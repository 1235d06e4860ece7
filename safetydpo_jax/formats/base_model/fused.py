"""A whole diffusers directory whose UNet has the LoRA in its weights.

  model_index.json, scheduler/, tokenizer*/, text_encoder*/, vae/, …   byte for byte
  unet/config.json                                                     byte for byte
  unet/diffusion_pytorch_model[.<variant>].safetensors                 W + a b + …

Above 10 GB, which SDXL is in float32, the weights are split as diffusers does it:
diffusion_pytorch_model[.<variant>]-00001-of-00002.safetensors and the index
diffusion_pytorch_model.safetensors.index[.<variant>].json with {"metadata":
{"total_size": bytes}, "weight_map": {tensor: file}}.

Sums are computed in float32 and rounded once; bf16(0.5 + 0.001) is 0.5. One tensor is
in memory at a time. With a variant, the new weights have it in their name, as the other
components' do, so that one call loads them all.

The files of model_index.json's components are copied. Pickles and code are not, nor are
other weights of the UNet and single-file checkpoints next to the folders: those contain
the UNet without the LoRA, and a reader might prefer them.
"""

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import weights
from safetydpo_jax.formats.base_model.component_files import (
  CONVERT,
  weight_files,
)
from safetydpo_jax.formats.tensors import FLOAT8, PICKLES, cast, write_safetensors
from safetydpo_jax.runtime import files
from safetydpo_jax.runtime.manifest import read_json, write_json

SHARD_BYTES = 10**10  # diffusers' max_shard_size

Change = Callable[[np.ndarray], np.ndarray]  # W in float32 → what is added to it

_COPIED = (".json", ".txt", ".safetensors", ".model")
_INDEX = "model_index.json"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
  """A folder to fill; it becomes `out` on success and is removed on failure.

  Raises:
    InputError: `out` exists and is not empty, or cannot be written. What the block
      raises passes through.
  """
  out = Path(out)
  temporary = out.absolute().with_name(f".{out.name}.{os.getpid()}")
  with files.naming(out):
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
      raise InputError(f"--out {out} already exists; choose a new folder")
    temporary.mkdir(parents=True)
  try:
    yield temporary
    with files.naming(out):
      os.replace(temporary, out)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def component_names(base: Path) -> list[str]:
  """The components that model_index.json lists, without those that are null.

  Raises:
    InputError: it lists something that is not a component of a PyTorch pipeline.
  """
  index = read_json(base / _INDEX, "diffusers directory")
  names = []
  for name, entry in index.items():
    kind = entry[-1] if isinstance(entry, list) and entry else entry
    if isinstance(kind, str) and kind.startswith("Flax"):
      raise InputError(f"{base / _INDEX} names {kind}; give the PyTorch checkpoint")
    if name.startswith("_") or not isinstance(entry, list) or kind is None:
      continue
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
      raise InputError(
        f"{base / _INDEX} lists {name!r}, which is not a valid component name"
      )
    if not (base / name).is_dir():
      raise InputError(f"{base / name} is missing, but {_INDEX} lists it; fetch it")
    names.append(name)
  return names


def copy_base(base: Path, out: Path) -> None:
  """Copies everything but the UNet's weights.

  Raises:
    InputError: a component is missing, has its weights only as pickles, is a link to a
      file elsewhere, or cannot be copied.
  """
  chosen = [base / _INDEX, *base.glob("LICENSE*")]
  for name in component_names(base):
    folder = base / name
    _check_classes(folder / "config.json")
    there = [file for file in folder.iterdir() if file.suffix in _COPIED]
    if name == "unet":
      there = [folder / "config.json"]
    elif not any(file.suffix == ".safetensors" for file in there):
      _refuse_pickles(folder)
    chosen += there
  for file in sorted(chosen):
    if files.is_lfs_pointer(file):
      raise InputError(f"{file} {files.NOT_FETCHED}")
    files.copy(_inside(file, base), out / file.relative_to(base))


def _check_classes(config: Path) -> None:
  """Refuses a component saved by diffusers' former Flax classes."""
  if config.is_file():
    content = read_json(config, "component")
    name = content.get("_class_name") if isinstance(content, dict) else None
    if str(name).startswith("Flax"):
      raise InputError(f"{config} names {name}; give the PyTorch checkpoint")


def _refuse_pickles(folder: Path) -> None:
  if pickles := sorted(f.name for f in folder.iterdir() if f.suffix in PICKLES):
    raise InputError(f"{folder} has its weights only as {pickles[0]}: {CONVERT}")


def _inside(file: Path, base: Path) -> Path:
  """`file`, if it is inside `base` or, in the hub's cache, one of its blobs.

  Otherwise a foreign checkpoint could make us copy, and publish, any file on this
  machine.
  """
  allowed = [base.resolve()]
  if base.resolve().parent.name == "snapshots":
    allowed.append(base.resolve().parents[1] / "blobs")
  real = file.resolve()
  if not any(real.is_relative_to(folder) for folder in allowed):
    raise InputError(f"{file} is a link to {real}, outside {base}; copy it there")
  if not real.is_file():
    raise InputError(f"{file} is not a regular file; fetch the checkpoint again")
  return file


def write_unet(
  out: Path,
  base: Path,
  lora: Mapping[str, Any],
  *,
  changes: Mapping[str, Change] | None = None,
  variant: str | None = None,
  dtype: DTypeLike | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
  """Writes out/unet's weights: those of base/unet with `lora` added.

  Args:
    out: the new directory.
    base: the diffusers directory.
    lora: LoRA tree, scale folded in, which fits the UNet (`lora.check_shapes`).
    changes: {PyTorch name of a weight: what is added to it, of it}, besides the LoRA.
    variant: of the base's weight files, and in the name of the new ones.
    dtype: of the new weights; None keeps each tensor's own, but see `new_dtype`.
    shard_bytes: the largest size of one file.

  Raises:
    InputError: the weights cannot be read or written, or a number overflows `dtype`.
  """
  files_of_base = weight_files(base / "unet", variant)
  for file in files_of_base:
    _inside(file, base)
  return write_tensors(
    out,
    dict(weights.read_tensors(files_of_base)),
    lora,
    str(base / "unet"),
    changes=changes,
    variant=variant,
    dtype=dtype,
    shard_bytes=shard_bytes,
  )


def write_tensors(
  out: Path,
  tensors: Mapping[str, np.ndarray],
  lora: Mapping[str, Any],
  source: str,
  *,
  changes: Mapping[str, Change] | None = None,
  variant: str | None = None,
  dtype: DTypeLike | None = None,
  shard_bytes: int = SHARD_BYTES,
) -> list[Path]:
  """`write_unet` for the tensors of a UNet, whose origin is `source` in errors."""
  layers, changes = lora_layers(lora), changes or {}
  found = {weights.canonical_name(name) for name in tensors}
  if missing := sorted((layers.keys() | changes.keys()) - found):
    raise InputError(f"the LoRA adapts {missing[0]}, which {source} does not have")
  layout = {
    name: (new_dtype(tensor, dtype), tensor.shape) for name, tensor in tensors.items()
  }
  shards = split(layout, shard_bytes)
  dot = f".{variant}" if variant else ""
  stem = f"diffusion_pytorch_model{dot}"
  written, table = [], {}
  for n, names in enumerate(shards, 1):
    part = f"-{n:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
    file = out / "unet" / f"{stem}{part}.safetensors"
    fused = (
      (name, fuse_tensor(name, tensors[name], layout[name][0], layers, changes))
      for name in names
    )
    write_safetensors(file, {n: layout[n] for n in names}, fused, {"format": "pt"})
    written.append(file)
    table |= dict.fromkeys(names, file.name)
  if len(shards) > 1:
    index = out / "unet" / f"diffusion_pytorch_model.safetensors.index{dot}.json"
    size = sum(_bytes(entry) for entry in layout.values())
    write_json(index, {"metadata": {"total_size": size}, "weight_map": table})
  return written


def lora_layers(lora: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """{PyTorch name of the adapted weight: (a, b)}."""
  factors = flatten_dict(lora)
  return {
    weights.torch_name((*path[:-1], "kernel")): (leaf, factors[(*path[:-1], "b")])
    for path, leaf in factors.items()
    if path[-1] == "a"
  }


def fuse_tensor(
  name: str,
  tensor: np.ndarray,
  dtype: DTypeLike,
  layers: Mapping[str, tuple[np.ndarray, np.ndarray]],
  changes: Mapping[str, Change],
) -> np.ndarray:
  """The sum as PyTorch stores it, (out, in), (out, in, kh, kw) or (n,), in `dtype`."""
  known, total = weights.canonical_name(name), tensor
  if (factors := layers.get(known)) is not None:
    a, b = (np.asarray(factor, np.float32) for factor in factors)
    product = a @ b  # (in, out) or (kh, kw, in, out)
    order = (3, 2, 0, 1) if product.ndim == 4 else (1, 0)
    product = product.transpose(order).reshape(tensor.shape)
    total = total.astype(np.float32) + product
  if (change := changes.get(known)) is not None:
    total = total.astype(np.float32) + change(tensor.astype(np.float32))
  if total is not tensor:
    return cast(total, dtype, f"unet.{name}")
  if tensor.dtype == dtype:
    return tensor
  return cast(tensor, dtype, f"unet.{name}")


def split(layout: Mapping[str, tuple], most: int) -> list[list[str]]:
  """Names by file: files are filled in order, up to `most` bytes each."""
  shards: list[list[str]] = [[]]
  size = 0
  for name, entry in layout.items():
    if shards[-1] and size + _bytes(entry) > most:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += _bytes(entry)
  return shards


def _bytes(entry: tuple[Any, tuple[int, ...]]) -> int:
  return math.prod(entry[1]) * np.dtype(entry[0]).itemsize


def new_dtype(tensor: np.ndarray, dtype: DTypeLike | None) -> np.dtype:
  """The type a tensor is written in; only floats are converted.

  float8 becomes float16, which holds all its numbers: rounded to two or three binary
  digits, a sum would lose the LoRA.
  """
  if dtype is None and tensor.dtype in FLOAT8:
    return np.dtype(np.float16)
  whole = np.issubdtype(tensor.dtype, np.integer) or tensor.dtype == np.bool_
  return tensor.dtype if dtype is None or whole else np.dtype(dtype)
