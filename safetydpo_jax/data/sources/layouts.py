"""Published layouts of preference pairs → `SourcePair`s, independent of the layout.

The layout is recognised by what the path holds:

  prepared    a dataset built with TFDS (`coprov2.py`)
  folder      metadata.jsonl and images (`text_tables.py`)
  parquet     the hub's files, or Pick-a-Pic's (`parquet.py`); `x-train-*.parquet`
              where there are several splits, in the folder or in its folder `data`
  CSV         CoProV2's CSV and images (`text_tables.py`)

Paths may be URLs that `etils.epath` opens: gs://, s3://, az://.

The hub's files have no categories. They come from CoProV2's CSV, which has: the pair
with the same two prompts and image names, else those with the same prompts, else the
one with the same image names. A pair under two categories keeps both.
"""

import collections
import dataclasses
import fnmatch
import os
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from etils import epath

from safetydpo_jax.data.sources import parquet, text_tables
from safetydpo_jax.data.sources.pairs import Image, SourcePair, Table, merge
from safetydpo_jax.data.sources.text_tables import CSV_COLUMNS, METADATA
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import storage

_PREPARED = "*-train.array_record-*-of-" + 5 * "[0-9]"


class Counts(NamedTuple):
  """What became of a dataset's rows; `skipped` pairs lack an image.

  `without_caption` counts the rows that were left out for that.
  """

  rows: int
  pairs: int
  captions: int
  ties: int
  repeated: int
  skipped: int
  uncategorised: int
  without_caption: int = 0


def read_pairs(
  dataset: str | os.PathLike,
  *,
  categories_csv: str | os.PathLike | None = None,
  skipped: list[str] | None = None,
  need_images: bool = True,
) -> tuple[list[SourcePair], Counts]:
  """Reads a dataset in any layout.

  Args:
    dataset: a folder, or its file that lists the pairs.
    categories_csv: CoProV2's CSV, to take categories from; by default the CSV in
      the dataset's folder, if the dataset is in another layout.
    skipped: takes a line for every pair without its image, every row without a caption
      and every file that cannot be read, and they are left out; None: that is an error.
    need_images: False: a table that was moved without any of its images is read too;
      its pairs' images are paths at which there is nothing.

  Returns:
    The pairs, sorted by id, and what became of the rows.

  Raises:
    InputError: the layout is unknown, an image is missing or outside the folder, or a
      row cannot be read.
  """
  path = storage.as_path(dataset)
  kind, files = _find_files(path)
  official = None
  csv_file = storage.as_path(categories_csv) if categories_csv else None
  if csv_file is None and kind != "CSV" and path.is_dir():
    csv_file = _find_official(path)
  if csv_file is not None:
    official = read_official(csv_file)
  lines = [] if skipped is None else skipped
  before = len(lines)
  table = _read(kind, files, official, skipped)
  in_files = len(lines) - before
  without_caption = sum(row.caption is None for row in table.rows)
  if not (need_images or table.images):
    table = table._replace(images=_absent_images(table))
  pairs, repeated = merge(table, skipped)
  if official:
    pairs = join_categories(pairs, official, csv_file)
  counts = Counts(
    rows=len(table.rows) + table.ties,
    pairs=len(pairs),
    captions=sum(caption is not None for pair in pairs for caption in pair.captions),
    ties=table.ties,
    repeated=repeated,
    skipped=len(lines) - before - in_files - without_caption,
    uncategorised=sum(not pair.categories for pair in pairs),
    without_caption=without_caption,
  )
  if not pairs:
    raise InputError(
      f"{files[0]} holds no pairs: {counts.rows} rows, {counts.ties} of them ties"
      + "".join(f"; {line}" for line in lines[before:][:1])
    )
  return pairs, counts


def read_official(file: str | os.PathLike) -> list[SourcePair]:
  """The pairs of CoProV2's CSV, sorted by id; their images need not exist.

  Raises:
    InputError: it cannot be read.
  """
  table = text_tables.read_csv(storage.as_path(file))
  return merge(table._replace(images=_absent_images(table)), None)[0]


def _absent_images(table: Table) -> dict[str, Image]:
  """The images that a table names, whether they exist or not."""
  folder = storage.as_path(table.folder)
  names = {path for row in table.rows for path in (row.preferred, row.dispreferred)}
  return {name: folder / name for name in names}


def join_categories(
  pairs: Sequence[SourcePair], official: Sequence[SourcePair], csv_file: epath.Path
) -> list[SourcePair]:
  """Adds the categories of the official pairs with the same prompts or names.

  Raises:
    InputError: no pair is among them.
  """
  known = collections.defaultdict(set)
  for pair in official:
    texts = (pair.captions, *zip(pair.captions))  # the prompts together and alone
    for key in (key for captions in texts for key in _keys(captions, pair.names)):
      known[key].update(pair.categories)
  joined, matched = [], 0
  for pair in pairs:
    keys = _keys(pair.captions, pair.names)
    found = next((known[key] for key in keys if key in known), None)
    matched += found is not None
    tags = tuple(sorted({*pair.categories, *(found or ())}))
    joined.append(dataclasses.replace(pair, categories=tags))
  if pairs and not matched:
    raise InputError(
      f"{csv_file} has none of the dataset's {len(pairs)} pairs, neither by prompts "
      "nor by image names; is it the CSV of another dataset?"
    )
  return joined


def _keys(
  captions: Sequence[str | None], names: tuple[str, str]
) -> tuple[Hashable, ...]:
  """What identifies a pair, the surest first; prompts alone may be those of several."""
  prompts, images = frozenset(captions) - {None}, frozenset(names)
  return (prompts, images), prompts, images


def _find_files(dataset: epath.Path) -> tuple[str, list[epath.Path]]:
  """Which layout a path holds, and the files that list its pairs."""
  if not dataset.exists():
    raise InputError(f"--pairs {dataset} does not exist")
  endings = {".jsonl": "folder", ".csv": "CSV", ".parquet": "parquet"}
  if not dataset.is_dir():
    if kind := endings.get(dataset.suffix):
      return kind, [dataset]
    raise InputError(
      f"{dataset} is neither a .csv file, nor a .parquet file, nor a {METADATA}"
    )
  if prepared := _matching(dataset, _PREPARED):
    return "prepared", prepared
  if (dataset / METADATA).exists():
    return "folder", [dataset / METADATA]
  for folder in (dataset, dataset / "data"):
    if tables := _matching(folder, "*.parquet"):
      train = [table for table in tables if "train" in table.name]
      return "parquet", train or tables
  tables = _matching(dataset, "*.csv")
  train = [table for table in tables if "train" in table.name.lower()]
  if len(tables) == 1 or len(train) == 1:
    return "CSV", train or tables
  if tables:
    names = ", ".join(table.name for table in tables)
    raise InputError(f"{dataset} holds several CSV files ({names}); give one of them")
  raise InputError(
    f"{dataset} holds neither {METADATA} nor parquet files nor a dataset built with "
    f"TFDS nor a CSV file with the columns {', '.join(CSV_COLUMNS)}"
  )


def _find_official(folder: epath.Path) -> epath.Path | None:
  """The one CSV in a folder that looks like CoProV2's."""
  tables = _matching(folder, "*.csv")
  train = [table for table in tables if "train" in table.name.lower()]
  return next(filter(text_tables.is_csv, train or tables), None)


def _matching(folder: epath.Path, pattern: str) -> list[epath.Path]:
  """A folder's files of that name, sorted; `glob` would interpret its brackets."""
  if not folder.is_dir():
    return []
  return sorted(f for f in folder.iterdir() if fnmatch.fnmatch(f.name, pattern))


def _read(
  kind: str,
  files: list[epath.Path],
  official: Sequence[SourcePair] | None,
  skipped: list[str] | None,
) -> Table:
  if kind == "folder":
    return text_tables.read_jsonl(files[0])
  if kind == "CSV":
    return text_tables.read_csv(files[0])
  if kind == "parquet":
    return parquet.read_parquet(files, official, skipped)
  from safetydpo_jax.data.sources import prepared  # imports TFDS, 0.6 s

  return prepared.read_prepared(files, skipped)
