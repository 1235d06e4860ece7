"""Models as shapes: the built-in ones are the published ones."""

import pytest

from safetydpo_jax.formats.base_model.pipeline import parameter_shapes
from safetydpo_jax.models import published
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition
from safetydpo_jax.planning import shapes


@pytest.mark.parametrize(
  ("name", "unet", "encoders"),
  [
    ("sd15", published.SD15_UNET, [published.CLIP_L]),
    ("sdxl", published.SDXL_UNET, [published.CLIP_L, published.CLIP_BIGG]),
  ],
)
def test_built_in_models_have_the_published_shapes(name, unet, encoders):
  ours, _, texts, _ = shapes.read_configs(name)
  modules = [UNet2DCondition(freeze(ours)), *(CLIPText(freeze(x)) for x in texts)]
  theirs = [UNet2DCondition(freeze(unet)), *(CLIPText(freeze(x)) for x in encoders)]
  for mine, other in zip(modules, theirs, strict=True):
    assert parameter_shapes(mine) == parameter_shapes(other)
