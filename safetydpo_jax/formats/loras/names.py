"""Which layer of the UNet a tensor of a LoRA file belongs to, and which part of it.

A name is a prefix, a module and a part:

  lora_unet_, lycoris_               input_blocks_4_1_proj_in     .lora_down.weight
  unet., diffusion_model.,           input_blocks.4.1.proj_in     .lora_A.weight
  base_model.model., or none                                      .hada_w1_a …

The module is in sgm's spelling or in diffusers' (`kohya.py`), with underscores or with
dots. Who writes what:

  diffusers   unet. with dots; before 2024 <…attn1>.processor.to_q_lora.down.weight
  PEFT        base_model.model. with dots
  kohya       lora_unet_; LyCORIS too, and lycoris_ without kohya's trainer
  OneTrainer  lora_unet_, or unet. with dots in sgm's spelling (OMI)
  ComfyUI     diffusion_model. with dots in sgm's spelling
"""

import re
from collections.abc import Sequence

from safetydpo_jax.formats.loras import kohya

LayerPath = tuple[str, ...]

# The parts of a layer as tensors name them, by our names; see `products.py`.
_PARTS = {
  "down": ("lora_down.weight", "lora.down.weight", "lora_A.weight"),
  "up": ("lora_up.weight", "lora.up.weight", "lora_B.weight"),
  "mid": ("lora_mid.weight",),
  **{part: (part,) for part in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")},
  **{part: (part,) for part in ("hada_t1", "hada_t2")},
  **{part: (part,) for part in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")},
  **{part: (part,) for part in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
  "diff": ("diff", "w_norm"),
  "diff_b": ("diff_b", "b_norm"),
  "alpha": ("alpha",),
  "dora_scale": ("dora_scale",),
  "magnitude": ("lora_magnitude_vector", "lora_magnitude_vector.weight"),
}
_PART_OF = {name: part for part, names in _PARTS.items() for name in names}
_TENSOR = re.compile(
  rf"(.+?)\.({'|'.join(map(re.escape, sorted(_PART_OF, key=len, reverse=True)))})"
)
_ADAPTER = re.compile(r"\.default(?=\.|$)")  # PEFT's name of the one adapter in a file
_OLD = re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$")
_DOTTED = re.compile(
  r"^(?:unet\.|base_model\.model\.|(?:model\.)?diffusion_model\.)+(?=.)"
)
_FLAT = re.compile(r"^(?:lora_unet_|lycoris_)")
_DIFFUSERS_ROOT = re.compile(
  r"(down_blocks_\d+|up_blocks_\d+|mid_block|conv_in|conv_out|conv_norm_out"
  r"|time_embedding|add_embedding)$"
)
_SGM_ROOT = re.compile(
  r"(input_blocks|middle_block|output_blocks|time_embed|label_emb|out)\."
)
_NUMBERED = re.compile(r"(in|out)put_blocks[._]\d")
# What a file may hold besides the UNet, by whose it is.
_OTHERS = {
  "text encoders": re.compile(
    r"(base_model\.model\.|lycoris_)?(text_encoders?(_\d)?[._]|text_model[._]"
    r"|lora_(prior_)?te\d?_|te\d?[._]|clip_[glh][._]|cond_stage_model\.|conditioner\.)"
  ),
  "embeddings": re.compile(r"bundle_emb\.|emb_params$|string_to_param\."),
  "the VAE": re.compile(r"(lora_)?vae[._]|first_stage_model\."),
}


def owner(name: str) -> str | None:
  """Whose a tensor is if it is not the UNet's: "text encoders", "embeddings", …"""
  return next((who for who, form in _OTHERS.items() if form.match(name)), None)


def parse(
  name: str, resnets: Sequence[int] = kohya.TWO_EACH
) -> tuple[LayerPath, str] | None:
  """A UNet tensor's layer, as a path in our tree, and its part of `_PARTS`.

  Args:
    name: of the tensor.
    resnets: of the UNet's levels, which decide what sgm's numbers mean.

  Returns:
    None if it is not a part of a LoRA, or not in a layer of a Stable Diffusion UNet.
  """
  found = _split(name)
  path = found and _layer(found[1], resnets)
  return (path, _PART_OF[found[2]]) if found and path else None


def is_numbered(name: str) -> bool:
  """Whether a tensor is part of a layer that is named by its number, as sgm does."""
  found = _split(name)
  return bool(found and _NUMBERED.search(found[1]))


def _split(name: str) -> re.Match | None:
  """A tensor's module and part, None if it is not a part of a LoRA."""
  name = _OLD.sub(r".\1.lora.\2.weight", _ADAPTER.sub("", name))
  return _TENSOR.fullmatch(name.replace(".to_out.lora", ".to_out.0.lora"))


def _layer(module: str, resnets: Sequence[int]) -> LayerPath | None:
  if _FLAT.match(module):
    return kohya.module_path(_FLAT.sub("", module), resnets)
  module = _DOTTED.sub("", module)
  if _SGM_ROOT.match(module):
    return kohya.module_path(module.replace(".", "_"), resnets)
  path = kohya.module_path(module.replace(".", "_"), resnets)
  return path if path and _DIFFUSERS_ROOT.match(path[0]) else None
