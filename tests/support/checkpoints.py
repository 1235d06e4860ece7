"""Tiny random checkpoints, written by diffusers and transformers themselves.

They are odd on purpose (two levels of unequal width, a level without cross attention,
sizes that are no powers of two) and no weight in them is zero or at its default, so a
swapped scale or a forgotten bias shows.
"""

import json
from pathlib import Path

import diffusers
import torch
import transformers

UNET = {
  "sample_size": 8,
  "in_channels": 4,
  "out_channels": 4,
  "block_out_channels": (32, 64),
  "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
  "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
  "layers_per_block": 1,
  "attention_head_dim": 4,
  "cross_attention_dim": 24,
  "norm_num_groups": 8,
}
VAE = {
  "sample_size": 16,
  "block_out_channels": (16, 24),
  "down_block_types": ("DownEncoderBlock2D",) * 2,
  "up_block_types": ("UpDecoderBlock2D",) * 2,
  "layers_per_block": 1,
  "latent_channels": 4,
  "norm_num_groups": 8,
  "scaling_factor": 0.18215,
}
TEXT = {
  "hidden_size": 24,
  "intermediate_size": 52,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "max_position_embeddings": 77,
  "hidden_act": "quick_gelu",
  "bos_token_id": 0,
  "eos_token_id": 2,
}
SCHEDULER = {
  "_class_name": "PNDMScheduler",
  "_diffusers_version": "0.6.0",
  "beta_end": 0.012,
  "beta_schedule": "scaled_linear",
  "beta_start": 0.00085,
  "clip_sample": False,
  "num_train_timesteps": 1000,
  "prediction_type": "epsilon",
  "set_alpha_to_one": False,
  "skip_prk_steps": True,
  "steps_offset": 1,
  "trained_betas": None,
}
# What a tiny checkpoint of the other families has otherwise.
SD2 = {
  "unet": {
    "attention_head_dim": (2, 4),
    "use_linear_projection": True,
    "upcast_attention": True,
  },
  "text": {"hidden_act": "gelu"},
  "scheduler": {
    "_class_name": "DDIMScheduler",
    "prediction_type": "v_prediction",
    "skip_prk_steps": None,
  },
}
SDXL = {
  "unet": {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 2),
    "use_linear_projection": True,
    "cross_attention_dim": 24 + 16,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 10,
  },
  "vae": {"scaling_factor": 0.13025},
  "scheduler": {
    "_class_name": "EulerDiscreteScheduler",
    "interpolation_type": "linear",
    "set_alpha_to_one": None,
    "skip_prk_steps": None,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
  },
}
TEXT_2 = {
  "hidden_size": 16,
  "intermediate_size": 30,
  "num_hidden_layers": 2,
  "num_attention_heads": 2,
  "projection_dim": 10,
  "hidden_act": "gelu",
  "bos_token_id": 0,
}
MERGES = ("a n", "t h", "th e</w>", "r e", "re d</w>", "an d</w>", "o n</w>", "i n")


def perturb(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
  """Moves every parameter off its default, deterministically; returns the module."""
  generator = torch.Generator().manual_seed(seed)
  with torch.no_grad():
    for parameter in module.parameters():
      noise = torch.randn(parameter.shape, generator=generator)
      if parameter.ndim > 1:
        fan_in = parameter[0].numel()
        parameter.copy_(noise / fan_in**0.5)
      else:
        parameter.mul_(1 + 0.1 * noise).add_(0.05 * noise.flip(0))
  return module.eval()


def bpe() -> tuple[dict[str, int], list[str]]:
  """The vocabulary and merges of a byte-level BPE in CLIP's layout."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  rest = [256 + i for i in range(256 - len(printable))]
  symbols = [chr(code) for code in printable + rest]
  words = symbols + [s + "</w>" for s in symbols]
  words += [merge.replace(" ", "") for merge in MERGES]
  words += ["<|startoftext|>", "<|endoftext|>"]
  return {word: index for index, word in enumerate(words)}, list(MERGES)


def save_tokenizer(path: Path, pad_token: str = "<|endoftext|>") -> int:
  """Writes a CLIP tokenizer in its published files; returns the vocabulary's size."""
  path.mkdir(parents=True)
  vocabulary, merges = bpe()
  (path / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
  (path / "merges.txt").write_text(
    "\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8"
  )
  special = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": pad_token,
  }
  (path / "special_tokens_map.json").write_text(json.dumps(special))
  config = {
    **special,
    "add_prefix_space": False,
    "do_lower_case": True,
    "errors": "replace",
    "model_max_length": 77,
    "tokenizer_class": "CLIPTokenizer",
  }
  (path / "tokenizer_config.json").write_text(json.dumps(config))
  return len(vocabulary)


def save_tiny_checkpoint(
  path, *, seed=0, unet=None, vae=None, text=None, scheduler=None
) -> Path:
  """Writes a tiny Stable Diffusion 1.x pipeline as a diffusers directory.

  Args:
    path: the directory to make.
    seed: decides every weight.
    unet, vae, text, scheduler: config fields that replace the defaults above.

  Returns:
    `path`, a `pathlib.Path`.
  """
  path = Path(path)
  # PyTorch draws what `perturb` starts from, else from whatever tests ran before.
  torch.manual_seed(seed)
  vocabulary_size = save_tokenizer(path / "tokenizer")
  text_config = {"vocab_size": vocabulary_size, **TEXT, **(text or {})}
  components = {
    "unet": diffusers.UNet2DConditionModel(**{**UNET, **(unet or {})}),
    "vae": diffusers.AutoencoderKL(**{**VAE, **(vae or {})}),
    "text_encoder": transformers.CLIPTextModel(
      transformers.CLIPTextConfig(**text_config)
    ),
  }
  for index, (name, module) in enumerate(components.items()):
    perturb(module, 10 * seed + index).save_pretrained(path / name)
  folder = path / "scheduler"
  folder.mkdir()
  config = {**SCHEDULER, **(scheduler or {})}
  config = {key: value for key, value in config.items() if value is not None}
  (folder / "scheduler_config.json").write_text(json.dumps(config, indent=2))
  index = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.6.0",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", config["_class_name"]],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
  }
  (path / "model_index.json").write_text(json.dumps(index, indent=2))
  return path


def save_tiny_sdxl_checkpoint(path, *, seed=0, unet=None) -> Path:
  """Writes a tiny Stable Diffusion XL pipeline; see `save_tiny_checkpoint`."""
  changed = {**SDXL, "unet": {**SDXL["unet"], **(unet or {})}}
  path = save_tiny_checkpoint(path, seed=seed, **changed)
  size = save_tokenizer(path / "tokenizer_2", pad_token="!")
  config = transformers.CLIPTextConfig(vocab_size=size, eos_token_id=size - 1, **TEXT_2)
  encoder = transformers.CLIPTextModelWithProjection(config)
  perturb(encoder, 10 * seed + 3).save_pretrained(path / "text_encoder_2")
  index = json.loads((path / "model_index.json").read_text())
  for name in ("safety_checker", "requires_safety_checker"):
    del index[name]
  index |= {
    "_class_name": "StableDiffusionXLPipeline",
    "force_zeros_for_empty_prompt": True,
    "image_encoder": [None, None],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
  }
  (path / "model_index.json").write_text(json.dumps(index, indent=2))
  return path
