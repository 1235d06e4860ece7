"""Settings of the conditioning: what is accepted, and what SDXL is told."""

import pytest

from safetydpo_jax import load_pipeline
from safetydpo_jax.errors import InputError
from safetydpo_jax.sampling import text_settings
from safetydpo_jax.sampling.text_settings import TextSettings
from tests.support.checkpoints import save_tiny_sdxl_checkpoint


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"clip_skip": -1}, "--clip_skip is -1"),
    ({"original_size": "512"}, "--original_size is '512'; expected H,W"),
    ({"original_size": "0,512"}, "--original_size is '0,512'"),
    ({"target_size": "1e3,512"}, "--target_size"),
    ({"crop_top_left": "-1,0"}, "--crop_top_left is '-1,0'; expected Y,X"),
    ({"negative_original_size": "8,8"}, "are needed together"),
    ({"negative_target_size": "8,8"}, "are needed together"),
    ({"negative_crop_top_left": "8,8"}, "are needed together"),
  ],
)
def test_values_out_of_range_are_one_line(options, message):
  with pytest.raises(InputError, match=message):
    TextSettings(**options)


@pytest.mark.parametrize(
  ("options", "ids", "negative_ids", "manifest"),
  [
    ({}, (6, 8, 0, 0, 6, 8), (6, 8, 0, 0, 6, 8), None),
    (
      {"original_size": "6,8", "crop_top_left": "0, 0", "clip_skip": 0},
      (6, 8, 0, 0, 6, 8),
      (6, 8, 0, 0, 6, 8),
      None,
    ),
    (
      {"original_size": "1,2", "crop_top_left": "3,4", "target_size": "5,6"},
      (1, 2, 3, 4, 5, 6),
      (1, 2, 3, 4, 5, 6),
      {"original_size": [1, 2], "crop_top_left": [3, 4], "target_size": [5, 6]},
    ),
    (
      {
        "crop_top_left": "3,4",
        "negative_original_size": "1,2",
        "negative_target_size": "5,6",
        "prompt_style": "long",
        "clip_skip": 2,
      },
      (6, 8, 3, 4, 6, 8),
      (1, 2, 0, 0, 5, 6),
      {
        "prompt_style": "long",
        "clip_skip": 2,
        "crop_top_left": [3, 4],
        "negative_original_size": [1, 2],
        "negative_target_size": [5, 6],
      },
    ),
  ],
)
def test_sizes_and_what_the_manifest_says(options, ids, negative_ids, manifest):
  settings = TextSettings(**options)
  assert text_settings.time_ids(settings, 6, 8) == (ids, negative_ids)
  assert text_settings.to_manifest(settings, 6, 8) == manifest


def test_the_web_ui_skips_layers_of_the_negative_prompt_too():
  skips = {
    style: text_settings.clip_skips(TextSettings(prompt_style=style, clip_skip=1))
    for style in ("plain", "long", "a1111")
  }
  assert skips == {"plain": (1, 0), "long": (1, 0), "a1111": (1, 1)}


def test_settings_that_the_model_cannot_have_are_refused(tiny_checkpoint, tmp_path):
  one = load_pipeline(tiny_checkpoint, components=())
  text_settings.check_fits(TextSettings(clip_skip=1), one)
  with pytest.raises(InputError, match="--clip_skip is 2; expected 0 to 1"):
    text_settings.check_fits(TextSettings(clip_skip=2), one)
  sized = TextSettings(crop_top_left="8,0")
  with pytest.raises(InputError, match="--crop_top_left is for Stable Diffusion XL"):
    text_settings.check_fits(sized, one)
  two = save_tiny_sdxl_checkpoint(tmp_path / "sdxl")
  text_settings.check_fits(sized, load_pipeline(two, components=()))
