"""Configs of a single file's networks, read from its tensors' names and shapes.

A single file has no config.json. Nearly all of one follows from the shapes; the rest is
the same in everything that sgm and ldm trained, and is filled in by these rules:

  group norms   32 groups
  UNet heads    8 in SD 1, whose projections are 1×1 convolutions; else 64 channels each
  CLIP heads    64 channels each
  activation    quick_gelu in OpenAI's text encoder, gelu in OpenCLIP's

Distilled models (fewer resnets, no middle, fewer transformer layers) are read as they
are. The configs are those of diffusers' config.json.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.open_clip_names import text_tensor
from safetydpo_jax.models import clip, vae
from safetydpo_jax.models.published import CLIP_L
from safetydpo_jax.models.unet_config import read_levels

Shapes = Mapping[str, tuple[int, ...]]  # {name without its component's prefix: shape}

HEAD = 64  # channels of one head, see the module's docstring
SD1_HEADS = 8
_CONV, _LINEAR = 4, 2  # axes of their weights
_MOST = 100  # blocks or layers of one kind; published models have 32 at most


class _Level(NamedTuple):
  features: int
  layers: tuple[int, ...]  # of the transformer after each resnet
  attends: bool
  resnets: int


def unet_config(shapes: Shapes, pooled: int | None) -> dict[str, Any]:
  """A UNet's config.json without `sample_size`.

  Args:
    shapes: of the tensors below `model.diffusion_model.`.
    pooled: features of the pooled text that SDXL's UNet takes; None: of other families.

  Raises:
    InputError: it is not laid out as a UNet of Stable Diffusion, or is not complete.
  """
  first = _shape(shapes, "input_blocks.0.0.weight", _CONV)
  down = _levels(shapes, "input_blocks", 1)
  up = _levels(shapes, "output_blocks", 0)
  width = _of_attention(shapes, "attn2.to_k.weight", _LINEAR)
  linear = len(_of_attention(shapes, "proj_in.weight", _LINEAR, _CONV)) == _LINEAR
  config = {
    "in_channels": first[1],
    "out_channels": _shape(shapes, "out.2.weight", _CONV)[0],
    "block_out_channels": tuple(level.features for level in down),
    "layers_per_block": _one_if_equal(level.resnets for level in down),
    "down_block_types": tuple(_kind(x, "CrossAttnDown", "Down") for x in down),
    "up_block_types": tuple(_kind(x, "CrossAttnUp", "Up") for x in up),
    "cross_attention_dim": width[1],
    "use_linear_projection": linear,
    "attention_head_dim": tuple(max(1, x.features // HEAD) for x in down)
    if linear
    else SD1_HEADS,
    **_middle(shapes, down),
    **_transformers(down, up),
  }
  if pooled is not None:
    inputs = _shape(shapes, "label_emb.0.0.weight", _LINEAR)[1]
    config |= {
      "addition_embed_type": "text_time",
      "addition_time_embed_dim": (inputs - pooled) // 6,
      "projection_class_embeddings_input_dim": inputs,
    }
  return config


def _levels(shapes: Shapes, blocks: str, start: int) -> list[_Level]:
  """The levels of one way. A level ends with the entry that changes the resolution."""
  levels, layers, features, number = [], [], 0, start
  ends = {"input_blocks": ("0.op",), "output_blocks": ("1.conv", "2.conv")}[blocks]
  while True:
    place = f"{blocks}.{number}"
    _check_count(number, blocks)
    resnet = f"{place}.0.in_layers.2.weight" in shapes
    if resnet:
      features = _shape(shapes, f"{place}.0.in_layers.2.weight", _CONV)[0]
      layers.append(_depth(shapes, f"{place}.1"))
    ended = any(f"{place}.{end}.weight" in shapes for end in ends)
    last = not resnet and not ended
    if (ended or last) and layers:
      attends = [depth is not None for depth in layers]
      if any(attends) != all(attends):
        raise InputError(
          f"level {len(levels)} of {blocks} has transformers after some resnets only, "
          "which no UNet of diffusers has; convert it once with the tool it came from"
        )
      depths = tuple(depth for depth in layers if depth is not None)
      levels.append(_Level(features, depths, all(attends), len(layers)))
      layers = []
    if last and not levels:
      raise InputError(f"{blocks} holds no level of a UNet; fetch the file again")
    if last:
      return levels
    number += 1


def _depth(shapes: Shapes, place: str) -> int | None:
  """How many blocks the transformer at `place` has, None if there is no transformer."""
  if f"{place}.proj_in.weight" not in shapes:
    return None
  return _count(shapes, f"{place}.transformer_blocks")


def _count(names: Iterable[str], prefix: str) -> int:
  """How many numbers follow `prefix` and a dot.

  If one is left out, `account` misses it: the highest may be any number.
  """
  pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
  count = len({match[1] for match in map(pattern.match, names) if match})
  _check_count(count, prefix)
  return count


def _check_count(count: int, prefix: str) -> None:
  if count > _MOST:
    raise InputError(
      f"it has more than {_MOST} {prefix}, which no Stable Diffusion has; fetch the "
      "file again"
    )


def _kind(level: _Level, attending: str, plain: str) -> str:
  return f"{attending if level.attends else plain}Block2D"


def _middle(shapes: Shapes, down: list[_Level]) -> dict[str, Any]:
  """`mid_block_type`, where it is not the usual one."""
  if "middle_block.0.in_layers.2.weight" not in shapes:
    return {"mid_block_type": None}
  depth = _depth(shapes, "middle_block.1")
  if depth is None:
    return {"mid_block_type": "UNetMidBlock2D"}
  # diffusers takes the middle's number from the lowest level.
  deepest = down[-1].layers[:1] or (depth,)
  if deepest != (depth,):
    raise InputError(
      f"the middle transformer has {depth} blocks and the one before it {deepest[0]}, "
      "which no UNet of diffusers has; convert it once with the tool it came from"
    )
  return {"mid_block_type": "UNetMidBlock2DCrossAttn"}


def _transformers(down: list[_Level], up: list[_Level]) -> dict[str, Any]:
  """`transformer_layers_per_block`, and the way up's if it is not the mirror image."""

  def entry(level: _Level) -> int | tuple[int, ...]:
    return _one_if_equal(level.layers) if level.layers else 1

  downwards, upwards = [entry(x) for x in down], [entry(x) for x in up]
  # A level without transformers on the way up says nothing about them.
  mirrored = [
    entry(level) if level.layers else below
    for level, below in zip(reversed(up), downwards)
  ]
  config: dict[str, Any] = {"transformer_layers_per_block": _one_if_equal(downwards)}
  if mirrored != downwards or any(isinstance(x, tuple) for x in downwards):
    config["transformer_layers_per_block"] = tuple(downwards)
    config["reverse_transformer_layers_per_block"] = tuple(upwards)
  return config


def vae_config(shapes: Shapes) -> dict[str, Any]:
  """A VAE's config.json without `sample_size` and `scaling_factor`.

  Args:
    shapes: of the tensors below `first_stage_model.`.

  Raises:
    InputError: it is not laid out as a VAE of Stable Diffusion, or is not complete.
  """
  levels = _count(shapes, "encoder.down")
  _shape(shapes, "encoder.down.0.block.0.conv1.weight", _CONV)
  resnets = [_count(shapes, f"encoder.down.{i}.block") for i in range(levels)]
  config = {
    "in_channels": _shape(shapes, "encoder.conv_in.weight", _CONV)[1],
    "out_channels": _shape(shapes, "decoder.conv_out.weight", _CONV)[0],
    "latent_channels": _shape(shapes, "decoder.conv_in.weight", _CONV)[1],
    "block_out_channels": tuple(
      _shape(shapes, f"encoder.down.{i}.block.0.conv1.weight", _CONV)[0]
      for i in range(levels)
    ),
    "layers_per_block": resnets[0],
    "down_block_types": ("DownEncoderBlock2D",) * levels,
    "up_block_types": ("UpDecoderBlock2D",) * levels,
  }
  parts = {
    "use_quant_conv": "quant_conv.weight",
    "use_post_quant_conv": "post_quant_conv.weight",
    "mid_block_add_attention": "encoder.mid.attn_1.q.weight",
  }
  return config | {field: False for field, key in parts.items() if key not in shapes}


def clip_config(shapes: Shapes) -> dict[str, Any]:
  """An OpenAI text encoder's config.json; names as transformers has them."""
  return _text_config(shapes, lambda name: name, "encoder.layers", None)


def open_clip_config(
  shapes: Shapes, projected: bool, layers: int | None
) -> dict[str, Any]:
  """An OpenCLIP text encoder's config.json.

  Args:
    shapes: of the tensors below its prefix, with OpenCLIP's names.
    projected: whether its pooled output is projected and used, as SDXL's is.
    layers: how many of its layers are used at most; None: all.

  Raises:
    InputError: it is not complete.
  """

  def original(name: str) -> str:
    return text_tensor(name)[0]

  config = _text_config(shapes, original, "transformer.resblocks", layers)
  config["hidden_act"] = "gelu"
  if projected:
    config["architectures"] = ["CLIPTextModelWithProjection"]
    config["projection_dim"] = _shape(shapes, "text_projection", _LINEAR)[1]
  return config


def _text_config(shapes: Shapes, key, blocks: str, most: int | None) -> dict[str, Any]:
  vocabulary, width = _shape(shapes, key("embeddings.token_embedding.weight"), _LINEAR)
  layers = _count(shapes, blocks)
  return {
    **CLIP_L,
    "vocab_size": vocabulary,
    "hidden_size": width,
    "projection_dim": width,
    "intermediate_size": _shape(
      shapes, key("encoder.layers.0.mlp.fc1.weight"), _LINEAR
    )[0],
    "num_hidden_layers": min(layers, most or layers),
    "num_attention_heads": max(1, width // HEAD),
    "max_position_embeddings": _shape(
      shapes, key("embeddings.position_embedding.weight"), _LINEAR
    )[0],
  }


def difference(
  name: str, own: Mapping[str, Any], derived: Mapping[str, Any]
) -> tuple[str, Any, Any] | None:
  """The first field in which two configs of a network differ, and its values, or None.

  A field that a config leaves out has its default.

  Args:
    name: unet, vae, text_encoder or text_encoder_2.
    own: its config.json.
    derived: the one derived from its tensors' shapes.
  """
  one, other = (_settled(name, config) for config in (own, derived))
  fields = ((field, one[field], other[field]) for field in one)
  return next((found for found in fields if found[1] != found[2]), None)


def _settled(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
  """The fields that decide what a network computes, in one form."""
  if name == "vae":
    return vars(vae.read_config(config))
  if name != "unet":
    c = vars(clip.read_config(config))
    # The end token is the highest id of every vocabulary, which is what 2 stands for.
    c["eos_token_id"] = c["eos_token_id"] in (2, c["vocab_size"] - 1)
    c["projection_dim"] = c["projected"] and c["projection_dim"]
    return c
  c, down, middle, up = read_levels(config)
  plain = {k: v for k, v in vars(c).items() if not k.endswith(("_block", "_types"))}
  del plain["attention_head_dim"]  # of levels without attention it says nothing
  plain["time_embedding_dim"] = c.time_embedding_dim or 4 * c.block_out_channels[0]
  blocks = [
    [(x.features, x.resnets, x.transformer_layers) for x in levels]
    for levels in (down, [middle] if middle else [], up)
  ]
  heads = [
    x.heads for x in (*down, *([middle] if middle else []), *up) if x.transformer_layers
  ]
  return {**plain, "attention_head_dim": heads, "transformer_layers_per_block": blocks}


def _of_attention(shapes: Shapes, ending: str, *axes: int) -> tuple[int, ...]:
  """The shape of the first tensor with this ending; see `_shape`."""
  for name in shapes:
    if name.endswith(f".{ending}"):
      return _shape(shapes, name, *axes)
  raise InputError(f"no tensor of its UNet ends in {ending}; fetch the file again")


def _shape(shapes: Shapes, name: str, *axes: int) -> tuple[int, ...]:
  """The shape of a weight; `axes` are the numbers of axes that it may have."""
  shape = shapes.get(name)
  if shape is None or len(shape) not in axes or not all(shape):
    found = "is missing" if shape is None else f"has shape {shape}"
    raise InputError(f"{name} {found}; fetch the file again")
  return shape


def _one_if_equal(values: Iterable[Any]) -> Any:
  values = tuple(values)
  return values[0] if len(set(values)) == 1 else values
