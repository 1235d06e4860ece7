"""LoRA files that PyTorch users exchange: safetensors in diffusers and PEFT naming.

diffusers (`pytorch_lora_weights.safetensors`), what we write:
  unet.<module>.lora.down.weight   (r, in)  = aᵀ
  unet.<module>.lora.up.weight     (out, r) = bᵀ, the scale folded in
  header: format = pt, and lora_adapter_metadata = JSON of unet.r, unet.lora_alpha,
  unet.target_modules and nothing more (diffusers refuses unknown keys). With
  alpha = r the file needs no `.alpha` tensors.

PEFT, also read: <module>.lora_A.weight and .lora_B.weight. A prefix `unet.` or
`base_model.model.` may be present or not. A scale in the header or in `.alpha`
tensors is folded into b.

<module> is the PyTorch name, down_blocks.0.attentions.0.….attn1.to_out.0.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import save_file

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.tensors import open_safetensors
from safetydpo_jax.formats.weights import torch_name, tree_path
from safetydpo_jax.lora import rank_of

FILE_NAME = "pytorch_lora_weights.safetensors"

# Ending of a tensor's name → its part of the layer.
_PARTS = {
  ".lora.down.weight": "a",
  ".lora_A.weight": "a",
  ".lora_A.default.weight": "a",
  ".lora.up.weight": "b",
  ".lora_B.weight": "b",
  ".lora_B.default.weight": "b",
  ".alpha": "alpha",
}
_PREFIX = re.compile(r"^(unet\.|base_model\.model\.)+")
_UNET = re.compile(r"(down_blocks|mid_block|up_blocks)\.")


def adapted_layers(lora: dict) -> list[str]:
  """PyTorch names of the layer kinds a LoRA adapts: to_q, to_out.0, …"""
  names = [torch_name(path[:-1]) for path in flatten_dict(lora) if path[-1] == "a"]
  kinds = {".".join(name.split(".")[-2:]) for name in names}
  return sorted({kind if kind[-1].isdigit() else kind.split(".")[-1] for kind in kinds})


def write_diffusers(folder: Path, lora: Any, targets: tuple[str, ...]) -> Path:
  """Writes `lora` (scale folded in) so that `load_lora_weights(folder)` reads it.

  Returns:
    The file, written through a temporary name.
  """
  tensors, rank = {}, rank_of(lora)
  for path, leaf in flatten_dict(lora).items():
    part = {"a": "down", "b": "up"}[path[-1]]
    # One rank for all layers is what the header can say; zeros change no product.
    missing = rank - leaf.shape[1 if path[-1] == "a" else 0]
    leaf = np.pad(
      np.asarray(leaf, np.float32),
      [(0, 0), (0, missing)][:: 1 if part == "down" else -1],
    )
    # A transposed view would be written in its old order: safetensors ignores strides.
    tensors[f"unet.{torch_name(path[:-1])}.lora.{part}.weight"] = np.ascontiguousarray(
      leaf.T
    )
  about = {"unet.r": rank, "unet.lora_alpha": rank, "unet.target_modules": targets}
  header = {"format": "pt", "lora_adapter_metadata": json.dumps(about)}
  file = Path(folder) / FILE_NAME
  temporary = file.with_name(f".{file.name}.{os.getpid()}")
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, temporary, metadata=header)
    os.replace(temporary, file)
  except (OSError, SafetensorError) as error:
    raise InputError(
      f"cannot write {file}: {error}; choose an --out you can write to"
    ) from error
  return file


def _read_metadata(file: Path, header: dict[str, str]) -> dict[str, Any]:
  """The adapter's settings in the header; refuses those that change the product."""
  try:
    metadata = json.loads(header.get("lora_adapter_metadata", "{}"))
  except json.JSONDecodeError as error:
    raise InputError(f"{file}: lora_adapter_metadata is no JSON: {error}") from error
  if not isinstance(metadata, dict):
    raise InputError(f"{file}: lora_adapter_metadata is no JSON object")
  for name in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern"):
    if metadata.get(f"unet.{name}"):
      raise InputError(
        f"{file} was made with {name}, which is not supported; save it as a plain LoRA"
      )
  alpha = metadata.get("unet.lora_alpha")
  if not isinstance(alpha, int | float | None):
    raise InputError(f"{file}: unet.lora_alpha is {alpha!r}; expected a number")
  return metadata


def read_lora_file(file: Path) -> dict:
  """Reads a LoRA file in diffusers or PEFT naming → LoRA tree, float32 numpy.

  Raises:
    InputError: for an unreadable file, a tensor that is no part of a UNet LoRA, a
      layer whose factors do not belong together, or a number that is not finite.
  """
  tensors, header = open_safetensors(file)
  metadata = _read_metadata(file, header)
  layers: dict[tuple[str, ...], dict[str, np.ndarray]] = {}
  for name, tensor in tensors.items():
    ending = next((end for end in _PARTS if name.endswith(end)), None)
    module = _PREFIX.sub("", name.removesuffix(ending or ""))
    if ending is None or not _UNET.match(module):
      raise InputError(
        f"{file}: {name!r} is no UNet LoRA tensor in diffusers or PEFT naming"
      )
    layers.setdefault(tree_path(module), {})[_PARTS[ending]] = np.asarray(
      tensor, np.float32
    )
  if not layers:
    raise InputError(f"{file} holds no tensors")

  lora = {}
  for path, parts in layers.items():
    where = f"{file}: {torch_name(path)}"
    if not {"a", "b"} <= parts.keys():
      raise InputError(f"{where} has only one of its two factors")
    a, b = parts["a"].T, parts["b"].T
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
      raise InputError(
        f"{where} has factors {a.shape} and {b.shape}; expected one rank, (in, r) and "
        "(r, out)"
      )
    alpha = parts.get("alpha", metadata.get("unet.lora_alpha") or a.shape[1])
    b = b * (np.float32(alpha) / a.shape[1])
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
      raise InputError(f"{where} holds NaN or infinity")
    lora[(*path, "a")] = np.ascontiguousarray(a)
    lora[(*path, "b")] = np.ascontiguousarray(b)
  return unflatten_dict(lora)
