"""The map of names and the configs from shapes, at the published models' full sizes."""

import diffusers
import pytest
import torch
import transformers

from safetydpo_jax.formats.base_model import (
  original_names,
  original_shapes,
)
from safetydpo_jax.formats.base_model import single_file_families as families
from safetydpo_jax.formats.base_model import single_file_networks as networks
from safetydpo_jax.models import published
from safetydpo_jax.models.unet_config import read_levels
from tests.support import distilled, single_files

UNETS = {
  "sd15": (published.SD15_UNET, None, 686),
  "sd21": (published.SD21_UNET, None, 686),
  "sdxl": (published.SDXL_UNET, 1280, 1680),
  "ssd-1b": (distilled.SSD_1B, 1280, None),
  "small-sd": (distilled.SMALL_SD, None, None),
  "tiny-sd": (distilled.TINY_SD, None, None),
  "koala": (distilled.KOALA_700M, 1280, None),
}
VAE = published.SD15_VAE
# The text encoders, and how many tensors a file has of them (SD 2's without the last
# layer and the projection).
ENCODERS = {
  "sd15": (families.SD1.encoders[0], published.CLIP_L, 196),
  "sd21": (families.SD2.encoders[0], published.CLIP_H, 280),
  "sdxl": (families.SDXL.encoders[1], published.CLIP_BIGG, 389),
}


def on_meta(kind, config):
  """{name: shape} of a PyTorch module of this size; no memory is used."""
  with torch.device("meta"):
    return kind(config).state_dict()


def unet_state(config):
  lists = {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}
  with torch.device("meta"):
    return diffusers.UNet2DConditionModel(**lists).state_dict()


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_s_names_and_config(name):
  config, pooled, count = UNETS[name]
  state = unet_state(config)
  assert count is None or len(state) == count
  theirs = single_files.rename(state, single_files.unet_modules(config), "u.")
  ours = networks.unet_parts(config, "u.")
  assert {n: part.key for n, part in ours.items()} == dict(zip(state, theirs))
  shapes = {n.removeprefix("u."): tuple(x.shape) for n, x in theirs.items()}
  derived = original_shapes.unet_config(shapes, pooled)
  assert read_levels(derived)[1:] == read_levels(config)[1:]
  assert original_shapes.difference("unet", config, derived) is None
  # LitEma's names, without dots, are those of the same tensors.
  for key in shapes:
    assert original_names.unflatten(key.replace(".", "")) == key
  assert original_names.unflatten("input_blocksx00weight") is None


def test_a_vae_s_names_and_config():
  state = on_meta(lambda c: diffusers.AutoencoderKL(**c), VAE)
  theirs = single_files.rename(state, single_files.vae_modules(VAE), "v.")
  ours = networks.vae_parts(VAE, "v.")
  assert {n: part.key for n, part in ours.items()} == dict(zip(state, theirs))
  assert len(theirs) == 248
  shapes = {n.removeprefix("v."): tuple(x.shape) for n, x in theirs.items()}
  derived = original_shapes.vae_config(shapes)
  assert original_shapes.difference("vae", VAE, derived) is None


@pytest.mark.parametrize("name", ENCODERS)
def test_a_text_encoder_s_names_and_config(name):
  encoder, config, count = ENCODERS[name]
  kind = getattr(transformers, config["architectures"][0])
  state = on_meta(lambda c: kind(transformers.CLIPTextConfig(**c)), config)
  parts = networks.text_parts(encoder, config, "t.", "")
  inside = {n.removeprefix("text_model."): x for n, x in state.items()}
  assert parts.keys() == inside.keys()
  if encoder.open_clip:
    theirs = single_files.open_clip(state, "t.", config["num_hidden_layers"])
  else:
    theirs = {f"t.{n}": x for n, x in inside.items()}
  assert {part.key for part in parts.values()} == theirs.keys()
  assert len(theirs) == count
  shapes = {n.removeprefix("t."): tuple(x.shape) for n, x in theirs.items()}
  if encoder.open_clip:
    projected = encoder.component == "text_encoder_2"
    derived = original_shapes.open_clip_config(shapes, projected, encoder.layers)
  else:
    derived = original_shapes.clip_config(shapes)
  assert original_shapes.difference(encoder.component, config, derived) is None
