"""Classifier-free guidance, plain and rescaled, against its equations and diffusers."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import (
  StableDiffusionPipeline,
  rescale_noise_cfg,
)

from safetydpo_jax.sampling.guidance import embed_scale, guided


def test_guidance_mixes_the_two_predictions_per_image():
  def prediction(latents, timesteps, context):
    return latents * 0 + context[:, :1, :1, None]

  context = jnp.full((2, 5, 3), 2.0)
  predict = guided(prediction, context, context * 0 + 1, jnp.array([0.0, 3.0]))
  out = predict(jnp.ones((2, 4, 4, 4)), jnp.array(7))
  np.testing.assert_allclose(out[:, 0, 0, 0], [1.0, 4.0])


def test_rescaled_guidance_equals_diffusers():
  rng = np.random.default_rng(0)
  conditional, unconditional = rng.standard_normal((2, 3, 4, 5, 2)).astype(np.float32)
  # Each image has its own deviation.
  conditional *= np.array([1, 2, 3])[:, None, None, None]
  scale = np.array([7.5, 1.0, 3.0], np.float32)

  def prediction(latents, timesteps, context):
    return jnp.concatenate([unconditional, conditional])

  context = jnp.zeros((3, 1, 1))
  ours = guided(prediction, context, context, scale, rescale=0.7)
  theirs = torch.from_numpy(
    unconditional + scale[:, None, None, None] * (conditional - unconditional)
  )
  expected = rescale_noise_cfg(theirs, torch.from_numpy(conditional), 0.7)
  np.testing.assert_allclose(
    ours(jnp.zeros((3, 4, 5, 2)), jnp.array(7)), expected, rtol=0, atol=1e-5
  )


@pytest.mark.parametrize("dim", [6, 256, 257])
def test_the_embedded_scale_equals_diffusers(dim):
  scale = np.array([0.0, 1.0, 7.5], np.float32)
  expected = StableDiffusionPipeline.get_guidance_scale_embedding(
    None, torch.from_numpy(scale) - 1, dim
  )
  # The sines of angles up to 6500 have 2e-4 of rounding in float32.
  np.testing.assert_allclose(embed_scale(scale, dim), expected, rtol=0, atol=1e-3)
