"""A UNet's `config.json`: which fields are read, and the sizes of every level.

In the config the field `attention_head_dim` is the *number* of heads, for historical
reasons in diffusers.
"""

from typing import Any

from safetydpo_jax.errors import InputError
from safetydpo_jax.models import config as config_lib
from safetydpo_jax.models.blocks import Level

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
