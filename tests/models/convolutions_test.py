"""LoRAs on convolutions are merged like all others: by products, and by activations."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.merging import activations, baselines, comerge, experts
from safetydpo_jax.models.layers import Conv
from tests.support.parity import draw


def conv_lora(seed, rank=2):
  """A 3×2 kernel of 4 channels to 5, and a dense layer beside it."""
  return {
    "conv1": {"a": draw(3, 2, 4, rank, seed=seed), "b": draw(rank, 5, seed=seed + 50)},
    "to_q": {"a": draw(6, rank, seed=seed + 100), "b": draw(rank, 7, seed=seed + 150)},
  }


def as_dense(tree):
  """The same LoRA with the convolution's kernel as one axis."""
  conv = tree["conv1"]
  matrix = {"a": conv["a"].reshape(-1, conv["a"].shape[-1]), "b": conv["b"]}
  return {**tree, "conv1": matrix}


@pytest.mark.parametrize("method", baselines.METHODS)
def test_every_method_treats_a_kernel_as_one_axis(method):
  loras = [conv_lora(0), conv_lora(1, rank=3)]
  merge = baselines.METHODS[method]
  got = merge(loras, [0.7, 0.3])
  expected = merge([as_dense(tree) for tree in loras], [0.7, 0.3])
  assert got["conv1"]["a"].shape[:3] == (3, 2, 4)
  chex.assert_trees_all_close(as_dense(got), expected, rtol=1e-6)


def measured(trees, winners):
  """Activations under which expert `winners[u]` is the most active in unit u."""

  def units(leaf, n):
    chosen = np.resize(winners, leaf.shape[-1])
    return np.where(chosen == n, 1.0, 0.0)[None].astype(np.float32)

  return [
    jax.tree.map(lambda leaf, n=n: units(leaf, n), t) for n, t in enumerate(trees)
  ]


@pytest.mark.parametrize("method", comerge.METHODS)
def test_co_merge_takes_units_of_convolutions_as_of_dense_layers(method):
  loras = [conv_lora(0), conv_lora(1)]
  merge, found = comerge.METHODS[method].merge, measured(loras, [1, 0])
  got, expected = merge(loras, found), merge([as_dense(x) for x in loras], found)
  assert got["conv1"]["a"].shape[:3] == (3, 2, 4)
  chex.assert_trees_all_close(as_dense(got), expected, rtol=1e-6)
  if method == "co_merge_factor":
    np.testing.assert_array_equal(
      got["conv1"]["a"][..., 0], loras[1]["conv1"]["a"][..., 0]
    )


def test_activations_of_a_convolution_are_what_it_computes():
  """Of stride 2 and uneven padding: the layer's own, as its output shows."""
  ours, x = (
    Conv(5, 3, stride=2, padding=((0, 1), (1, 1))),
    jnp.asarray(draw(2, 8, 6, 4)),
  )
  params = ours.init(jax.random.key(0), x)["params"]
  a, b = draw(3, 3, 4, 2, seed=1), draw(2, 5, seed=2)
  variables = {"params": params, "lora": {"a": a, "b": b}}
  with nn.intercept_methods(activations._capture):
    out, state = ours.apply(variables, x, mutable=[activations.COLLECTION])
  low_rank = out - ours.apply({"params": params}, x)
  found = state[activations.COLLECTION]
  np.testing.assert_allclose(found["b"], jnp.abs(low_rank).mean((1, 2)), rtol=1e-4)
  hidden = ours.clone(features=2, use_bias=False).apply({"params": {"kernel": a}}, x)
  np.testing.assert_allclose(found["a"], jnp.abs(hidden).mean((1, 2)), rtol=1e-4)


def test_experts_with_convolutions_are_loras_and_other_shapes_are_not():
  experts.check_is_lora("some", conv_lora(0))
  broken = conv_lora(0)
  broken["conv1"]["a"] = broken["conv1"]["a"][0]
  with pytest.raises(InputError, match="conv1 is not a LoRA layer"):
    experts.check_is_lora("some", broken)
