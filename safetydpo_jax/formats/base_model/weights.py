"""Weights of a diffusers component: found, read, renamed, and all accounted for.

A parameter's path in our tree is its PyTorch name with every index joined to the name
before it (`down_blocks.0.attentions.1` ↔ down_blocks_0/attentions_1), and
  kernel of a convolution  (kh, kw, in, out) = weight.transpose(2, 3, 1, 0)
  kernel of a linear layer (in, out)         = weight.T
  scale, embedding                           = weight
So the module's own tree of shapes is the whole mapping. Every parameter must be found
and every tensor used.

Which files those are: `component_files.py`.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import DTypeLike

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.component_files import weight_files
from safetydpo_jax.formats.tensors import FLOAT8, is_whole, open_safetensors
from safetydpo_jax.runtime.log import note

_LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}
_INDEX = re.compile(r"_(\d+)$")
# Names that end in a number: linear_1, not linear.1.
_OWN_NUMBER = re.compile(r"^linear_\d+$")

# Names in older files. SD 1.5's published VAE has diffusers' first attention names,
# some with 1×1-convolution weights; text encoders may or may not have the prefix.
_LEGACY = (
  (re.compile(r"^text_model\."), ""),
  (re.compile(r"(attentions\.\d+)\.query\."), r"\1.to_q."),
  (re.compile(r"(attentions\.\d+)\.key\."), r"\1.to_k."),
  (re.compile(r"(attentions\.\d+)\.value\."), r"\1.to_v."),
  (re.compile(r"(attentions\.\d+)\.proj_attn\."), r"\1.to_out.0."),
)
_BUFFERS = ("position_ids",)  # constants that older files store with the weights


def torch_name(path: Iterable[str]) -> str:
  """PyTorch's dotted name of a module or parameter, given its path in our tree."""
  *modules, last = path
  last = _LEAVES.get(last, last)
  return ".".join(
    part if _OWN_NUMBER.match(part) else _INDEX.sub(r".\1", part)
    for part in (*modules, last)
  )


def tree_path(name: str) -> tuple[str, ...]:
  """The path in our tree of a module with PyTorch's dotted name."""
  return tuple(re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name).split("."))


def canonical_name(name: str) -> str:
  """A tensor's name as current libraries write it, without `text_model.`."""
  for pattern, replacement in _LEGACY:
    name = pattern.sub(replacement, name)
  return name


def read_tensors(files: Iterable[Path]) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, view of the file) for every tensor of the files."""
  for file in files:
    tensors, _ = open_safetensors(file)
    yield from tensors.items()


def convert(
  tensors: Iterable[tuple[str, Any]],
  shapes: Mapping[str, Any],
  *,
  dtype: DTypeLike = np.float32,
  source: str = "the checkpoint",
) -> dict[str, Any]:
  """Arranges PyTorch tensors as a parameter tree.

  Args:
    tensors: (PyTorch name, array) pairs, taken one at a time.
    shapes: the module's parameter tree, of anything with a `.shape`.
    dtype: the type of the result.
    source: the tensors' origin, for errors.

  Returns:
    A nested dict of contiguous numpy arrays with the shapes of `shapes`.

  Raises:
    InputError: a tensor is missing, unused, duplicate, of the wrong shape, or of
      integers.
  """
  wanted = {torch_name(path): path for path in flatten_dict(shapes)}
  flat_shapes = flatten_dict(shapes)
  found: dict[tuple[str, ...], np.ndarray] = {}
  unused, twice, misshapen, whole = [], [], [], []
  for name, tensor in tensors:
    path = wanted.get(canonical_name(name))
    if path is None:
      if name.rpartition(".")[2] not in _BUFFERS:
        unused.append(name)
      continue
    array = _to_our_layout(np.asarray(tensor), path[-1], len(flat_shapes[path].shape))
    if path in found:
      twice.append(name)
    elif array.shape != tuple(flat_shapes[path].shape):
      found[path] = array
      misshapen.append(f"{name} {tuple(tensor.shape)}")
    elif is_whole(array):
      found[path] = array
      whole.append(f"{name} {array.dtype}")
    else:
      found[path] = array.astype(dtype, order="C")
  missing = [name for name, path in wanted.items() if path not in found]
  complaints = [
    _list(missing, "lacks"),
    _list(unused, "has no place in the model for"),
    _list(twice, "contains twice"),
    _list(misshapen, "has shapes other than config.json requires in"),
    _list(whole, "has integers, as quantised weights do, in"),
  ]
  if any(complaints):
    details = ", and ".join(filter(None, complaints))
    raise InputError(f"{source} does not fit its config.json: it {details}")
  return unflatten_dict(found)


def _to_our_layout(array: np.ndarray, leaf: str, rank: int) -> np.ndarray:
  """A view of a PyTorch tensor in our order of axes, see the module's docstring."""
  if leaf != "kernel":
    return array
  if rank == 2 and array.ndim == 4 and array.shape[2:] == (1, 1):
    array = array[:, :, 0, 0]
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _list(names: list[str], verb: str, most: int = 3) -> str:
  """ "lacks 5 tensors (a, b, c, …)", or nothing for an empty list."""
  if not names:
    return ""
  more = ", …" if len(names) > most else ""
  noun = "tensor" if len(names) == 1 else "tensors"
  return f"{verb} {len(names)} {noun} ({', '.join(names[:most])}{more})"


def load_component(
  folder: Path,
  shapes: Mapping[str, Any],
  *,
  dtype: DTypeLike = np.float32,
  variant: str | None = None,
) -> dict[str, Any]:
  """Reads a component's weights into a tree like `shapes`; see `convert`."""
  files = weight_files(folder, variant)
  source = str(files[0] if len(files) == 1 else folder)
  return convert(read_tensors(files), shapes, dtype=dtype, source=source)


def note_float8(
  tensors: Iterable[tuple[str, np.ndarray]], whose: str, dtype: DTypeLike
) -> None:
  """Says so where weights are float8; `whose` names them.

  They are read as any others, but a model is not what it was before they were rounded.
  """
  narrow = {tensor.dtype.name for _, tensor in tensors if tensor.dtype in FLOAT8}
  if narrow:
    note(
      f"{whose} has weights in {min(narrow)}, numbers of one or two decimal digits; "
      f"they are computed with in {np.dtype(dtype).name}"
    )


def fingerprint(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
  """16 hexadecimal digits that identify a model's weights.

  SHA-256 over every tensor's name, shape and 64 evenly spaced elements as float16, in
  the order of names: float32 and float16 files of one model agree, and only a few
  pages of a mapped file are read.
  """
  digest = hashlib.sha256()
  for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
    flat = tensor.reshape(-1)
    indices = np.linspace(0, max(flat.size - 1, 0), 64).astype(np.int64)
    sample = flat[indices] if flat.size else flat
    with np.errstate(over="ignore"):
      digest.update(json.dumps([name, list(tensor.shape)]).encode())
      digest.update(sample.astype(np.float32).astype("<f2").tobytes())
  return digest.hexdigest()[:16]
