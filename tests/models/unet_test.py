"""The UNet equals diffusers' on odd configurations and refuses what it lacks."""

import chex
import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from safetydpo_jax.errors import InputError
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition
from tests.support.checkpoints import UNET, perturb
from tests.support.parity import NETWORK, apply, array, draw, params_of, tensor

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
UP_CROSS, UP_PLAIN = "CrossAttnUpBlock2D", "UpBlock2D"

# name → (config over the tiny checkpoint's, latent size)
CONFIGS = {
  "sd1, sizes that do not divide": ({}, (5, 7)),
  "sd2, three levels, heads and layers as lists": (
    {
      "block_out_channels": (16, 24, 32),
      "down_block_types": (CROSS, CROSS, PLAIN),
      "up_block_types": (UP_PLAIN, UP_CROSS, UP_CROSS),
      "attention_head_dim": (2, 3, 4),
      "layers_per_block": (1, 2, 1),
      "use_linear_projection": True,
      "upcast_attention": True,
      "cross_attention_dim": 20,
      "norm_num_groups": 4,
      "in_channels": 3,
      "out_channels": 5,
    },
    (6, 4),
  ),
  "sdxl, text_time and several transformer layers": (
    {
      "block_out_channels": (16, 32, 32),
      "down_block_types": (PLAIN, CROSS, CROSS),
      "up_block_types": (UP_CROSS, UP_CROSS, UP_PLAIN),
      "attention_head_dim": (1, 2, 4),
      "transformer_layers_per_block": (1, 2, 3),
      "use_linear_projection": True,
      "addition_embed_type": "text_time",
      "addition_time_embed_dim": 6,
      "projection_class_embeddings_input_dim": 6 * 6 + 10,
    },
    (9, 8),
  ),
  "no attention on the way, sin first, shifted": (
    {
      "down_block_types": (PLAIN, PLAIN),
      "up_block_types": (UP_PLAIN, UP_PLAIN),
      "flip_sin_to_cos": False,
      "freq_shift": 1,
      "norm_eps": 1e-3,
      "time_embedding_dim": 40,
    },
    (4, 4),
  ),
  "four levels, a plain middle, wide kernels": (
    {
      "block_out_channels": (8, 16, 16, 24),
      "down_block_types": (CROSS, PLAIN, CROSS, PLAIN),
      "up_block_types": (UP_PLAIN, UP_CROSS, UP_PLAIN, UP_CROSS),
      "mid_block_type": "UNetMidBlock2D",
      "conv_in_kernel": 5,
      "conv_out_kernel": 1,
    },
    (11, 9),
  ),
  # As SSD-1B, whose config has lists in lists and another number on the way up.
  "sdxl distilled, a number for each transformer": (
    {
      "block_out_channels": (16, 32, 32),
      "down_block_types": (PLAIN, CROSS, CROSS),
      "up_block_types": (UP_CROSS, UP_CROSS, UP_PLAIN),
      "attention_head_dim": (1, 2, 4),
      "layers_per_block": 2,
      "mid_block_type": "UNetMidBlock2D",
      "transformer_layers_per_block": [0, [1, 2], [2, 2]],
      "reverse_transformer_layers_per_block": [[2, 2, 3], [2, 1, 1], 1],
      "use_linear_projection": True,
      "addition_embed_type": "text_time",
      "addition_time_embed_dim": 6,
      "projection_class_embeddings_input_dim": 6 * 6 + 10,
    },
    (8, 4),
  ),
  "asymmetric, with a middle, whose number is the lowest level's first": (
    {
      "transformer_layers_per_block": [1, [3]],
      "reverse_transformer_layers_per_block": [[1, 2], 2],
      "down_block_types": (CROSS, CROSS),
      "up_block_types": (UP_CROSS, UP_CROSS),
    },
    (4, 4),
  ),
  # As small-sd and tiny-sd (BK-SDM).
  "sd1 distilled, attention on all levels, no middle": (
    {
      "block_out_channels": (16, 24, 32),
      "down_block_types": (CROSS,) * 3,
      "up_block_types": (UP_CROSS,) * 3,
      "mid_block_type": None,
    },
    (9, 8),
  ),
  "one level, no middle": (
    {
      "block_out_channels": (16,),
      "down_block_types": (CROSS,),
      "up_block_types": (UP_CROSS,),
      "mid_block_type": None,
      "layers_per_block": 2,
    },
    (3, 5),
  ),
}


def build(overrides, size, **options):
  """(PyTorch UNet, our UNet, inputs)."""
  config = {**UNET, **overrides}
  theirs = perturb(diffusers.UNet2DConditionModel(**config))
  ours = UNet2DCondition(freeze(dict(theirs.config)), **options)
  timesteps = np.array([3, 870])
  context = draw(2, 6, config["cross_attention_dim"], seed=1)
  inputs = [draw(2, *size, config["in_channels"]), timesteps, context]
  if "addition_embed_type" in config:
    ids = np.array([[64, 64, 0, 0, 64, 64], [9, 70, 3, 5, 64, 32]], np.float32)
    inputs.append({"text_embeds": draw(2, 10, seed=2), "time_ids": ids})
  return theirs, ours, inputs


def run_theirs(theirs, inputs):
  latents, timesteps, context, *added = inputs
  added = {k: tensor(v) for k, v in added[0].items()} if added else None
  with torch.no_grad():
    out = theirs(
      tensor(latents), tensor(timesteps), tensor(context), added_cond_kwargs=added
    )
  return array(out.sample)


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name):
  theirs, ours, inputs = build(*CONFIGS[name])
  params = params_of(theirs, ours, *inputs)
  expected = run_theirs(theirs, inputs)
  assert 0.1 < expected.std() < 10
  np.testing.assert_allclose(
    apply(ours, params, *inputs), expected, rtol=0, atol=NETWORK
  )


def test_the_guidance_scale_of_a_distilled_unet_equals_diffusers():
  small, size = CONFIGS["one level, no middle"]
  theirs, ours, inputs = build({**small, "time_cond_proj_dim": 6}, size)
  params = params_of(theirs, ours, *inputs)
  condition = draw(2, 6, seed=3)
  with torch.no_grad():
    expected = theirs(*map(tensor, inputs), timestep_cond=tensor(condition)).sample
  got = apply(ours, params, *inputs, None, condition)
  np.testing.assert_allclose(got, array(expected), rtol=0, atol=NETWORK)
  plain = apply(ours, params, *inputs)
  np.testing.assert_allclose(plain, run_theirs(theirs, inputs), rtol=0, atol=NETWORK)
  assert np.abs(plain - got).max() > 0.01


def test_a_unet_that_knows_no_guidance_scale_takes_none():
  _, ours, inputs = build({}, (4, 4))
  with pytest.raises(InputError, match="no time_cond_proj_dim"):
    jax.eval_shape(ours.init, jax.random.key(0), *inputs, None, draw(2, 6))


def test_bfloat16_stays_near_float32():
  theirs, ours, inputs = build({}, (8, 8), dtype=jnp.bfloat16)
  params = params_of(theirs, ours, *inputs)
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  got = apply(ours, params, *inputs)
  assert got.dtype == jnp.bfloat16
  expected = run_theirs(theirs, inputs)
  difference = np.float32(got) - expected
  assert np.sqrt(np.mean(difference**2)) < 0.03 * expected.std()


def random_lora(params, rank=2):
  """An entry for every to_q and to_out_0."""
  tree = {}
  for name, child in params.items():
    if name in ("to_q", "to_out_0"):
      inputs, outputs = child["kernel"].shape
      a, b = draw(inputs, rank, seed=1), draw(rank, outputs, seed=2)
      tree[name] = {"a": 0.3 * a, "b": 0.3 * b}
    elif isinstance(child, dict) and (below := random_lora(child, rank)):
      tree[name] = below
  return tree


def test_adapter_equals_the_fused_weights():
  theirs, ours, inputs = build({}, (4, 4))
  params = params_of(theirs, ours, *inputs)
  lora = random_lora(params)
  adapted = jax.jit(ours.apply)({"params": params, "lora": lora}, *inputs)

  def fuse(params, lora):
    if "a" in lora:
      return {**params, "kernel": params["kernel"] + lora["a"] @ lora["b"]}
    fused = {name: fuse(params[name], below) for name, below in lora.items()}
    return {**params, **fused}

  fused = apply(ours, fuse(params, lora), *inputs)
  assert np.abs(adapted - apply(ours, params, *inputs)).max() > 0.05
  np.testing.assert_allclose(adapted, fused, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def gradient_problem():
  """(module, loss of (module, lora), lora) on the smallest UNet that has all blocks."""
  theirs, ours, inputs = build(CONFIGS["one level, no middle"][0], (8, 8))
  params = params_of(theirs, ours, *inputs)

  def loss(module, lora):
    variables = {"params": params, "lora": lora}
    return jnp.mean(jnp.square(module.apply(variables, *inputs)))

  return ours, loss, random_lora(params)


def test_remat_changes_no_result_and_no_name(gradient_problem):
  ours, loss, lora = gradient_problem
  run = jax.jit(jax.value_and_grad(loss, argnums=1), static_argnums=0)
  plain = run(ours, lora)
  for remat in ("full", "dots"):
    recomputed = run(ours.clone(remat=remat), lora)
    chex.assert_trees_all_close(plain, recomputed, rtol=1e-4, atol=1e-6)


def test_each_remat_mode_stores_less_than_the_one_before(gradient_problem):
  """Counts the bytes the forward pass keeps for the backward pass."""
  ours, loss, lora = gradient_problem

  def stored(remat) -> int:
    module = ours.clone(remat=remat)
    kept = jax.eval_shape(
      lambda lora: jax.vjp(lambda x: loss(module, x), lora)[1], lora
    )
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(kept))

  none, dots, full = map(stored, ("none", "dots", "full"))
  assert none > 1.2 * dots > 1.2 * 1.2 * full, (none, dots, full)


def test_an_unknown_remat_is_refused():
  _, ours, inputs = build({}, (4, 4), remat="some")
  with pytest.raises(InputError, match="remat = 'some'"):
    jax.eval_shape(ours.init, jax.random.key(0), *inputs)


def test_inputs_of_another_model_are_refused():
  ours = UNet2DCondition(freeze(UNET))
  with pytest.raises(InputError, match=r"context with 32 channels.*expects 24"):
    ours.init(
      jax.random.key(0), jnp.zeros((1, 4, 4, 4)), jnp.zeros((1,)), jnp.zeros((1, 2, 32))
    )


def test_sdxl_without_its_added_condition_is_refused():
  _, ours, inputs = build(*CONFIGS["sdxl, text_time and several transformer layers"])
  with pytest.raises(InputError, match="needs added_cond"):
    jax.eval_shape(ours.init, jax.random.key(0), *inputs[:3])
  inputs[3]["text_embeds"] = inputs[3]["text_embeds"][:, :7]
  with pytest.raises(InputError, match=r"gives 43 numbers.*expects 46"):
    jax.eval_shape(ours.init, jax.random.key(0), *inputs)
