"""Tiny random CLIPs, written by transformers, and the same under OpenCLIP's names."""

import json
import re
from pathlib import Path

import torch
import transformers

from tests.support.checkpoints import perturb, save_tokenizer

VISION = {
  "hidden_size": 24,
  "intermediate_size": 52,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "image_size": 32,
  "patch_size": 8,
}
TEXT = {
  "hidden_size": 20,
  "intermediate_size": 44,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "bos_token_id": 0,
}


def save_tiny_clip(
  path: Path, *, seed: int = 0, vision=None, text=None, projection: int = 12
) -> transformers.CLIPModel:
  """Writes a CLIP directory in transformers' format; returns the PyTorch model."""
  size = save_tokenizer(path)
  text = {"vocab_size": size, "eos_token_id": size - 1, **TEXT, **(text or {})}
  config = transformers.CLIPConfig(
    text_config=text,
    vision_config={**VISION, **(vision or {})},
    projection_dim=projection,
  )
  torch.manual_seed(seed)
  model = perturb(transformers.CLIPModel(config), seed)
  with torch.no_grad():
    model.logit_scale.fill_(3.5)
  model.save_pretrained(path)
  return model


def to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
  """transformers' names → OpenCLIP's, q, k and v joined."""
  renamed = {}
  for name, tensor in state.items():
    if name.endswith("position_ids") or re.search(r"\.[kv]_proj\.", name):
      continue
    if ".q_proj." in name:
      parts = [state[name.replace(".q_proj.", f".{p}_proj.")] for p in "qkv"]
      tensor = torch.cat(parts)
      name = name.replace("self_attn.q_proj.", "attn.in_proj_")
    for old, new in (
      ("vision_model.", "visual."),
      ("text_model.", ""),
      ("encoder.layers.", "transformer.resblocks."),
      ("self_attn.", "attn."),
      ("final_layer_norm", "ln_final"),
      ("layer_norm", "ln_"),
      ("mlp.fc1", "mlp.c_fc"),
      ("mlp.fc2", "mlp.c_proj"),
      ("embeddings.class_embedding", "class_embedding"),
      ("embeddings.patch_embedding", "conv1"),
      ("embeddings.position_embedding.weight", "positional_embedding"),
      ("embeddings.token_embedding", "token_embedding"),
      ("pre_layrnorm", "ln_pre"),
      ("post_layernorm", "ln_post"),
    ):
      name = name.replace(old, new)
    if name in ("visual_projection.weight", "text_projection.weight"):
      name = "visual.proj" if name.startswith("visual") else "text_projection"
      tensor = tensor.T
    renamed[name] = tensor.contiguous()
  return renamed


def open_clip_config(model: transformers.CLIPModel, act: str = "gelu") -> dict:
  """The `open_clip_config.json` of that model."""
  vision, text = model.config.vision_config, model.config.text_config
  return {
    "model_cfg": {
      "embed_dim": model.config.projection_dim,
      "quick_gelu": act == "quick_gelu",
      "vision_cfg": {
        "image_size": vision.image_size,
        "layers": vision.num_hidden_layers,
        "width": vision.hidden_size,
        "head_width": vision.hidden_size // vision.num_attention_heads,
        "patch_size": vision.patch_size,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
      },
      "text_cfg": {
        "context_length": text.max_position_embeddings,
        "vocab_size": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_attention_heads,
        "layers": text.num_hidden_layers,
        "mlp_ratio": text.intermediate_size / text.hidden_size,
      },
    },
    "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
  }


def write_json(path: Path, content: dict) -> None:
  """Writes JSON."""
  path.write_text(json.dumps(content), encoding="utf-8")
