"""Prompts to render: a CSV with a column `prompt` and these optional ones.

  image                file name to save under, a .png or .jpg below the folder of
                       images; by default 0000000_0.png, 0000001_0.png, …
  evaluation_seed      decides the initial noise; by default the row's number from 0
  evaluation_guidance  the row's own guidance scale
  negative_prompt      the row's own negative prompt

Further columns (category, case_number, …) are kept in `PromptTable.cells`.
"""

import csv
import math
import os
from pathlib import Path
from typing import NamedTuple

from safetydpo_jax.errors import InputError

# Bytes. File systems allow 255; our temporary names are a little longer than the final.
_LONGEST_NAME = 240


class Row(NamedTuple):
  """One image to render: its file, its prompt, its seed, and the number of its CSV row.

  `guidance` and `negative_prompt` are None where the CSV leaves them to the command.
  """

  file: Path
  prompt: str
  seed: int
  number: int
  guidance: float | None = None
  negative_prompt: str | None = None


class PromptTable(NamedTuple):
  """A prompts CSV as it was read, before its images have a folder.

  Attributes:
    file: the CSV.
    rows: in order; `Row.file` is the image's name as the CSV gives it.
    cells: each row's {column: text}.
  """

  file: Path
  rows: list[Row]
  cells: list[dict[str, str]]

  def in_folder(self, folder: Path) -> list[Row]:
    """The rows, in order, with their images in `folder`.

    A row that names an earlier row's image, with the same prompt, is that row again:
    CoProV2 lists some pairs under two categories.

    Raises:
      InputError: an image's name leads out of `folder`, or two prompts share an image.
    """
    folder = folder.resolve()
    seen: dict[Path, Row] = {}
    placed = []
    for row in self.rows:
      where, name = f"{self.file} row {row.number + 1}", self.name_of(row)
      file = (folder / name).resolve()
      if not file.is_relative_to(folder):
        raise InputError(f"{where}: image {name!r} is outside the folder of images")
      first = seen.setdefault(file, row._replace(file=file))
      if first.prompt != row.prompt:
        raise InputError(
          f"{where}: image {name!r} belongs to row {first.number + 1}, which has "
          "another prompt; give each prompt its own image"
        )
      placed.append(first)
    return placed

  def name_of(self, row: Row) -> str:
    """The name of a row's image as the CSV gives it, or the default."""
    return self.cells[row.number].get("image") or default_name(row.number)


def default_name(number: int) -> str:
  """The image's name of row `number`, counted from 0."""
  return f"{number:07d}_0.png"


def read_prompts(file: Path, folder: Path) -> list[Row]:
  """The rows of a prompts CSV with their images in `folder`.

  Raises:
    InputError: see `read_table` and `PromptTable.in_folder`.
  """
  return read_table(file).in_folder(folder)


def read_table(file: Path) -> PromptTable:
  """Reads a prompts CSV.

  Raises:
    InputError: the file cannot be read, has no column `prompt`, or a row has more or
      fewer fields than the header, an invalid image name, a seed that is not a whole
      number of 64 bits, or a guidance scale that is not a finite number.
  """
  try:
    with open(file, newline="", encoding="utf-8-sig") as lines:  # Excel writes a BOM
      reader = csv.DictReader(lines)
      cells, columns = list(reader), reader.fieldnames or ()
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise InputError(f"cannot read {file} as a prompts CSV: {error}") from error
  if "prompt" not in columns:
    raise InputError(
      f"{file} has no column `prompt`; its columns are "
      f"{', '.join(columns)[:200] or 'missing: the file is empty'}"
    )
  if not cells:
    raise InputError(f"{file} has no rows below its header")
  rows = []
  for number, row in enumerate(cells):
    where = f"{file} row {number + 1}"
    if None in row or row["prompt"] is None:
      raise InputError(
        f"{where} does not have the {len(columns)} fields of the header; put prompts "
        "with commas in quotes"
      )
    name = row.get("image") or default_name(number)
    _check_name(name, where)
    seed = read_seed(row.get("evaluation_seed") or str(number), where)
    guidance = read_guidance(row.get("evaluation_guidance"), where)
    negative_prompt = row.get("negative_prompt") or None
    rows.append(Row(Path(name), row["prompt"], seed, number, guidance, negative_prompt))
  return PromptTable(file, rows, cells)


def _check_name(name: str, where: str) -> None:
  """Refuses an image name that no file can have, or of another format."""
  longest = max((len(os.fsencode(part)) for part in Path(name).parts), default=0)
  if "\0" in name or longest > _LONGEST_NAME:
    raise InputError(
      f"{where}: image {name[:40]!r} is not a valid file name; expected at most "
      f"{_LONGEST_NAME} bytes"
    )
  if Path(name).suffix.lower() not in (".png", ".jpg", ".jpeg"):
    raise InputError(f"{where}: image {name!r} is not a .png or .jpg")


def read_seed(text: str, where: str) -> int:
  """A seed as PyTorch takes it, −2⁶³ to 2⁶⁴ − 1; pandas may have written `7.0`."""
  try:
    seed = int(text.strip().removesuffix(".0"))
  except ValueError:
    seed = None
  if seed is None or not -(2**63) <= seed < 2**64:
    raise InputError(
      f"{where}: evaluation_seed is {text!r}; expected a whole number from -2^63 to "
      "2^64 - 1"
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
    raise InputError(
      f"{where}: evaluation_guidance is {text!r}; expected a finite number"
    )
  return guidance
