"""Every sampler ends where diffusers' scheduler of the same config ends."""

import inspect
import re
from typing import get_args

import diffusers
import pytest

from safetydpo_jax import diffusion
from safetydpo_jax.errors import InputError
from safetydpo_jax.sampling.methods import (
  CLASSES,
  METHODS,
  Name,
  make_sampler,
  name_of,
)
from tests.support.checkpoints import SCHEDULER
from tests.support.schedulers import KINDS, SD2, SDXL, ZERO_SNR, assert_equal, class_of

SPACINGS = {"epsilon": "leading", "v_prediction": "trailing", "sample": "linspace"}


@pytest.mark.parametrize(
  ("name", "kind"), [(name, kind) for name in KINDS for kind in KINDS[name]]
)
def test_final_latents_equal_diffusers(name, kind):
  assert_equal(name, {"prediction_type": kind, "timestep_spacing": SPACINGS[kind]})


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", KINDS)
def test_few_steps_do_without_a_past(name, steps):
  assert_equal(name, SD2, steps)


@pytest.mark.parametrize("name", KINDS)
def test_a_schedule_without_terminal_signal(name):
  """Classes that do not know the field pass over it, and so do we."""
  assert_equal(name, ZERO_SNR)


# Parameters of diffusers' classes that change nothing here, at whatever value.
NEUTRAL = {
  "dynamic_thresholding_ratio": 0.9,  # of thresholding, which is refused
  "sample_max_value": 2.0,
  "flow_shift": 3.0,  # of flow matching, which is refused
  "time_shift_type": "exponential",
  "noise_sampler_seed": 3,  # noise is from the rows' seeds
}
NEUTRAL_FOR = {
  "lcm": {"timestep_spacing": "trailing", "steps_offset": 3, "set_alpha_to_one": False},
  "tcd": {
    "timestep_spacing": "trailing",
    "steps_offset": 3,
    "set_alpha_to_one": False,
    "clip_sample": True,
    "clip_sample_range": 0.1,
    "thresholding": True,
    "timestep_scaling": 3.0,
  },
}
# Read from any config, though in few signatures.
HIDDEN = {"sigma_min", "sigma_max"}


@pytest.mark.parametrize("name", METHODS)
def test_every_parameter_of_diffusers_class_is_read_refused_or_neutral(name):
  parameters = inspect.signature(class_of(name).__init__).parameters
  theirs = {key: p.default for key, p in parameters.items() if key != "self"}
  method, neutral = METHODS[name], {**NEUTRAL, **NEUTRAL_FOR.get(name, {})}
  for field, default in theirs.items():
    default = tuple(default) if isinstance(default, list) else default
    if field in method.fields:
      ours = method.fields[field]
      if field != "algorithm_type" or name != "dpmpp_2m_sde":
        assert ours == default, field
    assert default in method.accepted.get(field, (default,)), field
    known = {*method.fields, *method.accepted, *neutral}
    assert field in known, f"{field} is passed over"
  assert {*method.fields, *method.accepted} <= {*theirs, *HIDDEN}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("config", [SD2, SDXL], ids=["sd2", "sdxl"])
def test_any_sampler_takes_another_ones_config(config, name):
  """Absent fields have the defaults of the class that samples; others are no matter."""
  config = {key: value for key, value in config.items() if key != "timestep_spacing"}
  more = {**NEUTRAL, "variance_type": "fixed_small", **NEUTRAL_FOR.get(name, {})}
  known = inspect.signature(class_of(name).__init__).parameters
  more = {field: value for field, value in more.items() if field in known}
  assert_equal(name, {**config, **more}, steps=7)


@pytest.mark.parametrize("name", ["heun", "dpmpp_sde", "lcm", "tcd"])
def test_a_config_without_betas_has_those_of_the_samplers_class(name):
  given = dict.fromkeys(("beta_start", "beta_end", "beta_schedule"))
  assert_equal(name, SD2, leave_out=given)


def test_the_names_of_samplers_are_the_table():
  assert set(get_args(Name)) == set(METHODS) == set(KINDS)


def test_a_class_of_diffusers_names_its_sampler():
  for name in CLASSES:
    assert name_of(name, {}) in METHODS
    assert hasattr(diffusers, name)
  with pytest.raises(
    InputError, match=r"scheduler is 'KDPM2DiscreteScheduler'.* give --sampler, one of"
  ):
    name_of("KDPM2DiscreteScheduler", {})


@pytest.mark.parametrize(
  ("kind", "name"),
  [
    ("dpmsolver++", "dpmpp_2m"),
    ("dpmsolver", "dpmpp_2m"),
    ("sde-dpmsolver++", "dpmpp_2m_sde"),
    ("sde-dpmsolver", "dpmpp_2m_sde"),
  ],
)
def test_a_field_decides_between_the_variants_of_a_class(kind, name):
  config = {"algorithm_type": kind}
  assert name_of("DPMSolverMultistepScheduler", config) == name


REFUSED = [
  ("ddim", {"thresholding": True}),
  ("pndm", {"prediction_type": "sample"}),
  ("euler", {"interpolation_type": "log_linear"}),
  ("euler", {"final_sigmas_type": "other"}),
  ("euler_ancestral", {"prediction_type": "sample"}),
  ("dpmpp_sde", {"prediction_type": "sample"}),
  ("dpmpp_2m", {"solver_order": 4}),
  ("dpmpp_2m", {"variance_type": "learned_range"}),
  ("dpmpp_2m", {"lambda_min_clipped": -2.1}),
  ("dpmpp_2m", {"use_flow_sigmas": True}),
  ("dpmpp_2m", {"timestep_spacing": "squared"}),
  ("dpmpp_2m", {"algorithm_type": "dpmsolver"}),  # to σ = 0
  ("dpmpp_2m_sde", {"solver_order": 3}),
  ("dpmpp_2s", {"solver_type": "other"}),
  ("unipc", {"shift_terminal": 0.1}),
  ("deis", {"use_dynamic_shifting": True}),
  ("ddpm", {"variance_type": "learned"}),
  ("ddpm", {"variance_type": "fixed_large_log"}),
  ("lcm", {"original_inference_steps": 1001}),
  ("lcm", {"thresholding": True}),
  ("heun", {"use_karras_sigmas": "yes"}),
  ("heun", {"sigma_min": "small"}),
  ("euler", {"steps_offset": 0.5}),
  ("unipc", {"disable_corrector": 3}),
]


@pytest.mark.parametrize(("name", "fields"), REFUSED)
def test_what_would_change_the_result_is_refused_by_name(name, fields):
  schedule = diffusion.Schedule.from_config({**SCHEDULER, **fields})
  ((field, value),) = fields.items()
  with pytest.raises(
    InputError, match=re.escape(f"{field}") + " (= )?" + re.escape(repr(value))
  ):
    make_sampler(name, schedule, 20)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "lcm", "tcd"])
def test_noise_without_any_signal_says_nothing_of_the_image(name):
  config = {**ZERO_SNR, "prediction_type": "epsilon"}
  with pytest.raises(InputError, match=r"'epsilon' .*rescale_betas_zero_snr"):
    make_sampler(name, diffusion.Schedule.from_config(config), 20)


@pytest.mark.parametrize(
  ("name", "steps"),
  [("euler", 0), ("dpmpp_2m", 1000), ("pndm", 1001), ("lcm", 51), ("tcd", 0)],
)
def test_a_number_of_steps_outside_the_schedule_is_refused(name, steps):
  schedule = diffusion.Schedule.from_config(SCHEDULER)
  with pytest.raises(InputError, match=f"steps is {steps}; expected 1 to"):
    make_sampler(name, schedule, steps)


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("unipc", {"lower_order_final": False}),
    ("unipc", {"predict_x0": False}),
  ],
)
def test_a_division_by_zero_is_an_error_and_no_picture(name, fields):
  """diffusers gives NaN."""
  schedule = diffusion.Schedule.from_config({**SCHEDULER, **fields})
  with pytest.raises(InputError, match=r"division by zero.*--sampler"):
    make_sampler(name, schedule, 20)


def test_spread_sigmas_are_of_one_kind_and_between_positive_bounds():
  both = {"use_karras_sigmas": True, "use_beta_sigmas": True}
  low = {"use_karras_sigmas": True, "sigma_min": -1.0}
  for fields, message in ((both, "karras.* and use_beta"), (low, "sigma_min -1.0")):
    schedule = diffusion.Schedule.from_config({**SCHEDULER, **fields})
    with pytest.raises(InputError, match=message):
      make_sampler("euler", schedule, 20)


@pytest.mark.parametrize("value", [10**400, float("nan"), float("inf"), True, "1"])
@pytest.mark.parametrize("field", ["sigma_min", "steps_offset"])
def test_a_number_that_is_none_is_refused(field, value):
  schedule = diffusion.Schedule.from_config({**SDXL, field: value})
  with pytest.raises(InputError, match=rf"{field} = .*; expected a value like"):
    make_sampler("euler", schedule, 20)
