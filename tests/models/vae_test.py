"""The autoencoder equals diffusers' on odd configurations, in both directions."""

import inspect

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from safetydpo_jax.errors import InputError
from safetydpo_jax.models import vae
from safetydpo_jax.models.config import freeze
from tests.support.checkpoints import VAE, perturb
from tests.support.parity import NETWORK, apply, array, draw, params_of, tensor


def levels(*channels):
  return {
    "block_out_channels": channels,
    "down_block_types": ("DownEncoderBlock2D",) * len(channels),
    "up_block_types": ("UpDecoderBlock2D",) * len(channels),
  }


# name → (config over the tiny checkpoint's, image size)
CONFIGS = {
  "two levels, a non-square image": ({}, (12, 18)),
  "three levels, sizes that do not divide": (
    {**levels(8, 16, 24), "layers_per_block": 2, "norm_num_groups": 4},
    (13, 22),
  ),
  "one level, sixteen channels": (
    {**levels(16), "latent_channels": 16, "scaling_factor": 1.5},
    (5, 6),
  ),
  "grey images, no attention, no quantisation layers": (
    {
      "in_channels": 1,
      "out_channels": 1,
      "mid_block_add_attention": False,
      "use_quant_conv": False,
      "use_post_quant_conv": False,
    },
    (8, 8),
  ),
}


def build(overrides):
  theirs = perturb(diffusers.AutoencoderKL(**{**VAE, **overrides}))
  return theirs, vae.AutoencoderKL(freeze(dict(theirs.config)))


@pytest.mark.parametrize("name", CONFIGS)
def test_equals_diffusers(name):
  overrides, size = CONFIGS[name]
  theirs, ours = build(overrides)
  images = np.tanh(draw(2, *size, theirs.config.in_channels))
  params = params_of(theirs, ours, images)
  with torch.no_grad():
    posterior = theirs.encode(tensor(images)).latent_dist
    decoded = theirs.decode(posterior.mean).sample
  # diffusers clips logvar inside the posterior; `parameters` are the moments as made.
  moments = array(posterior.parameters)
  assert 0.1 < moments.std() < 10
  got = apply(ours, params, images, method="encode")
  np.testing.assert_allclose(got, moments, rtol=0, atol=NETWORK)
  mean = array(posterior.mean)
  got = apply(ours, params, mean, method="decode")
  np.testing.assert_allclose(got, array(decoded), rtol=0, atol=NETWORK)


@pytest.mark.parametrize("name", CONFIGS)
def test_pixels_per_latent_is_the_ratio_of_sizes(name):
  _, ours = build(CONFIGS[name][0])
  scale = vae.pixels_per_latent(ours.config)
  channels = vae.read_config(ours.config).in_channels
  images = jnp.zeros((1, 4 * scale, 8 * scale, channels))
  variables = jax.eval_shape(ours.init, jax.random.key(0), images)

  def encode(variables, images):
    return ours.apply(variables, images, method="encode")

  assert jax.eval_shape(encode, variables, images).shape[1:3] == (4, 8)


def test_bfloat16_returns_float32_near_float32():
  theirs, ours = build({})
  images = np.tanh(draw(1, 16, 16, 3))
  params = params_of(theirs, ours, images)
  exact = apply(ours, params, images, method="encode")
  half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
  got = apply(ours.clone(dtype=jnp.bfloat16), half, images, method="encode")
  assert got.dtype == jnp.float32
  assert np.sqrt(np.mean((got - exact) ** 2)) < 0.03 * exact.std()


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("down_block_types", ("DownEncoderBlock2D", "AttnDownEncoderBlock2D")),
    ("up_block_types", ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")),
    ("down_block_types", ("DownEncoderBlock2D",)),
    ("act_fn", "gelu"),
    ("shift_factor", 0.06),
    ("latents_mean", (0.1, 0.2, 0.3, 0.4)),
    ("a_field_of_tomorrow", 3),
  ],
)
def test_a_config_we_lack_is_refused_by_name(field, value):
  with pytest.raises(InputError, match=field):
    vae.read_config(freeze({**VAE, field: value}))


def test_every_parameter_of_diffusers_class_is_read_refused_or_neutral():
  """At diffusers' default a field is read, or changes nothing."""
  parameters = inspect.signature(diffusers.AutoencoderKL.__init__).parameters
  theirs = {key: p.default for key, p in parameters.items() if key != "self"}
  for field, default in theirs.items():
    if field in vae.DEFAULTS:
      assert vae.DEFAULTS[field] == default, field
    elif field not in vae.IGNORED:
      assert default in vae.ACCEPTED.get(field, (None, False)), field
  assert {*vae.DEFAULTS, *vae.ACCEPTED} <= {*theirs}
  assert set(vae.IGNORED) & {*theirs} == {"sample_size", "force_upcast"}


def test_how_weights_were_averaged_is_no_matter():
  vae.read_config(freeze({**VAE, "decay": 0.9999, "optimization_step": 7}))
