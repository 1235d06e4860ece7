"""Co-Merge, both readings of it, on activations that are made up."""

import chex
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from safetydpo_jax.merging import comerge
from tests.support.experts import TO_V, normal

METHODS = list(comerge.METHODS)


def tree_of(a, b):
  return {"mid_block": {"to_q": {"a": np.float32(a), "b": np.float32(b)}}}


def parts(tree):
  return tree["mid_block"]["to_q"]["a"], tree["mid_block"]["to_q"]["b"]


@pytest.fixture
def two():
  rng = np.random.default_rng(3)
  return [tree_of(normal(rng, (4, 2)), normal(rng, (2, 3))) for _ in range(2)]


# Wins of (expert 0, expert 1): a (3, 0), (1, 2); b (0, 3), (3, 0), (2, 1).
HEARD = [
  tree_of([[2, 1], [2, 9], [2, 1]], [[1, 5, 5], [1, 5, 5], [1, 5, 0]]),
  tree_of([[1, 2], [1, 2], [1, 2]], [[3, 4, 4], [3, 4, 4], [3, 4, 9]]),
]


def test_wins_are_counted_over_inputs_and_not_summed():
  """Nine once is less than two twice."""
  counts = parts(comerge.count_wins(HEARD))
  np.testing.assert_array_equal(counts[0], [[3, 1], [0, 2]])
  np.testing.assert_array_equal(counts[1], [[0, 3, 2], [3, 0, 1]])


def test_a_tie_goes_to_the_lowest_number(two):
  even = [HEARD[0], HEARD[0]]
  chex.assert_trees_all_equal(comerge.factor(two, even), two[0])
  assert parts(comerge.count_wins(even))[0].tolist() == [[3, 3], [0, 0]]


def test_factors_take_each_column_from_its_winner(two):
  a, b = parts(comerge.factor(two, HEARD))
  (a0, b0), (a1, b1) = map(parts, two)
  np.testing.assert_array_equal(a, np.stack([a0[:, 0], a1[:, 1]], 1))
  np.testing.assert_array_equal(b, np.stack([b1[:, 0], b0[:, 1], b0[:, 2]], 1))


def test_the_product_takes_each_column_from_its_winner(two):
  a, b = parts(comerge.product(two, HEARD))
  assert a.shape == (4, 4)
  (a0, b0), (a1, b1) = map(parts, two)
  wanted = np.stack([(a1 @ b1)[:, 0], (a0 @ b0)[:, 1], (a0 @ b0)[:, 2]], 1)
  np.testing.assert_allclose(a @ b, wanted, rtol=0, atol=1e-5)


def test_a_product_cut_to_a_rank_is_its_svd(two):
  whole = np.matmul(*parts(comerge.product(two, HEARD)))
  a, b = parts(comerge.product(two, HEARD, rank=2))
  assert a.shape == (4, 2)
  lost = np.linalg.norm(whole - a @ b)
  values = np.linalg.svd(whole, compute_uv=False)
  np.testing.assert_allclose(lost, np.linalg.norm(values[2:]), rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_experts_decides_nothing_but_ties(method, experts):
  """On an odd number of inputs and two experts there are none."""
  rng = np.random.default_rng(0)
  heard = [
    jax.tree.map(lambda x: np.abs(normal(rng, (5, x.shape[1]))), tree)
    for tree in experts[:2]
  ]
  merge = comerge.METHODS[method].merge
  one, other = merge(experts[:2], heard), merge(experts[1::-1], heard[::-1])
  one, other = flatten_dict(one), flatten_dict(other)
  a, b = (*TO_V, "a"), (*TO_V, "b")
  np.testing.assert_allclose(one[a] @ one[b], other[a] @ other[b], rtol=0, atol=1e-5)
