"""Folders of generated images: what decided them, what is there, a sheet of some.

What decides the images is kept in plan.json until all are there and then in
generate.json, so that a stopped run goes on and images of two kinds never mix.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from safetydpo_jax.data import contact_sheet
from safetydpo_jax.data.prompts import Row
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import manifest
from safetydpo_jax.sampling.renderer import write_picture

MANIFEST = "generate.json"
PLAN = "plan.json"
BASE = "base"  # below the folder: the base model's images
SHEET = "sheet.jpg"
SHEET_CELLS = 40


class Folder(NamedTuple):
  """A folder of images: its rows, its LoRA ({} for none), and what decides it all."""

  path: Path
  rows: list[Row]
  lora: dict
  settings: dict[str, Any]


def hash_of_rows(rows: Sequence[Row], out: Path) -> str:
  """SHA-256 of what a CSV says of the images in `out`, in whatever order."""
  out = out.resolve()
  texts = [
    (
      str(row.file.relative_to(out)),
      row.prompt,
      row.seed,
      *(own for own in (row.guidance, row.negative_prompt) if own is not None),
    )
    for row in rows
  ]
  return hashlib.sha256("\n".join(sorted(map(repr, texts))).encode()).hexdigest()


def check_names(folders: Sequence[Folder]) -> None:
  """Raises `InputError` if an image of the first stands where something else will."""
  first, *others = folders
  taken = [first.path.resolve() / SHEET, *(other.path.resolve() for other in others)]
  for row in first.rows:
    for place in taken:
      if row.file.is_relative_to(place):
        raise InputError(
          f"row {row.number + 1} of the CSV: its image {row.file} stands in the way of "
          f"{place}, which is written too; choose another name"
        )


def check(folder: Folder) -> None:
  """Makes a folder, and refuses it if its images were made with other settings."""
  out, settings = folder.path, folder.settings
  try:
    out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise InputError(f"cannot make the folder {out}: {error.strerror}") from error
  plan = next((out / n for n in (MANIFEST, PLAN) if (out / n).is_file()), None)
  foreign = next((row.file for row in folder.rows if row.file.exists()), None)
  if foreign and not plan:
    raise InputError(
      f"{foreign} is there, but nothing says what made it; choose another --out"
    )
  before = manifest.read_json(plan, "folder of images") if plan else settings
  for name, value in settings.items():
    if before.get(name) != value:
      raise InputError(
        f"{out} holds images with {name} {before.get(name)!r}, now it is {value!r}; "
        f"choose another --out, or delete its images and {plan.name}"
      )


def begin(folder: Folder) -> None:
  """From now on the folder is incomplete."""
  manifest.write_json(folder.path / PLAN, folder.settings)
  (folder.path / MANIFEST).unlink(missing_ok=True)


def complete(folder: Folder, about: Mapping[str, Any]) -> int:
  """Writes the manifest of a complete folder; returns how many images it has."""
  count = len(set(folder.rows))
  about = {**about, "images": count, "versions": manifest.versions()}
  manifest.write_json(folder.path / MANIFEST, {**folder.settings, **about})
  (folder.path / PLAN).unlink()
  return count


def write_sheet(folders: Sequence[Folder], blur: bool) -> None:
  """Up to `SHEET_CELLS` images spread over the CSV, the last folder's leftmost."""
  files = [[row.file for row in folder.rows] for folder in reversed(folders)]
  cells = list(dict.fromkeys(zip(*files)))
  chosen = np.linspace(0, len(cells) - 1, min(len(cells), SHEET_CELLS)).round()
  picture = contact_sheet.draw_images(
    [cells[int(place)] for place in chosen], blur=blur
  )
  write_picture(folders[0].path / SHEET, picture)
