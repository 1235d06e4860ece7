"""Safetensors without loading them: views of a mapped file, and a streaming writer.

Format (https://github.com/huggingface/safetensors): 8 bytes, little-endian length N of
the header; N bytes of JSON {name: {dtype, shape, data_offsets: [begin, end]}}, offsets
counted from the header's end; the tensors' bytes, row-major and little-endian. They
follow one another without gaps, and no name is there twice.

The library's own numpy reader does not know bfloat16, and its writer holds a whole file
in memory (10 GB for SDXL) and ignores strides; hence these.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from safetydpo_jax.errors import InputError
from safetydpo_jax.runtime import files

_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
# Types of 2 or 3 binary digits, which weights are kept in to save memory.
FLOAT8 = frozenset(
  np.dtype(dtype) for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
)
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the library's own limit
_PICKLE_MARKS = (b"PK\x03\x04", b"\x80\x02")  # torch.save's files begin so, new and old
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# What a message says after naming a pickle, and what to do with one that is a dict.
NOT_READ = "pickles can run code and are not read"
HOW_TO_CONVERT = (
  f"{NOT_READ}; if you trust it, convert it once with PyTorch: "
  "x = torch.load(OLD, weights_only=True); "
  'safetensors.torch.save_file(x.get("state_dict", x), NEW)'
)


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
    if len(data) < 8 or 8 + length > len(data) or length > _LARGEST_HEADER:
      raise ValueError(f"a header of {length} bytes in a file of {len(data)}")
    text = data[8 : 8 + length].tobytes()
    header = json.loads(text, object_pairs_hook=_object)
    metadata = header.pop("__metadata__", None) or {}
    if not all(isinstance(value, str) for value in metadata.values()):
      raise ValueError("metadata that is not text")
    body = data[8 + length :]
    tensors = {name: _view(body, name, entry) for name, entry in header.items()}
    _check_cover(header, len(body))
  except (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    OverflowError,
    RecursionError,
  ) as error:
    raise InputError(_why_not(path, error)) from error
  return tensors, metadata


def _why_not(path: Path, error: Exception) -> str:
  """Why a file cannot be read as safetensors, and what to do."""
  if files.is_lfs_pointer(path):
    return f"{path} {files.NOT_FETCHED}"
  with contextlib.suppress(OSError), path.open("rb") as file:
    if file.read(4).startswith(_PICKLE_MARKS):
      return f"{path} is a pickle under another name; {HOW_TO_CONVERT}"
  return f"{path} is not a readable safetensors file ({error}); fetch it again"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object; of two equal names, which one counts would depend on the reader."""
  found = dict(pairs)
  if len(found) < len(pairs):
    raise ValueError("a name is listed twice")
  return found


def _check_cover(header: Mapping[str, dict], size: int) -> None:
  """Refuses gaps, and tensors that overlap: a small file would fill the memory."""
  end = 0
  for begin, next_end in sorted(entry["data_offsets"] for entry in header.values()):
    if begin != end:
      raise ValueError(f"a tensor begins at byte {begin}, where {end} was expected")
    end = next_end
  if end != size:
    raise ValueError(f"{size - end} bytes belong to no tensor")


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


def write_safetensors(
  file: str | os.PathLike,
  layout: Mapping[str, tuple[DTypeLike, tuple[int, ...]]],
  tensors: Iterable[tuple[str, np.ndarray]],
  metadata: Mapping[str, str],
) -> None:
  """Writes a file, one tensor in memory at a time.

  Args:
    layout: {name: (dtype, shape)} of all tensors, in the file's order.
    tensors: (name, array) in the order of `layout`; any strides.
    metadata: the header's texts.

  Raises:
    InputError: the file cannot be written.
    ValueError: `tensors` does not agree with `layout`.
  """
  file = Path(file)
  with files.writing(file) as temporary:
    with files.naming(file):
      out = temporary.open("wb")
    with out:
      for part in _parts(layout, tensors, metadata):
        with files.naming(file):
          out.write(part)
      with files.naming(file):
        out.flush()  # or what is left would fail as the file is closed


def _parts(
  layout: Mapping[str, tuple],
  tensors: Iterable[tuple[str, np.ndarray]],
  metadata: Mapping[str, str],
) -> Iterator[bytes | memoryview]:
  """What a file consists of: the header, then one tensor after the other."""
  yield _header(layout, metadata)
  expected = iter(layout.items())
  for name, array in tensors:
    if (name, (array.dtype, array.shape)) != next(expected):
      raise ValueError(f"{name} {array.dtype} {array.shape} is not in the layout")
    # A transposed view has its base's bytes; row-major order has to be made.
    yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
  if (left := next(expected, None)) is not None:
    raise ValueError(f"{left[0]} is missing")


def _header(layout: Mapping[str, tuple], metadata: Mapping[str, str]) -> bytes:
  """The length and the JSON, padded so that the tensors begin at a multiple of 8."""
  entries: dict[str, Any] = {"__metadata__": dict(metadata)}
  end = 0
  for name, (dtype, shape) in layout.items():
    begin, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
    entries[name] = {
      "dtype": _CODES[np.dtype(dtype)],
      "shape": list(shape),
      "data_offsets": [begin, end],
    }
  text = json.dumps(entries, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(8, "little") + text


def is_whole(array: np.ndarray) -> bool:
  """Whether it holds integers or truth values, as quantised weights do."""
  return array.dtype.kind in "biu"  # of bfloat16 and float8 it is "V"


def cast(array: np.ndarray, dtype: DTypeLike, what: str) -> np.ndarray:
  """`array` in another float type.

  Raises:
    InputError: it holds NaN or infinity, or a number too large for `dtype`; `what`
      names it.
  """
  with np.errstate(over="ignore", invalid="ignore"):
    result = array.astype(dtype)
  if not np.isfinite(result).all():
    if not np.isfinite(array).all():
      raise InputError(f"{what} holds NaN or infinity; make it again")
    raise InputError(
      f"{what} holds {np.abs(array).max():.3g}, too large for {np.dtype(dtype).name}; "
      "use --dtype bfloat16 or float32"
    )
  return result
