"""Reading the LoRA files that PyTorch users exchange, whatever their naming.

  diffusers  unet.<module>.lora.down.weight, .lora.up.weight; before 2024
             unet.<…attn1>.processor.to_q_lora.down.weight
  PEFT       base_model.model.<module>.lora_A.weight, .lora_B.weight, and beside them
             adapter_config.json
  kohya      lora_unet_<module>.lora_down.weight, .lora_up.weight (`kohya.py`)

down is (r, in) or of a convolution (r, in, kh, kw), up (out, r) or (out, r, 1, 1);
<module> is the PyTorch name, down_blocks.0.attentions.0.….attn1.to_out.0. The scale, of
`.alpha` tensors or of PEFT's settings (`peft_config.py`), is folded into b. The
prefixes may be absent. Only the UNet is adapted here: tensors of text encoders are left
out, since users share such files for their UNet part too, and a line is printed.
"""

import re
import sys
from pathlib import Path

import numpy as np
from flax.traverse_util import unflatten_dict

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.weights import torch_name, tree_path
from safetydpo_jax.formats.loras import kohya, peft_config
from safetydpo_jax.formats.loras.peft_config import Scaling
from safetydpo_jax.formats.tensors import open_safetensors
from safetydpo_jax.runtime import manifest

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

# A tensor's name: the module, then which part of the layer it is.
_TENSOR = re.compile(
  r"(.+?)\.(?:(lora\.down|lora_down|lora_A(?:\.default)?|lora\.up|lora_up"
  r"|lora_B(?:\.default)?)\.weight|(alpha))"
)
_DOWN = ("lora.down", "lora_down", "lora_A", "lora_A.default")
_OLD = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
_PREFIX = re.compile(r"^(unet\.|base_model\.model\.)+")
_TEXT_ENCODER = ("text_encoder", "text_model.", "te1.", "te2.", *kohya.TEXT_ENCODERS)
_ROOTS = re.compile(
  r"(down_blocks_\d+|up_blocks_\d+|mid_block|conv_in|conv_out|time_embedding"
  r"|add_embedding)$"
)
# Parts of names that distinguish other adapters from plain LoRA.
_OTHERS = {
  ".hada_": "LoHa",
  ".lokr_": "LoKr",
  ".dora_scale": "DoRA",
  ".lora_magnitude_vector": "DoRA",
  ".lora_mid.": "LoCon with a Tucker core",
  ".oft_": "OFT",
  ".diff": "a difference of whole weights",
}

LayerPath = tuple[str, ...]


def read_peft_folder(folder: Path) -> dict:
  """Reads adapter_model.safetensors with adapter_config.json; see `read_lora_file`."""
  config = manifest.read_json(folder / PEFT_CONFIG, "PEFT adapter")
  if not isinstance(config, dict):
    raise InputError(f"{folder / PEFT_CONFIG} is not a JSON object")
  scaling = peft_config.parse(config, str(folder / PEFT_CONFIG))
  return read_lora_file(folder / PEFT_FILE, scaling)


def read_lora_file(file: Path, scaling: Scaling | None = None) -> dict:
  """Reads a LoRA file in any of the namings → LoRA tree, float32 numpy.

  Args:
    file: safetensors.
    scaling: of the products; by default that of the file's header, else alpha = r.

  Raises:
    InputError: an unreadable file, another kind of adapter, a tensor that is not
      part of a UNet LoRA, a layer with mismatched factors, or a number that is not
      finite.
  """
  if file.suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl"):
    raise InputError(
      f"{file} is a pickle, which can run code, and is not read; save it as safetensors"
    )
  tensors, header = open_safetensors(file)
  if scaling is None:
    text = header.get("lora_adapter_metadata", "{}")
    scaling = peft_config.parse_header(text, str(file))
  layers: dict[LayerPath, dict[str, np.ndarray]] = {}
  left_out = 0
  for name, tensor in tensors.items():
    module = _PREFIX.sub("", name)
    if kind := next((kind for part, kind in _OTHERS.items() if part in name), None):
      raise InputError(
        f"{file} is {kind} ({name}), which is not supported; only LoRA is"
      )
    if module.startswith(_TEXT_ENCODER):
      left_out += 1
      continue
    path, part = _parse_name(module, f"{file}: {name!r}")
    if part in layers.setdefault(path, {}):
      raise InputError(f"{file}: {name!r} is listed twice, under two names")
    layers[path][part] = np.asarray(tensor, np.float32)
  if not layers:
    raise InputError(f"{file} holds no tensors of a UNet LoRA")
  if left_out:
    print(
      f"{file}: {left_out} tensors of text encoders are left out; only the UNet's LoRA "
      "is used here",
      file=sys.stderr,
    )
  lora: dict[LayerPath, np.ndarray] = {}
  for path, parts in layers.items():
    where = f"{file}: {torch_name(path)}"
    a, b = _factors(parts, where)
    rank = a.shape[-1]
    if "alpha" in parts:
      if parts["alpha"].size != 1:
        raise InputError(f"{where} has an alpha of shape {parts['alpha'].shape}")
      scale = float(parts["alpha"].reshape(())) / rank
    else:
      scale = scaling(torch_name(path), rank)
    with np.errstate(over="ignore"):
      b = b * np.float32(scale)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
      raise InputError(f"{where} holds NaN or infinity")
    lora[(*path, "a")] = np.ascontiguousarray(a)
    lora[(*path, "b")] = np.ascontiguousarray(b)
  return unflatten_dict(lora)


def _parse_name(name: str, where: str) -> tuple[LayerPath, str]:
  """The layer's path and which of a, b and alpha a tensor is."""
  name = _OLD.sub(r".\1.lora.\2.weight", name).replace(".to_out.lora", ".to_out.0.lora")
  found = _TENSOR.fullmatch(name)
  path = None
  if found and found[1].startswith(kohya.PREFIX):
    path = kohya.module_path(found[1])
  elif found:
    path = tree_path(found[1])
  if not found or not path or not _ROOTS.match(path[0]):
    raise InputError(
      f"{where} is not a UNet LoRA tensor in diffusers, PEFT or kohya naming"
    )
  return path, "alpha" if found[3] else "a" if found[2] in _DOWN else "b"


def _factors(parts: dict[str, np.ndarray], where: str) -> tuple[np.ndarray, np.ndarray]:
  """a (in, r) or (kh, kw, in, r), and b (r, out)."""
  if not {"a", "b"} <= parts.keys():
    raise InputError(f"{where} has only one of its two factors")
  down, up = parts["a"], parts["b"]
  if up.ndim == 4 and up.shape[2:] == (1, 1):
    up = up[:, :, 0, 0]
  if down.ndim == 4 and down.shape[2:] == (1, 1):
    down = down[:, :, 0, 0]
  if down.ndim not in (2, 4) or up.ndim != 2 or not 0 < down.shape[0] == up.shape[1]:
    raise InputError(
      f"{where} has factors {parts['a'].shape} and {parts['b'].shape}; expected one "
      "rank, (r, in) and (out, r), or (r, in, kh, kw) and (out, r, 1, 1)"
    )
  return (down.T if down.ndim == 2 else down.transpose(2, 3, 1, 0)), up.T
