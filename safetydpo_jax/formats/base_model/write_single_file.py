"""A checkpoint in one safetensors file, the LoRA in its UNet's weights.

The tensors have the original code's names (`original_names.py`), so that ComfyUI,
A1111, Forge and diffusers' `from_single_file` read them:

  model.diffusion_model.   W + a b
  first_stage_model.       the VAE, its attention as 1×1 convolutions
  cond_stage_model. or conditioner.   the text encoders
  v_pred, ztsnr            markers, where the UNet predicts v and readers cannot see it

and the header says family, prediction type and size (modelspec). Such a file holds no
configs: readers know the families. A network they would build in another way, because
of other heads or group norms, is refused.

Sums are computed in float32 and rounded once, and one tensor is in memory at a time, as
in `fused.py`.
"""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike

from safetydpo_jax.diffusion import Schedule
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import (
  component_files,
  fused,
  original_shapes,
  single_file,
  weights,
)
from safetydpo_jax.formats.base_model import single_file_families as families
from safetydpo_jax.formats.base_model import single_file_networks as networks
from safetydpo_jax.formats.base_model.original_names import Part
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.formats.base_model.single_file_families import Family
from safetydpo_jax.formats.tensors import cast, write_safetensors

FILE = "safetydpo_model.safetensors"


class _Piece(NamedTuple):
  """A tensor of diffusers', and which part of one of the file's it is."""

  component: str
  name: str
  part: Part


def write_single_file(
  file: Path,
  base: Pipeline,
  lora: Mapping[str, Any],
  header: Mapping[str, str],
  *,
  changes: Mapping[str, fused.Change] | None = None,
  variant: str | None = None,
  dtype: DTypeLike | None = None,
) -> None:
  """Writes the base model with `lora` in its UNet.

  Args:
    file: to write.
    base: the base model; no weights are loaded.
    lora: LoRA tree, scale folded in, which fits the UNet (`lora.check_shapes`).
    header: texts for the file's header.
    changes: of the UNet's weights besides the LoRA, see `fused.write_unet`.
    variant: of the base's weight files, if it is a directory; a component that does
      not have it is read without.
    dtype: of the weights; None keeps each tensor's own, but see `fused.new_dtype`.

  Raises:
    InputError: the base cannot be read or has no place in such a file, the file cannot
      be written, or a number overflows `dtype`.
  """
  family = family_of(base)
  tensors = {name: read_component(base, name, variant) for name in base.modules()}
  by_key: dict[str, list[_Piece]] = {}
  for name in tensors:
    for tensor, part in _parts(base, family, name).items():
      by_key.setdefault(part.key, []).append(_Piece(name, tensor, part))
  for pieces in by_key.values():
    pieces.sort(key=lambda piece: piece.part.third or 0)
  layout = {
    key: (
      fused.new_dtype(tensors[pieces[0].component][pieces[0].name], dtype),
      _shape(pieces, tensors),
    )
    for key, pieces in by_key.items()
  }
  _check_read_back(base, family, {key: shape for key, (_, shape) in layout.items()})
  extra = _markers(base, family)
  if base.single:
    extra |= single_file.unused_text(base.single)
  layout |= {key: (tensor.dtype, tensor.shape) for key, tensor in extra.items()}
  layers = fused.lora_layers(lora)

  def arrays() -> Iterator[tuple[str, np.ndarray]]:
    for key, pieces in by_key.items():
      yield key, _join(pieces, tensors, layers, changes or {}, *layout[key])

  write_safetensors(
    file, layout, itertools.chain(arrays(), extra.items()), {"format": "pt", **header}
  )


def family_of(base: Pipeline) -> Family:
  """Which Stable Diffusion a model is, by its networks."""
  if base.single:
    return base.single.family
  if len(base.text_encoders) == 2:
    return families.SDXL
  linear = base.unet.config.get("use_linear_projection", False)
  return families.SD2 if linear else families.SD1


def read_component(
  base: Pipeline, name: str, variant: str | None
) -> dict[str, np.ndarray]:
  """{diffusers name without `text_model.`: view of the file} of a network.

  Raises:
    InputError: its weights cannot be read, or there are none.
  """
  if base.single:
    return dict(single_file.component_of(base.single, name).read())
  there = [file.name for file in (base.path / name).glob("*")]
  if not component_files.is_there(there, variant):
    variant = None
  files = component_files.weight_files(base.path / name, variant)
  return {weights.canonical_name(n): x for n, x in weights.read_tensors(files)}


def _parts(base: Pipeline, family: Family, name: str) -> dict[str, Part]:
  """{diffusers name: where it goes} of a network."""
  config = base.modules()[name].config
  if name == "unet":
    return networks.unet_parts(config, networks.UNET)
  if name == "vae":
    return networks.vae_parts(config, networks.VAE[0])
  encoder = next(e for e in family.encoders if e.component == name)
  return networks.text_parts(encoder, config, encoder.prefixes[0])


def _shape(
  pieces: list[_Piece], tensors: Mapping[str, Mapping[str, np.ndarray]]
) -> tuple[int, ...]:
  """The shape of what `_join` makes."""
  first = pieces[0]
  if (tensor := tensors[first.component].get(first.name)) is None:
    raise InputError(f"the base's {first.component} lacks {first.name}; fetch it again")
  rows, *rest = tensor.shape
  if first.part.third is not None:
    return (3 * rows, *rest)
  if first.part.transposed:
    return (*rest, rows)
  return (*tensor.shape, 1, 1) if _is_convolution(first, tensor) else tensor.shape


def _is_convolution(piece: _Piece, tensor: np.ndarray) -> bool:
  """Whether the original code has a 1×1 convolution where diffusers is linear."""
  return piece.component == "vae" and tensor.ndim == 2


def _join(
  pieces: list[_Piece],
  tensors: Mapping[str, Mapping[str, np.ndarray]],
  layers: Mapping[str, tuple[np.ndarray, np.ndarray]],
  changes: Mapping[str, fused.Change],
  dtype: np.dtype,
  shape: tuple[int, ...],
) -> np.ndarray:
  """A tensor of the file's: fused, its thirds one below the other, transposed."""
  arrays = []
  for piece in pieces:
    tensor = tensors[piece.component][piece.name]
    if piece.component == "unet":
      tensor = fused.fuse_tensor(piece.name, tensor, dtype, layers, changes)
    elif tensor.dtype != dtype:
      tensor = cast(tensor, dtype, f"{piece.component}.{piece.name}")
    arrays.append(tensor.T if piece.part.transposed else tensor)
  return (arrays[0] if len(arrays) == 1 else np.concatenate(arrays)).reshape(shape)


def _check_read_back(
  base: Pipeline, family: Family, shapes: Mapping[str, tuple[int, ...]]
) -> None:
  """Refuses networks that a reader of the file would build in another way.

  Raises:
    InputError: naming the field.
  """
  for name, config in networks.configs_of(family, shapes).items():
    own = base.modules()[name].config
    if found := original_shapes.difference(name, own, config):
      field, value, usual = found
      raise InputError(
        f"{base.name} cannot be a single file: its {name} has {field} = {value!r}, and "
        f"readers of single files would assume {usual!r}; use --format pipeline"
      )


def _markers(base: Pipeline, family: Family) -> dict[str, np.ndarray]:
  """Empty tensors that say what the UNet predicts; ComfyUI looks for them in SDXL.

  Raises:
    InputError: readers of the file would assume another noise schedule.
  """
  schedule = base.schedule
  zero_snr = bool(schedule.config.get("rescale_betas_zero_snr"))
  velocity = schedule.prediction_type == "v_prediction"
  usual = Schedule.from_config(
    {**family.scheduler, "rescale_betas_zero_snr": zero_snr and velocity}
  )
  if schedule.prediction_type not in families.CHOICES or not np.array_equal(
    schedule.alphas_cumprod, usual.alphas_cumprod
  ):
    raise InputError(
      f"{base.name} cannot be a single file: readers of single files would not expect "
      f"its noise schedule or prediction type ({schedule.prediction_type}); use "
      "--format pipeline"
    )
  # Readers know that SD 2 may predict v.
  names = ["v_pred"] if velocity and (family is not families.SD2 or zero_snr) else []
  names += ["ztsnr"] if zero_snr else []
  return {name: np.zeros(0, np.float32) for name in names}
