"""Manifests: the JSON file in every directory we write, and how it is written.

A manifest says what made a directory, from what, with which versions, seeds and
fingerprints. It is written last and by rename, so a directory with a manifest is
complete, and one without is not.
"""

import contextlib
import json
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import files

if TYPE_CHECKING:
  from etils import epath

_PACKAGES = ("safetydpo-jax", "jax", "flax", "optax", "orbax-checkpoint")


def versions(*more: str) -> dict[str, str | None]:
  """Versions of packages that affect a result's digits, None if not installed."""
  found = dict.fromkeys((*_PACKAGES, *more))
  for package in found:
    with contextlib.suppress(PackageNotFoundError):  # or a checkout on the path
      found[package] = version(package)
  return found


def write_json(path: str | os.PathLike, content: Any) -> None:
  """Writes `content` as JSON that every reader takes: no NaN, no infinity."""
  files.write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def read_json(path: str | os.PathLike, what: str) -> Any:
  """Reads a JSON file; `what` names it in the error, for example "pair cache"."""
  path = Path(path)
  try:
    return json.loads(path.read_text(encoding="utf-8"))
  except FileNotFoundError:
    raise missing(path, what) from None
  except (OSError, ValueError, RecursionError) as error:
    if files.is_lfs_pointer(path):
      raise InputError(f"{path} {files.NOT_FETCHED}") from None
    raise unreadable(path, what, error) from error


def missing(path: "Path | epath.Path", what: str) -> InputError:
  """The error of a folder that lacks the JSON file that makes it a `what`."""
  return InputError(f"{path.parent} is not {_a(what)}: it has no {path.name}")


def unreadable(path: "Path | epath.Path", what: str, error: Exception) -> InputError:
  """The error of a JSON file that cannot be read."""
  return InputError(f"cannot read {path}, the JSON file of {_a(what)}: {error}")


def _a(what: str) -> str:
  return f"{'an' if what[0] in 'aeiou' else 'a'} {what}"


def change(name: str, before: Any, now: Any) -> str:
  """The words "with NAME 1, now it is 2" of a setting; None is one that is not set."""
  was, new = ("unset" if value is None else repr(value) for value in (before, now))
  return f"with {name} {was}, now it is {new}"
