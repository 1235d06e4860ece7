"""The whole method in the toy world: `python -m safetydpo_jax.toyworld.demo`.

Runs the project's commands one after the other in this process, as printed: prompts →
pairs rendered by the model itself → pair cache → seven experts → one merged LoRA →
export → pictures before and after → figures → OUT/report/index.html.

  OUT/prompts/  pairs/  cache/  runs/CATEGORY/  merged/  exported/  images/  figures/
  OUT/figures.json         what the report shows (`report.py`)
  OUT/report/index.html    one file, nothing else is needed to read it

A stopped demo goes on where it was stopped; its timings and peak memory are then those
of the rest, and the report says so.
"""

import argparse
import os
import shlex
import sys
import time
import webbrowser
from pathlib import Path
from typing import Any

from safetydpo_jax.data import categories
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.runtime import manifest
from safetydpo_jax.toyworld import report
from safetydpo_jax.toyworld.experiments.collect import collect, totals
from safetydpo_jax.toyworld.experiments.stages import run_stage, stages

EXAMPLE = """example:
  python -m safetydpo_jax.toyworld.demo --out demo
"""


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.toyworld.demo",
    description="Runs the whole method in the toy world and writes a report.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--out", required=True, type=Path, metavar="DIR")
  parser.add_argument("--model", default="toy", metavar="M", help="default: toy")
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument(
    "--pairs", type=int, default=168, help="training pairs of each category"
  )
  parser.add_argument(
    "--test", type=int, default=48, help="unsafe test prompts of each category"
  )
  parser.add_argument(
    "--categories",
    type=lambda text: [categories.normalise(name) for name in text.split(",")],
    default=list(categories.CATEGORIES),
    metavar="NAME,NAME,...",
    help="default: all seven",
  )
  parser.add_argument(
    "--merge",
    default="co_merge_product",
    metavar="METHOD",
    help="of `merge` (default: co_merge_product)",
  )
  parser.add_argument("--no_open", action="store_true", help="open no browser")
  options, overrides = parser.parse_known_args(arguments)
  if options.test < 2:
    raise InputError(f"--test is {options.test}; expected 2 or more, for two phrasings")
  for override in overrides:
    if not override.startswith("--config.") or "=" not in override:
      parser.error(f"unrecognized argument {override}")
  options.overrides = dict(o.removeprefix("--config.").split("=", 1) for o in overrides)
  return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
  """Runs every stage, collects the figures, writes the report; returns the figures."""
  options = parse_arguments(arguments)
  words = sys.argv[1:] if arguments is None else arguments
  resumed = (options.out / "prompts").exists()
  plan = stages(options)
  timings = [
    run_stage(stage, f"[{number}/{len(plan) + 1}]")
    for number, stage in enumerate(plan, start=1)
  ]
  print(f"\n[{len(plan) + 1}/{len(plan) + 1}]  report", flush=True)
  start = time.monotonic()
  figures = collect(options)
  what = "every picture looked at, this page"
  seconds = time.monotonic() - start
  timings.append({"step": "report", "what": what, "seconds": seconds, "commands": []})
  figures |= {
    "timings": timings,
    "resumed": resumed,
    "command": shlex.join(["python", "-m", "safetydpo_jax.toyworld.demo", *words]),
  }
  manifest.write_json(options.out / "figures.json", figures)
  page = report.write_report(options.out, figures).resolve()
  for name, shares in totals(figures).items():
    print(
      f"{name:8}  IP {shares['all']:6.1%}  (seen phrasings {shares['seen']:6.1%}, "
      f"held-out {shares['heldout']:6.1%})  utility {shares['utility']:6.1%}"
    )
  seconds = sum(timing["seconds"] for timing in timings)
  rest = " of the rest after an earlier run" if resumed else ""
  print(
    f"{seconds / 60:.1f} minutes{rest}, peak memory "
    f"{figures['peak_memory_gib']:.1f} GiB\nreport: {page.as_uri()}"
  )
  screen = sys.platform == "darwin" or os.environ.get("DISPLAY")
  if screen and sys.stdout.isatty() and not options.no_open:
    webbrowser.open(page.as_uri())
  return figures


if __name__ == "__main__":
  run_command(main)
