"""The TFDS builder: built and read without TensorFlow, no image encoded twice."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from safetydpo_jax.data.sources.layouts import read_pairs
from safetydpo_jax.data.sources.pairs import read_image
from safetydpo_jax.errors import InputError
from tests.support.lookalike import write_folder_layout, write_prepared_layout

PAIRS = 6

SCRIPT = """
import json, sys
import tensorflow_datasets as tfds
from safetydpo_jax.data.sources.coprov2 import Coprov2
from safetydpo_jax.data.sources.layouts import read_pairs
source, out = sys.argv[1:]
builder = Coprov2(data_dir=out, file_format="array_record")
builder.download_and_prepare(
  download_config=tfds.download.DownloadConfig(manual_dir=source)
)
examples = builder.as_data_source("train")
pairs, counts = read_pairs(builder.data_dir)
assert not [name for name in sys.modules if name.split(".")[0] == "tensorflow"]
print(json.dumps({
  "examples": len(examples),
  "first": [examples[0][s]["image"].tolist() for s in ("preferred", "dispreferred")],
  "ids": [example["id"].decode() for example in examples],
  "counts": counts._asdict(),
}))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  folder = tmp_path_factory.mktemp("data")
  source = write_folder_layout(folder / "source", pairs=PAIRS)
  result = subprocess.run(
    [sys.executable, "-c", SCRIPT, str(source), str(folder / "out")],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  return source, json.loads(result.stdout.splitlines()[-1])


def test_it_is_built_and_read_without_tensorflow(built):
  source, result = built
  pairs, _ = read_pairs(source)
  assert result["examples"] == result["counts"]["pairs"] == PAIRS
  assert result["ids"] == [pair.id for pair in pairs], "sorted by id, not shuffled"


def test_tfds_decodes_the_images_of_the_dataset(built):
  source, result = built
  pair = read_pairs(source)[0][0]
  for image, pixels in zip((pair.preferred, pair.dispreferred), result["first"]):
    expected = Image.open(io.BytesIO(read_image(image)))
    np.testing.assert_array_equal(np.asarray(pixels, np.uint8), np.asarray(expected))


def test_a_pair_without_a_caption_or_category_keeps_none(tmp_path):
  source = write_folder_layout(tmp_path / "source", pairs=2, ties=0)
  file = source / "metadata.jsonl"
  rows = [json.loads(line) for line in file.read_text().splitlines()]
  del rows[0]["category"]
  file.write_text("".join(json.dumps(row) + "\n" for row in (rows[0], rows[3])))
  built = build(source, tmp_path / "out")
  found = [(p.captions, p.categories) for p in read_pairs(built)[0]]
  assert found == [(p.captions, p.categories) for p in read_pairs(source)[0]]
  assert found[0][0][1] is None
  assert found[0][1] == ()


def build(source, out):
  import tensorflow_datasets as tfds

  from safetydpo_jax.data.sources.coprov2 import Coprov2

  builder = Coprov2(data_dir=out, file_format="array_record")
  config = tfds.download.DownloadConfig(manual_dir=source)
  builder.download_and_prepare(download_config=config)
  return builder.data_path


def test_a_dataset_with_a_broken_pair_is_not_built(tmp_path):
  source = write_folder_layout(tmp_path / "source", pairs=2)
  (source / "s_idx_0000001_0.jpg").unlink()
  with pytest.raises(InputError, match=r"s_idx_0000001_0\.jpg does not exist"):
    build(source, tmp_path / "out")


@pytest.fixture
def prepared(tmp_path):
  return write_prepared_layout(tmp_path / "prepared", pairs=3)


def rename(folder):
  (file,) = folder.glob("*array_record*")
  file.rename(file.with_name("coprov2-train.array_record-00000-of-00002"))


def garble(folder):
  (file,) = folder.glob("*array_record*")
  file.write_bytes(b"x" * 100000)


DAMAGE = {
  "missing": (rename, "has 1 of 2 ArrayRecord files"),
  "garbage": (garble, "is not a readable ArrayRecord file of coprov2"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_dataset_is_named_or_read_as_far_as_it_goes(
  prepared, damage, message
):
  damage(prepared)
  with pytest.raises(InputError, match=message):
    read_pairs(prepared)
  skipped = []
  if damage is rename:
    assert len(read_pairs(prepared, skipped=skipped)[0]) == 3
  else:
    with pytest.raises(InputError, match="holds no pairs"):
      read_pairs(prepared, skipped=skipped)
  assert len(skipped) == 1
