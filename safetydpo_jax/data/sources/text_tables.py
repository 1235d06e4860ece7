"""Datasets whose pairs are listed in a text file beside the images.

folder  metadata.jsonl. One JSON object a line: `jpg_0` and `jpg_1` (paths relative to
        the folder), `label_0` (1: jpg_0 is preferred, 0: jpg_1; any other value is a
        tie, which is dropped and counted), `caption`, and optionally `file_name` and
        `category`. `file_name` says which image's prompt the caption is: the
        preferred one's (slot "safe"); otherwise, also if it is neither or absent, the
        dispreferred one's (slot "unsafe").
CSV     columns prompt, image, category (CoProV2's files; `columns.py` has their other
        names) beside the images or beside a folder `images`; what it may look like is
        in `delimited.py`. Rows u_idx_N_K.jpg and s_idx_N_K.jpg are a pair: the unsafe
        and the safe image, each with its own prompt.
"""

import itertools
import json
import os
from collections.abc import Iterable

from etils import epath

from safetydpo_jax.data import columns, delimited
from safetydpo_jax.data.sources import pairs
from safetydpo_jax.data.sources.pairs import Row, Table
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime.files import NOT_FETCHED, is_lfs_content
from safetydpo_jax.runtime.log import note

METADATA = "metadata.jsonl"
CSV_COLUMNS = ("prompt", "image", "category")


def read_jsonl(file: epath.Path) -> Table:
  """The folder layout.

  Raises:
    InputError: a line is not a JSON object, lacks a field, or names an image outside.
  """
  rows, ties = [], 0
  for number, line in enumerate(_read_text(file).split("\n"), start=1):
    if not line.strip():
      continue
    where = f"{file} line {number}"
    try:
      row = json.loads(line)
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits
      raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(row, dict):
      raise InputError(f"{where} is a JSON {type(row).__name__}, expected an object")
    if missing := [key for key in ("jpg_0", "jpg_1", "label_0") if key not in row]:
      raise InputError(f"{where} has no field {', '.join(missing)}")
    images = [inside(where, row[key]) for key in ("jpg_0", "jpg_1")]
    side = pairs.preferred_side(where, row["label_0"])
    if side is None:
      ties += 1
      continue
    preferred, dispreferred = images[side], images[1 - side]
    named = row.get("file_name")
    slot = "safe" if named and inside(where, named) == preferred else "unsafe"
    caption = pairs.caption(where, row.get("caption"))
    category = row.get("category")
    tags = () if category in (None, "") else (category,)
    rows.append(Row(where, preferred, dispreferred, slot, caption, tags))
  return Table(str(file.parent), rows, _images(file.parent, rows), ties)


def read_csv(file: epath.Path) -> Table:
  """CoProV2's CSV.

  Raises:
    InputError: it is another CSV, a row has no partner, or names an image outside.
  """
  kinds, images = {}, []
  for where, row in _read_cells(file):
    image = inside(where, row.get("image"))
    if not (name := pairs.COPRO_IMAGE.fullmatch(os.path.basename(image))):
      raise InputError(
        f"{where}: image {image!r} is neither u_idx_NUMBER_0.jpg nor "
        "s_idx_NUMBER_0.jpg, so its partner is unknown"
      )
    kind, *digits = name.groups()
    number = (os.path.dirname(image), *map(int, digits))
    first = kinds.setdefault(number, {}).setdefault(kind, image)
    if first != image:
      raise InputError(
        f"{where}: images {first!r} and {image!r} have the same number, so their "
        "partners are unknown; rename one"
      )
    images.append((where, number, kind, row))
  rows = []
  for where, number, kind, row in images:
    pair = kinds[number]
    if len(pair) < 2:
      partner = "su"["us".index(kind)]
      folder, name = os.path.split(pair[kind])
      partner = os.path.join(folder, partner + name[1:])
      raise InputError(f"{where}: image {pair[kind]} has no partner {partner}")
    slot = "unsafe" if kind == "u" else "safe"
    caption = pairs.caption(where, row.get("prompt"))
    tags = (row["category"],) if row.get("category") else ()
    rows.append(Row(where, pair["s"], pair["u"], slot, caption, tags))
  beside, below = (
    _images(root, rows) for root in (file.parent, file.parent / "images")
  )
  if beside:
    return Table(str(file.parent), rows, beside)
  return Table(str(file.parent / "images"), rows, below)


def inside(where: str, name: object) -> str:
  """An image's path below the dataset's folder, in its shortest form.

  Raises:
    InputError: it is not text, or leads out of the folder.
  """
  name = pairs.text(where, "image path", name).strip()
  path = os.path.normpath(name)
  if not name or os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
    raise InputError(f"{where}: image path {name!r} is outside the dataset's folder")
  return path


def is_csv(file: epath.Path) -> bool:
  """Whether a file looks like CoProV2's CSV, by its header and first row.

  Raises:
    InputError: it was not fetched from Git LFS.
  """
  try:
    table = delimited.read(file, "CSV of pairs", _is_wanted, most=1)
    found = columns.find(table.columns)
    cells = [found.cells(row, str(file)) for row in table.rows]
  except InputError as error:
    if NOT_FETCHED in str(error):
      raise
    return False
  has_all = {*CSV_COLUMNS} <= found.indices.keys()
  return has_all and any("_idx_" in row.get("image", "") for row in cells)


def _read_text(file: epath.Path) -> str:
  try:
    content = file.read_bytes()
    if is_lfs_content(content):
      raise InputError(f"{file} {NOT_FETCHED}")
    return content.decode("utf-8-sig")  # Excel writes a BOM
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{file} is not a readable text in UTF-8: {error}") from error


def _is_wanted(name: str) -> bool:
  return columns.normalise(name) in CSV_COLUMNS


def _read_cells(file: epath.Path) -> list[tuple[str, dict[str, str]]]:
  """(where, cells) of the rows of a CSV with the columns of CoProV2."""
  table = delimited.read(file, "CSV of pairs", _is_wanted)
  found = columns.find(table.columns)
  if missing := [name for name in CSV_COLUMNS if name not in found.indices]:
    raise InputError(f"{file} has no column {', '.join(missing)}")
  for line in (*table.notes, *found.note(file)):
    note(line)
  names = (f"{file} row {number}" for number in itertools.count(1))
  return [(where, found.cells(row, where)) for where, row in zip(names, table.rows)]


def _images(root: epath.Path, rows: Iterable[Row]) -> dict[str, epath.Path]:
  """The rows' images that exist; each folder is listed once."""
  named = {path for row in rows for path in (row.preferred, row.dispreferred)}
  there = set()
  for folder in {os.path.dirname(path) for path in named}:
    if (root / folder).is_dir():
      there |= {os.path.join(folder, file.name) for file in (root / folder).iterdir()}
  return {path: root / path for path in named & there}
