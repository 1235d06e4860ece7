"""CLIPScore: does the image show what its prompt says?

    score = 100 · cosine(image embedding, text embedding)

with OpenCLIP's ViT-H/14 of laion2b_s32b_b79k, unless another CLIP is named. Not
clipped at zero and not multiplied by 2.5 as in Hessel et al. (2021): papers on safe
generation report the plain cosine, and clipping changes nothing where the mean is far
above zero.

Prompts are cleaned as OpenCLIP's tokenizer does (`data/cleaning.py`), so that a curly
quotation mark gives the same tokens; "!" is a word also with a tokenizer that pads with
it (`formats/clip/files.py`).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from safetydpo_jax.data import cleaning
from safetydpo_jax.formats.clip.files import Clip, load_clip, tokenize
from safetydpo_jax.metrics import clip_features
from safetydpo_jax.metrics.extraction import Extractor

CLIP = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"


@dataclasses.dataclass(frozen=True)
class ClipScore:
  """The metric; made by `load`.

  Attributes:
    about: its weights and settings, as JSON.
    clip: the model, for its tokenizer; the extractors have its weights.
    image_size: pixels per side of its input.
    extract_images, extract_texts: pixels or token ids → embeddings.
  """

  about: dict[str, Any]
  clip: Clip = dataclasses.field(repr=False)
  image_size: int
  extract_images: Extractor = dataclasses.field(repr=False)
  extract_texts: Extractor = dataclasses.field(repr=False)


def load(
  clip: str | Path = CLIP,
  *,
  tokenizer: str | Path | None = None,
  mesh: Mesh | None = None,
  per_device: int = 8,
) -> ClipScore:
  """Reads a CLIP; see `load_clip` and `extraction.make_extractor`.

  Raises:
    InputError: ftfy is not installed, or a file is missing or damaged.
  """
  cleaning.load_ftfy()
  model = load_clip(clip, tokenizer=tokenizer)
  return ClipScore(
    about={
      "name": "CLIPScore",
      "scale": 100,
      "clipped": False,
      **clip_features.about(model),
    },
    clip=dataclasses.replace(model, params={}),
    image_size=model.image_size,
    extract_images=clip_features.image_extractor(model, mesh, per_device),
    extract_texts=clip_features.text_extractor(model, mesh, per_device),
  )


def prepare(image: Image.Image, model: ClipScore | None = None) -> np.ndarray:
  """An RGB image as OpenCLIP's preprocessing crops it, (224, 224, 3) uint8.

  `model` is needed if its size is not ViT-H/14's 224.
  """
  return clip_features.prepare(image, model.image_size if model else 224)


def features(model: ClipScore, batch: np.ndarray) -> np.ndarray:
  """Prepared images (n, h, w, 3) uint8 → image embeddings (n, e) float32."""
  clip_features.check_batch(batch, model.image_size)
  return model.extract_images(batch)


def text_features(model: ClipScore, prompts: Sequence[str]) -> np.ndarray:
  """Prompts → text embeddings (n, e) float32."""
  cleaned = [cleaning.clean(prompt) for prompt in prompts]
  return model.extract_texts(tokenize(model.clip, cleaned))


def scores(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
  """100 · cosine of each image with its own prompt, (n, e) twice → (n,) float64."""
  if image_features.shape != text_features.shape:
    raise ValueError(f"{image_features.shape} images, {text_features.shape} prompts")
  images, texts = (
    np.asarray(x, np.float64) / np.linalg.norm(x, axis=-1, keepdims=True)
    for x in (image_features, text_features)
  )
  return 100 * (images * texts).sum(-1)
