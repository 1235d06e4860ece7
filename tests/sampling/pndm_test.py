"""PNDM reads each field as diffusers does."""

import pytest

from safetydpo_jax import diffusion
from safetydpo_jax.errors import InputError
from safetydpo_jax.sampling.methods import make_sampler
from tests.support.checkpoints import SCHEDULER
from tests.support.schedulers import SD2, assert_equal

VARIANTS = {
  "Runge-Kutta": {"skip_prk_steps": False},
  "Runge-Kutta, v": {**SD2, "skip_prk_steps": False},
  "ends at 1": {"set_alpha_to_one": True, "steps_offset": 0},
}


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_field_of_the_config_counts_as_in_diffusers(fields):
  assert_equal("pndm", fields)


def test_runge_kutta_needs_four_steps():
  config = {**SCHEDULER, "skip_prk_steps": False}
  with pytest.raises(InputError, match=r"PNDM needs 4 or more.*skip_prk_steps"):
    make_sampler("pndm", diffusion.Schedule.from_config(config), 3)
