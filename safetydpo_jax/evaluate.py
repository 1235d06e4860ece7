"""Turns images into figures: `python -m safetydpo_jax.evaluate --images DIR …`.

Writes, below --out,

  figures.json        every figure with its interval, and what it rests on: detectors,
                      hashes of their weights, thresholds, how the images were made
  images.csv          a line for each row of the prompts CSV: state, scores, decisions
  report/index.html   the same to look at

Metrics: ip (`evaluation/detectors.py`: the share of images in which any detector finds
something), clip (CLIPScore), fid. Images and their states: `evaluation/scoring.py`;
what the tables of figures.json hold: `evaluation/figures.py`. With --reference, images
of the same CSV by the model before, figures stand in pairs as well.

--suite renders and measures several prompt sets (`evaluation/suite.py`):

  python -m safetydpo_jax.evaluate --suite safety --model sd15 --lora merged \\
    --sets sets --q16 prompts.p --out report
"""

import argparse
import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from safetydpo_jax import generate
from safetydpo_jax.data.prompts import read_prompts
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.evaluation import (
  cases,
  detectors,
  figures,
  listing,
  quality,
  suite,
  webpage,
)
from safetydpo_jax.evaluation.command_line import parse_arguments
from safetydpo_jax.evaluation.figures import IMAGES, REFERENCE
from safetydpo_jax.evaluation.report_view import SCOPES, View
from safetydpo_jax.evaluation.scoring import Outcome, score_folder
from safetydpo_jax.metrics import fid, intervals
from safetydpo_jax.runtime import hosts, manifest, sharding
from safetydpo_jax.sampling.folders import MANIFEST, hash_of_rows

# Of generate.json: what must agree before two folders' images are compared in pairs.
SAME = ("base", "sampler", "steps", "guidance", "guidance_rescale", "negative_prompt")
SAME += ("height", "width", "dtype", "prompts_sha256", "latents_sha256")


def read_generated(folder: Path) -> dict[str, Any] | None:
  """What `generate` says of its images, None if others made them."""
  if not (folder / MANIFEST).is_file():
    return None
  about = manifest.read_json(folder / MANIFEST, "folder of images")
  if not isinstance(about, dict):
    raise InputError(
      f"{folder / MANIFEST} is no JSON object; generate the images again"
    )
  return about


def check_pair(
  places: dict[str, Path], folders: dict[str, dict[str, Any] | None]
) -> None:
  """Refuses to compare images that differ in more than the weights, or in nothing."""
  if REFERENCE in places and places[REFERENCE].resolve() == places[IMAGES].resolve():
    raise InputError(
      f"--images and --reference are both {places[IMAGES]}; --reference is the folder "
      "of the model before"
    )
  images, reference = folders[IMAGES], folders.get(REFERENCE)
  if not images or not reference:
    return
  for name in SAME:
    if images.get(name) != reference.get(name):
      raise InputError(
        f"--images were made with {name} {images.get(name)!r}, --reference with "
        f"{reference.get(name)!r}: the difference would not be the training's; "
        "generate both alike"
      )


def same_prompts(prompts: Path, folder: Path, generated: dict | None) -> bool | None:
  """Whether a folder's images were rendered from just these rows; None if unknown."""
  if not generated or "prompts_sha256" not in generated:
    return None
  rows = read_prompts(prompts, folder)
  return hash_of_rows(rows, folder) == generated["prompts_sha256"]


def warnings(
  prompts: Path,
  rows: Sequence[cases.Case],
  outcomes: dict[str, list[Outcome]],
  folders: dict[str, dict[str, Any]],
) -> list[str]:
  """What whoever reads the figures must know of the images, a line each."""
  found = []
  for name, about in folders.items():
    if about["rendered_from_these_prompts"] is False:
      found.append(
        f"{name}: not rendered from {prompts} as it is now; images are matched to its "
        "rows by name alone"
      )
    found += listing.warnings(rows, outcomes[name], name)
  loras = {n: (about["generated"] or {}).get("lora") for n, about in folders.items()}
  if loras.get(REFERENCE) and loras[IMAGES] == []:
    found.append(
      "the reference was rendered with a LoRA and the images without: are the folders "
      "swapped?"
    )
  return found


def about_folder(
  folder: Path, generated: dict | None, rows: Sequence[cases.Case], told: list[Outcome]
) -> dict[str, Any]:
  """Where the images are, what made them, which bytes they are, what became of them."""
  bytes_of = sorted((case.name, outcome.sha256) for case, outcome in zip(rows, told))
  return {
    "folder": str(folder),
    "generated": generated,
    "fingerprint": hashlib.sha256(repr(bytes_of).encode()).hexdigest()[:16],
    "counts": figures.count_states(told),
  }


def print_summary(result: dict[str, Any]) -> None:
  """The headline figures as lines."""
  if jax.process_index() > 0:
    return
  if result["rates"] and result["headline"] != "all":
    benign = result["prompts"]["benign"]
    print(f"rates are without {benign} rows whose prompts ask for no harm")
  for row in result["rates"]:
    if (row["category"], row["scope"]) == ("all", result["headline"]):
      print(
        f"{row['folder']:10}{row['judge']:10}{row['rate']:8.1%}   95 % "
        f"{row['low']:.1%} to {row['high']:.1%}   {row['count']} of {row['n']} images"
      )
  for row in result["changes"]:
    if (row["category"], row["scope"]) == ("all", result["headline"]):
      print(
        f"{'change':10}{row['judge']:10}{row['difference']:+8.1%}   95 % "
        f"{row['low']:+.1%} to {row['high']:+.1%}   only reference "
        f"{row['only_reference']}, only images {row['only_images']}"
      )
  view = View(result, [], {})
  for row in result["scores"]:
    if (row["category"], row["scope"]) == ("all", view.score_scope(row["score"])):
      line = f"{row['folder']:10}{row['score']:10}{row['mean']:8.3f}   "
      if row["low"] is not None:
        line += f"95 % {row['low']:.3f} to {row['high']:.3f}   "
      print(line + SCOPES[row["scope"]])
  for row in result["fid"]:
    print(f"{row['of']:10}{'fid':10}{row['fid']:8.2f}   against {row['against']}")
    if row["caution"]:
      print(row["caution"])


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
  """Measures, writes everything below --out on host 0, returns figures.json's content.

  Raises:
    InputError: a file is missing or damaged, or the folders were not made alike.
  """
  rows = cases.read_cases(options.prompts, options.train)
  places = {IMAGES: options.images}
  if options.reference:
    places[REFERENCE] = options.reference
  generated = {name: read_generated(folder) for name, folder in places.items()}
  check_pair(places, generated)
  same = {n: same_prompts(options.prompts, f, generated[n]) for n, f in places.items()}
  watching = detectors.load(options)
  size = options.batch_size * jax.local_device_count()
  seen, real, about_real = {}, None, None
  if "fid" in options.metrics:
    network = fid.load(options.inception, per_device=options.batch_size)
    seen = {name: fid.Statistics() for name in places}
    if options.fid_statistics:
      place = options.fid_statistics
      real, about_real = quality.of_real(place, network, size, options.out)
  outcomes, about = {}, {}
  for name, folder in places.items():
    more = [quality.watch(network, seen[name])] if seen else []
    about = {detector.name: detector.about for detector in watching + more}
    outcomes[name] = score_folder(
      folder, options.prompts, rows, watching + more, size, name
    )
  seen = {name: quality.together(statistics) for name, statistics in seen.items()}
  folders = {
    name: about_folder(folder, generated[name], rows, outcomes[name])
    | {"rendered_from_these_prompts": same[name]}
    for name, folder in places.items()
  }
  scores = [detector.score for detector in watching if detector.score]
  result = {
    "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "title": options.title,
    "prompts": {
      "file": str(options.prompts),
      "fingerprint": cases.fingerprint(rows),
      "benign": sum(case.benign for case in rows),
      "leaked": sum(case.leaked for case in rows) if options.train else None,
    },
    "metrics": options.metrics,
    "detectors": about,
    "fid_statistics": about_real,
    "folders": folders,
    "warnings": warnings(options.prompts, rows, outcomes, folders),
    "categories": cases.category_names(rows),
    "headline": figures.headline_scope(rows),
    "benign_scope": figures.benign_scope(rows),
    "bootstrap": {
      "level": intervals.LEVEL,
      "resamples": intervals.RESAMPLES,
      "seed": options.seed,
      "unit": "prompt",
    },
    **figures.all_figures(rows, outcomes, scores, options.seed),
    "fid": quality.rows(seen, real),
    "versions": manifest.versions(),
  }
  if jax.process_index() == 0:
    write(options.out, result, rows, outcomes)
  return result


def write(
  out: Path,
  result: dict[str, Any],
  rows: Sequence[cases.Case],
  outcomes: dict[str, list[Outcome]],
) -> None:
  """figures.json, images.csv and the report."""
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"cannot make the folder {out}: {error.strerror}") from error
  # An earlier run's would vouch for this one's other files if it ended between them.
  (out / "figures.json").unlink(missing_ok=True)
  for line in result["warnings"]:
    print(line)
  lines = listing.lines(rows, outcomes)
  listing.write(out / "images.csv", lines)
  files = {
    name: {case.name: Path(about["folder"], case.name) for case in rows}
    for name, about in result["folders"].items()
  }
  webpage.write(out, webpage.build(View(result, lines, files)))
  manifest.write_json(out / "figures.json", result)  # last: what has it is complete


def main(arguments: list[str] | None = None) -> None:
  """Reads, measures, writes, prints."""
  options = parse_arguments(arguments)
  hosts.initialize()
  sharding.use_precision("float32")
  if options.suite:
    suite.run(options, generate.main, evaluate)
  else:
    result = evaluate(options)
    print_summary(result)
  if jax.process_index() == 0:
    print(f"{options.out}/report/index.html")


if __name__ == "__main__":
  run_command(main)
