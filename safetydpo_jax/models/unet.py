"""The UNet of Stable Diffusion 1.x, 2.x and XL, one module read from `config.json`.

    e    = time_embedding(sinusoid(t)) [+ add_embedding(pooled text, sinusoid(sizes))]
    h    = conv_in(latents);  keep h
    down : levels × (resnet(h, e), transformer(h, context); keep h; halve; keep h)
    mid  : resnet, transformer, resnet
    up   : levels × (resnet([h, kept], e), transformer(h, context); double)
    out  = conv_out(silu(norm(h)))

The bracket is SDXL's (`addition_embed_type` "text_time"). UNets distilled with guidance
(`time_cond_proj_dim`, as LCM's) add an embedding of the guidance scale to sinusoid(t),
see `sampling/guidance.py`. The config is read in `unet_config.py`.
"""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.sharding import Mesh, PartitionSpec

from safetydpo_jax.errors import InputError
from safetydpo_jax.models.blocks import BlockSettings, DownBlock, MidBlock, UpBlock
from safetydpo_jax.models.flash import OnMesh
from safetydpo_jax.models.layers import (
  Conv,
  Dtype,
  GroupNorm,
  TimestepEmbedding,
  timestep_embedding,
)
from safetydpo_jax.models.unet_config import read_levels


class UNet2DCondition(nn.Module):
  """Predicts noise (or velocity) from noisy latents, timestep and text.

  Attributes:
    config: the checkpoint's `config.json`, frozen (`config.freeze`).
    dtype: the compute type; norms, softmax and the sinusoid stay in float32.
    remat: what the backward pass recomputes, a key of `blocks.REMAT`.
    attention: the kernel, see `attention.attend`.
  """

  config: FrozenDict[str, Any]
  dtype: Dtype = jnp.float32
  remat: str = "none"
  attention: str | OnMesh = "auto"

  @nn.compact
  def __call__(
    self,
    latents: jax.Array,
    timesteps: jax.Array,
    context: jax.Array,
    added_cond: dict[str, jax.Array] | None = None,
    timestep_cond: jax.Array | None = None,
  ) -> jax.Array:
    """Returns the prediction.

    Args:
      latents: (n, h, w, in_channels), any h and w.
      timesteps: (n,).
      context: (n, l, cross_attention_dim), the text encoder's states.
      added_cond: None, or for SDXL {'text_embeds': (n, e), 'time_ids': (n, 6)}.
      timestep_cond: (n, time_cond_proj_dim), the guidance scale's embedding, or None:
        none is added.

    Returns:
      (n, h, w, out_channels) in `dtype`.

    Raises:
      InputError: the config asks for something not implemented, or `added_cond` or
        `timestep_cond` does not fit it.
    """
    chex.assert_rank([latents, timesteps, context], [4, 1, 3])
    c, down, middle, up = read_levels(self.config)
    for what, array, size in (
      ("latents", latents, c.in_channels),
      ("context", context, c.cross_attention_dim),
    ):
      if array.shape[-1] != size:
        raise InputError(
          f"{what} with {array.shape[-1]} channels, this UNet expects {size}; "
          "use the VAE and text encoder of the same checkpoint"
        )
    settings = BlockSettings(
      c.norm_num_groups,
      c.norm_eps,
      c.use_linear_projection,
      self.dtype,
      self.remat,
      self.attention,
    )
    time = self._embed_time(c, timesteps, added_cond, timestep_cond)
    context = context.astype(self.dtype)
    features = c.block_out_channels[0]
    x = Conv(features, c.conv_in_kernel, dtype=self.dtype, name="conv_in")(latents)
    kept = [x]
    for i, level in enumerate(down):
      below = DownBlock(level, settings, i < len(down) - 1, name=f"down_blocks_{i}")
      x, more = below(x, time, context)
      kept += more
    if middle is not None:
      x = MidBlock(middle, settings, name="mid_block")(x, time, context)
    for i, level in enumerate(up):
      kept, own = kept[: -level.resnets], kept[-level.resnets :]
      size = kept[-1].shape[1:3] if i < len(up) - 1 else None
      above = UpBlock(level, settings, name=f"up_blocks_{i}")
      x = above(x, own, time, context, size)
    norm = GroupNorm(c.norm_num_groups, c.norm_eps, self.dtype, name="conv_norm_out")
    x = jax.nn.silu(norm(x))
    return Conv(c.out_channels, c.conv_out_kernel, dtype=self.dtype, name="conv_out")(x)

  @nn.nowrap
  def on_mesh(self, mesh: Mesh, rows: PartitionSpec | None = None) -> "UNet2DCondition":
    """This UNet with attention that is split over devices, see `OnMesh`."""
    kernel = self.attention
    kernel = kernel.kernel if isinstance(kernel, OnMesh) else kernel
    return self.clone(attention=OnMesh(kernel, mesh, rows))

  def _embed_time(self, c, timesteps, added_cond, timestep_cond) -> jax.Array:
    """The embedding e of the module's docstring, (n, time features)."""
    sinusoid = {"flip_sin_to_cos": c.flip_sin_to_cos, "freq_shift": c.freq_shift}
    features = c.time_embedding_dim or 4 * c.block_out_channels[0]
    if c.time_cond_proj_dim is None and timestep_cond is not None:
      raise InputError(
        "this UNet takes no timestep_cond: its config has no time_cond_proj_dim"
      )
    if c.time_cond_proj_dim is not None and timestep_cond is None:
      timestep_cond = jnp.zeros((len(timesteps), c.time_cond_proj_dim))
    time = TimestepEmbedding(features, self.dtype, name="time_embedding")(
      timestep_embedding(timesteps, c.block_out_channels[0], **sinusoid), timestep_cond
    )
    if c.addition_embed_type is None:
      return time
    if added_cond is None or not {"text_embeds", "time_ids"} <= set(added_cond):
      raise InputError(
        "this UNet (addition_embed_type 'text_time', as in SDXL) needs added_cond with "
        "'text_embeds' and 'time_ids'"
      )
    pooled, ids = added_cond["text_embeds"], added_cond["time_ids"]
    chex.assert_rank([pooled, ids], 2)
    sizes = timestep_embedding(ids.reshape(-1), c.addition_time_embed_dim, **sinusoid)
    joined = [pooled.astype(jnp.float32), sizes.reshape(ids.shape[0], -1)]
    added = jnp.concatenate(joined, axis=-1)
    if added.shape[-1] != c.projection_class_embeddings_input_dim:
      raise InputError(
        f"added_cond gives {added.shape[-1]} numbers (text_embeds {pooled.shape[-1]}, "
        f"time_ids {ids.shape[-1]} × {c.addition_time_embed_dim}), the UNet expects "
        f"{c.projection_class_embeddings_input_dim}"
      )
    return time + TimestepEmbedding(features, self.dtype, name="add_embedding")(added)


def example_inputs(config) -> tuple:
  """The smallest inputs `UNet2DCondition` takes, zeros, to initialise it with."""
  c, *_ = read_levels(config)
  latents = jnp.zeros((1, 1, 1, c.in_channels))
  context = jnp.zeros((1, 1, c.cross_attention_dim))
  added = None
  if c.addition_embed_type is not None:
    pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
    added = {"text_embeds": jnp.zeros((1, pooled)), "time_ids": jnp.zeros((1, 6))}
  return latents, jnp.zeros((1,), jnp.int32), context, added
