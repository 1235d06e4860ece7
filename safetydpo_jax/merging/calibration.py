"""Calibration inputs of Co-Merge: which pairs, under which caption, at which timesteps.

They come from a pair cache: the same number of pairs of every category, each under one
of its captions and not mirrored, both images of a pair, every pair at every timestep. A
category's pairs depend on the cache, the seed and its name alone, so an expert that is
added later can be measured on the inputs of the earlier ones.
"""

import zlib
from typing import NamedTuple

import chex
import numpy as np

from safetydpo_jax.data.cache.batches import Draw
from safetydpo_jax.data.cache.records import PairCache
from safetydpo_jax.errors import InputError


class Batch(NamedTuple):
  """Calibration inputs; a pair at a timestep makes two, one of each image.

  Attributes:
    moments: (B, 2, h, w, 2c) float16.
    token_ids: for each text encoder (B, 77) int32.
    pairs: (B,) int32, which of the calibration's pairs.
    timesteps: (B,) int32.
    time_ids: (B, 6) int32 for SDXL, else None.
  """

  moments: chex.Array
  token_ids: tuple[chex.Array, ...]
  pairs: chex.Array
  timesteps: chex.Array
  time_ids: chex.Array | None = None


def categories_of(cache: PairCache) -> list[str]:
  """The categories of a cache's pairs; ["all"] if they have none."""
  encoded = cache.manifest.get("category", "all")
  if encoded != "all":
    return [encoded]
  return sorted({tag for entry in cache.index for tag in entry.categories}) or ["all"]


def choose_pairs(cache: PairCache, count: int, seed: int) -> list[Draw]:
  """`count` pairs of each category of a cache, each under one of its captions.

  Images are not mirrored and captions not dropped. A category's pairs depend on the
  seed and its name alone.

  Raises:
    InputError: the cache is empty, or a category has fewer pairs.
  """
  if not len(cache):
    raise InputError(f"{cache.path} holds no pairs; encode some for --calibration")
  chosen = []
  for category in categories_of(cache):
    examples = cache.select(category)
    rng = np.random.default_rng([seed, zlib.crc32(category.encode())])
    examples = rng.permutation(examples)
    _, first = np.unique(examples[:, 0], return_index=True)
    if len(first) < count:
      raise InputError(
        f"{cache.path} has {len(first)} pairs of category {category}, --pairs is "
        f"{count}; lower it, or encode more"
      )
    chosen += [examples[row] for row in sorted(first)[:count]]
  return [Draw(int(record), int(slot), (0, 0), False) for record, slot in chosen]


def default_timesteps(total: int, count: int = 4) -> list[int]:
  """`count` timesteps in the middles of equal parts: 125, 375, 625, 875 of 1000."""
  return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def parse_timesteps(text: str | None, total: int) -> list[int]:
  """`100,500` → ascending timesteps below `total`; None: `default_timesteps`.

  Raises:
    InputError: for anything else.
  """
  if text is None:
    return default_timesteps(total)
  try:
    numbers = sorted({int(number) for number in text.split(",")})
  except ValueError:
    numbers = [-1]
  if numbers[0] < 0 or numbers[-1] >= total:
    raise InputError(
      f"--timesteps is {text!r}; expected whole numbers from 0 to {total - 1}, "
      "separated by commas"
    )
  return numbers
