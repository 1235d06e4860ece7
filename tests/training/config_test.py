"""What of a config makes another run, and what cannot work."""

import json
from types import SimpleNamespace

import pytest

from configs import base
from safetydpo_jax.errors import InputError
from safetydpo_jax.training.config import LATER, check_config, run_settings

MADE_OF = SimpleNamespace(fingerprint="0123")


def settings(**changes):
  config = base.get_config()
  with config.unlocked():
    config.update_from_flattened_dict(changes)
  return run_settings(config, MADE_OF, MADE_OF)


def test_options_that_came_later_are_named_only_where_they_are_on():
  """A checkpoint from before them has no such names, and goes on."""
  later = set(LATER)
  assert not later & set(settings())
  on = {
    "schedule": "cosine",
    "lora.dropout": 0.1,
    "lora.rank_pattern": (("conv1", 8),),
    "lora.alpha_pattern": (("conv1", 8.0),),
    "lora.init": "before",
  }
  assert later & set(settings(**on)) == later == set(on)


def test_settings_are_what_json_gives_back():
  found = settings(**{"lora.rank_pattern": (("conv1", 8),)})
  assert json.loads(json.dumps(found)) == found


def test_what_changes_no_result_is_left_out():
  changes = {"remat": "full", "accumulation": 2, "mesh.fsdp": 4, "steps": 5}
  assert settings(**changes) == settings()
  assert settings(seed=1) != settings()


@pytest.mark.parametrize("rate", [-0.1, 1.0, 2.0])
def test_a_dropout_that_is_no_share_is_named(rate):
  config = base.get_config()
  config.lora.dropout = rate
  with pytest.raises(InputError, match=r"config\.lora\.dropout is .*below 1"):
    check_config(config)
