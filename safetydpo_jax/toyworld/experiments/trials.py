"""The study's trials (`study.py`): each a LoRA, how it is made, and where it is drawn.

A trial is made by the project's commands from a finished demo's folder (`demo.py`): its
pair cache, its experts and its test prompts. What is there is not made again.
"""

import importlib
import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safetydpo_jax.data.cache import records
from safetydpo_jax.data.prompts import read_prompts
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras import expert
from safetydpo_jax.merging import comerge
from safetydpo_jax.runtime import manifest
from safetydpo_jax.toyworld import measure
from safetydpo_jax.toyworld.experiments.stages import CONFIGS, GUIDANCE, STEPS

# The weight of each expert in a sum decides what the sum is worth: so the curve, not a
# point of it.
WEIGHTS = {"mean": (), "0.25": ("--weights", "0.25"), "0.5": ("--weights", "0.5")}
SUM = {"sum": ("--weights", "1")}
SUMS = {"linear": WEIGHTS | SUM, "svd": WEIGHTS | SUM}
SUMS |= {"magnitude": WEIGHTS, "dare_linear": WEIGHTS}
# Merging methods by the name the tables give them: `merge`'s options.
MERGES: dict[str, tuple[str, ...]] = {
  **{
    f"{method}, {'weights ' * ('.' in name)}{name}": (method, *words)
    for method, weights in SUMS.items()
    for name, words in weights.items()
  },
  "ties": ("ties",),
  "dare_ties": ("dare_ties",),
  "co_merge_factor": ("co_merge_factor",),
  "co_merge_product, svd": ("co_merge_product", "--rank", "EXPERT"),
  "co_merge_product": ("co_merge_product",),
}
# What a trial decides itself; the demo's other settings are for all alike.
OWN = ("steps", "learning_rate", "holdout", "category", "cache", "seed", "lora.seed")
FRACTIONS = (0.1, 0.3)  # of the pairs; the demo's own experts have all


class Trial(NamedTuple):
  """One LoRA to make and to measure."""

  group: str  # which table it stands in
  name: str
  folder: Path  # the LoRA's
  command: tuple[str, list[str]]  # (module below safetydpo_jax, arguments)
  prompts: Path  # the test CSV


def trials(demo: Path, out: Path, options: Any) -> list[Trial]:
  """Every trial of one seed.

  Args:
    demo: the finished demo's folder.
    out: where the trials go.
    options: has seed, model, categories, overrides.

  Raises:
    InputError: an override of what the trials decide.
  """
  if taken := [name for name in OWN if name in options.overrides]:
    raise InputError(
      f"--config.{taken[0]} is what the study varies; give it to the demo alone"
    )
  names, test = list(options.categories), demo / "prompts/test.csv"
  runs = {name: str(demo / "runs" / name) for name in names}
  about = manifest.read_json(demo / "runs" / names[0] / "expert.json", "expert")
  rank, steps = str(about["rank"]), about["step"]
  rate = about["config"]["learning_rate"]

  def train(folder: Path, category: str, **values: Any) -> tuple[str, list[str]]:
    config = f"{os.path.relpath(CONFIGS / category)}.py:toy"
    values = {"model": options.model, "cache": demo / "cache"} | values
    values = {"seed": options.seed, "lora.seed": options.seed} | values
    values = options.overrides | values
    arguments = [f"--config.{name}={value}" for name, value in values.items()]
    return "train", ["--config", config, "--workdir", str(folder), *arguments]

  def merge(folder: Path, experts: list[str], method: str, *rest: str):
    arguments = ["--experts", ",".join(runs[name] for name in experts)]
    arguments += ["--method", method, "--out", str(folder)]
    arguments += [rank if word == "EXPERT" else word for word in rest]
    if method.startswith("dare"):
      arguments += ["--seed", str(options.seed)]
    if method.startswith("co_merge"):
      arguments += ["--calibration", str(demo / "cache")]
      arguments += ["--statistics", str(out / "statistics")]
    return "merge", arguments

  table = []
  every = steps * len(names)
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
    folder = out / "all_single" / folder
    command = train(folder, "all_single", **values)
    table.append(Trial("all_single", name, folder, command, test))
  for name, words in MERGES.items():
    folder = out / "merges" / name.replace(", ", "_").replace(" ", "_")
    command = merge(folder, names, *words)
    table.append(Trial("merges", name, folder, command, test))
  for count in range(1, len(names)):
    for group, method in {"linear": "linear", "co_merge": comerge.DEFAULT}.items():
      folder = out / "experts" / f"{method}_{count}"
      command = merge(folder, names[:count], method)
      table.append(Trial(f"experts, {group}", str(count), folder, command, test))
  for fraction in FRACTIONS:
    for name in names:
      folder = out / "data" / f"{fraction:g}" / name
      command = train(folder, name, holdout=round(1 - fraction, 6))
      prompts = demo / f"prompts/{name}.csv"
      table.append(Trial(f"data, {fraction:g}", name, folder, command, prompts))
  return table


def run_trial(trial: Trial, demo: Path, out: Path, model: str) -> dict[str, Any]:
  """Makes, draws and measures one LoRA, unless that was done; returns its figures.

  Returns:
    {group, name, rank, pairs, rates, utility, distance, command}; `distance` is the
    mean absolute difference from the base model's pictures of the safe prompts, in
    grey levels, `pairs` how many a data trial trained on, else None.
  """
  file = figures_file(trial, out)
  if not file.exists():
    file.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_json(file, _make(trial, demo, out, model))
  about = manifest.read_json(trial.folder / expert.MANIFEST, "expert")
  pairs = None
  if trial.group.startswith("data"):
    config = about["config"]
    kept = (config[name] for name in ("category", "mixture", "holdout"))
    pairs, _ = records.open_cache(demo / "cache").count(*kept)
  figures = manifest.read_json(file, "trial")
  return figures | {"rank": about["rank"], "pairs": pairs}


def figures_file(trial: Trial, out: Path) -> Path:
  """Where a trial's figures are kept."""
  place = out / "figures" / trial.folder.relative_to(out)
  return place.with_name(f"{place.name}.json")


def _make(trial: Trial, demo: Path, out: Path, model: str) -> dict[str, Any]:
  images = out / "images" / trial.folder.relative_to(out)
  module, arguments = trial.command
  line = shlex.join(["python", "-m", f"safetydpo_jax.{module}", *arguments])
  print(f"$ {line}", flush=True)
  _run(module, arguments)
  sampler = ["--steps", STEPS, "--guidance", GUIDANCE, "--batch_size", "48"]
  source = ["--model", model, "--prompts", str(trial.prompts)]
  lora = ["--lora", str(trial.folder), "--out", str(images)]
  _run("generate", [*source, *lora, *sampler])
  pictures = measure.look(images, trial.prompts)
  return {
    "group": trial.group,
    "name": trial.name,
    "rates": measure.rates(pictures),
    "utility": measure.utility(pictures),
    "distance": distance(pictures, trial.prompts, demo / "images/base"),
    "command": line,
  }


def distance(pictures: list, prompts: Path, base: Path) -> float:
  """Mean absolute difference from the base's pictures of safe prompts, of 255."""
  # One prompt has one name in the CSV of its category and in that of all.
  theirs = {row.file.name: row.file for row in read_prompts(prompts, base)}
  safe = [picture.file for picture in pictures if picture.asked is None]
  pairs = [
    (measure.read_picture(f), measure.read_picture(theirs[f.name])) for f in safe
  ]
  ours, base_ones = np.array(pairs, np.float32).swapaxes(0, 1)
  return float(np.abs(ours - base_ones).mean())


def _run(module: str, arguments: list[str]) -> None:
  importlib.import_module(f"safetydpo_jax.{module}").main(arguments)
