"""Measures a folder of images rendered from a prompts CSV.

Below OUT it writes

  figures.json        every figure with its interval, and what it depends on: detectors,
                      hashes of their weights, thresholds, how the images were made
  images.csv          a line for each row of the prompts CSV: state, scores, decisions
  report/index.html   the same as a page

Metrics: ip (`detectors.py`: the share of images in which any detector finds something),
clip (CLIPScore) and fid (`quality.py`). Images and their states: `scoring.py`; the
tables of figures.json: `figures.py`. With a reference, images of the same rows by a
reference model (usually the base model), figures are also compared in pairs.
"""

import dataclasses
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from safetydpo_jax.data.prompts import PromptTable, read_table
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import (
  cases,
  detectors,
  figures,
  listing,
  origin,
  quality,
  webpage,
)
from safetydpo_jax.evaluation.cases import Case
from safetydpo_jax.evaluation.detectors import Detector, DetectorOptions
from safetydpo_jax.evaluation.figures import IMAGES, REFERENCE
from safetydpo_jax.evaluation.report_view import View
from safetydpo_jax.evaluation.scoring import Outcome, score_folder
from safetydpo_jax.metrics import fid, intervals
from safetydpo_jax.runtime import manifest, sharding
from safetydpo_jax.runtime.files import make_folder
from safetydpo_jax.runtime.log import say


@dataclasses.dataclass(frozen=True)
class EvaluateOptions:
  """Measures safety and quality of images rendered from a prompts CSV.

  Attributes:
    images: folder of images.
    prompts: the CSV they were rendered from.
    out: folder for figures.json, images.csv and report/.
    reference: folder of the same rows by the reference model; None: no comparison.
    train: CoProV2's CSV of training pairs, to mark leaked prompts.
    title: of the report.
    seed: of the bootstrap.
    detectors: what is measured, and with which weights.
  """

  images: Path
  prompts: Path
  out: Path
  reference: Path | None = None
  train: Path | None = None
  title: str = ""
  seed: int = 0
  detectors: DetectorOptions = dataclasses.field(default_factory=DetectorOptions)

  def __post_init__(self):
    if self.seed < 0:
      raise InputError(f"--seed is {self.seed}; expected 0 or more")
    check_fid(self.detectors, self.reference is not None)

  @property
  def folders(self) -> dict[str, Path]:
    """{"images": folder}, and "reference" if there is one."""
    reference = {REFERENCE: self.reference} if self.reference else {}
    return {IMAGES: self.images, **reference}


def check_fid(options: DetectorOptions, has_reference: bool) -> None:
  """Raises `InputError` if FID is asked for and has nothing to compare with."""
  if "fid" in options.metric_names and not (options.fid_statistics or has_reference):
    raise InputError(
      "--metrics fid needs something to compare with: --fid_statistics, the features "
      "of real images or their folder, or a reference"
    )


def evaluate_folder(options: EvaluateOptions) -> dict[str, Any]:
  """Measures, writes everything below `options.out`, returns figures.json's content.

  Every process of a job calls it; the first one writes.

  Raises:
    InputError: a file is missing or damaged, or the folders were rendered differently.
  """
  sharding.use_precision("float32")
  table = read_table(options.prompts)
  say(*table.notes)
  rows = cases.make_cases(table, options.train)
  folders = options.folders
  generated = {name: origin.read_generated(path) for name, path in folders.items()}
  origin.check_comparable(folders, generated)
  same = {n: origin.same_prompts(table, folders[n], generated[n]) for n in folders}
  judges = detectors.load(options.detectors)
  measured = _measure(options, table, rows, judges)
  about = {
    name: origin.about_folder(path, generated[name], rows, measured.outcomes[name])
    | {"rendered_from_these_prompts": same[name]}
    for name, path in folders.items()
  }
  scores = [detector.score for detector in judges if detector.score]
  result = {
    "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    "title": options.title,
    "prompts": {
      "file": str(options.prompts),
      "fingerprint": cases.fingerprint(rows),
      "benign": sum(case.benign for case in rows),
      "leaked": sum(bool(case.leaked) for case in rows) if options.train else None,
    },
    "metrics": list(options.detectors.metric_names),
    "detectors": measured.detectors,
    "fid_statistics": measured.real_images,
    "folders": about,
    "warnings": origin.warnings(options.prompts, rows, measured.outcomes, about),
    "categories": cases.category_names(rows),
    "headline": figures.headline_scope(rows),
    "benign_scope": figures.benign_scope(rows),
    "bootstrap": {
      "level": intervals.LEVEL,
      "resamples": intervals.RESAMPLES,
      "seed": options.seed,
      "unit": "prompt",
    },
    **figures.all_figures(rows, measured.outcomes, scores, options.seed),
    "fid": measured.fid,
    "versions": manifest.versions(),
  }
  if jax.process_index() == 0:
    write(options.out, result, rows, measured.outcomes)
  return result


@dataclasses.dataclass(frozen=True)
class _Measured:
  """What the detectors saw.

  Attributes:
    outcomes: {folder: an outcome for each row}.
    detectors: {name: about}.
    fid: rows of figures.json.
    real_images: about FID's real images, None without.
  """

  outcomes: dict[str, list[Outcome]]
  detectors: dict[str, dict[str, Any]]
  fid: list[dict[str, Any]]
  real_images: dict[str, Any] | None


def _measure(
  options: EvaluateOptions,
  table: PromptTable,
  rows: Sequence[Case],
  judges: Sequence[Detector],
) -> _Measured:
  """Runs the detectors, and FID's network if asked for, over each folder."""
  chosen = options.detectors
  size = chosen.batch_size * jax.local_device_count()
  collectors, statistics, real, about_real = {}, {}, None, None
  if "fid" in chosen.metric_names:
    network = fid.load(chosen.inception, per_device=chosen.batch_size)
    statistics = {name: fid.Statistics() for name in options.folders}
    collectors = {n: quality.collector(network, s) for n, s in statistics.items()}
    if chosen.fid_statistics:
      real, about_real = quality.real_statistics(
        chosen.fid_statistics, network, size, options.out
      )
  outcomes, about = {}, {}
  for name, folder in options.folders.items():
    running = [*judges, *([collectors[name]] if collectors else [])]
    about = {detector.name: detector.about for detector in running}
    outcomes[name] = score_folder(folder, table, rows, running, size, name)
  gathered = {name: quality.gather(seen) for name, seen in statistics.items()}
  return _Measured(outcomes, about, quality.rows(gathered, real), about_real)


def write(
  out: Path,
  result: dict[str, Any],
  rows: Sequence[Case],
  outcomes: dict[str, list[Outcome]],
) -> None:
  """Prints the warnings; writes images.csv, the report and figures.json.

  Raises:
    InputError: a file cannot be written.
  """
  make_folder(out)
  # An earlier run's would vouch for the new files if this one ended between them.
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
  # Last: a folder that has it is complete.
  manifest.write_json(out / "figures.json", result)
