"""UniPC reads each field as diffusers does."""

import pytest

from tests.support.schedulers import SD2, assert_equal

SPREADS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
BOUNDS = {"sigma_min": 0.05, "sigma_max": 9.0}
TO_MIN = {"final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize("bounds", [{}, BOUNDS], ids=["free", "bounded"])
@pytest.mark.parametrize("spread", SPREADS)
def test_sigmas_may_be_spread(spread, bounds):
  assert_equal("unipc", {**SD2, spread: True, **bounds})


@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("clean", [True, False])
def test_orders_and_types_of_solvers(clean, order, solver):
  fields = {"predict_x0": clean, "solver_order": order, "solver_type": solver}
  assert_equal("unipc", {**SD2, **TO_MIN, **fields})


VARIANTS = {
  "steps without a corrector": {"disable_corrector": [0, 3]},
  "another class's solver type": {"solver_type": "midpoint"},
  "to its own smallest σ": {**TO_MIN, "use_karras_sigmas": True, **BOUNDS},
  "in full order to the end": {**TO_MIN, "lower_order_final": False},
  "for the noise, from the image": {
    **TO_MIN,
    "predict_x0": False,
    "prediction_type": "sample",
  },
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_field_of_the_config_counts_as_in_diffusers(fields):
  assert_equal("unipc", fields)
