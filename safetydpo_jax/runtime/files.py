"""How a file is written: under a temporary name, then renamed, so never half of it.

The temporary name begins with a dot and a tag and keeps the ending, by which writers of
pictures and arrays know their format. A write that fails leaves what was there before.

And what is in a file's place where a repository was cloned without Git LFS: a pointer,
three lines of text, the first of which names the specification.
"""

import contextlib
import csv
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetydpo_jax.errors import InputError

if TYPE_CHECKING:  # it takes long to import, and only methods of its paths are used
  from etils import epath

_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
# What a message says after the name of such a file.
NOT_FETCHED = (
  "is a Git LFS pointer, not the file it stands for; fetch that with `git lfs pull` in "
  "its folder"
)


@contextlib.contextmanager
def writing(path: str | os.PathLike[str], tag: str | None = None) -> Iterator[Path]:
  """Gives the temporary name to write to; what was written there becomes `path`.

  Missing folders above `path` are made. A block that only writes goes into `naming`;
  one that also reads, such as from an iterator, puts each write into it, so that a
  failure to read is not taken for one to write.

  Args:
    path: the file.
    tag: of the temporary name; None: the process's number, so that several may write.
      What a killed process left is overwritten by the next if the tag is fixed.

  Raises:
    InputError: the folder cannot be made, or the file not be put there. What the block
      raises passes through.
  """
  path = Path(path)
  temporary = path.with_name(f".{tag or os.getpid()}.{path.name}")
  with naming(path):
    path.parent.mkdir(parents=True, exist_ok=True)
  try:
    yield temporary
    with naming(path):
      os.replace(temporary, path)
  finally:
    with contextlib.suppress(OSError):  # it may be what has failed
      temporary.unlink()


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


def make_folder(path: "Path | epath.Path") -> None:
  """Makes a folder and those above it, if they are not there; also on a store.

  Raises:
    InputError: it cannot be made.
  """
  try:
    path.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    reason = error.strerror or error
    raise InputError(f"cannot make the folder {os.fspath(path)}: {reason}") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
  """Writes `text` as UTF-8."""
  with writing(path) as temporary, naming(path):
    temporary.write_text(text, encoding="utf-8")


def write_csv(
  path: str | os.PathLike[str],
  columns: Sequence[str],
  rows: Iterable[Mapping[str, Any]],
) -> None:
  """Writes a header and a line for each row; a row may lack columns."""
  table = list(rows)  # read before anything is written
  with (
    writing(path) as temporary,
    naming(path),
    open(temporary, "w", newline="", encoding="utf-8") as lines,
  ):
    writer = csv.DictWriter(lines, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)


def copy(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
  """Copies a file into a folder, which is made if it is missing.

  Raises:
    InputError: `source` cannot be read or `target` not be written; it names both.
  """
  try:
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
  except OSError as error:
    raise InputError(
      f"cannot copy {os.fspath(source)} to {os.fspath(target)}: "
      f"{error.strerror or error}"
    ) from error


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
