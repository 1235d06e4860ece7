"""A model as shapes, from a directory's config.json files or a published model's.

Weights are never read. For a model of the hub that is not on this disk, the published
config.json files are in `models/published.py`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from safetydpo_jax.data.cache.batches import Batch
from safetydpo_jax.diffusion import Schedule
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import configs as config_files
from safetydpo_jax.formats.base_model.hub import PRESETS
from safetydpo_jax.formats.base_model.module_shapes import parameter_shapes
from safetydpo_jax.formats.base_model.parts import CLASSES
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.formats.base_model.single_file import open_single_file, split_choice
from safetydpo_jax.models import clip, published, vae
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition
from safetydpo_jax.models.vae import AutoencoderKL
from safetydpo_jax.training.config import RunConfig


def read_configs(
  model: str,
) -> tuple[Mapping, Mapping, tuple[Mapping, ...], Mapping]:
  """The configs of UNet, VAE, text encoders and noise schedule.

  Args:
    model: a diffusers directory, a single file, or a preset's name or hub id.

  Raises:
    InputError: it is neither.
  """
  folder = Path(model if Path(model).is_dir() else PRESETS.get(model, model))
  if folder.is_dir():
    names = ("text_encoder", "text_encoder_2")
    encoders = {name: CLASSES[name][0] for name in names if (folder / name).is_dir()}
    folders = {name: folder / name for name in CLASSES}
    found, scheduler = config_files.read_configs(
      folders, folder / "scheduler", encoders
    )
    unet, vae_config, *texts = found.values()
    return unet, vae_config, tuple(texts), scheduler
  file, choice = split_choice(model)
  if Path(file).is_file():
    single = open_single_file(Path(file), choice)
    return (
      single.configs["unet"],
      single.configs["vae"],
      tuple(single.configs[encoder.component] for encoder in single.family.encoders),
      single.scheduler,
    )
  by_repository = {repository: name for name, repository in PRESETS.items()}
  configs = published.MODELS.get(by_repository.get(model, model))
  if configs is None:
    raise InputError(
      f"config.model is {model!r}; expected a diffusers directory, a single file or "
      f"one of {', '.join(PRESETS)}"
    )
  return configs


def make_pipeline(config: RunConfig) -> Pipeline:
  """The networks of `config.model` without weights; `params` holds their shapes."""
  unet_config, vae_config, encoder_configs, schedule = map(
    freeze, read_configs(config.model)
  )
  dtype = jnp.dtype(config.dtype)
  unet = UNet2DCondition(unet_config, dtype, config.remat, config.attention)
  encoders = tuple(CLIPText(encoder, dtype) for encoder in encoder_configs)
  modules = dict(zip(("text_encoder", "text_encoder_2"), encoders), unet=unet)
  vae_scale = vae.pixels_per_latent(vae_config)
  return Pipeline(
    name=config.model,
    path=Path(config.model),
    unet=unet,
    vae=AutoencoderKL(vae_config, dtype),
    text_encoders=encoders,
    tokenizers=(),
    schedule=Schedule.from_config(schedule),
    params={
      name: jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), parameter_shapes(module)
      )
      for name, module in modules.items()
    },
    fingerprint="",
    latent_channels=vae.read_config(vae_config).latent_channels,
    vae_scale=vae_scale,
    scaling_factor=vae.read_config(vae_config).scaling_factor,
    image_size=config_files.image_size(unet_config, vae_config),
  )


def batch_shapes(pipeline: Pipeline, rows: int) -> Batch:
  """A batch of the pair cache as `jax.ShapeDtypeStruct`."""
  side = pipeline.resolution // pipeline.vae_scale
  ids = tuple(
    jax.ShapeDtypeStruct(
      (rows, clip.read_config(encoder.config).max_position_embeddings), jnp.int32
    )
    for encoder in pipeline.text_encoders
  )
  moments = (rows, 2, side, side, 2 * pipeline.latent_channels)
  times = jax.ShapeDtypeStruct((rows, 6), jnp.int32) if len(ids) > 1 else None
  return Batch(jax.ShapeDtypeStruct(moments, jnp.float16), ids, times)


def bytes_of(tree: Any, shardings: Any = None) -> int:
  """Bytes of a tree of shapes, on one device where `shardings` splits it."""
  if shardings is None:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
  parts = jax.tree.map(
    lambda leaf, where: jax.ShapeDtypeStruct(where.shard_shape(leaf.shape), leaf.dtype),
    tree,
    shardings,
  )
  return bytes_of(parts)
