"""Safetensors are mapped, whatever their type; a damaged file is refused."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.tensors import open_safetensors


@pytest.mark.parametrize(
  "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8]
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
  damaged = {
    "empty": b"",
    "short": good[:5],
    "truncated in the header": good[:40],
    "truncated in the body": good[:-7],
    "a header of the wrong length": np.uint64(2**62).tobytes() + good[8:],
    "no JSON": good[:8] + b"x" * int(length) + body,
    "a list": np.uint64(2).tobytes() + b"[]" + body,
    "an unknown type": good[:8] + header.replace(b'"F32"', b'"Q32"') + body,
    "another shape": good[:8] + header.replace(b"[6,4]", b"[6,5]") + body,
    "no offsets": good[:8] + header.replace(b"data_offsets", b"data_offsetx") + body,
  }
  for what, content in damaged.items():
    file.write_bytes(content)
    assert content != good, what
    with pytest.raises(InputError, match="no readable safetensors file"):
      open_safetensors(file)


def test_a_missing_file_is_refused(tmp_path):
  with pytest.raises(InputError, match=r"no\.safetensors"):
    open_safetensors(tmp_path / "no.safetensors")
