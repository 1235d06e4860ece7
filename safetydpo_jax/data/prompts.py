"""Prompts to render: a CSV with a column `prompt`, and others that may be there.

  image                file name to save under, a .png or .jpg below the out folder; by
                       default 0000000_0.png, 0000001_0.png, …
  evaluation_seed      decides the initial noise; by default the row's number from 0
  evaluation_guidance  the row's own guidance scale
  negative_prompt      the row's own negative prompt

Other columns (category, case_number, …) are for others.
"""

import csv
import math
import os
from pathlib import Path
from typing import NamedTuple

from safetydpo_jax.errors import InputError

_LONGEST_NAME = 240  # bytes; file systems take 255, our temporary names need some


class Row(NamedTuple):
  """One image to render: where it goes, from what, from which noise; its CSV row.

  `guidance` and `negative_prompt` are None where the CSV leaves them to the command.
  """

  file: Path
  prompt: str
  seed: int
  number: int
  guidance: float | None = None
  negative_prompt: str | None = None


def read_prompts(file: Path, out: Path) -> list[Row]:
  """The rows of a prompts CSV, in order.

  A row whose image was named before, with the same prompt, is that row again: CoProV2
  lists some pairs under two categories.

  Raises:
    InputError: if the file cannot be read, has no column `prompt`, fields without a
      column, an image name that leaves `out`, stands for two prompts or is none, a
      seed that is no whole number of 64 bits, or a guidance that is no number.
  """
  try:
    with open(file, newline="", encoding="utf-8-sig") as lines:  # Excel writes a BOM
      reader = csv.DictReader(lines)
      rows, columns = list(reader), reader.fieldnames or ()
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise InputError(f"{file} is no readable prompts CSV: {error}") from error
  if "prompt" not in columns:
    raise InputError(
      f"{file} has no column `prompt`, but {', '.join(columns)[:200] or 'no header'}"
    )
  if not rows:
    raise InputError(f"{file} has no rows below its header")
  out = out.resolve()
  seen: dict[Path, Row] = {}
  result = []
  for number, row in enumerate(rows):
    where = f"{file} row {number + 1}"
    if None in row or row["prompt"] is None:
      raise InputError(
        f"{where} has not the {len(columns)} fields of the header; put prompts with "
        "commas in quotes"
      )
    name = row.get("image") or f"{number:07d}_0.png"
    longest = max((len(os.fsencode(part)) for part in Path(name).parts), default=0)
    if "\0" in name or longest > _LONGEST_NAME:
      raise InputError(
        f"{where}: image {name[:40]!r} is no file name of {_LONGEST_NAME} bytes or less"
      )
    path = (out / name).resolve()
    if not path.is_relative_to(out):
      raise InputError(f"{where}: image {name!r} lies outside the folder of images")
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
      raise InputError(f"{where}: image {name!r} is no .png or .jpg")
    seed = read_seed(row.get("evaluation_seed") or str(number), where)
    guidance = read_guidance(row.get("evaluation_guidance"), where)
    negative_prompt = row.get("negative_prompt") or None
    new = Row(path, row["prompt"], seed, number, guidance, negative_prompt)
    first = seen.setdefault(path, new)
    if first.prompt != row["prompt"]:
      raise InputError(
        f"{where}: image {name!r} is that of row {first.number + 1}, with another "
        "prompt; give each prompt its own"
      )
    result.append(first)
  return result


def read_seed(text: str, where: str) -> int:
  """A seed as PyTorch takes it, −2⁶³ to 2⁶⁴ − 1; pandas may have written `7.0`."""
  try:
    seed = int(text.strip().removesuffix(".0"))
  except ValueError:
    seed = None
  if seed is None or not -(2**63) <= seed < 2**64:
    raise InputError(
      f"{where}: evaluation_seed {text!r} is no whole number from -2^63 to 2^64 - 1"
    )
  return seed


def read_guidance(text: str | None, where: str) -> float | None:
  """A row's guidance scale; None where its cell is empty."""
  if not text:
    return None
  try:
    guidance = float(text)
  except ValueError:
    guidance = math.nan
  if not math.isfinite(guidance):
    raise InputError(f"{where}: evaluation_guidance {text!r} is no finite number")
  return guidance
