"""Reading safetensors without loading them: each tensor is a view of a mapped file.

Format (https://github.com/huggingface/safetensors): 8 bytes, little-endian length N of
the header; N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}, offsets
counted from the header's end; the tensors' bytes, row-major and little-endian.

The library's own numpy reader knows no bfloat16, hence this one.
"""

import json
import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np

from safetydpo_jax.errors import InputError

_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


def open_safetensors(
  path: str | os.PathLike,
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
  """Maps a safetensors file.

  Returns:
    ({name: read-only view of the file}, the header's metadata).

  Raises:
    InputError: the file is missing, truncated, corrupt or of an unknown number type.
  """
  path = Path(path)
  try:
    data = np.memmap(path, np.uint8, mode="r")
    length = int.from_bytes(data[:8].tobytes(), "little")
    if len(data) < 8 or 8 + length > len(data):
      raise ValueError(f"a header of {length} bytes in a file of {len(data)}")
    header = json.loads(data[8 : 8 + length].tobytes())
    metadata = header.pop("__metadata__", None) or {}
    body = data[8 + length :]
    tensors = {name: _view(body, name, entry) for name, entry in header.items()}
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(
      f"{path} is no readable safetensors file ({error}); fetch it again"
    ) from error
  return tensors, metadata


def _view(body: np.ndarray, name: str, entry: dict) -> np.ndarray:
  """One tensor's bytes as an array, after checking them against the file."""
  if entry["dtype"] not in _DTYPES:
    raise ValueError(f"{name} is of unknown type {entry['dtype']}")
  dtype = np.dtype(_DTYPES[entry["dtype"]])
  shape = tuple(entry["shape"])
  begin, end = entry["data_offsets"]
  if not 0 <= begin <= end <= len(body):
    raise ValueError(f"{name} ends {end - len(body)} bytes after the file")
  if end - begin != math.prod(shape) * dtype.itemsize:
    raise ValueError(f"{name} has {end - begin} bytes for shape {shape}")
  return np.asarray(body[begin:end]).view(dtype).reshape(shape)
