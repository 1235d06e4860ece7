"""CLIP's vision tower.

    h_0 = pre_norm([class, patch_1 ... patch_m] + position)
    h_i = h + mlp(layer_norm2(h)),  h = h_{i-1} + attention(layer_norm1(h_{i-1}))
    embedding = visual_projection post_norm(h_N[class])

The layers are those of the text tower (`models/clip.py`) without the causal mask. Names
are transformers' without `vision_model.`, among them its misspelt `pre_layrnorm`.
"""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

from safetydpo_jax.errors import InputError
from safetydpo_jax.models import config as config_lib
from safetydpo_jax.models.clip import Encoder
from safetydpo_jax.models.layers import (
  ACTIVATIONS,
  Conv,
  Dense,
  Dtype,
  Embedding,
  LayerNorm,
)

# transformers' defaults of the fields we read.
DEFAULTS = {
  "hidden_size": 768,
  "intermediate_size": 3072,
  "projection_dim": 512,
  "num_hidden_layers": 12,
  "num_attention_heads": 12,
  "num_channels": 3,
  "image_size": 224,
  "patch_size": 32,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
}


def read_config(config):
  """Reads and checks a vision tower's config, see `config.settle`."""
  ignored = tuple(field for field in config if field not in DEFAULTS)
  c = config_lib.settle(config, "vision tower", DEFAULTS, {}, ignored)
  config_lib.choose(ACTIVATIONS, c.hidden_act, "vision tower", "hidden_act")
  config_lib.choose({3: None}, c.num_channels, "vision tower", "num_channels")
  if c.hidden_size % c.num_attention_heads:
    raise InputError(
      f"vision tower config: hidden_size = {c.hidden_size} cannot be split over "
      f"num_attention_heads = {c.num_attention_heads}"
    )
  if not 0 < c.patch_size <= c.image_size:
    raise InputError(
      f"vision tower config: patch_size = {c.patch_size} does not fit image_size = "
      f"{c.image_size}"
    )
  return c


class Patches(nn.Module):
  """Images (n, h, w, 3) → tokens (n, 1 + patches, d), the class token first."""

  image_size: int
  patch_size: int
  features: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    patch, d, n = self.patch_size, self.features, len(images)
    name = "class_embedding"
    first = self.param(name, nn.initializers.normal(0.02), (d,)).astype(self.dtype)
    conv = Conv(
      d, patch, patch, ((0, 0), (0, 0)), False, self.dtype, name="patch_embedding"
    )
    # A remainder at the right and below belongs to no patch.
    side = self.image_size // patch * patch
    tokens = conv(images[:, :side, :side]).reshape(n, -1, d)
    first = jnp.broadcast_to(first[None, None], (n, 1, d))
    tokens = jnp.concatenate([first, tokens], axis=1)
    count = tokens.shape[1]
    positions = Embedding(count, d, self.dtype, name="position_embedding")
    return tokens + positions(jnp.arange(count)[None])


class CLIPVision(nn.Module):
  """The vision tower with its projection.

  Attributes:
    config: the `vision_config` of the checkpoint's `config.json`, frozen.
    dtype: the compute type; norms and softmax stay in float32.
  """

  config: FrozenDict[str, Any]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    """Normalised images (n, image_size, image_size, 3) → (n, projection_dim)."""
    c = read_config(self.config)
    chex.assert_shape(images, (None, c.image_size, c.image_size, 3))
    embeddings = Patches(
      c.image_size, c.patch_size, c.hidden_size, self.dtype, name="embeddings"
    )
    encoder = Encoder(
      c.num_hidden_layers,
      c.num_attention_heads,
      c.intermediate_size,
      c.hidden_act,
      c.layer_norm_eps,
      causal=False,
      dtype=self.dtype,
      name="encoder",
    )
    norm = LayerNorm(c.layer_norm_eps, self.dtype, name="pre_layrnorm")
    *_, x = encoder(norm(embeddings(images)))
    x = LayerNorm(c.layer_norm_eps, self.dtype, name="post_layernorm")(x[:, 0])
    return Dense(c.projection_dim, False, self.dtype, name="visual_projection")(x)
