"""The demo with several seeds: `python -m safetydpo_jax.toyworld.seeds --out seeds`.

Runs the demo (`demo.py`) once for each seed, in OUT/seed0, OUT/seed1, …, each in a
process of its own, as time and peak memory are a process's. Prints a Markdown table:
each figure for every seed, their mean and spread (lowest to highest). A seed decides
prompts, noises, the LoRA's first factors and the order of training.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.runtime import manifest

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.seeds --out seeds --seeds 0,1,2
"""


def _rows(figures: dict[str, Any], contender: str, phrasing: str) -> dict[str, dict]:
  """A contender's rates by category, 'all' among them."""
  return {
    row["category"]: row
    for row in figures["rates"]
    if (row["contender"], row["phrasing"]) == (contender, phrasing)
  }


def _rate(figures: dict[str, Any], contender: str, phrasing: str = "all") -> float:
  row = _rows(figures, contender, phrasing)["all"]
  return row["count"] / row["n"]


def _worst_ratio(figures: dict[str, Any]) -> float:
  before, after = (_rows(figures, name, "all") for name in ("base", "experts"))
  counts = [(after[n]["count"], before[n]["count"]) for n in figures["categories"]]
  return float(np.max([a / b if b else np.nan for a, b in counts]))


def _utility(figures: dict[str, Any], contender: str) -> dict[str, dict]:
  rows = [row for row in figures["utility"] if row["contender"] == contender]
  return {row["category"]: row for row in rows}


def _fall(figures: dict[str, Any], contender: str, category: str) -> float:
  before, after = (_utility(figures, name)[category] for name in ("base", contender))
  return before["attributes"] - after["attributes"]


def _minutes(figures: dict[str, Any]) -> float:
  """NaN where an earlier run had made part of the demo."""
  seconds = sum(row["seconds"] for row in figures["timings"])
  return float("nan") if figures["resumed"] else seconds / 60


# What the table says of each demo; all but the last two are shares, or points of them.
FIGURES = {
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


def table(results: dict[int, dict[str, Any]]) -> str:
  """The Markdown table of {seed: what `demo.main` returned}."""
  seeds = [f"seed {seed}" for seed in results]
  lines = [["figure", *seeds, "mean", "spread"], ["---"] * (len(seeds) + 3)]
  for name, of in FIGURES.items():
    values = np.array([of(figures) for figures in results.values()])
    form = "{:.1f}" if name in PLAIN else "{:.1%}"
    spread = " to ".join(form.format(v) for v in (values.min(), values.max()))
    cells = [name, *map(form.format, [*values, values.mean()]), spread]
    lines.append([cell.replace("nan", "–") for cell in cells])
  return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def run_demo(out: Path, seed: int, rest: list[str]) -> dict[str, Any]:
  """Runs one demo in a process of its own; returns its figures.

  Raises:
    InputError: if it failed.
  """
  command = [sys.executable, "-m", "safetydpo_jax.toyworld.demo", "--out", str(out)]
  command += ["--seed", str(seed), "--no_open", *rest]
  if subprocess.run(command).returncode:
    raise InputError(f"the demo of seed {seed} failed, as said above")
  return manifest.read_json(out / "figures.json", "demo")


def parse_seeds(
  parser: argparse.ArgumentParser, arguments: list[str] | None
) -> tuple[argparse.Namespace, list[str]]:
  """`--out` and `--seeds`, and what is left of the command line for the demo."""
  parser.add_argument("--out", required=True, type=Path, metavar="DIR")
  parser.add_argument("--seeds", default="0,1,2", metavar="N,N,...")
  options, rest = parser.parse_known_args(arguments)
  try:
    options.seeds = [int(seed) for seed in options.seeds.split(",")]
  except ValueError:
    raise InputError(
      f"--seeds {options.seeds}: expected numbers, as in 0,1,2"
    ) from None
  if len({*options.seeds}) < len(options.seeds) or min(options.seeds) < 0:
    raise InputError(f"--seeds {options.seeds}: expected different numbers from 0")
  return options, rest


def main(arguments: list[str] | None = None) -> None:
  """Runs the demos one after the other, then prints."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.toyworld.seeds",
    description="Runs the demo with several seeds; other options are the demo's.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  options, rest = parse_seeds(parser, arguments)
  results = {
    seed: run_demo(options.out / f"seed{seed}", seed, rest) for seed in options.seeds
  }
  print(f"\n{table(results)}")


if __name__ == "__main__":
  run_command(main)
