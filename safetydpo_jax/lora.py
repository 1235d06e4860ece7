"""LoRA as a pytree of its own: initialisation, targets, scale, fusion.

For a frozen kernel W (in, out) and factors a (in, r), b (r, out) the adapted layer is

  (1)  y = x W + s · (d(x) a) b,     s = alpha / r

with d a dropout in training and the identity otherwise. A convolution W (kh, kw, in,
out) larger than 1×1 has a (kh, kw, in, r), of the same stride and padding, and b (r,
out); a 1×1 convolution is treated as the dense layer it is.

A LoRA tree mirrors the UNet's parameter tree and holds {'a', 'b'}, float32, at each
adapted layer. There are two kinds, told apart by their type:

  FactorTree  the factors of (1) as they are trained, s not applied
  LoraTree    s folded into b: what is saved, merged, exported, and what the UNet reads
              from its 'lora' collection (`models/layers.py`)

`fold_alpha` and `unfold_alpha` go from one to the other. The DPO reference is the same
UNet without that collection.

Source: Hu et al. 2021; initialisation as PEFT's "gaussian": a ~ N(0, (1/r)²), b = 0;
targets and patterns as PEFT's `target_modules`, `rank_pattern` and `alpha_pattern`.
"""

import hashlib
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NewType, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from safetydpo_jax.errors import InputError

# Self and cross attention of the UNet: what the released SafetyDPO launchers adapt.
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")

Tree = Mapping[str, Any]
# Both are plain nested dicts, to Orbax, to jit and on disk.
FactorTree = NewType("FactorTree", Tree)
LoraTree = NewType("LoraTree", Tree)
EitherTree = TypeVar("EitherTree", FactorTree, LoraTree)
Path = tuple[str, ...]
# ((ending of a PyTorch name, its number), …); the first that matches a layer counts.
Pattern = Sequence[tuple[str, float]]


def _ending(target: str) -> Path:
  """The end of a tree's path that a PyTorch name or dotted ending stands for."""
  return tuple(re.sub(r"\.(\d+)", r"_\1", target).split("."))


def _matches(path: Path, target: str) -> bool:
  ending = _ending(target)
  return path[-len(ending) :] == ending


def target_paths(params: Tree, targets: Sequence[str]) -> list[Path]:
  """Paths of the layers whose PyTorch name ends in one of `targets`.

  Args:
    params: the UNet's parameter tree (arrays or shapes).
    targets: PyTorch module names or dotted endings of them, as in PEFT's
      `target_modules`: "to_q", "attn2.to_out.0", "ff.net.0.proj", "conv1".

  Raises:
    InputError: a target matches no dense layer and no convolution.
  """
  layers = [path[:-1] for path in flatten_dict(params) if path[-1] == "kernel"]
  found = {t: [path for path in layers if _matches(path, t)] for t in targets}
  for target, paths in found.items():
    if not paths:
      raise InputError(
        f"lora.targets: {target!r} matches no dense layer and no convolution of the "
        f"UNet; the usual targets are {', '.join(ATTENTION_TARGETS)}"
      )
  if not found:
    raise InputError(
      f"lora.targets is empty; the usual targets are {', '.join(ATTENTION_TARGETS)}"
    )
  return sorted({path for paths in found.values() for path in paths})


def check_pattern(pattern: Pattern, name: str) -> None:
  """Raises `InputError` unless every entry is (layer, number above 0).

  Args:
    pattern: ((ending of a PyTorch name, number), …).
    name: what to call it in errors.
  """
  for entry in pattern:
    if not (
      isinstance(entry, (tuple, list))
      and len(entry) == 2
      and isinstance(entry[0], str)
      and isinstance(entry[1], (int, float))
      and not isinstance(entry[1], bool)
    ):
      raise InputError(
        f"{name} has {entry!r}; expected (layer, number), as in (('conv1', 8),)"
      )
    if not 0 < entry[1] < math.inf:
      raise InputError(f"{name}: {entry[0]!r} has {entry[1]}; expected above 0")


def by_layer(
  paths: Sequence[Path], value: float, pattern: Pattern, name: str
) -> dict[Path, float]:
  """{path: `value`, or the number of the first entry of `pattern` that matches it}.

  Args:
    paths: the adapted layers.
    value: for layers that no entry matches.
    pattern: ((ending of a PyTorch name, number), …).
    name: what to call the pattern in errors.

  Raises:
    InputError: an entry is malformed or matches no adapted layer.
  """
  check_pattern(pattern, name)
  for layer, _ in pattern:
    if not any(_matches(path, layer) for path in paths):
      raise InputError(f"{name}: {layer!r} matches no layer of lora.targets")
  return {
    path: next((number for t, number in pattern if _matches(path, t)), value)
    for path in paths
  }


def init_lora(
  key: jax.Array,
  params: Tree,
  rank: int,
  targets: Sequence[str] = ATTENTION_TARGETS,
  rank_pattern: Pattern = (),
) -> FactorTree:
  """A fresh LoRA: a ~ N(0, (1/r)²), b = 0, so that policy equals reference.

  A layer's draw depends on the key and the layer's name alone: experts that share a
  seed share every `a`, whatever else they adapt.

  Args:
    key: of the draws.
    params: the UNet's parameter tree (arrays or shapes).
    rank: r of every layer that `rank_pattern` does not name.
    targets: see `target_paths`.
    rank_pattern: ((target, r), …) for single layers.

  Raises:
    InputError: the rank is below 1, or a target or an entry matches no layer.
  """
  if rank < 1:
    raise InputError(f"lora.rank is {rank}; expected 1 or more")
  kernels = flatten_dict(params)
  paths = target_paths(params, targets)
  lora = {}
  for path, r in by_layer(paths, rank, rank_pattern, "lora.rank_pattern").items():
    if r != int(r):
      raise InputError(f"lora.rank_pattern has rank {r}; expected a whole number")
    shape_a, shape_b = factor_shapes(kernels[(*path, "kernel")].shape, int(r))
    layer_key = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
    lora[(*path, "a")] = jax.random.normal(layer_key, shape_a) / r
    lora[(*path, "b")] = jnp.zeros(shape_b)
  return FactorTree(unflatten_dict(lora))


def factor_shapes(
  kernel: tuple[int, ...], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Shapes of a and b for a kernel (in, out) or (kh, kw, in, out)."""
  *size, inputs, outputs = kernel
  if size == [1, 1]:
    size = []
  return (*size, inputs, rank), (rank, outputs)


def scale(lora: EitherTree, factor: float) -> EitherTree:
  """The tree whose product a b is `factor` times that of `lora` (b is scaled)."""
  return _scale_layers(lora, lambda path, rank: factor)


def fold_alpha(
  factors: FactorTree, alpha: float, alpha_pattern: Pattern = ()
) -> LoraTree:
  """The factors with s = alpha / r of equation (1) folded into b, layer by layer.

  Args:
    factors: what training holds.
    alpha: of every layer that `alpha_pattern` does not name.
    alpha_pattern: ((target, alpha), …) for single layers.

  Raises:
    InputError: an alpha is not above 0, or an entry matches no layer.
  """
  values = alphas(factors, alpha, alpha_pattern)
  return LoraTree(_scale_layers(factors, lambda path, rank: values[path] / rank))


def unfold_alpha(
  lora: LoraTree, alpha: float, alpha_pattern: Pattern = ()
) -> FactorTree:
  """The inverse of `fold_alpha`: a finished LoRA as training would hold it."""
  values = alphas(lora, alpha, alpha_pattern)
  return FactorTree(_scale_layers(lora, lambda path, rank: rank / values[path]))


def alphas(lora: Tree, alpha: float, alpha_pattern: Pattern = ()) -> dict[Path, float]:
  """Each layer's alpha, see `fold_alpha`."""
  if not alpha > 0:
    raise InputError(f"lora.alpha is {alpha}; expected above 0")
  paths = sorted({path[:-1] for path in flatten_dict(lora)})
  return by_layer(paths, alpha, alpha_pattern, "lora.alpha_pattern")


def _scale_layers(lora: EitherTree, factor_of: Callable[[Path, int], float]) -> Any:
  """b of each layer times factor_of(path, rank)."""
  return unflatten_dict(
    {
      path: leaf * factor_of(path[:-1], leaf.shape[0]) if path[-1] == "b" else leaf
      for path, leaf in flatten_dict(lora).items()
    }
  )


def dropout_draws(lora: Tree, keys: jax.Array, rate: float) -> dict[str, Any]:
  """The UNet's 'lora_dropout' collection: for each layer a key for each row.

  Args:
    lora: says which layers are adapted.
    keys: (n,) typed keys, one for each image the UNet is called with.
    rate: share of a layer's inputs that its low-rank path does not see.
  """
  draws = {}
  for path in sorted({path[:-1] for path in flatten_dict(lora)}):
    number = zlib.crc32("/".join(path).encode())
    draws[(*path, "keys")] = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
    draws[(*path, "rate")] = jnp.float32(rate)
  return unflatten_dict(draws)


def add(loras: Sequence[LoraTree]) -> LoraTree:
  """One LoRA whose product in each layer is the sum of the products of `loras`.

  Exact: [a_1 a_2] [b_1; b_2] = a_1 b_1 + a_2 b_2. Ranks add up; layers may differ.
  """
  factors: dict[Path, list[jax.Array]] = {}
  for lora in loras:
    for path, leaf in flatten_dict(lora).items():
      factors.setdefault(path, []).append(jnp.asarray(leaf))
  joined = {
    path: jnp.concatenate(leaves, axis=-1 if path[-1] == "a" else 0)
    for path, leaves in factors.items()
  }
  return LoraTree(unflatten_dict(joined))


def check_shapes(params: Tree, lora: Tree) -> None:
  """Raises `InputError` unless every layer of `lora` fits its kernel in `params`."""
  kernels, factors = flatten_dict(params), flatten_dict(lora)
  for path in sorted({path[:-1] for path in factors}):
    name, kernel = "/".join(path), kernels.get((*path, "kernel"))
    if kernel is None:
      raise InputError(f"the LoRA adapts {name}, which this model does not have")
    a, b = np.shape(factors[(*path, "a")]), np.shape(factors[(*path, "b")])
    if (a, b) != factor_shapes(kernel.shape, b[0]):
      raise InputError(
        f"the LoRA's {name} is {a} · {b}, the model's {kernel.shape}: it was made for "
        "another model"
      )


def fuse(params: Tree, lora: LoraTree) -> dict[str, Any]:
  """Base weights with the LoRA added in, W + a b, each in the dtype it had.

  The sum is taken in float32: bf16(0.5 + 0.001) is 0.5.

  Raises:
    InputError: `lora` adapts a layer that `params` lacks, or one of another shape.
  """
  check_shapes(params, lora)
  weights, factors = flatten_dict(params), flatten_dict(lora)
  for path in {path[:-1] for path in factors}:
    kernel = weights[(*path, "kernel")]
    a, b = factors[(*path, "a")], factors[(*path, "b")]
    product = jnp.dot(a, b, precision="highest").reshape(kernel.shape)
    weights[(*path, "kernel")] = (kernel.astype(jnp.float32) + product).astype(
      kernel.dtype
    )
  return unflatten_dict(weights)


def rank_of(lora: Tree) -> int:
  """The largest rank in the tree, 0 without a layer."""
  return max(
    (leaf.shape[-1] for path, leaf in flatten_dict(lora).items() if path[-1] == "a"),
    default=0,
  )


def num_parameters(lora: Tree) -> int:
  """Trainable parameters: 797,184 for SD1.5 at rank 4."""
  return sum(leaf.size for leaf in jax.tree.leaves(lora))


def factors_sha256(lora: Tree) -> str:
  """Identifies a LoRA by its factors; layers are hashed in sorted order."""
  digest = hashlib.sha256()
  for path, leaf in sorted(flatten_dict(lora).items()):
    leaf = np.asarray(leaf, np.float32)
    digest.update(f"{'/'.join(path)} {leaf.shape}".encode() + leaf.tobytes())
  return digest.hexdigest()
