"""The published sizes: parameter counts, and parity with random weights in float32.

Peak memory is 10 GB. Seen on two CPU cores: UNet 3e-6, VAE encoder 4e-6 and decoder
2e-5, text encoders 6e-6, on outputs of order one.
"""

import diffusers
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict

from safetydpo_jax.formats import weights
from safetydpo_jax.formats.pipeline import parameter_shapes
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition
from safetydpo_jax.models.vae import AutoencoderKL
from tests import published
from tests.parity import NETWORK, apply, array, draw, tensor


def count(module) -> int:
  return sum(leaf.size for leaf in flatten_dict(parameter_shapes(module)).values())


@pytest.mark.parametrize(
  ("module", "config", "parameters"),
  [
    (UNet2DCondition, published.SD15_UNET, 859_520_964),
    (UNet2DCondition, published.SD21_UNET, 865_910_724),
    (UNet2DCondition, published.SDXL_UNET, 2_567_463_684),
    (AutoencoderKL, published.SD15_VAE, 83_653_863),
    (CLIPText, published.CLIP_L, 123_060_480),
    (CLIPText, published.CLIP_BIGG, 694_659_840),
  ],
  ids=["sd15 unet", "sd21 unet", "sdxl unet", "vae", "clip-l", "clip-bigg"],
)
def test_parameter_counts(module, config, parameters):
  assert count(module(freeze(config))) == parameters


def convert_and_free(theirs, ours):
  """The weights as our tree; every tensor is given up as soon as it is converted."""
  state = theirs.state_dict()
  theirs.to("meta")
  tensors = ((name, state.pop(name).numpy()) for name in list(state))
  return weights.convert(tensors, parameter_shapes(ours))


def report_and_check(name, got, expected):
  got = np.asarray(got)
  error = np.abs(got - expected).max()
  print(f"{name}: largest difference {error:.1e}, deviation {expected.std():.2f}")
  assert 0.05 < expected.std() < 20
  assert error < NETWORK


@pytest.mark.slow
@pytest.mark.parametrize("size", [(16, 16), (64, 64)])
def test_sd15_unet_equals_diffusers(size):
  torch.manual_seed(0)
  theirs = diffusers.UNet2DConditionModel(**published.SD15_UNET).eval()
  ours = UNet2DCondition(freeze(published.SD15_UNET))
  inputs = draw(1, *size, 4), np.array([801]), draw(1, 77, 768, seed=1)
  with torch.no_grad():
    expected = array(theirs(*map(tensor, inputs)).sample)
  params = convert_and_free(theirs, ours)
  report_and_check(f"UNet {size}", apply(ours, params, *inputs), expected)


@pytest.mark.slow
def test_vae_equals_diffusers():
  torch.manual_seed(0)
  theirs = diffusers.AutoencoderKL(**published.SD15_VAE).eval()
  ours = AutoencoderKL(freeze(published.SD15_VAE))
  images = np.tanh(draw(1, 128, 192, 3))
  with torch.no_grad():
    moments = theirs.encode(tensor(images)).latent_dist.parameters
    decoded = array(theirs.decode(moments[:, :4]).sample)
  moments = array(moments)
  params = convert_and_free(theirs, ours)
  got = apply(ours, params, images, method="encode")
  report_and_check("VAE encoder", got, moments)
  got = apply(ours, params, moments[..., :4], method="decode")
  report_and_check("VAE decoder", got, decoded)


@pytest.mark.slow
@pytest.mark.parametrize("config", [published.CLIP_L, published.CLIP_BIGG])
def test_text_encoders_equal_transformers(config):
  torch.manual_seed(0)
  theirs = getattr(transformers, config["architectures"][0])(
    transformers.CLIPTextConfig(**config)
  ).eval()
  ours = CLIPText(freeze(config))
  ids = np.random.default_rng(0).integers(0, 49407, (2, 77), dtype=np.int32)
  ids[:, 20:] = 49407
  with torch.no_grad():
    expected = theirs(torch.tensor(ids).long(), output_hidden_states=True)
  params = convert_and_free(theirs, ours)
  got = apply(ours, params, ids)
  for name, mine, their in (
    ("last", got.last, expected.last_hidden_state),
    ("penultimate", got.penultimate, expected.hidden_states[-2]),
  ):
    report_and_check(f"CLIP {config['hidden_size']} {name}", mine, their.numpy())
