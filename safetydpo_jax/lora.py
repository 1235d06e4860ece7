"""LoRA as a pytree of its own: initialisation, targets, scale, fusion.

For a frozen kernel W (in, out) and factors a (in, r), b (r, out) the adapted layer is

  (1)  y = x W + s · (x a) b,     s = alpha / r

A LoRA tree mirrors the UNet's parameter tree and holds {'a', 'b'}, float32, at each
adapted layer; the UNet reads it from its 'lora' collection (`models/layers.py`) with s
folded into b. The DPO reference is the same UNet without that collection.

Source: Hu et al. 2021; initialisation as PEFT's "gaussian": a ~ N(0, (1/r)²), b = 0.
"""

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from safetydpo_jax.errors import InputError

# Self and cross attention of the UNet: what the released SafetyDPO launchers adapt.
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

Tree = Mapping[str, Any]
Path = tuple[str, ...]


def target_paths(params: Tree, targets: Sequence[str]) -> list[Path]:
  """Paths of the dense layers whose PyTorch name ends in one of `targets`.

  Args:
    params: the UNet's parameter tree (arrays or shapes).
    targets: PyTorch module names or dotted endings of them, as in PEFT's
      `target_modules`: "to_q" or "attn2.to_out.0".

  Raises:
    InputError: if a target matches no dense layer.
  """
  suffixes = {t: tuple(re.sub(r"\.(\d+)", r"_\1", t).split(".")) for t in targets}
  dense = [
    path[:-1]
    for path, leaf in flatten_dict(params).items()
    if path[-1] == "kernel" and leaf.ndim == 2
  ]
  found = {
    target: [path for path in dense if path[-len(suffix) :] == suffix]
    for target, suffix in suffixes.items()
  }
  for target, paths in found.items():
    if not paths:
      raise InputError(
        f"lora.targets: {target!r} matches no dense layer of the UNet; "
        f"the usual targets are {', '.join(ATTENTION_TARGETS)}"
      )
  return sorted({path for paths in found.values() for path in paths})


def init_lora(
  key: jax.Array, params: Tree, rank: int, targets: Sequence[str] = ATTENTION_TARGETS
) -> dict:
  """A fresh LoRA tree: a ~ N(0, (1/r)²), b = 0, so that policy equals reference.

  A layer's draw depends on the key and the layer's name alone: experts that share a
  seed share every `a`, whatever else they adapt.
  """
  if rank < 1:
    raise InputError(f"lora.rank is {rank}; expected 1 or more")
  kernels = flatten_dict(params)
  lora = {}
  for path in target_paths(params, targets):
    inputs, outputs = kernels[(*path, "kernel")].shape
    layer_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
    lora[(*path, "a")] = jax.random.normal(layer_key, (inputs, rank)) / rank
    lora[(*path, "b")] = jnp.zeros((rank, outputs))
  return unflatten_dict(lora)


def scale(lora: Tree, factor: float) -> dict:
  """The tree whose product a b is `factor` times that of `lora` (b is scaled)."""
  return unflatten_dict(
    {
      path: leaf * factor if path[-1] == "b" else leaf
      for path, leaf in flatten_dict(lora).items()
    }
  )


def add(loras: Sequence[Tree]) -> dict:
  """One LoRA whose product in each layer is the sum of the products of `loras`.

  Exact: [a_1 a_2] [b_1; b_2] = a_1 b_1 + a_2 b_2. Ranks add up; layers may differ.
  """
  factors: dict[Path, list] = {}
  for lora in loras:
    for path, leaf in flatten_dict(lora).items():
      factors.setdefault(path, []).append(jnp.asarray(leaf))
  return unflatten_dict(
    {
      path: jnp.concatenate(leaves, axis=1 if path[-1] == "a" else 0)
      for path, leaves in factors.items()
    }
  )


def check_shapes(params: Tree, lora: Tree) -> None:
  """Raises `InputError` unless every layer of `lora` fits its kernel in `params`."""
  kernels, factors = flatten_dict(params), flatten_dict(lora)
  for path in sorted({path[:-1] for path in factors}):
    name, kernel = "/".join(path), kernels.get((*path, "kernel"))
    if kernel is None:
      raise InputError(f"the LoRA adapts {name}, which this model does not have")
    a, b = factors[(*path, "a")].shape, factors[(*path, "b")].shape
    if a[1] != b[0] or (a[0], b[1]) != kernel.shape:
      raise InputError(
        f"the LoRA's {name} is {a} · {b}, the model's {kernel.shape}: it was made for "
        "another model"
      )


def fuse(params: Tree, lora: Tree) -> dict:
  """Base weights with the LoRA added in, W + a b, each in the dtype it had.

  The sum is taken in float32: bf16(0.5 + 0.001) is 0.5.

  Raises:
    InputError: if `lora` adapts a layer that `params` does not have, or another shape.
  """
  check_shapes(params, lora)
  weights, factors = flatten_dict(params), flatten_dict(lora)
  for path in {path[:-1] for path in factors}:
    kernel = weights[(*path, "kernel")]
    a, b = factors[(*path, "a")], factors[(*path, "b")]
    fused = kernel.astype(jnp.float32) + jnp.matmul(a, b, precision="highest")
    weights[(*path, "kernel")] = fused.astype(kernel.dtype)
  return unflatten_dict(weights)


def rank_of(lora: Tree) -> int:
  """The largest rank in the tree."""
  return max(
    leaf.shape[-1] for path, leaf in flatten_dict(lora).items() if path[-1] == "a"
  )


def num_parameters(lora: Tree) -> int:
  """Trainable parameters: 797,184 for SD1.5 at rank 4."""
  return sum(leaf.size for leaf in jax.tree.leaves(lora))
