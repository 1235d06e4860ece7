"""Folders of generated images: what determines them, and a contact sheet.

  plan.json       what determines the images, while some are still missing
  generate.json   the same and how they were made, once all of them are there
  sheet.jpg       the contact sheet

So an interrupted run can be continued, and images of two kinds never mix.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict

from safetydpo_jax.data import contact_sheet
from safetydpo_jax.data.prompts import Row
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.loras.adapter import Adapter
from safetydpo_jax.lora import LoraTree
from safetydpo_jax.runtime import manifest
from safetydpo_jax.sampling.renderer import write_picture

MANIFEST = "generate.json"
PLAN = "plan.json"
BASE = "base"  # subfolder with the base model's images
SHEET = "sheet.jpg"
SHEET_CELLS = 40


class Folder(NamedTuple):
  """A folder of images.

  Attributes:
    path: where it is.
    rows: the rows it has an image for.
    adapter: what they are rendered with, besides the base model.
    settings: what determines the images, for the manifest.
  """

  path: Path
  rows: list[Row]
  adapter: Adapter
  settings: dict[str, Any]


def hash_of_rows(rows: Sequence[Row], out: Path) -> str:
  """SHA-256 of what a CSV says about the images in `out`, in whatever order."""
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
  """Raises `InputError` if an image has the name of the sheet or of another folder."""
  first, *others = folders
  taken = [first.path.resolve() / SHEET, *(other.path.resolve() for other in others)]
  for row in first.rows:
    for path in taken:
      if row.file.is_relative_to(path):
        raise InputError(
          f"row {row.number + 1} of the CSV: its image {row.file} collides with "
          f"{path}, which is written as well; choose another name"
        )


def check_same_settings(folder: Folder) -> None:
  """Raises `InputError` if the folder holds images of other settings, or of unknown."""
  out, settings = folder.path, folder.settings
  plan = next((out / n for n in (MANIFEST, PLAN) if (out / n).is_file()), None)
  foreign = next((row.file for row in folder.rows if row.file.exists()), None)
  if foreign and not plan:
    raise InputError(
      f"{foreign} exists already, and {out} has no {MANIFEST} that says what made it; "
      "choose another --out"
    )
  if not plan:
    return
  before = manifest.read_json(plan, "folder of images")
  # Version 0.1.0 knew no changes besides the LoRA, so its hash cannot stand for them.
  known = None if folder.adapter.rest else _sha256_of_0_1(folder.adapter.lora)
  if known and before.get("lora_sha256") == known:
    before["lora_sha256"] = settings["lora_sha256"]
  for name, value in settings.items():
    if before.get(name) != value:
      raise InputError(
        f"{out} holds images {manifest.change(name, before.get(name), value)}; choose "
        f"another --out, or delete its images and {plan.name}"
      )


def _sha256_of_0_1(lora: LoraTree) -> str:
  """What version 0.1.0 wrote as `lora_sha256`."""
  digest = hashlib.sha256()
  for layer, leaf in sorted(flatten_dict(lora).items()):
    digest.update(f"{layer} {leaf.shape}".encode() + np.asarray(leaf).tobytes())
  return digest.hexdigest()


def mark_incomplete(folder: Folder) -> None:
  """Writes the plan and removes the manifest: from now on images may be missing."""
  manifest.write_json(folder.path / PLAN, folder.settings)
  (folder.path / MANIFEST).unlink(missing_ok=True)


def mark_complete(folder: Folder, about: Mapping[str, Any]) -> int:
  """Writes the manifest and removes the plan; returns the number of images."""
  count = len(set(folder.rows))
  about = {**about, "images": count, "versions": manifest.versions()}
  manifest.write_json(folder.path / MANIFEST, {**folder.settings, **about})
  (folder.path / PLAN).unlink()
  return count


def write_contact_sheet(folders: Sequence[Folder], blur: bool) -> None:
  """Up to `SHEET_CELLS` images, spread over the CSV, the last folder's leftmost."""
  files = [[row.file for row in folder.rows] for folder in reversed(folders)]
  cells = list(dict.fromkeys(zip(*files)))
  chosen = np.linspace(0, len(cells) - 1, min(len(cells), SHEET_CELLS)).round()
  picture = contact_sheet.draw_images([cells[int(i)] for i in chosen], blur=blur)
  write_picture(folders[0].path / SHEET, picture)
