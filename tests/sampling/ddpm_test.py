"""DDPM, LCM and TCD read each field as diffusers does."""

import pytest

from tests.support.schedulers import SD2, assert_equal


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize(
  "variance", ["fixed_small", "fixed_small_log", "fixed_large", None]
)
def test_variances_of_ddpm(variance, spacing):
  """The last step adds noise unless it is at timestep 0, as linspace has it."""
  assert_equal(
    "ddpm", {**SD2, "variance_type": variance, "timestep_spacing": spacing}, 4
  )


@pytest.mark.parametrize("name", ["ddpm", "lcm"])
def test_images_are_clipped_where_the_config_says_so(name):
  assert_equal(name, {"clip_sample": True, "clip_sample_range": 0.7})


@pytest.mark.parametrize("original", [1000, 333, 20])
@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_steps_are_some_of_those_of_the_distillation(name, original):
  assert_equal(name, {"original_inference_steps": original})


def test_the_scale_of_timesteps_in_lcms_boundary_condition():
  assert_equal("lcm", {"timestep_scaling": 0.001}, steps=4)
