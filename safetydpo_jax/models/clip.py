"""CLIP's text encoder, and how each Stable Diffusion reads its context from it.

    h_0 = token_embedding(ids) + position_embedding
    h_i = h + mlp(layer_norm2(h)),  h = h_{i-1} + causal_attention(layer_norm1(h_{i-1}))
    last = final_layer_norm(h_{N-s});  penultimate = h_{N-1-s}
    pooled = [text_projection] final_layer_norm(h_N)[position of the end token]

SD 1.x and 2.x condition on `last` (2.x ships an encoder one layer short). SDXL
conditions on the `penultimate` states of both its encoders, side by side, and on the
second one's projected `pooled`. s is diffusers' `clip_skip`, 0 unless asked for.

A text of more than p tokens, the encoder's positions, is encoded p at a time. With a
weight m for each token, a chunk's states z become

    z · m · mean(z) / mean(z · m)                       means over tokens and features

as with the emphasis "Original" of AUTOMATIC1111's web UI. `pooled` is that of the first
chunk, without weights.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.core import FrozenDict

from safetydpo_jax.errors import InputError
from safetydpo_jax.models import config as config_lib
from safetydpo_jax.models.attention import attend
from safetydpo_jax.models.layers import ACTIVATIONS, Dense, Dtype, Embedding, LayerNorm

# transformers' defaults for the fields we read. Its configs repeat every field that a
# model ever had, most of them meaningless here, so fields we do not read are accepted.
DEFAULTS = {
  "architectures": ("CLIPTextModel",),
  "vocab_size": 49408,
  "hidden_size": 512,
  "intermediate_size": 2048,
  "projection_dim": 512,
  "num_hidden_layers": 12,
  "num_attention_heads": 8,
  "max_position_embeddings": 77,
  "hidden_act": "quick_gelu",
  "layer_norm_eps": 1e-5,
  "eos_token_id": 49407,
}
PROJECTED: dict[tuple[str, ...], bool] = {
  ("CLIPTextModel",): False,
  ("CLIPTextModelWithProjection",): True,
}


class TextOutput(NamedTuple):
  last: jax.Array  # (n, l, d), after the final norm
  penultimate: jax.Array  # (n, l, d), one layer before that, without the norm
  pooled: jax.Array  # (n, d), or (n, projection_dim) with a projection


def read_config(config):
  """Reads and checks a text encoder's config, see `config.settle`."""
  ignored = tuple(field for field in config if field not in DEFAULTS)
  c = config_lib.settle(config, "text encoder", DEFAULTS, {}, ignored)
  kind = config.get("model_type", "clip_text_model")
  config_lib.choose(
    dict.fromkeys(("clip_text_model", "clip")), kind, "text encoder", "model_type"
  )
  config_lib.choose(ACTIVATIONS, c.hidden_act, "text encoder", "hidden_act")
  c.architectures = tuple(c.architectures or ("CLIPTextModel",))
  c.projected = config_lib.choose(
    PROJECTED, c.architectures, "text encoder", "architectures"
  )
  if c.projected and c.projection_dim is None:
    raise InputError(
      "text encoder config: projection_dim = null; expected the size of the projection"
    )
  if c.hidden_size % c.num_attention_heads:
    raise InputError(
      f"text encoder config: hidden_size = {c.hidden_size} cannot be split over "
      f"num_attention_heads = {c.num_attention_heads}"
    )
  return c


class SelfAttention(nn.Module):
  """Multi-head self attention with biases; (n, l, d) → same."""

  heads: int
  causal: bool
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n, length, d = x.shape
    q, k, v = (
      Dense(d, dtype=self.dtype, name=name)(x).reshape(n, length, self.heads, -1)
      for name in ("q_proj", "k_proj", "v_proj")
    )
    joined = attend(q, k, v, causal=self.causal).reshape(n, length, d)
    return Dense(d, dtype=self.dtype, name="out_proj")(joined)


class MLP(nn.Module):
  """fc2(activation(fc1(x))), (n, l, d) → same."""

  width: int
  activation: str
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    h = Dense(self.width, dtype=self.dtype, name="fc1")(x)
    h = ACTIVATIONS[self.activation](h)
    return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class EncoderLayer(nn.Module):
  """One pre-norm transformer layer, (n, l, d) → same."""

  heads: int
  width: int
  activation: str
  epsilon: float = 1e-5
  causal: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    norm = partial(LayerNorm, self.epsilon, self.dtype)
    attention = SelfAttention(self.heads, self.causal, self.dtype, name="self_attn")
    x = x + attention(norm(name="layer_norm1")(x))
    mlp = MLP(self.width, self.activation, self.dtype, name="mlp")
    return x + mlp(norm(name="layer_norm2")(x))


class Encoder(nn.Module):
  """A stack of N layers; returns h_0 to h_N, the states before and after each."""

  layers: int
  heads: int
  width: int
  activation: str
  epsilon: float = 1e-5
  causal: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, ...]:
    states = [x]
    for i in range(self.layers):
      layer = EncoderLayer(
        self.heads,
        self.width,
        self.activation,
        self.epsilon,
        self.causal,
        self.dtype,
        name=f"layers_{i}",
      )
      states.append(layer(states[-1]))
    return tuple(states)


class Embeddings(nn.Module):
  """Token plus position embedding, (n, l) int → (n, l, d)."""

  vocabulary: int
  positions: int
  features: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    embed = partial(Embedding, features=self.features, dtype=self.dtype)
    tokens = embed(self.vocabulary, name="token_embedding")(ids)
    positions = embed(self.positions, name="position_embedding")
    return tokens + positions(jnp.arange(ids.shape[1])[None, :])


class CLIPText(nn.Module):
  """The text encoder.

  Attributes:
    config: the checkpoint's `config.json`, frozen (`config.freeze`). `architectures`
      says whether there is a projection.
    dtype: the compute type; norms and softmax stay in float32.
  """

  config: FrozenDict[str, Any]
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, token_ids: jax.Array, clip_skip: int = 0) -> TextOutput:
    """Encodes token ids (n, l ≤ 77) int32; an id outside the vocabulary gives NaN.

    `clip_skip` is s of the module's docstring, below the number of layers.
    """
    chex.assert_rank(token_ids, 2)
    c = read_config(self.config)
    chex.assert_scalar_in(clip_skip, 0, c.num_hidden_layers - 1)
    embeddings = Embeddings(
      c.vocab_size,
      c.max_position_embeddings,
      c.hidden_size,
      self.dtype,
      name="embeddings",
    )
    encoder = Encoder(
      c.num_hidden_layers,
      c.num_attention_heads,
      c.intermediate_size,
      c.hidden_act,
      c.layer_norm_eps,
      dtype=self.dtype,
      name="encoder",
    )
    states = encoder(embeddings(token_ids))
    norm = LayerNorm(c.layer_norm_eps, self.dtype, name="final_layer_norm")
    whole = norm(states[-1])
    # Configs written before 2023 wrongly say 2; the end token is then the highest id.
    # Padding may repeat the end token: the first one counts.
    if c.eos_token_id == 2:
      end = jnp.argmax(token_ids, axis=-1)
    else:
      end = jnp.argmax(token_ids == c.eos_token_id, axis=-1)
    pooled = jnp.take_along_axis(whole, end[:, None, None], axis=1)[:, 0]
    if c.projected:
      project = Dense(c.projection_dim, False, self.dtype, name="text_projection")
      pooled = project(pooled)
    last = norm(states[-1 - clip_skip]) if clip_skip else whole
    return TextOutput(last, states[-2 - clip_skip], pooled)


def encode_text(
  text_encoders: Sequence[CLIPText],
  params: Mapping[str, Any],
  token_ids: Sequence[jax.Array | np.ndarray],
  weights: Sequence[jax.Array | np.ndarray] = (),
  clip_skip: int = 0,
) -> tuple[jax.Array, jax.Array | None]:
  """The UNet's context and pooled text; pure, so it can be jitted.

  Args:
    text_encoders: one (SD 1, SD 2) or two (SDXL).
    params: holds their parameters under 'text_encoder' and 'text_encoder_2'.
    token_ids: one (n, l) int array for each encoder; l at most the encoder's positions,
      or a multiple of them: chunk after chunk.
    weights: the tokens' weights, one (n, l) array for each encoder; () for none.
    clip_skip: s of the module's docstring.

  Returns:
    (context (n, l, d), pooled): `last` and None with one encoder; with two their
    `penultimate` states side by side and the second one's pooled (n, e).
  """
  names = ("text_encoder", "text_encoder_2")[: len(text_encoders)]
  one = len(text_encoders) == 1
  contexts, pooled = [], None
  for i, (encoder, ids) in enumerate(zip(text_encoders, token_ids, strict=True)):
    count, length = ids.shape
    positions = min(length, read_config(encoder.config).max_position_embeddings)
    chex.assert_is_divisible(length, positions)
    variables = {"params": params[names[i]]}
    output: Any = encoder.apply(variables, ids.reshape(-1, positions), clip_skip)
    states = output.last if one else output.penultimate
    if weights:
      states = weigh(states, weights[i].reshape(-1, positions))
    contexts.append(states.reshape(count, length, -1))
    if not one:
      pooled = output.pooled.reshape(count, length // positions, -1)[:, 0]
  return jnp.concatenate(contexts, axis=-1), pooled


def weigh(states: jax.Array, weights: jax.Array | np.ndarray) -> jax.Array:
  """Chunks' states z (m, p, d) by their tokens' weights (m, p); computed in float32.

  Weights of 1 leave a chunk as it is, also where its mean is 0.
  """
  chex.assert_equal_shape_prefix([states, weights], 2)
  exact = states.astype(jnp.float32)
  weighted = exact * weights[..., None]
  before, after = (z.mean((1, 2), keepdims=True) for z in (exact, weighted))
  plain = (weights == 1).all(1)[:, None, None]
  scaled = jnp.where(plain, exact, weighted * (before / jnp.where(plain, 1.0, after)))
  return scaled.astype(states.dtype)
