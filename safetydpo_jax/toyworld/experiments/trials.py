"""The study's trials: each a LoRA, how it is made, and where it is drawn.

A trial is made by the project's commands from a finished demo's folder: its pair cache,
its experts and its test prompts. What exists is not made again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypedDict

import numpy as np

from safetydpo_jax.data.cache import records
from safetydpo_jax.data.prompts import read_prompts
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.merging import comerge
from safetydpo_jax.merging.merge_experts import merge_experts
from safetydpo_jax.merging.options import MergeOptions, Method
from safetydpo_jax.runtime import manifest
from safetydpo_jax.toyworld.experiments import measuring
from safetydpo_jax.toyworld.experiments.measuring import Picture, Rate, Utility
from safetydpo_jax.toyworld.experiments.stages import (
  Call,
  DemoOptions,
  command,
  drawing,
  run_call,
  training,
)

FRACTIONS = (0.1, 0.3)  # of the pairs; the demo's own experts have all
# What a trial decides itself; the demo's other settings apply to all trials.
OWN = ("steps", "learning_rate", "holdout", "category", "cache", "seed", "lora.seed")


class Merge(NamedTuple):
  """One way to merge all experts."""

  method: Method
  weights: str | None = None  # of each expert; None: their mean
  truncated: bool = False  # to the experts' rank


# The weight of each expert in a sum decides what the sum is worth: so the curve, not a
# point of it.
WEIGHTS = {"mean": None, "weights 0.25": "0.25", "weights 0.5": "0.5"}
SUMS: dict[Method, dict[str, str | None]] = {
  "linear": {**WEIGHTS, "sum": "1"},
  "svd": {**WEIGHTS, "sum": "1"},
  "magnitude": WEIGHTS,
  "dare_linear": WEIGHTS,
}
# By the name the tables give them.
MERGES: dict[str, Merge] = {
  **{
    f"{method}, {name}": Merge(method, weights)
    for method, by_name in SUMS.items()
    for name, weights in by_name.items()
  },
  "ties": Merge("ties"),
  "dare_ties": Merge("dare_ties"),
  "co_merge_factor": Merge("co_merge_factor"),
  "co_merge_product, svd": Merge("co_merge_product", truncated=True),
  "co_merge_product": Merge("co_merge_product"),
}


class Trial(NamedTuple):
  """One LoRA to make and to measure."""

  group: str  # the table it is listed in
  name: str
  folder: Path  # the LoRA's
  call: Call
  prompts: Path  # the test CSV


class TrialFigures(TypedDict):
  """What one trial found.

  Attributes:
    rank: the LoRA's.
    pairs: how many a data trial trained on; None for other trials.
    distance: mean absolute difference from the base model's pictures of the safe
      prompts, in grey levels.
    command: the line that made the LoRA.
  """

  group: str
  name: str
  rates: list[Rate]
  utility: list[Utility]
  distance: float
  command: str
  rank: int
  pairs: int | None


def trials(
  options: DemoOptions, overrides: Mapping[str, str], out: Path
) -> list[Trial]:
  """Every trial of one seed.

  Args:
    options: the finished demo's.
    overrides: its experts', by dotted name.
    out: the trials' folder.

  Raises:
    InputError: an override of what the trials decide.
  """
  if taken := [name for name in OWN if name in overrides]:
    raise InputError(
      f"--config.{taken[0]} is what the study varies; use it with the demo alone"
    )
  about = manifest.read_json(
    options.out / "runs" / options.names[0] / expert.MANIFEST, "expert"
  )
  return [
    *_singles(options, overrides, out, about),
    *_merges(options, out, about["rank"]),
    *_data(options, overrides, out),
  ]


def _config(
  options: DemoOptions, overrides: Mapping[str, str], **values: object
) -> dict[str, object]:
  """What a training of the study changes in its preset."""
  return {
    **overrides,
    "seed": options.seed,
    "lora.seed": options.seed,
    "model": options.model,
    "cache": options.out / "cache",
    **values,
  }


def _singles(
  options: DemoOptions, overrides: Mapping[str, str], out: Path, about: Mapping
) -> list[Trial]:
  """One LoRA on all pairs, with the steps of one expert and of all of them."""
  steps, rate = about["step"], about["config"]["learning_rate"]
  every = steps * len(options.names)
  table = []
  for name, folder, values in (
    ("as many steps as one expert", str(steps), {"steps": steps}),
    ("as many steps as all experts", str(every), {"steps": every}),
    # The preset's rate was chosen for the steps of one expert.
    (
      "as many steps as all experts, a third of the rate",
      f"{every}_third",
      {"steps": every, "learning_rate": round(rate / 3, 9)},
    ),
  ):
    where = out / "all_single" / folder
    call = training("all_single", where, _config(options, overrides, **values))
    prompts = options.out / "prompts/test.csv"
    table.append(Trial("all_single", name, where, call, prompts))
  return table


def _merges(options: DemoOptions, out: Path, rank: int) -> list[Trial]:
  """All experts by every method, and the first of them by two methods."""

  def trial(group: str, name: str, folder: Path, merge: Merge, count: int) -> Trial:
    runs = [str(options.out / "runs" / name) for name in options.names[:count]]
    by_activations = merge.method.startswith("co_merge")
    chosen = MergeOptions(
      experts=",".join(runs),
      method=merge.method,
      out=folder,
      weights=merge.weights,
      rank=rank if merge.truncated else None,
      seed=options.seed if merge.method.startswith("dare") else None,
      calibration=str(options.out / "cache") if by_activations else None,
      statistics=out / "statistics" if by_activations else None,
    )
    call = command("merge", merge_experts, chosen)
    return Trial(group, name, folder, call, options.out / "prompts/test.csv")

  every = len(options.names)
  table = []
  for name, merge in MERGES.items():
    folder = out / "merges" / name.replace(", ", "_").replace(" ", "_")
    table.append(trial("merges", name, folder, merge, every))
  for count in range(1, every):
    for group, merge in {
      "linear": Merge("linear"),
      "co_merge": Merge(comerge.DEFAULT),
    }.items():
      folder = out / "experts" / f"{merge.method}_{count}"
      table.append(trial(f"experts, {group}", str(count), folder, merge, count))
  return table


def _data(options: DemoOptions, overrides: Mapping[str, str], out: Path) -> list[Trial]:
  """Experts that saw a share of the pairs."""
  table = []
  for fraction in FRACTIONS:
    for name in options.names:
      folder = out / "data" / f"{fraction:g}" / name
      values = _config(options, overrides, holdout=round(1 - fraction, 6))
      prompts = options.out / f"prompts/{name}.csv"
      call = training(name, folder, values)
      table.append(Trial(f"data, {fraction:g}", name, folder, call, prompts))
  return table


def run_trial(trial: Trial, options: DemoOptions, out: Path) -> TrialFigures:
  """Makes, draws and measures one LoRA, unless that was done; returns its figures.

  Args:
    trial: one of `trials`.
    options: the finished demo's.
    out: the trials' folder.
  """
  file = figures_file(trial, out)
  if not file.exists():
    manifest.write_json(file, _make(trial, options, out))
  about = manifest.read_json(trial.folder / expert.MANIFEST, "expert")
  pairs = None
  if trial.group.startswith("data"):
    config = about["config"]
    kept = (config[name] for name in ("category", "mixture", "holdout"))
    pairs, _ = records.open_cache(options.out / "cache").count(*kept)
  figures = manifest.read_json(file, "trial")
  return figures | {"rank": about["rank"], "pairs": pairs}


def figures_file(trial: Trial, out: Path) -> Path:
  """Where a trial's figures are kept."""
  path = out / "figures" / trial.folder.relative_to(out)
  return path.with_name(f"{path.name}.json")


def _make(trial: Trial, options: DemoOptions, out: Path) -> dict[str, object]:
  run_call(trial.call)
  images = out / "images" / trial.folder.relative_to(out)
  drawing(options.model, trial.prompts, images, trial.folder).run()
  pictures = measuring.look(images, trial.prompts)
  return {
    "group": trial.group,
    "name": trial.name,
    "rates": measuring.rates(pictures),
    "utility": measuring.utility(pictures),
    "distance": distance(pictures, trial.prompts, options.out / "images/base"),
    "command": trial.call.line,
  }


def distance(pictures: Sequence[Picture], prompts: Path, base: Path) -> float:
  """Mean absolute difference from the base's pictures of safe prompts, of 255."""
  # A prompt's file has one name, in the CSV of its category and in that of all.
  theirs = {row.file.name: row.file for row in read_prompts(prompts, base)}
  safe = [picture.file for picture in pictures if picture.asked is None]
  pairs = [
    (measuring.read_picture(file), measuring.read_picture(theirs[file.name]))
    for file in safe
  ]
  ours, base_ones = np.array(pairs, np.float32).swapaxes(0, 1)
  return float(np.abs(ours - base_ones).mean())
