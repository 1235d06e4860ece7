"""OpenCLIP's files: its names and its config, translated to transformers'.

  open_clip_config.json    {"model_cfg": {embed_dim, vision_cfg, text_cfg, quick_gelu?},
                            "preprocess_cfg": {mean, std}}
  open_clip_model.safetensors or open_clip_pytorch_model.bin

In its attention q, k and v are one matrix (3 d, d), and `visual.proj` (d, e) and
`text_projection` (d, e) multiply from the right. Source: OpenCLIP 3.3's model.py and
transformer.py. Only plain vision transformers with CLIP's own text tower are supported.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

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

_SINGLE = {
  "visual.class_embedding": "vision_model.embeddings.class_embedding",
  "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
  "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
  "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
  "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
  "visual.ln_post.weight": "vision_model.post_layernorm.weight",
  "visual.ln_post.bias": "vision_model.post_layernorm.bias",
  "positional_embedding": "text_model.embeddings.position_embedding.weight",
  "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
  "ln_final.weight": "text_model.final_layer_norm.weight",
  "ln_final.bias": "text_model.final_layer_norm.bias",
  "logit_scale": "logit_scale",
}
_PROJECTIONS = {
  "visual.proj": "visual_projection.weight",
  "text_projection": "text_projection.weight",
}
_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.+)$")
_INSIDE = {
  "ln_1": "layer_norm1",
  "ln_2": "layer_norm2",
  "attn.out_proj": "self_attn.out_proj",
  "mlp.c_fc": "mlp.fc1",
  "mlp.c_proj": "mlp.fc2",
}


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


def rename(
  tensors: Iterable[tuple[str, np.ndarray]],
) -> Iterator[tuple[str, np.ndarray]]:
  """(OpenCLIP's name, array) pairs under transformers' names; unknown ones as is."""
  for name, tensor in tensors:
    block = _BLOCK.match(name)
    if name in _PROJECTIONS:
      yield _PROJECTIONS[name], np.asarray(tensor).T
    elif block is None:
      yield _SINGLE.get(name, name), tensor
    else:
      tower = "vision_model" if block[1] else "text_model"
      layer = f"{tower}.encoder.layers.{block[2]}"
      inside, _, leaf = block[3].rpartition(".")
      if inside == "attn":  # in_proj_weight, in_proj_bias
        kind = leaf.removeprefix("in_proj_")
        for part, rows in zip("qkv", np.split(np.asarray(tensor), 3)):
          yield f"{layer}.self_attn.{part}_proj.{kind}", rows
      else:
        yield f"{layer}.{_INSIDE.get(inside, inside)}.{leaf}", tensor


_TEXT_BLOCK = re.compile(r"^encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_THIRDS = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
_ORIGINAL_INSIDE = {ours: theirs for theirs, ours in _INSIDE.items()}


def text_tensor(name: str) -> tuple[str, int | None, bool]:
  """Where OpenCLIP has a tensor of transformers' text encoder; the inverse of `rename`.

  Args:
    name: without `text_model.`.

  Returns:
    (OpenCLIP's name, which third of it along axis 0 or None for all, whether it is
    stored transposed).
  """
  block = _TEXT_BLOCK.match(name)
  if block is None:
    for theirs, ours in (*_SINGLE.items(), *_PROJECTIONS.items()):
      if ours.removeprefix("text_model.") == name and not theirs.startswith("visual."):
        return theirs, None, theirs in _PROJECTIONS
    raise ValueError(f"{name} is not in a text encoder")
  layer = f"transformer.resblocks.{block[1]}"
  if (third := _THIRDS.get(block[2])) is not None:
    return f"{layer}.attn.in_proj_{block[3]}", third, False
  return f"{layer}.{_ORIGINAL_INSIDE[block[2]]}.{block[3]}", None, False
