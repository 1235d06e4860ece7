"""What LoRA files hold besides low-rank products: changes that need the base weights.

  (1)  W' = W + s ΔW                     of a kernel, norm or bias
  (2)  W' = m V / ‖V‖,  V = W + s ΔW     DoRA; a norm for each output channel of V, or
                                         for each input channel, whichever m has

s is alpha / r, ΔW that of `products.py`. With a scale k, as in `L:k`, the base takes

  (3)  W + k (W' - W)

as in A1111 and ComfyUI. Of several adapters each change is taken from W itself, so that
their order does not matter.

Sources: Liu et al. 2024 (DoRA); LyCORIS and OneTrainer, whose `dora_scale` has the
norms' shape, (out, 1[, 1, 1]) or (1, in[, 1, 1]); PEFT (tuners/lora/dora.py), whose
`lora_magnitude_vector` is for the output channels.
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from safetydpo_jax import lora as lora_lib
from safetydpo_jax.errors import InputError
from safetydpo_jax.formats.base_model.weights import torch_name
from safetydpo_jax.formats.loras import products
from safetydpo_jax.formats.tensors import cast
from safetydpo_jax.lora import LoraTree, Tree

Path = tuple[str, ...]


class Change(NamedTuple):
  """How one parameter of the UNet changes, by (1) or (2).

  Attributes:
    parts: of a kernel's ΔW, as in the file; of a norm or bias, `diff` alone.
    shape: of ΔW in PyTorch's layout, (out, in, kh, kw), or (n,).
    scale: s.
    magnitude: m, (out, 1, 1, 1) or (1, in, 1, 1); None: equation (1).
    factor: k of equation (3).
  """

  parts: products.Parts
  shape: tuple[int, ...]
  scale: float = 1.0
  magnitude: np.ndarray | None = None
  factor: float = 1.0


class Adapter(NamedTuple):
  """A LoRA, and what it changes besides.

  Attributes:
    lora: the low-rank products, scale folded in.
    rest: {path of a parameter in the UNet's tree: its changes}; they add up.
  """

  lora: LoraTree
  rest: Mapping[Path, tuple[Change, ...]]


def of_lora(lora: Tree) -> Adapter:
  """A LoRA and nothing besides."""
  return Adapter(LoraTree(lora), {})


def scale(adapter: Adapter, factor: float) -> Adapter:
  """The adapter with all its changes `factor` times as large."""
  rest = {
    path: tuple(change._replace(factor=factor * change.factor) for change in changes)
    for path, changes in adapter.rest.items()
  }
  return Adapter(lora_lib.scale(adapter.lora, factor), rest)


def add(adapters: Sequence[Adapter]) -> Adapter:
  """One adapter that changes what all of `adapters` change."""
  rest: dict[Path, tuple[Change, ...]] = {}
  for adapter in adapters:
    for path, changes in adapter.rest.items():
      rest[path] = rest.get(path, ()) + changes
  return Adapter(lora_lib.add([adapter.lora for adapter in adapters]), rest)


def sha256(adapter: Adapter) -> str:
  """Identifies an adapter; of a LoRA alone it is `lora.factors_sha256`."""
  digest = hashlib.sha256(lora_lib.factors_sha256(adapter.lora).encode())
  for path, changes in sorted(adapter.rest.items()):
    for change in changes:
      arrays = {**change.parts, "magnitude": change.magnitude}
      digest.update(f"{'/'.join(path)} {change.scale} {change.factor}".encode())
      for part, array in sorted(arrays.items()):
        if array is not None:
          array = np.asarray(array, np.float32)
          digest.update(f"{part} {array.shape}".encode() + array.tobytes())
  return digest.hexdigest() if adapter.rest else lora_lib.factors_sha256(adapter.lora)


def check_shapes(params: Tree, adapter: Adapter) -> None:
  """Raises `InputError` unless what `adapter` changes is in `params`, of its shape."""
  lora_lib.check_shapes(params, adapter.lora)
  weights = flatten_dict(params)
  for path, changes in sorted(adapter.rest.items()):
    if path not in weights:
      raise InputError(
        f"the LoRA changes {'/'.join(path)}, which this model does not have"
      )
    for change in changes:
      if change.shape != _torch_shape(weights[path].shape):
        raise InputError(
          f"the LoRA's {'/'.join(path)} is {change.shape} in PyTorch's layout, the "
          f"model's {_torch_shape(weights[path].shape)}: it was made for another model"
        )


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Of a parameter in our layout: (n,), or (out, in, kh, kw)."""
  if len(shape) == 1:
    return shape
  *size, inputs, outputs = shape
  return outputs, inputs, *(size or (1, 1))


def difference(weight: np.ndarray, change: Change) -> np.ndarray:
  """k (W' - W) of equation (3), float32.

  Args:
    weight: W in PyTorch's layout, (n,), (out, in) or (out, in, kh, kw).
    change: of the parameter.
  """
  if len(change.shape) == 1:
    step = np.asarray(change.parts["diff"], np.float32)
  else:
    step = products.dense(change.parts, change.shape) * np.float32(change.scale)
  if change.magnitude is not None:
    base = np.asarray(weight, np.float32).reshape(change.shape)
    moved = base + step
    axes = (1, 2, 3) if change.magnitude.shape[0] == len(moved) else (0, 2, 3)
    norm = np.sqrt(np.sum(moved**2, axes, keepdims=True))
    # The epsilon is LyCORIS's: a channel of zeros stays one.
    norm = norm + np.finfo(np.float32).eps
    step = moved * (change.magnitude / norm) - base
  return (np.float32(change.factor) * step).reshape(weight.shape)


def fold(params: Tree, rest: Mapping[Path, tuple[Change, ...]]) -> Tree:
  """Base weights with `rest` folded in, each in the dtype it had.

  Args:
    params: the UNet's tree, of numpy arrays; it is not changed.
    rest: of an adapter that fits it, see `check_shapes`.

  Raises:
    InputError: a number becomes too large for the weight's dtype.
  """
  if not rest:
    return params
  weights = flatten_dict(params)
  for path, changes in rest.items():
    ours = np.asarray(weights[path])
    base = np.asarray(to_torch(ours), np.float32)
    total = base + sum(difference(base, change) for change in changes)
    weights[path] = cast(from_torch(total), ours.dtype, f"unet.{torch_name(path)}")
  return unflatten_dict(weights)


def to_torch(array: np.ndarray) -> np.ndarray:
  """A parameter in PyTorch's layout; see `base_model/weights.py`."""
  return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def from_torch(array: np.ndarray) -> np.ndarray:
  """The inverse of `to_torch`."""
  return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def as_lora(adapter: Adapter, name: str) -> LoraTree:
  """The adapter as a LoRA and nothing besides, exactly, where it can be.

  Changes of whole kernels become factors of as many ranks as it takes.

  Raises:
    InputError: it holds DoRA's magnitudes, or changes of norms or biases, which no LoRA
      holds; `name` names the file.
  """
  if not adapter.rest:
    return adapter.lora
  layers = [adapter.lora]
  for path, changes in adapter.rest.items():
    for change in changes:
      dora = change.magnitude is not None
      if dora or path[-1] != "kernel":
        what = "DoRA magnitudes" if dora else "changes of norms or biases"
        raise InputError(
          f"{name} holds {what} ({torch_name(path[:-1])}), which are not a LoRA; "
          "render it with `generate`, or fold it into the base with `export --format "
          "pipeline`"
        )
      layer = {(*path[:-1], p): leaf for p, leaf in zip("ab", low_rank(change))}
      layers.append(LoraTree(unflatten_dict(layer)))
  return jax.tree.map(np.asarray, lora_lib.add(layers))


def low_rank(change: Change) -> tuple[np.ndarray, np.ndarray]:
  """a (in, r) or (kh, kw, in, r), and b (r, out), with s and k folded into b."""
  out, inputs, *size = change.shape
  largest = min(out, inputs * math.prod(size))
  if "up" in change.parts or products.inner(change.parts) <= largest:
    up, down = products.factors(change.parts, change.shape)
  else:
    parts = {"diff": products.dense(change.parts, change.shape)}
    up, down = products.factors(parts, change.shape)
  b = up.T * np.float32(change.scale * change.factor)
  a = down.transpose(2, 3, 1, 0)
  return np.ascontiguousarray(a if size != [1, 1] else a[0, 0]), np.ascontiguousarray(b)


def num_parameters(adapter: Adapter) -> int:
  """How many numbers of the LoRA, and of the base, are changed."""
  changed = sum(math.prod(changes[0].shape) for changes in adapter.rest.values())
  return lora_lib.num_parameters(adapter.lora) + changed


def torch_changes(
  rest: Mapping[Path, tuple[Change, ...]],
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
  """{PyTorch's name of a parameter: W → what `rest` adds to it}, for `fused.py`."""

  def total(changes, weight):
    return sum(difference(weight, change) for change in changes)

  return {torch_name(path): partial(total, changes) for path, changes in rest.items()}
