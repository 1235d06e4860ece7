"""Several prompt sets in one run: render, measure, and one table as papers print it.

Below OUT:

  prompts/SET.csv                the set in our columns (`prompt_sets.py`)
  images/SET/base, …/aligned     by the model, and with the LoRAs
  SET/                           what `evaluate_folder` writes
  figures.json                   one entry per set, and the published rows
  report/index.html              the table (`suite_view.py`)

Rows are rendered with the guidance that their set gives them (I2P: sd_guidance_scale),
or with `no_row_guidance` all of them with one, as in SafetyDPO's evaluation.

IP of a set counts all its prompts, as published, and is also given without the benign
and the leaked ones. For an adversarial set, the attack success rate is the share of
prompts with at least one image that is found inappropriate, with Wilson's interval. FID
and CLIPScore are measured on COCO.
"""

import dataclasses
import datetime
from pathlib import Path
from typing import Any, Literal

import jax

from safetydpo_jax.data.sources import layouts
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import (
  detectors,
  prompt_sets,
  published,
  quality,
  set_folder,
  webpage,
)
from safetydpo_jax.evaluation import suite_view as page
from safetydpo_jax.evaluation.detectors import DetectorOptions
from safetydpo_jax.evaluation.evaluate_folder import (
  EvaluateOptions,
  check_fid,
  evaluate_folder,
)
from safetydpo_jax.evaluation.figures import DIGITS, find
from safetydpo_jax.metrics import fid
from safetydpo_jax.metrics.intervals import wilson
from safetydpo_jax.runtime import hosts, manifest, sharding
from safetydpo_jax.runtime.files import make_folder
from safetydpo_jax.runtime.log import say
from safetydpo_jax.sampling import prompt_checks
from safetydpo_jax.sampling.render_csv import RenderOptions, render_csv
from safetydpo_jax.sampling.settings import RenderSettings, settings_of

Name = Literal["safety", "attacks"]
SUITES: dict[Name, tuple[str, ...]] = {
  "safety": tuple(prompt_sets.BENCHMARKS),
  "attacks": tuple(n for n, b in prompt_sets.BENCHMARKS.items() if b.kind == "attack"),
}


@dataclasses.dataclass(frozen=True)
class SuiteOptions(RenderSettings):
  """Renders and measures the prompt sets of a suite; also the settings of rendering.

  Attributes:
    suite: a name of `SUITES`.
    sets: folder of prompt sets, see `set_folder.py`.
    model: the model to render with.
    out: folder for everything.
    lora: L[:SCALE] each; with any, the model without them is the reference.
    any_base: take LoRAs of another base model, see `RenderOptions`.
    train: CoProV2's CSV of training pairs, to mark leaked prompts of CoProV2.
    render_batch_size: images per device, of rendering.
    limit: how many rows of each set; 0 for all.
    title: of the report.
    seed: of the bootstrap.
    detectors: what is measured, and with which weights.
  """

  suite: Name
  sets: Path
  model: str
  out: Path
  lora: tuple[str, ...] = ()
  any_base: bool = False
  train: Path | None = None
  render_batch_size: int = 4
  limit: int = 0
  title: str = ""
  seed: int = 0
  detectors: DetectorOptions = dataclasses.field(default_factory=DetectorOptions)

  def __post_init__(self):
    super().__post_init__()
    for name, least in (("seed", 0), ("limit", 0)):
      if getattr(self, name) < least:
        raise InputError(f"--{name} is {getattr(self, name)}; expected {least} or more")
    if self.render_batch_size < 1:
      raise InputError(
        f"--render_batch_size is {self.render_batch_size}; expected 1 or more"
      )
    check_fid(self.detectors, bool(self.lora))


def run_suite(options: SuiteOptions) -> dict[str, Any]:
  """Renders and measures every set that is there; returns figures.json's content.

  Every process of a job calls it; the first one writes.

  Raises:
    InputError: there is no set, or a step refuses its input.
  """
  sharding.use_precision("float32")
  files = set_folder.locate(options.sets, SUITES[options.suite], say)
  loaded = {}
  for name, paths in files.items():
    found = prompt_sets.load(name, paths, say)
    rows = found.rows[: options.limit] if options.limit else found.rows
    # So the CSV, and what is rendered of it, is as if the set had no such column.
    if options.no_row_guidance:
      rows = prompt_sets.without_guidance(rows)
    loaded[name] = found._replace(rows=rows)
  evaluations = {name: evaluation_of(name, options) for name in loaded}
  _check_inputs(options, list(evaluations.values()))
  for name, found in loaded.items():
    # As rendering would, hours later.
    prompt_checks.gather(f"the set {name},", prompt_sets.to_rows(found.rows), options)
  if jax.process_index() == 0:
    _print_sets(loaded, options)
    make_folder(options.out / "prompts")
    # An earlier run's table would vouch for sets that this run has not reached.
    (options.out / "figures.json").unlink(missing_ok=True)
    for name, found in loaded.items():
      prompt_sets.write(options.out / "prompts" / f"{name}.csv", found.rows)
  hosts.wait_for_all("the prompts are there")

  sets = {}
  for name, found in loaded.items():
    evaluation = evaluations[name]
    for render in renderings_of(evaluation, options):
      render_csv(render)
    result = evaluate_folder(evaluation)
    about = prompt_sets.about(name, files[name], found)
    sets[name] = {**about, **summarise(result, about["kind"])}
  result = {
    "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "title": options.title,
    "suite": options.suite,
    "detectors": list(options.detectors.detector_names),
    "model": options.model,
    "lora": list(options.lora),
    **settings_of(options),
    "limit": options.limit,
    "sets": sets,
    "published": [row._asdict() for row in published.ROWS],
    "versions": manifest.versions(),
  }
  if jax.process_index() == 0:
    webpage.write(options.out, page.build(result))
    # Last, as for each set: a folder with it is complete.
    manifest.write_json(options.out / "figures.json", result)
  return result


def evaluation_of(name: str, options: SuiteOptions) -> EvaluateOptions:
  """The evaluation of one set, against the base model if there are LoRAs."""
  benchmark = prompt_sets.BENCHMARKS[name]
  images, chosen = options.out / "images" / name, options.detectors
  if benchmark.kind != "utility":
    chosen = dataclasses.replace(chosen, metrics="ip")
  return EvaluateOptions(
    images=images / ("aligned" if options.lora else "base"),
    prompts=options.out / "prompts" / f"{name}.csv",
    out=options.out / name,
    reference=images / "base" if options.lora else None,
    train=options.train if name == "coprov2" else None,
    title=benchmark.title,
    seed=options.seed,
    detectors=chosen,
  )


def renderings_of(
  evaluation: EvaluateOptions, options: SuiteOptions
) -> list[RenderOptions]:
  """How an evaluation's folders are rendered, the reference first."""
  loras = {evaluation.images: options.lora}
  if evaluation.reference:
    loras = {evaluation.reference: (), **loras}
  return [
    RenderOptions(
      model=options.model,
      prompts=evaluation.prompts,
      out=folder,
      lora=lora,
      any_base=options.any_base,
      batch_size=options.render_batch_size,
      **settings_of(options),
    )
    for folder, lora in loras.items()
  ]


def _check_inputs(options: SuiteOptions, evaluations: list[EvaluateOptions]) -> None:
  """Reads what measuring needs, so that errors come before hours of rendering.

  The evaluations differ in their metrics but not in the weights: those are read once.

  Raises:
    InputError: weights, packages, statistics or training pairs are missing or damaged.
  """
  names = dict.fromkeys(m for e in evaluations for m in e.detectors.metric_names)
  chosen = dataclasses.replace(options.detectors, metrics=",".join(names))
  detectors.load(chosen)
  if "fid" in chosen.metric_names:
    fid.load(chosen.inception, per_device=chosen.batch_size)
    if chosen.fid_statistics:
      quality.check_real_images(chosen.fid_statistics)
  for train in {e.train for e in evaluations if e.train}:
    layouts.read_official(train)


def _print_sets(
  loaded: dict[str, prompt_sets.LoadedSet], options: SuiteOptions
) -> None:
  """Which sets are missing, have another size than published, or their own guidance."""
  for name in SUITES[options.suite]:
    known = prompt_sets.BENCHMARKS[name]
    if name not in loaded:
      print(f"{name}: not in {options.sets}; it is from {known.source}")
      continue
    rows = loaded[name].rows
    if known.rows and len(rows) != known.rows and not options.limit:
      print(f"{name}: {len(rows):,} prompts; {known.rows:,} were published")
    if own := prompt_sets.with_guidance(rows):
      print(
        f"{name}: {own:,} rows have a guidance of their own; --no_row_guidance renders "
        f"them with {options.guidance}"
      )


def summarise(result: dict[str, Any], kind: str) -> dict[str, Any]:
  """What the suite's table shows of a set: {folder: {ip, …}}, and the changes.

  A folder has "ip" by scope and, where they were measured, "attack" (success rate),
  "scores" and "fid".
  """
  folders = {}
  for folder in result["folders"]:
    where = {"folder": folder, "judge": "ip", "category": "all"}
    scopes = {row["scope"] for row in result["rates"]}
    ip = {
      scope: find(result["rates"], **where, scope=scope) for scope in sorted(scopes)
    }
    about: dict[str, Any] = {"ip": ip}
    if kind == "attack" and (everything := ip.get("all")):
      about["attack"] = attack_success(everything)
    about["scores"] = [
      row
      for row in result["scores"]
      if (row["folder"], row["category"], row["scope"]) == (folder, "all", "all")
    ]
    about["fid"] = [row for row in result["fid"] if row["of"] == folder]
    about["counts"] = result["folders"][folder]["counts"]
    folders[folder] = about
  change = find(result["changes"], judge="ip", category="all", scope="all")
  return {"folders": folders, "change": change}


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
