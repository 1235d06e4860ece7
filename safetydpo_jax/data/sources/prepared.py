"""A dataset that the TFDS builder `coprov2.py` wrote, read without TensorFlow.

ArrayRecord files of examples (`FEATURES`). An example holds what a `SourcePair` holds;
a pair's captions and categories are lists, empty if the dataset has none.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from safetydpo_jax.data.sources import pairs
from safetydpo_jax.data.sources.pairs import SLOTS, Row, Table
from safetydpo_jax.runtime import storage
from safetydpo_jax.runtime.files import NOT_FETCHED, is_lfs_pointer

_IMAGE = {"name": tfds.features.Text(), "image": tfds.features.Image()}


FEATURES = tfds.features.FeaturesDict(
  {
    "id": tfds.features.Text(),
    "preferred": _IMAGE,
    "dispreferred": _IMAGE,
    "captions": {slot: tfds.features.Sequence(tfds.features.Text()) for slot in SLOTS},
    "categories": tfds.features.Sequence(tfds.features.Text()),
  }
)


SIDES = ("preferred", "dispreferred")


_BYTES = {side: {"image": tfds.decode.SkipDecoding()} for side in SIDES}


class RecordImage(NamedTuple):
  """An image of a prepared dataset's example."""

  files: tuple[str, ...]
  number: int
  side: str

  def read_bytes(self) -> bytes:
    """Its bytes."""
    return _example(self.files, self.number)[self.side]["image"]

  def __str__(self) -> str:
    return f"{Path(self.files[0]).parent} example {self.number} {self.side}"


@functools.lru_cache(maxsize=2)
def _source(files: tuple[str, ...]) -> ArrayRecordDataSource:
  return ArrayRecordDataSource(files)


@functools.lru_cache(maxsize=8)  # a pair's two images are read one after the other
def _example(files: tuple[str, ...], number: int) -> dict[str, Any]:
  return FEATURES.deserialize_example_np(_source(files)[number], decoders=_BYTES)


def read_prepared(files: Sequence[epath.Path], skipped: list[str] | None) -> Table:
  """Reads what `coprov2.Coprov2` wrote; files of a store are copied first.

  Args:
    files: its ArrayRecord files, in order.
    skipped: takes a line for each file that cannot be read; None: that is an error.

  Raises:
    InputError: a file is missing or damaged, or of another dataset.
  """
  rows, images = [], {}
  count = files[0].name.rpartition("-")[2]
  if int(count) != len(files):
    message = f"{files[0].parent} has {len(files)} of {int(count)} ArrayRecord files"
    pairs.report(message, skipped)
  for file, local in zip(files, storage.local_files(files)):
    try:
      source = _source((local,))
      for number in range(len(source)):
        where = f"{file} example {number}"
        example = _example((local,), number)
        names = [example[side]["name"].decode() for side in SIDES]
        for side, name in zip(SIDES, names):
          images[name] = RecordImage((local,), number, side)
        tags = tuple(tag.decode() for tag in example["categories"])
        rows += [
          Row(where, names[0], names[1], slot, caption.decode(), tags)
          for slot in SLOTS
          for caption in example["captions"][slot]
        ]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
      message = f"{file} is not a readable ArrayRecord file of coprov2: {error}"
      if is_lfs_pointer(local):
        message = f"{file} {NOT_FETCHED}"
      pairs.report(message, skipped)
  return Table(str(files[0].parent), rows, images)
