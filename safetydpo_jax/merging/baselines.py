"""Merging experts into one LoRA without data: the baselines of Co-Merge.

Every method works on the products P_n = a_n b_n of a layer, which are what an expert
adds to the model, and not on a and b apart: (Σ a_n)(Σ b_n) has cross terms a_m b_n that
no expert was trained with. With weights w_n and a density d in (0, 1]:

  (1)  linear       Σ w_n P_n, exactly: a = [a_1 … a_N], b = [w_1 b_1; …; w_N b_N],
                    so the ranks add up ("cat" in PEFT's words)
  (2)  svd          the nearest matrix of rank r to (1)
  (3)  magnitude    Σ w_n top(P_n), which keeps the share d of largest entries
  (4)  dare_linear  Σ w_n drop(P_n), which keeps each entry with probability d and
                    divides it by d
  (5)  ties         per entry, with T_n = top(P_n): the sign of Σ w_n T_n is elected,
                    and the mean of the T_n of that sign, weighted by |w_n|, is taken
  (6)  dare_ties    (5) with drop in place of top

(3) to (6) are dense, one layer at a time, and are cut back to rank r as in (2). The a
(kh, kw, in, r) of a convolution is a matrix (kh·kw·in, r) in all of them.

(5) and (6) are means: the sum of the weights does not matter there. With equal weights
they are PEFT's `ties` and `dare_ties` at weights 1; with unequal ones they divide by
the weights that took part, as mergekit's `normalize` does, where PEFT counts experts.

Sources: TIES, Yadav et al. 2023 (arXiv 2306.01708); DARE, Yu et al. 2023 (arXiv
2311.03099); names and definitions as in `peft.utils.merge_utils` and mergekit.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from safetydpo_jax import lora as lora_lib
from safetydpo_jax.lora import LoraTree, Path, Tree

DENSITY = 0.5

Dense = Callable[[np.ndarray, np.ndarray, float, np.random.Generator], np.ndarray]


def linear(loras: Sequence[LoraTree], weights: Sequence[float], **_: Any) -> LoraTree:
  """Equation (1): one LoRA whose product is Σ w_n P_n, of rank Σ r_n.

  Args:
    loras: LoRA trees, scale folded in; they may differ in rank and in layers.
    weights: w_n, one each.
  """
  return lora_lib.add([lora_lib.scale(x, w) for x, w in zip(loras, weights)])


def svd(
  loras: Sequence[LoraTree],
  weights: Sequence[float],
  *,
  rank: int | None = None,
  **_: Any,
) -> dict:
  """Equation (2).

  Args:
    loras, weights: as for `linear`.
    rank: r; by default in each layer the largest among the experts.
  """
  return truncate(linear(loras, weights), _ranks(loras, rank))


def merge_dense(
  combine: Dense,
  loras: Sequence[LoraTree],
  weights: Sequence[float],
  *,
  rank: int | None = None,
  density: float = DENSITY,
  seed: int = 0,
) -> dict:
  """Equations (3) to (6): `combine` on the products of each layer, then rank r.

  Args:
    combine: (products (n, in, out), weights (n,), density, generator) → (in, out).
    loras, weights, rank: as for `svd`. A layer that an expert lacks counts as zeros.
    density: d.
    seed: of what DARE drops; a draw depends on it, the layer's name and the experts'
      order alone.
  """
  ranks, shares = _ranks(loras, rank), np.asarray(weights, np.float32)
  factors = [flatten_dict(lora) for lora in loras]
  merged = {}
  for path, layer_rank in ranks.items():
    there = [f for f in factors if (*path, "a") in f]
    rows = there[0][(*path, "a")].shape[:-1]
    shape = math.prod(rows), there[0][(*path, "b")].shape[1]
    products = np.zeros((len(loras), *shape), np.float32)
    for n, f in enumerate(factors):
      if (*path, "a") in f:
        products[n] = _product(f, path)
    rng = np.random.default_rng([seed, zlib.crc32("/".join(path).encode())])
    dense = combine(products, shares, density, rng)
    u, s, v = np.linalg.svd(dense, full_matrices=False)
    merged |= _balanced(path, rows, u, s, v, layer_rank)
  return unflatten_dict(merged)


def magnitude(products, weights, density, rng) -> np.ndarray:
  """Equation (3)."""
  del rng
  return _weighted_sum(_top(products, density), weights)


def dare_linear(products, weights, density, rng) -> np.ndarray:
  """Equation (4)."""
  return _weighted_sum(_drop(products, density, rng), weights)


def ties(products, weights, density, rng) -> np.ndarray:
  """Equation (5)."""
  del rng
  return _elect(_top(products, density), weights)


def dare_ties(products, weights, density, rng) -> np.ndarray:
  """Equation (6)."""
  return _elect(_drop(products, density, rng), weights)


METHODS: dict[str, Callable[..., Tree]] = {
  "linear": linear,
  "svd": svd,
  "ties": partial(merge_dense, ties),
  "dare_linear": partial(merge_dense, dare_linear),
  "dare_ties": partial(merge_dense, dare_ties),
  "magnitude": partial(merge_dense, magnitude),
}


def truncate(lora: Tree, ranks: dict[Path, int]) -> dict:
  """The nearest LoRA whose layers have at most these ranks, both factors of equal size.

  From the factors alone, without a dense matrix: with a = Q R and bᵀ = Q' R', the
  singular values of a b are those of R R'ᵀ.
  """
  factors, merged = flatten_dict(lora), {}
  for path, rank in ranks.items():
    a, b = _matrices(factors, path)
    rows = factors[(*path, "a")].shape[:-1]
    left, left_triangle = np.linalg.qr(a)
    right, right_triangle = np.linalg.qr(b.T)
    u, s, v = np.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
    merged |= _balanced(path, rows, left @ u, s, v @ right.T, rank)
  return unflatten_dict(merged)


def _ranks(loras: Sequence[Tree], rank: int | None) -> dict[Path, int]:
  """The rank of each layer of the result."""
  ranks: dict[Path, int] = {}
  for lora in loras:
    for path, leaf in flatten_dict(lora).items():
      if path[-1] == "a":
        ranks[path[:-1]] = max(ranks.get(path[:-1], 0), leaf.shape[-1])
  return {path: rank or largest for path, largest in sorted(ranks.items())}


def _product(factors: dict, path: Path) -> np.ndarray:
  a, b = _matrices(factors, path)
  return a @ b


def _matrices(factors: dict, path: Path) -> tuple[np.ndarray, np.ndarray]:
  """a (rows, r) and b (r, out) of a layer, float32."""
  a, b = (np.asarray(factors[(*path, part)], np.float32) for part in "ab")
  return a.reshape(-1, a.shape[-1]), b


def _balanced(path: Path, rows: tuple, u, s, v, rank: int) -> dict[Path, np.ndarray]:
  """a = u √s, shaped (*rows, r), and b = √s v of the largest `rank` singular values."""
  root = np.sqrt(s[:rank])
  a = np.ascontiguousarray(u[:, :rank] * root[None, :])
  return {
    (*path, "a"): a.reshape(*rows, a.shape[1]),
    (*path, "b"): np.ascontiguousarray(root[:, None] * v[:rank]),
  }


def _weighted_sum(tensors: np.ndarray, weights: np.ndarray) -> np.ndarray:
  return np.tensordot(weights, tensors, axes=1)


def _top(products: np.ndarray, density: float) -> np.ndarray:
  """Each product with all but its ⌊d · size⌋ largest entries set to zero."""
  flat = products.reshape(len(products), -1)
  kept, keep = np.zeros_like(flat), int(density * flat.shape[1])
  if keep:
    largest = np.argpartition(np.abs(flat), -keep, axis=1)[:, -keep:]
    np.put_along_axis(kept, largest, np.take_along_axis(flat, largest, 1), 1)
  return kept.reshape(products.shape)


def _drop(products: np.ndarray, density: float, rng: np.random.Generator) -> np.ndarray:
  """Entries kept with probability d and divided by d, so that means stay."""
  kept = rng.random(products.shape) < density
  return np.where(kept, products / np.float32(density), np.float32(0))


def _elect(tensors: np.ndarray, weights: np.ndarray) -> np.ndarray:
  """The mean, weighted by |w_n|, of the entries that have the elected sign."""
  weighted = weights[:, None, None] * tensors
  positive = weighted.sum(0) >= 0
  agrees = np.where(positive[None], weighted > 0, weighted < 0)
  total = (agrees * np.abs(weights)[:, None, None]).sum(0)
  mean = (agrees * weighted).sum(0) / np.where(total > 0, total, 1)
  return mean.astype(np.float32)
