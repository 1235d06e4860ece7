"""Records and shards: how a pair is laid out in bytes, and many pairs in a file.

A record's arrays follow each other without gaps, little-endian and in C order:

  moments    float16  (2 flip, 2 pair, h, w, 2c)   mean and log variance of the VAE's
             posterior; flip 1 is the mirrored image's (which is not the mirror of flip
             0's), pair 0 the preferred image's
  token_ids  int32    (encoders, 2 slots, 77)      prompts of the slots unsafe and safe;
             zeros where the pair has none

and after them, to the end, UTF-8 JSON {"id", "categories", "captions": {slot: text}}.

A shard is an ArrayRecord file of group size 1, for random access, and uncompressed:
noise does not compress. zstd saves 8 % and costs three quarters of the speed.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath

from safetydpo_jax.data.sources.pairs import SLOTS
from safetydpo_jax.runtime import storage

SKIPPED = ".skipped.json"


class Field(NamedTuple):
  """One array of a record."""

  name: str
  dtype: str
  shape: tuple[int, ...]


def record_fields(
  latent_shape: Sequence[int], encoders: int, tokens: int
) -> tuple[Field, ...]:
  """The arrays of a record; `latent_shape` is (h, w, c) of one image's latents."""
  height, width, channels = latent_shape
  return (
    Field("moments", "<f2", (2, 2, height, width, 2 * channels)),
    Field("token_ids", "<i4", (encoders, len(SLOTS), tokens)),
  )


def pack(
  fields: Iterable[Field], arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> bytes:
  """A record's bytes.

  Raises:
    ValueError: an array does not have its field's shape.
  """
  parts = []
  for field in fields:
    array = np.asarray(arrays[field.name])
    if array.shape != tuple(field.shape):
      raise ValueError(f"{field.name} is {array.shape}, expected {field.shape}")
    parts.append(array.astype(field.dtype).tobytes())
  return b"".join([*parts, json.dumps(about, ensure_ascii=False).encode()])


def unpack(fields: Iterable[Field], record: bytes) -> dict[str, np.ndarray]:
  """A record's arrays by name: read-only views of its bytes, nothing is copied."""
  arrays, offset = {}, 0
  for name, dtype, shape in fields:
    size = math.prod(shape)
    flat = np.frombuffer(record, dtype, count=size, offset=offset)
    arrays[name] = flat.reshape(shape)
    offset += flat.nbytes
  return arrays


def about(fields: Iterable[Field], record: bytes) -> dict[str, Any]:
  """A record's id, categories and captions."""
  size = sum(np.dtype(dtype).itemsize * math.prod(shape) for _, dtype, shape in fields)
  return json.loads(record[size:])


def shard_names(records: int, shard_size: int) -> list[str]:
  """File names of the shards; shard i holds records from i · shard_size on."""
  count = -(-records // shard_size)
  return [f"pairs-{i:05d}-of-{count:05d}.arrayrecord" for i in range(count)]


def write_shard(file: epath.Path | os.PathLike, records: Iterable[bytes]) -> None:
  """Writes a shard under a temporary name and renames it when it is complete.

  A shard on a store is written locally and uploaded: ArrayRecord writes local files
  only.

  Raises:
    InputError: it cannot be written. What `records` raises passes through.
  """
  with storage.writing(storage.as_path(file)) as local:
    with storage.named(file):
      writer = ArrayRecordWriter(str(local), "group_size:1,uncompressed")
    for record in records:
      with storage.named(file):
        writer.write(record)
    with storage.named(file):
      writer.close()


def note_skipped(shard: epath.Path, skipped: dict[str, str]) -> None:
  """Writes beside a shard which pairs it lacks and why, {id: why}; {} if none."""
  file = shard.with_suffix(SKIPPED)
  if skipped:
    storage.write_json(file, skipped)
  elif file.exists():  # of an encode that was stopped
    file.unlink()


def read_skipped(shard_files: Sequence[epath.Path]) -> dict[str, str]:
  """What `note_skipped` wrote for these shards, together."""
  if not shard_files:
    return {}
  there = {file.name for file in shard_files[0].parent.iterdir()}
  found = {}
  for shard in shard_files:
    if (file := shard.with_suffix(SKIPPED)).name in there:
      found |= storage.read_json(file, "list of skipped pairs")
  return found
