"""CoProV2 as a TensorFlow Datasets dataset, without TensorFlow.

The builder reads any layout of `data/sources/layouts.py` from TFDS's manual folder and
writes ArrayRecord files with the images' own bytes, so nothing is encoded twice:

  builder = Coprov2(data_dir=OUT, file_format="array_record")
  builder.download_and_prepare(download_config=tfds.download.DownloadConfig(
      manual_dir=DATASET))
  source = builder.as_data_source("train")

With TensorFlow and mlcroissant installed, `tfds build
safetydpo_jax/data/sources/coprov2.py --manual_dir DATASET --file_format array_record`
does the same; that command imports them, though nothing here uses them.

The folder OUT/coprov2/1.0.0 is a layout of its own (`prepared.py`): `encode --pairs`
reads it.
"""

import os
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from safetydpo_jax.data.sources import layouts, pairs
from safetydpo_jax.data.sources.pairs import SLOTS
from safetydpo_jax.data.sources.prepared import FEATURES, SIDES


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
      disable_shuffling=True,  # sorted by id, like every layout
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
        for side, name in zip(SIDES, pair.names)
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
