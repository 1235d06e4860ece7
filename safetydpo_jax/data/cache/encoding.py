"""Images and captions → what a pair cache stores: VAE moments and token ids.

The VAE sees an image and its mirror image, in batches of one size on all local devices.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from safetydpo_jax.data.images import load_image
from safetydpo_jax.data.sources.pairs import SLOTS, Image, SourcePair
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.models.vae import AutoencoderKL

_THREADS = 4  # decode images while the devices compute


def tokenize(
  pipeline: Pipeline, pairs: Sequence[SourcePair]
) -> tuple[np.ndarray, np.ndarray, int]:
  """All captions' token ids.

  Returns:
    (pairs, encoders, 2, tokens) int32 with zeros for missing captions; (encoders,
    tokens) of the empty caption; how many captions have more tokens and are cut.
  """
  filled = [
    (number, slot)
    for number, pair in enumerate(pairs)
    for slot, caption in enumerate(pair.captions)
    if caption is not None
  ]
  texts = [str(pairs[number].captions[slot]) for number, slot in filled]
  tokens = np.stack(pipeline.tokenize([*texts, ""]), axis=1)
  ids, empty = tokens[:-1], tokens[-1]
  token_ids = np.zeros((len(pairs), ids.shape[1], len(SLOTS), ids.shape[2]), np.int32)
  for (number, slot), row in zip(filled, ids):
    token_ids[number, :, slot] = row
  limits = np.array(pipeline.token_limits)[:, None]
  cut = (pipeline.count_tokens([*texts, ""]) > limits).any(axis=0)
  return token_ids, empty, int(cut.sum())


def make_encoder(pipeline: Pipeline, batch_size: int):
  """A function from pixels to moments on all local devices.

  Returns:
    The function: (n, H, W, 3) uint8 with n ≤ the size below → (n, 2, h, w, 2c) float16,
    axis 1 the image and its mirror image. And the size: `batch_size` rounded up to
    pairs and devices; smaller batches are padded, so it is compiled once.
  """
  devices = jax.local_devices()
  axis_types = (AxisType.Auto,)
  mesh = jax.make_mesh((len(devices),), ("data",), axis_types, devices=devices)
  rows = NamedSharding(mesh, PartitionSpec("data"))
  params = jax.device_put(pipeline.params["vae"], NamedSharding(mesh, PartitionSpec()))
  unit = math.lcm(2, len(devices))
  size = -(-batch_size // unit) * unit
  encode = _jit_encode(pipeline.vae, rows)

  def encode_both(images):
    padded = np.zeros((size, *images.shape[1:]), np.uint8)
    padded[: len(images)] = images
    both = [
      encode(params, jax.device_put(np.ascontiguousarray(x), rows))
      for x in (padded, padded[:, :, ::-1])
    ]
    return np.stack([np.asarray(x)[: len(images)] for x in both], axis=1)

  return encode_both, size


@functools.lru_cache(maxsize=4)  # one program for the toy world's many caches
def _jit_encode(
  vae: AutoencoderKL, rows: NamedSharding
) -> Callable[[dict[str, Any], jax.Array], jax.Array]:
  """The jitted (params, pixels) → moments."""

  def encode(params, images):
    pixels = images.astype(jnp.float32) / 127.5 - 1
    moments: Any = vae.apply({"params": params}, pixels, method="encode")
    return moments.astype(jnp.float16)

  return jax.jit(encode, out_shardings=rows)


def encode_pairs(
  pairs: Sequence[SourcePair],
  resolution: int,
  encode: Callable[[np.ndarray], np.ndarray],
  size: int,
  progress: tqdm,
  skipped: dict[str, str] | None = None,
) -> Iterator[np.ndarray | None]:
  """Yields each pair's moments, (2 flip, 2 pair, h, w, 2c) float16, in order.

  Images are decoded by a few threads, one batch ahead of the devices.

  Args:
    pairs: what to encode.
    resolution: pixels per side.
    encode, size: see `make_encoder`.
    progress: advanced by images.
    skipped: takes {id: why} of a pair whose image cannot be read, for which None is
      yielded. If None: that is an error.

  Raises:
    InputError: an image cannot be read, or its moments are not finite.
  """
  files = [file for pair in pairs for file in (pair.preferred, pair.dispreferred)]
  options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=2 * size)
  load = functools.partial(_load, resolution=resolution, forgiving=skipped is not None)
  images = iter(grain.MapDataset.source(files).map(load).to_iter_dataset(options))
  for start in range(0, len(files), size):
    block = slice(start, start + size)
    pixels, faults = zip(*(next(images) for _ in files[block]))
    moments = encode(np.stack(pixels))
    for row, file in enumerate(files[block]):
      if not np.isfinite(moments[row]).all():
        raise InputError(
          f"the VAE's moments of {file} are not finite in float16; use --dtype float32 "
          "or a VAE made for half precision (for SDXL: madebyollin/sdxl-vae-fp16-fix)"
        )
    progress.update(len(pixels))
    pair_axis = moments.reshape(-1, 2, *moments.shape[1:])
    for row, pair in enumerate(pairs[start // 2 : start // 2 + len(pair_axis)]):
      fault = faults[2 * row] or faults[2 * row + 1]
      if fault and skipped is not None:
        skipped[pair.id] = fault
      yield None if fault else pair_axis[row].swapaxes(0, 1)


def _load(
  image: Image, resolution: int, forgiving: bool
) -> tuple[np.ndarray, str | None]:
  """Pixels and None; of an image that is skipped, black ones and why."""
  try:
    return load_image(image, resolution), None
  except InputError as error:
    if not forgiving:
      raise
    return np.zeros((resolution, resolution, 3), np.uint8), str(error)
