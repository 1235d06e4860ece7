"""Experts → one LoRA, by any method of `options.OPTIONS`.

In: run directories, merged directories and LoRA files; for Co-Merge (`comerge.py`) also
a pair cache and the base model. Out: an expert's directory (`formats/loras/expert.py`)
that `generate` and `export` take like any other:

  lora/, expert.json   category "merged", alpha = rank (the scale is folded in), the
                       method, its options, the calibration, and every expert with the
                       sha256 of its factors
  statistics/          Co-Merge: activations of each expert, for the next merge
  winners.txt .png     Co-Merge: which expert won how much of each layer
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict
from jax.sharding import NamedSharding

from safetydpo_jax import lora as lora_lib
from safetydpo_jax.data.cache import records
from safetydpo_jax.data.cache.records import PairCache
from safetydpo_jax.data.categories import CATEGORIES
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import load_pipeline
from safetydpo_jax.formats.base_model.weights import torch_name
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.formats.loras.write import adapted_layers
from safetydpo_jax.lora import Tree
from safetydpo_jax.merging import (
  activation_files,
  activations,
  baselines,
  calibration,
  comerge,
  experts,
)
from safetydpo_jax.merging.experts import Expert
from safetydpo_jax.merging.options import (
  MEASURING,
  OPTIONS,
  STATISTICS,
  MergeOptions,
  measuring_of,
  parse_weights,
  with_defaults,
)
from safetydpo_jax.runtime import hosts, manifest, sharding
from safetydpo_jax.runtime.log import note

__all__ = ["MERGED", "MergeOptions", "merge_experts"]

MERGED = "merged"  # the category of what is written here


def merge_experts(options: MergeOptions) -> None:
  """Reads the experts, measures them if the method needs it, merges, and writes.

  Raises:
    InputError: the experts, the model or the calibration do not fit each other, or the
      folder holds something other than an earlier merge.
  """
  options = with_defaults(options)
  sharding.use_precision(options.dtype or "float32")
  check_out_is_ours(options.out, options.names)
  pipeline = None
  if options.model:
    pipeline = load_pipeline(options.model, components=(), variant=options.variant)
  config = pipeline.unet.config if pipeline else None
  loaded = experts.read_experts(options.names, options.any_base, config)
  base = experts.find_base(loaded, pipeline, options.any_base)

  read = OPTIONS[options.method]
  settings = {name: getattr(options, name) for name in read if name not in MEASURING}
  if "weights" in settings:
    settings["weights"] = parse_weights(options.weights, len(loaded))
  about: dict[str, Any] = {"method": options.method, "options": settings}
  trees = [this.lora for this in loaded]
  if options.method in comerge.METHODS:
    reading = comerge.METHODS[options.method]
    experts.check_same_layers(loaded)
    if reading.one_seed:
      experts.check_same_units(loaded)
    found, about["calibration"] = read_or_measure(options, loaded, base)
    merged = reading.merge(trees, found, rank=options.rank)
    if jax.process_index() == 0:
      wins = comerge.count_wins(found, reading.parts)
      labels = experts.labels(loaded)
      print(activation_files.write_table(options.out, wins, found, labels))
      activation_files.draw_winners(options.out, wins, labels)
  else:
    merged = baselines.METHODS[options.method](trees, **settings)

  # All hosts write the tree together, through Orbax; the manifest comes last.
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


def check_out_is_ours(out: Path, names: Sequence[str]) -> None:
  """Refuses a folder that holds anything but an earlier merge, which is replaced.

  Raises:
    InputError: naming what is there.
  """
  if any(Path(name).absolute() == out.absolute() for name in names):
    raise InputError(f"--out {out} is one of the experts; choose another --out")
  try:
    there = sorted(file.name for file in out.iterdir()) if out.exists() else []
  except OSError as error:
    raise InputError(f"--out {out} is not a folder: {error.strerror}") from error
  if expert.MANIFEST in there:
    about = manifest.read_json(out / expert.MANIFEST, "merged expert")
    if isinstance(about, dict) and about.get("category") == MERGED:
      note(f"{out} holds an earlier merge ({about.get('method')}), which is replaced")
      return
  # A merge that was stopped before it wrote its manifest leaves these.
  ours = {"lora", STATISTICS, activation_files.TABLE, activation_files.PICTURE}
  if foreign := [name for name in there if name not in ours]:
    raise InputError(
      f"--out {out} holds something other than a merged expert ({foreign[0]}); choose "
      "another --out"
    )


def read_or_measure(
  options: MergeOptions, loaded: Sequence[Expert], base: dict[str, str]
) -> tuple[list[Tree], dict[str, Any]]:
  """Each expert's activations, and what expert.json says about the calibration.

  Activations that the statistics folder holds are read; the rest are measured, and
  written there.

  Args:
    options: with defaults.
    loaded: the experts.
    base: name and fingerprint of the base model.

  Raises:
    InputError: experts, model, cache and statistics do not fit each other.
  """
  settings = measuring_of(options)
  cache = records.open_cache(settings.calibration)
  pipeline = load_pipeline(base["name"], components=(), variant=options.variant)
  if not options.any_base:
    experts.find_base(loaded, pipeline)  # the name may lead to another model by now
  records.check_cache_fits(cache, pipeline)
  check_categories(cache, loaded)
  pairs = calibration.choose_pairs(cache, settings.pairs, settings.seed)
  timesteps = calibration.parse_timesteps(
    settings.timesteps, pipeline.schedule.num_timesteps
  )
  categories = calibration.categories_of(cache)
  about = {
    "cache": cache.fingerprint,
    "base": base["fingerprint"],
    "categories": categories,
    "pairs": settings.pairs,
    "timesteps": timesteps,
    "seed": settings.seed,
    "dtype": settings.dtype,
  }
  inputs = 2 * len(pairs) * len(timesteps)

  found = [
    activation_files.read_activations(
      settings.statistics, this.lora, this.sha256, about, inputs
    )
    for this in loaded
  ]
  hosts.wait_for_all("every host has read the statistics")
  missing = [n for n, tree in enumerate(found) if tree is None]
  if jax.process_index() == 0:
    print(f"{len(missing)} experts on {inputs} inputs of {', '.join(categories)}")
  if missing:
    measured = activations.measure(
      load_pipeline(
        base["name"],
        components=("unet", "text_encoder", "text_encoder_2"),
        dtype=settings.dtype,
        variant=options.variant,
      ),
      [loaded[n].lora for n in missing],
      cache,
      pairs,
      timesteps,
      seed=settings.seed,
      batch_size=settings.batch_size,
      mesh=sharding.make_mesh(),
      experts_at_once=settings.experts_at_once,
    )
    for n, tree in zip(missing, measured):
      check_finite(tree, loaded[n].name, cache.path)
      found[n] = tree
      if jax.process_index() == 0:
        activation_files.write_activations(
          settings.statistics, tree, experts.describe(loaded[n]), about
        )
  return [tree for tree in found if tree is not None], about


def check_categories(cache: PairCache, loaded: Sequence[Expert]) -> None:
  """Refuses a cache that lacks the category of an expert.

  Raises:
    InputError: naming the expert and the category.
  """
  categories = calibration.categories_of(cache)
  for this in loaded:
    category = this.about.get("category")
    if category in CATEGORIES and category not in categories:
      raise InputError(
        f"{cache.path} has no pairs of {category}, the category of {this.name}; it has "
        f"{', '.join(categories)}: encode pairs of all categories for --calibration"
      )


def check_finite(tree: Tree, name: str, cache: epath.Path) -> None:
  """Refuses activations with a NaN, which would win every unit of its layer.

  Raises:
    InputError: naming the layer.
  """
  for path, leaf in flatten_dict(tree).items():
    if not np.isfinite(leaf).all():
      raise InputError(
        f"{name} on {cache}: activations of {torch_name(path[:-1])} are not finite; "
        "use --dtype float32, or encode the cache again"
      )
