"""The parameters of a network, from its config alone: shapes and PyTorch names."""

import functools

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from safetydpo_jax.formats.base_model.weights import torch_name
from safetydpo_jax.models import vae
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.unet import UNet2DCondition, example_inputs
from safetydpo_jax.models.vae import AutoencoderKL

Module = UNet2DCondition | AutoencoderKL | CLIPText


@functools.lru_cache(maxsize=128)
def parameter_shapes(module: Module) -> dict:
  """A module's parameter tree as `jax.ShapeDtypeStruct`; nothing is computed."""
  if isinstance(module, UNet2DCondition):
    inputs = example_inputs(module.config)
  elif isinstance(module, AutoencoderKL):
    side = vae.pixels_per_latent(module.config)
    channels = vae.read_config(module.config).in_channels
    inputs = (jnp.zeros((1, side, side, channels)),)
  else:
    inputs = (jnp.zeros((1, 2), jnp.int32),)
  return jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]


def torch_names(module: Module) -> list[str]:
  """PyTorch's dotted names of a module's parameters, without `text_model.`."""
  return [torch_name(path) for path in flatten_dict(parameter_shapes(module))]
