"""Comparing a Flax module with its PyTorch twin on the same random weights."""

import functools

import jax
import numpy as np
import torch

from safetydpo_jax.formats.base_model import weights

LAYER = 1e-5  # largest absolute difference allowed in one layer, float32 on CPU
NETWORK = 1e-4  # and in a network, on outputs of order one


def array(tensor: torch.Tensor) -> np.ndarray:
  """A tensor as numpy; images (n, c, h, w) become (n, h, w, c)."""
  tensor = tensor.detach()
  return (tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor).numpy()


def tensor(values: np.ndarray) -> torch.Tensor:
  """The inverse of `array`."""
  made = torch.from_numpy(np.array(values))
  return made.permute(0, 3, 1, 2) if made.ndim == 4 else made


def draw(*shape: int, seed: int = 0) -> np.ndarray:
  """Standard normal float32."""
  return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def params_of(theirs: torch.nn.Module, ours, *inputs, **options) -> dict:
  """The PyTorch module's weights as our module's parameter tree."""
  shapes = jax.eval_shape(
    lambda *inputs: ours.init(jax.random.key(0), *inputs, **options), *inputs
  )["params"]
  tensors = ((name, value.numpy()) for name, value in theirs.state_dict().items())
  return weights.convert(tensors, shapes)


def apply(ours, params, *inputs, **options):
  """`ours.apply` under jit."""
  return _apply(ours, tuple(options.items()), params, *inputs)


@functools.partial(jax.jit, static_argnums=(0, 1))  # one program for equal modules
def _apply(ours, options, params, *inputs):
  return ours.apply({"params": params}, *inputs, **dict(options))


def assert_layers_agree(theirs, ours, *inputs: np.ndarray, tolerance=LAYER):
  """Both modules, with the PyTorch module's weights, give the same output."""
  params = params_of(theirs, ours, *inputs)
  with torch.no_grad():
    expected = array(theirs(*map(tensor, inputs)))
  assert expected.std() > 0.05, "an output near zero would agree with anything"
  np.testing.assert_allclose(
    apply(ours, params, *inputs), expected, rtol=0, atol=tolerance
  )


def assert_same_params(one, other):
  """Two parameter trees have the same names and, bit for bit, the same numbers."""
  ours, theirs = jax.tree.flatten(one), jax.tree.flatten(other)
  assert ours[1] == theirs[1]
  for a, b in zip(ours[0], theirs[0]):
    np.testing.assert_array_equal(a, b)
