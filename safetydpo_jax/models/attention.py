"""Attention and the transformer blocks of Stable Diffusion's UNet.

    attend(q, k, v) = softmax(q kᵀ / √d) v                                       (1)
    block(x):  x += attn1(norm1(x))                    self attention
               x += attn2(norm2(x), context)           cross attention           (2)
               x += ff(norm3(x)),  ff(x) = (u · gelu(g)) W,  [u, g] = x P        (3)

The gelu of (3) is the exact one. Products are summed and the softmax is taken in
float32 whatever the compute type, which is what diffusers' `upcast_attention` asks for.
"""

from collections.abc import Callable
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from safetydpo_jax.errors import InputError
from safetydpo_jax.models import flash
from safetydpo_jax.models.flash import OnMesh
from safetydpo_jax.models.layers import Conv, Dense, Dtype, GroupNorm, LayerNorm

KERNELS = ("auto", "xla", "cudnn", "splash")

# XLA keeps the (l, m) matrix of every head for the backward pass. From this size on it
# is recomputed there instead, for 3 % more arithmetic in a step of SD1.5 at 512.
RECOMPUTE_FROM = 1024 * 1024
# Shortest sequence for the TPU's kernel: 32 × 32 latents. Below that XLA's matrices are
# small, and 77 tokens of text do not fill a block.
SPLASH_FROM = 1024


def choose_kernel(q: jax.Array, k: jax.Array, backend: str) -> str:
  """The fastest kernel that computes (1) for these shapes and this backend.

  cuDNN's fused attention takes 16-bit types and head sizes that are multiples of 8 up
  to 128, TPU's splash attention lengths that are multiples of 128. They keep no (l, m)
  matrix in memory, so small products stay with XLA; and so does float32 on TPU, which
  the kernel would multiply in bfloat16.
  """
  head = q.shape[-1]
  if (
    backend == "tpu"
    and q.dtype == jnp.bfloat16
    and min(q.shape[1], k.shape[1]) >= SPLASH_FROM
    and flash.takes(q.shape[1], k.shape[1], head)
  ):
    return "splash"
  fits = (
    backend == "gpu"
    and q.dtype in (jnp.bfloat16, jnp.float16)
    and head % 8 == 0
    and head <= 128
    and q.shape[1] * k.shape[1] >= 256 * 64
  )
  return "cudnn" if fits else "xla"


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  causal: bool = False,
  kernel: str | OnMesh = "auto",
) -> jax.Array:
  """Equation (1) for every head.

  Args:
    q: (n, l, heads, d).
    k, v: (n, m, heads, d).
    causal: a query sees no keys after its own position.
    kernel: one of `KERNELS`, wrapped in `OnMesh` on a mesh of several devices: without
      the wrapper "auto" takes the TPU's kernel on a single device only.

  Returns:
    (n, l, heads, d), in the type of `q`.
  """
  chex.assert_rank([q, k, v], 4)
  place = kernel if isinstance(kernel, OnMesh) else None
  kernel = place.kernel if place else kernel
  if kernel not in KERNELS:
    raise InputError(f"attention = {kernel!r} is unknown, expected one of {KERNELS}")
  platform = place.platform if place else jax.default_backend()
  if kernel == "auto":
    kernel = choose_kernel(q, k, platform)
    if kernel == "splash" and not (place or jax.device_count() == 1):
      kernel = "xla"
  head = q.shape[-1]
  if kernel == "cudnn" and head > 128:  # SD1.5 has heads of 160 where l is small
    kernel = "xla"
  if kernel == "splash" and (causal or not flash.takes(q.shape[1], k.shape[1], head)):
    kernel = "xla"
  if kernel == "splash":
    return flash.flash(q, k, v, place=place, interpret=platform != "tpu")
  compute: Callable[..., jax.Array] = partial(
    jax.nn.dot_product_attention, is_causal=causal, implementation=kernel
  )
  if kernel == "xla" and q.shape[1] * k.shape[1] >= RECOMPUTE_FROM:
    compute = jax.checkpoint(compute)
  return compute(q, k, v)


class Attention(nn.Module):
  """Multi-head attention of `x` (n, l, c) on `context` (n, m, e), by default on itself.

  to_q, to_k and to_v have no bias, to_out_0 has one.
  """

  heads: int
  dtype: Dtype = jnp.float32
  kernel: str | OnMesh = "auto"

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array | None = None) -> jax.Array:
    context = x if context is None else context
    n, length, c = x.shape
    project = partial(Dense, c, False, self.dtype)

    def split(tokens: jax.Array) -> jax.Array:
      return tokens.reshape(n, tokens.shape[1], self.heads, c // self.heads)

    q = split(project(name="to_q")(x))
    k = split(project(name="to_k")(context))
    v = split(project(name="to_v")(context))
    joined = attend(q, k, v, kernel=self.kernel).reshape(n, length, c)
    return Dense(c, dtype=self.dtype, name="to_out_0")(joined)


class GEGLU(nn.Module):
  """u · gelu(g) of equation (3), (..., c) → (..., features)."""

  features: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = Dense(2 * self.features, dtype=self.dtype, name="proj")(x)
    value, gate = jnp.split(x, 2, axis=-1)
    return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nn.Module):
  """Equation (3), four times as wide inside; (..., c) → same."""

  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    c = x.shape[-1]
    h = GEGLU(4 * c, dtype=self.dtype, name="net_0")(x)
    return Dense(c, dtype=self.dtype, name="net_2")(h)


class TransformerBlock(nn.Module):
  """Equation (2), (n, l, c) and context (n, m, e) → (n, l, c)."""

  heads: int
  dtype: Dtype = jnp.float32
  kernel: str | OnMesh = "auto"

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    attention = partial(Attention, self.heads, dtype=self.dtype, kernel=self.kernel)
    norm = partial(LayerNorm, dtype=self.dtype)
    x = x + attention(name="attn1")(norm(name="norm1")(x))
    x = x + attention(name="attn2")(norm(name="norm2")(x), context)
    return x + FeedForward(self.dtype, name="ff")(norm(name="norm3")(x))


class Transformer2D(nn.Module):
  """Transformer blocks over the pixels of an image, as a residual.

  (n, h, w, c) and context (n, m, e) → (n, h, w, c). `linear_projection` says whether
  proj_in and proj_out are stored as linear layers (SD 2, SDXL) or as 1×1 convolutions
  (SD 1); they compute the same. `block` is `TransformerBlock`, rematerialised or not.
  """

  heads: int
  layers: int
  groups: int
  linear_projection: bool = False
  dtype: Dtype = jnp.float32
  kernel: str | OnMesh = "auto"
  block: type[nn.Module] = TransformerBlock

  @nn.compact
  def __call__(self, x: jax.Array, context: jax.Array) -> jax.Array:
    n, h, w, c = x.shape
    project: Callable[..., Dense | Conv]
    if self.linear_projection:
      project = partial(Dense, c, dtype=self.dtype)
    else:
      project = partial(Conv, c, 1, dtype=self.dtype)
    # 1e-6 here, while the resnets beside it have the config's norm_eps (1e-5).
    tokens = GroupNorm(self.groups, 1e-6, self.dtype, name="norm")(x)
    tokens = project(name="proj_in")(tokens).reshape(n, h * w, c)
    for i in range(self.layers):
      name = f"transformer_blocks_{i}"
      tokens = self.block(self.heads, self.dtype, self.kernel, name=name)(
        tokens, context
      )
    return x + project(name="proj_out")(tokens.reshape(n, h, w, c))
