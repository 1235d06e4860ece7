"""LMS and DEIS read each field as diffusers does."""

import pytest

from tests.support.schedulers import SD2, assert_equal

SPREADS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
BOUNDS = {"sigma_min": 0.05, "sigma_max": 9.0}


@pytest.mark.parametrize("bounds", [{}, BOUNDS], ids=["free", "bounded"])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", ["lms", "deis"])
def test_sigmas_may_be_spread(name, spread, bounds):
  """LMS ignores the bounds with Karras' σ, and with these alone."""
  assert_equal(name, {**SD2, spread: True, **bounds})


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("lower", [True, False])
def test_deis_ends_in_lower_order_below_15_steps(order, lower):
  assert_equal("deis", {"solver_order": order, "lower_order_final": lower}, steps=14)


def test_deis_keeps_its_order_from_15_steps_on():
  assert_equal("deis", {"solver_order": 3}, steps=15)
