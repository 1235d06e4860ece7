"""Folders that need not be on this machine: paths and URLs alike.

`etils.epath` opens gs://, s3://, az:// through fsspec, which needs the package of the
store (gcsfs, s3fs, adlfs). A name on a store appears when its upload is complete, so
writing there needs no temporary name; on a disk it does.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epath

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import files, manifest

_COPIES: list[tempfile.TemporaryDirectory] = []  # removed when the program ends


def as_path(place: str | os.PathLike) -> epath.Path:
  """A path as `pathlib` has it, or a URL with the same methods; file:// is a path.

  Raises:
    InputError: nothing opens such a URL, or the package that does is not installed.
  """
  name = os.fspath(place).removeprefix("file://")
  if not is_remote(name):
    return Path(name)
  try:
    path = epath.Path(name)
    path.exists()  # imports the store's package
  except (KeyError, NotImplementedError):
    raise InputError(
      f"{name}: expected a path, or a gs://, s3:// or az:// URL"
    ) from None
  except ImportError as error:
    raise InputError(f"{name} cannot be opened: {error}") from error
  return path


def is_remote(path: str | os.PathLike) -> bool:
  """Whether a path is a URL of a store."""
  return "://" in os.fspath(path)


@contextlib.contextmanager
def writing(path: epath.Path) -> Iterator[Path]:
  """Gives a local path to write to, and puts what was written at `path`, whole.

  Raises:
    InputError: it cannot be written there. What the caller raises passes through.
  """
  if is_remote(path):
    with tempfile.TemporaryDirectory() as folder:
      local = Path(folder) / path.name
      yield local
      with named(path):
        epath.Path(local).copy(path, overwrite=True)
    return
  with files.writing(path, tag="unfinished") as temporary:  # shards are large
    yield temporary


@contextlib.contextmanager
def named(path: os.PathLike) -> Iterator[None]:
  """A failure to write becomes an `InputError` that names the file."""
  try:
    yield
  except (RuntimeError, OSError) as error:
    raise InputError(f"cannot write {os.fspath(path)}: {error}") from error


def write_json(path: epath.Path, content: Any) -> None:
  """`manifest.write_json`, also to a store."""
  if not is_remote(path):
    manifest.write_json(path, content)
    return
  with writing(path) as local:
    manifest.write_json(local, content)


def read_json(path: epath.Path, what: str) -> Any:
  """`manifest.read_json`, also from a store."""
  if not is_remote(path):
    return manifest.read_json(path, what)
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise manifest.missing(path, what) from None
  except (OSError, ValueError, RecursionError) as error:
    raise manifest.unreadable(path, what, error) from error


def local_files(files: Sequence[epath.Path]) -> list[str]:
  """Paths of the files on this machine; of remote ones, copies until the program ends.

  For what reads only local files at random places: ArrayRecord.

  Raises:
    InputError: they cannot be copied.
  """
  if not any(map(is_remote, files)):
    return [os.fspath(file) for file in files]
  folder = tempfile.TemporaryDirectory()
  _COPIES.append(folder)
  copies = [Path(folder.name) / file.name for file in files]
  for file, copy in zip(files, copies):
    with named(copy):
      file.copy(copy)
  return [os.fspath(copy) for copy in copies]
