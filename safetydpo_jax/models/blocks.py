"""The blocks a UNet is stacked from: one resolution level down, the middle, one up.

Every resnet and transformer block is a unit of rematerialisation: with `remat` the
backward pass recomputes it instead of keeping its activations. Parameter names do not
depend on `remat`.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from safetydpo_jax.models.attention import Transformer2D, TransformerBlock
from safetydpo_jax.models.config import choose
from safetydpo_jax.models.flash import OnMesh
from safetydpo_jax.models.layers import Downsample, Dtype, ResnetBlock, Upsample

_CHECKPOINT_POLICIES = jax.checkpoint_policies
# What is stored for the backward pass besides the inputs of the blocks. "dots" also
# keeps convolutions, so that only elementwise work and attention's matrix are redone.
REMAT = {
  "none": None,
  "full": _CHECKPOINT_POLICIES.nothing_saveable,
  "dots": _CHECKPOINT_POLICIES.save_from_both_policies(
    _CHECKPOINT_POLICIES.dots_with_no_batch_dims_saveable,
    lambda primitive, *_, **__: primitive is jax.lax.conv_general_dilated_p,
  ),
}


class BlockSettings(NamedTuple):
  """What all blocks of one UNet have in common."""

  groups: int
  epsilon: float
  linear_projection: bool
  dtype: Dtype
  remat: str
  attention: str | OnMesh

  def rematerialised(self, block: type[nn.Module]) -> type[nn.Module]:
    """`block`, recomputed in the backward pass as `remat` says."""
    policy = choose(REMAT, self.remat, "UNet", "remat")
    return block if policy is None else nn.remat(block, policy=policy)

  def resnet(self, features: int, name: str) -> nn.Module:
    block = self.rematerialised(ResnetBlock)
    return block(features, self.groups, self.epsilon, self.dtype, name=name)

  def transformer(self, heads: int, layers: int, name: str) -> nn.Module:
    return Transformer2D(
      heads,
      layers,
      self.groups,
      self.linear_projection,
      self.dtype,
      self.attention,
      self.rematerialised(TransformerBlock),
      name=name,
    )


class Level(NamedTuple):
  """The sizes of one resolution level, read from the config."""

  features: int
  resnets: int
  heads: int
  transformer_layers: tuple[int, ...]  # one for each resnet; (): no transformers


class DownBlock(nn.Module):
  """One level on the way down; returns the image and what is kept for the way up."""

  level: Level
  settings: BlockSettings
  downsample: bool

  @nn.compact
  def __call__(self, x, time, context):
    level, settings = self.level, self.settings
    kept = []
    for i in range(level.resnets):
      x = settings.resnet(level.features, f"resnets_{i}")(x, time)
      if level.transformer_layers:
        transformer = settings.transformer(
          level.heads, level.transformer_layers[i], f"attentions_{i}"
        )
        x = transformer(x, context)
      kept.append(x)
    if self.downsample:
      x = Downsample(dtype=settings.dtype, name="downsamplers_0")(x)
      kept.append(x)
    return x, kept


class MidBlock(nn.Module):
  """The lowest level: resnet, and if it attends, transformer and resnet."""

  level: Level
  settings: BlockSettings

  @nn.compact
  def __call__(self, x, time, context):
    level, settings = self.level, self.settings
    x = settings.resnet(level.features, "resnets_0")(x, time)
    if level.transformer_layers:
      transformer = settings.transformer(
        level.heads, level.transformer_layers[0], "attentions_0"
      )
      x = transformer(x, context)
      x = settings.resnet(level.features, "resnets_1")(x, time)
    return x


class UpBlock(nn.Module):
  """One level on the way up; `kept` holds one image for every resnet, used last first.

  `size` is the next level's (h, w), or None at the last, which does not enlarge.
  """

  level: Level
  settings: BlockSettings

  @nn.compact
  def __call__(self, x, kept, time, context, size):
    level, settings = self.level, self.settings
    for i in range(level.resnets):
      x = jnp.concatenate([x, kept[-1 - i]], axis=-1)
      x = settings.resnet(level.features, f"resnets_{i}")(x, time)
      if level.transformer_layers:
        transformer = settings.transformer(
          level.heads, level.transformer_layers[i], f"attentions_{i}"
        )
        x = transformer(x, context)
    if size is not None:
      x = Upsample(settings.dtype, name="upsamplers_0")(x, size)
    return x
