"""Prompts to render: a CSV with a column `prompt` and these optional ones.

  image                file name to save under, a .png or .jpg below the folder of
                       images; by default 0000000_0.png, 0000001_0.png, … Images that
                       were made elsewhere may have other endings (`images.ENDINGS`)
  evaluation_seed      decides the initial noise; by default the row's number from 0
  evaluation_guidance  the row's own guidance scale
  negative_prompt      the row's own negative prompt

Their other names are in `columns.py`, what a CSV may look like in `delimited.py`.
Further columns (category, benign, …) are kept in `PromptTable.cells`. Every CSV of
prompts is read here, so that a row means the same to every command.
"""

import math
import os
import re
from pathlib import Path
from typing import NamedTuple

from safetydpo_jax.data import columns, delimited, images
from safetydpo_jax.errors import InputError

# Bytes. File systems allow 255; our temporary names are a little longer than the final.
_LONGEST_NAME = 240
WRITTEN = (".png", ".jpg", ".jpeg")


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
    cells: each row's {field of `columns.FIELDS`, or a column's normalised name: text}.
    columns: the fields and normalised names that the header has.
    notes: what whoever uses the CSV should know, a line each.
  """

  file: Path
  rows: list[Row]
  cells: list[dict[str, str]]
  columns: frozenset[str] = frozenset()
  notes: tuple[str, ...] = ()

  def in_folder(self, folder: Path) -> list[Row]:
    """The rows, in order, with their images in `folder`.

    A row that names an earlier row's image, with the same prompt, is that row again:
    CoProV2 lists some pairs under two categories.

    Raises:
      InputError: an image's name leads out of `folder`, or rows with different prompts,
        or with different settings of their own, share an image.
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
      own, its = self._own_settings(row), self._own_settings(first)
      if differing := [name for name in own if own[name] != its[name]]:
        name = differing[0]
        raise InputError(
          f"{where}: image {self.name_of(row)!r} belongs to row {first.number + 1}, "
          f"which has another {name} ({its[name]!r}, here {own[name]!r}); give each "
          "row its own image"
        )
      placed.append(first)
    return placed

  def _own_settings(self, row: Row) -> dict[str, int | float | str | None]:
    """What a row says about its image besides the prompt; None: nothing."""
    seeded = self.cells[row.number].get("evaluation_seed", "").strip()
    return {
      "evaluation_seed": row.seed if seeded else None,
      "evaluation_guidance": row.guidance,
      "negative_prompt": row.negative_prompt,
    }

  def name_of(self, row: Row) -> str:
    """The name of a row's image as the CSV gives it, or the default."""
    return _name(self.cells[row.number], row.number)

  def without_guidance(self) -> "PromptTable":
    """The table with no guidance of the rows' own."""
    return self._replace(rows=[row._replace(guidance=None) for row in self.rows])


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
    InputError: the file cannot be read, has no column `prompt`, or a row has more
      fields than the header or no prompt, two columns that contradict each other, an
      invalid image name, a seed that is not a whole number of 64 bits, or a guidance
      scale that is not a finite number.
  """
  table = delimited.read(file, "prompts CSV", _is_prompt)
  found = columns.find(table.columns)
  if "prompt" not in found.indices:
    raise InputError(
      f"{file} has no column `prompt`; its columns are "
      f"{', '.join(table.columns)[:200] or 'missing: the file is empty'}"
    )
  if not table.rows:
    raise InputError(f"{file} has no rows below its header")
  rows, cells = [], []
  for number, fields in enumerate(table.rows):
    where = f"{file} row {number + 1}"
    row = found.cells(fields, where)
    if "prompt" not in row:
      raise InputError(
        f"{where} has {len(fields)} of the header's {len(table.columns)} fields: its "
        "prompt is missing"
      )
    cells.append(row)
    rows.append(_read_row(row, number, where, found))
  notes = (*table.notes, *found.note(file))
  return PromptTable(file, rows, cells, frozenset(found.indices), notes)


def check_written(table: PromptTable) -> None:
  """Refuses a table whose images have an ending that is read but not written.

  Raises:
    InputError: naming the first.
  """
  for row in table.rows:
    if row.file.suffix.lower() not in WRITTEN:
      raise InputError(
        f"{table.file} row {row.number + 1}: image {str(row.file)!r} is not a .png or "
        ".jpg, and no other format is written; rename it"
      )


def _is_prompt(name: str) -> bool:
  return columns.normalise(name) == "prompt"


def _read_row(
  cells: dict[str, str], number: int, where: str, found: columns.Columns
) -> Row:
  name = _name(cells, number)
  _check_name(name, where)
  seed = read_seed(
    cells.get("evaluation_seed", ""), f"{where}: {found.name_of('evaluation_seed')}"
  )
  guidance = read_guidance(
    cells.get("evaluation_guidance", ""),
    f"{where}: {found.name_of('evaluation_guidance')}",
  )
  return Row(
    Path(name),
    cells["prompt"],
    number if seed is None else seed,
    number,
    guidance,
    cells.get("negative_prompt") or None,
  )


def _name(cells: dict[str, str], number: int) -> str:
  return cells.get("image", "").rstrip() or default_name(number)


def _check_name(name: str, where: str) -> None:
  """Refuses an image name that no file can have, or of another format."""
  longest = max((len(os.fsencode(part)) for part in Path(name).parts), default=0)
  if "\0" in name or longest > _LONGEST_NAME:
    raise InputError(
      f"{where}: image {name[:40]!r} is not a valid file name; expected at most "
      f"{_LONGEST_NAME} bytes"
    )
  if Path(name).suffix.lower() not in images.SUFFIXES:
    raise InputError(
      f"{where}: image {name!r} is not a .png or .jpg; images made elsewhere may also "
      f"be {', '.join(sorted(images.SUFFIXES.difference(WRITTEN)))}"
    )


def read_seed(text: str, what: str) -> int | None:
  """A seed as PyTorch takes it, −2⁶³ to 2⁶⁴ − 1; None where the cell is empty.

  pandas may have written `7.0`. Excel writes long numbers as 4.26E+09, which has lost
  digits and so is refused.
  """
  if not text.strip():
    return None
  match = re.fullmatch(r"\s*([+-]?[0-9]{1,20})(\.0*)?\s*", text)
  if not match or not -(2**63) <= (seed := int(match[1])) < 2**64:
    raise InputError(
      f"{what} is {text!r}; expected a whole number from -2^63 to 2^64 - 1, with all "
      "its digits"
    )
  return seed


def read_guidance(text: str, what: str) -> float | None:
  """A row's guidance scale; None where its cell is empty."""
  if not text.strip():
    return None
  try:
    guidance = math.nan if "_" in text else float(text)  # Python reads 7_5 as 75
  except ValueError:
    guidance = math.nan
  if not math.isfinite(guidance):
    raise InputError(f"{what} is {text!r}; expected a finite number, such as 7.5")
  return guidance
