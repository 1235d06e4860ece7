"""The pair cache: what `encode` writes and training reads.

  cache.json    manifest, written last: a folder without it is unfinished
  plan.json     the settings an encode was started with; gone when it is finished
  index.jsonl   one line per record: {"id": …, "categories": […], "slots": […]}
  pairs-00000-of-0000N.arrayrecord      the records, see `data/shards.py`

The manifest holds the settings that decide the cache's bytes, their `fingerprint`, and
`model`, the base as it was named; `fields`, the table of a record's arrays; `shards`,
the files and their numbers of records; `counts`, what became of the dataset's rows;
`empty_token_ids`; `versions`.
"""

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource

from safetydpo_jax.data import categories, shards
from safetydpo_jax.data.layouts import SLOTS
from safetydpo_jax.data.shards import Field
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats import manifest

FORMAT_VERSION = 1
MANIFEST = "cache.json"
PLAN = "plan.json"
INDEX = "index.jsonl"
MIXTURES = {"both": SLOTS, "unsafe": ("unsafe",), "safe": ("safe",)}
AGAIN = "run the same encode command again, it goes on where it stopped"


class Entry(NamedTuple):
  """What the index knows of a record."""

  id: str
  categories: tuple[str, ...]
  slots: tuple[str, ...]


def complete_cache(
  path: Path,
  settings: dict[str, Any],
  entries: Sequence[Entry],
  fields: Sequence[Field],
  **more: Any,
) -> None:
  """Writes the index and the manifest of a cache whose shards are all there.

  Args:
    path: the cache's folder.
    settings: what decides its bytes.
    entries: the index, in the order of records.
    fields: the arrays of a record.
    **more: the manifest's other rows: model, counts, empty_token_ids.

  Raises:
    InputError: they cannot be written.
  """
  size = settings["shard_size"]
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
  lines = [json.dumps(entry._asdict()) + "\n" for entry in entries]
  with shards.named(path / INDEX):
    (path / INDEX).write_text("".join(lines), encoding="utf-8")
  content = {
    **settings,
    "fingerprint": digest.hexdigest()[:16],
    "fields": fields,
    "shards": [
      {"file": name, "records": len(entries[i * size : (i + 1) * size])}
      for i, name in enumerate(shards.shard_names(len(entries), size))
    ],
    **more,
    "versions": manifest.versions(),
  }
  manifest.write_json(path / MANIFEST, content)
  (path / PLAN).unlink(missing_ok=True)


@dataclasses.dataclass(frozen=True)
class PairCache:
  """An opened cache; see the module's docstring.

  Attributes:
    path: its folder.
    manifest: the content of cache.json.
    index: an `Entry` for each record.
    fields: the arrays of a record.
  """

  path: Path
  manifest: dict[str, Any]
  index: tuple[Entry, ...]
  fields: tuple[Field, ...]
  _source: ArrayRecordDataSource = dataclasses.field(repr=False)

  def __len__(self) -> int:
    return len(self.index)

  @property
  def fingerprint(self) -> str:
    """Tells the dataset and how it was encoded from others."""
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
      shard = self.manifest["shards"][number // self.manifest["shard_size"]]["file"]
      raise InputError(_damaged(self.path / shard, error)) from error

  def select(self, category: str | None = None, mixture: str = "both") -> np.ndarray:
    """The training examples of a category: (n, 2) int64 of (record, slot).

    Args:
      category: any spelling of one; None or "all" for every pair. A pair under two
        categories belongs to both.
      mixture: "both" captions of a pair make an example each; or only "unsafe", "safe".

    Raises:
      InputError: the category or mixture is unknown, or nothing is left.
    """
    if mixture not in MIXTURES:
      raise InputError(
        f"unknown mixture {mixture!r}; expected one of {', '.join(MIXTURES)}"
      )
    name = categories.selection(category)
    encoded = self.manifest.get("category", "all")
    if encoded not in ("all", name):
      raise InputError(
        f"{self.path} holds {encoded} alone, category {name or 'all'} was asked for; "
        "encode the dataset again without --category"
      )
    examples = [
      (number, SLOTS.index(slot))
      for number, entry in enumerate(self.index)
      if name is None or name in entry.categories
      for slot in MIXTURES[mixture]
      if slot in entry.slots
    ]
    if not examples:
      there = Counter(tag for entry in self.index for tag in entry.categories)
      counts = ", ".join(f"{tag} {n}" for tag, n in sorted(there.items())) or "none"
      raise InputError(
        f"{self.path} has no examples of category {name or 'all'} with mixture "
        f"{mixture}; its {len(self)} pairs by category: {counts}"
      )
    return np.asarray(examples, np.int64)

  def count(self, category: str | None, mixture: str) -> tuple[int, int]:
    """How many pairs and how many examples `select` gives."""
    examples = self.select(category, mixture)
    return len(np.unique(examples[:, 0])), len(examples)


def open_cache(path: str | os.PathLike) -> PairCache:
  """Opens a finished cache.

  Raises:
    InputError: it is unfinished, of another version, or a file is missing or damaged.
  """
  path = Path(path)
  if (path / PLAN).is_file() and not (path / MANIFEST).is_file():
    raise InputError(f"{path} is an unfinished pair cache; {AGAIN}")
  about_cache = manifest.read_json(path / MANIFEST, "pair cache")
  version = about_cache.get("format") if isinstance(about_cache, dict) else None
  if version != FORMAT_VERSION:
    raise InputError(
      f"{path / MANIFEST} has format {version!r}, this program reads {FORMAT_VERSION}; "
      "encode the dataset again"
    )
  files = [path / shard["file"] for shard in about_cache["shards"]]
  counts = [shard["records"] for shard in about_cache["shards"]]
  if missing := [file.name for file in files if not file.is_file()]:
    raise InputError(f"{path} lacks {', '.join(missing)}; {AGAIN}")
  for file, count in zip(files, counts):
    try:
      records = len(ArrayRecordDataSource(str(file)))
    except RuntimeError as error:
      raise InputError(_damaged(file, error)) from error
    if records != count:
      raise InputError(_damaged(file, f"{records} records instead of {count}"))
  return PairCache(
    path=path,
    manifest=about_cache,
    index=_read_index(path / INDEX, sum(counts)),
    fields=tuple(
      Field(name, dtype, tuple(shape)) for name, dtype, shape in about_cache["fields"]
    ),
    _source=ArrayRecordDataSource([str(file) for file in files]),
  )


def _read_index(file: Path, records: int) -> tuple[Entry, ...]:
  try:
    lines = map(json.loads, file.read_text(encoding="utf-8").split("\n")[:-1])
    entries = [Entry(x["id"], tuple(x["categories"]), tuple(x["slots"])) for x in lines]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise InputError(_damaged(file, error)) from error
  if len(entries) != records:
    raise InputError(_damaged(file, f"{len(entries)} lines for {records} records"))
  return tuple(entries)


def _damaged(file: Path, why: object) -> str:
  return f"{file} is damaged ({why}); delete it, and {AGAIN}"


def check_cache_fits(cache: PairCache, pipeline: Any) -> None:
  """Refuses a cache that was encoded for another model.

  Args:
    cache: an opened cache.
    pipeline: a `formats.pipeline.Pipeline`.

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
