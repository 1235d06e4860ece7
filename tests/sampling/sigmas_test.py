"""Euler, Euler ancestral, Heun and DPM++ SDE read each field as diffusers does."""

import pytest

from tests.support.schedulers import SD2, assert_equal

SPREADS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
BOUNDS = {"sigma_min": 0.05, "sigma_max": 9.0}


@pytest.mark.parametrize("bounds", [{}, BOUNDS], ids=["free", "bounded"])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_sde"])
def test_sigmas_may_be_spread(name, spread, bounds):
  """DPM++ SDE ignores the bounds with Karras' σ, and with these alone."""
  assert_equal(name, {**SD2, spread: True, **bounds})


VARIANTS = {
  "euler to the smallest σ": ("euler", {"final_sigmas_type": "sigma_min"}),
  "euler in log σ": ("euler", {**SD2, "timestep_type": "continuous"}),
  "euler's log σ are for v alone": ("euler", {"timestep_type": "continuous"}),
  "ancestral passes over Karras": ("euler_ancestral", {"use_karras_sigmas": True}),
  "heun, clipped": ("heun", {"clip_sample": True, "clip_sample_range": 0.7}),
}


@pytest.mark.parametrize(("name", "fields"), VARIANTS.values(), ids=VARIANTS)
def test_every_field_of_the_config_counts_as_in_diffusers(name, fields):
  assert_equal(name, fields)
