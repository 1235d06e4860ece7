"""Each layer computes what its PyTorch twin computes, and adapters add (x a) b."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import downsampling, embeddings, resnet, upsampling

from safetydpo_jax.models import layers
from tests.support.checkpoints import perturb
from tests.support.parity import (
  apply,
  array,
  assert_layers_agree,
  draw,
  params_of,
  tensor,
)


@pytest.mark.parametrize("bias", [True, False])
def test_dense(bias):
  theirs = perturb(torch.nn.Linear(7, 5, bias=bias))
  assert_layers_agree(theirs, layers.Dense(5, bias), draw(2, 3, 7))


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (1, 1), (5, 1), (3, 2)])
def test_conv_of_a_non_square_image(kernel, stride):
  theirs = torch.nn.Conv2d(6, 9, kernel, stride=stride, padding=(kernel - 1) // 2)
  ours = layers.Conv(9, kernel, stride)
  assert_layers_agree(perturb(theirs), ours, draw(2, 5, 8, 6))


@pytest.mark.parametrize("epsilon", [1e-5, 1e-2])
def test_group_norm(epsilon):
  theirs = perturb(torch.nn.GroupNorm(4, 12, eps=epsilon))
  x = draw(3, 5, 7, 12) * np.linspace(0.1, 2, 12, dtype=np.float32)
  assert_layers_agree(theirs, layers.GroupNorm(4, epsilon), x + 0.5)


def test_group_norm_keeps_its_digits_when_the_mean_is_large():
  """mean(x²) − mean(x)² would be wrong by 1e-3 here, and by everything in float16."""
  theirs = perturb(torch.nn.GroupNorm(4, 12)).double()
  ours = layers.GroupNorm(4)
  x = draw(2, 8, 8, 12) + 100
  params = params_of(theirs, ours, x)
  with torch.no_grad():
    expected = array(theirs(tensor(x).double()))
  np.testing.assert_allclose(apply(ours, params, x), expected, rtol=0, atol=5e-5)


def test_layer_norm():
  theirs = perturb(torch.nn.LayerNorm(10, eps=1e-5))
  assert_layers_agree(theirs, layers.LayerNorm(), draw(2, 3, 10) * 3 + 1)


def test_norms_of_bfloat16_are_computed_in_float32():
  x = jnp.asarray(draw(2, 8, 8, 16) * 0.1 + 4, jnp.bfloat16)
  for ours in (layers.GroupNorm(4, dtype=jnp.bfloat16), layers.LayerNorm(1e-5)):
    variables = ours.init(jax.random.key(0), x)
    exact = ours.clone(dtype=jnp.float32).apply(variables, x.astype(jnp.float32))
    got = ours.apply(variables, x)
    # One rounding of the output is 2^-8 relative; statistics in bfloat16 err by 10 %.
    np.testing.assert_allclose(np.float32(got), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dim", [32, 33])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("freq_shift", [0, 1])
def test_timestep_embedding(dim, flip, freq_shift):
  timesteps = np.array([0, 1, 500, 999])
  got = layers.timestep_embedding(
    jnp.asarray(timesteps), dim, flip_sin_to_cos=flip, freq_shift=freq_shift
  )
  expected = embeddings.get_timestep_embedding(
    torch.tensor(timesteps),
    dim,
    flip_sin_to_cos=flip,
    downscale_freq_shift=freq_shift,
  )
  # At t = 999 one unit in the last place of the angle is 6e-5.
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
  np.testing.assert_allclose(got[:2], expected[:2], rtol=0, atol=1e-6)


def test_timestep_embedding_is_float32_whatever_comes_in():
  half = layers.timestep_embedding(jnp.asarray([999.0], jnp.bfloat16), 8)
  assert half.dtype == jnp.float32


def test_timestep_mlp():
  theirs = perturb(embeddings.TimestepEmbedding(8, 20))
  assert_layers_agree(theirs, layers.TimestepEmbedding(20), draw(3, 8))


@pytest.mark.parametrize("features", [8, 12])
def test_resnet_block_with_time(features):
  theirs = resnet.ResnetBlock2D(
    in_channels=8, out_channels=features, temb_channels=10, groups=4, eps=1e-5
  )
  ours = layers.ResnetBlock(features, 4, 1e-5)
  assert_layers_agree(perturb(theirs), ours, draw(2, 5, 3, 8), draw(2, 10, seed=1))


def test_resnet_block_without_time():
  theirs = resnet.ResnetBlock2D(
    in_channels=8, out_channels=12, temb_channels=None, groups=4, eps=1e-6
  )
  ours = layers.ResnetBlock(12, 4, 1e-6)
  inputs = draw(2, 5, 3, 8)
  params = params_of(perturb(theirs), ours, inputs)
  with torch.no_grad():
    expected = array(theirs(tensor(inputs), None))
  np.testing.assert_allclose(apply(ours, params, inputs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [(6, 4), (5, 7)])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_downsample(size, asymmetric):
  theirs = downsampling.Downsample2D(
    6, use_conv=True, padding=0 if asymmetric else 1, name="op"
  )
  ours = layers.Downsample(asymmetric)
  assert_layers_agree(perturb(theirs), ours, draw(2, *size, 6))


@pytest.mark.parametrize("size", [None, (6, 10), (5, 9), (5, 10)])
def test_upsample_to_even_and_odd_sizes(size):
  theirs = perturb(upsampling.Upsample2D(6, use_conv=True))
  ours = layers.Upsample()
  inputs = draw(2, 3, 5, 6)
  params = params_of(theirs, ours, inputs)
  with torch.no_grad():
    expected = array(theirs(tensor(inputs), size))
  np.testing.assert_allclose(
    apply(ours, params, inputs, size=size), expected, rtol=0, atol=1e-5
  )


@pytest.mark.parametrize(
  ("ours", "shape"),
  [(layers.Dense(5), (2, 3, 7)), (layers.Conv(5, 1), (2, 3, 4, 7))],
  ids=["dense", "conv1x1"],
)
def test_an_adapter_adds_its_product(ours, shape):
  x = jnp.asarray(draw(*shape))
  variables = ours.init(jax.random.key(0), x)
  assert set(variables) == {"params"}
  a, b = draw(7, 2, seed=1), draw(2, 5, seed=2)
  plain = ours.apply(variables, x)
  adapted = ours.apply({**variables, "lora": {"a": a, "b": b}}, x)
  np.testing.assert_allclose(adapted - plain, x @ a @ b, rtol=0, atol=1e-5)
  zero = ours.apply({**variables, "lora": {"a": a, "b": 0 * b}}, x)
  np.testing.assert_array_equal(zero, plain)


@pytest.mark.parametrize(
  ("kernel", "options"),
  [
    (3, {}),
    (5, {}),
    (3, {"stride": 2, "padding": ((1, 1), (1, 1))}),
    (3, {"stride": 2, "padding": ((0, 1), (0, 1))}),
  ],
  ids=["3x3", "5x5", "down", "down of the VAE"],
)
def test_a_convolutions_adapter_equals_the_fused_kernel(kernel, options):
  ours, x = layers.Conv(5, kernel, **options), jnp.asarray(draw(2, 8, 6, 7))
  variables = ours.init(jax.random.key(0), x)
  a, b = draw(kernel, kernel, 7, 2, seed=1), draw(2, 5, seed=2)
  adapted = ours.apply({**variables, "lora": {"a": a, "b": b}}, x)
  params = {**variables["params"]}
  params["kernel"] = params["kernel"] + np.einsum("hwir,ro->hwio", a, b)
  expected = ours.apply({"params": params}, x)
  np.testing.assert_allclose(adapted, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
  ("ours", "x", "a"),
  [
    (layers.Dense(5), (3, 4, 7), (7, 2)),
    (layers.Conv(5, 1), (3, 4, 4, 7), (7, 2)),
    (layers.Conv(5, 3), (3, 4, 4, 7), (3, 3, 7, 2)),
  ],
  ids=["dense", "conv1x1", "conv3x3"],
)
def test_dropout_is_of_the_low_rank_input_alone_and_of_each_row_by_its_key(ours, x, a):
  x, a, b = jnp.asarray(draw(*x)), draw(*a, seed=1), draw(2, 5, seed=2)
  variables = ours.init(jax.random.key(0), x)
  keys = jax.random.split(jax.random.key(7), len(x))
  rate = 0.25

  def run(x, keys):
    dropout = {"keys": keys, "rate": jnp.float32(rate)}
    return ours.apply(
      {**variables, "lora": {"a": a, "b": b}, "lora_dropout": dropout}, x
    )

  masks = [np.asarray(jax.random.bernoulli(k, 1 - rate, x.shape[1:])) for k in keys]
  assert 0.5 < np.mean(masks) < 0.95
  low_rank = ours.apply(
    {**variables, "lora": {"a": a, "b": b}}, np.stack(masks) * x / (1 - rate)
  ) - ours.apply(variables, np.stack(masks) * x / (1 - rate))
  expected = ours.apply(variables, x) + low_rank
  np.testing.assert_allclose(run(x, keys), expected, rtol=0, atol=1e-4)
  np.testing.assert_allclose(run(x[1:], keys[1:]), expected[1:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("weights_dtype", [jnp.float32, jnp.bfloat16])
def test_parameters_are_cast_to_the_compute_type_at_use(weights_dtype):
  ours = layers.ResnetBlock(12, 4, 1e-5, jnp.bfloat16)
  inputs = jnp.zeros((1, 4, 4, 8)), jnp.zeros((1, 6))
  variables = jax.eval_shape(ours.init, jax.random.key(0), *inputs)
  assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))
  variables = jax.tree.map(lambda leaf: leaf.update(dtype=weights_dtype), variables)
  assert jax.eval_shape(ours.apply, variables, *inputs).dtype == jnp.bfloat16


def test_quick_gelu_is_not_gelu():
  x = draw(50)
  expected = torch.tensor(x) * torch.sigmoid(1.702 * torch.tensor(x))
  np.testing.assert_allclose(layers.ACTIVATIONS["quick_gelu"](x), expected, atol=1e-6)
  exact = torch.nn.functional.gelu(torch.tensor(x))
  np.testing.assert_allclose(layers.ACTIVATIONS["gelu"](x), exact, atol=1e-6)
