"""Every sampler ends where diffusers' scheduler of the same config ends."""

import re
from typing import get_args
from unittest import mock

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.schedulers import scheduling_euler_ancestral_discrete as ancestral

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

TOLERANCE = 1e-4
STEPS = 20
SD2 = {**SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
SDXL = {
  **SCHEDULER,
  "_class_name": "EulerDiscreteScheduler",
  "interpolation_type": "linear",
  "sample_max_value": 1.0,
  "timestep_spacing": "leading",
  "use_karras_sigmas": False,
}
KINDS = {
  "ddim": ("epsilon", "v_prediction", "sample"),
  "pndm": ("epsilon", "v_prediction"),
  "euler": ("epsilon", "v_prediction", "sample"),
  "euler_ancestral": ("epsilon", "v_prediction"),
  "dpmpp_2m": ("epsilon", "v_prediction", "sample"),
}
THEIRS = {ours: theirs for theirs, ours in CLASSES.items()}


@pytest.fixture(scope="module")
def noises():
  """Initial latents, and noise for every step: (STEPS + 1, n, h, w, c)."""
  rng = np.random.default_rng(0)
  return rng.standard_normal((STEPS + 1, 2, 3, 2, 4)).astype(np.float32)


def sample_theirs(name, config, noises, steps, gain):
  """diffusers' scheduler around the model y = gain · sin(0.3 x) · cos(t / 300)."""
  scheduler = getattr(diffusers, THEIRS[name]).from_config(config)
  scheduler.set_timesteps(steps)
  latents = torch.from_numpy(noises[0]) * scheduler.init_noise_sigma
  draws = list(torch.from_numpy(noises[1:]))
  with mock.patch.object(ancestral, "randn_tensor", side_effect=draws):
    for timestep in scheduler.timesteps:
      scaled = scheduler.scale_model_input(latents, timestep)
      prediction = gain * torch.sin(0.3 * scaled) * torch.cos(timestep / 300)
      latents = scheduler.step(prediction, timestep, latents).prev_sample
  return latents.numpy()


def sample_ours(name, config, noises, steps, gain):
  """The same model and noises."""
  schedule = diffusion.Schedule.from_config(config)
  sampler = make_sampler(name, schedule, steps)

  def predict(latents, timestep):
    return gain * jnp.sin(0.3 * latents) * jnp.cos(timestep / 300)

  draws = jnp.asarray(noises[1:])
  return jax.jit(lambda x: sampler(predict, x, lambda step: draws[step]))(noises[0])


def assert_equal(name, config, noises, steps=STEPS):
  gain = 4 if config["prediction_type"] == "sample" else 1
  expected = sample_theirs(name, config, noises, steps, gain)
  assert expected.std() > 0.02, "an output near zero would agree with anything"
  ours = sample_ours(name, config, noises, steps, gain)
  np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize(
  ("name", "kind"), [(name, kind) for name in KINDS for kind in KINDS[name]]
)
def test_final_latents_equal_diffusers(name, kind, spacing, noises):
  config = {**SCHEDULER, "prediction_type": kind, "timestep_spacing": spacing}
  assert_equal(name, config, noises)


VARIANTS = {
  "pndm with Runge-Kutta": ("pndm", {"skip_prk_steps": False}),
  "pndm with Runge-Kutta, v": ("pndm", {**SD2, "skip_prk_steps": False}),
  "pndm that ends at 1": ("pndm", {"set_alpha_to_one": True, "steps_offset": 0}),
  "ddim clipped to another range": (
    "ddim",
    {"clip_sample": True, "clip_sample_range": 0.7},
  ),
  "ddim, no terminal signal": ("ddim", {**SD2, "rescale_betas_zero_snr": True}),
  "euler, Karras": ("euler", {"use_karras_sigmas": True}),
  "euler, Karras, bounds": (
    "euler",
    {"use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 9.0},
  ),
  "euler to the smallest σ": ("euler", {"final_sigmas_type": "sigma_min"}),
  "euler, no terminal signal": ("euler", {**SD2, "rescale_betas_zero_snr": True}),
  "ancestral, no terminal signal": (
    "euler_ancestral",
    {**SD2, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
  ),
  "ancestral passes over Karras": ("euler_ancestral", {"use_karras_sigmas": True}),
  "pndm passes over zero SNR": ("pndm", {**SD2, "rescale_betas_zero_snr": True}),
  "dpm, Karras": ("dpmpp_2m", {"use_karras_sigmas": True}),
  "dpm, Karras, v": ("dpmpp_2m", {**SD2, "use_karras_sigmas": True}),
  "dpm to the smallest σ": ("dpmpp_2m", {"final_sigmas_type": "sigma_min"}),
  "dpm to the smallest σ by Euler": (
    "dpmpp_2m",
    {"final_sigmas_type": "sigma_min", "euler_at_final": True},
  ),
  "dpm, Heun": ("dpmpp_2m", {"solver_type": "heun"}),
  "dpm of order 1": ("dpmpp_2m", {"solver_order": 1}),
  "dpm, no terminal signal": (
    "dpmpp_2m",
    {**SD2, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
  ),
}


@pytest.mark.parametrize(("name", "fields"), VARIANTS.values(), ids=VARIANTS)
def test_every_field_of_the_config_counts_as_in_diffusers(name, fields, noises):
  config = {**SCHEDULER, **fields}
  assert_equal(name, config, noises)


@pytest.mark.parametrize("lower", [True, False])
def test_dpm_ends_in_lower_order_below_15_steps(lower, noises):
  fields = {"final_sigmas_type": "sigma_min", "lower_order_final": lower}
  assert_equal("dpmpp_2m", {**SCHEDULER, **fields}, noises, steps=14)


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("name", ["pndm", "euler", "dpmpp_2m"])
def test_few_steps_do_without_a_past(name, steps, noises):
  assert_equal(name, SCHEDULER, noises, steps)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("config", [SD2, SDXL], ids=["sd2", "sdxl"])
def test_any_sampler_takes_another_ones_config(config, name, noises):
  """Absent fields have the defaults of the class that samples; others are no matter."""
  config = {key: value for key, value in config.items() if key != "timestep_spacing"}
  assert_equal(name, config, noises, steps=7)


def test_the_names_of_samplers_are_the_table():
  assert set(get_args(Name)) == set(METHODS) == set(CLASSES.values()) == set(KINDS)


def test_a_class_of_diffusers_names_its_sampler():
  for name in CLASSES:
    assert name_of(name) in METHODS
    assert hasattr(diffusers, name)
  with pytest.raises(
    InputError, match=r"scheduler is 'LMSDiscreteScheduler'.* give --sampler, one of"
  ):
    name_of("LMSDiscreteScheduler")


REFUSED = [
  ("ddim", {"thresholding": True}),
  ("pndm", {"prediction_type": "sample"}),
  ("euler", {"use_beta_sigmas": True}),
  ("euler", {"interpolation_type": "log_linear"}),
  ("euler", {"final_sigmas_type": "other"}),
  ("euler_ancestral", {"prediction_type": "sample"}),
  ("dpmpp_2m", {"algorithm_type": "sde-dpmsolver++"}),
  ("dpmpp_2m", {"solver_order": 3}),
  ("dpmpp_2m", {"lambda_min_clipped": -5.1}),
  ("dpmpp_2m", {"use_flow_sigmas": True}),
  ("dpmpp_2m", {"timestep_spacing": "squared"}),
]


@pytest.mark.parametrize(("name", "fields"), REFUSED)
def test_what_would_change_the_result_is_refused_by_name(name, fields):
  schedule = diffusion.Schedule.from_config({**SCHEDULER, **fields})
  ((field, value),) = fields.items()
  with pytest.raises(
    InputError, match=re.escape(f"{field}") + " (= )?" + re.escape(repr(value))
  ):
    make_sampler(name, schedule, STEPS)


def test_noise_without_any_signal_says_nothing_of_the_image():
  config = {**SCHEDULER, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
  with pytest.raises(InputError, match=r"'epsilon' .*rescale_betas_zero_snr"):
    make_sampler("ddim", diffusion.Schedule.from_config(config), STEPS)


@pytest.mark.parametrize(
  ("name", "steps"), [("euler", 0), ("dpmpp_2m", 1000), ("pndm", 1001)]
)
def test_a_number_of_steps_outside_the_schedule_is_refused(name, steps):
  schedule = diffusion.Schedule.from_config(SCHEDULER)
  with pytest.raises(InputError, match=f"steps is {steps}; expected 1 to"):
    make_sampler(name, schedule, steps)


def test_runge_kutta_needs_four_steps():
  config = {**SCHEDULER, "skip_prk_steps": False}
  with pytest.raises(InputError, match=r"PNDM needs 4 or more.*skip_prk_steps"):
    make_sampler("pndm", diffusion.Schedule.from_config(config), 3)
