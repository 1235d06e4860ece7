"""CLIP embeddings of images and texts, prepared as OpenAI's code and OpenCLIP do it.

The shorter side is resized bicubically with antialiasing (the longer one is rounded
down) and the centre cropped; then, on the device, x ← (x / 255 - mean) / standard
deviation.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from safetydpo_jax.data.images import crop_square
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.clip.files import Clip
from safetydpo_jax.metrics import provenance
from safetydpo_jax.metrics.extraction import Extractor, make_extractor


def prepare(image: Image.Image, size: int) -> np.ndarray:
  """CLIP's input, the central square, (size, size, 3) uint8."""
  square = crop_square(image.convert("RGB"), size, Image.Resampling.BICUBIC)
  return np.asarray(square)


def image_extractor(model: Clip, mesh: Mesh | None, per_device: int) -> Extractor:
  """(n, size, size, 3) uint8 → image embeddings (n, e) float32, not normalised."""
  mean, std = (jnp.asarray(v)[None, None, None] for v in (model.mean, model.std))
  tower = model.towers["vision"]

  def apply(params, pixels):
    images = (pixels.astype(jnp.float32) / 255 - mean) / std
    return tower.apply({"params": params}, images)

  return make_extractor(apply, model.params["vision"], mesh=mesh, per_device=per_device)


def text_extractor(model: Clip, mesh: Mesh | None, per_device: int) -> Extractor:
  """Token ids (n, length) int32 → text embeddings (n, e) float32, not normalised."""
  tower = model.towers["text"]

  def apply(params, ids):
    encoded: Any = tower.apply({"params": params}, ids)
    return encoded.pooled

  return make_extractor(
    apply,
    model.params["text"],
    mesh=mesh,
    per_device=per_device,
  )


def check_batch(batch: np.ndarray, size: int) -> None:
  """Raises `InputError` unless a batch is (n, size, size, 3) uint8."""
  if batch.dtype != np.uint8 or batch.shape[1:] != (size, size, 3):
    raise InputError(
      f"this CLIP takes images of (n, {size}, {size}, 3) uint8, not {batch.shape} "
      f"{batch.dtype}; make them with prepare(image, model)"
    )


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """The cosine of every row of a (n, d) with every row of b (m, d): (n, m) float64."""
  a, b = (np.asarray(x, np.float64) for x in (a, b))
  a, b = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (a, b))
  return a @ b.T


def about(model: Clip) -> dict[str, Any]:
  """A CLIP's weight files, for figures.json."""
  return {"clip": [provenance.describe(file) for file in model.files]}
