"""LoRA trees: targets, initialisation, scale, sums, fusion."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from safetydpo_jax import lora
from safetydpo_jax.errors import InputError

ATTENTION = {
  "to_q": {"kernel": jnp.ones((8, 12))},
  "to_out_0": {"kernel": jnp.ones((12, 8)), "bias": jnp.ones(8)},
}
PARAMS = {
  "blocks_0": {"attn1": ATTENTION, "attn2": ATTENTION},
  "ff": {"net_0": {"proj": {"kernel": jnp.ones((8, 64))}}},
  "conv": {"kernel": jnp.ones((3, 3, 4, 8))},
}


def random_lora(seed, rank=3, targets=("to_q", "to_out.0")):
  tree = lora.init_lora(jax.random.key(seed), PARAMS, rank, targets)
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(seed + 100), len(leaves))
  return jax.tree.unflatten(
    structure, [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves)]
  )


def product(tree, *path):
  layer = tree
  for name in path:
    layer = layer[name]
  return layer["a"] @ layer["b"]


@pytest.mark.parametrize(
  ("targets", "count"),
  [(("to_q",), 2), (("to_out.0",), 2), (("attn2.to_q",), 1), (("net.0.proj",), 1)],
)
def test_targets_are_endings_of_pytorch_names(targets, count):
  assert len(lora.target_paths(PARAMS, targets)) == count


@pytest.mark.parametrize("target", ["to_x", "conv", "q", "o_q"])
def test_a_target_that_matches_no_dense_layer_is_named(target):
  with pytest.raises(InputError, match=f"'{target}' matches no dense layer"):
    lora.target_paths(PARAMS, ("to_q", target))


def test_initialisation_is_pefts_gaussian():
  params = {"to_q": {"kernel": jnp.ones((4096, 8))}}
  layer = lora.init_lora(jax.random.key(0), params, 16, ("to_q",))["to_q"]
  assert float(layer["a"].std()) == pytest.approx(1 / 16, rel=0.02)
  assert float(layer["a"].mean()) == pytest.approx(0, abs=1e-3)
  chex.assert_trees_all_equal(layer["b"], jnp.zeros((16, 8)))


def test_experts_of_one_seed_share_a_whatever_else_they_adapt():
  few = lora.init_lora(jax.random.key(0), PARAMS, 4, ("to_q",))
  many = lora.init_lora(jax.random.key(0), PARAMS, 4, ("to_q", "to_out.0"))
  other = lora.init_lora(jax.random.key(1), PARAMS, 4, ("to_q",))
  a = few["blocks_0"]["attn1"]["to_q"]["a"]
  chex.assert_trees_all_equal(a, many["blocks_0"]["attn1"]["to_q"]["a"])
  assert not np.allclose(a, many["blocks_0"]["attn2"]["to_q"]["a"])
  assert not np.allclose(a, other["blocks_0"]["attn1"]["to_q"]["a"])


def test_scale_scales_the_product():
  tree = random_lora(0)
  path = ("blocks_0", "attn1", "to_q")
  chex.assert_trees_all_close(
    product(lora.scale(tree, 0.7), *path), 0.7 * product(tree, *path), rtol=1e-6
  )


def test_add_is_the_sum_of_products_also_over_different_layers_and_ranks():
  first, second = random_lora(0), random_lora(1, rank=2, targets=("to_q",))
  total = lora.add([first, second])
  path = ("blocks_0", "attn2", "to_q")
  expected = product(first, *path) + product(second, *path)
  chex.assert_trees_all_close(product(total, *path), expected, atol=1e-6)
  chex.assert_trees_all_equal(
    total["blocks_0"]["attn1"]["to_out_0"], first["blocks_0"]["attn1"]["to_out_0"]
  )


def test_fuse_adds_the_product_and_touches_nothing_else():
  tree = random_lora(0, targets=("to_q",))
  before, after = flatten_dict(PARAMS), flatten_dict(lora.fuse(PARAMS, tree))
  changed = {path for path in before if not np.array_equal(before[path], after[path])}
  assert changed == {("blocks_0", f"attn{i}", "to_q", "kernel") for i in (1, 2)}
  chex.assert_trees_all_close(
    after["blocks_0", "attn1", "to_q", "kernel"],
    1 + product(tree, "blocks_0", "attn1", "to_q"),
    rtol=1e-6,
  )


def test_fuse_rounds_once_after_a_float32_sum():
  # bf16 steps by 2⁻⁸ above 0.5 and 2⁻⁹ below it. The product 2⁻⁹ + 2⁻¹⁷ lies just
  # above the middle of a step: rounded to bf16 before the sum, it would be lost.
  product = 2.0**-9 + 2.0**-17
  tree = {"to_q": {"a": jnp.full((2, 1), product), "b": jnp.ones((1, 2))}}
  params = {"to_q": {"kernel": jnp.full((2, 2), 0.5, jnp.bfloat16)}}
  fused = lora.fuse(params, tree)["to_q"]["kernel"]
  assert fused.dtype == jnp.bfloat16
  assert float(fused[0, 0]) == 0.5 + 2.0**-8


@pytest.mark.parametrize(
  ("params", "message"),
  [
    ({"other": {"kernel": jnp.ones((8, 12))}}, "does not have"),
    ({"to_q": {"kernel": jnp.ones((8, 13))}}, "made for another model"),
  ],
)
def test_a_lora_of_another_model_is_refused(params, message):
  tree = {"to_q": {"a": jnp.ones((8, 3)), "b": jnp.ones((3, 12))}}
  with pytest.raises(InputError, match=message):
    lora.fuse(params, tree)


def test_rank_and_size():
  tree = random_lora(0, rank=3)
  assert lora.rank_of(tree) == 3
  assert lora.num_parameters(tree) == 2 * (8 * 3 + 3 * 12 + 12 * 3 + 3 * 8)
