"""The toy Stable Diffusion's architecture, and how it is written in diffusers' layout.

  vae           images (32, 32, 3) ⇄ latents (8, 8, 4): 4 × 4 pixels for one latent
  text_encoder  24 tokens → context (24, 96), two layers
  unet          latents, timestep, context → noise, on levels of 8 × 8 and 4 × 4

Everything is an ordinary config of the published classes, so diffusers loads the
directory as it is. Captions of the toy world have at most 22 tokens with both ends, so
24 positions replace CLIP's 77. Convolutional weights are stored in float16; the text
encoder's are not, as transformers would then run it in float16 too.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from numpy.typing import DTypeLike
from safetensors.numpy import save_file

from safetydpo_jax.formats.base_model import weights
from safetydpo_jax.lora import Tree
from safetydpo_jax.toyworld.world import scenes

TOKENS = 24
LATENT_SIDE = scenes.SIZE // 4

VAE = {
  "_class_name": "AutoencoderKL",
  "in_channels": 3,
  "out_channels": 3,
  "down_block_types": ("DownEncoderBlock2D",) * 3,
  "up_block_types": ("UpDecoderBlock2D",) * 3,
  "block_out_channels": (16, 32, 64),
  "layers_per_block": 1,
  "act_fn": "silu",
  "latent_channels": 4,
  "norm_num_groups": 8,
  "sample_size": scenes.SIZE,
  "mid_block_add_attention": False,
}
UNET = {
  "_class_name": "UNet2DConditionModel",
  "sample_size": LATENT_SIDE,
  "in_channels": 4,
  "out_channels": 4,
  "down_block_types": ("CrossAttnDownBlock2D",) * 2,
  "up_block_types": ("CrossAttnUpBlock2D",) * 2,
  "block_out_channels": (64, 128),
  "layers_per_block": 1,
  # Heads, for diffusers' historical reasons. A training step takes 0.28 s of one core
  # with two, and 0.39 s with four: many small products are slow there.
  "attention_head_dim": 2,
  "cross_attention_dim": 96,
  "norm_num_groups": 16,
  "use_linear_projection": True,
}
TEXT = {
  "architectures": ("CLIPTextModel",),
  "model_type": "clip_text_model",
  "hidden_size": 96,
  "intermediate_size": 384,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": TOKENS,
  "hidden_act": "quick_gelu",
  "projection_dim": 96,
}
SCHEDULER = {
  "_class_name": "DDIMScheduler",
  "num_train_timesteps": 1000,
  "beta_start": 0.00085,
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "prediction_type": "epsilon",
  "clip_sample": False,
  "set_alpha_to_one": False,
  "steps_offset": 1,
  "timestep_spacing": "leading",
}
INDEX = {
  "_class_name": "StableDiffusionPipeline",
  "_diffusers_version": "0.30.0",
  "feature_extractor": (None, None),
  "image_encoder": (None, None),
  "requires_safety_checker": False,
  "safety_checker": (None, None),
  "scheduler": ("diffusers", "DDIMScheduler"),
  "text_encoder": ("transformers", "CLIPTextModel"),
  "tokenizer": ("transformers", "CLIPTokenizer"),
  "unet": ("diffusers", "UNet2DConditionModel"),
  "vae": ("diffusers", "AutoencoderKL"),
}
STORED = {"unet": np.float16, "vae": np.float16, "text_encoder": np.float32}
STEMS = {
  "unet": "diffusion_pytorch_model",
  "vae": "diffusion_pytorch_model",
  "text_encoder": "model",
}


def rounded(params: Tree, name: str) -> Tree:
  """The tree as the file of component `name` will hold it, in float32."""
  return jax.tree.map(
    lambda leaf: np.asarray(leaf).astype(STORED[name]).astype(np.float32), params
  )


def to_torch(params: Tree, dtype: DTypeLike, prefix: str = "") -> dict[str, np.ndarray]:
  """A parameter tree as PyTorch tensors by name: the inverse of `weights.convert`."""
  tensors = {}
  for path, leaf in flatten_dict(params).items():
    array = np.asarray(leaf)
    if path[-1] == "kernel":
      array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
    tensors[prefix + weights.torch_name(path)] = np.ascontiguousarray(array, dtype)
  return tensors


def write_component(
  out: Path, name: str, config: Mapping[str, Any], params: Tree
) -> None:
  """Writes OUT/<name>/ with config.json and safetensors of the type `STORED`."""
  folder = out / name
  folder.mkdir(parents=True, exist_ok=True)
  # Older releases of transformers know the text encoder's tensors by this prefix only.
  prefix = "text_model." if name == "text_encoder" else ""
  file = folder / f"{STEMS[name]}.safetensors"
  save_file(to_torch(params, STORED[name], prefix), file, metadata={"format": "pt"})
  write_config(folder / "config.json", config)


def write_config(file: Path, config: Mapping[str, Any]) -> None:
  """Writes a config as JSON, making its folder."""
  file.parent.mkdir(parents=True, exist_ok=True)
  file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
