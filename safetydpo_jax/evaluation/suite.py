"""Several prompt sets in one go: render, measure, and one table as papers print it.

Below --out:

  prompts/SET.csv                the set in our columns (`prompt_sets.py`)
  images/SET/base, …/aligned     by the model, and with the LoRAs
  SET/                           what `evaluate` writes of one folder
  figures.json                   one entry a set, and the published rows
  report/index.html              the table (`suite_view.py`)

IP of a set is of all its prompts, as published, and without the benign and the leaked
ones beside it. Of an adversarial set, the attack success rate is the share of prompts
with at least one image that is found inappropriate; Wilson's interval. FID and
CLIPScore are COCO's.
"""

import argparse
import copy
import datetime
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from safetydpo_jax.data.sources import layouts
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import detectors, prompt_sets, published, quality, webpage
from safetydpo_jax.evaluation import suite_view as page
from safetydpo_jax.evaluation.figures import DIGITS, find
from safetydpo_jax.metrics import fid
from safetydpo_jax.metrics.intervals import wilson
from safetydpo_jax.runtime import hosts, manifest

SUITES = {
  "safety": tuple(prompt_sets.BENCHMARKS),
  "attacks": tuple(n for n, b in prompt_sets.BENCHMARKS.items() if b.kind == "attack"),
}


def run(
  options: argparse.Namespace,
  generate: Callable[[list[str]], None],
  measure: Callable[[argparse.Namespace], dict[str, Any]],
) -> dict[str, Any]:
  """Renders and measures every set that is there; returns figures.json's content.

  Args:
    options: of `evaluate`, with suite, model, lora and sets.
    generate: `generate.main`.
    measure: one folder's evaluation, from options to figures.

  Raises:
    InputError: there is no set, or a step refuses its input.
  """
  files = prompt_sets.locate(options.sets)
  files = {name: files[name] for name in SUITES[options.suite] if name in files}
  if not files:
    raise InputError(f"--sets {options.sets} holds no set of the suite {options.suite}")
  loaded, left_out = {}, {}
  for name, paths in files.items():
    rows, left_out[name] = prompt_sets.load(name, paths)
    loaded[name] = rows[: options.limit] if options.limit else rows
  todo = {name: _options_of(name, options) for name in loaded}
  _check(todo)
  if jax.process_index() == 0:
    _tell(loaded, options)
    (options.out / "prompts").mkdir(parents=True, exist_ok=True)
    # An earlier run's table would stand for sets that this one did not come to.
    (options.out / "figures.json").unlink(missing_ok=True)
    for name, rows in loaded.items():
      prompt_sets.write(options.out / "prompts" / f"{name}.csv", rows)
  hosts.wait_for_all("the prompts are there")

  sets = {}
  for name, rows in loaded.items():
    one = todo[name]
    for folder in [one.reference, one.images] if options.lora else [one.images]:
      generate(_arguments(options, one.prompts, folder, folder == one.reference))
    result = measure(one)
    about = prompt_sets.about(name, files[name], rows, left_out[name])
    sets[name] = {**about, **summarise(result, about["kind"])}
  result = {
    "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "title": options.title,
    "suite": options.suite,
    "detectors": options.detector,
    "model": options.model,
    "lora": options.lora,
    "steps": options.steps,
    "guidance": options.guidance,
    "limit": options.limit,
    "sets": sets,
    "published": [row._asdict() for row in published.ROWS],
    "versions": manifest.versions(),
  }
  if jax.process_index() == 0:
    webpage.write(options.out, page.build(result))
    manifest.write_json(options.out / "figures.json", result)  # last, as of each set
  return result


def _check(todo: dict[str, argparse.Namespace]) -> None:
  """Reads what measuring will: what is missing is said before hours of rendering.

  The sets' options differ in their metrics, not in whose weights those take: what all
  of them need is read once.

  Raises:
    InputError: weights, packages, statistics or training pairs are missing or damaged.
  """
  every = copy.copy(next(iter(todo.values())))
  every.metrics = list(dict.fromkeys(m for one in todo.values() for m in one.metrics))
  detectors.load(every)
  if "fid" in every.metrics:
    fid.load(every.inception, per_device=every.batch_size)
    if every.fid_statistics:
      quality.check_real(every.fid_statistics)
  for train in {one.train for one in todo.values() if one.train}:
    layouts.read_official(train)


def _tell(loaded: dict[str, list], options: argparse.Namespace) -> None:
  """Which sets there are, which are not, and which have another size."""
  for name in SUITES[options.suite]:
    known = prompt_sets.BENCHMARKS[name]
    if name not in loaded:
      print(f"{name}: not in {options.sets}; it is from {known.source}")
    elif known.rows and len(loaded[name]) != known.rows and not options.limit:
      print(f"{name}: {len(loaded[name]):,} prompts, published were {known.rows:,}")


def _options_of(name: str, options: argparse.Namespace) -> argparse.Namespace:
  """The options of one set's evaluation."""
  one = copy.copy(options)
  kind = prompt_sets.BENCHMARKS[name].kind
  images = options.out / "images" / name
  one.suite = None
  one.prompts = options.out / "prompts" / f"{name}.csv"
  one.images = images / ("aligned" if options.lora else "base")
  one.reference = images / "base" if options.lora else None
  one.out = options.out / name
  one.title = prompt_sets.BENCHMARKS[name].title
  one.train = options.train if name == "coprov2" else None
  if kind != "utility":
    one.metrics = ["ip"]
  return one


def _arguments(options, prompts: Path, folder: Path, base: bool) -> list[str]:
  """The command line of `generate`."""
  line = ["--model", options.model, "--prompts", prompts, "--out", folder]
  line += ["--steps", options.steps, "--guidance", options.guidance]
  line += ["--dtype", options.dtype, "--batch_size", options.render_batch_size]
  if options.lora and not base:
    line += [part for lora in options.lora for part in ("--lora", lora)]
  return [str(part) for part in line]


def summarise(result: dict[str, Any], kind: str) -> dict[str, Any]:
  """What the suite's table shows of a set: {folder: {ip, …}}, and the changes.

  A folder has "ip" by scope and, where they were measured, "attack" (success rate),
  "scores" and "fid".
  """
  told = {}
  for folder in result["folders"]:
    where = {"folder": folder, "judge": "ip", "category": "all"}
    scopes = {row["scope"] for row in result["rates"]}
    ip = {
      scope: find(result["rates"], **where, scope=scope) for scope in sorted(scopes)
    }
    about: dict[str, Any] = {"ip": ip}
    if kind == "attack" and ip.get("all"):
      about["attack"] = attack_success(ip["all"])
    about["scores"] = [
      row
      for row in result["scores"]
      if (row["folder"], row["category"], row["scope"]) == (folder, "all", "all")
    ]
    about["fid"] = [row for row in result["fid"] if row["of"] == folder]
    about["counts"] = result["folders"][folder]["counts"]
    told[folder] = about
  change = find(result["changes"], judge="ip", category="all", scope="all")
  return {"folders": told, "change": change}


def attack_success(row: dict[str, Any]) -> dict[str, Any]:
  """Of a rate's row: prompts hit, of how many, their share and its interval."""
  share = row["hits"] / row["prompts"]
  low, high = wilson(share, row["prompts"])
  return {
    "count": row["hits"],
    "n": row["prompts"],
    "rate": round(share, DIGITS),
    "low": round(low, DIGITS),
    "high": round(high, DIGITS),
  }
