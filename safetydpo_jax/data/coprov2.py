"""CoProV2 as a TensorFlow Datasets dataset, without TensorFlow.

The builder reads any layout of `data/layouts.py` from TFDS's manual folder and writes
ArrayRecord files with the images' own bytes, so nothing is encoded twice:

  builder = Coprov2(data_dir=OUT, file_format="array_record")
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(
      manual_dir=DATASET))
  source = builder.as_data_source("train")

The same is done by `tfds build safetydpo_jax/data/coprov2.py --manual_dir DATASET
--file_format array_record` where TensorFlow and mlcroissant are installed, which that
command imports though it does not use them here.

The folder OUT/coprov2/1.0.0 is a layout of its own: `encode --pairs` reads it. An
example holds what a `SourcePair` holds; a pair's captions and categories are lists,
empty where the dataset has none.
"""

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from etils import epath

from safetydpo_jax.data import layouts, pairs, places
from safetydpo_jax.data.pairs import SLOTS, Row, Table

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
_SIDES = ("preferred", "dispreferred")
_BYTES = {side: {"image": tfds.decode.SkipDecoding()} for side in _SIDES}


class Coprov2(tfds.core.GeneratorBasedBuilder):
  """Pairs of a harmful and a safe image with the prompts of both."""

  VERSION = tfds.core.Version("1.0.0")
  MANUAL_DOWNLOAD_INSTRUCTIONS = (
    "The manual folder is the dataset: the hub's parquet files with CoProV2's CSV "
    "beside them, or images beside metadata.jsonl or the CSV."
  )

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(
      builder=self,
      description="Preference pairs for safety: CoProV2.",
      features=FEATURES,
      homepage="https://arxiv.org/abs/2412.10493",
      disable_shuffling=True,  # sorted by id, as every layout is read
    )

  def _split_generators(self, dl_manager: tfds.download.DownloadManager):
    return {"train": self._generate_examples(dl_manager.manual_dir)}

  def _generate_examples(
    self, dataset: os.PathLike
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    found, _ = layouts.read_pairs(dataset)
    for number, pair in enumerate(found):
      images = {
        side: {"name": name, "image": pairs.read_image(getattr(pair, side))}
        for side, name in zip(_SIDES, pair.names)
      }
      captions = {
        slot: [] if caption is None else [caption]
        for slot, caption in zip(SLOTS, pair.captions)
      }
      tags = list(pair.categories)
      yield (
        number,
        {"id": pair.id, **images, "captions": captions, "categories": tags},
      )


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


@functools.lru_cache(maxsize=8)  # a pair's two images are asked for one after the other
def _example(files: tuple[str, ...], number: int) -> dict[str, Any]:
  return FEATURES.deserialize_example_np(_source(files)[number], decoders=_BYTES)


def read_prepared(files: Sequence[epath.Path], skipped: list[str] | None) -> Table:
  """Reads a dataset that `Coprov2` wrote; files of a store are copied here first.

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
  for file, local in zip(files, places.local_files(files)):
    try:
      source = _source((local,))
      for number in range(len(source)):
        where = f"{file} example {number}"
        example = _example((local,), number)
        names = [example[side]["name"].decode() for side in _SIDES]
        for side, name in zip(_SIDES, names):
          images[name] = RecordImage((local,), number, side)
        tags = tuple(tag.decode() for tag in example["categories"])
        rows += [
          Row(where, *names, slot, caption.decode(), tags)
          for slot in SLOTS
          for caption in example["captions"][slot]
        ]
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
      message = f"{file} is no ArrayRecord file of coprov2 that can be read: {error}"
      pairs.report(message, skipped)
  return Table(str(files[0].parent), rows, images)
