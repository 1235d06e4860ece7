"""Kohya's names of LoRA layers, which A1111, Forge and ComfyUI read.

  lora_unet_<module>.lora_down.weight   (r, in[, kh, kw])
  lora_unet_<module>.lora_up.weight     (out, r[, 1, 1])
  lora_unet_<module>.alpha              scalar; the product is scaled by alpha / r

<module> is one of two spellings, with every dot written as an underscore:
  diffusers'  down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q
  sgm's       input_blocks_4_1_transformer_blocks_0_attn1_to_q, what kohya's trainer
              calls the layers of SDXL

sgm numbers a UNet's entries from its input to its output, so what a number means
depends on how many resnets each level has (`resnets_of`): two in SD 1, SD 2, SDXL and
SSD-1B, one in small-sd, tiny-sd and KOALA.

Both are parsed by an exact grammar, so that a name that is not a module of a Stable
Diffusion UNet is refused; nothing is guessed. We write what all readers know every
layer by: sgm's spelling for SDXL, where A1111 does not find the other one's upsampler
of the first block, and diffusers' for SD1 and SD2, whose sgm names diffusers does not
read. ComfyUI and Forge read both.

Sources: kohya-ss/sd-scripts (networks/lora.py, library/sai_model_spec.py), A1111
(extensions-builtin/Lora/networks.py), ComfyUI (comfy/lora.py, comfy/utils.py),
diffusers (loaders/lora_conversion_utils.py).
"""

import json
import re
from collections.abc import Mapping, Sequence

from safetydpo_jax.models.unet_config import read_levels

PREFIX = "lora_unet_"
FILE_NAME = "safetydpo_lora.safetensors"
# Resnets of each level on the way down, where no model says it; its levels are at most
# four.
TWO_EACH = (2, 2, 2, 2)

# The parts of a module's path in our tree; joined by underscores they are its name.
_PART = re.compile(
  r"(?:^|_)((?:(?:down|up)_blocks|attentions|resnets|transformer_blocks|downsamplers"
  r"|upsamplers|to_out|net)_\d+|mid_block|attn[12]|to_[qkv]|ff|proj_in|proj_out|proj"
  r"|conv_in|conv_out|conv_shortcut|conv_norm_out|conv[12]?|norm[123]?|time_emb_proj"
  r"|cond_proj|time_embedding|add_embedding|linear_[12])(?=_|$)",
  re.ASCII,
)
_SGM = re.compile(
  r"(input_blocks|output_blocks)_(\d{1,2})_(\d)_(.+)|(middle_block)_([012])_(.+)",
  re.ASCII,
)
_SGM_OUTSIDE = {
  "input_blocks_0_0": ("conv_in",),
  "out_0": ("conv_norm_out",),
  "out_2": ("conv_out",),
  "time_embed_0": ("time_embedding", "linear_1"),
  "time_embed_2": ("time_embedding", "linear_2"),
  "label_emb_0_0": ("add_embedding", "linear_1"),
  "label_emb_0_2": ("add_embedding", "linear_2"),
}
_SGM_RESNET = {
  "in_layers_0": "norm1",
  "out_layers_0": "norm2",
  "in_layers_2": "conv1",
  "out_layers_3": "conv2",
  "emb_layers_1": "time_emb_proj",
  "skip_connection": "conv_shortcut",
}
_OUTSIDE_SGM = {path: name for name, path in _SGM_OUTSIDE.items()}
_RESNET_SGM = {ours: name for name, ours in _SGM_RESNET.items()}


def module_name(path: tuple[str, ...], sgm: bool = False) -> str:
  """lora_unet_<module> of a path in our tree, in sgm's spelling or in diffusers'.

  SDXL's added embedding is in sgm's in any case: diffusers drops the other with no more
  than a warning.
  """
  sgm = sgm or path[0] == "add_embedding"
  return PREFIX + (_write_sgm(path) if sgm else "_".join(path))


def writes_sgm(unet_config: Mapping) -> bool:
  """Whether a UNet's layers are written in sgm's spelling: those of SDXL's form.

  `_write_sgm` counts on two layers a block, and on attention wherever a block's output
  is upsampled; all published SDXL models have both.
  """
  upsampled = unet_config.get("up_block_types", ())[:-1]
  return (
    is_sdxl(unet_config)
    and unet_config.get("layers_per_block") == 2
    and all(kind.startswith("CrossAttn") for kind in upsampled)
  )


def is_sdxl(unet_config: Mapping) -> bool:
  """Whether a UNet takes SDXL's added embedding."""
  return unet_config.get("addition_embed_type") == "text_time"


def _write_sgm(path: tuple[str, ...]) -> str:
  """sgm's name of a module of SDXL: the inverse of `_read_sgm`."""
  if path in _OUTSIDE_SGM:
    return _OUTSIDE_SGM[path]
  block, part, *rest = path
  kind, _, number = part.rpartition("_")
  index = int(number)
  inner = {"resnets": 0, "attentions": 1, "downsamplers": 0, "upsamplers": 2}[kind]
  if kind == "resnets":
    rest = [_RESNET_SGM[rest[0]]]
  if block == "mid_block":
    return "_".join(("middle_block", str(1 if inner else 2 * index), *rest))
  side, _, number = block.partition("_blocks_")
  first = 3 * int(number) + (side == "down")  # of the block's three entries
  if kind.endswith("samplers"):
    index, rest = 2, ["op" if side == "down" else "conv"]
  side = {"down": "input_blocks", "up": "output_blocks"}[side]
  return "_".join((side, str(first + index), str(inner), *rest))


def resnets_of(unet_config: Mapping) -> tuple[int, ...]:
  """Resnets of each level on the way down; the way up has one more in each."""
  return tuple(level.resnets for level in read_levels(unet_config)[1])


def module_path(name: str, resnets: Sequence[int] = TWO_EACH) -> tuple[str, ...] | None:
  """The path in our tree of lora_unet_<module>, None if it is not in a UNet.

  `resnets` are those of the UNet's levels, which decide what sgm's numbers mean.
  """
  flat = name.removeprefix(PREFIX)
  return _read_sgm(flat, resnets) or _read_parts(flat)


def _read_parts(flat: str) -> tuple[str, ...] | None:
  """A path from its parts joined by underscores."""
  parts = tuple(_PART.findall(flat))
  return parts if parts and "_".join(parts) == flat else None


def _read_sgm(flat: str, resnets: Sequence[int]) -> tuple[str, ...] | None:
  """A path from sgm's name of the module."""
  if flat in _SGM_OUTSIDE:
    return _SGM_OUTSIDE[flat]
  found = _SGM.fullmatch(flat)
  if not found:
    return None
  if found[5]:
    where, kind = (
      ("mid_block",),
      ("resnets_0", "attentions_0", "resnets_1")[int(found[6])],
    )
    rest = found[7]
  else:
    down, inner, rest = found[1] == "input_blocks", int(found[3]), found[4]
    # The first entry of the input is conv_in. Then each level has its resnets, and on
    # the way down its downsampler; on the way up it has one resnet more.
    entries = [
      (level, layer, layer == count)
      for level, count in enumerate(resnets if down else reversed(resnets))
      for layer in range(count + 1)
    ]
    number = int(found[2]) - down
    if not 0 <= number < len(entries):
      return None
    block, layer, last = entries[number]
    where = (f"{'down' if down else 'up'}_blocks_{block}",)
    if rest in ("op", "conv"):
      right = last and (inner == 0 if down else inner in (1, 2))
      if not right or (rest == "op") != down:
        return None
      return (*where, "downsamplers_0" if down else "upsamplers_0", "conv")
    if inner > 1 or (down and last):
      return None
    kind = f"{('resnets', 'attentions')[inner]}_{layer}"
  if kind.startswith("resnets"):
    return (*where, kind, _SGM_RESNET[rest]) if rest in _SGM_RESNET else None
  parts = _read_parts(rest)
  return (*where, kind, *parts) if parts else None


def header(
  unet_config: Mapping, prediction_type: str, resolution: int, rank: int, title: str
) -> dict[str, str]:
  """What A1111, ComfyUI and kohya's tools look for in a LoRA file's header.

  There is no date: equal LoRAs give equal files.

  Args:
    unet_config: the base UNet's config.json.
    prediction_type: "epsilon" or "v_prediction".
    resolution: pixels per side the base was trained for.
    rank: r of all layers, which is alpha too.
    title: of the LoRA.
  """
  version = _version(unet_config)
  spec = model_spec(unet_config, prediction_type, resolution, title)
  return {
    "format": "pt",
    "ss_network_module": "networks.lora",
    "ss_network_dim": str(rank),
    "ss_network_alpha": str(float(rank)),
    "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": float(rank)}),
    "ss_base_model_version": version,
    "ss_v2": str(version == "sd_v2"),
    **spec,
    "modelspec.architecture": f"{spec['modelspec.architecture']}/lora",
    "modelspec.implementation": "diffusers",
  }


def _version(unet_config: Mapping) -> str:
  """kohya's name of the base model's family."""
  if is_sdxl(unet_config):
    return "sdxl_base_v1-0"
  return "sd_v2" if unet_config.get("cross_attention_dim") == 1024 else "sd_v1"


def model_spec(
  unet_config: Mapping, prediction_type: str, resolution: int, title: str
) -> dict[str, str]:
  """A file's header as Stability AI's ModelSpec has it; arguments as for `header`."""
  velocity = prediction_type == "v_prediction"
  architecture = {
    "sdxl_base_v1-0": "stable-diffusion-xl-v1-base",
    "sd_v2": "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512",
    "sd_v1": "stable-diffusion-v1",
  }[_version(unet_config)]
  return {
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.architecture": architecture,
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.title": title,
    "modelspec.resolution": f"{resolution}x{resolution}",
    "modelspec.prediction_type": "v" if velocity else "epsilon",
  }
