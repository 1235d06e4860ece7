"""What the demo found, as one dict for its report."""

import csv
import datetime
import json
import resource
import sys
from pathlib import Path
from typing import Any

from safetydpo_jax.formats.loras import expert
from safetydpo_jax.runtime import machine, manifest
from safetydpo_jax.toyworld.experiments import measuring
from safetydpo_jax.toyworld.experiments.measuring import Picture
from safetydpo_jax.toyworld.experiments.stages import (
  CONTENDERS,
  GUIDANCE,
  STEPS,
  DemoOptions,
)
from safetydpo_jax.toyworld.world import degradation, detector

EXAMPLES = (4, 2)  # unsafe and safe prompts of each category that the report shows


def look_at(options: DemoOptions) -> dict[str, list[Picture]]:
  """Every contender's pictures of the test prompts, in the same order."""
  looks = {}
  for contender in CONTENDERS:
    looks[contender] = [
      picture
      for name in options.names
      for picture in measuring.look(
        options.out / "images" / contender / (name if contender == "experts" else ""),
        options.out / f"prompts/{name}.csv",
      )
    ]
  return looks


def examples(
  out: Path, looks: dict[str, list[Picture]], category: str
) -> list[dict[str, Any]]:
  """A few test prompts of a category, with each contender's picture."""
  rows = list(zip(*looks.values()))
  result = []
  for unsafe, count in zip((True, False), EXAMPLES):
    mine = [r for r in rows if r[0].category == category and bool(r[0].asked) == unsafe]
    for row in mine[:: max(len(mine) // count, 1)][:count]:
      shown = dict(zip(looks, row))
      result.append(
        {
          "category": category,
          "prompt": row[0].prompt,
          "concept": row[0].asked,
          "images": {
            name: str(picture.file.relative_to(out.resolve()))
            for name, picture in shown.items()
          },
          "found": {name: picture.found for name, picture in shown.items()},
        }
      )
  return result


def training_pairs(out: Path) -> list[dict[str, str]]:
  """The first pair of each category."""
  with open(out / "pairs/prompts.csv", newline="", encoding="utf-8") as lines:
    rows = list(csv.DictReader(lines))
  first: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
  for unsafe, safe in zip(rows[::2], rows[1::2]):
    first.setdefault(unsafe["category"], (unsafe, safe))
  return [
    {
      "category": category,
      "prompt": unsafe["prompt"],
      "safe_prompt": safe["prompt"],
      "preferred": f"pairs/{safe['image']}",
      "dispreferred": f"pairs/{unsafe['image']}",
    }
    for category, (unsafe, safe) in first.items()
  ]


def collect(options: DemoOptions) -> dict[str, Any]:
  """What the report shows of the demo's folder, and this process's peak memory."""
  out, names = options.out, options.names
  looks = look_at(options)
  about = {
    name: manifest.read_json(out / "runs" / name / expert.MANIFEST, "finished expert")
    for name in names
  }
  config = about[names[0]]["config"]
  curves = {}
  for name in names:
    lines = (out / "runs" / name / "metrics.jsonl").read_text().splitlines()
    curves[name] = [json.loads(line) for line in lines]
  errors = degradation.measured_error()["autoencoder"]
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return {
    "title": "toy world",
    "date": datetime.date.today().isoformat(),
    "seed": options.seed,
    "machine": machine.describe(),
    "versions": manifest.versions(),
    "model": about[names[0]]["base"],
    "sampler": {"steps": STEPS, "guidance": GUIDANCE},
    "detector": {
      "threshold": detector.THRESHOLD,
      "level": "autoencoder",
      "missed": errors["missed"],
      "false_alarms": errors["false_alarm"],
    },
    "training": {
      "steps": config["steps"],
      "batch_size": config["batch_size"],
      "beta": config["dpo"]["beta"],
      "rank": config["lora"]["rank"],
      "learning_rate": config["learning_rate"],
      "pairs": options.pairs,
    },
    "categories": list(names),
    "contenders": list(CONTENDERS),
    **{
      kind.__name__: [
        {"contender": contender, **row}
        for contender, pictures in looks.items()
        for row in kind(pictures)
      ]
      for kind in (measuring.rates, measuring.utility)
    },
    "curves": curves,
    "examples": [row for name in names for row in examples(out, looks, name)],
    "pairs": training_pairs(out),
    # Kilobytes on Linux, bytes on macOS.
    "peak_memory_gib": peak / (2**30 if sys.platform == "darwin" else 2**20),
  }


def totals(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
  """Per contender IP by phrasing and utility, over all categories."""
  result: dict[str, dict[str, float]] = {name: {} for name in figures["contenders"]}
  for row in figures["rates"]:
    if row["category"] == "all":
      result[row["contender"]][row["phrasing"]] = row["count"] / row["n"]
  for row in figures["utility"]:
    if row["category"] == "all":
      result[row["contender"]]["utility"] = row["attributes"]
  return result
