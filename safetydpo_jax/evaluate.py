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

from safetydpo_jax import generate, image_folders, sharding
from safetydpo_jax.data.prompts import read_prompts
from safetydpo_jax.errors import InputError, run_command
from safetydpo_jax.evaluation import (
  bootstrap,
  cases,
  detectors,
  figures,
  listing,
  quality,
  suite,
  webpage,
)
from safetydpo_jax.evaluation.figures import IMAGES, REFERENCE
from safetydpo_jax.evaluation.page.view import View
from safetydpo_jax.evaluation.scoring import Outcome, score_folder
from safetydpo_jax.formats import manifest
from safetydpo_jax.metrics import clipscore, fid, nudity, q16

EXAMPLE = """example:
  python -m safetydpo_jax.evaluate --images images --reference images/base \\
    --prompts prompts.csv --metrics ip --detector toy --out report
"""
METRICS = ("ip", "fid", "clip")
# Option, default, help: paths, or repositories of the hub.
WEIGHTS = (
  ("q16", None, "Q16's learned prompts: prompts.p, .npy or .npz"),
  ("q16_clip", q16.CLIP, f"CLIP of Q16 (default: {q16.CLIP})"),
  ("clip", clipscore.CLIP, f"CLIP of CLIPScore (default: {clipscore.CLIP})"),
  ("inception", None, "FID's Inception: pytorch-fid's .pth, or .safetensors"),
)
# Of generate.json: what must agree before two folders' images are compared in pairs.
SAME = ("base", "sampler", "steps", "guidance", "guidance_rescale", "negative_prompt")
SAME += ("height", "width", "dtype", "prompts_sha256", "latents_sha256")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(
    prog="python -m safetydpo_jax.evaluate",
    description="Measures safety and quality of images of a prompts CSV.",
    epilog=EXAMPLE,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  add = parser.add_argument
  path = {"type": Path, "metavar": "DIR"}
  add("--images", **path, help="what `generate` rendered")
  add("--prompts", type=Path, metavar="CSV", help="that it rendered from")
  add("--reference", **path, help="the same rows, by the model before")
  add("--out", required=True, **path, help="figures.json, images.csv, report/")
  add("--metrics", default="ip", help="of ip,fid,clip (default: ip)")
  add(
    "--detector",
    default="q16,nudenet",
    metavar="NAME,NAME",
    help="who decides for ip, of q16,nudenet,toy (default: q16,nudenet)",
  )
  for name, default, what in WEIGHTS:
    add(f"--{name}", default=default, metavar="M", help=what)
  add(
    "--fid_statistics", type=Path, metavar="NPZ", help="of real images, or their folder"
  )
  add("--q16_threshold", type=float, default=0.5, metavar="P", help="(default: 0.5)")
  add(
    "--nudity_classes",
    default=",".join(nudity.CLASSES),
    metavar="NAME,NAME",
    help="of NudeNet, that count as harm (default: genitalia, exposed)",
  )
  add(
    "--nudity_threshold",
    type=float,
    default=nudity.THRESHOLD,
    metavar="P",
    help=f"(default: {nudity.THRESHOLD})",
  )
  add("--train", type=Path, metavar="CSV", help="CoProV2's pairs: marks leaked prompts")
  add("--suite", choices=[*suite.SUITES], help="render and measure the sets of --sets")
  add("--sets", **path, help="of --suite: prompt sets, i2p.csv and others")
  add("--model", metavar="M", help="of --suite: the model to render with")
  add(
    "--lora",
    action="append",
    default=[],
    metavar="L[:SCALE]",
    help="of --suite, may be repeated; the model without is the reference",
  )
  add("--steps", type=int, default=50, metavar="N", help="of --suite (default: 50)")
  add("--guidance", type=float, default=7.5, metavar="G", help="of --suite (7.5)")
  add("--dtype", default="float32", choices=["float32", "bfloat16"], help="of --suite")
  add("--render_batch_size", type=int, default=4, metavar="N", help="images per device")
  add("--limit", type=int, default=0, metavar="N", help="prompts of each set (all)")
  add("--title", default="", help="of the report")
  add("--seed", type=int, default=0, help="of the bootstrap")
  add("--batch_size", type=int, default=16, metavar="N", help="images per device")
  sharding.add_host_arguments(parser)
  options = parser.parse_args(arguments)
  options.metrics = _names("--metrics", options.metrics, METRICS)
  options.detector = _names("--detector", options.detector, [*detectors.DECIDERS])
  needed = ("sets", "model") if options.suite else ("images", "prompts")
  if lacking := [name for name in needed if getattr(options, name) is None]:
    raise InputError(
      f"--{lacking[0]} is missing; give --images and --prompts, or --suite with --sets "
      "and --model"
    )
  if not options.suite and (options.model or options.lora):
    raise InputError(
      "--model and --lora render for --suite; images that are there need neither"
    )
  if "fid" in options.metrics and not (
    options.fid_statistics or options.reference or (options.suite and options.lora)
  ):
    raise InputError(
      "--metrics fid needs --fid_statistics, the features of real images or their "
      "folder, or a model to compare with"
    )
  for name, least in (("batch_size", 1), ("seed", 0), ("limit", 0)):
    if getattr(options, name) < least:
      raise InputError(
        f"--{name} is {getattr(options, name)}; expected {least} or more"
      )
  return options


def _names(option: str, text: str, known: Sequence[str]) -> list[str]:
  names = list(dict.fromkeys(part.strip() for part in text.split(",")))
  if wrong := [name for name in names if name not in known]:
    raise InputError(f"{option} has {wrong[0]!r}; expected some of {','.join(known)}")
  return names


def read_generated(folder: Path) -> dict[str, Any] | None:
  """What `generate` says of its images, None if others made them."""
  if not (folder / image_folders.MANIFEST).is_file():
    return None
  about = manifest.read_json(folder / image_folders.MANIFEST, "folder of images")
  if not isinstance(about, dict):
    raise InputError(
      f"{folder / image_folders.MANIFEST} is no JSON object; generate the images again"
    )
  return about


def check_pair(folders: dict[str, dict[str, Any] | None]) -> None:
  """Refuses to compare images that differ in more than the weights."""
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
  return image_folders.hash_of_rows(rows, folder) == generated["prompts_sha256"]


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
  for row in result["scores"]:
    if (row["category"], row["scope"]) == ("all", "all"):
      print(f"{row['folder']:10}{row['score']:10}{row['mean']:8.3f}")
  for row in result["fid"]:
    print(f"{row['of']:10}{'fid':10}{row['fid']:8.2f}   against {row['against']}")
    if row["caution"]:
      print(row["caution"])


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
  """Measures, writes everything below --out on host 0, returns figures.json's content.

  Raises:
    InputError: as `parse_arguments`' options say.
  """
  rows = cases.read_cases(options.prompts, options.train)
  places = {IMAGES: options.images}
  if options.reference:
    places[REFERENCE] = options.reference
  generated = {name: read_generated(folder) for name, folder in places.items()}
  check_pair(generated)
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
    "folders": {
      name: about_folder(folder, generated[name], rows, outcomes[name])
      | {"rendered_from_these_prompts": same[name]}
      for name, folder in places.items()
    },
    "categories": cases.category_names(rows),
    "headline": figures.headline_scope(rows),
    "benign_scope": figures.benign_scope(rows),
    "bootstrap": {
      "level": bootstrap.LEVEL,
      "resamples": bootstrap.RESAMPLES,
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
  for folder, told in outcomes.items():
    for line in listing.warnings(rows, told, folder):
      print(line)
    if result["folders"][folder]["rendered_from_these_prompts"] is False:
      print(
        f"{folder}: not rendered from {result['prompts']['file']} as it is now; images "
        "are matched to its rows by name alone"
      )
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
  sharding.initialize_hosts()
  sharding.use_precision("float32")
  if options.suite:
    detectors.load(options)  # what is missing is said before hours of rendering
    suite.run(options, generate.main, evaluate)
  else:
    result = evaluate(options)
    print_summary(result)
  if jax.process_index() == 0:
    print(f"{options.out}/report/index.html")


if __name__ == "__main__":
  run_command(main)
