"""What a safetensors file is, by its tensors' names: for errors that name it.

The names are those of diffusers' loaders/single_file_utils.py and ComfyUI's
comfy/model_detection.py.
"""

import re
from collections.abc import Iterable, Mapping

# The first row whose pattern begins some tensor's name says what it is.
# With a UNet where Stable Diffusion has its own:
_RELATIVES = (
  (r"control_model\.", "a ControlNet"),
  (r".*\.motion_modules\.", "a model with AnimateDiff's motion modules"),
  (r".*\.time_(stack|mixer|mix_blocks)\b", "Stable Video Diffusion"),
  (r"embedder\.model\.visual\.", "an unCLIP model, which takes images"),
  (r"edm_(mean|std)$", "Playground 2.5, whose noise is scaled in another way (EDM)"),
  (r"edm_vpred\.", "CosXL, whose noise is scaled in another way (EDM)"),
)
# And without:
_OTHERS = (
  (r"lora_|.*\.lora[_.](A|B|up|down|linear)|.*\.(hada_w|lokr_w)\d", "a LoRA"),
  (r"controlnet_|input_hint_block\.", "a ControlNet"),
  (r"(emb_params|string_to_param|clip_[lg])$", "a textual inversion"),
  (r".*temporal_transformer\.", "an AnimateDiff motion module"),
  (r".*\bsingle_stream_modulation\.", "FLUX.2"),
  (r".*\bdouble_blocks\.\d+\.img_attn\.", "FLUX, or a model built like it"),
  (r".*\bjoint_blocks\.\d+\.", "Stable Diffusion 3"),
  (r".*\bdouble_layers\.\d+\.attn\.", "AuraFlow"),
  (r".*\b(clip_txt_mapper|clip_mapper|effnet_mapper)\.", "Stable Cascade"),
  (
    r".*\b(cap_embedder|x_embedder|patch_embedding|patchify_proj)\.",
    "a diffusion transformer",
  ),
  (r"(down_blocks|mid_block|up_blocks)\.", "a UNet with diffusers' names"),
  (r"(unet|vae|text_encoder)\.", "a pipeline with diffusers' names"),
  (r"(first_stage_model\.|vae\.)?(encoder|decoder)\.(conv_in|mid)", "a VAE alone"),
  (r"(text_model|transformer\.resblocks|embeddings)\.", "a text encoder alone"),
  (r"input_blocks\.", "a UNet alone"),
)
_SCALES = re.compile(r"(.*\.)?(scaled_fp8|scale_weight|scale_input|weight_scale)")
# By the channels that a UNet takes, where the latents have 4.
_UNETS = {
  5: "a depth-guided model",
  7: "an upscaler",
  8: "an image-editing model such as InstructPix2Pix",
  9: "an inpainting model",
}


def relative(names: Iterable[str]) -> str | None:
  """What a file with a UNet is, None if it may be Stable Diffusion."""
  return _first(_RELATIVES, list(names))


def describe(names: Iterable[str], header: Mapping[str, str]) -> str:
  """What a file without a UNet is, as well as its names and its header say."""
  names = sorted(names)
  shown = f", such as {names[0][:60]!r}" if names else ""
  kind = _first((*_RELATIVES, *_OTHERS), names) or f"{len(names)} tensors{shown}"
  said = header.get("modelspec.architecture", "")[:60]
  return f"{kind} (its header says {said!r})" if said else kind


def _first(rows: Iterable[tuple[str, str]], names: list[str]) -> str | None:
  for pattern, kind in rows:
    if any(re.match(pattern, name) for name in names):
      return kind
  return None


def is_scaled_float8(names: Iterable[str]) -> bool:
  """Whether weights are float8 with scales beside them, as ComfyUI's scaled_fp8."""
  return any(map(_SCALES.fullmatch, names))


def describe_unet(channels: int) -> str | None:
  """The kind of UNet that takes this many channels, or None if it is unknown."""
  return _UNETS.get(channels)
