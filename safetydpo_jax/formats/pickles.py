"""Arrays from untrusted pickles, without making any of the calls in them.

A pickle is a program: it names functions and has them called. Here every name it may
use is listed in a table, any other is refused, and a call is only recorded. What numpy
and PyTorch wrote is then read from these records:

  numpy    _reconstruct(ndarray, (0,), b'b'), state (1, shape, dtype, fortran, bytes)
           _frombuffer(bytes, dtype, shape, order)                     protocol 5
  PyTorch  {name: _rebuild_tensor_v2(storage, offset, shape, strides, ...)}, a storage
           being ('storage', type, key, location, elements)

PyTorch's files come in two forms. A zip with <folder>/data.pkl and the stored bytes of
each storage as <folder>/data/<key>; and, from before version 1.6, five pickles in a row
(magic number, version, system, object, keys) and then, for each key, an int64 count of
elements and their bytes.
"""

import io
import math
import os
import pickle
import pickletools
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from safetydpo_jax.errors import InputError

_STORAGES = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
  "LongStorage": np.int64,
  "IntStorage": np.int32,
  "ShortStorage": np.int16,
  "CharStorage": np.int8,
  "ByteStorage": np.uint8,
  "BoolStorage": np.bool_,
}
_ALLOWED = {
  ("collections", "OrderedDict"),
  ("_codecs", "encode"),  # how protocols below 3 write bytes
  ("numpy", "ndarray"),
  ("numpy", "dtype"),
  ("numpy.core.multiarray", "_reconstruct"),
  ("numpy._core.multiarray", "_reconstruct"),
  ("numpy.core.numeric", "_frombuffer"),
  ("numpy._core.numeric", "_frombuffer"),
  ("torch._utils", "_rebuild_tensor_v2"),
  ("torch._utils", "_rebuild_parameter"),
  *(("torch", name) for name in _STORAGES),
}
_NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
_MAGIC = 0x1950A86A20F9469CFC6C  # of PyTorch's files before version 1.6
_MOST = 16 << 20  # bytes of a pickle without its storages; a large model has 0.2 MB


def read_array(path: str | os.PathLike) -> np.ndarray:
  """The one array of a pickle by numpy, or the one tensor of a file by PyTorch.

  Raises:
    InputError: the file is missing, damaged, or holds anything else.
  """
  return _guard(path, "pickled array", lambda: _array(*_read(Path(path))))


def read_tensors(path: str | os.PathLike) -> dict[str, np.ndarray]:
  """{name: read-only array} of a state dict that PyTorch saved.

  Raises:
    InputError: the file is missing, damaged, or holds anything else.
  """

  def tensors():
    content, storages = _read(Path(path))
    items = content if isinstance(content, dict) else content.items
    return {_text(name): _array(value, storages) for name, value in items.items()}

  return _guard(path, "PyTorch state dict", tensors)


def _guard(path, what, read):
  try:
    return read()
  except Exception as error:  # whatever a hostile file makes the decoders raise
    reason = str(error) or type(error).__name__
    raise InputError(
      f"{path} is not a {what} that can be read safely ({reason}); fetch it again from "
      "its source, or save it as .npy or .safetensors"
    ) from error


class _Name:
  """A permitted global; calling it records the call."""

  __slots__ = ("name",)

  def __init__(self, name: str):
    self.name = name

  def __call__(self, *arguments: Any) -> "_Call":
    return _Call(self.name, arguments)

  def __setstate__(self, state: Any):
    raise pickle.UnpicklingError(f"it changes {self.name}")


class _Call:
  """The record of a call: what, with what, and what was put in the result."""

  __slots__ = ("arguments", "items", "name", "state")

  def __init__(self, name: str, arguments: tuple):
    self.name, self.arguments = name, arguments
    self.items, self.state = {}, None

  def __setitem__(self, key: Any, value: Any):
    self.items[key] = value

  def __setstate__(self, state: Any):
    self.state = state


class _Unpickler(pickle.Unpickler):
  def find_class(self, module: str, name: str) -> _Name:
    if (module, name) not in _ALLOWED:
      raise pickle.UnpicklingError(f"it asks for {module}.{name}")
    return _Name(name)

  def persistent_load(self, pid: Any) -> Any:
    return pid


def _load(file: BinaryIO) -> Any:
  """One pickle; leaves the file at its end."""
  start = file.tell()
  for operation, argument, _ in pickletools.genops(file):
    # The decoder would make its memo as long as the largest index in it.
    if "PUT" in operation.name and int(argument or 0) > _MOST:
      raise pickle.UnpicklingError("its memo has a huge index")
    if file.tell() - start > _MOST:
      raise pickle.UnpicklingError(f"it is longer than {_MOST} bytes")
  file.seek(start)
  return _Unpickler(file, encoding="latin1").load()


def _read(path: Path) -> tuple[Any, dict[str, bytes]]:
  """The records of a file's pickle, and the bytes of each storage."""
  with path.open("rb") as file:
    if zipfile.is_zipfile(file):
      return _read_zip(file)
    file.seek(0)
    first = _load(file)
    return _read_old(file) if first == _MAGIC else (first, {})


def _read_zip(file: BinaryIO) -> tuple[Any, dict[str, bytes]]:
  with zipfile.ZipFile(file) as archive:
    entries = {entry.filename: entry for entry in archive.infolist()}
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries.values()):
      raise ValueError("its parts are compressed, which PyTorch never does")
    # Parts that overlap would take more memory than the file has bytes.
    if sum(e.file_size for e in entries.values()) > os.fstat(file.fileno()).st_size:
      raise ValueError("its parts are longer than the file")
    name = next((name for name in entries if name.endswith("/data.pkl")), None)
    if name is None:
      raise ValueError("it has no data.pkl")
    folder = name.removesuffix("data.pkl")
    order = f"{folder}byteorder"
    if order in entries and archive.read(order) != b"little":
      raise ValueError("its bytes are in another order")
    content = _load(io.BytesIO(archive.read(name)))
    prefix = f"{folder}data/"
    return content, {
      entry.removeprefix(prefix): archive.read(entry)
      for entry in entries
      if entry.startswith(prefix)
    }


def _read_old(file: BinaryIO) -> tuple[Any, dict[str, bytes]]:
  _, system, content, keys = (_load(file) for _ in range(4))
  if system.get("little_endian") is not True:
    raise ValueError("its bytes are in another order")
  sizes = {}
  _collect_sizes(content, sizes)
  storages = {}
  for key in keys:
    elements, width = sizes[key]
    if file.read(8) != elements.to_bytes(8, "little"):
      raise ValueError(f"storage {key} does not have {elements} elements")
    storages[key] = file.read(elements * width)
  return content, storages


def _collect_sizes(content: Any, sizes: dict) -> None:
  """Adds (elements, bytes of each) of the storages of a state dict or a tensor."""
  values = [content]
  if isinstance(content, dict):
    values = list(content.values())
  elif content.name == "OrderedDict":
    values = list(content.items.values())
  for value in values:
    _, kind, key, _, elements, *_ = _tensor(value).arguments[0]
    sizes[key] = (elements, np.dtype(_STORAGES[kind.name]).itemsize)


def _tensor(value: Any) -> _Call:
  """The `_rebuild_tensor_v2` of a tensor or of a parameter around one."""
  if isinstance(value, _Call) and value.name == "_rebuild_parameter":
    value = value.arguments[0]
  if not isinstance(value, _Call) or value.name != "_rebuild_tensor_v2":
    raise ValueError(
      f"it holds a {type(value).__name__.strip('_')} instead of a tensor"
    )
  return value


def _array(value: Any, storages: dict[str, bytes]) -> np.ndarray:
  name = value.name if isinstance(value, _Call) else None
  if name in ("_reconstruct", "_frombuffer"):
    if name == "_reconstruct":
      _, shape, kind, fortran, data = value.state
      order = "F" if fortran else "C"
    else:
      data, kind, shape, order = value.arguments
    dtype = _dtype(kind)
    return _from_bytes(_bytes(data), dtype, shape).reshape(shape, order=order)  # type: ignore[call-overload]
  storage, offset, shape, strides, *_ = _tensor(value).arguments
  word, kind, key, _, elements, *view = storage
  if word != "storage" or any(view):
    raise ValueError("a storage is of an unknown kind")
  data = _from_bytes(storages[key], np.dtype(_STORAGES[kind.name]), (elements,))
  last = offset + sum((size - 1) * step for size, step in zip(shape, strides))
  count = math.prod(shape)
  if len(shape) != len(strides) or min((offset, *shape, *strides), default=0) < 0:
    raise ValueError(f"a tensor has shape {shape}, strides {strides}, start {offset}")
  if count and (last >= elements or count > elements):
    raise ValueError(f"a tensor of shape {shape} is larger than its storage")
  return np.lib.stride_tricks.as_strided(
    data[offset:], shape, [step * data.itemsize for step in strides], writeable=False
  )


def _from_bytes(data: bytes, dtype: np.dtype, shape: tuple) -> np.ndarray:
  """A flat array, if there are exactly as many bytes as the shape takes."""
  if len(data) != math.prod(shape) * dtype.itemsize:
    raise ValueError(f"{len(data)} bytes are not {tuple(shape)} of {dtype}")
  return np.frombuffer(data, dtype)


def _dtype(value: Any) -> np.dtype:
  code, order = value.arguments[0], value.state[1]
  if value.name != "dtype" or code not in _NUMBERS or order not in ("<", ">", "|", "="):
    raise ValueError(f"numbers of type {code!r}")
  return np.dtype(code).newbyteorder(order)


def _bytes(value: Any) -> bytes:
  if isinstance(value, _Call) and value.name == "encode":
    value = value.arguments[0]
  return value.encode("latin1") if isinstance(value, str) else bytes(value)


def _text(value: Any) -> str:
  if not isinstance(value, str):
    raise ValueError(f"a tensor is named {value!r}")
  return value
