"""Writing LoRA files that PyTorch users load, in diffusers' and in kohya's naming.

diffusers, pytorch_lora_weights.safetensors:
  unet.<module>.lora.down.weight   (r, in) = aᵀ, of a convolution (r, in, kh, kw)
  unet.<module>.lora.up.weight     (out, r) = bᵀ, of a convolution (out, r, 1, 1)
  header: format = pt, and lora_adapter_metadata = JSON of unet.r, unet.lora_alpha,
  unet.target_modules and nothing more (diffusers refuses unknown keys)
kohya: see `kohya.py`.

The scale is folded into b and alpha = r, so that readers that ignore alpha agree. Both
headers allow only one rank for all layers: smaller layers are padded with zeros, which
change no product.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict
from numpy.typing import DTypeLike

from safetydpo_jax.formats.base_model.weights import torch_name
from safetydpo_jax.formats.loras import kohya
from safetydpo_jax.formats.tensors import cast, write_safetensors
from safetydpo_jax.lora import rank_of

FILE_NAME = "pytorch_lora_weights.safetensors"
DTYPES = {
  "float32": np.float32,
  "float16": np.float16,
  "bfloat16": ml_dtypes.bfloat16,
}


def adapted_layers(lora: Mapping[str, Any]) -> list[str]:
  """PyTorch names of the layer kinds a LoRA adapts: to_q, to_out.0, …"""
  names = [torch_name(path[:-1]) for path in flatten_dict(lora) if path[-1] == "a"]
  kinds = {tuple(name.split(".")[-2:]) for name in names}
  return sorted({".".join(k) if k[-1].isdigit() else k[-1] for k in kinds})


def write_diffusers(
  folder: Path,
  lora: Mapping[str, Any],
  targets: Sequence[str],
  *,
  shapes: Mapping[str, Any] | None = None,
  dtype: DTypeLike = np.float32,
) -> Path:
  """Writes `lora` (scale folded in) so that `load_lora_weights(folder)` reads it.

  Args:
    folder: to write to.
    lora: the tree.
    targets: PyTorch names of the adapted layers or endings of them, for the header.
    shapes: the UNet's parameter tree (arrays or shapes), which distinguishes 1×1
      convolutions from linear layers; without it, all are taken for linear layers.
    dtype: of the numbers, of `DTYPES`.

  Raises:
    InputError: the file cannot be written, or a number does not fit `dtype`.
  """
  rank = rank_of(lora)
  about = {
    "unet.r": rank,
    "unet.lora_alpha": rank,
    "unet.target_modules": list(targets),
  }
  header = {"format": "pt", "lora_adapter_metadata": json.dumps(about)}
  named = {}
  for path, down, up in torch_factors(lora, shapes):
    named[f"unet.{torch_name(path)}.lora.down.weight"] = down
    named[f"unet.{torch_name(path)}.lora.up.weight"] = up
  return _write(Path(folder) / FILE_NAME, named, dtype, header)


def write_kohya(
  folder: Path,
  lora: Mapping[str, Any],
  header: Mapping[str, str],
  *,
  sgm: bool = False,
  shapes: Mapping[str, Any] | None = None,
  dtype: DTypeLike = np.float32,
) -> Path:
  """Writes `lora` as A1111 and ComfyUI read it.

  `header` comes from `kohya.header`, `sgm` from `kohya.writes_sgm`. The other
  arguments, and what it raises, are those of `write_diffusers`.
  """
  alpha = np.array(rank_of(lora), np.float32)
  named = {}
  for path, down, up in torch_factors(lora, shapes):
    name = kohya.module_name(path, sgm)
    named |= {
      f"{name}.lora_down.weight": down,
      f"{name}.lora_up.weight": up,
      f"{name}.alpha": alpha,
    }
  return _write(Path(folder) / kohya.FILE_NAME, named, dtype, header)


def torch_factors(
  lora: Mapping[str, Any], shapes: Mapping[str, Any] | None = None
) -> Iterator[tuple[tuple[str, ...], np.ndarray, np.ndarray]]:
  """(path, down, up) of every layer in PyTorch's layout, float32, of one rank."""
  factors, rank = flatten_dict(lora), rank_of(lora)
  kernels = flatten_dict(shapes) if shapes is not None else {}
  for path in sorted({path[:-1] for path in factors}):
    a = np.asarray(factors[(*path, "a")], np.float32)
    b = np.asarray(factors[(*path, "b")], np.float32)
    kernel = kernels.get((*path, "kernel"))
    if a.ndim == 2 and kernel is not None and len(kernel.shape) == 4:
      a = a[None, None]
    missing = rank - b.shape[0]
    a = np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, missing)])
    b = np.pad(b, [(0, missing), (0, 0)])
    if a.ndim == 2:
      yield path, a.T, b.T
    else:
      yield path, a.transpose(3, 2, 0, 1), b.T[:, :, None, None]


def target_modules(lora: Mapping[str, Any], shapes: Mapping[str, Any]) -> list[str]:
  """The header's names of the adapted layers, so that PEFT adapts these and no others.

  The kinds (to_q, to_out.0, …) if all layers of these kinds are adapted, as readers
  know them; else every layer by name.
  """
  adapted = {torch_name(path[:-1]) for path in flatten_dict(lora)}
  kinds = adapted_layers(lora)
  endings = tuple(f".{kind}" for kind in kinds)
  fitting = {
    name
    for path in flatten_dict(shapes)
    if path[-1] == "kernel" and f".{(name := torch_name(path[:-1]))}".endswith(endings)
  }
  return kinds if fitting == adapted else sorted(adapted)


def _write(
  file: Path,
  named: Mapping[str, np.ndarray],
  dtype: DTypeLike,
  header: Mapping[str, str],
) -> Path:
  """The file; alphas stay float32: bfloat16 cannot hold all whole numbers above 256."""
  ready = {
    name: array if name.endswith(".alpha") else cast(array, dtype, name)
    for name, array in named.items()
  }
  # Wide numbers first, as in the library, so that every tensor is aligned.
  ready = dict(sorted(ready.items(), key=lambda item: (-item[1].itemsize, item[0])))
  layout = {name: (array.dtype, array.shape) for name, array in ready.items()}
  write_safetensors(file, layout, ready.items(), header)
  return file
