"""The files of prompt sets, each form as rows of cells.

.csv, .tsv   as every CSV of prompts (`data/delimited.py`, `data/columns.py`)
.parquet     the same columns, of text, numbers, or lists of them; a cell without a
             value, or with NaN, is empty
.txt         a prompt per line
.json        COCO's annotations: one caption per image, that of the lowest id, and the
             image's id as its seed
"""

import json
import math
from collections.abc import Collection
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from safetydpo_jax.data import columns, delimited
from safetydpo_jax.data.sources import pairs
from safetydpo_jax.errors import InputError


class SetFile(NamedTuple):
  """A file's rows.

  Attributes:
    names: its columns, as it has them.
    columns: their normalised names, or the fields of `columns.FIELDS` that they are.
    rows: each row's {field or normalised name: text}.
    notes: what a reader should know, a line each.
  """

  names: list[str]
  columns: frozenset[str]
  rows: list[dict[str, str]]
  notes: tuple[str, ...] = ()


def read(file: Path, wanted: Collection[str]) -> SetFile:
  """Reads a file by its ending, one of `READERS`.

  Args:
    file: the file.
    wanted: normalised names of columns that are read beyond `columns.FIELDS`.

  Raises:
    InputError: the file is too large, or not what its ending says.
  """
  suffix = file.suffix.lower()
  try:
    if file.stat().st_size > delimited.LARGEST:
      raise InputError(f"{file} has more than {delimited.LARGEST:,} bytes; split it")
    return READERS[suffix](file, frozenset(wanted))
  except InputError:
    raise
  except Exception as error:  # pyarrow and json raise anything for a damaged file
    raise InputError(f"cannot read {file} as {suffix}: {error}") from error


def _read_csv(file: Path, wanted: frozenset[str]) -> SetFile:
  table = delimited.read(
    file, "prompt set", lambda name: columns.normalise(name) in wanted
  )
  found = columns.find(table.columns)
  rows = [
    found.cells(row, f"{file} row {number}")
    for number, row in enumerate(table.rows, start=1)
  ]
  notes = (*table.notes, *found.note(file, wanted))
  return SetFile(table.columns, frozenset(found.indices), rows, notes)


def _read_parquet(file: Path, wanted: frozenset[str]) -> SetFile:
  # Imported here: it takes a second, and few sets are parquet.
  import pyarrow.parquet

  from safetydpo_jax.data.sources import parquet_files

  opened = pyarrow.parquet.ParquetFile(file)
  names = opened.schema_arrow.names
  found = columns.find(names)
  # Names of images do not matter here, and the images themselves would fill memory.
  read = {*wanted, *columns.FIELDS} - {"image"}
  chosen = [name for key in found.indices if key in read for name in _of(found, key)]
  few = columns.find(chosen)
  cells = parquet_files.read_rows(opened, chosen, str(file))
  rows = [
    few.cells([_text(row[name], name) for name in chosen], f"{file} row {number}")
    for number, row in enumerate(cells, start=1)
  ]
  return SetFile(names, frozenset(found.indices), rows, found.note(file, wanted))


def _of(found: columns.Columns, key: str) -> list[str]:
  return [found.names[index] for index in found.indices[key]]


def _text(value: Any, column: str) -> str:
  """A parquet cell as a CSV would have it."""
  if value is None or (isinstance(value, float) and math.isnan(value)):
    return ""
  if isinstance(value, list):
    return ", ".join(_text(item, column) for item in value)
  if not isinstance(value, str | int | float | Decimal):
    raise InputError(f"column {column} holds {type(value).__name__}, expected text")
  return str(value)


def _read_text(file: Path, wanted: frozenset[str]) -> SetFile:
  lines = delimited.read_text(file, "prompt set").split("\n")
  rows = [{"prompt": line.strip()} for line in lines if line.strip()]
  return SetFile(["prompt"], frozenset({"prompt"}), rows)


def _read_coco(file: Path, wanted: frozenset[str]) -> SetFile:
  content = json.loads(delimited.read_text(file, "prompt set"))
  notes = content.get("annotations") if isinstance(content, dict) else None
  kinds = {"image_id": int, "id": int, "caption": str}
  if not isinstance(notes, list) or not all(
    isinstance(note, dict)
    and all(isinstance(note.get(name), kind) for name, kind in kinds.items())
    for note in notes
  ):
    raise InputError(
      f"cannot read {file} as .json: expected COCO's captions, an object with a list "
      f'"annotations" of objects with {", ".join(kinds)}; it is {_shape(content)}. '
      "Write other prompts to a .csv or .txt"
    )
  first: dict[int, dict[str, Any]] = {}
  for note in notes:
    image = note["image_id"]
    if image not in first or note["id"] < first[image]["id"]:
      first[image] = note
  rows = [
    {
      "prompt": pairs.text(f"{file} image {image}", "caption", note["caption"]).strip(),
      "evaluation_seed": str(image),
    }
    for image, note in sorted(first.items())
  ]
  return SetFile(["caption"], frozenset({"prompt"}), rows)


def _shape(content: Any) -> str:
  """What a JSON file holds, in few words."""
  if isinstance(content, dict):
    return f"an object with {', '.join(content)[:80] or 'nothing in it'}"
  return f"a list of {len(content)}" if isinstance(content, list) else "a single value"


READERS = {
  ".csv": _read_csv,
  ".tsv": _read_csv,
  ".txt": _read_text,
  ".json": _read_coco,
  ".parquet": _read_parquet,
}
