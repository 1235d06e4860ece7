"""Reading the LoRA files that PyTorch users exchange, whatever tool wrote them.

`names.py` says which layer a tensor belongs to, `products.py` what a layer's tensors do
to its kernel, `adapter.py` what needs the base weights: DoRA, norms, biases, and whole
kernels. The scale s = alpha / r comes from a layer's `alpha`, else from PEFT's settings
(`peft_config.py`), else it is 1; it is folded into b.

A product whose factors are smaller than the layer's kernel becomes one of the LoRA's
layers. A larger one, as LoKr of whole matrices is, is kept as a change of the kernel.

Only the UNet is adapted here. Tensors of text encoders, of the VAE and of embeddings
are left out, whatever they are, since users share such files for their UNet part too,
and a line is printed. A UNet tensor that is not understood is an error.
"""

import collections
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import unflatten_dict

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.weights import torch_name
from safetydpo_jax.formats.loras import kohya, names, peft_config, products
from safetydpo_jax.formats.loras.adapter import Adapter, Change, low_rank
from safetydpo_jax.formats.loras.names import LayerPath
from safetydpo_jax.formats.loras.peft_config import Scaling
from safetydpo_jax.formats.tensors import (
  HOW_TO_CONVERT,
  PICKLES,
  is_whole,
  open_safetensors,
)
from safetydpo_jax.lora import LoraTree
from safetydpo_jax.runtime import manifest
from safetydpo_jax.runtime.log import note

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"

# Parts of names that distinguish adapters that are not read.
_UNREAD = {
  ".oft_": "OFT",
  ".a1.weight": "GLoRA",
  ".b1.weight": "GLoRA",
  ".on_input": "(IA)³",
  ".boft": "BOFT",
}
# Layers with 3×3 kernels, which some parts hold flattened; others are 1×1 or linear.
_WIDE = ("conv_in", "conv_out", "conv1", "conv2", "conv")


def read_peft_folder(
  folder: Path, unet_config: Mapping[str, Any] | None = None
) -> Adapter:
  """Reads adapter_model.safetensors with adapter_config.json; see `read_lora_file`."""
  config = manifest.read_json(folder / PEFT_CONFIG, "PEFT adapter")
  if not isinstance(config, dict):
    raise InputError(f"{folder / PEFT_CONFIG} is not a JSON object")
  scaling = peft_config.parse(config, str(folder / PEFT_CONFIG))
  file = folder / PEFT_FILE
  if not file.exists() and (pickled := file.with_suffix(".bin")).is_file():
    file = pickled  # which says how to convert it
  return read_lora_file(file, scaling, unet_config)


def read_lora_file(
  file: Path,
  scaling: Scaling | None = None,
  unet_config: Mapping[str, Any] | None = None,
) -> Adapter:
  """Reads a LoRA file of any dialect.

  Args:
    file: safetensors.
    scaling: of the products; by default that of the file's header, else alpha = r.
    unet_config: the base UNet's config.json, which says what sgm's numbers of layers
      mean; None: two resnets a level, as published models have, see `kohya.py`.

  Returns:
    The adapter; its LoRA is float32 numpy, and the rest views of the file.

  Raises:
    InputError: an unreadable file, an adapter of a kind that is not read, a UNet tensor
      that is not understood, a layer whose tensors do not fit each other, or a number
      that is not finite.
  """
  if file.suffix in PICKLES:
    raise InputError(
      f"{file} is a pickle; {HOW_TO_CONVERT}, with a name that ends in .safetensors"
    )
  tensors, header = open_safetensors(file)
  if scaling is None:
    text = header.get("lora_adapter_metadata", "{}")
    scaling = peft_config.parse_header(text, str(file))
  layers = _sort(tensors, file, unet_config)
  lora: dict[LayerPath, np.ndarray] = {}
  rest: dict[LayerPath, tuple[Change, ...]] = {}
  numbers = 0
  for path, parts in layers.items():
    where = f"{file}: {torch_name(path)}"
    _check_numbers(parts, where)
    if (bias := parts.pop("diff_b", None)) is not None:
      rest[*path, "bias"] = (_vector(bias, where),)
    if parts.keys() == {"diff"} and parts["diff"].ndim == 1:
      rest[*path, "scale"] = (_vector(parts["diff"], where),)
    elif parts or bias is None:
      change = _kernel(path, parts, scaling, where)
      numbers += math.prod(change.shape)
      if numbers > products.LARGEST_UNET:
        raise InputError(f"{file} changes more numbers than any Stable Diffusion has")
      if _is_small(change):
        lora[*path, "a"], lora[*path, "b"] = low_rank(change)
        if not np.isfinite(lora[*path, "b"]).all():
          raise InputError(f"{where} holds NaN or infinity")
      else:
        rest[*path, "kernel"] = (change,)
  return Adapter(LoraTree(unflatten_dict(lora)), rest)


def _sort(
  tensors: dict[str, np.ndarray], file: Path, unet_config: Mapping[str, Any] | None
) -> dict[LayerPath, dict[str, np.ndarray]]:
  """The UNet's tensors by layer and part; what is not the UNet's is counted."""
  layers: dict[LayerPath, dict[str, np.ndarray]] = {}
  left_out: collections.Counter[str] = collections.Counter()
  resnets = kohya.resnets_of(unet_config) if unet_config else kohya.TWO_EACH
  for name, tensor in tensors.items():
    if who := names.owner(name):
      left_out[who] += 1
      continue
    if kind := next((kind for part, kind in _UNREAD.items() if part in name), None):
      raise InputError(
        f"{file} is {kind} ({name}), which is not supported; expected a LoRA, LoHa, "
        "LoKr or DoRA"
      )
    if not (parsed := names.parse(name, resnets)):
      if names.is_numbered(name):
        raise InputError(_no_layer(f"{file}: {name!r}", unet_config))
      raise InputError(
        f"{file}: {name!r} is not a UNet LoRA tensor in the naming of diffusers, PEFT, "
        "kohya, LyCORIS, OneTrainer or ComfyUI"
      )
    path, part = parsed
    if part in layers.setdefault(path, {}):
      raise InputError(f"{file}: {name!r} is listed twice, under two names")
    layers[path][part] = tensor
  if not layers:
    raise InputError(f"{file} holds no tensors of a UNet LoRA")
  if left_out:
    counts = " and ".join(
      f"{n} tensor{'s' if n > 1 else ''} of {who}" for who, n in left_out.items()
    )
    note(f"{file}: {counts} left out; only the UNet is adapted")
  return layers


def _no_layer(what: str, unet_config: Mapping[str, Any] | None) -> str:
  """The message for a layer whose number is not one of the UNet's."""
  of = "a UNet with two resnets on each level, which is assumed without a model"
  way = "use it with the model it was made for (`merge`: --model)"
  if unet_config:
    counts = ", ".join(map(str, kohya.resnets_of(unet_config)))
    of = f"this model, whose UNet has levels of {counts} resnets"
    way = "use it with the model it was made for"
  return f"{what} is not a layer of {of}; {way}"


def _check_numbers(parts: dict[str, np.ndarray], where: str) -> None:
  for part, array in parts.items():
    if is_whole(array) and part != "alpha":
      raise InputError(
        f"{where} holds integers ({array.dtype}) as its {part}, as quantised files do; "
        "save it with floating point numbers"
      )
    if not np.isfinite(np.asarray(array, np.float32)).all():
      raise InputError(f"{where} holds NaN or infinity")


def _vector(array: np.ndarray, where: str) -> Change:
  """The change of a norm or bias."""
  if array.ndim != 1:
    raise InputError(
      f"{where} has a norm or bias of shape {array.shape}; expected (n,)"
    )
  return Change({"diff": array}, array.shape)


def _kernel(
  path: LayerPath, parts: dict[str, np.ndarray], scaling: Scaling, where: str
) -> Change:
  """The change of a kernel that a layer's tensors make."""
  parts = dict(parts)
  alpha, dora_scale, magnitude = (
    parts.pop(name, None) for name in ("alpha", "dora_scale", "magnitude")
  )
  if dora_scale is not None and magnitude is not None:
    raise InputError(
      f"{where} has both dora_scale and lora_magnitude_vector, which mean the same; "
      "save it with one of them"
    )
  kind = products.kind_of(parts, where)
  shape = products.shape_of(parts, 3 if path[-1] in _WIDE else 1, where)
  rank = products.rank_of(parts)
  if alpha is not None and alpha.size != 1:
    raise InputError(f"{where} has an alpha of shape {alpha.shape}")
  if kind == "full":
    scale = 1.0
  elif alpha is None:
    scale = scaling(torch_name(path), rank)
  else:
    scale = float(alpha.reshape(())) / rank if rank else 1.0
  if scaling.dora and magnitude is None and dora_scale is None:
    raise InputError(
      f"{where} has no lora_magnitude_vector, although the settings say use_dora; save "
      "the adapter again"
    )
  axis = 0
  if dora_scale is not None:
    magnitude, axis = dora_scale, _axis(dora_scale, shape, where)
  if magnitude is not None:
    if magnitude.size != shape[axis]:
      raise InputError(
        f"{where} has magnitudes of shape {magnitude.shape}; expected {shape[axis]}"
      )
    ones = (-1, 1, 1, 1) if axis == 0 else (1, -1, 1, 1)
    magnitude = np.asarray(magnitude, np.float32).reshape(ones)
  return Change(parts, shape, scale, magnitude)


def _axis(dora_scale: np.ndarray, shape: tuple[int, ...], where: str) -> int:
  """Whose norms `dora_scale` holds: of output channels, 0, or of input channels, 1."""
  out, inputs, *unit = dora_scale.shape if dora_scale.ndim > 1 else (0, 0)
  if set(unit) <= {1}:
    for axis, wanted in enumerate(((shape[0], 1), (1, shape[1]))):
      if (out, inputs) == wanted:
        return axis
  raise InputError(
    f"{where} has a dora_scale of shape {dora_scale.shape}; expected ({shape[0]}, 1) "
    f"or (1, {shape[1]})"
  )


def _is_small(change: Change) -> bool:
  """Whether a change is kept as two factors, see the module's docstring."""
  if change.magnitude is not None or "diff" in change.parts:
    return False
  out, inputs = change.shape[0], math.prod(change.shape[1:])
  rank = products.inner(change.parts)
  return "up" in change.parts or rank * (out + inputs) <= out * inputs
