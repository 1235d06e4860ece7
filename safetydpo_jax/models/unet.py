"""The UNet of Stable Diffusion 1.x, 2.x and XL, one module read from `config.json`.

    e    = time_embedding(sinusoid(t)) [+ add_embedding(pooled text, sinusoid(sizes))]
    h    = conv_in(latents);  keep h
    down : levels × (resnet(h, e), transformer(h, context); keep h; halve; keep h)
    mid  : resnet, transformer, resnet
    up   : levels × (resnet([h, kept], e), transformer(h, context); double)
    out  = conv_out(silu(norm(h)))

The bracket is SDXL's (`addition_embed_type` "text_time"). UNets distilled with guidance
(`time_cond_proj_dim`, as LCM's) add an embedding of the guidance scale to sinusoid(t),
see `sampling/guidance.py`. In the config the field
`attention_head_dim` is the *number* of heads, for historical reasons in diffusers.
"""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict
from jax.sharding import Mesh, PartitionSpec

from safetydpo_jax.errors import InputError
from safetydpo_jax.models import config as config_lib
from safetydpo_jax.models.blocks import (
  BlockSettings,
  DownBlock,
  Level,
  MidBlock,
  UpBlock,
)
from safetydpo_jax.models.flash import OnMesh
from safetydpo_jax.models.layers import (
  Conv,
  Dtype,
  GroupNorm,
  TimestepEmbedding,
  timestep_embedding,
)

# diffusers' defaults of the fields we read.
DEFAULTS = {
  "in_channels": 4,
  "out_channels": 4,
  "flip_sin_to_cos": True,
  "freq_shift": 0,
  "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
  "mid_block_type": "UNetMidBlock2DCrossAttn",
  "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
  "block_out_channels": (320, 640, 1280, 1280),
  "layers_per_block": 2,
  "norm_num_groups": 32,
  "norm_eps": 1e-5,
  "cross_attention_dim": 1280,
  "transformer_layers_per_block": 1,
  "reverse_transformer_layers_per_block": None,
  "attention_head_dim": 8,
  "use_linear_projection": False,
  "addition_embed_type": None,
  "addition_time_embed_dim": None,
  "projection_class_embeddings_input_dim": None,
  "time_embedding_dim": None,
  "time_cond_proj_dim": None,
  "conv_in_kernel": 3,
  "conv_out_kernel": 3,
}
# Fields we do not read, with the values under which that changes nothing. Fields in
# neither table are accepted as null or false.
ACCEPTED = {
  "act_fn": ("silu", "swish"),
  "attention_type": ("default",),
  "downsample_padding": (1,),
  "dropout": (0.0,),
  "mid_block_scale_factor": (1,),
  "resnet_out_scale_factor": (1,),
  "resnet_time_scale_shift": ("default",),
  "time_embedding_type": ("positional",),
  "upcast_attention": (None, False, True),
}
# Fields that may be lists: a value for each level.
_BY_LEVEL = (
  *("layers_per_block", "attention_head_dim", "cross_attention_dim"),
  *("transformer_layers_per_block", "reverse_transformer_layers_per_block"),
)
# Fields whose default is null, else whole numbers; SDXL's need a value.
_ADDED = ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
_NULL_SIZES = (*_ADDED, "time_embedding_dim", "time_cond_proj_dim")
IGNORED = ("sample_size", "addition_embed_type_num_heads", *config_lib.TRAINING)

# Whether a block of this type attends to the context.
DOWN_BLOCKS = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
UP_BLOCKS = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
MID_BLOCKS = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False, None: None}


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


def read_levels(config):
  """Reads and checks a UNet's config.

  Returns:
    (c, down, middle, up): the fields as attributes, and the `Level` of every block in
    the order of computation; `middle` is None for a UNet without a mid block.
  """
  crossed = config.get("only_cross_attention")
  if isinstance(crossed, tuple) and not any(crossed):
    config = {**config, "only_cross_attention": False}  # at none of the levels
  c = config_lib.settle(config, "UNet", DEFAULTS, ACCEPTED, IGNORED, _BY_LEVEL)
  if c.addition_embed_type not in (None, "text_time"):
    raise InputError(
      f"UNet config: addition_embed_type = {c.addition_embed_type!r} is not supported, "
      "only None or 'text_time'"
    )
  for field in _NULL_SIZES:
    value, needed = getattr(c, field), c.addition_embed_type and field in _ADDED
    if type(value) is not int and (value is not None or needed):
      raise InputError(
        f"UNet config: {field} = {config_lib.as_json(value)}; expected a whole number"
      )
  if c.addition_embed_type and getattr(c, _ADDED[1]) <= 6 * getattr(c, _ADDED[0]):
    raise InputError(
      f"UNet config: {_ADDED[1]} = {getattr(c, _ADDED[1])}; expected more than six "
      f"times {_ADDED[0]}, which is {getattr(c, _ADDED[0])}"
    )
  levels = len(c.block_out_channels)
  fields = (
    "layers_per_block",
    "attention_head_dim",
    "cross_attention_dim",
    "down_block_types",
    "up_block_types",
  )
  spread = {f: config_lib.per_level(getattr(c, f), levels, f) for f in fields}
  for field, values in spread.items():
    fits = all(isinstance(v, int) and v > 0 for v in values)
    if "types" not in field and not fits:
      raise InputError(
        f"UNet config: {field} = {getattr(c, field)!r} is not supported, expected one "
        "positive integer, or one for each level"
      )
  if len(set(spread["cross_attention_dim"])) > 1:
    raise InputError(
      f"UNet config: cross_attention_dim = {c.cross_attention_dim!r} is not supported: "
      "all levels see one context, so all entries must be equal"
    )
  c.cross_attention_dim = spread["cross_attention_dim"][0]
  config_lib.check_groups(c, "UNet")

  def level(i: int, attends: bool, resnets: int, layers: Any, way="") -> Level:
    features, heads = c.block_out_channels[i], spread["attention_head_dim"][i]
    if not attends:
      return Level(features, resnets, heads, ())
    if features % heads:
      raise InputError(
        f"UNet config: {features} channels at level {i} cannot be split over "
        f"attention_head_dim = {heads} heads"
      )
    return Level(features, resnets, heads, _one_each(layers, resnets, way))

  def attends(table, value, field):
    return config_lib.choose(table, value, "UNet", field)

  layers_down, layers_up = _transformer_layers(c, levels)
  resnets = spread["layers_per_block"]
  down = [
    level(i, attends(DOWN_BLOCKS, kind, "down_block_types"), resnets[i], layers_down[i])
    for i, kind in enumerate(spread["down_block_types"])
  ]
  up = [
    level(
      levels - 1 - i,
      attends(UP_BLOCKS, kind, "up_block_types"),
      resnets[levels - 1 - i] + 1,
      layers_up[i],
      "reverse_" if c.reverse_transformer_layers_per_block else "",
    )
    for i, kind in enumerate(spread["up_block_types"])
  ]
  mid = attends(MID_BLOCKS, c.mid_block_type, "mid_block_type")
  if mid is None:
    return c, down, None, up
  # As diffusers: the middle's one transformer is the lowest level's first.
  deepest = layers_down[-1]
  first = deepest[0] if isinstance(deepest, (tuple, list)) and deepest else deepest
  return c, down, level(levels - 1, mid, 1, first), up


def _transformer_layers(c: Any, levels: int) -> tuple[tuple, tuple]:
  """The entries of `transformer_layers_per_block`, downwards and upwards.

  Distilled models (SSD-1B) have lists in the list, a number for each transformer, and
  then say in `reverse_transformer_layers_per_block` what the way up has.
  """
  field = "transformer_layers_per_block"
  down = config_lib.per_level(c.transformer_layers_per_block, levels, field)
  if c.reverse_transformer_layers_per_block:
    upwards = c.reverse_transformer_layers_per_block
    return down, config_lib.per_level(upwards, levels, f"reverse_{field}")
  if any(isinstance(entry, (tuple, list)) for entry in down):
    raise InputError(
      f"UNet config: {field} = {down!r} has a list in it, so reverse_{field} must say "
      "what the way up has; use the config.json that came with the weights"
    )
  return down, down[::-1]


def _one_each(entry: Any, transformers: int, way: str) -> tuple[int, ...]:
  """A level's entry as a number of layers for each of its transformers."""
  many = isinstance(entry, (tuple, list))
  layers = tuple(entry) if many else (entry,) * transformers
  if len(layers) != transformers or not all(
    isinstance(n, int) and n >= 0 for n in layers
  ):
    raise InputError(
      f"UNet config: {way}transformer_layers_per_block has {entry!r} for a level of "
      f"{transformers} transformers; expected a whole number, or one for each"
    )
  return layers


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
