"""The pair cache: what `encode` writes and training reads.

  cache.json    manifest, written last: a folder without it is unfinished
  plan.json     the settings an encode was started with; gone when it is finished
  index.jsonl   one line per record: {"id": …, "categories": […], "slots": […]}
  pairs-00000-of-0000N.arrayrecord      the records, see `data/cache/shards.py`
  pairs-00000-of-0000N.skipped.json     {id: why}, only where pairs were left out

The manifest holds the settings that decide the cache's bytes, their `fingerprint`, and
`model`, the name given for the base; `fields`, the table of a record's arrays;
`shards`, the files and their numbers of records; `counts`, what became of the dataset's
rows, and `skipped`, a line for each pair or file that could not be read;
`empty_token_ids`; `time_ids` of SDXL (`conditioning.py`) or null; `versions`.
"""

import bisect
import dataclasses
import hashlib
import itertools
import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from safetydpo_jax.data import categories, holdout
from safetydpo_jax.data.cache import shards
from safetydpo_jax.data.cache.shards import Field
from safetydpo_jax.data.sources.pairs import SLOTS, SourcePair
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.pipeline import Pipeline
from safetydpo_jax.models import conditioning
from safetydpo_jax.runtime import manifest, storage

FORMAT_VERSION = 1
MANIFEST = "cache.json"
PLAN = "plan.json"
INDEX = "index.jsonl"
PARTS = ("train", "holdout")
MIXTURES = {"both": SLOTS, "unsafe": ("unsafe",), "safe": ("safe",)}
AGAIN = "run the same encode command again, it resumes where it stopped"


class Entry(NamedTuple):
  """What the index says about a record."""

  id: str
  categories: tuple[str, ...]
  slots: tuple[str, ...]


def entry(pair: SourcePair) -> Entry:
  """A pair's line of the index."""
  about = pair.about()
  return Entry(about["id"], tuple(about["categories"]), tuple(about["captions"]))


def complete_cache(
  path: epath.Path,
  settings: dict[str, Any],
  entries: Sequence[Entry],
  fields: Sequence[Field],
  without: Collection[str] = (),
  **more: Any,
) -> None:
  """Writes the index and the manifest of a cache whose shards are all there.

  Args:
    path: the cache's folder.
    settings: what decides its bytes.
    entries: the index, in the order of records, of all pairs.
    fields: the arrays of a record.
    without: ids of pairs that were skipped and have no record.
    **more: the manifest's other rows: model, counts, skipped, empty_token_ids,
      time_ids.

  Raises:
    InputError: they cannot be written, or no pair is left.
  """
  path = storage.as_path(path)
  size = settings["shard_size"]
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  kept = [entry for entry in entries if entry.id not in without]
  if not kept:
    raise InputError(f"{path}: none of {len(entries)} pairs could be encoded")
  with storage.writing(path / INDEX) as local, storage.named(path / INDEX):
    lines = (json.dumps(entry._asdict()) + "\n" for entry in kept)
    local.write_text("".join(lines), encoding="utf-8")
  blocks = [entries[i : i + size] for i in range(0, len(entries), size)]
  content = {
    **settings,
    "fingerprint": digest.hexdigest()[:16],
    "fields": fields,
    "shards": [
      {"file": name, "records": sum(entry.id not in without for entry in block)}
      for name, block in zip(shards.shard_names(len(entries), size), blocks)
    ],
    **more,
    "versions": manifest.versions(),
  }
  storage.write_json(path / MANIFEST, content)
  if (path / PLAN).exists():
    (path / PLAN).unlink()


@dataclasses.dataclass(frozen=True)
class PairCache:
  """An opened cache; see the module's docstring.

  Attributes:
    path: its folder.
    manifest: the content of cache.json.
    index: an `Entry` for each record.
    fields: the arrays of a record.
  """

  path: epath.Path
  manifest: dict[str, Any]
  index: tuple[Entry, ...]
  fields: tuple[Field, ...]
  _source: ArrayRecordDataSource = dataclasses.field(repr=False)

  def __len__(self) -> int:
    return len(self.index)

  @property
  def fingerprint(self) -> str:
    """Identifies the dataset and how it was encoded."""
    return self.manifest["fingerprint"]

  @property
  def latent_shape(self) -> tuple[int, int, int]:
    """(h, w, c) of one image's latents."""
    return tuple(self.manifest["latent_shape"])

  @property
  def empty_token_ids(self) -> np.ndarray:
    """Token ids of the empty caption, (encoders, 77) int32."""
    return np.asarray(self.manifest["empty_token_ids"], np.int32)

  def __getitem__(self, number: int) -> dict[str, np.ndarray]:
    """Record `number`'s arrays by field name, read-only; thread-safe."""
    return shards.unpack(self.fields, self._read(number))

  def about(self, number: int) -> dict[str, Any]:
    """Record `number`'s id, categories and captions."""
    return shards.about(self.fields, self._read(number))

  def _read(self, number: int) -> bytes:
    try:
      return self._source[number]
    except RuntimeError as error:
      table = self.manifest["shards"]
      ends = list(itertools.accumulate(shard["records"] for shard in table))
      shard = table[bisect.bisect_right(ends, number)]["file"]
      raise InputError(_damaged(self.path / shard, error)) from error

  def select(
    self,
    category: str | None = None,
    mixture: str = "both",
    held_out: float = 0.0,
    part: str = "train",
  ) -> np.ndarray:
    """The training examples of a category: (n, 2) int64 of (record, slot).

    Args:
      category: any spelling of one; None or "all" for every pair. A pair under two
        categories belongs to both.
      mixture: "both" captions of a pair make an example each; or only "unsafe", or
        only "safe".
      held_out: share of the pairs kept out of training, see `holdout.is_held_out`.
      part: "train", or "holdout" for the pairs kept out.

    Raises:
      InputError: an argument is unknown or out of range, or nothing is left.
    """
    if part not in PARTS:
      raise InputError(f"unknown part {part!r}; expected {' or '.join(PARTS)}")
    if mixture not in MIXTURES:
      raise InputError(
        f"unknown mixture {mixture!r}; expected one of {', '.join(MIXTURES)}"
      )
    name = categories.selection(category)
    encoded = self.manifest.get("category", "all")
    if encoded not in ("all", name):
      raise InputError(
        f"{self.path} holds only {encoded}, category {name or 'all'} was asked for; "
        "encode the dataset again without --category"
      )
    examples = [
      (number, SLOTS.index(slot))
      for number, entry in enumerate(self.index)
      if name is None or name in entry.categories
      if holdout.is_held_out(entry.id, held_out) == (part == "holdout")
      for slot in MIXTURES[mixture]
      if slot in entry.slots
    ]
    if not examples:
      where = f" in the {part} part at holdout {held_out}" if held_out else ""
      there = Counter(tag for entry in self.index for tag in entry.categories)
      counts = ", ".join(f"{tag} {n}" for tag, n in sorted(there.items())) or "none"
      raise InputError(
        f"{self.path} has no examples of category {name or 'all'} with mixture "
        f"{mixture}{where}; its {len(self)} pairs by category: {counts}"
      )
    return np.asarray(examples, np.int64)

  def count(
    self, category: str | None, mixture: str, held_out: float = 0.0
  ) -> tuple[int, int]:
    """How many pairs and how many examples `select` gives for training."""
    examples = self.select(category, mixture, held_out)
    return len(np.unique(examples[:, 0])), len(examples)


def open_cache(place: str | os.PathLike) -> PairCache:
  """Opens a finished cache; the shards of a URL are copied to this machine first.

  Raises:
    InputError: it is unfinished, of another version, or a file is missing or damaged.
  """
  path = storage.as_path(place)
  if (path / PLAN).exists() and not (path / MANIFEST).exists():
    raise InputError(f"{path} is an unfinished pair cache; {AGAIN}")
  about_cache = storage.read_json(path / MANIFEST, "pair cache")
  version = about_cache.get("format") if isinstance(about_cache, dict) else None
  if version != FORMAT_VERSION:
    raise InputError(
      f"{path / MANIFEST} has format {version!r}, this version reads {FORMAT_VERSION}; "
      "encode the dataset again"
    )
  try:
    table = [(os.path.basename(s["file"]), s["records"]) for s in about_cache["shards"]]
    fields = tuple(Field(x, y, tuple(z)) for x, y, z in about_cache["fields"])
  except (KeyError, TypeError, ValueError) as error:
    raise InputError(_damaged(path / MANIFEST, error)) from error
  files, counts = [path / name for name, _ in table], [count for _, count in table]
  if missing := [file.name for file in files if not file.exists()]:
    raise InputError(f"{path} lacks {', '.join(missing)}; {AGAIN}")
  local = storage.local_files(files)
  for file, copy, count in zip(files, local, counts):
    try:
      records = len(ArrayRecordDataSource(copy))
    except RuntimeError as error:
      raise InputError(_damaged(file, error)) from error
    if records != count:
      raise InputError(_damaged(file, f"{records} records instead of {count}"))
  return PairCache(
    path=path,
    manifest=about_cache,
    index=_read_index(path / INDEX, sum(counts)),
    fields=fields,
    _source=ArrayRecordDataSource(local),
  )


def _read_index(file: epath.Path, records: int) -> tuple[Entry, ...]:
  try:
    lines = map(json.loads, file.read_text(encoding="utf-8").split("\n")[:-1])
    entries = [Entry(x["id"], tuple(x["categories"]), tuple(x["slots"])) for x in lines]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(_damaged(file, error)) from error
  if len(entries) != records:
    raise InputError(_damaged(file, f"{len(entries)} lines for {records} records"))
  return tuple(entries)


def _damaged(file: epath.Path, why: object) -> str:
  return f"{file} is damaged ({why}); delete it, and {AGAIN}"


def check_cache_fits(cache: PairCache, pipeline: Pipeline) -> None:
  """Refuses a cache that was encoded for another model.

  Args:
    cache: an opened cache.
    pipeline: the model to use it with.

  Raises:
    InputError: naming what differs.
  """
  height, _, channels = cache.latent_shape
  rows = {
    "the base model's fingerprint": (cache.manifest["base"], pipeline.fingerprint),
    "latent channels": (channels, pipeline.latent_channels),
    "pixels per latent": (cache.manifest["resolution"] // height, pipeline.vae_scale),
    "the VAE's scaling factor": (
      cache.manifest["scaling_factor"],
      pipeline.scaling_factor,
    ),
    "text encoders": (len(cache.empty_token_ids), len(pipeline.text_encoders)),
    "an empty caption's first and last token": (
      cache.empty_token_ids[:, [0, -1]].tolist(),
      [ids[0, [0, -1]].tolist() for ids in pipeline.tokenize([""])],
    ),
  }
  for what, (ours, theirs) in rows.items():
    if ours != theirs:
      raise InputError(
        f"{cache.path} was encoded with {cache.manifest['model']}, which does not fit "
        f"{pipeline.name}: {what} {ours} and {theirs}; encode the pairs again, with "
        f"--model {pipeline.name}"
      )


def read_time_ids(manifest: Mapping[str, Any], path: epath.Path) -> np.ndarray | None:
  """The time ids of a pair cache, (6,) int32; None unless there are two encoders.

  Args:
    manifest: the cache's; caches of earlier versions have no `time_ids`.
    path: the cache's folder, for errors.

  Raises:
    InputError: the manifest holds something else.
  """
  if len(manifest["empty_token_ids"]) < 2:
    return None
  side = manifest["resolution"]
  stored = manifest.get("time_ids", conditioning.make_time_ids(side, side))
  if not (
    isinstance(stored, list)
    and len(stored) == 6
    and all(isinstance(number, int) and 0 <= number < 2**31 for number in stored)
  ):
    raise InputError(
      f"{path}: time_ids in its manifest is {stored!r}, expected six sizes in pixels; "
      "encode the dataset again"
    )
  return np.asarray(stored, np.int32)
