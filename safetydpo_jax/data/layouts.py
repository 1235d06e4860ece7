"""Published layouts of preference pairs → `SourcePair`s, independent of the layout.

Two layouts, told apart by what the path holds:

  folder  metadata.jsonl and images. One JSON object a line: `jpg_0` and `jpg_1` (paths
          relative to the folder), `label_0` (1: jpg_0 is preferred, 0: jpg_1; any other
          value is a tie, which is dropped and counted), `caption`, and optionally
          `file_name` and `category`. `file_name` tells whose prompt the caption is: the
          preferred image's (slot "safe"), or, also when it is neither or absent, the
          dispreferred image's (slot "unsafe").
  CSV     columns prompt, image, category (CoProV2's files) beside the images or beside
          a folder `images`. Rows u_idx_N_K.jpg and s_idx_N_K.jpg are a pair: the unsafe
          and the safe image, each with its own prompt.

A published pair stands twice, once under each prompt. Its rows become one pair with two
caption slots, so that each image is encoded once. A row that repeats one is counted and
adds only its category; so does a whole CSV pair with the prompts and K of another one.
A further caption of an occupied slot makes a further pair, "ID#2".

Every row ends as a caption, a tie or a repeat: rows = captions + ties + repeated.
"""

import csv
import dataclasses
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safetydpo_jax.data import categories
from safetydpo_jax.errors import InputError

METADATA = "metadata.jsonl"
SLOTS = ("unsafe", "safe")
CSV_COLUMNS = ("prompt", "image", "category")
_CSV_IMAGE = re.compile(r"([us])_idx_(\d+)_(\d+)\.\w+")


@dataclasses.dataclass(frozen=True)
class SourcePair:
  """Two images of which one is preferred, and the prompts that made them.

  Attributes:
    id: "PREFERRED>DISPREFERRED", the images' names in the dataset; it depends neither
      on the order of rows nor on where the dataset lies.
    preferred, dispreferred: the image files.
    captions: one for each of `SLOTS`, None where the dataset has none.
    categories: our names, sorted; empty if the dataset has none.
  """

  id: str
  preferred: Path
  dispreferred: Path
  captions: tuple[str | None, str | None]
  categories: tuple[str, ...]

  def about(self) -> dict[str, Any]:
    """Id, categories, and {slot: caption} of the captions that are there."""
    texts = {slot: text for slot, text in zip(SLOTS, self.captions) if text is not None}
    return {"id": self.id, "categories": list(self.categories), "captions": texts}


class Counts(NamedTuple):
  """What became of a dataset's rows."""

  rows: int
  pairs: int
  captions: int
  ties: int
  repeated: int


class _Row(NamedTuple):
  """One caption of one pair; `where` is its file and line, for messages."""

  where: str
  preferred: str
  dispreferred: str
  slot: str
  caption: str
  category: str | None


def read_pairs(dataset: str | os.PathLike) -> tuple[list[SourcePair], Counts]:
  """Reads a dataset in either layout.

  Args:
    dataset: a folder with metadata.jsonl, a folder with one CSV, or either file.

  Returns:
    The pairs, sorted by id, and what became of the rows.

  Raises:
    InputError: the dataset is of no known layout, names an image that is not there or
      lies outside, or has a row that cannot be read.
  """
  file = _find_table(Path(dataset))
  if file.suffix == ".jsonl":
    root, rows, ties = file.parent, *_read_jsonl(file)
    same_pair = None
  else:
    root, rows, ties = *_read_csv(file), 0
    same_pair = _same_prompts
  _check_images(root, rows)
  pairs, repeated = _merge(root, rows, same_pair)
  captions = sum(caption is not None for pair in pairs for caption in pair.captions)
  counts = Counts(len(rows) + ties, len(pairs), captions, ties, repeated)
  if not pairs:
    raise InputError(f"{file} holds no pairs: {counts.rows} rows, {ties} of them ties")
  return pairs, counts


def fingerprint(pairs: Iterable[SourcePair]) -> str:
  """16 hexadecimal digits over ids, captions, categories and sizes of image files."""
  digest = hashlib.sha256()
  for pair in pairs:
    sizes = [file.stat().st_size for file in (pair.preferred, pair.dispreferred)]
    row = [pair.id, pair.captions, pair.categories, sizes]
    digest.update(json.dumps(row).encode())
  return digest.hexdigest()[:16]


def _find_table(dataset: Path) -> Path:
  """The file that lists the pairs."""
  if not dataset.exists():
    raise InputError(f"--pairs {dataset} does not exist")
  if dataset.is_file():
    if dataset.suffix in (".jsonl", ".csv"):
      return dataset
    raise InputError(f"{dataset} is neither a .csv file nor a {METADATA}")
  if (dataset / METADATA).is_file():
    return dataset / METADATA
  tables = sorted(dataset.glob("*.csv"))
  if len(tables) == 1:
    return tables[0]
  if tables:
    names = ", ".join(table.name for table in tables)
    raise InputError(f"{dataset} holds several CSV files ({names}); give one of them")
  raise InputError(
    f"{dataset} holds neither {METADATA} nor a CSV file with the columns "
    f"{', '.join(CSV_COLUMNS)}"
  )


def _read_jsonl(file: Path) -> tuple[list[_Row], int]:
  """The rows of the folder layout that are no ties, and the number of ties."""
  rows, ties = [], 0
  try:
    lines = file.read_text(encoding="utf-8-sig").split("\n")
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{file} cannot be read as UTF-8 text: {error}") from error
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    where = f"{file} line {number}"
    try:
      row = json.loads(line)
    except json.JSONDecodeError as error:
      raise InputError(f"{where} is no JSON: {error}") from error
    if not isinstance(row, dict):
      raise InputError(f"{where} is no JSON object but {type(row).__name__}")
    if missing := [key for key in ("jpg_0", "jpg_1", "label_0") if key not in row]:
      raise InputError(f"{where} has no field {', '.join(missing)}")
    images = [_inside(where, row[key]) for key in ("jpg_0", "jpg_1")]
    if not isinstance(row["label_0"], int | float | None):
      raise InputError(f"{where}: label_0 is {row['label_0']!r}, expected a number")
    if row["label_0"] not in (0, 1):
      ties += 1
      continue
    preferred, dispreferred = images if row["label_0"] == 1 else images[::-1]
    named = row.get("file_name")
    kind = "safe" if named and _inside(where, named) == preferred else "unsafe"
    caption = _text(where, "caption", row.get("caption"))
    category = row.get("category")
    rows.append(_Row(where, preferred, dispreferred, kind, caption, category))
  return rows, ties


def _read_csv(file: Path) -> tuple[Path, list[_Row]]:
  """The folder of a CSV's images, and its rows."""
  try:
    with open(file, newline="", encoding="utf-8-sig") as lines:
      reader = csv.DictReader(lines, strict=True)
      missing = [c for c in CSV_COLUMNS if c not in (reader.fieldnames or ())]
      if missing:
        raise InputError(f"{file} has no column {', '.join(missing)}")
      table = [(f"{file} line {reader.line_num}", row) for row in reader]
  except (OSError, UnicodeDecodeError, csv.Error) as error:
    raise InputError(f"{file} is no readable CSV: {error}") from error
  kinds, images = {}, []
  for where, row in table:
    if None in row:
      raise InputError(f"{where} has more columns than the header; quote the commas")
    image = _inside(where, row["image"])
    if not (name := _CSV_IMAGE.fullmatch(os.path.basename(image))):
      raise InputError(
        f"{where}: image {image!r} is neither u_idx_NUMBER_0.jpg nor "
        "s_idx_NUMBER_0.jpg, so its partner is unknown"
      )
    kind, *number = name.groups()
    number = (os.path.dirname(image), *map(int, number))
    kinds.setdefault(number, {})[kind] = image
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
    caption = _text(where, "prompt", row["prompt"])
    rows.append(_Row(where, pair["s"], pair["u"], slot, caption, row["category"]))
  beside = not rows or (file.parent / rows[0].preferred).is_file()
  return (file.parent if beside else file.parent / "images"), rows


def _inside(where: str, name: object) -> str:
  """An image's path below the dataset's folder, in its shortest form."""
  name = _text(where, "image path", name).strip()
  path = os.path.normpath(name)
  if not name or os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
    raise InputError(f"{where}: image path {name!r} leaves the dataset's folder")
  return path


def _text(where: str, what: str, value: object) -> str:
  if not isinstance(value, str):
    raise InputError(f"{where}: {what} is {value!r}, expected text")
  try:
    value.encode()
  except UnicodeEncodeError as error:  # half a surrogate pair, which JSON allows
    raise InputError(f"{where}: {what} is no valid Unicode: {error}") from None
  return value


def _check_images(root: Path, rows: list[_Row]) -> None:
  """Every image that a row names must be there."""
  checked = set()
  for row in rows:
    for name in (row.preferred, row.dispreferred):
      if name not in checked and not (root / name).is_file():
        raise InputError(f"{row.where}: image {root / name} does not exist")
      checked.add(name)


def _same_prompts(pair: SourcePair) -> tuple | None:
  """Equal for CSV pairs that repeat each other under other numbers."""
  number = _CSV_IMAGE.fullmatch(pair.preferred.name).group(3)
  return (*pair.captions, number) if None not in pair.captions else None


def _merge(root, rows, same_pair) -> tuple[list[SourcePair], int]:
  """Rows → pairs sorted by id, and how many rows repeated another one."""
  captions, tags, images = {}, {}, {}
  repeated = 0
  for row in rows:
    slot = SLOTS.index(row.slot)
    for id in _numbered(f"{row.preferred}>{row.dispreferred}"):
      present = captions.setdefault(id, [None, None])
      if present[slot] in (None, row.caption):
        break
    repeated += present[slot] is not None
    present[slot] = row.caption
    images[id] = (root / row.preferred, root / row.dispreferred)
    if row.category not in (None, ""):
      tags.setdefault(id, set()).add(_category(row))
  pairs, keys = {}, {}
  for id in sorted(captions):
    names = frozenset(tags.get(id, ()))
    pair = SourcePair(id, *images[id], tuple(captions[id]), tuple(sorted(names)))
    key = same_pair(pair) if same_pair else None
    first = pairs.get(keys.setdefault(key, id)) if key else None
    if first:
      names = sorted(names.union(first.categories))
      pair = dataclasses.replace(first, categories=tuple(names))
      repeated += sum(caption is not None for caption in captions[id])
    pairs[pair.id] = pair
  return list(pairs.values()), repeated


def _numbered(id: str) -> Iterator[str]:
  """ID, ID#2, ID#3, …"""
  return itertools.chain([id], (f"{id}#{number}" for number in itertools.count(2)))


def _category(row: _Row) -> str:
  try:
    return categories.normalise(row.category)
  except InputError as error:
    raise InputError(f"{row.where}: {error}") from None
