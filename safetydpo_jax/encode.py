"""Images and prompts → a pair cache: `python -m safetydpo_jax.encode`.

In: a dataset of preference pairs (layouts in `data/layouts.py`) and a Stable Diffusion
checkpoint. Out: a cache (`data/records.py`) with the VAE's posterior moments of every
image and of its mirror image, and the prompts' token ids, which training never has to
compute again.

A stopped encode goes on where it stopped when the same command runs again: shards are
complete or not there, and each is encoded on its own. With several processes each
encodes every n-th shard, and process 0 completes the cache.
"""

import argparse
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from safetydpo_jax import sharding
from safetydpo_jax.data import categories, layouts, records, shards
from safetydpo_jax.data.images import load_image
from safetydpo_jax.data.layouts import SLOTS, SourcePair
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.formats import manifest, weights
from safetydpo_jax.formats.pipeline import Pipeline, load_pipeline

EXAMPLE = """example:
  python -m safetydpo_jax.encode --model sd15 --pairs CoProV2 --out cache/sd15
"""
_THREADS = 4  # decode images while the devices compute


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.encode",
    description="Encodes preference pairs once, for any number of training runs.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--model", required=True, help="diffusers directory, hub id or sd15, sd21, sdxl")
  add("--pairs", required=True, help="dataset: metadata.jsonl or CSV, with images")
  add("--out", required=True, type=Path, help="folder of the cache")
  add("--resolution", type=int, help="pixels per side (default: the model's own)")
  add("--category", help="keep the pairs of one category (default: all)")
  add("--batch_size", type=int, default=8, help="images per VAE call (default: 8)")
  add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the VAE")
  add("--shard_size", type=int, default=1024, help="pairs per file (default: 1024)")
  add("--variant", help='of the weight files, for example "fp16"')
  return parser.parse_args(arguments)


def select_pairs(
  dataset: str, category: str | None
) -> tuple[list[SourcePair], dict[str, int]]:
  """The dataset's pairs of a category, and counts of what was kept and dropped."""
  name = categories.selection(category)
  pairs, counts = layouts.read_pairs(dataset)
  kept = [pair for pair in pairs if name is None or name in pair.categories]
  if not kept:
    there = sorted({tag for pair in pairs for tag in pair.categories})
    raise InputError(
      f"{dataset} has no pairs of category {name}; it has {', '.join(there) or 'none'}"
    )
  captions = sum(caption is not None for pair in kept for caption in pair.captions)
  return kept, {
    **counts._asdict(),
    "pairs": len(kept),
    "captions": captions,
    "other_categories": len(pairs) - len(kept),
  }


def make_settings(
  arguments: argparse.Namespace, pipeline: Pipeline, pairs: Sequence[SourcePair]
) -> dict[str, Any]:
  """What decides the bytes of a cache; goes into plan.json and the manifest.

  Raises:
    InputError: an argument is out of range.
  """
  resolution = pipeline.resolution
  if arguments.resolution is not None:
    resolution = arguments.resolution
  if resolution < 1 or resolution % pipeline.vae_scale:
    raise InputError(
      f"--resolution {resolution} is no multiple of {pipeline.vae_scale}, the pixels "
      f"per latent of {arguments.model}"
    )
  for name in ("batch_size", "shard_size"):
    if getattr(arguments, name) < 1:
      raise InputError(f"--{name} is {getattr(arguments, name)}, expected 1 or more")
  side = resolution // pipeline.vae_scale
  vae_files = weights.weight_files(pipeline.path / "vae", arguments.variant)
  return {
    "format": records.FORMAT_VERSION,
    "base": pipeline.fingerprint,
    "vae": weights.fingerprint(weights.read_tensors(vae_files)),
    "vae_dtype": arguments.dtype,
    "scaling_factor": pipeline.scaling_factor,
    "resolution": resolution,
    "latent_shape": [side, side, pipeline.latent_channels],
    "category": categories.selection(arguments.category) or "all",
    "dataset": layouts.fingerprint(pairs),
    "batch_size": arguments.batch_size,
    "shard_size": arguments.shard_size,
  }


def check_out(out: Path, settings: dict[str, Any], files: Sequence[Path]) -> bool:
  """Whether `out` is a finished cache of these settings; starts one if it is new.

  Raises:
    InputError: `out` was started with other settings, or cannot be written.
  """
  finished = (out / records.MANIFEST).is_file()
  plan = out / (records.MANIFEST if finished else records.PLAN)
  if any(out.glob("pairs-*")):  # else a plan may be replaced: nothing has come of it
    before = manifest.read_json(plan, "pair cache")
    for name, value in settings.items():
      if before.get(name) != value:
        raise InputError(
          f"{out} holds a cache with {name} {before.get(name)!r}, now it is {value!r}; "
          "choose another --out, or delete it"
        )
  if finished and all(file.is_file() for file in (*files, out / records.INDEX)):
    return True
  if jax.process_index() == 0:
    try:
      out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise InputError(f"cannot make the folder {out}: {error.strerror}") from error
    manifest.write_json(out / records.PLAN, settings)
  return False


def tokenize(
  pipeline: Pipeline, pairs: Sequence[SourcePair]
) -> tuple[np.ndarray, np.ndarray, int]:
  """All captions' token ids.

  Returns:
    (pairs, encoders, 2, tokens) int32 with zeros for missing captions; (encoders,
    tokens) of the empty caption; how many captions fill the last token, which longer
    ones are cut to.
  """
  places = [
    (number, slot)
    for number, pair in enumerate(pairs)
    for slot, caption in enumerate(pair.captions)
    if caption is not None
  ]
  texts = [pairs[number].captions[slot] for number, slot in places]
  tokens = np.stack(pipeline.tokenize([*texts, ""]), axis=1)
  ids, empty = tokens[:-1], tokens[-1]
  token_ids = np.zeros((len(pairs), ids.shape[1], len(SLOTS), ids.shape[2]), np.int32)
  for (number, slot), row in zip(places, ids):
    token_ids[number, :, slot] = row
  end = pipeline.tokenizers[0].eos_token_id
  full = (ids[:, 0, -1] == end) & (ids[:, 0, -2] != end)
  return token_ids, empty, int(full.sum())


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

  @functools.partial(jax.jit, out_shardings=rows)
  def encode(params, images):
    pixels = images.astype(jnp.float32) / 127.5 - 1
    moments = pipeline.vae.apply({"params": params}, pixels, method="encode")
    return moments.astype(jnp.float16)

  def encode_both(images):
    padded = np.zeros((size, *images.shape[1:]), np.uint8)
    padded[: len(images)] = images
    both = [
      encode(params, jax.device_put(np.ascontiguousarray(x), rows))
      for x in (padded, padded[:, :, ::-1])
    ]
    return np.stack([np.asarray(x)[: len(images)] for x in both], axis=1)

  return encode_both, size


def encode_pairs(
  pairs: Sequence[SourcePair], resolution: int, encode: Any, size: int, progress: tqdm
) -> Iterator[np.ndarray]:
  """Yields each pair's moments, (2 flip, 2 pair, h, w, 2c) float16, in order.

  Images are decoded by a few threads, one batch ahead of the devices.

  Raises:
    InputError: an image cannot be read, or its moments are not finite.
  """
  files = [file for pair in pairs for file in (pair.preferred, pair.dispreferred)]
  options = grain.ReadOptions(num_threads=_THREADS, prefetch_buffer_size=2 * size)
  load = functools.partial(load_image, resolution=resolution)
  images = iter(grain.MapDataset.source(files).map(load).to_iter_dataset(options))
  for start in range(0, len(files), size):
    batch = np.stack([next(images) for _ in files[start : start + size]])
    moments = encode(batch)
    for row, file in enumerate(files[start : start + size]):
      if not np.isfinite(moments[row]).all():
        raise InputError(
          f"the VAE's moments of {file} are not finite in float16; use --dtype float32 "
          "or a VAE made for half precision (for SDXL: madebyollin/sdxl-vae-fp16-fix)"
        )
    progress.update(len(batch))
    pair_axis = moments.reshape(-1, 2, *moments.shape[1:])
    yield from pair_axis.swapaxes(1, 2)


def main(arguments: list[str] | None = None) -> None:
  """Reads, encodes, completes: in the order things happen."""
  arguments = parse_arguments(arguments)
  sharding.initialize_hosts()
  sharding.use_precision(arguments.dtype)
  pairs, counts = select_pairs(arguments.pairs, arguments.category)
  pipeline = load_pipeline(
    arguments.model,
    components=("vae",),
    dtype=jnp.dtype(arguments.dtype),
    variant=arguments.variant,
  )
  settings = make_settings(arguments, pipeline, pairs)
  out, shard_size = arguments.out, arguments.shard_size
  files = [out / name for name in shards.shard_names(len(pairs), shard_size)]
  if check_out(out, settings, files):
    print(f"{out} is complete already: {counts['pairs']} pairs")
    return
  multihost_utils.sync_global_devices("the cache's folder is there")

  token_ids, empty_token_ids, counts["truncated"] = tokenize(pipeline, pairs)
  fields = shards.record_fields(settings["latent_shape"], *empty_token_ids.shape)
  encode, size = make_encoder(pipeline, arguments.batch_size)
  todo = [
    (file, slice(number * shard_size, (number + 1) * shard_size))
    for number, file in enumerate(files)
    if number % jax.process_count() == jax.process_index() and not file.is_file()
  ]
  total = 2 * sum(len(pairs[block]) for _, block in todo)
  with tqdm(total=total, unit=" images", disable=jax.process_index() > 0) as progress:
    for file, block in todo:
      moments = encode_pairs(
        pairs[block], settings["resolution"], encode, size, progress
      )
      rows = zip(moments, token_ids[block], pairs[block])
      shards.write_shard(
        file,
        (
          shards.pack(fields, {"moments": m, "token_ids": ids}, pair.about())
          for m, ids, pair in rows
        ),
      )
  multihost_utils.sync_global_devices("all shards are there")

  if jax.process_index() == 0:
    abouts = [pair.about() for pair in pairs]
    records.complete_cache(
      out,
      settings,
      [records.Entry(a["id"], a["categories"], tuple(a["captions"])) for a in abouts],
      fields,
      model=pipeline.name,
      counts=counts,
      empty_token_ids=empty_token_ids.tolist(),
    )
    print(
      f"{out}: {counts['pairs']} pairs with {counts['captions']} captions "
      f"({counts['truncated']} at the limit of {empty_token_ids.shape[1]} tokens); of "
      f"{counts['rows']} rows {counts['ties']} ties and {counts['repeated']} repeats "
      f"dropped, {counts['other_categories']} pairs of other categories"
    )


if __name__ == "__main__":
  run_command(main)
