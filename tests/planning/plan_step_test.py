"""Options of a plan, and the batch it is made for."""

from pathlib import Path

import pytest

from safetydpo_jax.errors import InputError
from safetydpo_jax.planning.chips import read_topology
from safetydpo_jax.planning.plan_step import PlanOptions, settle_batch
from tests.support.configs import run_config


def test_an_accumulation_that_does_not_divide_is_lowered_and_said():
  asked = run_config("hate", accumulation=4)
  config, note = settle_batch(asked, read_topology("v5e:4x4"))
  assert (asked.accumulation, config.accumulation) == (4, 1)
  assert "planned with --config.accumulation=1" in note


def test_an_accumulation_that_divides_is_left_alone():
  asked = run_config("hate", accumulation=4)
  assert settle_batch(asked, read_topology("v5e:2x2")) == (asked, "")


def test_a_batch_that_the_chips_cannot_share_is_named():
  with pytest.raises(InputError, match=r"config\.batch_size is 16 .* 64 chips"):
    settle_batch(run_config(), read_topology("v6e:8x8"))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"topology": "v7:1"}, "--topology v7:1"),
    ({"topology": "gpu:h100x8", "largest_batch": True}, "--largest_batch"),
    ({"topology": "v5e:2x2", "json": Path("nowhere/a.json")}, "--json nowhere/a.json"),
  ],
)
def test_options_out_of_range_are_named(options, message):
  with pytest.raises(InputError, match=message):
    PlanOptions(config="hate", **options)
