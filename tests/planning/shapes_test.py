"""Models as shapes: the built-in ones are the published ones."""

import pytest

from safetydpo_jax.formats.base_model.configs import image_size
from safetydpo_jax.formats.base_model.pipeline import load_pipeline, parameter_shapes
from safetydpo_jax.models import published
from safetydpo_jax.models.clip import CLIPText
from safetydpo_jax.models.config import freeze
from safetydpo_jax.models.unet import UNet2DCondition
from safetydpo_jax.planning import shapes
from tests.support.edits import edited_copy


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


def test_a_directory_has_the_size_that_it_is_trained_at(tiny_checkpoint, tmp_path):
  """A UNet from before diffusers 0.9, whose sample_size of 8 means 64."""
  file, changes = "unet/config.json", {"_diffusers_version": "0.6.0"}
  model = edited_copy(tiny_checkpoint, tmp_path / "model", file, **changes)
  unet, vae, *_ = shapes.read_configs(str(model))
  assert image_size(unet, vae) == (128, 128)
  assert image_size(unet, vae) == load_pipeline(model, components=()).image_size
