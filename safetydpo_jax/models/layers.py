"""Layers of Stable Diffusion's networks, NHWC, with PyTorch's parameter names.

Parameters may arrive in any float type; they are cast to the compute `dtype` at use.
Statistics of the norms and the timestep sinusoid are always computed in float32.

Low-rank adapters. A `Dense` or `Conv` whose path has an entry {'a', 'b'} in the 'lora'
collection computes

    y = x W + bias + (d(x) a) b     b: (r, out), the scale folded in

and without that entry y = x W + bias, so `apply({'params': p, 'lora': lora}, ...)` is
the policy and `apply({'params': p}, ...)` the reference. `a` is (in, r); for a kernel
larger than 1×1 it is (kh, kw, in, r), a convolution with the layer's own stride and
padding, and b stays 1×1. This is PEFT's form of both.

d is the identity, or dropout where the layer has an entry {'keys', 'rate'} in the
'lora_dropout' collection: a key for each row of x, so that a row's mask depends on
neither the batch nor the devices around it.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

Dtype = Any

_kernel_init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def quick_gelu(x: jax.Array) -> jax.Array:
  """x · sigmoid(1.702 x), the gelu of OpenAI's CLIP."""
  return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "quick_gelu": quick_gelu,
  "gelu": partial(jax.nn.gelu, approximate=False),
}


def timestep_embedding(
  timesteps: jax.Array,
  dim: int,
  *,
  flip_sin_to_cos: bool = True,
  freq_shift: float = 0,
) -> jax.Array:
  """Sinusoidal embedding: [sin(t ω_i), cos(t ω_i)], ω_i = 10000^(-i / (dim/2 - shift)).

  Args:
    timesteps: (n,), any number type.
    dim: size of the embedding; an odd one is padded with a zero.
    flip_sin_to_cos: put the cosines first.
    freq_shift: `shift` in the formula.

  Returns:
    (n, dim) float32.
  """
  chex.assert_rank(timesteps, 1)
  half = dim // 2
  exponent = jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
  frequencies = jnp.exp(-math.log(10000) * exponent)
  angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None, :]
  waves = [jnp.sin(angles), jnp.cos(angles)]
  embedding = jnp.concatenate(waves[::-1] if flip_sin_to_cos else waves, axis=-1)
  return jnp.pad(embedding, ((0, 0), (0, dim % 2)))


def low_rank_input(
  module: nn.Module, x: jax.Array, a: jax.Array, precision: str | None = None
) -> jax.Array:
  """x a, the first half of an adapter: (n, …, in) → (n, …, r), strided as `module`."""
  if a.ndim == 2:
    return jnp.dot(x, a, precision=precision)
  return module.convolve(x, a, precision)


def _adapt(module: nn.Module, x: jax.Array, y: jax.Array) -> jax.Array:
  """y + (d(x) a) b if the module has a low-rank entry, else y."""
  if not module.has_variable("lora", "a"):
    return y
  a = jnp.asarray(module.get_variable("lora", "a"), y.dtype)
  b = jnp.asarray(module.get_variable("lora", "b"), y.dtype)
  if module.has_variable("lora_dropout", "keys"):
    rate = module.get_variable("lora_dropout", "rate")
    x = _drop(module.get_variable("lora_dropout", "keys"), rate, x)
  return y + jnp.dot(low_rank_input(module, x, a), b)


def _drop(keys: jax.Array, rate: jax.Array, x: jax.Array) -> jax.Array:
  """x (n, …) with each entry kept with probability 1 − rate and divided by it."""
  chex.assert_shape(keys, x.shape[:1])
  kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[1:]))(keys)
  return jnp.where(kept, x / (1.0 - rate).astype(x.dtype), jnp.zeros((), x.dtype))


class Dense(nn.Module):
  """(..., in) → (..., features), with an optional low-rank addition (see above)."""

  features: int
  use_bias: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    kernel = self.param("kernel", _kernel_init, (x.shape[-1], self.features))
    x = x.astype(self.dtype)
    y = jnp.dot(x, jnp.asarray(kernel, self.dtype))
    if self.use_bias:
      y += _row(self.param("bias", nn.initializers.zeros, (self.features,)), y)
    return _adapt(self, x, y)


class Conv(nn.Module):
  """(n, h, w, in) → (n, h', w', features); kernel (kh, kw, in, features).

  `padding` is ((top, bottom), (left, right)), by default half the kernel, which keeps
  the size of an unstrided convolution.
  """

  features: int
  kernel_size: int = 3
  stride: int = 1
  padding: tuple[tuple[int, int], tuple[int, int]] | None = None
  use_bias: bool = True
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    size = self.kernel_size
    shape = (size, size, x.shape[-1], self.features)
    kernel = jnp.asarray(self.param("kernel", _kernel_init, shape), self.dtype)
    x = x.astype(self.dtype)
    y = jnp.dot(x, kernel[0, 0]) if size == 1 else self.convolve(x, kernel)
    if self.use_bias:
      y += _row(self.param("bias", nn.initializers.zeros, (self.features,)), y)
    return _adapt(self, x, y)

  @nn.nowrap
  def convolve(
    self, x: jax.Array, kernel: jax.Array, precision: str | None = None
  ) -> jax.Array:
    """x (n, h, w, in) with any kernel (kh, kw, in, out), in this layer's geometry."""
    return jax.lax.conv_general_dilated(
      x,
      kernel,
      window_strides=(self.stride, self.stride),
      padding=self.padding or (((self.kernel_size - 1) // 2,) * 2,) * 2,
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      precision=precision,
    )


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
  """Shapes (c,) to broadcast against (..., c), in the type of `like`."""
  return jnp.asarray(vector, like.dtype).reshape((1,) * (like.ndim - 1) + (-1,))


class GroupNorm(nn.Module):
  """Group normalisation over (h, w, channels of a group); (n, h, w, c) → same.

  Sums are taken per channel and joined per group on (n, c) arrays: the image is read
  once and never reshaped, which on TPU would split the lane dimension. A variance from
  sums of squares cancels when the mean is large (activations of the VAE reach means of
  30 standard deviations), so values are first shifted by one pixel's group mean.
  """

  groups: int
  epsilon: float = 1e-5
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    chex.assert_rank(x, 4)
    n, _, _, c = x.shape
    scale = self.param("scale", nn.initializers.ones, (c,))
    bias = self.param("bias", nn.initializers.zeros, (c,))

    def join(per_channel: jax.Array) -> jax.Array:  # (n, c) → (n, 1, 1, c)
      joined = per_channel.reshape(n, self.groups, c // self.groups).mean(2)
      return jnp.repeat(joined, c // self.groups, axis=1)[:, None, None, :]

    x = x.astype(jnp.float32)
    shift = jax.lax.stop_gradient(join(x[:, 0, 0, :]))
    x -= shift
    mean = join(x.mean((1, 2)))
    variance = jnp.maximum(join(jnp.square(x).mean((1, 2))) - jnp.square(mean), 0.0)
    multiplier = jax.lax.rsqrt(variance + self.epsilon) * _row(scale, x)
    return ((x - mean) * multiplier + _row(bias, x)).astype(self.dtype)


class LayerNorm(nn.Module):
  """Normalisation over the last axis, (..., c) → same."""

  epsilon: float = 1e-5
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
    bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
    x = x.astype(jnp.float32)
    x -= x.mean(-1, keepdims=True)
    variance = jnp.square(x).mean(-1, keepdims=True)
    y = x * jax.lax.rsqrt(variance + self.epsilon) * _row(scale, x) + _row(bias, x)
    return y.astype(self.dtype)


class Embedding(nn.Module):
  """Table look-up, (...) int → (..., features)."""

  entries: int
  features: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, ids: jax.Array) -> jax.Array:
    shape = (self.entries, self.features)
    table = self.param("embedding", nn.initializers.normal(0.02), shape)
    return jnp.take(jnp.asarray(table, self.dtype), ids, axis=0)


class TimestepEmbedding(nn.Module):
  """linear_2(silu(linear_1(x [+ cond_proj(condition)]))), (n, in) → (n, features).

  `condition` is (n, c) or None.
  """

  features: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, condition: jax.Array | None = None) -> jax.Array:
    if condition is not None:
      x = x.astype(self.dtype) + Dense(
        x.shape[-1], use_bias=False, dtype=self.dtype, name="cond_proj"
      )(condition)
    x = Dense(self.features, dtype=self.dtype, name="linear_1")(x)
    return Dense(self.features, dtype=self.dtype, name="linear_2")(jax.nn.silu(x))


class ResnetBlock(nn.Module):
  """Two normalised convolutions around an identity or 1×1 shortcut.

  (n, h, w, in), time embedding (n, e) or None → (n, h, w, features).
  """

  features: int
  groups: int
  epsilon: float
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, time: jax.Array | None = None) -> jax.Array:
    norm = partial(GroupNorm, self.groups, self.epsilon, self.dtype)
    h = jax.nn.silu(norm(name="norm1")(x))
    h = Conv(self.features, dtype=self.dtype, name="conv1")(h)
    if time is not None:
      shift = Dense(self.features, dtype=self.dtype, name="time_emb_proj")
      h += shift(jax.nn.silu(time))[:, None, None, :]
    h = jax.nn.silu(norm(name="norm2")(h))
    h = Conv(self.features, dtype=self.dtype, name="conv2")(h)
    if x.shape[-1] != self.features:
      x = Conv(self.features, 1, dtype=self.dtype, name="conv_shortcut")(x)
    return x.astype(self.dtype) + h


class Downsample(nn.Module):
  """3×3 convolution of stride 2, (n, h, w, c) → (n, ⌈h/2⌉, ⌈w/2⌉, c).

  The VAE pads only below and at the right (`asymmetric`), giving ⌊h/2⌋ and ⌊w/2⌋.
  """

  asymmetric: bool = False
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    padding = ((0, 1), (0, 1)) if self.asymmetric else ((1, 1), (1, 1))
    conv = Conv(x.shape[-1], stride=2, padding=padding, dtype=self.dtype, name="conv")
    return conv(x)


class Upsample(nn.Module):
  """Nearest neighbour ×2, then a 3×3 convolution.

  `size` (h', w') crops the enlarged image, for levels whose size was odd. That equals
  PyTorch's interpolation to it, since ⌊i · h / (2h - 1)⌋ = ⌊i / 2⌋ for i < 2h - 1.
  """

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, size: tuple[int, int] | None = None) -> jax.Array:
    n, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (n, h, 2, w, 2, c))
    x = x.reshape(n, 2 * h, 2 * w, c)
    if size is not None:
      x = x[:, : size[0], : size[1], :]
    return Conv(c, dtype=self.dtype, name="conv")(x)
