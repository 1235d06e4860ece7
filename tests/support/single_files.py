"""Single-file checkpoints, written from diffusers directories by an independent twin.

The rules are those of diffusers' convert_diffusers_to_original_stable_diffusion.py and
of sgm's modules: blocks are enumerated from the config and renamed one by one. None of
the package's own maps are used.
"""

import functools
import json
from pathlib import Path

import safetensors.torch
import torch

from tests.support import checkpoints
from tests.support.checkpoints import save_tiny_checkpoint, save_tiny_sdxl_checkpoint

# Some sizes are the readers': 32 groups, 64 channels a head, 8 heads in SD 1.
UNET = {
  "block_out_channels": (32, 64),
  "norm_num_groups": 32,
  "cross_attention_dim": 64,
}
VAE = {"block_out_channels": (32, 64), "norm_num_groups": 32}
TEXT = {"hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 1}
LAYERS_SD2 = 23
RESOLUTION = {"modelspec.resolution": "16x16"}
_SCHEDULER = {"set_alpha_to_one": False, "skip_prk_steps": True}


def save_sd1(path, seed=0, **unet) -> Path:
  """A diffusers directory of SD 1 that has a single file's sizes."""
  unet = {**UNET, "attention_head_dim": 8, **unet}
  return save_tiny_checkpoint(path, seed=seed, unet=unet, vae=VAE, text=TEXT)


def save_sd2(path, seed=0, **unet) -> Path:
  """The same of SD 2, whose text encoder is OpenCLIP's without the last layer."""
  unet = {**checkpoints.SD2["unet"], **UNET, "attention_head_dim": (1, 1), **unet}
  text = {**TEXT, "hidden_act": "gelu", "num_hidden_layers": LAYERS_SD2}
  scheduler = {"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
  return save_tiny_checkpoint(
    path, seed=seed, unet=unet, vae=VAE, text=text, scheduler=scheduler
  )


def save_sdxl(path, seed=0, **unet) -> Path:
  """The same of SDXL."""
  sizes = {
    "block_out_channels": (32, 128),
    "attention_head_dim": (1, 2),
    "norm_num_groups": 32,
    "cross_attention_dim": 64 + 128,
    "projection_class_embeddings_input_dim": 6 * 8 + 40,
  }
  parts = {
    "unet": {**checkpoints.SDXL["unet"], **sizes, **unet},
    "vae": {**checkpoints.SDXL["vae"], **VAE},
    "scheduler": checkpoints.SDXL["scheduler"],
    "text": TEXT,
  }
  text_2 = {"hidden_size": 128, "num_attention_heads": 2, "projection_dim": 40}
  return save_tiny_sdxl_checkpoint(path, seed=seed, parts=parts, text_2=text_2)


FAMILIES = {"sd1": save_sd1, "sd2": save_sd2, "sdxl": save_sdxl}
# Distilled models, as in `distilled.py`.
_SSD_1B = {
  "layers_per_block": 2,
  "mid_block_type": "UNetMidBlock2D",
  "transformer_layers_per_block": [1, [1, 2]],
  "reverse_transformer_layers_per_block": [[2, 1, 1], 1],
}
_TINY_SD = {
  "mid_block_type": None,
  "down_block_types": ("CrossAttnDownBlock2D",) * 2,
  "up_block_types": ("CrossAttnUpBlock2D",) * 2,
}
DISTILLED = {
  "ssd-1b": functools.partial(save_sdxl, **_SSD_1B),
  "koala": functools.partial(save_sdxl, mid_block_type=None),
  "small-sd": functools.partial(save_sd1, mid_block_type=None),
  "tiny-sd": functools.partial(save_sd1, **_TINY_SD),
}
FAMILY_OF = {"ssd-1b": "sdxl", "koala": "sdxl", "small-sd": "sd1", "tiny-sd": "sd1"}


def unet_modules(config) -> list[tuple[str, str]]:
  """(diffusers' module, the original's) of a UNet, block by block."""
  layers, levels = config["layers_per_block"], len(config["block_out_channels"])
  pairs = [
    ("time_embedding.linear_1", "time_embed.0"),
    ("time_embedding.linear_2", "time_embed.2"),
    ("add_embedding.linear_1", "label_emb.0.0"),
    ("add_embedding.linear_2", "label_emb.0.2"),
    ("conv_in", "input_blocks.0.0"),
    ("conv_norm_out", "out.0"),
    ("conv_out", "out.2"),
  ]
  resnets, n = [], 0
  for i in range(levels):
    for j in range(layers):
      n += 1
      resnets.append((f"down_blocks.{i}.resnets.{j}", f"input_blocks.{n}.0"))
      pairs.append((f"down_blocks.{i}.attentions.{j}", f"input_blocks.{n}.1"))
    if i < levels - 1:
      n += 1
      pairs.append((f"down_blocks.{i}.downsamplers.0.conv", f"input_blocks.{n}.0.op"))
  resnets += [("mid_block.resnets.0", "middle_block.0")]
  resnets += [("mid_block.resnets.1", "middle_block.2")]
  pairs += [("mid_block.attentions.0", "middle_block.1")]
  n = -1
  for i in range(levels):
    for j in range(layers + 1):
      n += 1
      resnets.append((f"up_blocks.{i}.resnets.{j}", f"output_blocks.{n}.0"))
      pairs.append((f"up_blocks.{i}.attentions.{j}", f"output_blocks.{n}.1"))
    if i < levels - 1:
      place = 2 if config["up_block_types"][i].startswith("CrossAttn") else 1
      pairs.append(
        (f"up_blocks.{i}.upsamplers.0.conv", f"output_blocks.{n}.{place}.conv")
      )
  inside = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
  }
  for theirs, original in resnets:
    pairs += [(f"{theirs}.{a}", f"{original}.{b}") for a, b in inside.items()]
  return pairs


def vae_modules(config) -> list[tuple[str, str]]:
  """The same of a VAE."""
  layers, levels = config["layers_per_block"], len(config["block_out_channels"])
  pairs = [("quant_conv", "quant_conv"), ("post_quant_conv", "post_quant_conv")]
  resnets = []
  for side, way, up, more in (("encoder", "down", 0, 0), ("decoder", "up", 1, 1)):
    pairs += [(f"{side}.{x}", f"{side}.{x}") for x in ("conv_in", "conv_out")]
    pairs += [(f"{side}.conv_norm_out", f"{side}.norm_out")]
    for i in range(levels):
      level = levels - 1 - i if up else i
      resnets += [
        (f"{side}.{way}_blocks.{i}.resnets.{j}", f"{side}.{way}.{level}.block.{j}")
        for j in range(layers + more)
      ]
      sample = f"{way}samplers.0.conv", f"{way}sample.conv"
      pairs.append(
        (f"{side}.{way}_blocks.{i}.{sample[0]}", f"{side}.{way}.{level}.{sample[1]}")
      )
    resnets += [
      (f"{side}.mid_block.resnets.{j}", f"{side}.mid.block_{j + 1}") for j in (0, 1)
    ]
    middle = f"{side}.mid_block.attentions.0", f"{side}.mid.attn_1"
    names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v"}
    names["to_out.0"] = "proj_out"
    pairs += [(f"{middle[0]}.{a}", f"{middle[1]}.{b}") for a, b in names.items()]
  for theirs, original in resnets:
    names = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2"}
    names["conv_shortcut"] = "nin_shortcut"
    pairs += [(f"{theirs}.{a}", f"{original}.{b}") for a, b in names.items()]
  return pairs


def rename(state, modules, prefix) -> dict:
  """A state dict under the original's names; every tensor must have one."""
  renamed = {}
  for name, tensor in state.items():
    # The longest module that begins the name: conv1 is not conv1's neighbour.
    theirs, original = max(
      (pair for pair in modules if name.startswith(f"{pair[0]}.")),
      key=lambda pair: len(pair[0]),
    )
    renamed[f"{prefix}{original}{name.removeprefix(theirs)}"] = tensor
  return renamed


def open_clip(state, prefix, layers) -> dict:
  """A transformers text encoder as OpenCLIP's."""
  state = {name.removeprefix("text_model."): x for name, x in state.items()}
  made = {
    "positional_embedding": state["embeddings.position_embedding.weight"],
    "token_embedding.weight": state["embeddings.token_embedding.weight"],
    "ln_final.weight": state["final_layer_norm.weight"],
    "ln_final.bias": state["final_layer_norm.bias"],
  }
  if "text_projection.weight" in state:
    made["text_projection"] = state["text_projection.weight"].T.contiguous()
  for n in range(layers):
    here, there = f"encoder.layers.{n}", f"transformer.resblocks.{n}"
    for leaf in ("weight", "bias"):
      qkv = [state[f"{here}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
      made[f"{there}.attn.in_proj_{leaf}"] = torch.cat(qkv)
      for theirs, original in (
        ("self_attn.out_proj", "attn.out_proj"),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
      ):
        made[f"{there}.{original}.{leaf}"] = state[f"{here}.{theirs}.{leaf}"]
  return {f"{prefix}{name}": tensor for name, tensor in made.items()}


def read_state(folder: Path) -> tuple[dict, dict]:
  """(config.json, state dict) of a component."""
  (file,) = folder.glob("*.safetensors")
  state = safetensors.torch.load_file(file)
  return json.loads((folder / "config.json").read_text()), state


def original_tensors(base: Path, family: str) -> dict:
  """All tensors of a diffusers directory under the original code's names."""
  names = ("unet", "vae", "text_encoder", "text_encoder_2")
  there = {name: base / name for name in names if (base / name).is_dir()}
  return arrange({name: read_state(path) for name, path in there.items()}, family)


def arrange(states: dict, family: str) -> dict:
  """Networks, {component: (config, state dict)}, under the original code's names."""
  made = {}
  for name, modules, prefix in (
    ("unet", unet_modules, "model.diffusion_model."),
    ("vae", vae_modules, "first_stage_model."),
  ):
    config, state = states[name]
    made |= rename(state, modules(config), prefix)
  for name in made:  # the original's attention is made of 1×1 convolutions
    if ".attn_1." in name and made[name].ndim == 2:
      made[name] = made[name][:, :, None, None]
  _, text = states["text_encoder"]
  if family == "sd2":
    made |= open_clip(text, "cond_stage_model.model.", LAYERS_SD2)
    # OpenCLIP has one layer more and a projection, which SD 2 leaves out.
    last = f"cond_stage_model.model.transformer.resblocks.{LAYERS_SD2 - 1}."
    for name in [name for name in made if name.startswith(last)]:
      more = name.replace(f".{LAYERS_SD2 - 1}.", f".{LAYERS_SD2}.")
      made[more] = torch.flip(made[name], [0])
    width = made["cond_stage_model.model.ln_final.bias"].shape[0]
    made["cond_stage_model.model.text_projection"] = torch.eye(width)
    made["cond_stage_model.model.logit_scale"] = torch.tensor(4.6)
    return made
  place = {"sd1": "cond_stage_model", "sdxl": "conditioner.embedders.0"}[family]
  for name, tensor in text.items():
    inside = name.removeprefix("text_model.")
    made[f"{place}.transformer.text_model.{inside}"] = tensor
  made[f"{place}.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[
    None
  ]
  if family == "sdxl":
    config, state = states["text_encoder_2"]
    prefix = "conditioner.embedders.1.model."
    made |= open_clip(state, prefix, config["num_hidden_layers"])
    made[f"{prefix}logit_scale"] = torch.tensor(4.6)
  return made


def save(file: Path, tensors: dict, header: dict | None = None) -> Path:
  """Writes a single file."""
  tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
  safetensors.torch.save_file(tensors, file, {"format": "pt", **(header or {})})
  return file


def ema_name(name: str) -> str:
  """LitEma's name of a parameter of the UNet."""
  inside = name.removeprefix("model.")
  return "model_ema." + inside.replace(".", "")
