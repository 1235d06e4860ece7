"""OpenCLIP's files: its config, translated to transformers'; names: `open_clip_names`.

  open_clip_config.json    {"model_cfg": {embed_dim, vision_cfg, text_cfg, quick_gelu?},
                            "preprocess_cfg": {mean, std}}
  open_clip_model.safetensors or open_clip_pytorch_model.bin

Source: OpenCLIP 3.3's model.py. Only plain vision transformers with CLIP's own text
tower are supported.
"""

from collections.abc import Mapping
from typing import Any

from safetydpo_jax.errors import InputError

# The model of published CLIPScores, for a file that comes without its config.
VIT_H_14 = {
  "embed_dim": 1024,
  "vision_cfg": {
    "image_size": 224,
    "layers": 32,
    "width": 1280,
    "head_width": 80,
    "patch_size": 14,
  },
  "text_cfg": {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 1024,
    "heads": 16,
    "layers": 24,
  },
}
# The fields we read, with OpenCLIP's defaults.
_VISION = {
  "image_size": 224,
  "layers": 12,
  "width": 768,
  "head_width": 64,
  "patch_size": 16,
  "mlp_ratio": 4.0,
}
_TEXT = {
  "context_length": 77,
  "vocab_size": 49408,
  "width": 512,
  "heads": 8,
  "layers": 12,
  "mlp_ratio": 4.0,
}
_MODEL = {"embed_dim": 512, "vision_cfg": {}, "text_cfg": {}, "quick_gelu": False}
# Values at which any other field changes nothing.
_HARMLESS = (None, False, {}, [])


def config_of(model: Mapping[str, Any]) -> dict[str, Any]:
  """A `model_cfg` as transformers' CLIP config.

  Raises:
    InputError: the model has parts that are not supported.
  """
  model = _settle(model, _MODEL, "model_cfg")
  vision = _settle(model["vision_cfg"], _VISION, "vision_cfg")
  text = _settle(model["text_cfg"], _TEXT, "text_cfg")
  shared = {"hidden_act": "quick_gelu" if model["quick_gelu"] else "gelu"}
  return {
    "model_type": "clip",
    "projection_dim": model["embed_dim"],
    "vision_config": {
      **shared,
      "hidden_size": vision["width"],
      "intermediate_size": int(vision["width"] * vision["mlp_ratio"]),
      "num_hidden_layers": vision["layers"],
      "num_attention_heads": vision["width"] // vision["head_width"],
      "image_size": vision["image_size"],
      "patch_size": vision["patch_size"],
    },
    "text_config": {
      **shared,
      "hidden_size": text["width"],
      "intermediate_size": int(text["width"] * text["mlp_ratio"]),
      "num_hidden_layers": text["layers"],
      "num_attention_heads": text["heads"],
      "max_position_embeddings": text["context_length"],
      "vocab_size": text["vocab_size"],
      "eos_token_id": 2,  # to transformers: pool at the highest id, as OpenCLIP does
    },
  }


def _settle(config: Any, defaults: Mapping[str, Any], what: str) -> dict[str, Any]:
  if not isinstance(config, Mapping):
    raise InputError(f"OpenCLIP config: {what} is {config!r}, expected a JSON object")
  for field, value in config.items():
    if field not in defaults and value not in _HARMLESS:
      raise InputError(
        f"OpenCLIP config: {what} has {field} = {value!r}, which is not supported; "
        "use a plain vision transformer such as ViT-H-14"
      )
  return {**defaults, **{key: config[key] for key in defaults if key in config}}
