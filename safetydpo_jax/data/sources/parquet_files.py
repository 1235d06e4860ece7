"""Parquet files of pairs: small columns are read at once, images when they are needed.

Text and bytes may be of any of Arrow's types for them (large, view, dictionary). An
image is bytes or a struct {bytes, path}, and may stand in a list of one, as `datasets`
writes List(Image()).
"""

import bisect
import collections
import contextlib
import functools
import itertools
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from safetydpo_jax.data import delimited
from safetydpo_jax.data.sources import pairs
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import storage
from safetydpo_jax.runtime.files import NOT_FETCHED, is_lfs_content

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
      content = _unwrap(value.as_py())
    if not isinstance(content, bytes):
      raise InputError("the row holds no bytes")
    return content

  def __str__(self) -> str:
    return f"{self.file} row {self.row} column {self.column}"


class Shard(NamedTuple):
  """The small columns of a file, and whether jpg_0 and jpg_1 are names."""

  file: str
  rows: list[dict[str, Any]]
  named: bool
  columns: dict[str, str]  # where the bytes are: jpg_0, jpg_1, image → path of leaf


def read_shard(file: str, skipped: list[str] | None) -> Shard | None:
  """The columns without bytes of a file; None if it is damaged and skipped."""
  try:
    schema = _open(file).schema_arrow
    if twice := [n for n in _NEEDED if schema.names.count(n) > 1]:
      raise InputError(f"{file} has two columns {twice[0]}; keep one of them")
    if missing := [name for name in _NEEDED if name not in schema.names]:
      raise InputError(f"{file} has no column {', '.join(missing)}")
    columns, named = {}, False
    small = {n: n for n in (*_NEEDED[2:], *_OPTIONAL) if n in schema.names}
    leaves = _leaves(file)
    for name in ("jpg_0", "jpg_1", "image"):
      if name not in schema.names:
        continue
      inside = {leaf.rpartition(".")[2]: leaf for leaf in leaves[name]}
      if "bytes" in inside:
        columns[name] = inside["bytes"]
        if "path" in inside:
          small[f"{name}.path"] = inside["path"]
      elif _holds_bytes(schema.field(name).type):
        (columns[name],) = leaves[name]
      else:
        small[name] = name
        named = named or name != "image"
    if named and "image" not in columns:
      raise InputError(f"{file} names its images but has no column image with bytes")
    # One by one, for two leaves of a column would come as one column.
    lists = {name: _read_values(file, leaf) for name, leaf in small.items()}
  except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
    pairs.report(f"{file} {_why_not(file, error)}", skipped)
    return None
  for name in lists.keys() - schema.names:  # paths inside of images
    lists[name] = [_path(file, name, *row) for row in enumerate(lists[name])]
  rows = [dict(zip(lists, values)) for values in zip(*lists.values())]
  return Shard(file, rows, named, columns)


def lost_shards(files: Sequence[epath.Path]) -> list[str]:
  """Files that `x-00000-of-00003.parquet` implies and that are missing."""
  there = {file.name for file in files}
  promised = set()
  for name in map(_NUMBERED.fullmatch, there):
    if name:
      stem, _, count = name.groups()
      promised |= {f"{stem}-{i:05d}-of-{count}.parquet" for i in range(int(count))}
  return sorted(promised - there)


def _why_not(file: str, error: Exception) -> str:
  with contextlib.suppress(OSError), storage.as_path(file).open("rb") as opened:
    if is_lfs_content(opened.read(64)):
      return NOT_FETCHED
  return f"is not a readable parquet file: {error}"


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
def _read_column(file: str, group: int, column: str) -> pa.ChunkedArray:
  """A leaf alone; around its values are the structs and lists that it is in."""
  return _open(file).read_row_group(group, columns=[column]).column(0)


def read_rows(file: pq.ParquetFile, columns: list[str], what: str) -> Iterator[dict]:
  """Rows as {column: Python's value}, read in pieces.

  Args:
    file: the file.
    columns: which of its columns or leaves.
    what: names them in the error.

  Raises:
    InputError: they unpack to more than `delimited.LARGEST` bytes: in parquet, a few
      bytes may stand for more than the memory.
  """
  size = 0
  for batch in file.iter_batches(100, columns=columns):
    rows = batch.to_pylist()
    # The first does not count a dictionary's repetitions, the second a list's items.
    size += batch.nbytes + sum(sys.getsizeof(v) for row in rows for v in row.values())
    if size > delimited.LARGEST:
      raise InputError(f"{what} unpacks to more than {delimited.LARGEST:,} bytes")
    yield from rows


def _read_values(file: str, leaf: str) -> list[Any]:
  rows = read_rows(_open(file), [leaf], f"{file} column {leaf}")
  return [value for row in rows for value in row.values()]


def _leaves(file: str) -> dict[str, list[str]]:
  """{column: the dotted paths of its leaves}, as the file spells them."""
  schema = _open(file).schema
  leaves = collections.defaultdict(list)
  for path in (schema.column(number).path for number in range(len(schema))):
    leaves[path.partition(".")[0]].append(path)
  return leaves


def _holds_bytes(kind: pa.DataType) -> bool:
  """Whether a column is of bytes, in any of Arrow's types for them."""
  while hasattr(kind, "value_type"):  # of lists and dictionaries
    kind = kind.value_type
  types = pa.types
  return any(
    is_type(kind)
    for is_type in (types.is_binary, types.is_large_binary, types.is_binary_view)
  )


def _path(file: str, name: str, row: int, value: Any) -> Any:
  try:
    return _unwrap(value)
  except InputError as error:
    raise InputError(f"{file} row {row}: {name} is {error}") from None


def _unwrap(value: Any) -> Any:
  """The one value inside structs of one field and lists of one item; None if empty.

  Raises:
    InputError: a list has several items.
  """
  while isinstance(value, dict | list):
    inside = list(value.values()) if isinstance(value, dict) else value
    if len(inside) > 1:
      raise InputError(f"a list of {len(inside)} images, expected one")
    value = inside[0] if inside else None
  return value


def forget() -> None:
  """Closes what was opened, for files may have been replaced since."""
  for cached in (_open, _row_groups, _read_column):
    cached.cache_clear()
