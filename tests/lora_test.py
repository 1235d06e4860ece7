"""LoRA trees: targets, initialisation, scale, sums, fusion."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from safetydpo_jax import lora
from safetydpo_jax.errors import InputError

ATTENTION = {
  "to_q": {"kernel": jnp.ones((8, 12))},
  "to_out_0": {"kernel": jnp.ones((12, 8)), "bias": jnp.ones(8)},
}
PARAMS = {
  "blocks_0": {"attn1": ATTENTION, "attn2": ATTENTION},
  "ff": {"net_0": {"proj": {"kernel": jnp.ones((8, 64))}}},
  "conv": {"kernel": jnp.ones((3, 2, 4, 8))},
  "proj_in": {"kernel": jnp.ones((1, 1, 4, 6)), "bias": jnp.ones(6)},
}
EVERYTHING = ("to_q", "to_out.0", "net.0.proj", "conv", "proj_in")


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
  return jnp.dot(layer["a"], layer["b"])


@pytest.mark.parametrize(
  ("targets", "count"),
  [
    (("to_q",), 2),
    (("to_out.0",), 2),
    (("attn2.to_q",), 1),
    (("ff.net.0.proj",), 1),
    (("conv", "proj_in"), 2),
    (("to_q", "attn1.to_q"), 2),
  ],
)
def test_targets_are_endings_of_pytorch_names(targets, count):
  assert len(lora.target_paths(PARAMS, targets)) == count


@pytest.mark.parametrize("target", ["to_x", "con", "q", "o_q", "0.proj"])
def test_a_target_that_matches_no_layer_is_named(target):
  with pytest.raises(
    InputError, match=f"'{target}' matches no dense layer and no conv"
  ):
    lora.target_paths(PARAMS, ("to_q", target))


def test_no_targets_at_all_are_refused():
  with pytest.raises(InputError, match=r"lora\.targets is empty; .*to_q"):
    lora.init_lora(jax.random.key(0), PARAMS, 4, ())


def test_a_convolution_has_its_kernels_size_in_a_and_none_in_b():
  tree = lora.init_lora(jax.random.key(0), PARAMS, 5, ("conv", "proj_in"))
  chex.assert_shape([tree["conv"]["a"], tree["conv"]["b"]], [(3, 2, 4, 5), (5, 8)])
  chex.assert_shape([tree["proj_in"]["a"], tree["proj_in"]["b"]], [(4, 5), (5, 6)])


def test_a_pattern_sets_single_layers_and_its_first_match_counts():
  pattern = (("attn2.to_q", 7), ("to_q", 2.0), ("net.0.proj", 1))
  tree = lora.init_lora(jax.random.key(0), PARAMS, 4, EVERYTHING, pattern)
  ranks = {
    path[:-1]: leaf.shape[-1]
    for path, leaf in flatten_dict(tree).items()
    if path[-1] == "a"
  }
  assert ranks.pop(("blocks_0", "attn2", "to_q")) == 7
  assert ranks.pop(("blocks_0", "attn1", "to_q")) == 2
  assert ranks.pop(("ff", "net_0", "proj")) == 1
  assert set(ranks.values()) == {4}
  assert lora.rank_of(tree) == 7
  # PEFT's gaussian has deviation 1 / r of the layer's own rank.
  alone = lora.init_lora(jax.random.key(0), PARAMS, 1, EVERYTHING)
  chex.assert_trees_all_equal(tree["ff"], alone["ff"])


def test_alpha_over_rank_is_folded_layer_by_layer_and_out_again():
  tree = random_lora(0, rank=3, targets=EVERYTHING)
  folded = lora.fold_alpha(tree, 6.0, (("attn2.to_q", 1.5), ("conv", 3)))
  for path, factor in {
    ("blocks_0", "attn1", "to_q"): 2.0,
    ("blocks_0", "attn2", "to_q"): 0.5,
    ("conv",): 1.0,
  }.items():
    chex.assert_trees_all_close(
      product(folded, *path), factor * product(tree, *path), rtol=1e-6
    )
  back = lora.unfold_alpha(folded, 6.0, (("attn2.to_q", 1.5), ("conv", 3)))
  chex.assert_trees_all_close(back, tree, rtol=1e-6)


WRONG = {
  "rank 0": ({"rank": 0}, "lora.rank is 0; expected 1 or more"),
  "no pair": ({"rank_pattern": ("conv", 8)}, "'conv'; expected .layer, number"),
  "a word": ({"rank_pattern": (("conv", "8"),)}, "expected .layer, number"),
  "rank 0 in one": ({"rank_pattern": (("conv", 0),)}, "'conv' has 0; expected above 0"),
  "half a rank": ({"rank_pattern": (("conv", 1.5),)}, "1.5; expected a whole number"),
  "no target": ({"rank_pattern": (("proj_in", 8),)}, "'proj_in' matches no layer of"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG)
def test_ranks_that_cannot_be_are_named(changes, message):
  settings = {"rank": 4, "targets": ("to_q", "conv"), **changes}
  with pytest.raises(InputError, match=message):
    lora.init_lora(jax.random.key(0), PARAMS, **settings)


@pytest.mark.parametrize(
  ("alpha", "pattern", "message"),
  [
    (0.0, (), "lora.alpha is 0.0; expected above 0"),
    (4.0, (("conv", -1),), "lora.alpha_pattern: 'conv' has -1; expected above 0"),
    (4.0, (("to_v", 1),), "lora.alpha_pattern: 'to_v' matches no layer"),
  ],
)
def test_alphas_that_cannot_be_are_named(alpha, pattern, message):
  with pytest.raises(InputError, match=message):
    lora.fold_alpha(random_lora(0, targets=("to_q", "conv")), alpha, pattern)


def test_every_layer_and_row_drops_by_a_key_of_its_own():
  tree = random_lora(0, targets=EVERYTHING)
  draws = lora.dropout_draws(tree, jax.random.split(jax.random.key(0), 3), 0.25)
  leaves = flatten_dict(draws)
  assert {path[:-1] for path in leaves} == {path[:-1] for path in flatten_dict(tree)}
  keys = [jax.random.key_data(leaf) for p, leaf in leaves.items() if p[-1] == "keys"]
  assert len(np.unique(np.concatenate(keys), axis=0)) == 3 * len(keys)
  assert {float(leaf) for p, leaf in leaves.items() if p[-1] == "rate"} == {0.25}


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
  first = random_lora(0, targets=EVERYTHING)
  second = random_lora(1, rank=2, targets=("to_q", "conv", "proj_in"))
  total = lora.add([first, second])
  for path in (("blocks_0", "attn2", "to_q"), ("conv",), ("proj_in",)):
    expected = product(first, *path) + product(second, *path)
    chex.assert_trees_all_close(product(total, *path), expected, atol=1e-5)
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


def test_fuse_adds_the_product_to_a_convolution_of_any_kernel():
  tree = random_lora(0, targets=("conv", "proj_in"))
  fused = lora.fuse(PARAMS, tree)
  conv = 1 + jnp.einsum("hwir,ro->hwio", tree["conv"]["a"], tree["conv"]["b"])
  chex.assert_trees_all_close(fused["conv"]["kernel"], conv, rtol=1e-5)
  proj = 1 + (tree["proj_in"]["a"] @ tree["proj_in"]["b"])[None, None]
  chex.assert_trees_all_close(fused["proj_in"]["kernel"], proj, rtol=1e-5)


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
    ({"to_q": {"kernel": jnp.ones((3, 3, 8, 12))}}, "made for another model"),
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


def test_a_hash_tells_factors_layers_and_shapes_apart():
  one = random_lora(0)
  flat = flatten_dict(one)
  path = next(iter(flat))
  others = [
    random_lora(1),
    unflatten_dict({**flat, path: flat[path] + np.float32(1e-6)}),
    {"mid": one, "down": {}},
    jax.tree.map(lambda leaf: leaf.reshape(-1, 1), one),
  ]
  hashes = {lora.factors_sha256(tree) for tree in (one, *others)}
  assert len(hashes) == 5
  assert lora.factors_sha256(jax.tree.map(np.asarray, one)) in hashes
