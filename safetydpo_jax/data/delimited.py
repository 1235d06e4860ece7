"""Tables in text files, as they are written by hand, by pandas and by Excel.

  encoding    UTF-8, with or without a byte order mark, or UTF-16 with one
  delimiter   the comma, in a .tsv the tab; another of comma, semicolon and tab where
              it alone finds a column that is looked for
  row ends    \\n or \\r\\n; in a file without \\n, \\r
  quotes      RFC 4180: a field in quotes may hold delimiters and row ends, and quotes
              that are written twice; a delimiter or the row's end follows it
  spaces      those after a delimiter are dropped if the header has some there

Every cell is text: "NA", "null" and "1.0" stay what they are. A row may lack its last
cells; blank rows do not count.
"""

import codecs
import contextlib
import csv
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime.files import NOT_FETCHED, is_lfs_content

LARGEST = 2_000_000_000  # bytes
_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_MARKS = (
  (codecs.BOM_UTF8, "utf-8-sig"),  # Excel writes it
  (codecs.BOM_UTF16_LE, "utf-16"),
  (codecs.BOM_UTF16_BE, "utf-16"),
)
# What `csv` says, and what it means here.
_TROUBLES = (
  ("unexpected end of data", "a quote that opens in it is never closed"),
  (
    "expected after",
    "text follows a closing quote; close each quote before the next delimiter, and "
    "write a quote within quotes twice",
  ),
  (
    "field larger",
    f"a field has more than {csv.field_size_limit():,} characters; is a quote in it "
    "not closed?",
  ),
  ("new-line character", "a field without quotes holds a carriage return; quote it"),
)


class Table(NamedTuple):
  """A text file's rows.

  Attributes:
    columns: the header's cells, without spaces around them.
    rows: each row's cells, at most one for each column.
    notes: what a reader should know, a line each.
  """

  columns: list[str]
  rows: list[list[str]]
  notes: tuple[str, ...]


def read(
  file: Path | epath.Path,
  what: str,
  is_wanted: Callable[[str], bool],
  most: int | None = None,
) -> Table:
  """Reads a table.

  Args:
    file: a .tsv, or a CSV of any name.
    what: it is, for errors: "prompts CSV".
    is_wanted: whether a column of this name is looked for; decides the delimiter.
    most: how many rows; None: all of them.

  Raises:
    InputError: the file cannot be read, a quote is not closed, or a row has more cells
      than the header.
  """
  text = read_text(file, what)
  usual = "\t" if file.suffix.lower() == ".tsv" else ","
  delimiter = _delimiter(text, usual, is_wanted)
  # Where a name follows a space, the space belongs to the delimiter, and quotes count.
  columns = next(_records(file, text, delimiter), [])
  spaced = any(column.startswith(" ") for column in columns[1:])
  records = _records(file, text, delimiter, spaced)
  columns, *rows = [*itertools.islice(records, most and most + 1)] or [[]]
  for number, row in enumerate(rows, start=1):
    if len(row) > len(columns):
      raise InputError(
        f"{file} row {number} has {len(row)} fields and the header {len(columns)}; put "
        f"fields that contain {_DELIMITERS[delimiter]} in quotes"
      )
  notes = [f"{file}: fields are separated by {_DELIMITERS[delimiter]}"]
  return Table(
    [column.strip() for column in columns],
    rows,
    tuple(notes if delimiter != usual else ()),
  )


def _delimiter(text: str, usual: str, is_wanted: Callable[[str], bool]) -> str:
  """The usual one, unless only another finds a wanted column in the header."""
  for delimiter in sorted(_DELIMITERS, key=lambda delimiter: delimiter != usual):
    with contextlib.suppress(InputError):  # the header's quotes are another one's
      header = next(_records(Path(), text, delimiter), [])
      split_by_both = delimiter != usual and any(usual in name for name in header)
      if any(is_wanted(name) for name in header) and not split_by_both:
        return delimiter
  return usual


def read_text(file: Path | epath.Path, what: str) -> str:
  """A file as text, by the encoding that it begins with.

  Args:
    file: the file.
    what: it is, for errors.

  Raises:
    InputError: it cannot be read, was not fetched from Git LFS, is too large, or is in
      another encoding.
  """
  try:
    about = file.stat()
    size = getattr(about, "st_size", getattr(about, "length", 0))  # a store's: length
    if size > LARGEST:
      raise InputError(f"{file} has {size:,} bytes, more than {LARGEST:,}; split it")
    content = file.read_bytes()
    if is_lfs_content(content):
      raise InputError(f"{file} {NOT_FETCHED}")
    encoding = next(
      (name for mark, name in _MARKS if content.startswith(mark)), "utf-8"
    )
    text = content.decode(encoding)
  except (OSError, RuntimeError, UnicodeDecodeError) as error:  # a store raises any
    hint = "; save it as UTF-8" if isinstance(error, UnicodeDecodeError) else ""
    raise InputError(f"cannot read {file} as a {what}: {error}{hint}") from error
  if "\0" in text.partition("\n")[0]:  # UTF-16 without its mark
    raise InputError(
      f"cannot read {file} as a {what}: its header holds NUL characters; save it as "
      "UTF-8"
    )
  return text


def _records(
  file: Path | epath.Path, text: str, delimiter: str, spaced: bool = False
) -> Iterator[list[str]]:
  """The header and the rows, without blank ones.

  Raises:
    InputError: a row cannot be read; names it.
  """
  # Not every \r ends a row: where it does not, `csv` refuses it outside quotes.
  lines = io.StringIO(text, newline="\n" if "\n" in text else "\r")
  reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=spaced, strict=True)
  number = 0
  while True:
    line = reader.line_num + 1
    try:
      record = next(reader)
    except StopIteration:
      return
    except csv.Error as error:
      row = f"row {number} (line {line})" if number else "the header"
      why = next((ours for theirs, ours in _TROUBLES if theirs in str(error)), error)
      raise InputError(f"{file}: {row} cannot be read: {why}") from error
    if record:
      yield record
      number += 1
