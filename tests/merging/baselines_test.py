"""Merging without data: what every method promises, and PEFT's word for the rest."""

import chex
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from peft.utils import merge_utils

from safetydpo_jax import lora
from safetydpo_jax.merging import baselines

# Two layers, one wider than deep, one deeper than wide.
SHAPES = {("down_blocks_0", "to_q"): (9, 14), ("mid_block", "to_v"): (12, 7)}
DETERMINISTIC = ("linear", "svd", "ties", "magnitude")
WEIGHTS = (0.5, 0.3, 0.9)
PEFT = {
  "ties": merge_utils.ties,
  "magnitude": merge_utils.magnitude_prune,
  "dare_linear": merge_utils.dare_linear,
  "dare_ties": merge_utils.dare_ties,
}


def make_lora(seed, rank=3, shapes=SHAPES):
  rng = np.random.default_rng(seed)
  tree = {}
  for path, (inputs, outputs) in shapes.items():
    tree[(*path, "a")] = rng.standard_normal((inputs, rank)).astype(np.float32)
    tree[(*path, "b")] = rng.standard_normal((rank, outputs)).astype(np.float32)
  return unflatten_dict(tree)


def products(tree):
  factors = flatten_dict(tree)
  return {
    path[:-1]: np.asarray(factors[path]) @ np.asarray(factors[(*path[:-1], "b")])
    for path in factors
    if path[-1] == "a"
  }


def assert_same_products(one, other, atol=1e-5):
  chex.assert_trees_all_close(products(one), products(other), rtol=0, atol=atol)


@pytest.fixture(scope="module")
def experts():
  return [make_lora(seed) for seed in range(3)]


def merge(method, loras, weights, **options):
  return baselines.METHODS[method](loras, weights, **options)


@pytest.mark.parametrize("method", baselines.METHODS)
def test_one_expert_is_itself(method, experts):
  options = {"density": 1.0} if method not in ("linear", "svd") else {}
  assert_same_products(merge(method, experts[:1], [1.0], **options), experts[0])


def test_one_expert_stays_itself_to_the_bit_when_it_is_merged_linearly(experts):
  chex.assert_trees_all_equal(merge("linear", experts[:1], [1.0]), experts[0])


@pytest.mark.parametrize("method", baselines.METHODS)
@pytest.mark.parametrize("weights", [(1 / 3, 1 / 3, 1 / 3), (0.2, 0.5, 0.3)])
def test_identical_experts_whose_weights_sum_to_1_are_that_expert(
  method, weights, experts
):
  options = {"density": 1.0} if method not in ("linear", "svd") else {}
  same = [experts[1]] * 3
  assert_same_products(merge(method, same, weights, **options), experts[1])


def test_the_linear_product_is_the_weighted_sum_without_cross_terms(experts):
  merged = merge("linear", experts, WEIGHTS)
  assert lora.rank_of(merged) == 9
  wanted = {
    path: sum(w * products(x)[path] for w, x in zip(WEIGHTS, experts))
    for path in SHAPES
  }
  chex.assert_trees_all_close(products(merged), wanted, rtol=0, atol=1e-5)


def test_svd_at_full_rank_is_linear(experts):
  full = merge("svd", experts, WEIGHTS, rank=9)
  assert_same_products(full, merge("linear", experts, WEIGHTS))
  assert flatten_dict(full)[("mid_block", "to_v", "a")].shape == (12, 7)


def test_svd_is_the_nearest_product_of_its_rank(experts):
  """Eckart and Young: what is lost are the other singular values."""
  linear = products(merge("linear", experts, WEIGHTS))
  cut = merge("svd", experts, WEIGHTS, rank=2)
  assert lora.rank_of(cut) == 2
  for path, product in products(cut).items():
    values = np.linalg.svd(linear[path], compute_uv=False)
    lost = np.linalg.norm(linear[path] - product)
    np.testing.assert_allclose(lost, np.linalg.norm(values[2:]), rtol=1e-4)


@pytest.mark.parametrize("method", [m for m in baselines.METHODS if m != "linear"])
def test_the_rank_is_the_experts_largest_unless_it_is_given(method, experts):
  loras = [experts[0], make_lora(5, rank=4), experts[1]]
  assert lora.rank_of(merge(method, loras, WEIGHTS)) == 4
  assert lora.rank_of(merge(method, loras, WEIGHTS, rank=2)) == 2


# PEFT divides `ties` by the number of experts that agree and we by their weights: the
# two meet at weights 1. The sums (`magnitude`, `dare_linear`) meet at all weights.
@pytest.mark.parametrize(
  ("method", "weights"),
  [("ties", (1.0, 1.0, 1.0)), ("magnitude", (1.0, 1.0, 1.0)), ("magnitude", WEIGHTS)],
)
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_dense_methods_are_pefts(method, weights, density, experts):
  merged = merge(method, experts, weights, density=density, rank=9)
  for path, ours in products(merged).items():
    tensors = [torch.from_numpy(products(x)[path]) for x in experts]
    theirs = PEFT[method](tensors, torch.tensor(weights), density)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  ("method", "weights"), [("dare_linear", WEIGHTS), ("dare_ties", (1.0, 1.0, 1.0))]
)
def test_dare_is_pefts_when_both_drop_the_same_entries(
  method, weights, experts, monkeypatch
):
  tensors = np.stack([products(x)["mid_block", "to_v"] for x in experts])
  combine = getattr(baselines, method)
  ours = combine(tensors, np.float32(weights), 0.4, np.random.default_rng(7))
  kept = iter(np.random.default_rng(7).random(tensors.shape) < 0.4)
  monkeypatch.setattr(
    torch, "bernoulli", lambda input: torch.from_numpy(next(kept)).to(input.dtype)
  )
  theirs = PEFT[method](
    [torch.from_numpy(x) for x in tensors], torch.tensor(weights), 0.4
  )
  np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-5)


def test_ties_by_hand():
  """Largest halves [4, -3] and [-2, -8]: the sum elects + and −, the mean follows."""
  one = np.array([[[4.0, -3.0, 1.0, 0.5]], [[-2.0, -8.0, 1.0, 0.5]]], np.float32)
  weights = np.array([1.0, 3.0], np.float32)
  merged = baselines.ties(one, weights, 0.5, None)
  np.testing.assert_allclose(merged, [[-2.0, (-3 - 3 * 8) / 4, 0.0, 0.0]])
  equal = baselines.ties(one, weights * 0 + 1, 0.5, None)
  np.testing.assert_allclose(equal, [[4.0, -5.5, 0.0, 0.0]])


def test_dare_keeps_the_mean_and_the_share():
  ones = np.ones((2, 300, 300), np.float32)
  merged = baselines.dare_linear(
    ones, np.float32([1, 0]), 0.25, np.random.default_rng(0)
  )
  assert abs(merged.mean() - 1) < 0.02
  assert abs((merged != 0).mean() - 0.25) < 0.01


def test_dare_drops_other_entries_for_each_expert_and_for_another_seed(experts):
  ones = np.ones((2, 30, 30), np.float32)
  dropped = baselines._drop(ones, 0.5, np.random.default_rng(0))
  assert (dropped[0] != dropped[1]).any()
  one, same, other = (
    merge("dare_linear", experts, WEIGHTS, seed=seed) for seed in (1, 1, 2)
  )
  chex.assert_trees_all_equal(one, same)
  with pytest.raises(AssertionError):
    assert_same_products(one, other, atol=0.1)


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_the_order_of_the_experts_does_not_matter(method, experts):
  swapped = merge(method, experts[::-1], WEIGHTS[::-1])
  assert_same_products(merge(method, experts, WEIGHTS), swapped)


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_how_a_product_is_split_into_factors_does_not_matter(method, experts):
  """a b = (a R) (R⁻¹ b): no method may see R."""
  mix = np.random.default_rng(9).standard_normal((3, 3)).astype(np.float32)

  def turned(leaf, part):
    return leaf @ mix if part == "a" else np.linalg.inv(mix) @ leaf

  other = unflatten_dict(
    {path: turned(leaf, path[-1]) for path, leaf in flatten_dict(experts[0]).items()}
  )
  one = merge(method, experts, WEIGHTS)
  assert_same_products(one, merge(method, [other, *experts[1:]], WEIGHTS), atol=1e-4)


@pytest.mark.parametrize("method", ["linear", "magnitude"])
def test_a_layer_that_one_expert_lacks_counts_as_zeros_there(method, experts):
  path = ("mid_block", "to_v")
  part = make_lora(1, shapes={path: SHAPES[path]})
  options = {"density": 1.0, "rank": 6} if method == "magnitude" else {}
  merged = products(merge(method, [experts[0], part], [0.5, 0.5], **options))
  first = products(experts[0])
  np.testing.assert_allclose(
    merged["down_blocks_0", "to_q"],
    0.5 * first["down_blocks_0", "to_q"],
    rtol=0,
    atol=1e-5,
  )
  both = 0.5 * (first[path] + products(part)[path])
  np.testing.assert_allclose(merged[path], both, rtol=0, atol=1e-5)


def test_nothing_kept_is_nothing():
  tensors = np.ones((2, 3, 3), np.float32)
  weights = np.ones(2, np.float32)
  assert not baselines.magnitude(tensors, weights, 0.05, None).any()
  assert not baselines.ties(tensors, 0 * weights, 1.0, None).any()
