"""The original code's names of tensors, and diffusers' names beside them.

Single-file checkpoints have the names of Stability AI's sgm and of CompVis's ldm:

  model.diffusion_model.                the UNet: input_blocks, middle_block and
                                        output_blocks, in the order of computation
  first_stage_model.                    the VAE; the decoder's levels count backwards
  cond_stage_model.transformer.         SD 1's text encoder, with transformers' names
  cond_stage_model.model.               SD 2's, with OpenCLIP's
  conditioner.embedders.0.transformer.  SDXL's first, with transformers'
  conditioner.embedders.1.model.        SDXL's second, with OpenCLIP's

The map is exact in both directions: every diffusers name has one `Part` of one tensor.
OpenCLIP's attention keeps q, k and v in one matrix, so a part may be a third of it,
and its projection multiplies from the right, so a part may be transposed.

Sources: sgm/modules/diffusionmodules/openaimodel.py and model.py, OpenCLIP's
transformer.py, diffusers' scripts/convert_original_stable_diffusion_to_diffusers.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from safetydpo_jax.formats import open_clip_names
from safetydpo_jax.models.unet_config import read_levels


class Part(NamedTuple):
  """Where a tensor of diffusers' is in a single file.

  Attributes:
    key: the tensor there.
    third: 0, 1 or 2 of its three equal parts along axis 0; None: all of it.
    transposed: whether it is stored transposed.
  """

  key: str
  third: int | None = None
  transposed: bool = False

  def take(self, tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """The part, a view."""
    tensor = tensors[self.key]
    # What has no thirds is left whole, and is refused for its shape.
    if self.third is not None and tensor.ndim and tensor.shape[0] % 3 == 0:
      rows = tensor.shape[0] // 3
      tensor = tensor[self.third * rows : (self.third + 1) * rows]
    return tensor.T if self.transposed else tensor


_UNET_OUTSIDE = {
  "time_embedding.linear_1": "time_embed.0",
  "time_embedding.linear_2": "time_embed.2",
  "add_embedding.linear_1": "label_emb.0.0",
  "add_embedding.linear_2": "label_emb.0.2",
  "conv_in": "input_blocks.0.0",
  "conv_norm_out": "out.0",
  "conv_out": "out.2",
}
_UNET_PLACE = re.compile(
  r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)"
  r"|mid_block\.(resnets\.0|attentions\.0|resnets\.1)\.(.+)"
)
_MIDDLE = {"resnets.0": 0, "attentions.0": 1, "resnets.1": 2}
_UNET_RESNET = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "time_emb_proj": "emb_layers.1",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "conv_shortcut": "skip_connection",
}


def unet_key(config: Mapping[str, Any]) -> Callable[[str], str]:
  """The function from a UNet's diffusers names to those in a single file.

  Args:
    config: the UNet's config.json.
  """
  _, down, _, up = read_levels(config)
  # Where each level starts: conv_in comes first, a downsampler ends every level but the
  # last, and an upsampler is in its level's last entry.
  starts = {
    "down": [1 + sum(x.resnets + 1 for x in down[:i]) for i in range(len(down))],
    "up": [sum(x.resnets for x in up[:i]) for i in range(len(up))],
  }

  def rename(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    if module in _UNET_OUTSIDE:
      return f"{_UNET_OUTSIDE[module]}.{leaf}"
    found = _UNET_PLACE.fullmatch(module)
    if not found:
      raise ValueError(f"{name} is not in a UNet")
    way, level, kind, number, inside, middle, inside_middle = found.groups()
    if middle:
      place, inside = f"middle_block.{_MIDDLE[middle]}", inside_middle
      resnet = middle.startswith("resnets")
    else:
      start, level = starts[way][int(level)], int(level)
      if kind == "downsamplers":
        return f"input_blocks.{start + down[level].resnets}.0.op.{leaf}"
      if kind == "upsamplers":
        behind = 2 if up[level].transformer_layers else 1
        last = start + up[level].resnets - 1
        return f"output_blocks.{last}.{behind}.conv.{leaf}"
      resnet = kind == "resnets"
      side = "input" if way == "down" else "output"
      place = f"{side}_blocks.{start + int(number)}.{0 if resnet else 1}"
    return f"{place}.{_UNET_RESNET[inside] if resnet else inside}.{leaf}"

  return rename


_VAE_LEVEL = re.compile(r"(down|up)_blocks\.(\d+)\.")
_VAE_INSIDE = (
  ("mid_block.resnets.0.", "mid.block_1."),
  ("mid_block.resnets.1.", "mid.block_2."),
  ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
  ("mid_block.attentions.0.to_q.", "mid.attn_1.q."),
  ("mid_block.attentions.0.to_k.", "mid.attn_1.k."),
  ("mid_block.attentions.0.to_v.", "mid.attn_1.v."),
  ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
  (".resnets.", ".block."),
  (".downsamplers.0.", ".downsample."),
  (".upsamplers.0.", ".upsample."),
  ("conv_norm_out.", "norm_out."),
  ("conv_shortcut.", "nin_shortcut."),
)


def vae_key(config: Mapping[str, Any]) -> Callable[[str], str]:
  """The function from a VAE's diffusers names to those in a single file."""
  levels = len(config["block_out_channels"])

  def place(found: re.Match) -> str:
    level = int(found[2])
    return f"{found[1]}.{level if found[1] == 'down' else levels - 1 - level}."

  def rename(name: str) -> str:
    name = _VAE_LEVEL.sub(place, name)
    for theirs, original in _VAE_INSIDE:
      name = name.replace(theirs, original)
    return name

  return rename


def parts(
  names: Iterable[str], prefix: str, key: Callable[[str], str]
) -> dict[str, Part]:
  """{diffusers name: part} of a UNet, a VAE, or a text encoder of transformers'."""
  return {name: Part(prefix + key(name)) for name in names}


def open_clip_parts(names: Iterable[str], prefix: str) -> dict[str, Part]:
  """{transformers' name: part} of a text encoder of OpenCLIP's."""
  found = {}
  for name in names:
    theirs, third, transposed = open_clip_names.text_tensor(name)
    found[name] = Part(prefix + theirs, third, transposed)
  return found


# LitEma writes a parameter's name without its dots: input_blocks.11.0.emb_layers.1.bias
# is input_blocks110emb_layers1bias. The second number of a block has one digit.
_FLAT = re.compile(
  r"input_blocks|output_blocks|middle_block|time_embed|label_emb|in_layers|out_layers"
  r"|emb_layers|skip_connection|transformer_blocks|proj_in|proj_out|to_[qkv]|to_out"
  r"|attn[12]|norm[123]?|ff|net|proj|conv|op|out|weight|bias"
  r"|(?<=put_blocks)\d+(?=\d)|(?<=label_emb)\d|\d+"
)


def unflatten(flat: str) -> str | None:
  """A UNet's key without its dots → with them; None if it is not one."""
  words = _FLAT.findall(flat)
  return ".".join(words) if "".join(words) == flat else None
