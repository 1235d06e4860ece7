"""Which layer A1111, Forge and ComfyUI find under the name of a LoRA's layer.

Twins of their published rules, apart from the package's: they call a UNet's layers as
sgm does, `input_blocks.4.1.proj_in`. A1111 turns diffusers' names into these by regular
expressions (extensions-builtin/Lora/networks.py: `convert_diffusers_name_to_compvis`,
`load_network`), ComfyUI and Forge look both up in a table made from the UNet's config
(comfy/utils.py: `unet_to_diffusers`; comfy/lora.py: `model_lora_keys_unet`).
"""

import re

_ATTENTION = ("norm", "proj_in", "proj_out")
_TRANSFORMER = (
  *(f"attn{n}.{part}" for n in (1, 2) for part in ("to_q", "to_k", "to_v", "to_out.0")),
  *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
)
_RESNET = {
  "norm1": "in_layers.0",
  "conv1": "in_layers.2",
  "time_emb_proj": "emb_layers.1",
  "norm2": "out_layers.0",
  "conv2": "out_layers.3",
  "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
  "conv_in": "input_blocks.0.0",
  "conv_norm_out": "out.0",
  "conv_out": "out.2",
  "time_embedding.linear_1": "time_embed.0",
  "time_embedding.linear_2": "time_embed.2",
  "add_embedding.linear_1": "label_emb.0.0",
  "add_embedding.linear_2": "label_emb.0.2",
}


def sgm_table(config) -> dict[str, str]:
  """{diffusers' name of a module: sgm's}, of every module that the UNet could have."""
  levels, depth = len(config["block_out_channels"]), _deepest(config)
  table = dict(_OUTSIDE)

  def resnet(theirs, sgm):
    table.update({f"{theirs}.{a}": f"{sgm}.{b}" for a, b in _RESNET.items()})

  def attention(theirs, sgm):
    ends = [*_ATTENTION]
    ends += [f"transformer_blocks.{n}.{e}" for n in range(depth) for e in _TRANSFORMER]
    table.update({f"{theirs}.{end}": f"{sgm}.{end}" for end in ends})

  number = 0
  for level, kind in enumerate(config["down_block_types"]):
    for layer in range(config["layers_per_block"]):
      number += 1
      here, there = f"down_blocks.{level}", f"input_blocks.{number}"
      resnet(f"{here}.resnets.{layer}", f"{there}.0")
      if kind.startswith("Cross"):
        attention(f"{here}.attentions.{layer}", f"{there}.1")
    if level < levels - 1:
      number += 1
      table[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
  resnet("mid_block.resnets.0", "middle_block.0")
  attention("mid_block.attentions.0", "middle_block.1")
  resnet("mid_block.resnets.1", "middle_block.2")
  number = -1
  for level, kind in enumerate(config["up_block_types"]):
    for layer in range(config["layers_per_block"] + 1):
      number += 1
      here, there = f"up_blocks.{level}", f"output_blocks.{number}"
      resnet(f"{here}.resnets.{layer}", f"{there}.0")
      if kind.startswith("Cross"):
        attention(f"{here}.attentions.{layer}", f"{there}.1")
    if level < levels - 1:
      inner = 2 if kind.startswith("Cross") else 1
      table[f"up_blocks.{level}.upsamplers.0.conv"] = f"{there}.{inner}.conv"
  return table


def _deepest(config) -> int:
  """The most layers that a transformer of the UNet has."""
  fields = ("transformer_layers_per_block", "reverse_transformer_layers_per_block")
  left, most = [config.get(field) or 1 for field in fields], 1
  while left:
    value = left.pop()
    left += [] if isinstance(value, int) else list(value)
    most = max(most, value) if isinstance(value, int) else most
  return most


def comfyui(config) -> dict[str, str]:
  """{name of a LoRA's layer: sgm's module} for ComfyUI and Forge."""
  table = sgm_table(config)
  found = {f"lora_unet_{sgm.replace('.', '_')}": sgm for sgm in table.values()}
  found |= {f"diffusion_model.{sgm}": sgm for sgm in table.values()}
  found |= {f"lora_unet_{name.replace('.', '_')}": sgm for name, sgm in table.items()}
  return found | {f"unet.{name}": sgm for name, sgm in table.items()}


def a1111(name: str, config) -> str | None:
  """sgm's module that A1111 takes `lora_unet_…` for, None if it finds none."""
  flat = {sgm.replace(".", "_"): sgm for sgm in sgm_table(config).values()}
  converted = _a1111_name(name.removeprefix("lora_unet_"))
  return flat.get(converted) or flat.get(name.removeprefix("lora_unet_"))


def _a1111_name(name: str) -> str:
  """The rule by which A1111 renames a layer; what no rule fits keeps its name."""
  if found := re.match(r"conv_in(.*)", name):
    return f"input_blocks_0_0{found[1]}"
  if found := re.match(r"conv_out(.*)", name):
    return f"out_2{found[1]}"
  if found := re.match(r"time_embedding_linear_(\d+)(.*)", name):
    return f"time_embed_{2 * int(found[1]) - 2}{found[2]}"
  if found := re.match(r"(down|up)_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)", name):
    side, level, kind, layer, end = found.groups()
    number = 3 * int(level) + int(layer) + (side == "down")
    side = {"down": "input", "up": "output"}[side]
    return f"{side}_blocks_{number}_{int(kind == 'attentions')}_{_end(kind, end)}"
  if found := re.match(r"mid_block_(attentions|resnets)_(\d+)_(.+)", name):
    kind, layer, end = found.groups()
    number = 1 if kind == "attentions" else 2 * int(layer)
    return f"middle_block_{number}_{_end(kind, end)}"
  if found := re.match(r"down_blocks_(\d+)_downsamplers_0_conv", name):
    return f"input_blocks_{3 + 3 * int(found[1])}_0_op"
  if found := re.match(r"up_blocks_(\d+)_upsamplers_0_conv", name):
    level = int(found[1])
    return f"output_blocks_{2 + 3 * level}_{2 if level else 1}_conv"
  return name


def _end(kind: str, end: str) -> str:
  renamed = _RESNET.get(end) if kind == "resnets" else None
  return renamed.replace(".", "_") if renamed else end
