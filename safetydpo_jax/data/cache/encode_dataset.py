"""Images and prompts → a pair cache.

In: a dataset of preference pairs (layouts in `data/sources/layouts.py`) and a Stable
Diffusion checkpoint. Out: a cache (`data/cache/records.py`) with the VAE's posterior
moments of every image and of its mirror image, and the prompts' token ids, so that
training computes neither.

An encode that was stopped resumes when the same command runs again: a shard is complete
or absent, and each is encoded on its own. With n processes, each encodes every n-th
shard, and process 0 completes the cache.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from tqdm import tqdm

from safetydpo_jax.data import categories, cleaning, contact_sheet
from safetydpo_jax.data.cache import encoding, records, resume, shards
from safetydpo_jax.data.sources import layouts
from safetydpo_jax.data.sources.pairs import SourcePair, fingerprint
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline, load_pipeline
from safetydpo_jax.models import conditioning
from safetydpo_jax.runtime import hosts, sharding, storage
from safetydpo_jax.runtime.log import say


@dataclasses.dataclass(frozen=True)
class EncodeOptions:
  """Encodes preference pairs once, for any number of training runs."""

  pairs: str
  """dataset: parquet files, images with metadata.jsonl or CSV, or built by TFDS"""
  model: str | None = None
  """diffusers directory, single file, hub id, or a preset such as sd15"""
  vae: str | None = None
  """another VAE's folder, file or hub id (default: the model's own)"""
  out: str | None = None
  """folder of the cache; like --pairs, it may be a gs:// or s3:// URL"""
  categories: str | None = None
  """CoProV2's CSV (default: the one in --pairs)"""
  resolution: int | None = None
  """pixels per side (default: the model's own)"""
  category: str | None = None
  """keep the pairs of one category (default: all)"""
  on_error: Literal["fail", "skip"] = "fail"
  """what to do with an image or file that cannot be read: stop, or leave it out and
  list it in the cache's manifest"""
  batch_size: int = 8
  """images per VAE call"""
  dtype: Literal["float32", "bfloat16"] = "float32"
  """number type of the VAE's computations"""
  shard_size: int = 1024
  """pairs per file"""
  variant: str | None = None
  """variant of the weight files, such as fp16"""
  fix_text: bool = False
  """repair prompts with ftfy (curly quotes, broken encodings), as transformers did
  before version 5"""
  stats: str | None = None
  """PNG to draw: a contact sheet of random pairs, and counts; if the pairs are a table,
  its images may be missing"""
  no_blur: bool = False
  """do not blur the contact sheet's images"""

  def __post_init__(self):
    if bool(self.model) != bool(self.out) or not (self.out or self.stats):
      raise InputError("--model and --out are needed together, or --stats alone")
    for name in ("batch_size", "shard_size"):
      if getattr(self, name) < 1:
        raise InputError(f"--{name} is {getattr(self, name)}; expected 1 or more")


class Selected(NamedTuple):
  """The pairs to encode.

  Attributes:
    pairs: sorted by id.
    counts: what became of the dataset's rows, by name.
    skipped: a line for each pair or file that could not be read.
  """

  pairs: list[SourcePair]
  counts: dict[str, int]
  skipped: list[str]


def encode_dataset(options: EncodeOptions) -> None:
  """Reads the dataset, draws its contact sheet, encodes it, completes the cache.

  Raises:
    InputError: dataset, model or cache cannot be read, or do not fit each other.
  """
  selected = select_pairs(options)
  if options.stats and jax.process_index() == 0:
    pairs, counts, _ = selected
    picture = contact_sheet.draw_sheet(pairs, counts, blur=not options.no_blur)
    contact_sheet.save_sheet(picture, storage.as_path(options.stats))
    print(f"{options.stats}: {counts['pairs']} pairs")
    rows = contact_sheet.count_rows(pairs, counts)
    print(", ".join(f"{name} {count:,}" for name, count in rows.items() if count))
  if options.out:
    encode_selected(options, selected)


def select_pairs(options: EncodeOptions) -> Selected:
  """The dataset's pairs of --category.

  Raises:
    InputError: the dataset cannot be read, or has no such pairs.
  """
  name = categories.selection(options.category)
  skipped: list[str] = []
  pairs, counts = layouts.read_pairs(
    options.pairs,
    categories_csv=options.categories,
    skipped=skipped if options.on_error == "skip" else None,
    need_images=options.out is not None,
  )
  kept = [pair for pair in pairs if name is None or name in pair.categories]
  if not kept:
    there = sorted({tag for pair in pairs for tag in pair.categories})
    raise InputError(
      f"{options.pairs} has no pairs of category {name}; it has "
      f"{', '.join(there) or 'none; give --categories'}"
    )
  if options.fix_text:
    kept, line = cleaning.fix_captions(kept)
    say(line)
  captions = sum(caption is not None for pair in kept for caption in pair.captions)
  more = {
    "pairs": len(kept),
    "captions": captions,
    "other_categories": len(pairs) - len(kept),
  }
  found = {**counts._asdict(), **more}
  if not counts.without_caption:  # as in the manifests of earlier caches
    del found["without_caption"]
  return Selected(kept, found, skipped)


def encode_selected(options: EncodeOptions, selected: Selected) -> None:
  """Encodes this host's shards that are not there yet; process 0 completes the cache.

  Raises:
    InputError: see `encode_dataset`.
  """
  sharding.use_precision(options.dtype)
  pipeline = load_pipeline(
    str(options.model),
    components=("vae",),
    dtype=jnp.dtype(options.dtype),
    variant=options.variant,
    vae_from=options.vae,
  )
  pairs, counts, _ = selected
  settings = make_settings(options, pipeline, pairs)
  out, shard_size = storage.as_path(str(options.out)), options.shard_size
  files = [out / name for name in shards.shard_names(len(pairs), shard_size)]
  skip = options.on_error == "skip"
  there = resume.list_files(out)
  resume.check_same_settings(out, settings, there)
  lost = resume.count_lost(out, files, there, skip=skip)
  if resume.is_finished(files, there):
    resume.remove_plan(out, there)
    print(f"{out} is complete already: {len(pairs) - lost} pairs")
    return
  resume.start_or_resume(out, settings)
  hosts.wait_for_all("the cache's folder is there")

  token_ids, empty_token_ids, counts["truncated"] = encoding.tokenize(pipeline, pairs)
  fields = shards.record_fields(settings["latent_shape"], *empty_token_ids.shape)
  encode, size = encoding.make_encoder(pipeline, options.batch_size)
  todo = [
    (file, slice(number * shard_size, (number + 1) * shard_size))
    for number, file in enumerate(files)
    if number % jax.process_count() == jax.process_index() and not file.exists()
  ]
  total = 2 * sum(len(pairs[block]) for _, block in todo)
  with tqdm(total=total, unit=" images", disable=jax.process_index() > 0) as progress:
    for file, block in todo:
      faults: dict[str, str] = {}
      encoded = encoding.encode_pairs(
        pairs[block],
        settings["resolution"],
        encode,
        size,
        progress,
        skipped=faults if skip else None,
      )
      rows = zip(encoded, token_ids[block], pairs[block])
      shards.write_shard(file, make_records(file, rows, fields, faults))
  hosts.wait_for_all("all shards are there")
  if jax.process_index() == 0:
    complete(options, selected, pipeline, settings, files, fields, empty_token_ids)


def make_settings(
  options: EncodeOptions, pipeline: Pipeline, pairs: Sequence[SourcePair]
) -> dict[str, Any]:
  """What decides the bytes of a cache; goes into plan.json and the manifest.

  Raises:
    InputError: the VAE cannot encode images of --resolution.
  """
  resolution = options.resolution
  if resolution is None:
    height, width = pipeline.image_size
    if height != width:
      raise InputError(
        f"{options.model} draws {height} × {width} pixels, and pairs are squares; give "
        "--resolution"
      )
    resolution = height
  if resolution < 1 or resolution % pipeline.vae_scale:
    raise InputError(
      f"--resolution {resolution} is not a multiple of {pipeline.vae_scale}, the "
      f"pixels per latent of {options.model}"
    )
  side = resolution // pipeline.vae_scale
  return {
    "format": records.FORMAT_VERSION,
    "base": pipeline.fingerprint,
    "vae": pipeline.vae_fingerprint,
    "vae_dtype": options.dtype,
    "scaling_factor": pipeline.scaling_factor,
    "resolution": resolution,
    "latent_shape": [side, side, pipeline.latent_channels],
    "category": categories.selection(options.category) or "all",
    "dataset": fingerprint(pairs),
    "batch_size": options.batch_size,
    "shard_size": options.shard_size,
  }


def make_records(
  file: epath.Path,
  rows: Iterator[tuple[np.ndarray | None, np.ndarray, SourcePair]],
  fields: Sequence[shards.Field],
  skipped: dict[str, str],
) -> Iterator[bytes]:
  """A shard's records; skipped pairs are noted before the shard is complete."""
  for encoded, token_ids, pair in rows:
    if encoded is not None:
      arrays = {"moments": encoded, "token_ids": token_ids}
      yield shards.pack(fields, arrays, pair.about())
  shards.note_skipped(file, skipped)


def complete(
  options: EncodeOptions,
  selected: Selected,
  pipeline: Pipeline,
  settings: dict[str, Any],
  files: Sequence[epath.Path],
  fields: Sequence[shards.Field],
  empty_token_ids: np.ndarray,
) -> None:
  """Writes index and manifest of a cache whose shards are all there; prints a summary.

  Raises:
    InputError: they cannot be written, or every pair was skipped.
  """
  pairs, counts, skipped = selected
  out, side = files[0].parent, settings["resolution"]
  sized = len(pipeline.text_encoders) == 2
  faults = shards.read_skipped(files)
  lost = [pair for pair in pairs if pair.id in faults]
  counts = {
    **counts,
    "skipped": counts["skipped"] + len(lost),
    "pairs": counts["pairs"] - len(lost),
    "captions": counts["captions"] - sum(len(x.about()["captions"]) for x in lost),
  }
  skipped = skipped + [f"{id}: {why}" for id, why in faults.items()]
  records.complete_cache(
    out,
    # Which captions it is made of is in their fingerprint already.
    {**settings, **({"fix_text": True} if options.fix_text else {})},
    [records.entry(pair) for pair in pairs],
    fields,
    without=faults,
    model=pipeline.name,
    counts=counts,
    skipped=skipped,
    empty_token_ids=empty_token_ids.tolist(),
    time_ids=conditioning.make_time_ids(side, side) if sized else None,
  )
  print(
    f"{out}: {counts['pairs']} pairs with {counts['captions']} captions "
    f"({counts['truncated']} cut at {empty_token_ids.shape[1]} tokens); of "
    f"{counts['rows']} rows {counts['ties']} ties and {counts['repeated']} repeats "
    f"dropped, {counts['other_categories']} pairs of other categories"
  )
  if skipped:
    rows = counts.get("without_caption", 0)
    left = [f"{counts['skipped']} pairs"] * (counts["skipped"] > 0 or not rows)
    left += [f"{rows} rows without a caption"] * (rows > 0)
    print(f"left out {' and '.join(left)}; the first: {skipped[0]}")
  if options.category is None and counts["uncategorised"]:
    print(f"{counts['uncategorised']} pairs have no category; see --categories")
