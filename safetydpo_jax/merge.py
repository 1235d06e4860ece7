"""Merges experts into one LoRA: `python -m safetydpo_jax.merge --experts A,B …`.

In: run directories, merged directories and LoRA files; for Co-Merge (`comerge.py`) also
a pair cache and the base model. Out: an expert's directory (`formats/loras/expert.py`)
that `generate` and `export` take like any other:
  lora/, expert.json   category "merged", alpha = rank (the scale is folded in), the
                       method, its options, the calibration, and every expert with the
                       sha256 of its factors
  statistics/          Co-Merge: activations of each expert, for the next merge
  winners.txt .png     Co-Merge: which expert won how much of each layer
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from safetydpo_jax import lora as lora_lib
from safetydpo_jax.data.cache import records
from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.formats.base_model.weights import torch_name
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.formats.loras.write import adapted_layers
from safetydpo_jax.merging import (
  activation_files,
  activations,
  baselines,
  calibration,
  comerge,
  experts,
)
from safetydpo_jax.merging.experts import Expert
from safetydpo_jax.runtime import hosts, manifest, sharding

EXAMPLE = """example:
  python -m safetydpo_jax.merge --experts runs/hate,runs/violence --method co_merge \\
    --calibration cache --out merged
"""
MERGED = "merged"  # the category of what this command writes
STATISTICS = "statistics"

# Which options a method reads, besides experts, model and variant.
_COMERGE = ("calibration", "statistics", "pairs", "timesteps", "seed", "dtype")
_COMERGE += ("batch_size", "experts_at_once")
OPTIONS = {
  "linear": ("weights",),
  "svd": ("weights", "rank"),
  "ties": ("weights", "rank", "density"),
  "dare_linear": ("weights", "rank", "density", "seed"),
  "dare_ties": ("weights", "rank", "density", "seed"),
  "magnitude": ("weights", "rank", "density"),
  "co_merge_factor": _COMERGE,
  "co_merge_product": (*_COMERGE, "rank"),
}
# Those that change the result; the calibration has a row of its own in expert.json.
RECORDED = ("weights", "rank", "density", "seed")
DEFAULTS = {
  "density": baselines.DENSITY,
  "seed": 0,
  "pairs": 4,
  "dtype": "float32",
  "batch_size": 2,
  "experts_at_once": 1,
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
  """The command line; an option is None where it is not given."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.merge",
    description="Merges LoRA experts of one base model into a single LoRA.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  add("--experts", required=True, metavar="L,L,…", help="runs or LoRA files")
  methods = ("co_merge", *OPTIONS)
  add(
    "--method",
    required=True,
    choices=methods,
    help=f"co_merge is {comerge.DEFAULT}; one of {', '.join(methods)}",
    metavar="METHOD",
  )
  add("--out", required=True, type=Path, metavar="DIR", help="folder to write to")
  add("--model", metavar="M", help="the base model (default: what the experts say)")
  add("--variant", help='of the model\'s files, for example "fp16"')
  add(
    "--weights",
    metavar="W[,W…]",
    help="one number for all experts or one for each (default: 1/N for N experts, "
    "their mean; 1 gives their sum, as diffusers' set_adapters does)",
  )
  add(
    "--rank",
    type=int,
    help="of the result (default: the experts' largest; co_merge_product: exact, the "
    "sum of their ranks)",
  )
  add(
    "--density",
    type=float,
    help=f"share of entries kept (default: {baselines.DENSITY})",
  )
  add("--seed", type=int, help="of what DARE drops or Co-Merge samples (default: 0)")
  group = parser.add_argument_group("Co-Merge").add_argument
  group("--calibration", metavar="CACHE", help="what `encode` wrote")
  group("--pairs", type=int, help="calibration pairs of each category (default: 4)")
  group(
    "--timesteps",
    metavar="T,T,…",
    help="that each pair is noised to (default: four, evenly spaced)",
  )
  group(
    "--statistics",
    type=Path,
    metavar="DIR",
    help="of the activations: what is there is not measured again (default: "
    f"OUT/{STATISTICS})",
  )
  group("--batch_size", type=int, help="pairs per device (default: 2)")
  group("--experts_at_once", type=int, help="that share a UNet call (default: 1)")
  group("--dtype", choices=["float32", "bfloat16"], help="default: float32")
  hosts.add_arguments(parser)
  return parser.parse_args(arguments)


def check_options(options: argparse.Namespace) -> None:
  """Fills in defaults; refuses what the method does not read or cannot be meant."""
  if options.method == "co_merge":
    options.method = comerge.DEFAULT
  read = OPTIONS[options.method]
  for name in dict.fromkeys(name for names in OPTIONS.values() for name in names):
    if getattr(options, name) is not None and name not in read:
      others = ", ".join(method for method, names in OPTIONS.items() if name in names)
      raise InputError(
        f"--method {options.method} does not read --{name}; leave it out, or take "
        f"one of {others}"
      )
    if name in read and getattr(options, name) is None:
      setattr(options, name, DEFAULTS.get(name))
  for name in ("rank", "pairs", "batch_size", "experts_at_once"):
    if getattr(options, name) is not None and getattr(options, name) < 1:
      raise InputError(f"--{name} is {getattr(options, name)}; expected 1 or more")
  if options.density is not None and not 0 < options.density <= 1:
    raise InputError(f"--density is {options.density}; expected above 0, up to 1")
  if options.seed is not None and not 0 <= options.seed < 2**32:
    raise InputError(f"--seed is {options.seed}; expected 0 to 2^32 - 1")
  if "calibration" in read and not options.calibration:
    raise InputError(
      f"--method {options.method} needs --calibration, a folder that `encode` wrote"
    )


def parse_weights(text: str | None, count: int) -> list[float]:
  """`0.5` or `0.2,0.8` → one number for each of `count` experts; None: 1 / count."""
  if text is None:
    return [1 / count] * count
  try:
    numbers = [float(number) for number in text.split(",")]
  except ValueError:
    numbers = [math.nan]
  if not all(map(math.isfinite, numbers)) or len(numbers) not in (1, count):
    raise InputError(
      f"--weights is {text!r}; expected one finite number, or {count} with commas "
      f"between them, one for each expert"
    )
  return numbers * count if len(numbers) == 1 else numbers


def check_out(out: Path, names: Sequence[str]) -> None:
  """Refuses a folder that holds anything but an earlier merge."""
  if any(Path(name).absolute() == out.absolute() for name in names):
    raise InputError(f"--out {out} is one of the experts; choose another --out")
  try:
    there = sorted(file.name for file in out.iterdir()) if out.exists() else []
  except OSError as error:
    raise InputError(f"--out {out} is no folder: {error.strerror}") from error
  if expert.MANIFEST in there:
    about = manifest.read_json(out / expert.MANIFEST, "merged expert")
    if isinstance(about, dict) and about.get("category") == MERGED:
      return
  # A merge that was stopped before its manifest.
  ours = {"lora", STATISTICS, activation_files.TABLE, activation_files.PICTURE}
  if foreign := [name for name in there if name not in ours]:
    raise InputError(
      f"--out {out} holds something else than a merged expert ({foreign[0]}); choose "
      "another --out"
    )


def measure(
  options: argparse.Namespace, loaded: Sequence[Expert], base: dict[str, str]
) -> tuple[list[dict], dict[str, Any]]:
  """Each expert's activations, from the statistics or measured now, and on what.

  Raises:
    InputError: experts, model, cache and statistics do not fit each other.
  """
  cache = records.open_cache(options.calibration)
  pipeline = load_pipeline(base["name"], components=(), variant=options.variant)
  experts.find_base(loaded, pipeline)  # another model may lie there by now
  records.check_cache_fits(cache, pipeline)
  categories = calibration.categories_of(cache)
  for this in loaded:
    category = this.about.get("category")
    if category in CATEGORIES and category not in categories:
      raise InputError(
        f"{cache.path} has no pairs of {category}, the category of {this.name}; it has "
        f"{', '.join(categories)}: encode pairs of all categories for --calibration"
      )
  pairs = calibration.choose_pairs(cache, options.pairs, options.seed)
  timesteps = calibration.parse_timesteps(
    options.timesteps, pipeline.schedule.num_timesteps
  )
  about = {
    "cache": cache.fingerprint,
    "base": base["fingerprint"],
    "categories": categories,
    "pairs": options.pairs,
    "timesteps": timesteps,
    "seed": options.seed,
    "dtype": options.dtype,
  }
  inputs = 2 * len(pairs) * len(timesteps)

  folder = options.statistics or options.out / STATISTICS
  found = [
    activation_files.read_activations(folder, this.lora, this.sha256, about, inputs)
    for this in loaded
  ]
  hosts.wait_for_all("every host has seen the statistics")
  missing = [n for n, tree in enumerate(found) if tree is None]
  if jax.process_index() == 0:
    print(f"{len(missing)} experts on {inputs} inputs of {', '.join(categories)}")
  if missing:
    components = ("unet", "text_encoder", "text_encoder_2")
    measured = activations.measure(
      load_pipeline(
        base["name"],
        components=components,
        dtype=options.dtype,
        variant=options.variant,
      ),
      [loaded[n].lora for n in missing],
      cache,
      pairs,
      timesteps,
      seed=options.seed,
      batch_size=options.batch_size,
      mesh=sharding.make_mesh(),
      experts_at_once=options.experts_at_once,
    )
    for n, tree in zip(missing, measured):
      check_finite(tree, loaded[n].name, cache.path)
      found[n] = tree
      if jax.process_index() == 0:
        activation_files.write_activations(
          folder, tree, experts.describe(loaded[n]), about
        )
  return found, about


def check_finite(tree: Any, name: str, cache: Any) -> None:
  """Refuses activations with a NaN, which would win every unit of theirs."""
  for path, leaf in flatten_dict(tree).items():
    if not np.isfinite(leaf).all():
      raise InputError(
        f"{name} on {cache}: activations of {torch_name(path[:-1])} are not finite; "
        "take --dtype float32, or encode the cache again"
      )


def main(arguments: list[str] | None = None) -> None:
  """Reads, checks, measures if the method needs it, merges, writes."""
  options = parse_arguments(arguments)
  names = options.experts.split(",")
  check_options(options)
  hosts.initialize()
  sharding.use_precision(options.dtype or "float32")
  check_out(options.out, names)
  if "weights" in OPTIONS[options.method]:
    options.weights = parse_weights(options.weights, len(names))
  loaded = experts.read_experts(names)
  pipeline = None
  if options.model:
    pipeline = load_pipeline(options.model, components=(), variant=options.variant)
  base = experts.find_base(loaded, pipeline)

  read = [name for name in RECORDED if name in OPTIONS[options.method]]
  settings = {name: getattr(options, name) for name in read}
  about: dict[str, Any] = {"method": options.method, "options": settings}
  trees = [this.lora for this in loaded]
  if options.method in comerge.METHODS:
    experts.check_same_layers(loaded)
    if options.method == "co_merge_factor":
      experts.check_same_units(loaded)
    found, about["calibration"] = measure(options, loaded, base)
    merged = comerge.METHODS[options.method](trees, found, rank=options.rank)
  else:
    merged = baselines.METHODS[options.method](trees, **settings)

  # Orbax writes one tree of all hosts; the manifest is written last.
  if options.method in comerge.METHODS and jax.process_index() == 0:
    wins = comerge.count_wins(found, comerge.PARTS[options.method])
    labels = experts.labels(loaded)
    print(activation_files.write_table(options.out, wins, found, labels))
    activation_files.draw_winners(options.out, wins, labels)
  replicated = NamedSharding(sharding.make_mesh(), sharding.REPLICATED)
  rank = lora_lib.rank_of(merged)
  about = {
    "category": MERGED,
    "rank": rank,
    "alpha": rank,
    "targets": adapted_layers(merged),
    "base": base,
    **about,
    "experts": [experts.describe(this) for this in loaded],
  }
  expert.write_expert(options.out, sharding.place(merged, replicated), about)
  if jax.process_index() == 0:
    print(
      f"{options.out}: {options.method} of {len(loaded)} experts, rank {rank}, "
      f"{lora_lib.num_parameters(merged):,} parameters"
    )


if __name__ == "__main__":
  run_command(main)
