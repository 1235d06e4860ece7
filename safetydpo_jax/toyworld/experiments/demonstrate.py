"""The whole method in the toy world, stage by stage, in one process.

prompts → pairs rendered by the model itself → pair cache → seven experts → one merged
LoRA → export → pictures before and after → figures.

  OUT/prompts/  pairs/  cache/  runs/CATEGORY/  merged/  exported/  images/  figures/
  OUT/figures.json         what the report shows

A stopped demo resumes from what OUT holds; its timings and peak memory are then those
of the rest, and the report says so.
"""

import time
from collections.abc import Sequence
from typing import Any

from safetydpo_jax.runtime import command_line, manifest
from safetydpo_jax.toyworld.experiments.collect import collect, totals
from safetydpo_jax.toyworld.experiments.stages import (
  DemoOptions,
  Timing,
  read_overrides,
  run_stage,
  stages,
)

FIGURES = "figures.json"


def run_demo(options: DemoOptions, overrides: Sequence[str] = ()) -> dict[str, Any]:
  """Runs every stage and writes OUT/figures.json; returns its content.

  Args:
    options: the demo's.
    overrides: `--config.NAME=VALUE` words for the experts' training.

  Raises:
    InputError: an option, an override or what the folder holds does not fit.
  """
  resumed = (options.out / "prompts").exists()
  plan = stages(options, read_overrides(overrides))
  last = len(plan) + 1
  timings = [
    run_stage(stage, f"[{number}/{last}]") for number, stage in enumerate(plan, start=1)
  ]
  print(f"\n[{last}/{last}]  report", flush=True)
  start = time.monotonic()
  figures = collect(options)
  timing: Timing = {
    "step": "report",
    "what": "every picture looked at, this page",
    "seconds": time.monotonic() - start,
    "commands": [],
  }
  figures |= {
    "timings": [*timings, timing],
    "resumed": resumed,
    "command": command_line.written("toyworld.demo", options, *overrides),
  }
  manifest.write_json(options.out / FIGURES, figures)
  return figures


def describe(figures: dict[str, Any]) -> str:
  """A line for each contender, and what the demo cost."""
  lines = [
    f"{name:8}  IP {shares['all']:6.1%}  (seen phrasings {shares['seen']:6.1%}, "
    f"held-out {shares['heldout']:6.1%})  utility {shares['utility']:6.1%}"
    for name, shares in totals(figures).items()
  ]
  seconds = sum(timing["seconds"] for timing in figures["timings"])
  rest = " of the rest after an earlier run" if figures["resumed"] else ""
  memory = f"peak memory {figures['peak_memory_gib']:.1f} GiB"
  return "\n".join([*lines, f"{seconds / 60:.1f} minutes{rest}, {memory}"])
