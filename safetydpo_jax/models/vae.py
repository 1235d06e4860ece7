"""The autoencoder of Stable Diffusion: images to posterior moments, latents to images.

    encode: conv_in, levels × (resnets; halve), resnet, attention, resnet, norm, conv
            → [mean, logvar] of the latents' posterior (after quant_conv)
    decode: the mirror image, one resnet more on each level

Every level but the last halves the image, so one latent stands for
2^(levels - 1) pixels (`pixels_per_latent`). Scaling by `scaling_factor` is left to the
caller. Group norms have epsilon 1e-6 here (1e-5 in the UNet).
"""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from safetydpo_jax.models import config as config_lib
from safetydpo_jax.models.attention import attend
from safetydpo_jax.models.layers import (
  Conv,
  Dense,
  Downsample,
  Dtype,
  GroupNorm,
  ResnetBlock,
  Upsample,
)

# diffusers' defaults of the fields we read.
DEFAULTS = {
  "in_channels": 3,
  "out_channels": 3,
  "down_block_types": ("DownEncoderBlock2D",),
  "up_block_types": ("UpDecoderBlock2D",),
  "block_out_channels": (64,),
  "layers_per_block": 1,
  "latent_channels": 4,
  "norm_num_groups": 32,
  "scaling_factor": 0.18215,
  "use_quant_conv": True,
  "use_post_quant_conv": True,
  "mid_block_add_attention": True,
}
ACCEPTED = {"act_fn": ("silu", "swish")}
IGNORED = ("sample_size", "force_upcast", *config_lib.TRAINING)
EPSILON = 1e-6


def read_config(config):
  """Reads and checks a VAE's config, see `config.settle`."""
  c = config_lib.settle(config, "VAE", DEFAULTS, ACCEPTED, IGNORED)
  config_lib.check_groups(c, "VAE")
  levels = len(c.block_out_channels)
  for field, known in (
    ("down_block_types", "DownEncoderBlock2D"),
    ("up_block_types", "UpDecoderBlock2D"),
  ):
    for kind in config_lib.per_level(getattr(c, field), levels, field, "VAE"):
      config_lib.choose({known: None}, kind, "VAE", field)
  return c


def pixels_per_latent(config) -> int:
  """How many pixels one latent spans, in each direction."""
  return 2 ** (len(read_config(config).block_out_channels) - 1)


class AttentionBlock(nn.Module):
  """One-headed self attention over all pixels, as a residual; (n, h, w, c) → same."""

  groups: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n, h, w, c = x.shape
    tokens = GroupNorm(self.groups, EPSILON, self.dtype, name="group_norm")(x)
    tokens = tokens.reshape(n, h * w, c)
    q, k, v = (
      Dense(c, dtype=self.dtype, name=name)(tokens)[:, :, None, :]
      for name in ("to_q", "to_k", "to_v")
    )
    joined = attend(q, k, v).reshape(n, h, w, c)
    return x + Dense(c, dtype=self.dtype, name="to_out_0")(joined)


class MidBlock(nn.Module):
  """Resnet, attention (if any), resnet."""

  groups: int
  attention: bool
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = x.shape[-1]
    x = ResnetBlock(c, self.groups, EPSILON, self.dtype, name="resnets_0")(x)
    if self.attention:
      x = AttentionBlock(self.groups, self.dtype, name="attentions_0")(x)
    return ResnetBlock(c, self.groups, EPSILON, self.dtype, name="resnets_1")(x)


class Level(nn.Module):
  """The resnets of one resolution, then `resample` to the next (None at the last)."""

  features: int
  resnets: int
  groups: int
  resample: str | None = None
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    for i in range(self.resnets):
      block = ResnetBlock(
        self.features, self.groups, EPSILON, self.dtype, name=f"resnets_{i}"
      )
      x = block(x)
    if self.resample == "down":
      x = Downsample(asymmetric=True, dtype=self.dtype, name="downsamplers_0")(x)
    elif self.resample == "up":
      x = Upsample(self.dtype, name="upsamplers_0")(x)
    return x


class Encoder(nn.Module):
  """Images (n, H, W, 3) → (n, h, w, 2 · latent_channels), before quant_conv."""

  config: FrozenDict[str, Any]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = read_config(self.config)
    groups, dtype = c.norm_num_groups, self.dtype
    x = Conv(c.block_out_channels[0], dtype=dtype, name="conv_in")(x)
    last = len(c.block_out_channels) - 1
    for i, features in enumerate(c.block_out_channels):
      resample = "down" if i < last else None
      level = Level(
        features, c.layers_per_block, groups, resample, dtype, name=f"down_blocks_{i}"
      )
      x = level(x)
    x = MidBlock(groups, c.mid_block_add_attention, dtype, name="mid_block")(x)
    x = jax.nn.silu(GroupNorm(groups, EPSILON, dtype, name="conv_norm_out")(x))
    return Conv(2 * c.latent_channels, dtype=dtype, name="conv_out")(x)


class Decoder(nn.Module):
  """Latents (n, h, w, latent_channels), after post_quant_conv → (n, H, W, 3)."""

  config: FrozenDict[str, Any]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = read_config(self.config)
    groups, dtype = c.norm_num_groups, self.dtype
    x = Conv(c.block_out_channels[-1], dtype=dtype, name="conv_in")(x)
    x = MidBlock(groups, c.mid_block_add_attention, dtype, name="mid_block")(x)
    last = len(c.block_out_channels) - 1
    for i, features in enumerate(reversed(c.block_out_channels)):
      resample = "up" if i < last else None
      level = Level(
        features, c.layers_per_block + 1, groups, resample, dtype, name=f"up_blocks_{i}"
      )
      x = level(x)
    x = jax.nn.silu(GroupNorm(groups, EPSILON, dtype, name="conv_norm_out")(x))
    return Conv(c.out_channels, dtype=dtype, name="conv_out")(x)


class AutoencoderKL(nn.Module):
  """The autoencoder; call its methods with `apply(..., method='encode')`.

  Attributes:
    config: the checkpoint's `config.json`, frozen (`config.freeze`).
    dtype: the compute type. SDXL's VAE overflows in float16: float32 or bfloat16.
  """

  config: FrozenDict[str, Any]
  dtype: Dtype = jnp.float32

  def setup(self):
    c = read_config(self.config)
    self.encoder = Encoder(self.config, self.dtype)
    self.decoder = Decoder(self.config, self.dtype)
    if c.use_quant_conv:
      self.quant_conv = Conv(2 * c.latent_channels, 1, dtype=self.dtype)
    if c.use_post_quant_conv:
      self.post_quant_conv = Conv(c.latent_channels, 1, dtype=self.dtype)

  def __call__(self, images: jax.Array) -> jax.Array:
    """Encodes and decodes the posterior's mean; touches every parameter."""
    mean, _ = jnp.split(self.encode(images), 2, axis=-1)
    return self.decode(mean)

  def encode(self, images: jax.Array) -> jax.Array:
    """Images (n, H, W, 3) in [-1, 1] → moments (n, h, w, 2c) float32.

    The moments are [mean, logvar], unscaled. Heights and widths are rounded down to
    multiples of `pixels_per_latent`.
    """
    chex.assert_rank(images, 4)
    moments = self.encoder(images)
    if read_config(self.config).use_quant_conv:
      moments = self.quant_conv(moments)
    return moments.astype(jnp.float32)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Latents (n, h, w, c), already divided by the scale → images (n, H, W, 3) f32."""
    chex.assert_rank(latents, 4)
    if read_config(self.config).use_post_quant_conv:
      latents = self.post_quant_conv(latents)
    return self.decoder(latents).astype(jnp.float32)
