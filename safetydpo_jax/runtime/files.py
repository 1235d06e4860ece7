"""How a file is written: under a temporary name, then renamed, so never half of it.

The temporary name begins with a dot and a tag and keeps the ending, by which writers of
pictures and arrays know their format. A write that fails leaves what was there before.

And what is in a file's place where a repository was cloned without Git LFS: a pointer,
three lines of text, the first of which names the specification.
"""

import contextlib
import csv
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetydpo_jax.errors import InputError

_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
# What a message says after the name of such a file.
NOT_FETCHED = (
  "is a Git LFS pointer, not the file it stands for; fetch that with `git lfs pull` in "
  "its folder"
)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], tag: str | None = None) -> Iterator[Path]:
  """Gives the temporary name to write to; what was written there becomes `path`.

  Missing folders above `path` are made.

  Args:
    path: the file.
    tag: of the temporary name; None: the process's number, so that several may write.
      What a killed process left is overwritten by the next if the tag is fixed.

  Raises:
    InputError: it cannot be written. What else the block raises passes through.
  """
  path = Path(path)
  temporary = path.with_name(f".{tag or os.getpid()}.{path.name}")
  with naming(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
      yield temporary
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """A failure to write becomes an `InputError` that names the file."""
  try:
    yield
  except OSError as error:
    raise InputError(
      f"cannot write {os.fspath(path)}: {error.strerror or error}; choose a folder you "
      "can write to"
    ) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes `text` as UTF-8."""
  with writing(path) as temporary:
    temporary.write_text(text, encoding="utf-8")


def write_csv(
  path: str | os.PathLike[str],
  columns: Sequence[str],
  rows: Iterable[Mapping[str, Any]],
) -> None:
  """Writes a header and a line for each row; a row may lack columns."""
  with (
    writing(path) as temporary,
    open(temporary, "w", newline="", encoding="utf-8") as lines,
  ):
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)


def is_lfs_pointer(path: str | os.PathLike[str]) -> bool:
  """Whether the file is what Git leaves in place of one that LFS has not fetched."""
  try:
    with open(path, "rb") as file:
      return file.read(len(_LFS_POINTER)) == _LFS_POINTER
  except OSError:
    return False


def is_lfs_content(content: bytes) -> bool:
  """Whether these are the bytes of a Git LFS pointer."""
  return content.startswith(_LFS_POINTER)
