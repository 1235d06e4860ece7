"""Safetensors are mapped, whatever their type; a damaged file is refused."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.tensors import cast, open_safetensors, write_safetensors


@pytest.mark.parametrize(
  "dtype",
  [
    *(torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64),
  ],
)
def test_tensors_and_metadata_are_read(tmp_path, dtype):
  theirs = torch.arange(12).reshape(3, 4).to(dtype)
  file = tmp_path / "x.safetensors"
  empty = torch.zeros(0, 2)
  save_file({"a": theirs, "b": torch.tensor(3.5), "c": empty}, file, {"format": "pt"})
  tensors, metadata = open_safetensors(file)
  assert metadata == {"format": "pt"}
  np.testing.assert_array_equal(np.float32(tensors["a"]), theirs.float())
  assert tensors["b"] == 3.5
  assert tensors["c"].shape == (0, 2)


def test_tensors_are_views_of_the_file(tmp_path):
  """A 5 GB file must not be loaded to look at one tensor."""
  file = tmp_path / "x.safetensors"
  save_file({"a": torch.ones(1000)}, file)
  (tensor,) = open_safetensors(file)[0].values()
  assert not tensor.flags.owndata
  assert not tensor.flags.writeable


def test_a_damaged_file_is_refused_in_one_line(tmp_path):
  file = tmp_path / "x.safetensors"
  save_file({"a": torch.ones(6, 4), "b": torch.ones(3)}, file)
  good = file.read_bytes()
  (length,) = np.frombuffer(good[:8], "<u8")
  header, body = good[8 : 8 + length], good[8 + length :]
  huge = header.replace(b"[6,4]", b"[0,%d]" % 10**30)
  damaged = {
    "empty": b"",
    "short": good[:5],
    "truncated in the header": good[:40],
    "truncated in the body": good[:-7],
    "a header of the wrong length": np.uint64(2**62).tobytes() + good[8:],
    "a header beyond all measure": np.uint64(len(good)).tobytes() + good[8:],
    "nested too deep": np.uint64(10**6).tobytes() + b"[" * 10**6,
    "metadata that is no text": np.uint64(26).tobytes() + b'{"__metadata__":{"a":[1]}}',
    "metadata in a list": np.uint64(20).tobytes() + b'{"__metadata__":[1]}',
    "no JSON": good[:8] + b"x" * int(length) + body,
    "a list": np.uint64(2).tobytes() + b"[]" + body,
    "an unknown type": good[:8] + header.replace(b'"F32"', b'"Q32"') + body,
    "another shape": good[:8] + header.replace(b"[6,4]", b"[6,5]") + body,
    "beyond all integers": np.uint64(len(huge)).tobytes() + huge + body,
    "a name twice": good[:8] + header.replace(b'"b"', b'"a"') + body,
    "bytes of no tensor": good + b"more",
    "no offsets": good[:8] + header.replace(b"data_offsets", b"data_offsetx") + body,
  }
  for what, content in damaged.items():
    file.write_bytes(content)
    assert content != good, what
    with pytest.raises(InputError, match="is not a readable safetensors file"):
      open_safetensors(file)


def test_what_is_there_instead_of_the_file_is_named(tmp_path):
  file = tmp_path / "x.safetensors"
  file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
  with pytest.raises(InputError, match=r"is a Git LFS pointer.*git lfs pull"):
    open_safetensors(file)
  for zipped in (True, False):
    torch.save({}, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"is a pickle.*save_file"):
      open_safetensors(file)


def test_a_header_longer_than_the_library_allows_is_not_parsed(tmp_path):
  file = tmp_path / "x.safetensors"
  with file.open("wb") as out:  # sparse: no byte of it is on the disk
    out.write(np.uint64(100_000_001).tobytes())
    out.truncate(100_000_100)
  with pytest.raises(InputError, match="a header of 100000001 bytes"):
    open_safetensors(file)


def written(file, tensors, metadata=None):
  layout = {name: (array.dtype, array.shape) for name, array in tensors.items()}
  write_safetensors(file, layout, tensors.items(), metadata or {})
  return file


def test_the_library_reads_what_we_write(tmp_path):
  rng = np.random.default_rng(0)
  square = rng.standard_normal((4, 6)).astype(np.float32)
  tensors = {
    "f32": square,
    "transposed": square.T,
    "strided": square[:, ::2],
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(3, np.float32),
    "bf16": square.astype(ml_dtypes.bfloat16).T,
    "f16": square.astype(np.float16),
  }
  file = written(tmp_path / "new" / "x.safetensors", tensors, {"format": "pt"})
  theirs, (ours, metadata) = load_file(file), open_safetensors(file)
  assert metadata == {"format": "pt"}
  for name, array in tensors.items():
    np.testing.assert_array_equal(theirs[name].float(), array.astype(np.float32))
    np.testing.assert_array_equal(ours[name], array)
  assert theirs["bf16"].dtype == torch.bfloat16
  assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_that_is_not_finished_is_not_there(tmp_path):
  a = np.ones((2, 3), np.float32)
  file = written(tmp_path / "x.safetensors", {"a": a})
  before = file.read_bytes()

  def stopped():
    yield "a", a
    raise KeyboardInterrupt

  def unreadable():
    yield "a", a
    raise OSError("a tensor cannot be read")

  layout = {"a": (a.dtype, a.shape), "b": (a.dtype, a.shape)}
  for tensors, error in (
    (stopped(), KeyboardInterrupt),
    (unreadable(), OSError),
    ([("a", a)], ValueError),
    ([("a", a), ("b", a.T)], ValueError),
    ([("b", a), ("a", a)], ValueError),
  ):
    with pytest.raises(error):
      write_safetensors(file, layout, tensors, {})
    assert file.read_bytes() == before
  assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_a_file_that_cannot_be_written_is_named():
  with pytest.raises(InputError, match=r"cannot write /proc/x: "):
    write_safetensors("/proc/x", {}, [], {})


def test_a_cast_never_makes_infinity():
  a = np.array([1.0, 65504.0], np.float32)
  assert cast(a, np.float16, "x").dtype == np.float16
  with pytest.raises(InputError, match=r"x holds 6.6e\+04, too large for float16"):
    cast(a * np.float32(1.008), np.float16, "x")
  cast(a * np.float32(1.008), ml_dtypes.bfloat16, "x")
  with pytest.raises(InputError, match="x holds NaN or infinity"):
    cast(a * np.nan, np.float32, "x")


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"no\.safetensors"):
    open_safetensors(tmp_path / "no.safetensors")


@pytest.mark.parametrize("second", [(0, 4), (2, 6), (8, 12)])
def test_tensors_that_overlap_or_leave_gaps_are_refused(second, tmp_path):
  """The library refuses them too; many tensors of one place would fill the memory."""
  entries = {
    name: {"dtype": "U8", "shape": [4], "data_offsets": offsets}
    for name, offsets in (("a", (0, 4)), ("b", second))
  }
  header = json.dumps(entries).encode()
  file = tmp_path / "x.safetensors"
  file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(second[1]))
  with pytest.raises(Exception, match="invalid offset for tensor"):
    load_file(file)
  with pytest.raises(InputError, match=f"begins at byte {second[0]}, where 4"):
    open_safetensors(file)
