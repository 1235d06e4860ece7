"""OpenCLIP's names of tensors, and transformers' beside them, in both directions.

In OpenCLIP's attention q, k and v are one matrix (3 d, d), and `visual.proj` (d, e) and
`text_projection` (d, e) multiply from the right. Source: OpenCLIP 3.3's transformer.py.
"""

import re
from collections.abc import Iterable, Iterator

import numpy as np

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
_TEXT_BLOCK = re.compile(r"^encoder\.layers\.(\d+)\.(.+)\.(weight|bias)$")
_THIRDS = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
_ORIGINAL_INSIDE = {ours: theirs for theirs, ours in _INSIDE.items()}


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
