"""Preference pairs in parquet files; their images stay there until they are needed.

  hub         CoProV2-SD15 and -SDXL: `jpg_0` and `jpg_1` are names, `image` is a struct
              {bytes, path} of the row's own image, one of the two, and `caption` its
              prompt. An image's bytes are found by its name. Where `image.path` does
              not say which of the two a row holds, the rows' order does: of n rows,
              rows i < n/2 hold the safe image and prompt of the pair and rows n/2 + i
              the unsafe ones (inferred from the published files, so it is checked: both
              rows must name the same two images, or their captions must be a pair of
              the official CSV).
  Pick-a-Pic  `jpg_0` and `jpg_1` hold the bytes (binary, or a struct {bytes, path}).
              An image's name is its `image_0_uid` / `image_1_uid`, else the path in the
              struct, else "sha256-" and 16 digits of its bytes. Which image's
              prompt the caption is: `file_name` says it, as in the folder layout; else
              the official CSV, if it has the prompt; else it is the unsafe one's.

Both have `label_0` (1, 0, or a tie) and `caption`, and may have `category`.
"""

import bisect
import functools
import hashlib
import itertools
import os
import re
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath

from safetydpo_jax.data.sources import pairs
from safetydpo_jax.data.sources.pairs import SLOTS, Row, SourcePair, Table
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import storage

_NUMBERED = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.parquet")
_NEEDED = ("jpg_0", "jpg_1", "label_0", "caption")
_OPTIONAL = ("file_name", "category", "image_0_uid", "image_1_uid")
_reading = threading.Lock()  # a ParquetFile is not thread-safe


class ParquetImage(NamedTuple):
  """An image in a row of a parquet file; `row` counts from 0."""

  file: str
  row: int
  column: str

  def read_bytes(self) -> bytes:
    """Its bytes; neighbouring rows cost little."""
    with _reading:
      starts = _row_groups(self.file)
      group = bisect.bisect_right(starts, self.row) - 1
      value = _read_column(self.file, group, self.column)[self.row - starts[group]]
      content = value.as_py()
    if content is None:
      raise InputError("the row holds no bytes")
    return content

  def __str__(self) -> str:
    return f"{self.file} row {self.row} column {self.column}"


class _Shard(NamedTuple):
  """The small columns of a file, and whether jpg_0 and jpg_1 are names."""

  file: str
  rows: list[dict[str, Any]]
  named: bool
  columns: dict[str, str]  # where the bytes are: jpg_0, jpg_1, image → leaf


@functools.lru_cache(maxsize=16)
def _open(file: str) -> pq.ParquetFile:
  return pq.ParquetFile(storage.as_path(file).open("rb"))


@functools.lru_cache(maxsize=64)
def _row_groups(file: str) -> list[int]:
  """The first row of each row group."""
  about = _open(file).metadata
  sizes = [about.row_group(group).num_rows for group in range(about.num_row_groups)]
  return list(itertools.accumulate(sizes, initial=0))[:-1]


@functools.lru_cache(maxsize=4)  # two halves of the file are read side by side
def _read_column(file: str, group: int, column: str) -> pa.Array:
  return _leaf(_open(file).read_row_group(group, columns=[column]), column)


def _leaf(table: pa.Table, column: str) -> pa.Array:
  """A column, or the field of a struct column, by its dotted name."""
  name, *field = column.split(".")
  array = table.column(name).combine_chunks()
  if isinstance(array, pa.ChunkedArray):  # no rows at all
    array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.nulls(0)
  return pc.struct_field(array, field[0]) if field else array


def read_parquet(
  files: Sequence[epath.Path],
  official: Sequence[SourcePair] | None,
  skipped: list[str] | None,
) -> Table:
  """Reads the files of one dataset, in either form.

  Args:
    files: all of them, in order.
    official: the pairs of CoProV2's CSV, if there is one.
    skipped: takes a line for each file that cannot be read; None: that is an error.

  Raises:
    InputError: a column is missing or of the wrong type, or pairs cannot be rebuilt.
  """
  for cached in (_open, _row_groups, _read_column):
    cached.cache_clear()  # files may have been replaced since
  before = len(skipped or ())
  if lost := _lost_shards(files):
    pairs.report(f"{files[0].parent} lacks {', '.join(lost)}", skipped)
  shards = [shard for file in files if (shard := _read_shard(str(file), skipped))]
  whole = len(skipped or ()) == before
  if len({shard.named for shard in shards}) > 1:
    raise InputError(
      f"{files[0].parent} mixes files with names and with bytes in jpg_0"
    )
  if shards and shards[0].named:
    return _read_hub(str(files[0].parent), shards, official, whole)
  return _read_pick_a_pic(str(files[0].parent), shards, official)


def _lost_shards(files: Sequence[epath.Path]) -> list[str]:
  """Files that `x-00000-of-00003.parquet` implies and that are missing."""
  there = {file.name for file in files}
  promised = set()
  for name in map(_NUMBERED.fullmatch, there):
    if name:
      stem, _, count = name.groups()
      promised |= {f"{stem}-{i:05d}-of-{count}.parquet" for i in range(int(count))}
  return sorted(promised - there)


def _read_shard(file: str, skipped: list[str] | None) -> _Shard | None:
  """The columns without bytes of a file; None if it is damaged and skipped."""
  try:
    schema = _open(file).schema_arrow
    if missing := [name for name in _NEEDED if name not in schema.names]:
      raise InputError(f"{file} has no column {', '.join(missing)}")
    columns, named = {}, False
    small = [name for name in (*_NEEDED[2:], *_OPTIONAL) if name in schema.names]
    for name in ("jpg_0", "jpg_1", "image"):
      kind = schema.field(name).type if name in schema.names else None
      if kind is None:
        continue
      if pa.types.is_struct(kind) and {field.name for field in kind} >= {"bytes"}:
        columns[name] = f"{name}.bytes"
        small += [f"{name}.path"] * ("path" in {field.name for field in kind})
      elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
        columns[name] = name
      else:
        small.append(name)
        named = named or name != "image"
    if named and "image" not in columns:
      raise InputError(f"{file} names its images but has no column image with bytes")
    table = _open(file).read(columns=small)
  except (OSError, pa.ArrowException) as error:
    pairs.report(f"{file} is not a readable parquet file: {error}", skipped)
    return None
  lists = {name: _leaf(table, name).to_pylist() for name in small}
  rows = [dict(zip(lists, values)) for values in zip(*lists.values())]
  return _Shard(file, rows, named, columns)


def _read_hub(
  folder: str,
  shards: Sequence[_Shard],
  official: Sequence[SourcePair] | None,
  whole: bool,
) -> Table:
  """Names in jpg_0 and jpg_1, bytes of the row's own image."""
  entries = [
    (f"{shard.file} row {number}", ParquetImage(shard.file, number, "image.bytes"), row)
    for shard in shards
    for number, row in enumerate(shard.rows)
  ]
  owns = [_own_image(row) for _, _, row in entries]
  if None in owns:
    if not whole:
      raise InputError(
        f"{folder}: image.path does not tell the images apart, and files are missing, "
        "so pairs cannot be rebuilt by their order"
      )
    return _read_halves(folder, entries, official)
  rows, images, ties = [], {}, 0
  for (where, image, row), own in zip(entries, map(str, owns)):
    names = [pairs.text(where, key, row[key]) for key in ("jpg_0", "jpg_1")]
    images[own] = image
    side = pairs.preferred_side(where, row["label_0"])
    if side is None:
      ties += 1
      continue
    slot = "safe" if own == names[side] else "unsafe"
    rows.append(_row(where, names[side], names[1 - side], slot, row))
  return Table(folder, rows, images, ties)


def _own_image(row: dict[str, Any]) -> str | None:
  """Which of jpg_0 and jpg_1 the row's own image is; None if that is not clear."""
  path = row.get("image.path")
  for shorten in (str, os.path.basename):
    if isinstance(path, str) and path:
      found = [
        name
        for name in (row["jpg_0"], row["jpg_1"])
        if isinstance(name, str) and shorten(name) == shorten(path)
      ]
      if len(found) == 1:
        return found[0]
  return None


def _read_halves(
  folder: str,
  entries: Sequence[tuple[str, ParquetImage, dict[str, Any]]],
  official: Sequence[SourcePair] | None,
) -> Table:
  """Pairs by the order of rows: safe ones, then the unsafe ones."""
  known = {pair.captions: pair.names for pair in official or ()}
  half, odd = divmod(len(entries), 2)
  rows, images, ties = [], {}, 0
  for safe, unsafe in zip(entries[:half], entries[half:]):
    where = f"{safe[0]} and {unsafe[0]}"
    side = pairs.preferred_side(where, safe[2]["label_0"])
    if side is None:
      ties += 2
      continue
    names = [safe[2]["jpg_0"], safe[2]["jpg_1"]]
    others = [unsafe[2]["jpg_0"], unsafe[2]["jpg_1"]]
    agree = None not in names and len({*names}) == 2 and {*names} == {*others}
    captions = (unsafe[2]["caption"], safe[2]["caption"])
    if odd or not (captions in known if official else agree):
      raise InputError(
        f"{where}: image.path does not tell the images apart, and by their order these "
        f"are not a pair; {'the CSV has no such prompts' if official else ''}"
        f"{'' if official else 'give the official CSV with --categories'}"
      )
    preferred, dispreferred = names[side], names[1 - side]
    if not agree:
      preferred, dispreferred = known[captions]
    images |= {preferred: safe[1], dispreferred: unsafe[1]}
    rows += [
      _row(entry[0], preferred, dispreferred, slot, entry[2])
      for entry, slot in zip((unsafe, safe), SLOTS)
    ]
  return Table(folder, rows, images, ties)


def _read_pick_a_pic(
  folder: str, shards: Sequence[_Shard], official: Sequence[SourcePair] | None
) -> Table:
  """Bytes in jpg_0 and jpg_1."""
  prompts = [{pair.captions[slot] for pair in official or ()} for slot in (0, 1)]
  safe_only = prompts[1] - prompts[0]
  rows, images, ties = [], {}, 0
  for shard in shards:
    for number, row in enumerate(shard.rows):
      where = f"{shard.file} row {number}"
      side = pairs.preferred_side(where, row["label_0"])
      if side is None:
        ties += 1
        continue
      names = []
      for name in ("jpg_0", "jpg_1"):
        image = ParquetImage(shard.file, number, shard.columns[name])
        names.append(_image_name(row, name, image))
        images.setdefault(names[-1], image)
      own = row.get("file_name")
      safe = own == names[side] if own else row["caption"] in safe_only
      slot = "safe" if safe else "unsafe"
      rows.append(_row(where, names[side], names[1 - side], slot, row))
  return Table(folder, rows, images, ties)


def _image_name(row: dict[str, Any], column: str, image: ParquetImage) -> str:
  name = row.get(f"image_{column[-1]}_uid") or row.get(f"{column}.path")
  if isinstance(name, str):
    return name
  digest = hashlib.sha256(pairs.read_image(image, str(image).encode()))
  return f"sha256-{digest.hexdigest()[:16]}"


def _row(
  where: str, preferred: str, dispreferred: str, slot: str, row: dict[str, Any]
) -> Row:
  caption = pairs.text(where, "caption", row["caption"])
  tags = (row["category"],) if row.get("category") else ()
  return Row(where, preferred, dispreferred, slot, caption, tags)
