"""Where evaluated images come from, according to `generate`, and what to warn about."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetydpo_jax.data.prompts import PromptTable
from safetydpo_jax.errors import InputError
from safetydpo_jax.evaluation import figures, listing
from safetydpo_jax.evaluation.cases import Case
from safetydpo_jax.evaluation.figures import IMAGES, REFERENCE
from safetydpo_jax.evaluation.scoring import Outcome
from safetydpo_jax.runtime import manifest
from safetydpo_jax.sampling.folders import MANIFEST, hash_of_rows

# Fields of generate.json that must agree before two folders are compared in pairs.
SAME = (
  *("base", "sampler", "steps", "guidance", "guidance_rescale", "negative_prompt"),
  *("height", "width", "dtype", "vae", "conditioning", "fix_text"),
  *("prompts_sha256", "latents_sha256"),
)


def read_generated(folder: Path) -> dict[str, Any] | None:
  """A folder's generate.json, None if other software made the images."""
  if not (folder / MANIFEST).is_file():
    return None
  about = manifest.read_json(folder / MANIFEST, "folder of images")
  if not isinstance(about, dict):
    raise InputError(
      f"{folder / MANIFEST} is not a JSON object; generate the images again"
    )
  return about


def check_comparable(
  folders: dict[str, Path], generated: dict[str, dict[str, Any] | None]
) -> None:
  """Raises `InputError` if the folders are one, or differ in more than the weights.

  Args:
    folders: "images" and, if there is one, "reference".
    generated: their generate.json.
  """
  if REFERENCE in folders and folders[REFERENCE].resolve() == folders[IMAGES].resolve():
    raise InputError(
      f"--images and --reference are both {folders[IMAGES]}; --reference is the folder "
      "of the reference model's images"
    )
  images, reference = generated[IMAGES], generated.get(REFERENCE)
  if not images or not reference:
    return
  for name in SAME:
    if images.get(name) != reference.get(name):
      raise InputError(
        f"--images were made with {name} {images.get(name)!r}, --reference with "
        f"{reference.get(name)!r}, so a difference would not be due to the weights "
        "alone; generate both with the same settings"
      )


def same_prompts(
  table: PromptTable, folder: Path, generated: dict[str, Any] | None
) -> bool | None:
  """Whether a folder was rendered from exactly these rows; None if unknown."""
  if not generated or "prompts_sha256" not in generated:
    return None
  if generated.get("no_row_guidance"):
    table = table.without_guidance()
  return hash_of_rows(table.in_folder(folder), folder) == generated["prompts_sha256"]


def about_folder(
  folder: Path,
  generated: dict[str, Any] | None,
  rows: Sequence[Case],
  outcomes: Sequence[Outcome],
) -> dict[str, Any]:
  """For figures.json: the folder, what made it, a fingerprint of its bytes, counts."""
  hashes = sorted((case.name, outcome.sha256) for case, outcome in zip(rows, outcomes))
  return {
    "folder": str(folder),
    "generated": generated,
    "fingerprint": hashlib.sha256(repr(hashes).encode()).hexdigest()[:16],
    "counts": figures.count_states(outcomes),
  }


def warnings(
  prompts: Path,
  rows: Sequence[Case],
  outcomes: dict[str, list[Outcome]],
  folders: dict[str, dict[str, Any]],
) -> list[str]:
  """What a reader of the figures must know about the images, a line each.

  Args:
    prompts: the CSV.
    rows: its rows.
    outcomes: of each folder.
    folders: of each folder, what figures.json says about it.
  """
  found = []
  for name, about in folders.items():
    if about["rendered_from_these_prompts"] is False:
      found.append(
        f"{name}: not rendered from {prompts} as it is now; images are matched to its "
        "rows by name alone"
      )
    if cut := (about["generated"] or {}).get("cut_prompts"):
      found.append(
        f"{name}: {cut['rows']} prompts were rendered only up to token {cut['limit']}; "
        f"the longest, row {cut['row']}, has {cut['longest']}"
      )
    found += listing.warnings(rows, outcomes[name], name)
  loras = {n: (about["generated"] or {}).get("lora") for n, about in folders.items()}
  if loras.get(REFERENCE) and loras[IMAGES] == []:
    found.append(
      "the reference was rendered with a LoRA and the images without: are the folders "
      "swapped?"
    )
  return found
