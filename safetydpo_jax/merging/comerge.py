"""Co-Merge: for each unit, take the expert that is most active there.

Experts n = 1 … N adapt the same layers, y = x W + (x a_n) b_n. Calibration inputs i are
noisy latents of pairs of every category, with their captions, at a few timesteps. With
x_n the input that the layer gets while the whole UNet runs with expert n:

  (1)  A_a(n, i, k) = mean over tokens of |(x_n a_n)_k|             rank units of a
  (2)  A_b(n, i, j) = mean over tokens of |(x_n a_n b_n)_j|         output units
  (3)  wins(n, u)   = number of inputs i in which n has the largest A(n, i, u)
  (4)  winner(u)    = the n with the most wins                      ties: the lowest n

Two readings of "merge the most active weights of each expert":

  (5)  factors: column u of merged a and of merged b is the winner's column, by (1) and
       by (2). The rank stays r. Unit k of one expert's `a` means the same as unit k of
       another's only if both started from one `a`, that is, from one LoRA seed.
  (6)  product: column j of the merged product is the winner's column of a_n b_n, by
       (2). Exactly, as one LoRA of rank N·r: a = [a_1 … a_N], and b stacks the b_n,
       each with zeros in the columns it did not win. An SVD cuts it back to a rank.

Source: SafetyDPO (arXiv 2412.10493), which describes Co-Merge in words and published no
code for it: "analyse which expert has the highest activation for each weight across all
inputs; then merge only the most active weights per expert". (1) to (6) are our reading.
"""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from safetydpo_jax.lora import LoraTree, Tree
from safetydpo_jax.merging import baselines
from safetydpo_jax.merging.activations import stack


def count_wins(activations: Sequence[Tree], parts: str = "ab") -> dict:
  """Equation (3): a tree like a LoRA with leaves (N, units) int64."""
  flat = [flatten_dict(tree) for tree in activations]
  numbers = np.arange(len(flat))[:, None, None]
  wins = {}
  for path in flat[0]:
    if path[-1] in parts:
      best = np.argmax(np.stack([tree[path] for tree in flat]), axis=0)
      wins[path] = (best[None] == numbers).sum(1)
  return unflatten_dict(wins)


def factor(
  loras: Sequence[Tree], activations: Sequence[Tree], *, rank: int | None = None
) -> dict:
  """Equation (5): one LoRA of the experts' rank.

  Args:
    loras: LoRA trees of one structure, one rank and one LoRA seed.
    activations: what `activations.measure` gives.
    rank: ignored: the experts' rank is kept.
  """
  del rank
  wins = flatten_dict(count_wins(activations))
  return unflatten_dict(
    {
      path: np.take_along_axis(
        leaves, wins[path].argmax(0).reshape((1,) * (leaves.ndim - 1) + (-1,)), 0
      )[0]
      for path, leaves in flatten_dict(stack(loras)).items()
    }
  )


def product(
  loras: Sequence[Tree], activations: Sequence[Tree], *, rank: int | None = None
) -> Tree:
  """Equation (6): one LoRA of rank Σ r_n, or of `rank` after an SVD.

  Args:
    loras: LoRA trees with the same layers; ranks may differ.
    activations: what `activations.measure` gives.
    rank: of the result; None: exact.
  """
  wins, masked = flatten_dict(count_wins(activations, "b")), []
  for n, lora in enumerate(loras):
    factors = flatten_dict(lora)
    for path, count in wins.items():
      won = (count.argmax(0) == n).astype(np.float32)
      factors[path] = factors[path] * won[None]
    masked.append(LoraTree(unflatten_dict(factors)))
  weights = [1.0] * len(loras)
  return (baselines.svd if rank else baselines.linear)(masked, weights, rank=rank)


class Reading(NamedTuple):
  """A reading of Co-Merge.

  Attributes:
    merge: (LoRA trees, their activations, rank=…) → LoRA tree.
    parts: the factors of which the wins decide.
    one_seed: whether the experts must have started from one LoRA seed.
  """

  merge: Callable[..., Tree]
  parts: str
  one_seed: bool


METHODS = {
  "co_merge_factor": Reading(factor, "ab", one_seed=True),
  "co_merge_product": Reading(product, "b", one_seed=False),
}
# What `--method co_merge` means: in the toy world's study it left less than half of the
# IP that the factors left, less in each of three seeds, for one point of utility.
DEFAULT: Final = "co_merge_product"
