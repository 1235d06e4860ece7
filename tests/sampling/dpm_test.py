"""DPM-Solver reads each field as diffusers does."""

import pytest

from tests.support.schedulers import SD2, assert_equal

SPREADS = (
  "use_karras_sigmas",
  "use_exponential_sigmas",
  "use_beta_sigmas",
)
BOUNDS = {"sigma_min": 0.05, "sigma_max": 9.0}
TO_MIN = {"final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize("bounds", [{}, BOUNDS], ids=["free", "bounded"])
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_2s"])
def test_sigmas_may_be_spread(name, spread, bounds):
  assert_equal(name, {**SD2, spread: True, **bounds})


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver"])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2s"])
def test_orders_and_types_of_solvers(name, algorithm, order, solver):
  fields = {
    **SD2,
    **TO_MIN,
    "algorithm_type": algorithm,
    "solver_order": order,
    "solver_type": solver,
  }
  assert_equal(name, fields)


@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
  ("name", "algorithm"),
  [
    ("dpmpp_2m_sde", "sde-dpmsolver++"),
    ("dpmpp_2m_sde", "sde-dpmsolver"),
    ("dpmpp_2s", "sde-dpmsolver++"),
  ],
)
def test_solvers_with_noise(name, algorithm, order, solver):
  fields = {**SD2, **TO_MIN, "solver_order": order, "solver_type": solver}
  config = {**fields, "algorithm_type": algorithm}
  assert_equal(name, config, algorithm_type=algorithm)


@pytest.mark.parametrize("kind", ["epsilon", "sample"])
@pytest.mark.parametrize("algorithm", ["dpmsolver", "sde-dpmsolver"])
def test_solvers_for_the_noise_take_any_prediction(algorithm, kind):
  name = "dpmpp_2m_sde" if "sde" in algorithm else "dpmpp_2m"
  config = {**TO_MIN, "prediction_type": kind, "algorithm_type": algorithm}
  assert_equal(name, config, algorithm_type=algorithm)


@pytest.mark.parametrize("steps", [14, 15])
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2s"])
def test_the_end_is_of_lower_order_where_configured(name, order, lower, steps):
  """Multistep below 15 steps; single-step where steps do not divide evenly, too."""
  fields = {**SD2, **TO_MIN, "solver_order": order, "lower_order_final": lower}
  assert_equal(name, fields, steps)


VARIANTS = {
  "Lu's λ": ("dpmpp_2m", {"use_lu_lambdas": True}),
  "by Euler to the smallest σ": ("dpmpp_2m", {**TO_MIN, "euler_at_final": True}),
  "of order 3 to σ = 0": ("dpmpp_2m", {"solver_order": 3}),
  "single-step of order 3 to σ = 0": ("dpmpp_2s", {"solver_order": 3}),
  "another class's solver type": ("dpmpp_2m", {"solver_type": "logrho"}),
  "another class's algorithm": ("dpmpp_2m", {**TO_MIN, "algorithm_type": "deis"}),
  "a λ below all of the schedule": ("dpmpp_2m", {"lambda_min_clipped": -5.1}),
  "a fixed variance": ("dpmpp_2m", {"variance_type": "fixed_small"}),
}


@pytest.mark.parametrize(("name", "fields"), VARIANTS.values(), ids=VARIANTS)
def test_every_field_of_the_config_counts_as_in_diffusers(name, fields):
  assert_equal(name, fields)


def test_the_name_of_a_sampler_comes_before_the_configs_algorithm():
  config = {"algorithm_type": "sde-dpmsolver++"}
  assert_equal("dpmpp_2m", config, algorithm_type="dpmsolver++")
