"""Images and prompts → a pair cache: `python -m safetydpo_jax.encode`.

In: a dataset of preference pairs (layouts in `data/sources/layouts.py`) and a Stable
Diffusion checkpoint. Out: a cache (`data/cache/records.py`) with the VAE's posterior
moments of every image and of its mirror image, and the prompts' token ids, which
training never has to compute again.

A stopped encode goes on where it stopped when the same command runs again: shards are
complete or not there, and each is encoded on its own. With several processes each
encodes every n-th shard, and process 0 completes the cache.
"""

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from tqdm import tqdm

from safetydpo_jax.data import categories, contact_sheet
from safetydpo_jax.data.cache import encoding, records, shards
from safetydpo_jax.data.sources import layouts
from safetydpo_jax.data.sources.pairs import SourcePair, fingerprint
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.formats.base_model import weights
from safetydpo_jax.formats.base_model.hub import PRESETS
from safetydpo_jax.formats.base_model.pipeline import Pipeline, load_pipeline
from safetydpo_jax.models import conditioning
from safetydpo_jax.runtime import hosts, sharding, storage

EXAMPLE = """example:
  python -m safetydpo_jax.encode --model sd15 --pairs CoProV2 --out cache/sd15

what is in a dataset, without a model:
  python -m safetydpo_jax.encode --pairs CoProV2 --stats sheet.png
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.encode",
    description="Encodes preference pairs once, for any number of training runs.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  presets = ", ".join(PRESETS)
  add("--model", help=f"diffusers directory, hub id or {presets}")
  add("--vae", help="another VAE's folder or hub id (default: the model's own)")
  add(
    "--pairs",
    required=True,
    help="dataset: parquet files, images with metadata.jsonl or CSV, or built by TFDS",
  )
  add("--out", help="folder of the cache; may be a gs:// or s3:// URL, like --pairs")
  add("--categories", metavar="CSV", help="CoProV2's CSV (default: the one in --pairs)")
  add("--resolution", type=int, help="pixels per side (default: the model's own)")
  add("--category", help="keep the pairs of one category (default: all)")
  add(
    "--on_error",
    default="fail",
    choices=("fail", "skip"),
    help="at an image or file that cannot be read: stop, or leave it out and list it "
    "in the cache's manifest (default: fail)",
  )
  add("--batch_size", type=int, default=8, help="images per VAE call (default: 8)")
  add("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the VAE")
  add("--shard_size", type=int, default=1024, help="pairs per file (default: 1024)")
  add("--variant", help='of the weight files, for example "fp16"')
  add("--stats", metavar="PNG", help="draw a sheet of random pairs and of the counts")
  add("--no_blur", action="store_true", help="show the sheet's images sharply")
  hosts.add_arguments(parser)
  options = parser.parse_args(arguments)
  if bool(options.model) != bool(options.out) or not (options.out or options.stats):
    parser.error("--model and --out are needed together, or --stats alone")
  return options


def select_pairs(
  arguments: argparse.Namespace,
) -> tuple[list[SourcePair], dict[str, int], list[str]]:
  """The dataset's pairs of a category, counts of what was kept, and what was skipped.

  Raises:
    InputError: the dataset cannot be read, or has no such pairs.
  """
  name = categories.selection(arguments.category)
  skipped = []
  pairs, counts = layouts.read_pairs(
    arguments.pairs,
    categories_csv=arguments.categories,
    skipped=skipped if arguments.on_error == "skip" else None,
  )
  kept = [pair for pair in pairs if name is None or name in pair.categories]
  if not kept:
    there = sorted({tag for pair in pairs for tag in pair.categories})
    raise InputError(
      f"{arguments.pairs} has no pairs of category {name}; it has "
      f"{', '.join(there) or 'none; give --categories'}"
    )
  captions = sum(caption is not None for pair in kept for caption in pair.captions)
  return (
    kept,
    {
      **counts._asdict(),
      "pairs": len(kept),
      "captions": captions,
      "other_categories": len(pairs) - len(kept),
    },
    skipped,
  )


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
  return {
    "format": records.FORMAT_VERSION,
    "base": pipeline.fingerprint,
    "vae": weights.fingerprint(weights.read_tensors(pipeline.vae_files)),
    "vae_dtype": arguments.dtype,
    "scaling_factor": pipeline.scaling_factor,
    "resolution": resolution,
    "latent_shape": [side, side, pipeline.latent_channels],
    "category": categories.selection(arguments.category) or "all",
    "dataset": fingerprint(pairs),
    "batch_size": arguments.batch_size,
    "shard_size": arguments.shard_size,
  }


def check_out(
  out: epath.Path,
  settings: dict[str, Any],
  files: Sequence[epath.Path],
  *,
  skip: bool,
) -> tuple[bool, int]:
  """Whether `out` is a finished cache of these settings; starts one if it is new.

  Returns:
    That, and how many pairs its shards lack.

  Raises:
    InputError: `out` was started with other settings, lacks pairs though `skip` is
      false, or cannot be written.
  """
  there = {file.name for file in out.iterdir()} if out.is_dir() else set()
  finished = records.MANIFEST in there
  plan = out / (records.MANIFEST if finished else records.PLAN)
  # Without a shard the plan may be replaced: nothing has come of it.
  if any(name.startswith("pairs-") for name in there):
    before = storage.read_json(plan, "pair cache")
    for name, value in settings.items():
      if before.get(name) != value:
        raise InputError(
          f"{out} holds a cache with {name} {before.get(name)!r}, now it is {value!r}; "
          "choose another --out, or delete it"
        )
  lost = shards.read_skipped([file for file in files if file.name in there])
  if lost and not skip:
    raise InputError(
      f"{out} lacks {len(lost)} pairs that --on_error skip left out, the first "
      f"{min(lost)}; mend them and choose another --out, or give --on_error skip"
    )
  if finished and {records.INDEX, *(file.name for file in files)} <= there:
    if records.PLAN in there and jax.process_index() == 0:  # killed in between
      (out / records.PLAN).unlink()
    return True, len(lost)
  if jax.process_index() == 0:
    try:
      out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise InputError(f"cannot make the folder {out}: {error.strerror}") from error
    storage.write_json(out / records.PLAN, settings)
  return False, len(lost)


def make_records(
  file: epath.Path, rows: Iterator[tuple], fields: Sequence[shards.Field], skipped: dict
) -> Iterator[bytes]:
  """The records of a shard; what was skipped is noted before the shard is complete."""
  for encoded, token_ids, pair in rows:
    if encoded is not None:
      arrays = {"moments": encoded, "token_ids": token_ids}
      yield shards.pack(fields, arrays, pair.about())
  shards.note_skipped(file, skipped)


def main(arguments: list[str] | None = None) -> None:
  """Reads, encodes, completes: in the order things happen."""
  arguments = parse_arguments(arguments)
  hosts.initialize()
  pairs, counts, skipped = select_pairs(arguments)
  if arguments.stats and jax.process_index() == 0:
    picture = contact_sheet.draw_sheet(pairs, counts, blur=not arguments.no_blur)
    contact_sheet.save_sheet(picture, storage.as_path(arguments.stats))
    print(f"{arguments.stats}: {counts['pairs']} pairs")
  if not arguments.out:
    return

  sharding.use_precision(arguments.dtype)
  pipeline = load_pipeline(
    arguments.model,
    components=("vae",),
    dtype=jnp.dtype(arguments.dtype),
    variant=arguments.variant,
    vae_from=arguments.vae,
  )
  settings = make_settings(arguments, pipeline, pairs)
  out, shard_size = storage.as_path(arguments.out), arguments.shard_size
  files = [out / name for name in shards.shard_names(len(pairs), shard_size)]
  skip = arguments.on_error == "skip"
  finished, lost = check_out(out, settings, files, skip=skip)
  if finished:
    print(f"{out} is complete already: {len(pairs) - lost} pairs")
    return
  hosts.wait_for_all("the cache's folder is there")

  token_ids, empty_token_ids, counts["truncated"] = encoding.tokenize(pipeline, pairs)
  fields = shards.record_fields(settings["latent_shape"], *empty_token_ids.shape)
  encode, size = encoding.make_encoder(pipeline, arguments.batch_size)
  todo = [
    (file, slice(number * shard_size, (number + 1) * shard_size))
    for number, file in enumerate(files)
    if number % jax.process_count() == jax.process_index() and not file.exists()
  ]
  total = 2 * sum(len(pairs[block]) for _, block in todo)
  with tqdm(total=total, unit=" images", disable=jax.process_index() > 0) as progress:
    for file, block in todo:
      faults = {}
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
    side = settings["resolution"]
    sized = len(pipeline.text_encoders) == 2
    time_ids = conditioning.make_time_ids(side, side) if sized else None
    faults = shards.read_skipped(files)
    lost = [pair for pair in pairs if pair.id in faults]
    counts["skipped"] += len(lost)
    counts["pairs"] -= len(lost)
    counts["captions"] -= sum(len(pair.about()["captions"]) for pair in lost)
    skipped += [f"{id}: {why}" for id, why in faults.items()]
    records.complete_cache(
      out,
      settings,
      [records.entry(pair) for pair in pairs],
      fields,
      without=faults,
      model=pipeline.name,
      counts=counts,
      skipped=skipped,
      empty_token_ids=empty_token_ids.tolist(),
      time_ids=time_ids,
    )
    print(
      f"{out}: {counts['pairs']} pairs with {counts['captions']} captions "
      f"({counts['truncated']} at the limit of {empty_token_ids.shape[1]} tokens); of "
      f"{counts['rows']} rows {counts['ties']} ties and {counts['repeated']} repeats "
      f"dropped, {counts['other_categories']} pairs of other categories"
    )
    if skipped:
      print(f"left out {counts['skipped']} pairs; the first: {skipped[0]}")
    if arguments.category is None and counts["uncategorised"]:
      print(f"{counts['uncategorised']} pairs have no category; see --categories")


if __name__ == "__main__":
  run_command(main)
