"""From prompts to pixels: text encoders, sampler with guidance, VAE decoder.

An image is a function of its own row alone. Its initial noise is N(0, 1) from the key
of its seed, and noise that the sampler adds after the UNet's i-th evaluation from that
key folded with i. So the batch and the number of devices change nothing but rounding.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from safetydpo_jax import diffusion
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model import old_files
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.lora import LoraTree
from safetydpo_jax.models import conditioning
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.unet import UNet2DCondition
from safetydpo_jax.models.vae import AutoencoderKL
from safetydpo_jax.runtime import files, sharding
from safetydpo_jax.sampling.guidance import embed_scale, guided
from safetydpo_jax.sampling.methods import Name, make_sampler

Params = dict[str, Any]  # a tree of arrays
TimeIds = tuple[int, ...]  # six, see `conditioning.py`


class Inputs(NamedTuple):
  """What determines n images.

  Attributes:
    latents: (n, h, w, c) float32 standard normal, before the sampler's own scaling.
    words: the two words of each seed's threefry key, (n, 2) uint32.
    token_ids, negative_ids: (n, 77 k) int32 for each text encoder, k chunks.
    negative: (n,) float32: 0 where the negative embeddings are zeros, as SDXL's without
      a negative prompt, else 1.
    guidance: g, (n,) float32.
    weights, negative_weights: of the tokens, shaped as they are, or () for none.
  """

  latents: jax.Array | np.ndarray
  words: np.ndarray
  token_ids: tuple[np.ndarray, ...]
  negative_ids: tuple[np.ndarray, ...]
  negative: np.ndarray
  guidance: np.ndarray
  weights: tuple[np.ndarray, ...] = ()
  negative_weights: tuple[np.ndarray, ...] = ()


class Networks(NamedTuple):
  """What a program that renders is made of; the weights are its arguments.

  Attributes:
    unet, vae, text_encoders: the modules.
    schedule: scheduler_config.json.
    vae_scale, scaling_factor: see `Pipeline`.
  """

  unet: UNet2DCondition
  vae: AutoencoderKL
  text_encoders: tuple[CLIPText, ...]
  schedule: FrozenDict[str, Any]
  vae_scale: int
  scaling_factor: float


def fix_schedule(pipeline: Pipeline) -> Pipeline:
  """Sets the scheduler's `steps_offset` to 1 and `clip_sample` to false.

  diffusers' StableDiffusionPipeline does so, for configs older than these fields; its
  SDXL pipeline takes the config as it is, and so do we.
  """
  config = old_files.correct_sampling(
    pipeline.schedule.config,
    f"{pipeline.name}: scheduler_config.json",
    xl=len(pipeline.text_encoders) > 1,
  )
  return dataclasses.replace(pipeline, schedule=diffusion.Schedule.from_config(config))


def make_renderer(
  pipeline: Pipeline,
  sampler: Name,
  steps: int,
  rescale: float,
  mesh: Mesh,
  clip_skips: tuple[int, int] = (0, 0),
  time_ids: tuple[TimeIds, TimeIds] | None = None,
) -> Callable[[Params, LoraTree, Inputs], jax.Array]:
  """A jitted (params, lora, inputs) → images (n, H, W, 3) float32 in [0, 1].

  `lora` is a LoRA tree, {} for none; `rescale` is φ of equation (2) of `guidance.py`.
  `clip_skips` and `time_ids` are those of the prompt and of the negative prompt; None:
  of the image's own size. Rows are split over the mesh. A UNet distilled with guidance
  is asked once per step, and neither negative prompts nor `rescale` count.

  Equal networks and settings get the same function, with its compiled program: a suite
  renders many sets, the toy world many folders.
  """
  networks = Networks(
    pipeline.unet,
    pipeline.vae,
    pipeline.text_encoders,
    pipeline.schedule.config,
    pipeline.vae_scale,
    pipeline.scaling_factor,
  )
  return _make_renderer(networks, sampler, steps, rescale, mesh, clip_skips, time_ids)


@functools.lru_cache(maxsize=16)
def _make_renderer(
  networks: Networks,
  sampler: Name,
  steps: int,
  rescale: float,
  mesh: Mesh,
  clip_skips: tuple[int, int],
  time_ids: tuple[TimeIds, TimeIds] | None,
) -> Callable[[Params, LoraTree, Inputs], jax.Array]:
  schedule = diffusion.Schedule.from_config(networks.schedule)
  run = make_sampler(sampler, schedule, steps)
  distilled = networks.unet.config.get("time_cond_proj_dim")
  unet = networks.unet.on_mesh(mesh, sharding.BATCH)

  def render(params, lora, inputs):
    count, *shape = inputs.latents.shape
    height, width = (networks.vae_scale * side for side in shape[:2])
    sizes = time_ids or (conditioning.make_time_ids(height, width),) * 2
    tiled = [jnp.tile(jnp.array([ids], jnp.float32), (count, 1)) for ids in sizes]
    context, null_context, added = _encode(
      networks.text_encoders, params, inputs, clip_skips, tiled
    )
    keys = jax.random.wrap_key_data(inputs.words, impl="threefry2x32")

    def predict(latents, timesteps, context, added=added, condition=None):
      variables = {"params": params["unet"], "lora": lora}
      return unet.apply(variables, latents, timesteps, context, added, condition)

    def predict_distilled(latents, timestep):
      own = jax.tree.map(lambda both: both[count:], added)  # without the negative ones
      timesteps = jnp.full((count,), timestep)
      condition = embed_scale(inputs.guidance, distilled)
      return predict(latents, timesteps, context, own, condition)

    def noise(step):
      return jax.vmap(
        lambda key: jax.random.normal(jax.random.fold_in(key, step), shape)
      )(keys)

    if distilled:
      with_guidance = predict_distilled
    else:
      with_guidance = guided(predict, context, null_context, inputs.guidance, rescale)
    clean = run(with_guidance, inputs.latents, noise)
    images: Any = networks.vae.apply(
      {"params": params["vae"]}, clean / networks.scaling_factor, method="decode"
    )
    return jnp.clip(images / 2 + 0.5, 0.0, 1.0)

  rows, replicated = (
    NamedSharding(mesh, spec) for spec in (sharding.BATCH, sharding.REPLICATED)
  )
  return jax.jit(
    render, in_shardings=(replicated, replicated, rows), out_shardings=rows
  )


def _encode(
  text_encoders: Sequence[CLIPText],
  params: Params,
  inputs: Inputs,
  clip_skips: tuple[int, int],
  time_ids: Sequence[jax.Array],
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array] | None]:
  """Contexts of prompts and of negative prompts; `added_cond` of both, these first."""
  (context, added), (null_context, null_added) = (
    conditioning.encode(text_encoders, params, ids, time, weights, clip_skip)
    for ids, time, weights, clip_skip in zip(
      (inputs.token_ids, inputs.negative_ids),
      time_ids,
      (inputs.weights, inputs.negative_weights),
      clip_skips,
    )
  )
  weight = inputs.negative.astype(null_context.dtype)
  null_context = null_context * weight[:, None, None]
  if added is None or null_added is None:  # the UNet reads no pooled text
    return context, null_context, None
  null_added["text_embeds"] = null_added["text_embeds"] * weight[:, None]
  both = jax.tree.map(lambda *parts: jnp.concatenate(parts), null_added, added)
  return context, null_context, both


def key_words(seeds: Sequence[int]) -> np.ndarray:
  """The words of each seed's threefry key, (n, 2) uint32; all 64 bits of it count."""
  return np.array([divmod(seed % 2**64, 2**32) for seed in seeds], np.uint32)


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...]) -> jax.Array:
  """Standard normal (n, *shape): each image's own draw, from its own seed.

  For seeds below 2³² the key is `jax.random.key(seed)`.
  """
  keys = jax.random.wrap_key_data(jnp.asarray(key_words(seeds)), impl="threefry2x32")
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def save_image(file: Path, image: np.ndarray) -> None:
  """Writes an image (H, W, 3) in [0, 1].

  Raises:
    InputError: the image is not finite, or cannot be written.
  """
  if not np.isfinite(image).all():
    raise InputError(
      f"{file}: the rendered image has NaN or infinite pixels; use --dtype float32"
    )
  write_picture(file, Image.fromarray(np.round(image * 255).astype(np.uint8)))


def write_picture(file: Path, picture: Image.Image) -> None:
  """Writes a picture as JPEG or PNG, as the ending of the name says."""
  with files.writing(file) as temporary, files.naming(file):
    picture.save(temporary, quality=95)
