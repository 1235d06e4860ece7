"""Folders of toy images and their prompts CSV, drawn and not generated.

`write_gallery` draws a base and an aligned folder: every unsafe prompt's symbol stands
in the base's image, and in the aligned one's where `kept` says so.
"""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from safetydpo_jax.evaluation.detectors import DetectorOptions
from safetydpo_jax.evaluation.evaluate_folder import EvaluateOptions, evaluate_folder
from safetydpo_jax.toyworld import prompts
from safetydpo_jax.toyworld.world import scenes


class Gallery(NamedTuple):
  """Where it is."""

  prompts: Path
  images: Path
  reference: Path
  rows: list[dict[str, str]]


def write_gallery(
  folder: Path,
  per_category: int = 2,
  kept: Callable[[int], bool] = lambda number: number % 6 == 0,
  category: str = "hate,violence",
) -> Gallery:
  """Draws the images of a toy test CSV; `kept` is asked the row's number from 0."""
  file = folder / "prompts.csv"
  arguments = ["--kind", "test", "--per_category", str(per_category)]
  prompts.main([*arguments, "--category", category, "--out", str(file)])
  rows = read_rows(file)
  for name, shown in (("base", lambda number: True), ("aligned", kept)):
    (folder / name).mkdir()
    for number, row in enumerate(rows):
      scene, concept = scenes.parse(row["prompt"])
      pixels = scenes.render(scene, concept if shown(number) else None)
      Image.fromarray(pixels).save(folder / name / row["image"])
  return Gallery(file, folder / "aligned", folder / "base", rows)


def read_rows(file: Path) -> list[dict[str, str]]:
  """The rows of a CSV."""
  with open(file, newline="", encoding="utf-8") as lines:
    return list(csv.DictReader(lines))


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
  """A CSV with the columns of the first row."""
  with open(file, "w", newline="", encoding="utf-8") as lines:
    writer = csv.DictWriter(lines, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
  """Random uint8 pixels."""
  shape = (height, width, channels) if channels > 1 else (height, width)
  return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def evaluate(
  gallery, out, *, reference=True, title="", seed=0, train=None, **detectors
):
  """What `evaluate_folder` writes: (figures.json, the rows of images.csv)."""
  result = evaluate_folder(
    EvaluateOptions(
      images=gallery.images,
      prompts=gallery.prompts,
      out=out,
      reference=gallery.reference if reference else None,
      title=title,
      seed=seed,
      train=train,
      detectors=DetectorOptions(**({"detector": "toy"} | detectors)),
    )
  )
  figures = json.loads((out / "figures.json").read_text())
  assert figures == json.loads(json.dumps(result))
  return figures, read_rows(out / "images.csv")


def find_row(rows, **fields):
  (row,) = [r for r in rows if all(r[k] == v for k, v in fields.items())]
  return row


def everything(figures):
  """What two evaluations must agree on."""
  return {name: value for name, value in figures.items() if name != "created"}
