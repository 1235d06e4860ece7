"""Attention and the transformer blocks equal diffusers', on every kernel choice."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models import attention as theirs_attention
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from safetydpo_jax.errors import InputError
from safetydpo_jax.models import attention
from tests.support.checkpoints import perturb
from tests.support.parity import (
  apply,
  array,
  assert_layers_agree,
  draw,
  params_of,
  tensor,
)


@pytest.mark.parametrize(
  ("length", "other", "causal"), [(6, 6, False), (6, 6, True), (5, 9, False)]
)
def test_attend_is_softmax_attention(length, other, causal):
  q, k, v = (draw(2, n, 3, 8, seed=i) for i, n in enumerate((length, other, other)))
  logits = np.einsum("nlhd,nmhd->nhlm", q, k) / np.sqrt(8)
  if causal:
    logits = np.where(np.tri(length, dtype=bool), logits, -np.inf)
  share = np.exp(logits - logits.max(-1, keepdims=True))
  share /= share.sum(-1, keepdims=True)
  expected = np.einsum("nhlm,nmhd->nlhd", share, v)
  got = attention.attend(*map(jnp.asarray, (q, k, v)), causal=causal)
  np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)


def test_softmax_of_bfloat16_is_taken_in_float32():
  """With logits of a few hundred, bfloat16 cannot tell neighbours apart."""
  q = jnp.full((1, 1, 1, 64), 16, jnp.bfloat16)
  k = jnp.stack([jnp.full((1, 1, 64), 2.0), jnp.full((1, 1, 64), 2.0)], axis=1)
  k = k.at[0, 1, 0, 0].add(0.25).astype(jnp.bfloat16)  # logits 256 and 256.5
  v = jnp.asarray([0.0, 1.0], jnp.bfloat16).reshape(1, 2, 1, 1)
  v = jnp.broadcast_to(v, (1, 2, 1, 64))
  got = attention.attend(q, k, v)
  expected = 1 / (1 + np.exp(-0.5))
  np.testing.assert_allclose(np.float32(got), expected, rtol=5e-3)


@pytest.mark.parametrize(
  ("backend", "dtype", "head", "length", "other", "kernel"),
  [
    ("gpu", jnp.bfloat16, 40, 4096, 4096, "cudnn"),
    ("gpu", jnp.float16, 64, 4096, 77, "cudnn"),
    ("gpu", jnp.bfloat16, 160, 4096, 4096, "xla"),  # too wide before Hopper
    ("gpu", jnp.bfloat16, 12, 4096, 4096, "xla"),  # no multiple of 8
    ("gpu", jnp.bfloat16, 64, 16, 16, "xla"),  # tiny
    ("gpu", jnp.float32, 40, 4096, 4096, "xla"),
    ("cpu", jnp.bfloat16, 40, 4096, 4096, "xla"),
    ("tpu", jnp.bfloat16, 40, 4096, 4096, "splash"),
    ("tpu", jnp.bfloat16, 160, 1024, 1024, "splash"),
    ("tpu", jnp.bfloat16, 64, 9216, 9216, "splash"),
    ("tpu", jnp.bfloat16, 40, 4096, 77, "xla"),  # the text
    ("tpu", jnp.bfloat16, 160, 256, 256, "xla"),  # small
    ("tpu", jnp.bfloat16, 40, 1100, 1100, "xla"),  # no whole blocks
    ("tpu", jnp.float32, 40, 4096, 4096, "xla"),  # the kernel multiplies in bfloat16
  ],
)
def test_auto_takes_fused_kernels_only_where_they_run(
  backend, dtype, head, length, other, kernel
):
  q = jax.ShapeDtypeStruct((2, length, 8, head), dtype)
  k = jax.ShapeDtypeStruct((2, other, 8, head), dtype)
  assert attention.choose_kernel(q, k, backend) == kernel


def test_an_unknown_kernel_is_refused():
  q = jnp.zeros((1, 2, 1, 8))
  with pytest.raises(InputError, match="'flash' is unknown"):
    attention.attend(q, q, q, kernel="flash")


def test_self_attention():
  theirs = perturb(Attention(12, heads=3, dim_head=4))
  assert_layers_agree(theirs, attention.Attention(3), draw(2, 7, 12))


def test_cross_attention():
  theirs = perturb(Attention(12, cross_attention_dim=10, heads=2, dim_head=6))
  assert_layers_agree(
    theirs, attention.Attention(2), draw(2, 7, 12), draw(2, 5, 10, seed=1)
  )


def test_geglu_uses_the_exact_gelu():
  assert_layers_agree(
    perturb(GEGLU(6, 9)), attention.GEGLU(9), draw(2, 5, 6), tolerance=2e-6
  )


def test_feed_forward():
  theirs = perturb(theirs_attention.FeedForward(8, activation_fn="geglu"))
  assert_layers_agree(theirs, attention.FeedForward(), draw(2, 5, 8))


def test_transformer_block():
  theirs = theirs_attention.BasicTransformerBlock(
    12, 3, 4, cross_attention_dim=10, activation_fn="geglu"
  )
  x, context = draw(2, 7, 12), draw(2, 5, 10, seed=1)
  ours = attention.TransformerBlock(3)
  params = params_of(perturb(theirs), ours, x, context)
  with torch.no_grad():
    expected = theirs(tensor(x), encoder_hidden_states=tensor(context))
  np.testing.assert_allclose(
    apply(ours, params, x, context), expected, rtol=0, atol=1e-5
  )


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_transformer_over_a_non_square_image(linear, layers):
  theirs = Transformer2DModel(
    2,
    8,
    in_channels=16,
    num_layers=layers,
    norm_num_groups=4,
    cross_attention_dim=10,
    use_linear_projection=linear,
  )
  x, context = draw(2, 3, 5, 16), draw(2, 6, 10, seed=1)
  ours = attention.Transformer2D(2, layers, 4, linear)
  params = params_of(perturb(theirs), ours, x, context)
  with torch.no_grad():
    expected = array(theirs(tensor(x), tensor(context)).sample)
  np.testing.assert_allclose(
    apply(ours, params, x, context), expected, rtol=0, atol=1e-5
  )


@pytest.mark.parametrize(("length", "kept"), [(1024, False), (64, True)])
def test_large_attention_matrices_are_not_kept_for_the_backward_pass(length, kept):
  shape = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
  _, backward = jax.eval_shape(
    lambda *inputs: jax.vjp(partial(attention.attend, kernel="xla"), *inputs),
    *[shape] * 3,
  )
  matrix = 2 * length * length
  assert any(leaf.size >= matrix for leaf in jax.tree.leaves(backward)) == kept
