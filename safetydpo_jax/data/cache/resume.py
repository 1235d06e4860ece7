"""What an earlier encode left in a cache's folder, and how the next one resumes.

A shard is complete or absent. plan.json holds the settings it was encoded with, or
cache.json once the cache is finished; see `records.py` for the files.
"""

from collections.abc import Sequence
from typing import Any

import jax
from etils import epath

from safetydpo_jax.data.cache import records, shards
from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import manifest, storage
from safetydpo_jax.runtime.files import make_folder


def list_files(out: epath.Path) -> set[str]:
  """The names of what the folder holds."""
  return {file.name for file in out.iterdir()} if out.is_dir() else set()


def check_same_settings(
  out: epath.Path, settings: dict[str, Any], there: set[str]
) -> None:
  """Refuses a folder whose shards were encoded with other settings.

  Raises:
    InputError: naming the setting.
  """
  plan = out / (records.MANIFEST if records.MANIFEST in there else records.PLAN)
  # A plan without shards may be replaced: nothing was made with it.
  if not any(name.startswith("pairs-") for name in there):
    return
  before = storage.read_json(plan, "pair cache")
  for name, value in settings.items():
    if before.get(name) != value:
      raise InputError(
        f"{out} holds a cache {manifest.change(name, before.get(name), value)}; choose "
        "another --out, or delete it"
      )


def count_lost(
  out: epath.Path, files: Sequence[epath.Path], there: set[str], *, skip: bool
) -> int:
  """How many pairs are missing from the shards written so far.

  Raises:
    InputError: any are missing, though `skip` is false.
  """
  lost = shards.read_skipped([file for file in files if file.name in there])
  if lost and not skip:
    raise InputError(
      f"{out} lacks {len(lost)} pairs that --on_error skip left out, the first "
      f"{min(lost)}; fix them and choose another --out, or give --on_error skip"
    )
  return len(lost)


def is_finished(files: Sequence[epath.Path], there: set[str]) -> bool:
  """Whether manifest, index and all shards exist."""
  return {records.MANIFEST, records.INDEX, *(file.name for file in files)} <= there


def remove_plan(out: epath.Path, there: set[str]) -> None:
  """Removes the plan of a finished cache, left by a kill just before the end."""
  if records.PLAN in there and jax.process_index() == 0:
    (out / records.PLAN).unlink()


def start_or_resume(out: epath.Path, settings: dict[str, Any]) -> None:
  """Makes the folder if it is new, and writes the plan; process 0 does it.

  Raises:
    InputError: they cannot be written.
  """
  if jax.process_index() != 0:
    return
  make_folder(out)
  storage.write_json(out / records.PLAN, settings)
