"""The networks of a single-file checkpoint: their configs, and where their tensors are.

The original code's names and layout, by network:

  model.diffusion_model.   the UNet
  first_stage_model.       the VAE
  cond_stage_model. or conditioner.embedders.   the text encoders
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import original_names, original_shapes
from safetydpo_jax.formats.base_model import single_file_kinds as kinds
from safetydpo_jax.formats.base_model.module_shapes import torch_names
from safetydpo_jax.formats.base_model.original_names import Part
from safetydpo_jax.formats.base_model.original_shapes import Shapes
from safetydpo_jax.formats.base_model.single_file_families import Encoder, Family
from safetydpo_jax.formats.base_model.weights import canonical_name
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition
from safetydpo_jax.models.vae import AutoencoderKL

UNET = "model.diffusion_model."
VAE = ("first_stage_model.", "vae.")  # the first is the one we write


class Component(NamedTuple):
  """One network of a single file.

  Attributes:
    path: the file.
    config: its config.json.
    tensors: the file's.
    parts: {diffusers name: where it is}.
  """

  path: Path
  config: dict[str, Any]
  tensors: Mapping[str, np.ndarray]
  parts: dict[str, Part]

  def read(self) -> Iterator[tuple[str, np.ndarray]]:
    """(diffusers name, view of the file) of every tensor."""
    for name, part in self.parts.items():
      yield name, part.take(self.tensors)


def has(tensors: Iterable[str], prefix: str | tuple[str, ...]) -> bool:
  return any(name.startswith(prefix) for name in tensors)


def configs_of(family: Family, shapes: Shapes) -> dict[str, dict[str, Any]]:
  """The config.json files of the networks in a single file, without `sample_size`.

  Args:
    family: of the file.
    shapes: {name: shape} of all its tensors.

  Raises:
    InputError: a network is incomplete, or not laid out as Stable Diffusion's.
  """
  encoders = {e.component: _text_config(e, shapes) for e in family.encoders}
  pooled = encoders.get("text_encoder_2", {}).get("projection_dim")
  unet = original_shapes.unet_config(below(shapes, UNET), pooled)
  if unet["in_channels"] != unet["out_channels"]:
    kind = kinds.describe_unet(unet["in_channels"]) or "no text-to-image model"
    raise InputError(
      f"its UNet takes {unet['in_channels']} channels and gives "
      f"{unet['out_channels']}; this is {kind}, which is not supported"
    )
  configs = {"unet": unet}
  if prefix := vae_prefix(shapes, VAE):
    configs["vae"] = original_shapes.vae_config(below(shapes, prefix))
    configs["vae"]["scaling_factor"] = family.scaling_factor
  return configs | encoders


def below(shapes: Mapping[str, Any], prefix: str) -> dict[str, Any]:
  size = len(prefix)
  return {name[size:]: x for name, x in shapes.items() if name.startswith(prefix)}


def _text_prefix(encoder: Encoder, names: Iterable[str]) -> str:
  names = list(names)
  for prefix in encoder.prefixes:
    if has(names, prefix):
      return prefix
  raise InputError(f"it lacks the text encoder {encoder.prefixes[0]}; fetch it again")


def _text_config(encoder: Encoder, shapes: Shapes) -> dict[str, Any]:
  own = below(shapes, _text_prefix(encoder, shapes))
  if not encoder.open_clip:
    own = {canonical_name(name): shape for name, shape in own.items()}
    return original_shapes.clip_config(own)
  projected = encoder.component == "text_encoder_2"
  return original_shapes.open_clip_config(own, projected, encoder.layers)


def vae_prefix(names: Iterable[str], prefixes: Iterable[str]) -> str | None:
  names = set(names)
  there = (p for p in prefixes if f"{p}decoder.conv_in.weight" in names)
  return next(there, None)


def parts_of(
  name: str, family: Family, config: dict[str, Any], tensors: Mapping[str, np.ndarray]
) -> dict[str, Part]:
  """Where the tensors of a component are in the file."""
  if name == "unet":
    return unet_parts(config, UNET)
  if name == "vae":
    return vae_parts(config, vae_prefix(tensors, VAE) or "")
  encoder = next(e for e in family.encoders if e.component == name)
  prefix = _text_prefix(encoder, tensors)
  # Files of early transformers, and merges of them, have no `text_model.`.
  flat = not encoder.open_clip and not has(tensors, f"{prefix}text_model.")
  return text_parts(encoder, config, prefix, "" if flat else "text_model.")


def unet_parts(config: Mapping[str, Any], prefix: str) -> dict[str, Part]:
  """{diffusers name: its place} of a UNet."""
  names = torch_names(UNet2DCondition(freeze(config)))
  return original_names.parts(names, prefix, original_names.unet_key(config))


def vae_parts(config: Mapping[str, Any], prefix: str) -> dict[str, Part]:
  """{diffusers name: its place} of a VAE."""
  names = torch_names(AutoencoderKL(freeze(config)))
  return original_names.parts(names, prefix, original_names.vae_key(config))


def text_parts(
  encoder: Encoder, config: Mapping[str, Any], prefix: str, inner: str = "text_model."
) -> dict[str, Part]:
  """{diffusers name without `text_model.`: its place} of a text encoder."""
  names = torch_names(CLIPText(freeze(config)))
  if encoder.open_clip:
    return original_names.open_clip_parts(names, prefix)
  return original_names.parts(names, prefix + inner, lambda name: name)
