"""The Inception network of the Fréchet Inception distance, up to its pooled features.

Inception v3 as TensorFlow published it on 2015-12-05, with the weights as converted by
pytorch-fid. Unlike the textbook network, average pooling leaves the padding out of its
mean, and the last block pools by maximum. Names are torchvision's.

A block is a list of parallel branches, a branch a list of layers; layers in inner
parentheses are parallel as well. Each layer is a convolution, a normalisation with
stored mean and variance (epsilon 1e-3) and a relu. Pooling comes last in a block.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from safetydpo_jax.errors import InputError
from safetydpo_jax.formats import pickles
from safetydpo_jax.formats.base_model import weights

SIZE = 299  # pixels per side
FEATURES = 2048


class Layer(NamedTuple):
  """A convolution: `stride` 1 keeps the size unless `padding` is VALID."""

  name: str
  features: int
  kernel: tuple[int, int] = (1, 1)
  stride: int = 1
  padding: str = "SAME"


def _reduce(name: str, features: int) -> Layer:
  return Layer(name, features, (3, 3), 2, "VALID")


_ROW, _COLUMN = (1, 7), (7, 1)


def _block_a() -> tuple:
  return (
    (Layer("branch1x1", 64),),
    (Layer("branch5x5_1", 48), Layer("branch5x5_2", 64, (5, 5))),
    (
      Layer("branch3x3dbl_1", 64),
      Layer("branch3x3dbl_2", 96, (3, 3)),
      Layer("branch3x3dbl_3", 96, (3, 3)),
    ),
  )


def _block_c(width: int) -> tuple:
  return (
    (Layer("branch1x1", 192),),
    (
      Layer("branch7x7_1", width),
      Layer("branch7x7_2", width, _ROW),
      Layer("branch7x7_3", 192, _COLUMN),
    ),
    (
      Layer("branch7x7dbl_1", width),
      Layer("branch7x7dbl_2", width, _COLUMN),
      Layer("branch7x7dbl_3", width, _ROW),
      Layer("branch7x7dbl_4", width, _COLUMN),
      Layer("branch7x7dbl_5", 192, _ROW),
    ),
  )


def _block_e() -> tuple:
  return (
    (Layer("branch1x1", 320),),
    (
      Layer("branch3x3_1", 384),
      (Layer("branch3x3_2a", 384, (1, 3)), Layer("branch3x3_2b", 384, (3, 1))),
    ),
    (
      Layer("branch3x3dbl_1", 448),
      Layer("branch3x3dbl_2", 384, (3, 3)),
      (Layer("branch3x3dbl_3a", 384, (1, 3)), Layer("branch3x3dbl_3b", 384, (3, 1))),
    ),
  )


_BLOCK_B = (
  (_reduce("branch3x3", 384),),
  (
    Layer("branch3x3dbl_1", 64),
    Layer("branch3x3dbl_2", 96, (3, 3)),
    _reduce("branch3x3dbl_3", 96),
  ),
)
_BLOCK_D = (
  (Layer("branch3x3_1", 192), _reduce("branch3x3_2", 320)),
  (
    Layer("branch7x7x3_1", 192),
    Layer("branch7x7x3_2", 192, _ROW),
    Layer("branch7x7x3_3", 192, _COLUMN),
    _reduce("branch7x7x3_4", 192),
  ),
)

STEM = (
  Layer("Conv2d_1a_3x3", 32, (3, 3), 2, "VALID"),
  Layer("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID"),
  Layer("Conv2d_2b_3x3", 64, (3, 3)),
  "maximum",
  Layer("Conv2d_3b_1x1", 80),
  Layer("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"),
  "maximum",
)
# (name, branches, pool, features of the pool's convolution or None for a reduction)
BLOCKS = (
  ("Mixed_5b", _block_a(), "mean", 32),
  ("Mixed_5c", _block_a(), "mean", 64),
  ("Mixed_5d", _block_a(), "mean", 64),
  ("Mixed_6a", _BLOCK_B, "maximum", None),
  ("Mixed_6b", _block_c(128), "mean", 192),
  ("Mixed_6c", _block_c(160), "mean", 192),
  ("Mixed_6d", _block_c(160), "mean", 192),
  ("Mixed_6e", _block_c(192), "mean", 192),
  ("Mixed_7a", _BLOCK_D, "maximum", None),
  ("Mixed_7b", _block_e(), "mean", 192),
  ("Mixed_7c", _block_e(), "maximum", 192),
)


class StoredNorm(nn.Module):
  """(x - running_mean) / √(running_var + 1e-3) · scale + bias, (..., c) → same."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1],)
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    variance = self.param("running_var", ones, shape)
    multiplier = self.param("scale", ones, shape) * jax.lax.rsqrt(variance + 1e-3)
    mean = self.param("running_mean", zeros, shape)
    shift = self.param("bias", zeros, shape) - mean * multiplier
    return x * multiplier[None, None, None] + shift[None, None, None]


class ConvNorm(nn.Module):
  """One layer, (n, h, w, in) → (n, h', w', features)."""

  layer: Layer

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    _, features, kernel, stride, padding = self.layer
    conv = nn.Conv(
      features, kernel, (stride, stride), padding, use_bias=False, name="conv"
    )
    return nn.relu(StoredNorm(name="bn")(conv(x)))


class Mixed(nn.Module):
  """A block, (n, h, w, in) → (n, h', w', out)."""

  branches: tuple
  pool: str
  pool_features: int | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    outputs = []
    for branch in self.branches:
      y = x
      for step in branch:
        if isinstance(step, Layer):
          y = ConvNorm(step, name=step.name)(y)
        else:
          sides = [ConvNorm(layer, name=layer.name)(y) for layer in step]
          y = jnp.concatenate(sides, axis=-1)
      outputs.append(y)
    if self.pool_features is None:
      outputs.append(nn.max_pool(x, (3, 3), (2, 2)))
    else:
      if self.pool == "mean":
        x = nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)
      else:
        x = nn.max_pool(x, (3, 3), (1, 1), "SAME")
      layer = Layer("branch_pool", self.pool_features)
      outputs.append(ConvNorm(layer, name=layer.name)(x))
    return jnp.concatenate(outputs, axis=-1)


class Inception(nn.Module):
  """RGB in [0, 1], (n, 299, 299, 3) → (n, 2048) float32."""

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    x = 2 * images - 1
    for layer in STEM:
      if isinstance(layer, str):  # "maximum"
        x = nn.max_pool(x, (3, 3), (2, 2))
      else:
        x = ConvNorm(layer, name=layer.name)(x)
    for name, branches, pool, features in BLOCKS:
      x = Mixed(branches, pool, features, name=name)(x)
    return x.mean((1, 2))


def read_weights(file: Path) -> dict[str, Any]:
  """The parameter tree of a state dict, .pth or .safetensors, without the classifier.

  Raises:
    InputError: the file is damaged, or belongs to another network.
  """
  if file.suffix == ".safetensors":
    tensors = dict(weights.read_tensors([file]))
  else:
    tensors = pickles.read_tensors(file)
  example = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
  shapes = jax.eval_shape(Inception().init, jax.random.key(0), example)["params"]
  used = (
    # `weights` reads a number at a name's end as an index: branch5x5_1 as branch5x5.1.
    (re.sub(r"\.(branch\w+)_(\d)\.", r".\1.\2.", name), tensor)
    for name, tensor in tensors.items()
    if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
  )
  params = weights.convert(used, shapes, dtype=np.float32, source=str(file))
  if min(leaf.min() for leaf in _variances(params)) < 0:
    raise InputError(f"{file} has a negative variance; fetch it again")
  return params


def _variances(params: dict) -> list[np.ndarray]:
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return [leaf for path, leaf in leaves if path[-1].key == "running_var"]
