"""Shards: a record's bytes are what the format says, and nothing is half written."""

import json

import numpy as np
import pytest
from array_record.python.array_record_data_source import ArrayRecordDataSource

from safetydpo_jax.data.cache import shards
from safetydpo_jax.errors import InputError

FIELDS = shards.record_fields((3, 5, 4), encoders=2, tokens=77)
ABOUT = {"id": "a>b", "categories": ["hate"], "captions": {"unsafe": '"~",\nü'}}


@pytest.fixture
def arrays():
  rng = np.random.default_rng(0)
  return {
    "moments": rng.standard_normal((2, 2, 3, 5, 8)).astype(np.float16),
    "token_ids": rng.integers(0, 49408, (2, 2, 77), np.int32),
  }


def test_a_record_is_its_arrays_little_endian_without_gaps_then_json(arrays):
  record = shards.pack(FIELDS, arrays, ABOUT)
  start = arrays["moments"].astype("<f2").tobytes()
  middle = arrays["token_ids"].astype("<i4").tobytes()
  assert record[: len(start) + len(middle)] == start + middle
  assert json.loads(record[len(start) + len(middle) :].decode()) == ABOUT


def test_what_is_packed_comes_back(arrays):
  record = shards.pack(FIELDS, arrays, ABOUT)
  for name, array in shards.unpack(FIELDS, record).items():
    assert array.dtype == arrays[name].dtype
    np.testing.assert_array_equal(array, arrays[name])
  assert shards.about(FIELDS, record) == ABOUT


def test_unpacking_copies_nothing(arrays):
  record = shards.pack(FIELDS, arrays, ABOUT)
  for array in shards.unpack(FIELDS, record).values():
    assert np.shares_memory(array, np.frombuffer(record, np.uint8))


def test_memory_order_and_wider_types_make_no_difference(arrays):
  odd = {
    "moments": np.asfortranarray(arrays["moments"]).astype(np.float32, order="K"),
    "token_ids": arrays["token_ids"].astype(">i8"),
  }
  assert shards.pack(FIELDS, odd, ABOUT) == shards.pack(FIELDS, arrays, ABOUT)


def test_a_wrong_shape_is_refused(arrays):
  arrays["moments"] = arrays["moments"].reshape(2, 2, 5, 3, 8)
  with pytest.raises(ValueError, match=r"moments is \(2, 2, 5, 3, 8\), expected"):
    shards.pack(FIELDS, arrays, ABOUT)


@pytest.mark.parametrize(
  ("records", "size", "count"), [(10, 5, 2), (11, 5, 3), (1, 5, 1)]
)
def test_shard_names_count_themselves(records, size, count):
  names = shards.shard_names(records, size)
  assert len(names) == count
  assert names[-1] == f"pairs-{count - 1:05d}-of-{count:05d}.arrayrecord"


def test_a_shard_holds_its_records_for_random_access(tmp_path):
  records = [bytes([i]) * (i + 1) for i in range(20)]
  shards.write_shard(tmp_path / "x", records)
  source = ArrayRecordDataSource(str(tmp_path / "x"))
  assert [source[i] for i in reversed(range(20))] == records[::-1]
  assert [file.name for file in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("error", [RuntimeError, OSError])
def test_a_failure_half_way_leaves_no_shard_and_passes_through(tmp_path, error):
  def records():
    yield b"one"
    raise error("out of device memory, or an image that cannot be read")

  with pytest.raises(error, match=r"^out of device memory"):
    shards.write_shard(tmp_path / "x", records())
  assert not (tmp_path / "x").exists()


def test_a_place_that_cannot_be_written_is_one_clear_line(tmp_path):
  (tmp_path / "gone").write_text("a file")
  with pytest.raises(InputError, match=r"cannot write .*gone/x"):
    shards.write_shard(tmp_path / "gone" / "x", [b"one"])


def test_what_a_shard_lacks_is_noted_beside_it_until_it_lacks_nothing(tmp_path):
  files = [tmp_path / f"pairs-{i}.arrayrecord" for i in range(3)]
  shards.note_skipped(files[0], {"a>b": "cut off"})
  shards.note_skipped(files[2], {"c>d": "no image"})
  assert shards.read_skipped(files) == {"a>b": "cut off", "c>d": "no image"}
  shards.note_skipped(files[0], {})
  assert shards.read_skipped(files) == {"c>d": "no image"}
