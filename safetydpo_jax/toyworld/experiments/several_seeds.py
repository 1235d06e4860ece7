"""The demo with several seeds, and the table of their figures.

Each demo (`demonstrate.py`) runs in OUT/seed0, OUT/seed1, …, in a process of its own,
since time and peak memory are a process's. The Markdown table has each figure for every
seed, their mean and spread (lowest to highest).
"""

import dataclasses
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from safetydpo_jax.errors import InputError
from safetydpo_jax.merging.options import Method
from safetydpo_jax.runtime import command_line, manifest
from safetydpo_jax.toyworld.experiments.demonstrate import FIGURES as FILE
from safetydpo_jax.toyworld.experiments.stages import DemoOptions

Figures = Mapping[str, Any]  # of one demo: the content of figures.json


@dataclasses.dataclass(frozen=True)
class SeedOptions:
  """Runs the demo with several seeds.

  A value of the experts' training is overridden by --config.NAME=VALUE.
  """

  out: Path
  """folder of the demos"""
  seeds: str = "0,1,2"
  """N,N,…; a seed decides prompts, noises, the LoRA's first factors and the order of
  training"""
  model: str = DemoOptions.model
  """the base model"""
  pairs: int = DemoOptions.pairs
  """training pairs of each category"""
  test: int = DemoOptions.test
  """unsafe test prompts of each category"""
  categories: str | None = DemoOptions.categories
  """NAME,NAME,… (default: all seven)"""
  merge: Method = DemoOptions.merge
  """merging method"""

  def __post_init__(self):
    numbers = self.numbers
    if len({*numbers}) < len(numbers) or min(numbers) < 0:
      raise InputError(f"--seeds {self.seeds}: expected different numbers, 0 or more")
    self.demo(numbers[0])  # checks what the demo has to say

  @property
  def numbers(self) -> tuple[int, ...]:
    """The seeds, one by one."""
    try:
      return tuple(int(seed) for seed in self.seeds.split(","))
    except ValueError:
      raise InputError(f"--seeds {self.seeds}: expected numbers, as in 0,1,2") from None

  def demo(self, seed: int) -> DemoOptions:
    """The options of one seed's demo."""
    names = ("model", "pairs", "test", "categories", "merge")
    same = {name: getattr(self, name) for name in names}
    return DemoOptions(out=self.out / f"seed{seed}", seed=seed, no_open=True, **same)


def run_seeds(options: SeedOptions, overrides: Sequence[str] = ()) -> None:
  """Runs the demos one after the other, then prints the table.

  Raises:
    InputError: a demo failed.
  """
  results = {seed: run_apart(options.demo(seed), overrides) for seed in options.numbers}
  print(f"\n{table(results)}")


def run_apart(options: DemoOptions, overrides: Sequence[str]) -> dict[str, Any]:
  """Runs one demo in a process of its own; returns its figures.

  Raises:
    InputError: it failed.
  """
  line = command_line.written("toyworld.demo", options, *overrides)
  _, *words = shlex.split(line)
  if subprocess.run([sys.executable, *words]).returncode:
    raise InputError(f"the demo of seed {options.seed} failed, see above")
  return manifest.read_json(options.out / FILE, "demo")


def _rows(figures: Figures, contender: str, phrasing: str) -> dict[str, dict[str, Any]]:
  """A contender's rates by category, 'all' among them."""
  return {
    row["category"]: row
    for row in figures["rates"]
    if (row["contender"], row["phrasing"]) == (contender, phrasing)
  }


def _rate(figures: Figures, contender: str, phrasing: str = "all") -> float:
  row = _rows(figures, contender, phrasing)["all"]
  return row["count"] / row["n"]


def _worst_ratio(figures: Figures) -> float:
  before, after = (_rows(figures, name, "all") for name in ("base", "experts"))
  counts = [(after[n]["count"], before[n]["count"]) for n in figures["categories"]]
  return float(np.max([a / b if b else np.nan for a, b in counts]))


def _utility(figures: Figures, contender: str) -> dict[str, dict[str, Any]]:
  rows = [row for row in figures["utility"] if row["contender"] == contender]
  return {row["category"]: row for row in rows}


def _fall(figures: Figures, contender: str, category: str) -> float:
  before, after = (_utility(figures, name)[category] for name in ("base", contender))
  return before["attributes"] - after["attributes"]


def _minutes(figures: Figures) -> float:
  """NaN where an earlier run had made part of the demo."""
  seconds = sum(row["seconds"] for row in figures["timings"])
  return float("nan") if figures["resumed"] else seconds / 60


# What the table says of each demo; all but the last two are shares, or points of them.
FIGURES: dict[str, Callable[[Figures], float]] = {
  "base: symbol asked for is there": lambda f: (
    _rows(f, "base", "all")["all"]["right"] / _rows(f, "base", "all")["all"]["n"]
  ),
  "base: any symbol under a safe prompt": lambda f: (
    _utility(f, "base")["all"]["symbols"] / _utility(f, "base")["all"]["n"]
  ),
  "base: attributes of safe prompts right": lambda f: _utility(f, "base")["all"][
    "attributes"
  ],
  "base: IP": lambda f: _rate(f, "base"),
  "experts, each on its category: IP": lambda f: _rate(f, "experts"),
  "experts: IP of the worst, as share of the base's": _worst_ratio,
  "experts: IP in held-out less in seen phrasings": lambda f: (
    _rate(f, "experts", "heldout") - _rate(f, "experts", "seen")
  ),
  "experts: utility lost": lambda f: _fall(f, "experts", "all"),
  "experts: utility lost by the worst": lambda f: max(
    _fall(f, "experts", name) for name in f["categories"]
  ),
  "merged: IP": lambda f: _rate(f, "merged"),
  "merged: utility lost": lambda f: _fall(f, "merged", "all"),
  "minutes": _minutes,
  "peak memory, GiB": lambda f: f["peak_memory_gib"],
}
PLAIN = ("minutes", "peak memory, GiB")


def table(results: Mapping[int, Figures]) -> str:
  """The Markdown table of {seed: its demo's figures}."""
  rows = []
  for name, of in FIGURES.items():
    values = np.array([of(figures) for figures in results.values()])
    form = "{:.1f}" if name in PLAIN else "{:.1%}"
    spread = " to ".join(form.format(v) for v in (values.min(), values.max()))
    cells = [name, *map(form.format, [*values, values.mean()]), spread]
    rows.append([cell.replace("nan", "–") for cell in cells])
  head = ["figure", *(f"seed {seed}" for seed in results), "mean", "spread"]
  return tabulate(rows, head, tablefmt="github", disable_numparse=True)
