"""Image features per second of a CLIP: `python benchmarks/clip_features.py`.

The vision tower of ViT-L/14 (Q16) or ViT-H/14 (CLIPScore) with the same random weights
in our code and in PyTorch's transformers, float32 on the same host, in one run. Prints
both speeds and the largest difference of a cosine; without PyTorch only ours.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from safetydpo_jax.formats.base_model import weights
from safetydpo_jax.formats.clip import open_clip
from safetydpo_jax.formats.clip.files import tower_shapes
from safetydpo_jax.metrics import clip_features
from safetydpo_jax.metrics.extraction import make_extractor
from safetydpo_jax.models.clip_vision import CLIPVision
from safetydpo_jax.models.config import freeze

VIT_L_14 = {
  "hidden_size": 1024,
  "intermediate_size": 4096,
  "num_hidden_layers": 24,
  "num_attention_heads": 16,
  "patch_size": 14,
  "image_size": 224,
  "hidden_act": "quick_gelu",
  "projection_dim": 768,
}
_VIT_H_14 = open_clip.config_of(open_clip.VIT_H_14)
TOWERS = {
  "ViT-L-14": VIT_L_14,
  "ViT-H-14": {**_VIT_H_14["vision_config"], "projection_dim": 1024},
}


def random_params(tower: CLIPVision) -> dict:
  """Random weights that keep the signal's size."""
  rng = np.random.default_rng(0)

  def draw(leaf):
    noise = rng.standard_normal(leaf.shape, np.float32)
    return noise / np.float32(np.prod(leaf.shape[:-1])) ** 0.5

  return jax.tree.map(draw, tower_shapes(tower))


def measure(run, batch: np.ndarray, repeats: int) -> tuple[float, np.ndarray]:
  """(images per second in the best of `repeats`, features), after a warm-up."""
  features, seconds = run(batch), []
  for _ in range(repeats):
    start = time.perf_counter()
    run(batch)
    seconds.append(time.perf_counter() - start)
  return len(batch) / min(seconds), features


def build_torch(config: dict, params: dict):
  """transformers' tower with the same weights, as a function of the same batch."""
  import torch
  import transformers
  from flax.traverse_util import flatten_dict

  theirs = transformers.CLIPVisionModelWithProjection(
    transformers.CLIPVisionConfig(**config)
  ).eval()
  state = theirs.state_dict()
  for path, leaf in flatten_dict(params).items():
    name = weights.torch_name(path)
    name = name if name in state else f"vision_model.{name}"
    if path[-1] == "kernel":
      leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
    state[name].copy_(torch.from_numpy(np.ascontiguousarray(leaf)))

  def run(batch):
    with torch.inference_mode():
      pixels = torch.from_numpy(batch.transpose(0, 3, 1, 2))
      return theirs(pixel_values=pixels).image_embeds.numpy()

  return run


def main() -> None:
  parser = argparse.ArgumentParser(
    description="Speed of CLIP's image features, ours and PyTorch's.",
    epilog="example: python benchmarks/clip_features.py --tower ViT-L-14 --images 16",
  )
  parser.add_argument("--tower", default="ViT-L-14", choices=TOWERS)
  parser.add_argument("--images", type=int, default=16)
  parser.add_argument("--per_device", type=int, default=8)
  parser.add_argument("--repeats", type=int, default=3)
  options = parser.parse_args()
  config = TOWERS[options.tower]
  tower = CLIPVision(freeze(config), jnp.float32)
  params = random_params(tower)
  shape = (options.images, *(config["image_size"],) * 2, 3)
  batch = np.random.default_rng(1).standard_normal(shape, np.float32)
  ours = make_extractor(
    lambda params, images: tower.apply({"params": params}, images),
    params,
    per_device=options.per_device,
  )
  speed, features = measure(ours, batch, options.repeats)
  device = jax.devices()[0]
  print(f"{options.tower}, float32, {options.images} images of {config['image_size']}²")
  print(f"ours    {speed:8.2f} images/s on {jax.device_count()} × {device.device_kind}")
  try:
    theirs = build_torch(config, params)
  except ImportError as error:
    print(f"PyTorch is left out: {error}")
    return
  speed, expected = measure(theirs, batch, options.repeats)
  print(f"PyTorch {speed:8.2f} images/s on the CPU")
  cosines = np.diag(clip_features.cosines(features, expected))
  print(f"largest 1 - cosine: {1 - cosines.min():.1e}")


if __name__ == "__main__":
  main()
